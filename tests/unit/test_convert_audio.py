"""WAV files as calibration data: every encoding, windows of whole recordings, and what is refused with which file's name."""

from __future__ import annotations

import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edge_serve.errors import UsageError
from edge_serve.spec import InputSpec
from edge_serve_converters.calibration import Warnings, draw, kind_of, open_source
from edge_serve_converters.plan import InputPlan, SignaturePlan
from edge_serve_converters.wav import WavFile
from tests.unit.calibration_files import ENCODINGS, SIGNAL, WINDOW, drawn, refused, warned, wav

STEPS = {"pcm8": 2**-7, "pcm16": 2**-15, "pcm24": 2**-23, "pcm32": 2**-24, "float32": 2**-24, "float64": 2**-24}


def ramp(frames: int, start: float = 0.0) -> Any:
    """A signal of which every sample is another one."""
    return start + np.arange(frames) / 10_000


def recordings(folder: Path, count: int, frames: int = 200) -> Path:
    """Write files that hold no sample in common."""
    for number in range(count):
        wav(folder / f"{number:02}.wav", ramp(frames, number * frames / 10_000), "float32")
    return folder


@pytest.mark.parametrize("extensible", [False, True])
@pytest.mark.parametrize("encoding", list(ENCODINGS))
@pytest.mark.parametrize("channels", [1, 2])
def test_all_encodings_become_the_same_signal(tmp_path: Path, encoding: str, channels: int, extensible: bool) -> None:
    signal = np.random.default_rng(0).uniform(-1, 0.99, (101, channels))
    signal[0], signal[1], signal[2] = -1, 0, 0.5
    file = WavFile.open(wav(tmp_path / "a.wav", signal, encoding, 44100, extensible))
    assert (file.frames, file.channels, file.rate) == (101, channels, 44100)
    read = file.read(np.array([0]), 101)[0]
    assert read.dtype == np.float32
    np.testing.assert_allclose(read, signal, atol=STEPS[encoding])
    np.testing.assert_array_equal(read[:3], signal[:3])
    np.testing.assert_array_equal(file.read(np.array([40, 7]), 3), [read[40:43], read[7:10]])


