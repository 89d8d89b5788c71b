"""One page about a model: figures with their chance levels, curves, confusion matrices, a map of the embeddings.

`report.html` contains its pictures, so it can be mailed or archived as one file; next to it are the same pictures as
PNG and the numbers as JSON. Pictures are drawn without pyplot, so no window system and no global state is touched, in
the Okabe-Ito colours, which colour-blind readers can distinguish. Every file is written under a temporary name and
renamed: a reader sees the old report or the new one. Names come from data: they are escaped on the page, drawn as
`fastclap.evaluation.lettering` says, and a part of the page whose figures are damaged is a note instead.
"""

from __future__ import annotations

import base64
import html
import io
import math
import re
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from fastclap.console import json_text, printable, shortened
from fastclap.errors import DataError
from fastclap.evaluation.lettering import PLAIN, drawn, families
from fastclap.files import write_atomic
from fastclap.reading import parse_json, read_bytes, read_json, read_text

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

BLUE, ORANGE, GREEN, PINK, SKY, RED, GREY = "#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#767676"
DIRECTIONS = {"audio_to_text": "audio → text", "text_to_audio": "text → audio"}
RETRIEVAL = ("R@1", "R@5", "R@10", "mAP@10", "median_rank", "mean_rank")
MAX_SKIPPED = 20  # clips listed on the page; report.json has all
PALETTE = (BLUE, ORANGE, GREEN, RED, PINK, SKY, "#222222")  # of classes on a map; after these the markers change
MARKERS = "osDv^PX<>h"
MAX_ANNOTATED = 30  # classes up to which the cells of a confusion matrix hold their counts
MAX_LABELLED = 90  # classes whose names fit beside a confusion matrix; of more, names stand at equal distances
MAX_MAPPED = 66  # classes with a colour on a map, as many as its legend holds; the clips of others are grey
MAX_METRICS = 1 << 30  # bytes of a metrics.jsonl that are read

T = TypeVar("T")


