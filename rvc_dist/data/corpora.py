"""Corpora: the recordings of a known layout, of a list or of a data set, and whose each is. No recording is opened."""

from __future__ import annotations

import contextlib
import gzip
import importlib
import os
import re
import tempfile
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache, lru_cache
from itertools import islice
from pathlib import Path
from typing import Annotated, Any, NamedTuple, cast
from urllib.parse import parse_qsl

from rvc_dist.choices import DATASETS, LHOTSE, Package
from rvc_dist.files import ForeignFileError, not_regular
from rvc_dist.schema import OsName, Rule, Seconds, SpeakerName, check, parse_json
from rvc_dist.workspace import SourceFile, StageError, listed

LISTS = (".jsonl", ".jsonl.gz")
"""How lists of recordings end: ours and Lhotse's."""
HF = "hf:"
"""data.audio_dir begins so for a data set of the Hugging Face hub, or one that was saved from there."""
MIN_SHARE = 0.9
"""Of the recordings: so many have to be named as a layout has them, before it is believed."""
MAX_LINE = 1 << 16
MARGIN_S = 0.1
"""Kept around the speech that VCTK's list of silences tells of."""
SAVED = ("dataset_dict.json", "state.json")
"""Of these a folder has one to which `save_to_disk` has written a data set."""
SPEAKER_COLUMNS = ("speaker_id", "speaker", "speaker_name", "client_id", "reader_id", "spk_id", "spk")


class Found(NamedTuple):
    file: SourceFile
    speaker: str | int | None = None
    """By name or by id; None: there is but one, who has no name."""


@dataclass(frozen=True)
class Listing:
    """What is found in a corpus."""

    kind: str
    """Its layout in words; nothing for folders by speaker."""
    found: list[Found]
    left_out: Counter[str] = field(default_factory=Counter)
    """What has no entry of its own, since there is one beside every recording, by why."""

    def about(self) -> str:
        """For the log: what was recognised, and what was left out."""
        used = [(file, speaker) for file, speaker in self.found if not file.reason]
        speakers = len({speaker for _, speaker in used})
        left = self.left_out + Counter({"that cannot be used, named below": len(self.found) - len(used)})
        told = "; left out: " + ", ".join(f"{n} {why}" for why, n in left.most_common()) if left else ""
        return f"{self.kind}: {speakers} speaker{'s' * (speakers != 1)}, {len(used)} recordings or parts{told}"


def base_of(audio_dir: Path) -> Path:
    """Where the paths of a corpus begin."""
    return audio_dir if audio_dir.is_dir() else audio_dir.parent


def is_list(path: Path) -> bool:
    return path.name.endswith(LISTS)


def speaker_name(name: Any) -> str:
    """Of a list or a data set. Digits alone would be taken for an id, of which 10,000 are too few for theirs."""
    text = str(name)
    return f"speaker_{text}" if text.isascii() and text.isdecimal() else text


# Layouts of folders


class Layout(NamedTuple):
    name: str
    pattern: re.Pattern[str]
    """Of a recording's path, with its speaker."""
    prefix: str = ""
    """Of speakers whom the corpus knows by numbers."""


_AT = r"(?:.*/)?"
_END = r"\.(?:flac|wav)"
LAYOUTS = (
    Layout("LibriTTS", re.compile(rf"{_AT}(?P<speaker>\d+)/(\d+)/(?P=speaker)_\2_\d+_\d+{_END}"), "libritts_"),
    Layout("LibriSpeech", re.compile(rf"{_AT}(?P<speaker>\d+)/(\d+)/(?P=speaker)-\2-\d+{_END}"), "librispeech_"),
    Layout("VCTK 0.92", re.compile(rf"{_AT}(?P<speaker>[ps]\d+)/(?P<of>(?P=speaker)_\d+)_(?P<mic>mic[12]){_END}")),
    Layout("VCTK 0.80", re.compile(rf"{_AT}wav48/(?P<speaker>[ps]\d+)/(?P<of>(?P=speaker)_\d+){_END}")),
    Layout("HiFi-TTS", re.compile(rf"{_AT}(?P<speaker>\d+)_(?:clean|other)/[^/]+/[^/]+{_END}"), "hifitts_"),
)
SILENCES = re.compile(r"vctk-silences.*\.txt")
"""Lines of an utterance, and the seconds at which speech begins and ends (nii-yamagishilab/vctk-silence-labels)."""


