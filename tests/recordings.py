"""Recordings of every format for tests, and damaged ones."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import soundfile


def write_av(path: Path, wave: Any, codec: str, rate: int, layout: str = "stereo", gap_s: float = 0.0) -> None:
    """Encode [S, channels] (or [S] in every channel) with ffmpeg's encoders, by PyAV.

    Time stamps jump by `gap_s` in its middle.
    """
    import av

    num_channels = av.AudioLayout(layout).nb_channels
    samples = wave if wave.ndim == 2 else np.stack([wave] * num_channels, axis=1)
    options: dict[str, Any] = {"format": "mp4"} if path.suffix == ".alac" else {}
    with av.open(str(path), "w", **options) as container:
        stream = container.add_stream(codec, rate=rate, layout=layout, options={"strict": "experimental"})
        if codec == "wmav2":
            stream.bit_rate = 128000
        stream.codec_context.open()
        # In one plane: PyAV counts nine of eight channels that lie apart.
        packed = np.ascontiguousarray(samples, np.float32).reshape(1, -1)
        frame = av.AudioFrame.from_ndarray(packed, format="flt", layout=layout)
        frame.rate = rate
        resampler = av.AudioResampler(
            format=stream.format.name, layout=layout, rate=rate, frame_size=stream.frame_size or 1024
        )
        at = 0
        for part in [*resampler.resample(frame), *resampler.resample(None)]:
            part.pts, at = at, at + part.samples
            for packet in stream.encode(part):
                if gap_s and packet.pts * packet.time_base > len(wave) / rate / 2:
                    packet.pts += round(gap_s / packet.time_base)
                    packet.dts = packet.pts
                container.mux(packet)
        if gap_s:
            return
        container.mux(stream.encode(None))


def write_every_kind(folder: Path, wave: Any, rate: int) -> list[Path]:
    """`wave` [S] in each format that libsndfile or ffmpeg writes."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, subtype in (("a.wav", "PCM_16"), ("b.wav", "PCM_24"), ("c.wav", "FLOAT"), ("d.wav", "PCM_U8")):
        soundfile.write(folder / name, wave, rate, subtype=subtype)
    for name in ("a.flac", "a.ogg", "a.mp3", "a.aiff"):
        soundfile.write(folder / name, wave, rate)
    soundfile.write(folder / "a.opus", wave, rate, format="OGG", subtype="OPUS")
    kinds = {"a.m4a": "aac", "b.m4a": "alac", "a.aac": "aac", "a.webm": "libopus", "a.ac3": "ac3", "a.wma": "wmav2"}
    for name, codec in kinds.items():
        write_av(folder / name, wave, codec, rate)
    return sorted(folder.iterdir())


