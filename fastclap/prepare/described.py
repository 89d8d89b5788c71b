"""Speech with descriptions: ParaSpeechCaps, FCaps, PromptSpeech, TextrolSpeech and SpeechCraft.

Their owners publish descriptions; the audio is that of other corpora, to be fetched from those. Clips are matched as
the owners say: by relative path (ParaSpeechCaps, FCaps, TextrolSpeech) or by the corpus's utterance id, which is the
name of the audio file (PromptSpeech, SpeechCraft).

Verified against public descriptions: ParaSpeechCaps's columns and splits and the layout of its audio (its repository's
dataset/README.md), FCaps's files, splits and cuts (its dataset card) and the two caption lists of a cut (the published
CLSP recipe), PromptSpeech's columns (public code that reads Real_training.csv), TextrolSpeech's columns and the name of
its training table (public code that reads them). Not verified: TextrolSpeech's test table is taken to be named and
built like it. SpeechCraft's files were not seen: their form is what the published annotation code writes; a copy that
differs needs `--columns`.
"""

from __future__ import annotations

import gzip
import re
import zlib
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from fastclap.errors import DataError, required
from fastclap.prepare.layout import (
    AudioIndex,
    Clips,
    Dataset,
    DescribedClip,
    Place,
    read_tables,
    split_by_speaker,
    split_in_name,
    texts,
)
from fastclap.prompts import parse_sex
from fastclap.reading import parse_json, read_json

_SHARD = re.compile(r"(.+?)-\d{5}-of-\d{5}")

_PARASPEECHCAPS_COLUMNS = {  # theirs → ours; transcripts, phonemes and measured values are left where they are
    "source": "source",
    "intrinsic_tags": "intrinsic_tags",
    "situational_tags": "situational_tags",
    "basic_tags": "basic_tags",
    "all_tags": "all_tags",
    "classification_tag": "classification_tag",
    "speakerid": "speaker",
    "accent": "accent",
    "pitch": "pitch",
    "speaking_rate": "speaking_rate",
    "noise": "noise",
}
_FCAPS_CUSTOM = ("intrinsic_tags", "situational_tags", "accent", "pitch", "speaking_rate")

_MOST_ENTRIES = 1 << 32  # bytes of a SpeechCraft file: one object of half a million descriptions
_SPEECHCRAFT_CAPTIONS = ("description", "instruction", "caption")
_SPEECHCRAFT_LABELS = {  # theirs, English and Chinese → ours
    "age": "age",
    "gender": "sex",
    "pitch": "pitch",
    "volume": "volume",
    "energy": "volume",
    "speed": "speed",
    "emotion": "emotion",
    "年龄": "age",
    "性别": "sex",
    "音高": "pitch",
    "音量": "volume",
    "语速": "speed",
}
_SPEECHCRAFT_SPEAKER = re.compile(r"SSB\d{4}|[^_]+(?=_)")  # AISHELL-3's has no separator


def _read_paraspeechcaps(place: Place) -> Clips:
    total, splits = _paraspeechcaps_tables(place)

    def clips() -> Iterator[DescribedClip]:
        for split, origin, records in splits:
            for number, record in enumerate(records, 1):
                source, relative = str(record["source"]), str(record["relative_audio_path"])
                columns = {ours: record.get(theirs) for theirs, ours in _PARASPEECHCAPS_COLUMNS.items()}
                columns["text_description"] = texts(record["text_description"])
                columns["sex"] = parse_sex(record.get("gender"))
                paths = (str(place.root / source / relative), str(place.root / relative))
                yield DescribedClip(paths, split, columns, f"{origin}:{number}", record.get("duration"))

    return total, clips()


