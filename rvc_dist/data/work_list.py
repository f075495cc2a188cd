"""The work list of a run: one pass over all recordings for lengths, rates and contents, shared by all ranks and tasks.

What the pass has found of PART recordings is a file, so it goes on after a kill. Everybody begins with their own parts
and goes on with those that nobody has done yet: array tasks wait for nobody, and whoever comes last finds all of it.
"""

from __future__ import annotations

import contextlib
import logging
import math
import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from operator import itemgetter
from pathlib import Path
from typing import Any, TypedDict, TypeVar

from rvc_dist.config import Recipe
from rvc_dist.data import decode
from rvc_dist.data.clip_files import SINCE, clip_settings
from rvc_dist.data.corpora import located
from rvc_dist.data.cutting import cut_file, make_gate, placed
from rvc_dist.data.loudness import LoudnessMeter
from rvc_dist.data.sources import Corpus, check_recordings, content_by, listing_of, read_corpus
from rvc_dist.files import STALE_TMP_S, atomic_write, write_json
from rvc_dist.schema import Count, OsName, Seconds
from rvc_dist.screen import ProgressBar
from rvc_dist.unit_stage import in_threads, in_threads_of_bar, mtime_ns
from rvc_dist.workspace import (
    Shard,
    SourceFile,
    Speakers,
    StageError,
    WorkList,
    Workspace,
    changes,
    cut_units,
    fingerprint,
    listed,
    printable,
    read_json,
    wait_for,
)

logger = logging.getLogger(__name__)

PART = 256
"""Recordings of a file of the pass; of no more, one process does it all and writes none."""

MAX_NAMES = 50
"""Speakers whose names are shown."""

T = TypeVar("T")
R = TypeVar("R")


class Level(TypedDict):
    """The most LUFS that a recording bears, and the clip that bears no more."""

    most: float
    where: OsName


@dataclass(frozen=True)
class Facts:
    """What the pass finds in a file."""

    duration_s: Seconds
    rate: Count
    content: OsName
    reason: OsName
    """Why it cannot be used."""


def nothing_usable(recipe: Recipe, reasons: list[tuple[str, str]]) -> StageError:
    return StageError(
        f"preprocess: none of the {len(reasons)} files in {recipe.data.audio_dir} gave a clip{listed(reasons)}"
    )


def missing_decoder(file: SourceFile, error: Exception) -> StageError:
    """A recording that may be good is no reason to go on without it: another rank, or the next run, would have it."""
    return StageError(f"preprocess: {printable(file.path)}: {error}; or take it out of the dataset")


class SharedPass:
    """Work on every recording that all processes do together, through files in a `folder` of its own."""

    def __init__(self, folder: Path, shard: Shard, num_threads: int, is_over: Callable[[], bool]) -> None:
        self.folder, self.shard, self.num_threads, self.is_over = folder, shard, num_threads, is_over

    def map(
        self,
        name: str,
        items: Sequence[T],
        function: Callable[[T], R],
        kind: Any,
        failed: Callable[[R], object],
    ) -> list[R] | None:
        """What `function` gives of each of `items`, plain data of a `kind`; None where others will have used it."""
        if len(items) <= PART:
            if not (self.shard.is_first or self.shard.array):
                return None
            return in_threads(self.num_threads, function, items, f"preprocess: {name}", "recordings", failed)
        parts = [items[at : at + PART] for at in range(0, len(items), PART)]
        index, count = self.shard.index, self.shard.count
        files = [self.folder / f"{name}_{number:05d}.json" for number in range(len(parts))]
        # The own parts first; then the others', each process from another place on.
        order = sorted(range(len(parts)), key=lambda number: (number % count != index, (number - index) % len(parts)))
        with ProgressBar(f"preprocess: {name}", len(items), "recordings") as bar:
            for number in order:
                if not files[number].is_file():
                    if self._has_ended():
                        return None
                    results = in_threads_of_bar(self.num_threads, function, parts[number], bar, failed)
                    # The folder was removed meanwhile, as below: also between mkdir's error and its look at it.
                    with contextlib.suppress(FileNotFoundError, FileExistsError):
                        write_json(files[number], results)
                else:
                    bar.advance(len(parts[number]))
        try:
            return [result for file in files for result in read_json(file, list[kind])]
        except FileNotFoundError:  # somebody has come to the end, and has removed them
            if self._has_ended():
                return None
            raise

    def _has_ended(self) -> bool:
        if is_over := self.is_over():
            self.remove()  # what was written since
        return is_over

    def remove(self) -> None:
        """Its files, and those of passes that came to no end and are old."""
        shutil.rmtree(self.folder, ignore_errors=True)
        with contextlib.suppress(OSError):  # others remove them at the same time
            for path in self.folder.parent.glob("*"):
                if time.time() - path.stat().st_mtime > STALE_TMP_S:
                    shutil.rmtree(path, ignore_errors=True)
            self.folder.parent.rmdir()