def recognise(audio_dir: Path, files: Sequence[SourceFile], is_recording: Callable[[str], bool]) -> Listing | None:
    """The corpus in a folder whose `files` are named as one or several of LAYOUTS have it, or None."""
    matches: dict[str, tuple[Layout, re.Match[str]]] = {}
    sounds = [f for f in files if not f.reason and is_recording(f.path)]
    for file in sounds:
        path = file.path.replace(os.sep, "/")
        found = next(((layout, m) for layout in LAYOUTS if (m := layout.pattern.fullmatch(path))), None)
        if found:
            matches[file.path] = found
    if len(matches) <= MIN_SHARE * len(sounds):
        return None
    names = [layout.name for layout in LAYOUTS if any(layout is of for of, _ in matches.values())]
    left_out: Counter[str] = Counter()
    best = {(os.path.dirname(path), m["of"]): path for path, m in _by_microphone(matches)}
    silences = _silences(audio_dir, files)
    result = []
    for file in files:
        layout, match = matches.get(file.path, (None, None))
        if layout is None or match is None:
            if file.reason and not file.reason.startswith("not one of "):
                result.append(Found(file))
            elif file.reason or not is_recording(file.path):
                left_out[f"that are no recordings (*{os.path.splitext(file.path)[1] or file.path})"] += 1
            else:
                why = f"not named as {' or '.join(names)} names its recordings"
                result.append(Found(replace(file, reason=why)))
            continue
        groups = match.groupdict()
        if "mic" in groups and best[os.path.dirname(file.path), groups["of"]] != file.path:
            left_out["of microphone 1 where there is one of microphone 2"] += 1
            continue
        from_s, to_s = silences.get(groups.get("of", ""), (0.0, 0.0))
        result.append(Found(replace(file, from_s=from_s, to_s=to_s), layout.prefix + match["speaker"]))
    return Listing(" and ".join(names), result, left_out)


def _by_microphone(matches: Mapping[str, tuple[Layout, re.Match[str]]]) -> list[tuple[str, re.Match[str]]]:
    """Those of VCTK 0.92, the second microphone last: it hears more of the voice and less of the room.

    Of p280 and p315 there is the first alone.
    """
    found = ((path, match) for path, (_, match) in matches.items() if "mic" in match.groupdict())
    return sorted(found, key=lambda found: (found[1]["mic"], found[0]))


def _silences(audio_dir: Path, files: Iterable[SourceFile]) -> dict[str, tuple[float, float]]:
    """Where speech begins and ends, with a margin, by utterance, if VCTK's list lies in the folder."""
    found = {}
    for file in files:
        if SILENCES.fullmatch(os.path.basename(file.path)):
            for number, line in enumerate((audio_dir / file.path).read_text(encoding="utf-8").splitlines(), 1):
                words = line.split()
                try:
                    start_s, end_s = (check(float(word), Seconds) for word in words[1:])
                    if not start_s < end_s:
                        raise ValueError("ends before it begins")
                except ValueError as error:
                    if len(words) < 2:  # an utterance of which nothing is known
                        continue
                    where = f"data.audio_dir: {audio_dir / file.path}, line {number}: {line[:80]!r}"
                    remedy = "expected an utterance and two rising times, or take the file out of the folder"
                    raise StageError(f"{where}: {error};", remedy) from error
                found[words[0]] = round(max(0.0, start_s - MARGIN_S), 6), round(end_s + MARGIN_S, 6)
    return found


# Lists


@dataclass(frozen=True)
class Line:
    """A line of a manifest: a recording, or a part of one, and who speaks."""

    audio: Annotated[OsName, Rule("a path", (str,), lambda text: bool(text))]
    """Relative to the manifest."""
    speaker: SpeakerName | Annotated[int, Rule("an id", (int,), lambda value: value >= 0)] | None = None
    start_s: Seconds = 0.0
    end_s: Seconds | None = None
    """None: to the end of the recording."""

    def __post_init__(self) -> None:
        if self.end_s is not None and self.end_s <= self.start_s:
            raise ForeignFileError(f"end_s: got {self.end_s}, expected more than start_s")


