"""The one sampler, which decides who trains on what, and when: a pure function of the recipe, the clips and the ranks.

A draw is one turn of a clip in an epoch. Its number is the clip's own; a further turn of the same clip in the same
epoch adds the number of all clips, and so has a noise and a part of its own.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from decimal import Context, Decimal
from itertools import accumulate, pairwise
from typing import NamedTuple

import numpy as np
from torch.utils.data import Sampler

from rvc_dist.config import MAX_CLIP_FRAMES, TrainConfig
from rvc_dist.train.clips import MUTE, ClipList, Numbers

BUCKET_FRAMES = 50
"""Clips are padded to a multiple of this many frames: at most 900 / 50 = 18 shapes."""
MIN_STEPS_PER_EPOCH = 4
"""Full steps an epoch below which a run is warned of its global batch, and more ranks are said not to pay."""
SHUFFLED_TOGETHER = 256
"""Draws of a speaker of few clips that one generator orders: making generators takes longer than using them."""

BatchesDone = Sequence[tuple[int, int]]
"""What of an epoch was trained on: (size of the global batch, steps of that size), one entry a change of size."""


@dataclass(frozen=True)
class MicroBatchSpec:
    """One micro-batch of one rank, before anything is read."""

    clips: tuple[int, ...]
    """Numbers of draws."""
    epoch: int
    padded_frames: int
    loss_scale: float
    mean_frames: float


@dataclass(frozen=True)
class Sampling:
    """What an epoch consists of, and in which order: what places in an epoch depend on besides the clips."""

    balance: float = 0.0
    """As `data.balance`."""
    window_frames: int = 0
    """Units are shuffled, and clips within units of about so many frames; 0: all clips are shuffled."""


class Window(NamedTuple):
    """Steps that read a few units."""

    units: tuple[int, ...]
    """In the order of first use; silent clips belong to none."""
    first: int
    """Its first step, counted from the place that was asked about."""
    end: int
    """The one after its last."""


class Balance:
    """How often speakers are drawn: one of n clips in proportion to n ** (1 - balance), with the draws of all fixed.

    Each speaker has an endless stream, shuffled pass after shuffled pass through the speaker's clips, of which every
    epoch takes the next part: no clip has a further turn before all others of its speaker have had as many. How much
    is rounded over all epochs so far: to less than one draw of the speaker's share in their sum, and so to less than
    two in each. Weights are whole numbers, computed in decimals: floating point differs between machines.
    """

    def __init__(self, speakers: Numbers, balance: float, seed: int) -> None:
        """`speakers` are those of the clips by number; a negative one is drawn once an epoch, as silent clips are."""
        order = np.argsort(speakers, kind="stable")
        ids, starts = np.unique(speakers[order], return_index=True)
        clips = np.split(order, starts[1:])
        self.seed = seed
        self.of_speaker = {int(s): its for s, its in zip(ids, clips, strict=True) if s >= 0}
        self._unbalanced = np.flatnonzero(speakers < 0)
        self.num_draws = len(speakers) - len(self._unbalanced)
        context, exponent = Context(prec=40), 1 - Decimal(repr(balance))
        weights = (context.power(Decimal(len(its)), exponent) for its in self.of_speaker.values())
        self._ends = [0, *accumulate(int(weight.scaleb(15)) for weight in weights)]

    def drawn_before(self, epoch: int) -> list[int]:
        """Draws of each speaker in all epochs before this one."""
        return [b - a for a, b in pairwise(epoch * self.num_draws * end // self._ends[-1] for end in self._ends)]

    def draws(self, epoch: int) -> Numbers:
        """Of an epoch: of each speaker those that come next."""
        spans = zip(self.of_speaker, self.drawn_before(epoch), self.drawn_before(epoch + 1), strict=True)
        clips = np.concatenate([self._unbalanced, *(self._part(*span) for span in spans)])
        order = np.argsort(clips, kind="stable")
        _, starts, counts = np.unique(clips[order], return_index=True, return_counts=True)
        clips[order] += (np.arange(len(clips)) - np.repeat(starts, counts)) * (self.num_draws + len(self._unbalanced))
        return clips

    def describe(self) -> str:
        """An epoch, in words."""
        shares = [end - begin for begin, end in pairwise(self._ends)]
        turns = [
            self.num_draws * share / (self._ends[-1] * len(its))
            for share, its in zip(shares, self.of_speaker.values(), strict=True)
        ]
        return (
            f"an epoch is {self.num_draws} turns, as many as clips, of {len(turns)} speakers: {min(turns):.3g} to "
            f"{max(turns):.3g} times a speaker's clips, and {min(shares) / self._ends[-1]:.2%} to "
            f"{max(shares) / self._ends[-1]:.2%} of all turns"
        )

    def _part(self, speaker: int, begin: int, end: int) -> Numbers:
        """Draws `begin` to `end` of a speaker's stream."""
        clips = self.of_speaker[speaker]
        passes = max(1, SHUFFLED_TOGETHER // len(clips))
        size, parts = passes * len(clips), [clips[:0]]
        for block in range(begin // size, -(-end // size)):
            generator = np.random.Generator(np.random.PCG64([self.seed, speaker, block, 0, 1]))
            order = generator.permuted(np.tile(clips, (passes, 1)), axis=1).reshape(-1)
            parts.append(order[max(0, begin - block * size) : end - block * size])
        return np.concatenate(parts)


class BucketBatchSampler(Sampler[tuple[MicroBatchSpec, ...]]):
    """Global batches of clips of like length, and this rank's part of each: a pure function of its arguments.

    Draws are shuffled, put into buckets by padded length, and cut into global batches of batch_size * accum_steps *
    num_ranks, or of `global_batch_size`, of which some ranks may have more than others; what is left of a bucket moves
    up into the next one, so only one batch an epoch, the last of the largest bucket, can be short. A short batch is
    dealt evenly; a rank that gets none computes a padding clip, whose losses are scaled by 0. Thus every draw is seen
    exactly once an epoch on any number of ranks. One item is one step: its micro-batches.

    With windows, this happens in each: units are shuffled and cut into windows by their frames, whatever the ranks, and
    what fills no global batch, fewer clips than one has, waits for the next window, in which it comes first. So a clip
    is read in the window of its unit or the next; only windows of fewer clips than a global batch join with those after
    them until they fill one.
    """

    def __init__(
        self,
        lengths: Sequence[int] | Numbers,
        batch_size: int,
        num_ranks: int,
        rank: int,
        seed: int,
        accum_steps: int = 1,
        global_batch_size: int | None = None,
        sampling: Sampling | None = None,
        speakers: Numbers | None = None,
        units: Numbers | None = None,
    ) -> None:
        """Per clip its frames, and where `sampling` needs them its speaker (negative: none) and unit (or MUTE)."""
        frames = np.asarray(lengths, dtype=np.int64)
        self.lengths = np.minimum(frames, MAX_CLIP_FRAMES)
        self.batch_size, self.num_ranks, self.rank, self.seed = batch_size, num_ranks, rank, seed
        self.global_batch_size = global_batch_size or batch_size * accum_steps * num_ranks
        self.sampling = sampling or Sampling()
        self._start: tuple[int, BatchesDone] = (0, ())
        self.balance = None
        if self.sampling.balance and speakers is not None:
            self.balance = Balance(speakers, self.sampling.balance, seed)
        every = np.zeros(len(frames), np.int64) if units is None else units
        self._unit_ids, self._units = np.unique(every, return_inverse=True)
        self._unit_frames = np.bincount(self._units, frames).astype(np.int64)
        self._last: tuple[object, list[list[Numbers]]] = (None, [])

    @classmethod
    def of(
        cls,
        config: TrainConfig,
        lengths: Sequence[int] | Numbers,
        num_ranks: int,
        rank: int,
        sampling: Sampling | None = None,
        clips: ClipList | None = None,
    ) -> BucketBatchSampler:
        """The trainer's; without `clips` that of all speakers alike, read in any order."""
        sizes = (config.batch_size, num_ranks, rank, config.seed, config.grad_accum_steps, config.keep_global_batch)
        if clips is None:
            return cls(lengths, *sizes)
        units, speakers = clips.rows["unit"], clips.rows["speaker"]
        return cls(lengths, *sizes, sampling, np.where(units == MUTE, -1, speakers), units)

    @property
    def steps_per_epoch(self) -> int:
        return -(-len(self.lengths) // self.global_batch_size)

    @property
    def exceeds_dataset(self) -> bool:
        """Whether the global batch is more than the clips bear: an epoch has fewer than MIN_STEPS_PER_EPOCH of it."""
        return self.global_batch_size * MIN_STEPS_PER_EPOCH > len(self.lengths)

    @property
    def num_padding_clips(self) -> int:
        """Clips an epoch that a rank computes for nothing, because its batch has none for it: mostly the short one."""
        num_full, short = divmod(len(self.lengths), self.global_batch_size)
        return num_full * self._num_padding(self.global_batch_size) + self._num_padding(short)

    def _num_padding(self, num_clips: int) -> int:
        num_micro = -(-num_clips // (self.batch_size * self.num_ranks))
        return max(0, self.num_ranks * num_micro - num_clips)

    def start_at(self, epoch: int, batches_done: BatchesDone) -> None:
        """Where the next iteration begins: in `epoch`, after the steps that `batches_done` counts."""
        self._start = (epoch, batches_done)

    def global_batches(self, epoch: int, batches_done: BatchesDone = ()) -> list[Numbers]:
        """The draws of every global batch of an epoch that is left, in order; the same on all ranks.

        When the size of the global batch changed within the epoch (a run resumed on another number of ranks), the draws
        that were not yet seen are cut anew, and none is seen twice.
        """
        return [clips for batches in self._batches_left(epoch, batches_done) for clips in batches]

    def windows(self, epoch: int, batches_done: BatchesDone = ()) -> list[Window]:
        """The windows of an epoch that are left: no step reads a unit of another one. All, where there are none."""
        found: list[Window] = []
        for batches in filter(None, self._batches_left(epoch, batches_done)):
            numbers, first_uses = np.unique(self._units[self._clips(np.concatenate(batches))], return_index=True)
            units = self._unit_ids[numbers[np.argsort(first_uses)]]
            first = found[-1].end if found else 0
            found.append(Window(tuple(units[units != MUTE].tolist()), first, first + len(batches)))
        return found

    def _batches_left(self, epoch: int, batches_done: BatchesDone) -> list[list[Numbers]]:
        """By window; the last answer is kept."""
        asked = epoch, tuple(batches_done), self.global_batch_size
        if self._last[0] != asked:
            self._last = asked, self._cut_left(epoch, batches_done)
        return self._last[1]

    def _cut_left(self, epoch: int, batches_done: BatchesDone) -> list[list[Numbers]]:
        left, windows = self._shuffled(epoch)
        for part, (size, num_steps) in enumerate(batches_done):
            cut = self._cut(left, windows, size, self._generator(epoch, part))
            if size == self.global_batch_size and part == len(batches_done) - 1:
                begins = [0, *accumulate(map(len, cut))]
                return [its[max(0, num_steps - begin) :] for its, begin in zip(cut, begins, strict=False)]
            done = [clips for batches in cut for clips in batches][:num_steps]
            is_left = ~np.isin(left, np.concatenate([left[:0], *done]))
            left, windows = left[is_left], windows[is_left]
        return self._cut(left, windows, self.global_batch_size, self._generator(epoch, len(batches_done)))

    def _generator(self, *key: int) -> np.random.Generator:
        return np.random.Generator(np.random.PCG64([self.seed, *key]))

    def _clips(self, draws: Numbers) -> Numbers:
        """Their numbers in the training list."""
        return draws % len(self.lengths)

    def _shuffled(self, epoch: int) -> tuple[Numbers, Numbers]:
        """The draws of an epoch in their order, and the window of each, in rising order."""
        rng, size = self._generator(epoch), self.sampling.window_frames
        order = rng.permutation(len(self.lengths))
        draws = order if self.balance is None else self.balance.draws(epoch)[order]
        if not size:
            return draws, np.zeros_like(draws)
        units = self._units[self._clips(draws)]
        is_mute = self._unit_ids[units] == MUTE
        drawn = rng.permutation(np.unique(units[~is_mute]))
        if not len(drawn):
            return draws, np.zeros_like(draws)
        units[is_mute] = drawn[rng.integers(len(drawn), size=is_mute.sum())]  # they are read beside any others
        frames, window_of = self._unit_frames[drawn], np.zeros(len(self._unit_ids), np.int64)
        window_of[drawn] = (np.cumsum(frames) - frames) // size
        windows = window_of[units]
        by_window = np.argsort(windows, kind="stable")
        return draws[by_window], windows[by_window]

    def _cut(self, order: Numbers, windows: Numbers, size: int, rng: np.random.Generator) -> list[list[Numbers]]:
        """Global batches by window: all of them are full, but for one of the last window."""
        cut, waiting = [], order[:0]
        for begin, end in pairwise([0, *(np.flatnonzero(np.diff(windows)) + 1).tolist(), len(order)]):
            clips = np.concatenate([waiting, order[begin:end]])
            taken = len(clips) // size * size if end < len(order) else len(clips)
            clips, waiting = clips[:taken], clips[taken:]
            cut.append(self._cut_window(clips, size, rng))
        return cut

    def _cut_window(self, order: Numbers, size: int, rng: np.random.Generator) -> list[Numbers]:
        buckets = -(-self.lengths[self._clips(order)] // BUCKET_FRAMES)
        batches, carried = [], order[:0]
        for bucket in np.unique(buckets):
            clips = np.concatenate([carried, order[buckets == bucket]])
            full = len(clips) // size * size
            batches += list(clips[:full].reshape(-1, size))
            carried = clips[full:]
        if len(carried):
            batches.append(carried)
        return [batches[i] for i in rng.permutation(len(batches))]

    def rank_batches(self, clips: Numbers, epoch: int) -> tuple[MicroBatchSpec, ...]:
        """This rank's micro-batches of a global batch: as many as are needed, the same number on every rank."""
        num_micro = -(-len(clips) // (self.batch_size * self.num_ranks))
        lengths, num_parts = self.lengths[self._clips(clips)], self.num_ranks * num_micro
        each, more = divmod(len(clips), num_parts)
        begins = [part * each + min(part, more) for part in range(self.rank, num_parts, self.num_ranks)]
        sizes = [each + (part < more) for part in range(self.rank, num_parts, self.num_ranks)]
        return tuple(
            MicroBatchSpec(
                clips=tuple((clips[begin : begin + size] if size else clips[:1]).tolist()),
                epoch=epoch,
                padded_frames=int(-(-lengths.max() // BUCKET_FRAMES) * BUCKET_FRAMES),
                loss_scale=size * self.num_ranks / len(clips),
                mean_frames=float(lengths.sum()) / self.num_ranks,
            )
            for begin, size in zip(begins, sizes, strict=True)
        )

    def __iter__(self) -> Iterator[tuple[MicroBatchSpec, ...]]:
        """Endless: epoch after epoch, from the start that was set."""
        epoch, batches_done = self._start
        while True:
            for clips in self.global_batches(epoch, batches_done):
                yield self.rank_batches(clips, epoch)
            epoch, batches_done = epoch + 1, ()
