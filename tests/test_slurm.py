"""The batch scripts: by themselves with stand-ins for SLURM's commands, and on a real cluster of two nodes."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from helpers import make_features, tiny_recipe, with_train
from launching import environment, forking_python, rvc_dist, warm
from warm_cli import CLIENT

from rvc_dist import __main__ as cli
from rvc_dist.train import checkpoint
from rvc_dist.workspace import DEMO_VOICE_DIR, Workspace

pytestmark = pytest.mark.usefixtures("thin_ranks")
ROOT = Path(__file__).parents[1]
SLURM = ROOT / "slurm"
JOBS = sorted(path.name for path in SLURM.glob("*.sbatch"))
SHELL = sorted([*SLURM.iterdir(), *(ROOT / "launch").glob("*.sh"), ROOT / ".ci" / "run", *ROOT.glob("tests/*.sh")])


def bash(script: str, code: int = 0, **variables: object) -> str:
    """What `script` prints, errors too, in the checkout."""
    values = environment() | {name: str(value) for name, value in variables.items()}
    command = ["bash", "-c", script]
    done = subprocess.run(command, cwd=ROOT, env=values, capture_output=True, text=True, check=False, timeout=60)
    output = done.stdout + done.stderr
    assert done.returncode == code, output
    return output


@pytest.mark.skipif(shutil.which("shellcheck") is None, reason="shellcheck is not on the PATH")
@pytest.mark.parametrize("path", SHELL, ids=lambda path: path.name)
def test_shellcheck_has_nothing_to_say(path: Path) -> None:
    checked = subprocess.run(
        ["shellcheck", "--external-sources", "--source-path=SCRIPTDIR", str(path)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert (checked.returncode, checked.stdout) == (0, "")


@pytest.mark.parametrize("name", JOBS)
def test_every_job_asks_to_be_requeued_and_names_its_log(name: str) -> None:
    lines = [line.removeprefix("#SBATCH ") for line in (SLURM / name).read_text().splitlines() if "#SBATCH" in line]
    assert {"--requeue", "--open-mode=append", "--ntasks-per-node=1"} <= set(lines)
    assert any(line.startswith("--output=") for line in lines)
    # The cluster's own affairs are not for us to guess.
    assert not any(line.startswith(("--partition", "--account", "--qos", "--gres", "--gpus")) for line in lines)
    assert ("--signal=B:USR1@120" in lines) is name.startswith("train")


# Stand-ins for the commands of SLURM


@pytest.fixture
def stand_in(tmp_path: Path) -> Callable[[str, str], str]:
    """Puts a bash script in the place of a command; returns the PATH to use."""
    folder = tmp_path / "bin"
    folder.mkdir()

    def put(name: str, script: str) -> str:
        (folder / name).write_text(f"#!/usr/bin/env bash\n{script}\n")
        (folder / name).chmod(0o755)
        return f"{folder}:{os.environ['PATH']}"

    return put


JOB = {"SLURM_SUBMIT_DIR": ROOT, "SLURM_JOB_ID": 7, "SLURM_JOB_NUM_NODES": 1, "SLURM_JOB_NODELIST": "n1", "VENV": ""}


def array(task: int, first: int, last: int, by: int, count: int) -> dict[str, int]:
    names = ("ID", "MIN", "MAX", "STEP", "COUNT")
    values = (task, first, last, by, count)
    return {f"SLURM_ARRAY_TASK_{name}": value for name, value in zip(names, values, strict=True)}


@pytest.mark.parametrize(
    ("variables", "part"),
    [
        ({}, "0/1"),
        (array(0, 0, 3, 1, 4), "0/4"),
        (array(3, 0, 3, 1, 4), "3/4"),
        (array(5, 3, 6, 1, 4), "2/4"),  # --array=3-6
        (array(9, 1, 9, 4, 3), "2/3"),  # --array=1-9:4
        (array(5, 3, 5, 1, 2) | {"SHARDS": 8}, "5/8"),  # --array=3,5
    ],
)
def test_every_task_of_an_array_takes_its_part(variables: dict[str, int], part: str) -> None:
    assert bash("set -eu; source slurm/common.sh; shard", **JOB, **variables) == f"{part}\n"


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        (array(5, 3, 5, 1, 2), "--array: 2 tasks between 3 and 5 leave gaps"),
        (array(8, 0, 8, 1, 9) | {"SHARDS": 8}, "SHARDS: got 8, but the array has a task 8"),
    ],
)
def test_an_array_that_would_leave_work_undone_is_refused(variables: dict[str, int], message: str) -> None:
    assert message in bash("set -euo pipefail; source slurm/common.sh; part=$(shard)", code=2, **JOB, **variables)


@pytest.mark.parametrize(
    ("variables", "wanted"),
    [
        (
            {"CONTAINER": "a.sif"},
            "bash launch/node.sh {bin}/apptainer exec --nv --pwd {root} --bind {root},/d:/d a.sif -- ",
        ),
        ({"CONTAINER": "org/image:1"}, "--container-image=org/image:1 --container-workdir={root} "),
        ({"CONTAINER": "org/image:1"}, "--container-mounts={root}:{root},/d:/d "),
        ({"SRUN_OPTIONS": "--mpi=none --quiet"}, "--mpi=none --quiet --kill-on-bad-exit=1 --nodes=1 --ntasks=1 "),
        ({}, "bash launch/node.sh -- extract --config my recipe.yaml --name x --shard 1/2\n"),
    ],
)
def test_what_the_cluster_needs_is_passed_through(variables, wanted, stand_in, tmp_path) -> None:
    stand_in("apptainer", "")
    stand_in("scontrol", '[[ $2 == hostnames ]] && echo n1 || echo "NodeName=n1 NodeAddr=10.0.0.1 Port=1"')
    path = stand_in("srun", 'echo "$@" "at $HEAD_ADDR:$HEAD_PORT"')
    output = bash(
        'bash slurm/extract.sbatch "my recipe.yaml" --name x',
        PATH=path,
        CONTAINER_MOUNTS="/d:/d",
        **JOB,
        **array(1, 0, 1, 1, 2),
        **variables,
    ).replace(" at 10.0.0.1:10007", "")
    assert wanted.format(root=ROOT, bin=tmp_path / "bin") in output


def test_modules_are_loaded_and_a_wrong_environment_is_named() -> None:
    script = "set -eu; module() { echo module $*; }; source slurm/common.sh"
    assert bash(script, MODULES="cuda/12 python", **JOB) == "module load cuda/12 python\n"
    script = "set -eu; module() { false; }; source slurm/common.sh"
    assert "'module load nope' failed" in bash(script, code=2, MODULES="nope", **JOB)
    assert "/none/bin/python does not exist" in bash(
        "set -eu; source slurm/common.sh", code=2, **JOB | {"VENV": "/none"}
    )


RUNNING, PREEMPTED, LEAVING = (
    "JobState=RUNNING PreemptTime=None",
    "JobState=RUNNING PreemptTime=2026-",
    "JobState=COMPLETING",
)


@pytest.mark.parametrize(
    ("ended", "asked", "note", "state", "requeued", "code"),
    [
        (0, "", "", RUNNING, False, 0),
        (0, "yes", "", RUNNING, False, 0),  # it was done before it heard of it
        (1, "", "", RUNNING, False, 1),
        (0, "yes", "SIGUSR1", RUNNING, True, 75),
        (0, "", "SIGUSR1", RUNNING, True, 75),  # sent to the ranks alone
        (0, "", "SIGTERM", RUNNING, False, 75),
        (143, "", "SIGTERM", PREEMPTED, True, 75),  # a grace time begins with TERM
        (143, "", "", PREEMPTED, True, 75),
        (137, "yes", "", RUNNING, True, 75),  # it was starting
        (0, "", "SIGUSR1", LEAVING, False, 75),  # cancelled, or SLURM requeues it by itself
        (143, "yes", "", LEAVING, False, 143),
    ],
)
def test_a_job_goes_back_into_the_queue_for_the_right_reasons(
    ended, asked, note, state, requeued, code, stand_in, tmp_path
) -> None:
    path = stand_in("scontrol", f'[[ $1 == show ]] && echo "{state}" || echo "$@"')
    marker = tmp_path / "requeue.json"
    if note:
        marker.write_text(json.dumps({"step": 3, "signal": note}))
    script = f"set -eu; source slurm/common.sh; asked={asked}; finish {ended} {marker}"
    output = bash(script, code=code, PATH=path, SLURM_ARRAY_JOB_ID=9, SLURM_ARRAY_TASK_ID=2, **JOB)
    assert ("requeue 9_2\n" in output) is requeued


def test_a_job_that_never_gets_anywhere_is_not_requeued_for_ever(stand_in) -> None:
    path = stand_in("scontrol", f'echo "{RUNNING}"')
    script = "set -eu; source slurm/common.sh; asked=yes; finish 137 ''"
    output = bash(script, code=2, PATH=path, SLURM_RESTART_COUNT=5, MAX_REQUEUES=5, **JOB)
    assert "Is --time long enough" in output


def start_node(stage: str, path: str, **variables: object) -> subprocess.Popen[str]:
    values = environment() | {"PATH": path, "RANKS": "2", "SLURM_JOB_NUM_NODES": "1", "SLURM_JOB_ID": "7"}
    values |= {"SLURM_NODEID": "0", "HEAD_ADDR": "n1", "HEAD_PORT": "1"} | {k: str(v) for k, v in variables.items()}
    command = ["bash", str(ROOT / "launch" / "node.sh"), "--", stage, "--config", "x"]
    return subprocess.Popen(command, env=values, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)


@pytest.mark.parametrize("sent", [signal.SIGUSR1, signal.SIGTERM])
def test_ranks_hear_of_a_signal_that_slurm_sends_to_its_own_child_alone(sent, stand_in) -> None:
    """A launcher as torch's: its ranks are in sessions of their own, and it knows nothing of USR1."""
    rank = "import signal, time\n"
    rank += "assert signal.getsignal(signal.SIGUSR1) is signal.SIG_IGN, 'a second signal would kill'\n"
    rank += "signal.signal(signal.SIGUSR1, lambda *_: exit(print('rank saved', flush=True)))\n"
    rank += "print('rank ready', flush=True)\ntime.sleep(20)"
    launcher = "import subprocess, sys\n"
    launcher += f"subprocess.run([sys.executable, '-c', {rank!r}], start_new_session=True, check=True)"
    path = stand_in("python", f'{sys.executable} -c "$CODE"')
    with start_node("train", path, CODE=launcher) as node:
        assert node.stdout is not None
        assert node.stdout.readline() == "rank ready\n"
        began_at = time.monotonic()
        node.send_signal(sent)
        assert node.stdout.readline() == "rank saved\n"
        assert node.wait(10) == 0
        assert time.monotonic() - began_at < 8


