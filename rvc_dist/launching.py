"""`rvc-dist launch --gpus 4 -- STAGE ...`: the launcher's command for these ranks, printed and run.

That is `accelerate launch`, or torchrun where nodes come and go: accelerate passes one number of nodes on, no range.
"""

from __future__ import annotations

import argparse
import os
import re
import shlex
import sys
import time
from typing import Any, NamedTuple

from rvc_dist import packaged
from rvc_dist.arguments import parse
from rvc_dist.config import Recipe
from rvc_dist.screen import without_details
from rvc_dist.stages import STAGES
from rvc_dist.workspace import Shard, StageError

EXIT_USAGE = 2
PORT = 29500
ACCELERATE = "accelerate.commands.launch"
RENDEZVOUS = ["--rdzv_backend", "c10d", "--max_restarts", "3"]
RENDEZVOUS += ["--rdzv_conf", "join_timeout=600,read_timeout=600,keep_alive_max_attempt=2000"]
"""Between machines, as launch/two_nodes.yaml says with the reasons."""
ELASTIC = [
    "--rdzv_conf",
    "join_timeout=600,read_timeout=600,last_call_timeout=5,keep_alive_interval=1,keep_alive_max_attempt=6",
]
ELASTIC += ["--max_restarts", "100"]
"""Between machines that come and go: docs/distribution.md has the reasons."""
LOST_AFTER_S = "15"
"""After how many seconds without an answer ranks that come and go take a machine for lost."""
SAVE_S = 90
"""How long a launcher that is to end its ranks waits for their checkpoint."""


class Machines(NamedTuple):
    """What was asked for; None: not said."""

    gpus: int | None
    cpu: int | None
    nodes: str | None
    node_rank: int | None
    main_ip: str | None
    main_port: int | None

    def check(self) -> None:
        """Raises ValueError where two of them contradict each other, or one lacks."""
        if self.gpus is not None and self.cpu is not None:
            raise ValueError("got --gpus and --cpu, expected one of them")
        of_several = {"--node_rank": self.node_rank, "--main_ip": self.main_ip, "--main_port": self.main_port}
        _, most = self.num_nodes
        for name, value in of_several.items():
            if most == 1 and value is not None:
                raise ValueError(f"{name} is for several machines; say how many: --nodes N")
        if most == 1:
            return
        if self.is_elastic and self.node_rank is not None:
            raise ValueError(
                f"--node_rank: machines that come and go (--nodes {self.nodes}) have no numbers; leave it out"
            )
        for name in ("--main_ip",) if self.is_elastic else ("--node_rank", "--main_ip"):
            if of_several[name] is None:
                raise ValueError(f"--nodes {self.nodes} needs {name} too, on each machine (under SLURM use slurm/)")
        if not self.is_elastic and self.node_rank not in range(most):
            raise ValueError(f"--node_rank: got {self.node_rank}, expected less than --nodes {self.nodes}")

    @property
    def num_nodes(self) -> tuple[int, int]:
        """The fewest and the most. Raises ValueError where that is no number and no range."""
        found = re.fullmatch(r"([1-9]\d{0,5})(?::([1-9]\d{0,5}))?", self.nodes or "1")
        least, most = (int(found[1]), int(found[2] or found[1])) if found else (1, 0)
        if least > most:
            raise ValueError(f"--nodes: got {self.nodes!r}, expected a number of machines, or FEWEST:MOST such as 1:4")
        return least, most

    @property
    def is_elastic(self) -> bool:
        return ":" in (self.nodes or "")


