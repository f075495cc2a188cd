"""Every path of a run folder, the work units, their fingerprints, and the one way to write a file.

A work unit is a fixed slice of the input, chosen by the work list alone. A unit is done when its file exists and
carries the fingerprint of the settings and sources that it should have been made from. Files are written under another
name and renamed, so any rank, any array task and any later run can do any unit, in any order, and be killed at any
moment.
This module imports no torch: the preprocess stage needs none.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import math
import os
import re
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, MutableMapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import chain
from pathlib import Path
from typing import Any, BinaryIO, TypedDict, TypeVar, cast, overload

from rvc_dist.config import ConfigError, Recipe, load_recipe
from rvc_dist.files import ForeignFileError, atomic_write, read_bounded, regular_size, remove_half_written, to_json
from rvc_dist.schema import (
    MAX_JSON_BYTES,
    Count,
    FileName,
    OsName,
    Positive,
    Repeat,
    Seconds,
    SpeakerId,
    SpeakerName,
    check,
    parse_json,
    record,
)
from rvc_dist.screen import ProgressBar

logger = logging.getLogger(__name__)

FORMAT_VERSION = 3
"""Part of every fingerprint: raise it when a stage's output changes for the same settings."""
DEMO_VOICE_DIR = Path(__file__).parent / "demo_voice"
DEMO_BASE_DIR = Path(__file__).parent / "demo_base"
HEADER_KEY = "rvc_dist"
"""All metadata of a safetensors file is one JSON text: the format keeps several keys in no fixed order."""
MIN_UNIT_S, MAX_UNIT_S, MAX_UNITS = 20.0, 600.0, 512
"""Bounds of a unit's length in seconds, and the count of units that a dataset is cut towards."""
MAX_PLAIN_RECORDINGS = 50_000
"""Of a work list that is one JSON text."""
MAX_WORK_LIST_BYTES = 1 << 30
"""Of one with a line a unit: about three million recordings."""
PART_SLACK_S = 0.2
"""A list may round, and headers of some formats are this much off: so far a part may reach beyond its recording."""
MAX_SLICE_S = 300.0
"""Longer recordings are cut into slices before anything is read of them: no process ever holds a whole one."""

CHECKPOINT_MANIFEST, CHECKPOINT_STATE, CHECKPOINT_RECORDINGS = "manifest.json", "state.json", "recordings.jsonl"
"""In a checkpoint's folder; the manifest is written last, and the last is there of more than MAX_PLAIN_RECORDINGS."""
RECORDINGS_A_LINE = 10_000

T = TypeVar("T")


class StageError(RuntimeError):
    """A stage cannot do its work: what is wrong and where, what to do, and what is listed below both."""

    def __init__(self, what: str, remedy: str = "", listed: str = "") -> None:
        super().__init__(what, remedy, listed)  # so that it can be pickled
        self.what = (what.rstrip(":;.") if remedy else what) + listed
        self.remedy = remedy
        self._text = f"{what} {remedy}".rstrip() + listed

    def __str__(self) -> str:
        return self._text


class OtherRankError(StageError):
    """This rank ends because another one failed, which has said why."""


class Stopped(RuntimeError):  # noqa: N818 - no error: the run goes on later
    """The run was asked to stop and saved a checkpoint; the same command continues it.

    Where one of several nodes was asked to (`of_node`), the launchers of the others start their ranks again.
    """

    def __init__(self, message: str = "", of_node: bool = False) -> None:
        super().__init__(message)
        self.of_node = of_node


class Speaker(TypedDict):
    """As RVC-WebUI writes `speaker_info`."""

    id: SpeakerId
    name: SpeakerName


@dataclass(frozen=True)
class Speakers:
    """Who speaks in a run: RUN/speakers.json, and as much of it as a checkpoint or a voice file keeps."""

    names: dict[int, str] = field(default_factory=dict)
    """By id, rising. Who was given no name is called by the id."""
    trained: tuple[int, ...] = ()
    """Rising ids of those whom the networks heard."""

    @classmethod
    def of(cls, info: Iterable[Speaker], trained: Iterable[int] = ()) -> Speakers:
        """Raises ForeignFileError when two have one id or one name."""
        listed, trained = list(info), sorted(set(trained))
        names = {s["id"]: s["name"] for s in listed}
        if len({*names.values()}) < len(listed):
            raise ForeignFileError("speakers: two have one id, or one name")
        return cls(dict(sorted(({i: str(i) for i in trained} | names).items())), tuple(trained))

    @property
    def info(self) -> list[Speaker]:
        return [{"id": i, "name": name} for i, name in self.names.items()]

    @property
    def has_names(self) -> bool:
        """Whether anybody was given a name."""
        return any(name != str(i) for i, name in self.names.items())

    @property
    def trained_info(self) -> list[Speaker]:
        """For a voice file: those who were trained, if there are several or one was given a name."""
        found = [speaker for speaker in self.info if speaker["id"] in self.trained]
        return found if len(found) > 1 or self.has_names else []

    def label(self, speaker: int) -> str:
        """For a sentence: the id, and the name where there is one."""
        name = self.names.get(speaker, str(speaker))
        return name if name == str(speaker) else f"{speaker} ({name})"


