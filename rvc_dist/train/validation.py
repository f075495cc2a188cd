"""What a voice makes of held-out clips: distances for each speaker, and a picture.

S samples, M mel bands, T frames.
"""

from __future__ import annotations

import logging
import math
import time
from dataclasses import dataclass, replace
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import Tensor

from rvc_dist.config import Recipe
from rvc_dist.data.remote import RemoteRun
from rvc_dist.models.generator import Generator
from rvc_dist.models.modules import kernel_search
from rvc_dist.models.pitch import coarse_pitch
from rvc_dist.train.clips import ClipRef
from rvc_dist.train.dataset import ClipData, ClipDataset, ClipTable, collate
from rvc_dist.train.ema import Ema, weights_of
from rvc_dist.train.holdout import LISTED, validated
from rvc_dist.train.progress import Progress
from rvc_dist.train.quality import Ear, Heard, Quality, mean_quality
from rvc_dist.train.sampler import MicroBatchSpec
from rvc_dist.train.trackers import Tracker
from rvc_dist.train.unseen import UnseenQuality, UnseenSpeech, mean_unseen

logger = logging.getLogger(__name__)

MOST_SHARE = 0.05
"""Of a run's time that validations should take."""


@dataclass(frozen=True)
class Verdict:
    """What one validation found: the same on every rank, but for `seconds`."""

    mean: Quality
    """Over speakers, each of which counts alike; of the better weights, where there is an average of them."""
    speakers: dict[int, Quality]
    """Mean over the clips of each speaker."""
    num_clips: int
    seconds: float
    progress: Progress
    """With what is best in it."""
    is_best: bool
    why: str
    """It is the best so far, or not."""
    of_weights: dict[str, Quality]
    """Where there is an average of the weights: `mean` of the weights (raw), and of the average (ema)."""
    unseen: UnseenQuality | None = None
    """Of the weights that count, on speakers whom training never hears, where there are some."""

    def line(self) -> dict[str, Any]:
        """For RUN/metrics.jsonl."""
        return {
            "values": self.mean._asdict(),
            "speakers": {str(speaker): quality._asdict() for speaker, quality in self.speakers.items()},
            "clips": self.num_clips,
            "seconds": self.seconds,
            "is_best": self.is_best,
            "why": self.why,
            **({"unseen": self.unseen._asdict()} if self.unseen is not None else {}),
        } | {f"values_{name}": quality._asdict() for name, quality in self.of_weights.items()}


