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
from rvc_dist.runtime.device import synchronize
from rvc_dist.tools.doctor.data import stand_in_table
from rvc_dist.tools.doctor.findings import Fact, Findings, Skipped, error, first_line, same, warning
from rvc_dist.tools.doctor.ranks import ANSWER_TIMEOUT_S, NETWORK, DoctorContext, RankGroup
from rvc_dist.workspace import StageError

MESSAGE_BYTES = (1 << 20, 25 << 20)
"""Sizes that are all-reduced: a small one, and DDP's buckets."""
REDUCE_TIME_S = 0.5
"""Time that one size is measured for."""


def check_all_reduce(context: DoctorContext) -> Findings:
    """Sums over the ranks are right, and how fast they are."""
    group, bytes_a_s = context.group, 0.0
    if context.not_joined is not None or group.count == 1:
        yield Skipped("the ranks did not find each other" if context.not_joined else "one rank")
        return
    num_bytes = gradient_bytes(context)
    yield from same({"gradients": f"{num_bytes / 1e6:.0f} MB a step"})
    try:
        for size in MESSAGE_BYTES:
            for dtype in (torch.bfloat16, torch.float32):
                pattern = torch.arange(size // dtype.itemsize, device=group.device) % 3 + 1
                total, seconds = summed(group, pattern, dtype)
                yield from wrong_sum(total, pattern, group.count)
            bytes_a_s = size / seconds
            yield Fact(f"{size >> 20} MB", bytes_a_s / 1e6, "MB/s")
    except StageError:
        raise
    except RuntimeError as failed:
        yield error(f"all-reduce over {dist.get_backend()} fails: {first_line(failed)}", NETWORK)
        return
    step_s = context.step_s if group.is_first else None  # one rank is enough to report it
    yield Fact("which take", num_bytes / bytes_a_s, "s")
    yield from slow_network(num_bytes / bytes_a_s, step_s, context.recipe)


def summed(group: RankGroup, pattern: Tensor, dtype: torch.dtype) -> tuple[Tensor, float]:
    """The sum of (rank + 1) * `pattern` over the ranks, and the seconds that one such sum takes the slowest.

    Raises:
        RuntimeError: the backend's own, or a rank does not answer.
        StageError: likewise, in the exchange besides it.
    """
    total = (pattern * (group.rank + 1)).to(dtype)
    seconds = max(group.gather(_all_reduce(group, total, 1)))
    repeats = max(1, min(20, int(REDUCE_TIME_S / max(seconds, 1e-6))))
    return total, max(group.gather(_all_reduce(group, torch.zeros_like(total), repeats))) / repeats


def _all_reduce(group: RankGroup, buffer: Tensor, repeats: int) -> float:
    """All-reduce `buffer` in place `repeats` times; the seconds of all. RuntimeError when that takes too long."""
    began_at = time.monotonic()
    work: Any = None
    for _ in range(repeats):
        work = dist.all_reduce(buffer, async_op=True)
        if group.device.type == "cpu":
            work.wait(timedelta(seconds=ANSWER_TIMEOUT_S / 2))
    while not work.is_completed():  # NCCL's wait would make the device wait, not the host
        if time.monotonic() > began_at + ANSWER_TIMEOUT_S / 2:
            raise RuntimeError(f"no end after {ANSWER_TIMEOUT_S / 2:.0f} s")
        time.sleep(1e-4)
    synchronize(group.device)
    return time.monotonic() - began_at


def wrong_sum(total: Tensor, pattern: Tensor, count: int) -> Findings:
    """Rank r gave (r + 1) * pattern: float32 sums of such integers are exact, of bf16 each addition is rounded."""
    wanted = pattern.double() * (count * (count + 1) // 2)
    off = float(((total.double() - wanted).abs() / wanted).max())
    allowed = 0.0 if total.dtype == torch.float32 else min(0.25, 2.0**-8 * count)
    if not off <= allowed:
        yield error(
            f"all-reduce of {total.nbytes >> 20} MB in {str(total.dtype).removeprefix('torch.')} gives wrong sums (off "
            f"by up to {100 * off:.3g} %)",
            "update NCCL or the network driver, and try NCCL_P2P_DISABLE=1, then NCCL_IB_DISABLE=1, to find the part "
            "that is at fault",
        )


def gradient_bytes(context: DoctorContext) -> int:
    """What a rank sends of gradients in one step: those of G and of D, once each."""
    recipe, table = context.recipe, stand_in_table(context)
    shape = context.shape or GeneratorShape.from_recipe(recipe, table.content_channels, table.num_speakers)
    with torch.device("meta"):
        discriminator = MultiPeriodDiscriminator(recipe.model.discriminator_spec, recipe.model.discriminator_channels)
        parameters = [*Generator(shape).parameters(), *discriminator.parameters()]
    return sum(p.numel() for p in parameters if p.requires_grad) * (2 if recipe.train.grad_compression == "bf16" else 4)


def slow_network(seconds: float, step_s: float | None, recipe: Recipe) -> Findings:
    """`seconds` that the gradients of a step take on the wire, `step_s` that the rest of it takes."""
    if step_s is not None and seconds > step_s:
        compress = "" if recipe.train.grad_compression == "bf16" else "set train.grad_compression bf16, "
        yield warning(
            f"sending the gradients of a step takes {seconds:.2f} s, computing it {step_s:.2f} s",
            f"{compress}raise train.grad_accum_steps or train.batch_size, or use a faster network: {NETWORK}",
        )
