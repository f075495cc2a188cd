"""`rvc-dist status`: finished, stale, running, killed and foreign run folders, seen from this host and from another."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import soundfile
from helpers import RATE, SteadyPitch, make_checkpoint, make_generator, narrow_recipe, tone, workspace_of

from rvc_dist import __main__ as cli
from rvc_dist.choices import F0_METHODS, F0Spec
from rvc_dist.config import Recipe
from rvc_dist.data import preprocess
from rvc_dist.features import extract, index
from rvc_dist.files import write_json
from rvc_dist.runtime import run_lock
from rvc_dist.runtime.job_file import JobFile
from rvc_dist.runtime.logs import RankLog
from rvc_dist.runtime.run_lock import RunLock
from rvc_dist.screen import AUDIO, ProgressBar
from rvc_dist.tools import status
from rvc_dist.train import checkpoint
from rvc_dist.train.progress import Progress
from rvc_dist.voice import export
from rvc_dist.workspace import Shard

ALONE = Shard()


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Recipe:
    """A run that is done, but for its last training steps."""
    folder = tmp_path_factory.mktemp("made")
    (folder / "audio").mkdir()
    for i in range(2):
        soundfile.write(folder / "audio" / f"{i}.wav", tone(21.0, RATE, 150.0 + 20 * i), RATE)
    recipe = narrow_recipe(folder)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(F0_METHODS, "pyin", F0Spec(SteadyPitch))
        for stage in (preprocess, extract, index):
            stage.run(recipe, ALONE)
    saved = make_checkpoint(recipe, make_generator(recipe), Progress(step=40, epoch=4, best_metric=0.5, best_step=30))
    checkpoint.save(workspace_of(recipe).checkpoints_dir, saved)
    export.run(recipe, ALONE)
    return recipe


@pytest.fixture
def run(made: Recipe, tmp_path: Path) -> Recipe:
    """A copy of it."""
    shutil.copytree(Path(made.run_dir), tmp_path / "run")
    return dataclasses.replace(made, run_dir=str(tmp_path / "run"))


def state_of(recipe: Recipe, **given: str) -> dict[str, Any]:
    keys = [(key.replace("__", "."), text) for key, text in given.items()]
    return json.loads(json.dumps(status.state_of(Path(recipe.run_dir), keys)))


def stage(state: dict[str, Any]) -> dict[str, str]:
    return {name: found["state"] for name, found in state["stages"].items()}


def test_a_run_tells_its_stages(run: Recipe) -> None:
    state = state_of(run)
    assert state["notes"] == []
    assert stage(state) == dict(preprocess="done", extract="done", index="done", train="part", export="done")
    assert state["stages"]["extract"] == {"state": "done", "why": "", "done": 2, "total": 2}
    assert state["state"] == "unfinished"
    assert (state["training"]["step"], state["training"]["best_step"]) == (40, 30)
    assert state["checkpoint"]["path"].endswith("step_00000040")
    assert state["voices"] == ["tiny_4e_40s.pth", "tiny_last.pth"]
    assert state_of(run, train__max_steps="40")["state"] == "done"


def test_what_is_stale_has_its_reason(run: Recipe) -> None:
    work = workspace_of(run)
    state = state_of(run, preprocess__chunk_len="2.0", extract__f0_method="fcpe", index__algorithm="kmeans")
    whys = {name: found["why"] for name, found in state["stages"].items() if found["state"] == "stale"}
    assert whys == {
        "preprocess": "preprocess.chunk_len: 3.0 -> 2.0",
        "extract": "extract.f0_method: pyin -> fcpe",
        "index": "other features or index settings",
    }
    later = time.time() + 10
    os.utime(work.checkpoints_dir / "step_00000040" / "manifest.json", (later, later))
    assert state_of(run)["stages"]["export"]["why"] == "step 40 is newer than tiny_last.pth"
    work.features_report_file.unlink()
    work.features_file(1).unlink()
    state = state_of(run)
    assert state["stages"]["extract"] == {"state": "part", "why": "", "done": 1, "total": 2}
    assert state["stages"]["index"]["why"] == "the features are not all made"
    work.clips_file(0).unlink()
    state = state_of(run)
    assert state["stages"]["preprocess"] == {"state": "part", "why": "", "done": 1, "total": 2}
    assert state["stages"]["extract"]["why"] == "the clips are not all made"


def test_recordings_are_looked_at_where_they_are(run: Recipe, tmp_path: Path) -> None:
    audio = tmp_path / "other"
    shutil.copytree(run.data.audio_dir, audio, copy_function=shutil.copy2)
    keys = {"data__audio_dir": str(audio)}
    assert state_of(run, **keys)["stages"]["preprocess"]["state"] == "done"
    soundfile.write(audio / "new.wav", tone(3.0), RATE)
    assert state_of(run, **keys)["stages"]["preprocess"]["why"] == f"recordings in {audio} are new, changed or gone"
    shutil.rmtree(audio)
    found = state_of(run, **keys)["stages"]["preprocess"]
    assert (found["state"], "does not exist" in found["why"]) == ("done", True)


def test_every_damage_is_told_and_hides_nothing_else(run: Recipe) -> None:
    work = workspace_of(run)
    newer = work.checkpoints_dir / "step_00000050"
    shutil.copytree(work.checkpoints_dir / "step_00000040", newer)
    (newer / "generator.safetensors").write_bytes(b"cut off")
    work.train_lock_file.write_bytes(b"\0" * 100_000)
    work.requeue_file.write_text("{")
    work.history_file.write_text('{"kind": "step", "ti')
    (work.logs_dir / "rank_00000.job").parent.mkdir(exist_ok=True)
    (work.logs_dir / "rank_00000.job").write_text("[]")
    state = state_of(run)
    assert state["damaged_checkpoints"] == ["step_00000050"]
    assert state["checkpoint"]["step"] == 40
    assert [any(str(path) in note for note in state["notes"]) for path in (work.train_lock_file, work.requeue_file)]
    assert stage(state)["index"] == "done"
    work.config_file.unlink()
    state = state_of(run)
    assert stage(state) == dict(
        preprocess="unknown", extract="unknown", index="unknown", train="unknown", export="part"
    )
    assert any("config.yaml is missing" in note for note in state["notes"])
    assert list(status.lines(state))


@pytest.mark.parametrize(
    ("make", "what"),
    [
        (lambda folder: None, "does not exist"),
        (lambda folder: folder.write_text("x"), "is a file, expected a run folder"),
        (lambda folder: folder.mkdir(), "is empty: nothing was begun here"),
        (lambda folder: (folder / "src").mkdir(parents=True), "is no run folder of rvc_dist"),
        (lambda folder: write_json(folder / "a" / "config.yaml", {}), "is no run folder of rvc_dist; it holds runs: a"),
        (lambda folder: write_json(folder / "sliced_audios" / "0_0_0.wav", {}), "is an experiment of Applio"),
    ],
)
def test_what_is_no_run_is_named(
    make: Any, what: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cli, "set_up_logging", lambda *_: None)
    make(tmp_path / "x")
    assert cli.main(["status", str(tmp_path / "x")]) == status.EXIT_NO_RUN
    assert capsys.readouterr().out.startswith(f"{tmp_path / 'x'} {what}")


# Who runs


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (run_lock, status):
        monkeypatch.setattr(module, "REFRESH_S", 0.3)


def job_of(recipe: Recipe, shard: Shard = ALONE) -> tuple[RankLog, JobFile]:
    log = RankLog(workspace_of(recipe), shard)
    log.note("INFO", "opens the file")
    return log, JobFile(log, "extract", ["extract", "--run_dir", "a b"])


def until(what: Path) -> None:
    deadline = time.monotonic() + 20
    while not what.exists():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_a_running_stage_tells_how_far_it_is_and_how_it_ended(run: Recipe) -> None:
    log, job = job_of(run, Shard(0, 2))
    with ProgressBar("extract", 200.0, AUDIO, 50.0) as bar, job:
        bar.num_failed, bar.text = 3, "5/20 units"
        until(job.path)
        state = state_of(run)
        (found,) = state["running"]
        assert (state["state"], stage(state)["extract"], stage(state)["index"]) == ("running", "running", "done")
        assert (found["stage"], found["rank"], found["ranks"], found["pid"]) == ("extract", 0, 2, os.getpid())
        assert (found["doing"]["done"], found["doing"]["total"], found["alive"]) == (50.0, 200.0, True)
        assert "extract (rank 0 of 2, pid" in (line := next(line for line in status.lines(state) if "running " in line))
        assert ": extract 25%, 5/20 units, 3 failed" in line
        job.code = 75
    state = state_of(run)
    assert (state["running"], state["last"]["ended"], state["state"]) == ([], "stopped", "stopped")
    log.close()


def other_host(path: Path) -> dict[str, Any]:
    """The file as a process on another host would have written it."""
    data: dict[str, Any] = json.loads(path.read_text())
    data |= {"host": "elsewhere", "pid_space": "another kernel", "path": f"/shared/{path.name}"}
    if "ended" in data:
        data["ended"] = None
    path.write_text(json.dumps(data))
    return data


def test_another_host_lives_where_its_file_changes(run: Recipe, quick: None) -> None:
    work = workspace_of(run)
    log, job = job_of(run)
    with job:
        until(job.path)
    lock = RunLock(work.train_lock_file)
    assert lock.try_acquire()
    data = [(path, other_host(path)) for path in (job.path, lock.path)]
    ended = threading.Event()

    def live() -> Iterator[None]:
        while not ended.wait(0.1):
            for path, values in data:
                values["beat"] += 1
                path.with_suffix(".new").write_text(json.dumps(values))
                path.with_suffix(".new").replace(path)

    thread = threading.Thread(target=live)
    thread.start()
    try:
        state = state_of(run)
        assert (state["running"][0]["host"], state["running"][0]["alive"], state["lock"]["alive"]) == (
            "elsewhere",
            True,
            True,
        )
    finally:
        ended.set()
        thread.join()
    state = state_of(run)
    assert (state["running"][0]["alive"], state["lock"]["alive"]) == (None, None)
    assert "nothing was heard" in "\n".join(status.lines(state))
    lock.release()
    log.close()


def test_who_was_killed_and_who_failed(run: Recipe) -> None:
    work = workspace_of(run)
    write_json(work.failure_file(7), {"rank": 7, "host": "old", "time": 1.0, "error": "of an earlier command"})
    os.utime(work.failure_file(7), (1.0, 1.0))
    log, job = job_of(run)
    with job:
        until(job.path)
    write_json(work.failure_file(3), {"rank": 3, "host": "h", "time": 1.0, "error": "no room"})
    data = json.loads(job.path.read_text())
    job.path.write_text(json.dumps(data | {"ended": None, "ticks": data["ticks"] + 1}))  # its pid is another's now
    state = state_of(run)
    assert [failure["error"] for failure in state["failures"]] == ["no room"]
    assert (state["last"]["ended"], state["state"], state["running"]) == ("killed", "failed", [])
    text = "\n".join(status.lines(state))
    assert "failed     rank 3 on h: no room" in text
    assert "killed     rvc-dist extract --run_dir 'a b' (pid " in text
    log.close()


def test_the_command_line_has_several_runs_and_json(run: Recipe, made: Recipe) -> None:
    """In a process of its own, which imports no torch."""
    program = "import sys; from rvc_dist.__main__ import main; code = main(); assert 'torch' not in sys.modules"
    program += "; sys.exit(code)"

    def told(*words: str) -> str:
        command = [sys.executable, "-c", program, "status", *words]
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=60).stdout

    both = told(run.run_dir, made.run_dir)
    assert both.count("tiny, unfinished") == 2
    one, many = json.loads(told(run.run_dir, "--json")), json.loads(told(run.run_dir, made.run_dir, "--json"))
    assert many[0] == one
    assert one.keys() == {
        "run", "kind", "what", "notes", "name", "state", "running", "lock", "last", "checkpoint", "damaged_checkpoints",
        "voices", "training", "stages", "requeue", "failures", "data",
    }  # fmt: skip
