"""Captions: true of the clip, plain English, the same whoever makes them; the command, and what can go wrong."""

from __future__ import annotations

import itertools
import json
import re
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile

from fastclap.apps.acoustics import Acoustics
from fastclap.apps.caption_manifest import caption
from fastclap.apps.captions import FEWEST, SCALES, Description, Labels, Thresholds, describe
from fastclap.commands.main import main
from fastclap.data import load_manifest
from fastclap.data.demo_voices import write_demo
from fastclap.errors import ConfigError, DataError

BOUNDS = Thresholds(
    {
        "pitch_hz": {"male": (110.0, 150.0), "female": (160.0, 220.0), "all": (140.0, 200.0)},
        "pitch_range_st": {"all": (3.0, 6.0)},
        "loudness_lufs": {"all": (-25.0, -18.0)},
        "syllable_rate": {"all": (4.0, 5.0)},
        "spectral_centroid_hz": {"all": (900.0, 1300.0)},
        "hnr_db": {"all": (8.0, 11.0)},
    }
)
VALUES = {
    "pitch_hz": (100.0, 155.0, 250.0),
    "pitch_range_st": (2.0, 4.0, 8.0),
    "loudness_lufs": (-30.0, -20.0, -12.0),
    "syllable_rate": (3.0, 4.5, 6.0),
    "spectral_centroid_hz": (700.0, 1100.0, 1500.0),
    "hnr_db": (5.0, 9.0, 14.0),
}
BASE = Acoustics(
    duration=3.0,
    speech_s=2.5,
    voiced_share=0.7,
    pitch_hz=155.0,
    pitch_range_st=4.0,
    loudness_lufs=-20.0,
    syllable_rate=4.5,
    pause_share=0.0,
    longest_pause_s=0.0,
    pause_place=None,
    spectral_centroid_hz=1100.0,
    hnr_db=9.0,
    f4_hz=3900.0,
    pitch_course=(0.0, 0.0, 0.0),
    loudness_course=(0.0, 0.0, 0.0),
)
# Words that claim a level of a measure; a caption with one of them needs that level.
CLAIMS = {
    ("pitch_hz", -1): r"low-pitched|(?<!high-pitched, )\blow\b|deep",
    ("pitch_hz", 0): r"medium-pitched",
    ("pitch_hz", 1): r"high-pitched|\bhigh\b(?! volume)",
    ("pitch_range_st", -1): r"little change of pitch|flat intonation",
    ("pitch_range_st", 1): r"lively|wide swings",
    ("loudness_lufs", -1): r"softly|quietly",
    ("loudness_lufs", 0): r"(normal|moderate) volume",
    ("loudness_lufs", 1): r"loudly|high volume",
    ("syllable_rate", -1): r"slowly|slow pace|unhurriedly",
    ("syllable_rate", 0): r"(normal|moderate) pace",
    ("syllable_rate", 1): r"\bfast\b|quickly",
    ("spectral_centroid_hz", -1): r"\bdark\b|smooth",
    ("spectral_centroid_hz", 1): r"bright|rough",
    ("hnr_db", -1): r"breathy|rough",
    ("hnr_db", 1): r"\bclear\b|smooth",
}


def said(description: Description) -> list[str]:
    return [*description.captions, *description.fine]


def all_levels() -> list[tuple[tuple[int, ...], Acoustics]]:
    """A clip for each combination of low, middle and high."""
    found = []
    for levels in itertools.product((-1, 0, 1), repeat=len(SCALES)):
        values = {name: VALUES[name][level + 1] for name, level in zip(SCALES, levels, strict=True)}
        found.append((levels, replace(BASE, **values)))
    return found


def test_no_word_is_said_that_was_not_measured() -> None:
    heard = set()
    for number, (levels, clip) in enumerate(all_levels()):
        level = dict(zip(SCALES, levels, strict=True))
        for text in said(describe(clip, Labels(), BOUNDS, name=str(number))):
            for (measure, wanted), words in CLAIMS.items():
                if re.search(words, text):
                    heard.add((measure, wanted))
                    assert level[measure] == wanted, f"{text} {level}"
            assert not re.search(r"\b(he|she|his|her|wo)?(man|male|female|his|her|lady|guy|girl|boy)\b", text), text
            assert "pause" not in text and "sounds" not in text and "sounding" not in text, text
    assert heard == set(CLAIMS), "every word is said of some clip"