def _paraspeechcaps_tables(place: Place) -> tuple[int, list[tuple[str, str, Iterable[Mapping[str, Any]]]]]:
    """The rows in all, and (split, file, rows) of Parquet files as the hub has them, or of a saved DatasetDict."""
    needed = {"source", "relative_audio_path", "text_description"}
    splits: list[tuple[str, str, Iterable[Mapping[str, Any]]]] = []
    if (place.annotations / "dataset_dict.json").is_file():
        datasets = required("datasets", "reading a saved `datasets` folder")
        saved = datasets.load_from_disk(str(place.annotations))
        columns = {path: set(data.column_names) for path, data in saved.items()}
        total = sum(len(data) for data in saved.values())
        splits = [(name, f"{place.annotations}/{name}", data) for name, data in sorted(saved.items())]
    else:
        import pyarrow
        import pyarrow.parquet

        total, columns = 0, {}
        for path in place.files("*.parquet", "*/*.parquet", "*/*/*.parquet"):
            try:
                file = pyarrow.parquet.ParquetFile(open(path, "rb"))  # noqa: SIM115 - read from later
            except (pyarrow.ArrowException, OSError) as error:
                raise _unreadable(path, error) from error
            columns[str(path)] = set(file.schema_arrow.names)
            total += file.metadata.num_rows
            match = _SHARD.fullmatch(path.stem)
            splits.append((match[1] if match else path.stem, str(path), _parquet_rows(path, file)))
    if not splits:
        raise place.wrong(
            f"no .parquet file in {place.annotations}; name the hub's with --annotations hf:ajd12342/paraspeechcaps"
        )
    for name, found in columns.items():
        if not needed <= found:
            raise place.wrong(f"{name} has the columns {', '.join(sorted(found))}, not {', '.join(sorted(needed))}")
    return total, splits


def _parquet_rows(path: Path, file: Any) -> Iterator[Mapping[str, Any]]:
    import pyarrow

    try:
        for batch in file.iter_batches(batch_size=4096):
            yield from batch.to_pylist()
    except (pyarrow.ArrowException, OSError, UnicodeDecodeError) as error:
        raise _unreadable(path, error) from error


def _unreadable(path: Path, error: Exception) -> DataError:
    return DataError(f"{path}: not a readable Parquet file ({' '.join(str(error).split())}); download it again")


def _read_fcaps(place: Place) -> Clips:
    files = place.files("fcaps-*.jsonl.gz", "data/fcaps-*.jsonl.gz", "fcaps-*.jsonl", "data/fcaps-*.jsonl")
    if not files:
        raise place.wrong(
            f"no fcaps-*.jsonl.gz in {place.annotations} or its folder data; name the hub's with "
            "--annotations hf:yfyeung/FCaps"
        )
    total = sum(1 for file in files for _ in _json_lines(file))
    return total, (
        clip for file in files for line, cut in _json_lines(file) for clip in _fcaps_clip(place, file, line, cut)
    )


def _json_lines(path: Path) -> Iterator[tuple[int, str]]:
    try:
        with gzip.open(path, "rt", encoding="utf-8") if path.suffix == ".gz" else open(path, encoding="utf-8") as file:
            yield from ((line, text) for line, text in enumerate(file, 1) if text.strip())
    except (OSError, EOFError, UnicodeDecodeError, zlib.error) as error:
        raise DataError(f"{path}: cannot be read ({error}); download it again") from error


