"""`rvc-dist launch`: the command that it becomes, and what it refuses before a rank is started."""

from __future__ import annotations

import json
import os
import shlex
import signal
import socket
import sys
import time
from pathlib import Path

import pytest
import torch
from helpers import make_features, tiny_recipe
from launching import LAUNCHER, environment, ranks
from warm_cli import Job

from rvc_dist import __main__ as cli
from rvc_dist import packaged

pytestmark = pytest.mark.usefixtures("thin_ranks")
LAUNCH = packaged.folder("launch")


@pytest.fixture(autouse=True)
def gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    """Four, of which only the number is asked."""
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    monkeypatch.setattr(torch.accelerator, "device_count", lambda: 4)
    for name in list(os.environ):  # an Accelerator of an earlier test leaves some behind
        if name in ("RANK", "WORLD_SIZE", "CUDA_VISIBLE_DEVICES") or name.startswith(("ACCELERATE_", "TORCH")):
            monkeypatch.delenv(name)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")


def launched(words: str, monkeypatch: pytest.MonkeyPatch) -> tuple[list[str], dict[str, str]]:
    """The words after `accelerate launch` that it becomes, and what it adds to the environment."""
    found = []
    monkeypatch.setattr(os, "execve", lambda _, command, environment: found.append((command, environment)))
    assert cli.main(["launch", *shlex.split(words)]) == 0
    ((command, environment),) = found
    assert command[:3] == [sys.executable, "-m", "accelerate.commands.launch"]
    return command[3:], {name: value for name, value in environment.items() if os.environ.get(name) != value}


STAGE = ["-m", "rvc_dist", "train", "--quiet", "--name", "a b", "train.batch_size=2"]


