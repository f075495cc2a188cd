"""The GAN step: one update of the discriminator D, then one of the generator G.

It knows networks, batches and losses; ranks, checkpoints and the run folder are the trainer's. Any tool can build one
over networks of its own.

Shapes: B clips, T spectrogram frames, S samples.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor

from rvc_dist.config import Recipe
from rvc_dist.models.generator import Generator, GeneratorOutput, Noise
from rvc_dist.models.modules import kernel_search, slice_samples
from rvc_dist.models.pitch import coarse_pitch
from rvc_dist.models.spectral import spectrogram_with_reach
from rvc_dist.runtime.device import PRECISIONS
from rvc_dist.train import compilation, losses
from rvc_dist.train.dataset import Batch
from rvc_dist.train.ddp import TrainedModule, Update
from rvc_dist.train.metrics import PhaseTimer


class StepResult(NamedTuple):
    """What came of a step; all of it stays on the device."""

    values: dict[str, Tensor]
    """Losses and gradient norms [], by their names in the log."""
    good: Tensor
    """[] bool: both networks were updated; the same on all ranks."""
    bad: Tensor
    """[] bool: one was not, and not for its loss scale alone; the same on all ranks."""
    finite: Tensor
    """[micro-batches] bool: the losses of this rank's micro-batch were finite."""