def _fcaps_clip(place: Place, path: Path, line: int, text: str) -> Iterator[DescribedClip]:
    origin = f"{path}:{line}"
    try:
        cut = parse_json(text, origin)
        source, supervision = cut["recording"]["sources"][0]["source"], cut["supervisions"][0]
        custom, start = supervision.get("custom") or {}, cut.get("start", 0.0)
        relative = source.lstrip("/")
        custom.keys()
    except (LookupError, TypeError, AttributeError) as error:
        raise place.wrong(f"{origin} is not a cut with a recording and a supervision ({error!r})") from error
    fine, short = texts(custom.get(place.name("long_captions"))), texts(custom.get(place.name("short_captions")))
    if not fine and not short:
        place.left_out["a cut without captions"] += 1
        return
    if start:  # a manifest row is a whole file; the card says that every cut starts at 0
        place.left_out["a cut that does not start at the beginning of its file"] += 1
        return
    columns = {
        "text_description": short or fine,  # Emilia's clips have fine captions only, and a row needs this column
        "fine_description": fine,
        "sex": parse_sex(supervision.get("gender")),
        "speaker": supervision.get("speaker"),
        **{column: custom.get(column) for column in _FCAPS_CUSTOM},
    }
    paths = (str(place.root / relative), str(place.root / relative.removeprefix("download/")))
    split = path.name.removeprefix("fcaps-").split(".")[0].removesuffix("-train_base")
    yield DescribedClip(paths, split, columns, origin, cut.get("duration"))


def _read_promptspeech(place: Place) -> Clips:
    item, speaker, caption = (place.name(column) for column in ("item_name", "spk_id", "style_prompt"))
    tables = read_tables(place, ("item_name", "style_prompt"))
    index = AudioIndex(place)

    def clips() -> Iterator[DescribedClip]:
        for path, origin, record in tables.rows():
            name = str(record[item])
            columns = {
                "text_description": texts(record[caption]),
                "sex": parse_sex(record.get(place.name("gender"))),
                "speaker": record.get(speaker) or name.partition("_")[0],
                **{column: record.get(place.name(column)) for column in ("pitch", "speaking_speed", "energy")},
            }
            yield DescribedClip(index.find(name), split_in_name(path), columns, origin)

    return tables.total, clips()


def _read_textrolspeech(place: Place) -> Clips:
    audio, caption, emotion = (place.name(column) for column in ("wav_fp", "style_prompt", "emotion"))
    tables = read_tables(place, ("wav_fp", "style_prompt"))

    def clips() -> Iterator[DescribedClip]:
        for path, origin, record in tables.rows():
            label = str(record.get(emotion) or "").strip().lower()
            columns = {
                "text_description": texts(record[caption]),
                "classification_tag": label,
                "emotion": label,
                "sex": parse_sex(record.get(place.name("gender"))),
                **{column: record.get(place.name(column)) for column in ("pitch", "tempo", "energy")},
            }
            yield DescribedClip(
                (str(place.root / str(record[audio]).lstrip("/")),), split_in_name(path), columns, origin
            )

    return tables.total, clips()


def _read_speechcraft(place: Place) -> Clips:
    entries: dict[str, tuple[str, dict[str, Any]]] = {}  # clip id → (where it was met first, its fields)
    files = place.files("*.json", "*/*.json")
    for path in files:
        for name, value in _speechcraft_entries(place, path):
            fields = {"description": value} if isinstance(value, str) else value
            entries.setdefault(name, (f"{path}:{name}", {}))[1].update(fields)
    caption = _speechcraft_caption(place, files, [fields for _, fields in entries.values()])
    index = AudioIndex(place)

    def clips() -> Iterator[DescribedClip]:
        for name, (origin, fields) in entries.items():
            captions = texts(fields.get(caption))
            if not captions:
                place.left_out["an entry without a description"] += 1
                continue
            labels = _speechcraft_labels(fields)
            match = _SPEECHCRAFT_SPEAKER.match(name)
            speaker = match[0] if match else name
            columns = {"text_description": captions, **labels, "classification_tag": labels.get("emotion")}
            yield DescribedClip(index.find(name), split_by_speaker(speaker), {**columns, "speaker": speaker}, origin)

    return len(entries), clips()


def _speechcraft_entries(place: Place, path: Path) -> Iterator[tuple[str, Any]]:
    """(clip id, description or fields) of a JSON object by clip id."""
    try:
        entries = read_json(path, limit=_MOST_ENTRIES).items()
    except (DataError, AttributeError) as error:
        raise place.wrong(f"{path} is not a JSON object by clip id ({error})") from error
    for name, value in entries:
        if not isinstance(value, (str, dict)):
            raise place.wrong(f"{path}: the entry of {name!r} is {str(value)[:40]!r}, neither text nor an object")
        yield name, value


