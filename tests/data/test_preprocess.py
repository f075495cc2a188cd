"""The preprocess stage on small datasets: right clips, the same bytes from any ranks, and nothing silent."""

from __future__ import annotations

import dataclasses
import json
import logging
import os
import random
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor, wait
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
from recordings import write_av
from safetensors.numpy import load_file

from rvc_dist import workspace
from rvc_dist.config import DataConfig, PreprocessConfig, Recipe
from rvc_dist.data import audio, clip_files, cutting, decode, preprocess, work_list
from rvc_dist.data.parts import CUT
from rvc_dist.data.sources import content_of, list_sources
from rvc_dist.workspace import Shard, StageError, WorkList, Workspace

RATE = 24000
VOICE = Path(preprocess.__file__).parents[1] / "demo_voice" / "voice"


def noise(seconds: float, rate: int = RATE, level: float = 0.1) -> audio.Wave:
    rng = np.random.default_rng(round(seconds * 1000))
    return np.clip(rng.normal(0.0, level, round(seconds * rate)), -1, 1).astype(np.float32)


def write(path: Path, wave: Any, rate: int = RATE, **options: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    soundfile.write(path, wave, rate, **options)


def recipe(tmp_path: Path, **preprocess_options: Any) -> Recipe:
    return Recipe(
        run_dir=str(tmp_path / "run"),
        data=DataConfig(audio_dir=str(tmp_path / "audio"), sample_rate=RATE),
        preprocess=PreprocessConfig(**preprocess_options),
    )


def clips_dir(config: Recipe) -> Path:
    return Workspace(config.run_dir, config.name).clips_dir


def contents(config: Recipe) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in clips_dir(config).iterdir()}


def report(config: Recipe) -> dict[str, Any]:
    data: dict[str, Any] = json.loads((clips_dir(config) / "report.json").read_text(encoding="utf-8"))
    return data


def reasons(config: Recipe) -> dict[str, str]:
    return {file["path"]: file["reason"] for file in report(config)["files"]}


def clips(config: Recipe) -> list[tuple[dict[str, Any], audio.Wave]]:
    """Every clip of a run with its entry in the header, in order."""
    found = []
    for path in workspace.unit_files(clips_dir(config)):
        header = workspace.read_header(path)
        assert header is not None
        arrays = load_file(path)
        assert sorted(arrays) == [f"{i:05d}" for i in range(len(header["clips"]))]
        found += [(clip, arrays[f"{i:05d}"]) for i, clip in enumerate(header["clips"])]
    return found


def mtimes(config: Recipe) -> dict[str, int]:
    return {p.name: p.stat().st_mtime_ns for p in workspace.unit_files(clips_dir(config))}


