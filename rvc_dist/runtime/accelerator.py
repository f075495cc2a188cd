"""All knowledge of Accelerate and torch.distributed: ranks, wire, stop signals."""

from __future__ import annotations

import logging
import math
import os
import signal
import socket
import stat
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from accelerate import Accelerator
from accelerate.utils import DistributedDataParallelKwargs, InitProcessGroupKwargs, gather_object
from torch import Tensor

from rvc_dist.config import TrainConfig
from rvc_dist.runtime.device import (
    adopt_device_number,
    apply_kernel_settings,
    check_backend,
    check_precision,
    cpu_model,
    device_id,
    device_name,
    kernel_settings,
    local_device,
    set_allocator,
    settings_text,
)
from rvc_dist.runtime.launcher import asks_for, check_deepspeed, fill_deepspeed_settings, lost_after_s, world_size
from rvc_dist.runtime.logs import rank_logs, tell_launcher
from rvc_dist.screen import say_at_once
from rvc_dist.workspace import OtherRankError, StageError, Stopped

logger = logging.getLogger(__name__)

STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)


def make_accelerator(config: TrainConfig, timeout_s: float | None = None) -> Accelerator:
    """The Accelerator of this rank, and the kernel settings of training.

    `timeout_s` is how long it waits for other ranks, now and in every collective; by default train.timeout_s.

    Raises:
        StageError: the launcher asked for another number of ranks than joined, the device lacks the precision, or
            there are fewer devices than ranks or no collective between them.
    """
    check_launcher(config)
    wanted = world_size()
    if wanted > 1:
        check_meeting_point(wanted)
        # Of NCCL's thread that looks at collectives, which a hanging device holds up too: else after 480 s.
        limit_s = math.ceil(device_timeout_s(timeout_s or config.timeout_s))
        os.environ.setdefault("TORCH_NCCL_HEARTBEAT_TIMEOUT_SEC", str(limit_s))
    backend = None
    check_backend(config, wanted)
    if local_device().type == "cpu":
        if asks_for("DEEPSPEED"):
            # So Accelerate hands CPUs to DeepSpeed; any other way it forgets DeepSpeed, or the other ranks.
            os.environ.pop("ACCELERATE_USE_CPU", None)
            backend = "gloo"
        elif wanted > 1:
            # Without this, `accelerate launch --multi_gpu` on CPUs gives every process rank 0 of 1.
            os.environ["ACCELERATE_USE_CPU"] = "true"
    adopt_device_number()
    set_allocator(config)
    apply_kernel_settings(config)
    accelerator = Accelerator(
        # Its bf16 would convert every output of the networks, features too, to float32: the step has its own autocast.
        mixed_precision="no",
        # The learning rate is a function of the step; Accelerate is not to step anything by itself.
        step_scheduler_with_optimizer=False,
        kwargs_handlers=[
            # With accumulation the first backward passes are local, and a static graph would be recorded from those.
            # Buffers are constants (BigVGAN's filters), and need not be sent.
            DistributedDataParallelKwargs(
                gradient_as_bucket_view=True, static_graph=config.micro_batches(wanted) == 1, broadcast_buffers=False
            ),
            InitProcessGroupKwargs(backend=backend, timeout=timedelta(seconds=timeout_s or config.timeout_s)),
        ],
    )
    if accelerator.device.index is None:  # alone, Accelerate says "cuda"; memory is counted by a device's number
        accelerator.state.device = local_device()
    if accelerator.num_processes != wanted:
        raise StageError(
            f"the launcher asked for {wanted} ranks but {accelerator.num_processes} joined;",
            "on CPUs launch with `ACCELERATE_USE_CPU=true accelerate launch --multi_gpu --num_processes N`",
        )
    advice = check_precision(config.autocast_precision, accelerator.device)
    if advice is not None and accelerator.is_main_process:
        logger.warning("%s %s", *advice)
    if asks_for("DEEPSPEED"):
        fill_deepspeed_settings(accelerator, config)
    notice_lost_machines()
    return accelerator


