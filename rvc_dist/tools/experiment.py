"""An experiment folder of Applio, ARVC, RVC-WebUI or rvc-next: what is in it, judged file by file.

Nothing in it is run, and what its files name is opened only where it is a silent clip. Shapes: T50 and T100 frames at
50 and 100 a second, C channels.
"""

from __future__ import annotations

import contextlib
import logging
import os
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import reduce
from operator import add
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple, TypedDict

import numpy as np
import numpy.typing as npt

from rvc_dist.config import F0_PER_S, MAX_SPEAKERS, RATES
from rvc_dist.data import decode
from rvc_dist.data.sources import content_of
from rvc_dist.features.unvoiced import FLOOR_HZ, UnvoicedCount
from rvc_dist.files import ForeignFileError, not_regular, read_bounded, read_npy
from rvc_dist.schema import Count, Positive, check, parse_json, record
from rvc_dist.tools.tables import some
from rvc_dist.unit_stage import in_threads
from rvc_dist.workspace import SourceFile, StageError, listed, printable

logger = logging.getLogger(__name__)

Array = npt.NDArray[np.float32]

CONTENT_PER_S = F0_PER_S // 2
LENGTH_TOLERANCE_S = 0.1
"""Features may be so much shorter or longer than their clip: trackers and encoders differ by a frame or two."""
OVERLAP_S = 0.3
"""Of neighbouring clips, as the tools cut them by default."""
MAX_NUMBERS = 1 << 26
"""Of the features of one clip: half an hour."""
SHOWN = 5
MAX_CONFIG_BYTES = 1 << 20
MAX_LIST_BYTES = 1 << 25
"""Of a filelist.txt: 100,000 clips with long paths. Of the manifest of recordings too."""
MAX_LIST_LINES, MAX_MISSING = 300_000, 1000
"""Of the list, and of its waves that are not there by name; more are only counted."""
MAX_MUTES = 20
"""Silent clips a speaker, and different files of them that are looked for."""
MAX_REPEAT = 100
"""How often RVC-WebUI lists a clip at most."""

NUMBER = re.compile(r"[0-9]{1,9}")


class NamedSpeaker(TypedDict):
    """As RVC-WebUI and rvc-next write `speaker_info`."""

    id: Count
    name: str


class Recording(TypedDict, total=False):
    """An entry of the manifest."""

    output_key: str
    """The names of its clips up to the number."""
    speaker_id: Count
    repeat: Positive


SPEAKERS = record(False, speaker_info=list[NamedSpeaker])
"""Of config.json."""
MANIFEST = record(False, speakers=list[NamedSpeaker], entries=list[Recording])
"""multispeaker_manifest.json."""


class Layout(NamedTuple):
    """Where a tool keeps what, relative to the experiment's folder."""

    tools: str
    waves: str
    content: tuple[str, ...]
    coarse: str
    """Pitch in 255 coarse steps."""
    f0: str
    """Pitch in Hz."""


LAYOUTS = (
    Layout("Applio, ARVC", "sliced_audios", ("extracted", "v2_extracted", "v1_extracted"), "f0", "f0_voiced"),
    Layout("RVC-WebUI, rvc-next", "0_gt_wavs", ("3_feature768", "3_feature256"), "2a_f0", "2b-f0nsf"),
)


@dataclass(frozen=True)
class FileList:
    """What filelist.txt says, by the names of waves."""

    speakers: Mapping[str, int]
    repeats: Mapping[str, int]
    """How often a wave is listed, which is how often it counts in an epoch."""
    names: Mapping[int, str]
    """Of speakers, as they are written there."""
    mutes: tuple[str, ...]
    """Content features of the silent clips, one entry a line."""


