"""Two jobs on one run folder, jobs that died, jobs on other hosts, and clocks that nobody may rely on."""

import json
import os
import shutil
import subprocess
import threading
import time

import pytest
from helpers import make_features, tiny_recipe
from launching import TIMEOUT_S, environment, ranks, rvc_dist

from rvc_dist.runtime import run_lock
from rvc_dist.runtime.run_lock import RunLock
from rvc_dist.train import trainer
from rvc_dist.workspace import Shard, StageError, Workspace


@pytest.fixture
def clock(monkeypatch):
    """The monotonic clock as the lock sees it: clock[0] seconds."""
    now = [1000.0]
    monkeypatch.setattr(run_lock.time, "monotonic", lambda: now[0])
    return now


def held_by(path, /, **changed):
    """A lock file that another job wrote; as it is, one on a host whose processes cannot be seen from here."""
    other = {
        "host": "node7",
        "pid": 4321,
        "ticks": 1.0,
        "pid_space": "another kernel",
        "slurm_job": "815",
        "slurm_restarts": 0,
        "elastic_run": None,
        "since": "2026-01-01 10:00:00+0000",
        "token": "other",
        "beat": 5,
        "path": "/elsewhere/train.lock",
    } | changed
    path.write_text(json.dumps(other) + "\n")


def test_what_is_no_file_of_ours_is_told(tmp_path):
    path = tmp_path / "train.lock"
    for make, what in (
        (os.mkfifo, "it is a FIFO"),
        (os.mkdir, "it is a folder"),
        (lambda p: p.symlink_to("/dev/zero"), "it is a link"),
        (lambda p: p.symlink_to("nowhere"), "it is a link"),
        (lambda p: p.write_bytes(bytes(1 << 20)), "expected at most"),
    ):
        make(path)
        assert not run_lock.may_be_held(path)
        with pytest.raises(StageError, match=f"train.lock: .*{what}.*; remove it"):
            RunLock(path).try_acquire()
        path.rmdir() if what.endswith("folder") else path.unlink()


def test_one_of_two_and_free_again_after_release(tmp_path):
    path = tmp_path / "train.lock"
    first = RunLock(path)
    assert first.try_acquire()
    assert json.loads(path.read_text())["pid"] == os.getpid()
    first.release()
    assert list(tmp_path.iterdir()) == []
    second = RunLock(path)
    assert second.try_acquire()
    second.release()


def test_a_live_process_of_this_machine_is_refused_at_once_and_a_dead_one_not(tmp_path):
    path = tmp_path / "train.lock"
    sleeper = subprocess.Popen(["sleep", "60"])
    seen = {"pid": sleeper.pid, "pid_space": run_lock.pid_space(), "ticks": run_lock.started_at(sleeper.pid)}
    held_by(path, **seen)
    try:
        with pytest.raises(StageError) as caught:
            RunLock(path).try_acquire()
        for part in (str(tmp_path), f"pid {sleeper.pid} on node7, SLURM job 815, since 2026-01-01", "run_dir"):
            assert part in str(caught.value)
        assert json.loads(path.read_text())["token"] == "other"
        held_by(path, **seen | {"ticks": seen["ticks"] - 1})  # its number was used again
        taken = RunLock(path)
        assert taken.try_acquire()
        taken.release()
    finally:
        sleeper.kill()
    os.waitid(os.P_PID, sleeper.pid, os.WEXITED | os.WNOWAIT)
    held_by(path, **seen)  # killed and nobody has asked for its exit code: a zombie
    assert RunLock(path).try_acquire()
    sleeper.wait()
    held_by(path, **seen)
    assert RunLock(path).try_acquire()


def test_a_clock_that_is_set_makes_no_holder_look_dead(monkeypatch):
    """psutil adds the boot's time of day, which changes with the clock, to a process's start."""
    import psutil

    before = run_lock.started_at(os.getpid())
    monkeypatch.setattr(psutil.Process, "create_time", lambda _: 0.0)
    assert run_lock.started_at(os.getpid()) == before > 0
    assert run_lock.is_alive(run_lock.job())


def test_a_folder_that_was_copied_while_it_trained_is_free_and_one_that_was_moved_is_not(tmp_path):
    run, copy, moved = (tmp_path / name for name in ("run", "copy", "moved"))
    run.mkdir()
    sleeper = subprocess.Popen(["sleep", "60"])
    try:
        seen = {"pid": sleeper.pid, "pid_space": run_lock.pid_space(), "ticks": run_lock.started_at(sleeper.pid)}
        held_by(run / "train.lock", **seen, path=str(run / "train.lock"))
        shutil.copytree(run, copy)
        taken = RunLock(copy / "train.lock")
        assert taken.try_acquire()
        taken.release()
        run.rename(moved)
        with pytest.raises(StageError, match="is being trained"):
            RunLock(moved / "train.lock").try_acquire()
    finally:
        sleeper.kill()
        sleeper.wait()


