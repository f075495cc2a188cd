"""Which recordings a conversion takes, and where the result of each goes."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from rvc_dist.config import InferConfig
from rvc_dist.data.decode import AUDIO_SUFFIXES
from rvc_dist.data.sources import KINDS
from rvc_dist.workspace import Shard, StageError, fingerprint, listed

logger = logging.getLogger(__name__)


class Job(NamedTuple):
    """A recording and the file that it becomes."""

    source: Path
    target: Path

    @property
    def failure_file(self) -> Path:
        """Why a rank could not convert it, for the rank that tells it."""
        return self.target.with_name(f".{fingerprint(self.target.name)}.failed")


def list_jobs(config: InferConfig) -> list[Job]:
    """Every recording of infer.input with its result's file, in the order in which they are given.

    Raises:
        StageError: something is not there, a folder holds no recording, or a result would replace another one or a
            recording.
    """
    given = [config.input] if isinstance(config.input, str) else list(config.input)
    output, many = Path(config.output), len(given) > 1 or os.path.isdir(given[0])
    is_folder = config.output.endswith("/") or not output.suffix or os.path.isdir(output)
    if many and not is_folder:
        raise StageError(f"infer.output: got {output} for several recordings;", "expected a folder, such as converted/")
    jobs = []
    for source in map(Path, given):
        if os.path.isdir(source):  # which is never an error, as `is_dir` may be
            found = _recordings_in(source, output)
            jobs += [Job(path, output / path.relative_to(source).with_suffix(f".{config.format}")) for path in found]
        elif os.path.isfile(source):
            jobs.append(Job(source, output / f"{source.stem}.{config.format}" if is_folder else output))
        else:
            raise StageError(f"infer.input: {source} {'is not a file' if os.path.exists(source) else 'does not exist'}")
    _check_targets(jobs)
    return jobs


def _recordings_in(folder: Path, output: Path) -> list[Path]:
    """The recordings below `folder` in a fixed order, without hidden ones and what conversions wrote to `output`.

    Raises:
        StageError: there are none, a folder cannot be read, or `output` is the folder itself.
    """
    if os.path.realpath(output) == os.path.realpath(folder):
        raise StageError(f"infer.output: {output} is the folder of infer.input itself;", "give another folder")
    paths = sorted(_files_below(folder, os.path.realpath(output)))
    others = [(str(path), "no recording by its name") for path in paths if path.suffix.lower() not in AUDIO_SUFFIXES]
    found = [path for path in paths if path.suffix.lower() in AUDIO_SUFFIXES]
    if not found:
        raise StageError(
            f"infer.input: {folder} holds no recording;", f"expected files of the kinds {KINDS}", listed(others)
        )
    if others:
        logger.warning("infer: %d files in %s are left out:%s", len(others), folder, listed(others))
    return found


def _files_below(folder: Path, output: str) -> Iterator[Path]:
    def unreadable(error: OSError) -> None:  # os.walk would pass over it
        raise StageError(f"infer.input: {error.filename} cannot be read ({error.strerror})") from error

    for here, folders, names in os.walk(folder, onerror=unreadable):
        folders[:] = [f for f in folders if not f.startswith(".") and os.path.realpath(Path(here, f)) != output]
        yield from (Path(here, name) for name in names if not name.startswith("."))


def _check_targets(jobs: list[Job]) -> None:
    """Nothing, if every result has a place of its own.

    Raises:
        StageError: one would replace another, or a recording.
    """
    sources = {os.path.realpath(job.source): job.source for job in jobs}
    taken: dict[str, Path] = {}
    for source, target in jobs:
        place = os.path.realpath(target)
        if place in sources:
            raise StageError(f"infer.output: {target} is infer.input itself;", "give the result another name")
        if place in taken:
            raise StageError(
                f"infer.output: {taken[place]} and {source} would both become {target};",
                "give one of them another name, or convert them into folders of their own",
            )
        taken[place] = source


def share_of(jobs: list[Job], shard: Shard) -> list[Job]:
    """This process's jobs: the same of a list for every process, large and small recordings spread over all."""
    by_size = sorted(jobs, key=lambda job: (-job.source.stat().st_size, str(job.source)))
    mine = set(by_size[shard.index :: shard.count])
    return [job for job in jobs if job in mine]