def test_captions_are_plain_sentences() -> None:
    labels = (
        Labels(),
        Labels("female", "angry", "8", "Irish"),
        Labels("male", "anger", "31.0", "Scottish accent", ("over a telephone line",)),
        Labels("female", "calm", "twenties"),
        Labels(None, "excited", "20-30"),
        Labels("male", None, "Elderly"),
    )
    for number, (_, clip) in enumerate(all_levels()):
        clip = replace(clip, pause_place=(0.1, 0.5, 0.9)[number % 3], longest_pause_s=(0.4, 1.4)[number % 2])
        clip = replace(clip, pitch_course=(number % 5 - 2.0, number % 7 - 3.0, number % 11 - 5.0))
        description = describe(clip, labels[number % len(labels)], BOUNDS, name=str(number), captions=6)
        assert len(description.captions) == 6 and len(description.fine) == 2
        for text in said(description):
            assert text[0].isupper() and text.endswith(".") and ".." not in text, text
            assert not re.search(r"  | ,|,,|, \.|\{|None|\bspeaker speaks|, and$", text), text
            assert not re.search(r"\b[Aa] [aeio]", text) and not re.search(
                r"\b[Aa]n [^aeiou8]", text.replace("Irish", "i")
            ), text
            assert "an 31" not in text and ".0" not in text


def test_labels_are_said() -> None:
    def texts(labels: Labels) -> str:
        return " ".join(text for seed in range(6) for text in said(describe(BASE, labels, BOUNDS, name="x", seed=seed)))

    assert re.search(r"a 35-year-old (woman|lady|female)", texts(Labels("female", age="35")))
    assert "in her thirties" in texts(Labels("female", age="35"))
    assert re.search(r"\b9-year-old boy", texts(Labels("male", age="9")))
    assert re.search(r"an 8-year-old child", texts(Labels(age="8")))
    assert "aged 20 to 30" in texts(Labels(age="20-30"))
    assert "in their twenties" in texts(Labels(age="twenties")) and "in his fifties" in texts(Labels("male", age="50"))
    assert re.search(r"an elderly (man|guy|male)", texts(Labels("male", age="Elderly")))
    assert "with an Irish accent" in texts(Labels(accent="Irish"))
    assert re.search(r"sounding angry|in an angry|sounds angry", texts(Labels(emotion="anger")))
    assert "over a radio" in texts(Labels(phrases=("over a radio",)))
    found = describe(BASE, Labels("male", "anger"), BOUNDS, name="x")
    assert "male" in found.intrinsic_tags and "angry" in found.situational_tags
    for text in describe(BASE, Labels("male"), BOUNDS, name="x").captions:
        assert re.search(r"\b(man|male|guy)\b", text), text


@pytest.mark.parametrize(
    ("pitch", "loudness", "place", "words"),
    [
        (
            (-2.0, 0.0, 2.0),
            (0.0, 0.0, 0.0),
            None,
            r"pitch (rises|climbs).*keeps a steady volume|steady.*(rises|climbs)",
        ),
        ((2.0, 0.0, -2.0), (-3.0, 0.0, 3.0), None, r"pitch (falls|drops).*louder|louder.*pitch (falls|drops)"),
        ((-2.0, 1.0, -1.0), (3.0, 0.0, -3.0), None, r"(rises and then falls).*(dies away|softer)|(dies|softer).*rises"),
        ((1.0, -2.0, 1.0), (-4.0, 1.0, -3.0), None, r"(dips and comes back).*(swells)|swells.*dips"),
        ((0.5, 0.0, -0.5), (1.0, -3.0, 1.0), None, r"stays level.*recovers|recovers.*stays level"),
        (None, None, 0.5, r"there is a short pause in the middle"),
        ((0.5, 0.0, -0.5), None, 0.9, r"stays level, with a short pause near the end"),
    ],
)
def test_the_course_is_said(pitch: Any, loudness: Any, place: float | None, words: str) -> None:
    clip = replace(BASE, pitch_course=pitch, loudness_course=loudness, pause_place=place, longest_pause_s=0.4)
    for seed in range(8):
        for text in describe(clip, Labels("female"), BOUNDS, name="x", seed=seed).fine:
            assert re.search(words, text), text


