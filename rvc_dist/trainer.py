"""The train stage: adversarial training of the generator on one or many ranks, resumable at every checkpoint.

Shapes: B clips, T spectrogram frames, S samples.
"""

from __future__ import annotations

import json
import logging
import math
import signal
import time
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from torch import Tensor, nn
from torch.optim import Optimizer

from rvc_dist import checkpoint, losses
from rvc_dist.config import LossConfig, Recipe
from rvc_dist.data import Batch, BucketBatchSampler, ClipDataset, ClipTable, collate, make_loader
from rvc_dist.distributed import (
    StopSignal,
    frozen,
    make_accelerator,
    restore_rng_state,
    rng_state,
    seed_rank,
)
from rvc_dist.features.f0 import coarse_pitch
from rvc_dist.metrics import Meter, PhaseTimer, Tracker
from rvc_dist.models.discriminator import MultiPeriodDiscriminator
from rvc_dist.models.generator import Generator, GeneratorOutput, GeneratorShape
from rvc_dist.models.modules import slice_samples
from rvc_dist.optim import learning_rate, make_optimizer
from rvc_dist.spectral import log_mel, spectrogram
from rvc_dist.workspace import Share, StageError, Stopped, Workspace

logger = logging.getLogger(__name__)

MAX_EVAL_CLIPS = 32


def run(recipe: Recipe, share: Share) -> None:
    """Train to the end of the budget, from the newest checkpoint if there is one.

    Raises:
        StageError: the features are missing, or a checkpoint or pretrained file does not fit.
        Stopped: a signal asked for the end; a checkpoint was written.
    """
    del share  # the Accelerator knows the ranks
    trainer = Trainer(recipe)
    try:
        trainer.train()
    finally:
        trainer.close()


@dataclass
class Network:
    """A network in its three guises, and what optimizes it."""

    raw: nn.Module
    """The module itself: for D in the generator's step, validation and checkpoints."""
    ddp: nn.Module
    """Prepared by Accelerate: gradients of a backward pass through it are averaged over ranks."""
    optimizer: Optimizer