@contextlib.contextmanager
def noted(notes: list[str], about: str = "") -> Iterator[None]:
    """Inside, what cannot be read becomes one of `notes`, behind what it is `about`: the rest is worth showing."""
    try:
        yield
    except (StageError, ForeignFileError, OSError) as error:
        notes.append(f"{about}{error}")


def list_checkpoints(folder: Path) -> list[Path]:
    """The checkpoints below `folder`, oldest first; copies that a user made under other names are none."""
    return sorted(path for path in folder.glob("step_" + 8 * "[0-9]") if path.is_dir())


class Workspace:
    """The paths of one run folder. Nothing is created until something is written."""

    def __init__(self, run_dir: str | Path, name: str) -> None:
        self.root = Path(run_dir)
        self.name = name
        self.config_file = self.root / "config.yaml"
        self.speakers_file = self.root / "speakers.json"
        self.clips_dir = self.root / "clips"
        self.work_list_file = self.clips_dir / "plan.json"
        self.clips_report_file = self.clips_dir / "report.json"
        self.features_dir = self.root / "features"
        self.features_report_file = self.features_dir / "report.json"
        self.mute_file = self.features_dir / "mute.safetensors"
        self.index_dir = self.root / "index"
        self.vectors_file = self.index_dir / "total_fea.npy"
        self.index_report_file = self.index_dir / "report.json"
        self.checkpoints_dir = self.root / "checkpoints"
        self.pretrained_dir = self.root / "pretrained"
        self.compile_file = self.root / "compile.json"
        self.requeue_file = self.root / "requeue.json"
        self.tensorboard_dir = self.root / "tensorboard"
        self.events_dir = self.tensorboard_dir / name
        """Of this run: TensorBoard calls a run by its folder."""
        self.history_file = self.root / "metrics.jsonl"
        """See `report.history`."""
        self.samples_dir = self.root / "samples"
        self.voice_dir = self.root / "voice"
        self.last_voice_file = self.voice_dir / f"{name}_last.pth"
        self.logs_dir = self.root / "logs"
        self.hanging_file = self.logs_dir / "hanging"
        """Which ranks of a training run are to be ended by their guards."""
        self.train_lock_file = self.root / "train.lock"

    def unit_file(self, folder: str, unit: int) -> Path:
        return self.root / folder / f"{unit:05d}.safetensors"

    def clips_file(self, unit: int) -> Path:
        return self.unit_file("clips", unit)

    def features_file(self, unit: int) -> Path:
        return self.unit_file("features", unit)

    def rank_log(self, rank: int) -> Path:
        """All that a rank logged, of every stage."""
        return self.logs_dir / f"rank_{rank:05d}.log"

    def beat_file(self, rank: int) -> Path:
        """Where a rank of a training run is, while it runs."""
        return self.logs_dir / f"rank_{rank:05d}.beat"

    def job_file(self, rank: int) -> Path:
        """Which command a rank runs or ran last."""
        return self.logs_dir / f"rank_{rank:05d}.job"

    def failure_file(self, rank: int) -> Path:
        """Why a rank failed, of the last stage that it ran."""
        return self.logs_dir / f"failed_rank_{rank:05d}.json"

    def failure_files(self) -> list[Path]:
        """Those of all ranks, of this command and of earlier ones."""
        return sorted(self.logs_dir.glob("failed_rank_*.json"))

    def check_root(self) -> None:
        """Nothing, unless the run folder is a file.

        Raises:
            StageError: it is.
        """
        if self.root.exists() and not self.root.is_dir():
            raise StageError(f"run_dir: {self.root} is a file;", "expected a folder, or a name that is free")

    def trained_on(self) -> tuple[Path, TrainedOn]:
        """The newest whole checkpoint and the data that it knows; nothing where there is none that says it."""
        path, state = self._newest_state()
        with contextlib.suppress(StageError, OSError):  # whoever goes on from it says it
            return path, whole_data(path, state.get("data", {}))
        return path, {}

    def unit_headers(self) -> Iterator[tuple[int, Path, FeaturesHeader]]:
        """Of every unit that has features: its number, its file for messages, and what is in it.

        Raises:
            StageError: one is damaged.
        """
        for path in unit_files(self.features_dir):
            yield int(path.stem), path, unit_header(path, FeaturesHeader, "extract")

    def heard_speakers(self) -> list[int]:
        """Those whom the newest whole checkpoint was trained on."""
        return list(self._newest_state()[1].get("trained_speakers", []))

    def _newest_state(self) -> tuple[Path, dict[str, Any]]:
        whole = [p for p in list_checkpoints(self.checkpoints_dir) if (p / CHECKPOINT_MANIFEST).is_file()]
        with contextlib.suppress(StageError, OSError):  # whoever goes on from it says it
            if whole:
                return whole[-1], read_json(whole[-1] / CHECKPOINT_STATE, KnowingState)
        return self.checkpoints_dir, {}

    def speakers(self) -> Speakers:
        """Who speaks in this run; without a file, as of older versions of rvc_dist, as the newest checkpoint says.

        Raises:
            StageError: the file is damaged.
        """
        path, remedy = self.speakers_file, "put it right, or delete it and run `rvc-dist preprocess` again"
        if path.is_file():
            data = read_json(path, SpeakersFile, remedy)
            info, trained = data.get("speakers", []), data.get("trained", [])
        else:
            path, state = self._newest_state()
            info, trained = state.get("speaker_info", []), state.get("trained_speakers", [])
        try:
            return Speakers.of(info, trained)
        except ForeignFileError as error:
            raise StageError(f"{path}: {error};", remedy) from error

    def save_speakers(self, speakers: Speakers) -> None:
        """Write speakers.json, if that changes what is in it: any process that lists the recordings may do it."""
        text = to_json({"speakers": speakers.info, "trained": speakers.trained})
        if not self.speakers_file.is_file() or self.speakers_file.read_text(encoding="utf-8") != text:
            atomic_write(self.speakers_file, text)

    def save_recipe(self, recipe: Recipe, reads_recordings: bool = False) -> None:
        """Keep the resolved recipe with the run; the stages that make what the run consists of do so.

        What the clips were cut from stays in it until a stage that reads recordings has cut others.
        """
        self.check_name()
        kept = self.kept_recipe()
        if kept is not None and not reads_recordings and kept.data.audio_dir != recipe.data.audio_dir:
            told = f"{self.config_file} keeps; for those of {recipe.data.audio_dir} run `rvc-dist preprocess`"
            logger.warning("data.audio_dir: the clips were cut from %s, which %s", kept.data.audio_dir, told)
            recipe = replace(recipe, data=replace(recipe.data, audio_dir=kept.data.audio_dir))
        atomic_write(self.config_file, recipe.to_yaml())

    def check_name(self) -> None:
        """Nothing, unless the run folder is that of another voice.

        Raises:
            StageError: it is; a folder has one name, by which its files are called.
        """
        kept = self.kept_recipe()
        if kept is not None and kept.name != self.name:
            raise StageError(
                f"run_dir: {self.root} is the run of {kept.name}, the recipe's name is {self.name};",
                f"give another run_dir, or to call the voice otherwise change the name in {self.config_file} too",
            )

    def kept_recipe(self) -> Recipe | None:
        """RUN/config.yaml, or None where there is none that this version reads."""
        with contextlib.suppress(ConfigError):
            return load_recipe(self.config_file) if self.config_file.is_file() else None
        return None

    def index_file(self, speaker: int | None = None) -> Path | None:
        """The run's retrieval index: of a `speaker` where there is one, else of all; None when there is neither."""
        if not self.index_report_file.is_file():
            return None
        report = read_json(self.index_report_file, IndexReport)
        own = [entry["file"] for entry in report.get("speakers", []) if entry["speaker"] == speaker]
        paths = (self.index_dir / name for name in [*own, report.get("file")] if name is not None)
        return next((path for path in paths if path.is_file()), None)