def write_report(
    folder: str | Path, *, results: Mapping[str, Any] | None = None, run: str | Path | None = None
) -> Path:
    """Write `report.html`, its PNGs and `report.json`.

    Args:
        folder: where to; made if needed.
        results: what `fastclap.evaluation.evaluate` returns.
        run: run folder of fastclap-train; its `metrics.jsonl` gives the training curves and, without `results`, the
            figures of the last validation.

    Returns:
        Path of the page.

    Raises:
        DataError: `run` holds no readable `metrics.jsonl`.
        ValueError: neither `results` nor `run` is given.
    """
    if results is None and run is None:
        raise ValueError("write_report needs results, a run folder, or both")
    training: list[dict[str, Any]] = []
    validation: list[dict[str, Any]] = []
    details: dict[str, Any] = {}
    notes: list[str] = []  # what cannot be shown
    if run is not None:
        records = read_metrics(Path(run) / "metrics.jsonl")
        training = [record for record in records if record["kind"] == "train"]
        validation = [record for record in records if record["kind"] == "valid"]
        details = _run_details(Path(run), training, notes)
    if results is None:
        results = validation[-1] if validation else {}

    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    pictures = _pictures(results, training, validation, notes)
    for name, png in pictures.items():
        write_atomic(folder / f"{name}.png", png)
    data = {**results, "run": details} if details else dict(results)
    write_atomic(folder / "report.json", json_text(data, indent=1).encode())
    write_atomic(folder / "report.html", _page(results, details, pictures, notes).encode())
    return folder / "report.html"


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The records of a `metrics.jsonl`, in order; a last line that was cut off while being written is left out.

    Raises:
        DataError: the file is missing, or another line is not a record.
    """
    try:
        lines = read_bytes(path, limit=MAX_METRICS).removesuffix(b"\n").split(b"\n")
    except DataError as error:
        raise DataError(f"{error}; a run folder of fastclap-train has a metrics.jsonl") from error
    records = []
    for number, line in enumerate(lines, start=1):
        try:
            record = parse_json(line, f"{path}:{number}")
            step = record["step"]
            if not isinstance(record["kind"], str) or not isinstance(step, int) or not 0 <= step < 1 << 63:
                raise TypeError
        except (DataError, KeyError, TypeError) as error:
            if number == len(lines):
                break
            what = str(error) if isinstance(error, DataError) else f"{path}:{number}: not a record with kind and step"
            raise DataError(f"{what}; remove the line") from error
        records.append(record)
    return records


def _shown(what: str, notes: list[str], show: Callable[[], T]) -> T | None:
    """What `show` makes of figures; None, and a note, if they are damaged: the rest of the page does not need them."""
    try:
        return show()
    except Exception as error:
        reason = str(error) if isinstance(error, DataError) else f"its figures are damaged: {error!r}"
        notes.append(shortened(f"{what} cannot be shown ({reason})", 500))
        return None


# ---- pictures ----


STYLE = {
    "font.size": 9,
    "axes.titlesize": 10,
    "axes.edgecolor": "#999999",
    "legend.frameon": False,
    "legend.fontsize": 8,
    "legend.handlelength": 2.8,
    "lines.linewidth": 1.6,
}


def _pictures(
    results: Mapping[str, Any],
    training: Sequence[dict[str, Any]],
    validation: Sequence[dict[str, Any]],
    notes: list[str],
) -> dict[str, bytes]:
    """PNG of each picture by its name; `notes` gets what cannot be drawn."""
    import matplotlib

    figures: dict[str, Callable[[], Figure]] = {}
    if training:
        figures["training"] = lambda: training_curves(training, validation)
    if results.get("retrieval"):
        figures["recall"] = lambda: recall_curves(results["retrieval"])
    classified = _mapping(results.get("classification"))
    for column, name in _file_names(classified).items():
        figures[f"confusion-{name}"] = partial(confusion_matrix, column, classified[column])
    if results.get("embeddings"):
        columns = _mapping(_mapping(results["embeddings"]).get("columns"))
        for column, name in _file_names(columns).items():
            figures[f"embeddings-{name}"] = partial(embedding_map, results["embeddings"], column)
        if not columns:
            figures["embeddings"] = lambda: embedding_map(results["embeddings"])
    pictures = {}
    names = _names([results, *({"classification": record.get("classification")} for record in validation)])
    with matplotlib.rc_context({**STYLE, **PLAIN, "font.family": families(names)}), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing from")  # a substitute of matplotlib's own
        for name, figure in figures.items():
            png = _shown(f"the picture {name}", notes, lambda figure=figure: _png(figure()))  # type: ignore[misc]
            if png is not None:
                pictures[name] = png
    return pictures


def _mapping(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, Mapping) else {}


def _names(values: Iterable[Any]) -> Iterator[str]:
    """All strings of a result but its lists of clips."""
    left = list(values)
    while left:
        value = left.pop()
        if isinstance(value, str):
            yield value
        elif isinstance(value, Mapping):
            left += value
            left += (inner for key, inner in value.items() if key not in ("skipped", "confusion", "audio", "class_of"))
        elif isinstance(value, (list, tuple)):
            left += value


def _file_names(columns: Iterable[str]) -> dict[str, str]:
    """Part of a file's name for each column, no two the same."""
    names: dict[str, str] = {}
    for column in columns:
        name = plain = re.sub(r"[^A-Za-z0-9_-]+", "_", column)[:60]
        number = 1
        while name in names.values():
            number += 1
            name = f"{plain}-{number}"
        names[column] = name
    return names


