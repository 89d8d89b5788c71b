"""WavLM at training speed, and the convolution stack of the whole wav2vec2 family: other arithmetic, same parameters.

The model stays transformers' own: its configuration, initialisation, loading and parameter names. `accelerate`
exchanges, inside a built model, the parts that hold a GPU up, and they adopt the parameters that are there, so a state
dict moves freely between an accelerated and a plain model.

* Convolutions. transformers keeps [batch, channels, time] and transposes around each LayerNorm. Here rows stay
  channels-last throughout and a convolution of kernel k and stride s ≤ k ≤ 2s is one GEMM over a view of s rows, plus
  one GEMM over the next k − s rows that accumulates onto it. The first layer, of the waveform, is one kernel with its
  LayerNorm and GELU; where it is not, the waveform is unfolded, and nothing else ever. Clips are padded to a multiple
  of the total stride, so that the views run through the batch; the row that then reads across the border between two
  clips is never valid, and is cut off at the end.
* Attention. transformers asks for the attention weights and so leaves every fused kernel out, and repeats the position
  bias over the batch, [batch · heads, T, T] in each layer. The bias depends on the distance j − i alone, up to a gate
  for each query, so it is passed on as a table of 2T − 1 values a head and the gates. The table is looked up once a
  forward pass.
* Positions. Their grouped convolution becomes batched products (`fastclap.models.positional`).

Lengths are tensors on the device and stay there; what is random follows torch's generators.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint

from fastclap.kernels import dispatch
from fastclap.kernels.feed_forward import feed_forward
from fastclap.kernels.layer_norm_gelu import layer_norm_gelu
from fastclap.kernels.residual_layer_norm import residual_layer_norm
from fastclap.kernels.toeplitz_attention import gated_toeplitz_attention
from fastclap.kernels.waveform_convolution import waveform_convolution, window_products
from fastclap.models import positional
from fastclap.models.pretrained import compile_layers, graphs_of


def accelerate(model: Any, *, encoder: bool = True) -> None:
    """Exchange parts of a wav2vec2-family model for faster ones that compute the same, in place.

    The convolution stack is exchanged in every model whose `feature_extractor` has the family's shape (GELU, one norm
    a layer or one GroupNorm in the first, kernels between one and two strides); the encoder in `WavLMModel` alone,
    and not where the configuration wants attention weights or hidden states back. What is not exchanged stays
    transformers' module. Where the encoder is exchanged, `model(...)` gives `last_hidden_state` and no more.

    Args:
        model: a model of transformers with `feature_extractor` and `encoder`, such as `WavLMModel`.
        encoder: exchange the encoder too.
    """
    config = model.config
    if _has_family_convolutions(getattr(model, "feature_extractor", None), config):
        model.feature_extractor = ConvolutionStack(model.feature_extractor)
    if encoder and _has_wavlm_encoder(config):
        model.encoder = Encoder(model.encoder, config)
    model.train(model.training)  # new modules start in training mode


def _has_wavlm_encoder(config: Any) -> bool:
    wants_more = getattr(config, "output_attentions", False) or getattr(config, "output_hidden_states", False)
    if config.model_type != "wavlm" or wants_more:
        return False
    return config.max_bucket_distance > config.num_buckets // 4 > 0  # the logarithmic buckets are defined


def encode(
    model: Any,
    waveform: Tensor,  # [B, samples], zeros past each end
    frames: Tensor | None,  # int64 [B] valid frames; None: all
    visit: Callable[[Tensor], None] | None = None,
) -> Tensor:  # [B, T, hidden]
    """Last hidden state of an accelerated `WavLMModel`, from lengths instead of a mask over samples.

    `visit` is called with the input of every layer, dropped ones among them, and with the result, as they arise.
    """
    features = model.feature_extractor(waveform).transpose(1, 2)
    hidden, _ = model.feature_projection(features)
    return model.encoder.encode(hidden, frames, visit)


# ---------------------------------------------------------------------------------------------------------------------
# convolutions


def _has_family_convolutions(module: nn.Module | None, config: Any) -> bool:
    layers = list(getattr(module, "conv_layers", ()))
    norms = [getattr(layer, "layer_norm", None) for layer in layers]
    kinds = [type(norm) for norm in norms]
    first_only = kinds == [nn.GroupNorm] + [type(None)] * (len(layers) - 1)
    return (
        bool(layers)
        and config.feat_extract_activation == "gelu"
        and (first_only or all(kind is nn.LayerNorm for kind in kinds))
        and all(
            isinstance(norm, nn.LayerNorm) or norm is None or norm.num_groups == norm.num_channels for norm in norms
        )
        and all(isinstance(layer.conv, nn.Conv1d) and layer.conv.groups == 1 for layer in layers)
        and all(layer.conv.padding == (0,) and layer.conv.dilation == (1,) for layer in layers)
        and layers[0].conv.in_channels == 1
        and all(layer.conv.stride[0] <= layer.conv.kernel_size[0] <= 2 * layer.conv.stride[0] for layer in layers[1:])
    )


class ConvolutionStack(nn.Module):
    """The family's strided convolutions on [rows, channels], with the parameters of transformers' feature encoder.

    Args:
        encoder: the module whose layers are adopted, so their parameter names stay.
    """

    def __init__(self, encoder: Any) -> None:
        super().__init__()
        self.conv_layers: Any = encoder.conv_layers
        self.shapes = [(layer.conv.kernel_size[0], layer.conv.stride[0]) for layer in self.conv_layers]

    def _freeze_parameters(self) -> None:
        """What `freeze_feature_encoder` of transformers' models calls."""
        self.requires_grad_(False)

    def forward(
        self,
        waveform: Tensor,  # [B, samples]
    ) -> Tensor:  # [B, channels, frames], a transposed view, as transformers' models expect it
        """Features of every clip.

        Raises:
            ValueError: the waveform is too short for one frame.
        """
        if not _use_gemms(waveform, self.conv_layers):
            x = waveform[:, None]
            for layer in self.conv_layers:
                x = layer(x)
            return x
        samples = waveform.shape[1]
        frames = self._frames(samples)[-1]
        if frames < 1:
            raise ValueError(f"{samples} samples are too few for one frame of these convolutions; pad the waveform")
        differentiable = _builds_graph(self, waveform)
        if waveform.device.type != "cpu" or differentiable or _normalizes_over_time(self.conv_layers):
            return self._features_by_gemms(waveform).transpose(1, 2)
        # Without gradients a CPU takes some frames at a time, whose layers stay in its cache and in memory that is
        # already its own.
        hop, field = 1, 1
        for size, step in self.shapes:
            field += (size - 1) * hop
            hop *= step
        at_once = max(1, FRAMES_AT_ONCE // len(waveform))
        parts = []
        for begin in range(0, frames, at_once):
            last = min(begin + at_once, frames) - 1
            parts.append(self._features_by_gemms(waveform[:, begin * hop : last * hop + field]))
        return torch.cat(parts, 1).transpose(1, 2)

    def _frames(self, samples: int) -> list[int]:
        """Frames that every layer makes of a clip."""
        frames = []
        for size, step in self.shapes:
            samples = (samples - size) // step + 1
            frames.append(samples)
        return frames

    def _features_by_gemms(self, waveform: Tensor) -> Tensor:  # [B, frames, channels]
        batch, samples = waveform.shape
        frames = self._frames(samples)
        (_, stride), *following = self.shapes
        total = math.prod(step for _, step in following)
        rows = -(-frames[0] // total) * total
        first, norm = self.conv_layers[0].conv, getattr(self.conv_layers[0], "layer_norm", None)
        if isinstance(norm, nn.LayerNorm):
            parameters = (first.weight, first.bias, norm.weight, norm.bias)
            x = waveform_convolution(waveform, *parameters, stride, rows, norm.eps).flatten(0, 1)
        else:
            x = window_products(waveform, first.weight, first.bias, stride, rows)
            x = _norm_gelu(self.conv_layers[0], x, batch, frames[0])
        for layer, (_, step), count in zip(self.conv_layers[1:], following, frames[1:], strict=True):
            conv = layer.conv
            weight, bias = conv.weight.transpose(1, 2).flatten(1), conv.bias
            if torch.is_autocast_enabled(x.device.type):
                low = torch.get_autocast_dtype(x.device.type)
                x, weight, bias = x.to(low), weight.to(low), None if bias is None else bias.to(low)
            x = _norm_gelu(layer, _RowConvolution.apply(x, weight, bias, step), batch, count)
        return x.unflatten(0, (batch, -1))[:, : frames[-1]]


def _builds_graph(module: nn.Module, x: Tensor) -> bool:
    """Whether autograd keeps what the module computes from `x`; not if it is frozen and nothing before it trains."""
    return torch.is_grad_enabled() and (x.requires_grad or any(p.requires_grad for p in module.parameters()))


FRAMES_AT_ONCE = 128  # of all clips of a batch together: 8,192 rows of the first layer, 16 MB


def _normalizes_over_time(layers: Any) -> bool:
    """Whether a frame depends on more than its own samples."""
    return isinstance(getattr(layers[0], "layer_norm", None), nn.GroupNorm)


def _use_gemms(waveform: Tensor, layers: Any) -> bool:
    """Whether the layers run as GEMMs: not on a CPU with a GroupNorm, where the libraries' convolutions are faster."""
    return waveform.device.type != "cpu" or not _normalizes_over_time(layers)


def _norm_gelu(
    layer: Any,  # a convolution layer of transformers
    x: Tensor,  # [B · rows, channels], its convolution's output
    batch: int,
    frames: int,  # valid rows of each clip
) -> Tensor:  # [B · rows, channels]
    norm = getattr(layer, "layer_norm", None)
    if norm is None:
        return F.gelu(x)
    if isinstance(norm, nn.LayerNorm):
        return layer_norm_gelu(x, norm.weight, norm.bias, norm.eps)
    # GroupNorm with a group for each channel: statistics over time, from the valid rows
    x = x.unflatten(0, (batch, -1)).to(torch.promote_types(x.dtype, torch.float32))
    variance, mean = torch.var_mean(x[:, :frames], 1, correction=0, keepdim=True)
    scale = norm.weight * (variance + norm.eps).rsqrt()
    return F.gelu(torch.addcmul(norm.bias - mean * scale, x, scale)).flatten(0, 1).to(norm.weight.dtype)


class _RowConvolution(torch.autograd.Function):
    """Convolution along contiguous rows as GEMMs on views: y[n] = b + W · x[n·s : n·s + k], for s ≤ k ≤ 2s.

    Autograd of the same two products would copy the whole gradient to accumulate onto a part of it.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,  # [N · s, C]
        weight: Tensor,  # [D, k · C], the kernel's positions outermost
        bias: Tensor | None,  # [D]
        stride: int,
    ) -> Tensor:  # [N, D]; the last row lacks what lies beyond the end of x
        rows, own, rest = _row_views(x, weight, stride)
        y = rows @ own.t() if bias is None else torch.addmm(bias, rows, own.t())
        if rest.shape[1]:
            y[:-1].addmm_(rows[1:, : rest.shape[1]], rest.t())
        ctx.save_for_backward(x, weight)
        ctx.stride, ctx.has_bias = stride, bias is not None
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None, None]:
        x, weight = ctx.saved_tensors
        rows, own, rest = _row_views(x, weight, ctx.stride)
        dx = dweight = None
        if ctx.needs_input_grad[0]:
            dx = dy @ own
            if rest.shape[1]:
                dx[1:, : rest.shape[1]].addmm_(dy[:-1], rest)
            dx = dx.view_as(x)
        if ctx.needs_input_grad[1]:
            dweight = torch.cat([dy.t() @ rows, dy[:-1].t() @ rows[1:, : rest.shape[1]]], 1)
        return dx, dweight, dy.sum(0) if ctx.has_bias and ctx.needs_input_grad[2] else None, None


def _row_views(x: Tensor, weight: Tensor, stride: int) -> tuple[Tensor, Tensor, Tensor]:
    """Groups of `stride` rows, the weights of a group's own rows, and those of the next group's first rows."""
    width = stride * x.shape[1]
    return x.view(-1, width), weight[:, :width], weight[:, width:]


# ---------------------------------------------------------------------------------------------------------------------
# encoder


def _add_and_normalize(
    x: Tensor,  # [B, T, hidden], the residual stream
    branch: Tensor | None,  # [B, T, hidden], without the bias of its last linear layer; None: there is none
    bias: Tensor | None,  # [hidden], of that layer
    norm: nn.LayerNorm,
    dropout: nn.Dropout,
    *,
    stable: bool,
    last: bool = False,
) -> tuple[Tensor, Tensor]:
    """The stream with the branch added, and what the next branch takes of it: its norm.

    Where layer norms come after the addition, the norm is the stream too. As such, and as the encoder's result, it is
    in float32 under autocast, as torch's would be.
    """
    probability = dropout.p if dropout.training else 0.0
    wide = torch.float32 if (last or not stable) and dispatch.autocast_dtype(x) is not None else None
    total, normalized = residual_layer_norm(
        x, branch, bias, norm.weight, norm.bias, norm.eps, dropout=probability, dtype=wide
    )
    return (total, normalized) if stable else (normalized, normalized)


def _is_plain(linear: nn.Module) -> bool:
    """Whether a linear layer is no more than its weight and bias. One with an adapter has to be called."""
    return type(linear) is nn.Linear


def _bias_apart(linear: Any) -> nn.Parameter | None:
    """The bias of a linear layer that whoever adds up its output adds; None: the output has it."""
    return linear.bias if _is_plain(linear) else None


def _without_bias_apart(linear: Any, x: Tensor) -> Tensor:
    """Output of a linear layer but for `_bias_apart`."""
    return F.linear(x, linear.weight) if _is_plain(linear) else linear(x)


class EncoderLayer(nn.Module):
    """One transformer layer of WavLM, with the parameters of transformers' layer, up to its last addition.

    That addition belongs to the encoder, as one kernel does it together with the norm that follows, which may be the
    next layer's.

    Args:
        layer: the layer whose modules are adopted, so their parameter names stay.
        stable: LayerNorm before attention and feed-forward (the large models) instead of after them.
        plain_gelu: the feed-forward's activation is the exact GELU.
    """

    def __init__(self, layer: Any, stable: bool, plain_gelu: bool) -> None:
        super().__init__()
        self.attention: Any = layer.attention
        self.dropout = layer.dropout
        self.layer_norm = layer.layer_norm
        self.feed_forward = layer.feed_forward
        self.final_layer_norm = layer.final_layer_norm
        self.stable, self.plain_gelu = stable, plain_gelu

    @property
    def used_from_outside(self) -> list[nn.Parameter]:
        """Parameters that the encoder reads: those of its addition and norm between two layers."""
        norm, bias = self.layer_norm if self.stable else self.final_layer_norm, self.output_bias
        return [norm.weight, norm.bias, *([] if bias is None else [bias])]

    @property
    def output_bias(self) -> nn.Parameter | None:
        """What is still to be added to the second result."""
        return _bias_apart(self.feed_forward.output_dense)

    def forward(
        self,
        x: Tensor,  # [B, T, hidden], the residual stream
        normalized: Tensor,  # [B, T, hidden], what attention takes of it: its norm, or the same
        table: Tensor,  # [heads, 2T − 1] position bias at the distances −(T−1) .. T−1
        frames: Tensor | None,  # int64 [B] valid frames; None: all
    ) -> tuple[Tensor, Tensor]:  # twice [B, T, hidden]: the stream, and what is to be added to it but for `output_bias`
        norm, bias = self.final_layer_norm if self.stable else self.layer_norm, _bias_apart(self.attention.out_proj)
        attended = self._attend(normalized, table, frames)
        x, normalized = _add_and_normalize(x, attended, bias, norm, self.dropout, stable=self.stable)
        return x, self._feed_forward(normalized)

    def _feed_forward(self, x: Tensor) -> Tensor:
        """All but the last bias, if it is to be added by itself, and dropout."""
        part = self.feed_forward
        inner, outer = part.intermediate_dense, part.output_dense
        plain = _is_plain(inner) and _is_plain(outer)
        if plain and self.plain_gelu and not (self.training and part.intermediate_dropout.p):
            return feed_forward(x, inner.weight, inner.bias, outer.weight)
        return _without_bias_apart(outer, part.intermediate_dropout(part.intermediate_act_fn(inner(x))))

    def _attend(
        self,
        x: Tensor,  # [B, T, hidden]
        table: Tensor,
        frames: Tensor | None,
    ) -> Tensor:  # [B, T, hidden], without the output's bias, if it is to be added by itself
        """Gated relative-position attention (WavLM, Chen et al. 2022, equations 4 to 8)."""
        attention, (*projected, gates) = self.attention, self._project(x)
        q, k, v = (part.unflatten(-1, (attention.num_heads, -1)).transpose(1, 2) for part in projected)
        gates = gates.to(table.dtype).sigmoid()  # [B, T, 2 · heads]
        update, reset = gates.unflatten(-1, (2, -1)).unbind(2)  # [B, T, heads]
        gate = update * (reset * attention.gru_rel_pos_const.flatten() - 1.0) + 2.0
        dropout = float(attention.dropout) if self.training else 0.0
        y = gated_toeplitz_attention(q, k, v, table, gate.transpose(1, 2), frames, dropout=dropout)
        return _without_bias_apart(attention.out_proj, y.transpose(1, 2).flatten(2))

    def _project(self, x: Tensor) -> Sequence[Tensor]:  # three times [B, T, hidden], and [B, T, 2 · heads]
        """Queries, keys, values and gates, from one product, so that its input is read, kept and given a gradient once.

        Each head's two gates are linear in the head's own part of the input, so their rows of the weight are zero
        elsewhere. Each gate is the sum of four outputs of a linear layer, which is the output of one with summed
        weights.
        """
        attention, heads = self.attention, self.attention.num_heads
        projections = (attention.q_proj, attention.k_proj, attention.v_proj)
        linear = attention.gru_rel_pos_linear
        if not all(map(_is_plain, (*projections, linear))):
            gates = linear(x.unflatten(-1, (heads, -1))).unflatten(-1, (2, 4)).sum(-1)  # [B, T, heads, 2]
            return [*(projection(x) for projection in projections), gates.transpose(-1, -2).flatten(-2)]
        per_head = linear.weight.unflatten(0, (2, 4)).sum(1)[:, None, None]  # [2, 1, 1, width]
        on_its_own = torch.eye(heads, dtype=per_head.dtype, device=x.device)[..., None] * per_head
        gate_weight = on_its_own.flatten(2).flatten(0, 1)  # [2 · heads, hidden]
        gate_bias = linear.bias.view(2, 4).sum(1).repeat_interleave(heads)
        weights, biases = [*(p.weight for p in projections), gate_weight], [*(p.bias for p in projections), gate_bias]
        if x.device.type == "cpu" and not torch.is_grad_enabled():  # to join weights costs more than it would save
            return [F.linear(x, weight, bias) for weight, bias in zip(weights, biases, strict=True)]
        dtype = dispatch.autocast_dtype(x) or x.dtype
        weight, bias = (torch.cat([part.to(dtype) for part in parts]) for parts in (weights, biases))
        return F.linear(x, weight, bias).split([len(part) for part in weights], -1)


class Encoder(nn.Module):
    """WavLM's encoder, with the parameters of transformers' `WavLMEncoder` or `WavLMEncoderStableLayerNorm`.

    Args:
        encoder: the module whose parameters are adopted.
        config: its `WavLMConfig`.

    Attributes:
        checkpoint: in training, keep each layer's input only and compute the layer again in the backward pass.
        compiled: the layers are compiled, for training alone.
    """

    buckets: Tensor

    def __init__(self, encoder: Any, config: Any) -> None:
        super().__init__()
        self.pos_conv_embed = encoder.pos_conv_embed
        if positional.is_understood(self.pos_conv_embed):
            self.pos_conv_embed = positional.PositionalConvolution(self.pos_conv_embed)
        self.layer_norm = encoder.layer_norm
        self.dropout = encoder.dropout
        self.stable = bool(config.do_stable_layer_norm)
        plain_gelu = config.hidden_act == "gelu"
        self.layers = nn.ModuleList(EncoderLayer(layer, self.stable, plain_gelu) for layer in encoder.layers)
        self.layerdrop = float(config.layerdrop)
        self.checkpoint = self.compiled = False
        # all distances from max_bucket_distance on share a bucket
        distances = torch.arange(-config.max_bucket_distance, config.max_bucket_distance + 1)
        first = encoder.layers[0].attention
        buckets = first._relative_positions_bucket(distances).to(first.rel_attn_embed.weight.device)
        self.register_buffer("buckets", buckets, persistent=False)

    @property
    def used_from_outside(self) -> list[nn.Parameter]:
        """Parameters of the layers that are read outside of their forward pass, so not to be sharded with them."""
        first: Any = self.layers[0]
        return [first.attention.rel_attn_embed.weight]

    def prepare_training(self, *, compile: bool = False, checkpoint: bool = False) -> None:
        """Execution options without effect on results; see the attributes."""
        self.checkpoint, self.compiled = checkpoint, compile
        if compile:
            compile_layers(self.layers)

    def position_table(self, frames: int) -> Tensor:  # float32 or float64 [heads, 2 · frames − 1]
        """Position bias of every head at the distances −(frames − 1) .. frames − 1, before the gate."""
        furthest = len(self.buckets) // 2
        distances = torch.arange(1 - frames, frames, device=self.buckets.device).clamp(-furthest, furthest)
        first: Any = self.layers[0]
        values = first.attention.rel_attn_embed(self.buckets[distances + furthest])
        return values.t().to(torch.promote_types(values.dtype, torch.float32)).contiguous()

    def forward(self, hidden_states: Tensor, attention_mask: Tensor | None = None, **_: Any) -> Any:
        """What transformers' model calls, with a bool mask [B, T] of the valid frames."""
        from transformers.modeling_outputs import BaseModelOutput

        frames = None if attention_mask is None else attention_mask.sum(1)
        return BaseModelOutput(last_hidden_state=self.encode(hidden_states, frames))

    def encode(
        self,
        x: Tensor,  # [B, T, hidden]
        frames: Tensor | None,  # int64 [B] valid frames; None: all
        visit: Callable[[Tensor], None] | None = None,  # is shown the input of every layer, and the result
    ) -> Tensor:  # [B, T, hidden]
        """Output of the last layer; what lies past a clip's frames is finite and means nothing."""
        if frames is not None:  # the positional convolution looks across the end
            padding = torch.arange(x.shape[1], device=x.device) >= frames[:, None]
            x = x.masked_fill(padding[..., None], 0.0)
        x = x + self.pos_conv_embed(x)
        x = self.dropout(x if self.stable else self.layer_norm(x))
        table = self.position_table(x.shape[1])
        # LayerDrop: drawn on the host, whose generator a gradient cache replays, and read without asking a device
        drops = self.training and self.layerdrop > 0
        draws = torch.rand(len(self.layers), device="cpu").tolist() if drops else [1.0] * len(self.layers)
        if self.compiled:  # as many clips as heads are a coincidence, of which a graph should make no rule
            torch._dynamo.mark_static(table, 0)
        normalized = x
        layers: Any = self.layers
        norms = [*(layer.layer_norm for layer in layers), self.layer_norm]  # in a stable encoder each before a layer
        if self.stable:
            x, normalized = _add_and_normalize(x, None, None, norms[0], self.dropout, stable=True)
        with graphs_of(self):
            for index, (layer, draw) in enumerate(zip(layers, draws, strict=True)):
                if visit is not None:
                    visit(x)
                branch = bias = None
                if index == 0 or draw >= self.layerdrop:
                    bias, inputs = layer.output_bias, (x, normalized, table, frames)
                    if self.checkpoint and self.training and _builds_graph(layer, x):
                        x, branch = checkpoint(layer, *inputs, use_reentrant=False)
                    else:
                        x, branch = layer(*inputs)
                if branch is not None or self.stable:  # without a branch it is the next layer's norm alone
                    x, normalized = _add_and_normalize(
                        x,
                        branch,
                        bias,
                        norms[index + 1] if self.stable else layer.final_layer_norm,
                        layer.feed_forward.output_dropout,
                        stable=self.stable,
                        last=index + 1 == len(layers),
                    )
        if visit is not None:
            visit(normalized)
        return normalized