@pytest.mark.parametrize("hours", [-1, 0, 1])
def test_a_job_elsewhere_is_watched_by_ones_own_clock_alone(tmp_path, clock, hours):
    path = tmp_path / "train.lock"
    held_by(path, since="2030-01-01 10:00:00+0000")
    wrong = time.time() + 3600 * hours
    os.utime(path, (wrong, wrong))
    waiting = RunLock(path)
    for now in (1000.0, 1010.0, 1029.0):
        clock[0] = now
        assert not waiting.try_acquire()
    clock[0] = 1000.0 + run_lock.STALE_S
    assert waiting.try_acquire()
    assert json.loads(path.read_text())["token"] != "other"
    assert [p.name for p in tmp_path.iterdir()] == ["train.lock"]


def test_a_job_elsewhere_that_moves_is_refused(tmp_path, clock):
    path = tmp_path / "train.lock"
    held_by(path)
    waiting = RunLock(path)
    assert not waiting.try_acquire()
    held_by(path, beat=6)
    clock[0] += run_lock.REFRESH_S
    with pytest.raises(StageError, match="is being trained by pid 4321 on node7"):
        waiting.try_acquire()


def test_a_file_without_its_first_line_yet_is_waited_for(tmp_path, clock):
    path = tmp_path / "train.lock"
    path.write_text("")
    waiting = RunLock(path)
    assert not waiting.try_acquire()
    held_by(path)
    with pytest.raises(StageError, match="on node7"):
        waiting.try_acquire()


@pytest.mark.parametrize(
    ("before", "now", "at_once"),
    [
        ({"slurm_job": "815"}, {"SLURM_JOB_ID": "815", "SLURM_RESTART_COUNT": "1"}, True),  # requeued
        ({"slurm_job": "815"}, {"SLURM_JOB_ID": "815"}, False),  # two steps of one job
        ({"slurm_job": "815"}, {"SLURM_JOB_ID": "816", "SLURM_RESTART_COUNT": "1"}, False),
        ({"slurm_job": None}, {}, False),
        ({"slurm_job": None, "elastic_run": "abc"}, {"TORCHELASTIC_RUN_ID": "abc"}, True),
        ({"slurm_job": None, "elastic_run": "abc"}, {"TORCHELASTIC_RUN_ID": "abd"}, False),
        ({"slurm_job": None, "elastic_run": "none"}, {"TORCHELASTIC_RUN_ID": "none"}, False),
    ],
)
def test_a_job_that_was_started_again_goes_on_at_once(tmp_path, monkeypatch, before, now, at_once):
    for name in ("SLURM_JOB_ID", "SLURM_RESTART_COUNT", "TORCHELASTIC_RUN_ID"):
        monkeypatch.delenv(name, raising=False)
    for name, value in now.items():
        monkeypatch.setenv(name, value)
    held_by(tmp_path / "train.lock", **before)
    assert run_lock.may_be_held(tmp_path / "train.lock") is not at_once
    assert RunLock(tmp_path / "train.lock").try_acquire() is at_once


@pytest.mark.parametrize("fate", ["taken", "deleted"])
def test_a_lost_lock_is_noticed_and_left_to_its_new_holder(tmp_path, clock, fate):
    path = tmp_path / "train.lock"
    mine = RunLock(path)
    assert mine.try_acquire()
    first = path.read_text()
    mine.refresh()
    assert path.read_text() == first, "not due yet"
    clock[0] += run_lock.REFRESH_S
    mine.refresh()
    assert json.loads(path.read_text())["beat"] == 1
    mine.check()
    path.unlink()
    if fate == "taken":
        held_by(path)
    clock[0] += run_lock.REFRESH_S
    mine.refresh()
    assert mine.is_lost
    with pytest.raises(StageError, match="lost its lock, " + ("now pid 4321" if fate == "taken" else "it is gone")):
        mine.check()
    mine.release()
    assert (json.loads(path.read_text())["token"] == "other") if fate == "taken" else not path.exists()


def test_a_lock_that_another_job_looks_at_is_not_lost(tmp_path):
    """It moves a lock that it took for a dead job's aside, sees that it is another's, and moves it back."""
    path, aside = tmp_path / "train.lock", tmp_path / "train.lock.other"
    mine = RunLock(path)
    assert mine.try_acquire()
    path.rename(aside)
    back = threading.Timer(0.3, aside.rename, [path])
    back.start()
    mine.check()
    back.join()
    assert not mine.is_lost
    mine.release()
    assert not path.exists()


