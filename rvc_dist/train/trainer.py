"""The train stage: adversarial training of the generator on one or many ranks, resumable at every checkpoint.

Shapes: B clips, T spectrogram frames, S samples.
"""

from __future__ import annotations

import logging
import math
import signal
import time
from collections import abc
from collections.abc import Iterator
from contextlib import AbstractContextManager, closing, contextmanager
from dataclasses import replace
from typing import NoReturn

import torch

from rvc_dist.config import Recipe
from rvc_dist.files import write_json
from rvc_dist.models.generator import Generator
from rvc_dist.runtime.accelerator import StopSignal, check_same_settings, make_accelerator, on_first_rank
from rvc_dist.runtime.launcher import zero_stage
from rvc_dist.runtime.watchdog import Watch
from rvc_dist.train import bad_steps, checkpoint, compilation, fingerprint, networks, out_of_memory, setup
from rvc_dist.train.bad_steps import RecentStep
from rvc_dist.train.dataset import (
    SHM,
    Batch,
    BucketBatchSampler,
    CachedClips,
    end_loader,
    fit_shared_memory,
    loader_settings,
    make_dataset,
    make_loader,
)
from rvc_dist.train.ddp import GradientReducer
from rvc_dist.train.metrics import Meter, PhaseTimer, ProgressBar, Tracker
from rvc_dist.train.optimizers import learning_rate
from rvc_dist.train.progress import Progress, is_due, is_overtrained, kl_warmup, save_is_due
from rvc_dist.train.step import GanStep
from rvc_dist.train.validation import Validation
from rvc_dist.workspace import Shard, StageError, Stopped, Workspace

logger = logging.getLogger(__name__)

WRITE_S = 30.0
"""How long a rank that ends for a fault waits for a checkpoint that is being written."""


def run(recipe: Recipe, shard: Shard) -> None:
    """Train to the end of the budget, from the newest checkpoint if there is one.

    Raises:
        StageError: the features are missing, a checkpoint or pretrained file does not fit, or another job trains in
            the same run folder.
        Stopped: a signal asked for the end; a checkpoint was written.
    """
    del shard  # the Accelerator knows the ranks
    with Watch(Workspace(recipe.run_dir, recipe.name)) as watch, watch.explain_timeouts(recipe.train.timeout_s):
        trainer = Trainer(recipe, watch)
        try:
            trainer.train()
        finally:
            trainer.close()


