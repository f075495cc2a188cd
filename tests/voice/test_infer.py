"""Conversion: any input, any length, no clicks, and a sentence for everything that is wrong."""

from __future__ import annotations

import dataclasses
import errno
import io
import itertools
import json
import logging
import os
import re
import resource
import shutil
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import faiss
import numpy as np
import pytest
import soundfile
import torch
from helpers import (
    NARROW,
    RATE,
    SteadyPitch,
    changed,
    make_generator,
    make_ssl_folder,
    noise,
    tone,
    voice_contents,
)
from huggingface_hub import constants
from torch import Tensor

from rvc_dist.choices import F0_METHODS, F0Spec
from rvc_dist.config import F0_HOP, FEATURE_RATE, RATES, DataConfig, EmbedderMix, ExtractConfig, Recipe
from rvc_dist.data import audio, decode
from rvc_dist.features.content import Embedder, load_embedder
from rvc_dist.models.generator import Generator
from rvc_dist.models.state_dict import from_upstream
from rvc_dist.models.torch_file import save_pth
from rvc_dist.voice import infer, sound_file, windows
from rvc_dist.voice.file import Voice
from rvc_dist.workspace import Shard, StageError

ALONE = Shard(0, 1)


pytestmark = pytest.mark.usefixtures("quick_pitch")


def convert_file(recipe: Recipe) -> audio.Wave:
    infer.run(recipe, ALONE)
    wave, _ = soundfile.read(recipe.infer.output, dtype="float32")
    result: audio.Wave = wave
    return result


def new_voice(recipe: Recipe, path: Path, **shape: Any) -> dict[str, Any]:
    """Write a voice made of `recipe` and return its contents."""
    contents = voice_contents(recipe, make_generator(recipe, **shape))
    save_pth(path, contents)
    return contents


def write_index(path: Path, vectors: Any) -> None:
    index = faiss.index_factory(vectors.shape[1], "IVF1,Flat")
    index.train(vectors if len(vectors) else noise(0.1, 768 * 100).reshape(-1, vectors.shape[1]))
    index.add(vectors)
    faiss.write_index(index, str(path))


# Windows


def blocks_of(wave: audio.Wave, size: int) -> Iterator[audio.Wave]:
    return (wave[at : at + size] for at in range(0, len(wave), size))


WINDOW = 200
"""Frames: the shortest window that a recipe allows."""
WINDOW_SAMPLES = WINDOW * F0_HOP
LENGTHS = [
    *(1, 159, 160, 800, WINDOW_SAMPLES - 1, WINDOW_SAMPLES, WINDOW_SAMPLES + 1, WINDOW_SAMPLES + 161),
    *(3 * WINDOW_SAMPLES, 4 * WINDOW_SAMPLES + 12345),
]


@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("block", [701, 64000])
def test_windows_tile_the_recording_and_carry_their_true_context(length: int, block: int) -> None:
    wave = noise(length / FEATURE_RATE, FEATURE_RATE)
    context = windows.CONTEXT * F0_HOP
    padded = np.pad(wave, (context, context + F0_HOP))
    at = 0
    cuts = list(windows.windows(blocks_of(wave, block), WINDOW))
    for piece, stands_for, last in cuts:
        assert len(piece) % F0_HOP == 0
        assert stands_for <= WINDOW_SAMPLES
        assert last or stands_for % F0_HOP == 0
        assert np.array_equal(piece, padded[at : at + len(piece)])
        assert len(piece) >= stands_for + 2 * context
        at += stands_for
    assert at == length
    assert [last for *_, last in cuts] == [False] * (len(cuts) - 1) + [True]


def test_windows_do_not_read_ahead_more_than_a_window() -> None:
    taken = 0

    def endless() -> Iterator[audio.Wave]:
        nonlocal taken
        while True:
            taken += 16000
            yield noise(1.0, FEATURE_RATE, seed=taken)

    done = 0
    for _, stands_for, _ in itertools.islice(windows.windows(endless(), WINDOW), 50):
        done += stands_for
        assert taken - done < WINDOW_SAMPLES + 2 * windows.CONTEXT * F0_HOP + 16000
    assert done > 50 * 0.7 * WINDOW_SAMPLES


def test_a_window_ends_where_it_is_quietest_and_leaves_room_for_the_fades() -> None:
    wave = np.ones(WINDOW_SAMPLES, np.float32)
    wave[170 * F0_HOP : 174 * F0_HOP] = 0.1  # four frames: what a fade around frame 172 covers
    wave[20 * F0_HOP : 40 * F0_HOP] = 0.0  # too early to count
    assert windows.quietest_frame(wave) == 172
    wave[170 * F0_HOP : 174 * F0_HOP] = 1.0
    wave[-2 * F0_HOP :] = 0.0  # too late: what is left would be shorter than its fades
    assert windows.quietest_frame(wave) == 150
    loud_end = np.linspace(0.1, 1.0, WINDOW_SAMPLES, dtype=np.float32)
    assert windows.quietest_frame(loud_end) == 150


class Repeater:
    """In the place of a Converter: repeats each 16 kHz sample, so that every window agrees with every other."""

    def __init__(self, factor: int) -> None:
        self.factor = factor
        self.rate = factor * FEATURE_RATE

    def __call__(self, wave: audio.Wave, at: int) -> audio.Wave:
        return np.repeat(wave, self.factor)

    def made(self, blocks: Iterator[audio.Wave], num_samples: int | None = None) -> audio.Wave:
        return np.concatenate(list(windows.convert(self, blocks, self.rate, WINDOW, num_samples)))


@pytest.mark.parametrize("length", LENGTHS)
def test_joined_windows_are_the_whole(length: int) -> None:
    wave = noise(length / FEATURE_RATE, FEATURE_RATE)
    made = Repeater(3).made(blocks_of(wave, 16000))
    assert len(made) == 3 * length
    np.testing.assert_allclose(made, np.repeat(wave, 3), atol=1e-6)