@pytest.mark.parametrize(("stage", "ignored"), [("train", "USR1"), ("extract", "USR2")])
def test_what_does_not_stop_is_ended(stage, ignored, stand_in) -> None:
    """A rank that never answers is killed in the end; a data stage is ended at once."""
    path = stand_in("python", f"trap '' {ignored}; echo ready; exec sleep 30")
    with start_node(stage, path, PATIENCE_S=1) as node:
        assert node.stdout is not None
        assert node.stdout.readline() == "ready\n"
        node.send_signal(signal.SIGUSR1)
        assert node.wait(10) == 128 + (signal.SIGKILL if stage == "train" else signal.SIGTERM)


def test_an_agent_that_restarts_ranks_is_not_told_of_a_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    """But for one of several nodes, whose end is no end for the others."""
    for value, code in (None, 75), ("0", 75), ("3", 0):
        if value is not None:
            monkeypatch.setenv("TORCHELASTIC_MAX_RESTARTS", value)
        assert cli.stopped_code(of_node=False) == code
        assert cli.stopped_code(of_node=True) == 75


# The chain


def pipeline(arguments: str, code: int = 0, **variables: object) -> str:
    python = Path(sys.executable).parents[1]
    return bash(f"bash slurm/pipeline.sh {arguments}", code, **{"VENV": python} | variables)