class Trainer:
    """With a `watch`, it holds the run folder's lock and is watched from the moment that it knows its ranks."""

    def __init__(self, recipe: Recipe, watch: Watch | None = None) -> None:
        self.recipe, self.config, self.spec = recipe, recipe.train, recipe.rate_spec
        self.work = Workspace(recipe.run_dir, recipe.name)
        self.table = setup.load_clips(recipe, self.work)
        self.accelerator = make_accelerator(self.config)
        self.device, self.is_main = self.accelerator.device, self.accelerator.is_main_process
        rank, num_ranks = self.accelerator.process_index, self.accelerator.num_processes
        if watch is None:
            watch = Watch(self.work)  # one that never starts
        else:
            watch.start(self.accelerator)
        self.heartbeat, self.lock = watch.heartbeat, watch.lock
        if self.is_main:
            setup.report_holdout(recipe, self.table)

        found = setup.saved_before(self.accelerator, self.work)
        self.shape, modules = networks.build(recipe, self.table, None if found is None else found[1].identity)
        self.identity = networks.identity(recipe, self.shape, self.table)
        self.data = fingerprint.of_data(recipe, self.table)
        lengths = [c.num_frames for c in self.table.train]
        sizes = (self.config.batch_size, num_ranks, rank, self.config.seed, self.config.grad_accum_steps)
        self.sampler = BucketBatchSampler(lengths, *sizes)
        self.progress, self.trained_speakers = Progress(), self.table.trained_speakers
        if found is not None:
            self.progress = setup.continued(self.accelerator, *found, self.identity, self.data)
            self.trained_speakers = tuple(sorted({*self.trained_speakers, *found[1].trained_speakers}))
        self.left_in_epoch = len(self.sampler.global_batches(self.progress.epoch, self.progress.batches_done))
        self.total_steps = setup.budget(recipe, self.table, self.sampler, self.left_in_epoch, self.progress)
        self.dataset = make_dataset(recipe, self.table, self.device)
        settings = loader_settings(self.config, self.device, isinstance(self.dataset, CachedClips))
        self.loader_settings = fit_shared_memory(recipe, self.table, settings)
        self.died: list[int] = []
        """Exit codes of loader processes that ended before their loader."""

        modules = {name: module.to(self.device) for name, module in modules.items()}
        steps = (self.progress.step, self.total_steps)
        self.compiled = setup.choose_compiled(recipe, self.accelerator, self.work, modules, steps, self._next_batch)
        self.reducer = GradientReducer(self.config.grad_compression == "bf16", self.heartbeat.sent)
        self.networks = {
            name: setup.trained_module(recipe, self.accelerator, module, self.compiled[name], self.reducer)
            for name, module in modules.items()
        }
        self.meter, self.timer = Meter(), PhaseTimer(self.device, self.heartbeat)
        self.step = GanStep(recipe, self.networks, self.timer)
        self.recent: list[RecentStep] = []
        if found is not None:
            self._resume(found[1])
        self.writer = checkpoint.AsyncCheckpointWriter(
            self.work.checkpoints_dir,
            self.config.keep_checkpoints,
            self.lock.check,
            self.config.timeout_s / 2,  # it gives up before the ranks that wait for this one
        )
        on_first_rank(self.accelerator, self._prepare_run_folder)  # not before the checkpoint has accepted the recipe
        compiled = {f"compiled {name}": yes for name, yes in self.compiled.items()}
        check_same_settings(self.accelerator, compiled | {"ZeRO stage": zero_stage(self.accelerator)})
        self.tracker = Tracker(self.work.tensorboard_dir, self.progress.step + 1, self.is_main)
        self.validation = Validation(recipe, self.table, self.dataset, self.accelerator, self.tracker)

    def _prepare_run_folder(self) -> None:
        setup.prepare_run_folder(self.recipe, self.work, self.networks)

    def _next_batch(self) -> Batch:
        self.sampler.start_at(self.progress.epoch, self.progress.batches_done)
        return self.dataset[next(iter(self.sampler))][0].to(self.device)

    def _resume(self, saved: checkpoint.Checkpoint) -> None:
        setup.load_weights(saved, self.networks, self.work)
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

    def train(self) -> None:
        """To the end of the budget.

        Raises:
            StageError: on all ranks when one cannot go on; the checkpoints before it are untouched.
            Stopped: a signal asked for the end; a checkpoint was written.
        """
        if self.progress.step >= self.total_steps:
            logger.info("already trained to step %d of %d", self.progress.step, self.total_steps)
            return
        with (
            StopSignal(self.accelerator, self.config.timeout_s) as stop,
            ProgressBar(self.total_steps, self.progress.step, self.is_main) as bar,
            self._loading() as steps,
        ):
            began_at, audio_s = time.monotonic(), 0.0
            while self.progress.step < self.total_steps and not self.overtrained:
                is_logged = self._due(self.config.log_every_steps, self.progress.step + 1)
                self.heartbeat.begin_step(self.progress.step + 1, "logged" if is_logged else "other")
                batches = self._read(steps, stop)
                full = all(len(batch.clips) == self.config.batch_size for batch in batches)
                with self._memory_advice(batches[0]), compilation.eager_unless(full):
                    self.train_step(batches)
                audio_s += self.audio_s(batches)
                self._advance()
                if is_logged:
                    with self.heartbeat.within("log"):
                        self.log(audio_s / (time.monotonic() - began_at), bar)
                    began_at, audio_s = time.monotonic(), 0.0
                is_best = self._due(self.config.eval_every_steps) and self.validate()
                with self.heartbeat.within("stop_poll"):
                    asked = stop.poll(failed=self.writer.error is not None or self.lock.is_lost)
                if asked == StopSignal.FAILED:
                    break
                if asked or is_best or save_is_due(self.config, self.progress, self.total_steps) or self.overtrained:
                    with self.heartbeat.within("checkpoint"):
                        self.save()
                if asked and self.progress.step < self.total_steps:
                    self._stop(signal.Signals(asked).name)
        self._finish_writing()
        if self.overtrained:
            logger.warning(
                "overtraining: no improvement for %d epochs; the best checkpoint is step %d",
                self.config.overtrain_threshold,
                self.progress.best_step,
            )
        logger.info("trained to step %d; checkpoints in %s", self.progress.step, self.work.checkpoints_dir)

    def _read(self, steps: Iterator[list[Batch]], stop: StopSignal) -> list[Batch]:
        """The micro-batches of the next step."""
        with self.timer.phase("data"), stop.limit(*self._next_clips()):
            return next(steps)

    def audio_s(self, batches: list[Batch]) -> float:
        """Seconds of real clips in a step, over all ranks."""
        frames = batches[0].mean_frames * int(self.accelerator.num_processes)
        return frames * self.spec.hop / self.recipe.data.sample_rate

    def _stop(self, name: str) -> NoReturn:
        self._finish_writing()
        if self.is_main:  # for batch scripts: a launcher hides its ranks' exit codes
            write_json(self.work.requeue_file, {"step": self.progress.step, "signal": name})
        raise Stopped(
            f"stopped by {name} at step {self.progress.step} of {self.total_steps}; a checkpoint was written and the "
            "same command continues"
        )

    def train_step(self, batches: list[Batch]) -> None:
        """One update of both networks; what came of it stays on the device until it is logged."""
        done = self.progress
        rate = learning_rate(self.config, done.step, done.epoch, self.total_steps, self.accelerator.num_processes)
        self.step.set_learning_rate(rate)
        result = self.step(batches, kl_warmup(self.config, done))
        self.meter.update(result.values, result.good)
        self.recent.append(RecentStep(done.step + 1, [b.clips for b in batches], result.good, result.finite))

    def _memory_advice(self, batch: Batch) -> AbstractContextManager[None]:
        return out_of_memory.advice(self.step, batch, self.accelerator.process_index)

    def _steps(self) -> abc.Generator[list[Batch], None, None]:
        """The micro-batches of each step from here on; when it is closed, its loader processes end."""
        self.sampler.start_at(self.progress.epoch, self.progress.batches_done)
        loaded = iter(make_loader(self.dataset, self.sampler, self.loader_settings))
        try:
            with self.heartbeat.noted():
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
                    f"{SHM} may be full.",
                    "Ask for more, or less with train.num_workers or train.batch_size; the same command continues from "
                    "the last checkpoint",
                ) from error

    def _advance(self) -> None:
        self.left_in_epoch -= 1
        self.progress = self.progress.advanced(self.sampler.global_batch_size, epoch_ends=self.left_in_epoch == 0)
        self.left_in_epoch = self.left_in_epoch or self.sampler.steps_per_epoch

    @property
    def overtrained(self) -> bool:
        return is_overtrained(self.config, self.progress)

    def _due(self, every_steps: int, step: int | None = None) -> bool:
        return is_due(every_steps, self.progress.step if step is None else step, self.total_steps)

    def log(self, audio_s_per_s: float, bar: ProgressBar) -> None:
        """Read the meters (the host waits for the device here and nowhere else) and write them down.

        Raises:
            StageError: too many steps in a row had no finite gradients; the checkpoints before it are untouched.
        """
        values = self.meter.read(self.accelerator)
        phases = self.timer.read()
        self.check_recent_steps()
        if not values:
            return  # of steps that all were bad, the review has said so
        values["train/lr"] = self.step.g.optimizer.param_groups[0]["lr"]
        values["train/epoch"] = self.progress.epochs_done(len(self.table.train))
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

    def check_recent_steps(self) -> None:
        """Name the clips of steps that made no update since the last check; roll back when too many were in a row.

        Raises:
            StageError: there is nothing to go back to, or going back did not help.
        """
        steps, self.recent = self.recent, []
        most = self.config.max_bad_steps
        streak, too_many = bad_steps.check_recent_steps(steps, self.progress.bad_streak, most, self.table.train)
        self.progress = replace(self.progress, bad_streak=streak)
        if too_many:
            self.roll_back()

    def roll_back(self) -> None:
        """Take weights and optimizers from the newest checkpoint and go on with the data that comes next."""
        self._finish_writing()
        folder, most = self.work.checkpoints_dir, self.config.max_bad_steps
        saved = bad_steps.checkpoint_from_before(self.accelerator, folder, self.identity, self.progress, most)
        setup.load_weights(saved, self.networks, self.work)
        self.progress = replace(self.progress, bad_streak=0, rolled_back_at=self.progress.step)

    def validate(self) -> bool:
        """Mel distance on held-out clips; True when it is the smallest so far."""
        generator, step = self.networks["generator"].module, self.progress.step
        assert isinstance(generator, Generator)
        with self.heartbeat.within("validation"):
            distance = self.validation.mel_distance(generator, step)
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
        self.check_recent_steps()
        weights = [w for network in self.networks.values() for w in network.module.parameters()]
        if not torch.stack([w.detach().isfinite().all() for w in weights]).all():
            raise StageError(
                f"step {self.progress.step}: a weight is not finite;",
                f"lower train.learning_rate or set train.max_grad_norm. The checkpoints in {self.work.checkpoints_dir} "
                "are from before",
            )
        meter = self.meter.state(self.accelerator)
        states = {name: network.optimizer_state(self.is_main) for name, network in self.networks.items()}
        if self.is_main:
            self.tracker.flush()
            self.writer.start(
                checkpoint.Checkpoint(
                    progress=self.progress,
                    identity=self.identity,
                    # Until the writer has copied them, these share the memory of the networks.
                    models={name: network.module.state_dict() for name, network in self.networks.items()},
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

    def close(self) -> None:
        self.writer.wait(min(WRITE_S, self.config.timeout_s))
        self.tracker.close()
