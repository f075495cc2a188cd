"""launch/cloud.sh on a machine without GPU, with a stand-in for rclone and for the installation."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from launching import ROOT, environment, finish, kill

SCRIPT = ROOT / "launch" / "cloud.sh"
VOICE = ROOT / "rvc_dist" / "demo_voice" / "voice"
RCLONE = """#!/usr/bin/env bash
# remote:PATH is the folder $FAKE_REMOTE/PATH.
set -euo pipefail
command=$1; shift
paths=()
ignore=()
while (($#)); do
  case $1 in
    --ignore-existing) ignore=(-n) ;;
    --exclude) shift ;;
    remote:*) paths+=("$FAKE_REMOTE/${1#remote:}") ;;
    *) paths+=("$1") ;;
  esac
  shift
done
case $command in
  lsf) ls "${paths[0]}" ;;
  sync) rm -rf "${paths[1]}" ;;&
  copy | sync) mkdir -p "${paths[1]}" && cp -rp "${ignore[@]}" "${paths[0]}/." "${paths[1]}/" ;;
esac
"""
PYTHON = """#!/usr/bin/env bash
# The environment is there already: nothing is installed.
[[ $1 == -m && $2 == pip ]] || exec {python} "$@"
"""


@pytest.fixture
def machine(tmp_path: Path) -> dict[str, str]:
    """The environment of a machine with rclone, a remote, and a virtual environment that needs nothing."""
    tools = tmp_path / "venv" / "bin"
    tools.mkdir(parents=True)
    for name, text in {"rclone": RCLONE, "python": PYTHON.format(python=sys.executable)}.items():
        (tools / name).write_text(text)
        (tools / name).chmod(0o755)
    (tools / "accelerate").write_text(
        f'#!/usr/bin/env bash\nexec {sys.executable} -m accelerate.commands.launch "${{@:2}}"\n'
    )
    (tools / "accelerate").chmod(0o755)
    remote = tmp_path / "remote"
    (remote / "voices").mkdir(parents=True)
    for name in ("000", "005", "025"):
        shutil.copy(VOICE / f"{name}.flac", remote / "voices")
    return environment() | {
        "VENV": str(tmp_path / "venv"),
        "PATH": f"{tools}{os.pathsep}{os.environ['PATH']}",
        "FAKE_REMOTE": str(remote),
    }


def cloud(machine: dict[str, str], *arguments: object, **more: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        ["bash", str(SCRIPT), *map(str, arguments)],
        env=machine | more,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        start_new_session=True,
    )


@pytest.mark.parametrize(
    ("arguments", "more", "code", "message"),
    [
        ([], {}, 2, "Usage: bash launch/cloud.sh RECIPE DATA"),
        (["nowhere.yaml", "x"], {}, 2, "nowhere.yaml is not a file; expected a recipe"),
        ([ROOT / "configs" / "48k.yaml", "nowhere"], {}, 1, "nowhere is not a folder; is the disk mounted?"),
        ([ROOT / "configs" / "48k.yaml", VOICE], {}, 1, "no nvidia-smi: this image has no NVIDIA driver"),
    ],
)
def test_what_is_missing_is_said_first(
    machine: dict[str, str], arguments: list[object], more: dict[str, str], code: int, message: str
) -> None:
    if "nvidia-smi" in message and shutil.which("nvidia-smi"):
        pytest.skip("this machine has a GPU driver")
    process = cloud(machine, *arguments, **more)
    output = finish(process, timeout_s=60)
    assert message in output
    assert process.returncode == code


@pytest.mark.slow
def test_an_interrupted_instance_is_continued_on_a_fresh_one(machine: dict[str, str], tmp_path: Path) -> None:
    run_dir, saved = tmp_path / "run", tmp_path / "remote" / "kept"
    options = ["--run_dir", run_dir, "--extract.f0_method", "fcpe"]
    options += ["--train.save_every_steps", "5", "--train.eval_every_steps", "1000"]
    command = [ROOT / "configs" / "demo_cpu.yaml", "remote:voices", *options, "--train.max_steps"]
    more = {"SAVE": "remote:kept", "SAVE_EVERY_S": "3", "RANKS": "1"}
    process = cloud(machine, *command, 1000, **more)
    try:
        deadline = time.monotonic() + 200
        while not list(saved.glob("checkpoints/step_*")):
            assert process.poll() is None, process.communicate()[0][-3000:]
            assert time.monotonic() < deadline
            time.sleep(0.2)
        process.send_signal(signal.SIGTERM)
        output = finish(process, timeout_s=60)
    finally:
        kill(process)
    assert process.returncode not in (0, None)
    assert "stopped by SIGTERM at step" in output
    assert "the same command goes on" in output
    step = int(output.split("stopped by SIGTERM at step ")[1].split()[0])
    assert (saved / "checkpoints" / f"step_{step:08d}").is_dir()

    shutil.rmtree(run_dir)  # the instance is gone
    shutil.rmtree(f"{run_dir}.audio")
    process = cloud(machine, *command, step + 3, **more)
    output = finish(process, timeout_s=200)
    assert process.returncode == 0, output[-3000:]
    assert f"continuing from step {step}," in output
    assert "0 to do here" in output  # clips and features came from there, too
    assert (saved / "voice" / "demo_last.pth").is_file()