def check_launcher(config: TrainConfig) -> None:
    """Refuse what a launcher's file asks for and this program would not do.

    Raises:
        StageError: another precision than the recipe's, FSDP, or DeepSpeed where it does not work.
    """
    precision = os.environ.get("ACCELERATE_MIXED_PRECISION", "no")
    if precision not in ("no", own := config.autocast_precision):
        raise StageError(
            f"the launcher's mixed_precision is {precision}, the recipe's train.precision {own}: the recipe decides;",
            f"say --mixed_precision no to the launcher (or in its file), or train.precision {precision} in the recipe",
        )
    if asks_for("FSDP"):
        raise StageError(
            "the launcher asks for FSDP, which this program does not use: G and D fit every GPU;",
            "launch with launch/multi_gpu.yaml, or share the optimizer's state among the ranks with launch/zero1.yaml",
        )
    if asks_for("DEEPSPEED"):
        check_deepspeed(config)


def check_meeting_point(num_ranks: int) -> None:
    """Refuse ranks that do not know where to find each other: srun alone does not say.

    Raises:
        StageError: MASTER_ADDR or MASTER_PORT is not set.
    """
    missing = [name for name in ("MASTER_ADDR", "MASTER_PORT") if not os.environ.get(name)]
    if missing:
        raise StageError(
            f"{num_ranks} ranks were started, which cannot find each other: {' and '.join(missing)} not set;",
            'before srun: export MASTER_ADDR=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1) '
            "MASTER_PORT=29500 (a free port)",
        )


def check_own_device(device: torch.device) -> None:
    """Refuse a GPU that another rank computes on; every rank has to ask, before they send anything.

    Raises:
        StageError: this rank is not the first on its GPU. NCCL would refuse too, in words that nobody understands.
    """
    if device.type == "cpu" or not dist.is_initialized():  # which have numbers too
        return
    host, rank = socket.gethostname(), str(dist.get_rank())
    first = dist.distributed_c10d._get_default_store().compare_set(f"{host}/{device_id(device)}", "", rank).decode()
    if first != rank:
        raise StageError(
            f"ranks {first} and {rank} compute on the same GPU of {host} ({device_id(device)});",
            "start one rank a GPU there, and let each task see all of its node's GPUs or one of its own",
        )


def device_timeout_s(timeout_s: float) -> float:
    """After how long NCCL is to abort a process by itself, where a watch names who hangs after `timeout_s`.

    Its clock begins when the host asks for a collective, which may be up to two steps before the host has to wait.
    """
    return 2 * timeout_s + 60


def outlast(accelerator: Accelerator, timeout_s: float) -> None:
    """Let collectives on GPUs wait for longer than a watch that names who hangs after `timeout_s`."""
    if accelerator.num_processes > 1 and accelerator.device.type != "cpu":
        set_timeout = getattr(dist, "set_timeout", None) or dist.distributed_c10d._set_pg_timeout  # before torch 2.14
        set_timeout(timedelta(seconds=device_timeout_s(timeout_s)))


def notice_lost_machines() -> None:
    """Let the kernel break this process's connections to machines that answer nothing for `lost_after_s`.

    Else a machine that vanishes without closing them is noticed after train.timeout_s. The other machine's kernel
    answers for a rank that computes, loads, saves or is stopped; of what was sent TCP makes another try at the latest
    after half of that time (RFC 6298), so that a shorter gap of the network costs nothing. The libraries that made the
    connections know no such setting. To be called when connections were made. Linux alone.
    """
    after_s = lost_after_s()
    if not after_s or not hasattr(socket, "TCP_USER_TIMEOUT"):
        return
    tcp = {"KEEPIDLE": max(1, int(after_s / 3)), "KEEPINTVL": 1, "USER_TIMEOUT": int(1000 * after_s)}
    for name in os.listdir("/proc/self/fd"):
        with suppress(OSError):  # it has just been closed, or leads nowhere
            if not stat.S_ISSOCK(os.fstat(int(name)).st_mode):
                continue
            with socket.socket(fileno=os.dup(int(name))) as connection:
                if connection.family not in (socket.AF_INET, socket.AF_INET6):
                    continue
                if connection.getpeername()[0] == connection.getsockname()[0]:
                    continue
                connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
                for option, value in tcp.items():
                    connection.setsockopt(socket.IPPROTO_TCP, getattr(socket, f"TCP_{option}"), value)


