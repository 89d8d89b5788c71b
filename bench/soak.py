"""Trainings that are killed, starved and stopped over and over: do they end as if nothing had been, and leak nothing?

    python -m bench.soak --minutes 60 --out bench/records/soak.md
    python -m bench.soak --ends 500 [--taken-apart]

The soak trains tiny models on one rank and on two, each with loader processes: once without a disturbance, and once
with one every few seconds, --resume after each that ends the run. Disturbances: SIGKILL of a rank, of a loader process,
and of a rank in the middle of a save; SIGTERM and SIGHUP; a full disk; a rank and a loader process that stand still for
a while. Both runs must end with the same weights and the same metrics.jsonl but for its times; memory, descriptors and
threads of the trainer must be flat from the first fifth of the run on, and no process and no piece of shared memory
may outlive a start.

`--ends` ends two-rank runs, a tenth of them trainings and the others only collectives, under conditions that
make an abort at the end likely: gloo's threads are late to let go of finished work (a C library slows them), and the
interpreter cannot be had in the last moments before it is taken apart. `--taken-apart` ends them as Python does, with
the interpreter taken apart, which is what `fastclap.train.distributed.end_process` avoids.
"""

from __future__ import annotations

import argparse
import atexit
import collections
import contextlib
import ctypes
import hashlib
import json
import os
import random
import re
import shutil
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

_MARK = "FASTCLAP_SOAK"
_LATE_SECONDS, _HOLD_SECONDS = 0.4, 0.8
_STUCK_SECONDS, _LEFT_SECONDS, _RESTART_SECONDS = 300, 60, 12
_DISK_BYTES = 64 << 20

_LATE = r"""
#define _GNU_SOURCE
#include <dlfcn.h>
#include <pthread.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

/* A thread of gloo says that a collective is finished, and is late to let go of its tensors. */
int late_microseconds;

int pthread_cond_broadcast(pthread_cond_t *condition) {
    static int (*next)(pthread_cond_t *);
    if (!next) next = (int (*)(pthread_cond_t *))dlsym(RTLD_NEXT, "pthread_cond_broadcast");
    char name[16] = "";
    int status = next(condition);
    pthread_getname_np(pthread_self(), name, sizeof name);
    if (!strcmp(name, "pt_gloo_runloop")) usleep(late_microseconds);
    return status;
}
"""


def configuration(folder: Path, *, workers: int = 0, steps: int = 2) -> dict[str, Any]:
    """The fields in which a tiny run differs from the recipe `small`."""
    return {
        "run_dir": str(folder),
        "steps": steps,
        "batch_size": 8,
        "log_every": 1,
        "save_every": 5,
        "valid_every": max(1, steps // 4),
        "device": "cpu",
        "threads": 1,
        "data": {
            "train": [str(folder.parent / "voices" / "train.jsonl")],
            "valid": [str(folder.parent / "voices" / "valid.jsonl")],
            "workers": workers,
            "crop_seconds": 0.5,
        },
        "model": {
            "audio": {"width": 16, "layers": 1, "heads": 2, "feature_options": {"n_mels": 16}},
            "text": {"width": 16, "layers": 1, "heads": 2, "vocab_size": 300},
            "head": {"kind": "linear", "dim": 16},
        },
        "optimizer": {"warmup_steps": 2, "ema_decay": 0.9},
    }


def as_rank(rank: int, ranks: int, port: int, log: Path) -> None:
    """Make this process one of several, as torchrun would, with its output in a file."""
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(ranks), LOCAL_RANK=str(rank))
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    descriptor = os.open(log, os.O_CREAT | os.O_WRONLY | os.O_APPEND)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    os.close(descriptor)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def prepare(folder: Path) -> None:
    """The clips, and the imports of all processes that are forked; the pictures of reports are not drawn."""
    process = os.fork()
    if not process:
        from fastclap.data.demo_voices import write_demo

        write_demo(folder / "voices", 48, 16, seed=1)
        os._exit(0)
    os.waitpid(process, 0)
    import torch

    from fastclap.evaluation import report
    from fastclap.train import cli, config, loop, recipes  # noqa: F401

    torch.set_num_threads(1)
    report._pictures = lambda *_: {}