def read_list(path: Path) -> Listing:
    """Of a manifest of ours, or of Lhotse's.

    Raises:
        StageError: it cannot be read, or lines of it say nothing that could be meant.
    """
    try:
        with _lines(path) as lines:
            head = next((text for _, text in lines), b"{}")
    except (OSError, EOFError) as error:
        raise StageError(f"data.audio_dir: {path} cannot be read ({error});", "expected JSON lines") from error
    with contextlib.suppress(ForeignFileError):
        if not {"audio", "speaker", "start_s", "end_s"} & (keys := parse_json(head, dict)).keys() and "id" in keys:
            return read_lhotse([path])
    return read_manifest(path)


@contextlib.contextmanager
def _lines(path: Path) -> Iterator[Iterator[tuple[int, bytes]]]:
    """The lines of a file that are not empty, with their numbers."""
    with gzip.open(path) if path.name.endswith(".gz") else path.open("rb") as file:
        lines = enumerate(iter(lambda: file.readline(MAX_LINE), b""), 1)
        yield ((number, line) for number, line in lines if line.strip())


def read_manifest(path: Path) -> Listing:
    """A `Line` a line. What is wrong in itself is refused, with all such lines; what does not fit what is on the disk
    is left out with its reason.
    """
    found: list[Found] = []
    faults: list[tuple[str, str]] = []
    first: dict[tuple[str, float, float | None], tuple[int, str | int | None]] = {}
    judged, of_line = cache(lambda audio: judge(path.parent, audio)), cast(Any, Line)
    with _lines(path) as lines:
        for number, text in lines:
            where = f"line {number}"
            try:
                line = Line(**check(parse_json(text, dict), of_line))
            except ForeignFileError as error:
                faults.append((where, str(error)))
                continue
            file = judged(os.path.normpath(line.audio))
            key = (file.path, line.start_s, line.end_s)
            other, speaker = first.setdefault(key, (number, line.speaker))
            if other != number and speaker != line.speaker:
                faults.append((where, f"gives to {line.speaker} what line {other} gives to {speaker}"))
                continue
            reason = f"the same as line {other}" if other != number else file.reason
            who = speaker_name(line.speaker) if isinstance(line.speaker, str) else line.speaker
            found.append(Found(part_of(replace(file, reason=reason), where, line.start_s, line.end_s), who))
    if faults:
        raise StageError(
            f"data.audio_dir: {len(faults)} of {len(faults) + len(found)} lines of {path} cannot be used;",
            'expected in each {"audio": "a.wav", "speaker": "alice", "start_s": 1.5, "end_s": 4}, the times if need be',
            listed(faults),
        )
    return Listing("manifest", found)


def judge(base: Path, path: str) -> SourceFile:
    """A file that a list names, by its folder alone."""
    try:
        status = (base / path).stat()
    except OSError as error:
        return SourceFile(path, 0, 0, 0, reason=f"cannot be read ({error.strerror})")
    reason = not_regular(status.st_mode) or ("" if status.st_size else "empty file (0 bytes)")
    return SourceFile(path, 0, status.st_size, status.st_mtime_ns, reason=reason)


def part_of(file: SourceFile, where: str, from_s: float, to_s: float | None) -> SourceFile:
    """From one time to another of a recording, as it stands at a place in a list."""
    part = replace(file, where=where, from_s=float(from_s), to_s=float(to_s or 0.0))
    return part.refused(file.reason) if file.reason else part


# Lhotse


def lhotse_lists(folder: Path) -> list[Path]:
    """Lhotse's lists in a folder: cuts, or else recordings."""
    names = sorted(name for name in os.listdir(folder) if name.endswith(LISTS))
    cuts = [name for name in names if "cuts" in name]
    return [folder / name for name in cuts or names if "cuts" in name or "recordings" in name]


