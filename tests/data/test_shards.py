"""The data stages by the command line: the same bytes from any number of ranks, in any order, killed at any moment."""

from __future__ import annotations

import random
import shutil
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import pytest
import soundfile
from launching import ROOT, TIMEOUT_S, environment, ranks
from warm_cli import Job

import rvc_dist as package

VOICE = Path(package.__file__).parent / "demo_voice" / "voice"
STAGES = ("preprocess", "extract", "index")
PLACES = ("clips", "features", "index")


@pytest.fixture(scope="module")
def audio(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Speech of two speakers with names, and what no stage can use: eight units of a long or several short files."""
    folder = tmp_path_factory.mktemp("audio")
    for speaker, count in (("alice", 6), ("bob", 8)):
        (folder / speaker).mkdir()
        for number, path in enumerate(sorted(VOICE.iterdir())[:count]):
            wave, rate = soundfile.read(path)
            wave = wave[count * 1000 :][: round((5.0 if number == 2 else 2.2) * rate)]
            soundfile.write(folder / speaker / path.name, wave, rate)
    (folder / "bob" / "text.wav").write_text("this is no sound")
    return folder


def options(audio: Path, run_dir: Path) -> list[str]:
    settings = {"run_dir": run_dir, "data.audio_dir": audio, "data.sample_rate": 24000, "extract.f0_method": "swipe"}
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


def start_stage(num_ranks: int, stage: str, audio: Path, run_dir: Path, *more: str) -> Job:
    script = str(ROOT / "tests" / "short_units.py")
    return ranks.start(num_ranks, script, [stage, *options(audio, run_dir), *more], environment())


def finish_all(jobs: Sequence[Job]) -> str:
    """What the last one said."""
    ended = [job.finish(TIMEOUT_S) for job in jobs]
    assert [code for code, _ in ended] == [0] * len(jobs), ended
    return ended[-1][1]


class Reference(NamedTuple):
    """What one rank makes, never interrupted."""

    run_dir: Path
    contents: dict[str, bytes]
    seconds: dict[str, float]
    """Of each stage."""


@pytest.fixture(scope="module")
def reference(audio: Path, tmp_path_factory: pytest.TempPathFactory) -> Reference:
    folder, seconds = tmp_path_factory.mktemp("one"), {}
    for stage in STAGES:
        job = start_stage(1, stage, audio, folder)
        started_at = time.monotonic()
        finish_all([job])
        seconds[stage] = time.monotonic() - started_at
    made = contents(folder)
    assert len([name for name in made if name.startswith("features/0")]) == 8
    return Reference(folder, made, seconds)


@pytest.mark.slow
@pytest.mark.distributed
def test_any_number_of_ranks(audio: Path, reference: Reference, tmp_path: Path) -> None:
    """2 ranks do all of it in test_pipeline.py."""
    for stage, num_ranks in zip(STAGES, (7, 3, 2), strict=True):
        finish_all([start_stage(num_ranks, stage, audio, tmp_path)])
    assert_same(tmp_path, reference.contents)


@pytest.mark.slow
def test_array_tasks_in_any_order_and_jobs_at_once(audio: Path, reference: Reference, tmp_path: Path) -> None:
    """Tasks of job arrays of other sizes, and then two jobs for all of it at once: some units are made twice."""
    for stage in STAGES:
        if stage != "index":
            finish_all([start_stage(1, stage, audio, tmp_path, "--shard", part) for part in ("2/3", "1/5")])
        finish_all([start_stage(1, stage, audio, tmp_path) for _ in range(2)])
    assert_same(tmp_path, reference.contents)


@pytest.mark.slow
def test_killed_again_and_again(audio: Path, reference: Reference, tmp_path: Path) -> None:
    """Both parts of a stage are killed at a random moment until one day they are let run to their end."""
    rng = random.Random(2)
    for stage, kills in (("preprocess", 6), ("extract", 4), ("index", 3)):
        parts = ([], []) if stage == "index" else (["--shard", "0/2"], ["--shard", "1/2"])
        for _ in range(kills):
            jobs = [start_stage(1, stage, audio, tmp_path, *part) for part in parts]
            time.sleep(rng.uniform(0.0, reference.seconds[stage]))
            for job in jobs:
                job.kill()
        finish_all([start_stage(1, stage, audio, tmp_path, *part) for part in parts])
    for place in PLACES:  # what the killed ones left half-written is removed when it is old
        for path in (tmp_path / place).glob(".*.tmp"):
            path.unlink()
    assert_same(tmp_path, reference.contents)


@pytest.mark.slow
def test_a_changed_recording_redoes_its_unit_and_says_so(audio: Path, reference: Reference, tmp_path: Path) -> None:
    data, run_dir = tmp_path / "audio", tmp_path / "run"
    for folder, copy in ((audio, data), (reference.run_dir, run_dir)):
        shutil.copytree(folder, copy)  # with the times of the files
    before = {path: path.stat().st_mtime_ns for place in PLACES[:2] for path in (run_dir / place).glob("0*")}
    *_, changed = sorted((data / "bob").glob("*.flac"))
    shutil.copy(VOICE / "000.flac", changed)
    output = finish_all([start_stage(1, "preprocess", data, run_dir)])
    assert f"making stale clips again: recordings in data.audio_dir: 1 changed (bob/{changed.name})" in output
    output = finish_all([start_stage(1, "extract", data, run_dir)])
    assert "making features again: other clips" in output
    redone = sorted(str(path.relative_to(run_dir)) for path, time in before.items() if path.stat().st_mtime_ns != time)
    assert redone == ["clips/00007.safetensors", "features/00007.safetensors"]
    output = finish_all([start_stage(1, "extract", data, run_dir, "--extract.f0_min", "60")])
    assert "making features again: extract.f0_min: 50.0 -> 60.0" in output
