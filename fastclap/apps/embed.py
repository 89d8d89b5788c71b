"""Embedding whole collections: files, folders, manifests and captions to one table of unit vectors, and reading it.

Clips are decoded in threads one batch ahead of the model, in batches of similar length. What is computed is put on the
disk every few seconds, in a hidden folder beside the output and under a key of the clip's path, size and time of change
(or of the caption), so that an interrupted call goes on where it was, also when files were added or repaired since. The
output appears under its name only when it is complete.

Beside an output ``X`` lie ``X.skipped.jsonl`` (what could not be embedded, if anything) and, for NPY, ``X.jsonl`` (one
object a row: ``path`` or ``text``, and ``origin``) and ``X.json`` (the header). A Parquet output holds the columns
``path``, ``text``, ``origin`` and ``vector``, and its header in the metadata.
"""

from __future__ import annotations

import io
import json
import os
import shutil
import time
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from hashlib import blake2b
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

from fastclap.console import Advance
from fastclap.data import BadClip, Manifest, Row, eval_batches, load_manifest
from fastclap.data.shards import is_pack
from fastclap.errors import ConfigError, DataError, ModelError
from fastclap.files import fsync, locked, replacing, write_atomic
from fastclap.models.encoder import DualEncoder

VERSION = 1
AUDIO_SUFFIXES = frozenset((".wav", ".flac", ".ogg", ".oga", ".opus", ".mp3", ".aiff", ".aif", ".aifc"))
_MANIFEST_SUFFIXES = frozenset((".jsonl", ".json", ".csv", ".tsv", ".parquet"))
_TEXTS_AT_ONCE = 1024
_PRECISIONS = ("float32", "bfloat16")  # the default first
_METADATA = b"fastclap"


class Item(NamedTuple):
    """One thing to embed: a clip or a caption."""

    name: str  # path of the clip, or the caption itself
    row: Row | None  # the clip; None for a caption
    origin: str  # where it was named, "FILE:LINE", or the folder it was found in
    key: bytes  # 16 bytes that identify the audio or the caption


class Index(NamedTuple):
    """An embedded collection in memory."""

    vectors: Tensor  # float32 [n, D], unit length
    names: list[dict[str, Any]]  # of each row: "path" or "text", and "origin"
    model: str | None  # fingerprint of the model, if fastclap wrote the table


# ---------------------------------------------------------------------------------------------------------------------
# what to embed


def gather(
    inputs: Sequence[str], *, audio_root: str | None = None, columns: Mapping[str, str] | None = None
) -> list[Item]:
    """Clips and captions named by files, folders and manifests, in the order given; files of a folder sorted.

    Args:
        inputs: each an audio file; a folder, searched through for audio files (hidden ones left out); a manifest or a
            packed or ``datasets`` folder, or hf:NAME, as :func:`fastclap.data.load_manifest` reads it, of which the
            clips are taken; or a .txt file with one caption a line. A clip that is named twice is taken once.
        audio_root, columns: for manifests, as of :func:`fastclap.data.load_manifest`.

    Raises:
        DataError: an input is missing, of an unknown type, or holds nothing to embed.
    """
    items: dict[Any, Item] = {}
    for name in inputs:
        before = len(items)
        suffix = os.path.splitext(name)[1].lower()
        if suffix == ".txt" and os.path.isfile(name):
            for line, text in enumerate(read_lines(name), 1):
                items[name, line] = Item(text, None, f"{name}:{line}", _digest("text", text))
            if len(items) == before:
                raise DataError(f"{name}: the file is empty; it needs one caption a line")
            continue
        if name.startswith("hf:") or suffix in _MANIFEST_SUFFIXES or _is_table_folder(name):
            rows: Iterator[Row] | Manifest = load_manifest(
                name, audio_root=audio_root, columns=columns, require_captions=False
            )
        elif os.path.isdir(name):
            rows = (clip_row(path, name) for path in _audio_files(name))
        elif suffix in AUDIO_SUFFIXES and os.path.isfile(name):
            rows = iter([clip_row(name, name)])
        elif os.path.exists(name):
            known = ", ".join(sorted(AUDIO_SUFFIXES | _MANIFEST_SUFFIXES | {".txt"}))
            raise DataError(f"{name}: cannot tell what this is; give a folder, hf:NAME, or a file of type {known}")
        else:
            raise DataError(f"{name}: no such file or folder (a Hugging Face data set is written hf:NAME)")
        empty = True
        for row in rows:
            empty = False
            key = _clip_key(row)
            items.setdefault(key, Item(row.audio, row._replace(source=0), row.origin, key))
        if empty:
            raise DataError(f"{name}: no audio file in this folder ({', '.join(sorted(AUDIO_SUFFIXES))})")
    if not items:
        raise DataError("nothing to embed: name at least one file, folder or manifest")
    return list(items.values())


