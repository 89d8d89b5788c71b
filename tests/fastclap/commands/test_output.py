"""What is shown and how a command ends: any name, any terminal, any end of the streams."""

from __future__ import annotations

import errno
import io
import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from fastclap import console, files
from fastclap.commands.main import COMMANDS, main
from fastclap.console import Table, json_text, note, progress, run_command, shortened, show, show_json, writing
from fastclap.errors import ConfigError, DataError, TrainingError

ODD_NAMES = (
    "[laughing]",
    "[/laugh]",
    "[bold red]",
    ":smile:",
    "$100_$",
    "開心",
    "غاضب",
    "😀",
    "{body}",
    "a\nb",
    "\x1b[31mred",
    "\udcff",
    "\u202eright to left",
    r"\frac{",
    "x" * 3000,
)

# ---- text ----


@pytest.mark.parametrize(
    ("text", "expected"),
    [("short", "short"), ("x" * 11, "x" * 9 + "…"), ("開" * 6, "開" * 4 + "…"), ("", "")],
)
def test_long_names_end_in_an_ellipsis(text: str, expected: str) -> None:
    assert shortened(text, 10) == expected


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ({"a": "開心\n"}, {"a": "開心\n"}),
        ({"p\udcff": ["\udcff.wav", 1.5, True, None]}, {r"p\udcff": [r"\udcff.wav", 1.5, True, None]}),
        ([float("nan"), -float("inf"), 10**30], [None, None, 10**30]),
        ({"path": Path("x"), 3: (1, 2)}, {"path": "x", "3": [1, 2]}),
        ({"path": Path("x"), "nan": float("nan")}, {"path": "x", "nan": None}),
    ],
)
def test_json_is_such_that_every_reader_takes_it(value: Any, expected: Any) -> None:
    def refuse(word: str) -> None:
        raise AssertionError(word)

    assert json.loads(json_text(value).encode(), parse_constant=refuse) == expected


def test_json_that_is_nested_too_deeply_is_a_message() -> None:
    value: list[Any] = []
    for _ in range(200_000):
        value = [value]
    with pytest.raises(DataError, match="nested too deeply"):
        json_text(value)
    while value:  # else its end is a recursion too
        value = value[0]


def test_a_table_takes_nothing_for_markup(capfd: Any) -> None:
    show(Table("[b]title :smile:", {"[i]name": "left", "n": "right"}, [(name, 1) for name in ODD_NAMES]))
    show(Table("whole", {"path": "whole"}, [("Q" * 3000,)]))
    out = capfd.readouterr().out
    for name in ODD_NAMES[:-1]:
        assert console.printable(name) in out
    assert "[b]title :smile:" in out and "[i]name" in out and "x…" in out and out.count("x") < 200
    assert out.count("Q") == 3000 and "\x1b" not in out and "\u202e" not in out


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "cp1252", "utf-8"])
def test_a_terminal_of_any_encoding(encoding: str, monkeypatch: pytest.MonkeyPatch) -> None:
    raw = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(raw, encoding=encoding))

    def tell() -> None:
        show("開心 \udcff", Table("title", {"name": "left"}, [(name,) for name in ODD_NAMES]))
        show_json({"name": "開心 😀"}, lines=True)

    assert run_command(tell) == 0
    lines = raw.getvalue().decode(encoding).splitlines()
    assert json.loads(lines[-1]) == {"name": "開心 😀"}
    assert lines[0] == ("開心" if encoding == "utf-8" else r"\u958b\u5fc3") + r" \udcff"


# ---- ends ----


class Failing(io.StringIO):
    """A stream that cannot be written: at once, or when it is flushed."""

    def __init__(self, number: int, buffered: bool) -> None:
        super().__init__()
        self.number, self.buffered = number, buffered

    def write(self, text: str) -> int:
        if not self.buffered:
            raise OSError(self.number, os.strerror(self.number))
        return super().write(text)

    def flush(self) -> None:
        if self.buffered and self.tell():
            raise OSError(self.number, os.strerror(self.number))