def training_curves(training: Sequence[dict[str, Any]], validation: Sequence[dict[str, Any]]) -> Figure:
    """Loss, learning rate and logit scale over the steps; from two validations on, their R@k and UAR as well."""
    recalls, uars = _validation_series(validation)
    bottom = [panel for panel in (recalls, uars) if panel] if len(validation) > 1 else []
    figure = _figure(10, 3.0 if not bottom else 6.0)
    rows = figure.subfigures(2 if bottom else 1, 1, squeeze=False)[:, 0]  # each row is divided by itself
    loss, rate, scale = rows[0].subplots(1, 3, width_ratios=(1.6, 1, 1))

    steps, values = _series(training, "loss")
    if len(values) > 40:
        loss.plot(steps, values, color=SKY, linewidth=0.7, alpha=0.7, label="each record")
        loss.plot(steps, _smooth(values), color=BLUE, linewidth=1.8, label="running mean")
        loss.legend()
    else:
        loss.plot(steps, values, color=BLUE, marker="o" if len(values) < 3 else None)
    _decorate(loss, "training loss", zero=True)
    rate.plot(*_series(training, "learning_rate"), color=GREEN)
    rate.yaxis.set_major_formatter("{x:g}")
    _decorate(rate, "learning rate", zero=True)
    scale.plot(*_series(training, "logit_scale"), color=ORANGE)
    _decorate(scale, "logit scale")

    if bottom:
        panels = rows[1].subplots(1, len(bottom), squeeze=False)[0]
        for panel, lines in zip(panels, bottom, strict=True):
            for label, (colour, style, steps, values, chance) in lines.items():
                panel.plot(steps, values, color=colour, linestyle=style, marker="o", markersize=3, label=label)
                panel.axhline(chance, color=colour, linestyle=":", linewidth=1)
            title = "validation recall" if lines is recalls else "validation UAR"
            _decorate(panel, f"{title} (dotted: chance)", share=True)
            panel.legend(loc="center left", bbox_to_anchor=(1, 0.5))
    return figure


def recall_curves(retrieval: Mapping[str, Any]) -> Figure:
    """Recall over the number of candidates considered: a panel for each direction, a line for each caption set."""
    figure = _figure(10, 3.6)
    retrieval = {drawn(captions): figures for captions, figures in retrieval.items()}
    for axes, (direction, title) in zip(figure.subplots(1, 2, sharey=True), DIRECTIONS.items(), strict=True):
        ticks: set[int] = set()
        for (captions, figures), colour in zip(retrieval.items(), (BLUE, RED, GREEN, PINK), strict=False):
            curve = figures[direction]["curve"]
            axes.plot(curve["k"], curve["recall"], color=colour, marker="o", markersize=4, label=f"{captions} captions")
            axes.plot(
                curve["k"], curve["chance"], color=colour, linestyle=":", linewidth=1.2, label=f"{captions}: chance"
            )
            ticks.update(curve["k"])
        shown = [k for k in sorted(ticks) if k not in (3, 30, 300)]
        axes.set_xscale("log")
        axes.set_xticks(shown, [str(k) for k in shown])
        axes.minorticks_off()
        _decorate(axes, title, share=True)
        axes.set_xlabel("candidates looked at, k")
    figure.axes[0].set_ylabel("recall@k")
    figure.legend(*figure.axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=4)
    return figure


