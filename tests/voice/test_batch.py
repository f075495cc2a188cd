"""What a conversion takes and gives: folders, ranks, resumption, kinds of files, channels, loudness and pitch."""

from __future__ import annotations

import dataclasses
import logging
import os
import re
import threading
from pathlib import Path
from typing import Any

import librosa
import numpy as np
import pytest
import soundfile
import torch
from helpers import NARROW, RATE, SteadyPitch, changed, make_generator, noise, tone, voice_contents

from rvc_dist.choices import F0_METHODS, SOUNDS, F0Spec
from rvc_dist.config import F0_HOP, FEATURE_RATE, PreprocessConfig, Recipe, recipe_of
from rvc_dist.data import decode
from rvc_dist.models.generator import Generator
from rvc_dist.models.torch_file import save_pth
from rvc_dist.screen import AUDIO, ProgressBar
from rvc_dist.train import conversion
from rvc_dist.voice import infer, pitch, recordings, sound_file, windows
from rvc_dist.voice.loudness import Loudness, matched
from rvc_dist.workspace import Shard, StageError

pytestmark = pytest.mark.usefixtures("quick_pitch")
ALONE = Shard(0, 1)


def write_recordings(folder: Path, *names: str) -> Path:
    """A short tone of each name, each of another length."""
    for i, name in enumerate(names):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        kind = Path(name).suffix[1:].replace("txt", "wav")
        soundfile.write(folder / name, tone(0.2 + 0.05 * i, 16000), 16000, format=kind)
    return folder


def batch(recipe: Recipe, folder: Path, output: str | Path = "out", **values: Any) -> Recipe:
    return changed(recipe, "infer", input=str(folder), output=str(folder.parent / output), **values)


def files_in(folder: Path) -> list[str]:
    return sorted(str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file())


# Which recordings, and where to


