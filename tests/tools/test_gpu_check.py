"""launch/gpu_check.sh and what it measures, on a machine without GPU: nothing is lost, whatever fails."""

import json
import os
import signal
import sys
import time
from pathlib import Path

import pytest
import torch
from launching import ROOT, environment, finish, ranks, start

from rvc_dist.tools import gpu_check
from rvc_dist.workspace import StageError

SCRIPT = ["bash", str(ROOT / "launch" / "gpu_check.sh")]
PYTHON = """#!/usr/bin/env bash
# Says what it is to do. torch sees two GPUs; measuring optimizers fails, and extraction hangs.
case "$*" in
  *device_count*) exec echo 2 ;;
  *gpu_check*optimizers) echo "python $*"; exit 3 ;;
  *gpu_check*extraction) echo "python $*"; exec sleep 60 ;;
  *) echo "python $*" ;;
esac
"""


@pytest.fixture
def fake(tmp_path: Path) -> dict[str, str]:
    path = tmp_path / "python"
    path.write_text(PYTHON)
    path.chmod(0o755)
    return {"PYTHON": str(path), "OUT": str(tmp_path)}


def test_a_machine_without_gpu_is_refused_in_one_sentence():
    process = start(SCRIPT, {"CUDA_VISIBLE_DEVICES": "", "PYTHON": sys.executable})
    (line,) = finish(process).splitlines()
    assert process.returncode == 1
    assert line.startswith("gpu_check: torch sees no GPU on this machine")


def test_a_part_that_fails_or_is_cut_stops_no_other(fake, tmp_path):
    script = tmp_path / "launch" / "gpu_check.sh"  # with a limit that is no minute
    script.parent.mkdir()
    script.write_text(Path(SCRIPT[1]).read_text().replace("measure 90 extraction", "measure 1 extraction"))
    (tmp_path / "tests").mkdir()
    (tmp_path / "tests" / "test_x.py").write_text("@pytest.mark.gpu")
    process = start(["bash", str(script)], fake)
    lines = finish(process).splitlines()
    assert process.returncode == 1
    assert lines[-1].startswith("== 2 parts failed: optimizers;extraction (")
    assert "== optimizers: FAILED, exit code 3" in lines
    assert "== extraction: FAILED, not done after 1 s" in lines
    commands = [line for line in lines if line.startswith("python ")]
    assert "tests/test_x.py" in commands[1]
    assert commands[1].endswith("-m gpu and not slow")
    assert commands[2].endswith("steps plain fp32 TF32")
    assert "--nproc_per_node 2" in commands[-3]
    assert commands[-2].endswith("steps compiled")
    assert commands[-1].endswith("gpu_check table")


def test_a_check_that_is_stopped_still_shows_its_tables(fake):
    process = start(SCRIPT, fake)
    assert process.stdout is not None
    for line in process.stdout:
        if line.startswith("python") and "extraction" in line:
            break
    began_at = time.monotonic()
    os.kill(process.pid, signal.SIGTERM)
    lines = process.stdout.read().splitlines()
    assert process.wait() == 1
    assert time.monotonic() - began_at < 10
    assert lines[-2].endswith("gpu_check table")
    assert lines[-1].startswith("== 1 parts failed: optimizers (")


def test_rows_that_fail_are_told_from_those_that_cannot_be(tmp_path, monkeypatch, capsys):
    def fail(error: Exception, cause: Exception | None = None):
        raise error from cause

    def part(check):
        yield "good", lambda: {"s": 0.25, "utilisation": 0.5}
        yield "above", lambda: {"utilisation": None}
        yield "package", lambda: fail(ImportError("no deepspeed"))
        yield "refused", lambda: fail(StageError("lamb needs a package"), ImportError("no pytorch_optimizer"))
        yield "memory", lambda: fail(torch.OutOfMemoryError("CUDA out of memory"))
        if check.tiny:
            yield "fault", lambda: fail(RuntimeError("CUDA error: misaligned address"))

    monkeypatch.setitem(gpu_check.PARTS, "machine", part)
    assert gpu_check.measure(gpu_check.Check(tmp_path, tiny=False), "machine")
    (tmp_path / "rows.jsonl").unlink()
    assert not gpu_check.measure(gpu_check.Check(tmp_path, tiny=True), "machine")
    rows = {row.pop("what"): row for row in map(json.loads, (tmp_path / "rows.jsonl").read_text().splitlines())}
    assert [name for name, row in rows.items() if "left out" in row] == ["package", "refused", "memory"]
    assert [name for name, row in rows.items() if "FAILED" in row] == ["fault"]
    gpu_check.table(gpu_check.Check(tmp_path, tiny=True))
    printed = capsys.readouterr().out
    for text in ("utilisation 50.0%", "utilisation error: above the measured peak", "FAILED CUDA error: misaligned"):
        assert text in printed
    assert len(json.loads((tmp_path / "gpu_check.json").read_text())) == 6


EVERY_PART = """
import os, sys, torch._dynamo
from pathlib import Path
from helpers import thin_networks
from rvc_dist.tools import gpu_check
for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
    del os.environ[name]
torch._dynamo.config.disable = True  # compiling takes minutes, however small the networks
thin_networks(setattr)
check = gpu_check.Check(Path(sys.argv[1]), tiny=True)
check.folder.mkdir()
check.__dict__["clips"] = [check.clips[0][:4000]]  # a quarter of a second
for part in gpu_check.PARTS:
    assert gpu_check.measure(check, part, *(gpu_check.STEPS if part == "steps" else ())), part
gpu_check.table(check)
"""


@pytest.mark.slow
def test_every_part_measures_without_a_gpu(tmp_path):
    """In one process, where the script has one for each; scaling is the steps again, under a launcher."""
    script = tmp_path / "every_part.py"
    script.write_text(EVERY_PART)
    on_cpu = environment() | {"CUDA_VISIBLE_DEVICES": ""}
    code, output = ranks.start(1, str(script), [tmp_path / "gpu_check"], on_cpu).finish(600)
    assert code == 0, output[-3000:]
    assert "FAILED" not in output, output[-3000:]
    rows = json.loads((tmp_path / "gpu_check" / "gpu_check.json").read_text())
    assert {row["part"] for row in rows} == set(gpu_check.PARTS)
    measured = {row["what"]: row for row in rows if "left out" not in row}
    for way in gpu_check.STEPS.keys() - {"fp16", "CUDA graphs"}:
        assert measured[f"{way}, batch 1"]["s"] > 0
        assert 0 < measured[f"{way}, batch 1"]["utilisation"] < 1
    assert {"adamw", "anyprecision_adamw", "hubert fp32", "whisper fp32", "rmvpe fp32", "penn fp32"} < set(measured)
    assert measured["bf16_adamw True"]["loss/g_mel"] < 0.05