def clip_row(path: str, origin: str) -> Row:
    """An audio file as a manifest row without captions."""
    return Row(path, (), (), {}, None, None, None, origin, 0)


def read_lines(path: str | os.PathLike[str]) -> list[str]:
    """Stripped lines of a UTF-8 text file; blank ones are kept, so that line i stays line i.

    Raises:
        DataError: the file is missing or not UTF-8.
    """
    try:
        text = Path(path).read_text(encoding="utf-8-sig")
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: not UTF-8 text ({error}); save it as UTF-8") from error
    return [line.strip() for line in text.removesuffix("\n").split("\n")] if text else []


def _is_table_folder(name: str) -> bool:
    markers = ("state.json", "dataset_dict.json")
    return os.path.isdir(name) and (is_pack(name) or any(os.path.isfile(os.path.join(name, m)) for m in markers))


def _audio_files(folder: str) -> Iterator[str]:
    for parent, folders, files in os.walk(folder):
        folders.sort()
        for file in sorted(files):
            if os.path.splitext(file)[1].lower() in AUDIO_SUFFIXES and not file.startswith("."):
                yield os.path.join(parent, file)


def _clip_key(row: Row) -> bytes:
    if row.packed is not None:
        return _digest("packed", os.path.abspath(row.packed.shard), row.packed.offset, row.packed.checksums.hex())
    path = os.path.abspath(row.audio)
    try:
        status = os.stat(path)
    except OSError:  # it will be skipped, with its reason
        return _digest("audio", path)
    return _digest("audio", path, status.st_size, status.st_mtime_ns)


def _digest(*parts: Any) -> bytes:
    return blake2b(repr(parts).encode(), digest_size=16).digest()


# ---------------------------------------------------------------------------------------------------------------------
# embedding


def embed_clips(
    model: DualEncoder, rows: Sequence[Row], *, batch_size: int = 32, threads: int = 4, bad: list[BadClip]
) -> Iterator[tuple[list[int], Tensor]]:
    """Indices of some of the rows and their unit vectors [k, D], batch by batch, until all readable clips are done.

    Args:
        model: in any mode, which it keeps.
        rows: clips, each with ``source`` 0.
        threads: decoding threads.
        bad: receives the clips that cannot be used.

    Raises:
        ModelError: a vector is not finite.
    """
    if not rows:
        return
    batches = eval_batches(Manifest(rows), model.sampling_rate, batch_size, bad=bad, threads=threads)
    for indices, audio, lengths, _, _ in batches:
        vectors = model.embed_audio(audio, lengths, sampling_rate=model.sampling_rate, batch_size=batch_size)
        check_finite(vectors, [rows[index].audio for index in indices])
        yield indices, vectors


