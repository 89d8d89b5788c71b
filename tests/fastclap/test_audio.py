"""Decoding: every supported kind of file gives the same clip, and every kind of damage is named."""

from __future__ import annotations

import io
import os
import pickle
import resource
import socket
import struct
from pathlib import Path

import numpy as np
import pytest
import soundfile

from fastclap.audio import AudioError, AudioFile, audio_info, read_audio, whole_clip, windows
from fastclap.errors import DataError

RATE = 16000


def tone(rate: int = RATE, seconds: float = 1.0, frequency: float = 440.0, amplitude: float = 0.5) -> np.ndarray:
    return amplitude * np.sin(2 * np.pi * frequency * np.arange(round(rate * seconds)) / rate)


def noise(samples: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(0, 0.1, samples)


def cut(path: Path, share: float) -> Path:
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * share)])
    return path


def test_16_bit_samples_are_exact(tmp_path: Path) -> None:
    samples = np.random.default_rng(0).integers(-32768, 32768, 8000).astype(np.int16)
    for name in ("clip.wav", "clip.flac"):
        soundfile.write(tmp_path / name, samples, RATE, subtype="PCM_16")
        wave = read_audio(tmp_path / name)
        assert wave.dtype == np.int16
        np.testing.assert_array_equal(wave, samples)
    floats = read_audio(tmp_path / "clip.wav", dtype="float32")
    assert floats.dtype == np.float32
    np.testing.assert_array_equal(floats, samples / np.float32(32768))


@pytest.mark.parametrize(
    ("extension", "subtype", "tolerance"),
    [("wav", "PCM_24", 1), ("wav", "FLOAT", 1), ("wav", "DOUBLE", 1), ("flac", "PCM_24", 1), ("aiff", "PCM_16", 1)],
)
def test_lossless_formats_agree_to_one_step(tmp_path: Path, extension: str, subtype: str, tolerance: int) -> None:
    path = tmp_path / f"clip.{extension}"
    soundfile.write(path, tone(), RATE, subtype=subtype)
    assert np.abs(read_audio(path).astype(int) - np.rint(tone() * 32768)).max() <= tolerance


