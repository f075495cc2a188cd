"""What goes wrong on one rank ends all of them soon, with its reason, and loses nothing that was saved."""

import os
import re
import shutil
import subprocess
import time
from contextlib import contextmanager
from pathlib import Path

import pytest
from launching import ROOT, finish, launcher, rvc_dist, start
from tiny import make_features, tiny_recipe

from rvc_dist.train import checkpoint

needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="mounts a small disk: needs root")


@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.parametrize("kind", ["raise", "kill"])
def test_a_rank_that_fails_ends_all_within_seconds_and_the_checkpoint_stays(tmp_path, monkeypatch, kind):
    recipe = tiny_recipe(tmp_path, max_steps=1000, save_every_steps=2, eval_every_steps=1000)
    make_features(recipe)
    file = tmp_path / "recipe.yaml"
    file.write_text(recipe.to_yaml())
    monkeypatch.setenv("FAULT", f"1:8:{kind}")
    process = start([*launcher(2), str(ROOT / "tests" / "faulty.py"), "train", "--config", str(file)])
    assert process.stdout is not None
    output, failed_at = [], None
    for line in process.stdout:
        output.append(line)
        if "step 7/" in line:
            failed_at = time.monotonic()
    finish(process, 60)
    assert failed_at is not None
    assert time.monotonic() - failed_at < 30
    assert process.returncode == 1
    text = "".join(output)
    cause = "RuntimeError: this rank was made to fail" if kind == "raise" else "Signal 9 (SIGKILL)"
    assert cause in text.partition("Root Cause (first observed failure)")[2], "the launcher's last lines"
    if kind == "raise":
        assert text.count("Traceback (most recent call last)") == 3, "rank 1's, the launcher's own, and rank 1's again"
        assert cause in (tmp_path / "logs" / "rank_00001.log").read_text()
    newest = checkpoint.latest(tmp_path / "checkpoints")
    assert newest is not None
    assert newest.name in ("step_00000004", "step_00000006")  # the writer of the last one may have been killed
    checkpoint.verify(newest)
    monkeypatch.delenv("FAULT")
    rvc_dist(2, "train", "--config", file, "--train.max_steps", 9)


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
@pytest.mark.parametrize("num_ranks", [1, 2])
def test_a_full_disk_ends_all_ranks_with_one_reason_and_keeps_what_was_saved(tmp_path, num_ranks):
    recipe = tiny_recipe(
        tmp_path / "run", max_steps=1000, save_every_steps=3, keep_checkpoints=99, eval_every_steps=999
    )
    make_features(recipe)
    file = tmp_path / "recipe.yaml"
    file.write_text(recipe.to_yaml())
    with small_disk(tmp_path / "run" / "checkpoints", 48) as disk:
        output = rvc_dist(num_ranks, "train", "--config", file, code=1)
        assert output.count("a checkpoint needs") == (1 if num_ranks == 1 else 2), "a launcher says it again at the end"
        assert "earlier checkpoints are untouched" in output
        saved = checkpoint.all_in(disk)
        assert len(saved) >= 2
        for folder in saved:
            checkpoint.verify(folder)
        assert not list(disk.glob(".step_*")), "no half of a checkpoint stays"
        for folder in saved[:-1]:
            shutil.rmtree(folder)
        last = int(saved[-1].name.removeprefix("step_"))
        assert "continuing from step" in rvc_dist(num_ranks, "train", "--config", file, "--train.max_steps", last + 1)


@pytest.mark.distributed
@pytest.mark.slow
@pytest.mark.parametrize("num_ranks", [1, 2])
def test_a_save_beyond_a_limit_on_the_size_of_files_is_a_failure(tmp_path, num_ranks):
    """A real limit, as quotas are: safetensors' error for it is no OSError."""
    recipe = tiny_recipe(tmp_path / "run", max_steps=2)
    make_features(recipe)
    file = tmp_path / "recipe.yaml"
    file.write_text(recipe.to_yaml())
    limited = ["bash", "-c", 'ulimit -f 256; exec "$@"', "limited", *launcher(num_ranks)]
    process = start([*limited, "-m", "rvc_dist", "train", "--config", str(file)])
    output = finish(process, 120)
    assert process.returncode == 1, output[-3000:]
    reason = r"step_00000002: cannot be written \(.*File too large.*\); \d+\.\d+ MB needed, \d+ MB free, no file may "
    assert re.search(reason + r"have more than 0\.262 MB \(ulimit -f\); earlier checkpoints are untouched", output)
    assert "trained to step" not in output
    assert num_ranks > 1 or "Traceback" not in output
    assert not list((tmp_path / "run" / "checkpoints").iterdir())


@needs_root
@pytest.mark.distributed
def test_a_folder_without_write_permission_is_refused_before_the_first_step(tmp_path):
    """Root may write anywhere but to a file system that is mounted read-only."""
    recipe = tiny_recipe(tmp_path / "run")
    make_features(recipe)
    file = tmp_path / "recipe.yaml"
    file.write_text(recipe.to_yaml())
    with small_disk(tmp_path / "run" / "checkpoints", 1) as disk:
        subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)
        output = rvc_dist(2, "train", "--config", file, code=1)
    assert output.count("checkpoints cannot be written there (Read-only file system); nothing was trained") == 2
    # By the first rank, and by the launcher at the end.
    assert "step 1/" not in output
