"""Batches: the dataset over the run's safetensors files, and the one sampler that decides who trains on what.

Shapes: B clips, T spectrogram frames, S = T * hop samples, C content channels.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from dataclasses import dataclass, fields, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from rvc_dist.config import F0_PER_S, MAX_CLIP_FRAMES, Recipe
from rvc_dist.workspace import StageError, Workspace, read_header, unit_files

logger = logging.getLogger(__name__)

BUCKET_FRAMES = 50
"""Clips are padded to a multiple of this many frames: at most 900 / 50 = 18 shapes."""
MUTE_SOURCE = ""
"""The source of the silent clips, which belong to no recording."""


@dataclass(frozen=True)
class ClipRef:
    """Where one training clip lies, and how long it is once wave, content and f0 are trimmed to the shortest."""

    unit: int
    key: str
    speaker: int
    source: str
    num_frames: int


@dataclass(frozen=True)
class Batch:
    """What one rank trains on in one step; padding is zero."""

    wave: Tensor
    """[B, 1, S] float32"""
    content: Tensor
    """[B, T, C] float32"""
    f0: Tensor
    """[B, T] float32 in Hz, 0 where unvoiced"""
    lengths: Tensor
    """[B] int64, valid frames"""
    speaker: Tensor
    """[B] int64"""
    share: float
    """This rank's clips over the mean number of clips a rank: 1 but in an epoch's last batch. Losses that are means
    over clips are multiplied by it, so that the average over ranks is the mean over the global batch."""
    mean_frames: float
    """Valid frames of the global batch over the number of ranks: what the KL divergence is divided by."""

    def _map(self, function: Any) -> Batch:
        tensors = {f.name: getattr(self, f.name) for f in fields(self)}
        return replace(self, **{k: function(v) for k, v in tensors.items() if isinstance(v, Tensor)})

    def to(self, device: torch.device) -> Batch:
        return self._map(lambda t: t.to(device, non_blocking=True))

    def pin_memory(self) -> Batch:
        return self._map(lambda t: t.pin_memory())


@dataclass(frozen=True)
class BatchPlan:
    """One rank's part of one global batch, before anything is read."""

    clips: tuple[int, ...]
    epoch: int
    padded_frames: int
    share: float
    mean_frames: float


def feature_frames(num_frames: int, rate: int, hop: int, per_s: int) -> Tensor:
    """For each spectrogram frame, the index of the feature frame that holds its start: [T] int64.

    At 100 frames a second this is the identity for f0 and repeats each of the 50 content frames twice, as RVC does;
    at 44.1 kHz (86.13 frames a second) it is the nearest-neighbour interpolation.
    """
    return torch.arange(num_frames) * (hop * per_s) // rate


