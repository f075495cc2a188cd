"""The loader: a rank's processes that read its steps ahead, the shared memory they need, and how they end."""

from __future__ import annotations

import logging
import math
import os
import shutil
import signal
import sys
import threading
from collections.abc import Generator, Iterator, Mapping
from contextlib import closing, contextmanager
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from accelerate import Accelerator
from torch.utils.data import DataLoader

from rvc_dist.config import MAX_CLIP_FRAMES, Recipe, TrainConfig
from rvc_dist.runtime.hang_killer import end_with_parent
from rvc_dist.runtime.heartbeat import Heartbeat
from rvc_dist.runtime.launcher import cores_of_rank, local_ranks, world_size
from rvc_dist.runtime.logs import ends_within
from rvc_dist.train.clips import ClipList
from rvc_dist.train.dataset import Batch, CachedClips, ClipDataset, ClipTable, make_dataset
from rvc_dist.train.feeding import Feed
from rvc_dist.train.progress import Progress
from rvc_dist.train.sampler import BUCKET_FRAMES, BucketBatchSampler, Sampling
from rvc_dist.workspace import StageError, Stopped

logger = logging.getLogger(__name__)

SHM = Path("/dev/shm")
"""Where loader processes put the batches that they have ready."""
WORKERS_S = 3.0
"""How long a loader process may take for the clips that it reads when the loader ends."""


class StepLoader:
    """What a rank trains on, step by step: as many micro-batches a step as the recipe says, on the rank's device."""

    def __init__(
        self,
        recipe: Recipe,
        table: ClipTable,
        accelerator: Accelerator,
        heartbeat: Heartbeat,
        progress: Progress,
        sampling: Sampling,
    ) -> None:
        config, self.device, self.rank = recipe.train, accelerator.device, accelerator.process_index
        self.recipe, self.num_ranks, self.heartbeat = recipe, int(accelerator.num_processes), heartbeat
        clips = ClipList.of(table.train)
        lengths = clips.rows["num_frames"]
        self.sampler = BucketBatchSampler.of(config, lengths, self.num_ranks, self.rank, sampling, clips)
        self.feed = Feed(recipe, self.sampler)
        self.dataset = make_dataset(recipe, table, self.device, self.feed.data)
        settings = loader_settings(config, self.device, isinstance(self.dataset, CachedClips))
        self.settings = fit_shared_memory(recipe, table, settings)
        self.died: list[int] = []
        """Exit codes of processes that ended before the loader."""
        self.left_in_epoch = len(self.sampler.global_batches(progress.epoch, progress.batches_done))
        """Steps after those of `progress`, and of `advanced`."""

    def next_batch(self, progress: Progress) -> Batch:
        """The first micro-batch of the step after `progress`."""
        self.sampler.start_at(progress.epoch, progress.batches_done)
        return self.dataset[next(iter(self.sampler))][0].to(self.device)

    def advanced(self, progress: Progress) -> Progress:
        """`progress` one step later."""
        self.left_in_epoch -= 1
        progress = progress.advanced(self.sampler.global_batch_size, epoch_ends=self.left_in_epoch == 0)
        self.feed.advance(progress, epoch_ended=self.left_in_epoch == 0)
        self.left_in_epoch = self.left_in_epoch or self.sampler.steps_per_epoch
        return progress

    def audio_s(self, batches: list[Batch]) -> float:
        """Seconds of real clips in a step, over all ranks."""
        return batches[0].mean_frames * self.num_ranks * self.recipe.rate_spec.hop / self.recipe.data.sample_rate

    def steps(self, progress: Progress) -> Generator[list[Batch], None, None]:
        """The micro-batches of each step after `progress`; when it is closed, the loader's processes end."""
        self.sampler.start_at(progress.epoch, progress.batches_done)
        self.feed.begin(progress)
        loaded = iter(make_loader(self.dataset, self.sampler, self.settings))
        try:
            with self.heartbeat.noted():
                copied = copied_ahead if self.settings["pin_memory"] else copied_in_turn
                yield from copied(loaded, self.device)
        finally:
            self.feed.end()
            self.died = end_loader(loaded)

    @contextmanager
    def loading(self, progress: Progress) -> Iterator[Iterator[list[Batch]]]:
        """The steps after `progress`.

        Raises:
            StageError: a loader process died, in the place of what PyTorch raises wherever it hears of it.
        """
        with closing(self.steps(progress)) as steps:
            try:
                yield steps
            except RuntimeError as error:
                steps.close()
                self.feed.check()  # without the stack of the loader process that heard of it
                if isinstance(error, StageError | Stopped) or not self.died:
                    raise
                reason = signal.strsignal(-self.died[0]) if self.died[0] < 0 else self.died[0]
                raise StageError(
                    f"rank {self.rank}: a loader process died in step {self.heartbeat.step} ({reason}): the host's "
                    f"memory or {SHM} may be full.",
                    "Ask for more, or less with train.num_workers or train.batch_size; the same command continues from "
                    "the last checkpoint",
                ) from error

    def awaited(self, step: int) -> tuple[str, str]:
        """What `step` waits for first, in words, and what to do where it does not come."""
        workers = self.settings["num_workers"]
        readers = f"its {workers} loader process(es) read" if workers else "it reads"
        return (
            f"the clips of step {step + self.settings['pin_memory']}, which {readers} from {self.feed.where}",
            "see whether that disk answers; where it is only slow, raise train.num_workers or train.timeout_s",
        )