def on_first_rank(accelerator: Accelerator, function: Callable[[], object]) -> bool:
    """Run `function` on the main rank, while the others wait: whether it returns something; its error is every rank's.

    Raises:
        Exception: that of `function` on the main rank, and an OtherRankError that points to it on the others.
    """
    error: Exception | None = None
    outcome = 0
    if accelerator.is_main_process:
        try:
            outcome = int(bool(function()))
        except Exception as failed:  # noqa: BLE001 - raised below, when the others have heard of it
            error, outcome = failed, 2
    outcome = int(accelerator.reduce(torch.tensor([outcome], device=accelerator.device)).item())
    if outcome == 2:
        if isinstance(error, StageError):
            tell_launcher(str(error))  # which ends this rank when the others have ended: they need no time for it
        raise error or OtherRankError("rank 0 failed; its message says why")
    return outcome == 1


def check_same_settings(accelerator: Accelerator, more: Mapping[str, Any]) -> None:
    """Print the kernel settings, and `more` of the trainer's, once; ranks that differ are an error.

    Raises:
        StageError: naming every setting that differs and its value on each rank.
    """
    every = gather_object([kernel_settings(accelerator.device) | dict(more)])
    differ = {key: [s[key] for s in every] for key in every[0] if any(s[key] != every[0][key] for s in every)}
    if differ:
        listed = "".join(f"\n  {key}: {dict(enumerate(values))}" for key, values in differ.items())
        raise StageError(f"the ranks have different settings (rank: value):{listed}")
    logger.info("%d ranks: %s", accelerator.num_processes, settings_text(every[0]))


def every_rank(accelerator: Accelerator) -> list[dict[str, Any]]:
    """Where each computes, as `report.history` keeps it."""
    device = accelerator.device
    name = cpu_model() if device.type == "cpu" else device_name(device)
    me = {"rank": accelerator.process_index, "host": socket.gethostname(), "device": str(device), "name": name}
    ranks: list[dict[str, Any]] = gather_object([me])
    return ranks


