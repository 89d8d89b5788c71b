"""The drop-ins: adapters against the definitions, patches against the clients' own losses, and how patching behaves.

Comparisons with a client run where it is installed, in this process and on two gloo ranks. One command runs them all,
with FASTCLAP_REFERENCE naming a checkout of ParaSpeechCLAP: `pytest tests/fastclap/drop_in`.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import inspect
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fastclap
from fastclap import drop_in
from fastclap.drop_in import patch, patching, sentence_transformers
from fastclap.testing import assert_close_rel

ROOT = Path(__file__).resolve().parents[3]
SCRIPT = Path(__file__).with_name("ranks.py")
NAMES = ("adapters", "open_clip", "laion_clap", "paraspeechclap", "transformers", "sentence_transformers", "grad_cache")


@functools.cache
def script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("drop_in_ranks", SCRIPT)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


# ---------------------------------------------------------------------------------------------------------------------
# Values and gradients
# ---------------------------------------------------------------------------------------------------------------------


def judge(client: str, ranks: list[dict[str, tuple[dict[str, Tensor], dict[str, Tensor], bool]]]) -> None:
    """Every result of every case: float64 to 1e-9, float32 to 1e-5. What is left to the client is equal to the bit."""
    averaged, left = script().AVERAGED, script().LEFT
    for case in ranks[0]:
        assert ranks[0][case][2] == (not case.startswith(left)), f"{client}: {case}: fused, or not, against the name"
        for name in ranks[0][case][0]:
            pairs = [(theirs[name], ours[name]) for theirs, ours, _ in (rank[case] for rank in ranks)]
            if name.startswith(averaged):
                pairs = [(sum(x) / len(x), sum(y) / len(y)) for x, y in [zip(*pairs, strict=True)]]  # type: ignore[arg-type]
            for rank, (theirs, ours) in enumerate(pairs):
                largest = max(float(x.norm()) for x in ranks[rank][case][0].values())
                tol = 1e-9 if theirs.dtype == torch.float64 else 1e-5
                what = f"{client}: {case}: {name} on rank {rank}"
                if case.startswith(left) and client != "adapters":
                    assert torch.equal(theirs, ours), what
                elif theirs.norm() <= 1e-4 * largest:  # a gradient that is zero but for rounding, as of a key's bias
                    assert (ours - theirs).norm() <= tol * largest, what
                else:
                    assert_close_rel(what, theirs, ours, tol)
        assert ranks[0][case][0].keys() == ranks[0][case][1].keys(), f"{client}: {case}"


def skip_unless_installed(client: str) -> None:
    if not script().installed(client):
        where = "FASTCLAP_REFERENCE names no checkout of it" if client == "paraspeechclap" else "not installed"
        pytest.skip(f"{client}: {where}")


@pytest.mark.parametrize("client", NAMES)
def test_one_process(client: str) -> None:
    skip_unless_installed(client)
    results = script().compare(client, 0, 1)
    assert results
    judge(client, [results])


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What each rank got; one start of two processes runs every client."""
    folder = tmp_path_factory.mktemp("ranks")
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    run = subprocess.run(
        [sys.executable, str(SCRIPT), str(folder)],
        env={**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=480,
    )
    assert run.returncode == 0, run.stderr[-4000:]
    return [torch.load(folder / f"rank{rank}.pt") for rank in range(2)]


@pytest.mark.skipif(sys.platform == "win32", reason="forks")
@pytest.mark.parametrize("client", [name for name in NAMES if name not in ("paraspeechclap", "transformers")])
def test_two_ranks(client: str, two_ranks: list[dict[str, Any]]) -> None:
    skip_unless_installed(client)
    assert two_ranks[0][client]
    judge(client, [rank[client] for rank in two_ranks])


def test_paraspeech_losses_by_definition() -> None:
    text, audio, tags = (torch.randn(rows, 4, dtype=torch.float64).requires_grad_() for rows in (3, 3, 2))
    cosines = F.cosine_similarity(audio[:, None], text[None], dim=2)
    expected = (F.cross_entropy(9 * cosines, torch.arange(3)) + F.cross_entropy(9 * cosines.T, torch.arange(3))) / 2
    losses = drop_in.ParaSpeechMultiTaskLoss()(text, audio, 9.0, tags, [["b"], None, ["a", "b"]], {"a": 0, "b": 1})
    assert_close_rel("contrastive", expected, losses["contrastive_loss"], 1e-12)
    assert_close_rel("alone", expected, drop_in.ParaSpeechClipLoss()(text, audio, 9.0), 1e-12)
    logits = F.cosine_similarity(audio[[0, 2], None], tags[None], dim=2)
    probability = logits.sigmoid()
    tag_loss = -torch.stack([(1 - probability[0, 0]).log(), *probability[[0, 1, 1], [1, 0, 1]].log()]).mean()
    assert_close_rel("classification", tag_loss, losses["classification_loss"], 1e-12)
    ours = torch.autograd.grad(losses["total_loss"], (text, audio, tags))
    for theirs, mine in zip(torch.autograd.grad(expected + tag_loss, (text, audio, tags)), ours, strict=True):
        assert_close_rel("gradient", theirs, mine, 1e-12)
    untagged = drop_in.ParaSpeechMultiTaskLoss()(text, audio, 9.0, tags, [[], None, []], {})
    assert untagged["classification_loss"] == 0


@pytest.mark.parametrize("corrected", (False, True))
def test_clap_model_loss_by_definition(corrected: bool) -> None:
    audio, text = script().units(0, 1, 2)
    labels = torch.arange(len(audio))
    text_to_audio = F.cross_entropy(5 * text @ audio.T, labels)
    second = audio @ text.T if corrected else text @ audio.T
    expected = (text_to_audio + F.cross_entropy(8 * second, labels)) / 2
    assert_close_rel("loss", expected, drop_in.ClapModelLoss(corrected)(audio, text, 8.0, 5.0), 1e-12)


def test_clap_model_corrected() -> None:
    model, inputs = script().clap_model().eval(), script().clap_model_inputs()
    with patch("transformers", corrected=True):
        out = model(**inputs, return_loss=True)
        as_tuple = model(**inputs, return_loss=True, return_dict=False)
    labels = torch.arange(len(out.logits_per_audio))
    expected = (F.cross_entropy(out.logits_per_text, labels) + F.cross_entropy(out.logits_per_audio, labels)) / 2
    assert_close_rel("loss", expected, out.loss, 1e-5)
    own = model(**inputs, return_loss=True)
    assert list(own) == list(out) and (own.loss - out.loss).abs() > 1e-4
    assert isinstance(as_tuple, tuple) and torch.equal(as_tuple[0], out.loss) and len(as_tuple) == len(own.to_tuple())


def test_ranking_loss_says_what_it_cannot_express() -> None:
    options, columns = script().ranking_options, [torch.randn(3, 4), torch.randn(3, 4)]
    assert torch.equal(
        sentence_transformers.ranking_loss(options(), columns), fastclap.info_nce(*columns, 20.0, direction="a_to_b")
    )
    dots = options()
    dots.similarity_fct.__name__ = "dot_score"
    expected = fastclap.info_nce(*columns, 20.0, direction="a_to_b", normalize=False)
    assert torch.equal(sentence_transformers.ranking_loss(dots, columns), expected)
    every = ("query_to_doc", "doc_to_query", "query_to_query", "doc_to_doc")
    for refused in (
        options(every),
        options(every[:2], partition_mode="joint"),
        options(hardness_mode="all_negatives", hardness_strength=2.0),
        options(similarity_fct=lambda a, b: a @ b.T),
        options(similarity_fct=F.cosine_similarity),
    ):
        assert sentence_transformers.ranking_loss(refused, columns) is None, refused
    for odd in (columns[:1], [columns[0], columns[1][:2]], [columns[0].to_sparse(), columns[1]]):
        assert sentence_transformers.ranking_loss(options(), odd) is None


# ---------------------------------------------------------------------------------------------------------------------
# Signatures and errors
# ---------------------------------------------------------------------------------------------------------------------


def parameters(function: Any) -> list[str]:
    return [name for name in inspect.signature(function).parameters if name != "self"]


OPEN_CLIP = ["local_loss", "gather_with_grad", "cache_labels", "rank", "world_size"]


def test_signatures_are_the_clients() -> None:
    call = ["image_features", "text_features", "logit_scale", "logit_bias", "output_dict"]
    assert parameters(drop_in.OpenClipLoss)[:5] == OPEN_CLIP and parameters(drop_in.OpenClipLoss.forward)[:5] == call
    sigmoid = ["cache_labels", "rank", "world_size", "dist_impl", "chunk_size"]
    assert parameters(drop_in.OpenClipSigLipLoss)[:5] == sigmoid
    assert parameters(drop_in.OpenClipSigLipLoss.forward)[:5] == call
    assert parameters(drop_in.LaionClapLoss) == [*OPEN_CLIP, "use_horovod", "mlp_loss", "weight_loss_kappa"]
    assert parameters(drop_in.LaionClapLoss.forward) == [
        "audio_features", "text_features", "logit_scale_a", "logit_scale_t", "audio_features_mlp", "text_features_mlp",
    ]  # fmt: skip
    three = ["text_features", "audio_features", "logit_scale"]
    assert parameters(drop_in.ParaSpeechClipLoss.forward) == three
    assert parameters(drop_in.ParaSpeechMultiTaskLoss.forward) == [
        *three, "tag_embeddings", "rich_tags_batch", "tag_to_idx", "classification_heads",
    ]  # fmt: skip
    assert parameters(drop_in.GradCacheLoss) == parameters(drop_in.GradCacheDistributedLoss) == ["n_hard_negatives"]
    assert parameters(drop_in.GradCacheLoss.__call__) == ["x", "y", "target", "reduction"]


@pytest.mark.parametrize(
    "client, name, adapter",
    [
        ("open_clip.loss", "ClipLoss", drop_in.OpenClipLoss),
        ("open_clip.loss", "SigLipLoss", drop_in.OpenClipSigLipLoss),
        ("laion_clap.clap_module.loss", "ClipLoss", drop_in.LaionClapLoss),
        ("paraspeechclap.loss", "ClipLoss", drop_in.ParaSpeechClipLoss),
        ("paraspeechclap.loss", "MultiTaskLoss", drop_in.ParaSpeechMultiTaskLoss),
        ("grad_cache.loss", "SimpleContrastiveLoss", drop_in.GradCacheLoss),
    ],
)
def test_adapter_takes_what_the_installed_client_takes(client: str, name: str, adapter: Any) -> None:
    skip_unless_installed(client.split(".")[0])
    theirs = getattr(importlib.import_module(client), name)
    own = [name for name in parameters(theirs) if name != "use_horovod" or "laion" in client]
    assert parameters(adapter)[: len(own)] == own
    for method in ("forward", "__call__"):
        if method in vars(theirs):
            assert parameters(getattr(adapter, method))[: len(parameters(vars(theirs)[method]))] == parameters(
                vars(theirs)[method]
            )


def test_wrong_arguments_are_named() -> None:
    with pytest.raises(NotImplementedError, match=r"weight_loss_kappa=0\.5.*set it to 0"):
        drop_in.LaionClapLoss(weight_loss_kappa=0.5)
    with pytest.raises(NotImplementedError, match="use_horovod"):
        drop_in.LaionClapLoss(use_horovod=True)
    x, y = torch.randn(3, 4), torch.randn(6, 4)
    with pytest.raises(ValueError, match="logit_scale_t"):
        drop_in.LaionClapLoss(mlp_loss=True)(x, x, 9.0)
    with pytest.raises(ValueError, match="6 texts for 3 clips"):
        drop_in.ParaSpeechClipLoss()(y, x, 9.0)
    with pytest.raises(ValueError, match="'loud' of clip 1"):
        drop_in.ParaSpeechMultiTaskLoss()(x, x, 9.0, y, [[], ["loud"], []], {"soft": 0})
    with pytest.raises(ValueError, match="need 3 rows of y, got 6"):
        drop_in.GradCacheLoss()(x, y)
    with pytest.raises(ValueError, match=r"shape \[3\], got \[2\]"):
        drop_in.GradCacheLoss(1)(x, y, target=torch.tensor([0, 1]))
    with pytest.raises(ValueError, match="outside the 6 rows"):
        drop_in.GradCacheLoss(1)(x, y, target=torch.tensor([0, 1, 6]))
    with pytest.raises(NotImplementedError, match="reduction='none'"):
        drop_in.GradCacheLoss(1)(x, y, reduction="none")
    with pytest.raises(RuntimeError, match="init_process_group"):
        drop_in.GradCacheDistributedLoss()


def test_grad_cache_losses_work_in_gradient_caching() -> None:
    """fastclap's own cache calls a loss as GradCache does."""
    towers = [nn.Linear(4, 3), nn.Linear(4, 3)]
    x, y = torch.randn(3, 4), torch.randn(6, 4)
    loss = fastclap.GradCache(towers, 2, drop_in.GradCacheLoss(1))(x, y)
    expected = F.cross_entropy(towers[0](x) @ towers[1](y).T, torch.tensor([0, 2, 4]))
    assert_close_rel("loss", expected, loss, 1e-6)
    for tower, gradient in zip(towers, torch.autograd.grad(expected, [t.weight for t in towers]), strict=True):
        assert tower.weight.grad is not None
        assert_close_rel("gradient", gradient, tower.weight.grad, 1e-5)


# ---------------------------------------------------------------------------------------------------------------------
# Patching
# ---------------------------------------------------------------------------------------------------------------------


class Client(nn.Module):
    """A stand-in for ParaSpeechCLAP's ClipLoss."""

    def forward(self, text_features: Tensor, audio_features: Tensor, logit_scale: float) -> Any:
        """Its own words."""
        return "the client's own"


@pytest.fixture
def client(monkeypatch: pytest.MonkeyPatch) -> Iterator[type[Client]]:
    """A package named paraspeechclap, whose ClipLoss is `Client`."""
    package, module = ModuleType("paraspeechclap"), ModuleType("paraspeechclap.loss")
    module.ClipLoss = Client  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "paraspeechclap", package)
    monkeypatch.setitem(sys.modules, "paraspeechclap.loss", module)
    own = Client.forward
    yield Client
    assert Client.forward is own