class ByRecording(TypedDict, total=False):
    """What grows with the recordings; a line of CHECKPOINT_RECORDINGS."""

    recordings: dict[str, OsName]
    held_from_s: dict[str, Seconds]


class TrainedOn(ByRecording, total=False):
    """`fingerprint.of_data`; empty where an older version wrote it."""

    train: str
    validation: str
    dataset_length: str
    holdout: list[float]
    balance: float
    window_frames: Count
    in_file: dict[str, Count]
    """How many entries of ByRecording are in CHECKPOINT_RECORDINGS, where they are."""


def split_data(data: Mapping[str, Any]) -> tuple[dict[str, Any], Iterator[str]]:
    """What a checkpoint's STATE keeps of `data`, and the lines of CHECKPOINT_RECORDINGS, where it has to be there."""
    keys = [key for key in ByRecording.__annotations__ if key in data]
    if len(data.get("recordings", ())) <= MAX_PLAIN_RECORDINGS:
        return dict(data), iter(())
    kept = {key: value for key, value in data.items() if key not in keys}
    parts = ((key, part) for key in keys for part in in_parts(list(data[key].items()), RECORDINGS_A_LINE))
    lines = (json.dumps({key: dict(part)}) + "\n" for key, part in parts)
    return kept | {"in_file": {key: len(data[key]) for key in keys}}, lines


