"""Text towers: tokenized captions in, one vector a caption out.

There are a small transformer to be trained from scratch and the encoders of transformers. Where the host knows how many
tokens a caption has, little or nothing is computed on padding: captions are packed one after the other, or grouped by
length.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fastclap.config import TextTowerConfig
from fastclap.errors import ConfigError
from fastclap.models.freezing import Stages, transformer_layers
from fastclap.models.layers import Transformer, length_mask, masked_mean, no_grad_if
from fastclap.models.packing import (
    Packing,
    has_sharded_parts,
    length_groups,
    longest_of,
    to_device,
    use_packed_attention,
)
from fastclap.models.pooling import Pooling
from fastclap.models.pretrained import (
    checkpoint_layers,
    compile_layers,
    complete_config,
    graphs_of,
    transformers_config,
    transformers_model,
)
from fastclap.models.sizes import check_counts, one_error


class TextTower(nn.Module):
    """What every text tower has: `width` of the output, `vocab_size` and the transformers configuration, if any."""

    width: int
    vocab_size: int
    frozen: bool = False  # nothing trains but what `combine` learns
    hf_config: dict[str, Any] | None = None

    def forward(
        self,
        input_ids: Tensor,  # int64 [B, tokens]
        attention_mask: Tensor,  # [B, tokens], 1 on tokens
        token_counts: Sequence[int] | None = None,  # tokens of each row, padded on the right; leaves padding out
    ) -> Tensor:  # [B, width]
        with no_grad_if(self.frozen):
            summary = self.summarize(input_ids, attention_mask, token_counts)
        return self.combine(summary)

    def summarize(
        self,
        input_ids: Tensor,  # the arguments are those of `forward`
        attention_mask: Tensor,
        token_counts: Sequence[int] | None = None,
    ) -> Tensor:  # [B, ...]
        """What the encoder says of each caption: all of the tower that `freeze` keeps fixed."""
        raise NotImplementedError

    def combine(
        self,
        summary: Tensor,  # [B, ...]
    ) -> Tensor:  # [B, width]
        """The tower's vectors from the summaries; what is learned in here goes on learning in a frozen tower."""
        return summary

    def prepare_training(self, *, compile: bool = False, checkpoint: bool = False) -> None:
        """Execution options without effect on results, as for `AudioTower.prepare_training`."""

    def stages(self) -> Stages:
        """The parts that can be frozen."""
        raise NotImplementedError


class SmallTextTower(TextTower):
    """Token embeddings and a pre-norm transformer, trained from scratch; without blocks, a bag of words."""

    def __init__(self, config: TextTowerConfig) -> None:
        super().__init__()
        if config.pooling not in ("cls", "mean") or (config.pooling == "cls" and config.layers == 0):
            raise ConfigError(f"pooling {config.pooling!r} needs an encoder of transformers or a block; use mean")
        if config.hidden_states != "last":
            raise ConfigError("hidden_states is of encoders of transformers; a small text tower pools its last layer")
        self.config = config
        self.width = config.width
        self.vocab_size = config.vocab_size
        self.embedding = nn.Embedding(config.vocab_size, config.width)
        nn.init.normal_(self.embedding.weight, std=config.width**-0.5)
        self.embedding_dropout = nn.Dropout(config.embedding_dropout)
        self.transformer = Transformer(config.width, config.layers, config.heads, config.feedforward, config.dropout)

    def stages(self) -> Stages:
        return Stages([self.embedding], (), list(self.transformer.blocks))

    def summarize(self, input_ids: Tensor, attention_mask: Tensor, token_counts: Sequence[int] | None = None) -> Tensor:
        packing = None
        if token_counts is not None:
            longest = longest_of("token_counts", token_counts, input_ids)
            input_ids, attention_mask = input_ids[:, :longest], attention_mask[:, :longest]
            if min(token_counts) < longest:
                packing = Packing(token_counts, input_ids.device)
        valid = attention_mask.bool()
        ids = input_ids if packing is None else packing.pack(input_ids)
        x = self.transformer(self.embedding_dropout(self.embedding(ids)), valid, packing)
        if packing is not None:
            x = packing.unpack(x)
        return x[:, 0] if self.config.pooling == "cls" else masked_mean(x, valid).to(x.dtype)