def test_patch_reaches_every_holder_and_undoes_itself(client: type[Client]) -> None:
    class Derived(client):  # type: ignore[misc, valid-type]
        def forward(self, *args: Any) -> Any:
            return super().forward(*args)

    before, derived, own = client(), Derived(), client.forward
    x, y = torch.randn(2, 3, 4)
    patched = patch("paraspeechclap")
    assert patched.replaced == (f"{client.__module__}.Client.forward",) and "Client.forward" in repr(patched)
    for loss in (before, derived, client()):
        assert torch.equal(loss(x, y, 9.0), fastclap.info_nce(y, x, 9.0))
    assert inspect.signature(client.forward) == inspect.signature(own) and client.forward.__doc__ == "Its own words."
    patched.undo()
    assert before(x, y, 9.0) == derived(x, y, 9.0) == "the client's own" and client.forward is own
    patched.undo()
    assert patched.replaced == ()


def test_patch_is_idempotent_and_a_context_manager(client: type[Client]) -> None:
    x, y = torch.randn(2, 3, 4)
    with patch("paraspeechclap"):
        with patch("paraspeechclap") as inner:
            assert inner.replaced == ()
        assert isinstance(client()(x, y, 9.0), Tensor)  # the inner one had nothing to undo
    assert client()(x, y, 9.0) == "the client's own"
    with pytest.raises(RuntimeError, match="inside"), patch("paraspeechclap"):
        raise RuntimeError("inside")
    assert client()(x, y, 9.0) == "the client's own"


