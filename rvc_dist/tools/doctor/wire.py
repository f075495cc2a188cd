"""Checks of the network between the ranks: are sums right, and how long do the gradients of a step take?"""

from __future__ import annotations

import time
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from rvc_dist.config import Recipe
from rvc_dist.models.discriminator import MultiPeriodDiscriminator
from rvc_dist.models.generator import Generator
from rvc_dist.models.shape import GeneratorShape
from rvc_dist.runtime.accelerator import synchronize
from rvc_dist.tools.doctor.findings import Result, first_line
from rvc_dist.tools.doctor.team import ANSWER_TIMEOUT_S, NETWORK, Exam, Team
from rvc_dist.tools.doctor.training import stand_in_table
from rvc_dist.workspace import StageError

MESSAGE_BYTES = (1 << 20, 25 << 20)
"""Sizes that are all-reduced: a small one, and DDP's buckets."""
REDUCE_TIME_S = 0.5
"""Time that one size is measured for."""


def check_all_reduce(exam: Exam, result: Result) -> None:
    """Sums over the ranks are right, and how fast they are."""
    team = exam.team
    if not exam.ready or team.count == 1:
        result.skipped = "one rank" if exam.ready else "the ranks did not find each other"
        return
    speed = {}
    try:
        for num_bytes in MESSAGE_BYTES:
            for dtype in (torch.float32, torch.bfloat16):
                seconds = all_reduce(team, dtype, num_bytes, result)
                if dtype == torch.float32:
                    speed[num_bytes] = num_bytes / seconds
                    megabytes = num_bytes >> 20
                    result.measured[f"{megabytes} MB"] = (num_bytes / seconds / 1e6, "MB/s")
    except RuntimeError as error:
        if isinstance(error, StageError):
            raise
        result.fail(f"all-reduce over {dist.get_backend()} fails: {first_line(error)}", NETWORK)
        return
    step_s = exam.step_s if team.is_first else None  # one rank is enough to tell it
    num_bytes = gradient_bytes(exam)
    judge_communication(num_bytes / speed[MESSAGE_BYTES[-1]], step_s, num_bytes, exam.recipe, result)


def all_reduce(team: Team, dtype: torch.dtype, num_bytes: int, result: Result) -> float:
    """Sum known numbers over the ranks, look at the sum, and return the seconds of one such sum.

    Raises:
        RuntimeError: the backend's own, or a rank does not answer.
        StageError: likewise, in the exchange besides it.
    """
    pattern = torch.arange(num_bytes // dtype.itemsize, device=team.device) % 3 + 1
    buffer = (pattern * (team.rank + 1)).to(dtype)
    began_at = time.monotonic()
    _sum(team, buffer, 1)
    seconds = max(team.gather(time.monotonic() - began_at))
    judge_sum(buffer, pattern, team.count, result)
    repeats = max(1, min(20, int(REDUCE_TIME_S / max(seconds, 1e-6))))
    began_at = time.monotonic()
    _sum(team, buffer.zero_(), repeats)
    return max(team.gather(time.monotonic() - began_at)) / repeats


def _sum(team: Team, buffer: Tensor, repeats: int) -> None:
    """All-reduce `buffer` in place `repeats` times; RuntimeError when that takes too long."""
    work: Any = None
    for _ in range(repeats):
        work = dist.all_reduce(buffer, async_op=True)
        if team.device.type == "cpu":
            work.wait(timedelta(seconds=ANSWER_TIMEOUT_S / 2))
    deadline = time.monotonic() + ANSWER_TIMEOUT_S / 2
    while not work.is_completed():  # NCCL's wait would make the device wait, not the host
        if time.monotonic() > deadline:
            raise RuntimeError(f"no end after {ANSWER_TIMEOUT_S / 2:.0f} s")
        time.sleep(1e-4)
    synchronize(team.device)


def judge_sum(total: Tensor, pattern: Tensor, count: int, result: Result) -> None:
    """Rank r gave (r + 1) * pattern: float32 sums of such integers are exact, of bf16 each addition is rounded."""
    wanted = pattern.double() * (count * (count + 1) // 2)
    error = float(((total.double() - wanted).abs() / wanted).max())
    allowed = 0.0 if total.dtype == torch.float32 else min(0.25, 2.0**-8 * count)
    if not error <= allowed:
        result.fail(
            f"all-reduce of {total.nbytes >> 20} MB in {str(total.dtype).removeprefix('torch.')} gives wrong sums (off "
            f"by up to {100 * error:.3g} %)",
            "update NCCL or the network driver, and try NCCL_P2P_DISABLE=1, then NCCL_IB_DISABLE=1, to find the part "
            "that is at fault",
        )


def gradient_bytes(exam: Exam) -> int:
    """What a rank sends of gradients in one step: those of G and of D, once each."""
    recipe, table = exam.recipe, stand_in_table(exam)
    shape = exam.shape or GeneratorShape.from_recipe(recipe, table.content_channels, table.num_speakers)
    with torch.device("meta"):
        modules = [
            Generator(shape),
            MultiPeriodDiscriminator(recipe.model.version, recipe.model.discriminator_channels),
        ]
    width = 2 if recipe.train.grad_compression == "bf16" else 4
    return sum(p.numel() * width for module in modules for p in module.parameters() if p.requires_grad)


def judge_communication(seconds: float, step_s: float | None, num_bytes: int, recipe: Recipe, result: Result) -> None:
    """`seconds` that the gradients of a step take on the wire, `step_s` that the rest of it takes."""
    result.same["gradients"] = f"{num_bytes / 1e6:.0f} MB a step"
    result.measured["which take"] = (seconds, "s")
    if step_s is not None and seconds > step_s:
        compress = "" if recipe.train.grad_compression == "bf16" else "set train.grad_compression bf16, "
        result.warn(
            f"sending the gradients of a step takes {seconds:.2f} s, computing it {step_s:.2f} s",
            f"{compress}raise train.grad_accum_steps or train.batch_size, or use a faster network: {NETWORK}",
        )
