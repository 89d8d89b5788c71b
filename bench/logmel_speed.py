"""The CPU log-mel record: every engine of `bench.test_native`, and slower libraries, in one interleaved run.

    python -m bench.logmel_speed --out bench/records/NAME

For one thread and for two, and for each front-end: one call of every engine in turn on the same batch, until the time
is up. Per 10 s clip: the median and the middle 80 % of the wall times, and the least processor time of all threads,
which counts where something else is running. The C++ engine allocates its features in the call, as the others do, and
as ever gets the memory of those that were dropped before. asrfront, the fastest peer, has rows of Whisper's and Kaldi's
front-end only. Says where torchaudio's time goes by running its stages one at a time on kept inputs. Writes speed.json
and speed.md. Exit status 1 if a target is missed.
"""

from __future__ import annotations

import argparse
import functools
import json
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import torchaudio
from torch import Tensor

from bench import timing
from bench.tables import markdown
from bench.test_native import CASES, ENGINES, SECONDS, SLOW_ENGINES, Case, Run, by_kaldi_native_fbank
from fastclap.kernels.log_mel import native

CPU = torch.device("cpu")
FLOAT, INT16 = "fastclap C++", "fastclap C++, int16"
# What the C++ engine is held to: times as fast as the others, and ms of one core a clip with AVX-512.
TARGETS = {"torchaudio": 10.0, "kaldi-native-fbank": 5.0}
CORE_MS = 0.25
HANDOVER = "kaldi-native-fbank, one frame"


def with_processor_time(call: Run, least: list[float]) -> Run:
    """The call, which also keeps its least processor time in ms."""

    def timed() -> object:
        start = time.process_time()
        result = call()
        least[0] = min(least[0], 1e3 * (time.process_time() - start))
        return result

    return timed


def compare(calls: dict[str, Run], clips: int, seconds: float) -> dict[str, dict[str, float]]:
    """ms a clip of every call."""
    for call in calls.values():
        call()
    least: dict[str, list[float]] = {name: [float("inf")] for name in calls}
    timed = {name: with_processor_time(call, least[name]) for name, call in calls.items()}
    found = timing.interleaved(timed, CPU, seconds, most=200)
    rows = {}
    for name, row in found.items():
        wall = {key: getattr(row, f"{key}_ms") / clips for key in ("median", "p10", "p90")}
        rows[name] = {key: float(f"{x:.4g}") for key, x in {**wall, "cpu": least[name][0] / clips}.items()}
        rows[name]["repeats"] = row.repeats
    return rows


def engines(case: Case, waveform: Tensor, slow: bool) -> tuple[dict[str, Run], dict[str, str]]:
    """The calls of every engine, and why others have none."""
    makers: dict[str, Any] = {**ENGINES, HANDOVER: functools.partial(by_kaldi_native_fbank, one_frame=True)}
    calls, absent = {}, {}
    for name, make in {**makers, **(SLOW_ENGINES if slow else {})}.items():
        try:
            calls[name] = make(case, waveform)
        except pytest.skip.Exception as reason:
            absent[name] = str(reason)
    return calls, absent


def stages(case: Case, waveform: Tensor) -> dict[str, Run]:
    """What torchaudio's MelSpectrogram and a logarithm do, step by step, and its mel product on frames as rows."""
    transform: Any = torchaudio.transforms.MelSpectrogram(**case.torchaudio)
    numbers, bank = transform.spectrogram, transform.mel_scale.fb

    def stft() -> Tensor:
        return torch.stft(
            waveform, numbers.n_fft, numbers.hop_length, numbers.win_length, numbers.window,
            center=True, pad_mode="reflect", normalized=False, onesided=True, return_complex=True,
        )  # fmt: skip

    spectrum = stft()
    power = spectrum.abs().pow(2.0)  # [clips, bins, frames], frames adjacent
    rows = power.mT.contiguous()
    mel = torch.matmul(power.mT, bank).mT
    assert torch.allclose(mel, transform(waveform), rtol=1e-4)
    return {
        "all": lambda: transform(waveform).clamp_(min=case.spec.floor).log_(),
        "STFT": stft,
        "abs and square": lambda: spectrum.abs().pow(2.0),
        "mel product": lambda: torch.matmul(power.mT, bank).mT,
        "logarithm": lambda: mel.clamp(min=case.spec.floor).log_(),
        "mel product, frames as rows": lambda: torch.matmul(rows, bank),
    }


def measure(clips: int, seconds: float, slow: bool, counts: tuple[int, ...]) -> dict[str, Any]:
    record: dict[str, Any] = {"clips": clips, "seconds_per_clip": SECONDS, "cases": [], "stages": []}
    for count in counts:
        torch.set_num_threads(count)
        for name, case in CASES.items():
            waveform = case.waveform(clips)
            calls, absent = engines(case, waveform, slow)
            rows = compare(calls, clips, seconds)
            record["cases"].append({"case": name, "threads": count, "rows": rows, "absent": absent})
            found = compare(stages(case, waveform), clips, seconds / 3)
            record["stages"].append({"case": name, "threads": count, "rows": found})
            print(f"{name}, {threads(count)}:", *(f"{engine} {row['median']:.3f}" for engine, row in rows.items()))
    return record