class Trainer:
    def __init__(self, recipe: Recipe) -> None:
        self.recipe, self.config, self.spec = recipe, recipe.train, recipe.rate_spec
        self.work = Workspace(recipe.run_dir, recipe.name)
        self.table = ClipTable.load(recipe)
        self.accelerator = make_accelerator(self.config)
        self.device = self.accelerator.device

        resume_from = checkpoint.latest(self.work.checkpoints_dir)
        # A resumed run needs of the pretrained files only the number of speakers.
        pretrained = {
            key: checkpoint.read_pretrained(Path(file), f"train.{key}")
            for key in (("pretrained_g", "pretrained_d") if resume_from is None else ("pretrained_g",))
            if (file := getattr(self.config, key)) is not None
        }
        num_speakers = self._num_speakers(pretrained.get("pretrained_g"))
        shape = GeneratorShape.from_recipe(recipe, self.table.content_channels, num_speakers)
        self.identity = self._identity(shape)
        torch.manual_seed(self.config.seed)
        generator = Generator(shape)
        discriminator = MultiPeriodDiscriminator(recipe.model.version, recipe.model.discriminator_channels)
        if resume_from is None:
            self._load_pretrained(pretrained, {"pretrained_g": generator, "pretrained_d": discriminator})
        del pretrained
        self.g, self.d = self._prepare(generator), self._prepare(discriminator)

        self.sampler = BucketBatchSampler(
            [c.num_frames for c in self.table.train],
            self.config.batch_size,
            self.accelerator.num_processes,
            self.accelerator.process_index,
            self.config.seed,
        )
        self.progress = checkpoint.Progress()
        seed_rank(self.config.seed, self.accelerator.process_index)
        if resume_from is not None:
            self._resume(checkpoint.load(resume_from, self.identity))
        if self.accelerator.is_main_process:  # not before the checkpoint has accepted it
            self.work.save_recipe(recipe.to_yaml())
        self.steps_per_epoch = self.sampler.steps_per_epoch
        self.step_in_epoch = self.progress.clips_in_epoch // self.sampler.global_batch_size
        self.total_steps = self._total_steps()
        self.dataset = ClipDataset(recipe, self.table.train)
        self.meter, self.timer = Meter(), PhaseTimer(self.device)
        self.tracker = Tracker(self.work.tensorboard_dir, self.progress.step + 1, self.accelerator.is_main_process)

    def _num_speakers(self, state: Mapping[str, Tensor] | None) -> int:
        """One row a speaker; with a pretrained generator's `state`, as many as it has."""
        if state is None:
            return self.table.num_speakers
        if "emb_g.weight" not in state:
            raise StageError(f"train.pretrained_g: {self.config.pretrained_g} holds no generator (no emb_g.weight)")
        rows = state["emb_g.weight"].shape[0]
        if rows < self.table.num_speakers:
            raise StageError(
                f"train.pretrained_g: {self.config.pretrained_g} has {rows} speakers, the dataset's highest speaker id "
                f"is {self.table.num_speakers - 1}"
            )
        return rows

    def _identity(self, shape: GeneratorShape) -> dict[str, Any]:
        """What a checkpoint must agree on to be continued; plain JSON data."""
        identity = {f"generator.{k}": v for k, v in asdict(shape).items()}
        identity["discriminator.version"] = self.recipe.model.version
        identity["discriminator.channels"] = self.recipe.model.discriminator_channels
        identity["optimizer"] = self.config.optimizer_name
        identity["embedder"] = self.table.embedder
        plain: dict[str, Any] = json.loads(json.dumps(identity))
        return plain

    def _load_pretrained(self, states: Mapping[str, Mapping[str, Tensor]], modules: Mapping[str, nn.Module]) -> None:
        for key, module in modules.items():
            if key in states:
                checkpoint.load_pretrained(Path(getattr(self.config, key)), states[key], module, f"train.{key}")
            else:
                logger.info("train.%s is not set: these weights start from random numbers", key)

    def _prepare(self, module: nn.Module) -> Network:
        module.to(self.device)
        optimizer = make_optimizer(self.config, module)
        if self.config.compile or (self.config.fast_train and self.device.type == "cuda"):
            # In place: the state dict keeps its keys, and D is compiled inside DDP and outside it alike.
            module.compile()
        return Network(module, self.accelerator.prepare_model(module), optimizer)

    def _resume(self, saved: checkpoint.Checkpoint) -> None:
        self.g.raw.load_state_dict(saved.models["generator"])
        self.d.raw.load_state_dict(saved.models["discriminator"])
        checkpoint.load_optimizer_state(self.g.optimizer, self.g.raw, saved.optimizers["optimizer_generator"])
        checkpoint.load_optimizer_state(self.d.optimizer, self.d.raw, saved.optimizers["optimizer_discriminator"])
        self.progress = saved.progress
        if len(saved.rng) == self.accelerator.num_processes:
            restore_rng_state(saved.rng[self.accelerator.process_index], self.device)
        else:
            seed_rank(self.config.seed + saved.progress.step, self.accelerator.process_index)
            logger.warning(
                "the checkpoint was made on %d ranks, this run has %d: it continues from the same weights, optimizer "
                "and place in the data, with new noise",
                len(saved.rng),
                self.accelerator.num_processes,
            )
        logger.info("continuing from step %d, epoch %d", self.progress.step, self.progress.epoch)

    def _total_steps(self) -> int:
        """Steps of the whole run; the log says what that is in epochs and clips."""
        left_in_epochs = (self.config.max_epochs - self.progress.epoch) * self.steps_per_epoch - self.step_in_epoch
        by_epochs = self.progress.step + left_in_epochs
        total = by_epochs if self.config.max_steps is None else min(by_epochs, self.config.max_steps)
        num_clips, global_batch = len(self.table.train), self.sampler.global_batch_size
        logger.info(
            "budget: %d steps, %.1f epochs of %d steps, %d clips seen of %d (%d held out); global batch %d",
            total,
            total / self.steps_per_epoch,
            self.steps_per_epoch,
            round(total / self.steps_per_epoch * num_clips),
            num_clips,
            len(self.table.holdout),
            global_batch,
        )
        if global_batch * 4 > num_clips:
            logger.warning(
                "the global batch of %d is more than a quarter of the %d clips: an epoch has only %d steps; "
                "fewer ranks or a smaller train.batch_size would learn more from the same data",
                global_batch,
                num_clips,
                self.steps_per_epoch,
            )
        return total

    def train(self) -> None:
        if self.progress.step >= self.total_steps:
            logger.info("already trained to step %d of %d", self.progress.step, self.total_steps)
            return
        batches = self._batches()
        with StopSignal(self.accelerator) as stop, self._progress_bar() as bar:
            began_at, seconds_seen = time.monotonic(), 0.0
            while self.progress.step < self.total_steps and not self.overtrained:
                with self.timer.phase("data"):
                    batch = next(batches)
                self.train_step(batch)
                seconds_seen += batch.mean_frames * self.accelerator.num_processes * self.spec.hop
                self._advance()
                if self._due(self.config.log_every_steps):
                    audio_s = seconds_seen / self.recipe.data.sample_rate
                    self.log(audio_s / (time.monotonic() - began_at), bar)
                    began_at, seconds_seen = time.monotonic(), 0.0
                is_best = self._due(self.config.eval_every_steps) and self.validate()
                signalled = stop.poll()
                if signalled or is_best or self._save_due() or self.overtrained:
                    self.save()
                if signalled and self.progress.step < self.total_steps:
                    raise Stopped(
                        f"stopped by {signal.Signals(signalled).name} at step {self.progress.step} of "
                        f"{self.total_steps}; a checkpoint was written and the same command continues"
                    )
        if self.overtrained:
            logger.warning(
                "overtraining: no improvement for %d epochs; the best checkpoint is step %d",
                self.config.overtrain_threshold,
                self.progress.best_step,
            )
        logger.info("trained to step %d; checkpoints in %s", self.progress.step, self.work.checkpoints_dir)

    def train_step(self, batch: Batch) -> None:
        """One update of D, then one of G."""
        self._set_learning_rate()
        logging_step = (self.progress.step + 1) % self.config.log_every_steps == 0
        self.timer.num_steps += 1
        with self.timer.phase("g_forward"):
            out = self._generate(batch)
            real = slice_samples(batch.wave, out.start, self.spec.segment // self.spec.hop, self.spec.hop)
        with self.timer.phase("d_step"):
            scores = self.d.ddp(torch.cat([real, out.wave.detach()])).scores
            real_scores, fake_scores = zip(*(s.chunk(2) for s in scores), strict=True)
            loss_d = losses.discriminator_loss(real_scores, fake_scores) * batch.share
            norm_d = self._optimize(self.d, loss_d, logging_step)
        # D outside DDP and frozen: its gradients would be computed, averaged over ranks, and thrown away.
        with self.timer.phase("g_step"), frozen(self.d.raw):
            terms = self._generator_terms(out, real, batch)
            loss_g = weighted_sum(terms, self.config.loss)
            norm_g = self._optimize(self.g, loss_g, logging_step)
        values = {f"loss/g_{k}": v for k, v in terms.items()} | {"loss/g_total": loss_g, "loss/d": loss_d}
        self.meter.update(values | norm_g | norm_d)

    def _generate(self, batch: Batch) -> GeneratorOutput:
        spec = spectrogram(batch.wave.squeeze(1), self.spec.n_fft, self.spec.hop)
        coarse, f0 = self._pitch(batch.f0)
        out: GeneratorOutput = self.g.ddp(batch.content, batch.lengths, coarse, f0, spec, batch.speaker)
        return out

    def _pitch(self, f0: Tensor) -> tuple[Tensor | None, Tensor | None]:
        return (coarse_pitch(f0), f0) if self.recipe.model.pitch_guidance else (None, None)

    def _generator_terms(self, out: GeneratorOutput, real: Tensor, batch: Batch) -> dict[str, Tensor]:
        """The generator's losses, unweighted, each scaled so that its mean over ranks is the global batch's."""
        with torch.no_grad():
            real_features = self.d.raw(real).features
        fake = self.d.raw(out.wave)
        means = {
            "mel": self._mel_loss(real, out.wave),
            "fm": losses.feature_matching_loss(real_features, fake.features),
            "adv": losses.generator_adversarial_loss(fake.scores),
        }
        kl = losses.kl_loss(out.z_p, out.logs_q, out.m_p, out.logs_p, out.mask, batch.mean_frames)
        # A rank without clips of its own in a short batch trains on a borrowed one that counts for nothing.
        return {k: v * batch.share for k, v in means.items()} | {"kl": kl if batch.share else kl * 0.0}

    def _mel_loss(self, real: Tensor, fake: Tensor) -> Tensor:
        rate, spec = self.recipe.data.sample_rate, self.spec
        if self.config.multiscale_mel_loss:
            return losses.multiscale_mel_loss(real, fake, rate)
        return losses.mel_loss(real, fake, rate=rate, n_fft=spec.n_fft, hop=spec.hop, num_mels=spec.num_mels)

    def _optimize(self, network: Network, loss: Tensor, logging_step: bool) -> dict[str, Tensor]:
        """One backward pass and one update; the gradient norm when it is wanted."""
        network.optimizer.zero_grad(set_to_none=True)
        self.accelerator.backward(loss)
        gradients = [p.grad for p in network.raw.parameters() if p.grad is not None]
        norm: dict[str, Tensor] = {}
        if logging_step or self.config.max_grad_norm is not None:
            total = nn.utils.get_total_norm(gradients)
            norm = {f"grad/norm_{'g' if network is self.g else 'd'}": total}
            if self.config.max_grad_norm is not None:
                nn.utils.clip_grads_with_norm_(network.raw.parameters(), self.config.max_grad_norm, total)
        network.optimizer.step()
        return norm

    def _set_learning_rate(self) -> None:
        rate = learning_rate(
            self.config, self.progress.step, self.progress.epoch, self.total_steps, self.accelerator.num_processes
        )
        for network in (self.g, self.d):
            for group in network.optimizer.param_groups:
                group["lr"] = rate

    def _batches(self) -> Iterator[Batch]:
        self.sampler.start_at(self.progress.epoch, self.step_in_epoch)
        cuda = self.device.type == "cuda"
        loader = make_loader(self.dataset, self.sampler, self.config.num_workers, cuda, self.config.fast_train)
        for batch in loader:
            yield batch.to(self.device)

    def _advance(self) -> None:
        self.progress.step += 1
        self.step_in_epoch += 1
        if self.step_in_epoch == self.steps_per_epoch:
            self.progress.epoch += 1
            self.step_in_epoch = 0
        self.progress.clips_in_epoch = self.step_in_epoch * self.sampler.global_batch_size

    @property
    def overtrained(self) -> bool:
        """Validation has not improved for as many epochs as the recipe allows."""
        waited = self.progress.epoch - self.progress.best_epoch
        return (
            self.config.overtrain_detect
            and self.progress.best_metric is not None
            and waited >= self.config.overtrain_threshold
        )

    def _due(self, every_steps: int) -> bool:
        return self.progress.step % every_steps == 0 or self.progress.step == self.total_steps

    def _save_due(self) -> bool:
        every_epochs = self.config.save_every_epochs
        if every_epochs is None:
            return self._due(self.config.save_every_steps)
        at_epoch_end = self.step_in_epoch == 0 and self.progress.epoch % every_epochs == 0
        return at_epoch_end or self.progress.step == self.total_steps

    def log(self, audio_s_per_s: float, bar: ProgressBar) -> None:
        """Read the meters (the host waits for the device here and nowhere else) and write them down.

        Raises:
            StageError: a loss is not a finite number; the checkpoints before it are untouched.
        """
        values = self.meter.read(self.accelerator)
        phases = self.timer.read()
        wrong = [k for k, v in values.items() if not math.isfinite(v)]
        if wrong:
            raise StageError(self._not_finite(", ".join(wrong)))
        values["train/lr"] = self.g.optimizer.param_groups[0]["lr"]
        values["train/epoch"] = self.progress.epoch + self.step_in_epoch / self.steps_per_epoch
        values["perf/audio_s_per_s"] = audio_s_per_s
        values |= {f"perf/{name}_s": seconds for name, seconds in phases.items()}
        self.tracker.scalars(values, self.progress.step)
        shown = ", ".join(f"{k[5:]} {values[k]:.3f}" for k in ("loss/g_mel", "loss/g_kl", "loss/g_total", "loss/d"))
        parts = ", ".join(f"{name} {seconds:.2f}" for name, seconds in phases.items())
        bar.update(self.progress.step, f"mel {values['loss/g_mel']:.3f} d {values['loss/d']:.2f}", audio_s_per_s)
        logger.info(
            "step %d/%d epoch %d: %s; %.2f s of audio a second; seconds a step: %s",
            self.progress.step,
            self.total_steps,
            self.progress.epoch,
            shown,
            audio_s_per_s,
            parts,
        )

    def _not_finite(self, what: str) -> str:
        return (
            f"step {self.progress.step}: {what} is not finite; lower train.learning_rate or set train.max_grad_norm. "
            f"The checkpoints in {self.work.checkpoints_dir} are from before"
        )

    @torch.no_grad()
    def validate(self) -> bool:
        """Mel distance on held-out clips, a picture and a sound; True when it is the smallest so far.

        The noise is drawn from a fixed seed and the training noise is left where it was, so that validations compare
        and a run is the same with and without them.
        """
        clips = self.table.holdout[:MAX_EVAL_CLIPS]
        mine = clips[self.accelerator.process_index :: self.accelerator.num_processes]
        sums = torch.zeros(2, device=self.device)
        devices = [self.device] if self.device.type == "cuda" else []
        with torch.random.fork_rng(devices):
            torch.manual_seed(self.config.seed)
            for i, clip in enumerate(mine or self.table.train[:1]):
                real, fake = self._resynthesise(clip)
                if mine:
                    distance = F.l1_loss(self._log_mel(fake), self._log_mel(real))
                    sums += torch.stack([distance, torch.ones_like(distance)])
                if i == 0:
                    self._show(real, fake)
        if not clips:
            return False
        total, count = self.accelerator.reduce(sums, reduction="sum").tolist()
        mean = total / count
        self.tracker.scalars({"eval/mel_distance": mean}, self.progress.step)
        is_best = self.progress.best_metric is None or mean < self.progress.best_metric
        if is_best:
            self.progress.best_metric = mean
            self.progress.best_step, self.progress.best_epoch = self.progress.step, self.progress.epoch
        logger.info(
            "validation at step %d: mel distance %.4f (best %.4f at step %d)",
            self.progress.step,
            mean,
            self.progress.best_metric,
            self.progress.best_step,
        )
        return is_best

    def _resynthesise(self, clip: Any) -> tuple[Tensor, Tensor]:
        """A clip [S] and what the voice makes of its content and pitch [S]."""
        read = self.dataset.read(clip)
        frames = len(read[1])
        batch = collate([read], frames, 1.0, frames, self.spec.hop).to(self.device)
        assert isinstance(self.g.raw, Generator)
        fake = self.g.raw.infer(batch.content, batch.lengths, *self._pitch(batch.f0), batch.speaker)
        return batch.wave[0, 0], fake[0, 0].float()

    def _log_mel(self, wave: Tensor) -> Tensor:
        spec = self.spec
        return log_mel(wave.unsqueeze(0), self.recipe.data.sample_rate, spec.n_fft, spec.hop, spec.num_mels)[0]

    def _show(self, real: Tensor, fake: Tensor) -> None:
        step, rate = self.progress.step, self.recipe.data.sample_rate
        self.tracker.mel_picture("mel/real_above_generated", [self._log_mel(real), self._log_mel(fake)], step)
        self.tracker.sound("audio/generated", fake, rate, step)
        self.tracker.sound("audio/real", real, rate, step)

    def save(self) -> None:
        """Write a checkpoint: the main rank alone touches the disk.

        Raises:
            StageError: the weights are not finite numbers (on every rank alike), or the disk refuses.
        """
        weights = [*self.g.raw.parameters(), *self.d.raw.parameters()]
        if not torch.stack([w.detach().isfinite().all() for w in weights]).all():
            raise StageError(self._not_finite("a weight"))
        states = self.accelerator.gather(rng_state(self.device).to(self.device).unsqueeze(0)).cpu()
        if self.accelerator.is_main_process:
            saved = checkpoint.Checkpoint(
                progress=self.progress,
                identity=self.identity,
                models={"generator": self.g.raw.state_dict(), "discriminator": self.d.raw.state_dict()},
                optimizers={
                    "optimizer_generator": checkpoint.optimizer_state(self.g.optimizer, self.g.raw),
                    "optimizer_discriminator": checkpoint.optimizer_state(self.d.optimizer, self.d.raw),
                },
                rng=list(states),
            )
            self.tracker.flush()
            path = checkpoint.save(self.work.checkpoints_dir, saved)
            checkpoint.prune(self.work.checkpoints_dir, self.config.keep_checkpoints, self.progress.best_step)
            logger.info("saved %s", path)

    def _progress_bar(self) -> ProgressBar:
        return ProgressBar(self.total_steps, self.progress.step, self.accelerator.is_main_process)

    def close(self) -> None:
        self.tracker.close()


class ProgressBar:
    """A live bar on the main rank's terminal; elsewhere the log lines are enough."""

    def __init__(self, total: int, done: int, enabled: bool) -> None:
        columns = (BarColumn(), MofNCompleteColumn(), TextColumn("{task.description}"))
        self._bar = Progress(*columns, TimeElapsedColumn(), TimeRemainingColumn(), transient=True)
        self._bar.disable = not (enabled and self._bar.console.is_terminal)
        self._task = self._bar.add_task("", total=total, completed=done)

    def __enter__(self) -> ProgressBar:
        self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.stop()

    def update(self, step: int, losses_text: str, audio_s_per_s: float) -> None:
        text = f"{losses_text}, {audio_s_per_s:.1f} s audio/s"
        self._bar.update(self._task, completed=step, description=text)


def weighted_sum(terms: Mapping[str, Tensor], weights: LossConfig) -> Tensor:
    """The generator's loss."""
    return weights.mel * terms["mel"] + weights.kl * terms["kl"] + weights.fm * terms["fm"] + weights.adv * terms["adv"]
