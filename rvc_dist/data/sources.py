"""The recordings of a dataset folder: which can be used, whose they are, and why the others are left out."""

from __future__ import annotations

import hashlib
import itertools
import logging
import os
import re
import unicodedata
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import NamedTuple

from rvc_dist.config import MAX_SPEAKERS
from rvc_dist.data import corpora
from rvc_dist.data.corpora import Found, Listing
from rvc_dist.data.decode import AUDIO_SUFFIXES
from rvc_dist.files import ForeignFileError, hash_of, not_regular
from rvc_dist.schema import Repeat, SpeakerName, check
from rvc_dist.workspace import SourceFile, Speakers, StageError, WorkList, Workspace, fingerprint, listed, printable

logger = logging.getLogger(__name__)

KINDS = " ".join(suffix[1:] for suffix in AUDIO_SUFFIXES)
NO_FOLDER, BY_ID, BY_NAME, BY_ALL = "in no folder", "by id", "by name", "Name_ID_Repeat"
NO_NAME = "not at all"
"""The ways to name the folders of speakers."""
NAME_ID_REPEAT = re.compile("(.+)_([0-9]+)_([0-9]+)")
NAMED = 3
"""Recordings of either side that a refusal names."""


@dataclass(frozen=True)
class Corpus:
    """The recordings that data.audio_dir names."""

    sources: list[SourceFile]
    """In a fixed order; those that cannot be used carry a reason."""
    speakers: Speakers
    kind: str = ""
    """What it was recognised as; nothing for folders by speaker."""
    about: str = ""
    """The same in a line, with what was left out."""


def list_sources(audio_dir: Path, work: Workspace | None = None) -> tuple[list[SourceFile], Speakers]:
    """The sources and speakers of `read_corpus`."""
    corpus = read_corpus(audio_dir, work)
    return corpus.sources, corpus.speakers


def read_corpus(audio_dir: Path, work: Workspace | None = None) -> Corpus:
    """Every recording that `audio_dir` holds or lists, in a fixed order, and who speaks.

    The run folder of `work` is left out when it lies in the dataset; whom it knows by name keeps the id. Hidden
    folders, and links to folders, are named, not entered.

    Raises:
        StageError: it is missing, is neither a folder nor a list, or holds no usable file; its speakers are named in
            several ways, or two places in it disagree on a speaker.
    """
    listing = _listing(audio_dir, work)
    folders = [(f, _folder_of_name(who) if listing.kind else folder_of(f.path)) for f, who in listing.found]
    folders = [(f if f.reason or not folder.fault else f.refused(folder.fault), folder) for f, folder in folders]
    usable = [(f, folder) for f, folder in folders if not f.reason]
    places = {folder.top: f.where for f, folder in reversed(usable)}
    known = work.speakers() if work else Speakers()
    ids, speakers = _speakers_of({folder for _, folder in usable}, known, places)
    found = [
        replace(f, speaker=ids.get(folder.top, folder.speaker or 0), repeat=folder.repeat) for f, folder in folders
    ]
    found.sort(key=lambda f: (f.speaker, f.path, f.from_s, f.to_s, f.where))
    if all(f.reason for f in found):
        raise StageError(
            f"data.audio_dir: {audio_dir} holds no usable recording;",
            f"expected files of the kinds {KINDS}, or sub-folders of them named by speaker (0, or alice, or alice_0_1)",
            listed((f.path, f.reason) for f in found),
        )
    return Corpus(found, speakers, listing.kind, listing.about() if listing.kind else "")


def is_corpus(path: Path) -> bool:
    """Whether there is something that data.audio_dir may be."""
    return path.is_dir() or (path.is_file() and corpora.is_list(path)) or str(path).startswith(corpora.HF)