def fail(error: BaseException) -> Callable[[], int]:
    def function() -> int:
        raise error

    return function


def ended_by(number: int) -> Callable[[], int]:
    def function() -> int:
        os.kill(os.getpid(), number)
        return 0

    return function


COPY = OSError(errno.ENOSPC, "No space left on device", "source.wav", None, "copy.wav")


@pytest.mark.parametrize(
    ("function", "status", "message"),
    [
        (lambda: None, 0, ""),
        (lambda: 1, 1, ""),
        (fail(DataError("line\x1b one\nline two")), 2, "fastclap: line\\x1b one\nline two\n"),
        (fail(TrainingError("stopped")), 3, "fastclap: stopped\n"),
        (fail(PermissionError(13, "Permission denied", "/a\nb")), 2, "fastclap: /a\\nb: Permission denied\n"),
        (fail(COPY), 2, "fastclap: copy.wav: No space left on device\n"),
        (fail(OSError("8 requested and 0 written")), 2, "fastclap: 8 requested and 0 written\n"),
        (fail(MemoryError()), 2, "fastclap: memory ran out; make batches or models smaller\n"),
        (fail(KeyboardInterrupt()), 130, ""),
        (ended_by(signal.SIGTERM), 143, ""),
        (ended_by(signal.SIGHUP), 129, ""),
    ],
)
def test_exit_statuses(function: Any, status: int, message: str, capfd: Any) -> None:
    handlers = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGHUP)
    assert run_command(function) == status
    assert capfd.readouterr() == ("", message)
    assert (signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGHUP)) == handlers


def test_errors_of_the_program_keep_their_traceback() -> None:
    with pytest.raises(ZeroDivisionError):
        run_command(fail(ZeroDivisionError()))
    with pytest.raises(RuntimeError, match="of ours"):
        run_command(fail(RuntimeError("of ours")))
    with pytest.raises(SystemExit) as stopped:
        run_command(fail(SystemExit(2)))
    assert stopped.value.code == 2


@pytest.mark.parametrize("buffered", [False, True])
@pytest.mark.parametrize(("number", "status"), [(errno.EPIPE, 141), (errno.ENOSPC, 2), (errno.EIO, 2)])
def test_an_output_that_cannot_be_written(
    number: int, status: int, buffered: bool, monkeypatch: pytest.MonkeyPatch, capfd: Any
) -> None:
    before = sys.stdout
    monkeypatch.setattr(sys, "stdout", Failing(number, buffered))
    table = Table("title", {"name": "left"}, [("x",)])
    for function in (lambda: show("x"), lambda: show(table), lambda: show_json({}), lambda: print("x", flush=True)):
        assert run_command(function) == status  # type: ignore[arg-type]
        err = capfd.readouterr().err
        expected = f"fastclap: standard output: cannot be written ({os.strerror(number)})\n"
        assert err == ("" if status == 141 else expected)
    monkeypatch.setattr(sys, "stdout", before)


@pytest.mark.parametrize("stream", [None, Failing(errno.ENOSPC, False), Failing(errno.EPIPE, True)])
def test_notes_and_progress_never_end_work(stream: Any, monkeypatch: pytest.MonkeyPatch, capfd: Any) -> None:
    monkeypatch.setattr(sys, "stderr", stream)

    def work() -> int:
        note("a note")
        print("of a library", file=sys.stderr)
        with progress("doing", "done", "clips") as advance:
            advance(1, 1)
        show("done")
        return 0

    assert run_command(work) == 0
    assert capfd.readouterr().out == "done\n"
    note("outside of a command")
    with progress("doing", "done", "clips") as advance:
        advance(1, 1)
    assert capfd.readouterr().out == "", "what is for stderr does not go to stdout"


def test_an_abandoned_output_is_no_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdout", Failing(errno.EPIPE, False))

    def work() -> int:
        with pytest.raises(BrokenPipeError):
            show("x")
        console.abandon(sys.stdout)
        show("goes nowhere")
        return 0

    assert run_command(work) == 0


