"""Embedding whole collections: files, folders, manifests and captions to one table of unit vectors, and reading it.

Clips are decoded in threads one batch ahead of the model, in batches of similar length. What is computed is saved every
few seconds in a hidden folder next to the output, under a key made of the clip's path, size and time of change (or of
the caption), so that an interrupted call goes on where it stopped, even if files were added or repaired since. The
output appears under its name only when it is complete.

Next to an output `X` there are `X.skipped.jsonl` (what could not be embedded, if anything) and, for NPY, `X.jsonl` (one
object a row: `path` or `text`, and `origin`) and `X.json` (the header). A Parquet output has the columns `path`,
`text`, `origin` and `vector`, and its header in the metadata.
"""

from __future__ import annotations

import io
import json
import os
import shutil
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from hashlib import blake2b
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

from fastclap.console import Advance
from fastclap.data import BadClip, Row, load_manifest
from fastclap.data.shards import is_pack
from fastclap.errors import ConfigError, DataError, FastclapError, ModelError
from fastclap.evaluation.embedding import embed_clips
from fastclap.files import fsync, locked, replacing, write_atomic
from fastclap.models.encoder import DualEncoder, check_batch_size
from fastclap.reading import parse_json, read_bytes, read_json, read_text

VERSION = 1
AUDIO_SUFFIXES = frozenset((".wav", ".flac", ".ogg", ".oga", ".opus", ".mp3", ".aiff", ".aif", ".aifc"))
_MANIFEST_SUFFIXES = frozenset((".jsonl", ".json", ".csv", ".tsv", ".parquet"))
_CAPTIONS_AT_ONCE = 1024
_NAMES = ("path", "text", "origin")  # columns that name a row
_PRECISIONS = ("float32", "bfloat16")  # the default first
_METADATA = b"fastclap"
_MOST_BYTES = 1 << 40  # of a list of captions or names, which is as long as the collection


class Input(NamedTuple):
    """One thing to embed: a clip or a caption."""

    name: str  # path of the clip, or the caption itself
    row: Row | None  # the clip; None for a caption
    origin: str  # where it was named, "FILE:LINE", or the folder in which it was found
    key: bytes  # 16 bytes that identify the audio or the caption

    @property
    def record(self) -> dict[str, str]:
        """How the output and the list of skipped inputs name it."""
        return {"path" if self.row else "text": self.name, "origin": self.origin}


class Index(NamedTuple):
    """An embedded collection in memory."""

    vectors: Tensor  # float32 [n, D], unit length
    names: list[dict[str, Any]]  # "path" or "text" of each row, and "origin"
    model: str | None  # fingerprint of the model, if fastclap wrote the table


# ---------------------------------------------------------------------------------------------------------------------
# what to embed


def gather(
    inputs: Sequence[str], *, audio_root: str | None = None, columns: Mapping[str, str] | None = None
) -> list[Input]:
    """Clips and captions named by files, folders and manifests, in the order given; files of a folder sorted.

    Args:
        inputs: each an audio file; a folder, searched for audio files (hidden ones are left out); a manifest, a packed
            folder, a saved `datasets` folder or hf:NAME, as `fastclap.data.load_manifest` reads it, for its clips; or a
            .txt file with one caption a line. A clip that is named twice is taken once.
        audio_root: folder from which relative paths of manifests start.
        columns: column names of manifests that differ from ours.

    Raises:
        DataError: an input is missing, of an unknown type, or holds nothing to embed.
    """
    found: dict[Any, Input] = {}
    for name in inputs:
        suffix = os.path.splitext(name)[1].lower()
        if suffix == ".txt" and os.path.isfile(name):
            lines = read_lines(name)
            if not lines:
                raise DataError(f"{name}: the file is empty; it needs one caption a line")
            for number, text in enumerate(lines, 1):
                found[name, number] = Input(text, None, f"{name}:{number}", _digest("text", text))
            continue
        rows = list(_clip_rows(name, suffix, audio_root, columns))
        if not rows:
            raise DataError(f"{name}: no audio file in this folder ({', '.join(sorted(AUDIO_SUFFIXES))})")
        for row in rows:
            key = clip_key(row)
            found.setdefault(key, Input(row.audio, row._replace(source=0), row.origin, key))
    if not found:
        raise DataError("nothing to embed: name at least one file, folder or manifest")
    return list(found.values())