def _listing(audio_dir: Path, work: Workspace | None) -> Listing:
    """What is there, and the names of speakers as far as it is no folder by speaker."""
    if not str(audio_dir).startswith(corpora.HF) and not audio_dir.exists():
        raise StageError(
            f"data.audio_dir: {audio_dir} does not exist;", "expected a folder of recordings, or a list of them"
        )
    if corpora.is_data_set(audio_dir):
        return corpora.read_data_set(audio_dir)
    if audio_dir.is_file():
        if not corpora.is_list(audio_dir):
            raise StageError(
                f"data.audio_dir: {audio_dir} is a file;",
                f"expected a folder of recordings, or a list of them ({' or '.join(corpora.LISTS)})",
            )
        return corpora.read_list(audio_dir)
    files = _without_doubles(sorted(_walk(audio_dir, work.root if work else None), key=lambda f: f.path), audio_dir)
    if not any(not f.reason for f in files) and (lists := corpora.lhotse_lists(audio_dir)):
        return corpora.read_lhotse(lists)
    found = corpora.recognise(audio_dir, files, lambda path: Path(path).suffix.lower() in AUDIO_SUFFIXES)
    if found is not None and not (work and _was_plain(found.kind, files, work)):
        return found
    return Listing("", [Found(f) for f in files])


def _was_plain(kind: str, files: Iterable[SourceFile], work: Workspace) -> bool:
    """Whether the run has clips of these recordings already, taken as folders by speaker: then it goes on so."""
    old = WorkList.load(work.work_list_file)
    if old is None or old.corpus or not {f.path for unit in old.units for f in unit.files} & {f.path for f in files}:
        return False
    logger.warning(
        "data.audio_dir: its layout is that of %s, but the clips of this run were cut with a folder a speaker, and so "
        "it goes on; for %s by its own rules begin another run",
        kind,
        kind,
    )
    return True


def listing_of(sources: Iterable[SourceFile]) -> str:
    """A stamp of what a folder holds, without a look into its files."""
    return fingerprint([(f.path, f.reason) if f.reason else f.listed for f in sources])


class Folder(NamedTuple):
    """What the name of a speaker's folder says."""

    top: str
    """That name; nothing for files in no folder."""
    naming: str
    name: str = ""
    speaker: int | None = None
    """None where the folder has a name alone."""
    repeat: int = 1
    """How often each clip counts in an epoch."""
    fault: str = ""
    """Why nobody can be called so."""


def folder_of(path: str) -> Folder:
    """The speaker's folder of a recording, whose `path` begins in the dataset's."""
    top, separator, _ = path.partition(os.sep)
    return _folder(top) if separator else Folder("", NO_FOLDER, speaker=0)


@cache
def _folder(top: str) -> Folder:
    name = unicodedata.normalize("NFC", top)  # some systems take letters and accents apart
    try:
        if top.isascii() and top.isdecimal():
            return Folder(top, BY_ID, speaker=_speaker_id(top))
        if not (found := NAME_ID_REPEAT.fullmatch(name)):
            return Folder(top, BY_NAME, check(name, SpeakerName, "name"))
        name, speaker, repeat = found.groups()
        how_often = check(int(repeat), Repeat, "repeat")
        return Folder(top, BY_ALL, check(name, SpeakerName, "name"), _speaker_id(speaker), how_often)
    except ForeignFileError as error:
        return Folder(top, BY_NAME, speaker=0, fault=f"folder {top!a}: {error}")


@cache
def _folder_of_name(who: str | int | None) -> Folder:
    """The same of a speaker whom a list or a layout names."""
    if who is None:
        return Folder("", NO_NAME, speaker=0)
    try:
        if isinstance(who, int):
            return Folder(str(who), BY_ID, speaker=_speaker_id(str(who)))
        return Folder(who, BY_NAME, check(unicodedata.normalize("NFC", who), SpeakerName, "speaker"))
    except ForeignFileError as error:
        return Folder("", NO_NAME, speaker=0, fault=str(error))


def _speaker_id(text: str) -> int:
    if len(text) > len(str(MAX_SPEAKERS)) or int(text) >= MAX_SPEAKERS:
        raise ForeignFileError(f"speaker id {text} is above {MAX_SPEAKERS - 1}")
    return int(text)


class Claim(NamedTuple):
    """That a speaker has this name."""

    speaker: int
    name: str
    where: str
    """It is said: a folder."""