PIPES = """
import subprocess, sys
command = [sys.executable, "-m", "fastclap", *sys.argv[1:]]
piped = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
piped.stdout.close()
print(piped.wait(), piped.stderr.read())
with open("/dev/full", "wb") as full:
    done = subprocess.run(command, stdout=full, stderr=subprocess.PIPE)
    print(done.returncode, done.stderr)
    done = subprocess.run([*command[:3], "no-such-command"], stdout=subprocess.PIPE, stderr=full)
    print(done.returncode, done.stdout)
words = '"$0" "$@"'
print(subprocess.run(["sh", "-c", f"{words} >&- 2>&- <&-", *command]).returncode)
"""


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")
@pytest.mark.parametrize("arguments", [["--help"], ["search", "--help"]])
def test_streams_of_a_process(arguments: list[str]) -> None:
    done = subprocess.run([sys.executable, "-c", PIPES, *arguments], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines() == [
        "141 b''",
        "2 b'fastclap: standard output: cannot be written (No space left on device)\\n'",
        "2 b''",
        "0",
    ]


# ---- commands ----


def refused(capfd: Any, *arguments: str) -> str:
    assert main(arguments) == 2
    out, err = capfd.readouterr()
    assert out == "" and err.startswith("fastclap: ") and err.count("\n") == 1, err
    return str(err)


MODEL = {"embed": ["m", "a.wav", "--out", "o.npy"], "similarity": ["m", "p.csv"], "search": ["m", "i.npy", "words"]}
MODEL |= {"rerank": ["m", "--data", "d"], "eval": ["--model", "m", "--data", "d"]}
MODEL |= {"classify": MODEL["eval"], "pack": ["m.jsonl", "--out", "o"], "caption": ["m.jsonl", "--out", "o.jsonl"]}
NUMBERS = {
    "--batch-size": ("embed similarity search rerank eval classify", ["0", "-1", str(10**9), str(10**30)]),
    "--threads": ("embed similarity search rerank", ["0", "-1", "100000"]),
    "--workers": ("pack caption", ["-1", "100000"]),
    "--width": ("eval classify", ["0", "-3", str(10**12)]),
    "--k": ("search", ["0", "-1"]),
    "--top-k": ("rerank", ["0", "-1"]),
    "--iterations": ("rerank", ["0", "-1", str(10**18)]),
    "--weights": ("rerank", ["0", "-1", "nan", "inf", "1e400"]),
    "--sampling-rate": ("pack", ["0", "-16000", str(10**9)]),
    "--shard-mb": ("pack", ["0", "-1", "nan", "inf", "1e300"]),
    "--captions": ("caption", ["0", "-1", str(10**9)]),
    "--fine-captions": ("caption", ["-1", str(10**9)]),
    "--seed": ("caption", ["-1", str(10**30)]),
}


@pytest.mark.parametrize("flag", NUMBERS)
def test_impossible_numbers_are_refused_before_anything_is_read(flag: str, capfd: Any) -> None:
    commands, values = NUMBERS[flag]
    for command in commands.split():
        for value in values:
            assert f"{flag} is " in refused(capfd, command, *MODEL[command], flag, value), (command, value)


def test_help_says_ranges_statuses_and_the_version(capfd: Any) -> None:
    assert main(["--help"]) == 0
    usage = capfd.readouterr().out
    assert all(command in usage for command in COMMANDS) and console.STATUSES in usage and "--version" in usage
    assert main(["--version"]) == 0
    assert capfd.readouterr().out.startswith("fastclap 0.")
    with pytest.raises(SystemExit):
        main(["embed", "--help"])
    assert "from 1 to 256" in " ".join(capfd.readouterr().out.replace("│", " ").split())


def test_classes_of_any_name_are_shown(
    clap_folder: str, write_clip: Callable[..., str], tmp_path: Path, capfd: Any
) -> None:
    names = [name for name in ODD_NAMES if name != "\udcff"]  # which no manifest can hold
    lines = [
        json.dumps({"audio": write_clip(f"{i}.wav", i), "[mood]": name}) for i, name in enumerate((*names, *names[:2]))
    ]
    (tmp_path / "m.jsonl").write_text("\n".join(lines))
    command = ["classify", "--model", clap_folder, "--data", str(tmp_path / "m.jsonl"), "--column", "[mood]"]
    assert main(command) == 0
    out = capfd.readouterr().out
    assert all(console.printable(name) in out for name in names[:-1]) and "Zero-shot [mood]: 16 clips" in out


def test_a_name_that_is_no_text_is_left_out_and_listed(
    write_clip: Callable[..., str], tmp_path: Path, capfd: Any
) -> None:
    write_clip("audio/good.wav", 1)
    shutil.copy(tmp_path / "audio" / "good.wav", os.fsencode(tmp_path / "audio") + b"/bad\xff.wav")
    out = tmp_path / "o.jsonl"
    assert main(["caption", str(tmp_path / "audio"), "--out", str(out), "--workers", "0", "--json"]) == 0
    assert json.loads(capfd.readouterr().out)["rows"] == 1
    (listed,) = map(json.loads, (tmp_path / "o-skipped.jsonl").read_text(encoding="utf-8").splitlines())
    assert listed["path"].endswith(r"bad\udcff.wav") and "not UTF-8" in listed["reason"]


def test_a_full_disk_is_named_by_what_was_to_be_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: Any
) -> None:
    (tmp_path / "metrics.jsonl").write_text('{"kind": "train", "step": 1, "loss": 2.0}\n')

    def full(path: Path) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(files, "fsync", full)
    out = str(tmp_path / "page")
    line = refused(capfd, "report", str(tmp_path), "--out", out)
    assert line == f"fastclap: {out}/training.png: No space left on device\n"