class StopSignal:
    """SIGTERM, SIGUSR1 and SIGINT ask for a checkpoint and an end; all ranks agree on the step.

    The handler only sets a flag. Each step takes the maximum of the flags of all ranks over gloo on the host, without
    waiting: the maximum of one step is read at the next, so the device is never waited for. A SIGTERM or SIGINT that
    comes a while after the first signal acts as it would have; at once, launcher and batch system mean the same.
    SIGUSR1 is repeated by scripts for as long as a large checkpoint takes, and says nothing new. FAILED, which is more
    than any signal, tells the others that a rank cannot go on. The end of a launcher is a SIGTERM too: `hang_killer`.
    A rank that ends for an error bears one SIGTERM more until its log is closed: a launcher ends all where one has
    failed, and the others would die before they have said why.
    """

    FAILED = 1000
    SAME_S = 2.0
    """Signals so close together are one wish."""
    NEXT_S = 10.0
    """How long a rank that was asked to stop still waits for what it needs to come to the end of its step."""

    def __init__(self, accelerator: Accelerator, timeout_s: float) -> None:
        self._received = 0
        self._received_at = 0.0
        self._timeout_s = timeout_s
        self._level = logging.INFO if accelerator.process_index else logging.WARNING  # the first rank says it for all
        self._me = f"rank {accelerator.process_index} on {socket.gethostname()}"
        self._what = self._remedy = ""
        """What is waited for under a limit, and what to do where it does not come."""
        self._pending: tuple[Tensor, Any] | None = None
        self._group: Any = None
        if accelerator.num_processes > 1:
            self._group = dist.new_group(backend="gloo", timeout=timedelta(seconds=timeout_s))
            notice_lost_machines()
        self._previous: dict[signal.Signals, Any] = {}
        self._is_failing = False

    def __enter__(self) -> StopSignal:
        self._previous = {s: signal.signal(s, self._handle) for s in STOP_SIGNALS}
        self._previous[signal.SIGALRM] = signal.signal(signal.SIGALRM, self._waited)
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if self._pending and kind is None:
            self._pending[1].wait()
        handlers = dict(self._previous)
        if kind is not None and issubclass(kind, Stopped):
            handlers[signal.SIGUSR1] = signal.SIG_IGN  # repeated once more it would change the exit code
        elif kind is not None and (logs := rank_logs()):
            self._is_failing = True
            logs[0].at_close.callback(signal.signal, signal.SIGTERM, handlers.pop(signal.SIGTERM))
        for number, handler in handlers.items():
            signal.signal(number, handler)

    def _handle(self, number: int, _: Any) -> None:
        now = time.monotonic()
        name = "Ctrl-C" if number == signal.SIGINT else signal.Signals(number).name
        if self._received and number == signal.SIGUSR1:
            return
        if self._received and now - self._received_at > self.SAME_S:
            say_at_once(
                f"{name} again: ending at once; the same command continues from the last checkpoint", self._level
            )
            signal.signal(number, self._previous[signal.Signals(number)])
            os.kill(os.getpid(), number)
        elif not self._received:
            self._received, self._received_at = number, now
            if self._is_failing:
                return
            say_at_once(
                f"{name}: stopping after this step, with a checkpoint from which the same command continues; "
                f"{'a SIGTERM' if number == signal.SIGUSR1 else f'another {name}'}, {self.SAME_S:g} s from now or "
                "later, ends at once without one",
                self._level,
            )
            if self._what:
                self._set_alarm(self.NEXT_S)

    @contextmanager
    def limit(self, what: str, remedy: str) -> Iterator[None]:
        """Inside, this rank waits for `what` no longer than for another rank, and only briefly once it is to stop.

        Raises:
            StageError: it did not come.
        """
        self._what, self._remedy = what, remedy
        self._set_alarm(self._timeout_s)
        if self._received:
            self._set_alarm(self.NEXT_S)
        try:
            yield
        finally:
            self._what = ""
            self._set_alarm(0.0)

    def _set_alarm(self, seconds: float) -> None:
        signal.setitimer(signal.ITIMER_REAL, seconds, 1.0)  # again and again: an error within a destructor is lost

    def _waited(self, *_: Any) -> None:
        if not self._what:
            return  # it has just come
        if self._received:
            name = signal.Signals(self._received).name
            raise StageError(
                f"{name} asked for the end while {self._me} waited for {self._what}, and they did not come within "
                f"{self.NEXT_S:g} s: no checkpoint was written;",
                "the same command continues from the last one",
            )
        raise StageError(
            f"{self._me} waited in vain for train.timeout_s = {self._timeout_s:g} s for {self._what}:",
            f"{self._remedy}; the same command continues from the last checkpoint",
        )

    def poll(self, failed: bool = False) -> int:
        """The number of a signal that some rank got, or FAILED, the same on every rank at the same step; 0 if none."""
        mine = self.FAILED if failed else self._received
        if self._group is None:
            return mine
        flag = torch.tensor([mine])
        before, self._pending = self._pending, (flag, dist.all_reduce(flag, dist.ReduceOp.MAX, self._group, True))
        if before is None:
            return 0
        before[1].wait()
        return int(before[0])