def test_the_commands_of_a_chain_are_shown() -> None:
    arguments = "configs/48k.yaml --nodes=4 --gpus-per-node 8 --shards 16%4 --dry-run --name 'a b' -- --account x"
    lines = pipeline(arguments, TRAIN_SBATCH="--time=2-0 --cpus-per-task=16").splitlines()
    assert len(lines) == 5
    after = ["", *(f"--dependency=afterok:{stage}_ID " for stage in ("PREPROCESS", "EXTRACT", "INDEX", "TRAIN"))]
    scripts = ["preprocess", "extract", "index", "train_multinode", "export"]
    own = ["--array=0-15%4 ", "--array=0-15%4 --gpus-per-node=1 ", "", "--nodes=4 --gpus-per-node=8 ", ""]
    given = [""] * 3 + ["--time=2-0 --cpus-per-task=16 ", ""]
    for line, script, options, dependency, more in zip(lines, scripts, own, after, given, strict=True):
        command = f"sbatch --parsable --kill-on-invalid-dep=yes {options}{dependency}--account x {more}"
        assert line == f"{command}slurm/{script}.sbatch {ROOT}/configs/48k.yaml --name a\\ b "
    one_node = pipeline("configs/48k.yaml --gpus-per-node 0 --dry-run")
    assert "slurm/train.sbatch" in one_node
    assert "gpus" not in one_node


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("", "expected a recipe first"),
        ("--nodes 2", "expected a recipe first"),
        ("none.yaml", "none.yaml: no such recipe"),
        ("configs/48k.yaml --nodes 0", "--nodes: got '0', expected a whole number of at least 1"),
        ("configs/48k.yaml --shards=08", "--shards: got '08'"),
        ("configs/48k.yaml --shards", "--shards: got ''"),
        ("configs/48k.yaml --shards 4%0", "--shards K%M: got '0'"),
        ("configs/48k.yaml --train.max_stepz 3", "unknown key train.max_stepz; did you mean train.max_steps?"),
    ],
)
def test_a_mistake_is_told_before_anything_is_submitted(arguments: str, message: str, stand_in) -> None:
    path = stand_in("sbatch", "echo a job id")
    output = pipeline(arguments, code=2, PATH=path)
    assert message in output
    assert "a job id" not in output


