"""What steps, epochs and runs take on any number of ranks: formulas alone, nothing is measured or read here.

Time of a step on W ranks = compute of the slowest rank + wait for its data + communication that nothing hides.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise
from typing import NamedTuple

from rvc_dist.config import TrainConfig
from rvc_dist.train.progress import Progress, total_steps
from rvc_dist.train.sampler import BUCKET_FRAMES, MIN_STEPS_PER_EPOCH, BucketBatchSampler

WORLD_SIZES = tuple(2**i for i in range(11))
"""1 to 1024."""
FIRST_BUCKET_BYTES, BUCKET_BYTES = 2**20, 25 * 2**20
"""DDP's buckets of gradients, each of which is one all-reduce."""
HIDDEN_SHARE = 0.3
"""Assumed: all-reduces go on behind the backward passes of the networks they belong to for this share of a step's
compute. Backward passes are two thirds of it, but that through D in G's step sends nothing. The bucket that a network
finishes last can never be hidden."""
MIN_SAVED, MIN_EFFICIENCY = 0.10, 0.50
"""A doubling of the ranks pays if an epoch gets shorter by this share of its time, at this efficiency or better."""


class Measured(NamedTuple):
    """What a benchmark on several ranks adds to that on one."""

    crowding: float
    """Time of a step without communication over that on one rank: what ranks of a machine take from one another."""
    exposed_s: float | None
    """Seconds that communication added to a step; None where the formula is to say."""


@dataclass(frozen=True)
class Pace:
    """What a full step of one rank takes, which has a device to itself."""

    full_s: float
    """Seconds of compute on clips of `frames` padded frames."""
    frames: float
    growing_share: float
    """Share of full_s that is proportional to the padded frames; the rest is the slice's and the weights'."""
    data_s: float = 0.0
    """Seconds a step that the loader is waited for."""
    measured: Mapping[int, Measured] = field(default_factory=dict)
    """By number of ranks."""

    def compute_s(self, frames: float, share: float = 1.0) -> float:
        """Of `share` of the full batch's clips, of `frames` padded frames: in proportion to their operations."""
        return self.full_s * share * (1 - self.growing_share + self.growing_share * frames / self.frames)


@dataclass(frozen=True)
class Cluster:
    """Devices and links."""

    ranks_per_node: int
    bandwidth: float
    """Bytes a second between two nodes, in each direction."""
    local_bandwidth: float
    """Bytes a second between two ranks of a node."""
    latency_s: float
    free_cores: float = math.inf
    """On CPUs, how many ranks a node has cores for; more than these share them."""

    def crowding(self, ranks: int, measured: Mapping[int, Measured]) -> float:
        """Factor of compute on a node with its share of `ranks`: as measured on the most ranks that are no more.

        From there on, and where nothing was measured, only ranks without cores of their own slow one another down.
        """
        here = min(ranks, self.ranks_per_node)
        known = max((w for w in measured if w <= here), default=0)
        factor = measured[known].crowding if known else 1.0
        return factor * max(1.0, here / self.free_cores) / max(1.0, known / self.free_cores)

    def exposed_s(
        self, ranks: int, gradients: Sequence[int], compute_s: float, measured: Mapping[int, Measured]
    ) -> float:
        """Seconds that communication adds to a step.

        Where a benchmark ran over the same kind of link, its number, in proportion to the bytes that a ring sends. Else
        all-reduce's time less what HIDDEN_SHARE of the compute hides, but at least that of one network's last bucket.
        """
        if ranks == 1:
            return 0.0
        crosses_nodes = ranks > self.ranks_per_node
        alike = {
            w: m.exposed_s
            for w, m in measured.items()
            if m.exposed_s is not None and (w > self.ranks_per_node) == crosses_nodes
        }
        if alike:
            known = max((w for w in alike if w <= ranks), default=min(alike))
            return alike[known] * ring_share(ranks) / ring_share(known)
        bandwidth = min(self.bandwidth, self.local_bandwidth) if crosses_nodes else self.local_bandwidth
        whole = sum(all_reduce_s(n, ranks, bandwidth, self.latency_s) for n in gradients)
        last = max(all_reduce_s(min(n, BUCKET_BYTES), ranks, bandwidth, self.latency_s) for n in gradients)
        return max(last, whole - HIDDEN_SHARE * compute_s)


def ring_share(ranks: int) -> float:
    """Bytes that a rank sends in a ring all-reduce, over the bytes that are reduced: 2 (W - 1) / W.

    Patarasuk and Yuan 2009, Bandwidth optimal all-reduce algorithms for clusters of workstations. No algorithm sends
    less, and its slowest link, the one between nodes where there are several, sets its pace.
    """
    return 2 * (ranks - 1) / ranks


def num_buckets(num_bytes: int) -> int:
    """DDP's buckets for the gradients of a network."""
    return 1 + math.ceil(max(0, num_bytes - FIRST_BUCKET_BYTES) / BUCKET_BYTES)


def all_reduce_s(num_bytes: int, ranks: int, bandwidth: float, latency_s: float) -> float:
    """Seconds to average gradients: a ring's bytes over the slowest link, and a tree's 2 log2 W messages a bucket.

    Libraries change from rings to trees as latency grows to matter (NCCL does), so that neither grows with W.
    """
    messages = num_buckets(num_bytes) * 2 * math.ceil(math.log2(ranks))
    return ring_share(ranks) * num_bytes / bandwidth + messages * latency_s


class Load(NamedTuple):
    """What the busiest rank computes in a step."""

    padded_frames: int
    share: float
    """Of the clips of a full step on one rank."""


