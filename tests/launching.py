"""Starts rvc_dist and helper scripts as a user does, on one rank or several, and never leaves a process behind."""

import contextlib
import json
import os
import subprocess
import sys
from pathlib import Path

import psutil
from warm_cli import CLIENT, LAUNCHER, ROOT, Job, Ranks

from rvc_dist.choices import (
    DATASETS,
    DEEPSPEED,
    F0_METHODS,
    LHOTSE,
    NOISEREDUCE,
    OPTIMIZERS,
    PYAV,
    PYLOUDNORM,
    SHTAB,
    STORAGES,
)

TIMEOUT_S = 300
OPTIONAL = {DATASETS, DEEPSPEED, LHOTSE, NOISEREDUCE, PYAV, PYLOUDNORM, SHTAB}
OPTIONAL |= {spec.package for table in (F0_METHODS, OPTIMIZERS) for spec in table.values() if spec.package}
OPTIONAL |= {package for package in STORAGES.values() if package.extra}
BROUGHT = ("llvmlite", "matplotlib", "numba", "pandas", "plotly", "onnxruntime", "resampy", "sklearn")
"""By what the extras bring."""
ONLY_CORE = {
    "PYTHONPATH": os.pathsep.join([str(ROOT / "tests" / "lacking"), str(ROOT)]),
    "LACKING": ",".join([*(package.module for package in OPTIONAL), *BROUGHT]),
}
"""The environment of a process in which no package can be imported that only an extra brings (but for faiss)."""
ranks = Ranks()
"""Ended by conftest.py."""


def environment() -> dict[str, str]:
    """The caller's, without what an outer launcher may have set; one thread a rank."""
    outer = {"RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"}
    kept = {k: v for k, v in os.environ.items() if k not in outer}
    path = os.pathsep.join([str(ROOT / "tests"), kept.get("PYTHONPATH", "")])
    return kept | {"OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true", "PYTHONPATH": path, "COLUMNS": "200"}


def launcher(num_ranks: int, launch_file: str | None = None) -> list[str]:
    """The command before `-m rvc_dist ...`: torchrun's, or accelerate's with a file of launch/; none for one rank."""
    if launch_file is not None:
        accelerate = ["accelerate.commands.launch", "--config_file", str(ROOT / "launch" / launch_file)]
        return [sys.executable, "-m", *accelerate, "--num_processes", str(num_ranks), "--main_process_port", "0"]
    return [sys.executable] if num_ranks == 1 else torchrun_launcher(num_ranks)


def torchrun_launcher(num_ranks: int) -> list[str]:
    return [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(num_ranks)]


def start(
    command: list[str], more_environment: dict[str, str] | None = None, **options: object
) -> subprocess.Popen[str]:
    return subprocess.Popen(
        command,
        cwd=ROOT,
        env=environment() | (more_environment or {}),
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        start_new_session=True,
        **options,
    )


def finish(process: subprocess.Popen[str], timeout_s: float = TIMEOUT_S) -> str:
    """The output of a process that is to end by itself; it and its ranks are ended when it does not."""
    try:
        return process.communicate(timeout=timeout_s)[0]
    except subprocess.TimeoutExpired:
        kill(process)
        raise AssertionError(f"no end after {timeout_s} s:\n{process.communicate()[0][-3000:]}") from None


def kill(process: subprocess.Popen[str]) -> None:
    """SIGKILL to a process and all that it started: launchers give their ranks sessions of their own."""
    with contextlib.suppress(psutil.NoSuchProcess):
        launcher_process = psutil.Process(process.pid)
        for each in [launcher_process, *launcher_process.children(recursive=True)]:
            with contextlib.suppress(psutil.NoSuchProcess):
                each.kill()


def launch(num_ranks: int, *words: object, launch_file: str | None = None, **more_environment: str) -> Job:
    """Begin what follows the command of `launcher`, in a process whose imports are done; its ranks are forks of it."""
    _, _, module, *options = launcher(num_ranks, launch_file)
    command = [num_ranks, module, *options, *words]
    return ranks.start(1, LAUNCHER, command, environment() | more_environment)


def warm(script: str = "") -> str:
    """WARM for CLIENT: its words are those of rvc_dist, or of `script`, in a process whose imports are done."""
    return json.dumps([ranks.server(environment()), script])


def warm_cli(folder: Path) -> None:
    """Put an `rvc-dist` into `folder` that starts at once: in a fork of a process whose imports are done."""
    script = folder / "rvc-dist"
    script.write_text(f"#!/bin/sh\nWARM='{warm()}' exec {CLIENT} \"$@\"\n")
    script.chmod(0o755)


def forking_python(folder: Path, forks_launcher: bool = False) -> Path:
    """A `python` in `folder` for scripts: its torchrun forks the one rank of its node, else it is ours.

    Stages but train run in a fork of this worker's server, and so does torchrun where it `forks_launcher`: who ends it
    by SIGKILL ends no fork.
    """
    path = folder / "python"
    torchrun = f"env WARM='{warm(LAUNCHER)}' {CLIENT}" if forks_launcher else f"{sys.executable} {LAUNCHER}"
    path.write_text(
        "#!/usr/bin/env bash\n"
        f'[[ $2 != torch.distributed.run ]] || exec {torchrun} 1 "${{@:2}}"\n'
        f"export WARM='{warm()}'\n"
        f'[[ $2 != rvc_dist || $3 == train ]] || exec {CLIENT} "${{@:3}}"\n'
        f'exec {sys.executable} "$@"\n'
    )
    path.chmod(0o755)
    return path


def rvc_dist(
    num_ranks: int,
    *arguments: object,
    code: int = 0,
    launch_file: str | None = None,
    more_environment: dict[str, str] | None = None,
) -> str:
    """Run `rvc-dist ARGUMENTS` on `num_ranks` ranks, expect its exit code, return what it printed.

    By accelerate with a file of launch/, else each by itself; with THIN in the environment, with networks of one layer
    of each kind.
    """
    more = more_environment or {}
    if launch_file is None:
        job = ranks.start(num_ranks, "", arguments, environment() | more)
    else:
        job = launch(num_ranks, "-m", "rvc_dist", *arguments, launch_file=launch_file, **more)
    ended, output = job.finish(TIMEOUT_S)
    assert ended == code, output[-5000:]
    return output


def torchrun(num_ranks: int, script: str, *arguments: object, more_environment: dict[str, str] | None = None) -> str:
    """Run a script of tests/ on `num_ranks` ranks, with what torchrun tells each of them."""
    job = ranks.start(num_ranks, str(ROOT / "tests" / script), arguments, environment() | (more_environment or {}))
    ended, output = job.finish(TIMEOUT_S)
    assert ended == 0, output[-5000:]
    return output
