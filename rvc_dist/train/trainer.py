"""The train stage: adversarial training of the generator on one or many ranks, resumable at every checkpoint.

Shapes: B clips, T spectrogram frames, S samples.
"""

from __future__ import annotations

import logging
import math
import signal
import time
import traceback
from collections import abc
from collections.abc import Iterator, Mapping
from contextlib import closing, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, TypedDict

import torch
from accelerate.utils import broadcast_object_list
from torch import Tensor, nn

from rvc_dist.config import LossConfig, Recipe
from rvc_dist.data import preprocess
from rvc_dist.features import extract
from rvc_dist.models.generator import Generator, GeneratorOutput, Noise
from rvc_dist.models.modules import slice_samples
from rvc_dist.models.pitch import coarse_pitch
from rvc_dist.models.spectral import spectrogram_with_reach
from rvc_dist.runtime.accelerator import StopSignal, check_same_settings, make_accelerator, on_first_rank
from rvc_dist.runtime.launcher import zero_stage
from rvc_dist.runtime.watchdog import Watch
from rvc_dist.train import checkpoint, compilation, deepspeed, fingerprint, holdout, losses, memory, networks
from rvc_dist.train.dataset import (
    SHM,
    Batch,
    BucketBatchSampler,
    CachedClips,
    ClipTable,
    end_loader,
    fit_shared_memory,
    loader_settings,
    make_dataset,
    make_loader,
)
from rvc_dist.train.ddp import Network, Wire, frozen
from rvc_dist.train.metrics import Meter, PhaseTimer, ProgressBar, Tracker
from rvc_dist.train.optimizers import learning_rate, make_optimizer
from rvc_dist.train.validation import Validation
from rvc_dist.workspace import Share, StageError, Stopped, Workspace, read_json, write_json

logger = logging.getLogger(__name__)

WRITE_S = 30.0
"""How long a rank that ends for a fault waits for a checkpoint that is being written."""


def run(recipe: Recipe, share: Share) -> None:
    """Train to the end of the budget, from the newest checkpoint if there is one.

    Raises:
        StageError: the features are missing, a checkpoint or pretrained file does not fit, or another job trains in
            the same run folder.
        Stopped: a signal asked for the end; a checkpoint was written.
    """
    del share  # the Accelerator knows the ranks
    with Watch(Workspace(recipe.run_dir, recipe.name)) as watch, watch.explain_timeouts(recipe.train.timeout_s):
        trainer = Trainer(recipe, watch)
        try:
            trainer.train()
        finally:
            trainer.close()


class Networks(TypedDict):
    generator: bool
    discriminator: bool


class Compiled(TypedDict):
    """RUN/compile.json."""

    key: dict[str, Any]
    compiled: Networks