@pytest.fixture
def units_of_2_s(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(workspace, "MIN_UNIT_S", 2.0)


@pytest.fixture
def small(tmp_path: Path, units_of_2_s: None) -> Path:
    """Six recordings of two speakers, one of them bad: five units."""
    folder = tmp_path / "audio"
    for i in range(3):
        write(folder / f"{i}.wav", noise(2.0 + i / 10))
    for i in range(2):
        write(folder / "1" / f"{i}.flac", noise(3.0 + i / 10), RATE)
    (folder / "bad.wav").write_text("these are words")
    return folder


# Cutting


def test_automatic_honours_chunk_and_overlap(tmp_path: Path) -> None:
    write(tmp_path / "audio" / "a.wav", noise(7.0))
    config = recipe(tmp_path, chunk_len=2.0, overlap_len=0.5, process_effects=False, normalization="none")
    preprocess.run(config, Shard())
    # every 1.5 s while more than 2.5 s remain: 7.0, 5.5, 4.0 s do, 2.5 s do not
    assert [(c["start_s"], len(w) / RATE) for c, w in clips(config)] == [(0.0, 2.0), (1.5, 2.0), (3.0, 2.0), (4.5, 2.5)]
    whole = soundfile.read(tmp_path / "audio" / "a.wav", dtype="float32")[0]
    for clip, wave in clips(config):
        first = round(clip["start_s"] * RATE)
        np.testing.assert_array_equal(wave, whole[first : first + len(wave)])


def test_simple_honours_chunk_and_overlap(tmp_path: Path) -> None:
    write(tmp_path / "audio" / "a.wav", noise(7.0))
    config = recipe(tmp_path, cut_method="simple", chunk_len=2.0, overlap_len=0.5)
    preprocess.run(config, Shard())
    assert [(c["start_s"], len(w) / RATE) for c, w in clips(config)] == [
        *[(0.0, 2.0), (1.5, 2.0), (3.0, 2.0), (4.5, 2.0)],
        (6.0, 1.0),
    ]
    config = recipe(tmp_path, cut_method="simple", chunk_len=3.0, overlap_len=0.0)
    preprocess.run(config, Shard())
    assert [(c["start_s"], len(w) / RATE) for c, w in clips(config)] == [(0.0, 3.0), (3.0, 3.0), (6.0, 1.0)]


def test_skip_keeps_a_file_whole_and_says_what_training_leaves(tmp_path: Path) -> None:
    write(tmp_path / "audio" / "long.wav", noise(9.5))
    write(tmp_path / "audio" / "short.wav", noise(4.0))
    config = recipe(tmp_path, cut_method="skip")
    preprocess.run(config, Shard())
    assert [(c["source"], len(w) / RATE) for c, w in clips(config)] == [("long.wav", 9.5), ("short.wav", 4.0)]
    assert reasons(config) == {
        "long.wav": "1 clip longer than the 9.0 s of which training makes use",
        "short.wav": "",
    }


def test_automatic_cuts_at_silence(tmp_path: Path) -> None:
    write(tmp_path / "audio" / "a.wav", np.concatenate([noise(2.0), np.zeros(2 * RATE), noise(1.9)]))
    config = recipe(tmp_path, process_effects=False)
    preprocess.run(config, Shard())
    first, second = clips(config)
    assert len(first[1]) / RATE == pytest.approx(2.0, abs=0.06)
    # half a second of the silence stays before the second
    assert second[0]["start_s"] == pytest.approx(3.5, abs=0.06)
    assert len(second[1]) / RATE == pytest.approx(2.4, abs=0.06)


@pytest.mark.parametrize(
    ("normalization", "peaks"),
    [
        ("none", [0.5, 0.25]),
        # each clip to 0.675 + peak / 4
        ("post", [0.8, 0.7375]),
        # the whole by 0.675 / 0.5 + 0.25 = 1.6
        ("pre", [0.8, 0.4]),
    ],
)
def test_normalization_by_hand(tmp_path: Path, normalization: str, peaks: list[float]) -> None:
    wave = np.concatenate([np.full(RATE, 0.5), np.full(RATE, 0.25)]).astype(np.float32)
    write(tmp_path / "audio" / "a.wav", wave, subtype="FLOAT")
    options = {"cut_method": "simple", "chunk_len": 1.0, "overlap_len": 0.0, "process_effects": False}
    config = recipe(tmp_path, normalization=normalization, **options)
    preprocess.run(config, Shard())
    assert [float(w.max()) for _, w in clips(config)] == pytest.approx(peaks, rel=1e-5)


def test_process_effects_removes_an_offset(tmp_path: Path) -> None:
    write(tmp_path / "audio" / "a.wav", noise(3.0) + np.float32(0.3), subtype="FLOAT")
    for effects, mean in ((True, 0.0), (False, 0.3)):
        config = recipe(tmp_path, cut_method="skip", process_effects=effects, normalization="none")
        preprocess.run(config, Shard())
        assert float(clips(config)[0][1][RATE:].mean()) == pytest.approx(mean, abs=0.01)


def test_every_kind_and_rate_becomes_mono_at_the_voices_rate(tmp_path: Path) -> None:
    folder = tmp_path / "audio"
    for suffix in ("mp3", "ogg", "flac", "aiff"):
        write(folder / f"{suffix}.{suffix}", noise(2.0, 44100), 44100)
    write(folder / "8k.WAV", noise(2.0, 8000), 8000, subtype="PCM_U8")
    write(folder / "96k.wav", noise(2.0, 96000), 96000, subtype="PCM_24")
    write(folder / "stereo.wav", np.stack([noise(2.0), noise(2.0)], axis=1))
    config = recipe(tmp_path)
    preprocess.run(config, Shard())
    assert set(reasons(config).values()) == {""}
    for clip, wave in clips(config):
        assert wave.dtype == np.float32
        assert len(wave) / RATE == pytest.approx(2.0, abs=0.06), clip["source"]
    assert len(clips(config)) == 7


def test_the_real_voice(tmp_path: Path) -> None:
    shutil.copytree(VOICE, tmp_path / "audio")
    config = recipe(tmp_path)
    preprocess.run(config, Shard())
    result = report(config)
    files = list(VOICE.glob("*.flac"))
    assert result["files_used"] == len(files)
    assert result["total_seconds"] == pytest.approx(sum(soundfile.info(f).duration for f in files), abs=0.01)
    assert result["clips"] == len(clips(config))
    assert result["clip_seconds"] == pytest.approx(sum(len(w) for _, w in clips(config)) / RATE, abs=0.01)
    for clip, wave in clips(config):
        assert cutting.MIN_CLIP_S <= len(wave) / RATE <= 3.3 + 1e-6
        assert 0.675 < np.abs(wave).max() < 1.0, clip


# The same bytes


@pytest.mark.parametrize("array", [False, True])
def test_any_number_of_ranks_in_any_order_gives_the_same_bytes(tmp_path: Path, small: Path, array: bool) -> None:
    config = recipe(tmp_path)
    preprocess.run(config, Shard())
    alone = contents(config)
    assert len([name for name in alone if name.endswith(".safetensors")]) == 5
    for count in (2, 3, 7):
        shutil.rmtree(config.run_dir)
        # Ranks wait for the work list of the first; the parts of an array wait for nobody.
        indices = list(range(count))
        random.Random(count).shuffle(indices)
        if not array:
            indices.sort(key=bool)
            random.Random(count).shuffle(rest := indices[1:])
            indices = [0, *rest]
        for done, index in enumerate(indices):
            assert not (clips_dir(config) / "report.json").exists() or done >= 5
            preprocess.run(config, Shard(index, count, array))
        assert contents(config) == alone


def test_ranks_at_once_wait_for_the_work_list_and_give_the_same_bytes(
    tmp_path: Path, small: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = recipe(tmp_path)
    alone = contents_of_fresh_run(config)
    shutil.rmtree(config.run_dir)
    made: list[int] = []
    cut_units = work_list.cut_units
    monkeypatch.setattr(work_list, "cut_units", lambda files: made.append(len(files)) or cut_units(files))
    with ThreadPoolExecutor(3) as ranks:
        others = [ranks.submit(preprocess.run, config, Shard(index, 3)) for index in (2, 1)]
        assert not wait(others, timeout=0.3).done
        preprocess.run(config, Shard(0, 3))
        for other in others:
            other.result(timeout=30)
    assert contents(config) == alone
    assert made == [5]  # the good files, listed once: only the first made a work list


def test_threads_change_no_byte(tmp_path: Path, small: Path) -> None:
    one, four = recipe(tmp_path, num_workers=1), recipe(tmp_path, num_workers=4)
    preprocess.run(one, Shard())
    alone = contents(one)
    shutil.rmtree(one.run_dir)
    preprocess.run(four, Shard())
    assert contents(four) == alone


def test_an_interrupted_run_goes_on(tmp_path: Path, small: Path) -> None:
    config = recipe(tmp_path)
    preprocess.run(config, Shard())
    whole, before = contents(config), mtimes(config)
    folder = clips_dir(config)
    for name in ("00001.safetensors", "00003.safetensors", "report.json"):
        (folder / name).unlink()
    (folder / ".0123456789abcdef.tmp").write_bytes(whole["00001.safetensors"][:1000])
    cut = folder / "00004.safetensors"
    cut.write_bytes(whole[cut.name][:-10])
    os.utime(folder / ".0123456789abcdef.tmp", (0, 0))
    assert clip_files.complete(config) is None
    preprocess.run(config, Shard())
    assert contents(config) == whole
    after = mtimes(config)
    assert {name for name in after if after[name] == before[name]} == {"00000.safetensors", "00002.safetensors"}
    assert clip_files.complete(config) is True


def test_a_second_run_decodes_nothing(tmp_path: Path, small: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = recipe(tmp_path)
    preprocess.run(config, Shard())
    whole, before = contents(config), mtimes(config)

    def fail(*_: object) -> None:
        raise AssertionError("opened a recording again")

    monkeypatch.setattr(decode, "opened", fail)
    preprocess.run(config, Shard())
    assert contents(config) == whole
    assert mtimes(config) == before


def test_an_unfinished_rank_writes_no_report(tmp_path: Path, small: Path, caplog: pytest.LogCaptureFixture) -> None:
    config = recipe(tmp_path)
    with caplog.at_level(logging.INFO):
        preprocess.run(config, Shard(0, 2))
    assert not (clips_dir(config) / "report.json").exists()
    assert "this part is done, 2 units are left to others" in caplog.text
    assert clip_files.complete(config) is None


# What changed


def test_a_changed_setting_makes_all_again_and_says_why(
    tmp_path: Path, small: Path, caplog: pytest.LogCaptureFixture
) -> None:
    config = recipe(tmp_path)
    preprocess.run(config, Shard())
    before = contents(config)
    changed = recipe(tmp_path, chunk_len=2.0, normalization="none")
    assert clip_files.complete(changed) is None
    with caplog.at_level(logging.INFO):
        preprocess.run(changed, Shard())
    assert "preprocess.chunk_len: 3.0 -> 2.0, preprocess.normalization: post -> none" in caplog.text
    assert all(before[name] != data for name, data in contents(changed).items() if name.endswith(".safetensors"))
    shutil.rmtree(config.run_dir)
    after = contents_of_fresh_run(changed)
    preprocess.run(config, Shard())
    preprocess.run(changed, Shard())
    assert contents(changed) == after


def contents_of_fresh_run(config: Recipe) -> dict[str, bytes]:
    shutil.rmtree(config.run_dir, ignore_errors=True)
    preprocess.run(config, Shard())
    return contents(config)


def test_settings_of_other_stages_change_nothing(tmp_path: Path, small: Path) -> None:
    config = recipe(tmp_path)
    preprocess.run(config, Shard())
    before = mtimes(config)
    other = dataclasses.replace(config, train=dataclasses.replace(config.train, batch_size=9))
    preprocess.run(other, Shard())
    whole = recipe(tmp_path, chunk_len=3)  # 3 is 3.0
    preprocess.run(whole, Shard())
    assert mtimes(config) == before


@pytest.mark.parametrize("change", ["changed", "added", "removed"])
def test_a_changed_dataset_is_followed(
    tmp_path: Path, small: Path, caplog: pytest.LogCaptureFixture, change: str
) -> None:
    config = recipe(tmp_path)
    preprocess.run(config, Shard())
    before = mtimes(config)
    if change == "changed":
        write(small / "1" / "1.flac", noise(2.5), RATE)
        told, redone = "1 changed (1/1.flac)", {"00004.safetensors"}
    elif change == "added":
        write(small / "1" / "2.flac", noise(2.5), RATE)
        told, redone = "1 new (1/2.flac)", {"00005.safetensors"}
    else:
        (small / "1" / "1.flac").unlink()
        told, redone = "1 gone (1/1.flac)", set()
    with caplog.at_level(logging.INFO):
        preprocess.run(config, Shard())
    assert told in caplog.text
    # Units that the change does not touch stay; one that is too many goes.
    after = mtimes(config)
    assert {name for name, at in after.items() if before.get(name) != at} == redone
    assert len(after) == {"changed": 5, "added": 6, "removed": 4}[change]
    assert contents(config) == contents_of_fresh_run(config)


def test_a_copied_dataset_is_known_by_its_content(
    tmp_path: Path, small: Path, caplog: pytest.LogCaptureFixture
) -> None:
    config = recipe(tmp_path)
    preprocess.run(config, Shard())
    before = mtimes(config)
    copied = dataclasses.replace(config, data=dataclasses.replace(config.data, audio_dir=str(tmp_path / "copied")))
    shutil.copytree(small, tmp_path / "copied", copy_function=shutil.copyfile)  # the time is that of the copy
    listed = [f.listed for folder in (small, tmp_path / "copied") for f in list_sources(folder)[0]]
    assert len(set(listed)) == 12
    with caplog.at_level(logging.INFO), ThreadPoolExecutor(2) as ranks:
        list(ranks.map(lambda rank: preprocess.run(copied, Shard(rank, 2)), range(2)))
    assert "the content of the recordings is what it was" in caplog.text
    assert "stale" not in caplog.text
    assert mtimes(config) == before
    assert clip_files.complete(copied)
    path = tmp_path / "copied" / "1" / "1.flac"  # one byte in the middle, the same size: a change all the same
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    preprocess.run(copied, Shard())
    assert [name for name, at in mtimes(config).items() if before[name] != at] == ["00004.safetensors"]


@pytest.mark.parametrize(
    ("rates", "expected"),
    [
        (
            (16000, 48000),
            "1 of 2 recordings (0.0 of 0.1 min) have a rate below data.sample_rate 48000, the lowest 16000 Hz: they "
            "hold nothing above 8000 Hz, and the voice learns to sound as dull; set data.sample_rate 24000, or give "
            "recordings of 48000 Hz",
        ),
        ((44100, 48000), ""),  # nothing that is heard
    ],
)
def test_recordings_below_the_voices_rate_are_told(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, rates: tuple[int, ...], expected: str
) -> None:
    for rate in rates:
        write(tmp_path / "audio" / f"{rate}.wav", noise(2.0, rate), rate)
    config = dataclasses.replace(recipe(tmp_path), data=DataConfig(str(tmp_path / "audio"), sample_rate=48000))
    preprocess.run(config, Shard())
    told = [r.getMessage() for r in caplog.records if r.levelno >= logging.WARNING]
    assert told == ([f"preprocess: {expected}"] if expected else [])
    assert {f["sample_rate"] for f in report(config)["files"]} == set(rates)
    assert report(config)["low_rates"] == expected.partition(";")[0]


def test_recordings_that_were_upsampled_are_told_once_for_all(
    tmp_path: Path, slices_of_4_s: None, caplog: pytest.LogCaptureFixture
) -> None:
    import soxr

    for name, rate in (("a", 48000), ("b", 16000), ("c", 22050)):
        wave = soxr.resample(noise(6.0, rate), rate, 48000, quality="VHQ")
        write(tmp_path / "audio" / f"{name}.wav", wave, 48000)
    write(tmp_path / "audio" / "d.wav", noise(2.0, 44100), 44100)
    config = dataclasses.replace(recipe(tmp_path), data=DataConfig(str(tmp_path / "audio"), sample_rate=48000))
    preprocess.run(config, Shard())
    (told,) = [r.getMessage() for r in caplog.records if r.levelno >= logging.WARNING]
    assert told.startswith("preprocess: 2 of 4 recordings (0.2 of 0.3 min) were upsampled, the lowest from 16000 Hz: ")
    assert told.endswith("\n  b.wav: 48000 Hz, holds what 16000 Hz do\n  c.wav: 48000 Hz, holds what 22050 Hz do")
    assert report(config)["upsampled"] == told.removeprefix("preprocess: ")
    assert [f["effective_rate"] for f in report(config)["files"]] == [48000, 16000, 22050, 44100]


def test_the_report_of_an_old_work_list_does_not_count(tmp_path: Path, small: Path) -> None:
    config = recipe(tmp_path)
    preprocess.run(config, Shard())
    (small / "bad.wav").unlink()  # the units stay as they are
    preprocess.make_work_list(config, Workspace(config.run_dir, config.name), Shard())
    assert clip_files.complete(config) is None
    preprocess.run(config, Shard())
    assert clip_files.complete(config) is True
    assert "bad.wav" not in reasons(config)


@pytest.mark.parametrize("field", ["path", "speaker", "size", "gone"])
def test_a_plan_that_names_other_recordings_under_the_listing_of_these_is_made_again(
    tmp_path: Path, small: Path, field: str
) -> None:
    config = recipe(tmp_path)
    preprocess.run(config, Shard())
    before, plan_file = contents(config), Workspace(config.run_dir, config.name).work_list_file
    write(tmp_path / "other.wav", noise(2.0))
    plan = json.loads(plan_file.read_text())
    if field == "gone":
        del plan["units"][0]
    else:
        plan["units"][0][0][field] = {"path": "../other.wav", "speaker": 7, "size": 1}[field]
    plan_file.write_text(json.dumps(plan))
    preprocess.run(config, Shard())
    assert contents(config) == before


# The report


def test_report_by_hand(tmp_path: Path) -> None:
    folder = tmp_path / "audio"
    write(folder / "0" / "a.wav", noise(2.0))
    write(folder / "0" / "b.wav", noise(7.0))
    write(folder / "3" / "c.wav", noise(1.25))
    (folder / "3" / "bad.wav").write_text("these are words")
    config = recipe(tmp_path, chunk_len=2.0, overlap_len=0.5)
    preprocess.run(config, Shard())
    result = report(config)
    files = {file.pop("path"): file for file in result.pop("files")}
    assert result == {
        "total_dataset_duration": "00:00:10",
        "total_seconds": 10.25,
        "clips": 6,
        "clip_seconds": 11.75,
        "seconds_in": 10.25,
        "lost": {},
        "low_rates": "",
        "upsampled": "",
        "speakers": [0, 3],
        "files_used": 3,
        "files_left_out": 1,
    }
    assert list(files) == ["0/a.wav", "0/b.wav", "3/bad.wav", "3/c.wav"]
    assert files["0/b.wav"] == {
        "speaker": 0,
        "seconds_in": 7.0,
        "clips": 4,
        "seconds_out": 8.5,
        "lost": {},
        "sample_rate": RATE,
        "effective_rate": RATE,
        "reason": "",
    }
    assert files["3/bad.wav"] == {
        "speaker": 3,
        "seconds_in": 0.0,
        "clips": 0,
        "seconds_out": 0.0,
        "lost": {},
        "reason": "not readable as audio (Format not recognised)",
    }
    assert [(c["source"], c["speaker"]) for c, _ in clips(config)][-1] == ("3/c.wav", 3)


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.0, "00:00:00"), (59.999, "00:00:59"), (3661.5, "01:01:01"), (360000.0, "100:00:00")],
)
def test_format_duration(seconds: float, text: str) -> None:
    assert clip_files.format_duration(seconds) == text


