"""Markdown tables and plots of a record that `bench.gpu_evidence` wrote.

    python -m bench.tables bench/records/NAME/record.json

prints the tables; the plots lie beside the record.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

Record = dict[str, Any]
Row = dict[str, Any]

# Sections of the kernels beside the loss, with the fields that tell their cases apart.
KERNELS = {
    "log_mel": ("front_end", "audio", "dtype"),
    "attention": ("batch", "passes"),
    "layer_norm_gelu": ("passes",),
    "normalize_waveform": ("statistics",),
}
KERNEL_SIZES = ("clips", "seconds", "heads", "frames", "head_width", "rows", "channels")


def tables(record: Record) -> str:
    """All tables of a record, each under a line that says what it shows."""
    machine, software = record.get("machine", {}), record.get("software", {})
    versions = ", ".join(f"{name} {version}" for name, version in software.items() if version)
    device = f"{machine.get('device', 'unknown device')} ({record['hardware']})"
    parts = [f"{device}, {versions}, commit {record['commit']}, {record['date']}."]
    if record.get("correct") is not True:
        failed = ", ".join(name for name, passed in record.get("checks", {}).items() if not passed) or "none was made"
        parts.append(f"**Checks did not all pass ({failed}): the figures that rest on them are not for use.**")
    unfinished = [f"{name} ({s['status']})" for name, s in record["sections"].items() if s["status"] != "done"]
    if unfinished:
        parts.append("Sections that did not finish: " + ", ".join(unfinished) + ".")
    parts += [*_speed(record), *_errors(record), *_stages(record), *_latency(record), *_largest(record)]
    for section in KERNELS:
        parts += _kernel(record, section)
    parts += _kernel_tests(record)
    return "\n\n".join(parts)


def plots(record: Record) -> Iterator[tuple[str, Callable[[Path], None]]]:
    """The file names of the plots that the record has figures for, and what draws each."""
    timed = [row for row in _cases(record) if "median_ms" in row and row["loss"] == "info_nce"]
    if timed:
        yield "time.png", lambda path: _plot_time(timed, path)
    measured = [row for row in _rows(record, "stages") if row.get("floor_ms")]
    if measured:
        yield "stages.png", lambda path: _plot_stages(measured, path)
    kernels = {name: [row for row in _kernel_cases(record, name) if "median_ms" in row] for name in KERNELS}
    kernels = {name: rows for name, rows in kernels.items() if rows}
    if kernels:
        yield "kernels.png", lambda path: _plot_kernels(kernels, path)


def markdown(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    return "\n".join("| " + " | ".join(cells) + " |" for cells in (header, ["---"] * len(header), *rows))


def _rows(record: Record, section: str) -> list[Row]:
    return record["sections"].get(section, {}).get("rows", [])


def _cases(record: Record) -> list[Row]:
    return [row for name in ("main", "more", "sigmoid") for row in _rows(record, name) if row["peer"]]


def _unique(values: Iterable[Any]) -> list[Any]:
    return list(dict.fromkeys(values))


def _speed(record: Record) -> Iterator[str]:
    for loss, dim in _unique((row["loss"], row["dim"]) for row in _cases(record)):
        cases = [row for row in _cases(record) if (row["loss"], row["dim"]) == (loss, dim)]
        sizes = sorted({row["rows"] for row in cases})
        by_cell = {(row["peer"], row["rows"]): row for row in cases}
        yield (
            f"`{loss}`, forward and backward, D = {dim}, {cases[0]['dtype']}: median ms (middle 80 %), peak memory "
            "beyond the inputs, share of the measured matmul peak that 3 passes of N²·D make up."
        )
        yield markdown(
            ["form", *(f"N = {n:,}" for n in sizes)],
            [[peer, *(_cell(by_cell.get((peer, n))) for n in sizes)] for peer in _unique(row["peer"] for row in cases)],
        )


def _cell(row: Row | None) -> str:
    if row is None:
        return ""
    if "median_ms" not in row:
        return row["notes"].split(";")[0] if row["reason"] == "not available" else row["reason"][:80]
    text = f"{row['median_ms']:.3g} ({row['p10_ms']:.3g}-{row['p90_ms']:.3g})"
    if row.get("peak_bytes") is not None:
        text += f", {row['peak_bytes'] / 1e9:.2f} GB"
    if row.get("share_of_peak") is not None:
        text += f", {row['share_of_peak']:.0%}"
    return text


def _errors(record: Record) -> Iterator[str]:
    cases = [row for row in _cases(record) if row.get("errors") and row["loss"] == "info_nce"]
    if not cases:
        return
    largest = max(cases, key=lambda row: (row["rows"], row["dim"] == 768))
    rows, dim = largest["rows"], largest["dim"]
    yield f"Relative error against float64 on the same inputs, N = {rows:,}, D = {dim}, {largest['dtype']}."
    names = list(largest["errors"])
    yield markdown(
        ["form", *names],
        [
            [row["peer"], *("none" if row["errors"][name] is None else f"{row['errors'][name]:.1e}" for name in names)]
            for row in cases
            if (row["rows"], row["dim"]) == (rows, dim)
        ],
    )


def _stages(record: Record) -> Iterator[str]:
    measured = [row for row in _rows(record, "stages") if row.get("floor_ms")]
    if measured:
        yield (
            "Where a step's time goes. The floor is the stage's matmul passes at the measured peak, or its bytes at "
            "the measured copy rate."
        )
        yield markdown(
            ["N", "D", "form", "stage", "ms", "floor ms", "floor / ms"],
            [
                (
                    *(f"{row['rows']:,}", str(row["dim"]), row["peer"], _stage(row)),
                    *(f"{_ms(row):.3g}", f"{row['floor_ms']:.3g}", f"{row['floor_ms'] / _ms(row):.0%}"),
                )
                for row in measured
            ],
        )


def _stage(row: Row) -> str:
    return f"{row['stage']} ({row['chunk_rows']:,} rows)" if "chunk_rows" in row else row["stage"]


def _ms(row: Row) -> float:
    return float(row["kernel_ms"] if "kernel_ms" in row else row["median_ms"])


def _latency(record: Record) -> Iterator[str]:
    rows = [row for row in _rows(record, "latency") if "median_ms" in row]
    for mode in _unique(row["mode"] for row in rows):
        chosen = [row for row in rows if row["mode"] == mode]
        sizes = sorted({row["rows"] for row in chosen})
        by_cell = {(row["peer"], row["rows"]): f"{row['median_ms']:.3g}" for row in chosen}
        how = "a captured CUDA graph" if mode == "graph" else mode
        yield f"Small batches, D = {chosen[0]['dim']}, {how}: forward and backward, median ms."
        yield markdown(
            ["form", *(f"N = {n:,}" for n in sizes)],
            [[p, *(by_cell.get((p, n), "") for n in sizes)] for p in _unique(row["peer"] for row in chosen)],
        )


def _largest(record: Record) -> Iterator[str]:
    for row in _rows(record, "largest"):
        if "median_ms" in row:
            memory = "" if row["peak_bytes"] is None else f", {row['peak_bytes'] / 1e9:.1f} GB beyond the inputs"
            yield f"N = {row['rows']:,}, D = {row['dim']}, one step: {row['median_ms'] / 1e3:.3g} s{memory}."


def _kernel_cases(record: Record, section: str) -> list[Row]:
    return [row for row in _rows(record, section) if row.get("peer")]


def _kernel(record: Record, section: str) -> Iterator[str]:
    checks = [row for row in _rows(record, section) if "passed" in row]
    cases = _kernel_cases(record, section)
    if checks:
        passed = sum(row["passed"] is True for row in checks)
        yield f"`{section}`: {passed} of {len(checks)} checks on the device passed."
    if cases:
        fixed = [f"{name} {cases[0][name]}" for name in KERNEL_SIZES if name in cases[0]]
        yield (
            f"`{section}`{': ' * bool(fixed)}{', '.join(fixed)}. Median ms (middle 80 %), memory above the inputs, the "
            "floor of bytes or flops at the measured rates, its share of the time, relative error against float64 (the "
            "largest of output and gradients)."
        )
        yield markdown(
            ["case", "form", "ms", "GB", "floor ms", "floor / ms", "error"],
            [[_kernel_case(section, row), row["peer"], *_kernel_cells(row)] for row in cases],
        )


def _kernel_case(section: str, row: Row) -> str:
    return ", ".join(f"B = {row[name]}" if name == "batch" else str(row[name]) for name in KERNELS[section])


def _kernel_cells(row: Row) -> tuple[str, ...]:
    if "median_ms" not in row:
        return (_cell(row), "", "", "", "")
    errors = [error for name, error in (row.get("errors") or {}).items() if name != "largest"]
    return (
        f"{row['median_ms']:.3g} ({row['p10_ms']:.3g}-{row['p90_ms']:.3g})",
        "" if row.get("peak_bytes") is None else f"{row['peak_bytes'] / 1e9:.2f}",
        *(f"{row['floor_ms']:.3g}", f"{row['share_of_floor']:.0%}"),
        f"{max(errors):.1e}" if errors else "",
    )


def _kernel_tests(record: Record) -> Iterator[str]:
    rows = _rows(record, "kernel_tests")
    if rows:
        said = {True: "passed", False: "**failed**", None: "stopped for lack of time"}
        yield "The kernels' own tests on the device."
        yield markdown(
            ["command", "", "last line"],
            [[f"`{row['command']}`", said[row["passed"]], (row["output"] or [""])[-1]] for row in rows],
        )


def _axes(count: int) -> Any:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot.subplots(1, count, figsize=(5.5 * count, 4.5), squeeze=False, layout="constrained")


def _plot_time(rows: Sequence[Row], path: Path) -> None:
    dims = sorted({row["dim"] for row in rows})
    figure, axes = _axes(len(dims))
    for axis, dim in zip(axes[0], dims, strict=True):
        for peer in _unique(row["peer"] for row in rows):
            line = sorted((r["rows"], r["median_ms"]) for r in rows if (r["peer"], r["dim"]) == (peer, dim))
            if line:
                axis.plot(
                    *zip(*line, strict=True), marker="o", lw=3 if peer.startswith("fastclap T") else 1, label=peer
                )
        axis.set(xscale="log", yscale="log", xlabel="N", ylabel="ms, forward and backward", title=f"InfoNCE, D = {dim}")
        axis.grid(alpha=0.3, which="both")
    axes[0][0].legend(fontsize="small")
    figure.savefig(path, dpi=120)


def _plot_stages(rows: Sequence[Row], path: Path) -> None:
    cases = _unique((row["rows"], row["dim"]) for row in rows)
    figure, axes = _axes(len(cases))
    for axis, case in zip(axes[0], cases, strict=True):
        chosen = [row for row in rows if (row["rows"], row["dim"]) == case][::-1]
        names = [f"{row['peer']}: {_stage(row)}" for row in chosen]
        axis.barh(names, [_ms(row) for row in chosen], color="tab:blue", label="measured")
        axis.barh(names, [row["floor_ms"] for row in chosen], height=0.35, color="tab:orange", label="floor")
        axis.set(xlabel="ms", title=f"N = {case[0]:,}, D = {case[1]}")
    axes[0][0].legend()
    figure.savefig(path, dpi=120)


def _plot_kernels(sections: dict[str, list[Row]], path: Path) -> None:
    figure, axes = _axes(len(sections))
    figure.set_size_inches(7 * len(sections), max(4.5, 0.22 * max(map(len, sections.values()))))
    for axis, (section, rows) in zip(axes[0], sections.items(), strict=True):
        names = [f"{_kernel_case(section, row)}: {row['peer']}" for row in rows]
        axis.barh(names, [row["median_ms"] for row in rows], color="tab:blue", label="measured")
        axis.barh(names, [row["floor_ms"] for row in rows], height=0.35, color="tab:orange", label="floor")
        axis.invert_yaxis()
        axis.set(xlabel="ms", xscale="log", title=section)
        axis.tick_params(axis="y", labelsize="x-small")
    axes[0][0].legend()
    figure.savefig(path, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("record", type=Path)
    print(tables(json.loads(parser.parse_args().record.read_text(encoding="utf-8"))))


if __name__ == "__main__":
    main()