def make_work_list(recipe: Recipe, work: Workspace, shard: Shard) -> WorkList:
    """The work list: read when it is current, else made by the first rank (by every array task alike).

    Raises:
        StageError: there is nothing to cut, or the run was trained on other recordings.
    """
    work.check_root()
    corpus = read_corpus(Path(recipe.data.audio_dir), work)
    current = partial(_current, recipe, work, corpus)
    if work_list := current():
        if shard.is_first or shard.array:
            work.save_speakers(corpus.speakers)
        return work_list
    return _made(recipe, work, corpus, shard) or wait_for("the work list of rank 0", current)


def _current(recipe: Recipe, work: Workspace, corpus: Corpus) -> WorkList | None:
    """The work list, if it is that of the recipe and of the corpus as it is now."""
    work_list = WorkList.load(work.work_list_file)
    wanted = listing_of(corpus.sources), clip_settings(recipe)
    if work_list is None or (work_list.listing, work_list.settings) != wanted:
        return None
    # The corpus's recordings and no others, whatever somebody wrote into the list.
    usable = {(f.listed, f.repeat) for f in corpus.sources if not f.reason}
    cut = {(f.listed, f.repeat) for unit in work_list.units for f in unit.files}
    return work_list if cut <= usable <= cut | {(f.listed, f.repeat) for f in work_list.excluded} else None


def _made(recipe: Recipe, work: Workspace, corpus: Corpus, shard: Shard) -> WorkList | None:
    """The new work list, written; None where another process writes it."""
    leads = shard.is_first or shard.array
    if leads and corpus.about:
        logger.info("data.audio_dir: %s", corpus.about)
    listing, settings = listing_of(corpus.sources), clip_settings(recipe)
    old, written_ns = WorkList.load(work.work_list_file), mtime_ns(work.work_list_file)

    def is_over() -> bool:
        return mtime_ns(work.work_list_file) != written_ns and _current(recipe, work, corpus) is not None

    folder = work.root / "survey" / fingerprint(listing, settings)
    spread = SharedPass(folder, shard, recipe.preprocess.num_workers, is_over)
    measured = _measured(recipe, corpus.sources, content_by(old, Path(recipe.data.audio_dir)), spread)
    if measured is None:
        return None
    if all(f.reason for f in measured):  # before anything of an earlier dataset in this run folder is touched
        raise nothing_usable(recipe, [(f.path, f.reason) for f in measured])
    check_recordings(work, measured, lambda f: f.content)
    units = cut_units([part for f in measured if not f.reason for part in f.slices()])
    lufs = common_loudness(recipe, [part for unit in units for part in unit.files], spread)
    if not leads or (lufs is None and is_over()):
        return None
    work.save_speakers(corpus.speakers)
    _tell_names(corpus.speakers)
    work_list = WorkList(listing, settings, units, tuple(f for f in measured if f.reason), lufs, corpus.kind)
    if old is not None and (
        why := changes(SINCE | old.made_with, SINCE | work_list.made_with) or _source_changes(old, measured)
    ):
        logger.info("preprocess: making stale clips again: %s", why)
    elif old is not None:
        logger.info("preprocess: the content of the recordings is what it was: what was made of it is kept")
    work.clips_report_file.unlink(missing_ok=True)  # `complete` must not take the old report for this work list's
    atomic_write(work.work_list_file, work_list.dumps())
    spread.remove()
    return work_list


def _tell_names(speakers: Speakers) -> None:
    if speakers.has_names:
        labels = [speakers.label(i) for i in speakers.names]
        more = f" and {len(labels) - MAX_NAMES} more" if len(labels) > MAX_NAMES else ""
        logger.info("preprocess: speakers %s%s", ", ".join(labels[:MAX_NAMES]), more)


