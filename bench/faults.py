"""Bad input by the thousand, to every command: each is done rightly or refused in words, within its time.

    python -m bench.faults --count 5000 --out /tmp/faults
    python -m bench.faults --only 0:1234            # one of them again, with all that it prints

An input is a valid command line of which something has been made worse: a flag, a manifest, a recording, a model, an
index, a checkpoint, a configuration, or what surrounds the process (streams, a full disk, the environment). It follows
from a seed and a number alone. Each runs in a fork of this process, which has imported everything, so that one takes a
fraction of a second. It is a fault if there is a traceback, another exit status than those that are documented, an
answer past its deadline, an end by a signal, more than 2 GB of memory, no word of why, JSON that is none, or a figure
that cannot be (a cosine beyond 1, NaN).
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import dataclasses
import importlib
import io
import json
import math
import os
import random
import re
import resource
import shutil
import signal
import stat
import sys
import tempfile
import time
import traceback
import typing
import wave
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

DEADLINE, TRAINING_DEADLINE = 20.0, 60.0  # seconds
_MEMORY = 2 << 30  # bytes that an input may take beyond what this process has
_RATE = 16_000
ROOT = Path(__file__).resolve().parents[1]

# ---------------------------------------------------------------------------------------------------------------------
# valid inputs


@dataclass(frozen=True)
class Line:
    """A valid command line; `{x}` in a word is the file x of the scene, or a copy of it that has been made worse."""

    words: Sequence[str]
    deadline: float = DEADLINE

    @property
    def files(self) -> list[str]:
        return sorted({name for word in self.words for name in re.findall(r"\{(\w+)\}", word)} - {"out"})


_TRAIN = [
    *("fastclap-train", "small", "--config", "{config}", "--data.train", "{manifest}", "--data.audio-root", "{audio}"),
    *("--steps", "2", "--run-dir", "{out}"),
]
LINES = [
    Line(["eval", "--model", "{model}", "--data", "{manifest}", "--audio-root", "{audio}", "--json"]),
    Line(["eval", "--model", "{run}", "--data", "{table}", "--audio-root", "{audio}", "--out", "{out}"]),
    Line(
        ["classify", "--model", "{model}", "--data", "{manifest}", "--audio-root", "{audio}", "--prompts", "{prompts}"]
    ),
    Line(["classify", "--model", "{model}", "--data", "{manifest}", "--audio-root", "{audio}", "--json"]),
    Line(["report", "{run}", "--out", "{out}"]),
    Line(["pack", "{manifest}", "--audio-root", "{audio}", "--out", "{out}", "--workers", "0", "--json"]),
    Line(["embed", "{model}", "{manifest}", "--audio-root", "{audio}", "--out", "{out}.npy", "--json"]),
    Line(["embed", "{model}", "{audio}", "--out", "{out}.parquet"]),
    Line(["embed", "{model}", "{packed}", "--out", "{out}.npy", "--json"]),
    Line(["embed", "{model}", "{texts}", "--out", "{out}.parquet", "--json"]),
    Line(["search", "{model}", "{npy}", "an angry voice", "--json"]),
    Line(["search", "{model}", "{parquet}", "--audio", "{clip}", "-k", "3"]),
    Line(["rerank", "{model}", "--data", "{candidates}", "--audio-root", "{audio}", "--json"]),
    Line(["similarity", "{model}", "{pairs}", "--audio-root", "{audio}", "--json"]),
    Line(["prepare", "ravdess", "--root", "{ravdess}", "--out", "{out}.jsonl", "--json"]),
    Line(["caption", "{manifest}", "--audio-root", "{audio}", "--out", "{out}.jsonl", "--workers", "0", "--json"]),
    Line(["convert", "{foreign}", "{out}", "--json"]),
    Line(["convert", "{checkpoint}", "{out}"]),
    Line(["doctor", "--json"]),
    Line(_TRAIN, TRAINING_DEADLINE),
    Line([*_TRAIN, "--data.valid", "{manifest}", "--valid.prompts", "{prompts}"], TRAINING_DEADLINE),
    Line([*_TRAIN[:-4], "--steps", "4", "--run-dir", "{run}", "--resume"], TRAINING_DEADLINE),
    Line(["fastclap-train", "average", "{run}", "--last", "1", "--out", "{out}"]),
]

_CONFIG = """\
steps: 2
batch_size: 4
log_every: 1
device: cpu
threads: 1
chunk_size: 0
data: {workers: 0, crop_seconds: 0.5, frozen_cache: 'off'}
model:
  audio: {width: 16, layers: 1, heads: 2, feature_options: {n_mels: 16}}
  text: {width: 16, layers: 1, heads: 2, vocab_size: 300, max_tokens: 16}
  head: {kind: linear, dim: 16}