@pytest.mark.parametrize(
    ("extension", "format", "subtype"), [("mp3", "MP3", None), ("ogg", "OGG", "VORBIS"), ("opus", "OGG", "OPUS")]
)
def test_lossy_formats_keep_the_tone(tmp_path: Path, extension: str, format: str, subtype: str | None) -> None:
    path = tmp_path / f"clip.{extension}"
    soundfile.write(path, tone(), RATE, format=format, subtype=subtype)
    wave = read_audio(path, dtype="float32")
    assert len(wave) == RATE
    middle = slice(RATE // 4, 3 * RATE // 4)
    assert np.corrcoef(wave[middle], tone()[middle])[0, 1] > 0.99


@pytest.mark.parametrize("rate", [8000, 11025, 44100, 48000, 96000])
def test_other_rates_are_resampled(tmp_path: Path, rate: int) -> None:
    soundfile.write(tmp_path / "clip.wav", tone(rate), rate, subtype="PCM_16")
    wave = read_audio(tmp_path / "clip.wav", RATE, dtype="float32")
    assert len(wave) == RATE
    np.testing.assert_allclose(wave[800:-800], tone()[800:-800], atol=2e-3)
    info = audio_info(tmp_path / "clip.wav")
    assert info == (rate, rate, 1, 1.0)


def test_channels_are_averaged(tmp_path: Path) -> None:
    left, right = tone(frequency=300), tone(frequency=700, amplitude=0.2)
    soundfile.write(tmp_path / "clip.wav", np.stack((left, right), axis=1), RATE, subtype="PCM_16")
    np.testing.assert_allclose(read_audio(tmp_path / "clip.wav", dtype="float32"), (left + right) / 2, atol=1e-4)
    assert audio_info(tmp_path / "clip.wav").channels == 2


def test_float_samples_beyond_full_scale_are_clipped(tmp_path: Path) -> None:
    soundfile.write(tmp_path / "clip.wav", np.array([1.5, -1.5, 0.25] * 800), RATE, subtype="FLOAT")
    assert read_audio(tmp_path / "clip.wav")[:3].tolist() == [32767, -32768, 8192]


@pytest.mark.parametrize("extension", ["wav", "flac"])
def test_a_part_equals_the_slice(tmp_path: Path, extension: str) -> None:
    path = tmp_path / f"clip.{extension}"
    soundfile.write(path, noise(RATE), RATE, subtype="PCM_16")
    whole = read_audio(path)
    for start, count in [(0, 100), (1, 1), (5000, 8000), (15999, 50), (12000, None)]:
        part = read_audio(path, start=start, num_samples=count)
        np.testing.assert_array_equal(part, whole[start : None if count is None else start + count])


@pytest.mark.parametrize("rate", [8000, 11025, 22050, 44100, 96000])
def test_a_part_of_a_resampled_file_equals_the_slice_to_one_step(tmp_path: Path, rate: int) -> None:
    soundfile.write(tmp_path / "clip.wav", noise(2 * rate), rate, subtype="PCM_16")
    whole = read_audio(tmp_path / "clip.wav").astype(int)
    for start, count in [(0, 4000), (7777, 8000), (20001, 5000), (28000, None)]:
        part = read_audio(tmp_path / "clip.wav", start=start, num_samples=count)
        expected = whole[start : None if count is None else start + count]
        assert part.shape == expected.shape
        assert np.abs(part - expected).max() <= 1


def test_start_outside_the_file(tmp_path: Path) -> None:
    soundfile.write(tmp_path / "clip.wav", tone(), RATE)
    with pytest.raises(AudioError, match=r"start=16000 lies outside the file, which has 16000 samples"):
        read_audio(tmp_path / "clip.wav", start=16000)


def test_missing_file(tmp_path: Path) -> None:
    with pytest.raises(AudioError, match=r"nowhere\.wav: no such file; check the path .* audio root"):
        read_audio(tmp_path / "nowhere.wav")


@pytest.mark.parametrize("kind", ["a folder", "a pipe", "a socket", "a device"])
def test_only_regular_files_are_opened(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "clip.wav"
    if kind == "a folder":
        path.mkdir()
    elif kind == "a pipe":
        os.mkfifo(path)
    elif kind == "a device":
        path.symlink_to("/dev/zero")
    with socket.socket(socket.AF_UNIX) as server:
        if kind == "a socket":
            server.bind(str(path))
        with pytest.raises(AudioError, match=rf"clip\.wav: is {kind}, not an audio file"):
            read_audio(path)


@pytest.mark.parametrize("path", ["a\0.wav", "\ud800.wav", "x" * 300, "loop/clip.wav"])
def test_paths_that_cannot_be(tmp_path: Path, path: str) -> None:
    (tmp_path / "loop").symlink_to("loop")
    with pytest.raises(AudioError) as caught:
        read_audio(f"{tmp_path}/{path}")
    assert "cannot be read" in str(caught.value) and str(caught.value).isprintable()


def test_a_name_that_is_not_utf8(tmp_path: Path) -> None:
    path = os.fsencode(tmp_path) + b"/\xff\xe2\x80\xa8.wav"
    soundfile.write(path, tone(), RATE)
    assert len(read_audio(os.fsdecode(path))) == RATE


def test_empty_file(tmp_path: Path) -> None:
    (tmp_path / "clip.wav").touch()
    with pytest.raises(AudioError, match=r"clip\.wav: zero length: the file is empty"):
        read_audio(tmp_path / "clip.wav")


def test_file_without_samples(tmp_path: Path) -> None:
    soundfile.write(tmp_path / "clip.wav", np.zeros(0), RATE)
    with pytest.raises(AudioError, match="zero length: the file holds no samples"):
        read_audio(tmp_path / "clip.wav")


@pytest.mark.parametrize("name", ["clip.wav", "clip.txt", "clip.raw"])
def test_unsupported_type(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_text("this is no audio at all\n" * 100)
    with pytest.raises(AudioError, match=r"not readable as audio \(.+unsupported type; WAV, FLAC, OGG"):
        read_audio(tmp_path / name)


@pytest.mark.parametrize(
    ("extension", "subtype"),
    [
        ("wav", "PCM_16"),
        ("wav", "PCM_24"),
        ("wav", "FLOAT"),
        ("aiff", "PCM_16"),
        ("flac", "PCM_16"),
        ("ogg", "VORBIS"),
        ("mp3", None),
    ],
)
@pytest.mark.parametrize("share", [0.98, 0.5, 0.1])
def test_truncated_file(tmp_path: Path, extension: str, subtype: str | None, share: float) -> None:
    path = tmp_path / f"clip.{extension}"
    soundfile.write(path, noise(2 * RATE), RATE, subtype=subtype)
    with pytest.raises(AudioError, match=rf"clip\.{extension}: .*(truncated|no samples)"):
        read_audio(cut(path, share))


def test_truncation_is_seen_in_the_header_alone(tmp_path: Path) -> None:
    soundfile.write(tmp_path / "clip.wav", noise(RATE), RATE)
    cut(tmp_path / "clip.wav", 0.5)
    with pytest.raises(AudioError, match="truncated: the header promises 32000 bytes of audio, the file has 15978"):
        audio_info(tmp_path / "clip.wav")


def test_streamed_wav_has_a_placeholder_length(tmp_path: Path) -> None:
    path = tmp_path / "clip.wav"
    soundfile.write(path, tone(), RATE, subtype="PCM_16")
    data = bytearray(path.read_bytes())
    data[4:8] = data[40:44] = b"\xff\xff\xff\xff"
    path.write_bytes(data)
    assert len(read_audio(path)) == RATE


def test_mp3_without_a_length_tag_may_end_where_it_ends(tmp_path: Path) -> None:
    path = tmp_path / "clip.mp3"
    soundfile.write(path, noise(RATE), RATE)
    data = path.read_bytes()
    assert b"Xing" in data or b"Info" in data
    path.write_bytes(data.replace(b"Xing", b"\0\0\0\0").replace(b"Info", b"\0\0\0\0"))
    assert len(read_audio(path)) > RATE // 2


@pytest.mark.parametrize("extension", ["flac", "ogg"])
def test_damage_in_the_middle(tmp_path: Path, extension: str) -> None:
    path = tmp_path / f"clip.{extension}"
    soundfile.write(path, noise(2 * RATE), RATE)
    data = bytearray(path.read_bytes())
    middle = len(data) // 2
    data[middle : middle + 400] = np.random.default_rng(1).bytes(400)
    path.write_bytes(data)
    with pytest.raises(AudioError, match="damaged"):
        read_audio(path)


def test_header_that_promises_too_much(tmp_path: Path) -> None:
    path = tmp_path / "clip.flac"
    soundfile.write(path, tone(), RATE)
    data = bytearray(path.read_bytes())
    data[21] |= 0x0F  # the upper bits of the 36-bit sample count of STREAMINFO
    data[22] = 0xFF
    path.write_bytes(data)
    assert audio_info(path).num_samples > 2**35
    with pytest.raises(AudioError, match="damaged"):
        read_audio(path)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_samples_that_are_no_numbers(tmp_path: Path, value: float) -> None:
    wave = tone()
    wave[1234] = value
    soundfile.write(tmp_path / "clip.wav", np.stack((tone(), wave), axis=1), RATE, subtype="FLOAT")
    with pytest.raises(AudioError, match=r"clip\.wav: sample 1234 is NaN or infinite"):
        read_audio(tmp_path / "clip.wav")


def test_error_is_a_data_error_and_survives_pickling() -> None:
    error = pickle.loads(pickle.dumps(AudioError("a.wav", "broken")))
    assert isinstance(error, DataError)
    assert (str(error), error.path, error.reason) == ("a.wav: broken", "a.wav", "broken")


def test_file_is_opened_once_for_length_and_reads(tmp_path: Path) -> None:
    soundfile.write(tmp_path / "clip.wav", tone(44100, 0.5), 44100)
    with AudioFile(tmp_path / "clip.wav", RATE) as file:
        assert file.num_samples == RATE // 2
        assert len(file.read()) == RATE // 2
        assert len(file.read(100, 200)) == 200


# Recordings in parts


@pytest.mark.parametrize(("rate", "extension"), [(RATE, "wav"), (44100, "flac"), (RATE, "mp3")])
def test_windows_follow_each_other(tmp_path: Path, rate: int, extension: str) -> None:
    soundfile.write(tmp_path / f"clip.{extension}", noise(rate * 5 + 7), rate)
    with AudioFile(tmp_path / f"clip.{extension}", RATE) as file:
        whole = file.read()
        parts = list(windows(file, 1.5))
        assert [len(part) for part in windows(file, 9e99)] == [len(whole)]
    assert len(parts) == 4 and {len(part) for part in parts} <= {len(whole) // 4, len(whole) // 4 + 1}
    assert np.abs(np.concatenate(parts).astype(int) - whole).max() <= (0 if extension == "wav" else 1)


def test_windows_end_where_a_recording_of_estimated_length_does(tmp_path: Path) -> None:
    path = tmp_path / "clip.mp3"
    soundfile.write(path, np.concatenate((noise(RATE) * 1e-3, noise(3 * RATE))), RATE, bitrate_mode="VARIABLE")
    data = path.read_bytes().replace(b"Xing", b"\0\0\0\0").replace(b"Info", b"\0\0\0\0")
    path.write_bytes(data[: len(data) // 2])
    with AudioFile(path, RATE) as file:
        assert not file.has_length
        assert sum(map(len, windows(file, 0.2))) == len(file.read())


@pytest.mark.parametrize("seconds", [0, -1.0, 1e-9, float("nan")])
def test_windows_without_length(tmp_path: Path, seconds: float) -> None:
    soundfile.write(tmp_path / "clip.wav", tone(), RATE)
    with AudioFile(tmp_path / "clip.wav", RATE) as file, pytest.raises(DataError, match="hold no sample"):
        next(windows(file, seconds))


# Headers that lie, and damage of every kind


@pytest.mark.parametrize(("rate", "shown"), [(1, "1 Hz"), (999, "999 Hz"), (10**9, "1000000000 Hz")])
def test_rates_that_no_audio_has(tmp_path: Path, rate: int, shown: str) -> None:
    soundfile.write(tmp_path / "clip.wav", noise(100), rate)
    with pytest.raises(AudioError, match=f"the header says {shown}, and audio has 1000 to 1000000: it is damaged"):
        read_audio(tmp_path / "clip.wav")


@pytest.mark.parametrize("rate", [-1, 0, 999, 10**9])
def test_rates_that_cannot_be_asked_for(tmp_path: Path, rate: int) -> None:
    with pytest.raises(DataError, match=f"sampling_rate={rate}: it is 1000 to 1000000 Hz"):
        read_audio(tmp_path / "clip.wav", rate)


@pytest.mark.parametrize("count", [0, -5])
def test_nothing_to_read(tmp_path: Path, count: int) -> None:
    soundfile.write(tmp_path / "clip.wav", tone(), RATE)
    with pytest.raises(AudioError, match=f"num_samples={count}: there is nothing to read"):
        read_audio(tmp_path / "clip.wav", num_samples=count)


def corpus(count: int, seed: int) -> list[bytes]:
    """Small recordings of every kind with flipped bits, cut ends and headers that lie."""
    random = np.random.default_rng(seed)
    originals = []
    for format, subtype in (
        *(("WAV", kind) for kind in ("PCM_16", "PCM_24", "FLOAT", "IMA_ADPCM")),
        *((kind, None) for kind in ("FLAC", "OGG", "MP3", "AIFF", "W64", "RF64", "CAF", "AU")),
        ("OGG", "OPUS"),
    ):
        with io.BytesIO() as file:
            soundfile.write(file, noise(3000), RATE, format=format, subtype=subtype)
            originals.append(file.getvalue())
    huge = [struct.pack(f"{order}{kind}", value) for order in "<>" for kind, value in (
        ("Q", 1 << 60), ("I", 0xFFFFFFF0), ("I", 10**9), ("H", 0xFFFF), ("I", 0), ("q", -1))]  # fmt: skip
    found = []
    for number in range(count):
        data = bytearray(originals[number % len(originals)])
        for _ in range(random.integers(1, 4)):
            kind, at = random.integers(4), int(random.integers(min(len(data), 120)))
            if kind == 0:
                data[at] ^= 1 << random.integers(8)
            elif kind == 1:
                del data[int(random.integers(len(data))) :]
                data += b"\0"
            elif kind == 2:
                value = huge[random.integers(len(huge))]
                data[at : at + len(value)] = value
            else:
                at = int(random.integers(len(data)))
                data[at : at + 30] = random.bytes(30)
        found.append(bytes(data))
    return found


def test_damage_of_every_kind_is_an_error_or_harmless(tmp_path: Path) -> None:
    path = tmp_path / "clip.wav"
    outcomes = []
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + (1 << 30), hard))  # what a header promises is not allocated
    try:
        for data in corpus(260, seed=0):
            path.write_bytes(data)
            try:
                with AudioFile(path, 24000) as file:
                    clip = whole_clip(file)
                    outcomes.append(clip.wave.dtype == np.int16 and 0 < len(clip.wave) <= file.num_samples)
                    outcomes.append(sum(map(len, windows(file, 0.05))) <= file.num_samples)
            except AudioError as error:
                outcomes.append(str(error).startswith(str(path)))
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
    assert all(outcomes)
    assert len(outcomes) > 300  # some of them can still be read
