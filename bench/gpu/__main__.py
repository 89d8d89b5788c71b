"""What only a GPU can show, in lots of under four minutes, whose rows are on the disk as soon as they are measured.

    python -m bench.gpu --plan                       # every lot: its record here, whether its code changed, seconds
    python -m bench.gpu --seconds 280                # what lacks a current record, the most useful first, within a time
    python -m bench.gpu --lots smoke loss            # these
    python -m bench.gpu --dry-run --out FOLDER       # every lot at tiny sizes on a CPU: tests the code, not the speed
    python -m bench.gpu --merge FOLDER               # take over rows of records that were made elsewhere
    python -m bench.gpu --report                     # write the tables and plots of every device from its records

The records are `bench/records/gpu/<device>/<lot>.json` (`bench.run`); the `README.md` of each folder and the
tables of `docs/benchmarks.md` are generated from them. The kernels of a lot are compiled first, in parallel, into
Triton's cache. Then every stage of it runs in a process of its own, watched by this one, which never touches the GPU: a
form that is absent, raises, hangs or is killed is a row with its reason, and the rest goes on (`bench.gpu.watch`).

Times on the device are taken behind a queued wait or by graph replay, and the host's separately (`bench.timing`).
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch

import fastclap
from bench import timing
from bench.gpu.lots import LOTS, ROOT, Lot
from bench.gpu.records import complete, folder_of, merge
from bench.gpu.watch import die_with_parent, run_stages
from bench.run import ABSENT, Record, Settings, read_record
from bench.tables import markdown

RECORDS = ROOT / "bench" / "records" / "gpu"
LEAST_SECONDS = 20  # a lot is not started with less
RESERVE = 10  # seconds kept for ending in time, whatever hangs


def commit() -> str | None:
    """The commit of the tree, and whether files were changed since; None outside of git."""

    def git(*arguments: str) -> str | None:
        try:
            done = subprocess.run(["git", "-C", str(ROOT), *arguments], capture_output=True, text=True, check=True)
        except (OSError, subprocess.CalledProcessError):
            return None
        return done.stdout.strip()

    head = git("rev-parse", "HEAD")
    return f"{head}, with changes" if head and git("status", "--porcelain", "--untracked-files=no") else head


def software() -> dict[str, str | None]:
    versions: dict[str, str | None] = {"python": platform.python_version(), "fastclap": fastclap.__version__}
    for name in ("torch", "triton", "transformers"):
        try:
            versions[name] = __import__(name).__version__
        except ImportError:
            versions[name] = None
    return versions


def machine(device: str) -> dict[str, Any]:
    """What `bench.timing.machine` says, asked for in a process that may touch the GPU.

    Raises:
        SystemExit: there is no GPU, or it does not answer.
    """

    def ask(connection: Any) -> None:
        die_with_parent()
        available = device == "cpu" or torch.cuda.is_available()
        connection.send(timing.machine(torch.device(device)) if available else None)

    here, there = multiprocessing.Pipe()
    process = multiprocessing.get_context("fork").Process(target=ask, args=(there,))
    process.start()
    try:
        if not here.poll(120):
            raise SystemExit("bench.gpu: the GPU did not answer within two minutes")
        found = here.recv()
        if found is None:
            raise SystemExit("no GPU here; --dry-run --out FOLDER runs the same code at tiny sizes on the CPU")
        return found
    finally:
        process.kill()
        process.join()


def newest(lot: Lot, device_folders: Sequence[Path]) -> dict[str, Any] | None:
    """The record of a lot with the latest run, out of several folders."""
    found = [r for folder in device_folders if (r := read_record(folder / f"{lot.name}.json")) is not None]
    return max(found, key=lambda r: r["runs"][-1]["date"], default=None)


def expected_seconds(lot: Lot, record: dict[str, Any] | None) -> float:
    """What the last complete run took, or an estimate."""
    done = [] if record is None else [run["seconds"] for run in record["runs"] if run["status"] == "done"]
    return done[-1] if done else lot.seconds


def plan_row(lot: Lot, record: dict[str, Any] | None) -> list[str]:
    cells = [lot.name, "none", "", f"{expected_seconds(lot, record):.0f} s", lot.what]
    if record is not None:
        run = record["runs"][-1]
        reasons = [row.get("reason", "not passed" if row.get("passed") is False else ABSENT) for row in record["rows"]]
        failed = sum(reason != ABSENT for reason in reasons)
        bad = f", {failed} failed" if failed else ""
        cells[1] = f"{run['date'][:10]}, {run['status']}, {len(record['rows'])} rows{bad}"
        cells[2] = "current" if record["code"] == lot.code else "code changed since"
    return cells


def plan(out: Path) -> str:
    """A table for every device that has records, or one where none has."""
    folders = sorted({folder.name for root in (RECORDS, out) for folder in root.glob("*") if folder.is_dir()})
    parts = []
    for name in folders or ["any device"]:
        rows = [plan_row(lot, newest(lot, [RECORDS / name, out / name])) for lot in LOTS.values()]
        total = sum(expected_seconds(lot, newest(lot, [RECORDS / name, out / name])) for lot in LOTS.values())
        parts.append(f"{name}: the most useful first, {total:.0f} s in all\n")
        parts.append(markdown(["lot", "record", "its code", "takes", "shows"], rows) + "\n")
    return "\n".join(parts)


def run_lot(lot: Lot, path: Path, settings: Settings, about: dict[str, Any], seconds: float) -> str:
    """Compiles and runs a lot within so many seconds. Returns how it ended."""
    start = time.monotonic()
    deadline = start + seconds
    record = Record(path)
    date = datetime.now(timezone.utc).isoformat(timespec="seconds")
    record.begin(lot.name, about["machine"]["device"], lot.code, date=date, **about, budget_s=round(seconds, 1))
    print(f"[{lot.name}] {lot.what}", flush=True)
    if settings.device == "cuda" and (lot.forms or lot.calls):
        from bench.gpu.compiling import compile_forms

        capability = about["machine"]["capability"].replace(".", "")
        compiled = compile_forms(lot.forms, int(capability), 0.5 * seconds, lot.calls)
        record.update_run(compiled=compiled)
    status = run_stages(record, lot.stages, settings, deadline)
    record.update_run(status=status, seconds=round(time.monotonic() - start, 1))
    print(f"[{lot.name}] {status} after {time.monotonic() - start:.0f} s", flush=True)
    return status


def run_lots(names: Sequence[str], out: Path, settings: Settings, seconds: float, chosen: bool) -> bool:
    """Runs lots until the time is up. Returns whether all of them came to their end."""
    end = time.monotonic() + seconds
    found = machine(settings.device)
    folder = out / folder_of(found["device"])
    about = {"command": " ".join(["python -m bench.gpu", *sys.argv[1:]]), "commit": commit()}
    about |= {"software": software(), "machine": found}
    for what in ("reference", "open_clip", "icefall"):
        checkout = getattr(settings, what)
        if checkout is not None:
            from bench.reference_step import commit_of

            about[what] = commit_of(checkout)
    well = True
    for name in names:
        lot = LOTS[name]
        known = newest(lot, [RECORDS / folder.name, folder])
        if not chosen and complete(known, lot.code):
            print(f"[{name}] has a current record", flush=True)
            continue
        left = end - time.monotonic() - RESERVE
        if left < LEAST_SECONDS:
            print(f"[{name}] not reached: {max(0.0, left):.0f} s are left", flush=True)
            well = False
            continue
        status = run_lot(lot, folder / f"{name}.json", settings, about, min(left, max(lot.seconds, 240.0)))
        well &= status == "done"
    return well


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--plan", action="store_true", help="list the lots, their records and what they take")
    what.add_argument("--report", action="store_true", help="write tables and plots from the records")
    what.add_argument("--merge", type=Path, metavar="FOLDER", help="take over records, FOLDER/<device>/<lot>.json")
    parser.add_argument("--lots", nargs="+", choices=LOTS, metavar="NAME", help=f"some of: {', '.join(LOTS)}")
    parser.add_argument("--seconds", type=float, default=3600, help="for everything (default: %(default)s)")
    parser.add_argument("--dry-run", action="store_true", help="tiny sizes on the CPU: tests the code, not the speed")
    parser.add_argument("--reference", type=Path, help="checkout of ParaSpeechCLAP")
    parser.add_argument("--open-clip", type=Path, help="checkout of open_clip with CLAP")
    parser.add_argument("--icefall", type=Path, help="checkout of yfyeung/icefall, branch clsp")
    parser.add_argument("--out", type=Path, default=RECORDS, help="folder of the records (default: %(default)s)")
    args = parser.parse_args()
    if args.plan:
        print(plan(args.out))
        return 0
    if args.merge is not None:
        for source in sorted(args.merge.glob("*/*.json")):
            lot = LOTS.get(source.stem)
            # A copy of the tree without git knows its code, but no commit.
            same = lot is not None and (read_record(source) or {}).get("code") == lot.code
            revision = commit() if same else None
            print(merge(source, args.out / source.parent.name / source.name, revision))
    if args.report or args.merge is not None:
        from bench.gpu.report import write_reports

        for path in write_reports(args.out):
            print(path)
        return 0
    if args.dry_run and args.out == RECORDS:
        parser.error("--dry-run needs --out: a CPU's figures are no records")
    settings = Settings("cpu" if args.dry_run else "cuda", args.reference, args.open_clip, args.icefall)
    # Peers may leave large files in the compilers' caches: theirs go with the run.
    with tempfile.TemporaryDirectory() as cache:
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = cache
        well = run_lots(args.lots or list(LOTS), args.out, settings, args.seconds, chosen=args.lots is not None)
    print(plan(args.out))
    return 0 if well else 1


if __name__ == "__main__":
    sys.exit(main())
