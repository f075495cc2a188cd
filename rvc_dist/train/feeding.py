"""Training from object storage: a machine's fetcher knows what is read when, and how far the ranks are.

For a run on the disk nothing of it does anything.
"""

from __future__ import annotations

from copy import copy
from functools import partial

from rvc_dist.config import Recipe
from rvc_dist.data.fetcher import Window
from rvc_dist.data.remote import Fetcher, RemoteRun, data_of
from rvc_dist.runtime.background import Background
from rvc_dist.train.progress import Progress
from rvc_dist.train.sampler import BatchesDone, BucketBatchSampler


class Feed:
    """Of a rank; the first rank of each machine has the fetcher."""

    def __init__(self, recipe: Recipe, sampler: BucketBatchSampler) -> None:
        self.data, self._sampler = data_of(recipe), sampler
        self.remote = self.data if isinstance(self.data, RemoteRun) else None
        self.where = self.remote.url if self.remote is not None else str(self.data.root)
        self._fetcher = Fetcher(self.remote) if self.remote is not None and self.remote.is_leader else None
        self._planner = Background("the plan of what is fetched") if self._fetcher is not None else None
        self._windows: list[Window] = []
        self._position = 0

    def begin(self, progress: Progress) -> None:
        """The steps after `progress` are read, this epoch's and the next one's."""
        self._position, self._windows = 0, []
        if self.remote is not None:
            self.remote.read_to(0)
        self._plan(progress.epoch, progress.batches_done)
        self._plan(progress.epoch + 1)

    def advance(self, progress: Progress, epoch_ended: bool) -> None:
        """A step was made, up to `progress`."""
        self._position += 1
        if self.remote is not None:
            self.remote.read_to(self._position)
        if epoch_ended:
            self._plan(progress.epoch + 1)

    def end(self) -> None:
        """No more steps are read: loader processes that wait for a unit wait no longer."""
        if self.remote is not None:
            self.remote.stop_reading()

    def check(self) -> None:
        """Nothing, unless what fetches has failed.

        Raises:
            StageError: it has, and why.
        """
        if self.remote is not None and (failure := self.remote.failure()) is not None:
            raise failure

    def close(self) -> None:
        """End the fetcher, if this rank has it."""
        if self._fetcher is not None:
            self._fetcher.close()

    def _plan(self, epoch: int, batches_done: BatchesDone = ()) -> None:
        """Let what an epoch reads be fetched, after what was planned before; beside training, for it takes a second."""
        if self._planner is not None:
            # A sampler keeps what it was asked last, for the thread that asked.
            self._planner.call(partial(self._plan_now, copy(self._sampler), epoch, batches_done))

    def _plan_now(self, sampler: BucketBatchSampler, epoch: int, batches_done: BatchesDone) -> None:
        assert self._fetcher is not None
        begins = self._windows[-1].end if self._windows else 0
        left = [window for window in self._windows if window.end > self._position]
        new = sampler.windows(epoch, batches_done)
        self._windows = left + [Window([*w.units], begins + w.first, begins + w.end) for w in new]
        self._fetcher.plan(self._windows)