def damaged(good: list[Path], folder: Path, count: int, seed: int) -> Iterator[Path]:
    """`count` damaged variants of the files in `good`, the same for the same seed."""
    folder.mkdir(parents=True, exist_ok=True)
    rng = random.Random(seed)
    kinds: list[Callable[[random.Random, bytearray], bytearray]] = [
        _cut, _flip_header, _flip_anywhere, _absurd_sizes, _zeros, _noise, _doubled, _junk_first, _only_magic,
    ]  # fmt: skip
    suffixes = sorted({path.suffix for path in good})
    for i in range(count):
        source, kind = good[i % len(good)], kinds[i // len(good) % len(kinds)]
        data = kind(rng, bytearray(source.read_bytes()))
        suffix = rng.choice(suffixes) if rng.random() < 0.2 else source.suffix
        path = folder / f"{i:03d}{kind.__name__}_{source.stem}{source.suffix[1:]}{suffix}"
        path.write_bytes(data)
        yield path


def _cut(rng: random.Random, data: bytearray) -> bytearray:
    return data[: rng.randrange(1, len(data))]


def _flip(rng: random.Random, data: bytearray, count: int, end: int) -> bytearray:
    for _ in range(count):
        data[rng.randrange(min(end, len(data)))] ^= 1 << rng.randrange(8)
    return data


def _flip_header(rng: random.Random, data: bytearray) -> bytearray:
    return _flip(rng, data, rng.randrange(1, 12), 128)


def _flip_anywhere(rng: random.Random, data: bytearray) -> bytearray:
    return _flip(rng, data, rng.randrange(1, 200), len(data))


def _absurd_sizes(rng: random.Random, data: bytearray) -> bytearray:
    for _ in range(rng.randrange(1, 4)):
        at = rng.randrange(4, 64)
        data[at : at + 4] = rng.choice([b"\xff\xff\xff\xff", b"\xff\xff\xff\x7f", b"\x7f\xff\xff\xff", bytes(4)])
    return data


def _zeros(rng: random.Random, data: bytearray) -> bytearray:
    at = rng.randrange(len(data))
    data[at : at + len(data) // 3] = bytes(len(data[at : at + len(data) // 3]))
    return data


def _noise(rng: random.Random, data: bytearray) -> bytearray:
    return data[:16] + bytearray(rng.randbytes(len(data)))


def _doubled(rng: random.Random, data: bytearray) -> bytearray:
    return data + data[rng.randrange(len(data)) :]


def _junk_first(rng: random.Random, data: bytearray) -> bytearray:
    return bytearray(rng.randbytes(rng.randrange(1, 4096))) + data


def _only_magic(rng: random.Random, data: bytearray) -> bytearray:
    return data[: rng.randrange(1, 48)]


_MADE_RARELY = ("au", "caf", "aac", "ac3", "wma", "mka")
_MADE_BY_FFMPEG = {"m4a": "aac", "aac": "aac", "ac3": "ac3", "wma": "wmav2", "mka": "flac"}


def write_made(folder: Path, seed: int) -> dict[str, float | None]:
    """A dataset of a few recordings of every kind, level and fault, the same for the same seed.

    Returns the seconds that each holds; None where damage leaves that open.
    """
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(seed)
    held: dict[str, float | None] = {}
    for i in range(rng.integers(2, 5)):
        rate = int(rng.choice([8000, 16000, 22050, 24000, 44100, 48000, 96000]))
        wave = _made_wave(rng, rate)
        kinds = {"wav": 0.3, "flac": 0.15, "ogg": 0.1, "mp3": 0.15, "m4a": 0.1} | dict.fromkeys(_MADE_RARELY, 0.05)
        kind = str(rng.choice(list(kinds), p=[share / sum(kinds.values()) for share in kinds.values()]))
        path = folder / f"{i}.{kind}"
        codec = _MADE_BY_FFMPEG.get(kind)
        if kind == "wav":
            soundfile.write(path, wave, rate, subtype=str(rng.choice(["PCM_16", "PCM_24", "FLOAT"])))
        else:
            wave = wave[:, :2]
            if kind != "flac" and rate == 96000:
                wave, rate = wave[::2], 48000
            if codec:
                rate = 48000 if kind == "ac3" else max(rate, 16000)
                write_av(path, wave[:, 0], codec, rate)
            else:
                soundfile.write(path, np.clip(wave, -1, 1), rate)
        held[path.name] = len(wave) / rate
        if rng.random() < 0.15:
            path.write_bytes(path.read_bytes() * 2)
            held[path.name] = 2 * len(wave) / rate
        if rng.random() < 0.15:
            data = bytearray(path.read_bytes())
            damage = [_cut, _flip_anywhere, _zeros][rng.integers(3)]
            path.write_bytes(damage(random.Random(int(rng.integers(1 << 30))), data))
            held[path.name] = None
    return held


def _made_wave(rng: np.random.Generator, rate: int) -> Any:
    """[S, channels]: bursts of noise and pauses of random length and level, some of them beyond full scale."""
    parts = []
    for _ in range(rng.integers(1, 7)):
        samples = round(float(rng.uniform(0.05, 3.0)) * rate)
        level_db = float(
            rng.choice([-200.0, -70.0, -50.0, -30.0, -20.0, -6.0, 12.0], p=[0.2, 0.1, 0.1, 0.2, 0.2, 0.17, 0.03])
        )
        burst = rng.normal(0.0, 0.3 * 10 ** (level_db / 20), samples)
        parts.append(burst * np.abs(np.sin(np.arange(samples) / rate * 2 * np.pi * 3)))
    mono = np.concatenate(parts).astype(np.float32) * np.float32(10 ** (float(rng.choice([0, 0, -20, -35])) / 20))
    gains = {0: [1.0], 1: [1.0, 0.7], 2: [1.0, -0.95], 3: [0, 0, 0.3, 0, 0, 0.01]}[int(rng.integers(4))]
    return mono[:, None] * np.float32(gains)