def in_parts(values: Sequence[T], most: int) -> Iterator[Sequence[T]]:
    """`values` in order, at most so many at once."""
    return (values[first : first + most] for first in range(0, len(values), most))


def whole_data(path: Path, data: TrainedOn) -> TrainedOn:
    """`data` of the state of the checkpoint in `path`, with what it keeps in a file of its own.

    Raises:
        StageError: that is missing or damaged.
    """
    if "in_file" not in data:
        return data
    file, found = path / CHECKPOINT_RECORDINGS, {key: dict[str, Any]() for key in data["in_file"]}
    try:
        if regular_size(file) > MAX_WORK_LIST_BYTES:
            raise ForeignFileError(f"more than {MAX_WORK_LIST_BYTES} bytes")
        with file.open("rb") as stream:
            for key, values in (item for part in json_lines(stream, ByRecording) for item in part.items()):
                found[key].update(cast(Any, values))
        if {key: len(values) for key, values in found.items()} != data["in_file"]:
            raise ForeignFileError("other recordings than its checkpoint says")
    except (ForeignFileError, FileNotFoundError, KeyError) as error:
        raise StageError(f"{file}: {error};", f"remove {path.name} to go on from the one before") from error
    return cast(TrainedOn, {**{k: v for k, v in data.items() if k != "in_file"}, **found})


SpeakersFile = record(False, speakers=list[Speaker], trained=list[SpeakerId])
"""RUN/speakers.json."""
KnowingState = record(False, data=TrainedOn, speaker_info=list[Speaker], trained_speakers=list[SpeakerId])
"""Of a checkpoint's STATE, what is read without its networks."""


class IndexOfSpeaker(TypedDict):
    speaker: SpeakerId
    file: FileName


IndexReport = record(False, stamp=str, file=FileName, speakers=list[IndexOfSpeaker])
"""RUN/index/report.json, as far as it is read; `file` is of all speakers."""
ClipsReport = record(total_dataset_duration=str)
"""RUN/clips/report.json, as far as it is read."""


class ClipEntry(TypedDict):
    """A clip in the header of a unit's file."""

    speaker: SpeakerId
    source: OsName
    start_s: Seconds


class SlicedClip(ClipEntry, total=False):
    slice_s: Seconds
    content: str
    repeat: Repeat
    guessed: bool
    """start_s is only what the clip's number and those before it tell, as in an import."""
    clipped: Count
    """Samples that lay beyond full scale, where its format ends."""


class Rates(TypedDict, total=False):
    """Of a recording, in Hz; an import does not tell them."""

    sample_rate: Count
    effective_rate: Count


class FileEntry(Rates):
    """What became of a recording, or a slice of one."""

    path: OsName
    speaker: SpeakerId
    seconds_in: Seconds
    clips: Count
    seconds_out: Seconds
    reason: OsName
    lost: dict[str, Seconds]


class ClipsHeader(TypedDict):
    """Of a clips file: what is in it."""

    stamp: str
    sample_rate: Positive
    clips: list[SlicedClip]
    files: list[FileEntry]


class FeaturesClip(SlicedClip):
    num_samples: Count
    num_content: Count
    num_f0: Count


class EmbedderUsed(TypedDict):
    name: str
    hash: str | None
    width: Positive


class FeaturesHeader(TypedDict):
    """Of a features file."""

    stamp: str
    sample_rate: Positive
    embedder: EmbedderUsed
    clips: list[FeaturesClip]


MuteHeader = record(stamp=str, num_samples=Count, num_content=Count, num_f0=Count)
"""Of the silent clip's features."""
FeaturesReport = record(settings=record(False, embedder=EmbedderUsed), clips=str, content_frames=Count)
"""RUN/features/report.json."""


