"""The demo voices are what their captions say, and the same every time."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from fastclap.audio import audio_info, read_audio
from fastclap.data import Manifest, load_manifest
from fastclap.data.demo_voices import STYLES, write_demo

RATE = 16000


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> tuple[Manifest, Manifest]:
    train, valid = write_demo(str(tmp_path_factory.mktemp("demo")), 240, 60, seed=0)
    return load_manifest(train, check_files=True), load_manifest(valid, check_files=True)


def fingerprint(folder: Path) -> dict[str, tuple[str, int]]:
    files = [path for path in folder.rglob("*") if path.is_file()]
    return {
        str(path.relative_to(folder)): (hashlib.sha256(path.read_bytes()).hexdigest(), path.stat().st_mtime_ns)
        for path in files
    }


def content(folder: Path) -> dict[str, str]:
    return {name: digest for name, (digest, _) in fingerprint(folder).items()}


def test_rows_are_complete(demo: tuple[Manifest, Manifest]) -> None:
    for manifest, count in zip(demo, (240, 60), strict=True):
        assert len(manifest) == count
        assert Counter(row.classification_tag for row in manifest) == dict.fromkeys(STYLES, count // len(STYLES))
        for row in manifest:
            assert len(row.captions) == 4
            assert len(row.fine_captions) == 1
            style, sex = row.classification_tag, row.tags["sex"][0]
            assert style is not None
            assert (
                row.captions[3] == f"A {sex} speaker is speaking in {'an' if style[0] in 'ae' else 'a'} {style} style."
            )
            assert row.tags["intrinsic_tags"][0] == sex
            assert row.tags["situational_tags"] == (style, row.tags["loudness"][0], row.tags["tempo"][0])
            assert ("pitch" in row.tags) == (style != "whispered")
            assert row.duration is not None
            assert 1 < row.duration < 3


def test_validation_speakers_are_new(demo: tuple[Manifest, Manifest]) -> None:
    train, valid = ({row.tags["speaker"] for row in manifest} for manifest in demo)
    assert len(train) > 40
    assert len(valid) > 10
    assert not train & valid


def test_files_are_16_khz_mono_and_unclipped(demo: tuple[Manifest, Manifest]) -> None:
    for row in demo[1]:
        info = audio_info(row.audio)
        assert (info.sampling_rate, info.channels, info.duration) == (RATE, 1, row.duration)
        assert np.abs(read_audio(row.audio).astype(int)).max() < 32767


def test_clips_sound_as_their_tags_say(demo: tuple[Manifest, Manifest]) -> None:
    def level(wave: np.ndarray) -> float:
        return float(20 * np.log10(wave.std()))

    def pitch(wave: np.ndarray) -> float:
        """Median over frames of the autocorrelation peak between 60 and 400 Hz, in Hz."""
        frames = np.lib.stride_tricks.sliding_window_view(wave, 1024)[::512] * np.hanning(1024)
        frames = frames[frames.std(axis=1) > np.median(frames.std(axis=1))]
        correlation = np.fft.irfft(np.abs(np.fft.rfft(frames, 2048)) ** 2)[:, RATE // 400 : RATE // 60]
        return RATE / (RATE // 400 + float(np.median(correlation.argmax(axis=1))))

    def highs(wave: np.ndarray) -> float:
        """Share of frames, of the louder half, that have most of their power above 1 kHz: noise rather than voice."""
        frames = np.lib.stride_tricks.sliding_window_view(wave, 400)[::200] * np.hanning(400)
        power = np.abs(np.fft.rfft(frames)) ** 2
        loud = power[power.sum(axis=1) > np.median(power.sum(axis=1))]
        return float((loud[:, 25:].sum(axis=1) > 0.5 * loud.sum(axis=1)).mean())

    train = demo[0]
    waves = [read_audio(row.audio, dtype="float32").astype(np.float64) for row in train]

    def mean(measure: object, **tags: str) -> float:
        chosen = [
            wave
            for wave, row in zip(waves, train, strict=True)
            if all(row.tags.get(k) == (v,) for k, v in tags.items())
        ]
        assert len(chosen) > 8
        return float(np.mean([measure(wave) for wave in chosen]))  # type: ignore[operator]

    levels = [mean(level, loudness=value) for value in ("soft", "normal", "loud")]
    assert levels[0] + 6 < levels[1] < levels[2] - 6
    for sex in ("male", "female"):
        pitches = [mean(pitch, sex=sex, pitch=value, phonation="clear") for value in ("low", "medium", "high")]
        assert pitches[0] * 1.1 < pitches[1] < pitches[2] / 1.1
    assert mean(pitch, sex="female", pitch="medium") > 1.4 * mean(pitch, sex="male", pitch="medium")
    whispered = [highs(w) for w, row in zip(waves, train, strict=True) if row.classification_tag == "whispered"]
    voiced = [highs(w) for w, row in zip(waves, train, strict=True) if row.classification_tag == "calm"]
    assert np.mean(whispered) > 2 * np.mean(voiced)


def test_same_arguments_same_bytes(tmp_path: Path) -> None:
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        write_demo(str(tmp_path / name), 12, 6, seed)
    assert content(tmp_path / "a") == content(tmp_path / "b")
    different = {name for name, digest in content(tmp_path / "c").items() if content(tmp_path / "a")[name] != digest}
    assert len(different) == len(content(tmp_path / "a"))


def test_a_complete_folder_is_left_alone_and_an_incomplete_one_is_finished(tmp_path: Path) -> None:
    paths = write_demo(str(tmp_path), 12, 6, 0)
    first = fingerprint(tmp_path)
    assert write_demo(str(tmp_path), 12, 6, 0) == paths
    assert fingerprint(tmp_path) == first
    (tmp_path / "complete.json").unlink()
    (tmp_path / "valid" / "00003.wav").write_bytes(b"half a file")
    write_demo(str(tmp_path), 12, 6, 0)
    assert content(tmp_path) == {name: digest for name, (digest, _) in first.items()}
    train, _ = write_demo(str(tmp_path), 18, 6, 0)
    assert len(Path(train).read_text().splitlines()) == 18
    assert json.loads((tmp_path / "complete.json").read_text())["num_train"] == 18