def check_finite(vectors: Tensor, names: Sequence[str]) -> None:
    """Raises ModelError, naming the first of ``names`` whose vector is not finite."""
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
    items: Sequence[Item],
    out: str | os.PathLike[str],
    *,
    batch_size: int = 32,
    threads: int = 4,
    save_seconds: float = 20,
    precision: Literal["float32", "bfloat16"] = "float32",
    advance: Advance = lambda done, total: None,
) -> dict[str, Any]:
    """Embed clips and captions into ``out``, or go on where an interrupted call left off.

    Args:
        items: as of :func:`gather`.
        out: a .parquet or .npy file that does not exist yet, or that an earlier call made of the same items.
        batch_size: clips embedded at a time.
        threads: decoding threads.
        save_seconds: what was computed is on the disk after so many seconds; a kill loses no more.
        precision: of the towers' products. bfloat16 is faster where the processor has instructions for it, and moves
            a unit vector by about 0.01; vectors of both kinds may be compared with one another.
        advance: told the items done and in all, after each batch.

    Returns:
        JSON-able: ``out``, ``clips``, ``texts`` (rows of the output), ``skipped``, ``dimension``, ``reused`` (items
        that an earlier call had done), and ``time`` of this call: ``seconds`` and ``clips_per_second``.

    Raises:
        ConfigError: ``out`` is neither .parquet nor .npy, or ``precision`` is unknown.
        DataError: ``out`` holds something else, or nothing could be embedded.
        ModelError: a vector is not finite.
        OSError: the disk is full; the same call goes on once there is room.
    """
    out = Path(out)
    if out.suffix not in (".parquet", ".npy"):
        raise ConfigError(f"--out {out}: name a .parquet or a .npy file")
    if precision not in _PRECISIONS:
        raise ConfigError(f"precision is {precision!r}; choose one of {', '.join(_PRECISIONS)}")
    header: dict[str, Any] = {
        "version": VERSION,
        "model": fingerprint(model),
        "precision": precision,
        "items": _digest(*[item.key for item in items]).hex(),
    }
    parts = out.with_name(f".{out.name}.parts")
    start = time.perf_counter()
    if out.exists():
        found = {"precision": _PRECISIONS[0], **(_header(out) or {})}
        if any(found.get(key) != value for key, value in header.items()):
            raise DataError(
                f"{out}: exists already and was not made of this model and these inputs in {precision}; remove it or "
                "name another file"
            )
        shutil.rmtree(parts, ignore_errors=True)
        return {**found["summary"], "out": os.fspath(out), "reused": len(items), "time": _times(start, 0)}
    parts.mkdir(parents=True, exist_ok=True)
    with locked(parts, "embedding into"):
        maker = header["model"] + ("" if precision == _PRECISIONS[0] else f" in {precision}")
        store = _Store(parts, maker, save_seconds)
        reused = sum(item.key in store.done for item in items)
        with torch.autocast(model.device.type, torch.bfloat16, enabled=precision == "bfloat16"):
            clips = _embed_missing(model, items, store, batch_size, threads, advance)
        summary = _finish(out, items, store, header)
    shutil.rmtree(parts)
    return {**summary, "out": os.fspath(out), "reused": reused, "time": _times(start, clips)}


def _times(start: float, clips: int) -> dict[str, float]:
    seconds = time.perf_counter() - start
    return {"seconds": round(seconds, 3), "clips_per_second": round(clips / seconds, 2)}


def _embed_missing(
    model: DualEncoder, items: Sequence[Item], store: _Store, batch_size: int, threads: int, advance: Advance
) -> int:
    """Put the vectors of all items that are not in the store into it; returns the clips that were embedded."""
    missing = list({item.key: item for item in items if item.key not in store.done}.values())
    done, total = len(items) - len(missing), len(items)
    advance(done, total)
    texts = [item for item in missing if item.row is None]
    embedded = 0
    try:
        for first in range(0, len(texts), _TEXTS_AT_ONCE):
            group = texts[first : first + _TEXTS_AT_ONCE]
            store.skip((item.key, "blank line") for item in group if not item.name)
            if group := [item for item in group if item.name]:
                vectors = model.embed_text([item.name for item in group])
                check_finite(vectors, [item.name for item in group])
                store.add([item.key for item in group], vectors)
            advance(done := done + min(_TEXTS_AT_ONCE, len(texts) - first), total)
        clips = [item for item in missing if item.row is not None]
        rows = [item.row for item in clips if item.row is not None]
        bad: list[BadClip] = []
        told = 0
        for indices, vectors in embed_clips(model, rows, batch_size=batch_size, threads=threads, bad=bad):
            store.skip((clips[clip.row].key, clip.reason) for clip in bad[told:])
            store.add([clips[index].key for index in indices], vectors)
            embedded += len(indices)
            done += len(indices) + len(bad) - told
            told = len(bad)
            advance(done, total)
        store.skip((clips[clip.row].key, clip.reason) for clip in bad[told:])
    finally:  # an interrupted call leaves all it has computed
        store.save()
    return embedded