def _speakers_of(
    folders: Collection[Folder], known: Speakers, places: Mapping[str, str]
) -> tuple[dict[str, int], Speakers]:
    """The id of each of the `folders` that hold recordings, by its name, and all speakers.

    `places` say where each is first met in a list. Names that are `known` keep their ids, others take the lowest that
    are free, in the order of the alphabet: listing the same folders again gives the same. Who was trained and has no
    folder any more stays.

    Raises:
        StageError: the folders are named in several ways, or two of them disagree on a speaker.
    """
    folders = sorted(folders)
    namings = {folder.naming: printable(folder.top) for folder in folders}
    if len(namings) > 1 and namings.keys() != {NO_FOLDER, BY_ID}:
        ways = ", ".join(f"{naming}{top and ': '}{top}" for naming, top in namings.items())
        raise StageError(
            f"data.audio_dir: speakers are named in several ways ({ways});",
            "name all folders in one: 0, 1, ..., or alice, bob, ..., or alice_0_1, bob_1_1, ... (Name_ID_Repeat)",
        )
    ids = {name: i for i, name in known.names.items()}
    names = {folder.name for folder in folders if folder.speaker is None}
    if len(names) >= MAX_SPEAKERS:
        most = f"expected at most {MAX_SPEAKERS - 1}"
        raise StageError(f"data.audio_dir: {len(names)} speakers by name;", most)
    taken = {*known.trained, *(ids[name] for name in names if name in ids)}
    free = (i for i in itertools.count() if i not in taken)
    ids |= {name: next(free) for name in sorted(names - ids.keys())}
    found = {folder: ids[folder.name] if folder.speaker is None else folder.speaker for folder in folders}
    claims = [
        Claim(i, folder.name or known.names.get(i, str(i)), _place_of(folder, places)) for folder, i in found.items()
    ]
    claims += [Claim(i, known.names[i], "one that was trained") for i in sorted({*known.trained} - {*found.values()})]
    _check_claims(claims)
    names_by_id = dict(sorted((claim.speaker, claim.name) for claim in claims))
    return {folder.top: i for folder, i in found.items()}, Speakers(names_by_id, known.trained)


def _place_of(folder: Folder, places: Mapping[str, str]) -> str:
    place = places[folder.top]
    return (printable(folder.top) or "what is in no folder") + (f" ({place})" if place else "")


def _check_claims(claims: Sequence[Claim]) -> None:
    """Raises StageError unless each id has one name, and each name one id."""
    by: tuple[Callable[[Claim], int | str], ...] = (lambda c: c.speaker, lambda c: " ".join(c.name.casefold().split()))
    for key in by:
        first: dict[int | str, Claim] = {}
        for claim in claims:
            other = first.setdefault(key(claim), claim)
            if other[:2] != claim[:2]:
                told = " and ".join(f"{c.where} is speaker {c.speaker}, called {c.name}" for c in (other, claim))
                raise StageError(
                    f"data.audio_dir: {told};",
                    "give each speaker one id and one name, not told from others' by capitals or spaces",
                )


def _walk(audio_dir: Path, run_dir: Path | None) -> list[SourceFile]:
    found: list[SourceFile] = []

    def left_out(path: Path | str, reason: str) -> None:
        found.append(SourceFile(str(Path(path).relative_to(audio_dir)), 0, 0, 0, reason=reason))

    def unreadable(error: OSError) -> None:  # os.walk would pass over it
        left_out(error.filename, f"folder cannot be read ({error.strerror})")

    own = Path(os.path.realpath(run_dir)) if run_dir else None  # Path.resolve would raise for a loop of links
    for folder, folders, names in os.walk(audio_dir, onerror=unreadable):
        for name in list(folders):
            path = Path(folder, name)
            if path.is_symlink():  # which os.walk does not enter
                left_out(path, "link to a folder; expected the folder itself")
            elif path.resolve() == own:
                folders.remove(name)
            elif name.startswith("."):
                left_out(path, "hidden folder")
                folders.remove(name)
        found.extend(_source(Path(folder, name), audio_dir) for name in names)
    return found


