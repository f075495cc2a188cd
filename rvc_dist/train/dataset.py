"""Batches: the dataset over the run's safetensors files, and the one sampler that decides who trains on what.

Shapes: B clips, T spectrogram frames, S = T * hop samples, C content channels.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset, Sampler

from rvc_dist.config import F0_PER_S, MAX_CLIP_FRAMES, RateSpec, Recipe, TrainConfig
from rvc_dist.data.number_formats import FULL_SCALE, clip_bytes_per_s, feature_bytes_per_s
from rvc_dist.data.remote import RemoteRun, data_of, unit_headers
from rvc_dist.train import memory
from rvc_dist.train.holdout import SpeakerShare, hold_out, settled_by, unseen_speakers
from rvc_dist.workspace import MuteHeader, StageError, Workspace, read_header, unit_header

logger = logging.getLogger(__name__)

BUCKET_FRAMES = 50
"""Clips are padded to a multiple of this many frames: at most 900 / 50 = 18 shapes."""
MIN_STEPS_PER_EPOCH = 4
"""Full steps an epoch below which a run is warned of its global batch, and more ranks are said not to pay."""
MUTE_SOURCE = ""
"""The source of the silent clips, which belong to no recording."""
MUTE = -1
"""In place of a unit: the silent clip."""
CACHE_SHARE = 0.5
"""Of the device's free memory, what a cached dataset may take: the rest is for the step."""

Clips = np.ndarray[Any, np.dtype[np.int64]]
"""Numbers of clips in the training list."""
BatchesDone = Sequence[tuple[int, int]]
"""What of an epoch was trained on: (size of the global batch, steps of that size), one entry a change of size."""


@dataclass(frozen=True)
class ClipRef:
    """Where one training clip lies, what it was cut from, and how long it is."""

    unit: int
    key: str
    speaker: int
    source: str
    """The recording."""
    num_frames: int
    """Once wave, content and f0 are trimmed to the shortest."""
    start_s: float = 0.0
    """In its recording."""
    duration_s: float = 0.0
    """Of all its samples."""
    content: str = ""
    """Hash of the recording, where it is known."""
    repeat: int = 1
    """How often it counts in an epoch."""
    guessed: bool = False
    """`start_s` is: so of its recording all is held out, or nothing, where that is possible."""

    @classmethod
    def of(cls, header: Mapping[str, Any], unit: int, index: int, num_samples: int, num_frames: int) -> ClipRef:
        """Clip `index` of a unit with this `header`."""
        clip, duration_s = header["clips"][index], num_samples / header["sample_rate"]
        where = (clip["speaker"], str(clip["source"]), num_frames, clip["start_s"], duration_s)
        more = clip.get("content", ""), clip.get("repeat", 1), clip.get("guessed", False)
        return cls(unit, f"{index:05d}", *where, *more)


@dataclass(frozen=True)
class Batch:
    """What one rank trains on in one step; padding is zero."""

    wave_with_reach: Tensor
    """[B, 1, reach + S + reach] float32: S and what the windows of the first and last frame reach beyond it"""
    content: Tensor
    """[B, T, C] float32"""
    f0: Tensor
    """[B, T] float32 in Hz, 0 where unvoiced"""
    lengths: Tensor
    """[B] int64, valid frames"""
    speaker: Tensor
    """[B] int64"""
    clips: tuple[int, ...]
    """Each clip's number in the training list."""
    seeds: tuple[int, ...]
    """Each clip's seed for the noise of this epoch."""
    loss_scale: float
    """This micro-batch's clips times the number of ranks, over those of the global batch: 1 over the micro-batches a
    step when the batch is full. Losses that are means over clips are multiplied by it, so that their sum over
    micro-batches, averaged over ranks, is the mean over the global batch."""
    mean_frames: float
    """Valid frames of the global batch over the number of ranks: what the KL divergence is divided by."""
    reach: int
    """In samples; see `RateSpec.reach`."""
    energy: Tensor | None = None
    """[B, T] float32, where the model follows it."""

    @property
    def wave(self) -> Tensor:
        """[B, 1, S]: the samples of the frames alone, a view."""
        return self.wave_with_reach[:, :, self.reach : self.wave_with_reach.shape[2] - self.reach]

    def _map(self, function: Any) -> Batch:
        tensors = {f.name: getattr(self, f.name) for f in fields(self)}
        return replace(self, **{k: function(v) for k, v in tensors.items() if isinstance(v, Tensor)})

    def first(self, count: int) -> Batch:
        """The first `count` clips."""
        return replace(self._map(lambda t: t[:count]), clips=self.clips[:count], seeds=self.seeds[:count])

    def to(self, device: torch.device) -> Batch:
        return self._map(lambda t: t.to(device, non_blocking=True))

    def pin_memory(self) -> Batch:
        return self._map(lambda t: t.pin_memory())

    def record_stream(self, stream: torch.Stream) -> None:
        """Let its memory, which another stream made, be used again only when `stream` is through with it."""
        for value in vars(self).values():
            if isinstance(value, Tensor):
                value.record_stream(stream)


