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
from launching import ROOT, environment, finish, kill, warm
from torch import Tensor
from warm_cli import CLIENT

from rvc_dist.train import checkpoint
from rvc_dist.train.optimizers import OptimizerState
from rvc_dist.train.progress import Progress

SCRIPT = ROOT / "launch" / "cloud.sh"
VOICE = ROOT / "rvc_dist" / "demo_voice" / "voice"
RCLONE = """#!{python}
'''remote:PATH is the folder $FAKE_REMOTE/PATH. Options mean what they mean in rclone, and so do exit codes.'''
import os, re, shutil, sys
from pathlib import Path

command, *rest = sys.argv[1:]
paths, excluded, options = [], [], {{}}
while rest:
    word = rest.pop(0)
    if word == "--exclude":
        glob = rest.pop(0)
        anchor = "^" if glob.startswith("/") else "(^|/)"
        parts = re.split(r"(\\*\\*|\\*)", glob.lstrip("/"))
        excluded.append(anchor + "".join({{"**": ".*", "*": "[^/]*"}}.get(p, re.escape(p)) for p in parts) + "$")
    elif word in ("--ignore-existing", "--dirs-only"):
        options[word] = True
    else:
        path = Path(os.environ["FAKE_REMOTE"], word[7:]) if word.startswith("remote:") else Path(word)
        paths.append(path) if word != "--backup-dir" else options.update(backup=rest.pop(0))
backup = Path(os.environ["FAKE_REMOTE"], options["backup"][7:]) if "backup" in options else None

def files(folder):
    found = [p.relative_to(folder) for p in sorted(folder.rglob("*"), reverse=True) if p.is_file()]
    return [p for p in found if not any(re.search(e, p.as_posix()) for e in excluded)]

def give_way(path):
    if backup is not None:
        (backup / path).parent.mkdir(parents=True, exist_ok=True)
        shutil.move(there / path, backup / path)
    else:
        (there / path).unlink()

if command == "lsf" and os.environ.get("FAKE_ERROR"):
    print("Failed to lsf: couldn't connect", file=sys.stderr)
    sys.exit(int(os.environ["FAKE_ERROR"]))
here = paths[0]
if not here.is_dir():
    print("error listing: directory not found", file=sys.stderr)
    sys.exit(3)
if command == "lsf":
    print("".join(f"{{p.name}}/\\n" for p in here.iterdir() if p.is_dir()), end="")
    sys.exit()
if command == "purge":
    shutil.rmtree(here)
    sys.exit()
there = paths[1]
for path in files(here):
    if (there / path).exists():
        if options.get("--ignore-existing") or (there / path).read_bytes() == (here / path).read_bytes():
            continue
        give_way(path)
    (there / path).parent.mkdir(parents=True, exist_ok=True)
    shutil.copy2(here / path, there / path)
    with open(os.environ["FAKE_REMOTE"] + ".log", "a") as log:
        log.write(f"{{path}}\\n")
for path in files(there) if command == "sync" else ():
    if not (here / path).exists():
        give_way(path)
"""
PYTHON = """#!/usr/bin/env bash
# The environment is there already: nothing is installed. Scripts of standard input are run in a fork of `ranks`.
case $* in
  "-m pip "*) exit ;;
  *device_count*) exec echo 0 ;;
  "- "*)
    cat > {script}
    WARM='{warm}' exec {client} "${{@:2}}"
    ;;
esac
exec {python} "$@"
"""


@pytest.fixture
def machine(tmp_path: Path) -> dict[str, str]:
    """The environment of a machine with rclone, a remote, and a virtual environment that needs nothing."""
    tools = tmp_path / "venv" / "bin"
    tools.mkdir(parents=True)
    for name, text in {
        "uv": "#!/bin/sh\n",
        "rclone": RCLONE.format(python=sys.executable),
        "python": PYTHON.format(
            python=sys.executable,
            script=tmp_path / "stdin.py",
            warm=warm(str(tmp_path / "stdin.py")),
            client=CLIENT,
        ),
    }.items():
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


STAND_IN = """#!/usr/bin/env bash
# In the place of the training: what a run may leave when it is ended at any moment.
mkdir -p "{run}/checkpoints/.step_00000009.0a.tmp" "{run}/clips"
for file in train.lock checkpoints/.step_00000009.0a.tmp/state.json clips/.0a.tmp clips/00000.safetensors; do
  echo new > "{run}/$file"
done
ls "{run}/checkpoints" > "{run}.seen"
"""


def trained(machine: dict[str, str], tmp_path: Path, **more: str) -> tuple[int | None, str]:
    """The exit code and the output of the script, with a stand-in for the training, on a machine without the run."""
    (tmp_path / "venv" / "bin" / "accelerate").write_text(STAND_IN.format(run=tmp_path / "run"))
    command = [ROOT / "configs" / "demo_cpu.yaml", "remote:voices", "--run_dir", tmp_path / "run"]
    process = cloud(machine, *command, SAVE="remote:kept/", RANKS="1", **more)
    output = finish(process, timeout_s=60)
    return process.returncode, output