class Trainer:
    """With a `watch`, it holds the run folder's lock and is watched from the moment that it knows its ranks."""

    def __init__(self, recipe: Recipe, watch: Watch | None = None) -> None:
        self.recipe, self.config, self.spec = recipe, recipe.train, recipe.rate_spec
        self.work = Workspace(recipe.run_dir, recipe.name)
        self.table = ClipTable.load(recipe)
        self.work.check_name()
        if wrong := preprocess.other_settings(recipe) or extract.other_settings(recipe):
            raise StageError(wrong)
        self.accelerator = make_accelerator(self.config)
        self.device = self.accelerator.device
        if watch is None:
            watch = Watch(self.work)  # one that never starts
        else:
            watch.start(self.accelerator)
        self.pulse, self.lock = watch.pulse, watch.lock
        if self.accelerator.is_main_process:
            for level, line in holdout.report(self.table.shares, recipe.data.holdout):
                logger.log(level, line)
            if self.config.overtrain_detect and not self.table.holdout:
                logger.warning("train.overtrain_detect does nothing: no clip is held out to see overtraining on")

        (resume_from,) = broadcast_object_list([checkpoint.latest(self.work.checkpoints_dir)])
        saved = None
        if resume_from is not None:
            on_first_rank(self.accelerator, partial(checkpoint.verify, resume_from))
            saved = checkpoint.load(resume_from)
        self.shape, modules = networks.build(recipe, self.table, None if saved is None else saved.identity)
        self.identity = networks.identity(recipe, self.shape, self.table)
        self.data = fingerprint.of_data(recipe, self.table)
        self.sampler = BucketBatchSampler(
            [c.num_frames for c in self.table.train],
            self.config.batch_size,
            self.accelerator.num_processes,
            self.accelerator.process_index,
            self.config.seed,
            self.config.grad_accum_steps,
        )
        self.progress = checkpoint.Progress()
        self.trained_speakers = self.table.trained_speakers
        self.meter, self.timer = Meter(), PhaseTimer(self.device, self.pulse)
        self.recent: list[Step] = []
        self.died: list[int] = []
        """Exit codes of loader processes that ended before their loader."""
        if saved is not None:
            on_first_rank(
                self.accelerator, partial(checkpoint.check_identity, resume_from, saved.identity, self.identity)
            )
            on_first_rank(self.accelerator, partial(fingerprint.check, resume_from, saved.data, self.data))
            self.progress = fingerprint.adjusted(saved.progress, saved.data, self.data)
            self.trained_speakers = tuple(sorted({*self.trained_speakers, *saved.trained_speakers}))
        self.left_in_epoch = len(self.sampler.global_batches(self.progress.epoch, self.progress.seen))
        self.total_steps = self._total_steps()
        self.dataset = make_dataset(recipe, self.table, self.device)
        settings = loader_settings(self.config, self.device, isinstance(self.dataset, CachedClips))
        self.loader_settings = fit_shared_memory(recipe, self.table, settings)

        modules = {name: module.to(self.device) for name, module in modules.items()}
        self.compiled = self._choose_compiled(modules)
        self.wire = Wire(self.config.grad_compression == "bf16", self.pulse.sent)
        self.g, self.d = (self._prepare(name, module) for name, module in modules.items())
        if saved is not None:
            self._resume(saved)
        self.writer = checkpoint.Writer(
            self.work.checkpoints_dir,
            self.config.keep_checkpoints,
            self.lock.check,
            self.config.timeout_s / 2,  # it gives up before the ranks that wait for this one
        )
        on_first_rank(self.accelerator, self._prepare_run_folder)  # not before the checkpoint has accepted the recipe
        compiled = {f"compiled {name}": yes for name, yes in self.compiled.items()}
        check_same_settings(self.accelerator, compiled | {"ZeRO stage": zero_stage(self.accelerator)})
        self.tracker = Tracker(self.work.tensorboard_dir, self.progress.step + 1, self.accelerator.is_main_process)
        self.validation = Validation(recipe, self.table, self.dataset, self.accelerator, self.tracker)

    def _prepare_run_folder(self) -> None:
        weights = sum(p.nbytes for n in self.networks.values() for p in n.raw.parameters())
        checkpoint.prepare_folder(self.work.checkpoints_dir, 3 * weights)  # and two moments of each
        self.work.requeue_file.unlink(missing_ok=True)
        self.work.save_recipe(self.recipe)

    def _choose_compiled(self, modules: Mapping[str, nn.Module]) -> dict[str, bool]:
        """Which networks to compile: as the run did before, else by a trial with the next batch."""
        if not compilation.asked_for(self.config):
            return dict.fromkeys(modules, False)
        key = compilation.key(self.config, self.device, self.total_steps)
        kept = read_json(self.work.compile_file, Compiled) if self.work.compile_file.is_file() else None
        (kept,) = broadcast_object_list([kept])
        if kept is not None and kept["key"] == key:
            chosen: dict[str, bool] = dict(kept["compiled"])
            return chosen
        compiled = {name: compilation.compiled(module, self.device) for name, module in modules.items()}
        self.sampler.start_at(self.progress.epoch, self.progress.seen)
        batch = self.dataset[next(iter(self.sampler))][0].to(self.device)

        def step(which: Mapping[str, bool]) -> None:
            self._compute_alone({name: compiled[name] if which[name] else m for name, m in modules.items()}, batch)

        self.g, self.d = (Network(m, m, m, make_optimizer(self.config, m)) for m in modules.values())
        steps_left = self.total_steps - self.progress.step
        with self._memory_advice(batch):
            chosen = compilation.choose(self.config, self.accelerator, checkpoint.MODELS, step, steps_left)
        if self.accelerator.is_main_process:
            write_json(self.work.compile_file, {"key": key, "compiled": chosen})
        return chosen

    def _compute_alone(self, calls: Mapping[str, nn.Module], batch: Batch) -> None:
        """What a step computes, on this rank alone and without updates; the networks are computed as `calls`."""
        networks = self.networks
        self.g, self.d = (Network(n.raw, calls[name], calls[name], n.optimizer) for name, n in networks.items())
        try:
            out, real = self._generate(batch, local=False)
            self._learn_to_tell_apart(real, out.wave.detach(), batch)
            with frozen(self.d.raw):
                self._learn_to_deceive(out, real, batch)
        finally:
            self.g, self.d = networks.values()
            for network in networks.values():
                network.raw.zero_grad(set_to_none=True)

    @contextmanager
    def _memory_advice(self, batch: Batch) -> Iterator[None]:
        """Turns running out of device memory into a sentence that says which batch size would fit.

        Raises:
            StageError: in the place of torch.OutOfMemoryError.
        """
        try:
            yield
        except torch.OutOfMemoryError as error:
            traceback.clear_frames(error.__traceback__)  # they hold the activations that did not fit
            size = self.config.batch_size
            fits = self._batch_that_fits(batch)
            remedy = f"train.batch_size {fits} would fit" if fits else "not even one clip fits"
            keep = f" (with train.grad_accum_steps {-(-size // fits)} the steps stay as large)" if fits else ""
            raise StageError(
                f"rank {self.accelerator.process_index}: {self.device} has not enough memory for train.batch_size "
                f"{size} with clips of {batch.content.shape[1]} frames; {remedy}{keep}. "
                "train.activation_checkpointing and train.precision bf16 need less"
            ) from error

    def _batch_that_fits(self, batch: Batch) -> int:
        """The largest batch size of clips as long as these, from the peak memory of one clip and of two."""
        raw = {name: network.raw for name, network in self.networks.items()}
        for network in self.networks.values():
            network.optimizer.zero_grad(set_to_none=True)
            network.detach()
        one, two = (
            memory.peak_of(partial(self._compute_alone, raw, batch.first(count)), self.device) for count in (1, 2)
        )
        if one is None or len(batch.clips) == 1:
            return 0
        weights = sum(p.nbytes for module in raw.values() for p in module.parameters())
        has_state = any(network.optimizer.state for network in self.networks.values())
        # Two moments a weight are still to come; the gradients of both networks were never there together.
        more = 0 if has_state else 2 * weights
        return memory.largest_batch(one, two, more, memory.capacity(self.device)) if two is not None else 1

    def _prepare(self, name: str, module: nn.Module) -> Network:
        call = compilation.compiled(module, self.device) if self.compiled[name] else module
        optimizer = make_optimizer(self.config, module)
        if zero_stage(self.accelerator):
            return deepspeed.ZeroNetwork.prepare(self.accelerator, module, call, optimizer, self.wire, self._autocast())
        network = Network(module, call, self.accelerator.prepare_model(call), optimizer)
        self.wire.attach(network.ddp)
        return network

    @property
    def networks(self) -> dict[str, Network]:
        return dict(zip(checkpoint.MODELS, (self.g, self.d), strict=True))

    def _load_weights(self, saved: checkpoint.Checkpoint) -> None:
        for name, network in self.networks.items():
            try:
                network.load(saved.models[name], saved.optimizers[name])
            except ValueError as error:
                raise StageError(
                    f"{self.work.checkpoints_dir}: step {saved.progress.step} does not fit the {name}'s optimizer; "
                    f"change train.optim back, or give the run another run_dir: {error}"
                ) from error

    def _resume(self, saved: checkpoint.Checkpoint) -> None:
        self._load_weights(saved)
        rank, num_ranks = self.accelerator.process_index, self.accelerator.num_processes
        self.meter.load(saved.meter, rank, num_ranks, self.device)
        logger.info("continuing from step %d, epoch %d", self.progress.step, self.progress.epoch)
        if saved.num_ranks != num_ranks:
            logger.warning(
                "the checkpoint was made on %d ranks, this run has %d: it continues from the same weights, optimizers "
                "and place in the data, with steps of %d clips",
                saved.num_ranks,
                num_ranks,
                self.sampler.global_batch_size,
            )

    def _total_steps(self) -> int:
        """Steps of the whole run; the log says what that is in epochs and clips."""
        sampler, num_clips = self.sampler, len(self.table.train)
        epochs_after = self.config.max_epochs - self.progress.epoch - 1
        by_epochs = self.progress.step + (self.left_in_epoch + epochs_after * sampler.steps_per_epoch)
        total = by_epochs if self.config.max_steps is None else min(by_epochs, self.config.max_steps)
        logger.info(
            "budget: %d steps, %.1f epochs of %d steps, %d clips seen of %d (%d held out); global batch %d",
            total,
            total / sampler.steps_per_epoch,
            sampler.steps_per_epoch,
            round(total / sampler.steps_per_epoch * num_clips),
            num_clips,
            len(self.table.holdout),
            sampler.global_batch_size,
        )
        logger.info(
            "every clip is seen once an epoch; ranks without one in the last batch of an epoch borrow %d (%.1f%%), "
            "which count for nothing",
            sampler.num_borrowed,
            100 * sampler.num_borrowed / num_clips,
        )
        if sampler.exceeds_dataset:
            logger.warning(
                "the global batch of %d is more than a quarter of the %d clips: an epoch has only %d steps; "
                "fewer ranks or a smaller train.batch_size would learn more from the same data",
                sampler.global_batch_size,
                num_clips,
                sampler.steps_per_epoch,
            )
        return total

    def train(self) -> None:
        if self.progress.step >= self.total_steps:
            logger.info("already trained to step %d of %d", self.progress.step, self.total_steps)
            return
        with (
            StopSignal(self.accelerator, self.config.timeout_s) as stop,
            self._progress_bar() as bar,
            self._loading() as steps,
        ):
            began_at, frames_seen = time.monotonic(), 0.0
            while self.progress.step < self.total_steps and not self.overtrained:
                is_logged = self._due(self.config.log_every_steps, self.progress.step + 1)
                self.pulse.begin_step(self.progress.step + 1, "logged" if is_logged else "other")
                with self.timer.phase("data"), stop.limit(*self._next_clips()):
                    batches = next(steps)
                full = all(len(batch.clips) == self.config.batch_size for batch in batches)
                with self._memory_advice(batches[0]), compilation.eager_unless(full):
                    self.train_step(batches)
                frames_seen += batches[0].mean_frames * self.accelerator.num_processes
                self._advance()
                if is_logged:
                    audio_s = frames_seen * self.spec.hop / self.recipe.data.sample_rate
                    with self.pulse.within("log"):
                        self.log(audio_s / (time.monotonic() - began_at), bar)
                    began_at, frames_seen = time.monotonic(), 0.0
                is_best = self._due(self.config.eval_every_steps) and self.validate()
                with self.pulse.within("stop_poll"):
                    asked = stop.poll(failed=self.writer.error is not None or self.lock.is_lost)
                if asked == StopSignal.FAILED:
                    break
                if asked or is_best or self._save_due() or self.overtrained:
                    with self.pulse.within("checkpoint"):
                        self.save()
                if asked and self.progress.step < self.total_steps:
                    self._finish_writing()
                    name = signal.Signals(asked).name
                    if self.accelerator.is_main_process:  # for batch scripts: a launcher hides its ranks' exit codes
                        write_json(self.work.requeue_file, {"step": self.progress.step, "signal": name})
                    raise Stopped(
                        f"stopped by {name} at step {self.progress.step} of "
                        f"{self.total_steps}; a checkpoint was written and the same command continues"
                    )
        self._finish_writing()
        if self.overtrained:
            logger.warning(
                "overtraining: no improvement for %d epochs; the best checkpoint is step %d",
                self.config.overtrain_threshold,
                self.progress.best_step,
            )
        logger.info("trained to step %d; checkpoints in %s", self.progress.step, self.work.checkpoints_dir)

    def train_step(self, batches: list[Batch]) -> None:
        """One update of D, then one of G, from all micro-batches: what one batch as large as all of them would do."""
        self._set_learning_rate()
        self.timer.num_steps += 1
        last = len(batches) - 1
        values: dict[str, Tensor] = {}
        finite = torch.ones(len(batches), dtype=torch.bool, device=self.device)
        self.d.optimizer.zero_grad(set_to_none=True)
        for i, batch in enumerate(batches):
            # G sees each micro-batch again after D's update; only the last pass of this loop is kept for that.
            with self.timer.phase("g_forward"), torch.set_grad_enabled(i == last):
                out, real = self._generate(batch, local=last > 0)
            with self.timer.phase("d_step"), self.d.local(i < last):
                loss_d = self._learn_to_tell_apart(real, out.wave.detach(), batch)
            add_to(values, {"loss/d": loss_d})
            finite[i] &= loss_d.isfinite()
        with self.timer.phase("d_step"):
            good = self._update(self.d, values)
        self.g.optimizer.zero_grad(set_to_none=True)
        # D outside DDP and frozen: its gradients would be computed, averaged over ranks, and thrown away.
        with frozen(self.d.raw):
            for i, batch in reversed(list(enumerate(batches))):
                if i < last:
                    with self.timer.phase("g_forward"):
                        out, real = self._generate(batch, local=i > 0)
                with self.timer.phase("g_step"), self.g.local(i > 0):
                    terms = self._learn_to_deceive(out, real, batch)
                add_to(values, terms)
                finite[i] &= terms["loss/g_total"].isfinite()
        with self.timer.phase("g_step"):
            good = good & self._update(self.g, values)
        self.meter.update(values, good)
        self.recent.append(Step(self.progress.step + 1, [b.clips for b in batches], good, finite))

    def _generate(self, batch: Batch, local: bool) -> tuple[GeneratorOutput, Tensor]:
        """G's output for a batch, and the real slice [B, 1, segment] that it imitates."""
        spec = spectrogram_with_reach(batch.wave_with_reach.squeeze(1), self.spec.n_fft, self.spec.hop)
        coarse, f0 = self._pitch(batch.f0)
        compilation.begin_pass()
        noise = Noise.draw(self.shape, batch.seeds, batch.content.shape[1], self.device)
        network = self.g.ddp if torch.is_grad_enabled() else self.g.call
        with self.g.local(local), self._autocast():
            out: GeneratorOutput = network(batch.content, batch.lengths, coarse, f0, spec, batch.speaker, noise)
        return out, slice_samples(batch.wave, out.start, self.shape.segment_frames, self.spec.hop)

    def _learn_to_tell_apart(self, real: Tensor, fake: Tensor, batch: Batch) -> Tensor:
        """Add D's gradients of one micro-batch; its loss."""
        with self._autocast():
            scores = self.d.ddp(torch.cat([real, fake])).scores
        real_scores, fake_scores = zip(*(s.chunk(2) for s in scores), strict=True)
        loss = losses.discriminator_loss(real_scores, fake_scores) * batch.share
        self.d.backward(loss)
        return loss

    def _learn_to_deceive(self, out: GeneratorOutput, real: Tensor, batch: Batch) -> dict[str, Tensor]:
        """Add G's gradients of one micro-batch; its losses."""
        terms = self._generator_terms(out, real, batch)
        loss = weighted_sum(terms, self.config.loss, self._kl_warmup())
        self.g.backward(loss)
        return {f"loss/g_{k}": v for k, v in terms.items()} | {"loss/g_total": loss}

    def _kl_warmup(self) -> float:
        return min(1.0, (self.progress.step + 1) / max(1, self.config.kl_warmup_steps))

    def _autocast(self) -> torch.autocast:
        """Parameters, losses and spectrograms stay float32."""
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.config.use_bf16)

    def _pitch(self, f0: Tensor) -> tuple[Tensor | None, Tensor | None]:
        return (coarse_pitch(f0), f0) if self.recipe.model.pitch_guidance else (None, None)

    def _generator_terms(self, out: GeneratorOutput, real: Tensor, batch: Batch) -> dict[str, Tensor]:
        """The generator's losses, unweighted, each scaled so that its mean over ranks is the global batch's."""
        with self._autocast():
            with torch.no_grad():
                real_features = self.d.call(real).features
            fake = self.d.call(out.wave)
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

    def _update(self, network: Network, values: dict[str, Tensor]) -> Tensor:
        """One update from the gradients, unless they are not finite: true [] if they are, the same on all ranks."""
        norm, good = network.update(self.config.max_grad_norm)
        add_to(values, {f"grad/norm_{'g' if network is self.g else 'd'}": norm})
        return good

    def _set_learning_rate(self) -> None:
        rate = learning_rate(
            self.config, self.progress.step, self.progress.epoch, self.total_steps, self.accelerator.num_processes
        )
        for network in (self.g, self.d):
            for group in network.optimizer.param_groups:
                group["lr"] = rate

    def _steps(self) -> abc.Generator[list[Batch], None, None]:
        """The micro-batches of each step from here on; when it is closed, its loader processes end."""
        self.sampler.start_at(self.progress.epoch, self.progress.seen)
        loaded = iter(make_loader(self.dataset, self.sampler, self.loader_settings))
        try:
            with self.pulse.noted():
                for batches in loaded:
                    yield [batch.to(self.device) for batch in batches]
        finally:
            self.died = end_loader(loaded)

    def _next_clips(self) -> tuple[str, str]:
        """What a step waits for first, in words, and what to do where it does not come."""
        workers = self.loader_settings["num_workers"]
        readers = f"its {workers} loader process(es) read" if workers else "it reads"
        return (
            f"the clips of step {self.progress.step + 1}, which {readers} from {self.work.root}",
            "see whether that disk answers; where it is only slow, raise train.num_workers or train.timeout_s",
        )

    @contextmanager
    def _loading(self) -> Iterator[Iterator[list[Batch]]]:
        """The steps from here on.

        Raises:
            StageError: a loader process died, in the place of what PyTorch raises wherever it hears of it.
        """
        with closing(self._steps()) as steps:
            try:
                yield steps
            except RuntimeError as error:
                steps.close()
                if isinstance(error, StageError | Stopped) or not self.died:
                    raise
                raise StageError(
                    f"rank {self.accelerator.process_index}: a loader process died in step {self.progress.step + 1} "
                    f"({signal.strsignal(-self.died[0]) if self.died[0] < 0 else self.died[0]}): the host's memory or "
                    f"{SHM} may be full. Ask for more, or less with train.num_workers or train.batch_size; the same "
                    "command continues from the last checkpoint"
                ) from error

    def _advance(self) -> None:
        size, seen = self.sampler.global_batch_size, list(self.progress.seen)
        if seen and seen[-1][0] == size:
            seen[-1] = (size, seen[-1][1] + 1)
        else:
            seen.append((size, 1))
        self.left_in_epoch -= 1
        self.progress = replace(self.progress, step=self.progress.step + 1, seen=tuple(seen))
        if self.left_in_epoch == 0:
            self.progress = replace(self.progress, epoch=self.progress.epoch + 1, seen=())
            self.left_in_epoch = self.sampler.steps_per_epoch

    @property
    def epochs_done(self) -> float:
        clips_seen = sum(size * num_steps for size, num_steps in self.progress.seen)
        return self.progress.epoch + clips_seen / len(self.table.train)

    @property
    def overtrained(self) -> bool:
        """Validation has not improved for as many epochs as the recipe allows."""
        waited = self.progress.epoch - self.progress.best_epoch
        return (
            self.config.overtrain_detect
            and self.progress.best_metric is not None
            and waited >= self.config.overtrain_threshold
        )

    def _due(self, every_steps: int, step: int | None = None) -> bool:
        step = self.progress.step if step is None else step
        return step % every_steps == 0 or step == self.total_steps

    def _save_due(self) -> bool:
        every_epochs = self.config.save_every_epochs
        if every_epochs is None:
            return self._due(self.config.save_every_steps)
        at_epoch_end = not self.progress.seen and self.progress.epoch % every_epochs == 0
        return at_epoch_end or self.progress.step == self.total_steps

    def log(self, audio_s_per_s: float, bar: ProgressBar) -> None:
        """Read the meters (the host waits for the device here and nowhere else) and write them down.

        Raises:
            StageError: too many steps in a row had no finite gradients; the checkpoints before it are untouched.
        """
        values = self.meter.read(self.accelerator)
        phases = self.timer.read()
        self._review()
        if not values:
            return  # of steps that all were bad, the review has said so
        values["train/lr"] = self.g.optimizer.param_groups[0]["lr"]
        values["train/epoch"] = self.epochs_done
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

    def _review(self) -> None:
        """Name the clips of steps that made no update since the last review; go back when they were too many in a row.

        Raises:
            StageError: there is nothing to go back to, or going back did not help.
        """
        steps, self.recent = self.recent, []
        flags = torch.cat([torch.cat([s.good.reshape(1), s.finite]) for s in steps]).tolist() if steps else []
        streak, too_many = self.progress.bad_streak, False
        for step in steps:
            good, *finite = flags[: 1 + len(step.clips)]
            del flags[: 1 + len(step.clips)]
            streak = 0 if good else streak + 1
            too_many = too_many or streak >= self.config.max_bad_steps
            if not good:
                clips = [
                    self.table.train[c]
                    for micro, fine in zip(step.clips, finite, strict=True)
                    if not fine
                    for c in micro
                ]
                named = ", ".join(dict.fromkeys(f"{c.source or 'silence'} (unit {c.unit}, {c.key})" for c in clips))
                logger.warning(
                    "step %d: no update, since a gradient was not finite; %s",
                    step.number,
                    f"clips with a loss that is not finite here: {named}"
                    if clips
                    else "every loss of this rank was finite",
                )
        self.progress = replace(self.progress, bad_streak=streak)
        if too_many:
            self._go_back()

    def _go_back(self) -> None:
        """Take weights and optimizers from the newest checkpoint and go on with the data that comes next."""
        on_first_rank(self.accelerator, self._written)
        (newest,) = broadcast_object_list([checkpoint.latest(self.work.checkpoints_dir)])
        if newest is not None:
            on_first_rank(self.accelerator, partial(checkpoint.verify, newest, self.identity))
        saved = checkpoint.load(newest) if newest is not None else None
        before = self.progress.rolled_back_at
        if saved is None or (before is not None and saved.progress.step <= before):
            raise StageError(
                f"step {self.progress.step}: {self.config.max_bad_steps} steps in a row had no finite gradients"
                f"{', also after going back to a checkpoint' if saved else ' before the first checkpoint'}; lower "
                "train.learning_rate, set train.max_grad_norm, or leave out the recordings named above. "
                f"The checkpoints in {self.work.checkpoints_dir} are from before"
            )
        logger.warning(
            "step %d: %d steps in a row had no finite gradients; going on from the weights of step %d",
            self.progress.step,
            self.config.max_bad_steps,
            saved.progress.step,
        )
        self._load_weights(saved)
        self.progress = replace(self.progress, bad_streak=0, rolled_back_at=self.progress.step)

    def validate(self) -> bool:
        """Mel distance on held-out clips; True when it is the smallest so far."""
        assert isinstance(self.g.raw, Generator)
        step = self.progress.step
        with self.pulse.within("validation"):
            distance = self.validation.mel_distance(self.g.raw, step)
        if distance is None:
            return False
        self.tracker.scalars({"eval/mel_distance": distance}, step)
        if not math.isfinite(distance):
            logger.warning("validation at step %d: the mel distance is %s, which is never the best", step, distance)
            return False
        best = self.progress.best_metric
        is_best = best is None or not distance >= best  # older versions of rvc_dist kept one that is not a number
        if is_best:
            epoch = self.progress.epoch
            self.progress = replace(self.progress, best_metric=distance, best_step=step, best_epoch=epoch)
        logger.info(
            "validation at step %d: mel distance %.4f (best %.4f at step %d)",
            step,
            distance,
            self.progress.best_metric,
            self.progress.best_step,
        )
        return is_best

    def save(self) -> None:
        """Write a checkpoint: the main rank alone touches the disk, and goes on as soon as it has copied the tensors.

        Raises:
            StageError: the weights are not finite numbers (on every rank alike).
        """
        self._review()
        weights = [*self.g.raw.parameters(), *self.d.raw.parameters()]
        if not torch.stack([w.detach().isfinite().all() for w in weights]).all():
            raise StageError(
                f"step {self.progress.step}: a weight is not finite; lower train.learning_rate or set "
                f"train.max_grad_norm. The checkpoints in {self.work.checkpoints_dir} are from before"
            )
        meter = self.meter.state(self.accelerator)
        is_main = self.accelerator.is_main_process
        states = {name: network.optimizer_state(is_main) for name, network in self.networks.items()}
        if is_main:
            self.tracker.flush()
            self.writer.start(
                checkpoint.Checkpoint(
                    progress=self.progress,
                    identity=self.identity,
                    # Until the writer has copied them, these share the memory of the networks.
                    models={name: network.raw.state_dict() for name, network in self.networks.items()},
                    optimizers={name: state for name, state in states.items() if state is not None},
                    meter=meter,
                    num_ranks=self.accelerator.num_processes,
                    trained_speakers=self.trained_speakers,
                    data=self.data,
                )
            )

    def _written(self) -> None:
        self.lock.check()
        self.writer.wait()
        if self.writer.error is not None:
            raise self.writer.error

    def _finish_writing(self) -> None:
        """Wait until the last checkpoint is on the disk.

        Raises:
            StageError: it could not be written; on all ranks.
        """
        on_first_rank(self.accelerator, self._written)

    def _progress_bar(self) -> ProgressBar:
        return ProgressBar(self.total_steps, self.progress.step, self.accelerator.is_main_process)

    def close(self) -> None:
        self.writer.wait(min(WRITE_S, self.config.timeout_s))
        self.tracker.close()


@dataclass
class Step:
    """What is remembered of a step until the host next waits for the device."""

    number: int
    clips: list[tuple[int, ...]]
    """Of each micro-batch of this rank."""
    good: Tensor
    """[] bool: it made its updates; the same on all ranks."""
    finite: Tensor
    """[micro-batches] bool: the losses of this rank's micro-batch were finite."""


def add_to(sums: dict[str, Tensor], values: Mapping[str, Tensor]) -> None:
    """Sum scalars by name, on the device."""
    for name, value in values.items():
        sums[name] = sums[name] + value.detach() if name in sums else value.detach()


def weighted_sum(terms: Mapping[str, Tensor], weights: LossConfig, kl_warmup: float) -> Tensor:
    """The generator's loss; `kl_warmup` in 0..1 scales the weight of the KL term."""
    kl = weights.kl * kl_warmup
    return weights.mel * terms["mel"] + kl * terms["kl"] + weights.fm * terms["fm"] + weights.adv * terms["adv"]