def test_a_folder_is_converted_into_a_folder(recipe: Recipe, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    songs = write_recordings(tmp_path / "songs", "a.wav", "b/c.d.flac", ".hidden/x.wav", "out/old.wav")
    (songs / "cover.txt").write_text("no sound")
    recipe = batch(recipe, songs, "songs/out", format="flac")
    infer.run(recipe, ALONE)
    assert files_in(songs / "out") == ["a.flac", "b/c.d.flac", "old.wav"]  # not its own results
    assert "1 files in" in caplog.text
    assert "cover.txt" in caplog.text
    infer.run(changed(recipe, "infer", input=("/".join((str(songs), "a.wav")), str(songs / "b")), format="wav"), ALONE)
    assert files_in(songs / "out") == ["a.flac", "a.wav", "b/c.d.flac", "c.d.wav", "old.wav"]


def test_a_file_goes_into_a_folder_too(recipe: Recipe, tmp_path: Path) -> None:
    infer.run(changed(recipe, "infer", output=str(tmp_path / "new") + "/"), ALONE)
    assert files_in(tmp_path / "new") == ["in.wav"]


@pytest.mark.parametrize(
    ("names", "given", "output", "message"),
    [
        ([], "songs", "out", r"infer\.input: .*songs holds no recording; expected files of the kinds wav "),
        (["a.txt"], "songs", "out", r"songs holds no recording; .*\n.*a\.txt: no recording by its name"),
        (["a.wav"], "none", "out", r"infer\.input: .*none does not exist"),
        (["a.wav"], "songs", "out.wav", r"infer\.output: got .*out\.wav for several recordings; expected a folder"),
        (["a.wav"], "songs", "songs", r"infer\.output: .*songs is the folder of infer\.input itself; give another"),
        (["a.wav", "a.mp3"], "songs", "out", r"a\.mp3 and .*a\.wav would both become .*out/a\.wav; give one of them"),
        (["a.wav"], "[{}/a.wav, {}/a.wav]", "out", r"would both become"),
        (["a.wav"], "[{}/a.wav, {}]", "songs", r"infer\.output: .* is (the folder of )?infer\.input itself"),
    ],
)
def test_what_cannot_be_sorted_out_is_refused_before_anything_is_loaded(
    names: list[str], given: str, output: str, message: str, recipe: Recipe, tmp_path: Path
) -> None:
    (tmp_path / "songs").mkdir()
    write_recordings(tmp_path / "songs", *names)
    given = given.replace("{}", str(tmp_path / "songs")) if given[0] == "[" else str(tmp_path / given)
    asked = recipe_of([("infer.input", given), ("infer.output", str(tmp_path / output))]).infer
    with pytest.raises(StageError, match=message):
        infer.run(changed(recipe, "infer", input=asked.input, output=asked.output, model="none.pth"), ALONE)
    assert files_in(tmp_path / "songs") == sorted(names)


def test_an_output_that_cannot_be_written_is_refused(recipe: Recipe, tmp_path: Path) -> None:
    songs = write_recordings(tmp_path / "songs", "a.wav")
    (tmp_path / "file").write_text("")
    with pytest.raises(StageError, match=r"infer\.output: .*file/out/a\.wav cannot be written \(Not a directory\)"):
        infer.run(batch(recipe, songs, "file/out", model="none.pth"), ALONE)


@pytest.mark.parametrize(
    ("text", "expected"),
    [("a.wav", "a.wav"), ("[a.wav, 'b, c.wav']", ("a.wav", "b, c.wav")), ("./[a].wav", "./[a].wav")],
)
def test_a_list_of_recordings_begins_with_a_bracket(text: str, expected: object) -> None:
    assert recipe_of([("infer.input", text)]).infer.input == expected
    assert recipe_of([("infer.input", text)]).to_dict()["infer"]["input"] == expected


# Ranks, and what is done already


def test_ranks_share_and_the_first_tells_what_could_not_be_converted(recipe: Recipe, tmp_path: Path) -> None:
    songs = write_recordings(tmp_path / "songs", *(f"{i}.wav" for i in range(5)))
    (songs / "bad.wav").write_text("no sound " * 9000)
    nan = tone(0.5, 16000)
    nan[5] = np.nan
    soundfile.write(songs / "nan.wav", nan, 16000, subtype="FLOAT")
    recipe = batch(recipe, songs)
    shares = [recordings.share_of(recordings.list_jobs(recipe.infer), Shard(i, 2)) for i in range(2)]
    assert [len(share) for share in shares] == [4, 3]
    assert not {job.source for job in shares[0]} & {job.source for job in shares[1]}
    told: list[BaseException] = []

    def first() -> None:
        with pytest.raises(StageError) as caught:
            infer.run(recipe, Shard(0, 2))
        told.append(caught.value)

    thread = threading.Thread(target=first)
    thread.start()
    infer.run(recipe, Shard(1, 2))  # whatever was wrong in its share: an error would end the first one
    thread.join(60)
    assert re.search(
        r"2 of 7 recordings were not converted:\n.*bad\.wav: not readable.*\n.*nan\.wav: has", str(told[0])
    )
    assert files_in(tmp_path / "out") == [f"{i}.wav" for i in range(5)]


def test_parts_of_an_array_do_theirs_and_wait_for_nobody(recipe: Recipe, tmp_path: Path) -> None:
    songs = write_recordings(tmp_path / "songs", "a.wav", "b.wav", "c.wav")
    (songs / "bad.wav").write_text("x")
    recipe = batch(recipe, songs)
    infer.run(recipe, Shard(0, 2, array=True))
    assert files_in(tmp_path / "out") == ["a.wav", "c.wav"]
    with pytest.raises(StageError, match=r"1 of 4 recordings were not converted:\n.*bad\.wav: "):
        infer.run(recipe, Shard(1, 2, array=True))
    assert files_in(tmp_path / "out") == ["a.wav", "b.wav", "c.wav"]


def test_what_is_done_is_made_again_only_if_something_changed(recipe: Recipe, tmp_path: Path) -> None:
    songs = write_recordings(tmp_path / "songs", "a.wav", "b.wav")
    recipe = batch(recipe, songs, format="mp3")
    places = [tmp_path / "out" / name for name in ("a.mp3", "b.mp3")]

    def made_again(recipe: Recipe) -> list[bool]:
        for place in places:
            os.utime(place, (0, 0)) if place.exists() else None
        infer.run(recipe, ALONE)
        return [place.stat().st_mtime > 0 for place in places]

    assert made_again(recipe) == [True, True]
    os.utime(songs / "a.wav")  # the same bytes
    assert made_again(recipe) == [False, False]
    assert made_again(changed(recipe, "infer", output=str(places[0].parent) + "/")) == [False, False]
    write_recordings(songs, "b.wav")
    assert made_again(recipe) == [False, True]
    places[0].write_bytes(places[0].read_bytes()[:100])
    assert made_again(recipe) == [True, False]
    for other in (changed(recipe, "infer", pitch=1.0), changed(recipe, "infer", loudness_mix=0.5)):
        assert made_again(other) == [True, True]
    save_pth(tmp_path / "v.pth", voice_contents(recipe, make_generator(recipe, num_speakers=3)))
    assert made_again(changed(recipe, "infer", model=str(tmp_path / "v.pth"))) == [True, True]


def test_what_is_made_is_counted_in_seconds() -> None:
    blocks = (np.zeros(10 * RATE, np.float32) for _ in range(3))
    bar = ProgressBar("infer", 60.0, AUDIO)
    assert sum(map(len, infer.counted(blocks, RATE, bar))) == 30 * RATE
    assert bar.done == 30.0


def test_the_first_rank_counts_what_others_converted(tmp_path: Path) -> None:
    write_recordings(tmp_path, "a.wav", "b.wav", "c.wav")  # of 0.2, 0.25 and 0.3 s
    jobs = [infer.Job(tmp_path / f"{name}.wav", tmp_path / f"{name}_made.wav") for name in "abc"]
    done, failed, _ = jobs
    stamps = infer.stamps_of({})
    bar = infer._progress({}, jobs, stamps)
    bar.tick()
    assert bar.total == pytest.approx(0.75)
    assert (bar.done, bar.num_failed) == (0.0, 0)
    sound_file.write(done.target, iter([np.zeros(RATE, np.float32)]), RATE, RATE, 1, stamps(done))
    failed.failure_file.write_text(f"{stamps(failed)}\nwhy")
    bar.tick()
    assert (bar.done, bar.num_failed) == (pytest.approx(0.45), 1)


# Kinds of files


@pytest.mark.parametrize("kind", SOUNDS)
@pytest.mark.parametrize("rate", [24000, 40000])
def test_every_kind_of_file_holds_what_was_made(kind: str, rate: int, tmp_path: Path) -> None:
    wave = np.stack([tone(1.0, rate), 0.5 * tone(1.0, rate, 220.0)], axis=1)
    path = tmp_path / f"a.{kind}"
    blocks = (wave[at : at + 7001] for at in range(0, rate, 7001))
    sound_file.write(path, blocks, rate, rate, 2, "0123")
    assert sound_file.stamp_of(path) == "0123"
    made, got_rate = soundfile.read(path, dtype="float32")
    wanted = {("mp3", 40000): 44100, ("opus", 40000): 48000}.get((kind, rate), rate)
    assert got_rate == wanted
    assert made.shape == (wanted, 2)
    inside = slice(wanted // 10, -wanted // 10)
    expected = librosa.resample(wave, orig_sr=rate, target_sr=wanted, axis=0)[inside]
    for channel in range(2):
        assert np.corrcoef(made[inside, channel], expected[:, channel])[0, 1] > 0.99


def test_a_wav_beyond_4_gb_counts_in_64_bits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sound_file, "MAX_WAV_BYTES", 40000)
    sound_file.write(tmp_path / "a.wav", iter([tone(1.0)]), RATE)
    assert soundfile.info(tmp_path / "a.wav").format == "RF64"
    with decode.opened(tmp_path / "a.wav") as recording:
        assert recording.duration_s == 1.0


def test_a_kind_that_libsndfile_cannot_write_is_told(
    recipe: Recipe, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(soundfile, "check_format", lambda *_: False)
    recipe = changed(recipe, "infer", output=str(tmp_path / "a.mp3"), model="none.pth")
    with pytest.raises(StageError, match=r"a\.mp3: libsndfile .* here cannot write mp3; pip install --upgrade"):
        infer.run(recipe, ALONE)


# Channels


def convert_stereo(recipe: Recipe, tmp_path: Path, left: Any, right: Any, **values: Any) -> Any:
    soundfile.write(tmp_path / "s.wav", np.stack([left, right], axis=1), RATE, subtype="FLOAT")
    infer.run(changed(recipe, "infer", input=str(tmp_path / "s.wav"), **values), ALONE)
    return soundfile.read(recipe.infer.output, dtype="float32")[0]


def test_channels_are_kept_or_mixed(recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[int] = []
    convert = infer.Converter.__call__
    monkeypatch.setattr(infer.Converter, "__call__", lambda *a: calls.append(a[2]) or convert(*a))
    left, right = tone(3.0), noise(3.0)
    alone = {side: convert_stereo(recipe, tmp_path, wave, wave) for side, wave in (("l", left), ("r", right))}
    assert alone["l"].shape == (3 * RATE,)
    calls.clear()
    kept = convert_stereo(recipe, tmp_path, left, right, channels="keep")
    assert calls == [0, 0]
    for channel, side in enumerate("lr"):
        np.testing.assert_allclose(kept[:, channel], alone[side], atol=2e-4)
    calls.clear()
    same = convert_stereo(recipe, tmp_path, left, left, channels="keep", window_s=2.0)
    assert np.array_equal(same[:, 0], same[:, 1])
    assert len(calls) == 2  # windows; what is alike is converted once
    assert calls[0] == 0 < calls[1]


def test_channels_that_cancel_are_told(recipe: Recipe, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    wave = tone(1.0)
    mixed = convert_stereo(recipe, tmp_path, wave, -wave)
    assert np.abs(mixed).max() > 1e-3
    assert f"infer: {tmp_path / 's.wav'}: its channels cancel each other: only channel 1 is taken" in caplog.text
    convert_stereo(recipe, tmp_path, wave, -wave, channels="keep")
    assert "s.wav: its channels cancel each other where they are mixed" in caplog.text


# Loudness


@pytest.mark.parametrize("share", [0.0, 0.4, 1.0])
def test_loudness_is_that_of_the_recording(share: float) -> None:
    """Against the formula of RVC, whose frames librosa makes."""
    source = noise(4.3, FEATURE_RATE) * np.repeat([1.0, 0.2, 0.0], [32000, 16000, 20800]).astype(np.float32)
    made = noise(4.3, RATE, level=0.3, seed=1)[:, None] * np.array([1.0, 0.5], np.float32)
    heard = Loudness(FEATURE_RATE)
    heard.add(np.stack([source, source], axis=1))
    blocks = (made[at : at + 5000] for at in range(0, len(made), 5000))
    got = np.concatenate(list(matched(blocks, RATE, heard, share)))
    assert got.dtype == np.float32

    def rms(wave: Any, rate: int) -> Any:
        frames = librosa.feature.rms(y=wave, frame_length=rate // 2 * 2, hop_length=rate // 2)[0]
        return np.interp(np.arange(len(made)) / RATE, np.arange(len(frames)) / 2, frames)

    for channel in range(2):
        own = np.maximum(rms(made[:, channel], RATE), 1e-6)
        expected = made[:, channel] * rms(source, FEATURE_RATE) ** (1 - share) * own ** (share - 1)
        inside = slice(0, 4 * RATE)  # RVC's last frame depends on how long the file is
        np.testing.assert_allclose(got[inside, channel], expected[inside], atol=1e-5)


def test_a_fading_recording_is_converted_to_a_fading_one(recipe: Recipe) -> None:
    fading = tone(4.0) * np.linspace(1.0, 0.05, 4 * RATE, dtype=np.float32)
    soundfile.write(recipe.infer.input, fading, RATE)

    def levels(share: float) -> Any:
        infer.run(changed(recipe, "infer", loudness_mix=share, window_s=2.0), ALONE)
        wave = soundfile.read(recipe.infer.output)[0]
        return np.sqrt(np.square(wave.reshape(4, -1)).mean(axis=1))

    own, mixed = levels(1.0), levels(0.0)
    assert own[3] > 0.3 * own[0]
    np.testing.assert_allclose(mixed, np.sqrt(np.square(fading.reshape(4, -1)).mean(axis=1)), rtol=0.25)


# Pitch


@pytest.fixture
def f0_fed(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The pitch that each call of the generator was given, without the context."""
    calls: list[Any] = []
    original = Generator.infer

    def spy(self: Generator, content: Any, lengths: Any, coarse: Any, f0: Any, *others: Any) -> Any:
        calls.append(f0[0, windows.CONTEXT : -windows.CONTEXT].numpy())
        return original(self, content, lengths, coarse, f0, *others)

    monkeypatch.setattr(Generator, "infer", spy)
    return calls


def test_autotune_puts_the_transposed_pitch_onto_semitones(recipe: Recipe, f0_fed: list[Any]) -> None:
    for strength in (None, 0.0, 0.5, 1.0):
        infer.run(changed(recipe, "infer", pitch=0.4, autotune=strength), ALONE)
    for f0, semitones in zip(f0_fed, (0.4, 0.4, 0.2, 0.0), strict=True):
        np.testing.assert_allclose(f0[10:80], 220.0 * 2 ** (semitones / 12), rtol=1e-4)


def test_a_voice_that_was_trained_autotuned_is_converted_so(recipe: Recipe, tmp_path: Path, f0_fed: list[Any]) -> None:
    tuned = changed(recipe, "extract", f0_autotune=True, f0_autotune_strength=1.0)
    save_pth(tmp_path / "v.pth", voice_contents(tuned, make_generator(recipe)))
    recipe = changed(recipe, "infer", model=str(tmp_path / "v.pth"), pitch=0.4)
    infer.run(recipe, ALONE)
    infer.run(changed(recipe, "infer", autotune=0.0), ALONE)
    assert [round(float(f0[50]), 2) for f0 in f0_fed] == [220.0, 225.14]


def test_the_pitch_of_a_file_takes_the_place_of_the_recordings(
    recipe: Recipe, tmp_path: Path, f0_fed: list[Any]
) -> None:
    (tmp_path / "f0.csv").write_text("0.2,100\n0.4,300\n\n0.6,0\n0.8,200\n")
    recipe = changed(recipe, "infer", f0_file=str(tmp_path / "f0.csv"), pitch=12.0)
    infer.run(recipe, ALONE)
    expected = {5: 440, 20: 100, 25: 150, 30: 200, 40: 300, 49: 300, 51: 0, 69: 0, 71: 200, 80: 200, 90: 440}
    assert {frame: round(float(f0_fed[0][frame])) for frame in expected} == expected
    soundfile.write(recipe.infer.input, tone(4.0), RATE)
    infer.run(changed(recipe, "infer", window_s=2.0, output=str(tmp_path / "b.wav")), ALONE)
    assert len(f0_fed) > 2
    assert round(float(f0_fed[1][30])) == 200
    assert all((f0 == 440).all() for f0 in f0_fed[2:])  # a later window counts its frames from the beginning
    songs = write_recordings(tmp_path / "songs", "a.wav", "b.wav")
    with pytest.raises(StageError, match=r"infer\.f0_file: got one for 2 recordings"):
        infer.run(batch(recipe, songs), ALONE)


def test_a_pitch_file_of_one_line_is_one_frame(tmp_path: Path) -> None:
    (tmp_path / "f").write_text("0.5,220")
    f0 = pitch.GivenPitch(tmp_path / "f")(np.zeros(100, np.float32), 0)
    assert np.flatnonzero(f0).tolist() == [50]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is empty"),
        (b"0,220\n1,high", r"line 2 is '1,high'; expected seconds,hz with at most 10000 Hz"),
        (b"0,220,1", "line 1 is '0,220,1'"),
        (b"0,nan", "line 1 is '0,nan'"),
        (b"0,-1", "line 1"),
        (b"-1,200", "line 1"),
        (b"inf,200", "line 1"),
        (b"0,1e9", "line 1"),
        (b"1,200\n1,300", "1 s follows 1 s; expected rising times"),
        (b"\xff\xfe0\0", "is no text of lines seconds,hz"),
        (None, "does not exist"),
    ],
)
def test_a_pitch_file_that_is_none_is_refused(content: bytes | None, message: str, tmp_path: Path) -> None:
    if content is not None:
        (tmp_path / "f0.csv").write_bytes(content)
    with pytest.raises(StageError, match=rf"infer\.f0_file: .*f0\.csv:? .*{message}|infer\.f0_file: .*{message}"):
        pitch.GivenPitch(tmp_path / "f0.csv")


def test_the_median_pitch_of_a_recording_is_brought_to_the_voices(
    recipe: Recipe, tmp_path: Path, f0_fed: list[Any], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, logger="rvc_dist")
    recipe = changed(recipe, "infer", auto_pitch=True)
    with pytest.raises(StageError, match=r"infer\.auto_pitch: the voice file does not say its median pitch"):
        infer.run(recipe, ALONE)
    contents = voice_contents(recipe, make_generator(recipe))
    save_pth(tmp_path / "v.pth", contents | {"f0_median": 330.0})
    recipe = changed(recipe, "infer", model=str(tmp_path / "v.pth"))
    infer.run(recipe, ALONE)
    infer.run(changed(recipe, "infer", pitch=-12.0), ALONE)
    assert [round(float(f0[50]), 1) for f0 in f0_fed] == [329.6, 164.8]  # 7 semitones above 220 Hz
    assert "median pitch 220.0 Hz, the voice's 330.0 Hz: +7 semitones" in caplog.text
    soundfile.write(recipe.infer.input, np.zeros(RATE), RATE)
    infer.run(recipe, ALONE)
    assert "infer.auto_pitch: nothing is voiced, so nothing is transposed" in caplog.text


def test_the_median_is_of_pieces_of_a_long_recording(tmp_path: Path) -> None:
    heard: list[int] = []

    class Pitch(SteadyPitch):
        def track(self, wave: torch.Tensor) -> torch.Tensor:
            heard.append(len(wave))
            return super().track(wave)

    soundfile.write(tmp_path / "long.wav", np.tile(tone(1.0, 8000), 300), 8000)
    with decode.opened(tmp_path / "long.wav") as recording:
        method = Pitch(Recipe().extract, torch.device("cpu"))
        assert conversion.median_f0(recording, method, lambda wave: wave) == 220.0
    assert len(heard) == 12
    assert max(heard) <= 10 * FEATURE_RATE + 2 * F0_HOP


# From the voice file


def test_a_voice_file_says_how_it_was_trained(
    recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setitem(F0_METHODS, "yin", F0Spec(SteadyPitch))
    trained = changed(recipe, "extract", f0_method="yin", f0_min=70.0, f0_max=700.0)
    trained = dataclasses.replace(trained, model=NARROW, preprocess=PreprocessConfig(process_effects=False))
    contents = voice_contents(trained, make_generator(trained))
    save_pth(tmp_path / "v.pth", contents)
    asked = dataclasses.replace(Recipe(), infer=changed(recipe, "infer", model=str(tmp_path / "v.pth")).infer)
    used = infer.Converter.load(asked).recipe
    assert (used.extract.f0_method, used.extract.f0_min, used.extract.f0_max) == ("yin", 70.0, 700.0)
    assert not used.preprocess.process_effects
    assert not caplog.records
    overruled = infer.Converter.load(changed(asked, "infer", f0_method="pyin", f0_max=800.0)).recipe
    assert (overruled.extract.f0_method, overruled.extract.f0_max) == ("pyin", 800.0)
    infer.Converter.load(changed(asked, "extract", f0_method="swipe"))
    assert "extract.f0_method: the voice was trained with yin, not with swipe; infer.f0_method" in caplog.text
    del contents["recipe"]  # of another tool
    save_pth(tmp_path / "v.pth", contents)
    theirs = changed(changed(asked, "extract", f0_method="pyin"), "infer", embedder_model="mfcc")
    assert infer.Converter.load(theirs).recipe.extract == theirs.extract


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("extract: {f0_method: of the future}", "got 'of the future', expected .*say --infer.f0_method"),
        ("extract: {f0_min: low}", "extract.f0_min: got 'low', expected a number"),
        ("extract: [1]", "its recipe.extract: got"),
        ("- 1", "its recipe: got"),
        ("extract: {f0_max: .nan}", "extract.f0_max: got nan"),
        ("a: &a [*a]", "holds itself"),
        ("a: " + "[" * 30, "levels"),
        ("#" + "x" * (1 << 17), "its recipe has 131073 letters"),
        ("!!python/object/apply:os.system ['true']", "not valid YAML"),
        (3, "recipe: got 3, expected a text"),
    ],
)
def test_a_recipe_in_a_voice_file_is_judged(text: Any, message: str, recipe: Recipe, tmp_path: Path) -> None:
    contents = voice_contents(recipe, make_generator(recipe))
    save_pth(tmp_path / "v.pth", contents | {"recipe": text})
    with pytest.raises(StageError, match=rf"infer\.model: .*{message}"):
        infer.Converter.load(changed(recipe, "infer", model=str(tmp_path / "v.pth")))


def test_the_noise_of_a_window_depends_on_its_place_alone(recipe: Recipe) -> None:
    converter, wave = infer.Converter.load(recipe), tone(3.0, FEATURE_RATE)
    first, other = converter(wave, 0), converter(wave, 100)
    assert np.array_equal(converter(wave, 0), first)
    assert not np.array_equal(other, first)