# ---------------------------------------------------------------------------------------------------------------------
# ends


def ends(count: int, folder: Path, *, taken_apart: bool) -> Callable[[], None] | None:
    """Tell how `count` two-rank runs end; returns, in the process of a rank, what this one does."""
    tally: collections.Counter[tuple[int, ...]] = collections.Counter()
    file = folder / "ends.json"
    file.write_text(json.dumps(configuration(folder / "ends")))
    for number in range(1, count + 1):
        port, processes = free_port(), []
        for rank in range(2):
            process = os.fork()
            if not process:  # the stack of the parent is left before the run begins, so that it can end as any does
                log = folder / f"rank-{rank}.log"
                return partial(_end, rank, port, log, file, number % 10 == 0, taken_apart)
            processes.append(process)
        statuses = tuple(os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]) for process in processes)
        tally[statuses] += 1
        if any(statuses):
            for rank in range(2):
                text = (folder / f"rank-{rank}.log").read_text(errors="replace")
                print(f"run {number}, rank {rank}, status {statuses[rank]}: {text[-600:].strip()}", flush=True)
        shutil.rmtree(folder / "ends", ignore_errors=True)
        for log in folder.glob("rank-*.log"):
            log.unlink()
        if number % 20 == 0 or number == count:
            told = ", ".join(f"{times} x {statuses}" for statuses, times in tally.items())
            print(f"{number} of {count} runs; exit statuses of both ranks: {told}", flush=True)
    aborted = sum(times for statuses, times in tally.items() if any(statuses))
    print(f"{aborted} of {count} runs did not end well", flush=True)
    end(folder, aborted > 0)


def _end(rank: int, port: int, log: Path, file: Path, trains: bool, taken_apart: bool) -> None:
    as_rank(rank, 2, port, log)
    from fastclap.train import cli, distributed, loop

    barrier = distributed.barrier

    def last_barrier(world: distributed.World) -> None:
        late = ctypes.c_int.in_dll(ctypes.CDLL(os.environ["LD_PRELOAD"]), "late_microseconds")
        late.value = int(1e6 * _LATE_SECONDS)
        barrier(world)

    distributed.barrier = last_barrier
    if taken_apart:
        distributed.end_process = lambda status: None  # type: ignore[assignment, return-value]
    if not trains:
        loop.train = _only_collectives  # type: ignore[assignment]
    cli.main(["small", "--config", str(file)])


def _only_collectives(config: Any) -> None:
    """What a run exchanges, without a model."""
    import torch
    import torch.distributed as dist

    import fastclap
    from fastclap.train import distributed

    world = distributed.join("cpu")
    try:
        distributed.agree(lambda: {"step": 0}, world)
        for _ in range(2):
            a, b = torch.randn(2, 4, 8, requires_grad=True).unbind()
            fastclap.info_nce(a, b, 10.0, process_group=world.group, agree_once=True).backward()
            dist.all_reduce(torch.ones(1000), group=world.group, async_op=True).wait()
        distributed.agree(lambda: 1, world)
        distributed.barrier(world)
    finally:
        distributed.leave(world)


# ---------------------------------------------------------------------------------------------------------------------
# the soak: one start of a training


@dataclass
class Figures:
    """What a process holds."""

    megabytes: float
    descriptors: int
    threads: int


def figures(process: int) -> Figures | None:
    """Of a process; None: it has gone."""
    with contextlib.suppress(OSError, IndexError, ValueError):
        folder = Path("/proc") / str(process)
        pages = int((folder / "statm").read_text().split()[1]) - int((folder / "statm").read_text().split()[2])
        found = Figures(
            pages * os.sysconf("SC_PAGE_SIZE") / 1e6,
            len(list((folder / "fd").iterdir())),
            len(list((folder / "task").iterdir())),
        )
        return found if pages else None
    return None


