"""preprocess.normalization lufs: every clip of a dataset is equally loud, and none clips."""

import logging
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import soundfile
from safetensors.numpy import load_file

from rvc_dist.config import DataConfig, PreprocessConfig, Recipe
from rvc_dist.data import clip_files, preprocess
from rvc_dist.data.loudness import LoudnessMeter
from rvc_dist.workspace import ClipsReport, Shard, StageError, Workspace, read_json

RATE = 24000
PEAK = 10 ** (-1 / 20)


def voice(level: float, seed: int, seconds: float = 2.0) -> np.ndarray:
    """Noise that swells four times a second, of this peak."""
    noise = np.random.default_rng(seed).standard_normal(int(RATE * seconds))
    wave = noise * (1.1 - np.cos(8 * np.pi * np.arange(len(noise)) / RATE))
    return level * wave / np.abs(wave).max()


@pytest.fixture
def recipe(tmp_path: Path) -> Recipe:
    """A loud speaker, a soft one with a click, which bears the least, and silence."""
    clicking = voice(0.02, 1)
    clicking[RATE] = 0.3
    waves = {"0/loud": voice(0.9, 0), "1/clicks": clicking, "1/soft": voice(0.05, 2), "1/silent": np.zeros(RATE)}
    for name, wave in waves.items():
        path = tmp_path / "audio" / f"{name}.wav"
        path.parent.mkdir(parents=True, exist_ok=True)
        soundfile.write(path, wave, RATE, subtype="FLOAT")
    return Recipe(
        run_dir=str(tmp_path / "run"),
        data=DataConfig(audio_dir=str(tmp_path / "audio"), sample_rate=RATE),
        preprocess=PreprocessConfig(cut_method="simple", normalization="lufs", process_effects=False),
    )


def clips_of(recipe: Recipe) -> list[np.ndarray]:
    folder = Workspace(recipe.run_dir, recipe.name).clips_dir
    return [wave for path in sorted(folder.glob("*.safetensors")) for wave in load_file(path).values()]


def contents(recipe: Recipe) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in Workspace(recipe.run_dir, recipe.name).clips_dir.iterdir()}


def with_loudness(recipe: Recipe, loudness: float | None) -> Recipe:
    return replace(recipe, preprocess=replace(recipe.preprocess, loudness=loudness))


def test_the_meter_is_that_of_the_standard():
    """BS.1770: 997 Hz at full scale in one channel is -3.01 LUFS."""
    tone = np.sin(2 * np.pi * 997 * np.arange(48000) / 48000).astype(np.float32)
    meter = LoudnessMeter(48000)
    assert meter(tone) == pytest.approx(-3.01, abs=0.05)
    assert meter(tone / 10) == pytest.approx(-23.01, abs=0.05)
    assert meter.most(tone / 10) == pytest.approx(-4.01, abs=0.05)
    assert meter(np.zeros(48000, np.float32)) is None
    assert meter.levelled(np.zeros(48000, np.float32), -20.0).max() == 0


def test_all_clips_have_the_most_that_none_clips_at(recipe, caplog):
    with caplog.at_level(logging.INFO):
        preprocess.run(recipe, Shard())
    clips, meter = clips_of(recipe), LoudnessMeter(RATE)
    assert len(clips) == 3
    target = read_json(Workspace(recipe.run_dir, recipe.name).clips_report_file, ClipsReport)["loudness_lufs"]
    assert f"brought to {target:.2f} LUFS, the most at which none peaks above -1 dB (1/clicks.wav at 0.0 s does" in (
        caplog.text
    )
    assert [meter(clip) for clip in clips] == pytest.approx([target] * 3, abs=0.01)
    peaks = sorted(float(np.abs(clip).max()) for clip in clips)
    assert peaks[-1] == pytest.approx(PEAK, rel=2e-3)
    assert peaks[-1] <= PEAK
    assert peaks[-2] < 0.5 * PEAK


@pytest.mark.parametrize(("asked", "reached"), [(-50.0, True), (-10.0, False)])
def test_a_loudness_that_is_asked_for_is_lowered_where_clips_would_clip(recipe, caplog, asked, reached):
    preprocess.run(with_loudness(recipe, asked), Shard())
    loudness = [LoudnessMeter(RATE)(clip) for clip in clips_of(recipe)]
    assert max(loudness) - min(loudness) < 0.01
    assert (loudness[0] == pytest.approx(asked, abs=0.01)) == reached
    assert ("not to preprocess.loudness -10 (1/clicks.wav" in caplog.text) == (not reached)
    assert max(float(np.abs(clip).max()) for clip in clips_of(recipe)) <= PEAK


def test_any_number_of_processes_makes_the_same_bytes(recipe, tmp_path):
    preprocess.run(recipe, Shard())
    expected = contents(recipe)
    for name, shards in {
        "ranks": [Shard(0, 2), Shard(1, 2)],
        "array": [Shard(i, 3, array=True) for i in (2, 0, 1)],
    }.items():
        other = replace(recipe, run_dir=str(tmp_path / name))
        for shard in shards:
            preprocess.run(other, shard)
        assert contents(other) == expected


def test_a_recording_that_bears_less_makes_all_clips_again(recipe, caplog):
    preprocess.run(recipe, Shard())
    before = {id(clip): clip for clip in clips_of(recipe)}
    wave = voice(0.01, 5)
    wave[100] = 0.9
    soundfile.write(Path(recipe.data.audio_dir, "0", "more.wav"), wave, RATE, subtype="FLOAT")
    with caplog.at_level(logging.INFO):
        preprocess.run(recipe, Shard())
    assert "making stale clips again: lufs: -" in caplog.text
    after = clips_of(recipe)
    assert len(after) == len(before) + 1
    loudness = [LoudnessMeter(RATE)(clip) for clip in after]
    assert max(loudness) - min(loudness) < 0.01
    assert max(float(np.abs(clip).max()) for clip in after) <= PEAK


def test_off_it_is_nothing(recipe, monkeypatch):
    """Neither a setting that clips depend on, nor a package that is needed."""
    off = replace(recipe, preprocess=replace(recipe.preprocess, normalization="post"))
    assert "preprocess.loudness" not in clip_files.clip_settings(off)
    monkeypatch.setitem(sys.modules, "pyloudnorm", None)
    preprocess.run(off, Shard())
    assert b"lufs" not in b"".join(v for k, v in contents(off).items() if k.endswith(".json"))
    with pytest.raises(StageError, match=r"lufs needs the package pyloudnorm .*the extra loudness has it"):
        preprocess.run(recipe, Shard())