def confusion_matrix(column: str, figures: Mapping[str, Any]) -> Figure:
    """Counts on colours that show the share of the true class's clips, with that class's recall as a bar."""
    import matplotlib

    confusion, rows = figures["confusion"], figures["per_class"]
    classes = [drawn(row["class"]) for row in rows]
    size = len(classes)
    side = max(2.4, min(0.46 * size, 11))
    longest = max(len(name) for name in classes)
    figure = _figure(side + 0.09 * longest + 4.2, side + 0.075 * longest + 1.3)
    matrix, bars = figure.subplots(1, 2, sharey=True, width_ratios=(side, 2.6))

    totals = [sum(row) or math.nan for row in confusion]
    shares = [[count / total for count in row] for row, total in zip(confusion, totals, strict=True)]
    blues = matplotlib.colormaps["Blues"].with_extremes(bad="#eeeeee")  # bad: a class without clips has no shares
    matrix.imshow(shares, cmap=blues, vmin=0, vmax=1, aspect="auto")
    labelled = range(0, size, math.ceil(size / MAX_LABELLED))
    labels = [classes[i] for i in labelled]
    matrix.set_xticks(labelled, labels, rotation=90 if size > 4 or longest > 10 else 0)
    matrix.set_yticks(labelled, [f"{classes[i]} ({rows[i]['clips']})" for i in labelled])
    matrix.set_xlabel("given class")
    matrix.set_ylabel("true class (clips)")
    matrix.set_title(f"{drawn(column)}: clips, coloured by share of the row", loc="left")
    if size <= MAX_ANNOTATED:
        for i, row in enumerate(confusion):
            for j, count in enumerate(row):
                if count:
                    dark = shares[i][j] > 0.55
                    weight = "bold" if i == j else "normal"
                    matrix.text(
                        j, i, count, ha="center", va="center", color="white" if dark else "#222222", weight=weight
                    )
    matrix.spines[:].set_visible(False)
    matrix.tick_params(length=0)

    recall = [row["recall"] if row["recall"] is not None else 0 for row in rows]
    bars.barh(range(size), recall, color=BLUE, height=0.66)
    for i in labelled:
        row = rows[i]
        text = "–" if row["recall"] is None else f"{100 * row['recall']:.0f}"
        bars.text(1.17, i, text, va="center", ha="right", fontsize=8)
    chance = bars.axvline(figures["chance"], color=GREY, linestyle="--", linewidth=1.1)
    mean = bars.axvline(figures["uar"], color=RED, linewidth=1.1)
    bars.set_xlim(0, 1.2)
    bars.set_xticks((0, 0.5, 1), ("0", "50", "100"))
    bars.set_xlabel("recall (%)")
    bars.tick_params(axis="y", length=0, labelleft=False)
    bars.spines[["top", "right", "left"]].set_visible(False)
    legend = (f"chance {100 * figures['chance']:.0f}", f"UAR {100 * figures['uar']:.1f}")
    bars.legend((chance, mean), legend, loc="lower left", bbox_to_anchor=(0, 1), ncols=2, borderaxespad=0.2)
    return figure