# Bad files


def test_every_bad_file_is_named_with_its_reason_and_the_good_ones_go_on(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = tmp_path / "audio"
    write(folder / "good.wav", noise(2.0))
    (folder / "text.wav").write_text("these are words")
    (folder / "zero.wav").touch()
    (folder / "notes.txt").write_text("these are words")
    (folder / "song.m4a").write_text("these are words")
    (folder / ".hidden.wav").write_text("these are words")
    write(folder / ".trash" / "a.wav", noise(2.0))
    write(folder / "a|b" / "a.wav", noise(2.0))
    write(folder / "10000" / "a.wav", noise(2.0))
    write(folder / "silent.wav", np.zeros(RATE))
    write(folder / "whisper.wav", noise(2.0, level=1e-3))
    write(folder / "blip.wav", noise(0.3))
    write(folder / "int16.wav", noise(2.0) * 32768, subtype="FLOAT")
    broken = noise(2.0)
    broken[100] = np.inf
    write(folder / "inf.wav", broken, subtype="FLOAT")
    (folder / "README").write_text("these are words")
    os.mkfifo(folder / "pipe.wav")
    expected = {
        "good.wav": "",
        "text.wav": "not readable as audio (Format not recognised)",
        "zero.wav": "empty file (0 bytes)",
        "notes.txt": f"not one of {' '.join(s[1:] for s in decode.AUDIO_SUFFIXES)}",
        "song.m4a": "not readable as audio (Invalid data found when processing input)",
        ".hidden.wav": "hidden file",
        ".trash": "hidden folder",
        "a|b/a.wav": "folder 'a|b': name: got 'a|b', expected a name of at most 255 printable letters and no |",
        "10000/a.wav": "folder '10000': speaker id 10000 is above 9999",
        "silent.wav": "silent (peak below -60 dB)",
        "whisper.wav": "silent (nothing but steady noise below -42 dB RMS)",
        "blip.wav": "1 clip dropped (shorter than 0.5 s)",
        "int16.wav": "1 clip dropped (peak above 2.5)",
        "inf.wav": "has samples that are not finite numbers",
        "README": "not readable as audio (Format not recognised)",
        "pipe.wav": "it is a FIFO, socket or device, expected a file",
    }
    config = recipe(tmp_path)
    with caplog.at_level(logging.INFO):
        preprocess.run(config, Shard())
    assert reasons(config) == expected
    for path, reason in expected.items():
        assert not reason or f"preprocess: {path}: {reason}" in caplog.messages
    assert report(config)["files_left_out"] == len(expected) - 1
    assert any(f"of {len(expected)} files ({len(expected) - 1} left out)" in line for line in caplog.messages)
    assert [c["source"] for c, _ in clips(config)] == ["good.wav"]


def test_a_cut_mp3_gives_what_there_is_and_says_so(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    path = tmp_path / "audio" / "a.mp3"
    write(path, noise(6.0, 44100), 44100)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    config = recipe(tmp_path)
    preprocess.run(config, Shard())
    (file,) = report(config)["files"]
    missing_s = file["lost"]["cut off"]
    assert 2.0 < missing_s < 4.0
    assert file["seconds_in"] == pytest.approx(6.0, abs=0.1)
    promised = f"its header promises 6.00 s, what is there ends at {6.0 - missing_s:.2f} s"
    assert file["reason"] == f"{missing_s:.2f} s are missing (cut off: {promised})"
    (told,) = [r.getMessage() for r in caplog.records if "are in clips" in r.getMessage()]
    assert f"of 6.0 s of recordings ({missing_s:.1f} s of them are promised by headers and not there)" in told


def test_slices_beyond_a_cut_are_missing_not_unreadable(tmp_path: Path, slices_of_4_s: None) -> None:
    path = tmp_path / "audio" / "a.wav"
    write(path, noise(10.0))
    path.write_bytes(path.read_bytes()[: path.stat().st_size * 3 // 10])
    config = recipe(tmp_path)
    preprocess.run(config, Shard())
    (file,) = report(config)["files"]
    assert file["seconds_in"] == pytest.approx(10.0, abs=0.01)
    assert file["lost"] == {CUT: pytest.approx(7.0, abs=0.01)}
    assert file["reason"].count("what is there ends before this part") == 2


def test_simple_loses_only_what_is_shorter_than_a_clip_and_says_so(tmp_path: Path) -> None:
    for name, seconds in (("a", 5.9), ("b", 2.0), ("c", 5.75), ("d", 0.4)):
        write(tmp_path / "audio" / f"{name}.wav", noise(seconds))
    config = recipe(tmp_path, cut_method="simple", overlap_len=0.0)
    preprocess.run(config, Shard())
    files = {f["path"][0]: (f["clips"], f["seconds_out"], f["lost"], f["reason"]) for f in report(config)["files"]}
    assert files == {
        "a": (2, 5.9, {}, ""),
        "b": (1, 2.0, {}, ""),
        "c": (2, 5.75, {}, ""),
        "d": (0, 0.0, {"shorter than 0.5 s": 0.4}, "1 clip dropped (shorter than 0.5 s)"),
    }
    config = recipe(tmp_path, cut_method="simple", chunk_len=2.8, overlap_len=0.0)  # 0.3 s of "a" are left
    preprocess.run(config, Shard())
    assert report(config)["lost"] == {"shorter than 0.5 s": 0.85}  # and 0.15 s of "c"


# Soft recordings


def voice(seconds: float = 12.0) -> audio.Wave:
    """Real speech at 16 kHz."""
    parts = [soundfile.read(f, dtype="float32")[0] for f in sorted(VOICE.iterdir())[:3]]
    return np.concatenate(parts)[: round(16000 * seconds)]


@pytest.mark.parametrize(
    ("channels", "note"),
    [
        (lambda wave: 10 ** (-26 / 20) * wave, ""),
        (lambda wave: 10 ** (-34 / 20) * wave, ""),
        (
            lambda wave: np.stack([wave, -0.97 * wave], axis=1),
            "its channels cancel each other: only channel 1 is taken",
        ),
        (lambda wave: np.stack([-0.9 * wave, wave], axis=1), "its channels cancel each other: only channel 2 is taken"),
        (lambda wave: wave[:, None] * np.float32([0, 0, 0.06, 0, 0, 0]), ""),  # 5.1 with a soft centre
    ],
)
def test_nothing_of_a_soft_recording_is_lost(tmp_path: Path, channels: Any, note: str) -> None:
    write(tmp_path / "audio" / "a.wav", channels(voice()), 16000, subtype="FLOAT")
    preprocess.run(recipe(tmp_path), Shard())
    (file,) = report(recipe(tmp_path))["files"]
    assert file["reason"] == note
    assert sum(file["lost"].values()) < 0.05 * file["seconds_in"], file
    if note:  # what is converted is heard as what is trained
        with decode.opened(tmp_path / "audio" / "a.wav") as recording:
            heard = np.concatenate(list(audio.stream(recording, 16000)))
        np.testing.assert_allclose(heard, voice(), atol=1e-4)


def test_much_silence_is_told(tmp_path: Path) -> None:
    quiet_room = np.random.default_rng(1).normal(0.0, 3e-4, 20 * 16000).astype(np.float32)
    write(tmp_path / "audio" / "a.wav", np.concatenate([voice(8.0), quiet_room]), 16000)
    preprocess.run(recipe(tmp_path), Shard())
    (file,) = report(recipe(tmp_path))["files"]
    assert file["lost"]["silence"] == pytest.approx(20.0, abs=0.6)
    assert file["reason"] == f"{file['lost']['silence']:.1f} of its 28.0 s are silence"


def test_odd_names_arrive_everywhere(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder = tmp_path / "audio"
    write(folder / "plain.wav", noise(2.0))
    names = ["sp ace.wav", "quo'te\".wav", "new\nline.wav", "ünï✓.wav", os.fsdecode(b"b\xff.wav")]
    for name in names:
        shutil.copy(folder / "plain.wav", folder / name)
        bad = folder / f"x{name}"
        bad.write_text("these are words")
    config = recipe(tmp_path)
    preprocess.run(config, Shard())
    assert sorted(c["source"] for c, _ in clips(config)) == sorted([*names, "plain.wav"])
    assert {path for path, reason in reasons(config).items() if reason} == {f"x{name}" for name in names}
    assert r"preprocess: 'xnew\nline.wav': not readable" in caplog.text
    before = mtimes(config)
    preprocess.run(config, Shard())
    assert mtimes(config) == before
    for message in caplog.messages:
        message.encode()  # no lone surrogate reaches a log file
        assert "\n" not in message


def test_links_are_used_once_or_named(tmp_path: Path) -> None:
    folder, outside = tmp_path / "audio", tmp_path / "elsewhere"
    write(folder / "a.wav", noise(2.0))
    write(folder / ".store" / "b.wav", noise(2.0))
    write(outside / "c.wav", noise(2.0))
    (folder / "of_a.wav").symlink_to("a.wav")
    (folder / "of_b.wav").symlink_to(".store/b.wav")
    (folder / "of_b_too.wav").symlink_to(".store/b.wav")
    (folder / "of_c.wav").symlink_to(outside / "c.wav")
    (folder / "of_nothing.wav").symlink_to("nothing.wav")
    (folder / "1").symlink_to(outside)
    config = recipe(tmp_path)
    preprocess.run(config, Shard())
    assert reasons(config) == {
        "a.wav": "",
        ".store": "hidden folder",
        "of_a.wav": "link to the same recording as a.wav",
        "of_b.wav": "",
        "of_b_too.wav": "link to the same recording as of_b.wav",
        "of_c.wav": "link that leads out of the dataset; expected the recording itself",
        "of_nothing.wav": "broken link",
        "1": "link to a folder; expected the folder itself",
    }
    # The recording counts, not the link.
    before = WorkList.load(clips_dir(config) / "plan.json")
    write(folder / ".store" / "b.wav", noise(3.0))
    preprocess.run(config, Shard())
    after = WorkList.load(clips_dir(config) / "plan.json")
    assert before is not None
    assert after is not None
    assert after.units[0].duration_s == before.units[0].duration_s + 1.0


def test_the_dataset_folder_itself_may_be_a_link(tmp_path: Path) -> None:
    write(tmp_path / "real" / "0" / "a.wav", noise(2.0))
    (tmp_path / "audio").symlink_to("real")
    config = recipe(tmp_path)
    preprocess.run(config, Shard())
    assert reasons(config) == {"0/a.wav": ""}


def test_a_run_folder_inside_the_dataset_is_not_part_of_it(tmp_path: Path) -> None:
    write(tmp_path / "audio" / "a.wav", noise(2.0))
    config = dataclasses.replace(recipe(tmp_path), run_dir=str(tmp_path / "audio" / "run"))
    for _ in range(2):
        preprocess.run(config, Shard())
        assert reasons(config) == {"a.wav": ""}


# Nothing usable


@pytest.mark.parametrize(
    ("prepare", "message"),
    [
        (lambda folder: None, r"data\.audio_dir: .*audio does not exist"),
        (lambda folder: folder.write_text("a file"), r"data\.audio_dir: .*audio is a file"),
        (lambda folder: folder.mkdir(), r"holds no usable recording; expected files of the kinds wav wave flac"),
        (lambda folder: write(folder / ".a.wav", noise(1.0)), r"holds no usable recording.*\n  \.a\.wav: hidden file"),
        (lambda folder: write(folder / "a|b" / "a.wav", noise(1.0)), r"\n  a|b/a\.wav: folder 'a|b': name: got 'a|b'"),
    ],
)
def test_a_useless_folder_is_refused(tmp_path: Path, prepare: Any, message: str) -> None:
    prepare(tmp_path / "audio")
    with pytest.raises(StageError, match=message):
        preprocess.run(recipe(tmp_path), Shard())
    assert not (tmp_path / "run").exists()


def test_no_clip_at_all_is_an_error_and_leaves_none(tmp_path: Path) -> None:
    write(tmp_path / "audio" / "a.wav", noise(2.0))
    config = recipe(tmp_path)
    preprocess.run(config, Shard())
    assert clip_files.complete(config) is True
    write(tmp_path / "audio" / "a.wav", np.zeros(2 * RATE))
    (tmp_path / "audio" / "b.wav").write_text("these are words")
    with pytest.raises(StageError, match=r"none of the 2 files in .* gave a clip\n  a\.wav: silent.*\n  b\.wav: not"):
        preprocess.run(config, Shard())
    assert contents(config) == {}
    assert clip_files.complete(config) is None


def test_files_that_are_all_unreadable_are_an_error(tmp_path: Path) -> None:
    (tmp_path / "audio").mkdir()
    for i in range(25):
        (tmp_path / "audio" / f"{i}.wav").write_text("these are words")
    config = recipe(tmp_path)
    with pytest.raises(StageError, match=r"none of the 25 files [\s\S]*\n  and 5 more$"):
        preprocess.run(config, Shard())
    assert not (tmp_path / "run").exists()


def test_a_folder_of_unreadable_files_leaves_the_clips_of_an_earlier_one_alone(tmp_path: Path) -> None:
    config = recipe(tmp_path)
    write(Path(config.data.audio_dir) / "a.wav", noise(2.0))
    preprocess.run(config, Shard())
    before = {p.name: p.read_bytes() for p in Path(config.run_dir, "clips").iterdir()}
    (tmp_path / "wrong").mkdir()
    (tmp_path / "wrong" / "a.wav").write_text("these are words")
    wrong = dataclasses.replace(config, data=dataclasses.replace(config.data, audio_dir=str(tmp_path / "wrong")))
    with pytest.raises(StageError, match="none of the 1 files"):
        preprocess.run(wrong, Shard())
    assert {p.name: p.read_bytes() for p in Path(config.run_dir, "clips").iterdir()} == before


def test_a_run_dir_that_is_a_file_is_refused(tmp_path: Path) -> None:
    write(tmp_path / "audio" / "a.wav", noise(2.0))
    (tmp_path / "run").write_text("a file")
    with pytest.raises(StageError, match=r"run_dir: .*run is a file"):
        preprocess.run(recipe(tmp_path), Shard())
    assert (tmp_path / "run").read_text() == "a file"


def test_the_stage_needs_no_torch(tmp_path: Path) -> None:
    write(tmp_path / "audio" / "a.wav", noise(2.0, 16000), 16000)
    code = (
        "import sys\n"
        "from rvc_dist.data import preprocess\n"
        "from rvc_dist.config import DataConfig, Recipe\n"
        "from rvc_dist.workspace import Shard\n"
        "preprocess.run(Recipe(run_dir=sys.argv[2], data=DataConfig(audio_dir=sys.argv[1])), Shard())\n"
        "print(sorted({'torch', 'librosa', 'transformers', 'accelerate'} & set(sys.modules)))\n"
    )
    command = [sys.executable, "-c", code, str(tmp_path / "audio"), str(tmp_path / "run")]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


# Long recordings


@pytest.fixture
def slices_of_4_s(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(workspace, "MAX_SLICE_S", 4.0)
    monkeypatch.setattr(cutting, "MAX_SLICE_S", 4.0)


def test_slices_by_hand(slices_of_4_s: None) -> None:
    def cut(seconds: float) -> list[tuple[float, float, bool]]:
        file = workspace.SourceFile("a.wav", 0, 1, 1, seconds)
        return [(s.start_s, s.duration_s, s.is_last) for s in file.slices()]

    assert cut(4.0) == [(0.0, 4.0, True)]
    assert cut(4.5) == [(0.0, 3.0, False), (3.0, 1.5, True)]
    assert cut(10.25) == [(0.0, 4.0, False), (4.0, 4.0, False), (8.0, 2.25, True)]
    assert cut(12.0) == [(0.0, 4.0, False), (4.0, 4.0, False), (8.0, 4.0, True)]


@pytest.mark.parametrize("suffix", ["wav", "mp3", "ogg", "flac"])
def test_a_long_recording_is_done_in_slices(
    tmp_path: Path, slices_of_4_s: None, units_of_2_s: None, suffix: str
) -> None:
    wave = noise(10.25, 48000)
    write(tmp_path / "audio" / f"a.{suffix}", wave, 48000)
    config = recipe(tmp_path, cut_method="skip", process_effects=False, normalization="none")
    preprocess.run(config, Shard())
    made = clips(config)
    assert [(clip["slice_s"], clip["start_s"], len(piece) / RATE) for clip, piece in made] == [
        (0.0, 0.0, 4.0),
        (4.0, 4.0, 4.0),
        (8.0, 8.0, pytest.approx(2.25, abs=0.06)),
    ]
    # One slice after the other they are the recording; at the cuts the resampler hears an edge.
    whole = audio.resample(decode.decode(tmp_path / "audio" / f"a.{suffix}")[0], 48000, RATE)
    joined = np.concatenate([piece for _, piece in made])
    assert len(joined) == len(whole)
    inner = np.abs(np.arange(len(whole)) / RATE % 4.0 - 2.0) < 1.99
    np.testing.assert_allclose(joined[inner], whole[inner], atol=2e-4)
    assert report(config)["files"] == [
        {
            "path": f"a.{suffix}",
            "speaker": 0,
            "seconds_in": pytest.approx(10.25, abs=0.06),
            "clips": 3,
            "seconds_out": pytest.approx(10.25, abs=0.06),
            "lost": {},
            "sample_rate": 48000,
            "effective_rate": 48000,
            "reason": "",
        }
    ]


def test_ranks_share_the_slices_of_a_recording(tmp_path: Path, slices_of_4_s: None, units_of_2_s: None) -> None:
    write(tmp_path / "audio" / "a.wav", noise(11.0))
    one, three = recipe(tmp_path), dataclasses.replace(recipe(tmp_path), run_dir=str(tmp_path / "three"))
    preprocess.run(one, Shard())
    for rank in (2, 0, 1):
        preprocess.run(three, Shard(rank, 3, array=True))
    assert len(mtimes(one)) == 3
    assert contents(three) == contents(one)


def test_what_is_said_of_a_slice_says_where_it_begins(
    tmp_path: Path, slices_of_4_s: None, caplog: pytest.LogCaptureFixture
) -> None:
    wave = noise(8.0)
    wave[4 * RATE :] = 0.0
    write(tmp_path / "audio" / "a.wav", wave)
    config = recipe(tmp_path)
    preprocess.run(config, Shard())
    assert reasons(config) == {"a.wav": "from 00:00:04: silent (peak below -60 dB)"}


def test_a_recording_longer_than_its_header_says_so(tmp_path: Path, slices_of_4_s: None) -> None:
    """An mp4 whose header was written for its first 3 of 9 seconds."""
    write(tmp_path / "audio" / "a.wav", noise(9.0))
    file = workspace.SourceFile("a.wav", 0, 1, 1, 3.0)
    outcome = cutting.cut_file(recipe(tmp_path), file)
    assert (outcome.seconds_in, outcome.lost["longer than its header says"]) == (9.0, 2.0)
    assert outcome.reason == "2.00 s are missing (longer than its header says)"


# What recordings tell


def test_clipping_and_offset_are_told(tmp_path: Path) -> None:
    wave = noise(3.0)
    write(tmp_path / "audio" / "good.wav", wave)
    write(tmp_path / "audio" / "clipped.wav", np.clip(8 * wave, -1, 1))
    write(tmp_path / "audio" / "offset.wav", wave + np.float32(0.125), subtype="FLOAT")
    config = recipe(tmp_path)
    preprocess.run(config, Shard())
    told = reasons(config)
    assert told["good.wav"] == ""
    assert told["offset.wav"] == f"has a DC offset of {0.125 + float(wave.mean()):.3f}"
    full = np.abs(np.clip(8 * wave, -1, 1)) >= 0.999
    share = 100 * np.count_nonzero(full[1:] & full[:-1]) / len(full)
    assert share > 1
    assert told["clipped.wav"] == f"clipped ({share:.1f}% of its samples at full scale)"


def test_two_jobs_with_other_settings_in_one_folder_are_told(
    tmp_path: Path, small: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second begins while the first is at work: each is whole or says that it is not."""
    first, second = recipe(tmp_path), recipe(tmp_path, normalization="none")
    make_unit, calls = preprocess.Preprocess.make_unit, []

    def make(*arguments: Any) -> None:
        make_unit(*arguments)
        calls.append(arguments)
        if len(calls) == 2:
            preprocess.run(second, Shard())

    monkeypatch.setattr(preprocess.Preprocess, "make_unit", make)
    with pytest.raises(
        StageError, match=r"units in .*clips were replaced meanwhile: another job works in this run folder"
    ):
        preprocess.run(first, Shard())


# Noise reduction


def buzz(seconds: float = 6.0) -> audio.Wave:
    """Thirty equal harmonics of 150 Hz, half a second on, half a second off."""
    times = np.arange(round(seconds * RATE)) / RATE
    tone = sum(0.02 * np.sin(2 * np.pi * 150 * k * times + k * k) for k in range(1, 31)) * (times % 1.0 < 0.5)
    return np.asarray(tone, np.float32)


def noisy(level: float = 0.01) -> audio.Wave:
    return buzz() + np.random.default_rng(0).normal(0.0, level, 6 * RATE).astype(np.float32)


@pytest.mark.parametrize(("strength", "low", "high"), [(0.0, 0.99, 1.01), (0.5, 0.45, 0.6), (1.0, 0.0, 0.1)])
def test_the_noise_goes_by_its_strength_and_the_voice_stays(strength: float, low: float, high: float) -> None:
    from rvc_dist.data.denoise import NoiseGate

    wave = noisy()
    cleaned = NoiseGate(RATE, strength)(wave)
    assert cleaned.shape == wave.shape
    times = np.arange(len(wave)) / RATE % 1.0
    pause, sounding = (times > 0.6) & (times < 0.9), (times > 0.1) & (times < 0.4)
    assert low < np.std(cleaned[pause]) / np.std(wave[pause]) < high
    left = np.vdot(cleaned[sounding], buzz()[sounding]) / np.vdot(buzz()[sounding], buzz()[sounding])
    assert left == pytest.approx(1.0, abs=0.06)


def test_windows_join_without_a_seam_and_batches_are_equal(monkeypatch: pytest.MonkeyPatch) -> None:
    from rvc_dist.data import denoise

    wave = np.tile(noisy(), 4)
    cleaned = denoise.NoiseGate(RATE, 0.7)(wave)
    monkeypatch.setattr(denoise, "BATCH_WINDOWS", 1)
    np.testing.assert_array_equal(denoise.NoiseGate(RATE, 0.7)(wave), cleaned)
    monkeypatch.setattr(denoise, "WINDOW_S", 100.0)
    at_once = denoise.NoiseGate(RATE, 0.7)(wave)
    assert np.std(cleaned - at_once) < 0.02 * np.std(at_once)
    assert np.abs(np.diff(cleaned - at_once)).max() < 0.01


def test_digital_silence_has_no_noise_to_learn_from() -> None:
    from rvc_dist.data.denoise import NoiseGate

    gate = NoiseGate(RATE, 1.0)
    for wave in (np.zeros(3 * RATE, np.float32), noise(0.4)):
        assert gate.profile(wave) is None
        assert gate(wave) is wave
    muted = np.concatenate([np.zeros(4 * RATE, np.float32), noisy()])
    profile = gate.profile(muted)
    assert profile is not None
    assert np.abs(profile).min() < np.abs(profile).max() < 0.2  # noise of the pauses, neither silence nor tone


def test_cleaned_clips_are_the_same_from_any_ranks(tmp_path: Path, units_of_2_s: None) -> None:
    for i in range(3):
        write(tmp_path / "audio" / f"{i}.wav", np.roll(noisy(), i * 1000))
    config = recipe(tmp_path, clean_dataset=True, clean_strength=0.8, num_workers=1)
    preprocess.run(config, Shard())
    other = dataclasses.replace(recipe(tmp_path, clean_dataset=True, clean_strength=0.8), run_dir=str(tmp_path / "two"))
    for rank in (1, 0):
        preprocess.run(other, Shard(rank, 2, array=True))
    assert contents(other) == contents(config)
    plain = dataclasses.replace(recipe(tmp_path), run_dir=str(tmp_path / "plain"))
    preprocess.run(plain, Shard())
    assert contents(plain) != contents(config)


def test_cleaning_without_its_package_names_the_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path / "audio" / "a.wav", noise(3.0))
    monkeypatch.setitem(sys.modules, "noisereduce.torchgate", None)
    with pytest.raises(StageError, match=r"clean_dataset needs the package noisereduce .*pip install noisereduce"):
        preprocess.run(recipe(tmp_path, clean_dataset=True), Shard())


def peak_kb(tmp_path: Path, minutes: int) -> int:
    """The most memory that preprocess had for one stereo recording of so many minutes, with one thread."""
    folder = tmp_path / f"{minutes} minutes"
    folder.mkdir()
    second = np.stack([noise(1.0, 44100), noise(1.1, 44100)[:44100]], axis=1)
    with soundfile.SoundFile(folder / "long.flac", "w", 44100, 2) as file:
        for _ in range(60 * minutes):
            file.write(second)
    code = (
        "import re, sys; from rvc_dist import workspace; workspace.MAX_SLICE_S = 60.0;"  # before others ask for it
        "from rvc_dist.__main__ import main; code = main(sys.argv[1:]);"
        # Not ru_maxrss, which knows the size of this process, too.
        "print(code, re.search(r'VmHWM:\\s+(\\d+)', open('/proc/self/status').read())[1])"
    )
    options = ["--data.audio_dir", folder, "--run_dir", tmp_path / f"run {minutes}", "--preprocess.num_workers", 1]
    command = [sys.executable, "-c", code, "preprocess", *map(str, options)]
    result = subprocess.run(command, capture_output=True, text=True, timeout=300, check=True)
    exit_code, peak = map(int, result.stdout.split())
    assert exit_code == 0, result.stderr[-2000:]
    return peak


@pytest.mark.slow
def test_memory_does_not_grow_with_a_recording(tmp_path: Path) -> None:
    """A slice of at most a minute here, besides libraries: 6 minutes more are 127 MB of samples at 44.1 kHz.

    With more threads the peak would hang on their timing: how many slices are in memory at once.
    """
    assert peak_kb(tmp_path, 8) - peak_kb(tmp_path, 2) < 30e3


def test_a_missing_decoder_stops_the_stage_instead_of_losing_recordings(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tmp_path / "audio" / "a.wav", noise(3.0))
    write_av(tmp_path / "audio" / "b.m4a", noise(3.0, 48000), "aac", 48000)
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "av", None)
        with pytest.raises(StageError, match=r"b\.m4a: m4a needs the package av: pip install av .*; or take it out"):
            preprocess.run(recipe(tmp_path), Shard())
    preprocess.run(recipe(tmp_path), Shard())
    assert reasons(recipe(tmp_path)) == {"a.wav": "", "b.m4a": ""}


def test_a_recordings_content_is_its_bytes_whatever_it_is_called(tmp_path):
    recordings = {"a": bytes(3_000_000), "b": bytes(3_000_000), "c": bytes(3_000_001), "d": bytes(2_999_999) + b"x"}
    for name, data in {**recordings, "e": b"", "f": b"x"}.items():
        (tmp_path / name).write_bytes(data)
    hashes = [content_of(tmp_path / name) for name in "abcdef"]
    assert hashes[0] == hashes[1]
    assert len(set(hashes)) == 5
