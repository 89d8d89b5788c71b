"""The ``fastclap`` command: what can be done with a trained model, and packing of the data to train on.

The measuring and packing commands are here, those that put a model to use (embed, search, ...) in ``cli_apps``.

Each command is a dataclass whose fields are its flags. torch is imported after the arguments have been understood, so
that ``--help`` and mistyped flags answer at once. Figures go to stdout, as a table or with ``--json`` as JSON and
nothing else; progress, notes and errors go to stderr. Exit status: 0 done, 1 ``doctor`` found a problem, 2 a mistake in
the arguments, the data or the model, told in one line.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro

from fastclap import cli_apps
from fastclap.console import make_table, pick_device, print_json, progress
from fastclap.errors import ConfigError, DataError, FastclapError
from fastclap.prompts import DEFAULT_TEMPLATE, PROMPT_SETS, load_prompts

if TYPE_CHECKING:
    from rich.table import Table

    from fastclap.data import Manifest
    from fastclap.model import CLAP


@dataclass(kw_only=True)
class _OnData:
    model: str
    """Exported model folder, run folder (its newest checkpoint) or Hugging Face hub id."""
    data: list[str]
    """Manifests: .jsonl, .json, .csv, .tsv or .parquet files, saved `datasets` folders, or hf:NAME[:SPLIT]."""
    audio_root: str | None = None
    """Folder that relative audio paths start from (default: the folder of each manifest)."""
    columns: dict[str, str] = field(default_factory=dict)
    """Column names of the manifests that differ, as pairs: OURS THEIRS (for example text_description caption)."""
    out: str | None = None
    """Folder that receives report.html, its pictures (recall curves, confusion matrix, map of the embeddings) and
    report.json."""
    json: bool = False
    """Print the whole result as JSON, and nothing else, on stdout."""
    device: str = "auto"
    """cuda, cuda:N, cpu, or auto (a GPU if there is one)."""
    batch_size: int = 32
    """Clips embedded at a time."""


@dataclass(kw_only=True)
class Eval(_OnData):
    captions: Literal["global", "fine", "both"] = "global"
    """Captions to retrieve with: text_description, fine_description, or each in turn."""
    captions_per_clip: Literal["first", "all"] = "first"
    """Of a clip with several captions, use the first, or all (its rank is then that of its best-ranked one)."""


@dataclass(kw_only=True)
class Classify(_OnData):
    column: str = "classification_tag"
    """Manifest column that holds the true class."""
    template: list[str] = field(default_factory=lambda: [DEFAULT_TEMPLATE])
    """Prompts of every class, averaged: {} is the class name, {a} or {A} its article (a or an)."""
    prompts: str | None = None
    """Prompts instead of the template: a JSON file with {"class": ["prompt", ...]}, or one such mapping for each
    column; or a published set by name: paraspeechclap-pitch, -texture, -volume, -clarity, -rhythm or -situational,
    clsp-emotion, -gender or -age."""
    classes: list[str] | None = None
    """Candidate classes (default: those of the prompts file, else all values of the column)."""


@dataclass(kw_only=True)
class Report:
    run: Annotated[str, tyro.conf.Positional]
    """Run folder of fastclap-train."""
    out: str | None = None
    """Folder for report.html, its pictures and report.json (default: RUN/report)."""


@dataclass(kw_only=True)
class Pack:
    manifests: Annotated[list[str], tyro.conf.Positional]
    """Manifests: .jsonl, .json, .csv, .tsv or .parquet files, saved `datasets` folders, packed folders, or
    hf:NAME[:SPLIT]."""
    out: str
    """Folder that receives the pack: new, or that of an interrupted call, which is continued."""
    audio_root: str | None = None
    """Folder that relative audio paths start from (default: the folder of each manifest)."""
    columns: dict[str, str] = field(default_factory=dict)
    """Column names of the manifests that differ, as pairs: OURS THEIRS (for example text_description caption)."""
    sampling_rate: int = 16000
    """Rate of the packed samples, in Hz: that of the model to train."""
    shard_mb: float = 512
    """Size of a shard, in MB."""
    workers: int | None = None
    """Decoding processes, 0 for none (default: one for each CPU core)."""
    json: bool = False
    """Print the summary as JSON, and nothing else, on stdout."""


@dataclass(kw_only=True)
class Prepare:
    dataset: Annotated[
        Literal[
            "paraspeechcaps", "fcaps", "promptspeech", "textrolspeech", "speechcraft", "ravdess", "crema-d", "iemocap"
        ],
        tyro.conf.Positional,
    ]
    """Which dataset it is."""
    root: str
    """Folder of its audio."""
    out: str
    """Manifest to write, a .jsonl file; with {split} in its name, one file a split."""
    annotations: str | None = None
    """File or folder of its captions and labels, or hf:NAME of the hub (default: the root)."""
    columns: dict[str, str] = field(default_factory=dict)
    """Names of its fields that differ in this copy, as pairs: PUBLISHED FOUND."""
    json: bool = False
    """Print the summary as JSON, and nothing else, on stdout."""


@dataclass(kw_only=True)
class Convert:
    checkpoint: Annotated[str, tyro.conf.Positional]
    """ParaSpeechCLAP .pth.tar, LAION-CLAP .pt, folder of a transformers CLAP, or the hub id of one of these."""
    folder: Annotated[str, tyro.conf.Positional]
    """Model folder to write."""
    tokenizer: str | None = None
    """Folder or hub id of the text tower's tokenizer (default: the published one's, from the hub)."""
    audio_config: dict[str, str] = field(default_factory=dict)
    """Entries of the audio tower's transformers configuration that are not as published, as pairs: NAME JSON."""
    text_config: dict[str, str] = field(default_factory=dict)
    """Likewise of the text tower."""
    license: str | None = None
    """Licence of the weights for the model card, by its name on the hub (for example cc-by-nc-sa-4.0)."""
    json: bool = False
    """Print the summary as JSON, and nothing else, on stdout."""