def test_conflicting_patches_are_refused() -> None:
    with patch("transformers"), pytest.raises(ValueError, match=r"patched already.*undo"):
        patch("transformers", corrected=True)
    with pytest.raises(ValueError, match="'transformers'"):
        patch("open_clip", corrected=True)


def test_unknown_and_absent_clients(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"'clip'.*open_clip, laion_clap, paraspeechclap"):
        patch("clip")
    for name, install in (("open_clip", "open_clip_torch"), ("laion_clap", "laion-clap"), ("paraspeechclap", "PYTHON")):
        for module in patching.CLIENTS[name].modules:
            monkeypatch.setitem(sys.modules, module, None)  # type: ignore[arg-type]
        with pytest.raises(ModuleNotFoundError, match=f"{name} is not installed.*{install}"):
            patch(name)
    # A client that lacks one of its own dependencies is not absent: its own message counts.
    (tmp_path / "grad_cache").mkdir()
    (tmp_path / "grad_cache" / "__init__.py").write_text("import a_module_that_is_missing\n")
    for module in [module for module in sys.modules if module.split(".")[0] in ("grad_cache", "gradcache")]:
        monkeypatch.delitem(sys.modules, module)
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ModuleNotFoundError, match="a_module_that_is_missing"):
        patch("grad_cache")