class _Store:
    """What was computed so far, in files of the parts folder: each has the keys, the vectors, and what was skipped."""

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
            if json.loads(owner.read_bytes()) != {"version": VERSION, "model": model}:
                raise DataError(
                    f"{folder}: holds what an interrupted call computed with another model or precision; use them "
                    "again, or remove the folder"
                )
        else:
            write_atomic(owner, json.dumps({"version": VERSION, "model": model}).encode())
        for path in sorted(folder.glob("part-*.npz")):
            try:
                keys, _, skipped = _read_part(path, vectors=False)
            except (OSError, ValueError, KeyError, zipfile.BadZipFile):
                path.unlink()  # damaged: its items are embedded again
                continue
            self.files.append(path)
            self.done.update(keys)
            self.skipped.update(skipped)
        self.done.update(self.skipped)

    def add(self, keys: Sequence[bytes], vectors: Tensor) -> None:
        self._keys += keys
        self._vectors.append(vectors.float().cpu().numpy())
        if time.monotonic() - self._saved > self.save_seconds:
            self.save()

    def skip(self, found: Iterator[tuple[bytes, str]]) -> None:
        self._skipped.update(found)

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
            keys, vectors, _ = _read_part(path)
            if keys:
                yield keys, vectors


def _read_part(path: Path, vectors: bool = True) -> tuple[list[bytes], np.ndarray, dict[bytes, str]]:
    with np.load(path, allow_pickle=False) as part:
        keys = [row.tobytes() for row in part["keys"]]
        skipped = {bytes.fromhex(key): reason for key, reason in json.loads(part["skipped"].tobytes()).items()}
        return keys, part["vectors"] if vectors else np.zeros((0, 0), np.float32), skipped


def _finish(out: Path, items: Sequence[Item], store: _Store, header: Mapping[str, Any]) -> dict[str, Any]:
    """Write the output from the store, its name last."""
    listing = out.with_name(f"{out.name}.skipped.jsonl")
    lost = [item for item in items if item.key in store.skipped]
    lines = [{"path" if i.row else "text": i.name, "origin": i.origin, "reason": store.skipped[i.key]} for i in lost]
    if lines:
        write_atomic(listing, _json_lines(lines))
    else:
        listing.unlink(missing_ok=True)
    kept = [item for item in items if item.key not in store.skipped]
    if not kept:
        raise DataError(
            f"none of the {len(items)} inputs can be used; the first: {lost[0].origin}: {lost[0].name} "
            f"{store.skipped[lost[0].key]} (all: {listing})"
        )
    wanted: dict[bytes, list[int]] = {}
    for row, item in enumerate(kept):
        wanted.setdefault(item.key, []).append(row)
    matrix: np.ndarray | None = None
    for keys, vectors in store.vectors():
        if matrix is None:
            matrix = np.empty((len(kept), vectors.shape[1]), np.float32)
        for key, vector in zip(keys, vectors, strict=True):
            matrix[wanted.get(key, [])] = vector
    assert matrix is not None
    names: list[dict[str, Any]] = [
        {"path" if item.row else "text": _as_utf8(item.name), "origin": _as_utf8(item.origin)} for item in kept
    ]
    clips = sum(item.row is not None for item in kept)
    summary = {
        "clips": clips,
        "texts": len(kept) - clips,
        "skipped": len(lost),
        "dimension": matrix.shape[1],
    }
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
    """A file name may hold bytes that are no UTF-8; they become question marks."""
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
    with replacing(out) as aside:
        pyarrow.parquet.write_table(table, aside, use_dictionary=False)


# ---------------------------------------------------------------------------------------------------------------------
# reading


