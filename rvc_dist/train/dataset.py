"""Batches: the clips that a run has, and the dataset over its safetensors files.

Shapes: B clips, T spectrogram frames, S = T * hop samples, C content channels.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields, replace
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from rvc_dist.config import F0_PER_S, MAX_CLIP_FRAMES, RateSpec, Recipe
from rvc_dist.data.number_formats import FULL_SCALE, clip_bytes_per_s, feature_bytes_per_s
from rvc_dist.data.remote import RemoteRun, data_of
from rvc_dist.train import memory
from rvc_dist.train.clips import MUTE, MUTE_SOURCE, ClipList, ClipRef
from rvc_dist.train.holdout import SpeakerShare, hold_out, settled_by, unseen_speakers, validated_all
from rvc_dist.train.sampler import MicroBatchSpec
from rvc_dist.workspace import MuteHeader, StageError, Workspace, read_header, unit_header

logger = logging.getLogger(__name__)

CACHE_SHARE = 0.5
"""Of the device's free memory, what a cached dataset may take: the rest is for the step."""


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

    train: Sequence[ClipRef]
    holdout: Sequence[ClipRef]
    content_channels: int
    embedder: dict[str, Any]
    num_speakers: int
    shares: tuple[SpeakerShare, ...] = ()
    """What of each speaker is held out."""
    unseen: tuple[ClipRef, ...] = ()
    """All clips of the speakers in data.holdout_speakers, who are in neither of the others."""
    validates_all: bool = False
    """Validation hears every speaker, however many: the run was begun by a version that had no bound."""

    @property
    def trained_speakers(self) -> tuple[int, ...]:
        """The speakers that the networks hear, in rising order: silent clips alone teach nobody's voice."""
        rows = ClipList.of(self.train).rows
        return tuple(np.unique(rows["speaker"][rows["unit"] != MUTE]).tolist())

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
        short, embedder = 0, {}

        def found() -> Iterator[ClipRef]:
            nonlocal short, embedder
            for unit, path, header in work.unit_headers():
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
                    else:
                        yield ClipRef.of(header, unit, i, clip["num_samples"], frames)

        clips = ClipList.of(found())
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
        listed, shares = ClipList.of(clips), list[SpeakerShare]()
        num_speakers, unseen = int(listed.rows["speaker"].max()) + 1, listed[:0]
        if recipe.data.holdout_speakers:
            ids = np.unique(listed.rows["speaker"]).tolist()
            left_out = unseen_speakers(recipe, ids, work.speakers(), work.heard_speakers())
            is_unseen = np.isin(listed.rows["speaker"], [*left_out])
            unseen, listed = listed.take(is_unseen), listed.take(~is_unseen)
        _, trained_on = work.trained_on()
        settled = settled_by(trained_on, recipe.data.holdout, recipe.train.seed)
        is_held, is_lost = np.zeros((2, len(listed)), bool)
        speakers, of_speaker = np.unique(listed.rows["speaker"], return_inverse=True)
        by_speaker = np.split(np.argsort(of_speaker, kind="stable"), np.cumsum(np.bincount(of_speaker))[:-1])
        for numbers in by_speaker:  # a speaker's clips alone are objects at any moment
            its_clips = list(listed.take(numbers))
            held, lost, its_shares = hold_out(its_clips, recipe.data.holdout, recipe.train.seed, settled)
            is_held[numbers], is_lost[numbers] = ([c in part for c in its_clips] for part in (held, lost))
            shares += its_shares
        trained = np.flatnonzero(~(is_held | is_lost))
        train = listed.take(np.repeat(trained, listed.rows["repeat"][trained]))
        silent = [c for s in speakers.tolist() for c in mutes(s)]
        table = cls(
            train=train + ClipList.of(silent) if silent else train,
            holdout=listed.take(is_held),
            content_channels=embedder["width"],
            embedder=embedder,
            num_speakers=num_speakers,
            shares=tuple(shares),
            unseen=tuple(unseen),
        )
        return replace(table, validates_all=validated_all(recipe, table, trained_on))