@dataclass(frozen=True)
class Experiment:
    """An experiment's folder, read as far as its small files go."""

    folder: Path
    layout: Layout
    content_dir: Path | None
    """None when no features were extracted."""
    f0_dir: Path | None
    """None when there is no pitch."""
    width: int
    """C of the content features, 0 without any."""
    unvoiced: str
    """`UnvoicedCount.convention` of the pitch."""
    config: dict[str, Any]
    info: dict[str, Any]
    recordings: Mapping[str, Recording]
    """Of the manifest, by the names of their clips up to the number."""
    names: Mapping[int, str]
    """Of speakers."""
    filelist: FileList

    @property
    def waves_dir(self) -> Path:
        return self.folder / self.layout.waves

    @property
    def encoder(self) -> str:
        """As the tool calls it; empty where nothing names it."""
        return str(self.info.get("embedder") or self.info.get("embedder_model") or "")

    def content_file(self, wave: str) -> Path | None:
        return self.content_dir and self.content_dir / f"{Path(wave).stem}.npy"

    def f0_file(self, wave: str) -> Path | None:
        return self.f0_dir and self.f0_dir / f"{wave}.npy"

    def coarse_file(self, wave: str) -> Path:
        return self.folder / self.layout.coarse / f"{wave}.npy"

    def has_features(self, wave: str) -> bool:
        """Whether the files are there, unread."""
        files = [f for f in (self.content_file(wave), self.f0_file(wave)) if f is not None]
        return bool(files) and all(f.is_file() for f in files)

    def speaker_of(self, wave: str) -> int:
        """By filelist.txt, else by the manifest, else by the wave's name."""
        by_recording = self._recording(wave).get("speaker_id", speaker_in(wave))
        return self.filelist.speakers.get(wave, by_recording)

    def repeat_of(self, wave: str) -> int:
        """How often the clip counts in an epoch."""
        return min(MAX_REPEAT, self.filelist.repeats.get(wave) or self._recording(wave).get("repeat", 1))

    def _recording(self, wave: str) -> Recording:
        return self.recordings.get(recording_of(wave)[0], {})

    def total_seconds(self) -> float:
        """Length of the recordings that the clips were cut from, which overlap; 0 when it is not told."""
        value = self.info.get("total_seconds")
        return float(value) if isinstance(value, (int, float)) and 0.0 < value < float("inf") else 0.0


def read_experiment(folder: Path, num_threads: int = 1) -> Experiment:
    """What is in an experiment's folder.

    Raises:
        StageError: it is missing, no folder, or laid out like none of LAYOUTS; says what was found.
    """
    if not folder.is_dir():
        what = "is a file" if folder.exists() else "does not exist"
        raise StageError(f"{folder} {what};", "expected the folder of an experiment, such as logs/NAME")
    layout = find_layout(folder)
    content_dir = _with_arrays([folder / name for name in layout.content])
    f0_dir = _with_arrays([folder / layout.f0])
    filelist = read_filelist(folder / "filelist.txt")
    config = read_info(folder / "config.json")
    manifest = read_info(folder / "multispeaker_manifest.json", MANIFEST, MAX_LIST_BYTES)
    names = [*_speaker_info(folder, config), *manifest.get("speakers", [])]
    return Experiment(
        folder=folder,
        layout=layout,
        content_dir=content_dir,
        f0_dir=f0_dir,
        width=_width(content_dir) if content_dir else 0,
        unvoiced=_convention(f0_dir, num_threads) if f0_dir else "zero",
        config=config,
        info=read_info(folder / "model_info.json") | read_info(folder / "experiment.json"),
        recordings={e["output_key"]: e for e in manifest.get("entries", []) if "output_key" in e},
        names={**{s["id"]: s["name"] for s in names}, **filelist.names},
        filelist=filelist,
    )


def find_layout(folder: Path) -> Layout:
    found = [layout for layout in LAYOUTS if any((folder / layout.waves).glob("*.wav"))]
    if len(found) == 1:
        return found[0]
    expected = " or ".join(f"{layout.waves}/ ({layout.tools})" for layout in LAYOUTS)
    if found:
        both = " and ".join(f"{layout.waves}/" for layout in found)
        raise StageError(f"{folder} has waves in {both}:", "move one of them away, or name an experiment of one tool")
    inside = sorted(p.name for p in folder.iterdir() if any((p / layout.waves).is_dir() for layout in LAYOUTS))
    if inside := [name for name in inside if not name.startswith("mute")]:  # the tools' silent clips
        raise StageError(f"{folder} is no experiment but holds some:", f"name one of them ({some(inside, SHOWN)})")
    here = [p.name + "/" * p.is_dir() for p in sorted(folder.iterdir())]
    more = f" and {len(here) - 10} more" if len(here) > 10 else ""
    raise StageError(
        f"{folder} is not laid out as an experiment: expected .wav files in {expected}; "
        f"found {', '.join(map(printable, here[:10])) + more if here else 'an empty folder'}"
    )


