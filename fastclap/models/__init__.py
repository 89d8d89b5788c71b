"""The dual encoder and its parts: towers, heads, tokenizer, model folders, foreign checkpoints."""
