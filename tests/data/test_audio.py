"""Decoding, resampling, filtering, levelling and cutting, against values worked out by hand."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

import rvc_dist
from rvc_dist.data import audio, decode

RATE = 16000
SLICE_RATE = 1000
VOICE = Path(rvc_dist.__file__).parent / "demo_voice" / "voice"
HOP = 15
"""Samples of a slicer frame at SLICE_RATE."""


def sine(hz: float, seconds: float, rate: int = RATE, level: float = 0.5) -> audio.Wave:
    return (level * np.sin(2 * np.pi * hz * np.arange(round(seconds * rate)) / rate)).astype(np.float32)


def level(wave: audio.Wave) -> float:
    """RMS of the middle half, away from the edges of filters."""
    return float(np.sqrt(np.mean(wave[len(wave) // 4 : -len(wave) // 4].astype(np.float64) ** 2)))


# Resampling and filtering


@pytest.mark.parametrize("path", sorted(VOICE.glob("*.flac")), ids=lambda path: path.name)
def test_speech_has_its_own_rate_and_what_was_upsampled_the_one_before(path: Path) -> None:
    wave, rate = decode.decode(path)
    high = audio.resample(wave, rate, 48000)
    assert (audio.effective_rate(wave, rate, rate), audio.effective_rate(high, 48000, rate)) == (16000, 16000)
    assert audio.effective_rate(high, 48000, 48000) == 16000
    telephone = audio.resample(audio.resample(wave, rate, 8000), 8000, 44100)
    assert audio.effective_rate(np.round(telephone * 32767).astype(np.float32) / 32767, 44100, 44100) == 8000


@pytest.mark.parametrize(("rate", "new_rate"), [(16000, 48000), (44100, 16000), (48000, 40000), (8000, 44100)])
def test_resample_keeps_duration_and_level(rate: int, new_rate: int) -> None:
    wave = audio.resample(sine(200, 1.0, rate), rate, new_rate)
    assert wave.dtype == np.float32
    assert abs(len(wave) - new_rate) <= 1
    np.testing.assert_allclose(
        wave[new_rate // 4 : new_rate // 2], sine(200, 1.0, new_rate)[new_rate // 4 :][: new_rate // 4], atol=1e-3
    )


def test_resample_to_the_same_rate_changes_nothing() -> None:
    wave = sine(200, 0.1)
    assert audio.resample(wave, RATE, RATE) is wave


@pytest.mark.parametrize("rate", [24000, 48000])
def test_highpass_removes_offset_and_rumble_and_keeps_speech(rate: int) -> None:
    offset = audio.highpass(np.full(rate, 0.5, np.float32), rate)
    assert np.abs(offset[rate // 2 :]).max() < 1e-3
    # 5th order: |H| = 1 / sqrt(1 + (48 / f)^10), so 1 / 39 at 23 Hz, 0.7071 at 48 Hz and 0.9999997 at 200 Hz.
    for hz, gain in ((23.0, 1 / (1 + (48 / 23) ** 10) ** 0.5), (48.0, 0.5**0.5), (200.0, 1.0)):
        wave = sine(hz, 4.0, rate)
        assert level(audio.highpass(wave, rate)) == pytest.approx(gain * level(wave), rel=0.01, abs=2e-4)


def test_highpass_in_blocks_is_bit_equal(monkeypatch: pytest.MonkeyPatch) -> None:
    wave = np.random.default_rng(0).normal(0.0, 0.1, 10000).astype(np.float32)
    whole = audio.highpass(wave, RATE)
    monkeypatch.setattr(audio, "FILTER_BLOCK", 999)
    np.testing.assert_array_equal(audio.highpass(wave, RATE), whole)
    assert whole.dtype == np.float32


# Level


def test_normalise_by_hand() -> None:
    # peak 0.5: factor 0.9 * 0.75 / 0.5 + 0.25 = 1.6
    np.testing.assert_allclose(audio.normalise(np.array([0.5, -0.25, 0.0], np.float32)), [0.8, -0.4, 0.0], rtol=1e-6)
    # peak 2 (negative): factor 0.675 / 2 + 0.25 = 0.5875
    np.testing.assert_allclose(audio.normalise(np.array([-2.0, 1.0], np.float32)), [-1.175, 0.5875], rtol=1e-6)


def test_normalise_leaves_silence_alone() -> None:
    quiet = np.array([9e-4, -9e-4], np.float32)
    assert audio.normalise(quiet).tolist() == quiet.tolist()
    assert audio.normalise(np.zeros(0, np.float32)).size == 0


# Windows


def spans(pieces: object) -> list[tuple[int, int]]:
    return [(start, len(wave)) for start, wave in pieces]  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("samples", "expected"),
    [
        # chunk 30, step 25; a window as long as more than 35 remain
        (100, [(0, 30), (25, 30), (50, 30), (75, 25)]),
        (36, [(0, 30), (25, 11)]),
        (35, [(0, 35)]),
        (4, [(0, 4)]),
    ],
)
def test_cut_windows_by_hand(samples: int, expected: list[tuple[int, int]]) -> None:
    wave = np.arange(samples, dtype=np.float32)
    pieces = list(audio.cut_windows(wave, 10, 3.0, 0.5))
    assert spans(pieces) == expected
    assert all(piece[0] == start for start, piece in pieces)


@pytest.mark.parametrize(
    ("samples", "expected"),
    [
        (101, [(0, 30), (25, 30), (50, 30), (75, 26)]),
        (80, [(0, 30), (25, 30), (50, 30)]),
        (79, [(0, 30), (25, 30), (50, 29)]),
        (29, [(0, 29)]),
    ],
)
def test_cut_fixed_by_hand(samples: int, expected: list[tuple[int, int]]) -> None:
    wave = np.arange(samples, dtype=np.float32)
    pieces = list(audio.cut_fixed(wave, 10, 3.0, 0.5))
    assert spans(pieces) == expected
    assert all(piece[0] == start for start, piece in pieces)


def test_window_steps_are_rounded() -> None:
    # (0.3 - 0.1) * 10 is 1.9999999999999996
    wave = np.zeros(8, np.float32)
    assert spans(audio.cut_windows(wave, 10, 0.3, 0.1)) == [(0, 3), (2, 3), (4, 4)]
    assert spans(audio.cut_fixed(wave, 10, 0.3, 0.1)) == [(0, 3), (2, 3), (4, 3), (6, 2)]


def test_an_overlap_of_almost_everything_still_ends() -> None:
    assert len(list(audio.cut_fixed(np.zeros(100, np.float32), 10, 3.0, 2.9999))) == 71


# Silences. At 1000 Hz: frames of 15 samples, windows of 60; 1.5 s are 100 frames, 400 ms 27, 500 ms 33.
# Frame i hears the hops i - 2 .. i + 1, so silence in the hops a .. b - 1 makes the frames a + 2 .. b - 2 silent:
# b - a - 3 of them. A recording of n hops has n + 1 frames, and nothing sounds beyond its ends.


def pattern(*hops: int) -> audio.Wave:
    """Tone for the first count of hops, silence for the second, and so on."""
    parts = [np.full(n * HOP, 0.0 if i % 2 else 0.5, np.float32) for i, n in enumerate(hops)]
    wave = np.concatenate(parts)
    wave[::2] *= -1
    return wave


def cuts(wave: audio.Wave) -> list[tuple[float, float]]:
    """(first, last) of each piece, in hops."""
    pieces = audio.cut_silences(wave, SLICE_RATE)
    for start, piece in pieces:
        np.testing.assert_array_equal(piece, wave[start : start + len(piece)])
    return [(start / HOP, (start + len(piece)) / HOP) for start, piece in pieces]


@pytest.mark.parametrize(
    ("hops", "expected"),
    [
        # a tone, nothing to cut
        ((200,), [(0, 200)]),
        # 26 silent frames are too few, 27 are cut at the quietest (the first of equals): nothing is lost
        ((150, 29, 150), [(0, 329)]),
        ((150, 30, 150), [(0, 152), (152, 330)]),
        # 33 frames, the longest that is cut at one place
        ((150, 36, 150), [(0, 152), (152, 336)]),
        # 34, 57 (less than twice 500 ms) and 97 frames (more): up to the first quiet one, and 33 before the next tone
        ((150, 37, 150), [(0, 152), (153, 337)]),
        ((150, 60, 150), [(0, 152), (176, 360)]),
        ((150, 100, 150), [(0, 152), (216, 400)]),
        # the silence ends at frame 99, then 100: too soon after the beginning, then not
        ((60, 40, 150), [(0, 250)]),
        ((60, 41, 150), [(0, 62), (67, 251)]),
        # the second silence ends 95 frames after the cut at frame 176 and is no cut; 101 frames after, it is one
        ((150, 60, 21, 41, 150), [(0, 152), (176, 422)]),
        ((150, 60, 27, 41, 150), [(0, 152), (176, 239), (244, 428)]),
        # leading silence of 33 frames stays, of 34 and of 99 keeps its last 33
        ((0, 34, 150), [(0, 184)]),
        ((0, 35, 150), [(1, 185)]),
        ((0, 100, 150), [(66, 250)]),
        # trailing silence of 26 frames stays, of 27 and of 99 goes after the first quiet frame
        ((150, 27), [(0, 177)]),
        ((150, 28), [(0, 152)]),
        ((150, 100), [(0, 152)]),
        # both ends; the tone itself may be short
        ((0, 100, 10, 100), [(66, 112)]),
        # a recording of at most 1.5 s stays whole
        ((50, 50), [(0, 100)]),
        ((50, 51), [(0, 52)]),
    ],
)
def test_cut_silences_by_hand(hops: tuple[int, ...], expected: list[tuple[float, float]]) -> None:
    assert cuts(pattern(*hops)) == expected


def test_cut_silences_cuts_at_the_quietest_frames() -> None:
    wave = pattern(150, 100, 150)
    wave[150 * HOP : 250 * HOP] = 1e-3
    wave[160 * HOP : 164 * HOP] = 0.0  # frame 162 hears only this
    wave[240 * HOP : 244 * HOP] = 0.0  # frame 242 hears only this
    assert cuts(wave) == [(0, 162), (242, 400)]
    # The last frame that is near enough to the first tone is 33 after the first quiet one.
    wave = pattern(150, 100, 150)
    wave[150 * HOP : 250 * HOP] = 1e-3
    wave[183 * HOP : 187 * HOP] = 0.0
    assert cuts(wave) == [(0, 185), (216, 400)]
    # Leading silence of 33 frames stays wherever its quietest is, of 34 it does not.
    for hops, expected in ((34, [(0, 184)]), (35, [(10, 185)])):
        wave = pattern(0, hops, 150)
        wave[: hops * HOP] = 1e-3
        wave[8 * HOP : 12 * HOP] = 0.0
        assert cuts(wave) == expected
    # Further than 500 ms from either tone the quietest place does not count: the level there is the first of equals.
    wave = pattern(150, 100, 150)
    wave[150 * HOP : 250 * HOP] = 1e-3
    wave[198 * HOP : 202 * HOP] = 0.0
    assert cuts(wave) == [(0, 152), (216, 400)]


def test_cut_silences_threshold_is_42_db() -> None:
    loud_enough, too_quiet = 10 ** (-41.9 / 20), 10 ** (-42.1 / 20)
    for value, expected in ((loud_enough, [(0, 400)]), (too_quiet, [(0, 152), (216, 400)])):
        wave = pattern(150, 100, 150)
        wave[150 * HOP : 250 * HOP] = value
        assert cuts(wave) == expected


@pytest.mark.parametrize(
    ("speech_db", "noise_db", "expected"),
    [
        (-18.0, -60.0, -42.0),  # the softest that is cut as the other tools cut it
        (-10.0, -60.0, -42.0),
        (-30.0, -75.0, -54.0),
        (-30.0, -55.0, -49.0),  # the room is heard: silence is what is not above its noise
        (-50.0, -51.0, -45.0),  # nothing but noise: all silent
    ],
)
def test_silence_is_below_speech_and_at_the_noise(speech_db: float, noise_db: float, expected: float) -> None:
    levels = np.repeat([speech_db, noise_db, -120.0], [180, 20, 100])  # digital silence is no noise
    assert audio.silence_db(10.0 ** (levels / 20.0)) == pytest.approx(expected)


@pytest.mark.parametrize("gain_db", [-10.0, -24.0])
def test_soft_recordings_are_cut_as_loud_ones(gain_db: float) -> None:
    loud = pattern(150, 100, 150)
    loud[150 * HOP : 250 * HOP] = 10 ** (-41.9 / 20)  # speech of -6 dB, so of -18 this is silence
    expected = cuts((loud * 10 ** (-12 / 20)).astype(np.float32))
    assert cuts((loud * 10 ** (gain_db / 20 - 12 / 20)).astype(np.float32)) == expected


@pytest.mark.parametrize(
    ("right", "expected"), [(1.0, None), (0.0, None), (-0.5, None), (-0.9, 0), (-1.0, 0), (-1.1, 1)]
)
def test_channels_that_cancel_are_found(right: float, expected: int | None) -> None:
    left = np.random.default_rng(0).normal(0.0, 0.1, 4000).astype(np.float32)
    downmix = audio.Downmix()
    for part in (left[:1000], left[1000:]):
        np.testing.assert_allclose(downmix(np.stack([part, right * part], axis=1)), part * (1 + right) / 2, atol=1e-6)
    assert downmix.loudest_of_cancelling() == expected


def test_independent_channels_do_not_cancel() -> None:
    for channels in (1, 2, 6):
        downmix = audio.Downmix()
        downmix(np.random.default_rng(channels).normal(0.0, 0.1, (40000, channels)).astype(np.float32))
        assert downmix.loudest_of_cancelling() is None


def test_cut_silences_of_silence_is_nothing() -> None:
    assert audio.cut_silences(np.zeros(5000, np.float32), SLICE_RATE) == []
    assert audio.cut_silences(np.zeros(0, np.float32), SLICE_RATE) == []


def test_cut_silences_keeps_a_last_incomplete_hop() -> None:
    wave = np.full(200 * HOP + 7, 0.5, np.float32)
    assert spans(audio.cut_silences(wave, SLICE_RATE)) == [(0, 200 * HOP + 7)]


def test_frame_rms_is_that_of_zero_padded_windows() -> None:
    wave = np.random.default_rng(0).normal(0.0, 0.3, 1234).astype(np.float32)
    padded = np.pad(wave.astype(np.float64), (2 * HOP, 4 * HOP))
    expected = [np.sqrt(np.mean(padded[i * HOP : i * HOP + 4 * HOP] ** 2)) for i in range(1234 // HOP + 1)]
    np.testing.assert_allclose(audio._frame_rms(wave, HOP), expected, rtol=1e-12)
