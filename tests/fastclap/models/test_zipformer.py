"""The Zipformer tower next to the published code (where FASTCLAP_ICEFALL names a checkout) and to its own promises."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from bench.icefall import encode, encoder
from fastclap.config import AudioTowerConfig, ZipformerConfig
from fastclap.errors import ConfigError
from fastclap.models.audio_towers import build_audio_tower
from fastclap.models.zipformer import limits
from fastclap.models.zipformer.encoder import encoded_distances, frames_of
from fastclap.models.zipformer.limits import Balancer, Schedule, Whitener
from fastclap.models.zipformer.tower import ZipformerTower
from tests.fastclap.models.zipformer_peer import SMALL, WIDTHS, run, same_draws, tower

SIZES = pytest.mark.parametrize("config", [SMALL, WIDTHS], ids=["one width", "three widths"])
MELS = 40


def features(*frames: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return 3 * torch.randn(len(frames), max(frames), MELS, dtype=dtype, generator=torch.Generator().manual_seed(2))


def pair(icefall: SimpleNamespace, config: ZipformerConfig) -> tuple[ZipformerTower, Any]:
    """Both codes with the same weights, in float64."""
    ours, theirs = tower(config, MELS).double(), encoder(icefall, config, MELS).double()
    theirs.load_state_dict({k: x for k, x in ours.state_dict().items() if k.startswith("encoder")})
    return ours, theirs


@pytest.fixture
def exact(icefall: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """The published code without what makes it inexact: a softmax whose gradient is float32's."""
    monkeypatch.setattr(icefall.zipformer2, "softmax", lambda x, dim: x.softmax(dim))
    return icefall