def test_a_chain_that_is_refused_halfway_leaves_no_job(stand_in) -> None:
    stand_in("scancel", 'echo "cancelled $*"')
    path = stand_in(
        "sbatch", '[[ $* != *index.sbatch* ]] || exit 1; [[ $* == *extract.sbatch* ]] && echo "8;c" || echo 7'
    )
    output = pipeline("configs/48k.yaml", code=2, PATH=path)
    assert output.startswith("preprocess  7\nextract     8\n")
    assert "cancelled 7 8\n" in output
    assert "refused the job of the index stage" in output


def test_the_first_job_of_a_chain_says_what_a_later_one_would_miss(stand_in, tmp_path) -> None:
    """The training's pretrained weights are missing: no task of preprocess begins."""
    recipe = tiny_recipe(tmp_path / "run", pretrained_g=str(tmp_path / "G.pth"))
    recipe = replace(recipe, data=replace(recipe.data, audio_dir=str(DEMO_VOICE_DIR / "voice")))
    file = tmp_path / "recipe.yaml"
    file.write_text(recipe.to_yaml())
    stand_in("sbatch", 'if [[ $* == *preprocess.sbatch* ]]; then echo "LOOK_AHEAD=$LOOK_AHEAD" >&2; fi; echo 7')
    stand_in("scontrol", '[[ $2 == hostnames ]] && echo n1 || echo "NodeName=n1 NodeAddr=10.0.0.1 Port=1"')
    run = 'while [[ $1 == -* ]]; do shift; done; [[ $1 != bash ]] || exec echo "begins: ${*: -2}"; exec "$@"'
    path = stand_in("srun", run)
    assert "LOOK_AHEAD=yes\n" in pipeline(str(file), PATH=path)
    job = {**JOB, **array(1, 0, 1, 1, 2), "VENV": Path(sys.executable).parents[1], "PATH": path}
    output = bash(f"bash slurm/preprocess.sbatch {file}", code=1, LOOK_AHEAD="yes", **job)
    assert "rvc-dist run: nothing was begun, since the run would fail later for want of 1 thing(s):" in output
    assert "train.pretrained_g: " in output
    assert "begins" not in output
    stand_in("python", 'echo "looks: $*"')  # in bin/, as of an environment
    looked = f"looks: -m rvc_dist run --config {file} --look-ahead\n"
    for asked, output in (("yes", looked), ("", "")):
        begun = bash(f"bash slurm/preprocess.sbatch {file}", LOOK_AHEAD=asked, **job | {"VENV": tmp_path})
        assert begun == f"{output}begins: --shard 1/2\n"


# On a real cluster

HAS_SLURM = shutil.which("slurmctld") is not None and os.geteuid() == 0
needs_slurm = pytest.mark.skipif(not HAS_SLURM, reason="starts slurmctld and slurmd: not on the PATH, or not root")


def free_ports(count: int) -> int:
    """The first of `count` free ports in a row."""
    for first in range(17000 + os.getpid() % 1000, 32000, count):
        try:
            for port in range(first, first + count):
                with socket.socket() as each:
                    each.bind(("127.0.0.1", port))
        except OSError:
            continue
        return first
    raise AssertionError("no free ports")