def helpers(process: int) -> list[int]:
    """All descendants of a process."""
    children: dict[int, list[int]] = {}
    for status in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError, IndexError):
            parent = int(status.read_text().rsplit(")", 1)[1].split()[1])
            children.setdefault(parent, []).append(int(status.parent.name))
    found: list[int] = []
    left = [process]
    while left:
        left += (more := children.get(left.pop(), []))
        found += more
    return found


def loaders(process: int) -> list[int]:
    """The loader processes of a rank, which its fork server has started."""
    servers = [p for p in helpers(process) if "forkserver" in _command(p)]
    return [p for server in servers for p in helpers(server)]


def _command(process: int) -> str:
    with contextlib.suppress(OSError):
        return (Path("/proc") / str(process) / "cmdline").read_bytes().decode(errors="replace")
    return ""


def marked() -> list[int]:
    """The living processes of this soak but for itself."""
    wanted, found = f"{_MARK}={os.environ[_MARK]}".encode(), []
    for file in Path("/proc").glob("[0-9]*/environ"):
        with contextlib.suppress(OSError):
            state = (file.parent / "stat").read_text().rsplit(")", 1)[1].split()[0]
            if int(file.parent.name) != os.getpid() and state != "Z" and wanted in file.read_bytes().split(b"\0"):
                found.append(int(file.parent.name))
    return found


def shared_memory() -> set[str]:
    return set(os.listdir("/dev/shm"))


class Start:
    """The processes of one start of a training."""

    def __init__(self, file: Path, ranks: int, log: Path) -> None:
        self.processes: list[int] = []
        self._statuses: dict[int, int] = {}
        port = free_port()
        for rank in range(ranks):
            process = os.fork()
            if not process:
                self._be(rank, ranks, port, log, file)
            self.processes.append(process)

    @staticmethod
    def _be(rank: int, ranks: int, port: int, log: Path, file: Path) -> NoReturn:
        status: Any = 70
        try:
            as_rank(rank, ranks, port, log)
            from fastclap.train import cli, distributed

            try:
                cli.main(["small", "--config", str(file), "--resume"])
                status = 0
            except SystemExit as error:
                status = error.code
            except BaseException:
                import traceback

                traceback.print_exc()
            distributed.end_process(status if isinstance(status, int) else 71)
        finally:
            os._exit(72)

    def poll(self) -> list[int] | None:
        """The statuses of all ranks, once all have ended."""
        for process in self.processes:
            if process not in self._statuses:
                ended, status = os.waitpid(process, os.WNOHANG)
                if ended:
                    self._statuses[process] = os.waitstatus_to_exitcode(status)
        return None if len(self._statuses) < len(self.processes) else list(self._statuses.values())

    @property
    def living(self) -> list[int]:
        """The processes whose numbers are theirs still."""
        return [process for process in self.processes if process not in self._statuses]


# ---------------------------------------------------------------------------------------------------------------------
# disturbances


def _signal(number: int) -> Callable[[Start, Path, random.Random], str]:
    def send(start: Start, run: Path, chance: random.Random) -> str:
        _kill(chance.choice(start.living), number)
        return f"{signal.Signals(number).name} of a rank"

    return send


def _kill_loader(start: Start, run: Path, chance: random.Random) -> str:
    found = loaders(chance.choice(start.living))
    if found:
        _kill(chance.choice(found), signal.SIGKILL)
    return "SIGKILL of a loader process"


def _kill_in_a_save(start: Start, run: Path, chance: random.Random) -> str:
    """As soon as a checkpoint is being written."""
    end = time.monotonic() + 5
    while time.monotonic() < end:
        if any(run.glob("checkpoints/.writing-*")):
            break
    time.sleep(chance.uniform(0, 0.01))
    _kill(start.living[0], signal.SIGKILL)
    return "SIGKILL in a save"


def _fill_disk(start: Start, run: Path, chance: random.Random) -> str:
    filler = run.parent / "filler"
    with contextlib.suppress(OSError), open(filler, "wb", buffering=0) as file:
        while True:
            file.write(bytes(1 << 16))
    end = time.monotonic() + chance.uniform(0.5, 3)
    while time.monotonic() < end and start.poll() is None:
        time.sleep(0.05)
    filler.unlink()
    return "a full disk"


