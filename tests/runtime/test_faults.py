"""What goes wrong on one rank ends all of them soon, with its reason, and loses nothing that was saved."""

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import psutil
import pytest
from helpers import make_features, tiny_recipe
from launching import LAUNCHER, ROOT, environment, finish, kill, launch, launcher, ranks, rvc_dist, start

from rvc_dist.train import checkpoint

pytestmark = pytest.mark.usefixtures("thin_ranks")
needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="mounts a small disk: needs root")


def prepared(folder: Path, **train: object) -> Path:
    """A recipe file of a run in `folder`/run whose features exist."""
    recipe = tiny_recipe(
        folder / "run", **({"max_steps": 1000, "eval_every_steps": 999, "trackers": ("tensorboard",)} | train)
    )
    make_features(recipe)
    file = folder / "recipe.yaml"
    file.write_text(recipe.to_yaml())
    return file


@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.parametrize("kind", ["raise", "kill"])
def test_a_rank_that_fails_ends_all_within_seconds_and_the_checkpoint_stays(tmp_path, monkeypatch, kind):
    file = prepared(tmp_path, save_every_steps=2)
    monkeypatch.setenv("FAULT", f"1:8:{kind}")
    job = launch(2, ROOT / "tests" / "faulty.py", "train", "--config", file)
    failed_at = None
    for line in job.lines():
        if "step 7/" in line:
            failed_at = time.monotonic()
    code, text = job.finish(60)
    assert failed_at is not None
    assert time.monotonic() - failed_at < 30
    assert code == 1
    cause = "RuntimeError: this rank was made to fail" if kind == "raise" else "Signal 9 (SIGKILL)"
    assert cause in text.partition("Root Cause (first observed failure)")[2], "the launcher's last lines"
    if kind == "raise":
        assert text.count("Traceback (most recent call last)") == 3, "rank 1's, the launcher's own, and rank 1's again"
        assert cause in (tmp_path / "run" / "logs" / "rank_00001.log").read_text()
    newest = checkpoint.latest(tmp_path / "run" / "checkpoints")
    assert newest is not None
    assert newest.name in ("step_00000004", "step_00000006")  # the writer of the last one may have been killed
    checkpoint.verify(newest)  # that such a run goes on: test_resume.py


def all_of(launcher: int) -> list[psutil.Process]:
    """A launcher and all that it started: ranks, loader processes, guards."""
    return [psutil.Process(launcher), *psutil.Process(launcher).children(recursive=True)]


def alive_after(seconds: float, processes: list[psutil.Process]) -> list[psutil.Process]:
    """Those that run for longer than so many seconds more; one that nobody has waited for does not run."""
    _, left = psutil.wait_procs(processes, timeout=seconds)
    return [each for each in left if each.is_running() and each.status() != psutil.STATUS_ZOMBIE]


def with_fault(monkeypatch, file: Path, fault: str) -> tuple[str, float]:
    """What two ranks print of which one has a fault, and the seconds from its last step's line to the end of all."""
    monkeypatch.setenv("FAULT", fault)
    job = launch(2, ROOT / "tests" / "faulty.py", "train", "--config", file)
    processes, last_at = [], float("nan")
    try:
        for line in job.lines():
            if "step 2/" in line:
                processes = all_of(job.pid)
            if re.search(r"step \d+/", line):
                last_at = time.monotonic()
        code, text = job.finish(30)
    finally:
        job.kill()
    assert len(processes) == 7, "a launcher, and of each rank itself, a loader process and a guard"
    assert not alive_after(1.0, processes), "a process outlived the launcher"
    assert code == 1
    return text, time.monotonic() - last_at


@pytest.mark.slow
@pytest.mark.distributed
def test_a_loader_that_gives_nothing_is_told_by_its_rank_and_what_the_other_says_is_true(tmp_path, monkeypatch):
    file = prepared(tmp_path, timeout_s=4.0)
    monkeypatch.delenv("THIN")  # else the other begins to wait at the same moment
    text, seconds = with_fault(monkeypatch, file, "1:6:stall")
    assert 4.0 < seconds < 4.0 + 12
    reason = (
        f"rank 1 on {os.uname().nodename} waited in vain for train.timeout_s = 4 s for the clips of step 6, which its "
        f"1 loader process(es) read from {tmp_path / 'run'}: see whether that disk answers"
    )
    assert reason in text.partition("Root Cause (first observed failure)")[2], "the launcher's last lines"
    first = (tmp_path / "run" / "logs" / "rank_00000.log").read_text()
    assert re.search(rf"rank 1 on .* failed first: see .*rank_00001.log: .*{re.escape(reason)}", first)
    assert "the others, all of which" not in text


@pytest.mark.slow
@pytest.mark.distributed
def test_a_loader_process_that_is_killed_is_told_and_ends_all(tmp_path, monkeypatch):
    text, seconds = with_fault(monkeypatch, prepared(tmp_path), "1:8:loader")
    assert seconds < 12
    told = (
        r"rank 1: a loader process died in step [4-8] \(Killed\): the host's memory or /dev/shm may be full\. Ask for "
    )
    assert re.search(told, text.partition("Root Cause (first observed failure)")[2])