optimizer: {warmup_steps: 1}
"""


def make_scene(folder: Path) -> None:
    """The files of the valid command lines, each under its name in `Line.words`."""
    import numpy as np

    (folder / "audio").mkdir(parents=True)
    (folder / "ravdess" / "Actor_01").mkdir(parents=True)
    rows = []
    for number in range(8):
        time_ = np.arange(_RATE * 3 // 10 + 400 * number) / _RATE
        sound = 9000 * np.sin(2 * np.pi * (110 + 40 * number) * time_) + 500 * np.cos(7000 * time_)
        write_wave(folder / "audio" / f"{number}.wav", sound.astype(np.int16).tobytes())
        rows.append(
            {
                "audio": f"{number}.wav",
                "text_description": f"a {'calm' if number % 2 else 'angry'} voice, number {number}",
                "fine_description": [f"it speaks {'low' if number < 4 else 'high'}", "and slowly"],
                "classification_tag": "calm" if number % 2 else "angry",
                "intrinsic_tags": ["low"] if number < 4 else ["high", "clear"],
                "duration": len(sound) / _RATE,
            }
        )
        emotion = 3 if number % 2 else 5
        shutil.copy(
            folder / "audio" / f"{number}.wav",
            folder / "ravdess" / "Actor_01" / f"03-01-0{emotion}-01-0{number % 2 + 1}-0{number // 4 + 1}-01.wav",
        )
    shutil.copy(folder / "audio" / "0.wav", folder / "clip")

    def lines(name: str, records: Sequence[Any]) -> None:
        (folder / name).write_text("".join(json.dumps(record) + "\n" for record in records))

    lines("manifest.jsonl", rows)
    lines("candidates.jsonl", [{"id": n // 4, "text": f"voice {n // 4}", "audio": f"{n}.wav"} for n in range(8)])
    (folder / "table.csv").write_text(
        "audio,text_description,classification_tag\n" + "".join(f"{n}.wav,a voice {n},c{n % 2}\n" for n in range(8))
    )
    (folder / "pairs.csv").write_text(
        "audio,other_audio,rating\n" + "".join(f"{n}.wav,{n + 1}.wav,{n}\n" for n in range(6))
    )
    (folder / "texts.txt").write_text("an angry voice\na calm voice\nein leiser Ton\n")
    (folder / "prompts.json").write_text(json.dumps({"calm": ["a calm voice"], "angry": ["anger", "a furious voice"]}))
    (folder / "config.yaml").write_text(_CONFIG)
    for words in (
        [*_TRAIN[:-1], "{run}", "--data.valid", "{manifest}"],
        ["pack", "{manifest}", "--audio-root", "{audio}", "--out", "{packed}", "--workers", "0"],
    ):
        places = {"run": folder / "run", "packed": folder / "packed"}
        call([word.format(**places_of(folder, **places)) for word in words])
    shutil.copytree(folder / "run" / "model", folder / "model")
    for words in (
        ["embed", "{model}", "{audio}", "--out", f"{folder}/{end}"] for end in ("npy.npy", "parquet.parquet")
    ):
        call([word.format(**places_of(folder)) for word in words])
    make_foreign_models(folder)


def make_foreign_models(folder: Path) -> None:
    """A folder of transformers' CLAP, which can be converted, and a checkpoint that no code has written."""
    import torch
    from transformers import ClapConfig, ClapModel, PreTrainedTokenizerFast

    size = {"hidden_size": 16, "num_attention_heads": 2}
    audio = {**size, "patch_embeds_hidden_size": 8, "depths": [1, 1], "num_attention_heads": [1, 2]}
    text = {**size, "num_hidden_layers": 1, "intermediate_size": 16, "vocab_size": 300, "max_position_embeddings": 20}
    ClapModel(ClapConfig(audio_config=audio, text_config=text, projection_dim=8)).save_pretrained(folder / "foreign")
    tokenizer = PreTrainedTokenizerFast(tokenizer_file=str(folder / "model" / "tokenizer.json"), pad_token="<pad>")
    tokenizer.save_pretrained(folder / "foreign")
    torch.save({"state_dict": {"audio.x": torch.zeros(3)}}, folder / "checkpoint.pt")


