"""The ranks of an examination: how they find each other, exchange what they found, and whether their clocks agree."""

from __future__ import annotations

import socket
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from datetime import timedelta
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar

import torch.distributed as dist
from accelerate import Accelerator
from torch import nn

from rvc_dist.config import Recipe
from rvc_dist.data.sources import is_corpus, list_sources
from rvc_dist.models.shape import GeneratorShape
from rvc_dist.report.facts import flat
from rvc_dist.runtime.accelerator import make_accelerator
from rvc_dist.runtime.device import local_device
from rvc_dist.runtime.launcher import zero_stage
from rvc_dist.tools.doctor.findings import Findings, Problem, error, first_line, same, warning
from rvc_dist.train.dataset import ClipTable
from rvc_dist.workspace import Shard, SourceFile, StageError, WorkList, Workspace

ANSWER_TIMEOUT_S = 60
"""A rank that says nothing for so long is taken for lost."""
MAX_CLOCK_SKEW_S = 5.0
MEETING = (
    "make sure that all ranks were started, and that MASTER_ADDR and MASTER_PORT name rank 0's host and a free port"
)
NETWORK = (
    "let the nodes reach each other on all ports; where a node has several network interfaces name the one that "
    "connects them (GLOO_SOCKET_IFNAME, NCCL_SOCKET_IFNAME); NCCL_DEBUG=INFO says what NCCL tried"
)

T = TypeVar("T")


class RankGroup:
    """The ranks that joined, and an exchange of plain data that does not need the network of the GPUs."""

    def __init__(self, rank: int = 0, accelerator: Accelerator | None = None) -> None:
        self.rank, self.accelerator = rank, accelerator
        self.count = int(accelerator.num_processes) if accelerator is not None else 1
        self.device = accelerator.device if accelerator is not None else local_device()
        self._group: Any = None
        if self.count > 1:
            self._group = dist.new_group(backend="gloo", timeout=timedelta(seconds=ANSWER_TIMEOUT_S))

    @property
    def is_first(self) -> bool:
        """Whether this rank does what one rank is enough for."""
        return self.rank == 0 or self.count == 1

    def gather(self, value: T) -> list[T]:
        """The value of every rank; the others wait for it.

        Raises:
            StageError: a rank did not answer; from then on this rank is alone.
        """
        if self._group is None:
            return [value]
        values: list[Any] = [None] * self.count
        try:
            dist.all_gather_object(values, value, group=self._group)
        except RuntimeError as error:
            self._group, self.count = None, 1
            raise StageError(
                f"a rank did not answer within {ANSWER_TIMEOUT_S} s ({first_line(error)}); what follows is of rank "
                f"{self.rank} alone.",
                f"Look at the other ranks' output; if they are alive, {NETWORK}",
            ) from error
        return values


@dataclass
class DoctorContext:
    """What is looked at, and what earlier checks leave for later ones."""

    recipe: Recipe
    group: RankGroup = field(default_factory=RankGroup)
    not_joined: Problem | None = None
    """Why this rank did not find the others."""
    table: ClipTable | None = None
    """None when there are no features that fit the recipe."""
    remote_answers: bool = False
    data_stages_done: bool = False
    embedder: dict[str, Any] | None = None
    """Of features that are still to be made: what `ClipTable.embedder` will be."""
    shape: GeneratorShape | None = None
    modules: dict[str, nn.Module] = field(default_factory=dict)
    """Networks to be thrown away; empty when they cannot be built."""
    step_s: float | None = None
    """Estimated seconds of a whole step without communication."""

    @property
    def work(self) -> Workspace:
        return Workspace(self.recipe.run_dir, self.recipe.name)

    @cached_property
    def work_list(self) -> WorkList | None:
        return WorkList.load(self.work.work_list_file)

    @property
    def is_imported(self) -> bool:
        """Whether the clips are another tool's, and no recordings are looked for."""
        return self.work_list is not None and self.work_list.imported_from is not None

    @cached_property
    def sources(self) -> list[SourceFile]:
        """Of the dataset, which is walked once.

        Raises:
            StageError: it is not there, or none of its files can be used.
        """
        return list_sources(Path(self.recipe.data.audio_dir), self.work)[0]

    @property
    def has_features_to_make(self) -> bool:
        """Whether there are recordings, or clips, without the recipe's features."""
        there = is_corpus(Path(self.recipe.data.audio_dir)) or self.work.work_list_file.is_file()
        return there and not self.data_stages_done


def join(recipe: Recipe) -> DoctorContext:
    """Find the other ranks as training does; where that fails this rank goes on alone."""
    rank = Shard.from_environment().index
    try:
        # What the hardware cannot do is a finding of its own, no reason to stop here.
        plain = replace(recipe.train, precision="fp32", bf16_adamw=False)
        accelerator = make_accelerator(plain, ANSWER_TIMEOUT_S)
        return DoctorContext(recipe, RankGroup(accelerator.process_index, accelerator))
    except StageError as failed:
        problem = Problem.of(failed)
    except (RuntimeError, ValueError, OSError) as failed:  # what torch.distributed raises when ranks do not meet
        problem = error(f"the ranks did not find each other: {first_line(failed)}", f"{MEETING}; {NETWORK}")
    return DoctorContext(recipe, RankGroup(rank), problem)


def check_ranks(context: DoctorContext) -> Findings:
    """The launcher's ranks are all there, were given one recipe, and have clocks that agree."""
    group = context.group
    if context.not_joined is not None:
        yield context.not_joined
    group.gather(None)  # so that all read their clocks at one moment
    settings = {key: str(value) for key, value in flat(context.recipe.to_dict()).items()}
    ranks = group.gather((socket.gethostname(), settings, time.time()))
    hosts, recipes, clocks = zip(*ranks, strict=True)
    yield from same({"ranks": str(group.count), "hosts": str(len(set(hosts)))})
    if group.count > 1:
        yield from same({"backend": dist.get_backend()})
    if group.accelerator is not None and (stage := zero_stage(group.accelerator)):
        yield from same({"ZeRO stage": str(stage)})
    yield from same({key: settings[key] for key in settings if any(r.get(key) != settings[key] for r in recipes)})
    if group.is_first:
        yield from skewed_clocks(clocks)


def skewed_clocks(clocks: Sequence[float]) -> Findings:
    """Seconds since the epoch of every rank, read at one moment."""
    spread = max(clocks) - min(clocks)
    if spread > MAX_CLOCK_SKEW_S:
        late, early = clocks.index(max(clocks)), clocks.index(min(clocks))
        yield warning(
            f"the clock of rank {late} is {spread:.0f} s ahead of rank {early}'s",
            "let a time service (chrony, ntpd) set the clocks; until then the logs of the ranks are out of step",
        )