@pytest.mark.slow
@pytest.mark.distributed
def test_a_disk_that_hangs_ends_all_with_its_reason(tmp_path, monkeypatch):
    """The first rank's: of its checkpoint, curves, lock, beats and log nothing is written to the end any more."""
    text, seconds = with_fault(monkeypatch, prepared(tmp_path, save_every_steps=3, timeout_s=6.0), "0:5:disk")
    assert seconds < 20
    run = tmp_path / "run"
    assert (
        f"TensorBoard's writer in {run / 'tensorboard' / 'tiny'} has not answered for 2 s: going on without it" in text
    )
    reason = f"{run / 'checkpoints'}: the last checkpoint is still being written after 3 s: see whether its disk"
    assert reason in text.partition("Root Cause (first observed failure)")[2]
    assert text.count("Traceback (most recent call last)") == 1, "the launcher's own"
    saved = checkpoint.list_checkpoints(run / "checkpoints")
    assert [folder.name for folder in saved] == ["step_00000003"]
    checkpoint.verify(saved[0])


@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.parametrize("until", ["imports", "set-up"])
def test_a_launcher_that_is_killed_before_the_first_step_takes_its_ranks_along(tmp_path, until):
    file = prepared(tmp_path)
    if until == "imports":  # real ones
        process = start([*launcher(2), "-m", "rvc_dist", "train", "--config", str(file)])
        pid, end = process.pid, partial(kill, process)
        while len(all_of(pid)) < 3:
            time.sleep(0.01)
    else:
        job = launch(2, "-m", "rvc_dist", "train", "--config", file)
        pid, end = job.pid, job.kill
        next(line for line in job.lines() if "budget:" in line)
    try:
        processes = all_of(pid)
        assert len(processes) >= 3
        os.kill(pid, signal.SIGKILL)
        assert not alive_after(10.0, processes)
    finally:
        end()


@needs_root
@pytest.mark.slow
@pytest.mark.distributed
def test_shared_memory_that_is_too_small_is_told_before_the_first_step(tmp_path):
    file = prepared(tmp_path, batch_size=8)
    small = ["unshare", "--mount", "bash", "-c", 'mount -t tmpfs -o size=1m tmpfs /dev/shm && exec "$@"', "small"]
    torchrun = [sys.executable, LAUNCHER, "2", *launcher(2)[2:]]  # forks its ranks
    process = start([*small, *torchrun, "-m", "rvc_dist", "train", "--config", str(file)])
    output = finish(process, 60)
    assert process.returncode == 1
    assert re.search(r"/dev/shm has 1 MB free, the loaders of 2 rank\(s\) on this host need \d+ MB \(steps of ", output)
    assert "start the container with --shm-size=1g, or set train.num_workers 0" in output
    assert output.count("Traceback (most recent call last)") == 1, "the launcher's own"
    assert "step 1/" not in output


@contextmanager
def small_disk(folder: Path, megabytes: int):
    folder.mkdir(parents=True)
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={megabytes}m", "tmpfs", str(folder)], check=True)
    try:
        yield folder
    finally:
        subprocess.run(["umount", str(folder)], check=True)


@needs_root
@pytest.mark.slow
@pytest.mark.distributed
def test_a_full_disk_ends_all_ranks_with_one_reason_and_keeps_what_was_saved(tmp_path):
    file = prepared(tmp_path, save_every_steps=1, keep_checkpoints=99)
    with small_disk(tmp_path / "run" / "checkpoints", 24) as disk:
        output = rvc_dist(2, "train", "--config", file, code=1)
        assert output.count("a checkpoint needs") == 1, "the first rank's alone"
        assert "earlier checkpoints are untouched" in output
        saved = checkpoint.list_checkpoints(disk)
        assert len(saved) >= 2
        for folder in saved:
            checkpoint.verify(folder)
        assert not list(disk.glob(".step_*")), "no half of a checkpoint stays"
        for folder in saved[:-1]:
            shutil.rmtree(folder)
        last = int(saved[-1].name.removeprefix("step_"))
        assert "continuing from step" in rvc_dist(1, "train", "--config", file, "--train.max_steps", last + 1)


@pytest.mark.slow
def test_a_save_beyond_a_limit_on_the_size_of_files_is_a_failure(tmp_path, monkeypatch):
    """A real limit, as quotas are: safetensors' error for it is no OSError."""
    file = prepared(tmp_path, max_steps=2)
    monkeypatch.setenv("FAULT", "0:1:limit")
    faulty = str(ROOT / "tests" / "faulty.py")
    code, output = ranks.start(1, faulty, ["train", "--config", file], environment()).finish(120)
    assert code == 1, output[-3000:]
    reason = r"step_00000002: cannot be written \(.*File too large.*\); \d+\.\d+ MB needed, \d+ MB free, no file may "
    assert re.search(reason + r"have more than 0\.131 MB \(ulimit -f\); earlier checkpoints are untouched", output)
    assert "trained to step" not in output
    assert "Traceback" not in output
    assert not list((tmp_path / "run" / "checkpoints").iterdir())


@needs_root
@pytest.mark.distributed
def test_a_folder_without_write_permission_is_refused_before_the_first_step(tmp_path):
    """Root may write anywhere but to a file system that is mounted read-only."""
    file = prepared(tmp_path)
    with small_disk(tmp_path / "run" / "checkpoints", 1) as disk:
        subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)
        output = rvc_dist(2, "train", "--config", file, code=1, launch_file="cpu.yaml")
    assert output.count("checkpoints cannot be written there (Read-only file system); nothing was trained") == 2
    # By the first rank, and by the launcher at the end.
    assert "step 1/" not in output