@pytest.fixture
def draws(exact: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Function that begins the draws of both codes anew, from a seed."""
    return same_draws(exact, monkeypatch)


def relative_gradients(ours: nn.Module, theirs: nn.Module) -> dict[str, float]:
    mine = {name: p.grad for name, p in ours.named_parameters()}
    found = {name: p.grad for name, p in theirs.named_parameters() if name in mine}
    for name in [name for name, gradient in found.items() if gradient is None]:  # encodings of positions were skipped
        assert mine[name] is None and found.pop(name) is None
    return {name: float((mine[name] - g).norm() / g.norm()) for name, g in found.items() if g is not None}


@SIZES
def test_evaluation_and_its_gradients_are_those_of_the_published_code(exact: Any, config: ZipformerConfig) -> None:
    ours, theirs = pair(exact, config)
    x, lengths = features(150, 150, 150), [150] * 3
    for name in ("scaling", "zipformer2"):  # in its evaluation mode limits act on gradients all the same
        getattr(exact, name).random = SimpleNamespace(random=lambda: 1.0)
    expected, frames = encode(theirs.eval(), x, torch.tensor(lengths))
    found, packing = run(ours.eval(), x, lengths)
    assert packing.lengths == frames.tolist()
    torch.testing.assert_close(packing.unpack(found), expected, rtol=1e-12, atol=1e-12)
    upstream = torch.randn(expected.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    (expected * upstream).sum().backward()
    (packing.unpack(found) * upstream).sum().backward()
    relative = relative_gradients(ours, theirs)
    assert len(relative) == len(list(ours.parameters())) and max(relative.values()) < 1e-9
    # what the published code holds besides is never used
    unused = {name for name, p in theirs.named_parameters() if p.grad is None}
    assert {name.rpartition(".")[2] for name in unused} == {"bypass_scale"} and len(unused) == len(ours.encoder.layers)


@SIZES
@pytest.mark.parametrize("batches", [0.0, 3000.0, 100_000.0])
def test_training_is_that_of_the_published_code(
    exact: Any, draws: Any, config: ZipformerConfig, batches: float
) -> None:
    ours, theirs = pair(exact, config)
    ours.batches = batches
    for module in theirs.modules():
        if hasattr(module, "batch_count"):
            module.batch_count = batches
    x, lengths = features(*[150] * 5), [150] * 5
    draws(4)
    expected, _ = encode(theirs.train(), x, torch.tensor(lengths))
    draws(4)
    found, packing = run(ours.train(), x, lengths)
    torch.testing.assert_close(packing.unpack(found), expected, rtol=1e-6, atol=1e-6)
    upstream = torch.randn(expected.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    (expected * upstream).sum().backward()
    (packing.unpack(found) * upstream).sum().backward()
    assert max(relative_gradients(ours, theirs).values()) < 1e-4  # the limits of the published code are in float32
    limits.settle(ours.whiteners, torch.cat([each.found for each in ours.whiteners]))
    probabilities = [m.prob for m in theirs.modules() if type(m).__name__ == "Whiten"]
    assert sorted(float(each.probability) for each in ours.whiteners) == pytest.approx(sorted(probabilities))
    assert min(probabilities) < 0.1  # some have found their limit held


@pytest.mark.slow
def test_the_published_sizes_are_those_of_the_published_code(icefall: SimpleNamespace) -> None:
    config = ZipformerConfig(size="spear-xlarge")
    ours = ZipformerTower(AudioTowerConfig(kind="zipformer", features="clsp", zipformer=config)).eval()
    theirs = encoder(icefall, config, 128).eval()
    theirs.load_state_dict({k: x for k, x in ours.state_dict().items() if k.startswith("encoder")})
    x = 3 * torch.randn(1, 200, 128, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        expected, _ = encode(theirs, x, torch.tensor([200]))
        found, packing = run(ours, x, [200])
    torch.testing.assert_close(packing.unpack(found), expected, rtol=1e-5, atol=1e-5)


def test_named_sizes_have_the_published_numbers_of_parameters() -> None:
    counts = {}
    for size in ("spear-base", "spear-large", "spear-xlarge"):
        with torch.device("meta"):
            built = ZipformerTower(
                AudioTowerConfig(kind="zipformer", features="clsp", zipformer=ZipformerConfig(size=size))  # type: ignore[arg-type]
            )
        tensors = [x for name, x in built.state_dict().items() if name.startswith("encoder")]
        counts[size] = sum(x.numel() for x in tensors)
    assert counts["spear-xlarge"] == 5_226_225 + 591_747_011
    assert round(counts["spear-base"] / 1e6) == 93 and round(counts["spear-large"] / 1e6) == 327


@SIZES
def test_a_clip_has_the_same_result_alone_and_in_any_batch(config: ZipformerConfig) -> None:
    built = tower(config, MELS).double().eval()
    frames = [150, 97, 9, 24, 10, 149]
    x = features(*frames)
    together, packing = run(built, x, frames)
    poisoned = x.clone()
    for row, count in enumerate(frames):
        poisoned[row, count:] = 1e6
    again, _ = run(built, torch.nn.functional.pad(poisoned, (0, 0, 0, 31), value=-7.0), frames)
    torch.testing.assert_close(again, together, rtol=1e-12, atol=1e-12)
    for row, count in enumerate(frames):
        alone, single = run(built, x[row : row + 1, :count], [count])
        torch.testing.assert_close(packing.unpack(together)[row, : single.total], alone, rtol=1e-10, atol=1e-10)


def test_a_clip_of_a_waveform_has_the_same_vector_alone_padded_and_in_a_batch() -> None:
    built = tower(SMALL, MELS).eval()
    generator = torch.Generator().manual_seed(5)
    clips = [0.1 * torch.randn(size, generator=generator) for size in (16000, 9000, 300, 1, built.min_samples)]
    padded = torch.nn.utils.rnn.pad_sequence(clips, batch_first=True)
    sizes = [len(clip) for clip in clips]
    with torch.inference_mode():
        together = built(padded, torch.tensor(sizes), host_lengths=sizes)
        assert torch.equal(together, built(padded, torch.tensor(sizes)))
        noisy = padded + 9.0 * (torch.arange(padded.shape[1]) >= torch.tensor(sizes)[:, None])
        torch.testing.assert_close(built(noisy, torch.tensor(sizes), host_lengths=sizes), together, rtol=0, atol=1e-5)
        for row, clip in enumerate(clips):
            torch.testing.assert_close(built(clip[None])[0], together[row], rtol=0, atol=1e-5)
    assert together.shape == (5, built.width) and (together[0] - together[1]).norm() > 0.1


def test_frames_and_least_samples() -> None:
    built = tower(SMALL, MELS)
    spec = built.log_mel.spec
    assert spec.frames(built.min_samples) == 9 and spec.frames(built.min_samples - 1) == 8
    assert [frames_of(count) for count in (9, 10, 11, 150)] == [1, 1, 2, 71]


def test_distances_are_encoded_alike_whatever_the_longest_clip() -> None:
    short, long = encoded_distances(5, 12, torch.device("cpu")), encoded_distances(300, 12, torch.device("cpu"))
    assert torch.equal(long[295:304], short)
    c, angle = 12**0.5, torch.tensor(0.0)
    for row, distance in enumerate(range(-4, 5)):
        d = torch.tensor(float(distance))
        angle = (c * d.sign() * ((d.abs() + c).log() - torch.tensor(c).log()) * 2 * torch.pi / 12).atan()
        expected = torch.stack([f(angle * k) for k in range(1, 7) for f in (torch.cos, torch.sin)])
        torch.testing.assert_close(short[row, :-1], expected[:-1], rtol=1e-5, atol=1e-6)
        assert short[row, -1] == 1


def test_training_repeats_itself_and_checkpoints_change_nothing() -> None:
    audio = 0.1 * torch.randn(3, 12000, generator=torch.Generator().manual_seed(6))
    sizes = [12000, 8000, 5000]
    results = []
    for checkpoint in (False, False, True):
        built = tower(SMALL, MELS).train()
        built.prepare_training(checkpoint=checkpoint)
        torch.manual_seed(7)
        out = built(audio, torch.tensor(sizes), host_lengths=sizes)
        out.square().sum().backward()
        gradients = [p.grad for p in built.parameters() if p.grad is not None]
        results.append([out.detach(), *gradients, *(w.found for w in built.whiteners)])
    for other in results[1:]:
        assert all(torch.equal(x, y) for x, y in zip(results[0], other, strict=True))


def test_a_pass_without_gradients_makes_the_same_draws() -> None:
    built = tower(SMALL, MELS).train()
    audio = 0.1 * torch.randn(2, 12000, generator=torch.Generator().manual_seed(6))
    torch.manual_seed(7)
    expected, after = built(audio), torch.rand(1)
    torch.manual_seed(7)
    with torch.no_grad():
        assert torch.equal(built(audio), expected)
    assert torch.equal(torch.rand(1), after)


def test_schedules_are_linear_between_their_points() -> None:
    schedule = Schedule((0, 0.3), (100, 0.1), (300, 0.5))
    assert [schedule(at) for at in (-5, 0, 50, 100, 200, 300, 1e9)] == pytest.approx(
        [0.3, 0.3, 0.2, 0.1, 0.3, 0.5, 0.5]
    )


def test_a_step_moves_the_schedules() -> None:
    built = tower(SMALL, MELS)
    built.begin_step(30, 1200.0)
    assert built.batches == 60.0
    late = ZipformerTower(AudioTowerConfig(kind="zipformer", zipformer=ZipformerConfig(size="spear-base", layers=[1])))
    late.begin_step(30, 1200.0)
    assert late.batches == 100_060.0


class Always:
    """Stands for `Training` where every limit is active and every draw is the same."""

    def __init__(self, number: float = 0.0) -> None:
        self.number = number

    def draw(self) -> float:
        return self.number

    def at(self, value: Any) -> float:
        return value(0.0) if isinstance(value, Schedule) else value


def test_a_balancer_is_the_gradient_of_its_excess() -> None:
    generator = torch.Generator().manual_seed(8)
    spread = torch.tensor([0.01, 1.0, 5.0, 1.0, 1.0, 0.3])
    x = (torch.randn(50, 6, generator=generator) * spread + torch.tensor([0, 0, 0, 2.0, -2.0, 0.0])).double()
    balancer = Balancer((0.3, 0.6), (0.2, 2.0), 1.0)
    leaf = x.clone().requires_grad_()
    out = balancer(leaf, Always())  # type: ignore[arg-type]
    upstream = torch.randn(50, 6, dtype=torch.float64, generator=generator)
    out.backward(upstream)
    low, high = (limits._mean_of_share(share) for share in (0.3, 0.6))
    small, large = 0.2 * (torch.pi / 2) ** 0.5, 2.0 * (torch.pi / 2) ** 0.5
    inner = x.clone().requires_grad_()
    square, mean = inner.square().mean(0), inner.mean(0)
    ratio, size = mean / (square - mean.square()).sqrt(), square.sqrt()
    excess = (ratio - ratio.clamp(low, high)).abs() + (size.clamp(small, large) / size).log().abs()
    (slope,) = torch.autograd.grad(excess.sum(), inner)
    rms = slope.square().mean(0).sqrt()
    expected = upstream + upstream.abs() * slope * (0.04 / rms.clamp(min=1e-20))
    torch.testing.assert_close(leaf.grad, expected, rtol=1e-9, atol=1e-12)
    assert torch.equal(out, x)
    changed = (leaf.grad != upstream).any(0)
    assert torch.equal(changed, excess > 0) and changed.any() and not changed.all()


def test_a_balancer_counts_valid_positions_only() -> None:
    x = torch.randn(2, 3, 7, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(9))
    valid = (torch.arange(7) < torch.tensor([7, 4])[:, None])[:, None, :, None]
    balancer, gradient = Balancer((0.45, 0.5), (2.0, 3.0), 1.0), torch.ones_like(x)
    whole = torch.cat([x[0].transpose(0, 1), x[1, :, :4].transpose(0, 1)])  # [11, C, bands]
    expected = whole.clone().requires_grad_()
    balancer(expected, Always(), 1).backward(torch.ones_like(whole))  # type: ignore[arg-type]
    poisoned = x.masked_fill(~valid, 1e9).requires_grad_()
    balancer(poisoned, Always(), 1, valid).backward(gradient)  # type: ignore[arg-type]
    assert poisoned.grad is not None and expected.grad is not None
    found = torch.cat([poisoned.grad[0].transpose(0, 1), poisoned.grad[1, :, :4].transpose(0, 1)])
    torch.testing.assert_close(found, expected.grad, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("groups", [1, 2])
def test_a_whitener_is_the_gradient_of_its_distance(groups: int) -> None:
    generator = torch.Generator().manual_seed(10)
    x = torch.randn(40, 6, dtype=torch.float64, generator=generator) @ torch.randn(6, 6, dtype=torch.float64)
    upstream = torch.randn(40, 6, dtype=torch.float64, generator=generator)
    whitener = Whitener(1.5, 0.02, groups)
    leaf = x.clone().requires_grad_()
    whitener(leaf, Always()).backward(upstream)  # type: ignore[arg-type]
    inner = x.clone().requires_grad_()
    split = inner.view(40, groups, -1).transpose(0, 1)
    split = split - split.mean(1, keepdim=True)
    covariance = split.transpose(1, 2) @ split
    eigenvalues = torch.linalg.eigvalsh(covariance)
    distance = eigenvalues.square().mean() / eigenvalues.mean().square()
    assert distance > 1.5
    (slope,) = torch.autograd.grad(distance, inner)
    torch.testing.assert_close(leaf.grad, upstream + 0.02 * upstream.norm() * slope / slope.norm(), rtol=1e-9, atol=0)
    assert whitener.found.tolist() == [0, 1]


def test_a_whitener_looks_rarely_after_its_limit_held() -> None:
    x = torch.randn(200, 4, generator=torch.Generator().manual_seed(11)).requires_grad_()
    whitener = Whitener(3.0)

    def step(number: float) -> float:
        x.grad = None
        whitener(x, Always(number)).sum().backward()  # type: ignore[arg-type]
        assert x.grad is not None and torch.equal(x.grad, torch.ones_like(x))  # white enough
        limits.settle([whitener], whitener.found.clone())
        return float(whitener.probability)

    assert step(0.3) == pytest.approx(0.25)  # not drawn
    assert step(0.2) == pytest.approx(0.025)
    assert step(0.2) == pytest.approx(0.025) and whitener.found.tolist() == [0, 0]
    whitener.limit = 1.0001
    x.grad = None
    whitener(x, Always(0.2)).sum().backward()  # type: ignore[arg-type]
    assert x.grad is not None and torch.equal(x.grad, torch.ones_like(x))  # drawn on the host, but it does not look
    x.grad = None
    whitener(x, Always(0.02)).square().sum().backward()  # type: ignore[arg-type]
    limits.settle([whitener], whitener.found.clone())
    assert float(whitener.probability) == pytest.approx(0.25)


def test_a_parameter_out_of_its_range_is_driven_back() -> None:
    x = torch.tensor([0.1, 0.1, 0.5, 0.5, 1.2, 1.2]).requires_grad_()
    limits.limited(x, 0.2, 1.0, Always()).backward(torch.tensor([1.0, -1, 1, -1, 1, -1]))  # type: ignore[arg-type]
    assert x.grad is not None and x.grad.tolist() == [-1, -1, 1, -1, 1, 1]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"layers": [1, 2]}, r"zipformer.layers is \[1, 2\]; give a number for each of the 7 stacks"),
        ({"width": [0]}, "zipformer.width 0"),
        ({"kernel": [30]}, "zipformer.kernel has 30; it must be odd"),
        ({"feedforward": [99]}, "zipformer.feedforward has 99"),
        ({"unmasked_width": [2000]}, "unmasked_width 2000"),
        ({"encoding_width": 47}, "encoding_width is 47"),
        ({"output_downsampling": 4}, "output_downsampling 4"),
    ],
)
def test_impossible_sizes_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        build_audio_tower(AudioTowerConfig(kind="zipformer", zipformer=ZipformerConfig(size="spear-base", **changes)))


def test_poolings_and_layers_that_do_not_exist_are_refused() -> None:
    for options in ({"pooling": "token"}, {"hidden_states": "weighted"}):
        with pytest.raises(ConfigError, match="pools its result"):
            ZipformerTower(AudioTowerConfig(kind="zipformer", zipformer=SMALL, **options))  # type: ignore[arg-type]


def test_with_clip_normalization_a_clip_is_augmented_and_independent_of_its_level() -> None:
    plain = {"kind": "zipformer", "features": "clsp", "feature_options": {"n_mels": MELS}, "zipformer": SMALL}
    audio = 0.1 * torch.randn(3, 9000, generator=torch.Generator().manual_seed(12))
    vectors = {}
    for normalization in (None, "clip"):
        torch.manual_seed(0)
        built = ZipformerTower(AudioTowerConfig(feature_normalization=normalization, **plain)).eval()  # type: ignore[arg-type]
        with torch.inference_mode():
            vectors[normalization] = built(audio), built(0.5 * audio)
    torch.testing.assert_close(*vectors["clip"], rtol=0, atol=1e-4)
    assert (vectors[None][0] - vectors[None][1]).norm() > 0.1
    built.train()
    seen: list[Tensor] = []
    built.encoder_embed.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    for gain in (0.0, 6.0):
        built.config.random_gain = gain
        torch.manual_seed(1)
        built(audio)
    hidden = (seen[0] == 0).sum((1, 2))
    assert (hidden > 0).any()  # spans of SpecAugment, at the clip's level
    assert seen[0].shape == seen[1].shape and not torch.equal(seen[0], seen[1])
    with pytest.raises(ConfigError, match="feature_normalization global"):
        ZipformerTower(AudioTowerConfig(feature_normalization="global", **plain))  # type: ignore[arg-type]
