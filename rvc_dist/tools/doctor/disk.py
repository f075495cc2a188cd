"""Checks of the run folder: space, speed, atomic renames, and that all ranks share it."""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
import statistics
import time
from pathlib import Path

from rvc_dist.files import atomic_write
from rvc_dist.tools.doctor.findings import Result, ranks_text
from rvc_dist.tools.doctor.team import SAME_FOLDER, Exam, Team
from rvc_dist.workspace import StageError

MAX_FSYNC_S = 0.1
SEEN_WITHIN_S = 5.0
"""A file of another node may take so long to appear: NFS keeps listings for some seconds."""
WRITTEN_BYTES = 32 << 20
"""Size of the file whose writing is timed."""


def existing_parent(path: Path) -> Path:
    """`path` itself, or the nearest folder above it that exists."""
    return next(p for p in (path, *path.absolute().parents) if p.is_dir())


def judge_disk(folder: Path, one: int, total: int, result: Result) -> None:
    """Bytes of what is made of the data and of one checkpoint, and of all that is to come."""
    free = shutil.disk_usage(folder).free
    result.measured |= {"free": (free / 1e9, "GB"), "for the run": (max(0, total) / 1e9, "GB")}
    remedy = f"free space on the disk of {folder}, choose another run_dir, or lower train.keep_checkpoints"
    if free < one:
        result.fail(
            f"the disk has {free / 1e6:.0f} MB free, the run needs {one / 1e6:.0f} MB to its first checkpoint", remedy
        )
    elif free < total:
        result.warn(f"the disk has {free / 1e9:.2f} GB free, the run may need {total / 1e9:.2f} GB", remedy)


def check_run_folder(exam: Exam, result: Result) -> None:
    """Every rank can write to the run folder, sees what the others write there, and files are synced and renamed."""
    team, root = exam.team, exam.work.root
    made: list[Path] = []
    (token, *_) = team.gather(f".doctor_{secrets.token_hex(8)}")
    mine = root / f"{token}_{team.rank}"
    try:
        if team.is_first:
            made = make_folders(root)
        if _all_wrote(exam, result, mine):
            _look_for(team, root, token, result)
            team.gather(None)  # nobody removes what another still looks for
    finally:
        remove_traces(mine)
        with contextlib.suppress(StageError):  # an exchange that failed was told
            team.gather(None)
        for folder in reversed(made):
            with contextlib.suppress(OSError):  # another program may use it meanwhile
                folder.rmdir()


def remove_traces(path: Path) -> None:
    """Remove what `measure_folder` made, also when it failed halfway."""
    with contextlib.suppress(OSError):  # there is nothing, or a file is in the place of the folder
        path.unlink()
    for folder in _renamed_folder(path):
        with contextlib.suppress(OSError):
            folder.rmdir()


def _renamed_folder(path: Path) -> tuple[Path, Path]:
    """A folder's name before and after."""
    return path.with_name(f"{path.name}.before"), path.with_name(f"{path.name}.after")


def make_folders(root: Path) -> list[Path]:
    """Make `root` and what is above it; returns the new ones, outermost first. Unlike `mkdir`, tells no error."""
    new = [p for p in reversed([root, *root.parents]) if not p.exists()]
    with contextlib.suppress(OSError):  # writing into it will fail, and say why
        root.mkdir(parents=True, exist_ok=True)
    return [p for p in new if p.is_dir()]


def _all_wrote(exam: Exam, result: Result, mine: Path) -> bool:
    """Write and measure on every rank; whether it worked on all of them."""
    team, root = exam.team, mine.parent
    (there, *_) = team.gather(root.is_dir())
    worked = False
    try:
        if there and not _appears(root):
            result.fail(f"{root}, which rank 0 has, does not exist here", SAME_FOLDER)
        else:
            measure_folder(mine, result, with_speed=team.is_first)
            worked = True
    except OSError as error:
        result.fail(
            f"run_dir: {root} cannot be written to ({error.strerror}: {error.filename or root})",
            "make it writable, remove what is in the way, or choose another run_dir",
        )
    return all(team.gather(worked))


def _appears(path: Path) -> bool:
    """Whether `path` exists now or soon, since network filesystems keep listings for a while."""
    deadline = time.monotonic() + SEEN_WITHIN_S
    while not path.exists():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.1)
    return True


def _look_for(team: Team, root: Path, token: str, result: Result) -> None:
    """The first rank looks for the files of all others, the others for the first rank's."""
    others = [] if team.count == 1 else range(team.count) if team.is_first else [0]
    unseen = [rank for rank in others if not _appears(root / f"{token}_{rank}")]
    if unseen:
        result.fail(f"what rank(s) {ranks_text(unseen)} wrote in {root} is not to be seen here", SAME_FOLDER)
    elif team.count > 1:
        result.same["shared"] = "yes"


def measure_folder(path: Path, result: Result, with_speed: bool) -> None:
    """Write `path` several times as all files of a run are written, which must replace it whole; time that.

    Raises:
        OSError: the folder refuses.
    """
    seconds = []
    for i in range(5):
        began_at = time.monotonic()
        atomic_write(path, f"{i}" * 4096)
        seconds.append(time.monotonic() - began_at)
    with path.open() as before:
        atomic_write(path, "new")
        whole = before.read() == "4" * 4096 and path.read_text() == "new"
    folder, renamed = _renamed_folder(path)
    folder.mkdir()
    folder.rename(renamed)
    if not whole or folder.exists() or not renamed.is_dir():
        result.fail(
            f"renaming in {path.parent} is not atomic",
            "choose a run_dir on a POSIX filesystem (ext4, xfs, NFS, Lustre)",
        )
    fsync_s = statistics.median(seconds)
    result.measured["write, sync, rename"] = (fsync_s * 1000, "ms")
    if fsync_s > MAX_FSYNC_S:
        result.warn(
            f"writing and syncing a small file in {path.parent} takes more than {MAX_FSYNC_S * 1000:.0f} ms",
            "choose a faster filesystem for run_dir, or write less often: a larger train.save_every_steps",
        )
    if with_speed and shutil.disk_usage(path.parent).free > 4 * WRITTEN_BYTES:
        began_at = time.monotonic()
        atomic_write(path, os.urandom(1 << 20) * (WRITTEN_BYTES >> 20))
        result.measured["writes"] = (WRITTEN_BYTES / 1e6 / (time.monotonic() - began_at), "MB/s")
