"""How far every log-mel engine is from float64: ours in C++, CUDA, Triton, torch, and the library a preset comes from.

    TRITON_INTERPRET=1 python -m bench.logmel_errors --out bench/records/NAME --audio FOLDER

On a machine with a GPU without the variable: then the engines of CUDA and Triton run there. With neither Triton's is
left out, and that of CUDA, as with the variable, is its own source on the CPU (`bench.cuda_on_cpu`).

The truth is `log_mel_reference`. Every engine gets the same float32 samples: generated sounds
(silence, full-scale tones, hum under weak noise, clicks, noise, a voice of 0.05 s to `--longest` seconds, a ragged
batch with noise behind each clip's end) and, with `--audio`, clips of real speech, resampled where a front-end asks for
it. In the ragged batch ours run all clips at once with their lengths; the others, which know no lengths, clip by clip.
Writes errors.json and errors.md into the folder. Exit status 1 if ours is worse than the float32 FFT (`worse`).
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.metadata
import json
import math
import os
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torchaudio
from torch import Tensor
from torchaudio.compliance import kaldi

from bench import cuda_on_cpu, quick_interpreter, timing
from fastclap.features import PRESETS
from fastclap.kernels.log_mel import native
from fastclap.kernels.log_mel.operator import log_mel
from fastclap.kernels.log_mel.spec import LogMelSpec
from fastclap.kernels.log_mel.torch_engine import log_mel_reference

Engine = Callable[[Tensor], Tensor]  # [samples] -> [frames, mels]

# Ours is worse where its rms error is above these multiples of the origin's over all sounds of a kind and on one sound.
# Rounding of one transform has one distribution, whatever the order of its sums; the factors leave room for its luck.
KIND, LUCK = 1.1, 1.5
# The rms of fewer values than this hangs on the largest of them, and a kind is judged as one sound is: of other draws
# of the 48 tones and hums, the loud errors of any engine of ours are 0.1 to 1.3 times the origin's.
MANY = 100_000
ROUNDING = 1e-6  # and above this: the rounding of the features themselves
LOUD = 60.0  # dB below the loudest band of a frame: what lies within is well-conditioned
BACKENDS = {"fastclap C++": "native", "fastclap CUDA": "cuda", "fastclap Triton": "triton", "fastclap torch": "torch"}
OURS = tuple(BACKENDS)
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
GPU = torch.cuda.is_available() and not INTERPRETED


# ---------------------------------------------------------------------------------------------------------------------
# Front-ends and where they come from
# ---------------------------------------------------------------------------------------------------------------------


def whisper(n_mels: int) -> Engine:
    from transformers import WhisperFeatureExtractor

    extractor = WhisperFeatureExtractor(feature_size=n_mels)
    options = {"sampling_rate": 16000, "padding": "do_not_pad", "truncation": False, "return_tensors": "pt"}
    return lambda x: extractor(x.numpy(), **options).input_features[0].T


def ast() -> Engine:
    from transformers import ASTFeatureExtractor

    extractor = ASTFeatureExtractor()
    return lambda x: extractor(x.numpy(), sampling_rate=16000, return_tensors="pt").input_values[0]


def clap(truncation: str) -> Engine:
    from transformers import ClapFeatureExtractor

    extractor = ClapFeatureExtractor(frequency_min=50)
    options = {"truncation": truncation, "padding": "pad", "sampling_rate": 48000, "return_tensors": "pt"}
    return lambda x: extractor(x.numpy(), max_length=len(x), **options).input_features[0, 0]


def fbank(**options: object) -> Engine:
    return lambda x: kaldi.fbank(x[None], **options)


def beats(x: Tensor) -> Tensor:
    return (kaldi.fbank(x[None] * 2**15, num_mel_bins=128) - 15.41663) / (2 * 6.55582)


def clsp(x: Tensor) -> Tensor:
    return kaldi.fbank(x[None], num_mel_bins=128, snip_edges=False, high_freq=-400.0)


def kaldi_native_fbank() -> Engine:
    import kaldi_native_fbank as knf

    options = knf.FbankOptions()
    options.frame_opts.samp_freq, options.frame_opts.dither, options.mel_opts.num_bins = 16000, 0.0, 80

    def run(x: Tensor) -> Tensor:
        extractor = knf.OnlineFbank(options)
        extractor.accept_waveform(16000, x.tolist())
        extractor.input_finished()
        return torch.from_numpy(np.stack([extractor.get_frame(i) for i in range(extractor.num_frames_ready)]))

    return run


def librosa_decibels(spec: LogMelSpec) -> Engine:
    import librosa

    options = {"n_fft": spec.n_fft, "hop_length": spec.hop_length, "pad_mode": "reflect", "n_mels": spec.n_mels}

    def run(x: Tensor) -> Tensor:
        mel = librosa.feature.melspectrogram(
            y=x.numpy(), sr=spec.sampling_rate, fmin=spec.f_min, fmax=spec.f_max, **options
        )
        return torch.from_numpy(librosa.power_to_db(mel, amin=1e-10, top_db=None)).T

    return run


def torchlibrosa_decibels(spec: LogMelSpec) -> Engine:
    from torchlibrosa.stft import LogmelFilterBank, Spectrogram

    stage = torch.nn.Sequential(
        Spectrogram(spec.n_fft, spec.hop_length),
        LogmelFilterBank(spec.mel_rate, spec.n_fft, spec.n_mels, spec.f_min, spec.f_max, top_db=None),
    )
    return lambda x: stage(x[None])[0, 0]


def mel_spectrogram(decibels: bool = False, **options: Any) -> Engine:
    mel = torchaudio.transforms.MelSpectrogram(**options)
    decibel = torchaudio.transforms.AmplitudeToDB("power")
    return lambda x: decibel(mel(x)).T if decibels else mel(x).clamp(min=1e-10).log().T


@dataclass(frozen=True)
class FrontEnd:
    spec: LogMelSpec
    origins: dict[str, Callable[[], Engine]]  # the first, whose transform is a float32 FFT, is what ours is judged by
    double: dict[str, Callable[[], Engine]] = field(default_factory=dict)  # with a transform in float64


MS_CLAP = replace(PRESETS["clap"], sampling_rate=44100, hop_length=320, mel_sampling_rate=32000)
MS_CLAP_NUMBERS = {
    "sample_rate": 32000,
    "n_fft": 1024,
    "hop_length": 320,
    "n_mels": 64,
    "f_min": 50.0,
    "f_max": 14000.0,
}
FUSION = {"sample_rate": 48000, "n_fft": 1024, "hop_length": 480, "n_mels": 64, "f_min": 50.0, "f_max": 14000.0}
FRONT_ENDS = {
    "whisper": FrontEnd(PRESETS["whisper"], {"transformers": lambda: whisper(80)}),
    "whisper, 128 mels": FrontEnd(replace(PRESETS["whisper"], n_mels=128), {"transformers": lambda: whisper(128)}),
    "kaldi": FrontEnd(
        PRESETS["kaldi"],
        {"torchaudio kaldi": lambda: fbank(num_mel_bins=80), "kaldi-native-fbank": kaldi_native_fbank},
    ),
    "clap": FrontEnd(
        PRESETS["clap"],
        {
            "torchaudio": lambda: mel_spectrogram(True, norm="slaney", mel_scale="slaney", **FUSION),
            "torchlibrosa": lambda: torchlibrosa_decibels(PRESETS["clap"]),
        },
        {"librosa": lambda: librosa_decibels(PRESETS["clap"]), "transformers": lambda: clap("rand_trunc")},
    ),
    "clap-fusion": FrontEnd(
        PRESETS["clap-fusion"],
        {"torchaudio": lambda: mel_spectrogram(True, **FUSION)},
        {"transformers": lambda: clap("fusion")},
    ),
    "ms-clap": FrontEnd(
        MS_CLAP,
        {
            "torchaudio": lambda: mel_spectrogram(True, norm="slaney", mel_scale="slaney", **MS_CLAP_NUMBERS),
            "torchlibrosa": lambda: torchlibrosa_decibels(MS_CLAP),
        },
    ),
    "ast": FrontEnd(PRESETS["ast"], {"transformers": ast}),
    "beats": FrontEnd(PRESETS["beats"], {"torchaudio kaldi": lambda: beats}),
    "clsp": FrontEnd(PRESETS["clsp"], {"torchaudio kaldi": lambda: clsp}),
    "torchaudio": FrontEnd(PRESETS["torchaudio"], {"torchaudio": mel_spectrogram}),
}


# ---------------------------------------------------------------------------------------------------------------------
# Sounds
# ---------------------------------------------------------------------------------------------------------------------


def voice(seconds: float, rate: int, generator: torch.Generator) -> Tensor:
    """A vibrato harmonic series, four syllables a second, over weak noise."""
    samples = max(1, round(seconds * rate))
    t = torch.arange(samples, dtype=torch.float64) / rate
    phase = 2 * torch.pi * 120 * t + 20 / 3 * torch.sin(2 * torch.pi * 3 * t)
    series = sum(torch.sin(k * phase) / k for k in range(1, 30)) * 0.05 * (1 + torch.sin(2 * torch.pi * 4 * t))
    return (series + 1e-3 * torch.randn(samples, generator=generator)).float()


def sounds(rate: int, longest: float) -> Iterator[tuple[str, list[Tensor]]]:
    """Names, and the clips of each: one, or those of a ragged batch."""
    generator = torch.Generator().manual_seed(0)
    samples = int(min(1.0, longest) * rate) + 37
    white = torch.randn(samples, generator=generator)
    t = torch.arange(samples, dtype=torch.float64) / rate

    def tones(lowest: float, highest: float) -> Tensor:
        """One tone has its luck of rounding; these are 24, of a quarter of a second."""
        pitches = lowest * (highest / lowest) ** torch.rand(24, 1, generator=generator)
        return torch.sin(2 * torch.pi * (pitches * t[: rate // 4] + torch.rand(24, 1, generator=generator))).float()

    clicks = torch.zeros(samples)
    clicks[samples // 3], clicks[samples // 2] = 1.0, -1.0
    yield "silence", [torch.zeros(samples)]
    yield "full-scale tones", list(tones(60, 0.45 * rate))
    yield "hum under weak noise", list(0.5 * tones(45, 65) + 1e-4 * white[: rate // 4])
    yield "clicks", [clicks]
    yield "noise", [0.1 * white]
    for seconds in (0.05, 0.5, 2.003, 10.0, 60.0):
        if seconds <= longest:
            yield f"voice, {seconds:g} s", [voice(seconds, rate, generator)]
    lengths = [min(seconds, longest) for seconds in (0.05, 0.31, 1.003, 2.5, 0.777, 4.0)]
    yield "ragged batch", [voice(seconds, rate, generator) for seconds in lengths]


def speech(folder: Path, clips: int, rate: int) -> list[Tensor]:
    """Clips spread over the audio files of a folder, mono, at a rate."""
    import soundfile
    import soxr

    paths = sorted(path for path in folder.rglob("*") if path.suffix.lower() in (".wav", ".flac", ".ogg", ".mp3"))
    if not paths:
        raise SystemExit(f"{folder}: no audio files")
    found = []
    for path in paths[:: max(1, len(paths) // clips)][:clips]:
        audio, own_rate = soundfile.read(path, dtype="float32", always_2d=True)
        found.append(torch.from_numpy(soxr.resample(audio.mean(axis=1), own_rate, rate).astype(np.float32)))
    return found


# ---------------------------------------------------------------------------------------------------------------------
# Errors
# ---------------------------------------------------------------------------------------------------------------------


def ours(engine: str, clips: Sequence[Tensor], spec: LogMelSpec) -> list[Tensor]:
    """All clips as one batch, with noise behind the end of each; the real frames of each, on the CPU."""
    lengths = torch.tensor([len(clip) for clip in clips])
    noise = torch.Generator().manual_seed(1)
    batch = torch.randn(len(clips), int(lengths.max()), generator=noise)
    for row, clip in zip(batch, clips, strict=True):
        row[: len(clip)] = clip
    backend = BACKENDS[engine]
    device = "cuda" if GPU and backend in ("cuda", "triton") else "cpu"
    with cuda_on_cpu.installed() if backend == "cuda" and not GPU else contextlib.nullcontext():
        features, frames = log_mel(batch.to(device), lengths.to(device), spec, backend=backend)
    return [x[:count] for x, count in zip(features.cpu(), frames.tolist(), strict=True)]


def loud(
    truth: Tensor,  # [frames, mels] features
    spec: LogMelSpec,
) -> Tensor:
    """Whether a value lies within `LOUD` dB of the loudest band of its frame, above the floor."""
    per_decibel = {"ln": math.log(10) / 10, "log10": 0.1, "db": 1.0}[spec.log]
    decibels = (truth * spec.std + spec.mean) / per_decibel
    return (decibels > decibels.amax(dim=1, keepdim=True) - LOUD) & (decibels > 10 * math.log10(spec.floor) + 1e-6)


def figures(differences: Sequence[Tensor], at: Sequence[Tensor]) -> dict[str, float]:
    """Largest and rms error of all values, and of those that are loud."""
    every = torch.cat([x.flatten() for x in differences])
    chosen = torch.cat([x[mask] for x, mask in zip(differences, at, strict=True)])
    found = {}
    for name, x in (("", every), ("_loud", chosen)):
        found[f"max{name}"] = float(f"{float(x.abs().max()) if x.numel() else 0.0:.4g}")
        found[f"rms{name}"] = float(f"{float(x.square().mean().sqrt()) if x.numel() else 0.0:.4g}")
    return found


def measure(front_end: FrontEnd, named_clips: Iterable[tuple[str, list[Tensor]]]) -> list[dict[str, Any]]:
    """A row a sound: the errors of every engine that is installed."""
    spec = front_end.spec
    others, reasons = {}, {}
    for name, make in {**front_end.origins, **front_end.double}.items():
        try:
            others[name] = make()
        except ImportError as error:
            reasons[name] = f"not installed: {error.name}"
    rows = []
    for kind, clips in named_clips:
        truths = [log_mel_reference(clip[None], None, spec) for clip in clips]
        truth = [features[0, : int(frames)] for features, frames in truths]
        at = [loud(x, spec) for x in truth]
        engines = {}
        for name in OURS:
            if name == "fastclap C++" and not native.available():
                reasons[name] = native.description()
                continue
            if name == "fastclap Triton" and not (INTERPRETED or GPU):
                reasons[name] = "neither a GPU nor TRITON_INTERPRET=1"
                continue
            if name == "fastclap CUDA" and not (GPU or cuda_on_cpu.compiler()):
                reasons[name] = "neither a GPU nor g++"
                continue
            found = ours(name, clips, spec)
            engines[name] = figures([x.double() - y for x, y in zip(found, truth, strict=True)], at)
        for name, engine in others.items():
            found = [engine(clip)[: len(y)] for clip, y in zip(clips, truth, strict=True)]
            engines[name] = figures([x.double() - y for x, y in zip(found, truth, strict=True)], at)
        values, audible = sum(x.numel() for x in truth), sum(int(mask.sum()) for mask in at)
        rows.append({"sound": kind, "clips": len(clips), "values": values, "loud": audible, "engines": engines})
    if reasons:
        rows[0]["absent"] = reasons
    return rows


def worse(rows: Sequence[dict[str, Any]], origin: str) -> list[str]:
    """Sounds, and kinds of sounds, on which an engine of ours has a larger error than the origin."""
    found = []
    kinds = {"all sounds but pure tones and hum": True, "pure tones and hum": False}
    for engine in OURS:
        groups = [
            (KIND, kind, [row for row in rows if row["sound"].startswith(WELL) == well]) for kind, well in kinds.items()
        ]
        groups += [(LUCK, row["sound"], [row]) for row in rows]
        for factor, name, group in groups:
            if not group or not all({engine, origin} <= row["engines"].keys() for row in group):
                continue
            mine, theirs = pooled(group, engine), pooled(group, origin)
            for figure, count in (("rms", "values"), ("rms_loud", "loud")):
                room = factor if sum(row[count] for row in group) >= MANY else LUCK
                if mine[figure] > room * theirs[figure] + ROUNDING:
                    found.append(f"{name}: {figure} of {engine} {mine[figure]:.1e}, {theirs[figure]:.1e}")
    return found


def pooled(rows: Sequence[dict[str, Any]], engine: str) -> dict[str, float]:
    """The figures of an engine over all sounds of a front-end."""
    found: dict[str, float] = {}
    for name, count in (("", "values"), ("_loud", "loud")):
        total = sum(row[count] for row in rows)
        squares = sum(row[count] * row["engines"][engine][f"rms{name}"] ** 2 for row in rows)
        found[f"rms{name}"] = math.sqrt(squares / max(total, 1))
        found[f"max{name}"] = max(row["engines"][engine][f"max{name}"] for row in rows)
    return found


# ---------------------------------------------------------------------------------------------------------------------
# Tables
# ---------------------------------------------------------------------------------------------------------------------

# Sounds whose bands are above the rounding of a float32 transform, as a rule.
WELL = ("silence", "noise", "voice", "ragged batch", "clicks", "real speech")


def tables(record: dict[str, Any]) -> str:
    lines = [
        "# Errors of the log-mel engines against float64",
        "",
        f"Written by `{record['command']}`. CPU: {record['machine']['cpu']}; "
        + ", ".join(f"{name} {version}" for name, version in record["versions"].items())
        + f"; C++ engine: {record['simd']}; CUDA: {record['cuda']}; Triton: {record['triton']}.",
        "",
        "Features are in the units of each preset (natural logarithm for Kaldi's family and torchaudio, decibels for "
        "the CLAP family, normalised for Whisper, AST and BEATs). *loud*: values within "
        f"{LOUD:.0f} dB of the loudest band of their frame. *float32 FFT* marks what ours is judged by: the "
        "library that the preset reproduces, or torchaudio where that one's own transform is no float32 FFT (the CLAP "
        "family); *float64 inside* has a transform in float64 and is no match for a float32 one.",
        "",
    ]
    everything = {name: entry["rows"] for name, entry in record["front_ends"].items()}
    for title, choose in (
        ("All sounds but pure tones and hum", lambda kind: kind.startswith(WELL)),
        ("Pure tones and hum", lambda kind: not kind.startswith(WELL)),
    ):
        lines += [
            f"## {title}",
            "",
            "| front-end | engine | rms | max | rms, loud | max, loud |",
            "|---|---|---|---|---|---|",
        ]
        for name, all_rows in everything.items():
            rows = [row for row in all_rows if choose(row["sound"])]
            entry = record["front_ends"][name]
            for engine in rows[0]["engines"]:
                figure = pooled(rows, engine)
                role = {entry["origin"]: " (float32 FFT)"}.get(engine, "")
                role = " (float64 inside)" if engine in entry["double"] else role
                cells = [f"{figure[key]:.1e}" for key in ("rms", "max", "rms_loud", "max_loud")]
                lines.append(f"| {name} | {engine}{role} | {' | '.join(cells)} |")
        lines.append("")
    kinds = list(dict.fromkeys(row["sound"] for rows in everything.values() for row in rows))
    for engine in OURS:
        if not any(engine in row["engines"] for rows in everything.values() for row in rows):
            continue
        lines += [f"## {engine} over the float32 FFT, by sound: ratio of rms errors (all values / loud values)", ""]
        lines += ["| sound | " + " | ".join(everything) + " |", "|---" * (1 + len(everything)) + "|"]
        for kind in kinds:
            cells = []
            for name, rows in everything.items():
                origin = record["front_ends"][name]["origin"]
                row = next((row for row in rows if row["sound"] == kind), None)
                cells.append("" if row is None else ratio(row["engines"], engine, origin))
            lines.append(f"| {kind} | {' | '.join(cells)} |")
        lines += ["", f'"=": both below {ROUNDING:g}.', ""]
    exceptions = [f"- {name}: {line}" for name, entry in record["front_ends"].items() for line in entry["worse"]]
    lines += ["## Verdict", ""]
    if exceptions:
        few = f"on one sound, or over fewer than {MANY:,} values, {LUCK} times"
        lines += [f"Worse than the float32 FFT (rms above {KIND} times its own; {few}) on:", ""]
        lines += exceptions
    else:
        lines.append(
            "On no front-end is the rms error of an engine of ours, of all values or of the loud ones, above that of "
            f"the float32 FFT by more than rounding ({KIND} times + {ROUNDING:g}) over its pure tones and hum or over "
            f"its other sounds, nor above {LUCK} times + {ROUNDING:g} on a single sound or over fewer than {MANY:,} "
            "values."
        )
    lines += [
        "",
        "Where a comparison needs care: a float32 transform leaves rounding of about 1e-7 of a frame's amplitude in "
        "every bin. Bands 100 dB and more below the loudest of their frame (next to a tone or a hum, above 8 kHz in "
        "speech that was recorded at 16 kHz) hold that rounding instead of their energy, in every float32 engine, "
        "and a logarithm shows it as errors of whole units, above all where the truth is the floor. Two float32 "
        "engines differ there as much as each differs from the truth: only their rms errors compare, and the loud "
        "values. Largest errors are single values out of thousands and depend on the luck of rounding. torchlibrosa is "
        "judged by no verdict: it multiplies by the DFT matrix, which takes tens of times the operations of an FFT and "
        "rounds less, so that its errors may be half of those of any FFT, ours or torchaudio's.",
    ]
    return "\n".join(lines) + "\n"


def ratio(engines: dict[str, dict[str, float]], engine: str, origin: str) -> str:
    if not {engine, origin} <= engines.keys():
        return ""
    cells, mine = [], engines[engine]
    for figure in ("rms", "rms_loud"):
        small = max(mine[figure], engines[origin][figure]) <= ROUNDING
        cells.append("=" if small else f"{mine[figure] / max(engines[origin][figure], 1e-12):.2f}")
    return " / ".join(cells)


def versions() -> dict[str, str]:
    found = {}
    for name in ("torch", "torchaudio", "transformers", "librosa", "torchlibrosa", "kaldi-native-fbank"):
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder for errors.json and errors.md")
    parser.add_argument("--audio", type=Path, help="folder of real speech")
    parser.add_argument("--clips", type=int, default=24, help="how many of its files")
    parser.add_argument("--longest", type=float, default=60.0, help="seconds of the longest generated sound")
    parser.add_argument("--front-ends", nargs="+", choices=FRONT_ENDS, default=list(FRONT_ENDS))
    args = parser.parse_args()
    quick_interpreter.install()
    record: dict[str, Any] = {
        "command": "TRITON_INTERPRET=1 " * INTERPRETED
        + "python -m bench.logmel_errors"
        + " --audio FOLDER" * (args.audio is not None)
        + f" --longest {args.longest:g}" * (args.longest != parser.get_default("longest")),
        "machine": timing.machine(torch.device("cpu")),
        "versions": versions(),
        "simd": native.simd_paths()[0] if native.available() else native.description(),
        "cuda": "on the GPU" if GPU else "its source on the CPU",
        "triton": "in its interpreter" if INTERPRETED else "on the GPU" if GPU else "absent",
        "front_ends": {},
    }
    failures = 0
    for name in args.front_ends:
        front_end = FRONT_ENDS[name]
        rate = front_end.spec.sampling_rate
        clips = list(sounds(rate, args.longest))
        if args.audio:
            clips.append(("real speech", speech(args.audio, args.clips, rate)))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # mel filters without a bin, which some origins have
            rows = measure(front_end, clips)
        origin = next(iter(front_end.origins))
        found = worse(rows, origin)
        failures += len(found)
        print(f"{name}: {len(rows)} sounds, {len(found)} on which ours is worse than {origin}", *found, sep="\n  ")
        record["front_ends"][name] = {
            "origin": origin, "double": list(front_end.double), "worse": found, "rows": rows,
        }  # fmt: skip
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / "errors.json").write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    (args.out / "errors.md").write_text(tables(record), encoding="utf-8")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