def _header(path: Path) -> dict[str, Any] | None:
    """What fastclap wrote about an output, None if it did not write it."""
    try:
        if path.suffix == ".npy":
            header = json.loads(path.with_name(f"{path.name}.json").read_bytes())
        else:
            import pyarrow.parquet

            header = json.loads((pyarrow.parquet.read_schema(path).metadata or {})[_METADATA])
    except (OSError, ValueError, KeyError):  # pyarrow's errors are OSErrors and ValueErrors
        return None
    return header if isinstance(header, dict) and isinstance(header.get("summary"), dict) else None


def load_index(path: str | os.PathLike[str]) -> Index:
    """Read what :func:`embed` wrote, or another table of vectors.

    Args:
        path: a .parquet file with a column ``vector`` and, for names, ``path`` or ``text``; or a .npy file with a
            matrix, whose names are read from FILE.npy.jsonl, one object a row.

    Raises:
        DataError: the file is missing, damaged, holds no vectors, or its names are not as many.
    """
    path = Path(path)
    if path.is_dir():
        raise DataError(f"{path}: is a folder; embed it first: fastclap embed MODEL {path} --out index.parquet")
    if path.suffix not in (".parquet", ".npy"):
        raise DataError(f"{path}: not a table of vectors; give the .parquet or .npy file that fastclap embed wrote")
    if not path.is_file():
        raise DataError(f"{path}: no such file; make it with: fastclap embed MODEL INPUT... --out {path}")
    matrix, names = (_read_npy if path.suffix == ".npy" else _read_parquet)(path)
    if matrix.ndim != 2 or not matrix.size or not np.issubdtype(matrix.dtype, np.floating):
        raise DataError(f"{path}: holds {matrix.dtype} of shape {matrix.shape} instead of a matrix of vectors")
    if len(names) != len(matrix):
        raise DataError(f"{path}: {len(names)} names for {len(matrix)} vectors; embed again")
    vectors = torch.from_numpy(np.array(matrix, np.float32, copy=True))
    if not vectors.isfinite().all():
        bad = int((~vectors.isfinite().all(1)).nonzero()[0])
        raise DataError(f"{path}: the vector of row {bad} is not finite; embed again")
    header = _header(path)
    return Index(torch.nn.functional.normalize(vectors, dim=1), names, header["model"] if header else None)


def _read_npy(path: Path) -> tuple[np.ndarray, list[dict[str, Any]]]:
    listing = path.with_name(f"{path.name}.jsonl")
    try:
        matrix = np.load(path, allow_pickle=False)
        names = [json.loads(line) for line in listing.read_text(encoding="utf-8").splitlines()]
    except FileNotFoundError as error:
        raise DataError(f"{listing}: missing; it names the rows of {path.name}, copy it along") from error
    except (OSError, ValueError, EOFError) as error:
        raise DataError(f"{path}: truncated or damaged ({error}); embed again") from error
    return matrix, names


def _read_parquet(path: Path) -> tuple[np.ndarray, list[dict[str, Any]]]:
    import pyarrow
    import pyarrow.parquet

    try:
        table = pyarrow.parquet.read_table(path)
    except (pyarrow.ArrowException, OSError) as error:
        raise DataError(f"{path}: truncated or damaged ({error}); embed again") from error
    if "vector" not in table.column_names:
        raise DataError(f"{path}: no column 'vector'; the columns are {', '.join(table.column_names)}")
    column = table.column("vector").combine_chunks()
    if not pyarrow.types.is_fixed_size_list(column.type) and not pyarrow.types.is_list(column.type):
        raise DataError(f"{path}: the column 'vector' holds {column.type} instead of lists of numbers")
    values = column.flatten().to_numpy(zero_copy_only=False)
    if not len(table) or len(values) % len(table) or column.null_count:
        raise DataError(f"{path}: the vectors are of different lengths or missing; embed again")
    kept = [name for name in ("path", "text", "origin") if name in table.column_names]
    records = table.select(kept).to_pylist() if kept else [{"path": f"row {i}"} for i in range(len(table))]
    names = [{key: value for key, value in record.items() if value is not None} for record in records]
    return values.reshape(len(table), -1), names