def test_windows_of_one_file_are_never_in_both_parts(tmp_path: Path) -> None:
    folder = recordings(tmp_path, 10)
    for seed in range(5):
        data = drawn(folder, SIGNAL, InputSpec(kind="window", hop=10), seed=seed)
        parts = [
            np.unique((part["s"] * 10_000 + 0.5).astype(int) // 200) for part in (data.calibration, data.held_back)
        ]
        assert not set(parts[0]) & set(parts[1])
        assert len(parts[1]) == 2


def test_a_single_file_is_split_in_time(tmp_path: Path) -> None:
    wav(tmp_path / "one.wav", ramp(2000), "float32")
    for hop in (None, 10):
        data = drawn(tmp_path, SIGNAL, InputSpec(kind="window", hop=hop))
        assert data.calibration["s"].max() < data.held_back["s"].min()


def test_windows_are_normalized_by_channel(tmp_path: Path) -> None:
    signal = np.stack([ramp(500), ramp(500, 0.5)], axis=1)
    wav(tmp_path / "a.wav", signal, "float64")
    window = drawn(tmp_path, WINDOW, InputSpec(kind="window", mean=(0.0, 0.5), std=(0.1,))).calibration["w"][0, 0]
    np.testing.assert_allclose(window[:, 0], window[:, 1], atol=1e-5)
    np.testing.assert_allclose(np.diff(window[:, 0]), 1e-3, atol=1e-5)


def test_files_shorter_than_a_window_are_left_out_and_named(tmp_path: Path) -> None:
    recordings(tmp_path, 5, 500)
    wav(tmp_path / "click.wav", ramp(20))
    text = warned(tmp_path, SIGNAL, InputSpec(kind="window"))
    assert "1 of 6 WAV files are shorter than one window (50 samples) and left out: click.wav" in text
    wav(tmp_path / "only" / "click.wav", ramp(20))
    assert "no WAV file is as long as one window" in refused(tmp_path / "only", SIGNAL)


def test_rates_must_be_equal_and_as_said(tmp_path: Path) -> None:
    recordings(tmp_path, 3)
    assert drawn(tmp_path, SIGNAL, InputSpec(rate_hz=16000.0)).calibration
    text = refused(tmp_path, SIGNAL, InputSpec(rate_hz=8000.0))
    assert "00.wav: has 16000 samples a second, --rate-hz says 8000" in text
    wav(tmp_path / "odd.wav", ramp(200), rate=22050)
    assert "odd.wav: has 22050 samples a second" in refused(tmp_path, SIGNAL)


def test_channels_must_be_the_models(tmp_path: Path) -> None:
    wav(tmp_path / "stereo.wav", np.zeros((200, 2)))
    assert "stereo.wav: has 2 channels; input 's' of shape [1, 50] takes 1" in refused(tmp_path, SIGNAL)


def test_numbers_that_are_none_are_refused_with_the_file(tmp_path: Path) -> None:
    signal = ramp(2000)
    signal[700] = np.nan
    wav(tmp_path / "bad.wav", signal, "float32")
    assert "bad.wav: holds NaN or infinite values within 50 samples from sample 700" in refused(tmp_path, SIGNAL)


def test_floats_in_another_scale_are_warned_of(tmp_path: Path) -> None:
    wav(tmp_path / "loud.wav", ramp(3000) * 32768, "float32")
    assert "loud.wav: has samples up to" in warned(tmp_path, SIGNAL)


def test_silence_is_warned_of(tmp_path: Path) -> None:
    wav(tmp_path / "silence.wav", np.zeros(2000))
    assert "input 's' are constant (0)" in warned(tmp_path, SIGNAL)


def test_recordings_say_their_kind_themselves(tmp_path: Path) -> None:
    recordings(tmp_path, 2)
    assert kind_of(tmp_path) == "window"
    assert "say --kind window, not image" in refused(tmp_path, SIGNAL, InputSpec(kind="image"))


def test_a_model_with_two_inputs_is_refused(tmp_path: Path) -> None:
    recordings(tmp_path, 2)
    two = SignaturePlan("s", (InputPlan("a", "float32", (1, 50), True), InputPlan("b", "float32", (1, 50), True)), {})
    assert "several inputs (a, b)" in refused(tmp_path, two)


def test_a_length_that_was_never_filled_in_means_all_that_is_there(tmp_path: Path) -> None:
    path = wav(tmp_path / "pipe.wav", ramp(300))
    content = path.read_bytes()
    place = content.index(b"data") + 4
    path.write_bytes(content[:place] + b"\xff\xff\xff\xff" + content[place + 4 :])
    assert WavFile.open(path).frames == 300


def form(**changes: int) -> bytes:
    """Give the bytes of a format with a mistake in it."""
    said = {"kind": 1, "channels": 1, "rate": 16000, "bits": 16, **changes}
    return struct.pack("<HHIIHH", said["kind"], said["channels"], said["rate"], 32000, 2, said["bits"])


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        (b"RIFF", b"RIFX", "is no WAV file"),
        (b"WAVE", b"AVI ", "is no WAV file"),
        (b"data", b"junk", "it has no samples"),
        (b"fmt ", b"frmt", "its samples come before their format"),
        (form(), form(kind=2, bits=4), "holds samples of format 0x2 with 4 bit"),
        (form(), form(bits=20), "holds samples of format 0x1 with 20 bit"),
        (form(), form(channels=0), "says 0 channels at 16000 Hz"),
        (form(), form(rate=0), "says 1 channels at 0 Hz"),
    ],
)
def test_damaged_headers_are_refused(tmp_path: Path, old: bytes, new: bytes, words: str) -> None:
    path = wav(tmp_path / "a.wav", ramp(100))
    path.write_bytes(path.read_bytes().replace(old, new, 1))
    text = refused(tmp_path, SIGNAL)
    assert "a.wav: " in text
    assert words in text


def test_every_cut_of_a_file_is_refused(tmp_path: Path) -> None:
    path = wav(tmp_path / "a.wav", ramp(60), extensible=True)
    content = path.read_bytes()
    for end in range(len(content)):
        path.write_bytes(content[:end])
        with pytest.raises(UsageError, match=r"a\.wav"):
            WavFile.open(path)


def test_the_fingerprint_is_of_the_sound(tmp_path: Path) -> None:
    prints = []
    for offset in (0.0, 0.0, 0.5):
        wav(tmp_path / "a.wav", ramp(2000, offset))
        source = open_source(tmp_path, InputSpec())
        draw(source, SIGNAL, samples=100, seed=0, warnings=Warnings())
        prints.append(source.fingerprint())
    assert prints[0] == prints[1] != prints[2]