@pytest.mark.parametrize(
    ("error", "named"),
    [
        (OSError(errno.ENOSPC, "full"), "out"),
        (OSError(errno.EACCES, "read-only", f".out.{os.getpid()}"), "out"),
        (OSError(errno.ENOSPC, "full", "source.wav", None, f"/x/.out.{os.getpid()}/1.wav"), "out"),
        (OSError(errno.ENOENT, "gone", "source.wav"), "source.wav"),
    ],
)
def test_an_error_names_the_output_unless_it_is_of_an_input(error: OSError, named: str, capfd: Any) -> None:
    def work() -> None:
        with writing("out"):
            raise error

    assert run_command(work) == 2  # type: ignore[arg-type]
    assert capfd.readouterr().err == f"fastclap: {named}: {error.strerror}\n"


def test_sigterm_keeps_what_is_embedded(
    clap_folder: str, write_clip: Callable[..., str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: Any
) -> None:
    from fastclap.apps import embed

    clips = [write_clip(f"{i}.wav", i) for i in range(3)]
    command = ["embed", clap_folder, *clips, "--out", str(tmp_path / "o.npy"), "--batch-size", "1", "--json"]
    check, calls = embed.check_finite, iter(range(9))

    def check_or_end(vectors: Any, names: Any) -> None:
        check(vectors, names)
        if next(calls) == 1:
            os.kill(os.getpid(), signal.SIGTERM)

    with monkeypatch.context() as patch:
        patch.setattr(embed, "check_finite", check_or_end)
        assert main(command) == 143
    assert capfd.readouterr().out == "" and not (tmp_path / "o.npy").exists()
    assert main(command) == 0
    assert json.loads(capfd.readouterr().out)["reused"] == 1


def test_values_of_convert_are_json_or_a_word() -> None:
    from fastclap.commands.convert import _parse_values

    assert _parse_values({"a": "3", "b": "gelu", "c": "[1]"}) == {"a": 3, "b": "gelu", "c": [1]}
    for wrong in ("[" * 100_000, "{1}", '"\\ud800"'):
        with pytest.raises(ConfigError, match="the value of a"):
            _parse_values({"a": wrong})
