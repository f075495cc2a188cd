"""The data stages by the command line: the same bytes from any number of ranks, in any order, killed at any moment."""

from __future__ import annotations

import random
import shutil
import time
from collections.abc import Sequence
from pathlib import Path

import pytest
from launching import TIMEOUT_S, environment, ranks, rvc_dist
from warm_cli import Job

import rvc_dist as package

VOICE = Path(package.__file__).parent / "demo_voice" / "voice"
STAGES = ("preprocess", "extract", "index")
PLACES = ("clips", "features", "index")


@pytest.fixture(scope="module")
def audio(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The demo voice twice, for two speakers with names, and what no stage can use: eight units."""
    folder = tmp_path_factory.mktemp("audio")
    for speaker in ("bob", "alice"):
        shutil.copytree(VOICE, folder / speaker)
    (folder / "bob" / "text.wav").write_text("this is no sound")
    return folder


def options(audio: Path, run_dir: Path) -> list[str]:
    settings = {"run_dir": run_dir, "data.audio_dir": audio, "data.sample_rate": 24000, "extract.f0_method": "fcpe"}
    arguments = [f"--{key}={value}" for key, value in settings.items()]
    return [*arguments, "--extract.embedder_model=mfcc", "--preprocess.num_workers=1"]


def contents(run_dir: Path) -> dict[str, bytes]:
    files = [path for place in PLACES for path in (run_dir / place).iterdir()]
    files.append(run_dir / "speakers.json")
    return {str(path.relative_to(run_dir)): path.read_bytes() for path in files}


def assert_same(run_dir: Path, reference: dict[str, bytes]) -> None:
    made = contents(run_dir)
    assert sorted(made) == sorted(reference)
    assert [name for name in made if made[name] != reference[name]] == []


@pytest.fixture(scope="module")
def reference(audio: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """What one rank makes, never interrupted."""
    folder = tmp_path_factory.mktemp("one")
    for stage in STAGES:
        rvc_dist(1, stage, *options(audio, folder))
    made = contents(folder)
    assert len([name for name in made if name.startswith("features/0")]) == 8
    return made


def start_stage(stage: str, audio: Path, run_dir: Path, *more: str) -> Job:
    return ranks.start(1, "", [stage, *options(audio, run_dir), *more], environment())


def finish_all(jobs: Sequence[Job]) -> None:
    ended = [job.finish(TIMEOUT_S) for job in jobs]
    assert [code for code, _ in ended] == [0] * len(jobs), ended


@pytest.mark.slow
@pytest.mark.distributed
def test_any_number_of_ranks(audio: Path, reference: dict[str, bytes], tmp_path: Path) -> None:
    """2 ranks do all of it in test_pipeline.py."""
    for stage, num_ranks in zip(STAGES, (7, 3, 2), strict=True):
        rvc_dist(num_ranks, stage, *options(audio, tmp_path))
    assert_same(tmp_path, reference)


@pytest.mark.slow
def test_array_tasks_in_any_order_and_jobs_at_once(audio: Path, reference: dict[str, bytes], tmp_path: Path) -> None:
    """Tasks of job arrays of other sizes, and then two jobs for all of it at once: some units are made twice."""
    for stage in STAGES:
        if stage != "index":
            finish_all([start_stage(stage, audio, tmp_path, "--shard", part) for part in ("2/3", "1/5")])
        finish_all([start_stage(stage, audio, tmp_path) for _ in range(2)])
    assert_same(tmp_path, reference)


@pytest.mark.slow
def test_killed_again_and_again(audio: Path, reference: dict[str, bytes], tmp_path: Path) -> None:
    """Both parts of a stage are killed at a random moment until one day they are let run to their end."""
    rng = random.Random(2)
    for stage, kills, longest_s in (("preprocess", 6, 1.0), ("extract", 4, 6.0), ("index", 3, 1.5)):
        parts = ([], []) if stage == "index" else (["--shard", "0/2"], ["--shard", "1/2"])
        for _ in range(kills):
            jobs = [start_stage(stage, audio, tmp_path, *part) for part in parts]
            time.sleep(rng.uniform(0.0, longest_s))
            for job in jobs:
                job.kill()
        finish_all([start_stage(stage, audio, tmp_path, *part) for part in parts])
    for place in PLACES:  # what the killed ones left half-written is removed when it is old
        for path in (tmp_path / place).glob(".*.tmp"):
            path.unlink()
    assert_same(tmp_path, reference)


@pytest.mark.slow
def test_a_changed_recording_redoes_its_unit_and_says_so(
    audio: Path, reference: dict[str, bytes], tmp_path: Path
) -> None:
    data, run_dir = tmp_path / "audio", tmp_path / "run"
    shutil.copytree(audio, data)  # with the times of the files
    for stage in STAGES[:2]:
        rvc_dist(1, stage, *options(data, run_dir))
    before = {path: path.stat().st_mtime_ns for place in PLACES[:2] for path in (run_dir / place).glob("0*")}
    shutil.copy(VOICE / "005.flac", data / "bob" / "060.flac")
    output = rvc_dist(1, "preprocess", *options(data, run_dir))
    assert "making stale clips again: recordings in data.audio_dir: 1 changed (bob/060.flac)" in output
    output = rvc_dist(1, "extract", *options(data, run_dir))
    assert "making features again: other clips" in output
    redone = sorted(str(path.relative_to(run_dir)) for path, time in before.items() if path.stat().st_mtime_ns != time)
    assert redone == ["clips/00007.safetensors", "features/00007.safetensors"]
    output = rvc_dist(1, "extract", *options(data, run_dir), "--extract.f0_min", "60")
    assert "making features again: extract.f0_min: 50.0 -> 60.0" in output