def test_a_clip_without_voice_and_one_too_short_for_a_course() -> None:
    whisper = replace(
        BASE, pitch_hz=None, pitch_range_st=None, hnr_db=None, f4_hz=None, pitch_course=None, voiced_share=0.0
    )
    for seed in range(5):
        found = describe(whisper, Labels(), BOUNDS, name="x", seed=seed)
        assert found.intrinsic_tags == [] and found.situational_tags[0] == "whispered"
        assert not any(re.search("pitch|intonation|breathy|clear", text) for text in said(found))
        assert any("whispered voice" in text for text in found.captions)
    short = replace(BASE, pitch_course=None, loudness_course=None, syllable_rate=None)
    for text in said(describe(short, Labels("male"), BOUNDS, name="x")):
        assert not re.search("rises|falls|louder|steady|pace|fast|slow", text), text
    nothing = describe(short, Labels(), Thresholds({}), name="x")
    assert all(re.search(r"(speaks|talks|talking|voice)\.", text) for text in nothing.captions), nothing
    assert nothing.intrinsic_tags == nothing.situational_tags == []


def test_the_seed_and_the_name_fix_the_wording() -> None:
    def of(seed: int, name: str) -> Description:
        return describe(BASE, Labels("female", "sad", "40"), BOUNDS, name=name, seed=seed)

    assert of(0, "a.wav") == of(0, "a.wav")
    assert len({str(of(seed, "a.wav")) for seed in range(8)}) > 6
    assert len({str(of(0, name)) for name in "abcdefgh"}) > 6
    forms = {text.split()[0] for seed in range(20) for text in of(seed, "a.wav").captions}
    assert {"A", "The", "At"} <= forms


# ---------------------------------------------------------------------------------------------------------------------
# thresholds


def spread(count: int, sex: str | None) -> list[tuple[Acoustics, str | None]]:
    return [(replace(BASE, pitch_hz=100.0 + 9 * i, loudness_lufs=-30.0 + i), sex) for i in range(count)]


def test_thresholds_are_terciles_or_published() -> None:
    clips = spread(31, "male")
    terciles = Thresholds.of_set(clips, published=False)
    assert terciles.bounds["loudness_lufs"] == {"all": (-20.0, -10.0)}
    assert terciles.bounds["pitch_hz"]["male"] == terciles.bounds["pitch_hz"]["all"] == (190.0, 280.0)
    assert "female" not in terciles.bounds["pitch_hz"]
    published = Thresholds.of_set(clips, published=True)
    assert published.bounds["pitch_hz"] == {"male": (115.7, 149.7), "female": (141.6, 184.5), "all": (190.0, 280.0)}
    words = [published.word(clip, "loudness_lufs", "male") for clip, _ in clips]
    assert (words[9], words[10], words[20], words[21]) == (-1, 0, 0, 1)
    assert published.word(replace(BASE, hnr_db=None), "hnr_db", "male") is None


def test_clips_that_are_alike_get_no_words_for_nothing() -> None:
    bounds = Thresholds.of_set([(BASE, "male")] * 20, published=False)
    assert {bounds.word(BASE, measure, "male") for measure in SCALES} == {0}
    assert bounds.bounds["loudness_lufs"]["all"] == (-21.0, -19.0)


def test_a_few_clips_have_no_terciles() -> None:
    few = Thresholds.of_set(spread(FEWEST - 1, None), published=True)
    assert dict(few.bounds) == {"pitch_hz": {"male": (115.7, 149.7), "female": (141.6, 184.5)}}
    assert "loudness_lufs" in Thresholds.of_set(spread(FEWEST, None), published=True).bounds


def test_thresholds_are_read_as_written_and_mistakes_are_named(tmp_path: Path) -> None:
    path = tmp_path / "t.json"
    path.write_text(BOUNDS.to_json())
    assert Thresholds.read(str(path)) == BOUNDS
    with pytest.raises(DataError, match="cannot be read"):
        Thresholds.read(str(tmp_path / "no.json"))
    wrong = {
        "[1]": "holds no thresholds .* they look like",
        '{"pitch_hz": [1, 2]}': "holds no thresholds",
        '{"pitch_hz": {"male": [1]}}': "holds no thresholds",
        '{"pitch_hz": {"male": [1, 1%s]}}' % ("0" * 400): "holds no thresholds",
        "{": r"t\.json: not valid JSON",
        "[" * 100_000: r"t\.json: JSON nested too deeply",
        '{"speed": {"all": [1, 2]}}': "no measure is named 'speed'; the measures are pitch_hz",
        '{"pitch_hz": {"child": [1, 2]}}': "no group is named 'child'",
        '{"pitch_hz": {"male": [1, NaN]}}': r"\[1, nan\] is no pair",
        '{"pitch_hz": {"male": [2, 1]}}': r"\[2, 1\] is no pair",
    }
    for text, message in wrong.items():
        path.write_text(text)
        with pytest.raises(DataError, match=message):
            Thresholds.read(str(path))
    path.write_bytes(b"\xff")
    with pytest.raises(DataError, match="not UTF-8"):
        Thresholds.read(str(path))