def _with_arrays(folders: list[Path]) -> Path | None:
    """The first of `folders` with arrays in it."""
    found = [folder for folder in folders if any(folder.glob("*.npy"))]
    for folder in found[1:]:
        logger.warning("import: %s is left out, %s is used", folder, found[0].name)
    return found[0] if found else None


def _width(content_dir: Path) -> int:
    """C of the first features that can be read, 0 if none can."""
    for path in sorted(content_dir.glob("*.npy")):
        with contextlib.suppress(ForeignFileError):
            return int(read_array(path, 2).shape[1])
    return 0


def _convention(f0_dir: Path, num_threads: int) -> str:
    """What the pitch is in unvoiced frames; arrays that cannot be read say nothing."""

    def count(path: Path) -> UnvoicedCount:
        with contextlib.suppress(ForeignFileError):
            return UnvoicedCount.of(read_array(path, 1))
        return UnvoicedCount()

    what = "import: what unvoiced frames have"
    counts = in_threads(num_threads, count, sorted(f0_dir.glob("*.npy")), what, "pitches")
    return reduce(add, counts, UnvoicedCount()).convention


def read_info(path: Path, kind: Any = dict, most: int = MAX_CONFIG_BYTES) -> dict[str, Any]:
    """A JSON file of another tool: {} when there is none or it holds something else, which is said."""
    try:
        found: dict[str, Any] = parse_json(read_bounded(path, most), kind) if path.exists() else {}
        return found
    except (ForeignFileError, OSError) as error:
        logger.warning("import: %s is not what its name says and is left out: %s", path, error)
        return {}


def _speaker_info(folder: Path, config: dict[str, Any]) -> list[NamedSpeaker]:
    """Ids and names in config.json."""
    try:
        found: list[NamedSpeaker] = check(config, SPEAKERS).get("speaker_info", [])
        return found
    except ForeignFileError as error:
        logger.warning("import: the names of speakers in %s are left out: %s", folder / "config.json", error)
        return []


def read_filelist(path: Path) -> FileList:
    """What a filelist.txt says, in which a line is `wave|content[|coarse f0|f0][...]|speaker id[|speaker name]`.

    Paths are those of the machine that wrote it, Windows or not, so that only their names count here.
    """
    speakers: dict[str, int] = {}
    repeats: Counter[str] = Counter()
    names: dict[int, str] = {}
    mutes: list[str] = []
    wrong, several, renamed = [], set(), set()
    for number, line in enumerate(_lines(path), 1):
        fields = line.strip().split("|")
        speaker, speaker_name = _speaker_in(fields)
        if speaker is None:
            wrong += [str(number)] if line.strip() else []
            continue
        name = PurePosixPath(fields[0].replace("\\", "/")).name
        if speaker_name and names.setdefault(speaker, speaker_name) != speaker_name:
            renamed.add(str(speaker))
        if name.startswith("mute"):
            mutes.append(fields[1])
            continue
        repeats[name] += 1
        if speakers.setdefault(name, speaker) != speaker:
            several.add(name)
    told = {
        "line %s is not `wave|features|...|speaker id[|name]`": wrong,
        "%s: listed for several speakers, the first counts": sorted(several),
        "speaker %s has several names, the first counts": sorted(renamed, key=int),
    }
    if found := [text % some(which, SHOWN) for text, which in told.items() if which]:
        logger.warning("import: %s: %s", path, "; ".join(found))
    return FileList(speakers, repeats, names, tuple(mutes))