def _pause(whose: str) -> Callable[[Start, Path, random.Random], str]:
    def pause(start: Start, run: Path, chance: random.Random) -> str:
        rank = chance.choice(start.living)
        found = [rank] if whose == "a rank" else loaders(rank)
        if found:
            victim = chance.choice(found)
            _kill(victim, signal.SIGSTOP)
            time.sleep(chance.uniform(0.5, 3))
            _kill(victim, signal.SIGCONT)
        return f"{whose} stands still"

    return pause


def _kill(process: int, number: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.kill(process, number)


DISTURBANCES: list[Callable[[Start, Path, random.Random], str]] = [
    _signal(signal.SIGKILL),
    _signal(signal.SIGTERM),
    _signal(signal.SIGHUP),
    _kill_loader,
    _kill_in_a_save,
    _fill_disk,
    _pause("a rank"),
    _pause("a loader process"),
]


# ---------------------------------------------------------------------------------------------------------------------
# the soak: whole runs


@dataclass
class Outcome:
    """Of a run from its first start to its end."""

    run: Path
    seconds: float = 0.0
    starts: int = 0
    statuses: collections.Counter[int] = field(default_factory=collections.Counter)
    disturbed: collections.Counter[str] = field(default_factory=collections.Counter)
    samples: list[tuple[float, int, Figures]] = field(default_factory=list)  # seconds, steps, rank 0
    left_over: int = 0  # processes that outlived a start
    shared: int = 0  # pieces of shared memory that did
    faults: list[str] = field(default_factory=list)


def steps_done(run: Path) -> int:
    """Lines of metrics.jsonl, about one a step."""
    with contextlib.suppress(OSError):
        return (run / "metrics.jsonl").read_bytes().count(b"\n")
    return 0


def whole_run(run: Path, ranks: int, workers: int, steps: int, chance: random.Random | None, gap: float) -> Outcome:
    """Train to the end; with a source of chance, disturbed every `gap` steps on average."""
    file = run.with_suffix(".json")
    file.write_text(json.dumps(configuration(run, workers=workers, steps=steps)))
    outcome, begin, before = Outcome(run), time.monotonic(), shared_memory()
    turn = [act for act in DISTURBANCES if act is not _fill_disk or os.path.ismount(run.parent)]
    if chance is not None:
        chance.shuffle(turn)
    while True:
        log = run.parent / f"{run.name}-{outcome.starts}.log"
        start, born = Start(file, ranks, log), steps_done(run)
        outcome.starts, acts = outcome.starts + 1, outcome.disturbed.total()
        done, moved, quiet = born, time.monotonic(), 0.0 if chance is None else 1 + chance.expovariate(1 / gap)
        while (statuses := start.poll()) is None:
            time.sleep(0.05)
            now, there = time.monotonic(), steps_done(run)
            if there != done:
                quiet -= max(0, there - done)  # a resumed run takes lines back
                done, moved = there, now
                if found := figures(start.processes[0]):
                    outcome.samples.append((now - begin, done, found))
            if now - moved > _STUCK_SECONDS:
                outcome.faults.append(f"{log}: no step for {_STUCK_SECONDS} s")
                for process in start.living:
                    _kill(process, signal.SIGKILL)
            if chance is not None and quiet < 0:
                act = turn[outcome.disturbed.total() % len(turn)]
                outcome.disturbed[act(start, run, chance)] += 1
                quiet = 1 + chance.expovariate(1 / gap)
        outcome.statuses.update(statuses)
        _look_for_what_is_left(outcome, log, before)
        text = log.read_text(errors="replace")
        if "Traceback (most recent" in text or "terminate called" in text:
            outcome.faults.append(f"{log}: {_last_words(text)}")
        if not any(statuses):
            break
        if outcome.disturbed.total() == acts:  # and yet it has failed
            outcome.faults.append(f"{log}: statuses {statuses}: {_last_words(text)}")
            break
    outcome.seconds = time.monotonic() - begin
    return outcome


def _last_words(text: str) -> str:
    return " ".join(text.split())[-600:]


def _look_for_what_is_left(outcome: Outcome, log: Path, before: set[str]) -> None:
    """Processes and shared memory that a start has left behind, once loader processes have seen that it has gone."""
    end = time.monotonic() + _LEFT_SECONDS
    while (left := marked()) and time.monotonic() < end:
        time.sleep(0.1)
    for process in left:
        outcome.faults.append(f"{log}: left over is process {process}, {_command(process)[:120]!r}")
        _kill(process, signal.SIGKILL)
    outcome.left_over += len(left)
    shared = shared_memory() - before
    outcome.shared += len(shared)
    for name in shared:
        outcome.faults.append(f"{log}: left over is /dev/shm/{name}")
        before.add(name)


def result(run: Path) -> tuple[str, str, int]:
    """Hashes of the weights and of the metrics without their times, and the number of records."""
    weights = hashlib.sha256((run / "model" / "model.safetensors").read_bytes())
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    for record in records:
        record.pop("time", None)
    return weights.hexdigest(), hashlib.sha256(json.dumps(records).encode()).hexdigest(), len(records)


def soak(minutes: float, folder: Path, seed: int) -> list[str]:
    """Soak, print as it goes, and return the record's lines; those with a fault begin with FAULT."""
    setups, lines = [(1, 2), (2, 1)], []
    shared, before = shared_memory(), figures(os.getpid())
    for index, (ranks, workers) in enumerate(setups):
        seconds = 60 * minutes / len(setups)
        trial = whole_run(folder / f"trial-{index}", ranks, workers, 60, None, 0)
        (first, early, _), *_, (last, late, _) = trial.samples
        steps = max(60, int((late - early) / (last - first) * (seconds - trial.seconds) / 4))
        whole = whole_run(folder / f"whole-{index}", ranks, workers, steps, None, 0)
        gap = steps / max(8.0, (seconds - whole.seconds) / _RESTART_SECONDS)
        struck = whole_run(folder / f"struck-{index}", ranks, workers, steps, random.Random(seed + index), gap)
        lines += (new := told(ranks, workers, steps, whole, struck))
        print("\n".join(new), flush=True)
    after = figures(os.getpid())
    if before and after:
        lines.append(
            f"The soak itself had {before.descriptors} descriptors and {before.threads} threads before, and "
            f"{after.descriptors} and {after.threads} after; {len(shared_memory() - shared)} pieces of shared memory "
            "are left."
        )
    return lines


def told(ranks: int, workers: int, steps: int, whole: Outcome, struck: Outcome) -> list[str]:
    """The record of a pair of runs."""
    lines = [f"## {ranks} rank(s), {workers} loader process(es) each, {steps} steps", ""]
    lines += ["| | undisturbed | disturbed |", "|---|---|---|"]
    rows: list[tuple[str, ...]] = [
        ("seconds", f"{whole.seconds:.0f}", f"{struck.seconds:.0f}"),
        ("starts", str(whole.starts), str(struck.starts)),
    ]
    for name, unit in (("megabytes", "memory of rank 0, MB"), ("descriptors", "descriptors"), ("threads", "threads")):
        row = [unit]
        for outcome in (whole, struck):
            early, late = (
                [getattr(found, name) for _, at, found in outcome.samples if low * steps <= at <= high * steps]
                for low, high in ((0.2, 0.4), (0.8, 2.0))
            )
            if not early or not late:
                row.append("too short")
                continue
            first, last = statistics.median(early), statistics.median(late)
            row.append(f"{first:.0f} to {last:.0f}")
            if last > first + (max(20, 0.05 * first) if name == "megabytes" else 2):
                outcome.faults.append(f"{unit} grow from {first:.0f} to {last:.0f}")
        rows.append(tuple(row))
    rows.append(("processes that outlived a start", str(whole.left_over), str(struck.left_over)))
    rows.append(("shared memory that did", str(whole.shared), str(struck.shared)))
    statuses = [", ".join(f"{n} x {s}" for s, n in sorted(o.statuses.items())) for o in (whole, struck)]
    rows.append(("exit statuses of ranks", *statuses))
    lines += [f"| {' | '.join(row)} |" for row in rows]
    lines += ["", "Disturbances: " + (", ".join(f"{n} x {d}" for d, n in sorted(struck.disturbed.items())) or "none")]
    try:
        same = result(whole.run) == result(struck.run)
        lines.append(
            f"Weights and metrics {'are the same, bit for bit' if same else 'DIFFER'} "
            f"({result(whole.run)[2]} records, weights {result(whole.run)[0][:12]} and {result(struck.run)[0][:12]})."
        )
        if not same:
            struck.faults.append("weights or metrics differ")
    except (OSError, ValueError) as error:
        struck.faults.append(f"a run has no result: {error}")
    lines += [f"FAULT: {fault}" for outcome in (whole, struck) for fault in outcome.faults]
    return [*lines, ""]


# ---------------------------------------------------------------------------------------------------------------------
# command line


def begin(library: bool) -> Path:
    """The folder of the runs; restarts this program with the environment of its processes, if it has another."""
    if os.environ.get(_MARK):
        return Path(os.environ["FASTCLAP_CACHE"]).parent
    folder = Path(tempfile.mkdtemp(prefix="soak-"))
    environment = {**os.environ, _MARK: folder.name, "FASTCLAP_CACHE": str(folder / "cache"), "HF_HUB_OFFLINE": "1"}
    environment |= {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    if library:
        source, built = folder / "late.c", folder / "late.so"
        source.write_text(_LATE)
        subprocess.run(["cc", "-shared", "-fPIC", "-O1", "-o", built, source, "-ldl", "-lpthread"], check=True)
        environment["LD_PRELOAD"] = str(built)
    command: list[str] = [sys.executable, "-m", "bench.soak", *sys.argv[1:]]
    if not library and os.geteuid() == 0 and shutil.which("unshare"):
        # A disk that can be filled, and shared memory of its own, both gone with this process.
        mounts = f"mount -t tmpfs -o size={_DISK_BYTES} tmpfs {folder}; mount -t tmpfs tmpfs /dev/shm"
        command = ["unshare", "--mount", "sh", "-c", f'{mounts}; exec "$@"', "sh", *command]
    os.execvpe(command[0], command, environment)


def end(folder: Path, failed: bool) -> NoReturn:
    """Remove the folder, of which a copy is kept if something is to be seen in it, and end."""
    if failed:
        print(f"see {shutil.copytree(folder, f'{folder}-seen')}", flush=True)
    subprocess.run(["umount", "-q", folder], check=False, stderr=subprocess.DEVNULL)
    shutil.rmtree(folder, ignore_errors=True)
    raise SystemExit(int(failed))


def main() -> Callable[[], None] | None:
    """Run the command line; in the process of a rank, returns what it does."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--minutes", type=float, default=10, help="of the soak (default: %(default)s)")
    parser.add_argument("--ends", type=int, default=0, help="end so many two-rank runs instead")
    parser.add_argument("--taken-apart", action="store_true", help="with --ends: end them as Python does")
    parser.add_argument("--seed", type=int, default=0, help="of the disturbances")
    parser.add_argument("--out", type=Path, help="the record (default: printed only)")
    options = parser.parse_args()
    folder = begin(options.ends > 0)
    if options.ends:
        # What is registered first is called last; C code with the interpreter locked, which no other thread then gets.
        atexit.register(ctypes.PyDLL(None).usleep, int(1e6 * _HOLD_SECONDS))
    prepare(folder)
    if options.ends:
        return ends(options.ends, folder, taken_apart=options.taken_apart)
    import torch

    lines = soak(options.minutes, folder, options.seed)
    faults = [line for line in lines if line.startswith("FAULT")]
    title = f"# Soak: {options.minutes:g} minutes, {os.cpu_count()} cores, torch {torch.__version__}"
    text = "\n".join([title, "", f"`python -m bench.soak {re.sub('[^ -~]', '', ' '.join(sys.argv[1:]))}`", "", *lines])
    print(lines[-1], f"\n{len(faults)} fault(s)", flush=True)
    if options.out:
        options.out.write_text(text + "\n")
    end(folder, bool(faults))


if __name__ == "__main__":
    task = main()
    if task is not None:
        task()