def test_the_length_is_exact_where_16_khz_cannot_tell_it(caplog: pytest.LogCaptureFixture) -> None:
    wave = noise(1.0, FEATURE_RATE)
    converter = Repeater(3)
    for wanted in (47998, 48000, 48002):
        made = converter.made(blocks_of(wave, 16000), wanted)
        assert len(made) == wanted
        shared = min(wanted, 48000)
        assert np.array_equal(made[:shared], np.repeat(wave, 3)[:shared])
    assert not caplog.records
    # A header that promises something else than a rounding error is not believed.
    assert len(converter.made(blocks_of(wave, 16000), 90000)) == 48000


def test_windows_that_disagree_are_faded_into_each_other() -> None:
    count = itertools.count()

    class Counter(Repeater):
        def __call__(self, wave: audio.Wave, at: int) -> audio.Wave:
            return np.full(len(wave) * self.factor, next(count), np.float32)

    length = 4 * WINDOW_SAMPLES
    made = Counter(3).made(blocks_of(noise(8.0, FEATURE_RATE), 16000))
    num_windows = next(count)
    assert num_windows >= 4
    assert len(made) == 3 * length
    assert (made[0], made[-1]) == (0.0, num_windows - 1)
    steps = np.diff(made)
    assert steps.min() >= -1e-6
    # A raised cosine over FADE frames of 10 ms: its steepest step is pi / 2 over its length.
    fade = windows.FADE * 480
    assert steps.max() == pytest.approx(np.pi / 2 / fade, rel=0.01)
    assert np.count_nonzero(steps) == pytest.approx((num_windows - 1) * fade, rel=0.01)


class LocalEmbedder(Embedder):
    """Features of each 20 ms alone, unlike mfcc, which knows the mean of its window."""

    name, width, weights_hash = "local", 768, "0"

    def encode(self, wave: Tensor) -> Tensor:
        frames = wave[:, : wave.shape[1] // 320 * 320].reshape(len(wave), -1, 320)
        return torch.nn.functional.pad(torch.fft.rfft(frames).abs().log1p(), (0, 768 - 161))


def speech_like(seconds: float) -> audio.Wave:
    """Noise in syllables at 16 kHz, with pauses."""
    time = np.arange(round(seconds * FEATURE_RATE)) / FEATURE_RATE
    swell = np.clip(np.sin(2 * np.pi * 3 * time), 0, 1) * (0.6 + 0.4 * np.sin(2 * np.pi * 0.37 * time))
    return (noise(seconds, FEATURE_RATE) * swell).astype(np.float32)


@pytest.mark.parametrize("guided", [False, True])
def test_joins_do_not_click(guided: bool, recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        "rvc_dist.features.extractor.load_embedder", lambda _config, _version, device: LocalEmbedder(device)
    )
    recipe = dataclasses.replace(recipe, model=dataclasses.replace(NARROW, pitch_guidance=guided))
    recipe = changed(recipe, "infer", model=str(tmp_path / "v.pth"))
    new_voice(recipe, tmp_path / "v.pth")
    monkeypatch.setattr(torch, "randn", torch.zeros)
    wave = speech_like(9.0)
    cuts: list[int] = []

    def made(window_s: float) -> audio.Wave:
        converter, window = infer.Converter.load(recipe), round(window_s * 100)
        pieces = windows.windows(blocks_of(wave, 16000), window)
        cuts[:] = np.cumsum([length for _, length, _ in pieces])[:-1] * 3 // 2
        return np.concatenate(list(windows.convert(converter, blocks_of(wave, 16000), RATE, window)))

    whole = made(30.0)
    assert not cuts
    joined = made(2.0)
    assert len(cuts) >= 4
    assert len(joined) == len(whole) == 9 * RATE
    assert whole.std() > 0.003
    steps = np.abs(np.diff(joined, n=2))  # a click is a jump: it shows in the second difference
    near = np.zeros(len(steps), bool)
    for cut in cuts:
        near[cut - 600 : cut + 600] = True
    assert steps[near].max() <= 1.1 * steps[~near].max()
    if guided:  # the sine begins anew in each window: levels can be compared, waves cannot
        assert joined[1:-1][near].std() == pytest.approx(whole[1:-1][near].std(), rel=0.1)
        return
    difference = (joined - whole)[1:-1]  # of the attention, which sees a window instead of all
    assert difference.std() < 0.03 * whole.std()
    assert difference[near].std() < 0.03 * whole.std()


# Inputs


@pytest.mark.parametrize(
    ("name", "rate", "channels", "seconds"),
    [
        ("mono.wav", 24000, 1, 1.0),
        ("stereo.wav", 44100, 2, 1.2345),
        ("phone.wav", 8000, 1, 1.0),
        ("studio.flac", 48000, 2, 1.00003),
        ("odd.wav", 11025, 1, 0.777),
        ("a.ogg", 44100, 1, 1.0),
        ("a.mp3", 44100, 2, 1.0),
        ("short.wav", 48000, 1, 0.05),
        ("one_sample.wav", 16000, 1, 1 / 16000),
    ],
)
def test_any_recording_is_converted_to_its_own_length(
    name: str, rate: int, channels: int, seconds: float, recipe: Recipe, tmp_path: Path
) -> None:
    path = tmp_path / name
    soundfile.write(path, np.stack([tone(seconds, rate)] * channels, axis=1), rate)
    made = convert_file(changed(recipe, "infer", input=str(path)))
    info = soundfile.info(recipe.infer.output)
    assert (info.samplerate, info.channels, info.subtype) == (RATE, 1, "PCM_16")
    assert len(made) == round(soundfile.info(path).frames * RATE / rate)
    assert np.abs(made).max() > 1e-3


def test_a_damaged_recording_is_converted_but_for_its_damage_and_says_so(
    recipe: Recipe, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "a.flac"
    soundfile.write(path, np.random.default_rng(0).normal(0, 0.1, 3 * RATE), RATE)
    data = bytearray(path.read_bytes())
    data[len(data) // 2 : len(data) // 2 + 64] = bytes(64)
    path.write_bytes(data)
    made = convert_file(changed(recipe, "infer", input=str(path)))
    assert 2.5 * RATE < len(made) < 3 * RATE
    assert f"infer: {path}: {3 - len(made) / RATE:.2f} s are missing (unreadable)" in caplog.text


def test_the_channels_are_averaged(recipe: Recipe, tmp_path: Path) -> None:
    wave = tone(0.5)
    for name, left, right in (("a.wav", wave, wave), ("b.wav", wave * 1.5, wave * 0.5)):
        soundfile.write(tmp_path / name, np.stack([left, right], axis=1), RATE, subtype="FLOAT")
    same, other = (convert_file(changed(recipe, "infer", input=str(tmp_path / n))) for n in ("a.wav", "b.wav"))
    np.testing.assert_allclose(other, same, atol=2e-3)


def test_an_mp3_is_read_without_clicks_between_blocks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "long.mp3"
    monkeypatch.setattr(decode, "FORGETFUL_BLOCK", 4 * 44100)
    soundfile.write(path, tone(10.0, 44100), 44100)
    with decode.opened(path) as recording:
        wave = np.concatenate(list(audio.stream(recording, FEATURE_RATE)))
    decoded, rate = decode.decode(path)
    assert rate == 44100
    np.testing.assert_allclose(wave, audio.resample(decoded, rate, FEATURE_RATE), atol=1e-5)


def test_a_wav_is_read_in_blocks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "long.wav"
    soundfile.write(path, tone(10.0, 44100), 44100)
    monkeypatch.setattr(decode, "BLOCK", 4 * 44100)
    with decode.opened(path) as recording:
        blocks = list(audio.stream(recording, FEATURE_RATE))
    assert max(map(len, blocks)) <= 1.1 * 4 * FEATURE_RATE
    whole = audio.resample(decode.decode(path)[0], 44100, FEATURE_RATE)
    np.testing.assert_allclose(np.concatenate(blocks), whole, atol=1e-5)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"hello, this is text\n" * 10, r"in\.wav: not readable as audio"),
        (b"", r"in\.wav: not readable as audio"),
        (None, r"in\.wav does not exist"),
    ],
)
def test_an_unreadable_input_is_named(content: bytes | None, message: str, recipe: Recipe, tmp_path: Path) -> None:
    Path(recipe.infer.input).unlink()
    if content is not None:
        Path(recipe.infer.input).write_bytes(content)
    with pytest.raises(StageError, match=r"infer\.input: .*" + message):
        infer.run(recipe, ALONE)
    assert not Path(recipe.infer.output).exists()