def loader_settings(config: TrainConfig, device: torch.device, cached: bool) -> dict[str, Any]:
    """The DataLoader options of a rank.

    Those of `fast_train` are the reference's: as many workers as half of the rank's cores, at most 8, unless the recipe
    has a number, 16 batches ahead, pinned memory, workers that persist.
    """
    workers = config.num_workers
    if workers is None:
        workers = max(1, min(8, cores_of_rank() // 2)) if config.fast_train else 1
    if cached:
        workers = 0
    return {
        "num_workers": workers,
        "prefetch_factor": (16 if config.fast_train else 4) if workers else None,
        "pin_memory": device.type == "cuda" and not cached,
        "persistent_workers": workers > 0,
    }


class ReadAhead(NamedTuple):
    """How many steps each loader process may have ready in shared memory."""

    wanted: int
    fits: int
    needed: int
    """Bytes of shared memory, of all ranks of this host."""
    free: int
    what: str
    remedy: str

    @classmethod
    def measure(cls, recipe: Recipe, table: ClipTable, settings: Mapping[str, Any]) -> ReadAhead:
        config, spec, num_ranks = recipe.train, recipe.rate_spec, local_ranks()
        frames = int(ClipList.of(table.train).rows["num_frames"].max(initial=0)) or MAX_CLIP_FRAMES
        frames = min(frames, MAX_CLIP_FRAMES)
        samples = -(-frames // BUCKET_FRAMES) * BUCKET_FRAMES * (spec.hop + table.content_channels + 1) + 2 * spec.reach
        step_bytes = config.batch_size * config.micro_batches(world_size()) * samples * 4
        workers, wanted = settings["num_workers"], settings["prefetch_factor"]
        # Besides those that are ready, two: a rank lets go of a step only when it has the next.
        needed, free = step_bytes * (workers * wanted + 2) * num_ranks, shutil.disk_usage(SHM).free
        return cls(
            wanted,
            (free // (step_bytes * num_ranks) - 2) // workers,
            needed,
            free,
            f"{SHM} has {free / 1e6:.0f} MB free, the loaders of {num_ranks} rank(s) on this host need "
            f"{needed / 1e6:.0f} MB (steps of {step_bytes / 1e6:.1f} MB, {wanted} ahead in each of {workers} "
            "loader process(es) a rank)",
            f"start the container with --shm-size={math.ceil(1.5 * needed / 2**30)}g, or set train.num_workers 0",
        )


def fit_shared_memory(recipe: Recipe, table: ClipTable, settings: Mapping[str, Any]) -> Mapping[str, Any]:
    """`settings`, with fewer steps ahead where shared memory does not hold them: results do not depend on that.

    Raises:
        StageError: it does not even hold one a loader process, and the ranks would wait for ever.
    """
    if not settings["num_workers"] or not SHM.is_dir():
        return settings
    ahead = ReadAhead.measure(recipe, table, settings)
    if ahead.fits < 1:
        raise StageError(f"{ahead.what};", ahead.remedy)
    if ahead.fits >= ahead.wanted:
        return settings
    if os.environ.get("LOCAL_RANK", "0") == "0":
        logger.warning("%s: %d ahead fit and are read; for more, %s", ahead.what, ahead.fits, ahead.remedy)
    return {**settings, "prefetch_factor": ahead.fits}


def copied_in_turn(loaded: Iterator[list[Batch]], device: torch.device) -> Iterator[list[Batch]]:
    """Each step's micro-batches on `device`."""
    for batches in loaded:
        yield [batch.to(device) for batch in batches]


def copied_ahead(loaded: Iterator[list[Batch]], device: torch.device) -> Iterator[list[Batch]]:
    """The same on a GPU, from pinned memory: a step's are copied beside the kernels of the step before."""
    copies, ready = torch.cuda.Stream(device), None  # type: ignore[no-untyped-call]
    for batches in loaded:
        with torch.cuda.stream(copies):
            copied = [batch.to(device) for batch in batches], copies.record_event()
        if ready is not None:
            yield _handed_over(*ready, device)
        ready = copied
    if ready is not None:
        yield _handed_over(*ready, device)


def _handed_over(batches: list[Batch], copied: torch.Event, device: torch.device) -> list[Batch]:
    """`batches` for the current stream, which waits until they are `copied`."""
    stream = torch.cuda.current_stream(device)
    stream.wait_event(copied)
    for batch in batches:
        batch.record_stream(stream)
    return batches


def make_loader(
    dataset: ClipDataset, sampler: BucketBatchSampler, settings: Mapping[str, Any]
) -> DataLoader[list[Batch]]:
    """Steps as the sampler plans them; nothing else shards or shuffles."""
    return DataLoader(
        dataset,
        sampler=sampler,
        batch_size=None,
        # A loader draws a seed for its workers; drawn from the global state it would depend on what ran before.
        generator=torch.Generator(),
        worker_init_fn=partial(end_with_rank, os.getpid()),
        **settings,
    )


def end_loader(loaded: Any) -> list[int]:
    """End the processes of a loader's iterator, by force where they do not; the exit codes of those that had died."""
    workers = getattr(loaded, "_workers", ())
    if not workers or sys.is_finalizing():  # where multiprocessing has ended them
        return []
    signal.setitimer(signal.ITIMER_REAL, 0.0)  # of a wait for it that was in vain, and would end this too
    died = [worker.exitcode for worker in workers if worker.exitcode]
    handler = signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # PyTorch's would take their end for a fault
    if not ends_within(WORKERS_S, "the loader", loaded._shutdown_workers):
        for worker in workers:
            worker.kill()
            worker.join(WORKERS_S)
    if all(worker.exitcode is not None for worker in workers):  # what hangs in the kernel ends later
        signal.signal(signal.SIGCHLD, handler)
    return died


def end_with_rank(rank: int, worker: int) -> None:
    """Let this loader process end with its rank, of process id `rank`, or when that says so, and for nobody else.

    It holds the rank's connections: while it lives, the others do not notice that the rank has died. What asks a rank
    to save and stop often goes to its loader processes too, which it still needs for a step.
    """
    del worker
    for number in (signal.SIGINT, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)
    end_with_parent(signal.SIGKILL, rank)
    if hasattr(signal, "sigwaitinfo"):  # Linux
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        threading.Thread(target=_end_when_asked, args=(rank,), name="end", daemon=True).start()


def _end_when_asked(rank: int) -> None:
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != rank:
        pass
    os.kill(os.getpid(), signal.SIGKILL)  # nothing of it is to be kept