def _measured(
    recipe: Recipe, sources: Sequence[SourceFile], content: Callable[[SourceFile], str], spread: SharedPass
) -> list[SourceFile] | None:
    """`sources` with length, rate and content, or why they have none; each file is looked at once."""
    files = {f.file: f for f in sources if not f.reason}
    items = [files[key] for key in sorted(files)]
    look = partial(_facts, Path(recipe.data.audio_dir), content)
    facts = spread.map("content", items, look, Facts, itemgetter("reason"))
    if facts is None:
        return None
    found = dict(zip(sorted(files), facts, strict=True))
    return [f if f.reason else _with_facts(f, found[f.file]) for f in sources]


def _facts(audio_dir: Path, content: Callable[[SourceFile], str], file: SourceFile) -> dict[str, Any]:
    """`Facts` of a file."""
    try:
        with located(audio_dir, file.path) as path, decode.opened(path) as recording:
            length_s, rate = round(recording.duration_s, 6), recording.rate
        return asdict(Facts(length_s, rate, content(file), ""))
    except decode.MissingDecoderError as error:
        raise missing_decoder(file, error) from error
    except (decode.AudioError, OSError) as error:
        return asdict(Facts(0.0, 0, "", str(error)))


def _with_facts(file: SourceFile, facts: dict[str, Any]) -> SourceFile:
    if facts["reason"]:
        return file.refused(facts["reason"])
    try:
        return replace(placed(file, facts["duration_s"]), rate=facts["rate"], content=facts["content"])
    except decode.AudioError as error:
        return file.refused(str(error))


def common_loudness(recipe: Recipe, parts: Sequence[SourceFile], spread: SharedPass) -> float | None:
    """What preprocess.normalization lufs brings every clip to, in LUFS; None with another, and where others found it.

    The recipe's loudness, or the most at which no clip of any of `parts` peaks above -1 dB, whichever is less.
    """
    if recipe.preprocess.normalization != "lufs":
        return None
    gate, meter, wanted = make_gate(recipe), LoudnessMeter(recipe.data.sample_rate), recipe.preprocess.loudness
    as_it_is = replace(recipe, preprocess=replace(recipe.preprocess, normalization="none"))

    def most(part: SourceFile) -> list[Level]:
        try:
            clips = cut_file(as_it_is, part, gate).clips
        except decode.AudioError:
            return []
        levels = [(meter.most(clip.wave), clip.start_s) for clip in clips]
        found = ((most, f"{part.path} at {at:.1f} s") for most, at in levels if most is not None)
        return [{"most": most, "where": where} for most, where in [min(found, default=(None, ""))] if most is not None]

    levels = spread.map("loudness", parts, most, list[Level], lambda _: False)
    if levels is None:
        return None
    bearable, where = min(((level["most"], level["where"]) for some in levels for level in some), default=(0.0, ""))
    bearable = math.floor(100 * bearable) / 100
    if wanted is not None and wanted <= bearable:
        logger.info("preprocess: all clips are brought to %.2f LUFS", wanted)
        return wanted
    told = f"preprocess: all clips are brought to {bearable:.2f} LUFS, the most at which none peaks above -1 dB"
    limit = f" ({printable(where)} does there)"
    if wanted is None:
        logger.info("%s%s", told, limit)
    else:
        logger.warning("%s, not to preprocess.loudness %g%s", told, wanted, limit)
    return bearable


def _source_changes(old: WorkList, sources: list[SourceFile]) -> str:
    """What happened to the recordings since `old`, in one line with the first name of each sort; nothing if nothing."""
    before = {f.path: f for f in (*(f for unit in old.units for f in unit.files), *old.excluded)}
    after = {f.path: f for f in sources}
    sorts = {
        "new": sorted(after.keys() - before.keys()),
        "gone": sorted(before.keys() - after.keys()),
        "changed": sorted(p for p in after.keys() & before.keys() if after[p].content != before[p].content),
    }
    told = [f"{len(paths)} {sort} ({printable(paths[0])})" for sort, paths in sorts.items() if paths]
    return f"recordings in data.audio_dir: {', '.join(told)}" if told else ""
