"""What a voice makes of held-out clips: mel distance, a picture and a sound.

S samples, M mel bands, T frames.
"""

from __future__ import annotations

import logging
import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from torch import Tensor

from rvc_dist.config import Recipe
from rvc_dist.models.generator import Generator
from rvc_dist.models.modules import kernel_search
from rvc_dist.models.pitch import coarse_pitch
from rvc_dist.models.spectral import log_mel
from rvc_dist.train.dataset import ClipDataset, ClipRef, ClipTable, MicroBatchSpec, collate, reference_clip
from rvc_dist.train.holdout import validated
from rvc_dist.train.metrics import Tracker
from rvc_dist.train.progress import Progress

logger = logging.getLogger(__name__)


@dataclass
class Validation:
    """Converts held-out clips with each one's own noise, so that distances compare, on any number of ranks."""

    recipe: Recipe
    table: ClipTable
    dataset: ClipDataset
    accelerator: Accelerator
    tracker: Tracker

    def judge(self, generator: Generator, progress: Progress) -> Progress:
        """`progress`, and what is best in it where the mel distance is the smallest so far."""
        step, distance = progress.step, self.mel_distance(generator, progress.step)
        if distance is None:
            return progress
        self.tracker.scalars({"eval/mel_distance": distance}, step)
        if not math.isfinite(distance):
            logger.warning(f"validation at step {step}: the mel distance is {distance}, which is never the best")
            return progress
        after = progress.validated(distance)
        logger.info(
            f"validation at step {step}: mel distance {distance:.4f} (best {after.best_metric:.4f} at step "
            f"{after.best_step})"
        )
        return after

    @torch.no_grad()
    def mel_distance(self, generator: Generator, step: int) -> float | None:
        """Mean over clips and ranks, None without held-out clips; the first, or the reference, goes to TensorBoard."""
        device = self.accelerator.device
        clips = validated(self.recipe, self.table)
        mine = list(enumerate(clips))[self.accelerator.process_index :: self.accelerator.num_processes]
        sums = torch.zeros(2, device=device)
        with torch.random.fork_rng([device] if device.type == "cuda" else []), kernel_search(False):
            for i, clip in mine or [(0, self.table.train[0])]:
                torch.manual_seed(self.recipe.train.seed + i)
                real, fake = self._resynthesise(generator, clip)
                if mine:
                    distance = F.l1_loss(self._log_mel(fake), self._log_mel(real))
                    sums += torch.stack([distance, torch.ones_like(distance)])
                if i == 0:
                    if (reference := reference_clip(self.recipe, self.table.trained_speakers[0])) is not None:
                        torch.manual_seed(self.recipe.train.seed)
                        real, fake = self._resynthesise(generator, reference)
                    self._show(real, fake, step)
        if not clips:
            return None
        total, count = self.accelerator.reduce(sums, reduction="sum").tolist()
        return float(total / count)

    def _resynthesise(self, generator: Generator, clip: ClipRef) -> tuple[Tensor, Tensor]:
        """A clip [S] and what the voice makes of its content and pitch [S]."""
        read = self.dataset.read(clip)
        frames = len(read.content)
        micro = MicroBatchSpec(clips=(0,), epoch=0, padded_frames=frames, loss_scale=1.0, mean_frames=frames)
        batch = collate([read], micro, self.recipe.rate_spec, seeds=(0,)).to(self.accelerator.device)
        guided = self.recipe.model.pitch_guidance
        coarse, f0 = (coarse_pitch(batch.f0), batch.f0) if guided else (None, None)
        fake = generator.infer(batch.content, batch.lengths, coarse, f0, batch.speaker, batch.energy)
        return batch.wave[0, 0], fake[0, 0].float()

    def _log_mel(self, wave: Tensor) -> Tensor:
        """[M, T] of a wave [S]."""
        spec = self.recipe.rate_spec
        return log_mel(wave.unsqueeze(0), self.recipe.data.sample_rate, spec.n_fft, spec.hop, spec.num_mels)[0]

    def _show(self, real: Tensor, fake: Tensor, step: int) -> None:
        rate = self.recipe.data.sample_rate
        self.tracker.mel_picture("mel/real_above_generated", [self._log_mel(real), self._log_mel(fake)], step)
        self.tracker.sound("audio/generated", fake, rate, step)
        self.tracker.sound("audio/real", real, rate, step)