def embedding_map(embeddings: Mapping[str, Any], column: str | None = None) -> Figure:
    """The clips along their two principal components, coloured by a column's classes, whose prompts are stars."""
    from matplotlib.patheffects import withStroke

    x, y = zip(*embeddings["audio"], strict=True)
    found: Mapping[str, Any] = {"classes": [], "class_of": [None] * len(x)}
    if column is not None:
        found = embeddings["columns"][column]
    classes = [drawn(name) for name in found["classes"][:MAX_MAPPED]]
    class_of = [number if number is not None and number < MAX_MAPPED else None for number in found["class_of"]]
    longest = max((len(name) for name in classes), default=0)
    legend_columns = 1 + len(classes) // 22
    figure = _figure(6.4 + (0.5 + 0.075 * longest) * legend_columns * bool(classes), 5.2)
    axes = figure.subplots()
    size = 22 if len(x) <= 500 else 9
    halo = [withStroke(linewidth=2.5, foreground="white")]
    unknown = [i for i, value in enumerate(class_of) if value is None]
    if unknown:
        others = "no, several or other classes" if len(found["classes"]) > MAX_MAPPED else "no or several classes"
        colour, label = (BLUE, "clips") if column is None else ("#c8c8c8", others)
        axes.scatter(
            [x[i] for i in unknown], [y[i] for i in unknown], size, colour, alpha=0.7, linewidths=0, label=label
        )
    for number, name in enumerate(classes):
        members = [i for i, value in enumerate(class_of) if value == number]
        axes.scatter(
            [x[i] for i in members],
            [y[i] for i in members],
            size,
            PALETTE[number % len(PALETTE)],
            marker=MARKERS[number // len(PALETTE) % len(MARKERS)],
            alpha=0.7,
            linewidths=0,
            label=name,
        )
    for number, name in enumerate(classes):
        place = found["prompts"][number]
        colour = PALETTE[number % len(PALETTE)]
        axes.scatter(*place, 190, colour, marker="*", edgecolors="white", linewidths=0.9, zorder=3)
        if len(classes) <= MAX_ANNOTATED:
            axes.annotate(name, place, (5, 5), textcoords="offset points", fontsize=8, path_effects=halo, zorder=4)
    subject = f"{len(x)} clips" + (f" by {drawn(column)}, prompts as stars" if column is not None else "")
    axes.set_title(subject, loc="left")
    first, second = (f"{100 * share:.0f} % of the variance" for share in embeddings["variance"])
    axes.set_xlabel(f"first principal component ({first})")
    axes.set_ylabel(f"second principal component ({second})")
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(color="#e3e3e3", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.set_aspect("equal", adjustable="datalim")
    if classes:
        axes.legend(loc="center left", bbox_to_anchor=(1, 0.5), ncols=legend_columns, handlelength=1)
    return figure


def _figure(width: float, height: float) -> Figure:
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained")


def _decorate(axes: Axes, title: str, *, zero: bool = False, share: bool = False) -> None:
    axes.set_title(title, loc="left")
    axes.grid(axis="y", color="#e3e3e3", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.set_xlabel("step")
    if zero:
        axes.set_ylim(bottom=0)
    if share:
        axes.set_ylim(0, 1.02)
        axes.set_yticks((0, 0.25, 0.5, 0.75, 1), ("0", "25 %", "50 %", "75 %", "100 %"))


def _series(records: Sequence[dict[str, Any]], key: str) -> tuple[list[int], list[float]]:
    pairs = [(record["step"], value) for record in records if (value := _number(record.get(key))) is not None]
    return [step for step, _ in pairs], [value for _, value in pairs]


def _number(value: Any) -> float | None:
    """A finite number that a picture can hold, else None."""
    return float(value) if isinstance(value, (int, float)) and abs(value) < 1e300 else None


_Line = tuple[str, str, list[int], list[float], float]


def _validation_series(validation: Sequence[dict[str, Any]]) -> tuple[dict[str, _Line], dict[str, _Line]]:
    recalls: dict[str, _Line] = {}
    uars: dict[str, _Line] = {}
    for record in validation:
        for captions, colours in (("global", (BLUE, SKY)), ("fine", (RED, ORANGE))):
            for (direction, title), colour in zip(DIRECTIONS.items(), colours, strict=True):
                figures = record.get("retrieval", {}).get(captions, {}).get(direction)
                if figures:
                    for key, style in (("R@1", "-"), ("R@10", "--")):
                        new: _Line = (colour, style, [], [], figures["chance"][key])
                        line = recalls.setdefault(f"{captions}, {title}, {key}", new)
                        line[2].append(record["step"])
                        line[3].append(figures[key])
        for (column, figures), colour in zip(
            record.get("classification", {}).items(), (BLUE, RED, GREEN, ORANGE, PINK, SKY), strict=False
        ):
            line = uars.setdefault(drawn(column), (colour, "-", [], [], figures["chance"]))
            line[2].append(record["step"])
            line[3].append(figures["uar"])
    return recalls, uars


def _smooth(values: Sequence[float]) -> list[float]:
    """Centred running mean over a twentieth of the series, shorter at its ends."""
    reach = max(1, len(values) // 40)
    windows = [values[max(0, i - reach) : i + reach + 1] for i in range(len(values))]
    return [sum(window) / len(window) for window in windows]


def _png(figure: Figure) -> bytes:
    stream = io.BytesIO()
    figure.savefig(stream, format="png", dpi=130, facecolor="white", metadata={"Software": None})
    return stream.getvalue()


# ---- page ----


def _page(
    results: Mapping[str, Any], details: Mapping[str, Any], pictures: Mapping[str, bytes], notes: Sequence[str]
) -> str:
    problems = list(notes)
    subject = details.get("folder") or results.get("model") or "evaluation"
    parts = [_shown("the summary", problems, lambda: _summary(results, details))]
    if results.get("classification"):
        table = _shown("classification", problems, lambda: _classification_table(results["classification"]))
        parts += ["<h2>Zero-shot classification</h2>", table]
        parts += [_picture(name, png) for name, png in pictures.items() if name.startswith("confusion-")]
    if results.get("retrieval"):
        table = _shown("retrieval", problems, lambda: _retrieval_table(results["retrieval"]))
        parts += ["<h2>Retrieval</h2>", table]
    if "recall" in pictures:
        parts.append(_picture("recall", pictures["recall"]))
    maps = [_picture(name, png) for name, png in pictures.items() if name.startswith("embeddings")]
    if maps:
        parts += ["<h2>Embeddings</h2>", _MAP_NOTE, *maps]
    if "training" in pictures:
        parts += ["<h2>Training</h2>", _picture("training", pictures["training"])]
    if results.get("skipped"):
        parts.append(_shown("the skipped clips", problems, lambda: _skipped(results["skipped"])))
    if details.get("environment"):
        rows = [[key, value] for key, value in _flatten(details["environment"])]
        parts.append(f"<details><summary>Environment</summary>{_table(['', ''], rows)}</details>")
    if details.get("config"):
        lines = "\n".join(_text(line) for line in details["config"].split("\n"))
        parts.append(f"<details><summary>Configuration</summary><pre>{lines}</pre></details>")
    head = [f"<h1>fastclap report</h1><p class=subject>{_text(subject)}</p>"]
    head += [f"<p class=problem>{_text(problem)}</p>" for problem in problems]
    before, between, after = re.split(r"\{title\}|\{body\}", _HTML)
    return before + _text(subject) + between + "\n".join(part for part in (*head, *parts) if part) + after


def _skipped(skipped: Sequence[Mapping[str, Any]]) -> str:
    rows = [[clip["row"], clip["path"], clip["reason"]] for clip in skipped[:MAX_SKIPPED]]
    more = f"<p>… and {len(skipped) - MAX_SKIPPED} more in report.json</p>" if len(skipped) > MAX_SKIPPED else ""
    return f"<h2>Skipped clips ({len(skipped)})</h2>{_table(['row', 'file', 'reason'], rows)}{more}"


def _summary(results: Mapping[str, Any], details: Mapping[str, Any]) -> str:
    facts: list[tuple[str, Any]] = [("model", results.get("model")), ("data", ", ".join(results.get("data", [])))]
    if details:
        facts += [("training steps", details.get("steps")), ("last training loss", details.get("loss"))]
        facts += [("clips per second", details.get("clips_per_second"))]
        facts += [("figures from", f"validation at step {results['step']}" if "step" in results else None)]
    facts += [("clips evaluated", results.get("clips")), ("clips skipped", len(results.get("skipped", [])) or None)]
    rows = [[name, value] for name, value in facts if value not in (None, "")]
    return _table(["", ""], rows) if rows else ""


def _retrieval_table(retrieval: Mapping[str, Any]) -> str:
    rows = []
    for captions, both in retrieval.items():
        for direction, title in DIRECTIONS.items():
            figures = both[direction]
            cells = [_with_chance(figures[key], figures["chance"][key], key) for key in RETRIEVAL]
            rows.append([f"{captions}, {title}", figures["queries"], figures["candidates"], *cells])
    heads = ["captions, direction", "queries", "candidates"]
    heads += [key.replace("_", " ") if key.endswith("rank") else f"{key} %" for key in RETRIEVAL]
    note = (
        "<p class=note>Grey: a random order of the candidates. Equal texts are one candidate; ties count as losses.</p>"
    )
    return _table(heads, rows) + note


def _classification_table(classification: Mapping[str, Any]) -> str:
    rows = []
    for column, figures in classification.items():
        accuracy = f"{_percent(figures['accuracy'])} <small>majority {_percent(figures['majority_accuracy'])}</small>"
        uar = f"{_percent(figures['uar'])} <small>chance {_percent(figures['chance'])}</small>"
        prompts = "; ".join(figures.get("templates") or ["prompt list"])
        cells = [_Markup(accuracy), _Markup(uar), _percent(figures["macro_f1"]), prompts]
        rows.append([column, figures["clips"], len(figures["classes"]), *cells])
    return _table(["column", "clips", "classes", "accuracy (WA) %", "UAR (UA) %", "macro-F1 %", "prompt"], rows)


class _Markup(str):
    """Text that is HTML already."""


def _with_chance(value: float, chance: float, key: str) -> _Markup:
    show = _rank if key.endswith("rank") else _percent
    return _Markup(f"{show(value)} <small>{show(chance)}</small>")


def _percent(share: float) -> str:
    return f"{100 * share:.1f}"


def _rank(rank: float) -> str:
    return f"{rank:.1f}".removesuffix(".0")


def _table(heads: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    head = "".join(f"<th>{_text(cell)}</th>" for cell in heads)
    body = "".join("<tr>" + "".join(f"<td>{_text(cell)}</td>" for cell in row) + "</tr>" for row in rows)
    return f"<table>{f'<thead><tr>{head}</tr></thead>' if any(heads) else ''}<tbody>{body}</tbody></table>"


def _picture(name: str, png: bytes) -> str:
    return f'<img alt="{_text(name)}" src="data:image/png;base64,{base64.b64encode(png).decode()}">'


def _text(value: Any) -> str:
    return value if isinstance(value, _Markup) else html.escape(printable(str(value)))


def _run_details(run: Path, training: Sequence[Mapping[str, Any]], notes: list[str]) -> dict[str, Any]:
    details: dict[str, Any] = {"folder": str(run)}
    if training:
        loss = _number(training[-1].get("loss"))
        details |= {"steps": training[-1]["step"], "loss": None if loss is None else round(loss, 4)}
        speeds = [_number(_mapping(record.get("time")).get("clips_per_second")) for record in training]
        known = sorted(speed for speed in speeds if speed is not None)
        if known:
            details["clips_per_second"] = round(known[len(known) // 2], 1)
    readers: dict[str, Callable[[Path], Any]] = {"environment.json": _environment, "config.yaml": read_text}
    for name, read in readers.items():
        if (run / name).exists():
            details[name.partition(".")[0]] = _shown(name, notes, partial(read, run / name))
    return {key: value for key, value in details.items() if value is not None or key == "loss"}


def _environment(path: Path) -> Any:
    environment = read_json(path)
    json_text(dict(_flatten(environment)))  # a RecursionError here, rather than on the page, if it is nested too deeply
    json_text(environment)
    return environment


def _flatten(value: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(value, dict):
        for key, inner in value.items():
            yield from _flatten(inner, f"{prefix}{' · ' if prefix else ''}{key}")
    else:
        yield prefix, ", ".join(str(item) for item in value) if isinstance(value, list) else value


_MAP_NOTE = (
    "<p class=note>The clips along the two directions in which they vary most. Texts lie apart from all clips (the "
    "modality gap), so clips and prompts are centred, each on their own mean: a star shows where its class should lie, "
    "not how near it is.</p>"
)

_HTML = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>fastclap report: {title}</title>
<style>
body { font: 15px/1.5 system-ui, sans-serif; color: #222; background: #fff; max-width: 1080px; margin: 2em auto; }
body { padding: 0 1em; overflow-wrap: anywhere; }
h1 { font-size: 1.5em; margin: 0; }
h2 { font-size: 1.15em; margin: 1.8em 0 .5em; border-bottom: 1px solid #ddd; }
.subject { color: #555; margin: 0 0 1em; }
.problem { color: #a33b00; margin: .3em 0; }
.note { color: #767676; font-size: .85em; margin: .3em 0; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; margin: .4em 0; font-size: .93em; }
th, td { text-align: left; padding: .25em .9em .25em 0; vertical-align: top; border-bottom: 1px solid #eee; }
th { font-weight: 600; border-bottom: 1px solid #999; }
small { color: #767676; white-space: nowrap; margin-left: .3em; }
img { display: block; max-width: 100%; margin: 1em 0; }
pre { background: #f6f6f6; padding: 1em; overflow-x: auto; font-size: .85em; }
summary { cursor: pointer; margin-top: 1em; font-weight: 600; }
</style></head><body>
{body}
</body></html>
"""