def test_client_of_an_unknown_version_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    module = ModuleType("open_clip.loss")
    module.ClipLoss = type("ClipLoss", (), {"forward": lambda self: "own"})  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "open_clip", ModuleType("open_clip"))
    monkeypatch.setitem(sys.modules, "open_clip.loss", module)
    with pytest.raises(ImportError, match=r"no SigLipLoss\.forward"):
        patch("open_clip")
    assert module.ClipLoss().forward() == "own"


def stand_in(*methods: str, **attributes: Any) -> Any:
    """An object of a client's class: attributes that its constructor would set, methods that return "own"."""
    own = {name: lambda self, *args, **kwargs: "own" for name in methods}
    return type("Own", (), {**own, **attributes})()


def stand_ins() -> Iterator[Any]:
    """Client, its module, its classes with an object each, a call, and what the patched call gives."""
    a, b, c, d = (F.normalize(torch.randn(4, 6), dim=1) for _ in range(4))
    one = {"local_loss": False, "gather_with_grad": False, "rank": 0, "world_size": 1, "use_horovod": False}
    logits = ("forward", "get_logits", "get_ground_truth")
    clip, sigmoid = stand_in(*logits, **one), stand_in(*logits, "_loss", rank=0, world_size=1)
    classes = {"ClipLoss": clip, "SigLipLoss": sigmoid}
    expected = drop_in.OpenClipLoss()(a, b, 9.0)
    yield "open_clip", "open_clip.loss", classes, lambda: clip.forward(a, b, 9.0), expected
    expected = drop_in.OpenClipSigLipLoss()(a, b, 9.0, -1.0)
    yield "open_clip", "open_clip.loss", classes, lambda: sigmoid.forward(a, b, 9.0, -1.0), expected
    horovod = stand_in(*logits, **{**one, "use_horovod": True})
    classes = {"ClipLoss": horovod, "SigLipLoss": sigmoid}
    yield "open_clip", "open_clip.loss", classes, lambda: horovod.forward(a, b, 9.0), "own"
    derived, derived_sigmoid = (
        type("Derived", (type(x),), {"get_logits": lambda self: None})() for x in (clip, sigmoid)
    )
    classes = {"ClipLoss": clip, "SigLipLoss": sigmoid}
    yield "open_clip", "open_clip.loss", classes, lambda: derived.forward(a, b, 9.0), "own"
    yield "open_clip", "open_clip.loss", classes, lambda: derived_sigmoid.forward(a, b, 9.0, -1.0), "own"

    for kappa in (0, 0.5):
        laion = stand_in("forward", **one, mlp_loss=True, weight_loss_kappa=kappa)
        expected = "own" if kappa else drop_in.LaionClapLoss(mlp_loss=True)(a, b, 9.0, 8.0, c, d)
        call = functools.partial(lambda loss: loss.forward(a, b, 9.0, 8.0, c, d), laion)
        yield "laion_clap", "clap_module.loss", {"ClipLoss": laion}, call, expected

    for scale, directions in ((20.0, ["query_to_doc"]), (20.0, ["query_to_doc", "query_to_query"])):
        options = vars(script().ranking_options(directions, scale=scale))
        options["similarity_fct"] = staticmethod(options["similarity_fct"])
        plain = stand_in("compute_loss_from_embeddings", **options)
        cached = stand_in("calculate_loss", **options)
        classes = {"MultipleNegativesRankingLoss": plain, "CachedMultipleNegativesRankingLoss": cached}
        expected = fastclap.info_nce(a, torch.cat([b, c]), scale, direction="a_to_b") if len(directions) == 1 else "own"
        call = functools.partial(lambda loss: loss.compute_loss_from_embeddings([a, b, c], None), plain)
        yield "sentence_transformers", "sentence_transformers.losses", classes, call, expected
        call = functools.partial(lambda loss: loss.calculate_loss([[a[:3], a[3:]], [b], [c]]), cached)
        yield "sentence_transformers", "sentence_transformers.losses", classes, call, expected

    simple = stand_in("__call__", target_per_qry=1)
    ranks = stand_in("__call__", "gather_tensor", target_per_qry=1, rank=0, word_size=1)
    classes = {"SimpleContrastiveLoss": simple, "DistributedContrastiveLoss": ranks}
    for loss in (simple, ranks):
        call = functools.partial(lambda loss: loss(a, b), loss)
        yield "grad_cache", "grad_cache.loss", classes, call, drop_in.GradCacheLoss()(a, b)
        call = functools.partial(lambda loss: loss(a, b, reduction="none"), loss)
        yield "grad_cache", "grad_cache.loss", classes, call, "own"