def sampler_on(ranks: int, config: TrainConfig, lengths: Sequence[int]) -> BucketBatchSampler:
    """The trainer's, of the first of so many ranks."""
    return BucketBatchSampler.of(config, list(lengths), ranks, 0)


def loads(sampler: BucketBatchSampler, alone: int = 0) -> list[Load]:
    """The steps of an epoch, as the trainer's own sampler deals them; `alone`: clips of a step on one rank."""
    of_rank = sampler.global_batch_size / sampler.num_ranks
    full = alone or of_rank
    steps = []
    for clips in sampler.global_batches(epoch=0):
        if len(clips) == sampler.global_batch_size:
            frames = int(-(-sampler.lengths[clips].max() // BUCKET_FRAMES) * BUCKET_FRAMES)
            steps.append(Load(frames, of_rank / full))
        else:  # the short batch of the epoch; rank 0 has the most of it
            parts = sampler.rank_batches(clips, epoch=0)
            steps.append(Load(parts[0].padded_frames, sum(len(p.clips) for p in parts) / full))
    return steps


@dataclass(frozen=True)
class Forecast:
    """A run on one number of ranks, without start-up, validation and the writing of checkpoints."""

    ranks: int
    global_batch: int
    steps_per_epoch: int
    total_steps: int
    step_s: float
    """Mean over an epoch."""
    compute_s: float
    exposed_s: float
    """Of step_s, what communication adds."""
    audio_s_per_s: float
    """Seconds of training clips a second, over all ranks."""
    efficiency: float = 1.0
    """Audio a second over that of as many single ranks."""
    sent_bytes: float = 0.0
    """That a rank sends in a step."""

    @property
    def epoch_s(self) -> float:
        return self.steps_per_epoch * self.step_s

    @property
    def wall_s(self) -> float:
        return self.total_steps * self.step_s

    @property
    def rank_hours(self) -> float:
        return self.ranks * self.wall_s / 3600


def forecasts(
    config: TrainConfig,
    lengths: Sequence[int],
    sizes: Iterable[int],
    pace: Pace,
    cluster: Cluster,
    gradients: Sequence[int],
    frame_s: float,
) -> dict[int, Forecast]:
    """The run on each number of ranks in `sizes`; efficiency is against the forecast for one.

    Args:
        lengths: of the training clips, in spectrogram frames.
        gradients: bytes of each network's gradients as they are sent.
        frame_s: seconds of a frame.
    """

    def on(ranks: int) -> Forecast:
        sampler = sampler_on(ranks, config, lengths)
        steps, per_epoch = loads(sampler, config.global_batch(1)), sampler.steps_per_epoch
        factor = cluster.crowding(ranks, pace.measured)
        compute = sum(pace.compute_s(s.padded_frames, s.share) for s in steps) * factor / len(steps)
        exposed = cluster.exposed_s(ranks, gradients, compute, pace.measured)
        step_s = compute + exposed + pace.data_s
        return Forecast(
            ranks=ranks,
            global_batch=sampler.global_batch_size,
            steps_per_epoch=per_epoch,
            total_steps=total_steps(config, per_epoch, per_epoch, Progress()),
            step_s=step_s,
            compute_s=compute,
            exposed_s=exposed,
            audio_s_per_s=float(sampler.lengths.sum()) * frame_s / (step_s * len(steps)),
            sent_bytes=ring_share(ranks) * sum(gradients),
        )

    alone = on(1)
    many = {ranks: on(ranks) for ranks in sizes}
    return {w: replace(f, efficiency=f.audio_s_per_s / alone.audio_s_per_s / w) for w, f in many.items()}


class Limit(NamedTuple):
    """The most ranks that pay, and why no more."""

    ranks: int
    reason: str


def data_limit(num_clips: int, clips_per_rank: int, kept: int | None = None) -> Limit:
    """As many ranks as leave MIN_STEPS_PER_EPOCH full steps an epoch: past it the trainer warns of the global batch.

    0 when one rank's batch is already more than that. `clips_per_rank`: of a step, all micro-batches together. A global
    batch that is `kept` has clips for as many ranks.
    """
    if kept is not None:
        return Limit(kept, f"the recipe: a step has train.keep_global_batch {kept} clips")
    ranks = num_clips // (MIN_STEPS_PER_EPOCH * clips_per_rank)
    return Limit(
        ranks,
        f"the dataset: a global batch of more than {ranks * clips_per_rank if ranks else num_clips // 4} clips is more "
        f"than a quarter of its {num_clips}, and an epoch has fewer than {MIN_STEPS_PER_EPOCH} full steps",
    )


def speed_limit(doubled: Sequence[Forecast]) -> Limit | None:
    """The last world size that every doubling up to it was worth: an epoch took at least MIN_SAVED less time than on
    half as many ranks, and efficiency was at least MIN_EFFICIENCY. None when all were.

    `doubled`: forecasts on 1, 2, 4, ... ranks.
    """
    for half, twice in pairwise(doubled):
        saved = 1 - twice.epoch_s / half.epoch_s
        if saved < MIN_SAVED or twice.efficiency < MIN_EFFICIENCY:
            change = f"{abs(saved):.0%} {'shorter' if saved > 0 else 'longer'}"
            why = (
                f"speed: {twice.ranks} ranks would make an epoch {change}, at an efficiency of "
                f"{twice.efficiency:.0%}, with {twice.exposed_s / twice.step_s:.0%} of a step spent on communication"
            )
            return Limit(half.ranks, why)
    return None