def _lines(path: Path) -> Iterator[str]:
    if not path.exists():
        return iter(())
    try:
        text = read_bounded(path, MAX_LIST_BYTES)
        if text.count(b"\n") > MAX_LIST_LINES:
            raise ForeignFileError(f"more than {MAX_LIST_LINES} lines")
    except ForeignFileError as error:
        raise StageError(f"{path}: {error};", "leave the list out, or shorten it to the experiment's clips") from error
    return map(os.fsdecode, text.splitlines())


def _speaker_in(fields: list[str]) -> tuple[int | None, str]:
    """Id and name at the end of a line: a name makes four columns of three, or six of five, and may be a number."""
    if len(fields) in (4, 6) and NUMBER.fullmatch(fields[-2]):
        return int(fields[-2]), fields[-1]
    return (int(fields[-1]) if len(fields) > 2 and NUMBER.fullmatch(fields[-1]) else None), ""


def list_waves(experiment: Experiment, num_threads: int, content: Callable[[SourceFile], str]) -> list[SourceFile]:
    """Every wave of the experiment in a fixed order, and those that filelist.txt has beyond; unusable with a reason."""
    found = {p.name: p for p in experiment.waves_dir.glob("*.wav")}
    missing = sorted(experiment.filelist.speakers.keys() - found.keys())
    if len(missing) > MAX_MISSING:
        logger.warning("import: %d waves of filelist.txt are missing, %d of them are named", len(missing), MAX_MISSING)

    def judged(name: str) -> SourceFile:
        speaker = experiment.speaker_of(name)
        if name in found:
            return _wave(found[name], speaker, content)
        return SourceFile(name, speaker, 0, 0, reason="in filelist.txt, but the wave is missing")

    names = sorted({*found, *missing[:MAX_MISSING]})
    files = in_threads(num_threads, judged, names, "import: content", "waves")
    if all(f.reason for f in files):
        raise nothing(experiment, [(f.path, f.reason) for f in files])
    unlisted = sorted(found.keys() - experiment.filelist.speakers.keys())
    if unlisted and experiment.filelist.speakers:
        which = f"{len(unlisted)} clips are not in filelist.txt and are imported all the same ({some(unlisted, SHOWN)})"
        logger.warning("import: %s", which)
    return in_their_recordings(files)


def _wave(path: Path, speaker: int, content: Callable[[SourceFile], str]) -> SourceFile:
    """A wave for the work list; with a reason where it cannot be used."""
    file = SourceFile(path.name, speaker, 0, 0)
    try:
        status = path.stat()
        file = replace(file, size=status.st_size, mtime_ns=status.st_mtime_ns)
        reason = not_regular(status.st_mode)
        if speaker >= MAX_SPEAKERS:
            reason = reason or f"speaker id {speaker} is above {MAX_SPEAKERS - 1}"
        if reason:
            return replace(file, reason=reason)
        with decode.opened(path) as recording:
            seconds, rate = round(recording.duration_s, 6), recording.rate
        return replace(file, duration_s=seconds, rate=rate, content=content(file))
    except decode.AudioError as error:
        return replace(file, reason=str(error))
    except OSError as error:  # a link that leads nowhere
        return replace(file, reason=f"cannot be read ({error.strerror})")


def speaker_in(wave: str) -> int:
    """The id in SPEAKER_RECORDING_CLIP.wav and in msFILE_sSPEAKER_HASH_CLIP.wav; other names are of speaker 0."""
    match = re.fullmatch(r"(?:(\d+)_\d+|ms\d+_s(\d+)_[0-9A-Za-z]+)_\d+\.wav", wave, re.ASCII)
    return int(match[1] or match[2]) if match else 0


def recording_of(wave: str) -> tuple[str, int]:
    """What a clip was cut from and its number there, by its name: Applio's and ARVC's, RVC-WebUI's, rvc-next's."""
    match = re.fullmatch(r"((?:\d+_)?\d+|ms\d+_s\d+_[0-9A-Za-z]+)_(\d+)\.wav", wave, re.ASCII)
    return (match[1], int(match[2])) if match else (wave, 0)