def run(
    _: Recipe, shard: Shard, command: list[str], only_print: bool, meeting_point: bool = False, **asked: Any
) -> int:
    """Print the command that starts the ranks, and become it; its exit code is that of the launcher.

    Args:
        command: the stage and its words.
        meeting_point: start no ranks: be where those of other machines find each other.
        asked: the fields of Machines.

    Raises:
        StageError: this machine has fewer GPUs than asked for, or this is a rank already.
    """
    machines = Machines(**asked)
    if meeting_point:
        return hold_meeting_point(machines.main_port or PORT)
    try:
        if not command or command[0] not in STAGES or not STAGES[command[0]].reads:
            raise ValueError(f"got {' '.join(command) or 'no stage'}, expected rvc-dist launch --gpus N -- STAGE ...")
        machines.check()
        recipe = parse(command[0], without_details(command[1:])[0])[0]  # a mistake is told once, and by no rank
    except (argparse.ArgumentError, ValueError, OSError) as error:
        sys.stderr.write(f"rvc-dist launch: {error}\n")
        return EXIT_USAGE
    if shard.count > 1 or "TORCHELASTIC_RUN_ID" in os.environ:
        raise StageError("launch starts ranks, but this is one already;", f"say rvc-dist {command[0]} without launch")
    ranks = machines.cpu or num_ranks(machines.gpus)
    variables, options = (
        elastic_options(machines, ranks, recipe.name) if machines.is_elastic else launcher_options(machines, ranks)
    )
    words = [*options, "-m", "rvc_dist", *command]
    shown = [f"{name}={value}" for name, value in variables.items()]
    name, module = ("torchrun", "torch.distributed.run") if machines.is_elastic else ("accelerate launch", ACCELERATE)
    sys.stderr.write(f"{' '.join([*shown, name, shlex.join(words)])}\n")
    sys.stderr.flush()
    if not only_print:
        os.execve(sys.executable, [sys.executable, "-m", module, *words], os.environ | variables)
    return 0


def hold_meeting_point(port: int) -> int:
    """Until a signal ends it, be the store in which launchers with `--main_ip THIS --main_port PORT` find each other.

    Raises:
        StageError: something else uses the port.
    """
    from torch.distributed import TCPStore  # type: ignore[attr-defined]

    try:
        store = TCPStore("localhost", port, is_master=True, wait_for_workers=False)
    except RuntimeError as error:
        raise StageError(
            f"--main_port {port} cannot be listened on ({error});", "choose another, on all machines"
        ) from error
    sys.stderr.write(f"rvc-dist launch: machines meet at port {store.port} until this is ended; see --main_ip\n")
    sys.stderr.flush()
    while True:
        time.sleep(3600)


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


def elastic_options(machines: Machines, ranks: int, name: str) -> tuple[dict[str, str], list[str]]:
    """Environment variables and options of torchrun for so many ranks on each machine, for a run of this name."""
    variables = threads(machines, ranks) | {"TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}
    wanted = {"TORCH_ELASTIC_SHUTDOWN_TIMEOUT": str(SAVE_S), "RVC_DIST_LOST_AFTER_S": LOST_AFTER_S}
    variables |= {name: os.environ.get(name, value) for name, value in wanted.items()}
    if machines.cpu is not None:
        variables["ACCELERATE_USE_CPU"] = "true"
    options = ["--nnodes", str(machines.nodes), "--nproc_per_node", str(ranks), "--rdzv_backend", "c10d"]
    options += ["--rdzv_endpoint", f"{machines.main_ip}:{machines.main_port or PORT}", "--rdzv_id", f"rvc_dist-{name}"]
    return variables, options + ELASTIC


def threads(machines: Machines, ranks: int) -> dict[str, str]:
    """The variable that shares the cores of a machine without GPUs among its ranks, unless it is set."""
    if machines.cpu is None or "OMP_NUM_THREADS" in os.environ:
        return {}
    from rvc_dist.runtime.launcher import usable_cores

    return {"OMP_NUM_THREADS": str(max(1, len(usable_cores()) // ranks))}


def launcher_options(machines: Machines, ranks: int) -> tuple[dict[str, str], list[str]]:
    """Environment variables and options of `accelerate launch` for so many ranks on this machine."""
    variables = threads(machines, ranks)
    folder = packaged.folder("launch")
    if machines.num_nodes[1] > 1:
        variables["TORCH_DISABLE_SHARE_RDZV_TCP_STORE"] = "1"
        if machines.cpu is not None:
            variables["ACCELERATE_USE_CPU"] = "true"
        options = ["--config_file", str(folder / "two_nodes.yaml"), "--num_machines", str(machines.nodes)]
        options += ["--num_processes", str(ranks * machines.num_nodes[1]), "--machine_rank", str(machines.node_rank)]
        options += ["--main_process_ip", str(machines.main_ip), "--main_process_port", str(machines.main_port or PORT)]
        return variables, options + RENDEZVOUS
    if ranks > 1:
        file = "multi_gpu.yaml" if machines.cpu is None else "cpu.yaml"
        return variables, ["--config_file", str(folder / file), "--num_processes", str(ranks)]
    if machines.cpu is None:
        return variables, ["--config_file", str(folder / "one_gpu.yaml")]
    options = ["--cpu", "--num_machines", "1", "--num_processes", "1", "--mixed_precision", "no"]
    return variables, [*options, "--dynamo_backend", "no"]