def _mutes(work: Workspace, recipe: Recipe, speaker: int) -> list[ClipRef]:
    if not recipe.extract.include_mutes or read_header(work.mute_file) is None:
        return []
    header = unit_header(work.mute_file, MuteHeader, "extract")
    sizes = header["num_samples"], header["num_content"], header["num_f0"]
    frames = covered_frames(recipe.data.sample_rate, recipe.rate_spec.hop, *sizes)
    return [ClipRef(MUTE, "00000", speaker, MUTE_SOURCE, frames)] * recipe.extract.include_mutes


class ClipDataset(Dataset[list[Batch]]):
    """Reads whole steps: one item is the micro-batches of one rank."""

    def __init__(self, recipe: Recipe, clips: Sequence[ClipRef], units: Workspace | None = None) -> None:
        self.units = units or Workspace(recipe.run_dir, recipe.name)
        self.clips = clips
        self.rate, self.spec, self.seed = recipe.data.sample_rate, recipe.rate_spec, recipe.train.seed
        self.has_energy = recipe.model.energy
        self.wave_kind: torch.dtype = getattr(torch, recipe.preprocess.clip_format)

    def __getitem__(self, micro_batches: tuple[MicroBatchSpec, ...]) -> list[Batch]:
        return [self.read_batch(micro) for micro in micro_batches]

    def read_batch(self, micro: MicroBatchSpec) -> Batch:
        clips = [self.read(self._clip(draw), self._first_frame(draw, micro.epoch)) for draw in micro.clips]
        seeds = tuple(self._noise_seed(draw, micro.epoch) for draw in micro.clips)
        return collate(clips, replace(micro, clips=tuple(d % len(self.clips) for d in micro.clips)), self.spec, seeds)

    def _clip(self, draw: int) -> ClipRef:
        return self.clips[draw % len(self.clips)]

    def _first_frame(self, draw: int, epoch: int) -> int:
        """Long clips show another part of at most 900 frames each time; the choice needs no state."""
        spare = self._clip(draw).num_frames - MAX_CLIP_FRAMES
        if spare <= 0:
            return 0
        return int(np.random.Generator(np.random.PCG64([self.seed, epoch, draw])).integers(spare + 1))

    def _noise_seed(self, draw: int, epoch: int) -> int:
        """The noise of a draw is the same on any rank of any number: nothing of it needs saving."""
        return int(np.random.SeedSequence([self.seed, epoch, draw, 1]).generate_state(1, np.uint64)[0])

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
            features = _open(self.units.mute_file)
            wave: Any = torch.zeros(clip.num_frames * self.spec.hop, dtype=self.wave_kind)
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
        self, recipe: Recipe, clips: Sequence[ClipRef], device: torch.device, units: Workspace | None = None
    ) -> None:
        super().__init__(recipe, clips, units)
        self._cache = {clip: self._load(clip, device) for clip in dict.fromkeys(clips)}

    def _load(self, clip: ClipRef, device: torch.device) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        wave, content, f0, energy = super()._tensors(clip)
        wave = wave[: clip.num_frames * self.spec.hop + self.spec.reach].to(device)
        return wave, content.to(device), f0.to(device), None if energy is None else energy.to(device)

    def _tensors(self, clip: ClipRef) -> tuple[Any, Tensor, Tensor, Tensor | None]:
        return self._cache[clip] if clip in self._cache else super()._tensors(clip)


def bytes_per_s(recipe: Recipe, content_channels: int) -> float:
    """Of clips with their features, as they are stored."""
    return clip_bytes_per_s(recipe) + feature_bytes_per_s(recipe, content_channels)


def cached_bytes(recipe: Recipe, clips: Sequence[ClipRef], content_channels: int) -> int:
    """Device memory that `CachedClips` takes: as much as the clips and features on the disk."""
    different = dict.fromkeys(clips)
    seconds = sum(c.num_frames for c in different) * recipe.rate_spec.hop / recipe.data.sample_rate
    reach_s = len(different) * recipe.rate_spec.reach / recipe.data.sample_rate
    return round(seconds * bytes_per_s(recipe, content_channels) + reach_s * clip_bytes_per_s(recipe))


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


def make_dataset(recipe: Recipe, table: ClipTable, device: torch.device, units: Workspace | None = None) -> ClipDataset:
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
