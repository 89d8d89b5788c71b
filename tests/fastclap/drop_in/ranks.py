"""Clients' own losses next to the patched ones: what each gives, in this process or on two gloo ranks.

    python ranks.py FOLDER

writes what both ranks got; `test_losses.py` judges it, and calls the same cases in its own process. Only clients that
are installed take part; FASTCLAP_REFERENCE names a checkout of ParaSpeechCLAP, which is no package.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import inspect
import multiprocessing
import os
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
import torch._dynamo  # DistributedDataParallel would import it twice after the fork
import torch.distributed as dist
import torch.distributed.nn.functional
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from fastclap import drop_in
from fastclap.drop_in import open_clip, paraspeechclap, sentence_transformers, shared, transformers_clap

WORLD = 2
ROWS, DIM = 5, 12  # rows of each rank
AVERAGED = "average over ranks of "  # a result that is compared only after averaging
LEFT = "left to the client: "  # a case that the fused loss cannot express

if os.environ.get("FASTCLAP_REFERENCE"):
    sys.path.append(os.environ["FASTCLAP_REFERENCE"])

Results = dict[str, Tensor]
Run = Callable[[], Results]
Cases = Iterator["tuple[str, Run] | tuple[str, Run, Run]"]  # name, the client's loss, and ours if patching is not it


def draw(*shape: int, seed: int, rank: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(100 * seed + rank), dtype=torch.float64)


def units(rank: int, *seeds: int, rows: int = ROWS) -> list[Tensor]:
    return [F.normalize(draw(rows, DIM, seed=seed, rank=rank), dim=1) for seed in seeds]


def from_leaves(loss: Callable[..., Any], *tensors: Tensor, averaged: tuple[int, ...] = ()) -> Run:
    """Runs a loss on fresh leaves; gives its value and each leaf's gradient. Dicts and tuples of losses are summed.

    `averaged` counts the value as 0 and the leaves from 1.
    """

    def run() -> Results:
        leaves = [tensor.clone().requires_grad_() for tensor in tensors]
        value = loss(*leaves)
        parts = value.values() if isinstance(value, dict) else value if isinstance(value, tuple) else [value]
        total = sum(part * weight for part, weight in zip(parts, (1.0, 0.3, 0.7), strict=False))
        total.backward()
        results = {"value": total.detach()}
        for index, leaf in enumerate(leaves, 1):
            results[f"gradient {index}"] = torch.zeros_like(leaf) if leaf.grad is None else leaf.grad
        return {AVERAGED * (index in averaged) + name: x for index, (name, x) in enumerate(results.items())}

    return run


def from_model(model: nn.Module, loss: Callable[[nn.Module], Tensor], average: bool = False) -> Run:
    """Runs a loss on a model, with DistributedDataParallel if averages are wanted; gives all parameters' gradients."""

    def run() -> Results:
        torch.manual_seed(3)  # dropout
        model.zero_grad()
        module = DistributedDataParallel(model) if average else model  # must outlive the backward pass
        value = loss(module)
        value.backward()
        gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
        return {AVERAGED * average + "value": value.detach(), **gradients}

    return run


def modes(rank: int, world: int) -> Iterator[tuple[str, dict[str, Any]]]:
    for local_loss in (False, True):
        for gather_with_grad in (False, True):
            if world > 1 or (not local_loss and not gather_with_grad):
                options = {"local_loss": local_loss, "gather_with_grad": gather_with_grad}
                yield f"local_loss={local_loss}, gather_with_grad={gather_with_grad}", {
                    **options, "rank": rank, "world_size": world,
                }  # fmt: skip


