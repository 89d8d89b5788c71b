"""Tables and plots of the records: `README.md` in each device's folder, and the tables of `docs/benchmarks.md`."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from bench.gpu.lots import LOTS, ROOT
from bench.gpu.records import read_all
from bench.run import ABSENT, NOT_REACHED, Row
from bench.tables import markdown

Records = dict[str, dict[str, Any]]

PAGE = ROOT / "docs" / "benchmarks.md"
BEGIN, END = "<!-- tables of bench.gpu: begin -->", "<!-- end -->"
UNMEASURED = "**Nothing here has been measured on a GPU yet.**"
OURS = ("fastclap", "fastclap Triton")  # forms of the kernels that are ours
PUBLISHED = "CLSP's code, as published"  # form of the lot `clsp` (`bench.clsp_step`)
COMMON_SIZES = ("clips", "seconds", "heads", "frames", "head_width", "rows", "channels")  # in all cases of a kernel
FORMS_ON_PAGE = ("fastclap Triton", "materialised, compiled", "open_clip, compiled", "inf_cl", "memeff")


def write_reports(root: Path) -> list[Path]:
    """Writes the page and the plots of every device under `root`, and the tables of `PAGE` from its own records."""
    written = []
    devices = {folder: read_all(folder) for folder in sorted(root.glob("*")) if folder.is_dir()}
    for folder, records in devices.items():
        if not records:
            continue
        for name, draw in plots(records):
            draw(folder / name)
            written.append(folder / name)
        page = folder / "README.md"
        page.write_text(report(records), encoding="utf-8")
        written.append(page)
    if root == ROOT / "bench" / "records" / "gpu":
        PAGE.write_text(with_tables(PAGE.read_text(encoding="utf-8"), devices), encoding="utf-8")
        written.append(PAGE)
    return written


def with_tables(page: str, devices: dict[Path, Records]) -> str:
    """The page with new tables between its marks."""
    before, _, rest = page.partition(BEGIN)
    _, mark, after = rest.partition(END)
    if not mark:
        raise ValueError(f"the page has no “{BEGIN}” … “{END}”")
    return f"{before}{BEGIN}\n{tables_of(devices)}\n{END}{after}"


def tables_of(devices: dict[Path, Records]) -> str:
    """The training step and the loss on every device that has records."""
    parts = []
    for folder, records in devices.items():
        tables = [
            *_step(records, brief=True),
            *_clsp(records, brief=True),
            *_loss(records, FORMS_ON_PAGE),
            *_state(records),
        ]
        if tables:
            link = f"../bench/records/gpu/{folder.name}/README.md"
            parts += [f"On one {_device(records)} ([all of it]({link})):", *tables]
    return "\n\n".join(parts or [UNMEASURED])


def report(records: Records) -> str:
    """The page of a device."""
    parts = [
        f"# {_device(records)}",
        "Made by `python -m bench.gpu --report` from the records in this folder. Times are medians on the device "
        "(middle 80 %), behind a queued wait; *host* is the time until a call was queued.",
        *_lots(records),
        *_state(records),
        *_failures(records),
        *_absent(records),
        *_step(records, brief=False),
        *_clsp(records, brief=False),
        *_profile(records),
        *_open_clip(records),
        *_train(records),
        *_loss(records, None),
        *_contrasts(records),
        *_errors(records),
        *_stages(records),
        *_latency(records),
        *_kernels(records),
        *_embed(records),
    ]
    return "\n\n".join(parts) + "\n"


# ---------------------------------------------------------------------------------------------------------------------
# what the tables share


def _device(records: Records) -> str:
    return next(iter(records.values()))["device"]


def rows_of(records: Records, *lots: str, **case: Any) -> list[Row]:
    """Rows of some lots whose case has these fields with these values (`...`: any)."""
    return [
        row
        for lot in lots
        if lot in records
        for row in records[lot]["rows"]
        if all(name in row["case"] and value in (..., row["case"][name]) for name, value in case.items())
    ]


def _unique(values: Iterable[Any]) -> list[Any]:
    return list(dict.fromkeys(values))


def _ms(row: Row) -> str:
    if "median_ms" not in row:
        return row["reason"][:60]
    if row["repeats"] < 2:
        return f"{row['median_ms']:.3g}"
    return f"{row['median_ms']:.3g} ({row['p10_ms']:.3g}-{row['p90_ms']:.3g})"


def _gigabytes(row: Row) -> str:
    return "" if row.get("peak_bytes") is None else f"{row['peak_bytes'] / 1e9:.2f} GB"


def _percent(row: Row, name: str) -> str:
    return "" if row.get(name) is None else f"{row[name]:.0%}"


def _figure(row: Row, name: str) -> str:
    return "" if row.get(name) is None else f"{row[name]:.3g}"


# ---------------------------------------------------------------------------------------------------------------------
# tables


def _lots(records: Records) -> Iterator[str]:
    runs = {name: records[name]["runs"][-1] for name in LOTS if name in records}
    for versions in _unique(", ".join(f"{n} {v}" for n, v in run["software"].items() if v) for run in runs.values()):
        yield f"Software: {versions}."
    yield markdown(
        ["lot", "last run", "", "seconds", "commit"],
        [
            [name, run["date"], run["status"], str(run.get("seconds", "")), _commit(run["commit"])]
            for name, run in runs.items()
        ],
    )


def _commit(commit: str | None) -> str:
    head, _, changes = (commit or "").partition(",")
    return f"{head[:10]}{changes}"


def _state(records: Records) -> Iterator[str]:
    """A sentence on what was checked."""
    said = []
    checks = [
        row for name in ("smoke", "loss", "towers", "log_mel") for row in rows_of(records, name) if "passed" in row
    ]
    if checks:
        said.append(f"{sum(row['passed'] is True for row in checks)} of {len(checks)} checks against float64 passed")
    for row in rows_of(records, "tests", file="all"):
        said.append(f"{row['passed_tests']} tests passed on the device, {row['failed_tests']} failed")
    rates = [(row, "TFLOP/s", "tflops") for row in rows_of(records, *LOTS, ceiling="matmul")[:1]]
    rates += [(row, "GB/s", "gbytes_s") for row in rows_of(records, *LOTS, ceiling="copy")[:1]]
    for row, unit, name in rates:
        if name in row:
            said.append(f"a large {row['case']['ceiling']} runs at {row[name]:.4g} {unit}")
    if said:
        yield "; ".join(said) + "."


def _failures(records: Records) -> Iterator[str]:
    bad = [
        (name, row)
        for name in records
        for row in records[name]["rows"]
        if row.get("passed") is False or ("reason" in row and not row["reason"].startswith((ABSENT, NOT_REACHED)))
    ]
    if bad:
        yield "What failed:"
        yield markdown(
            ["lot", "case", ""],
            [
                [name, _case(row), str(row.get("reason") or row.get("errors") or row.get("failures"))[:120]]
                for name, row in bad
            ],
        )


def _absent(records: Records) -> Iterator[str]:
    rows = [row for name in records for row in records[name]["rows"] if row.get("reason") == ABSENT]
    absent = _unique(
        f"{row['case']['form']} ({row.get('notes', '').split(';')[0]})" for row in rows if "form" in row["case"]
    )
    if absent:
        yield f"Not there: {', '.join(absent)}."


def _case(row: Row) -> str:
    return ", ".join(str(value) for value in row["case"].values())


def _step(records: Records, *, brief: bool) -> Iterator[str]:
    lots = ("step",) if brief else ("step", "step_more")
    sizes = _unique(row["case"]["rows"] for row in rows_of(records, *lots, form=..., rows=...))
    for rows in [min(sizes)] if brief and sizes else sizes:
        cases = [row for row in rows_of(records, *lots, form=..., rows=rows) if not brief or "median_ms" in row]
        if not cases:
            continue
        yield f"A training step of WavLM-Large and XLM-R, {rows} clips of {cases[0]['case'].get('seconds', 10):g} s:"
        times = {row["case"]["form"]: row.get("median_ms") for row in cases}
        released, tuned = times.get("reference, as released"), times.get("reference, bf16")
        yield markdown(
            ["form", "ms", "clips/s", "of the matmul peak", "memory", "× released", "× reference, bf16"],
            [
                [row["case"]["form"], *_step_cells(row), *(_gain(row, base) for base in (released, tuned))]
                for row in cases
            ],
        )


def _step_cells(row: Row) -> list[str]:
    return [_ms(row), _figure(row, "clips_per_s"), _percent(row, "mfu"), _gigabytes(row)]


def _clsp(records: Records, *, brief: bool) -> Iterator[str]:
    cases = rows_of(records, "clsp", form=..., clips=..., seconds=...)
    for clips, seconds in _unique((row["case"]["clips"], row["case"]["seconds"]) for row in cases):
        chosen = [row for row in cases if row["case"]["clips"] == clips and row["case"]["seconds"] == seconds]
        chosen = [row for row in chosen if not brief or "median_ms" in row]
        if not chosen:
            continue
        yield f"A training step of CLSP's second stage with SPEAR-XLarge, {clips} clips of {seconds:g} s:"
        published = next((row.get("median_ms") for row in chosen if row["case"]["form"] == PUBLISHED), None)
        yield markdown(
            ["form", "ms", "clips/s", "of the matmul peak", "memory", "s of audio/s", "× published"],
            [
                [row["case"]["form"], *_step_cells(row), _figure(row, "audio_s_per_s"), _gain(row, published)]
                for row in chosen
            ],
        )


def _gain(row: Row, base_ms: float | None) -> str:
    return f"{base_ms / row['median_ms']:.1f}" if base_ms and "median_ms" in row else ""


def _open_clip(records: Records) -> Iterator[str]:
    rows = [row for row in rows_of(records, "step_more", rate=48000) if "median_ms" in row]
    if rows:
        clips = rows[0]["case"]["clips"]
        yield f"open_clip's CLAP and our log-mel tower of as many parameters, {clips} clips at 48 kHz:"
        yield markdown(
            ["form", "ms", "clips/s", "memory"],
            [[row["case"]["form"], _ms(row), _figure(row, "clips_per_s"), _gigabytes(row)] for row in rows],
        )


def _profile(records: Records) -> Iterator[str]:
    parts = [row for row in rows_of(records, "step", part=...) if "ms" in row]
    if parts:
        yield f"Where the device's time of our step goes, {parts[0]['clips']} clips:"
        yield markdown(
            ["part", "ms", "share"],
            [[row["case"]["part"], _figure(row, "ms"), _percent(row, "share")] for row in parts],
        )
    rows = [row for row in rows_of(records, "step", kernel=...) if "ms" in row][:10]
    if rows:
        yield "The longest kernels of our step:"
        cells = [
            [f"`{row['case']['kernel'][:80]}`", str(row["calls"]), _figure(row, "ms"), _percent(row, "share")]
            for row in rows
        ]
        yield markdown(["kernel", "calls", "ms", "share"], cells)


def _train(records: Records) -> Iterator[str]:
    rows = [row for row in rows_of(records, "train", step=...) if "clips_per_s" in row]
    if rows:
        row = rows[-1]
        shares = {"mfu": "of the peak", "waiting": "of the time waiting for clips"}
        units = {"clips_per_s": "clips/s", "watts": "W", "joules_per_clip": "J a clip"}
        said = [f"{_figure(row, name)} {unit}" for name, unit in units.items() if _figure(row, name)]
        said += [f"{_percent(row, name)} {unit}" for name, unit in shares.items() if _percent(row, name)]
        yield f"`fastclap-train` at full size from packed shards, at step {row['case']['step']}: {', '.join(said)}."


def _loss(records: Records, names: Sequence[str] | None) -> Iterator[str]:
    brief = names is not None
    cases = rows_of(records, "loss", "loss_more", loss=..., rows=..., form=...)
    cases = [row for row in cases if "check" not in row["case"] and row.get("reason") != ABSENT]
    for loss, dim in _unique((row["case"]["loss"], row["case"]["dim"]) for row in cases):
        chosen = [row for row in cases if (row["case"]["loss"], row["case"]["dim"]) == (loss, dim)]
        chosen = [row for row in chosen if not brief or (row["case"]["form"] in names and "median_ms" in row)]
        if not chosen or (brief and (loss, dim) != ("info_nce", 768)):
            continue
        sizes = sorted({row["case"]["rows"] for row in chosen})
        by_cell = {(row["case"]["form"], row["case"]["rows"]): row for row in chosen}
        yield f"`{loss}`, forward and backward, D = {dim}, {chosen[0]['case']['dtype']}, ms (memory beyond the inputs):"
        yield markdown(
            ["form", *(f"N = {n:,}" for n in sizes)],
            [
                [form, *(_loss_cell(by_cell.get((form, n)), brief) for n in sizes)]
                for form in _unique(row["case"]["form"] for row in chosen)
            ],
        )
    for row in rows_of(records, "loss_more", largest=...):
        if "median_ms" in row:
            case = row["case"]
            memory = f", {_gigabytes(row)} beyond the inputs" if _gigabytes(row) else ""
            yield f"N = {case['rows']:,}, D = {case['dim']}, one step: {row['median_ms'] / 1e3:.3g} s{memory}."


def _loss_cell(row: Row | None, brief: bool) -> str:
    if row is None:
        return ""
    if "median_ms" not in row:
        return _ms(row)
    if brief:
        return f"{row['median_ms']:.3g}" + (f" ({_gigabytes(row)})" if _gigabytes(row) else "")
    host = f"host {row['host_ms']:.3g}" if "host_ms" in row and row["host_ms"] > 0.5 * row["median_ms"] else ""
    return ", ".join(part for part in (_ms(row), host, _gigabytes(row), _percent(row, "share_of_peak")) if part)


def _contrasts(records: Records) -> Iterator[str]:
    rows = [row for row in rows_of(records, "loss_more", contrast=..., form=...) if "median_ms" in row]
    if rows:
        case = rows[0]["case"]
        yield (
            f"What else InfoNCE contrasts, forward and backward, N = {case['rows']:,}, D = {case['dim']}, "
            f"{case['dtype']}; the floor is the passes of 2·N²·D flops at the measured rate:"
        )
        yield markdown(
            ["form", "ms", "passes", "floor ms", "memory", "largest error"],
            [
                [
                    *(row["case"]["form"], _ms(row), f"{row['passes']:g}", _figure(row, "floor_ms"), _gigabytes(row)),
                    f"{max(row['errors'].values()):.1e}" if row.get("errors") else "",
                ]
                for row in rows
            ],
        )


def _errors(records: Records) -> Iterator[str]:
    cases = [row for row in rows_of(records, "loss", loss="info_nce", rows=..., form=...) if row.get("errors")]
    if not cases:
        return
    largest = max(row["case"]["rows"] for row in cases)
    cases = [row for row in cases if row["case"]["rows"] == largest]
    names = list(cases[0]["errors"])
    yield f"Relative error against float64 on the same inputs, N = {largest:,}:"
    yield markdown(
        ["form", *names],
        [
            [r["case"]["form"], *(f"{r['errors'][n]:.1e}" if r["errors"].get(n) is not None else "none" for n in names)]
            for r in cases
        ],
    )


def _stages(records: Records) -> Iterator[str]:
    measured = [row for row in rows_of(records, "loss", stage=..., form=...) if row.get("floor_ms")]
    if measured:
        yield "Where a step's time goes. The floor is the stage's matmul passes, or its bytes, at the measured rates:"
        yield markdown(
            ["N", "D", "form", "stage", "ms", "floor ms", "floor / ms"],
            [
                [
                    *(f"{row['case']['rows']:,}", str(row["case"]["dim"]), row["case"]["form"], row["case"]["stage"]),
                    *(f"{_stage_ms(row):.3g}", f"{row['floor_ms']:.3g}", f"{row['floor_ms'] / _stage_ms(row):.0%}"),
                ]
                for row in measured
            ],
        )


def _stage_ms(row: Row) -> float:
    return float(row["kernel_ms"] if "kernel_ms" in row else row["median_ms"])


def _latency(records: Records) -> Iterator[str]:
    rows = [row for row in rows_of(records, "loss", latency=...) if "median_ms" in row]
    if rows:
        columns = _unique((row["case"]["rows"], row["case"]["latency"]) for row in rows)
        by_cell = {(r["case"]["form"], r["case"]["rows"], r["case"]["latency"]): f"{r['median_ms']:.3g}" for r in rows}
        yield "Small batches, forward and backward, ms: calls in a row by the wall clock, and replays of a graph:"
        yield markdown(
            ["form", *(f"N = {n:,}, {mode}" for n, mode in columns)],
            [
                [f, *(by_cell.get((f, *column), "") for column in columns)]
                for f in _unique(r["case"]["form"] for r in rows)
            ],
        )


def _kernels(records: Records) -> Iterator[str]:
    """A line a case: ours, the floor, and the fastest peer."""
    rows = rows_of(records, "towers", "log_mel", kernel=..., form=...)
    cases = _unique(tuple((k, v) for k, v in row["case"].items() if k != "form") for row in rows)
    cells = []
    for case in cases:
        chosen = {
            r["case"]["form"]: r for r in rows if tuple((k, v) for k, v in r["case"].items() if k != "form") == case
        }
        timed = {form: row for form, row in chosen.items() if "median_ms" in row}
        ours = next((chosen[form] for form in OURS if form in chosen), None)
        peers = {form: row for form, row in timed.items() if not form.startswith("fastclap")}
        best = min(peers, key=lambda form: peers[form]["median_ms"], default=None)
        gain = f"{peers[best]['median_ms'] / ours['median_ms']:.2g}" if best and ours and "median_ms" in ours else ""
        errors = [e for n, e in ((ours or {}).get("errors") or {}).items() if n != "largest"]
        cells.append(
            [
                ", ".join(f"B = {v}" if k == "batch" else str(v) for k, v in case if k not in COMMON_SIZES),
                "" if ours is None else _ms(ours),
                _figure(ours or {}, "floor_ms"),
                _percent(ours or {}, "share_of_floor"),
                f"{max(errors):.1e}" if errors else "",
                best or "",
                _ms(peers[best]) if best else "",
                gain,
            ]
        )
    if cells:
        yield "The other kernels, each with its fastest peer; the floor is bytes or flops at the measured rates:"
        yield markdown(["case", "ours, ms", "floor", "floor / ms", "error", "fastest peer", "its ms", "×"], cells)


def _embed(records: Records) -> Iterator[str]:
    rows = [row for row in rows_of(records, "embed", form=...) if "median_ms" in row]
    if rows:
        yield "Embedding with a full-size model:"
        names = [n for n in _unique(n for row in rows for n in row["case"]) if n != "form"]
        yield markdown(
            ["form", *names, "ms", "clips or captions a second"],
            [
                [
                    *(r["case"]["form"], *(str(r["case"].get(n, "")) for n in names), _ms(r)),
                    _figure(r, "clips_per_s") or _figure(r, "captions_per_s"),
                ]
                for r in rows
            ],
        )


# ---------------------------------------------------------------------------------------------------------------------
# plots


def plots(records: Records) -> Iterator[tuple[str, Callable[[Path], None]]]:
    """The file name of each plot for which there are figures, and the function that draws it."""
    loss = [r for r in rows_of(records, "loss", "loss_more", loss="info_nce", rows=..., form=...) if "median_ms" in r]
    if loss:
        yield "loss.png", lambda path: _plot_loss(loss, path)
    step = [r for r in rows_of(records, "step", form=..., rows=...) if "clips_per_s" in r]
    if step:
        yield "step.png", lambda path: _plot_step(step, path)


def _axes(count: int) -> Any:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot.subplots(1, count, figsize=(6 * count, 4.5), squeeze=False, layout="constrained")


def _plot_loss(rows: Sequence[Row], path: Path) -> None:
    dims = sorted({row["case"]["dim"] for row in rows})
    figure, axes = _axes(len(dims))
    for axis, dim in zip(axes[0], dims, strict=True):
        for form in _unique(row["case"]["form"] for row in rows):
            chosen = [row for row in rows if (row["case"]["form"], row["case"]["dim"]) == (form, dim)]
            line = sorted((row["case"]["rows"], row["median_ms"]) for row in chosen)
            if line:
                axis.plot(*zip(*line, strict=True), marker="o", lw=3 if form in OURS else 1, label=form)
        axis.set(xscale="log", yscale="log", xlabel="N", ylabel="ms, forward and backward", title=f"InfoNCE, D = {dim}")
        axis.grid(alpha=0.3, which="both")
        axis.legend(fontsize="small")
    figure.savefig(path, dpi=110)


def _plot_step(rows: Sequence[Row], path: Path) -> None:
    sizes = sorted({row["case"]["rows"] for row in rows})
    figure, axes = _axes(len(sizes))
    for axis, size in zip(axes[0], sizes, strict=True):
        chosen = [row for row in rows if row["case"]["rows"] == size][::-1]
        bars = axis.barh([row["case"]["form"] for row in chosen], [row["clips_per_s"] for row in chosen])
        for bar, row in zip(bars, chosen, strict=True):
            bar.set_color("tab:gray" if row["case"]["form"].startswith("reference") else "tab:blue")
        axis.bar_label(bars, fmt="%.3g", padding=2)
        axis.margins(x=0.15)
        axis.set(xlabel="clips a second", title=f"batch of {size:,}")
    figure.savefig(path, dpi=110)