def _clip_rows(name: str, suffix: str, audio_root: str | None, columns: Mapping[str, str] | None) -> Iterable[Row]:
    """The clips that an input other than captions names."""
    if name.startswith("hf:") or suffix in _MANIFEST_SUFFIXES or is_table_folder(name):
        return load_manifest(name, audio_root=audio_root, columns=columns, require_captions=False)
    if os.path.isdir(name):
        return (clip_row(path, name) for path in audio_files(name))
    if suffix in AUDIO_SUFFIXES and os.path.isfile(name):
        return [clip_row(name, name)]
    if os.path.exists(name):
        known = ", ".join(sorted(AUDIO_SUFFIXES | _MANIFEST_SUFFIXES | {".txt"}))
        raise DataError(f"{name}: cannot tell what this is; give a folder, hf:NAME, or a file of type {known}")
    raise DataError(f"{name}: no such file or folder (a Hugging Face data set is written hf:NAME)")


def clip_row(path: str, origin: str) -> Row:
    """An audio file as a manifest row without captions."""
    return Row(path, (), (), {}, None, None, None, origin, 0)


def read_lines(path: str | os.PathLike[str]) -> list[str]:
    """Stripped lines of a UTF-8 text file; blank ones are kept, so that line i stays line i.

    Raises:
        DataError: the file is missing or not UTF-8.
    """
    text = read_text(Path(path), limit=_MOST_BYTES)
    return [line.strip() for line in text.removesuffix("\n").split("\n")] if text else []


def is_table_folder(name: str) -> bool:
    """Whether a folder is a packed one or a saved `datasets` folder."""
    markers = ("state.json", "dataset_dict.json")
    return is_pack(name) or any(os.path.isfile(os.path.join(name, marker)) for marker in markers)


def audio_files(folder: str) -> Iterator[str]:
    """Audio files of a folder and the folders in it, sorted; hidden ones are left out."""
    for parent, folders, files in os.walk(folder):
        folders.sort()
        for file in sorted(files):
            if os.path.splitext(file)[1].lower() in AUDIO_SUFFIXES and not file.startswith("."):
                yield os.path.join(parent, file)


def clip_key(row: Row) -> bytes:
    """16 bytes that identify the audio of a row: its path, size and time of change, or its place in a packed folder."""
    if row.packed is not None:
        return _digest("packed", os.path.abspath(row.packed.shard), row.packed.offset, row.packed.checksums.hex())
    path = os.path.abspath(row.audio)
    try:
        status = os.stat(path)
    except OSError:  # the clip will be skipped, with a reason
        return _digest("audio", path)
    return _digest("audio", path, status.st_size, status.st_mtime_ns)


def _digest(*parts: Any) -> bytes:
    return blake2b(repr(parts).encode(), digest_size=16).digest()


# ---------------------------------------------------------------------------------------------------------------------
# embedding


def check_finite(vectors: Tensor, names: Sequence[str]) -> None:
    """Check vectors [n, D] of clips or captions.

    Raises:
        ModelError: one is not finite; the first of `names` [n] where that is so is in the message.
    """
    finite = vectors.isfinite().all(dim=1).tolist()
    if not all(finite):
        raise ModelError(
            f"the model gives NaN or infinity for {names[finite.index(False)]!r}: its weights are damaged or overflow "
            "in this precision"
        )


