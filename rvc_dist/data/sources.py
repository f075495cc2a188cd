"""The recordings of a dataset folder: which can be used, whose they are, and why the others are left out."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from pathlib import Path

from rvc_dist.config import MAX_SPEAKERS
from rvc_dist.data.decode import AUDIO_SUFFIXES
from rvc_dist.files import not_regular
from rvc_dist.workspace import SourceFile, StageError, WorkList, Workspace, listed, printable

KINDS = " ".join(suffix[1:] for suffix in AUDIO_SUFFIXES)
NAMED = 3
"""Recordings of either side that a refusal names."""


def list_sources(audio_dir: Path, run_dir: Path | None = None) -> list[SourceFile]:
    """Every file below `audio_dir` in a fixed order; those that cannot be used carry a reason.

    `run_dir` is left out when it lies in the dataset. Hidden folders, and links to folders, are named, not entered.

    Raises:
        StageError: the folder is missing, is not a folder, or holds no usable file.
    """
    if not audio_dir.exists():
        raise StageError(f"data.audio_dir: {audio_dir} does not exist;", "expected a folder of recordings")
    if not audio_dir.is_dir():
        raise StageError(f"data.audio_dir: {audio_dir} is a file;", "expected a folder of recordings")
    found = sorted(_walk(audio_dir, run_dir), key=lambda f: (f.speaker, f.path))
    found = _without_doubles(found, audio_dir)
    if all(f.reason for f in found):
        raise StageError(
            f"data.audio_dir: {audio_dir} holds no usable recording;",
            f"expected files of the kinds {KINDS}, or sub-folders of them named by speaker id (0, 1, ...)",
            listed((f.path, f.reason) for f in found),
        )
    return found


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
    speaker, reason = _speaker_of(relative)
    suffix = path.suffix.lower()
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
    return SourceFile(str(relative), speaker, status.st_size, status.st_mtime_ns, reason=reason)


def content_of(path: Path) -> str:
    """A short hash of all bytes of a recording, whatever it is called and wherever it is.

    Raises:
        OSError: it cannot be read.
    """
    with path.open("rb") as file:
        return hashlib.file_digest(file, "blake2b").hexdigest()[:16]  # BLAKE2 is fast on processors of every kind


def content_by(work_list: WorkList | None, audio_dir: Path) -> Callable[[SourceFile], str]:
    """The content of a recording: as `work_list` has it where neither size nor time differs, else it is read."""
    known = {f.listed: f.content for unit in (work_list.units if work_list else ()) for f in unit.files}
    return lambda file: known.get(file.listed) or content_of(audio_dir / file.path)


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


def _speaker_of(relative: Path) -> tuple[int, str]:
    """The speaker id of a dataset file, and the reason when its folder gives none."""
    if len(relative.parts) == 1:
        return 0, ""
    top = relative.parts[0]
    if top.isascii() and top.isdecimal():
        speaker = int(top)
        return (speaker, "") if speaker < MAX_SPEAKERS else (0, f"speaker id {top} is above {MAX_SPEAKERS - 1}")
    return 0, f"folder {top!r} is not named by an integer speaker id"