@pytest.mark.parametrize(
    ("words", "options", "variables"),
    [
        ("--gpus 2", ["--config_file", str(LAUNCH / "multi_gpu.yaml"), "--num_processes", "2"], {}),
        ("", ["--config_file", str(LAUNCH / "multi_gpu.yaml"), "--num_processes", "4"], {}),
        ("--gpus 1", ["--config_file", str(LAUNCH / "one_gpu.yaml")], {}),
        ("--cpu 2", ["--config_file", str(LAUNCH / "cpu.yaml"), "--num_processes", "2"], {}),
        (
            "--nodes 2 --node_rank 1 --main_ip h --main_port 7",
            [
                *["--config_file", str(LAUNCH / "two_nodes.yaml"), "--num_machines", "2", "--num_processes", "8"],
                *["--machine_rank", "1", "--main_process_ip", "h", "--main_process_port", "7"],
                *["--rdzv_backend", "c10d", "--max_restarts", "3", "--rdzv_conf"],
                "join_timeout=600,read_timeout=600,keep_alive_max_attempt=2000",
            ],
            {"TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"},
        ),
    ],
)
def test_the_command_is_printed_and_run(
    words: str,
    options: list[str],
    variables: dict[str, str],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert launched(f"{words} -- train --quiet --name 'a b' train.batch_size=2", monkeypatch) == (
        options + STAGE,
        variables,
    )
    printed = [*(f"{name}={value}" for name, value in variables.items()), "accelerate", "launch", *options, *STAGE]
    assert shlex.split(capsys.readouterr().err) == printed


def test_machines_that_come_and_go_are_torchruns(monkeypatch: pytest.MonkeyPatch) -> None:
    found = []
    monkeypatch.setattr(os, "execve", lambda _, *became: found.append(became))
    words = "launch --cpu 2 --nodes 1:4 --main_ip h -- train --name alice"
    assert cli.main(words.split()) == 0
    ((command, variables),) = found
    assert command[1:] == [
        *["-m", "torch.distributed.run", "--nnodes", "1:4", "--nproc_per_node", "2", "--rdzv_backend", "c10d"],
        *["--rdzv_endpoint", "h:29500", "--rdzv_id", "rvc_dist-alice", "--rdzv_conf"],
        "join_timeout=600,read_timeout=600,last_call_timeout=5,keep_alive_interval=1,keep_alive_max_attempt=6",
        *["--max_restarts", "100", "-m", "rvc_dist", "train", "--name", "alice"],
    ]
    added = {name: value for name, value in variables.items() if os.environ.get(name) != value}
    assert added == {
        "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1",
        "TORCH_ELASTIC_SHUTDOWN_TIMEOUT": "90",
        "RVC_DIST_LOST_AFTER_S": "15",
        "ACCELERATE_USE_CPU": "true",
    }
    page = (LAUNCH.parent / "docs" / "distribution.md").read_text()
    assert f"--rdzv_conf {command[14]}" in page
    assert "--max_restarts 100" in page


def test_a_meeting_point_holds_the_store_of_others_or_says_that_its_port_is_taken(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    held = []

    def stand(_: float) -> None:
        port = capsys.readouterr().err.partition("machines meet at port ")[2].partition(" ")[0]
        other = torch.distributed.TCPStore("localhost", int(port), is_master=False)
        other.set("a", "b")
        held.append((int(port), other.get("a")))
        assert cli.main(["launch", "--meeting_point", "--main_port", port]) == 1
        raise KeyboardInterrupt

    monkeypatch.setattr(time, "sleep", stand)
    with socket.socket() as free:
        free.bind(("", 0))
        port = free.getsockname()[1]
    assert cli.main(["launch", "--meeting_point", "--main_port", str(port)]) == 75
    assert held == [(port, b"b")]
    assert f"--main_port {port} cannot be listened on (" in capsys.readouterr().err


def test_the_rendezvous_of_several_machines_is_that_of_the_file() -> None:
    text = " ".join((LAUNCH / "two_nodes.yaml").read_text().replace("#", " ").replace("\\", " ").split())
    for part in ("--rdzv_backend c10d", "--rdzv_conf join_timeout=600,read_timeout=600,keep_alive_max_attempt=2000"):
        assert part in text
    assert "--max_restarts 3" in text


@pytest.mark.parametrize(
    ("words", "code", "message"),
    [
        ("--gpus 5 -- train", 1, "--gpus 5: PyTorch sees 4 GPUs on this machine; say --gpus 4"),
        ("--gpus 2 --cpu 2 -- train", 2, "got --gpus and --cpu, expected one of them"),
        ("--gpus 2", 2, "got no stage, expected rvc-dist launch --gpus N -- STAGE ..."),
        ("--gpus 2 train", 2, "the stage stands behind --; did you mean: rvc-dist launch --gpus 2 -- train"),
        ("--gpus 2 -- trian", 2, "got trian, expected rvc-dist launch"),
        ("--gpus 2 -- recipes", 2, "got recipes, expected rvc-dist launch"),
        ("--gpus 2 -- train --train.batchsize 2", 2, "unknown key train.batchsize; did you mean train.batch_size?"),
        ("--gpus 2 -- train --config none", 2, "--config: none does not exist"),
        ("--nodes 2 -- train", 2, "--nodes 2 needs --node_rank too"),
        ("--nodes 2 --node_rank 0 -- train", 2, "--nodes 2 needs --main_ip too"),
        ("--nodes 2 --node_rank 2 --main_ip h -- train", 2, "--node_rank: got 2, expected less than --nodes 2"),
        ("--nodes 1:4 -- train", 2, "--nodes 1:4 needs --main_ip too"),
        (
            "--nodes 1:4 --node_rank 0 --main_ip h -- train",
            2,
            "--node_rank: machines that come and go (--nodes 1:4) have",
        ),
        ("--nodes 4:1 --main_ip h -- train", 2, "--nodes: got '4:1', expected a number of machines, or FEWEST:MOST"),
        ("--nodes all -- train", 2, "--nodes: got 'all', expected a number of machines"),
        ("--node_rank 0 -- train", 2, "--node_rank is for several machines; say how many: --nodes N"),
        ("--gpus two -- train", 2, "argument --gpus: got 'two', expected a whole number"),
        ("--gpu 2 -- train", 2, "unknown option --gpu; rvc-dist launch --help lists them"),
    ],
)
def test_what_cannot_be_started_is_told_once_and_before(
    words: str, code: int, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["launch", *shlex.split(words)]) == code
    assert message in capsys.readouterr().err


def test_a_rank_starts_no_ranks(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
    monkeypatch.setattr(cli, "end_with_launcher", lambda: None)
    assert cli.main(["launch", "--gpus", "2", "--", "train"]) == 1
    assert "launch starts ranks, but this is one already; say rvc-dist train without launch" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.distributed
def test_ranks_on_the_cpu_get_signals_and_give_their_code(tmp_path: Path) -> None:
    """It becomes a launcher whose ranks are forks."""

    def start(*words: object) -> Job:
        return ranks.start(1, LAUNCHER, [2, "rvc_dist", "launch", "--cpu", "2", "--", *words], environment())

    code, told = start("preprocess", "--data.audio_dir", "none", "--run_dir", tmp_path / "none").finish(60)
    assert code == 1
    assert "rvc-dist preprocess: " in told.splitlines()[-2]
    recipe = tiny_recipe(tmp_path / "run", max_steps=100_000, max_epochs=100_000)
    make_features(recipe)
    (tmp_path / "my.yaml").write_text(recipe.to_yaml())
    job = start("train", "--config", tmp_path / "my.yaml")
    try:
        history = tmp_path / "run" / "metrics.jsonl"
        while not (history.is_file() and "loss/g_mel" in history.read_text()):
            assert not job.wait(0.2), job.said()
        job.signal(signal.SIGTERM)
        code, told = job.finish(60)
    finally:
        job.kill()
    assert code == 1, "of torchrun, whatever the ranks say"
    assert json.loads((tmp_path / "run" / "requeue.json").read_text())["signal"] == "SIGTERM", told[-2000:]