def test_every_patch_on_stand_ins_for_the_clients(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a patched method reads of its object and what it leaves to the original, where no client is installed."""
    for client, name, classes, call, expected in stand_ins():
        with monkeypatch.context() as context:
            for other in patching.CLIENTS[client].modules:
                context.setitem(sys.modules, other, None)  # type: ignore[arg-type]
            module = ModuleType(name)
            vars(module).update({key: type(value) for key, value in classes.items()})
            context.setitem(sys.modules, name.split(".")[0], ModuleType(name.split(".")[0]))
            context.setitem(sys.modules, name, module)
            assert call() == "own"
            with patch(client):
                assert call() == "own" if isinstance(expected, str) else torch.equal(call(), expected), client
            assert call() == "own"


@pytest.mark.parametrize(
    "client, name", [("open_clip", "ClipLoss"), ("open_clip", "SigLipLoss"), ("laion_clap", "ClipLoss")]
)
def test_patches_hand_the_distributed_modes_on(client: str, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a client to compare with on two ranks: the object's mode, rank and world size reach fastclap's loss."""
    options = {"local_loss": True, "gather_with_grad": True, "rank": 3, "world_size": 5}
    loss = stand_in(
        "forward",
        "get_logits",
        "get_ground_truth",
        "_loss",
        **options,
        use_horovod=False,
        mlp_loss=False,
        weight_loss_kappa=0,
    )
    key = f"{name}.forward"
    forward = patching.CLIENTS[client].methods[key](type(loss), type(loss).forward)
    seen = {}
    for cls in (fastclap.ClipLoss, fastclap.SigLipLoss):
        monkeypatch.setattr(cls, "forward", lambda self, *args: seen.update(vars(self)))
    forward(loss, 1, 2, 3)
    wanted = options if name == "ClipLoss" else {"rank": 3, "world_size": 5}
    assert {key: seen[key] for key in wanted} == wanted


def test_cached_ranking_loss_goes_backward_when_told() -> None:
    options, columns = script().ranking_options(), [torch.randn(4, 3, requires_grad=True) for _ in range(2)]
    calculate_loss = patching.CLIENTS["sentence_transformers"].methods[
        "CachedMultipleNegativesRankingLoss.calculate_loss"
    ]
    loss = calculate_loss(object, lambda *_: None)(options, [[column] for column in columns], with_backward=True)
    expected = torch.autograd.grad(fastclap.info_nce(*columns, 20.0, direction="a_to_b"), columns)
    assert not loss.requires_grad
    for column, gradient in zip(columns, expected, strict=True):
        assert torch.equal(column.grad, gradient)


def test_ranking_adapters_are_sentence_transformers_classes() -> None:
    skip_unless_installed("sentence_transformers")
    from sentence_transformers import SentenceTransformer, losses

    model = SentenceTransformer(modules=[script().Sentences()], device="cpu").eval()
    for name in ("MultipleNegativesRankingLoss", "CachedMultipleNegativesRankingLoss"):
        adapter, theirs = getattr(drop_in, name), getattr(losses, name)
        assert adapter is getattr(drop_in, name) and issubclass(adapter, theirs) and adapter.__name__ == name
        features = script().sentence_features(0, 3)
        values = [cls(model)([dict(column) for column in features], None) for cls in (theirs, adapter)]
        assert_close_rel(name, *values, 1e-6)
        assert adapter(model).get_config_dict() == theirs(model).get_config_dict()


def test_import_is_cheap_and_brings_no_client() -> None:
    code = (
        "import sys, fastclap; assert 'fastclap.drop_in' not in sys.modules; fastclap.drop_in.patch\n"
        f"print({set(NAMES)} & {{name.split('.')[0] for name in sys.modules}})"
    )
    run = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env={**os.environ, "PYTHONPATH": "."}, capture_output=True, text=True
    )
    assert run.stdout.strip() == "set()", run.stderr
    with pytest.raises(AttributeError, match="no attribute 'ClapLoss'"):
        _ = drop_in.ClapLoss


# ---------------------------------------------------------------------------------------------------------------------
# docs/drop-in.md
# ---------------------------------------------------------------------------------------------------------------------


def examples() -> list[Any]:
    """The page's blocks that need a client: ```python needs=NAME. tests/test_docs.py runs the others."""
    text = (ROOT / "docs" / "drop-in.md").read_text(encoding="utf-8")
    found = re.findall(r"```python needs=(\w+)\n(.*?)```", text, flags=re.DOTALL)
    return [pytest.param(name, code, id=name) for name, code in found]


@pytest.mark.parametrize("name, code", examples())
def test_examples_with_a_client_run(name: str, code: str) -> None:
    skip_unless_installed(name)
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    run = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert run.returncode == 0, run.stderr