class GanStep:
    def __init__(self, recipe: Recipe, networks: Mapping[str, TrainedModule], timer: PhaseTimer | None = None) -> None:
        """`networks` are a generator and a discriminator, by checkpoint.MODELS."""
        self.recipe, self.config, self.spec = recipe, recipe.train, recipe.rate_spec
        self.networks = dict(networks)
        self.g, self.d = self.networks["generator"], self.networks["discriminator"]
        assert isinstance(self.g.module, Generator)
        self.generator, self.shape = self.g.module, self.g.module.shape
        self.device = next(self.g.module.parameters()).device
        self.dtype = PRECISIONS[self.config.autocast_precision]
        self.timer = timer or PhaseTimer(self.device)
        self.batch_sizes: list[int] = []
        """Clips of each micro-batch of the last step."""

    def __call__(self, batches: Sequence[Batch], kl_warmup: float = 1.0, adversarial: bool = True) -> StepResult:
        """D's updates, mostly one, then one of G, from all micro-batches: what one batch as large as all would do.

        `kl_warmup` in 0..1 scales the weight of the KL term. If not `adversarial`, D is neither asked nor updated.
        """
        self.timer.num_steps += 1
        values: dict[str, Tensor] = {}
        finite = torch.ones(len(batches), dtype=torch.bool, device=self.device)
        for network in self.networks.values():
            network.optimizer.zero_grad(set_to_none=True)
        compilation.begin_step()
        of_d, made = self.update_discriminator(batches, values, finite) if adversarial else (None, None)

        # D outside DDP and frozen: its gradients would be computed, averaged over ranks, and thrown away.
        with self.d.frozen(self.dtype) if adversarial else nullcontext():
            for i, batch in reversed(list(enumerate(batches))):
                if made is None:
                    with self.timer.phase("g_forward"):
                        made = self.generate(batch, no_sync=i > 0)
                with self.timer.phase("g_step"), self.g.no_sync(i > 0):
                    terms = self.generator_backward(*made, batch, kl_warmup, adversarial)
                made = None
                add_to(values, terms)
                finite[i] &= terms["loss/g_total"].isfinite()
        with self.timer.phase("g_step"):
            of_g = self.g.update(self.config.max_grad_norm)
            add_to(values, {"grad/norm_g": of_g.norm})
        if of_d is None:
            return StepResult(values, of_g.good, of_g.bad, finite)
        return StepResult(values, of_d.good & of_g.good, of_d.bad | of_g.bad, finite)

    def update_discriminator(
        self, batches: Sequence[Batch], values: dict[str, Tensor], finite: Tensor
    ) -> tuple[Update, tuple[GeneratorOutput, Tensor]]:
        """D's updates; their loss and norm go into `values`, and micro-batches with a loss that is not into `finite`.

        Returns:
            What came of them, and what `generate` made of the last micro-batch, with a graph for G's step.
        """
        last = len(batches) - 1
        slices: list[tuple[Tensor, Tensor]] = []
        for i, batch in enumerate(batches):
            # G sees each micro-batch again after D's update; only the last pass of this loop is kept for that.
            with self.timer.phase("g_forward"), torch.set_grad_enabled(i == last):
                out, real = self.generate(batch, no_sync=last > 0)
            with self.timer.phase("d_step"), self.d.no_sync(i < last):
                loss_d = self.discriminator_backward(real, out.wave.detach(), batch)
            add_to(values, {"loss/d": loss_d})
            finite[i] &= loss_d.isfinite()
            if self.config.d_updates > 1:
                slices.append((real, out.wave.detach().clone()))  # CUDA graphs use the memory of their outputs again
        with self.timer.phase("d_step"):
            update = self.d.update(self.config.max_grad_norm)
            add_to(values, {"grad/norm_d": update.norm})
            for _ in range(self.config.d_updates - 1):
                update = self.update_discriminator_again(batches, slices, update)
        return update, (out, real)

    def generate(self, batch: Batch, no_sync: bool = False) -> tuple[GeneratorOutput, Tensor]:
        """G's output for a batch, and the real slice [B, 1, segment] that it imitates."""
        spec = spectrogram_with_reach(batch.wave_with_reach.squeeze(1), self.spec.n_fft, self.spec.hop)
        pitch = (coarse_pitch(batch.f0), batch.f0) if self.recipe.model.pitch_guidance else (None, None)
        noise = Noise.draw(self.shape, batch.seeds, batch.content.shape[1], self.device)
        network = self.g.wrapped if torch.is_grad_enabled() else self.g.compiled
        with self.g.no_sync(no_sync), self._autocast():
            out: GeneratorOutput = network(
                batch.content, batch.lengths, *pitch, spec, batch.speaker, noise, batch.energy
            )
        return out, slice_samples(batch.wave, out.start, self.shape.segment_frames, self.spec.hop)

    def update_discriminator_again(
        self, batches: Sequence[Batch], slices: Sequence[tuple[Tensor, Tensor]], before: Update
    ) -> Update:
        """One more update from the same real and fake slices; what came of it and of those `before`."""
        self.d.optimizer.zero_grad(set_to_none=True)
        for i, (batch, (real, fake)) in enumerate(zip(batches, slices, strict=True)):
            with self.d.no_sync(i < len(batches) - 1):
                self.discriminator_backward(real, fake, batch)
        now = self.d.update(self.config.max_grad_norm)
        return Update(before.norm, before.good & now.good, before.bad | now.bad)

    def discriminator_backward(self, real: Tensor, fake: Tensor, batch: Batch) -> Tensor:
        """Add D's gradients of one micro-batch; its loss."""
        with self._autocast():
            scores = self.d.wrapped(torch.cat([real, fake])).scores
        real_scores, fake_scores = zip(*(s.chunk(2) for s in scores), strict=True)
        weights = self.recipe.model.discriminator_spec.score_weights
        loss = losses.discriminator_loss(real_scores, fake_scores, weights) * batch.loss_scale
        self.d.backward(loss)
        return loss

    def generator_backward(
        self, out: GeneratorOutput, real: Tensor, batch: Batch, kl_warmup: float = 1.0, adversarial: bool = True
    ) -> dict[str, Tensor]:
        """Add G's gradients of one micro-batch; its losses."""
        terms = self.generator_terms(out, real, batch, adversarial)
        loss = losses.weighted_sum(terms, self.config.loss, kl_warmup)
        with kernel_search():  # the backward pass ends where cuDNN does not search
            self.g.backward(loss)
        return {f"loss/g_{k}": v for k, v in terms.items()} | {"loss/g_total": loss}

    def generator_terms(
        self, out: GeneratorOutput, real: Tensor, batch: Batch, adversarial: bool = True
    ) -> dict[str, Tensor]:
        """The generator's losses, unweighted, each scaled so that its mean over ranks is the global batch's."""
        judged: list[Sequence[Any]] = [(), (), ()]
        if adversarial:
            with self._autocast():
                with torch.no_grad():
                    real_features = self.d.compiled(real).features
                fake = self.d.compiled(out.wave)
            judged = [real_features, fake.features, fake.scores]
        seen = losses.LossInputs(self.recipe, batch, out, real, *judged)
        return {name: loss(seen) for name, loss in losses.wanted(self.config.loss, adversarial).items()}

    def _autocast(self) -> torch.autocast:
        return autocast(self.device, self.config.autocast_precision)

    def set_learning_rates(self, **rates: float) -> None:
        """By network."""
        for name, rate in rates.items():
            for group in self.networks[name].optimizer.param_groups:
                group["lr"] = rate

    def unwrapped(self, timer: PhaseTimer | None = None) -> GanStep:
        """The same networks and optimizers on this rank alone and eagerly: nothing is sent, nothing compiled."""
        networks = {n: TrainedModule.alone(net.module, net.optimizer, net.scale) for n, net in self.networks.items()}
        return GanStep(self.recipe, networks, timer)

    def local_dry_run(self, batch: Batch) -> None:
        """What a step computes, but for updates; with unwrapped networks on this rank alone."""
        try:
            compilation.begin_step()
            out, real = self.generate(batch)
            self.discriminator_backward(real, out.wave.detach(), batch)
            with self.d.frozen(self.dtype):
                self.generator_backward(out, real, batch)
        finally:
            for network in self.networks.values():
                network.module.zero_grad(set_to_none=True)


def autocast(device: torch.device, precision: str) -> torch.autocast:
    """Of the networks, in `precision` fp32, bf16 or fp16; parameters, losses and spectrograms stay float32."""
    return torch.autocast(device.type, PRECISIONS[precision], enabled=precision != "fp32")


def add_to(sums: dict[str, Tensor], values: Mapping[str, Tensor]) -> None:
    """Sum scalars by name, on the device."""
    for name, value in values.items():
        sums[name] = sums[name] + value.detach() if name in sums else value.detach()
