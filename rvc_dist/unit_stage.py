"""What the stages share that make a file of each work unit.

Any rank, any array task and any later run can do any unit, in any order, and be killed at any moment; whoever finishes
last writes the report. Files are the only meeting point: a collective would time out on a long stage, and array tasks
have no process group.
"""

from __future__ import annotations

import contextlib
import logging
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, ClassVar, Generic, TypeVar

from rvc_dist.config import Recipe
from rvc_dist.screen import AUDIO, ProgressBar
from rvc_dist.workspace import (
    Shard,
    StageError,
    Unit,
    Workspace,
    changes,
    is_done,
    read_header,
    read_unit_file,
    remove_leftovers,
    unit_header,
)

logger = logging.getLogger(__name__)

Header = TypeVar("Header")
T = TypeVar("T")
R = TypeVar("R")


class UnitStage(ABC, Generic[Header]):
    """A stage that makes a file of each of `units`. A unit is done when its file has one of its fingerprints."""

    name: ClassVar[str]
    """On the command line and in messages."""
    folder: ClassVar[str]
    """Of the run, where the files are."""
    header: type[Header]
    """What the header of a unit's file holds."""

    def __init__(self, recipe: Recipe, units: Sequence[Unit]) -> None:
        self.recipe, self.units = recipe, units
        self.work = Workspace(recipe.run_dir, recipe.name)

    @abstractmethod
    def fingerprints(self, unit: Unit) -> Collection[str]:
        """Of the settings and sources that the unit's file may have been made from, as `stamp` in its header."""

    @abstractmethod
    def make_units(self, units: Sequence[Unit]) -> None:
        """Write the files of `units`, each of them atomically."""

    @abstractmethod
    def report(self, headers: list[Header]) -> None:
        """Write the report, given the header of every unit's file."""

    def file(self, unit: Unit) -> Path:
        """Where the unit's file is, or will be."""
        return self.work.unit_file(self.folder, unit.id)

    def is_done(self, unit: Unit) -> bool:
        return is_done(self.file(unit), *self.fingerprints(unit))

    def make(self, shard: Shard) -> None:
        """Make the units of `shard` that are not done, and the report once all are.

        Raises:
            StageError: another job replaced units meanwhile, or a unit's file is damaged.
        """
        mine = shard.take(self.units)
        # The first rank shows the whole job, others and array tasks their part.
        shown = self.units if shard.is_first and not shard.array else mine
        undone = [unit for unit in shown if not self.is_done(unit)]
        todo = [unit for unit in mine if unit in undone]
        minutes = sum(unit.duration_s for unit in self.units) / 60
        logger.info("%s: %d units of %.1f min, %d to do here", self.name, len(self.units), minutes, len(todo))
        with self.progress(shown, undone):
            self.make_units(todo)
        self.finish(shard)

    def progress(self, units: Sequence[Unit], undone: Sequence[Unit]) -> ProgressBar:
        """Of `units`, whoever makes those that are `undone`: their files tell it."""
        waiting = {unit: mtime_ns(self.file(unit)) for unit in undone}
        total_s = sum(unit.duration_s for unit in units)

        def look(bar: ProgressBar) -> None:
            for unit, before in [*waiting.items()]:
                if mtime_ns(self.file(unit)) != before and (header := read_header(self.file(unit))) is not None:
                    del waiting[unit]
                    bar.num_failed += self.num_failed(header)
            bar.done = total_s - sum(unit.duration_s for unit in waiting)
            bar.text = f"{len(units) - len(waiting)}/{len(units)} units"

        return ProgressBar(self.name, total_s, AUDIO, total_s - sum(u.duration_s for u in undone), look)

    def num_failed(self, header: Mapping[str, Any]) -> int:
        """Recordings of a unit that gave nothing, given the header of its file."""
        return sum(1 for file in header.get("files", ()) if not file["clips"])

    def finish(self, shard: Shard) -> None:
        """Write the report once every unit is done, whoever did it."""
        folder = self.work.root / self.folder
        files = {self.file(unit): self.fingerprints(unit) for unit in self.units}
        left, headers = read_headers(files, self.header, self.name)
        if left and shard.does_all:
            raise StageError(
                f"{self.name}: {left} of {len(files)} units in {folder} were replaced meanwhile: another job works in "
                "this run folder with other settings or recordings;",
                "end one, then run the stage again",
            )
        if left:
            logger.info("%s: this part is done, %d units are left to others", self.name, left)
            return
        remove_leftovers(folder, len(files))
        self.report(headers)


def mtime_ns(path: Path) -> int:
    """When a file was last written, 0 where there is none."""
    with contextlib.suppress(FileNotFoundError):
        return path.stat().st_mtime_ns
    return 0


def read_headers(files: Mapping[Path, Collection[str]], kind: type[Header], stage: str) -> tuple[int, list[Header]]:
    """How many of `files` have none of their fingerprints; when all have, their headers, for which each is opened once.

    Raises:
        StageError: all have, and one is damaged.
    """
    found = {path: read_unit_file(path) for path in files}
    left = sum(read is None or read[0].get("stamp") not in files[path] for path, read in found.items())
    return left, [] if left else [unit_header(path, kind, stage, read) for path, read in found.items()]


def check_settings(folder: Path, made_with: Mapping[str, Any], settings: Mapping[str, Any], remedy: str) -> None:
    """Nothing, unless `folder` holds files of other settings than the recipe's.

    Raises:
        StageError: it does.
    """
    if differ := changes(made_with, settings, shared=True):
        raise StageError(
            f"{folder} holds {folder.name} of other settings than the recipe's:",
            f"{remedy}, or set back what differs ({differ})",
        )


def in_threads(
    count: int,
    function: Callable[[T], R],
    items: Sequence[T],
    what: str,
    unit: str,
    failed: Callable[[R], object] = lambda _: False,
) -> list[R]:
    """What `function` gives of each of `items`, in `count` threads; a bar says how far `what` is, and what `failed`."""
    with ProgressBar(what, len(items), unit) as bar:
        return in_threads_of_bar(count, function, items, bar, failed)


def in_threads_of_bar(
    count: int, function: Callable[[T], R], items: Sequence[T], bar: ProgressBar, failed: Callable[[R], object]
) -> list[R]:
    """The same of some of what a bar counts."""
    results = []
    with ThreadPoolExecutor(count) as pool:
        try:
            for result in pool.map(function, items):
                results.append(result)
                bar.advance(num_failed=bool(failed(result)))
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise
    return results


def one_ahead(function: Callable[[T], R], items: Iterable[T]) -> Iterator[R]:
    """What `function` gives of each of `items`, in a thread that is at most one item ahead."""
    with ThreadPoolExecutor(1) as pool:
        begun: deque[Future[R]] = deque()
        for item in items:
            begun.append(pool.submit(function, item))
            if len(begun) > 1:
                yield begun.popleft().result()
        yield from (future.result() for future in begun)
