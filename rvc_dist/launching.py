"""`rvc-dist launch --gpus 4 -- STAGE ...`: the `accelerate launch` command for these ranks, printed and run."""

from __future__ import annotations

import argparse
import os
import shlex
import sys
from typing import Any, NamedTuple

from rvc_dist import packaged
from rvc_dist.arguments import parse
from rvc_dist.config import Recipe
from rvc_dist.screen import without_details
from rvc_dist.stages import STAGES
from rvc_dist.workspace import Shard, StageError

EXIT_USAGE = 2
RENDEZVOUS = ["--rdzv_backend", "c10d", "--max_restarts", "3"]
RENDEZVOUS += ["--rdzv_conf", "join_timeout=600,read_timeout=600,keep_alive_max_attempt=2000"]
"""Between machines, as launch/two_nodes.yaml says with the reasons."""


class Machines(NamedTuple):
    """What was asked for; None: not said."""

    gpus: int | None
    cpu: int | None
    nodes: int | None
    node_rank: int | None
    main_ip: str | None
    main_port: int | None

    def check(self) -> None:
        """Raises ValueError where two of them contradict each other, or one lacks."""
        if self.gpus is not None and self.cpu is not None:
            raise ValueError("got --gpus and --cpu, expected one of them")
        of_several = {"--node_rank": self.node_rank, "--main_ip": self.main_ip, "--main_port": self.main_port}
        for name, value in of_several.items():
            if self.nodes in (None, 1) and value is not None:
                raise ValueError(f"{name} is for several machines; say how many: --nodes N")
        if self.nodes in (None, 1):
            return
        for name in ("--node_rank", "--main_ip"):
            if of_several[name] is None:
                raise ValueError(f"--nodes {self.nodes} needs {name} too, on each machine (under SLURM use slurm/)")
        if self.node_rank not in range(self.nodes or 1):
            raise ValueError(f"--node_rank: got {self.node_rank}, expected less than --nodes {self.nodes}")


def run(_: Recipe, shard: Shard, command: list[str], only_print: bool, **asked: Any) -> int:
    """Print the command that starts the ranks, and become it; its exit code is that of the launcher.

    Args:
        command: the stage and its words.
        asked: the fields of Machines.

    Raises:
        StageError: this machine has fewer GPUs than asked for, or this is a rank already.
    """
    machines = Machines(**asked)
    try:
        if not command or command[0] not in STAGES or not STAGES[command[0]].reads:
            raise ValueError(f"got {' '.join(command) or 'no stage'}, expected rvc-dist launch --gpus N -- STAGE ...")
        machines.check()
        parse(command[0], without_details(command[1:])[0])  # a mistake is told once, and by no rank
    except (argparse.ArgumentError, ValueError, OSError) as error:
        sys.stderr.write(f"rvc-dist launch: {error}\n")
        return EXIT_USAGE
    if shard.count > 1 or "TORCHELASTIC_RUN_ID" in os.environ:
        raise StageError("launch starts ranks, but this is one already;", f"say rvc-dist {command[0]} without launch")
    ranks = machines.cpu or num_ranks(machines.gpus)
    variables, options = launcher_options(machines, ranks)
    words = [*options, "-m", "rvc_dist", *command]
    shown = [f"{name}={value}" for name, value in variables.items()]
    sys.stderr.write(f"{' '.join([*shown, 'accelerate', 'launch', shlex.join(words)])}\n")
    sys.stderr.flush()
    if not only_print:
        launcher = [sys.executable, "-m", "accelerate.commands.launch"]
        os.execve(sys.executable, [*launcher, *words], os.environ | variables)
    return 0


def num_ranks(gpus: int | None) -> int:
    """One a GPU.

    Raises:
        StageError: there are fewer than `gpus`, or none.
    """
    import torch

    found = torch.accelerator.device_count() if torch.accelerator.is_available() else 0
    if found == 0 or (gpus or 0) > found:
        seen = f"{found or 'no'} GPU{'' if found == 1 else 's'}"
        visible = os.environ.get("CUDA_VISIBLE_DEVICES")
        why = f" (CUDA_VISIBLE_DEVICES is {visible!r})" if visible is not None else ""
        asked = f"--gpus {gpus}: " if gpus else ""
        remedy = f"say --gpus {found}" if found else "to try things on the CPU, say --cpu 2"
        raise StageError(f"{asked}PyTorch sees {seen} on this machine{why};", remedy)
    return gpus or found


def launcher_options(machines: Machines, ranks: int) -> tuple[dict[str, str], list[str]]:
    """Environment variables and options of `accelerate launch` for so many ranks on this machine."""
    variables: dict[str, str] = {}
    if machines.cpu is not None and "OMP_NUM_THREADS" not in os.environ:
        from rvc_dist.runtime.launcher import usable_cores

        variables["OMP_NUM_THREADS"] = str(max(1, len(usable_cores()) // ranks))
    folder = packaged.folder("launch")
    if machines.nodes is not None and machines.nodes > 1:
        variables["TORCH_DISABLE_SHARE_RDZV_TCP_STORE"] = "1"
        if machines.cpu is not None:
            variables["ACCELERATE_USE_CPU"] = "true"
        options = ["--config_file", str(folder / "two_nodes.yaml"), "--num_machines", str(machines.nodes)]
        options += ["--num_processes", str(ranks * machines.nodes), "--machine_rank", str(machines.node_rank)]
        options += ["--main_process_ip", str(machines.main_ip), "--main_process_port", str(machines.main_port or 29500)]
        return variables, options + RENDEZVOUS
    if ranks > 1:
        file = "multi_gpu.yaml" if machines.cpu is None else "cpu.yaml"
        return variables, ["--config_file", str(folder / file), "--num_processes", str(ranks)]
    if machines.cpu is None:
        return variables, ["--config_file", str(folder / "one_gpu.yaml")]
    options = ["--cpu", "--num_machines", "1", "--num_processes", "1", "--mixed_precision", "no"]
    return variables, [*options, "--dynamo_backend", "no"]