def open_clip_cases(rank: int, world: int) -> Cases:
    import open_clip
    from open_clip.loss import ClipLoss, CoCaLoss, DistillClipLoss, SigLipLoss

    image, text, teacher_image, teacher_text = units(rank, 1, 2, 3, 4)
    scale, scale_of_one, bias = torch.tensor(9.0).double(), torch.tensor([9.0]).double(), torch.tensor(-5.0).double()
    logits, labels = draw(ROWS, 7, 6, seed=5, rank=rank), torch.randint(1, 6, (ROWS, 7))

    class Doubled(ClipLoss):
        def get_logits(self, *args: Any, **kwargs: Any) -> Any:
            return tuple(2 * x for x in super().get_logits(*args, **kwargs))

    for name, options in modes(rank, world):
        loss = ClipLoss(cache_labels=True, **options)
        yield f"ClipLoss, {name}", from_leaves(loss, image, text, scale)
        yield (
            f"ClipLoss by keyword with a bias, {name}",
            from_leaves(
                lambda a, b, s, c, loss=loss: loss(
                    image_features=a, text_features=b, logit_scale=s, logit_bias=c, output_dict=True
                ),
                image, text, scale_of_one, bias,
            ),
        )  # fmt: skip
        coca = CoCaLoss(0.5, 2.0, **options)
        yield (
            f"CoCaLoss, {name}",
            from_leaves(lambda a, b, c, s, loss=coca: loss(a, b, c, labels, s), image, text, logits, scale),
        )
        distill = DistillClipLoss(**options)
        yield (
            f"{LEFT}DistillClipLoss, {name}",
            from_leaves(
                lambda a, b, s, loss=distill: loss(a, b, s, teacher_image, teacher_text, 7.0), image, text, scale
            ),
        )
        yield f"{LEFT}overridden get_logits, {name}", from_leaves(Doubled(**options), image, text, scale)
    averaged = (0, 3, 4) if world > 1 else ()  # open_clip gives each rank its own rows' part of these
    chunk = {"chunk_size": 3} if "chunk_size" in inspect.signature(SigLipLoss).parameters else {}
    for name in ("bidir", "shift", "reduce", "gather"):
        sigmoid = SigLipLoss(rank=rank, world_size=world, dist_impl=name, **(chunk if name == "gather" else {}))
        yield f"SigLipLoss, {name}", from_leaves(sigmoid, image, text, scale, bias, averaged=averaged)

    torch.manual_seed(11)
    model = open_clip.model.CLIP(
        embed_dim=DIM,
        vision_cfg={"layers": 1, "width": 64, "patch_size": 16, "image_size": 32},
        text_cfg={"context_length": 8, "vocab_size": 50, "width": 32, "heads": 2, "layers": 1},
        init_logit_bias=-5.0,
        nonscalar_logit_scale=True,
        output_dict=True,
    ).double()
    images, tokens = draw(ROWS, 3, 32, 32, seed=6, rank=rank), torch.randint(1, 50, (ROWS, 8))
    for name, options in modes(rank, world):
        loss = ClipLoss(**options)
        yield f"CLIP, {name}", from_model(model, lambda m, loss=loss: loss(**m(images, tokens)), world > 1)
    sigmoid = SigLipLoss(rank=rank, world_size=world)
    yield "CLIP, SigLipLoss", from_model(model, lambda m: sigmoid(**m(images, tokens)), world > 1)


def laion_cases(rank: int, world: int) -> Cases:
    from laion_clap.clap_module.loss import ClipLoss

    other_copy = importlib.import_module("clap_module.loss").ClipLoss  # laion_clap puts it on the path

    features = units(rank, 1, 2, 3, 4)
    scales = torch.tensor(9.0).double(), torch.tensor(6.0).double()
    everything = (*features[:2], *scales, *features[2:])  # in the order of the arguments
    for name, options in modes(rank, world):
        loss = ClipLoss(**options)
        yield f"plain, {name}", from_leaves(loss, *features[:2], scales[0])
        yield f"second copy, {name}", from_leaves(other_copy(**options), *features[:2], scales[0])
        mlp = ClipLoss(mlp_loss=True, **options)
        yield f"mlp_loss, {name}", from_leaves(mlp, *everything)
        kappa = ClipLoss(mlp_loss=world == 1, weight_loss_kappa=0.7, **options)
        inputs = everything if world == 1 else (*features[:2], scales[0])  # what works at all
        yield f"{LEFT}weight_loss_kappa, {name}", from_leaves(kappa, *inputs)
    if world == 1:
        yield "CLAP", from_model(*laion_model(ClipLoss(mlp_loss=True)))