def _source(path: Path, audio_dir: Path) -> SourceFile:
    """One file of the dataset, judged by its name and kind alone."""
    relative = path.relative_to(audio_dir)
    # Of a link the recording's own size and time count.
    status = path.stat() if path.exists() else path.lstat()
    reason, suffix = "", path.suffix.lower()
    if path.name.startswith("."):
        reason = "hidden file"
    elif path.is_symlink() and not path.exists():
        reason = "broken link"
    elif path.is_symlink() and not path.resolve().is_relative_to(audio_dir.resolve()):
        reason = "link that leads out of the dataset; expected the recording itself"
    elif told := not_regular(status.st_mode):
        reason = told
    elif suffix and suffix not in AUDIO_SUFFIXES:  # a name without one is judged by its content
        reason = f"not one of {KINDS}"
    elif not status.st_size:
        reason = "empty file (0 bytes)"
    return SourceFile(str(relative), 0, status.st_size, status.st_mtime_ns, reason=reason)


def content_of(path: Path) -> str:
    """A short hash of all bytes of a recording, whatever it is called and wherever it is.

    Raises:
        OSError: it cannot be read.
    """
    return hash_of(path, hashlib.blake2b())[:16]  # BLAKE2 is fast on processors of every kind


def content_by(work_list: WorkList | None, audio_dir: Path) -> Callable[[SourceFile], str]:
    """The content of a recording: as `work_list` has it where neither size nor time differs, else it is read."""
    known = {f.file: f.content for unit in (work_list.units if work_list else ()) for f in unit.files}

    def content(file: SourceFile) -> str:
        if not (found := known.get(file.file)):
            with corpora.located(audio_dir, file.path) as path:
                found = content_of(path)
        return found

    return content


def check_recordings(work: Workspace, sources: Iterable[SourceFile], content: Callable[[SourceFile], str]) -> None:
    """Nothing, if the run may go on with `sources`. `content` is asked until one of them is known, names first.

    Raises:
        StageError: the newest checkpoint was trained on none of them, as training says once they are cut.
    """
    path, trained_on = work.trained_on()
    old, new = trained_on.get("recordings", {}), {}
    names = {*old.values()}
    usable = [s for s in sources if old and not s.reason]
    for source in sorted(usable, key=lambda s: s.path not in names):
        found = content(source)
        if found in old or source.path in hashless(old):
            return
        new[found] = source.path
    if new:
        raise other_recordings(path, old, new)


def hashless(recordings: Mapping[str, str]) -> set[str]:
    """The names of those in a checkpoint whose content it does not know: what an older version of rvc_dist cut."""
    return {name for key, name in recordings.items() if key.startswith(f"{name} to ")}


def other_recordings(path: Path, old: Mapping[str, str], new: Mapping[str, str]) -> StageError:
    """For a checkpoint in `path` of recordings of which none is there; names by content."""
    return StageError(
        f"{path} was trained on other recordings ({named(old)}) than those that are there now ({named(new)}): none is "
        "the same.",
        "Give the new voice another run_dir, or remove the checkpoints to begin anew",
    )


def named(recordings: Mapping[str, str]) -> str:
    names = sorted(set(recordings.values()))
    more = ", ..." if len(names) > NAMED else ""
    return f"{len(names)} ({', '.join(map(printable, names[:NAMED]))}{more})"


def _without_doubles(files: list[SourceFile], audio_dir: Path) -> list[SourceFile]:
    """`files` with a reason for each link to a recording that is used anyway: no recording is heard twice."""
    usable = [f for f in files if not f.reason]
    links = {f.path for f in usable if (audio_dir / f.path).is_symlink()}
    if not links:
        return files
    taken = {(audio_dir / f.path).resolve(): f.path for f in usable if f.path not in links}
    doubles = {}
    for path in sorted(links):
        first = taken.setdefault((audio_dir / path).resolve(), path)
        if first != path:
            doubles[path] = f"link to the same recording as {printable(first)}"
    return [replace(f, reason=doubles.get(f.path, f.reason)) for f in files]