def test_of_many_that_find_a_dead_job_one_goes_on(tmp_path, monkeypatch):
    monkeypatch.setattr(run_lock, "STALE_S", 0.6)
    monkeypatch.setattr(run_lock, "REFRESH_S", 0.02)
    path = tmp_path / "train.lock"
    held_by(path)
    locks = [RunLock(path) for _ in range(8)]
    refused, until = [], time.monotonic() + 10.0

    def contend(number: int) -> None:
        locks[number]._mine["pid_space"] = f"host {number}"
        try:
            while not locks[number].try_acquire():
                time.sleep(0.01)
        except StageError:
            refused.append(number)
        else:
            while len(refused) < 7 and time.monotonic() < until:
                locks[number].refresh()
                time.sleep(0.01)

    threads = [threading.Thread(target=contend, args=(n,)) for n in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    holders = [n for n in range(8) if locks[n]._stream is not None and not locks[n].is_lost]
    assert len(holders) == 1
    assert len(refused) >= 6
    locks[holders[0]].check()


def test_who_takes_over_a_dead_jobs_lock_in_the_same_moment_as_another_is_refused(tmp_path, monkeypatch):
    """The file that it makes is replaced by another's before it trains."""
    monkeypatch.setattr(run_lock, "STALE_S", 0.0)
    mine = RunLock(tmp_path / "train.lock")
    held_by(mine.path)
    monkeypatch.setattr(RunLock, "_write", lambda _: held_by(mine.path, token="quicker"))
    with pytest.raises(StageError, match="is being trained by"):
        mine.try_acquire()
    assert mine._stream is None
    assert not mine.is_lost
    assert "quicker" in mine.path.read_text()


def test_a_lock_that_another_has_by_mistake_for_a_moment_is_not_lost(tmp_path):
    """As jobs do that contend for the lock of a dead one: each looks at whose file it moved, and puts it back."""
    mine, other = RunLock(tmp_path / "train.lock"), tmp_path / "other"
    assert mine.try_acquire()
    held_by(other)
    mine.path.rename(tmp_path / "aside")
    other.rename(mine.path)
    back = threading.Timer(0.3, (tmp_path / "aside").rename, [mine.path])
    back.start()
    mine.check()
    back.join()
    assert not mine.is_lost


def test_a_job_that_lost_its_lock_stops_without_a_checkpoint(tmp_path, monkeypatch):
    recipe = tiny_recipe(tmp_path, max_steps=6, save_every_steps=3, eval_every_steps=99)
    make_features(recipe)
    work = Workspace(recipe.run_dir, recipe.name)
    healthy = trainer.Trainer.train_step

    def step(self, batches):
        if self.progress.step == 1:
            held_by(work.train_lock_file)
        healthy(self, batches)

    monkeypatch.setattr(trainer.Trainer, "train_step", step)
    with pytest.raises(StageError, match="now pid 4321 on node7"):
        trainer.run(recipe, Shard())
    assert not list(work.checkpoints_dir.glob("*step_*"))
    assert json.loads(work.train_lock_file.read_text())["token"] == "other"
    assert "watch" not in [t.name for t in threading.enumerate()]


@pytest.mark.slow
@pytest.mark.distributed
def test_a_second_job_is_refused_until_the_first_is_dead(tmp_path):
    recipe = tiny_recipe(tmp_path / "run", max_steps=100_000, max_epochs=100_000, save_every_steps=2)
    make_features(recipe)
    file = tmp_path / "recipe.yaml"
    file.write_text(recipe.to_yaml())
    command = ["train", "--config", file]
    first = ranks.start(1, "", command, environment())
    try:
        if not any("saved" in line for line in first.lines()):
            pytest.fail(first.said())
        second = ranks.start(1, "", command, environment())
        pid = second.pid
        code, output = second.finish(TIMEOUT_S)
        assert code == 1, output
        assert f"rvc-dist train: {tmp_path / 'run'} is being trained by pid {first.pid} on" in output
        assert "Traceback" not in output
        assert not first.wait(0), "the first goes on"
        logs = Workspace(recipe.run_dir, recipe.name).logs_dir
        assert f"pid {pid}" not in (logs / "rank_00000.log").read_text(), "that is the first one's log"
        assert not list(logs.glob("failed_rank_*"))
    finally:
        first.kill()
    began_at = time.monotonic()
    assert "already trained" in rvc_dist(1, *command, "--train.max_steps", 1)  # less than it has
    assert time.monotonic() - began_at < run_lock.STALE_S
    assert not (tmp_path / "run" / "train.lock").exists()