def read_lhotse(paths: Sequence[Path]) -> Listing:
    """The parts that Lhotse's supervisions tell of, and recordings without any as a whole.

    Raises:
        StageError: the package is missing, or a list cannot be read.
    """
    lhotse = _package(LHOTSE, "a list of Lhotse")
    found: list[Found] = []
    for path in paths:
        try:
            found += _of_lhotse(lhotse, path)
        except (ValueError, KeyError, TypeError, AttributeError, AssertionError, OSError, EOFError) as error:
            told = f"{type(error).__name__}: {error}"
            raise StageError(f"data.audio_dir: {path}: no list that lhotse reads ({told});", "make it anew") from error
    return Listing("Lhotse's " + ", ".join(path.name for path in paths), found)


def _of_lhotse(lhotse: Any, path: Path) -> Iterator[Found]:
    judged = cache(lambda source: judge(path.parent, source))
    if "cuts" in path.name:
        for cut in lhotse.load_manifest_lazy(path):
            if type(cut).__name__ != "MonoCut" or cut.recording is None:
                yield Found(SourceFile(str(cut.id), 0, 0, 0, reason=f"a {type(cut).__name__}, expected a MonoCut"))
                continue
            spans = [(s.id, cut.start + max(0.0, s.start), cut.start + min(s.end, cut.duration), s.speaker, s.channel)
                     for s in cut.supervisions]  # fmt: skip
            yield from _parts(judged, cut.recording, spans or [(cut.id, cut.start, cut.end, None, cut.channel)])
        return
    other = path.with_name(path.name.replace("recordings", "supervisions"))
    by_recording: dict[str, list[tuple[str, float, float, str | None, Any]]] = {}
    for s in lhotse.load_manifest_lazy(other) if other != path and other.is_file() else ():
        by_recording.setdefault(s.recording_id, []).append((s.id, s.start, s.end, s.speaker, s.channel))
    for recording in lhotse.load_manifest_lazy(path):
        whole = (recording.id, 0.0, 0.0, None, recording.channel_ids)
        yield from _parts(judged, recording, by_recording.pop(recording.id, [whole]))
    for name, spans in by_recording.items():
        for span in spans:
            missing = SourceFile(name, 0, 0, 0, reason=f"there is no such recording in {path.name}")
            yield Found(part_of(missing, span[0], 0.0, None))


def _parts(
    judged: Callable[[str], SourceFile], recording: Any, spans: Sequence[tuple[str, float, float, str | None, Any]]
) -> Iterator[Found]:
    sources, reason = recording.sources, ""
    if len(sources) != 1 or sources[0].type != "file":
        reason = f"its sound is in {len(sources)} sources ({sources[0].type}), expected one file"
    elif recording.transforms:
        reason = "it is changed by transforms, expected it as it was recorded"
    file = judged(os.path.normpath(sources[0].source)) if not reason else SourceFile(recording.id, 0, 0, 0)
    for name, from_s, to_s, speaker, channels in spans:
        wanted = sorted(channels if isinstance(channels, list) else [channels])
        why = reason or file.reason
        if not why and wanted != sorted(recording.channel_ids):
            why = f"channel {wanted} of {recording.channel_ids}, expected all; split the channels before"
        is_end = to_s >= recording.duration
        part = part_of(replace(file, reason=why), name, round(from_s, 6), None if is_end else round(to_s, 6))
        yield Found(part, speaker if speaker is None else speaker_name(speaker))


# Data sets of the hub


def is_data_set(audio_dir: Path) -> bool:
    """Whether it is one of the hub, or one that was saved from there: a folder of Arrow's files, or of Parquet's."""
    if str(audio_dir).startswith(HF):
        return True
    saved = any((audio_dir / name).is_file() for name in SAVED)
    return audio_dir.is_dir() and (saved or any(True for _ in islice(audio_dir.glob("*.parquet"), 1)))