@dataclass(frozen=True)
class MicroBatchSpec:
    """One micro-batch of one rank, before anything is read."""

    clips: tuple[int, ...]
    epoch: int
    padded_frames: int
    loss_scale: float
    mean_frames: float


class ClipData(NamedTuple):
    """One clip as it is trained on. Wave and content are as they are stored, until they are put into a batch."""

    wave_with_reach: Tensor
    """[reach + T * hop + reach] float32 or int16"""
    content: Tensor
    """[T, C] float32, float16 or bfloat16"""
    f0: Tensor
    """[T] float32 in Hz"""
    speaker: int
    energy: Tensor | None = None
    """[T] float32"""


def feature_frames(num_frames: int, rate: int, hop: int, per_s: int, device: torch.device | str = "cpu") -> Tensor:
    """For each spectrogram frame, the index of the feature frame that holds its start: [T] int64.

    At 100 frames a second this is the identity for f0 and repeats each of the 50 content frames twice, as RVC does;
    at 44.1 kHz (86.13 frames a second) it is the nearest-neighbour interpolation.
    """
    return torch.arange(num_frames, device=device) * (hop * per_s) // rate


def covered_frames(rate: int, hop: int, num_samples: int, num_content: int, num_f0: int) -> int:
    """Spectrogram frames for which wave, content (50 a second) and f0 (100 a second) all exist."""
    by_content = -(-num_content * rate // (hop * F0_PER_S // 2))
    by_f0 = -(-num_f0 * rate // (hop * F0_PER_S))
    return min(num_samples // hop, by_content, by_f0)


@dataclass(frozen=True)
class ClipTable:
    """All clips of a run, split into training and validation: see `rvc_dist.train.holdout`."""

    train: tuple[ClipRef, ...]
    holdout: tuple[ClipRef, ...]
    content_channels: int
    embedder: dict[str, Any]
    num_speakers: int
    shares: tuple[SpeakerShare, ...] = ()
    """What of each speaker is held out."""
    unseen: tuple[ClipRef, ...] = ()
    """All clips of the speakers in data.holdout_speakers, who are in neither of the others."""

    @property
    def trained_speakers(self) -> tuple[int, ...]:
        """The speakers that the networks hear, in rising order: silent clips alone teach nobody's voice."""
        return tuple(sorted({c.speaker for c in self.train if c.source != MUTE_SOURCE}))

    @classmethod
    def load(cls, recipe: Recipe) -> ClipTable:
        """Read the headers of every unit.

        Raises:
            StageError: the features are missing, or no clip is long enough to train on.
        """
        work = data_of(recipe)
        if not work.features_report_file.is_file():
            raise StageError(f"{work.features_dir} has no features:", "run `rvc-dist extract` first")
        spec = recipe.rate_spec
        clips, short, embedder = [], 0, {}
        for unit, path, header in unit_headers(work):
            if header["sample_rate"] != recipe.data.sample_rate:
                raise StageError(
                    f"{path} belongs to clips of {header['sample_rate']} Hz, the recipe says data.sample_rate "
                    f"{recipe.data.sample_rate}:",
                    "run `rvc-dist preprocess` and `extract` again",
                )
            embedder = dict(header["embedder"])
            for i, clip in enumerate(header["clips"]):
                sizes = clip["num_samples"], clip["num_content"], clip["num_f0"]
                frames = covered_frames(recipe.data.sample_rate, spec.hop, *sizes)
                if frames < spec.segment // spec.hop + 1:
                    short += 1
                    continue
                clips.append(ClipRef.of(header, unit, i, clip["num_samples"], frames))
        if short:
            logger.warning("%d clips are shorter than the training segment and are left out", short)
        if not clips:
            raise StageError(f"{work.features_dir} holds no clip long enough to train on")
        return cls.split(recipe, clips, lambda speaker: _mutes(work, recipe, speaker), embedder)

    @classmethod
    def split(
        cls,
        recipe: Recipe,
        clips: Sequence[ClipRef],
        mutes: Callable[[int], Sequence[ClipRef]],
        embedder: dict[str, Any],
    ) -> ClipTable:
        """`clips` without the held-out ones, and the silent clips of each speaker; `embedder` made the content.

        A clip that counts several times an epoch is there so often, each with a noise and a part of its own.

        What the run was trained on stays on its side.
        """
        work = Workspace(recipe.run_dir, recipe.name)
        num_speakers, unseen = max(c.speaker for c in clips) + 1, list[ClipRef]()
        if recipe.data.holdout_speakers:
            ids = sorted({c.speaker for c in clips})
            left_out = unseen_speakers(recipe, ids, work.speakers(), work.heard_speakers())
            unseen = [c for c in clips if c.speaker in left_out]
            clips = [c for c in clips if c.speaker not in left_out]
        _, trained_on = work.trained_on()
        settled = settled_by(trained_on, recipe.data.holdout, recipe.train.seed)
        held, lost, shares = hold_out(clips, recipe.data.holdout, recipe.train.seed, settled)
        speakers = sorted({c.speaker for c in clips})
        train = (c for c in clips if c not in held and c not in lost for _ in range(c.repeat))
        return cls(
            train=(*train, *(c for s in speakers for c in mutes(s))),
            holdout=tuple(c for c in clips if c in held),
            content_channels=embedder["width"],
            embedder=embedder,
            num_speakers=num_speakers,
            shares=shares,
            unseen=tuple(unseen),
        )


def _mutes(work: Workspace, recipe: Recipe, speaker: int) -> list[ClipRef]:
    if not recipe.extract.include_mutes or read_header(work.mute_file) is None:
        return []
    header = unit_header(work.mute_file, MuteHeader, "extract")
    sizes = header["num_samples"], header["num_content"], header["num_f0"]
    frames = covered_frames(recipe.data.sample_rate, recipe.rate_spec.hop, *sizes)
    return [ClipRef(MUTE, "00000", speaker, MUTE_SOURCE, frames)] * recipe.extract.include_mutes


class BucketBatchSampler(Sampler[tuple[MicroBatchSpec, ...]]):
    """Global batches of clips of like length, and this rank's part of each: a pure function of its arguments.

    Clips are shuffled, put into buckets by padded length, and cut into global batches of batch_size * accum_steps *
    num_ranks, or of `global_batch_size`, of which some ranks may have more than others; what is left of a bucket moves
    up into the next one, so only one batch an epoch, the last of the largest bucket, can be short. A short batch is
    dealt evenly; a rank that gets none computes a padding clip, whose losses are scaled by 0. Thus every clip is seen
    exactly once an epoch on any number of ranks. One item is one step: its micro-batches.
    """

    def __init__(
        self,
        lengths: list[int],
        batch_size: int,
        num_ranks: int,
        rank: int,
        seed: int,
        accum_steps: int = 1,
        global_batch_size: int | None = None,
    ) -> None:
        self.lengths = np.minimum(np.asarray(lengths, dtype=np.int64), MAX_CLIP_FRAMES)
        self.batch_size, self.num_ranks, self.rank, self.seed = batch_size, num_ranks, rank, seed
        self.global_batch_size = global_batch_size or batch_size * accum_steps * num_ranks
        self._start: tuple[int, BatchesDone] = (0, ())

    @classmethod
    def of(cls, config: TrainConfig, lengths: list[int], num_ranks: int, rank: int) -> BucketBatchSampler:
        sizes = (config.batch_size, num_ranks, rank, config.seed, config.grad_accum_steps, config.keep_global_batch)
        return cls(lengths, *sizes)

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

    def global_batches(self, epoch: int, batches_done: BatchesDone = ()) -> list[Clips]:
        """The clip numbers of every global batch of an epoch that is left, in order; the same on all ranks.

        When the size of the global batch changed within the epoch (a run resumed on another number of ranks), the clips
        that were not yet seen are cut anew, and none is seen twice.
        """
        left = self._generator(epoch).permutation(len(self.lengths))
        for part, (size, num_steps) in enumerate(batches_done):
            batches = self._cut(left, size, self._generator(epoch, part))
            if size == self.global_batch_size and part == len(batches_done) - 1:
                return batches[num_steps:]
            left = left[~np.isin(left, np.concatenate(batches[:num_steps]))]
        return self._cut(left, self.global_batch_size, self._generator(epoch, len(batches_done)))

    def _generator(self, *key: int) -> np.random.Generator:
        return np.random.Generator(np.random.PCG64([self.seed, *key]))

    def _cut(self, order: Clips, size: int, rng: np.random.Generator) -> list[Clips]:
        buckets = -(-self.lengths[order] // BUCKET_FRAMES)
        batches, carried = [], order[:0]
        for bucket in np.unique(buckets):
            clips = np.concatenate([carried, order[buckets == bucket]])
            full = len(clips) // size * size
            batches += list(clips[:full].reshape(-1, size))
            carried = clips[full:]
        if len(carried):
            batches.append(carried)
        return [batches[i] for i in rng.permutation(len(batches))]

    def rank_batches(self, clips: Clips, epoch: int) -> tuple[MicroBatchSpec, ...]:
        """This rank's micro-batches of a global batch: as many as are needed, the same number on every rank."""
        num_micro = -(-len(clips) // (self.batch_size * self.num_ranks))
        lengths = self.lengths[clips]
        return tuple(
            MicroBatchSpec(
                clips=tuple((mine if len(mine) else clips[:1]).tolist()),
                epoch=epoch,
                padded_frames=int(-(-lengths.max() // BUCKET_FRAMES) * BUCKET_FRAMES),
                loss_scale=len(mine) * self.num_ranks / len(clips),
                mean_frames=float(lengths.sum()) / self.num_ranks,
            )
            for mine in np.array_split(clips, self.num_ranks * num_micro)[self.rank :: self.num_ranks]
        )

    def __iter__(self) -> Iterator[tuple[MicroBatchSpec, ...]]:
        """Endless: epoch after epoch, from the start that was set."""
        epoch, batches_done = self._start
        while True:
            for clips in self.global_batches(epoch, batches_done):
                yield self.rank_batches(clips, epoch)
            epoch, batches_done = epoch + 1, ()


class UnitFiles(Protocol):
    """Where the files of units are: a run folder, or what fetches them when they are asked for."""

    @property
    def mute_file(self) -> Path: ...
    def clips_file(self, unit: int) -> Path: ...
    def features_file(self, unit: int) -> Path: ...


class ClipDataset(Dataset[list[Batch]]):
    """Reads whole steps: one item is the micro-batches of one rank."""

    def __init__(self, recipe: Recipe, clips: tuple[ClipRef, ...], units: UnitFiles | None = None) -> None:
        self.work = Workspace(recipe.run_dir, recipe.name)
        self.units: UnitFiles = units or self.work
        self.clips = clips
        self.rate, self.spec, self.seed = recipe.data.sample_rate, recipe.rate_spec, recipe.train.seed
        self.has_energy = recipe.model.energy
        self.wave_kind: torch.dtype = getattr(torch, recipe.preprocess.clip_format)

    def __getitem__(self, micro_batches: tuple[MicroBatchSpec, ...]) -> list[Batch]:
        return [self.read_batch(micro) for micro in micro_batches]

    def read_batch(self, micro: MicroBatchSpec) -> Batch:
        clips = [self.read(self.clips[i], self._first_frame(i, micro.epoch)) for i in micro.clips]
        return collate(clips, micro, self.spec, tuple(self._noise_seed(i, micro.epoch) for i in micro.clips))

    def _first_frame(self, index: int, epoch: int) -> int:
        """Long clips show another part of at most 900 frames each epoch; the choice needs no state."""
        spare = self.clips[index].num_frames - MAX_CLIP_FRAMES
        if spare <= 0:
            return 0
        return int(np.random.Generator(np.random.PCG64([self.seed, epoch, index])).integers(spare + 1))

    def _noise_seed(self, index: int, epoch: int) -> int:
        """The noise of a clip in an epoch is the same on any rank of any number: nothing of it needs saving."""
        return int(np.random.SeedSequence([self.seed, epoch, index, 1]).generate_state(1, np.uint64)[0])

    def read(self, clip: ClipRef, first: int = 0) -> ClipData:
        """A clip from frame `first` on, at most MAX_CLIP_FRAMES of it: aligned and trimmed."""
        last = min(clip.num_frames, first + MAX_CLIP_FRAMES)
        wave, content, f0, energy = self._tensors(clip)
        hop, frames = self.spec.hop, slice(first, last)
        of_f0 = feature_frames(last, self.rate, hop, F0_PER_S, f0.device)[frames]
        return ClipData(
            wave_with_reach=part_with_reach(wave, first * hop, last * hop, self.spec.reach),
            content=content[feature_frames(last, self.rate, hop, F0_PER_S // 2, content.device)[frames]],
            f0=f0[of_f0],
            speaker=clip.speaker,
            energy=None if energy is None else energy[of_f0],
        )

    def _tensors(self, clip: ClipRef) -> tuple[Any, Tensor, Tensor, Tensor | None]:
        """The whole wave [S], or what reads a part of it; content [T50, C]; f0 and energy [T100]."""
        if isinstance(self.units, RemoteRun) and self.units.has_removed():
            _open.cache_clear()  # a file that is open takes its room
        if clip.unit == MUTE:
            features, wave = (
                _open(self.units.mute_file),
                torch.zeros(clip.num_frames * self.spec.hop, dtype=self.wave_kind),
            )
        else:
            features = self._opened(self.units.features_file, clip.unit)
            wave = self._opened(self.units.clips_file, clip.unit).get_slice(clip.key)
        energy = features.get_tensor(f"{clip.key}.energy") if self.has_energy else None
        return wave, features.get_tensor(f"{clip.key}.content"), features.get_tensor(f"{clip.key}.f0"), energy

    def _opened(self, file_of: Callable[[int], Path], unit: int) -> Any:
        while True:
            try:
                return _open(file_of(unit))
            except FileNotFoundError:
                if not isinstance(self.units, RemoteRun):  # whose cache removed it in between
                    raise


class CachedClips(ClipDataset):
    """A dataset that lies in a device's memory: read once, never copied again."""

    def __init__(
        self, recipe: Recipe, clips: tuple[ClipRef, ...], device: torch.device, units: UnitFiles | None = None
    ) -> None:
        super().__init__(recipe, clips, units)
        self._cache = {clip: self._load(clip, device) for clip in dict.fromkeys(clips)}

    def _load(self, clip: ClipRef, device: torch.device) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        wave, content, f0, energy = super()._tensors(clip)
        wave = wave[: clip.num_frames * self.spec.hop + self.spec.reach].to(device)
        return wave, content.to(device), f0.to(device), None if energy is None else energy.to(device)

    def _tensors(self, clip: ClipRef) -> tuple[Any, Tensor, Tensor, Tensor | None]:
        return self._cache[clip] if clip in self._cache else super()._tensors(clip)


def cached_bytes(recipe: Recipe, clips: tuple[ClipRef, ...], content_channels: int) -> int:
    """Device memory that `CachedClips` takes: as much as the clips and features on the disk."""
    different = dict.fromkeys(clips)
    seconds = sum(c.num_frames for c in different) * recipe.rate_spec.hop / recipe.data.sample_rate
    of_wave, of_features = clip_bytes_per_s(recipe), feature_bytes_per_s(recipe, content_channels)
    reach_s = len(different) * recipe.rate_spec.reach / recipe.data.sample_rate
    return round(seconds * (of_wave + of_features) + reach_s * of_wave)


def part_with_reach(wave: Any, first: int, last: int, reach: int) -> Tensor:
    """Samples first - reach .. last + reach of a clip's `wave` [S], reflected where the clip has none.

    So their spectrogram is that of the whole clip, reflected at its ends, as other tools of RVC take it. `wave` may be
    a slice of a safetensors file, of which only this part is read.
    """
    (size,) = wave.get_shape() if hasattr(wave, "get_shape") else wave.shape
    begin, end = max(0, first - reach), min(size, last + reach)
    part: Tensor = wave[begin:end]
    before, after = begin - (first - reach), last + reach - end
    if not (before or after):
        return part
    # Not F.pad, which reflects no int16 on GPUs.
    padded = torch.cat([part[1 : 1 + before].flip(0), part, part[len(part) - 1 - after : -1].flip(0)])
    assert len(padded) == last - first + 2 * reach, "shorter than what is reflected"
    return padded


def place(into: Tensor, stored: Tensor) -> None:
    """Write a wave or content as it is stored into a float32 tensor: numbers are converted while they are copied."""
    if stored.dtype == torch.int16:
        torch.mul(stored, 1 / FULL_SCALE, out=into)
    else:
        into.copy_(stored)


@lru_cache(maxsize=1024)
def _open(path: Path) -> Any:
    """A memory-mapped safetensors file; the system bounds how many a process may have."""
    from safetensors import safe_open

    return safe_open(path, framework="pt")


def make_dataset(recipe: Recipe, table: ClipTable, device: torch.device, units: UnitFiles | None = None) -> ClipDataset:
    """The training clips, in the device's memory if the recipe asks for that and they fit."""
    if not recipe.train.cache_on_device:
        return ClipDataset(recipe, table.train, units)
    needed, free = cached_bytes(recipe, table.train, table.content_channels), memory.free_memory(device)
    if needed > free * CACHE_SHARE:
        logger.warning(
            f"train.cache_on_device: the dataset needs {needed / 1e9:.1f} GB, {device} has {free / 1e9:.1f} GB free of "
            f"which it may take {CACHE_SHARE:.0%}; it is read from the disk instead"
        )
        return ClipDataset(recipe, table.train, units)
    logger.info("the dataset lies in the memory of %s: %.2f GB", device, needed / 1e9)
    return CachedClips(recipe, table.train, device, units)


def collate(clips: list[ClipData], micro: MicroBatchSpec, spec: RateSpec, seeds: tuple[int, ...]) -> Batch:
    """Pad clips with zeros to the frames of the micro-batch, on the device that they are on."""
    size, width, padded, device = len(clips), clips[0].content.shape[1], micro.padded_frames, clips[0].f0.device
    wave = torch.zeros(size, 1, padded * spec.hop + 2 * spec.reach, device=device)
    content = torch.zeros(size, padded, width, device=device)
    f0 = torch.zeros(size, padded, device=device)
    energy = None if clips[0].energy is None else torch.zeros(size, padded, device=device)
    for i, clip in enumerate(clips):
        place(wave[i, 0, : len(clip.wave_with_reach)], clip.wave_with_reach)
        place(content[i, : len(clip.content)], clip.content)
        f0[i, : len(clip.f0)] = clip.f0
        if energy is not None and clip.energy is not None:
            energy[i, : len(clip.energy)] = clip.energy
    return Batch(
        wave_with_reach=wave,
        content=content,
        f0=f0,
        lengths=torch.tensor([len(c.content) for c in clips]),
        speaker=torch.tensor([c.speaker for c in clips]),
        clips=micro.clips,
        seeds=seeds,
        loss_scale=micro.loss_scale,
        mean_frames=micro.mean_frames,
        reach=spec.reach,
        energy=energy,
    )