def laion_model(loss: nn.Module) -> tuple[nn.Module, Callable[[nn.Module], Tensor]]:
    """A small CLAP of LAION's: its text transformer and heads as they are, its audio tower a linear layer."""
    from laion_clap.clap_module import model as module

    class Audio(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(20, 16)

        def forward(self, audio: Tensor, mixup_lambda: Any = None, device: Any = None) -> dict[str, Tensor]:
            return {"embedding": self.layer(audio)}

    own = module.create_pann_model
    module.create_pann_model = lambda *args: Audio()
    try:
        torch.manual_seed(11)
        text = {
            "context_length": 8,
            "vocab_size": 50,
            "width": 32,
            "heads": 2,
            "layers": 1,
            "model_type": "transformer",
        }
        model = module.CLAP(16, {}, text, joint_embed_shape=DIM)
    finally:
        module.create_pann_model = own
    audio, tokens = draw(ROWS, 20, seed=6).float(), torch.randint(1, 50, (ROWS, 8))

    def model_loss(clap: nn.Module) -> Tensor:
        a, t, a_mlp, t_mlp, scale_a, scale_t = clap(audio, tokens)
        return loss(a, t, scale_a, scale_t, a_mlp, t_mlp)

    return model, model_loss


def paraspeechclap_cases(rank: int, world: int) -> Cases:
    if world > 1:
        return  # its loss knows no ranks
    from paraspeechclap.loss import ClipLoss, MultiTaskLoss

    text, audio, tags, more_tags = (draw(rows, DIM, seed=rows) for rows in (7, 7, 3, 4))
    audio, scale = audio + 1, torch.tensor(9.0).double()
    single = [x.float() for x in (text, audio, scale, tags, more_tags)]  # its targets are float32
    clips = [["soft"], [], ["loud", "deep"], None, ["deep"], ["soft", "loud"], []]
    index = {"soft": 0, "loud": 1, "deep": 2}
    yield "ClipLoss", from_leaves(ClipLoss(), text, audio, scale)

    def two_heads(loss: nn.Module, a: Tensor, b: Tensor, s: Tensor, t: Tensor, u: Tensor) -> Any:
        rows = ({"tag_embeddings": t, "rich_tags_batch": clips}, {"tag_embeddings": u, "rich_tags_batch": [[]] * 7})
        return loss(a, b, s, classification_heads=[{**head, "tag_to_idx": index} for head in rows])

    for name, ours in (("patched", MultiTaskLoss()), ("adapter", drop_in.ParaSpeechMultiTaskLoss())):
        both = (MultiTaskLoss(), ours)
        no_head = [from_leaves(loss, *single[:3]) for loss in both]
        yield f"MultiTaskLoss, {name}, no head", *no_head
        one_head = [from_leaves(lambda *x, loss=loss: loss(*x, clips, index), *single[:4]) for loss in both]
        yield f"MultiTaskLoss, {name}, one head", *one_head
        heads = [from_leaves(lambda *x, loss=loss: two_heads(loss, *x), *single) for loss in both]
        yield f"MultiTaskLoss, {name}, two heads, one without tags", *heads
    yield "CLAP", from_model(*paraspeechclap_model(ClipLoss()))


def paraspeechclap_model(loss: nn.Module) -> tuple[nn.Module, Callable[[nn.Module], Tensor]]:
    """ParaSpeechCLAP's own model around a small WavLM and a small text encoder with random weights."""
    import tempfile

    from paraspeechclap.model import CLAP
    from transformers import RobertaConfig, RobertaModel, WavLMConfig, WavLMModel

    torch.manual_seed(11)
    small = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    conv = {"conv_dim": (16, 16), "conv_stride": (10, 8), "conv_kernel": (10, 8), "num_feat_extract_layers": 2}
    with tempfile.TemporaryDirectory() as folder:
        WavLMModel(WavLMConfig(**small, **conv, num_conv_pos_embedding_groups=2)).save_pretrained(f"{folder}/wavlm")
        RobertaModel(RobertaConfig(**small, vocab_size=50)).save_pretrained(f"{folder}/text")
        model = CLAP(f"{folder}/wavlm", f"{folder}/text", DIM)
    audio, tokens = draw(ROWS, 2000, seed=6).float(), torch.randint(3, 50, (ROWS, 8))
    return model, lambda clap: loss(*clap(audio, {"input_ids": tokens}))


def transformers_cases(rank: int, world: int) -> Cases:
    if world > 1:
        return  # its loss knows no ranks
    model = clap_model()
    inputs = clap_model_inputs()
    yield "ClapModel", from_model(model, lambda m: m(**inputs, return_loss=True).loss)
    yield "ClapModel, a tuple", from_model(model, lambda m: m(**inputs, return_loss=True, return_dict=False)[0])
    yield (
        "ClapModel, logits",
        from_model(model, lambda m: m(**inputs, return_loss=True).logits_per_audio.square().mean()),
    )
    yield (
        f"{LEFT}ClapModel, no loss asked for",
        from_model(model, lambda m: m(**inputs).logits_per_text.square().mean()),
    )


def clap_model() -> nn.Module:
    from transformers import ClapAudioConfig, ClapConfig, ClapModel, ClapTextConfig

    torch.manual_seed(11)
    small = {"hidden_size": 32, "projection_dim": DIM, "num_attention_heads": 2, "intermediate_size": 32}
    text = ClapTextConfig(**small, vocab_size=50, num_hidden_layers=1)
    audio = ClapAudioConfig(
        **{**small, "num_attention_heads": [2, 2]}, num_mel_bins=16, spec_size=64, window_size=4, patch_size=2,
        patch_stride=2, patch_embeds_hidden_size=16, depths=[1, 1], num_hidden_layers=2,
    )  # fmt: skip
    model = ClapModel(ClapConfig(text_config=text.to_dict(), audio_config=audio.to_dict(), projection_dim=DIM))
    with torch.no_grad():
        model.logit_scale_a.fill_(2.2)
        model.logit_scale_t.fill_(1.7)
    return model


def clap_model_inputs() -> dict[str, Tensor]:
    return {
        "input_ids": torch.randint(3, 50, (ROWS, 8), generator=torch.Generator().manual_seed(1)),
        "input_features": draw(ROWS, 1, 64, 16, seed=6).float(),
        "is_longer": torch.zeros(ROWS, 1, dtype=torch.bool),
    }


class Sentences(nn.Module):
    """A first and only module of a SentenceTransformer: mean of token embeddings, with dropout."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens, self.dropout, self.dense = nn.Embedding(50, 16), nn.Dropout(0.2), nn.Linear(16, DIM)

    def forward(self, features: dict[str, Tensor], **_: Any) -> dict[str, Tensor]:
        x = self.dense(self.dropout(self.tokens(features["input_ids"]).mean(1)).tanh())
        return {**features, "sentence_embedding": x}


def sentence_features(rank: int, columns: int) -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(1 + rank)
    tokens = torch.randint(0, 50, (columns, ROWS, 6), generator=generator)
    return [{"input_ids": column, "attention_mask": torch.ones_like(column)} for column in tokens]


def sentence_transformers_cases(rank: int, world: int) -> Cases:
    from sentence_transformers import SentenceTransformer, util
    from sentence_transformers import losses as client

    torch.manual_seed(11)
    model = SentenceTransformer(modules=[Sentences()], device="cpu").double()
    pairs, triplets, many = (sentence_features(rank, columns) for columns in (2, 3, 5))
    plain, cached = client.MultipleNegativesRankingLoss, client.CachedMultipleNegativesRankingLoss
    configurations: dict[str, dict[str, Any]] = {
        "cos_sim": {},
        "dot_score": {"similarity_fct": util.dot_score, "scale": 1.0},
    }
    if "directions" in inspect.signature(plain).parameters:
        both = ("query_to_doc", "doc_to_query")
        every = (*both, "query_to_query", "doc_to_doc")
        configurations |= {
            "two-sided": {"directions": both, "partition_mode": "per_direction"},
            f"{LEFT}two-sided, joint": {"directions": both},
            f"{LEFT}four-sided": {"directions": every},
            f"{LEFT}hardness": {"hardness_mode": "all_negatives", "hardness_strength": 5.0},
            "hardness off": {"hardness_mode": "all_negatives"},
        }
    configurations[f"{LEFT}another similarity"] = {"similarity_fct": lambda a, b: util.cos_sim(a, b).sin()}
    for name, options in configurations.items():
        for columns, features in (("pairs", pairs), ("triplets", triplets), ("three negatives", many)):
            for cls, more in ((plain, {}), (cached, {"mini_batch_size": 2})):
                loss = cls(model, **options, **more, gather_across_devices=world > 1)
                yield (
                    f"{name}, {cls.__name__}, {columns}",
                    from_model(model, lambda _, loss=loss, features=features: loss([dict(f) for f in features], None)),
                )
    for cls, more in ((plain, {}), (cached, {"mini_batch_size": 2})):

        def matryoshka(_: nn.Module, cls: Any = cls, more: Any = more) -> Tensor:
            # It keeps the bound method of a cached loss, so it must be built while the patch is on.
            loss = client.MatryoshkaLoss(model, cls(model, **more, gather_across_devices=world > 1), [DIM, 4])
            return loss([dict(f) for f in triplets], None)

        yield f"MatryoshkaLoss({cls.__name__})", from_model(model, matryoshka)
    for cls in (client.MultipleNegativesSymmetricRankingLoss, client.CachedMultipleNegativesSymmetricRankingLoss):
        name = cls.__name__ if issubclass(cls, (plain, cached)) else f"{LEFT}{cls.__name__}"  # which is newer
        symmetric = cls(model)
        yield name, from_model(model, lambda _, loss=symmetric: loss([dict(f) for f in pairs], None))
    evaluated = cached(model, mini_batch_size=2)

    def evaluation(_: nn.Module) -> Tensor:
        model.eval()
        with torch.no_grad():
            value = evaluated([dict(f) for f in pairs], None)
        model.train()
        return value.requires_grad_()

    yield "CachedMultipleNegativesRankingLoss, evaluation", from_model(model, evaluation)


def grad_cache_cases(rank: int, world: int) -> Cases:
    from grad_cache import GradCache
    from grad_cache import loss as client

    cls = client.DistributedContrastiveLoss if world > 1 else client.SimpleContrastiveLoss
    x, y = (draw(rows, DIM, seed=rows, rank=rank) for rows in (ROWS, 3 * ROWS))
    target = torch.tensor([4, 2, 2, -100, 9] + [3, 20, 29, 11, 0] * (world - 1))
    yield "as it is", from_leaves(cls(), x, y[:ROWS])
    yield "hard negatives", from_leaves(cls(2), x, y)
    yield "sum", from_leaves(lambda a, b: cls(2)(a, b, reduction="sum"), x, y)
    yield "target", from_leaves(lambda a, b: cls()(a, b, target=target), x, y)
    yield "target, sum", from_leaves(lambda a, b: cls()(a, b, target=target, reduction="sum"), x, y)
    yield f"{LEFT}no reduction", from_leaves(lambda a, b: cls(2)(a, b, reduction="none").square().sum(), x, y)
    soft = torch.eye(ROWS * world).double() * 0.9 + 0.1 / (ROWS * world)
    yield f"{LEFT}soft targets", from_leaves(lambda a, b: cls()(a, b, target=soft), x, y[:ROWS])
    if world == 1:
        closure = client.ContrastiveLossWithQueryClosure()
        yield "query closure", from_leaves(lambda a, b: closure(b, query_closure=lambda: a), x, y[:ROWS])
    torch.manual_seed(11)
    towers = nn.ModuleList(
        nn.Sequential(nn.Linear(DIM, 16), nn.Dropout(0.2), nn.Tanh(), nn.Linear(16, 8)) for _ in "xy"
    )
    cache = GradCache(models=list(towers.double()), chunk_sizes=[2, 4], loss_fn=cls(2))

    def cached() -> Results:
        torch.manual_seed(3)
        towers.zero_grad()
        value = cache(x, y)
        return {"value": value, **{name: p.grad.clone() for name, p in towers.named_parameters() if p.grad is not None}}

    yield "GradCache", cached


def adapter_cases(rank: int, world: int) -> Cases:
    """The adapters, which need no client, against the definitions."""
    audio, text, audio_mlp, text_mlp = units(rank, 1, 2, 3, 4)
    scale, scale_t = torch.tensor(9.0).double(), torch.tensor(6.0).double()
    for name, options in modes(rank, world):
        mine, theirs = drop_in.LaionClapLoss(**options), functools.partial(two_sided, **options)
        yield f"LaionClapLoss, {name}", from_leaves(theirs, audio, text, scale), from_leaves(mine, audio, text, scale)
        everything = (audio, text, scale, scale_t, audio_mlp, text_mlp)
        yield (
            f"LaionClapLoss, mlp_loss, {name}",
            from_leaves(
                lambda a, t, s_a, s_t, a_mlp, t_mlp, loss=theirs: (loss(a, t_mlp, s_a) + loss(a_mlp, t, s_t)) / 2,
                *everything,
            ),
            from_leaves(drop_in.LaionClapLoss(**options, mlp_loss=True), *everything),
        )

        class Doubled(drop_in.OpenClipLoss):
            def get_logits(self, *args: Any, **kwargs: Any) -> Any:
                return tuple(2 * x for x in super().get_logits(*args, **kwargs))

        yield (
            f"{LEFT}OpenClipLoss with its own logits, {name}",
            from_leaves(lambda a, b, s, loss=theirs: loss(a, b, 2 * s), audio, text, scale),
            from_leaves(Doubled(**options), audio, text, scale),
        )
        mine = drop_in.OpenClipLoss(**options)
        yield f"OpenClipLoss, {name}", from_leaves(theirs, audio, text, scale), from_leaves(mine, audio, text, scale)

    x, y = (draw(rows, DIM, seed=rows, rank=rank) for rows in (ROWS, 3 * ROWS))
    target = torch.tensor([4, 2, 2, -100, 9] + [3, 20, 29, 11, 0] * (world - 1))
    mine = drop_in.GradCacheDistributedLoss(2) if world > 1 else drop_in.GradCacheLoss(2)

    def one_sided(x: Tensor, y: Tensor, target: Tensor | None = None, reduction: str = "mean") -> Tensor:
        x, y = (rows_of_all_ranks(z, rank, world, False, False) for z in (x, y))
        return F.cross_entropy(x @ y.T, torch.arange(0, len(y), 3) if target is None else target, reduction=reduction)

    for name, options in {
        "": {},
        ", sum": {"reduction": "sum"},
        ", target": {"target": target},
        ", both": {"target": target, "reduction": "sum"},
    }.items():
        runs = [from_leaves(functools.partial(loss, **options), x, y) for loss in (one_sided, mine)]
        yield f"{type(mine).__name__}{name}", *runs

    columns = [draw(ROWS, DIM, seed=seed, rank=rank) for seed in (6, 7, 8)]
    for name, two in (("one-sided", False), ("two-sided", True)):
        directions = ("query_to_doc", "doc_to_query") if two else ("query_to_doc",)

        def ranking(*columns: Tensor, directions: tuple[str, ...] = directions) -> Tensor:
            loss = sentence_transformers.ranking_loss(ranking_options(directions, world), columns)
            assert loss is not None
            return loss

        def definition(*columns: Tensor, two: bool = two) -> Tensor:
            queries, *docs = (F.normalize(column, dim=1) for column in columns)
            every = torch.cat([rows_of_all_ranks(doc, rank, world, True, True) for doc in docs])
            own = torch.arange(ROWS) + rank * ROWS
            loss = F.cross_entropy(20 * queries @ every.T, own)
            every = rows_of_all_ranks(queries, rank, world, True, True)
            return (loss + F.cross_entropy(20 * docs[0] @ every.T, own)) / 2 if two else loss

        yield f"ranking, {name}", from_leaves(definition, *columns), from_leaves(ranking, *columns)


def ranking_options(directions: tuple[str, ...] = ("query_to_doc",), world: int = 1, **more: Any) -> SimpleNamespace:
    """What the ranking loss reads of sentence-transformers' object."""

    def cos_sim() -> None: ...

    cos_sim.__module__ = "sentence_transformers.util"
    return SimpleNamespace(
        **{
            "similarity_fct": cos_sim, "scale": 20.0, "directions": directions, "partition_mode": "per_direction",
            "gather_across_devices": world > 1, **more,
        }
    )  # fmt: skip


def rows_of_all_ranks(x: Tensor, rank: int, world: int, gather_with_grad: bool, local_loss: bool) -> Tensor:
    """A gather in open_clip's ways: with all gradients, with the own rows' only, or with none."""
    if world == 1:
        return x
    if gather_with_grad:
        return torch.cat(torch.distributed.nn.functional.all_gather(x))
    parts = [torch.empty_like(x) for _ in range(world)]
    dist.all_gather(parts, x.detach())
    if not local_loss:
        parts[rank] = x
    return torch.cat(parts)


def two_sided(
    a: Tensor, b: Tensor, scale: Tensor, rank: int, world_size: int, local_loss: bool, gather_with_grad: bool
) -> Tensor:
    """open_clip's definition in its four modes."""
    every_a, every_b = (rows_of_all_ranks(x, rank, world_size, gather_with_grad, local_loss) for x in (a, b))
    if not local_loss:
        a, b, rank = every_a, every_b, 0
    labels = torch.arange(len(a)) + rank * len(a)
    return (F.cross_entropy(scale * a @ every_b.T, labels) + F.cross_entropy(scale * b @ every_a.T, labels)) / 2


CLIENTS: Mapping[str, Callable[[int, int], Cases]] = {
    "adapters": adapter_cases,
    "open_clip": open_clip_cases,
    "laion_clap": laion_cases,
    "paraspeechclap": paraspeechclap_cases,
    "transformers": transformers_cases,
    "sentence_transformers": sentence_transformers_cases,
    "grad_cache": grad_cache_cases,
}


FUSED = (
    (open_clip, "info_nce"),
    (open_clip, "sigmoid_loss"),
    (paraspeechclap, "info_nce"),
    (transformers_clap, "info_nce"),
    (sentence_transformers, "info_nce"),
    (shared, "info_nce"),
)


def installed(client: str) -> bool:
    return client == "adapters" or importlib.util.find_spec(client) is not None


def compare(client: str, rank: int, world: int) -> dict[str, tuple[Results, Results, bool]]:
    """Case -> what the client's own loss gives, what the patched one gives, and whether that called fastclap's."""
    results = {}
    calls: list[str] = []

    def counted(function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            calls.append(function.__name__)
            return function(*args, **kwargs)

        return call

    for name, theirs, *ours in CLIENTS[client](rank, world):
        before = theirs()
        calls.clear()
        with ExitStack() as stack:
            if client != "adapters":
                stack.enter_context(drop_in.patch(client))
            for module, function in FUSED:
                stack.enter_context(mock.patch.object(module, function, counted(getattr(module, function))))
            after = (ours[0] if ours else theirs)()
        results[name] = before, after, bool(calls)
    return results


def worker(rank: int, folder: Path) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=WORLD, timeout=timedelta(seconds=60)
    )
    torch.save({name: compare(name, rank, WORLD) for name in CLIENTS if installed(name)}, folder / f"rank{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()


def main() -> None:
    folder = Path(sys.argv[1])
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    for name in list(filter(installed, CLIENTS))[1:]:
        drop_in.patch(name).undo()  # imports the client once, before the fork
    context = multiprocessing.get_context("fork")
    processes = [context.Process(target=worker, args=(rank, folder)) for rank in range(WORLD)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    sys.exit(max(abs(process.exitcode or 0) for process in processes))


if __name__ == "__main__":
    main()
