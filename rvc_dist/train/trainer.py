"""The train stage: adversarial training of the generator on one or many ranks, resumable at every checkpoint."""

from __future__ import annotations

import logging
import signal
import time
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import NoReturn

from accelerate import Accelerator

from rvc_dist.config import Recipe
from rvc_dist.files import write_json
from rvc_dist.models.modules import kernel_search
from rvc_dist.report.background import PageMaker
from rvc_dist.report.history import History
from rvc_dist.runtime.accelerator import (
    StopSignal,
    check_own_device,
    check_same_settings,
    every_rank,
    make_accelerator,
    on_first_rank,
)
from rvc_dist.runtime.launcher import is_among_nodes, zero_stage
from rvc_dist.runtime.logs import versions
from rvc_dist.runtime.watchdog import Watch
from rvc_dist.screen import ProgressBar
from rvc_dist.train import bad_steps, checkpoint, compilation, out_of_memory, run_state, setup, speaker_encoder
from rvc_dist.train.bad_steps import RecentStep
from rvc_dist.train.dataset import Batch
from rvc_dist.train.ema import Ema, weights_of
from rvc_dist.train.listening import Listening
from rvc_dist.train.loader import StepLoader
from rvc_dist.train.metrics import Meter, PhaseTimer, report_steps
from rvc_dist.train.optimizers import learning_rate, report_speed
from rvc_dist.train.progress import Progress, is_due, is_overtrained, kl_warmup, save_is_due
from rvc_dist.train.step import GanStep, StepResult
from rvc_dist.train.trackers import Tracker, check_trackers
from rvc_dist.train.validation import Validation
from rvc_dist.train.voice_file import VoiceWriter
from rvc_dist.workspace import Shard, Stopped, Workspace

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
    work = Workspace(recipe.run_dir, recipe.name)
    with (
        Watch(work) as watch,
        PageMaker(work.root, recipe.train.report) as pages,
        History(work.history_file) as history,
        ExitStack() as end,
        watch.explain_timeouts(recipe.train.timeout_s),
    ):
        trainer = Trainer(recipe, watch, history, pages)
        end.callback(trainer.close)
        trainer.train()


