"""What the CUDA log-mel kernel looks like in machine code, for GPUs that need not be there, beside the bound of bytes.

    python -m bench.log_mel_code [--out FILE]

For every front-end of `bench.kernel_peers` and an n_fft of 2,048, compiled by NVRTC for sm_80, 90 and 100: seconds of
the compiler, without its cache; registers, stack and shared memory of a block; blocks on a multiprocessor; and a
frame's instructions and wavefronts by step, as `bench.machine_code` counts them. Exits with 1 where a form spills or a
multiprocessor has no room for the blocks that it is planned for.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import torch

from bench import machine_code
from bench.kernel_peers import FRONT_ENDS
from bench.machines import H100
from bench.predictions import COPY_SHARE, HERTZ, MULTIPROCESSORS, SCHEDULERS
from bench.tables import markdown
from fastclap.kernels import cuda_tools, offline
from fastclap.kernels.log_mel import cuda_engine
from fastclap.kernels.log_mel.spec import LogMelSpec

SPECS = {**FRONT_ENDS, "n_fft 2048": LogMelSpec(44100, 2048, 2048, 512, 128)}
STEPS = ("samples", "means", "first", "second", "third", "range")
FORM_COLUMNS = (
    "front-end",
    "arch",
    "compiled in s",
    "registers",
    "stack B",
    "shared B",
    "threads",
    "blocks/SM",
    "frames",
)
STEP_COLUMNS = ("front-end", "arch", *STEPS, "issue", "wavefronts", "bytes")


def rows() -> Iterator[tuple[list[str], list[str], bool]]:
    """Of each form the cells under `FORM_COLUMNS` and `STEP_COLUMNS`, and whether all is well."""
    for name, spec in SPECS.items():
        found = cuda_engine.layout(spec)
        assert isinstance(found, cuda_engine.Layout)
        for arch in offline.ARCHITECTURES:
            source, options = cuda_engine.SOURCE.read_text(), cuda_engine.options(spec, torch.float32, False)
            file, every = cuda_tools._named(source, options, arch)
            start = time.perf_counter()
            cubin = cuda_tools._nvrtc().compile(source, file, every)
            seconds = time.perf_counter() - start
            usage = offline._resource_usage(cubin, "log_mel")
            stack = usage["STACK"] + usage["LOCAL"]
            blocks = offline._programs(arch, found.shared_bytes, usage["REG"], found.threads // 32, 0)
            form = [name, arch, f"{seconds:.1f}", usage["REG"], stack, f"{found.shared_bytes:,}", found.threads, blocks]
            steps = machine_code.log_mel_frame(machine_code.parse(offline._cuobjdump(cubin, "-sass")), spec)
            cycles = {step: (counts.instructions / SCHEDULERS, counts.wavefronts) for step, counts in steps.items()}
            by_step = ["{:.0f} / {:.0f}".format(*cycles[step]) if step in cycles else "-" for step in STEPS]
            moved = 4 * (spec.hop_length + spec.n_mels)
            floor = moved / (COPY_SHARE * H100.tbytes * 1e12) * MULTIPROCESSORS * HERTZ
            total = [f"{value:.0f}" for value in (*map(sum, zip(*cycles.values(), strict=True)), floor)]
            yield (
                [*map(str, form), str(found.frames)],
                [name, str(arch), *by_step, *total],
                not stack and blocks >= min(found.blocks, offline.SHARED_OF_SM[arch] // found.shared_bytes),
            )


def page(forms: list[list[str]], steps: list[list[str]]) -> str:
    kernel, tools, *engines = (
        len(path.read_text(encoding="utf-8").splitlines())
        for path in (cuda_engine.SOURCE, Path(cuda_tools.__file__), *Path(cuda_engine.__file__).parent.glob("*.py"))
    )
    return f"""# Machine code of the CUDA log-mel kernel

Written by `python -m bench.log_mel_code --out FILE`; NVRTC {cuda_tools.compiler_version()}, float32 to float32. Nothing here was run on a GPU.

{markdown(FORM_COLUMNS, forms)}

Cycles of a multiprocessor for a frame, to issue / of the pipe to shared memory and L1, by step of the kernel: samples
into shared memory (and what a block begins with), frames' means, real FFTs, complex FFTs and powers, mels to features,
dynamic range. *bytes*: the cycles in which {COPY_SHARE:.0%} of an {H100.name}'s rate brings a frame's new samples and takes its features,
float32. The least of shared memory; `tests/kernels/log_mel/test_cuda_engine.py` has where lanes keep out of each other's
banks.

{markdown(STEP_COLUMNS, steps)}

Lines: {kernel} of the kernel, {tools} that compile and launch it, {sum(engines):,} in `kernels/log_mel` with all engines.
"""  # noqa: E501


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="write the page there")
    args = parser.parse_args()
    forms, steps, well = [], [], True
    for form, step, good in rows():
        print(*form, *step[2:], "" if good else "does not fit", sep=" | ", flush=True)
        forms.append(form)
        steps.append(step)
        well = well and good
    if args.out:
        args.out.write_text(page(forms, steps), encoding="utf-8")
    return 0 if well else 1


if __name__ == "__main__":
    sys.exit(main())