def test_what_was_uploaded_is_trained_from_where_it_is(machine: dict[str, str], tmp_path: Path) -> None:
    accelerate = tmp_path / "venv" / "bin" / "accelerate"
    accelerate.write_text(f'#!/usr/bin/env bash\necho "$*" > {tmp_path}/told\n')
    (tmp_path / "venv" / "bin" / "rclone").unlink()  # nothing is copied
    process = cloud(machine, ROOT / "configs" / "demo_cpu.yaml", "s3://bucket/alice", RANKS="1")
    output = finish(process, timeout_s=60)
    assert process.returncode == 0, output
    assert (tmp_path / "told").read_text().endswith("demo_cpu.yaml --data.remote s3://bucket/alice\n")


def write_checkpoint(folder: Path, step: int) -> None:
    states = {name: OptimizerState({}, []) for name in checkpoint.MODELS}
    models: dict[str, dict[str, Tensor]] = {name: {} for name in checkpoint.MODELS}
    checkpoint.save(folder, checkpoint.Checkpoint(Progress(step=step), {}, models, states))


def kept(folder: Path) -> list[str]:
    return sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file())


def test_a_remote_that_cannot_be_read_is_not_taken_for_a_new_one(machine: dict[str, str], tmp_path: Path) -> None:
    saved = tmp_path / "remote" / "kept"
    saved.mkdir()
    (saved / "config.yaml").write_text("before")
    code, output = trained(machine, tmp_path, FAKE_ERROR="1")
    assert code == 1
    assert "remote:kept cannot be read (rclone's exit code 1, its reason is above). Nothing was started" in output
    assert "couldn't connect" in output
    assert kept(saved) == ["config.yaml"]
    assert not (tmp_path / "run.seen").exists()


@pytest.mark.slow
def test_what_is_kept_is_fetched_when_whole_and_never_deleted(machine: dict[str, str], tmp_path: Path) -> None:
    saved, folder = tmp_path / "remote" / "kept", tmp_path / "remote" / "kept" / "checkpoints"
    code, output = trained(machine, tmp_path)
    assert code == 0, output
    assert "nothing is kept at remote:kept yet: a new run" in output
    assert kept(saved) == ["clips/00000.safetensors"], "neither what is half-written nor the lock"

    shutil.rmtree(tmp_path / "run")
    for step in (4, 7, 8):
        write_checkpoint(folder, step)
    (folder / "step_00000007" / "manifest.json").unlink()  # of a transfer that was cut off
    (folder / "step_00000008" / "discriminator.safetensors").unlink()
    (saved / "clips" / "00000.safetensors").write_text("before")
    code, output = trained(machine, tmp_path)
    assert code == 0, output
    assert (tmp_path / "run.seen").read_text() == "step_00000004\n"
    for told in ("step_00000007 is not whole and is passed over: manifest", "step_00000008 is not whole"):
        assert told in output
    checkpoint.verify(folder / "step_00000004")
    assert {p.partition("/")[0] for p in kept(folder)} == {"step_00000004"}
    replaced = tmp_path / "remote" / "kept.replaced"
    assert {p.partition("/")[0] for p in kept(replaced / "checkpoints")} == {"step_00000007", "step_00000008"}
    assert (replaced / "clips" / "00000.safetensors").read_text() == "before"

    for step in (1, 2, 3):
        write_checkpoint(folder, step)
        (folder / f"step_{step:08d}" / "manifest.json").unlink()
    (replaced / "checkpoints" / "step_best").mkdir()
    code, output = trained(machine, tmp_path, KEEP_REPLACED="4")
    assert code == 0, output
    left = sorted(p.name for p in (replaced / "checkpoints").iterdir())
    assert left == [*(f"step_{step:08d}" for step in (2, 3, 7, 8)), "step_best"], "the newest, and what a person made"

    shutil.rmtree(saved)
    Path(f"{tmp_path / 'remote'}.log").unlink()
    assert trained(machine, tmp_path)[0] == 0
    sent = Path(f"{tmp_path / 'remote'}.log").read_text().split()
    assert sent[-1] == "checkpoints/step_00000004/manifest.json", "a half-sent checkpoint has none"


@pytest.mark.slow
def test_an_interrupted_instance_is_continued_on_a_fresh_one(machine: dict[str, str], tmp_path: Path) -> None:
    run_dir, saved = tmp_path / "run", tmp_path / "remote" / "kept"
    options = ["--run_dir", run_dir]
    options += ["--train.report", "false", "--train.samples", "false"]
    options += ["--train.save_every_steps", "2", "--train.eval_every_steps", "1000"]
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
    forked = f'exec {CLIENT} "${{@:13}}"'  # nothing is sent to it
    (tmp_path / "venv" / "bin" / "accelerate").write_text(f"#!/usr/bin/env bash\n{forked}\n")
    more["WARM"] = warm()
    process = cloud(machine, *command, step + 2, **more)
    output = finish(process, timeout_s=200)
    assert process.returncode == 0, output[-3000:]
    assert f"continuing from step {step}," in output
    assert "0 to do here" in output  # clips and features came from there, too
    assert (saved / "voice" / "demo_last.pth").is_file()