def test_samples_that_are_not_numbers_leave_no_output_behind(recipe: Recipe, tmp_path: Path) -> None:
    wave = tone(1.0)
    wave[12345] = np.nan
    soundfile.write(recipe.infer.input, wave, RATE, subtype="FLOAT")
    Path(recipe.infer.output).write_bytes(b"of an earlier conversion")
    with pytest.raises(StageError, match=r"infer\.input: .*not finite"):
        infer.run(recipe, ALONE)
    assert Path(recipe.infer.output).read_bytes() == b"of an earlier conversion"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["in.wav", "out.wav"]


# Outputs


def test_a_missing_output_folder_is_made(recipe: Recipe, tmp_path: Path) -> None:
    target = tmp_path / "a" / "b" / "out.flac"
    infer.run(changed(recipe, "infer", output=str(target)), ALONE)
    assert soundfile.info(target).format == "FLAC"
    assert [p.name for p in target.parent.iterdir()] == ["out.flac"]


def test_the_longest_name_and_a_link_in_the_place_of_a_half_written_file_do_no_harm(
    recipe: Recipe, tmp_path: Path
) -> None:
    target, mine = tmp_path / ("o" * 245 + ".wav"), tmp_path / "mine"
    mine.write_text("before")
    infer.run(changed(recipe, "infer", output=str(target)), ALONE)
    for name in (".out.wav.tmp", ".out.wav.raw.tmp"):  # such as anyone could guess
        (tmp_path / name).symlink_to(mine)
    before = os.umask(0o007)
    try:
        infer.run(recipe, ALONE)
    finally:
        os.umask(before)
    assert Path(recipe.infer.output).read_bytes() == target.read_bytes()
    assert Path(recipe.infer.output).stat().st_mode & 0o777 == 0o660
    assert mine.read_text() == "before"
    longer = changed(recipe, "infer", output=str(tmp_path / ("o" * 252 + ".wav")), model="none.pth")
    with pytest.raises(StageError, match=r"infer\.output: .*\.wav cannot be written \(File name too long\)"):
        infer.run(longer, ALONE)


@pytest.mark.parametrize(("first", "suffix"), [("disk", "wav"), ("memory", "wav"), ("memory", "flac")])
def test_an_output_beyond_a_limit_is_told_and_leaves_nothing(first, suffix, tmp_path, monkeypatch) -> None:
    """The samples are written twice: as they come, then turned down, by libsndfile, which names no error."""
    if first == "memory":
        monkeypatch.setattr(sound_file.tempfile, "TemporaryFile", lambda dir: io.BytesIO())
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    blocks = iter([noise(20000 / RATE)])
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (2000, hard))
        with pytest.raises(OSError, match=r"File too large; 0\.120 MB needed, \d+ MB free, no file may have") as caught:
            sound_file.write(tmp_path / f"a.{suffix}", blocks, RATE, 20000)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert caught.value.errno == errno.EFBIG
    assert caught.value.filename == str(tmp_path / f"a.{suffix}")
    assert not list(tmp_path.iterdir())