def write_wave(path: Path, samples: bytes) -> None:
    with wave.open(str(path), "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(_RATE)
        file.writeframes(samples)


def places_of(folder: Path, **more: Path) -> dict[str, str]:
    """The path of each file of a scene by its name."""
    found = {
        path.name.partition(".")[0]: str(path)
        for path in folder.iterdir()
        if path.name.find(".", 1) == path.name.rfind(".")
    }
    return found | {name: str(path) for name, path in more.items()}


def call(words: Sequence[str]) -> int:
    """Run a command line in this process and return its exit status."""
    from fastclap.commands.main import main
    from fastclap.train import cli

    try:
        if words and words[0] == "fastclap-train":
            cli.main(list(words[1:]))
            return 0
        return main(list(words))
    except SystemExit as stop:
        return stop.code if isinstance(stop.code, int) else 0 if stop.code is None else 1


# ---------------------------------------------------------------------------------------------------------------------
# what makes them worse

WORDS = [
    *("-1", "0", "1", "2", "-0.0", "3.7", "1e9", "1e400", "nan", "inf", "-inf", "999999999999999999999", "0x10", "1_0"),
    *("", " ", "\u202e", "開心", "x" * 5000, "[/x]", "[bold]", "$x_$", "true", "None", "../..", "/dev/null", "-", "--"),
    *("{}", "[]", '{"a": 1}', "\udcff", "a\nb", "\x1b[31m", "/proc/self/mem", ".", "/", "hf:", "hf:x:y", "cuda", "cpu"),
    *("{0}", "{a}", "%s", "nowhere.jsonl", "nowhere.npy", "a,b", "a\u2028b", "1 2", "auto", "😀"),
]
VALUES: list[Any] = [
    *(None, True, False, 0, -1, 1, 2**31, 2**63, -(10**30), 1e308, 1e-300, float("nan"), float("inf"), "", " ", "x"),
    *(
        "開心",
        "[/x]",
        "$x_$",
        "\u2028",
        "\x00",
        "a\x85b",
        "x" * 20_000,
        "\udcff",
        "../../etc/passwd",
        "/dev/zero",
        "{}",
    ),
    *([], {}, [[]], [None], ["x"] * 1000, {"a": {"b": 1}}, [1, "a"], -0.5, 1.5, 3, 10**9, "1", "nan", "true"),
]
BYTES = [b"", b"\x00", b"\xff\xfe", b"\xef\xbb\xbf", b"\x89PNG\r\n\x1a\n" + b"x" * 200, b"[" * 100_000, b"1" * 6000]
BYTES += [b'"\\ud800"', b"\r\n", b"{", b"\xc3\x28", b"\xe2\x80\xa8", b"&a [*a]", b"\n" * 50, b"PAR1", b"RIFF"]


def worse_words(words: list[str], chance: random.Random) -> list[str]:
    """A command line with a flag too many, too few, or of another value."""
    words = list(words)
    # what is written goes to the folder of the input, and not just anywhere
    outward = {place + 1 for place, word in enumerate(words) if word in ("--out", "--run-dir")}
    free = [place for place in range(1, len(words)) if place not in outward]
    kind = chance.choice(["value", "value", "drop", "twice", "unknown", "known", "known", "known", "known"])
    if kind == "known" or not free:
        name, choices = chance.choice(flags_of(words))
        return [*words, name, chance.choice(choices)] if chance.random() < 0.8 else [*words, name]
    place = chance.choice(free)
    if kind == "value":
        words[place] = chance.choice(WORDS)
    elif kind == "drop":
        del words[place]
    elif kind == "twice":
        words.insert(place, words[place])
    else:
        words.append(chance.choice(["--nonsense", "--help=3", "-z", "--batch_size", "---", chance.choice(WORDS)]))
    return words


def flags_of(words: Sequence[str]) -> list[tuple[str, list[str]]]:
    """Every flag of a command, but for those that say where to write, each with values that it may be given."""
    from fastclap.train.config import TrainConfig

    is_training = words[0] == "fastclap-train"
    cls = TrainConfig if is_training else importlib.import_module(f"fastclap.commands.{words[0]}").Flags

    def walk(cls: type, path: str) -> Iterator[tuple[str, list[str]]]:
        for name, hint in typing.get_type_hints(cls).items():
            if dataclasses.is_dataclass(hint):
                yield from walk(typing.cast(type, hint), f"{path}{name}.")
            elif name not in (
                "out",
                "run_dir",
                "frozen_cache",
                "folder",
                "steps",
                "epochs",
                "batch_size",
                "demo_clips",
            ):
                arguments = [each for each in typing.get_args(hint) if isinstance(each, str)]
                yield f"--{path}{name}".replace("_", "-"), [*WORDS, *arguments * (len(WORDS) // 6)]

    return [*walk(cls, ""), ("--batch-size", ["0", "-1", "1", "3", "1000000", "nan"]), ("--nothing", WORDS)]


def worse_file(path: Path, chance: random.Random, others: Sequence[Path]) -> None:
    """A file, or one within a folder, with damage of some kind."""
    if path.is_dir():
        inside = sorted(p for p in path.rglob("*") if p.is_file())
        if not inside or chance.random() < 0.05:
            shutil.rmtree(path)
            if chance.random() < 0.5:
                path.write_bytes(b"x")
            return
        path = chance.choice(inside)
    kind = chance.choice(["value"] * 5 + ["bytes"] * 3 + ["kind", "cut", "other", "name", "line", "wave"])
    data = path.read_bytes()
    if kind == "value" and worse_value(path, data, chance):
        return
    if kind == "wave" and data[:4] == b"RIFF":
        path.write_bytes(worse_wave(data, chance))
    elif kind == "cut":
        path.write_bytes(data[: chance.randint(0, len(data))])
    elif kind == "other":
        path.write_bytes(chance.choice(others).read_bytes())
    elif kind == "name":
        path.rename(
            path.with_name(chance.choice(["[x].wav", "$a_$", "a\nb", "開心.jsonl", "x" * 200, "\udcff", ".npy"]))
        )
    elif kind == "line":
        lines = data.splitlines(keepends=True)
        place = chance.randint(0, len(lines))
        path.write_bytes(b"".join([*lines[:place], chance.choice([*BYTES, *lines, b""]), *lines[place + 1 :]]))
    elif kind == "kind":
        path.unlink()
        make = chance.choice(["fifo", "folder", "none", "loop", "null", "socket"])
        if make == "fifo":
            os.mkfifo(path)
        elif make == "folder":
            path.mkdir()
        elif make in ("loop", "null"):
            path.symlink_to(path if make == "loop" else "/dev/null")
        elif make == "socket":
            os.mknod(path, stat.S_IFSOCK | 0o600)
    else:
        worse = bytearray(data)
        for _ in range(chance.choice([1, 1, 2, 8, 64])):
            place = chance.randint(0, len(worse)) if chance.random() < 0.5 else chance.randint(0, min(200, len(worse)))
            if worse and place < len(worse) and chance.random() < 0.7:
                worse[place] ^= 1 << chance.randint(0, 7)
            else:
                worse[place:place] = chance.choice(BYTES)
        path.write_bytes(bytes(worse))


def worse_value(path: Path, data: bytes, chance: random.Random) -> bool:
    """A value within JSON, JSON lines or YAML that is exchanged, left out or added; whether the file is such."""
    import yaml

    text = data.decode("utf-8", "replace")
    is_lines = path.suffix == ".jsonl"
    try:
        records = [json.loads(line) for line in text.splitlines()] if is_lines else None
        whole = records if is_lines else yaml.safe_load(text) if path.suffix == ".yaml" else json.loads(text)
    except ValueError:
        return False
    if not isinstance(whole, (dict, list)) or not whole:
        return False
    for _ in range(chance.choice([1, 1, 2])):
        spots = list(_spots(whole))
        inside, key = chance.choice(spots) if spots else (whole, 0)
        action = chance.random()
        if not inside:
            continue
        if action < 0.7:
            inside[key] = chance.choice(VALUES)
        elif action < 0.85:
            del inside[key]
        elif isinstance(inside, dict):
            inside[str(chance.choice(VALUES))[:50]] = inside[key]
        else:
            inside.append(inside[key])
    with contextlib.suppress(ValueError):
        text = "\n".join(map(json.dumps, whole)) if is_lines and isinstance(whole, list) else json.dumps(whole)
        path.write_text(text, encoding="utf-8", errors="surrogateescape")
        return True
    return False


def _spots(value: Any) -> Iterator[tuple[Any, Any]]:
    entries = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in list(entries):
        yield value, key
        yield from _spots(inner)


def worse_wave(data: bytes, chance: random.Random) -> bytes:
    """A WAV file whose header lies, or whose samples are odd."""
    header, samples = bytearray(data[:44]), data[44:]
    kind = chance.choice(["rate", "channels", "bits", "format", "size", "silence", "one", "loud", "align"])
    big = chance.choice([0, 1, 3, 7, 64, 65535, 10_000_000, 0x7FFFFFFF, 0xFFFFFFFF])
    places = {
        "rate": (24, 4),
        "channels": (22, 2),
        "bits": (34, 2),
        "format": (20, 2),
        "size": (40, 4),
        "align": (32, 2),
    }
    if kind in places:
        place, size = places[kind]
        header[place : place + size] = (big & (256**size - 1)).to_bytes(size, "little")
    samples = {"silence": bytes(len(samples)), "one": samples[:2], "loud": b"\xff\x7f\x00\x80" * 2000}.get(
        kind, samples
    )
    return bytes(header) + samples


@dataclass
class Surroundings:
    """What an input finds around it, but for its files."""

    stdout: str = "file"  # file, closed, full, gone (a pipe without a reader), ascii
    stderr: str = "file"  # file, closed, full
    disk: int | None = None  # bytes that a file may have
    environment: dict[str, str | None] = dataclasses.field(default_factory=dict)


def surroundings(chance: random.Random) -> Surroundings:
    return chance.choice(
        [
            *(Surroundings(stdout=kind) for kind in ("closed", "full", "gone", "gone", "ascii")),
            *(Surroundings(stderr=kind) for kind in ("closed", "full")),
            *(Surroundings(disk=size) for size in (4096, 8192, 50_000)),
            Surroundings(environment={"HOME": None}),
            Surroundings(environment={"HOME": "/dev/null", "FASTCLAP_CACHE": "/dev/null/x"}),
            Surroundings(environment={"FASTCLAP_CACHE": "\udcff/x"}),
            Surroundings(environment={"TMPDIR": "/nowhere", "COLUMNS": "1"}),
            Surroundings(environment={"COLUMNS": "-3", "TERM": "nonsense"}),
        ]
    )


# ---------------------------------------------------------------------------------------------------------------------
# one input


@dataclass
class Input:
    """A command line, what surrounds it, and how long it may take."""

    words: list[str]
    around: Surroundings
    deadline: float
    what: str  # has been made worse


def make_input(seed: int, number: int, scene: Path, folder: Path) -> Input:
    """An input with the files of its own in `folder`, which is empty."""
    chance = random.Random(f"{seed}/{number}")
    line = chance.choice(LINES)
    what = chance.choice(["words", "words", "file", "file", "file", "file", "around", "out", "nothing"])
    if what == "nothing" and chance.random() < 0.7:
        what = "file"
    return worsened(line, what, chance, scene, folder)


def worsened(line: Line, what: str, chance: random.Random, scene: Path, folder: Path) -> Input:
    """A valid command line with its `what` made worse."""
    originals, places = places_of(scene), {"out": str(folder / "out")}
    for name in line.files:
        # the run is trained on, and what is made worse must be a copy
        places[name] = originals[name]
        if what == "file" or name == "run":
            source = Path(originals[name])
            copy = folder / source.name
            shutil.copytree(source, copy) if source.is_dir() else shutil.copy(source, copy)
            places[name] = str(copy)
    if what == "file" and line.files:
        others = sorted(p for p in scene.rglob("*") if p.is_file() and p.stat().st_size < 1 << 20)
        worse_file(Path(places[chance.choice(line.files)]), chance, others)
    words = [word.format(**places) for word in line.words]
    around = Surroundings()
    if what == "words":
        for _ in range(chance.choice([1, 1, 2])):
            words = worse_words(words, chance)
    elif what == "around":
        around = surroundings(chance)
    elif what == "out":
        make = chance.choice(["file", "folder", "under a file", "fifo", "odd"])
        if make == "odd":
            words = [word.replace(places["out"], f"{folder}/[x] $a_$ 開心\udcff") for word in words]
        if make == "under a file":
            (folder / "out").write_bytes(b"x")
            words = [word.replace(places["out"], f"{places['out']}/deep/x") for word in words]
        for end in ("", ".npy", ".parquet", ".jsonl") if make in ("file", "folder", "fifo") else ():
            place = Path(places["out"] + end)
            if make == "folder":
                (place / "inside").mkdir(parents=True)
            else:
                os.mkfifo(place) if make == "fifo" else place.write_bytes(b"x")
    return Input(words, around, line.deadline, what)


@dataclass
class Outcome:
    """How an input ended."""

    status: int | None  # None: past its deadline
    signal: int | None
    seconds: float
    memory: int  # bytes beyond the parent's
    out: str
    err: str
    fault: str  # "": none


def run_input(made: Input, folder: Path) -> Outcome:
    """Run an input in a fork, and judge it."""
    begin, files = time.monotonic(), {name: folder / f".{name}" for name in ("stdout", "stderr")}
    sys.stdout.flush()
    child = os.fork()
    if not child:
        _in_child(made, folder, files)
    status: int | None = None
    while time.monotonic() - begin < made.deadline:
        pid, status, usage = os.wait4(child, os.WNOHANG)
        if pid:
            break
        time.sleep(0.005)
    else:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(child, signal.SIGKILL)
            os.kill(child, signal.SIGKILL)
        _, _, usage = os.wait4(child, 0)
        status = None
    with contextlib.suppress(ProcessLookupError):  # what it has left behind
        os.killpg(child, signal.SIGKILL)
    out, err = (
        path.read_bytes().decode("utf-8", "surrogateescape") if path.exists() else "" for path in files.values()
    )
    memory = 1024 * (usage.ru_maxrss - resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
    outcome = Outcome(None, None, time.monotonic() - begin, memory, out, err, "")
    if status is not None:
        outcome.status = os.waitstatus_to_exitcode(status)
        if outcome.status < 0:
            outcome.signal, outcome.status = -outcome.status, None
    outcome.fault = judge(made, outcome)
    return outcome


def _in_child(made: Input, folder: Path, files: dict[str, Path]) -> typing.NoReturn:
    code = 70
    try:
        os.setpgid(0, 0)
        for number, name in enumerate(("stdout", "stderr"), 1):
            kind = getattr(made.around, name)
            if kind == "gone":
                read, write = os.pipe()
                os.close(read)
            else:
                place = "/dev/full" if kind == "full" else files[name]
                write = os.open(place, os.O_WRONLY | os.O_CREAT | (0 if kind == "full" else os.O_TRUNC), 0o600)
            os.dup2(write, number)
            os.close(write)
            stream: Any = io.TextIOWrapper(
                io.FileIO(number, "w", closefd=False),
                encoding="ascii" if kind == "ascii" else "utf-8",
                errors="backslashreplace" if name == "stderr" else "strict",
                write_through=True,
            )
            setattr(sys, name, None if kind == "closed" else stream)
            if kind == "closed":
                os.close(number)
        for key, value in made.around.environment.items():
            os.environ.pop(key, None) if value is None else os.environ.__setitem__(key, value)
        if made.around.disk is not None:
            signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
            resource.setrlimit(resource.RLIMIT_FSIZE, (made.around.disk, resource.RLIM_INFINITY))
        os.chdir(folder)
        null = os.open(os.devnull, os.O_RDONLY)
        os.dup2(null, 0)
        code = call(made.words)
    except BaseException:
        code = 1
        with contextlib.suppress(Exception):
            (folder / ".traceback").write_text(traceback.format_exc())
        with contextlib.suppress(Exception):
            traceback.print_exc()
    finally:
        os._exit(code & 255)


_EXPECTED = {0, 2, 3}


def judge(made: Input, outcome: Outcome) -> str:
    """What is wrong with an outcome; "": nothing."""
    around = made.around
    if outcome.signal is not None:
        return f"ended by {signal.Signals(outcome.signal).name}"
    if outcome.status is None:
        return f"no end within {made.deadline:g} s"
    if "Traceback" in outcome.err or "Exception ignored" in outcome.err:
        return innermost(outcome.err)
    allowed = _EXPECTED | ({1} if made.words[:1] == ["doctor"] else set())
    allowed |= {141} if around.stdout == "gone" else set()
    if outcome.status not in allowed:
        return f"exit status {outcome.status}"
    if outcome.memory > _MEMORY:
        return f"took {outcome.memory / 1e9:.1f} GB"
    if outcome.status and around.stderr == "file" and not outcome.err.strip() and outcome.status != 141:
        return f"exit status {outcome.status} without a word"
    if made.what == "nothing" and outcome.status and not any(word.endswith("checkpoint.pt") for word in made.words):
        return f"a valid command line was refused: {outcome.err.strip()[:200]}"
    if outcome.status == 0 and around.stdout == "file" and "--json" in made.words and "--help" not in made.words:
        return wrong_result(outcome.out, made.words[0])
    return ""


def wrong_result(text: str, command: str) -> str:
    """What is wrong with a result of `--json`."""

    def refuse(word: str) -> float:
        raise ValueError(f"{word} in JSON")

    try:
        value = json.loads(text.encode("utf-8"), parse_constant=refuse)
    except ValueError as error:
        return f"{command}: stdout is no JSON ({error})"[:120]
    for inside, key in _spots(value):
        number = inside[key]
        if isinstance(number, float) and not math.isfinite(number):
            return f"{command}: {key} is {number}"
        if key in ("cosine", "score", "similarity") and isinstance(number, float) and abs(number) > 1.001:
            return f"{command}: {key} is {number}"
    return ""


def innermost(text: str) -> str:
    """The last line of a traceback, and the innermost place in it that is ours."""
    ours = [
        f"{os.path.relpath(path, ROOT)}:{line} in {function}"
        for path, line, function in re.findall(r'File "([^"]*)", line (\d+), in (\S+)', text)
        if path.startswith((f"{ROOT}/fastclap", f"{ROOT}/train", f"{ROOT}/kernels"))
    ]
    last = [line for line in text.strip().splitlines() if line and not line.startswith(" ")][-1]
    return f"{ours[-1] if ours else 'elsewhere'}: {re.sub(r'/[^ :]*/', '…/', last)[:160]}"


# ---------------------------------------------------------------------------------------------------------------------
# all of them


def scene_in(folder: Path) -> Path:
    """A scene, made in a fork that keeps this process as it is."""
    scene = folder / "scene"
    child = os.fork()
    if not child:
        code = 1
        try:
            null = os.open(os.devnull, os.O_WRONLY)
            os.dup2(null, 1)
            make_scene(scene)
            code = 0
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(code)
    _, status = os.waitpid(child, 0)
    if status:
        raise RuntimeError("the scene could not be made")
    return scene


def warm_up() -> None:
    """Import what commands import, so that forks need not."""
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    import torch

    torch.set_num_threads(1)
    from fastclap.commands.main import COMMANDS

    for name in COMMANDS:
        importlib.import_module(f"fastclap.commands.{name}")
    for name in ("train.loop", "train.cli", "apps.embed", "apps.search", "apps.rerank", "evaluation", "data.pack"):
        importlib.import_module(f"fastclap.{name}")
    for name in ("matplotlib.pyplot", "pyarrow.parquet", "sklearn.metrics", "soundfile", "soxr", "transformers"):
        importlib.import_module(name)


def run_all(
    numbers: Sequence[int], seed: int, scene: Path, folder: Path, each: Callable[[int, Input, Outcome], None]
) -> None:
    """Run inputs one after another."""
    for number in numbers:
        own = folder / f"{seed}-{number}"
        own.mkdir(parents=True)
        made = make_input(seed, number, scene, own)
        each(number, made, run_input(made, own))
        shutil.rmtree(own, ignore_errors=True)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--count", type=int, default=5000)
    parser.add_argument("--first", type=int, default=0, help="number of the first input")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", help="SEED:NUMBER of one input to run again, with all that it prints")
    parser.add_argument("--out", help="folder for faults.jsonl; default: a temporary one")
    options = parser.parse_args(arguments)
    warm_up()
    with tempfile.TemporaryDirectory(dir="/dev/shm" if os.path.isdir("/dev/shm") else None) as temporary:
        folder = Path(temporary)
        scene = scene_in(folder)
        if options.only:
            seed, number = map(int, options.only.split(":"))

            def show(number: int, made: Input, outcome: Outcome) -> None:
                print(ascii(made.words), made.around, made.what)
                print(outcome.out.encode("utf-8", "backslashreplace").decode())
                print(outcome.err.encode("utf-8", "backslashreplace").decode())
                print(f"status {outcome.status}, {outcome.seconds:.2f} s, {outcome.memory >> 20} MiB: {outcome.fault}")

            run_all([number], seed, scene, folder, show)
            return 0
        return _tally(options, scene, folder)


def _tally(options: argparse.Namespace, scene: Path, folder: Path) -> int:
    out = Path(options.out or folder)
    out.mkdir(parents=True, exist_ok=True)
    faults: dict[str, list[int]] = collections.defaultdict(list)
    statuses: collections.Counter[tuple[str, str]] = collections.Counter()
    slowest = 0.0
    with open(out / "faults.jsonl", "w") as file:

        def note(number: int, made: Input, outcome: Outcome) -> None:
            nonlocal slowest
            slowest = max(slowest, outcome.seconds)
            kind = "fault" if outcome.fault else "done" if outcome.status == 0 else "refused"
            statuses[made.words[0] if made.words else "", kind] += 1
            if outcome.fault:
                faults[outcome.fault].append(number)
                record = {"number": number, "fault": outcome.fault, "words": made.words, "what": made.what}
                record |= {"around": dataclasses.asdict(made.around), "stderr": outcome.err[-3000:]}
                file.write(json.dumps(record) + "\n")
                file.flush()
            if sum(statuses.values()) % 250 == 0:
                print(f"{sum(statuses.values())} inputs, {sum(map(len, faults.values()))} faults", flush=True)

        run_all(range(options.first, options.first + options.count), options.seed, scene, folder, note)
    print(f"\n{'command':<16}{'done':>8}{'refused':>9}{'fault':>7}")
    for command in sorted({name for name, _ in statuses}):
        print(f"{command[:15]!a:<16}" + "".join(f"{statuses[command, k]:>8}" for k in ("done", "refused", "fault")))
    for fault, numbers in sorted(faults.items(), key=lambda item: -len(item[1])):
        print(f"{len(numbers):>5}  {fault}   --only {options.seed}:{numbers[0]}")
    total = sum(statuses.values())
    print(f"{total} inputs, {sum(map(len, faults.values()))} faults of {len(faults)} kinds, slowest {slowest:.1f} s")
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