def in_their_recordings(files: list[SourceFile]) -> list[SourceFile]:
    """`files` with where each begins in its recording, as far as numbers and lengths tell.

    The tools cut with an overlap, so each is taken to begin within the one before: only neighbours share samples.
    """
    ends_s: dict[tuple[int, str], float] = {}
    starts_s = {}
    for file in sorted(files, key=lambda f: recording_of(f.path)):
        recording = (file.speaker, recording_of(file.path)[0])
        starts_s[file.path] = round(max(0.0, ends_s.get(recording, 0.0) - OVERLAP_S), 6)
        ends_s[recording] = starts_s[file.path] + file.duration_s
    return [replace(f, start_s=starts_s[f.path]) for f in files]


def nothing(experiment: Experiment, reasons: list[tuple[str, str]]) -> StageError:
    return StageError(f"{experiment.waves_dir}: none of {len(reasons)} clips can be used{listed(reasons)}")


def common_rate(experiment: Experiment, files: list[SourceFile]) -> int:
    """The sample rate of every wave in Hz.

    Raises:
        StageError: there are several, config.json says another, or no network has it.
    """
    by_rate: dict[int, list[str]] = {}
    for file in files:
        if not file.reason:
            by_rate.setdefault(file.rate, []).append(file.path)
    if len(by_rate) > 1:
        rates = "; ".join(f"{rate} Hz: {len(n)} clips ({some(n, SHOWN)})" for rate, n in sorted(by_rate.items()))
        raise StageError(f"{experiment.waves_dir} has waves of several sample rates, expected one ({rates})")
    (rate,) = by_rate
    data = experiment.config.get("data")
    said = data.get("sample_rate", data.get("sampling_rate", rate)) if isinstance(data, dict) else rate
    if said != rate:
        raise StageError(f"{experiment.folder / 'config.json'} says {said} Hz, the waves have {rate} Hz")
    if rate not in RATES["v2"]:
        expected = ", ".join(map(str, RATES["v2"]))
        raise StageError(f"{experiment.waves_dir} has waves of {rate} Hz, expected one of {expected}")
    return rate


def feature_listing(experiment: Experiment, num_threads: int) -> list[tuple[str, str]]:
    """What changed arrays change: the content of each, whatever its time."""
    folders = [d for d in (experiment.content_dir, experiment.f0_dir) if d]
    if experiment.unvoiced == "clipped":  # mended from these
        folders.append(experiment.folder / experiment.layout.coarse)
    paths = [p for folder in folders for p in sorted(folder.glob("*.npy"))]
    found = in_threads(num_threads, lambda p: content_of(p) if p.is_file() else "", paths, "import: content", "arrays")
    return [(f"{p.parent.name}/{p.name}", content) for p, content in zip(paths, found, strict=True)]


def read_features(experiment: Experiment, wave: str, seconds: float) -> tuple[Array, Array]:
    """Content [T50, C] and f0 [T100] of a clip; f0 is 0 where the experiment has no pitch.

    Raises:
        ForeignFileError: a file is missing or is not what it should be.
    """
    content_file, f0_file = experiment.content_file(wave), experiment.f0_file(wave)
    assert content_file is not None
    content = read_array(content_file, 2)
    if content.shape[1] != experiment.width:
        raise ForeignFileError(f"{content_file.parent.name}: {content.shape[1]} wide, the others {experiment.width}")
    f0 = read_array(f0_file, 1) if f0_file else np.zeros(2 * len(content), np.float32)
    if f0_file and f0.min(initial=0.0) < 0.0:
        raise ForeignFileError(f"{f0_file.parent.name}: a pitch below 0 Hz")
    if f0_file and experiment.unvoiced == "clipped":
        f0 = _mended(f0, experiment.coarse_file(wave))
    for file, array, per_s in (content_file, content, CONTENT_PER_S), (f0_file, f0, F0_PER_S):
        if file and abs(len(array) / per_s - seconds) > LENGTH_TOLERANCE_S:
            raise ForeignFileError(f"{file.parent.name}: {len(array) / per_s:.2f} s long, the clip {seconds:.2f} s")
    return content, f0