def covered_frames(rate: int, hop: int, num_samples: int, num_content: int, num_f0: int) -> int:
    """Spectrogram frames for which wave, content (50 a second) and f0 (100 a second) all exist."""
    by_content = -(-num_content * rate // (hop * F0_PER_S // 2))
    by_f0 = -(-num_f0 * rate // (hop * F0_PER_S))
    return min(num_samples // hop, by_content, by_f0)


@dataclass(frozen=True)
class ClipTable:
    """All clips of a run, split into training and validation by source file."""

    train: tuple[ClipRef, ...]
    holdout: tuple[ClipRef, ...]
    content_channels: int
    embedder: dict[str, Any]
    num_speakers: int

    @classmethod
    def load(cls, recipe: Recipe) -> ClipTable:
        """Read the headers of every unit.

        Raises:
            StageError: the features are missing, or no clip is long enough to train on.
        """
        work = Workspace(recipe.run_dir, recipe.name)
        if not work.features_report_file.is_file():
            raise StageError(f"{work.features_dir} has no features: run `rvc-dist extract` first")
        spec = recipe.rate_spec
        clips, short, embedder = [], 0, {}
        for path in unit_files(work.features_dir):
            header = read_header(path)
            if header is None:
                raise StageError(f"{path} is damaged: delete it and run `rvc-dist extract` again")
            if header["sample_rate"] != recipe.data.sample_rate:
                raise StageError(
                    f"{path} belongs to clips of {header['sample_rate']} Hz, the recipe says "
                    f"data.sample_rate {recipe.data.sample_rate}: run `rvc-dist preprocess` and `extract` again"
                )
            embedder = header["embedder"]
            for i, clip in enumerate(header["clips"]):
                sizes = clip["num_samples"], clip["num_content"], clip["num_f0"]
                frames = covered_frames(recipe.data.sample_rate, spec.hop, *sizes)
                if frames < spec.segment // spec.hop + 1:
                    short += 1
                    continue
                clips.append(ClipRef(int(path.stem), f"{i:05d}", clip["speaker"], clip["source"], frames))
        if short:
            logger.warning("%d clips are shorter than the training segment and are left out", short)
        if not clips:
            raise StageError(f"{work.features_dir} holds no clip long enough to train on")
        kept_out = held_out_sources({c.source for c in clips}, recipe.data.holdout, recipe.train.seed)
        if recipe.data.holdout and not kept_out:
            logger.warning("data.holdout: one source file cannot be split; no validation, no best checkpoint")
        speakers = sorted({c.speaker for c in clips})
        mutes = [c for s in speakers for c in _mutes(work, recipe, s)]
        return cls(
            train=tuple(c for c in clips if c.source not in kept_out) + tuple(mutes),
            holdout=tuple(c for c in clips if c.source in kept_out),
            content_channels=embedder["width"],
            embedder=embedder,
            num_speakers=speakers[-1] + 1,
        )


def _mutes(work: Workspace, recipe: Recipe, speaker: int) -> list[ClipRef]:
    header = read_header(work.mute_file) if recipe.extract.include_mutes else None
    if header is None:
        return []
    sizes = header["num_samples"], header["num_content"], header["num_f0"]
    frames = covered_frames(recipe.data.sample_rate, recipe.rate_spec.hop, *sizes)
    return [ClipRef(-1, "00000", speaker, MUTE_SOURCE, frames)] * recipe.extract.include_mutes


def held_out_sources(sources: set[str], share: float, seed: int) -> set[str]:
    """The source files kept for validation: at least one if `share` > 0, never all."""
    ordered = sorted(sources)
    count = min(len(ordered) - 1, max(1, round(share * len(ordered)))) if share else 0
    if count <= 0:
        return set()
    chosen = np.random.Generator(np.random.PCG64(seed)).permutation(len(ordered))[:count]
    return {ordered[i] for i in chosen}


class BucketBatchSampler(Sampler[BatchPlan]):
    """Global batches of clips of like length, and this rank's part of each: a pure function of its arguments.

    Clips are shuffled, put into buckets by padded length, and cut into global batches of batch_size * num_ranks; what
    is left of a bucket moves up into the next one, so only one batch an epoch, the last of the largest bucket, can be
    short. A short batch is dealt evenly; a rank that gets none takes one clip with a share of 0. Thus every clip is
    seen exactly once an epoch on any number of ranks.
    """

    def __init__(self, lengths: list[int], batch_size: int, num_ranks: int, rank: int, seed: int) -> None:
        self.lengths = np.minimum(np.asarray(lengths, dtype=np.int64), MAX_CLIP_FRAMES)
        self.batch_size, self.num_ranks, self.rank, self.seed = batch_size, num_ranks, rank, seed
        self.start = (0, 0)

    @property
    def global_batch_size(self) -> int:
        return self.batch_size * self.num_ranks

    @property
    def steps_per_epoch(self) -> int:
        return -(-len(self.lengths) // self.global_batch_size)

    def start_at(self, epoch: int, step_in_epoch: int) -> None:
        """Where the next iteration begins."""
        self.start = (epoch, step_in_epoch)

    def global_batches(self, epoch: int) -> list[np.ndarray[Any, np.dtype[np.int64]]]:
        """The clip numbers of every global batch of an epoch, in order; the same on all ranks."""
        rng = np.random.Generator(np.random.PCG64([self.seed, epoch]))
        order = rng.permutation(len(self.lengths))
        buckets = -(-self.lengths[order] // BUCKET_FRAMES)
        batches, carried = [], order[:0]
        for bucket in np.unique(buckets):
            clips = np.concatenate([carried, order[buckets == bucket]])
            full = len(clips) // self.global_batch_size * self.global_batch_size
            batches += list(clips[:full].reshape(-1, self.global_batch_size))
            carried = clips[full:]
        if len(carried):
            batches.append(carried)
        return [batches[i] for i in rng.permutation(len(batches))]

    def part(self, clips: np.ndarray[Any, np.dtype[np.int64]], epoch: int) -> BatchPlan:
        """This rank's part of a global batch."""
        mine = np.array_split(clips, self.num_ranks)[self.rank]
        share = len(mine) * self.num_ranks / len(clips)
        lengths = self.lengths[clips]
        return BatchPlan(
            clips=tuple((mine if len(mine) else clips[:1]).tolist()),
            epoch=epoch,
            padded_frames=int(-(-lengths.max() // BUCKET_FRAMES) * BUCKET_FRAMES),
            share=share,
            mean_frames=float(lengths.sum()) / self.num_ranks,
        )

    def __iter__(self) -> Iterator[BatchPlan]:
        """Endless: epoch after epoch, from `start` on."""
        epoch, step = self.start
        while True:
            for clips in self.global_batches(epoch)[step:]:
                yield self.part(clips, epoch)
            epoch, step = epoch + 1, 0


class ClipDataset(Dataset[Batch]):
    """Reads whole batches: one item is one BatchPlan."""

    def __init__(self, recipe: Recipe, clips: tuple[ClipRef, ...]) -> None:
        self.work = Workspace(recipe.run_dir, recipe.name)
        self.clips = clips
        self.rate, self.hop, self.seed = recipe.data.sample_rate, recipe.rate_spec.hop, recipe.train.seed

    def __getitem__(self, plan: BatchPlan) -> Batch:
        return collate(
            [self.read(self.clips[i], self._first_frame(i, plan.epoch)) for i in plan.clips],
            plan.padded_frames,
            plan.share,
            plan.mean_frames,
            self.hop,
        )

    def _first_frame(self, index: int, epoch: int) -> int:
        """Long clips show another part of at most 900 frames each epoch; the choice needs no state."""
        spare = self.clips[index].num_frames - MAX_CLIP_FRAMES
        if spare <= 0:
            return 0
        return int(np.random.Generator(np.random.PCG64([self.seed, epoch, index])).integers(spare + 1))

    def read(self, clip: ClipRef, first: int = 0) -> tuple[Tensor, Tensor, Tensor, int]:
        """wave [S], content [T, C], f0 [T], speaker: aligned, trimmed, from frame `first` on."""
        last = min(clip.num_frames, first + MAX_CLIP_FRAMES)
        features = _open(self.work.mute_file if clip.unit < 0 else self.work.features_file(clip.unit))
        content, f0 = features.get_tensor(f"{clip.key}.content"), features.get_tensor(f"{clip.key}.f0")
        if clip.unit < 0:
            wave = torch.zeros((last - first) * self.hop)
        else:
            waves = _open(self.work.clips_file(clip.unit)).get_slice(clip.key)
            wave = waves[first * self.hop : last * self.hop]
        frames = slice(first, last)
        content = content[feature_frames(last, self.rate, self.hop, F0_PER_S // 2)[frames]]
        f0 = f0[feature_frames(last, self.rate, self.hop, F0_PER_S)[frames]]
        return wave, content, f0, clip.speaker


@lru_cache(maxsize=1024)
def _open(path: Path) -> Any:
    """A memory-mapped safetensors file; the system bounds how many a process may have."""
    from safetensors import safe_open

    return safe_open(path, framework="pt")


def collate(
    clips: list[tuple[Tensor, Tensor, Tensor, int]], padded_frames: int, share: float, mean_frames: float, hop: int
) -> Batch:
    """Pad clips (wave [S], content [T, C], f0 [T], speaker) with zeros to `padded_frames`."""
    size, width = len(clips), clips[0][1].shape[1]
    wave = torch.zeros(size, 1, padded_frames * hop)
    content = torch.zeros(size, padded_frames, width)
    f0 = torch.zeros(size, padded_frames)
    for i, (w, c, f, _) in enumerate(clips):
        wave[i, 0, : len(w)] = w
        content[i, : len(c)] = c
        f0[i, : len(f)] = f
    return Batch(
        wave=wave,
        content=content,
        f0=f0,
        lengths=torch.tensor([len(c) for _, c, _, _ in clips]),
        speaker=torch.tensor([s for *_, s in clips]),
        share=share,
        mean_frames=mean_frames,
    )


def make_loader(
    dataset: ClipDataset, sampler: BucketBatchSampler, num_workers: int, pin_memory: bool, fast: bool
) -> DataLoader[Batch]:
    """Batches as the sampler plans them; nothing else shards or shuffles."""
    if fast and num_workers:
        num_workers = max(num_workers, min(8, (torch.multiprocessing.cpu_count() or 1) // 2))
    return DataLoader(
        dataset,
        sampler=sampler,
        batch_size=None,
        num_workers=num_workers,
        pin_memory=pin_memory,
        persistent_workers=num_workers > 0,
        prefetch_factor=(16 if fast else 4) if num_workers else None,
        # A loader draws a seed for its workers; drawn from the global state it would change the noise of a resumed run.
        generator=torch.Generator(),
    )