# ---------------------------------------------------------------------------------------------------------------------
# the command


@pytest.fixture(scope="module")
def voices(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Manifest of 14 synthetic voices with labels and captions."""
    return Path(write_demo(str(tmp_path_factory.mktemp("voices")), 14, 4, seed=3)[0])


def rows_of(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_a_manifest_keeps_what_it_had_and_gains_captions(voices: Path, tmp_path: Path, capfd: Any) -> None:
    out = tmp_path / "o" / "captioned.jsonl"
    out.parent.mkdir()
    assert main(["caption", str(voices), "--out", str(out), "--workers", "0"]) == 0
    printed = capfd.readouterr()
    assert "measured 14 of 14 clips" in printed.err and "14 rows" in printed.out and "sex labelled: " in printed.out
    before, after = rows_of(voices), rows_of(out)
    for old, new in zip(before, after, strict=True):
        same = set(old) - {"audio", "text_description", "fine_description", "intrinsic_tags", "situational_tags"}
        assert {name: old[name] for name in same} == {name: new[name] for name in same}
        assert new["text_description"][: len(old["text_description"])] == old["text_description"]
        assert len(new["text_description"]) == len(old["text_description"]) + 4
        assert len(new["fine_description"]) == 3 and new["loudness_lufs"] < 0 and "measured_sex" not in new
    manifest = load_manifest(str(out), check_files=True)
    assert len(manifest) == 14 and manifest[0].fine_captions and "pitch_hz" in manifest.columns
    assert Thresholds.read(str(out.with_name("captioned-thresholds.json"))).bounds["loudness_lufs"]
    assert sorted(path.name for path in out.parent.iterdir()) == ["captioned-thresholds.json", "captioned.jsonl"]
    caption(str(voices), out, replace=True, captions=2, fine=0, workers=0)
    for new in rows_of(out):
        assert len(new["text_description"]) == 2 and "fine_description" not in new
        assert new["sex"] in new["intrinsic_tags"] and new["classification_tag"] in new["situational_tags"]


def test_whispers_are_heard_in_a_folder_without_labels(voices: Path, tmp_path: Path, capfd: Any) -> None:
    known = {Path(row["relative_audio_path"]).name: row for row in rows_of(voices)}
    folder = str((voices.parent / rows_of(voices)[0]["relative_audio_path"]).parent)
    out = tmp_path / "captioned.jsonl"
    assert main(["caption", folder, "--out", str(out), "--workers", "0", "--json"]) == 0
    summary = json.loads(capfd.readouterr().out)
    assert summary["sex"]["labelled"] == {} and sum(summary["sex"]["measured"].values()) == summary["rows"]
    for row in rows_of(out):
        assert (tmp_path / row["audio"]).is_file() and row["measured_sex"] in ("male", "female", "unknown")
        style = known[Path(row["audio"]).name]["classification_tag"]
        assert ("whispered" in row.get("situational_tags", ())) == (style == "whispered")
    assert len(load_manifest(str(out), check_files=True)) == summary["rows"]


def test_the_output_depends_on_neither_processes_nor_order_nor_interruptions(voices: Path, tmp_path: Path) -> None:
    first = tmp_path / "first.jsonl"
    caption(str(voices), first, workers=0)
    expected = first.read_bytes()
    for workers in (1, 2):
        caption(str(voices), tmp_path / "w.jsonl", workers=workers)
        assert (tmp_path / "w.jsonl").read_bytes() == expected
    lines = voices.read_text().splitlines(keepends=True)
    turned = voices.with_name("turned.jsonl")
    turned.write_text("".join(reversed(lines)))
    caption(str(turned), tmp_path / "t.jsonl", workers=0)
    assert (tmp_path / "t.jsonl").read_bytes() == b"".join(reversed(expected.splitlines(keepends=True)))
    caption(str(voices), tmp_path / "s.jsonl", workers=0, seed=1)
    other = rows_of(tmp_path / "s.jsonl")
    assert all(a["text_description"] != b["text_description"] for a, b in zip(other, rows_of(first), strict=True))

    def stop(done: int, total: int) -> None:
        if done == 6:
            raise KeyboardInterrupt

    out = tmp_path / "i.jsonl"
    with pytest.raises(KeyboardInterrupt):
        caption(str(voices), out, workers=0, advance=stop)
    store = tmp_path / ".i.jsonl.parts" / "measured.jsonl"
    assert not out.exists() and len(store.read_text().splitlines()) == 7
    store.write_text(store.read_text()[:-20])  # as a crash may leave it
    assert caption(str(voices), out, workers=0)["reused"] == 5
    assert out.read_bytes() == expected and not store.parent.exists()


def test_measures_of_another_version_are_made_again(voices: Path, tmp_path: Path) -> None:
    out = tmp_path / "v.jsonl"
    caption(str(voices), out, workers=0)
    expected = out.read_bytes()
    store = tmp_path / ".v.jsonl.parts" / "measured.jsonl"
    store.parent.mkdir()
    store.write_text('{"version": 0}\n{"key": "00", "reason": "old"}\n')
    assert caption(str(voices), out, workers=0)["reused"] == 0
    assert out.read_bytes() == expected


def test_thresholds_of_another_set(voices: Path, tmp_path: Path) -> None:
    (tmp_path / "t.json").write_text(json.dumps({"loudness_lufs": {"all": [-1.0, 0.0]}}))
    caption(str(voices), tmp_path / "o.jsonl", workers=0, thresholds=str(tmp_path / "t.json"), replace=True)
    for row in rows_of(tmp_path / "o.jsonl"):
        assert "soft" in row["situational_tags"] and not any("pitched" in tag for tag in row["intrinsic_tags"])
    assert json.loads((tmp_path / "o-thresholds.json").read_text()) == {"loudness_lufs": {"all": [-1.0, 0.0]}}


@pytest.fixture
def odd_clips(tmp_path: Path) -> Path:
    """A folder of one good clip in several formats, and of clips that are bad each in their own way."""
    folder = tmp_path / "odd"
    (folder / "deeper").mkdir(parents=True)
    time = np.arange(48000 * 2) / 48000
    wave = 0.1 * sum(np.sin(2 * np.pi * 120 * k * time) / k for k in range(1, 12))
    soundfile.write(folder / "stereo48.wav", np.stack((wave, wave), 1), 48000)
    soundfile.write(folder / "deeper" / "mono16.flac", wave[::3], 16000)
    soundfile.write(folder / "short.wav", wave[: 48000 // 5], 48000)
    soundfile.write(folder / "whisper.wav", np.random.default_rng(0).normal(0, 0.05, 32000), 16000)
    soundfile.write(folder / "zeros.wav", np.zeros(16000), 16000)
    soundfile.write(folder / "faint.wav", np.random.default_rng(0).normal(0, 1e-4, 16000), 16000)
    soundfile.write(folder / "blip.wav", wave[:2000], 48000)
    (folder / "text.wav").write_text("no audio")
    return folder


def test_odd_clips(odd_clips: Path, tmp_path: Path, capfd: Any) -> None:
    out = tmp_path / "odd.jsonl"
    assert main(["caption", str(odd_clips), "--out", str(out), "--workers", "0"]) == 0
    assert f"4 clips left out, see {tmp_path / 'odd-skipped.jsonl'}" in capfd.readouterr().err
    rows = {Path(row["audio"]).name: row for row in rows_of(out)}
    assert set(rows) == {"stereo48.wav", "mono16.flac", "short.wav", "whisper.wav"}
    for name in ("stereo48.wav", "mono16.flac", "short.wav"):
        assert rows[name]["pitch_hz"] == pytest.approx(120, rel=1e-3)
    assert rows["stereo48.wav"]["loudness_lufs"] == pytest.approx(rows["mono16.flac"]["loudness_lufs"], abs=0.2)
    assert "pitch_hz" not in rows["whisper.wav"] and rows["whisper.wav"]["situational_tags"] == ["whispered"]
    assert rows["short.wav"]["duration"] == 0.2 and "pitch_course" not in rows["short.wav"]
    skipped = {Path(note["path"]).name: note["reason"] for note in rows_of(tmp_path / "odd-skipped.jsonl")}
    expected = {"zeros.wav": "silent", "faint.wav": "-70 LUFS", "blip.wav": "too short", "text.wav": "not readable"}
    assert set(skipped) == set(expected) and all(words in skipped[name] for name, words in expected.items())
    for name in ("zeros.wav", "faint.wav", "blip.wav", "text.wav"):
        (odd_clips / name).unlink()
    caption(str(odd_clips), out, workers=0)
    assert not (tmp_path / "odd-skipped.jsonl").exists()


def test_mistakes_are_one_line(
    voices: Path, odd_clips: Path, tmp_path: Path, capfd: Any, write_clip: Callable[..., str]
) -> None:
    def line(*arguments: str) -> str:
        assert main(["caption", *arguments, "--workers", "0"]) == 2
        out, err = capfd.readouterr()
        assert out == "" and err.splitlines()[-1].startswith("fastclap: "), err
        return err.splitlines()[-1]

    (tmp_path / "empty").mkdir()
    out = ("--out", str(tmp_path / "o.jsonl"))
    assert "no audio file in this folder" in line(str(tmp_path / "empty"), *out)
    assert "no such manifest" in line(str(tmp_path / "nothing.jsonl"), *out)
    assert "captions have words for classification_tag" in line(str(voices), *out, "--labels", "mood")
    assert "no clip has a label in column 'accent'; columns: " in line(str(voices), *out, "--labels", "accent")
    assert "no clip has a label in column 'room'" in line(str(voices), *out, "--phrases", "room", "in a {}")
    assert "must contain {}" in line(str(voices), *out, "--phrases", "tempo", "fast")
    assert "name a .jsonl file" in line(str(voices), "--out", str(tmp_path / "o.csv"))
    assert "is the manifest itself" in line(str(voices), "--out", str(voices))
    assert "--captions is 0" in line(str(voices), *out, "--captions", "0")
    assert "no.json: cannot be read" in line(str(voices), *out, "--thresholds", "no.json")
    assert main(["pack", str(voices), "--out", str(tmp_path / "packed"), "--workers", "0"]) == 0
    capfd.readouterr()
    assert "is a packed folder; caption the manifest" in line(str(tmp_path / "packed"), *out)
    for name in ("stereo48.wav", "short.wav", "whisper.wav", "zeros.wav", "blip.wav", "text.wav"):
        (odd_clips / name).unlink()
    shutil.rmtree(odd_clips / "deeper")
    assert "none of the 1 clips can be used" in line(str(odd_clips), *out)
    with pytest.raises(ConfigError, match="--workers -1"):
        caption(str(voices), tmp_path / "o.jsonl", workers=-1)


def test_labels_and_phrases_of_a_table(tmp_path: Path, voices: Path) -> None:
    """A CSV file with columns of other names, one of them worded by the user."""
    clips = [str((voices.parent / row["relative_audio_path"]).resolve()) for row in rows_of(voices)[:3]]
    table = tmp_path / "t.csv"
    lines = ["file,gender,feeling,channel", *(f"{clip},F,joy,radio" for clip in clips[:2]), f"{clips[2]},?,,"]
    table.write_text("\n".join(lines) + "\n")
    columns = {"audio": "file", "classification_tag": "feeling"}
    out = tmp_path / "t.jsonl"
    caption(str(table), out, columns=columns, phrases={"channel": "over a {}"}, workers=0)
    *labelled, bare = rows_of(out)
    for row in labelled:
        assert row["feeling"] == row["classification_tag"] == "joy" and row["gender"] == "F"
        texts = [*row["text_description"], *row["fine_description"]]
        assert all("over a radio" in text and "joyful" in text for text in texts), texts
        assert all(re.search(r"woman|lady|female", text) for text in texts), texts
        assert "female" in row["intrinsic_tags"] and "joyful" in row["situational_tags"]
    assert "measured_sex" in bare and not any("radio" in text for text in bare["text_description"])
    caption(str(table), out, columns=columns, labels=["classification_tag"], workers=0)
    assert all("measured_sex" in row and "over a" not in str(row["text_description"]) for row in rows_of(out))