class TransformersTextTower(TextTower):
    """Any encoder of transformers (of an encoder-decoder, the encoder), with its pooler output or as `Pooling` does."""

    base: Any

    def __init__(self, config: TextTowerConfig, load_pretrained: bool) -> None:
        super().__init__()
        from transformers import AutoConfig, AutoModel

        model_config, pretrained = transformers_config(config, AutoConfig, load_pretrained)
        self.hf_config = complete_config(model_config)
        optional = () if config.pooling == "pooler" else ("pooler",)
        module: Any = transformers_model(AutoModel, AutoModel.from_config, model_config, pretrained, optional)
        self.base = module.get_encoder() if getattr(model_config, "is_encoder_decoder", False) else module
        self.vocab_size = model_config.vocab_size
        self.by_pooler = config.pooling == "pooler"
        if self.by_pooler and config.hidden_states != "last":
            raise ConfigError("pooling pooler is of the last layer alone; set hidden_states to last")
        self.counts_ids = config.pooling == "msclap"
        over_time = {"cls": "first", "pooler": "first", "msclap": "last"}.get(config.pooling, config.pooling)
        width, states = model_config.hidden_size, model_config.num_hidden_layers + 1
        self.pooling = Pooling(over_time, config.hidden_states, width, states)  # type: ignore[arg-type]
        self.width = self.pooling.width
        self.packs = use_packed_attention(self.base)
        self.compiled = False
        if not getattr(model_config, "add_pooling_layer", True):  # of hf_config: BERT without its pooler
            self.base.pooler = None
        pooler = getattr(self.base, "pooler", None)
        if self.by_pooler and pooler is None:
            raise ConfigError(f"{model_config.model_type} has no pooler; use cls or mean pooling")
        if not self.by_pooler and pooler is not None:
            pooler.requires_grad_(False)  # it takes no part, and DDP waits for the gradient of whatever could have one

    def prepare_training(self, *, compile: bool = False, checkpoint: bool = False) -> None:
        if checkpoint:
            checkpoint_layers(self.base)
        if compile and self.packs:  # of these the layers are known to become whole graphs
            compile_layers(self.base.encoder.layer)
            self.compiled = True

    def stages(self) -> Stages:
        embeddings = getattr(self.base, "embeddings", None) or self.base.get_input_embeddings()
        return Stages([embeddings], (), transformer_layers(self.base))

    def summarize(self, input_ids: Tensor, attention_mask: Tensor, token_counts: Sequence[int] | None = None) -> Tensor:
        with graphs_of(self):
            return self._encode(input_ids, attention_mask, token_counts)

    def _encode(self, input_ids: Tensor, attention_mask: Tensor, token_counts: Sequence[int] | None) -> Tensor:
        if token_counts is None:
            return self._encode_padded(input_ids, attention_mask)
        longest = longest_of("token_counts", token_counts, input_ids)
        input_ids, attention_mask = input_ids[:, :longest], attention_mask[:, :longest]
        if min(token_counts) == longest:
            return self._encode_padded(input_ids, attention_mask)
        if self.packs:
            return self._encode_packed(input_ids, attention_mask, Packing(token_counts, input_ids.device))
        if has_sharded_parts(self):  # every rank must run each layer equally often, whatever its captions
            return self._encode_padded(input_ids, attention_mask)
        return self._encode_groups(input_ids, attention_mask, token_counts)

    def _encode_padded(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        # transformers takes a 4-d mask as it is; of a 2-d one it asks the device whether all tokens are valid
        mask = attention_mask.bool()[:, None, None] if self.packs else attention_mask
        output = self.base(input_ids=input_ids, attention_mask=mask, **self._wanted)
        if self.by_pooler:
            return output.pooler_output[:, None]
        valid = self._pooled(input_ids, attention_mask)
        return self._pool(output, lambda state: (state, valid))

    def _encode_packed(self, input_ids: Tensor, attention_mask: Tensor, packing: Packing) -> Tensor:
        ids = packing.pack(input_ids)[None]
        positions = packing.positions
        embeddings = self.base.embeddings
        if hasattr(embeddings, "create_position_ids_from_input_ids"):  # RoBERTa's follow the padding token's id
            positions = packing.pack(embeddings.create_position_ids_from_input_ids(input_ids, embeddings.padding_idx))
        # without explicit types a sequence could be no longer than the positions of one caption
        types = torch.zeros_like(ids)
        output = self.base(
            input_ids=ids, position_ids=positions[None], token_type_ids=types, packing=packing, **self._wanted
        )
        if self.by_pooler:
            return self.base.pooler(packing.unpack(output.last_hidden_state[0]))[:, None]
        valid = self._pooled(input_ids, attention_mask)
        return self._pool(output, lambda state: (packing.unpack(state[0]), valid))

    def _encode_groups(self, input_ids: Tensor, attention_mask: Tensor, token_counts: Sequence[int]) -> Tensor:
        groups = length_groups(token_counts, 1024 if input_ids.is_cuda else 16)
        order = torch.tensor(list(itertools.chain(*groups)))
        back, order = to_device(torch.stack([order.argsort(), order]), input_ids.device)
        parts = []
        for group, rows in zip(groups, order.split([len(group) for group in groups]), strict=True):
            longest = token_counts[group[-1]]
            parts.append(self._encode_padded(input_ids[rows, :longest], attention_mask[rows, :longest]))
        return torch.cat(parts)[back]

    def _pooled(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Tokens that are pooled, bool [B, tokens]."""
        valid = attention_mask.bool()
        if self.counts_ids:  # as many as there are ids other than 0, from the first on
            valid = length_mask((valid & (input_ids != 0)).sum(1).clamp(min=1), valid.shape[1])
        return valid

    @property
    def _wanted(self) -> dict[str, bool]:
        return {"output_hidden_states": True} if self.pooling.every_state else {}

    def _pool(self, output: Any, rows: Callable[[Tensor], tuple[Tensor, Tensor]]) -> Tensor:
        """Summaries from what the encoder gives; `rows` makes a padded batch of a state, and says what is valid."""
        states = output.hidden_states if self.pooling.every_state else [output.last_hidden_state]
        return torch.stack([self.pooling.pool(*rows(state), number) for number, state in enumerate(states)], 1)

    def combine(self, summary: Tensor) -> Tensor:
        return self.pooling.combine(summary).to(self.base.dtype)


def build_text_tower(config: TextTowerConfig, load_pretrained: bool = True) -> TextTower:
    """Text tower of `config.kind`; arguments and errors as for `build_audio_tower`."""
    with one_error("text"):
        check_counts(dataclasses.asdict(config), "text")
        if config.kind == "hf":
            return TransformersTextTower(config, load_pretrained)
        if config.kind == "small":
            return SmallTextTower(config)
    raise ConfigError(f"unknown text tower {config.kind!r}; known: small, hf")