def fingerprint(model: DualEncoder) -> str:
    """An id of a model's architecture and weights, from a few hundred values of each tensor."""
    digest = blake2b(digest_size=16)
    for name, tensor in model.state_dict().items():
        values = tensor.detach().flatten()
        sample = values[:: max(1, len(values) // 256)].float().cpu().numpy()
        digest.update(f"{name} {tuple(tensor.shape)} ".encode() + sample.astype("<f4").tobytes())
    return digest.hexdigest()


def embed(
    model: DualEncoder,
    inputs: Sequence[Input],
    out: str | os.PathLike[str],
    *,
    batch_size: int = 32,
    threads: int = 4,
    save_seconds: float = 20,
    precision: Literal["float32", "bfloat16"] = "float32",
    advance: Advance = lambda done, total: None,
) -> dict[str, Any]:
    """Embed clips and captions into `out`, or go on where an interrupted call stopped.

    Args:
        model: in any mode, which it keeps.
        inputs: what `gather` found.
        out: a .parquet or .npy file that does not exist yet, or that an earlier call made of the same inputs.
        batch_size: clips embedded at a time.
        threads: decoding threads.
        save_seconds: vectors are saved at such intervals; a killed call loses no more.
        precision: of the towers' products. bfloat16 is faster where the processor has instructions for it, and moves
            a unit vector by about 0.01; vectors of both kinds may be compared with one another.
        advance: called with the numbers of inputs done and of all inputs, after each batch.

    Returns:
        JSON-able: `out`, `clips`, `texts` (rows of the output), `skipped`, `dimension`, `reused` (inputs that an
        earlier call had done), and `time` of this call: `seconds` and `clips_per_second`.

    Raises:
        ConfigError: `out` is neither .parquet nor .npy, or `precision` is unknown.
        DataError: `out` holds something else, or nothing could be embedded.
        ModelError: a vector is not finite.
        OSError: the disk is full; the same call goes on once there is room.
    """
    out = Path(out)
    if out.suffix not in (".parquet", ".npy"):
        raise ConfigError(f"--out {out}: name a .parquet or a .npy file")
    if precision not in _PRECISIONS:
        raise ConfigError(f"precision is {precision!r}; choose one of {', '.join(_PRECISIONS)}")
    check_batch_size(batch_size)
    if not inputs:
        raise DataError("nothing to embed: name at least one file, folder or manifest")
    header: dict[str, Any] = {
        "version": VERSION,
        "model": fingerprint(model),
        "precision": precision,
        "items": _digest(*[item.key for item in inputs]).hex(),
    }
    start = time.perf_counter()
    parts = out.with_name(f".{out.name}.parts")
    if out.exists():
        found = {"precision": _PRECISIONS[0], **_header_of_output(out)}
        if any(found.get(key) != value for key, value in header.items()):
            raise DataError(
                f"{out}: exists already and was not made of this model and these inputs in {precision}; remove "
                "it, or name another file"
            )
        shutil.rmtree(parts, ignore_errors=True)
        return {**found["summary"], "out": os.fspath(out), "reused": len(inputs), "time": _times(start, 0)}
    parts.mkdir(parents=True, exist_ok=True)
    with locked(parts, "embedding into"):
        origin = header["model"] + ("" if precision == _PRECISIONS[0] else f" in {precision}")
        store = _Store(parts, origin, save_seconds)
        reused = sum(item.key in store.done for item in inputs)
        with torch.autocast(model.device.type, torch.bfloat16, enabled=precision == "bfloat16"):
            clips = _embed_missing(model, inputs, store, batch_size, threads, advance)
        summary = _finish(out, inputs, store, header)
    shutil.rmtree(parts)
    return {**summary, "out": os.fspath(out), "reused": reused, "time": _times(start, clips)}


def _times(start: float, clips: int) -> dict[str, float]:
    seconds = time.perf_counter() - start
    return {"seconds": round(seconds, 3), "clips_per_second": round(clips / seconds, 2)}


def _embed_missing(
    model: DualEncoder, inputs: Sequence[Input], store: _Store, batch_size: int, threads: int, advance: Advance
) -> int:
    """Add the vectors of all inputs that the store lacks to it; returns the number of clips embedded."""
    missing = list({item.key: item for item in inputs if item.key not in store.done}.values())
    done, total = len(inputs) - len(missing), len(inputs)
    advance(done, total)
    captions = [item for item in missing if item.row is None]
    clips = [item for item in missing if item.row is not None]
    embedded = 0
    try:
        for first in range(0, len(captions), _CAPTIONS_AT_ONCE):
            group = captions[first : first + _CAPTIONS_AT_ONCE]
            store.skip((item.key, "blank line") for item in group if not item.name)
            if written := [item for item in group if item.name]:
                store.add(written, model.embed_text([item.name for item in written]))
            done += len(group)
            advance(done, total)
        clip_rows = [item.row for item in clips if item.row is not None]
        bad: list[BadClip] = []
        for rows, vectors in embed_clips(model, clip_rows, batch_size=batch_size, threads=threads, bad=bad):
            store.skip((clips[clip.row].key, clip.reason) for clip in bad)
            store.add([clips[row] for row in rows], vectors)
            embedded += len(rows)
            done += len(rows) + len(bad)
            bad.clear()
            advance(done, total)
        store.skip((clips[clip.row].key, clip.reason) for clip in bad)
    finally:  # an interrupted call keeps all it has computed
        store.save()
    return embedded


class _Store:
    """What has been computed so far, in files of a folder, each with keys, vectors, and what was skipped.

    Args:
        folder: where the files are.
        model: fingerprint of the model, and the precision unless it is float32.
        save_seconds: `add` writes a file at such intervals.

    Raises:
        DataError: the files are of another model or precision.
    """

    def __init__(self, folder: Path, model: str, save_seconds: float) -> None:
        self.folder = folder
        self.save_seconds = save_seconds
        self.done: set[bytes] = set()
        self.skipped: dict[bytes, str] = {}
        self.files: list[Path] = []
        self._keys: list[bytes] = []
        self._vectors: list[np.ndarray] = []
        self._skipped: dict[bytes, str] = {}
        self._saved = time.monotonic()
        owner = folder / "model.json"
        if owner.exists():
            try:
                found = read_json(owner)
            except DataError as error:
                raise DataError(f"{error}; remove the folder {folder}, and embed again") from error
            if found != {"version": VERSION, "model": model}:
                raise DataError(
                    f"{folder}: holds what an interrupted call computed with another model or precision; use that "
                    "again, or remove the folder"
                )
        else:
            write_atomic(owner, json.dumps({"version": VERSION, "model": model}).encode())
        for path in sorted(folder.glob("part-*.npz")):
            part = _read_part(path)
            if part is None or not path.stem.removeprefix("part-").isdecimal():
                path.unlink()  # damaged: its items are embedded again
                continue
            keys, _, skipped = part
            self.files.append(path)
            self.done.update(keys)
            self.skipped.update(skipped)
        self.done.update(self.skipped)

    def add(self, inputs: Sequence[Input], vectors: Tensor) -> None:
        check_finite(vectors, [item.name for item in inputs])
        self._keys += [item.key for item in inputs]
        self._vectors.append(vectors.float().cpu().numpy())
        if time.monotonic() - self._saved > self.save_seconds:
            self.save()

    def skip(self, reasons: Iterable[tuple[bytes, str]]) -> None:
        self._skipped.update(reasons)

    def save(self) -> None:
        if self._keys or self._skipped:
            number = int(self.files[-1].stem.removeprefix("part-")) + 1 if self.files else 0
            path = self.folder / f"part-{number:06d}.npz"
            skipped = {key.hex(): reason for key, reason in self._skipped.items()}
            buffer = io.BytesIO()
            np.savez(
                buffer,
                keys=np.frombuffer(b"".join(self._keys), np.uint8).reshape(-1, 16),
                vectors=np.concatenate(self._vectors) if self._vectors else np.zeros((0, 0), np.float32),
                skipped=np.frombuffer(json.dumps(skipped).encode(), np.uint8),
            )
            write_atomic(path, buffer.getvalue())
            self.files.append(path)
            self.done.update(self._keys, self._skipped)
            self.skipped.update(self._skipped)
            self._keys, self._vectors, self._skipped = [], [], {}
        self._saved = time.monotonic()

    def vectors(self) -> Iterator[tuple[list[bytes], np.ndarray]]:
        for path in self.files:
            part = _read_part(path)
            if part is None:
                raise DataError(f"{path}: damaged since it was written; run the same command again")
            if part[0]:
                yield part[0], part[1]


def _read_part(path: Path) -> tuple[list[bytes], np.ndarray, dict[bytes, str]] | None:
    """Keys, their vectors, and what was skipped; None: the file is damaged."""
    try:
        with np.load(path, allow_pickle=False) as part:
            keys, vectors, listed = part["keys"], part["vectors"], parse_json(part["skipped"].tobytes(), str(path))
        skipped = {bytes.fromhex(key): str(reason) for key, reason in listed.items()}
        whole = keys.dtype == np.uint8 and keys.shape == (len(vectors), 16) and vectors.dtype == np.float32
        if whole and vectors.ndim == 2 and np.isfinite(vectors).all():
            return [row.tobytes() for row in keys], vectors, skipped
    except Exception:  # an archive of NumPy may be damaged in any of its layers
        pass
    return None


def _finish(out: Path, inputs: Sequence[Input], store: _Store, header: Mapping[str, Any]) -> dict[str, Any]:
    """Write the output from the store; it gets its name last."""
    listing = out.with_name(f"{out.name}.skipped.jsonl")
    skipped = [item for item in inputs if item.key in store.skipped]
    if skipped:
        write_atomic(listing, _json_lines([{**item.record, "reason": store.skipped[item.key]} for item in skipped]))
    else:
        listing.unlink(missing_ok=True)
    kept = [item for item in inputs if item.key not in store.skipped]
    if not kept:
        first = skipped[0]
        raise DataError(
            f"none of the {len(inputs)} inputs can be used; the first: {first.origin}: {first.name} "
            f"{store.skipped[first.key]} (all: {listing})"
        )
    rows_of: dict[bytes, list[int]] = {}
    for row, item in enumerate(kept):
        rows_of.setdefault(item.key, []).append(row)
    matrix: np.ndarray | None = None
    for keys, vectors in store.vectors():
        if matrix is None:
            matrix = np.empty((len(kept), vectors.shape[1]), np.float32)
        for key, vector in zip(keys, vectors, strict=True):
            matrix[rows_of.get(key, [])] = vector
    assert matrix is not None
    names = [{key: _as_utf8(value) for key, value in item.record.items()} for item in kept]
    clips = sum(item.row is not None for item in kept)
    summary = {"clips": clips, "texts": len(kept) - clips, "skipped": len(skipped), "dimension": matrix.shape[1]}
    full = {**header, "summary": summary}
    if out.suffix == ".npy":
        write_atomic(out.with_name(f"{out.name}.jsonl"), _json_lines(names))
        write_atomic(out.with_name(f"{out.name}.json"), json.dumps(full, indent=1).encode())
        with replacing(out) as aside, open(aside, "wb") as file:
            np.save(file, matrix)
    else:
        _write_parquet(out, names, matrix, full)
    fsync(out.parent)
    return summary


def _as_utf8(name: str) -> str:
    """A file name may hold bytes that are not UTF-8; they become question marks."""
    return name.encode(errors="replace").decode()


def _json_lines(records: Sequence[Mapping[str, Any]]) -> bytes:
    return "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records).encode(errors="replace")


def _write_parquet(
    out: Path, names: Sequence[Mapping[str, Any]], matrix: np.ndarray, header: Mapping[str, Any]
) -> None:
    import pyarrow
    import pyarrow.parquet

    columns = {
        key: pyarrow.array([name.get(key) for name in names], pyarrow.string()) for key in ("path", "text", "origin")
    }
    vectors = pyarrow.FixedSizeListArray.from_arrays(pyarrow.array(matrix.reshape(-1)), matrix.shape[1])
    table = pyarrow.table({**columns, "vector": vectors}, metadata={_METADATA: json.dumps(header)})
    with replacing(out) as aside, open(aside, "wb") as file:  # pyarrow takes no name that is not UTF-8
        pyarrow.parquet.write_table(table, file, use_dictionary=False)


# ---------------------------------------------------------------------------------------------------------------------
# reading


def _header(path: Path) -> dict[str, Any] | None:
    """The header of an output, None if fastclap did not write it.

    Raises:
        DataError: it is damaged.
    """
    if path.suffix == ".npy":
        file = path.with_name(f"{path.name}.json")
        if not file.exists():
            return None
        header = read_json(file)
    else:
        import pyarrow.parquet

        with open(path, "rb") as opened:
            metadata = pyarrow.parquet.read_schema(opened).metadata or {}
        if _METADATA not in metadata:
            return None
        file, header = path, parse_json(metadata[_METADATA], f"{path}: its header")
    kinds = {"model": str, "items": str, "summary": dict}
    if not isinstance(header, dict) or not all(isinstance(header.get(key), kind) for key, kind in kinds.items()):
        raise DataError(f"{file}: not the header of vectors that fastclap embedded; embed again, or remove it")
    return header


def _header_of_output(path: Path) -> dict[str, Any]:
    """The header of something that is there already, empty if it has none that can be read."""
    if not path.is_file():  # a pipe would be waited for
        return {}
    try:
        return _header(path) or {}
    except (DataError, OSError, ValueError):  # pyarrow's errors are OSErrors and ValueErrors
        return {}


def load_index(path: str | os.PathLike[str]) -> Index:
    """Read what `embed` wrote, or another table of vectors.

    Args:
        path: a .parquet file with a column `vector` and, for names, `path` or `text`; or a .npy file with a matrix,
            whose names are read from FILE.npy.jsonl, one object a row.

    Raises:
        DataError: the file is missing, damaged or holds no vectors, a vector is not finite or has no direction, or
            there are more or fewer names than vectors, or a name is no object with texts.
    """
    if not isinstance(path, (str, os.PathLike)):
        raise DataError(f"an index is {path!r}; give the .parquet or .npy file that fastclap embed wrote")
    path = Path(path)
    if path.is_dir():
        raise DataError(f"{path}: is a folder; embed it first: fastclap embed MODEL {path} --out index.parquet")
    if path.suffix not in (".parquet", ".npy"):
        raise DataError(f"{path}: not a table of vectors; give the .parquet or .npy file that fastclap embed wrote")
    if not path.is_file():
        raise DataError(f"{path}: no such file; make it with: fastclap embed MODEL INPUT... --out {path}")
    try:
        matrix, names = (_read_npy if path.suffix == ".npy" else _read_parquet)(path)
        header = _header(path)
    except FastclapError:
        raise
    except Exception as error:  # of any kind: NumPy's and pyarrow's for what another program has written, or cut
        raise DataError(f"{path}: truncated or damaged ({' '.join(str(error).split())}); embed again") from error
    if matrix.ndim != 2 or not matrix.size or not np.issubdtype(matrix.dtype, np.floating):
        raise DataError(f"{path}: holds {matrix.dtype} of shape {matrix.shape} instead of a matrix of vectors")
    if len(names) != len(matrix):
        raise DataError(f"{path}: {len(names)} names for {len(matrix)} vectors; embed again")
    for row, name in enumerate(names):
        if not isinstance(name, dict) or not all(isinstance(name.get(key, ""), str) for key in _NAMES):
            raise DataError(f"{path}: the name of row {row} is {str(name)[:80]!a}; give an object with path or text")
    with np.errstate(over="ignore"):  # what float32 does not hold becomes infinite
        vectors = torch.from_numpy(np.array(matrix, np.float32, copy=True))
    lengths = torch.linalg.vector_norm(vectors, dim=1, dtype=torch.float64)
    for unusable, what in ((~vectors.isfinite().all(1), "not finite"), (lengths == 0, "zero, which has no direction")):
        if unusable.any():
            raise DataError(f"{path}: the vector of row {int(unusable.nonzero()[0])} is {what}; embed again")
    small_or_large = (lengths < 1e-12) | (lengths > 1e18)  # whose squares float32 does not hold
    if small_or_large.any():
        vectors[small_or_large] = (vectors[small_or_large].double() / lengths[small_or_large, None]).float()
    return Index(torch.nn.functional.normalize(vectors, dim=1), names, header["model"] if header else None)


def _read_npy(path: Path) -> tuple[np.ndarray, list[Any]]:
    listing = path.with_name(f"{path.name}.jsonl")
    matrix = np.load(path, mmap_mode="r", allow_pickle=False)
    if not isinstance(matrix, np.ndarray):
        raise DataError(f"{path}: holds several arrays; give a .npy file with one matrix")
    if not listing.exists():
        raise DataError(f"{listing}: missing; it names the rows of {path.name}; copy it along")
    lines = read_bytes(listing, limit=_MOST_BYTES).removesuffix(b"\n").split(b"\n")  # no other character ends a line
    return matrix, [parse_json(line, f"{listing}:{number}") for number, line in enumerate(lines, 1)]


def _read_parquet(path: Path) -> tuple[np.ndarray, list[Any]]:
    import pyarrow
    import pyarrow.parquet

    with open(path, "rb") as file:
        table = pyarrow.parquet.ParquetFile(file).read()  # read_table would import pandas
    if "vector" not in table.column_names:
        raise DataError(f"{path}: no column 'vector'; the columns are {', '.join(table.column_names)}")
    column = table.column("vector").combine_chunks()
    types = pyarrow.types
    if not (types.is_fixed_size_list(column.type) or types.is_list(column.type) or types.is_large_list(column.type)):
        raise DataError(f"{path}: the column 'vector' holds {column.type} instead of lists of numbers")
    if not types.is_floating(column.type.value_type):
        raise DataError(f"{path}: the column 'vector' holds lists of {column.type.value_type} instead of floats")
    if not len(table):
        raise DataError(f"{path}: holds no vectors; embed again")
    if column.null_count:
        row = int(np.flatnonzero(np.array(column.is_null()))[0])
        raise DataError(f"{path}: the vector of row {row} is missing; embed again")
    flat = column.flatten()
    if not types.is_fixed_size_list(column.type):
        sizes = np.diff(np.array(column.offsets))
        if (sizes != sizes[0]).any():
            row = int(np.flatnonzero(sizes != sizes[0])[0])
            raise DataError(
                f"{path}: the vector of row {row} has {sizes[row]} numbers, that of row 0 has {sizes[0]}: they are of "
                "different lengths; embed again"
            )
    values = flat.to_numpy(zero_copy_only=False) if flat.null_count else np.from_dlpack(flat)  # no need of pandas
    kept = [name for name in _NAMES if name in table.column_names]
    for name in kept:
        kind = table.schema.field(name).type
        kind = kind.value_type if types.is_dictionary(kind) else kind
        if not (types.is_string(kind) or types.is_large_string(kind) or types.is_null(kind)):
            raise DataError(f"{path}: the column {name!r} holds {kind} instead of text")
    records = table.select(kept).to_pylist() if kept else [{"path": f"row {i}"} for i in range(len(table))]
    names = [{key: value for key, value in record.items() if value is not None} for record in records]
    return values.reshape(len(table), -1), names