@dataclass(frozen=True)
class SourceFile:
    """One recording of the dataset, or a slice of a long one.

    `path` is relative to the dataset folder, `reason` why the recording is left out.
    """

    path: OsName
    speaker: Count
    size: Count
    mtime_ns: int
    duration_s: Seconds = 0.0
    reason: OsName = ""
    start_s: Seconds = 0.0
    is_last: bool = True
    """The last slice goes to the end of the recording, which may be later than its header says."""
    content: str = ""
    """A hash of the file, by which a copy is known to be the same; nothing where it was not read."""
    rate: int = 0
    """Of the recording, in Hz."""
    from_s: Seconds = 0.0
    to_s: Seconds = 0.0
    """What the corpus takes of the recording; 0: to its end."""
    repeat: Repeat = 1
    """How often each of its clips counts in an epoch."""
    where: OsName = field(default="", compare=False)
    """Its place in a list, for reasons; no file keeps it."""

    @property
    def file(self) -> tuple[str, int, int]:
        """What a changed file changes, without opening it."""
        return self.path, self.size, self.mtime_ns

    @property
    def listed(self) -> tuple[Any, ...]:
        """The same of this part of it, and of whose it is."""
        part = (self.from_s, self.to_s) if self.from_s or self.to_s else ()
        return self.path, self.speaker, self.size, self.mtime_ns, *part

    @property
    def identity(self) -> tuple[Any, ...]:
        """What clips depend on."""
        content = self.content or f"{self.size} bytes at {self.mtime_ns} ns"
        return self.path, self.speaker, content, self.start_s, *self.listed[4:]

    def refused(self, reason: str) -> SourceFile:
        """With a reason why it cannot be used, which begins with its place in a list."""
        return replace(self, reason=f"{self.where}: {reason}" if self.where else reason)

    def part_of(self, length_s: float) -> SourceFile:
        """With its place in the recording, given the recording's length.

        Raises:
            ValueError: it does not lie within the recording; the message is the reason.
        """
        told, most_s = f"the recording has {length_s:.2f} s", length_s + PART_SLACK_S
        if self.from_s >= length_s or self.to_s > most_s:
            place = f"begins at {self.from_s:g} s" if self.from_s >= length_s else f"ends at {self.to_s:g} s"
            raise ValueError(f"{place}, {told}")
        end_s = min(self.to_s or length_s, length_s)
        seconds = round(end_s - self.from_s, 6)
        return replace(self, start_s=self.from_s, duration_s=seconds, is_last=not self.to_s)

    def to_plain(self) -> dict[str, Any]:
        """For the work list, where what is of corpora alone stands only if it says something."""
        return {k: v for k, v in vars(self).items() if k != "where" and _OF_CORPORA.get(k) != v}

    def slices(self) -> list[SourceFile]:
        """The recording in equal slices of at most MAX_SLICE_S, which begin at whole seconds from its start on."""
        count = math.ceil(self.duration_s / MAX_SLICE_S)
        if count <= 1:
            return [self]
        step = math.ceil(self.duration_s / count)
        starts = range(0, math.ceil(self.duration_s), step)
        ends = [*starts[1:], self.duration_s]
        return [
            replace(
                self,
                start_s=round(self.start_s + at, 6),
                duration_s=round(float(end) - at, 6),
                is_last=self.is_last and at == starts[-1],
            )
            for at, end in zip(starts, ends, strict=True)
        ]


_OF_CORPORA = {"from_s": 0.0, "to_s": 0.0, "repeat": 1}


@dataclass(frozen=True)
class Unit:
    """A fixed slice of the dataset."""

    id: int
    files: tuple[SourceFile, ...]

    @cached_property
    def duration_s(self) -> float:
        return sum(f.duration_s for f in self.files)

    def fingerprint(self, settings: Mapping[str, Any]) -> str:
        return fingerprint(settings, [f.identity for f in self.files])


class OldWorkListFile(TypedDict):
    version: int
    listing: str
    settings: dict[str, Any]
    units: list[list[SourceFile]]
    excluded: list[SourceFile]


class WorkListFile(OldWorkListFile, total=False):
    """RUN/clips/plan.json."""

    lufs: float
    corpus: str
    excluded_lines: Positive
    """The last so many lines, of a file of several: none holds more than a text may."""


