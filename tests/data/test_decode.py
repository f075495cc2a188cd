"""Decoding of every format, of any part, and of what is broken."""

from __future__ import annotations

import os
import struct
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import soundfile
from recordings import write_av

from rvc_dist.data import decode

RATE = 16000


def sine(hz: float, seconds: float, rate: int = RATE, level: float = 0.5) -> decode.Wave:
    return (level * np.sin(2 * np.pi * hz * np.arange(round(seconds * rate)) / rate)).astype(np.float32)


def level(wave: decode.Wave) -> float:
    """RMS of the middle half, away from the edges of filters."""
    return float(np.sqrt(np.mean(wave[len(wave) // 4 : -len(wave) // 4].astype(np.float64) ** 2)))


def read_by_parts(path: Path, part_s: float) -> tuple[decode.Wave, dict[str, float], list[str]]:
    """The parts of a recording joined, the seconds that were lost, by why, and what is said of it."""
    waves, lost, at = [np.zeros(0, np.float32)], dict[str, float](), 0.0
    told: list[str] = []
    with decode.opened(path) as recording:
        while at < recording.duration_s:
            is_last = at + part_s >= recording.duration_s
            waves += map(decode.mono, recording.blocks(at, None if is_last else round(part_s * recording.rate)))
            for seconds, why in recording.lost:
                lost[why] = lost.get(why, 0.0) + seconds
            told += recording.told()
            at += part_s
    return np.concatenate(waves), lost, told


@pytest.mark.parametrize("suffix", ["wav", "flac", "ogg", "mp3", "aiff"])
def test_decode_reads_every_kind(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"a.{suffix}"
    soundfile.write(path, sine(200, 2.0, 44100), 44100)
    wave, rate = decode.decode(path)
    assert rate == 44100
    assert wave.dtype == np.float32
    assert abs(len(wave) - 88200) <= 1152
    assert decode.duration(path) == pytest.approx(2.0, abs=0.03)
    assert level(wave) == pytest.approx(0.5 / 2**0.5, rel=0.02)


@pytest.mark.parametrize(
    ("subtype", "rate", "tolerance"),
    [("PCM_U8", 8000, 1 / 127), ("PCM_16", 22050, 1e-4), ("PCM_24", 96000, 1e-6), ("DOUBLE", 16000, 1e-7)],
)
def test_decode_keeps_the_samples_of_every_depth(tmp_path: Path, subtype: str, rate: int, tolerance: float) -> None:
    wave = sine(200, 0.5, rate)
    soundfile.write(tmp_path / "a.wav", wave, rate, subtype=subtype)
    decoded, got_rate = decode.decode(tmp_path / "a.wav")
    assert got_rate == rate
    np.testing.assert_allclose(decoded, wave, atol=tolerance)


def test_decode_takes_the_mean_of_channels(tmp_path: Path) -> None:
    left, right = np.full(4000, 0.5), np.full(4000, -0.25)
    soundfile.write(tmp_path / "a.wav", np.stack([left, right], axis=1), RATE, subtype="FLOAT")
    wave, _ = decode.decode(tmp_path / "a.wav")
    assert wave.shape == (4000,)
    assert wave.tolist() == [0.125] * 4000


def test_decode_in_blocks_is_the_whole_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for suffix in ("flac", "wav", "ogg", "mp3"):
        path = tmp_path / f"a.{suffix}"
        soundfile.write(path, np.random.default_rng(0).uniform(-0.5, 0.5, 30000), RATE)
        whole = soundfile.read(path, dtype="float32")[0]
        monkeypatch.setattr(decode, "BLOCK", 1001)
        monkeypatch.setattr(decode, "FORGETFUL_BLOCK", 1001)
        np.testing.assert_allclose(decode.decode(path)[0], whole, atol=0 if suffix in ("flac", "wav") else 1e-6)


def test_decode_accepts_a_name_that_is_no_utf8(tmp_path: Path) -> None:
    soundfile.write(tmp_path / "a.wav", sine(200, 0.5), RATE)
    path = Path(os.fsdecode(os.fsencode(tmp_path) + b"/b\xff\n.wav"))
    (tmp_path / "a.wav").rename(path)
    assert len(decode.decode(path)[0]) == 8000
    assert decode.duration(path) == 0.5


@pytest.mark.parametrize("suffix", ["wav", "flac", "ogg", "mp3", "opus", "aiff"])
def test_text_is_not_audio(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"a.{suffix}"
    path.write_text("these are words " * 500)
    for read in (decode.duration, decode.decode):
        with pytest.raises(decode.AudioError, match=r"not readable as audio \(Format not recognised\)"):
            read(path)


def test_decode_refuses_nan_and_a_flac_of_only_a_header_and_no_samples(tmp_path: Path) -> None:
    path = tmp_path / "a.wav"
    wave = sine(200, 0.5)
    wave[7] = np.nan
    soundfile.write(path, wave, RATE, subtype="FLOAT")
    with pytest.raises(decode.AudioError, match="not finite"):
        decode.decode(path)

    soundfile.write(path, np.zeros(0), RATE)
    for read in (decode.duration, decode.decode):
        with pytest.raises(decode.AudioError, match="holds no samples"):
            read(path)

    path = tmp_path / "a.flac"
    soundfile.write(path, np.random.default_rng(0).uniform(-0.5, 0.5, 60000), RATE)
    path.write_bytes(path.read_bytes()[:50000])
    path.write_bytes(path.read_bytes()[:40])
    with pytest.raises(decode.AudioError, match="not readable"):
        decode.decode(path)


@pytest.mark.parametrize(("nibble", "rest"), [(0x0F, b"\xff" * 4), (0x00, bytes(4))])
def test_a_flac_header_that_lies_allocates_nothing(tmp_path: Path, nibble: int, rest: bytes) -> None:
    path = tmp_path / "a.flac"
    soundfile.write(path, sine(200, 1.0), RATE)
    data = bytearray(path.read_bytes())
    # The 36 bits of the sample count: all ones, 256 GiB of float32; or zero, as encoders write to a pipe.
    data[21] = data[21] & 0xF0 | nibble
    data[22:26] = rest
    path.write_bytes(data)
    if not nibble:
        assert (decode.duration(path), len(decode.decode(path)[0])) == (1.0, RATE)
        return
    for read in (decode.duration, decode.decode):
        with pytest.raises(decode.AudioError, match="damaged header or a stream of unknown length"):
            read(path)


def test_a_sample_rate_that_is_damage_is_refused(tmp_path: Path) -> None:
    soundfile.write(tmp_path / "a.wav", sine(200, 0.5), RATE)
    data = bytearray((tmp_path / "a.wav").read_bytes())
    data[24:28] = (1).to_bytes(4, "little")
    (tmp_path / "a.wav").write_bytes(data)
    with pytest.raises(decode.AudioError, match="sample rate of 1 Hz, expected 4000 to 768000"):
        decode.decode(tmp_path / "a.wav")


def write_mp3_without_length(path: Path, wave: decode.Wave, mode: str) -> None:
    """An mp3 as recorders of streams write it: without the first frame, which tells the length."""
    options = {"format": "MP3", "subtype": "MPEG_LAYER_III", "bitrate_mode": mode, "compression_level": 0.5}
    soundfile.write(path, wave, 44100, **options)
    data = path.read_bytes()
    path.write_bytes(data[data.index(data[:2], 4) :])


def test_an_mp3_whose_length_is_underestimated_is_read_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # Loud noise first and silence after it: libsndfile takes the noise's bit rate for the whole file's.
    wave = np.zeros(20 * 44100, np.float32)
    wave[: 5 * 44100] = np.random.default_rng(0).normal(0.0, 0.2, 5 * 44100)
    path = tmp_path / "a.mp3"
    write_mp3_without_length(path, wave, "VARIABLE")
    decoded, rate = decode.decode(path)
    assert len(decoded) / rate == pytest.approx(20.0, abs=0.1)
    assert decode.duration(path) == pytest.approx(20.0, abs=0.1)
    monkeypatch.setitem(sys.modules, "av", None)
    decode._known.cache_clear()
    with pytest.raises(decode.MissingDecoderError, match=r"only \d\.\d of 20\.\d s would be read; pip install av"):
        decode.decode(path)


def test_an_mp3_of_constant_rate_needs_no_length(tmp_path: Path) -> None:
    path = tmp_path / "a.mp3"
    write_mp3_without_length(path, sine(200, 5.0, 44100), "CONSTANT")
    assert len(decode.decode(path)[0]) == pytest.approx(5.0 * 44100, rel=0.02)


# What needs PyAV, and slices


AV_KINDS = {
    "a.m4a": ("aac", 44100),
    "a.mp4": ("aac", 48000),
    "a.aac": ("aac", 44100),
    "a.alac": ("alac", 44100),
    "b.m4a": ("alac", 96000),
    "a.wma": ("wmav2", 44100),
    "a.webm": ("libopus", 48000),
    "b.webm": ("vorbis", 44100),
    "a.ac3": ("ac3", 48000),
    "a.mka": ("flac", 16000),
    "a.mov": ("pcm_s24le", 44100),
    "a.mkv": ("pcm_u8", 8000),
}
"""File name -> codec and sample rate. A bare .alac is an mp4 container, as encoders write it."""
LOSSLESS = ("alac", "flac", "pcm_s24le")


@pytest.mark.parametrize("name", list(AV_KINDS))
def test_every_kind_of_ffmpegs(tmp_path: Path, name: str) -> None:
    codec, rate = AV_KINDS[name]
    wave = sine(200, 2.0, rate)
    write_av(tmp_path / name, wave, codec, rate)
    decoded, got_rate = decode.decode(tmp_path / name)
    assert got_rate == rate
    assert decode.duration(tmp_path / name) == pytest.approx(2.0, abs=0.1)
    assert read_by_parts(tmp_path / name, 10.0)[2] == []  # nothing is said of a healthy one
    assert len(decoded) == pytest.approx(2.0 * rate, abs=0.1 * rate)
    assert level(decoded) == pytest.approx(0.5 / 2**0.5, rel=0.02)
    if codec in LOSSLESS:
        np.testing.assert_allclose(decoded, wave, atol=2e-4)


def test_channels_of_ffmpegs_kinds_are_averaged(tmp_path: Path) -> None:
    wave = sine(200, 1.0, 48000)
    surround = np.stack([wave * share for share in (0.6, 0.0, 1.2, 0.3, 0.0, 0.9)], axis=1)
    write_av(tmp_path / "a.mka", surround, "flac", 48000, "5.1")
    np.testing.assert_allclose(decode.decode(tmp_path / "a.mka")[0], wave * 0.5, atol=1e-4)


def test_eight_channels_are_eight(tmp_path: Path) -> None:
    wave = sine(200, 1.0, 48000)
    write_av(tmp_path / "a.m4a", np.stack([wave] * 8, axis=1), "aac", 48000, "7.1")
    with decode.opened(tmp_path / "a.m4a") as recording:
        blocks = list(recording.blocks())
    assert {block.shape[1] for block in blocks} == {8}
    assert level(decode.decode(tmp_path / "a.m4a")[0]) == pytest.approx(0.5 / 2**0.5, rel=0.2)


@pytest.mark.parametrize("name", ["a.wav", "a.flac", "a.ogg", "a.mp3", "a.m4a", "a.mka", "a.webm", "a.wma", "a.aac"])
def test_a_part_is_that_part_of_the_whole(tmp_path: Path, name: str) -> None:
    """Lossy decoders need frames before a part to be right in it; those that keep no exact time are a little off."""
    rate = 48000
    times = np.arange(6 * rate) / rate
    wave = (0.5 * np.sin(2 * np.pi * (200 + 150 * times) * times)).astype(np.float32)  # 200 Hz and rising
    if name in ("a.m4a", "a.mka", "a.webm", "a.wma", "a.aac"):
        codec = {"a.mka": "flac", "a.webm": "libopus", "a.wma": "wmav2"}.get(name, "aac")
        write_av(tmp_path / name, wave, codec, rate, "mono")
    else:
        soundfile.write(tmp_path / name, wave, rate)
    whole, _ = decode.decode(tmp_path / name)
    start_s, num = 3.1, rate
    with decode.opened(tmp_path / name) as recording:
        part = np.concatenate([decode.mono(block) for block in recording.blocks(start_s, num)])
    assert len(part) == num
    at = round(start_s * rate)
    # Time stamps in milliseconds; and those of wma are two frames late at the beginning of a file.
    slack = {"a.webm": 48, "a.mka": 48, "a.wma": 4200}.get(name, 0)
    error, offset = min((float(np.abs(whole[at + d : at + d + num] - part).max()), d) for d in range(-slack, slack + 1))
    assert error < (0.02 if name in ("a.m4a", "a.aac") else 2e-3), (error, offset)  # aac fills bands with noise


def test_a_part_beyond_the_end_is_empty(tmp_path: Path) -> None:
    soundfile.write(tmp_path / "a.wav", sine(200, 1.0), RATE)
    with decode.opened(tmp_path / "a.wav") as recording:
        assert list(recording.blocks(5.0)) == []
        assert sum(map(len, recording.blocks(0.5, RATE))) == RATE // 2


@pytest.mark.parametrize(
    ("name", "suffix"), [("a.flac", ".wav"), ("a.wav", ".m4a"), ("a.m4a", ".wav"), ("a.mp3", ".ogg")]
)
def test_the_content_counts_not_the_name(tmp_path: Path, name: str, suffix: str) -> None:
    if name.endswith("m4a"):
        write_av(tmp_path / name, sine(200, 1.0, 44100), "aac", 44100)
    else:
        soundfile.write(tmp_path / name, sine(200, 1.0, 44100), 44100)
    wrong = (tmp_path / name).rename(tmp_path / f"wrong{suffix}")
    wave, rate = decode.decode(wrong)
    assert (rate, level(wave)) == (44100, pytest.approx(0.5 / 2**0.5, rel=0.02))


def test_a_playlist_opens_nothing(tmp_path: Path) -> None:
    soundfile.write(tmp_path / "secret.wav", sine(200, 1.0), RATE)
    for text in (
        f"ffconcat version 1.0\nfile {tmp_path}/secret.wav\n",
        f"#EXTM3U\n#EXTINF:1,\n{tmp_path}/secret.wav\n",
    ):
        for suffix in (".m4a", ".aac", ".wav", ".mp4"):
            path = tmp_path / f"list{suffix}"
            path.write_text(text)
            with pytest.raises(decode.AudioError, match="not readable as audio"):
                decode.decode(path)


def test_a_video_without_sound_says_so(tmp_path: Path) -> None:
    import av

    with av.open(str(tmp_path / "a.mp4"), "w") as container:
        stream = container.add_stream("mpeg4", rate=5)
        stream.width, stream.height, stream.pix_fmt = 32, 32, "yuv420p"
        for _ in range(3):
            container.mux(stream.encode(av.VideoFrame.from_ndarray(np.zeros((32, 32, 3), np.uint8), format="rgb24")))
        container.mux(stream.encode(None))
    with pytest.raises(decode.AudioError, match="has no sound in it"):
        decode.decode(tmp_path / "a.mp4")


def test_without_pyav_the_command_that_helps_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_av(tmp_path / "a.m4a", sine(200, 1.0, 44100), "aac", 44100)
    soundfile.write(tmp_path / "really.wav", sine(200, 1.0), RATE)
    (tmp_path / "really.wav").rename(tmp_path / "flac.m4a")
    monkeypatch.setitem(sys.modules, "av", None)
    monkeypatch.setitem(sys.modules, "av.error", None)
    with pytest.raises(
        decode.MissingDecoderError, match=r"m4a needs the package av: pip install av \(the extra formats "
    ):
        decode.decode(tmp_path / "a.m4a")
    assert decode.duration(tmp_path / "flac.m4a") == 1.0


def test_hours_of_silence_in_few_bytes_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "bomb.flac"
    with soundfile.SoundFile(path, "w", 8000, 1, format="FLAC", subtype="PCM_16") as file:
        for _ in range(3600):
            file.write(np.zeros(8000, np.float32))
    with pytest.raises(decode.AudioError, match=r"1\.0 hours in \d+ bytes: silence, or a damaged header"):
        decode.duration(path)


def test_a_file_that_cannot_be_opened_says_why(tmp_path: Path) -> None:
    with pytest.raises(decode.AudioError, match=r"cannot be read \(No such file or directory\)"):
        decode.decode(tmp_path / "gone.wav")
    with pytest.raises(decode.AudioError, match=r"cannot be read \(Is a directory\)"):
        decode.decode(tmp_path)


# Headers that do not say what is there, damage, gaps


def hiss(seconds: float, rate: int = 44100) -> decode.Wave:
    return np.random.default_rng(0).normal(0.0, 0.1, round(seconds * rate)).astype(np.float32)


def write_kind(path: Path, wave: decode.Wave, gap_s: float = 0.0) -> Path:
    codecs = dict.fromkeys(("m4a", "aac", "3gp", "m4b"), "aac")
    codecs |= {"ac3": "ac3", "wma": "wmav2", "mka": "flac", "webm": "libopus"}
    kind = path.suffix[1:]
    if kind in codecs:
        rate = 48000 if kind == "webm" else 44100
        write_av(path, wave[: len(wave) * 44100 // 44100], codecs[kind], rate, "mono", gap_s)
    elif kind in ("opus", "rf64", "w64"):
        rate = 48000 if kind == "opus" else 44100
        form = {"opus": {"format": "OGG", "subtype": "OPUS"}}.get(kind, {"format": kind.upper(), "subtype": "PCM_16"})
        soundfile.write(path, wave, rate, **form)
    else:
        soundfile.write(path, wave, 44100)
    return path


@pytest.mark.parametrize(
    "kind", ["mp3", "ogg", "opus", "flac", "wav", "aiff", "au", "caf", "webm", "mka", "m4a", "wma"]
)
def test_joined_recordings_are_read_whole_and_in_any_part(tmp_path: Path, kind: str) -> None:
    path = write_kind(tmp_path / f"a.{kind}", hiss(4.0))
    one, rate = decode.decode(path)
    path.write_bytes(path.read_bytes() * 2)
    both, _ = decode.decode(path)
    # A joined recording ends where its header says; time stamps of some are in milliseconds, those of asf coarser.
    slack = round({"webm": 0.02, "m4a": 0.04, "wma": 0.1}.get(kind, 0.001) * rate)
    assert abs(len(both) - 2 * len(one)) <= slack
    if kind in ("m4a", "wma", "mka"):  # 4 s after the first begins the second
        np.testing.assert_allclose(both[4 * rate : 5 * rate].std(), one[:rate].std(), rtol=0.05)
    else:
        np.testing.assert_allclose(both[-len(one) :], one, atol=1e-6)
    parts, lost, told = read_by_parts(path, 1.5)
    assert abs(len(parts) - len(both)) <= slack
    assert lost == {}
    assert "2 recordings joined in one file" in told


@pytest.mark.parametrize(
    ("riff", "data", "after", "seconds", "note"),
    [
        (None, 100000, b"", 4.0, "its header tells of 1.1 of 4.0 s"),
        (100036, 100000, b"", 4.0, "its header tells of 1.1 of 4.0 s"),
        (0, 0, b"", 4.0, "its header tells of 0.0 of 4.0 s"),
        (0xFFFFFFFF, 0xFFFFFFFF, b"", 4.0, ""),
        (None, None, b"LIST" + struct.pack("<I", 1 << 20) + bytes(range(256)) * 400, 4.0, ""),
        (None, None, np.random.default_rng(0).bytes(100000), 4.0, ""),
    ],
)
def test_a_wav_is_as_long_as_its_samples(
    tmp_path: Path, riff: int | None, data: int | None, after: bytes, seconds: float, note: str
) -> None:
    wave = hiss(seconds)
    soundfile.write(tmp_path / "a.wav", wave, 44100)
    whole = bytearray((tmp_path / "a.wav").read_bytes())
    at = whole.index(b"data") + 4
    for place, size in ((4, riff), (at, data)):
        if size is not None:
            whole[place : place + 4] = struct.pack("<I", size)
    (tmp_path / "a.wav").write_bytes(whole + after)
    parts, lost, told = read_by_parts(tmp_path / "a.wav", 1.0)
    np.testing.assert_allclose(parts, wave, atol=1e-4)
    assert lost == {}
    assert set(told) == ({note} if note else set())


def test_a_joined_recording_that_cannot_be_read_is_named_with_its_seconds(tmp_path: Path) -> None:
    path = write_kind(tmp_path / "a.m4a", hiss(4.0))
    whole = path.read_bytes()
    path.write_bytes(whole + whole[: len(whole) // 2])
    wave, lost, told = read_by_parts(path, 1.5)
    assert len(wave) / 44100 == pytest.approx(4.0, abs=0.05)
    assert lost == {decode.UNREADABLE: pytest.approx(2.0, abs=0.1)}
    assert any("recording 2 of those joined: not readable as audio (cut off before the table" in note for note in told)
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(decode.AudioError, match=r"not readable as audio \(cut off before the table"):
        decode.duration(path)


@pytest.mark.parametrize("kind", ["mp3", "aac", "ac3"])
def test_bytes_of_a_stream_that_are_no_frames_are_told_in_full_where_they_are(tmp_path: Path, kind: str) -> None:
    path = write_kind(tmp_path / f"a.{kind}", hiss(12.0))
    data = bytearray(path.read_bytes())
    seconds, half = len(data) / 12, len(data) // 2
    data[half : half + round(seconds)] = bytes(round(seconds))
    path.write_bytes(data)
    whole, rate = decode.decode(path)
    assert len(whole) / rate == pytest.approx(11.0, abs=0.1)
    for part_s in (100.0, 2.5):
        parts, lost, _ = read_by_parts(path, part_s)
        assert abs(len(parts) - len(whole)) <= (100 if kind == "ac3" else 1)  # whose time stamps are rounded
        assert lost == {decode.UNREADABLE: pytest.approx(1.0, abs=0.05)}


@pytest.mark.parametrize(
    "kind",
    [*("wav", "rf64", "w64", "aiff", "au", "caf", "flac"), *("mp3", "ogg", "opus", "wma", "mka", "webm", "aac", "ac3")],
)
def test_a_cut_recording_keeps_its_start_and_is_called_cut(tmp_path: Path, kind: str) -> None:
    path = write_kind(tmp_path / f"a.{kind}", hiss(6.0))
    seconds = len(decode.decode(path)[0]) / decode.decode(path)[1]
    path.write_bytes(path.read_bytes()[: path.stat().st_size * 6 // 10])
    wave, rate = decode.decode(path)
    assert 0.4 * seconds < len(wave) / rate < 0.65 * seconds
    parts, lost, told = read_by_parts(path, 100.0)
    assert len(parts) == len(wave)
    assert any("cut off" in note for note in told)
    if kind not in ("ogg", "opus", "aac", "ac3", "wma"):  # which do not say how long they were
        assert sum(lost.values()) + len(wave) / rate == pytest.approx(seconds, abs=0.1)


@pytest.mark.parametrize("kind", ["flac", "ogg", "opus", "m4a", "aac", "ac3", "mka"])
def test_damage_costs_what_is_damaged(tmp_path: Path, kind: str) -> None:
    bursts = hiss(12.0) * np.float32(np.arange(12 * 44100) // 4410 % 2)  # for which vorbis changes its block size
    path = write_kind(tmp_path / f"a.{kind}", bursts)
    seconds = decode.duration(path)
    data = bytearray(path.read_bytes())
    data[len(data) // 2 : len(data) // 2 + 64] = np.random.default_rng(3).bytes(64)
    path.write_bytes(data)
    whole, rate = decode.decode(path)
    assert len(whole) / rate > seconds - 2.1
    for part_s in (100.0, 3.0):
        parts, lost, _ = read_by_parts(path, part_s)
        assert abs(len(parts) - len(whole)) <= {"mka": 48, "ac3": 100}.get(kind, 1)
        assert set(lost) == {decode.UNREADABLE}
        assert len(parts) / rate + sum(lost.values()) == pytest.approx(seconds, abs=0.05)


@pytest.mark.parametrize("kind", ["mka", "webm", "wma", "m4a"])
def test_a_gap_in_the_time_stamps_is_told_and_no_sound_comes_twice(tmp_path: Path, kind: str) -> None:
    write_kind(tmp_path / f"gap.{kind}", sine(200, 8.0, 44100), gap_s=6.0)
    whole, _ = decode.decode(tmp_path / f"gap.{kind}")
    parts, lost, _ = read_by_parts(tmp_path / f"gap.{kind}", 3.0)
    slack = 312 if kind == "webm" else 0  # a part that begins in the gap loses what the decoder needs to settle
    assert 0 <= len(whole) - len(parts) <= slack
    half = len(whole) // 3
    np.testing.assert_allclose(parts[:half], whole[:half], atol=2e-3)
    np.testing.assert_allclose(parts[-half:], whole[-half:], atol=2e-2)
    assert lost == {decode.GAP: pytest.approx(6.0, abs=0.25)}


def test_the_track_that_sounds_is_taken_and_told(tmp_path: Path) -> None:
    import av

    path = tmp_path / "two.mka"
    with av.open(str(path), "w") as container:
        streams = [container.add_stream("flac", rate=RATE, layout="mono") for _ in range(2)]
        for stream, level_ in zip(streams, (0, 8000), strict=True):
            samples = (level_ * np.sin(np.arange(2 * RATE) / 10)).astype(np.int16)
            for at in range(0, 2 * RATE, 4000):
                frame = av.AudioFrame.from_ndarray(samples[None, at : at + 4000], format="s16", layout="mono")
                frame.rate, frame.pts = RATE, at
                container.mux(stream.encode(frame))
            container.mux(stream.encode(None))
    wave, _, told = read_by_parts(path, 10.0)
    assert level(wave) == pytest.approx(8000 / 32768 / 2**0.5, rel=0.02)
    assert told == ["sound track 2 of 2 was taken"]


def test_threads_that_read_slices_look_at_a_recording_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, looks, find_parts = write_kind(tmp_path / "a.wav", hiss(1.0)), [], decode.find_parts

    def slow(path: Path) -> object:
        looks.append(path)
        time.sleep(0.05)
        return find_parts(path)

    monkeypatch.setattr(decode, "find_parts", slow)
    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(decode.duration, [path] * 8)) == [1.0] * 8
    assert looks == [path]


def test_gsm_is_read_in_any_part(tmp_path: Path) -> None:
    soundfile.write(tmp_path / "a.wav", sine(200, 3.0, 8000), 8000, subtype="GSM610")
    whole, _ = decode.decode(tmp_path / "a.wav")
    assert len(whole) == pytest.approx(24000, abs=320)
    np.testing.assert_array_equal(read_by_parts(tmp_path / "a.wav", 1.1)[0], whole)


@pytest.mark.parametrize("kind", ["wav", "flac", "ogg", "mp3", "m4a", "aac", "webm"])
def test_a_name_without_a_suffix_is_judged_by_its_content(tmp_path: Path, kind: str) -> None:
    write_kind(tmp_path / f"a.{kind}", hiss(2.0)).rename(tmp_path / "take one")
    assert decode.duration(tmp_path / "take one") == pytest.approx(2.0, abs=0.2)