def _speechcraft_caption(place: Place, files: list[Path], entries: list[dict[str, Any]]) -> str:
    """The field of the entries that holds the description."""
    keys = dict.fromkeys(key for fields in entries for key in fields)
    wanted = place.names.get("description")
    fitting = (
        [key for word in _SPEECHCRAFT_CAPTIONS for key in keys if key.endswith(word)] if wanted is None else [wanted]
    )
    if fitting and fitting[0] in keys:
        return fitting[0]
    if not keys:
        raise place.wrong(f"no .json file with entries in {place.annotations} or a folder in it")
    raise place.wrong(
        f"the entries of {', '.join(map(str, files[:3]))} have the fields {', '.join(keys)}; say which one holds the "
        "description with --columns description FIELD"
    )


def _speechcraft_labels(fields: Mapping[str, Any]) -> dict[str, Any]:
    """Labels from fields of their own, or from one field "labels" of "name:value" parts between tabs."""
    packed = fields.get("labels")
    parts = (part.partition(":") for part in packed.split("\t")) if isinstance(packed, str) else ()
    found = {**{name.strip(): value.strip() for name, _, value in parts}, **fields}
    labels = {
        ours: value.strip().lower()
        for theirs, ours in _SPEECHCRAFT_LABELS.items()
        if isinstance(value := found.get(theirs), str)
    }
    return {**labels, "sex": parse_sex(labels.get("sex"))}


PARASPEECHCAPS = Dataset(
    "ParaSpeechCaps",
    "its Parquet files under --annotations (a folder, or hf:ajd12342/paraspeechcaps), and the audio as "
    "ROOT/{voxceleb,expresso,ears,emilia}/RELATIVE_AUDIO_PATH",
    "get it from https://huggingface.co/datasets/ajd12342/paraspeechcaps",
    "as published: train_scaled, train_base, dev, holdout",
    (),
    _read_paraspeechcaps,
)
FCAPS = Dataset(
    "FCaps",
    "fcaps-*.jsonl.gz under --annotations (a folder, or hf:yfyeung/FCaps), and the audio as "
    "ROOT/{Emilia,ears,expresso,voxceleb1,voxceleb2}/...",
    "get it from https://huggingface.co/datasets/yfyeung/FCaps",
    "as published: emilia, pscbase, dev, test",
    ("short_captions", "long_captions"),
    _read_fcaps,
)
PROMPTSPEECH = Dataset(
    "PromptSpeech",
    "Real_training.csv with the columns item_name and style_prompt under --annotations, and LibriTTS's WAV files under "
    "--root",
    "get it from https://speechresearch.github.io/prompttts/ and LibriTTS from https://www.openslr.org/60",
    "as published: by the name of each table, Real_training.csv is train",
    ("item_name", "spk_id", "gender", "pitch", "speaking_speed", "energy", "style_prompt"),
    _read_promptspeech,
)
TEXTROLSPEECH = Dataset(
    "TextrolSpeech",
    "tables such as caption/random_train.csv, and the audio at ROOT/WAV_FP with each row's wav_fp",
    "get it from https://github.com/jishengpeng/TextrolSpeech",
    "as published: by the name of each table, random_train.csv is train",
    ("wav_fp", "gender", "pitch", "tempo", "energy", "emotion", "style_prompt"),
    _read_textrolspeech,
)
SPEECHCRAFT = Dataset(
    "SpeechCraft",
    "JSON files of descriptions by clip id under --annotations, and audio files named by clip id under --root",
    "get it from https://github.com/thuhcsi/SpeechCraft",
    "none published; by speaker (of GigaSpeech: by recording): 5 % test and 5 % dev, by a hash of the speaker's id",
    ("description",),
    _read_speechcraft,
)
