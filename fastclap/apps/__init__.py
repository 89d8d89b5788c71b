"""What is done with a trained model: embed, search, rerank, score."""