class Validation:
    """Converts held-out clips with each one's own noise, so that distances compare, on any number of ranks."""

    def __init__(
        self, recipe: Recipe, table: ClipTable, dataset: ClipDataset, accelerator: Accelerator, tracker: Tracker
    ) -> None:
        self.recipe, self.table, self.dataset = recipe, table, dataset
        self.accelerator, self.tracker = accelerator, tracker
        self.clips = validated(recipe, table)
        heard, held = (len({c.speaker for c in clips}) for clips in (self.clips, table.holdout))
        if heard < held:
            logger.info(f"validation hears {heard} of the {held} speakers with held-out clips, drawn by train.seed")
        self.ear = Ear(recipe, accelerator.device)
        self.unseen = UnseenSpeech(recipe, table, dataset, self.ear)
        self._read: dict[ClipRef, ClipData] = {}
        self._heard: dict[ClipRef, Heard] = {}
        """Of real clips, those that this rank compares."""
        self._first: tuple[Tensor, Tensor] | None = None
        """The first clip and what the voice made of it last; on the main rank."""
        self._ended_at: float | None = None
        self._has_warned = False

    def judge(self, generator: Generator, progress: Progress, ema: Ema | None = None) -> Verdict | None:
        """How good the voice is by now, None where no clip is held out; every rank has to ask.

        With `ema`, the weights of the moment and their average are both heard, and the better ones count.
        """
        began_at = time.monotonic()
        qualities, first = self.measure(generator), self._first
        if not qualities:
            return None
        (mean, speakers), of_weights, uses_ema = self._means(qualities), dict[str, Quality](), None
        if ema is not None:
            with ema.applied():
                averaged, by_speaker = self._means(self.measure(generator))
            of_weights, uses_ema = {"raw": mean, "ema": averaged}, averaged.mel_distance < mean.mel_distance
            if uses_ema:
                mean, speakers, first = averaged, by_speaker, self._first
        self._first = first
        joins_at = self.recipe.train.adversarial_from_step
        if progress.best_step <= joins_at < progress.step and progress.best_metric is not None:
            logger.info(f"the discriminator joined after step {joins_at}: the best begins anew")
            progress = replace(progress, best_metric=None, best_step=0, best_epoch=0)
        after, why = progress.judged(mean.mel_distance)
        is_best, after = after is not progress, replace(after, uses_ema=uses_ema)
        why += f", with {'the average of' if uses_ema else 'raw'} weights" if of_weights else ""
        with weights_of(ema, uses_ema):
            unseen = self.measure_unseen(generator)
        seconds = time.monotonic() - began_at
        verdict = Verdict(mean, speakers, len(self.clips), seconds, after, is_best, why, of_weights, unseen)
        self._report(verdict)
        self._warn_of_time(began_at)
        return verdict

    def _means(self, qualities: list[Quality]) -> tuple[Quality, dict[int, Quality]]:
        """Over speakers, and of each, of what `measure` found."""
        of_speaker: dict[int, list[Quality]] = {}
        for clip, quality in zip(self.clips, qualities, strict=True):
            of_speaker.setdefault(clip.speaker, []).append(quality)
        speakers = {speaker: mean_quality(of_speaker[speaker]) for speaker in sorted(of_speaker)}
        return mean_quality(list(speakers.values())), speakers

    @torch.no_grad()
    def measure(self, generator: Generator) -> list[Quality]:
        """Of every clip, in their order; one rank computes all of a clip's, so that they are the same on any number."""
        mine = []
        for i in range(self.accelerator.process_index, len(self.clips), self.accelerator.num_processes):
            clip = self.clips[i]
            real, fake = self.resynthesise(generator, clip, i)
            if i == 0:
                self._first = real, fake
            if clip not in self._heard:
                self._heard[clip] = self.ear.hear(real)
            mine.append((i, self.ear.compare(self._heard[clip], fake)))
        return [quality for _, quality in sorted(gather_object(mine))]

    @torch.no_grad()
    def measure_unseen(self, generator: Generator) -> UnseenQuality | None:
        """Of conversions of speech of speakers whom training never hears; None without any. Every rank has to ask."""
        mine, pairs = [], self.unseen.pairs
        for i in range(self.accelerator.process_index, len(pairs), self.accelerator.num_processes):
            clip, target = pairs[i]
            source, made = self.resynthesise(generator, replace(clip, speaker=target.speaker), i)
            own = self.dataset.read(target).wave_with_reach.to(source.device)
            mine.append((i, self.unseen.compare(source, own, made)))
        return mean_unseen([quality for _, quality in sorted(gather_object(mine))]) if pairs else None

    @torch.no_grad()
    def resynthesise(self, generator: Generator, clip: ClipRef, number: int = 0) -> tuple[Tensor, Tensor]:
        """A clip [S] and what the voice makes of its content and pitch [S], with the noise of this `number`.

        The state of random numbers is as before.
        """
        device, guided = self.accelerator.device, self.recipe.model.pitch_guidance
        read = self._read.get(clip) or self.dataset.read(clip)
        if isinstance(self.dataset.units, RemoteRun):  # else its unit would be fetched each time
            self._read[clip] = read
        frames = len(read.content)
        micro = MicroBatchSpec(clips=(0,), epoch=0, padded_frames=frames, loss_scale=1.0, mean_frames=frames)
        batch = collate([read], micro, self.recipe.rate_spec, seeds=(0,)).to(device)
        coarse, f0 = (coarse_pitch(batch.f0), batch.f0) if guided else (None, None)
        with torch.random.fork_rng([device] if device.type == "cuda" else []), kernel_search(False):
            torch.manual_seed(self.recipe.train.seed + number)
            fake = generator.infer(batch.content, batch.lengths, coarse, f0, batch.speaker, batch.energy)
        return batch.wave[0, 0], fake[0, 0].float()

    def show(self, generator: Generator, step: int) -> None:
        """The first clip as it was judged, or one of training where none is held out: a picture in TensorBoard."""
        real, fake = self._first or self.resynthesise(generator, self.table.train[0])
        rows = [("real", real), (f"what the voice makes of it at step {step}", fake)]
        self.tracker.spectrograms("held_out", rows, self.recipe.data.sample_rate, step)

    def _report(self, verdict: Verdict) -> None:
        """Curves and log lines."""
        step, several = verdict.progress.step, len(verdict.speakers) > 1
        curves = {f"validation/{name}": value for name, value in verdict.mean._asdict().items()}
        for speaker, quality in verdict.speakers.items() if several else ():
            curves |= {f"validation_speaker_{speaker}/{name}": value for name, value in quality._asdict().items()}
        for weights, quality in verdict.of_weights.items():
            curves |= {f"validation_{weights}/{name}": value for name, value in quality._asdict().items()}
            logger.info(f"validation at step {step}, {weights} weights: {quality.text()}")
        if (best := verdict.progress.best_metric) is not None:
            curves |= {"best/mel_distance": best, "best/step": verdict.progress.best_step}
        if verdict.unseen is not None:
            curves |= {f"validation_unseen/{name}": value for name, value in verdict.unseen._asdict().items()}
            logger.info(f"unseen speakers at step {step}, into trained voices: {verdict.unseen.text()}")
        self.tracker.scalars({name: value for name, value in curves.items() if not math.isnan(value)}, step)
        logger.info(f"validation at step {step}: {verdict.mean.text()}")
        if several:
            worst = sorted(verdict.speakers, key=lambda s: verdict.speakers[s].mel_distance, reverse=True)[:LISTED]
            listed = "; ".join(f"{s}: {verdict.speakers[s].mel_distance:.4f}" for s in worst)
            others = len(verdict.speakers) - len(worst)
            more = f"; {others} others are nearer" if others else ""
            logger.info(f"mel distance by speaker, farthest first: {listed}{more}")
        level = logging.INFO if math.isfinite(verdict.mean.mel_distance) else logging.WARNING
        judged = f"step {step} is the best" if verdict.is_best else f"step {step} is not the best"
        logger.log(level, f"{judged}: {verdict.why} ({verdict.num_clips} clips in {verdict.seconds:.1f} s)")

    def _warn_of_time(self, began_at: float) -> None:
        """Once, where a validation took more than its share of the time since the one before."""
        before, self._ended_at = self._ended_at, time.monotonic()
        if before is None or self._has_warned:
            return
        share = (self._ended_at - began_at) / (self._ended_at - before)
        if share > MOST_SHARE:
            self._has_warned = True
            logger.warning(f"validation takes {share:.0%} of the time: a longer train.eval_every_steps would take less")