@dataclass(frozen=True)
class WorkList:
    """The work list of a run: the same for every rank, since it depends on the dataset folder alone."""

    listing: str
    """Stamp of the folder's listing."""
    settings: dict[str, Any]
    """The settings that the clips depend on, to say what changed."""
    units: tuple[Unit, ...]
    excluded: tuple[SourceFile, ...]
    """Files that no unit holds, each with its reason."""
    lufs: float | None = None
    """The loudness that all clips are brought to, where they are; it depends on all recordings."""
    corpus: str = ""
    """What the folder was recognised as; nothing for folders by speaker."""

    @property
    def made_with(self) -> dict[str, Any]:
        """What the clips of a unit depend on besides its recordings."""
        return self.settings | ({} if self.lufs is None else {"lufs": self.lufs})

    @property
    def imported_from(self) -> str | None:
        """The experiment of another tool that the clips come from; None when preprocess cuts them."""
        return self.settings["data.audio_dir"] if "imported" in self.settings else None

    def fingerprints(self) -> dict[Unit, str]:
        """Of every unit's clips."""
        return {unit: unit.fingerprint(self.made_with) for unit in self.units}

    def undone(self, work: Workspace) -> list[Unit]:
        """The units whose clips are still to be made."""
        return [u for u, wanted in self.fingerprints().items() if not is_done(work.clips_file(u.id), wanted)]

    def dumps(self) -> str:
        """As one JSON text; of more recordings than one can hold, as a line a unit below a line of all else."""
        groups = [[f.to_plain() for f in files] for files in (*(unit.files for unit in self.units), self.excluded)]
        data: dict[str, Any] = {"version": FORMAT_VERSION, "listing": self.listing, "settings": self.settings}
        more: dict[str, Any] = {"lufs": self.lufs, "corpus": self.corpus or None}
        more = {key: value for key, value in more.items() if value is not None}
        if sum(map(len, groups)) <= MAX_PLAIN_RECORDINGS:
            return to_json(data | {"units": groups[:-1], "excluded": groups[-1]} | more)
        *groups, excluded = groups
        last = list(in_parts(excluded, RECORDINGS_A_LINE)) or [[]]
        more |= {"excluded_lines": len(last)} if len(last) > 1 else {}
        return "".join(
            json.dumps(line) + "\n" for line in (data | {"units": [], "excluded": []} | more, *groups, *last)
        )

    @classmethod
    def load(cls, path: Path) -> WorkList | None:
        """The work list in `path`, or None when there is none of this version.

        Raises:
            StageError: it is damaged.
        """
        if not path.is_file():
            return None
        try:
            if (data := _work_list_text(path))["version"] != FORMAT_VERSION:
                return None
            check(data, WorkListFile)
        except (ForeignFileError, KeyError) as error:
            raise StageError(
                f"{path}: not a work list of ours ({error});", "delete it and run the stage again"
            ) from error
        units, excluded = data["units"], data["excluded"]
        made = tuple(Unit(i, tuple(SourceFile(**f) for f in files)) for i, files in enumerate(units))
        kept = tuple(SourceFile(**f) for f in excluded)
        return cls(data["listing"], data["settings"], made, kept, data.get("lufs"), data.get("corpus", ""))


def _work_list_text(path: Path) -> dict[str, Any]:
    """What is in a work list of either form, not judged yet."""
    with path.open("rb") as file:
        head = file.readline(MAX_JSON_BYTES)
        if head.rstrip() in (b"{", b"") or not file.peek(1):
            return {"version": None} | read_json(path)
        if regular_size(path) > MAX_WORK_LIST_BYTES:
            raise ForeignFileError(f"more than {MAX_WORK_LIST_BYTES} bytes")
        data: dict[str, Any] = parse_json(head, dict)
        lines = list(json_lines(file, list[Any]))
        num_units = len(lines) - check(data.get("excluded_lines", 1), Positive)
        data["units"], data["excluded"] = lines[:num_units], list(chain.from_iterable(lines[num_units:]))
        return {"version": None} | data


def json_lines(stream: BinaryIO, kind: type[T]) -> Iterator[T]:
    """What each line of a file holds.

    Raises:
        ForeignFileError: one is something else.
    """
    return (parse_json(line, kind) for line in iter(lambda: stream.readline(MAX_JSON_BYTES), b""))


def cut_units(files: Sequence[SourceFile]) -> tuple[Unit, ...]:
    """Consecutive runs of `files` of about equal duration; the world size has no say in it."""
    total_s = sum(f.duration_s for f in files)
    target_s = min(MAX_UNIT_S, max(MIN_UNIT_S, total_s / MAX_UNITS))
    units: list[Unit] = []
    current: list[SourceFile] = []
    length_s = 0.0
    for file in files:
        current.append(file)
        length_s += file.duration_s
        if length_s >= target_s:
            units.append(Unit(len(units), tuple(current)))
            current, length_s = [], 0.0
    if current:
        units.append(Unit(len(units), tuple(current)))
    return tuple(units)