@dataclass(kw_only=True)
class Doctor:
    json: bool = False
    """Print JSON, and nothing else, on stdout."""


_EVAL = """Retrieval in both directions: R@1, R@5, R@10, mAP@10, median and mean rank, each beside its chance level.

Equal texts are one candidate; ties count against the model.

Examples:
  fastclap eval --model runs/demo --data valid.jsonl
  fastclap eval --model runs/demo --data valid.jsonl --captions both --out report
  fastclap eval --model runs/demo --data a.jsonl b.csv --audio-root /audio --json > figures.json
"""
_CLASSIFY = """Zero-shot classification: accuracy (WA), UAR (UA), macro-F1 and each class's recall.

A clip gets the class whose prompt is nearest to it.

Examples:
  fastclap classify --model runs/demo --data test.jsonl
  fastclap classify --model runs/demo --data test.jsonl --column sex --template "{A} {} speaker."
  fastclap classify --model runs/demo --data test.jsonl --template "A man sounds {}." "A woman sounds {}."
  fastclap classify --model runs/demo --data test.jsonl --prompts emotions.json --out report
  fastclap classify --model runs/demo --data test.jsonl --prompts paraspeechclap-situational
  fastclap classify --model runs/demo --data test.jsonl --column sex --prompts clsp-gender
  fastclap classify --model runs/demo --data test.jsonl --column intrinsic_tags --classes shrill nasal deep
"""
_PREPARE = """Write the manifest of a public dataset: audio, captions, tags, emotion, sex, age, durations, splits.

Clips whose audio is missing or unreadable are left out and listed beside the manifest, in NAME-skipped.jsonl. Where to
get each dataset, under which licence, and how its folder looks: docs/data.md.

Examples:
  fastclap prepare ravdess --root data/ravdess --out manifests/ravdess.jsonl
  fastclap prepare iemocap --root data/IEMOCAP_full_release --out "manifests/iemocap-{split}.jsonl"
  fastclap prepare paraspeechcaps --root data/audio --annotations hf:ajd12342/paraspeechcaps --out "psc-{split}.jsonl"
  fastclap prepare promptspeech --root data/LibriTTS --annotations data/PromptSpeech --out promptspeech.jsonl --json
"""
_CONVERT = """Turn a checkpoint of another code into a model folder: safetensors, configuration, tokenizer, model card.

Every command takes such checkpoints as they are too; a converted one loads without the hub and without unpickling.

Examples:
  fastclap convert paraspeechclap-intrinsic.pth.tar models/intrinsic
  fastclap convert paraspeechclap-combined.pth.tar models/combined --tokenizer tokenizers/granite-278m
  fastclap convert 630k-audioset-best.pt models/laion --license cc0-1.0
  fastclap convert laion/clap-htsat-unfused models/htsat --json
  fastclap convert own.pth.tar models/own --audio-config num_attention_heads 12 do_stable_layer_norm false
"""
_REPORT = """Write the one-page report of a training run: curves, last validation, configuration.

Examples:
  fastclap report runs/demo
  fastclap report runs/demo --out /tmp/report
"""
_PACK = """Decode clips once into shards of int16 samples: a packed folder is a manifest with its audio.

Training and evaluation read it like any manifest (--data.train FOLDER), without decoding. Clips that cannot be used are
left out and listed in FOLDER/skipped.jsonl. An interrupted pack is continued by the same command.

Examples:
  fastclap pack train.jsonl --out packed/train
  fastclap pack a.jsonl b.csv --out packed/all --audio-root /audio --workers 16
  fastclap pack train.jsonl --out packed/train-48k --sampling-rate 48000 --json
"""
_DOCTOR = """Say what this machine and this installation can do; exit status 1 if something needed is missing.

Examples:
  fastclap doctor
  fastclap doctor --json
"""
_FLAGS = (tyro.conf.FlagCreatePairsOff,)  # no --no-json
_USAGE = """usage: fastclap COMMAND [--flag value ...]

Measure and use contrastive language-audio models, and pack data (fastclap-train trains them). Commands:
{commands}

  fastclap COMMAND --help   every flag of a command, with its default and examples
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command line (default: this process's) and return the exit status; help and mistyped flags exit at once."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    commands: dict[str, tuple[Any, str, Callable[[Any], int]]] = {
        "eval": (Eval, _EVAL, _eval),
        "classify": (Classify, _CLASSIFY, _classify),
        "report": (Report, _REPORT, _report),
        "pack": (Pack, _PACK, _pack),
        **cli_apps.COMMANDS,
        "prepare": (Prepare, _PREPARE, _prepare),
        "convert": (Convert, _CONVERT, _convert),
        "doctor": (Doctor, _DOCTOR, _doctor),
    }
    usage = _USAGE.format(
        commands="\n".join(f"  {name:<12}{text.splitlines()[0]}" for name, (_, text, _) in commands.items())
    )
    if not arguments or arguments[0] in ("-h", "--help"):
        print(usage, end="", file=sys.stdout if arguments else sys.stderr)
        return 0 if arguments else 2
    name, *flags = arguments
    try:
        if name not in commands:
            raise ConfigError(f"there is no command {name!r}; choose one of: {', '.join(commands)} (fastclap --help)")
        kind, text, run = commands[name]
        return run(tyro.cli(kind, prog=f"fastclap {name}", description=text, args=flags, config=_FLAGS))
    except FastclapError as error:
        message = str(error)
    except OSError as error:  # a full disk, a folder that may not be written
        message = f"{error.filename}: {error.strerror}" if error.filename else str(error)
    except KeyboardInterrupt:
        return 130
    print(f"fastclap: {message}", file=sys.stderr)
    return 2


def _eval(arguments: Eval) -> int:
    from fastclap.evaluation import evaluate

    names: Any = ["global", "fine"] if arguments.captions == "both" else [arguments.captions]
    model, manifest = _load(arguments, require_captions=arguments.captions == "global")
    result = evaluate(
        model,
        manifest,
        captions=names,
        tasks=[],
        captions_per_clip=arguments.captions_per_clip,
        embedding_map=arguments.out is not None,
        batch_size=arguments.batch_size,
        progress=True,
    )
    return _present(arguments, result, [_retrieval_table(result["retrieval"])])


def _classify(arguments: Classify) -> int:
    templates, prompts, classes = arguments.template, None, arguments.classes
    if arguments.prompts in PROMPT_SETS:
        published = PROMPT_SETS[arguments.prompts]
        templates, prompts = [published.template or DEFAULT_TEMPLATE], published.prompts
        classes = classes or (None if published.classes is None else list(published.classes))
    elif arguments.prompts:
        prompts = load_prompts(arguments.prompts, arguments.column)
        if not prompts:
            raise DataError(f"{arguments.prompts}: no prompts for the column {arguments.column!r}")

    from fastclap.evaluation import ClassificationTask, evaluate

    task = ClassificationTask(arguments.column, templates, prompts, classes)
    model, manifest = _load(arguments, require_captions=False)
    result = evaluate(
        model,
        manifest,
        captions=[],
        tasks=[task],
        embedding_map=arguments.out is not None,
        batch_size=arguments.batch_size,
        progress=True,
    )
    figures = result["classification"][arguments.column]
    notes = {
        "clips_without_class": "clips have none of the classes and were left out",
        "clips_with_several": "clips have several of the classes and were left out",
    }
    for key, text in notes.items():
        if figures[key]:
            print(f"fastclap: {figures[key]} {text}", file=sys.stderr)
    unused = [row["class"] for row in figures["per_class"] if not row["clips"]]
    if unused:
        print(
            f"fastclap: no clip has the class {', '.join(unused)}; it counts in macro-F1, not in UAR", file=sys.stderr
        )
    return _present(arguments, result, _classification_tables(arguments.column, figures))


def _report(arguments: Report) -> int:
    from fastclap.evaluation import write_report

    print(write_report(arguments.out or Path(arguments.run) / "report", run=arguments.run))
    return 0


def _prepare(arguments: Prepare) -> int:
    from fastclap.prepare import prepare

    with progress("preparing", "prepared", "clips") as advance:
        summary = prepare(
            arguments.dataset,
            arguments.root,
            arguments.out,
            annotations=arguments.annotations,
            columns=arguments.columns,
            advance=advance,
        )
    if summary["skipped_file"]:
        print(
            f"fastclap: {summary['missing']} clips without audio and {summary['unreadable']} unreadable ones left out, "
            f"see {summary['skipped_file']}",
            file=sys.stderr,
        )
    if arguments.json:
        print_json(summary)
        return 0
    for reason, clips in summary["left_out"].items():
        print(f"left out {clips}: {reason}")
    if summary["repeated"]:
        print(f"left out {summary['repeated']}: repeats of a row")
    for split, figures in summary["splits"].items():
        speakers = f", {figures['speakers']} speakers" if figures["speakers"] else ""
        print(f"{split}: {figures['rows']} rows, {figures['hours']:.2f} h{speakers}")
    print(f"split {summary['split_rule']}")
    print(f"{summary['rows']} rows, {summary['hours']:.2f} h: {', '.join(summary['files'])}")
    return 0


def _convert(arguments: Convert) -> int:
    def values(pairs: Mapping[str, str]) -> dict[str, Any]:
        parsed: dict[str, Any] = {}
        for name, value in pairs.items():
            try:
                parsed[name] = json.loads(value)
            except ValueError:  # a bare word, such as a model type
                parsed[name] = value
        return parsed

    if arguments.tokenizer is not None:  # a mistake in its name is better found before a large file is read
        from fastclap.tokenizer import as_tokenizer

        as_tokenizer(arguments.tokenizer)

    from fastclap.checkpoints import find_checkpoint, read_checkpoint

    found = find_checkpoint(arguments.checkpoint)
    print(f"fastclap: reading {found}", file=sys.stderr)
    model = read_checkpoint(
        found,
        tokenizer=arguments.tokenizer,
        audio_config=values(arguments.audio_config),
        text_config=values(arguments.text_config),
    )
    print(f"fastclap: writing {arguments.folder}", file=sys.stderr)
    model.save_pretrained(arguments.folder, license=arguments.license)
    summary: dict[str, Any] = {
        "model": arguments.folder,
        "audio": model.config.audio.kind,
        "text": model.config.text.kind,
        "dim": model.config.head.dim,
        "sampling_rate": model.sampling_rate,
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "logit_scale": model.logit_scale.item(),
    }
    if arguments.json:
        print_json(summary)
    else:
        print(
            f"{summary['parameters'] / 1e6:.1f} million parameters, {summary['dim']} dimensions, "
            f"{summary['sampling_rate']} Hz: {arguments.folder}"
        )
    return 0


def _pack(arguments: Pack) -> int:
    from fastclap.data import load_manifest
    from fastclap.data.shards import pack

    if not arguments.manifests:
        raise ConfigError("name at least one manifest to pack")
    manifest = load_manifest(
        arguments.manifests, audio_root=arguments.audio_root, columns=arguments.columns, require_captions=False
    )
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    with progress("packing", "packed", "clips") as advance:
        summary = pack(
            manifest,
            arguments.out,
            sampling_rate=arguments.sampling_rate,
            shard_mb=arguments.shard_mb,
            workers=cores if arguments.workers is None else arguments.workers,
            advance=advance,
        )
    if summary["skipped"]:
        print(f"fastclap: {summary['skipped']} rows left out, see {arguments.out}/skipped.jsonl", file=sys.stderr)
    if arguments.json:
        print_json(summary)
    else:
        print(
            f"{summary['rows']} rows, {summary['clips']} clips, {summary['hours']:.2f} h, "
            f"{summary['bytes'] / 1e6:.1f} MB in {summary['shards']} shards: {arguments.out}"
        )
    return 0


def _load(arguments: _OnData, *, require_captions: bool) -> tuple[CLAP, Manifest]:
    from fastclap.data import load_manifest
    from fastclap.model import CLAP

    if arguments.batch_size < 1:
        raise ConfigError(f"--batch-size is {arguments.batch_size}; it must be at least 1")
    if not arguments.data:
        raise ConfigError("--data is empty: name at least one manifest")
    if arguments.out is not None:
        Path(arguments.out).mkdir(parents=True, exist_ok=True)  # an unusable folder is better found now than at the end
    device = pick_device(arguments.device)
    manifest = load_manifest(
        arguments.data,
        audio_root=arguments.audio_root,
        columns=arguments.columns,
        require_captions=require_captions,
    )
    return CLAP.from_pretrained(arguments.model, device=device), manifest


def _present(arguments: _OnData, result: Mapping[str, Any], tables: Sequence[Table]) -> int:
    result = {"model": arguments.model, "data": arguments.data, **result}
    skipped = result["skipped"]
    for clip in skipped[:5]:
        print(f"fastclap: skipped {clip['path']}: {clip['reason']}", file=sys.stderr)
    if len(skipped) > 5:
        print(f"fastclap: skipped {len(skipped) - 5} more clips (--json and --out list them)", file=sys.stderr)
    page = None
    if arguments.out is not None:
        from fastclap.evaluation import write_report

        page = write_report(arguments.out, results=result)
    if arguments.json:
        print_json(result)
        return 0
    from rich.console import Console

    console = Console()
    for table in tables:
        console.print(table)
    seconds = result["time"]["seconds"]
    console.print(f"{result['clips']} clips, {len(skipped)} skipped, {seconds:.1f} s", highlight=False)
    if page is not None:
        console.print(f"report: {page}", highlight=False, soft_wrap=True)
    return 0


def _retrieval_table(retrieval: Mapping[str, Any]) -> Table:
    table = make_table("Retrieval (chance in brackets)", "figure")
    columns = []
    for captions, both in retrieval.items():
        for direction, title in (("audio_to_text", "audio → text"), ("text_to_audio", "text → audio")):
            table.add_column(f"{captions}\n{title}", justify="right")
            columns.append(both[direction])
    for key in ("R@1", "R@5", "R@10", "mAP@10", "median_rank", "mean_rank"):
        show = "{:.1f}".format if key.endswith("rank") else _percent
        name = key.replace("_", " ") if key.endswith("rank") else f"{key} %"
        table.add_row(name, *(f"{show(figures[key])} ({show(figures['chance'][key])})" for figures in columns))
    for key in ("queries", "candidates"):
        table.add_row(key, *(str(figures[key]) for figures in columns))
    return table


def _classification_tables(column: str, figures: Mapping[str, Any]) -> list[Table]:
    per_class = make_table(f"{column}, class by class", "class")
    for head in ("clips", "given", "recall %", "precision %", "F1 %"):
        per_class.add_column(head, justify="right")
    for row in figures["per_class"]:
        recall = "–" if row["recall"] is None else _percent(row["recall"])
        cells = (str(row["clips"]), str(row["given"]), recall, _percent(row["precision"]), _percent(row["f1"]))
        per_class.add_row(row["class"], *cells)
    table = make_table(f"Zero-shot {column}: {figures['clips']} clips, {len(figures['classes'])} classes", "figure")
    table.add_column("%", justify="right")
    table.add_column("to compare")
    majority = f"always the most frequent class: {_percent(figures['majority_accuracy'])}"
    table.add_row("accuracy (WA)", _percent(figures["accuracy"]), majority)
    table.add_row("UAR (UA)", _percent(figures["uar"]), f"chance: {_percent(figures['chance'])}")
    table.add_row("macro-F1", _percent(figures["macro_f1"]), "")
    return [per_class, table]


def _percent(share: float) -> str:
    return f"{100 * share:.1f}"


def _doctor(arguments: Doctor) -> int:
    from fastclap.doctor import diagnose

    findings, problems = diagnose()
    if arguments.json:
        print_json({**findings, "problems": problems})
        return 1 if problems else 0
    from rich.console import Console
    from rich.markup import escape

    console = Console(highlight=False, soft_wrap=True)
    for group, facts in findings.items():
        console.print(f"[bold]{group}[/bold]")
        for name, value in facts.items():
            text = (", ".join(value) or "none") if isinstance(value, list) else str(value)
            console.print(f"  {name:<16} {escape(text)}")
    for problem in problems:
        console.print(f"[red]problem:[/red] {escape(problem)}")
    if not problems:
        console.print("[green]everything needed is there[/green]")
    return 1 if problems else 0