class Cluster:
    """Two nodes on this machine. Jobs log to ID.out in `folder`."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        first = free_ports(3)
        self.variables: dict[str, object] = {
            "SLURM_LOCAL_DIR": folder,
            "SLURM_LOCAL_CTLD_PORT": first,
            "SLURM_LOCAL_SLURMD_PORT": first,  # and the two after it
            "SLURM_CONF": folder / "slurm.conf",
            "VENV": folder / "venv",
        }
        (folder / "venv" / "bin").mkdir(parents=True)
        forking_python(folder / "venv" / "bin")

    def __call__(self, command: str, **variables: object) -> str:
        return bash(command, **self.variables, **variables)

    def submit(self, arguments: str, **variables: object) -> str:
        return self(f"sbatch --parsable --output={self.folder}/%j.out {arguments}", **variables).strip()

    def log(self, job: str) -> str:
        path = self.folder / f"{job}.out"
        return path.read_text() if path.is_file() else ""

    def wait(self, what: str, probe: Callable[[], object], seconds: float = 150) -> float:
        """Seconds until `probe` gave something true."""
        began_at = time.monotonic()
        while not probe():
            if time.monotonic() > began_at + seconds:
                logs = "\n".join(f"{p}:\n{p.read_text()[-3000:]}" for p in self.folder.glob("*.out"))
                raise AssertionError(f"{what}: not after {seconds} s\n{self('scontrol show job')}\n{logs}")
            time.sleep(0.3)  # scontrol takes time of the cores, too
        return time.monotonic() - began_at

    def wait_for_state(self, job: str, state: str) -> float:
        def reached() -> bool:
            return f"JobState={state} " in self(f"scontrol --oneliner show job {job}")

        return self.wait(f"job {job} {state}", reached)

    def wait_for_step(self, job: str, step: int) -> float:
        return self.wait(f"job {job} at step {step}", lambda: step <= steps(self.log(job))[-1])

    def requeue_now(self, job: str) -> None:
        """SLURM lets a requeued job wait for two minutes."""
        self.wait_for_state(job, "PENDING")
        # In the second in which the old job's credential is revoked, the new one's would be too.
        self(f"scontrol update JobId={job} StartTime=now+3")


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    with tempfile.TemporaryDirectory(prefix="slurm-") as folder:  # short: a socket's path has at most 107 letters
        cluster = Cluster(Path(folder))
        try:
            cluster("bash tests/slurm_local.sh start 2")
            yield cluster
        finally:
            cluster("bash tests/slurm_local.sh stop")


def steps(log: str) -> list[int]:
    """The steps that a log tells of, after a 0."""
    return [0, *map(int, re.findall(r" step (\d+)/", log))]


@needs_slurm
@pytest.mark.slurm
@pytest.mark.parametrize("name", JOBS)
def test_slurm_accepts_the_options_of_every_job(name: str, cluster: Cluster) -> None:
    assert "to start at" in cluster(f"sbatch --test-only slurm/{name} configs/48k.yaml")


@needs_slurm
@pytest.mark.slurm
@pytest.mark.slow
@pytest.mark.distributed
def test_a_chain_whose_training_is_preempted_ends_as_one_that_never_was(cluster: Cluster, tmp_path: Path) -> None:
    """Arrays of preprocess and extract, index, training on two nodes, voice files; a more important job comes."""
    recordings = tmp_path / "audio"
    recordings.mkdir()
    for path in sorted((DEMO_VOICE_DIR / "voice").glob("*.flac"))[:3]:
        shutil.copy(path, recordings)
    recipe = tiny_recipe(tmp_path / "run", max_steps=200, save_every_steps=1000, eval_every_steps=1000)
    recipe = replace(recipe, data=replace(recipe.data, audio_dir=str(recordings)))
    recipe = replace(recipe, extract=replace(recipe.extract, f0_method="swipe"))
    file = tmp_path / "recipe.yaml"
    file.write_text(recipe.to_yaml())

    arguments = f"{file} --nodes 2 --gpus-per-node 0 --shards 2 -- --output={cluster.folder}/%A.out"
    jobs = dict(line.split() for line in cluster(f"bash slurm/pipeline.sh {arguments}").splitlines())
    assert list(jobs) == ["preprocess", "extract", "index", "train", "export"]
    train = jobs["train"]
    cluster.wait_for_step(train, 2)
    high = cluster.submit("--partition=high --nodes=2 --exclusive --wrap='exit 0'")
    assert cluster.wait("a checkpoint", Workspace(recipe.run_dir, "").requeue_file.is_file) < 30, (
        "longer than GraceTime"
    )
    cluster.wait_for_state(high, "COMPLETED")
    last = steps(cluster.log(train))[-1]
    end = last + 3
    file.write_text(with_train(recipe, max_steps=end).to_yaml())  # so it ends soon
    cluster.requeue_now(train)
    log = cluster.log(train)
    assert log.count(f"stopped by SIGUSR1 at step {last} of 200") == 2, "both ranks, at the same step"
    assert "back into the queue" in log
    assert "Restarts=1 " in cluster(f"scontrol --oneliner show job {train}")
    cluster.wait_for_state(jobs["export"], "COMPLETED")
    log = cluster.log(train)
    assert f"continuing from step {last}," in log
    assert steps(log)[1:] == [*range(1, end + 1)], "no step twice, none missing"
    assert (tmp_path / "run" / "voice" / "tiny_last.pth").is_file()

    for folder in "clips", "features":
        shutil.copytree(tmp_path / "run" / folder, tmp_path / "whole" / folder)
    rvc_dist(2, "train", "--config", file, "--run_dir", tmp_path / "whole")
    stopped, whole = (checkpoint.latest(tmp_path / name / "checkpoints") for name in ("run", "whole"))
    assert stopped is not None
    assert whole is not None
    assert stopped.name == whole.name == f"step_{end:08d}"
    for name in checkpoint.FILES:
        assert (stopped / name).read_bytes() == (whole / name).read_bytes(), name


@needs_slurm
@pytest.mark.slurm
@pytest.mark.slow
def test_at_the_end_of_its_time_a_job_is_requeued_but_not_when_its_user_cancels_it(
    cluster: Cluster, tmp_path: Path
) -> None:
    """On one node, with one rank. USR1 comes to the batch script, as `#SBATCH --signal=B:USR1@120` has it."""
    recipe = tiny_recipe(tmp_path / "run", max_steps=100_000, save_every_steps=100_000, eval_every_steps=100_000)
    make_features(recipe)
    file = tmp_path / "recipe.yaml"
    file.write_text(recipe.to_yaml())
    job = cluster.submit(f"slurm/train.sbatch {file}", STAGE="train")
    cluster.wait_for_step(job, 2)
    cluster(f"scancel --signal=USR1 --batch {job}")
    cluster.requeue_now(job)
    last = steps(cluster.log(job))[-1]
    assert [path.name for path in checkpoint.list_checkpoints(tmp_path / "run" / "checkpoints")] == [f"step_{last:08d}"]
    cluster.wait_for_step(job, last + 1)
    assert f"continuing from step {last}," in cluster.log(job)
    cluster(f"scancel {job}")
    cluster.wait_for_state(job, "CANCELLED")
    cluster.wait("the end of the job", lambda: not cluster("squeue --noheader"))
    assert "JobState=CANCELLED " in cluster(f"scontrol --oneliner show job {job}")
    assert cluster.log(job).count("back into the queue") == 1


@needs_slurm
@pytest.mark.slurm
@pytest.mark.slow
@pytest.mark.distributed
def test_tasks_of_srun_are_ranks_without_a_launcher(cluster: Cluster, tmp_path: Path) -> None:
    recipe = tiny_recipe(tmp_path / "run", max_steps=2)
    make_features(recipe)
    file = tmp_path / "recipe.yaml"
    file.write_text(recipe.to_yaml())
    srun = f"srun --quiet --nodes=2 --ntasks=2 --export=ALL {CLIENT} train --config {file}"
    logs = Workspace(recipe.run_dir, "").logs_dir
    with pytest.raises(AssertionError, match="MASTER_ADDR and MASTER_PORT not set; before srun: export MASTER_ADDR="):
        cluster(srun, WARM=warm())
    assert not (tmp_path / "run" / "checkpoints").exists()
    output = cluster(srun, WARM=warm(), MASTER_ADDR="127.0.0.1", MASTER_PORT=free_ports(1))
    assert "2 ranks: " in output
    assert "trained to step 2" in output
    assert sorted(path.name for path in logs.glob("*.log")) == ["rank_00000.log", "rank_00001.log"]