def adopt_slurm_ranks(environment: MutableMapping[str, str]) -> None:
    """Under plain srun, one task a rank and no launcher: set what a launcher would set.

    Only srun itself sets SLURM_STEP_NUM_TASKS: a batch script is no rank.
    """
    count, rank = environment.get("SLURM_STEP_NUM_TASKS", "1"), environment.get("SLURM_PROCID", "")
    if "RANK" in environment or "WORLD_SIZE" in environment or count == "1" or not rank:
        return
    environment.update(RANK=rank, WORLD_SIZE=count, LOCAL_RANK=environment.get("SLURM_LOCALID", "0"))
    per_node = tasks_per_node(environment.get("SLURM_STEP_TASKS_PER_NODE", ""))
    node = int(environment.get("SLURM_NODEID", "0"))
    if node < len(per_node):
        environment["LOCAL_WORLD_SIZE"] = str(per_node[node])


def tasks_per_node(text: str) -> list[int]:
    """SLURM's `2(x3),1` -> [2, 2, 2, 1]."""
    parts = re.findall(r"(\d+)(?:\(x(\d+)\))?", text)
    return [int(count) for count, times in parts for _ in range(int(times or 1))]


@dataclass(frozen=True)
class Shard:
    """Which part of a list of units this process does: part `index` of `count`."""

    index: int = 0
    count: int = 1
    array: bool = False
    """True for `--shard`: the other parts may run at any time, or never, so nobody is waited for."""

    @classmethod
    def from_environment(cls) -> Shard:
        """The rank that the launcher gave this process; no process group is needed for it."""
        return cls(int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1")))

    @classmethod
    def parse(cls, text: str) -> Shard:
        """`I/N`, with 0 <= I < N, as `--shard` takes it."""
        left, _, right = text.partition("/")
        if not (text.isascii() and left.isdecimal() and right.isdecimal() and int(left) < int(right)):
            raise ValueError(f"--shard: got {text!r}, expected I/N with 0 <= I < N, such as 0/8")
        return cls(int(left), int(right), array=True)

    @property
    def is_first(self) -> bool:
        return self.index == 0

    @property
    def does_all(self) -> bool:
        """Whether nobody else does a part."""
        return self.count == 1 and not self.array

    def take(self, units: Sequence[Unit]) -> list[Unit]:
        """This process's units, the longest first, so that all finish at about the same time."""
        ordered = sorted(units, key=lambda unit: (-unit.duration_s, unit.id))
        return ordered[self.index :: self.count]


def fingerprint(*parts: Any) -> str:
    """A short hash of plain data and FORMAT_VERSION; equal data gives the same on every machine."""
    text = json.dumps([FORMAT_VERSION, *parts], sort_keys=True, ensure_ascii=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def fingerprint_of_list(parts: Iterable[Sequence[Any]]) -> str:
    """`fingerprint` of the list that `parts` make one after the other, without all of its text at once."""
    digest, comma = hashlib.sha256(f"[{FORMAT_VERSION}, [".encode()), ""
    for part in parts:
        digest.update(f"{comma}{json.dumps(part, sort_keys=True, ensure_ascii=True)[1:-1]}".encode())
        comma = ", "
    digest.update(b"]]")
    return digest.hexdigest()[:16]


def changes(before: Mapping[str, Any], after: Mapping[str, Any], shared: bool = False) -> str:
    """`key: old -> new` for every setting that differs, or only for those that both have, to say why work is redone."""
    keys = [k for k in {**before, **after} if before.get(k) != after.get(k)]
    keys = [k for k in keys if k in before and k in after] if shared else keys
    return ", ".join(f"{k}: {before.get(k)} -> {after.get(k)}" for k in keys)


def printable(name: str) -> str:
    """A file name for a log line: as it is, or escaped when it has line breaks or bytes that are no UTF-8."""
    return name if name.isprintable() else ascii(name)


def listed(reasons: Iterable[tuple[str, str]], most: int = 20) -> str:
    """`path: reason` on a line each, and how many more there are."""
    lines = [f"\n  {printable(path)}: {reason}" for path, reason in reasons]
    more = f"\n  and {len(lines) - most} more" if len(lines) > most else ""
    return "".join(lines[:most]) + more


@overload
def read_json(path: Path) -> dict[str, Any]: ...
@overload
def read_json(path: Path, kind: type[T], remedy: str = ...) -> T: ...
def read_json(path: Path, kind: Any = dict, remedy: str = "delete it and run the stage again") -> Any:
    """A JSON file of the run folder that holds a `kind`.

    Raises:
        StageError: it holds something else; says where in it, and `remedy`.
        OSError: it cannot be read.
    """
    try:
        return parse_json(read_bounded(path, MAX_JSON_BYTES), kind)
    except ForeignFileError as error:
        raise StageError(f"{path}: {error};", remedy) from error


def save_arrays(path: Path, arrays: Mapping[str, Any], header: Mapping[str, Any]) -> None:
    """Write `arrays` and a JSON `header` as one safetensors file, atomically: of numpy, or some of them tensors."""
    import numpy as np
    from safetensors import numpy as of_numpy

    metadata = {HEADER_KEY: json.dumps(header, sort_keys=True, ensure_ascii=True)}
    if all(isinstance(array, np.ndarray) for array in arrays.values()):
        contents = of_numpy.save(dict(arrays), metadata=metadata)
    else:
        import torch
        from safetensors import torch as of_torch

        tensors = {k: torch.tensor(v) if isinstance(v, np.ndarray) else v for k, v in arrays.items()}
        contents = of_torch.save(tensors, metadata=metadata)
    atomic_write(path, contents)


UnitFile = tuple[dict[str, Any], dict[str, list[int]]]
"""The JSON header of a safetensors file of ours, and the shape of each of its arrays."""


def read_header(path: Path) -> dict[str, Any] | None:
    """The JSON header of a safetensors file of ours; None when it is missing, foreign or damaged."""
    found = read_unit_file(path)
    return found and found[0]


def read_unit_file(path: Path) -> UnitFile | None:
    """What a safetensors file of ours says that it holds; None when it is missing, foreign or damaged."""
    from safetensors import SafetensorError, safe_open

    if not path.is_file():
        return None
    try:
        with safe_open(path, framework="numpy") as file:
            metadata = file.metadata() or {}
            shapes = {key: file.get_slice(key).get_shape() for key in file.keys()}  # noqa: SIM118
        return parse_json(metadata[HEADER_KEY].encode(), dict), shapes
    except (FileNotFoundError, SafetensorError, KeyError, ForeignFileError):
        return None


def unit_header(path: Path, kind: type[T], stage: str, found: UnitFile | None = None) -> T:
    """The header of a unit's file or of the silent clip's, whose arrays are as long as it says.

    `found` is what was read of the file, where that was done before.

    Raises:
        StageError: it is no whole file of `stage`.
    """
    try:
        if (found := found or read_unit_file(path)) is None:
            raise ForeignFileError("no header of rvc_dist")
        (values, shapes), header = found, check(found[0], kind)
        for i, clip in enumerate(values.get("clips", [values])):
            wave, *features = (shapes.get(f"{i:05d}{part}", []) for part in ("", ".content", ".f0"))
            sizes = [] if kind is ClipsHeader else [clip["num_content"], clip["num_f0"]]
            if [shape[0] for shape in features if shape] != sizes or len(wave) != (not sizes):
                raise ForeignFileError(f"clips[{i}]: other arrays than it says")
    except ForeignFileError as error:
        raise StageError(f"{path} is damaged ({error}):", f"delete it and run `rvc-dist {stage}` again") from error
    return header


def is_done(path: Path, *wanted: str) -> bool:
    """Whether the file has one of the fingerprints that are `wanted`."""
    header = read_header(path)
    return header is not None and header.get("stamp") in wanted


def wait_for(what: str, probe: Callable[[], T | None], poll_s: float = 0.2) -> T:
    """Poll `probe` until it returns something. When a rank dies, its launcher ends those that wait."""
    with ProgressBar(f"waiting for {what}", None, ""):
        while (found := probe()) is None:
            time.sleep(poll_s)
    return found


def remove_leftovers(folder: Path, num_units: int) -> None:
    """Remove the unit files of an earlier, longer work list, and what killed processes left half-written."""
    for path in unit_files(folder):
        if int(path.stem) >= num_units:
            path.unlink(missing_ok=True)  # another process that finished at the same time may have been here first
    remove_half_written(folder)


def unit_files(folder: Path) -> Iterator[Path]:
    """The unit files in `folder`, in the order of their numbers."""
    found = (p for p in folder.glob("*.safetensors") if p.stem.isascii() and p.stem.isdecimal())
    return iter(sorted(found, key=lambda p: int(p.stem)))