def verdicts(record: dict[str, Any]) -> list[tuple[str, bool]]:
    """Each target, with the figures, and whether it is met."""
    found = []
    for entry in record["cases"]:
        rows, where = entry["rows"], f"{entry['case']}, {threads(entry['threads'])}"
        for engine in (FLOAT, INT16):
            if engine not in rows:
                continue
            for other, factor in TARGETS.items():
                if other not in rows:
                    continue
                theirs = rows[other]["median"]
                handover = rows[HANDOVER]["median"] if other == "kaldi-native-fbank" and HANDOVER in rows else 0.0
                ratio, least = theirs / rows[engine]["median"], (theirs - handover) / rows[engine]["median"]
                without = f" ({least:.1f} without handing over the samples)" if handover else ""
                found.append((f"{where}: {engine} is {ratio:.1f} times {other}{without}", least >= factor))
            if entry["threads"] == 1:
                found.append(
                    (f"{where}: {engine} takes {rows[engine]['median']:.3f} ms", rows[engine]["median"] <= CORE_MS)
                )
    return found


def threads(count: int) -> str:
    return f"{count} thread{'s' * (count > 1)}"


def tables(record: dict[str, Any]) -> str:
    lines = [
        "# CPU log-mel engines",
        "",
        f"Written by `{record['command']}` on {record['machine']['cpu']}, {record['machine']['cores']} cores; "
        f"C++ engine: {record['simd']}. Batches of {record['clips']} clips of {record['seconds_per_clip']} s; ms a "
        "clip: median of the interleaved calls (10th to 90th percentile) and least processor time.",
        "",
    ]
    for entry in record["cases"]:
        lines += [f"## {entry['case']}, {threads(entry['threads'])}", ""]
        ours = entry["rows"].get(FLOAT, {}).get("median")
        cells = [
            (
                name,
                f"{row['median']:.3f} ({row['p10']:.3f}-{row['p90']:.3f})",
                f"{row['cpu']:.3f}",
                f"{row['median'] / ours:.1f}" if ours else "",
            )
            for name, row in entry["rows"].items()
        ]
        lines += [markdown(("engine", "wall time", "processor time", f"over {FLOAT}"), cells), ""]
        lines += [f"- {name}: {reason}" for name, reason in entry["absent"].items()] + [""]
    lines += ["## Where torchaudio's time goes", ""]
    lines += ["MelSpectrogram and a logarithm, ms a clip, each stage alone on kept inputs.", ""]
    names = list(record["stages"][0]["rows"])
    cells = [
        (entry["case"], str(entry["threads"]), *(f"{entry['rows'][name]['median']:.3f}" for name in names))
        for entry in record["stages"]
    ]
    share = statistics.mean(
        (entry["rows"]["STFT"]["median"] + entry["rows"]["abs and square"]["median"]) / entry["rows"]["all"]["median"]
        for entry in record["stages"]
    )
    lines += [
        markdown(("front-end", "threads", *names), cells),
        "",
        f"STFT, abs and square take {100 * share:.0f} % on average: windowed frames, their complex spectrum, its "
        "magnitudes (a root, which the square undoes) and their squares, each written to memory for the whole batch "
        "and read again. The spectrum lies as [bins, frames], so that the mel product reads across its rows; the last "
        "column is the same product on frames as rows. It is dense, where a mel bank has at most two entries a bin. "
        "The C++ engine keeps 16 frames in the cache from samples to logarithm and skips the zeros of the bank.",
        "",
        "## Targets",
        "",
        *(f"- {'met' if met else '**missed**'}: {text}" for text, met in verdicts(record)),
        "",
        f"kaldi-native-fbank takes a Python list of samples; *{HANDOVER}*, at a hop of the whole clip, is the cost of "
        "handing them over. asrfront's kaldi-80 has Hamming's window in place of Povey's.",
    ]
    return "\n".join(lines) + "\n"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder for speed.json and speed.md")
    parser.add_argument("--clips", type=int, default=32, help="a batch")
    parser.add_argument("--seconds", type=float, default=20.0, help="for each front-end and number of threads")
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--fast", action="store_true", help="without " + ", ".join(SLOW_ENGINES))
    args = parser.parse_args()
    record = {
        "command": "python -m bench.logmel_speed",
        "machine": timing.machine(CPU),
        "simd": native.simd_paths()[0] if native.available() else native.description(),
        **measure(args.clips, args.seconds, not args.fast, tuple(args.threads)),
    }
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / "speed.json").write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    (args.out / "speed.md").write_text(tables(record), encoding="utf-8")
    missed = [text for text, met in verdicts(record) if not met]
    print(*(f"missed: {text}" for text in missed), sep="\n")
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