def test_an_impossible_output_is_refused_before_anything_is_loaded(recipe: Recipe, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    (tmp_path / "folder.wav" / "in.wav").mkdir(parents=True)
    nowhere = changed(recipe, "infer", model=str(tmp_path / "none.pth"))
    for output, message in [
        (tmp_path / "file" / "out.wav", r"infer\.output: .*out\.wav cannot be written"),
        (tmp_path / "folder.wav", r"infer\.output: .*in\.wav is a folder"),
        (tmp_path / "in.wav", r"infer\.output: .*in\.wav is infer\.input itself"),
    ]:
        with pytest.raises(StageError, match=message):
            infer.run(changed(nowhere, "infer", output=str(output)), ALONE)


def test_what_would_clip_is_turned_down_as_a_whole(tmp_path: Path) -> None:
    loud = tone(1.0, level=1.0) * 3
    assert np.abs(loud).max() > 2
    sound_file.write(tmp_path / "a.wav", iter([loud[:10000], loud[10000:]]), RATE)
    made, _ = soundfile.read(tmp_path / "a.wav", dtype="float32")
    np.testing.assert_allclose(made, loud * (sound_file.MAX_PEAK / np.abs(loud).max()), atol=1 / 32768)
    quiet = tone(1.0, level=0.1)
    sound_file.write(tmp_path / "b.wav", iter([quiet]), RATE)
    made, _ = soundfile.read(tmp_path / "b.wav", dtype="float32")
    np.testing.assert_allclose(made, quiet, atol=1 / 32768)


def test_the_seed_decides_the_noise(recipe: Recipe) -> None:
    first = convert_file(recipe)
    assert np.array_equal(convert_file(recipe), first)
    assert not np.array_equal(convert_file(changed(recipe, "infer", seed=5)), first)


def test_only_the_first_rank_converts(recipe: Recipe) -> None:
    infer.run(recipe, Shard(1, 2))
    assert not Path(recipe.infer.output).exists()


# Voices


@pytest.mark.parametrize("rate", sorted(RATES["v2"]))
@pytest.mark.parametrize("seconds", [0.05, 2.71828])
def test_a_voice_of_any_rate(rate: int, seconds: float, recipe: Recipe, tmp_path: Path) -> None:
    recipe = dataclasses.replace(recipe, data=DataConfig(sample_rate=rate))
    recipe = changed(recipe, "infer", model=str(tmp_path / "v.pth"), window_s=2.0)
    new_voice(recipe, tmp_path / "v.pth")
    soundfile.write(recipe.infer.input, tone(seconds), RATE)
    made = convert_file(recipe)
    assert soundfile.info(recipe.infer.output).samplerate == rate
    assert len(made) == round(round(seconds * RATE) / RATE * rate)
    # Sound to the very end: at 44.1 kHz a window is no whole number of frames, which must not show.
    assert np.abs(made[-rate // 50 :]).max() > 1e-4


def test_both_spellings_of_weight_norm_are_the_same_voice(recipe: Recipe, tmp_path: Path, voice_file: Path) -> None:
    old = torch.load(voice_file, weights_only=True)
    new = old | {"weight": from_upstream(old["weight"])}
    assert old["weight"].keys() != new["weight"].keys()
    save_pth(tmp_path / "new.pth", new)
    expected = convert_file(recipe)
    assert np.array_equal(convert_file(changed(recipe, "infer", model=str(tmp_path / "new.pth"))), expected)


def test_a_voice_of_another_tool(recipe: Recipe, tmp_path: Path, voice_file: Path) -> None:
    """Only what all tools write, the posterior still in it, a config whose speakers are not those of the table."""
    ours = torch.load(voice_file, weights_only=True)
    theirs = {k: ours[k] for k in ("weight", "config", "f0", "version")} | {"vocoder": "Default", "sr": "24k"}
    theirs["weight"]["enc_q.pre.bias"] = torch.zeros(16)
    theirs["config"][15] = 109
    save_pth(tmp_path / "theirs.pth", theirs)
    expected = convert_file(recipe)
    there = changed(recipe, "infer", model=str(tmp_path / "theirs.pth"), embedder_model="mfcc")
    assert np.array_equal(convert_file(there), expected)


def test_a_voice_without_pitch_needs_no_tracker(
    recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = dataclasses.replace(recipe, model=dataclasses.replace(NARROW, pitch_guidance=False))
    write_index(tmp_path / "i.index", noise(1.0, 768 * 50).reshape(-1, 768))
    recipe = changed(
        recipe, "infer", model=str(tmp_path / "v.pth"), index=str(tmp_path / "i.index"), index_rate=1.0, protect=0.0
    )
    assert new_voice(recipe, tmp_path / "v.pth")["f0"] == 0
    monkeypatch.setitem(F0_METHODS, "pyin", F0Spec("no_such_module:Pitch"))
    assert len(convert_file(recipe)) == RATE
    # What is voiced is not known, so protection does not apply: all frames are retrieved ones.
    converter = infer.Converter.load(recipe)
    assert (converter.feeder._kept_share(np.zeros(20), 10) == 1).all()


def test_a_recording_beyond_the_range_of_pitch_is_told(
    recipe: Recipe, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    for hz, told in ((40.0, "lower infer.f0_min"), (220.0, ""), (1500.0, "raise infer.f0_max")):
        caplog.clear()
        monkeypatch.setitem(F0_METHODS, "pyin", F0Spec(type("Steady", (SteadyPitch,), {"HZ": hz})))
        infer.run(changed(recipe, "infer", output=f"{recipe.run_dir}/{hz}.wav"), ALONE)
        warned = [r.getMessage() for r in caplog.records if "frames with a pitch" in r.getMessage()]
        assert len(warned) == bool(told)
        assert all(w.startswith("infer: 100% of the frames") and f"{told} if" in w for w in warned)


def test_a_v1_voice(recipe: Recipe, tmp_path: Path) -> None:
    recipe = dataclasses.replace(recipe, model=dataclasses.replace(NARROW, version="v1"))
    recipe = changed(recipe, "infer", model=str(tmp_path / "v.pth"))
    assert new_voice(recipe, tmp_path / "v.pth", content_channels=256)["version"] == "v1"
    assert len(convert_file(recipe)) == RATE


def test_the_speaker_counts(recipe: Recipe) -> None:
    first = convert_file(recipe)
    assert not np.array_equal(convert_file(changed(recipe, "infer", speaker=1)), first)
    with pytest.raises(StageError, match=r"infer\.speaker: got 2, this voice has speakers 0 to 1$"):
        infer.run(changed(recipe, "infer", speaker=2), ALONE)


@pytest.mark.parametrize(
    ("trained", "asked", "wanted"),
    [
        ([1], None, 1),  # only folder 1/ was there
        ([1], 0, "infer.speaker: got 0, this voice was trained on speaker 1"),
        ([2, 0], None, 0),
        ([2, 0], 2, 2),
        ([2, 0], 1, "infer.speaker: got 1, this voice was trained on speakers 0, 2"),
        (None, None, 0),  # of another tool
        (None, 108, 108),
        (None, 109, "infer.speaker: got 109, this voice has speakers 0 to 108"),
        ([109], None, "trained_speakers[0]: got 109, expected 0 to 108"),
        ([-1], None, "trained_speakers[0]: got -1, expected 0 to 108"),
        ([True], None, "trained_speakers[0]: got True, expected a whole number"),
        ("0", None, "trained_speakers: got '0', expected a list"),
    ],
)
def test_only_trained_speakers_speak(
    recipe: Recipe, tmp_path: Path, trained: Any, asked: int | None, wanted: int | str, caplog: pytest.LogCaptureFixture
) -> None:
    contents = voice_contents(recipe, make_generator(recipe, num_speakers=109))
    save_pth(tmp_path / "v.pth", damaged(contents, trained_speakers=trained))
    recipe = changed(recipe, "infer", model=str(tmp_path / "v.pth"), speaker=asked)
    if isinstance(wanted, str):
        with pytest.raises(StageError, match=re.escape(wanted)):
            infer.Converter.load(recipe)
        return
    with caplog.at_level("INFO"):
        assert infer.Converter.load(recipe).speaker == wanted
    assert ("infer: speaker 0 of those trained (0, 2)" in caplog.text) == (trained == [2, 0] and asked is None)


ALICE, BOB = {"id": 1, "name": "alice", "f0_median": 210.0}, {"id": 5, "name": "7"}


@pytest.mark.parametrize(
    ("change", "asked", "wanted"),
    [
        ({"speaker_info": [ALICE, BOB]}, "alice", (1, 210.0)),
        ({"speaker_info": [ALICE, BOB]}, "7", (5, 150.0)),  # a name of digits, where no such id was trained
        ({"speaker_info": [ALICE, BOB]}, 5, (5, 150.0)),
        ({"speaker_info": [ALICE, BOB]}, None, (1, 210.0)),
        ({"speaker_info": [ALICE, BOB], "trained_speakers": [5, 7]}, "7", (7, 150.0)),
        (
            {"speaker_info": [ALICE], "trained_speakers": [0, 1]},
            "bob",
            "bob, this voice was trained on speakers 0, 1 (a",
        ),
        ({"speaker_info": [BOB, BOB | {"id": 2}]}, "7", "7 is the name of the speakers 2 (7), 5 (7); give an id"),
        ({"speaker_info": [BOB | {"id": 109}]}, None, "trained_speakers[0]: got 109, expected 0 to 108"),
        ({"speaker_info": [BOB | {"name": "a\nb"}]}, None, "speaker_info[0].name: got 'a\\nb', expected a short text"),
        ({"speaker_info": {"alice": 1}}, None, "speaker_info: got {'alice': 1}, expected a list"),
        ({"speaker_info": [[1, "alice"]]}, None, "speaker_info[0]: got [1, 'alice'], expected keys"),
        ({"unvoiced": "clipped"}, None, "unvoiced: got 'clipped', expected one of zero, interpolated"),
        ({"f0_median": float("nan")}, None, "f0_median: got nan, expected 0.0 to 10000.0"),
    ],
)
def test_a_voice_file_names_its_speakers_and_its_pitch(
    change: dict[str, Any], asked: Any, wanted: tuple[int, float] | str, recipe: Recipe, tmp_path: Path
) -> None:
    contents = voice_contents(recipe, make_generator(recipe, num_speakers=109))
    told = {"trained_speakers": None, "f0_median": 150.0, "unvoiced": "interpolated"} | change
    save_pth(tmp_path / "v.pth", damaged(contents, **told))
    if isinstance(wanted, str):
        with pytest.raises(StageError, match=re.escape(wanted)):
            Voice.load(tmp_path / "v.pth", torch.device("cpu")).speaker(asked)
        return
    voice = Voice.load(tmp_path / "v.pth", torch.device("cpu"))
    assert (voice.speaker(asked), voice.median_f0(voice.speaker(asked))) == wanted
    assert voice.unvoiced == "interpolated"


def damaged(contents: dict[str, Any], **values: Any) -> dict[str, Any]:
    return {k: v for k, v in {**contents, **values}.items() if v is not None}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"weight": None}, "is not a voice file: expected `weight` and `config`"),
        ({"weight": None, "model": {}}, "it looks like a training checkpoint"),
        ({"weight": {}}, r"holds no voice that can be built here \(it has no 'enc_p.emb_phone.weight'\)"),
        ({"weight": 3}, "holds no voice that can be built here"),
        ({"config": [1, 2]}, r"got 2 entries, expected 18"),
        ({"config": 3}, "holds no voice that can be built here"),
        ({"config": {6: 10**9}}, "config.num_layers: got 1000000000, expected 1 to 64"),
        ({"config": {4: 10**5}}, r"its config asks for more weights than the \d+ that it holds"),
        ({"config": {3: True}}, "config.hidden_channels: got True"),
        ({"config": {5: 3}}, "config.num_heads: got 3, which no network"),
        ({"config": {10: [3, 7, 10]}}, r"config.resblock_kernels: got \[3, 7, 10\], which"),
        ({"config": {11: [[1, 10**9]] * 3}}, r"config.resblock_dilations\[0\]\[1\]: got 1000000000"),
        ({"config": {12: [6, 10, 2, 2]}}, r"does not fit its own config: .*noise_convs"),
        ({"config": {12: [10, 6, 2, 4]}}, "give 480 samples a frame, 24000 Hz needs 240"),
        ({"config": {14: [20, 12, 4, 3]}}, r"config.upsample_kernels: got \[20, 12, 4, 3\], which"),
        ({"config": {17: 2**70}}, "config.sample_rate: got"),
        ({"version": "v9"}, "version: got 'v9', expected one of v1, v2"),
        ({"f0": 0}, r"does not fit its own config: .*(emb_pitch|noise_convs|m_source)"),
        ({"vocoder": "WaveNet"}, "vocoder: got 'wavenet'"),
    ],
)
def test_a_voice_that_cannot_be_built_is_refused(
    change: dict[str, Any], message: str, recipe: Recipe, tmp_path: Path, voice_file: Path
) -> None:
    contents = torch.load(voice_file, weights_only=True)
    if isinstance(entries := change.get("config"), dict):
        change = {"config": [entries.get(i, entry) for i, entry in enumerate(contents["config"])]}
    save_pth(tmp_path / "v.pth", damaged(contents, **change))
    with pytest.raises(StageError, match=rf"infer\.model: .*{message}"):
        infer.run(changed(recipe, "infer", model=str(tmp_path / "v.pth")), ALONE)


def test_a_voice_is_loaded_while_another_thread_builds_something_larger(monkeypatch, voice_file: Path) -> None:
    build = Generator.__init__

    def beside(*arguments: Any, **options: Any) -> None:
        other = threading.Thread(target=torch.nn.Linear, args=(2000, 2000))
        other.start()
        other.join()
        build(*arguments, **options)

    monkeypatch.setattr(Generator, "__init__", beside)
    Voice.load(voice_file, torch.device("cpu"))


def test_a_damaged_voice_file_is_refused(recipe: Recipe, tmp_path: Path, voice_file: Path) -> None:
    whole = voice_file.read_bytes()
    path = tmp_path / "v.pth"
    for content in (b"", b"\x80", b"hello", b"PK\x03\x04", b"\x80\x02cos\nsystem\n.", whole[:1000], whole[:-1000]):
        path.write_bytes(content)
        with pytest.raises(StageError, match=r"infer\.model: .*v\.pth is not a voice file") as caught:
            infer.run(changed(recipe, "infer", model=str(path)), ALONE)
        assert "weights_only" not in str(caught.value)
    path.unlink()
    with pytest.raises(StageError, match=r"infer\.model: .*v\.pth does not exist"):
        infer.run(changed(recipe, "infer", model=str(path)), ALONE)
    with pytest.raises(StageError, match=r"infer\.model: .*tiny_last\.pth does not exist"):
        infer.run(changed(recipe, "infer", model=None), ALONE)


def test_a_voice_that_gives_no_numbers_is_refused(recipe: Recipe, tmp_path: Path, voice_file: Path) -> None:
    contents = torch.load(voice_file, weights_only=True)
    contents["weight"]["emb_g.weight"][0, 0] = torch.nan
    save_pth(tmp_path / "v.pth", contents)
    with pytest.raises(StageError, match="not finite"):
        infer.run(changed(recipe, "infer", model=str(tmp_path / "v.pth")), ALONE)
    assert not Path(recipe.infer.output).exists()


def test_the_encoder_must_fit_the_voice(recipe: Recipe, tmp_path: Path) -> None:
    new_voice(recipe, tmp_path / "v.pth", content_channels=256)
    recipe = changed(recipe, "infer", model=str(tmp_path / "v.pth"))
    with pytest.raises(StageError, match=r"mfcc gives features 768 wide, the voice was trained on 256 \(mfcc\)"):
        infer.run(recipe, ALONE)
    with pytest.raises(StageError, match=r"infer\.embedder_model: .*/none is no folder"):
        infer.run(changed(recipe, "infer", embedder_model=str(tmp_path / "none")), ALONE)


def warnings(caplog: pytest.LogCaptureFixture) -> str:
    return "\n".join(r.getMessage() for r in caplog.records if r.levelno >= logging.WARNING)


def test_other_weights_of_the_encoder_are_refused_unless_they_are_asked_for(
    recipe: Recipe, tmp_path: Path, voice_file: Path, caplog: pytest.LogCaptureFixture
) -> None:
    infer.run(recipe, ALONE)
    infer.run(changed(recipe, "infer", embedder_model="mfcc"), ALONE)
    assert not warnings(caplog)
    save_pth(tmp_path / "v.pth", torch.load(voice_file, weights_only=True) | {"embedder_hash": "0" * 16})
    recipe = changed(recipe, "infer", model=str(tmp_path / "v.pth"))
    differ = (
        r"infer\.embedder_model: the voice was trained with mfcc \(weights 0{16}\), not with mfcc \(weights \w{16}\)"
    )
    with pytest.raises(StageError, match=differ + r"; .*--infer\.embedder_model FOLDER"):
        infer.run(recipe, ALONE)
    infer.run(changed(recipe, "infer", embedder_model="mfcc"), ALONE)
    assert re.fullmatch(differ + ": the words may come out wrong", warnings(caplog))


def test_a_voice_whose_encoder_cannot_be_had_is_not_sent_to_another(
    recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    contents = new_voice(recipe, tmp_path / "v.pth")
    save_pth(tmp_path / "v.pth", contents | {"embedder_model": "spin", "embedder_hash": "00ff"})
    with pytest.raises(StageError, match=r"--infer\.embedder_model FOLDER \(the voice .* spin \(weights 00ff\)\)$"):
        infer.run(changed(recipe, "infer", model=str(tmp_path / "v.pth")), ALONE)


def test_a_tracker_that_cannot_be_had_is_no_matter_of_the_encoder(recipe: Recipe) -> None:
    lost = changed(changed(recipe, "extract", f0_model="/none/rmvpe.pt"), "infer", f0_method="rmvpe")
    with pytest.raises(StageError, match=r"^extract\.f0_model: (?!.*the voice was trained)"):
        infer.run(lost, ALONE)


def test_the_mix_of_layers_comes_from_the_voice_alone(
    recipe: Recipe, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    make_ssl_folder(tmp_path / "enc", "Hubert", num_layers=3)
    (tmp_path / "enc").rename(tmp_path / "moved")
    moved = load_embedder(ExtractConfig(embedder_model=str(tmp_path / "moved")), "v2", torch.device("cpu"))
    contents = new_voice(recipe, tmp_path / "v.pth", content_channels=16)
    mix = {"embedder_mix": {"layers": [1, 2], "ratio": 0.25}}
    contents |= {"embedder_model": str(tmp_path / "enc"), "embedder_hash": moved.weights_hash} | mix
    save_pth(tmp_path / "v.pth", contents)
    recipe = changed(recipe, "infer", model=str(tmp_path / "v.pth"))
    with pytest.raises(
        StageError, match=r"enc is no folder \(the voice was trained with .*, 0\.25 of layers 1, 2 mixed"
    ):
        infer.run(recipe, ALONE)
    recipe = changed(recipe, "infer", embedder_model=str(tmp_path / "moved"))
    # The recipe's own mix, of the next run perhaps, has no say.
    for other in (EmbedderMix(), EmbedderMix((0,), 1.0)):
        converter = infer.Converter.load(changed(recipe, "extract", embedder_mix=other))
        assert converter.extractor.embedder.mix == EmbedderMix((1, 2), 0.25)
    infer.run(recipe, ALONE)
    assert not warnings(caplog)
    with pytest.raises(StageError, match=r"infer\.model: the voice's embedder_mix\.layers: got \[1, 2\] with mfcc"):
        infer.run(changed(recipe, "infer", embedder_model="mfcc"), ALONE)
    save_pth(tmp_path / "v.pth", contents | {"embedder_mix": {"layers": [2, 4], "ratio": 0.25}})
    with pytest.raises(StageError, match=r"the voice's embedder_mix\.layers: got \[2, 4\], .*moved has 3 layers"):
        infer.run(recipe, ALONE)
    save_pth(tmp_path / "v.pth", contents | {"embedder_mix": "all"})
    with pytest.raises(StageError, match=r"infer\.model: .*embedder_mix: got 'all', expected keys such as layers"):
        infer.run(recipe, ALONE)


# Pitch, index and protection: what reaches the generator


@pytest.fixture
def heard(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Tensor]]:
    """The inputs of every call of Generator.infer."""
    calls: list[dict[str, Tensor]] = []
    original = Generator.infer

    def spy(self: Generator, content: Tensor, lengths: Tensor, coarse: Any, f0: Any, *others: Any) -> Tensor:
        calls.append({"content": content, "coarse": coarse, "f0": f0})
        return original(self, content, lengths, coarse, f0, *others)

    monkeypatch.setattr(Generator, "infer", spy)
    return calls


def test_twelve_semitones_double_the_pitch(recipe: Recipe, heard: list[dict[str, Tensor]]) -> None:
    for pitch in (0.0, 12.0, -12.0, 7.0):
        infer.run(changed(recipe, "infer", pitch=pitch), ALONE)
    plain, up, down, fifth = (call["f0"] for call in heard)
    voiced = plain > 0
    assert voiced.any()
    assert not voiced.all()  # the context around the recording is silent
    assert set(plain[voiced].tolist()) == {220.0}
    torch.testing.assert_close(up, 2 * plain)
    torch.testing.assert_close(down, plain / 2)
    torch.testing.assert_close(fifth, plain * 2 ** (7 / 12))
    # 220, 440 and 110 Hz are 308.0, 549.6 and 164.5 mel; row 1 is at 77.76 mel and a row is 986.65 / 254 = 3.884.
    rows = [sorted(set(call["coarse"][voiced].tolist())) for call in heard[:3]]
    assert rows == [[60], [122], [23]]
    assert set(heard[0]["coarse"][~voiced].tolist()) == {1}


def half_silent(recipe: Recipe) -> Recipe:
    """One second of tone, then one of silence."""
    soundfile.write(recipe.infer.input, np.concatenate([tone(1.0), np.zeros(RATE, np.float32)]), RATE)
    return recipe


@pytest.mark.parametrize(("protect", "kept"), [(0.0, 0.0), (0.33, 0.33), (0.5, 1.0)])
def test_the_index_is_mixed_in_and_unvoiced_frames_are_protected(
    protect: float, kept: float, recipe: Recipe, tmp_path: Path, heard: list[dict[str, Tensor]]
) -> None:
    far = np.full((8, 768), 3.0, np.float32)  # eight neighbours at one place: what is retrieved is that place
    write_index(tmp_path / "i.index", far)
    recipe = half_silent(changed(recipe, "infer", protect=protect))
    infer.run(recipe, ALONE)
    infer.run(changed(recipe, "infer", index=str(tmp_path / "i.index"), index_rate=0.5), ALONE)
    plain, mixed = (call["content"][0] for call in heard)
    voiced = heard[0]["f0"][0] > 0
    expected = 0.5 * torch.full_like(plain, 3.0) + 0.5 * plain
    inside = torch.zeros_like(voiced)
    inside[110:190], inside[210:290] = True, True  # away from where sound begins and ends
    for where, share in ((inside & voiced, 1.0), (inside & ~voiced, kept)):
        assert where.sum() >= 70
        torch.testing.assert_close(mixed[where], share * expected[where] + (1 - share) * plain[where])


@pytest.mark.parametrize(
    ("told", "key", "drawn"),
    [
        ({"unvoiced": "interpolated"}, "zero", True),  # what the voice says goes before the recipe
        ({"unvoiced": "zero"}, "interpolated", False),
        ({"unvoiced": None}, "interpolated", True),  # of another tool, which does not say
        ({"unvoiced": None}, "zero", False),
        ({"unvoiced": None, "f0_median": 200.0}, "zero", True),  # of rvc-next
    ],
)
def test_a_voice_gets_the_pitch_of_unvoiced_frames_that_it_was_trained_with(
    told: dict[str, Any], key: str, drawn: bool, recipe: Recipe, tmp_path: Path, heard: list[dict[str, Tensor]]
) -> None:
    """Drawn on after it was decided which frames are protected from the index."""
    contents = voice_contents(recipe, make_generator(recipe, num_speakers=2))
    save_pth(tmp_path / "v.pth", damaged(contents, **told))
    write_index(tmp_path / "i.index", np.full((8, 768), 3.0, np.float32))
    index = {"index": str(tmp_path / "i.index"), "index_rate": 1.0, "protect": 0.0}
    recipe = half_silent(changed(recipe, "infer", model=str(tmp_path / "v.pth"), **index))
    infer.run(changed(recipe, "extract", unvoiced=key), ALONE)
    f0, coarse, content = (heard[0][name][0] for name in ("f0", "coarse", "content"))
    assert f0[150] == 220.0
    assert (f0[250], coarse[250]) == ((220.0, 60) if drawn else (0.0, 1))
    assert (content[150] == 3.0).all()
    assert (content[250] != 3.0).any()
    soundfile.write(recipe.infer.input, np.zeros(RATE, np.float32), RATE)  # nothing voiced at all
    infer.run(changed(recipe, "extract", unvoiced=key), ALONE)
    assert not heard[1]["f0"].any()


def test_index_rate_zero_is_no_index_and_one_gives_back_what_it_knows(
    recipe: Recipe, tmp_path: Path, heard: list[dict[str, Tensor]], monkeypatch: pytest.MonkeyPatch
) -> None:
    infer.run(recipe, ALONE)
    known = heard[0]["content"][0, ::2].numpy()
    write_index(tmp_path / "i.index", np.ascontiguousarray(known))
    recipe = changed(recipe, "infer", index=str(tmp_path / "i.index"), protect=0.5)
    infer.run(changed(recipe, "infer", index_rate=1.0), ALONE)
    # Every frame is in the index: an exact hit, without division by zero.
    torch.testing.assert_close(heard[1]["content"], heard[0]["content"], rtol=1e-4, atol=1e-4)
    (tmp_path / "i.index").unlink()
    infer.run(changed(recipe, "infer", index_rate=0.0), ALONE)
    assert torch.equal(heard[2]["content"], heard[0]["content"])


def test_the_index_must_fit_the_voice(recipe: Recipe, tmp_path: Path) -> None:
    path = tmp_path / "i.index"
    recipe = changed(recipe, "infer", index=str(path), index_rate=0.5)
    with pytest.raises(StageError, match=r"infer\.index: .*i\.index does not exist"):
        infer.run(recipe, ALONE)
    path.write_text("hello")
    with pytest.raises(StageError, match=r"infer\.index: .*i\.index is no index for this voice: it is cut short"):
        infer.run(recipe, ALONE)
    write_index(path, noise(1.0, 256 * 50).reshape(-1, 256))
    with pytest.raises(
        StageError, match=r"i\.index is no index for this voice: it holds features 256 wide, expected 768"
    ):
        infer.run(recipe, ALONE)
    write_index(path, np.zeros((0, 768), np.float32))
    with pytest.raises(StageError, match=r"i\.index is no index for this voice: it is empty"):
        infer.run(recipe, ALONE)


def test_a_voice_of_the_run_takes_the_index_of_the_run(
    recipe: Recipe, voice_file: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, logger="rvc_dist")
    run_dir = Path(recipe.run_dir)
    for folder in ("voice", "index"):
        (run_dir / folder).mkdir(parents=True)
    for name in ("tiny_last.pth", "tiny_best.pth"):
        shutil.copyfile(voice_file, run_dir / "voice" / name)
    write_index(run_dir / "index" / "added.index", noise(1.0, 768 * 50).reshape(-1, 768))
    (run_dir / "index" / "report.json").write_text('{"file": "added.index", "stamp": "0"}')
    recipe = changed(recipe, "infer", index_rate=0.5)
    for model, has_index in [(None, True), (str(run_dir / "voice" / "tiny_best.pth"), True), (str(voice_file), False)]:
        caplog.clear()
        infer.run(changed(recipe, "infer", model=model), ALONE)
        assert ("added.index" in caplog.text) is has_index
        assert ("infer.index_rate has no effect" in caplog.text) is not has_index

    shutil.copyfile(run_dir / "index" / "added.index", run_dir / "index" / "added_spkid1.index")
    report = {"file": "added.index", "stamp": "0", "speakers": [{"speaker": 1, "file": "added_spkid1.index"}]}
    (run_dir / "index" / "report.json").write_text(json.dumps(report))
    foreign = {"model": str(voice_file), "index": str(run_dir / "index")}
    for given, speaker in itertools.product(({"model": None}, foreign), (0, 1)):
        caplog.clear()
        infer.run(changed(recipe, "infer", speaker=speaker, **given), ALONE)
        assert f"/{'added_spkid1' if speaker else 'added'}.index" in caplog.text


@pytest.mark.parametrize("name", ["someone/evil", "evil", "x/" + "y" * 200])
def test_nothing_is_fetched_because_a_voice_file_names_it(
    recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    asked: list[str] = []

    def hub_file(repository: str, *_: str) -> Path:
        asked.append(repository)
        raise FileNotFoundError("no network")

    monkeypatch.setattr("rvc_dist.features.content.hub_file", hub_file)
    contents = new_voice(recipe, tmp_path / "v.pth")
    save_pth(tmp_path / "v.pth", contents | {"embedder_model": name})
    recipe = changed(recipe, "infer", model=str(tmp_path / "v.pth"))
    with pytest.raises(StageError, match=r"names the encoder '.*', which is neither published .* nor a folder here"):
        infer.Converter.load(recipe)
    assert asked == []
    for said in (changed(recipe, "infer", embedder_model=name), changed(recipe, "extract", embedder_model=name)):
        with pytest.raises(StageError, match="cannot be had"):
            infer.Converter.load(said)
    assert set(asked) == {name}