def _mended(f0: Array, coarse_file: Path) -> Array:
    """f0 [T100] in Hz that was lifted to FLOOR_HZ where it is unvoiced, and then smoothed, as it was before.

    The coarse pitch, from before, is 1 where unvoiced; it also says what smoothing has drawn down to the floor. Without
    any, what is at the floor is taken to be unvoiced.
    """
    if not coarse_file.parent.is_dir():
        return np.where(f0 > FLOOR_HZ, f0, np.float32(0.0))
    import torch

    from rvc_dist.models.pitch import COARSE_BINS, coarse_hz

    coarse = read_array(coarse_file, 1)
    if coarse.shape != f0.shape or not 1 <= coarse.min() <= coarse.max() < COARSE_BINS:
        told = f"{len(coarse)} steps from {coarse.min():g} to {coarse.max():g}"
        raise ForeignFileError(f"{coarse_file.parent.name}: {told}, expected {len(f0)} from 1 to {COARSE_BINS - 1}")
    voiced = np.where(f0 > FLOOR_HZ, f0, coarse_hz(torch.from_numpy(coarse)).numpy())
    return np.where(coarse > 1, voiced, np.float32(0.0))


def read_array(path: Path, num_dims: int) -> Array:
    """A float32 copy of what is in an .npy file; nothing in it is run.

    Raises:
        ForeignFileError: it is missing, no array of numbers of `num_dims` dimensions, empty, or not finite.
    """
    try:
        data = read_npy(path)
    except FileNotFoundError:
        raise ForeignFileError(f"{path.parent.name}: missing") from None
    except (ForeignFileError, OSError) as error:
        raise ForeignFileError(f"{path.parent.name}: {error}") from error
    if data.ndim != num_dims or data.size > MAX_NUMBERS:
        what = f"{data.dtype} {list(data.shape)}, expected at most {MAX_NUMBERS} numbers in {num_dims} dimensions"
        raise ForeignFileError(f"{path.parent.name}: {what}")
    array: Array = np.ascontiguousarray(data, np.float32)
    if not np.isfinite(array).all():
        raise ForeignFileError(f"{path.parent.name}: values that are not finite")
    return array


def read_mute(experiment: Experiment) -> Array | None:
    """Content [T50, C] of the silent clip; None, which is said, where the list names one that is of no use."""
    different = [*dict.fromkeys(experiment.filelist.mutes)][:MAX_MUTES]  # every speaker has the same
    path = next(filter(None, (_find_mute(experiment, mute) for mute in different)), None)
    if path is None:
        if experiment.filelist.mutes:
            logger.warning("import: silent clips are left out: %s is not to be found", experiment.filelist.mutes[0])
        return None
    try:
        content = read_array(path, 2)
        if content.shape[1] == experiment.width:
            return content
        wrong = f"{content.shape[1]} wide, the clips' features {experiment.width}"
    except ForeignFileError as error:
        wrong = str(error)
    logger.warning("import: silent clips are left out: %s: %s", path, wrong)
    return None


def _find_mute(experiment: Experiment, written: str) -> Path | None:
    """The file of a path in filelist.txt: as it is written, or in or beside the experiment, which may have moved.

    A list may name any file of this machine; only what the tools call a silent clip's features is looked at.
    """
    path = Path(written.replace("\\", "/"))
    if not re.search(r"(?:^|/)mute[^/]*(?:/[^/]*)?/mute[^/\0]*\.npy$", path.as_posix()) or ".." in path.parts:
        return None
    logs = experiment.folder.parent
    tried = [path] if path.is_absolute() else [logs.parent / path]
    tried += [folder.joinpath(*path.parts[-3:]) for folder in (logs, experiment.folder)]
    tried.append(experiment.folder / path.name)
    return next((p for p in tried if p.is_file()), None)


def weight_pairs(folder: Path) -> Iterator[tuple[int, Path, Path]]:
    """(step, generator, discriminator), the highest step first: from that one the other tools go on."""
    numbered = {int(m[1]): p for p in folder.glob("G_*.pth") if (m := re.fullmatch(r"G_(\d+)\.pth", p.name, re.ASCII))}
    for step in sorted(numbered, reverse=True):
        other = folder / f"D_{step}.pth"
        if other.is_file():
            yield step, numbered[step], other
        else:
            logger.warning("import: %s is left out: %s is missing", numbered[step].name, other.name)