@lru_cache(2)
def _data_set(audio_dir: Path) -> tuple[dict[str, Any], str, str]:
    """Its splits, and the columns that have the sound and the speaker.

    Raises:
        StageError: it cannot be had, or not told which column is the sound.
    """
    datasets = _package(DATASETS, "a data set of the Hugging Face hub")
    name, _, query = str(audio_dir).removeprefix(HF).partition("?")
    asked = dict(parse_qsl(query))
    where = f"data.audio_dir: {audio_dir}"
    if strange := asked.keys() - {"config", "split", "speaker", "audio"}:
        raise StageError(f"{where}: unknown {', '.join(sorted(strange))};", "expected config, split, speaker or audio")
    try:
        if any((Path(name) / file).is_file() for file in SAVED):
            found = datasets.load_from_disk(name)
        else:
            found = datasets.load_dataset(name, asked.get("config"))
    except (ValueError, OSError, datasets.exceptions.DatasetsError) as error:
        raise StageError(f"{where} cannot be had ({type(error).__name__}: {error.__cause__ or error})") from error
    splits = dict(found) if isinstance(found, dict) else {"all": found}
    if (split := asked.get("split")) is not None:
        if split not in splits:
            raise StageError(f"{where} has no split {split};", f"expected one of {', '.join(splits)}")
        splits = {split: splits[split]}
    features = next(iter(splits.values())).features
    sounds = [c for c, kind in features.items() if isinstance(kind, datasets.Audio) and asked.get("audio", c) == c]
    if len(sounds) != 1:
        told = f"{len(sounds)} columns of sound ({', '.join(sounds) or ', '.join(features)})"
        raise StageError(f"{where} has {told};", f"expected one; choose with {HF}{name}?audio=COLUMN")
    speakers = [asked["speaker"]] if "speaker" in asked else [c for c in SPEAKER_COLUMNS if c in features]
    if speakers and speakers[0] not in features:
        raise StageError(f"{where} has no column {speakers[0]};", f"expected one of {', '.join(features)}")
    raw = datasets.Audio(decode=False)
    splits = {name: split.cast_column(sounds[0], raw) for name, split in splits.items()}
    return splits, sounds[0], speakers[0] if speakers else ""


def read_data_set(audio_dir: Path) -> Listing:
    """A row a recording, without a look at its bytes."""
    splits, sound, speaker = _data_set(audio_dir)
    arrow = importlib.import_module("pyarrow.compute")  # with which that package comes
    found = []
    for name, split in splits.items():
        kind = split.features.get(speaker)
        columns = [sound, speaker] if speaker else [sound]
        batches = split.select_columns(columns).with_format("arrow").iter(1000)
        row, stamp = 0, int(split._fingerprint, 16) >> 1  # of what it holds: rows have no times
        for batch in batches:
            sounds = batch[sound].combine_chunks()
            sizes = arrow.binary_length(arrow.struct_field(sounds, "bytes")).to_pylist()
            paths = arrow.struct_field(sounds, "path").to_pylist()
            speakers = batch[speaker].to_pylist() if speaker else [None] * len(paths)
            for size, path, who in zip(sizes, paths, speakers, strict=True):
                where = f"row {row} of {name}"
                file = SourceFile(f"{HF}{name}/{row}/{os.path.basename(path or '')}", 0, size or 0, stamp)
                file = replace(file, where=where)
                if not size:
                    file = file.refused("empty (0 bytes)" if size is not None else "there is no sound in it")
                if who is not None:
                    who = speaker_name(kind.int2str(who) if hasattr(kind, "int2str") else who)
                found.append(Found(file, who))
                row += 1
    column = f"speakers by its column {speaker}" if speaker else "no column of speakers known: all of one"
    return Listing(f"data set of {', '.join(splits)} ({column})", found)


@contextlib.contextmanager
def located(audio_dir: Path, path: str) -> Iterator[Path]:
    """Where the file of a recording is: while it is in use, for one that lies inside a data set."""
    if not path.startswith(HF):
        yield base_of(audio_dir) / path
        return
    splits, sound, _ = _data_set(audio_dir)
    split, row, name = path.removeprefix(HF).split("/", 2)
    with tempfile.TemporaryDirectory(prefix="rvc_dist_") as folder:
        # Decoders take files: by their names they know some kinds.
        copy = Path(folder, "sound" + os.path.splitext(name)[1])
        copy.write_bytes(splits[split][int(row)][sound]["bytes"])
        yield copy


def _package(package: Package, what: str) -> Any:
    try:
        return importlib.import_module(package.module)
    except ImportError as error:
        raise StageError(*package.missing(f"data.audio_dir: {what}", error)) from error