class Trainer:
    """With a `watch`, it holds the run folder's lock and is watched from the moment that it knows its ranks."""

    def __init__(
        self,
        recipe: Recipe,
        watch: Watch | None = None,
        history: History | None = None,
        pages: PageMaker | None = None,
    ) -> None:
        self.recipe, self.config = recipe, recipe.train
        self.work = Workspace(recipe.run_dir, recipe.name)
        self.table = setup.load_clips(recipe, self.work)
        self.accelerator = make_accelerator(self.config)
        check_own_device(self.accelerator.device)
        self.device, self.is_main = self.accelerator.device, self.accelerator.is_main_process
        if watch is None:
            watch = Watch(self.work)  # one that never starts
        else:
            watch.start(self.accelerator)
        self.heartbeat, self.lock = watch.heartbeat, watch.lock
        self.pages = pages or PageMaker(self.work.root, enabled=False)
        self.history = history or History(self.work.history_file)
        on_first_rank(self.accelerator, partial(check_trackers, recipe))
        if self.is_main:
            setup.report_holdout(recipe, self.table)
            report_speed(self.config, self.device)

        self.heartbeat.enter("reading the checkpoint")
        self.origin, saved = setup.find_origin(recipe, self.accelerator, self.work, self.table)
        self.progress = self.origin.progress
        self.loader = StepLoader(
            recipe, self.table, self.accelerator, self.heartbeat, self.progress, self.origin.sampling
        )
        self.total_steps = setup.budget(recipe, self.table, self.loader, self.progress)

        self.heartbeat.enter("making the networks")
        self.networks, self.compiled, self.reducer = setup.prepare_networks(
            recipe, self.accelerator, self.work, self.origin, self.total_steps, self.loader, self.heartbeat.sent
        )
        self.meter, self.timer = Meter(), PhaseTimer(self.device, self.heartbeat)
        self.step = GanStep(recipe, self.networks, self.timer)
        self.ema = Ema(self.step.generator, self.config.ema_decay) if self.config.ema_decay else None
        self.recent: list[RecentStep] = []
        if saved is not None:
            run_state.resume(recipe, self.accelerator, saved, self.progress, self.networks, self.meter, self.ema)
        else:
            run_state.begin(recipe, self.networks)
        self.writer = checkpoint.AsyncCheckpointWriter(
            self.work.checkpoints_dir,
            self.config.keep_checkpoints,
            self._before_checkpoint,
            self.config.timeout_s / 2,  # it gives up before the ranks that wait for this one
            self._saved,
        )
        self.voices = VoiceWriter(recipe, self.table)
        self.heartbeat.enter("preparing the run folder")
        on_first_rank(self.accelerator, self._prepare_run_folder)  # not before the checkpoint has accepted the recipe
        compiled = {f"compiled {name}": yes for name, yes in self.compiled.items()}
        encoder = {"speaker encoder": speaker_encoder.PACKAGE if speaker_encoder.weights_file() else "none"}
        data = {"data.remote": self.loader.feed.remote.sha256} if self.loader.feed.remote else {}
        more = data | encoder | {"ZeRO stage": zero_stage(self.accelerator)}
        check_same_settings(self.accelerator, compiled | more)
        self.ranks = every_rank(self.accelerator)
        self.tracker = Tracker(recipe, self.progress.step + 1, self.is_main and not self.is_finished)
        self.validation = Validation(recipe, self.table, self.loader.dataset, self.accelerator, self.tracker)
        self.listening = Listening(recipe, self.table, self.origin.speakers)
        self.heartbeat.enter("preparing what is to be listened to")
        on_first_rank(self.accelerator, self._prepare_listening)

    def _prepare_run_folder(self) -> None:
        setup.prepare_run_folder(self.recipe, self.work, self.origin, self.networks)

    def _prepare_listening(self) -> None:
        if self.config.samples and not self.is_finished:
            self.listening.prepare(self.step.shape, lambda: self.voices.facts.f0_medians)

    def train(self) -> None:
        """To the end of the budget.

        Raises:
            StageError: on all ranks when one cannot go on; the checkpoints before it are untouched.
            Stopped: a signal asked for the end; a checkpoint was written.
        """
        if self.is_finished:
            logger.info(f"already trained to step {self.progress.step} of {self.total_steps}")
            return
        self._begin_history()
        with (
            StopSignal(self.accelerator, self.config.timeout_s) as stop,
            ProgressBar("train", self.total_steps, "steps", self.progress.step, logs=False) as bar,
            self.loader.loading(self.progress) as steps,
        ):
            began_at, audio_s = time.monotonic(), 0.0
            while not self.is_finished and not self.is_overtrained:
                self.history.step = number = self.progress.step + 1
                is_logged = is_due(self.config.log_every_steps, number, self.total_steps)
                is_evaluated = is_due(self.config.eval_every_steps, number, self.total_steps)
                self.heartbeat.begin_step(number, "evaluated" if is_evaluated else "logged" if is_logged else "other")
                with self.timer.phase("data"), stop.limit(*self.loader.awaited(number)):
                    batches = next(steps)
                self.train_step(batches)
                self.progress = self.loader.advanced(self.progress)
                audio_s += self.loader.audio_s(batches)
                if is_logged:
                    with self.heartbeat.within("log"):
                        self.log(audio_s / (time.monotonic() - began_at), bar)
                    began_at, audio_s = time.monotonic(), 0.0
                is_best = is_evaluated and self.evaluate()
                with self.heartbeat.within("stop_poll"):
                    asked = stop.poll(failed=self.writer.error is not None or self.lock.is_lost)
                if asked == StopSignal.FAILED:
                    break
                if (why := self._why_save(bool(asked), is_best)) is not None:
                    with self.heartbeat.within("checkpoint"):
                        self.save(why)
                if asked and not self.is_finished:
                    self._stop(signal.Signals(asked))
        self._finish_writing()
        if self.is_overtrained:
            logger.warning(
                f"overtraining: no improvement for {self.config.overtrain_threshold} epochs; the best checkpoint is "
                f"step {self.progress.best_step}"
            )
        self.history.write("end", self.progress.step, why="overtrained" if self.is_overtrained else "done")
        logger.info(f"trained to step {self.progress.step}; checkpoints in {self.work.checkpoints_dir}")

    def _begin_history(self) -> None:
        if self.is_main:
            self.history.begin(
                self.progress.step,
                epoch=self.progress.epochs_done(len(self.table.train)),
                total_steps=self.total_steps,
                ranks=self.ranks,
                versions=versions(),
                global_batch=self.loader.sampler.global_batch_size,
            )

    @property
    def is_finished(self) -> bool:
        return self.progress.step >= self.total_steps

    @property
    def is_overtrained(self) -> bool:
        return is_overtrained(self.config, self.progress)

    def train_step(self, batches: list[Batch]) -> None:
        """One update of both networks; what came of it stays on the device until it is logged."""
        done = self.progress
        result = take_step(self.step, batches, done, self.total_steps, self.accelerator)
        if self.ema is not None:
            self.ema.update(done.step)
        self.meter.update(result.values, result.good)
        self.recent.append(RecentStep.of(done.step + 1, batches, result))

    def log(self, audio_s_per_s: float, bar: ProgressBar) -> None:
        """Read the meters (the host waits for the device here and nowhere else) and write them down.

        Raises:
            StageError: too many steps in a row had no finite gradients; the checkpoints before it are untouched.
        """
        values, phases = self.meter.read(self.accelerator), self.timer.read()
        self.check_recent_steps()
        if values:  # else all steps were bad, as was reported
            values["train/lr"] = self.step.g.optimizer.param_groups[0]["lr"]
            if self.config.learning_rate_d is not None:
                values["train/lr_d"] = self.step.d.optimizer.param_groups[0]["lr"]
            values["train/epoch"] = self.progress.epochs_done(len(self.table.train))
            values["perf/audio_s_per_s"] = audio_s_per_s
            epoch = values["train/epoch"]
            self.history.write("step", self.progress.step, epoch=epoch, values=values, seconds=phases)
            report_steps(values, phases, self.progress, self.total_steps, self.tracker, bar)

    def check_recent_steps(self) -> None:
        """Name the clips of steps that made no update since the last check; roll back when too many were in a row.

        Raises:
            StageError: there is nothing to go back to, or going back did not help.
        """
        steps, self.recent = self.recent, []
        most = self.config.max_bad_steps
        streak, too_many = bad_steps.check_recent_steps(
            self.accelerator, steps, self.progress.bad_streak, most, self.table.train
        )
        self.progress = replace(self.progress, bad_streak=streak)
        if too_many:
            self.roll_back()

    def roll_back(self) -> None:
        """Take weights and optimizers from the newest checkpoint and go on with the data that comes next."""
        self._finish_writing()
        folder, most = self.work.checkpoints_dir, self.config.max_bad_steps
        saved = bad_steps.checkpoint_from_before(self.accelerator, folder, self.origin.identity, self.progress, most)
        run_state.load_weights(saved, self.networks, self.work, self.ema)
        self.progress = replace(self.progress, bad_streak=0, rolled_back_at=self.progress.step)

    def evaluate(self) -> bool:
        """What the voice makes of held-out speech, on all ranks; True when it is the best so far.

        Training goes on as if it had not been.
        """
        step, generator = self.progress.step, self.step.generator
        with self.heartbeat.within("validation"):
            verdict = self.validation.judge(generator, self.progress, self.ema)
            if self.is_main:
                self.validation.show(generator, step)
        if verdict is not None:
            self.progress = verdict.progress
            self.history.write(
                "validation", step, epoch=self.progress.epochs_done(len(self.table.train)), **verdict.line()
            )
        if self.is_main:
            with self.heartbeat.within("samples"), weights_of(self.ema, self.progress.uses_ema):
                self.listening.play(generator, step, partial(self._heard, step))
            self.pages.begin()
        return verdict is not None and verdict.is_best

    def _heard(self, step: int, folder: Path) -> None:
        """By the thread that wrote them, when there are samples of `step`."""
        self.tracker.samples(folder, step)
        self.history.write("samples", step, folder=folder.relative_to(self.work.root).as_posix())

    def _why_save(self, is_asked: bool, is_best: bool) -> checkpoint.Why | None:
        """Why a checkpoint is to be written now, the reason that keeps it longest; None where none is."""
        if self.is_finished or self.is_overtrained:
            return "end"
        if save_is_due(self.config, self.progress, self.total_steps):
            return "due"
        return "best" if is_best else "stop" if is_asked else None

    def save(self, why: checkpoint.Why = "due") -> None:
        """Begin to write a checkpoint: the main rank alone does, and goes on as soon as it has copied the tensors.

        Raises:
            StageError: the weights are not finite numbers (on every rank alike).
        """
        self.check_recent_steps()
        state = self.origin, self.progress, self.networks, self.meter, self.work
        made = run_state.make_checkpoint(self.accelerator, *state, why, self.ema)
        if made is not None:
            self.writer.start(made)

    def _before_checkpoint(self) -> None:
        """By the thread that writes it: what a run that goes on from it does not repeat is on the disk."""
        self.lock.check()
        self.tracker.flush()
        self.history.flush()

    def _saved(self, made: checkpoint.Checkpoint, path: Path) -> None:
        """By the writer's thread, when a checkpoint is whole: its voice, unless a later one replaces it."""
        step, root = made.progress.step, self.work.root
        self.history.write("checkpoint", step, path=path.relative_to(root).as_posix(), why=made.why)
        if self.config.save_every_voices and made.why != "stop" and (voice := self.voices(made, path)):
            self.history.write("voice", step, path=voice.relative_to(root).as_posix())

    def _finish_writing(self) -> None:
        """Wait until the last checkpoint is on the disk, and for samples some seconds.

        Raises:
            StageError: it could not be written, or the run folder is another job's by now; on all ranks.
        """
        on_first_rank(self.accelerator, self.writer.finish)
        self.listening.flush()

    def _stop(self, number: signal.Signals) -> NoReturn:
        """SIGTERM is for the ranks of one launcher, SIGUSR1 and Ctrl-C are for all."""
        self._finish_writing()
        name, of_node = number.name, number == signal.SIGTERM and is_among_nodes()
        if self.is_main:  # for batch scripts: a launcher hides its ranks' exit codes
            write_json(self.work.requeue_file, {"step": self.progress.step, "signal": name})
        self.history.write("end", self.progress.step, why=f"stopped by {name}")
        raise Stopped(
            f"stopped by {name} at step {self.progress.step} of {self.total_steps}; a checkpoint was written and "
            + ("launchers that were not asked to end go on from it" if of_node else "the same command continues"),
            of_node,
        )

    def close(self) -> None:
        self.loader.feed.close()
        self.writer.wait(min(WRITE_S, self.config.timeout_s))
        self.listening.close()
        self.tracker.close()


def take_step(
    step: GanStep, batches: list[Batch], done: Progress, total_steps: int, accelerator: Accelerator
) -> StepResult:
    """The update after `done` of a run of `total_steps`: with the learning rates and KL weight of that place."""
    config = step.config
    rate = partial(learning_rate, config, done.step, done.epoch, total_steps, accelerator.num_processes)
    joins_at = config.adversarial_from_step
    step.set_learning_rates(generator=rate(), discriminator=rate(config.learning_rate_d, joins_at))
    sizes, before = [len(batch.clips) for batch in batches], step.batch_sizes
    step.batch_sizes = sizes
    full = all(size == config.micro_batch(accelerator.num_processes) for size in sizes)
    with (
        out_of_memory.advice(step, batches[0], accelerator.process_index),
        compilation.eager_unless(full),
        kernel_search(None if full or sizes == before else False),  # for the one step an epoch it took a GPU 12 s
    ):
        return step(batches, kl_warmup(config, done), adversarial=done.step >= joins_at)
