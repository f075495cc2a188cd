"""Checks of the run folder: space, speed, atomic renames, and that all ranks share it."""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
import statistics
import time
from collections.abc import Iterator
from pathlib import Path

from rvc_dist.config import F0_PER_S
from rvc_dist.data.number_formats import clip_bytes_per_s, feature_bytes_per_s
from rvc_dist.features import index_file
from rvc_dist.files import atomic_write, existing_folder
from rvc_dist.tools.doctor.data import recorded_seconds
from rvc_dist.tools.doctor.findings import Fact, Findings, error, ranks_text, same, warning
from rvc_dist.tools.doctor.ranks import DoctorContext, RankGroup
from rvc_dist.train import checkpoint
from rvc_dist.workspace import StageError, list_checkpoints

SAME_FOLDER = "every rank must see the same run folder and be given the same recipe: put run_dir on a shared filesystem"
MAX_FSYNC_S = 0.1
SEEN_WITHIN_S = 5.0
"""A file of another node may take so long to appear: NFS keeps listings for some seconds."""
WRITTEN_BYTES = 32 << 20
"""Size of the file whose writing is timed."""


def check_disk(context: DoctorContext) -> Findings:
    """The run's disk holds clips, features, index, checkpoints and voice files that are still to come."""
    config, work = context.recipe.train, context.work
    weights = {name: sum(p.nbytes for p in module.parameters()) for name, module in context.modules.items()}
    one = 3 * sum(weights.values()) + checkpoint.SPARE_BYTES  # weights, and two moments of each
    kept = sum(f.stat().st_size for p in list_checkpoints(work.checkpoints_dir) for f in p.glob("*"))
    folders = (work.clips_dir, work.features_dir, work.index_dir)
    there = sum(f.stat().st_size for folder in folders for f in folder.glob("*"))
    data = max(0, round(sum(data_bytes(context))) - there) if context.has_features_to_make else 0
    voices = 3 * (weights.get("generator", 0) // 2)
    yield Fact("for the data stages", data / 1e9, "GB")
    # The newest ones, the best, and the one being written before the oldest goes.
    total = data + (config.keep_checkpoints + 2) * one + voices - kept
    folder = existing_folder(work.root)
    yield from room(folder, data + one, total)


def data_bytes(context: DoctorContext) -> Iterator[float]:
    """Bytes of clips, features and index when no recording is silent anywhere."""
    recipe, width = context.recipe, (context.embedder or {}).get("width", 768)
    seconds = recorded_seconds(context)
    if recipe.preprocess.cut_method != "skip":
        seconds *= recipe.preprocess.chunk_len / (recipe.preprocess.chunk_len - recipe.preprocess.overlap_len)
    yield seconds * (clip_bytes_per_s(recipe) + feature_bytes_per_s(recipe, width))
    frames = seconds * F0_PER_S / 2
    index = recipe.index
    vectors = frames if index.algorithm == "faiss" or index.has_each else min(frames, index_file.KMEANS_ABOVE)
    yield (1 + index.has_common + index.has_each) * vectors * width * 4  # total_fea.npy and the index files


def room(folder: Path, one: int, total: int) -> Findings:
    """Bytes of what is made of the data and of one checkpoint, and of all that is to come."""
    free = shutil.disk_usage(folder).free
    yield from (Fact("free", free / 1e9, "GB"), Fact("for the run", max(0, total) / 1e9, "GB"))
    remedy = f"free space on the disk of {folder}, choose another run_dir, or lower train.keep_checkpoints"
    if free < one:
        yield error(
            f"the disk has {free / 1e6:.0f} MB free, the run needs {one / 1e6:.0f} MB to its first checkpoint", remedy
        )
    elif free < total:
        yield warning(f"the disk has {free / 1e9:.2f} GB free, the run may need {total / 1e9:.2f} GB", remedy)


def check_run_folder(context: DoctorContext) -> Findings:
    """Every rank can write to the run folder, sees what the others write there, and files are synced and renamed."""
    group, root = context.group, context.work.root
    made = [p for p in (root, *root.parents) if not p.exists()] if group.is_first else []
    if group.is_first:
        with contextlib.suppress(OSError):  # writing into it will fail, and say why
            root.mkdir(parents=True, exist_ok=True)
    try:
        yield from write_and_look(group, root)
    finally:
        for folder in made:
            with contextlib.suppress(OSError):  # it was not made, or another program uses it meanwhile
                folder.rmdir()


def write_and_look(group: RankGroup, root: Path) -> Findings:
    """Each rank makes a folder of its own in `root`, and looks for that of others once all are there."""
    (token, there), *_ = group.gather((f".doctor_{secrets.token_hex(8)}", root.is_dir()))
    mine = root / f"{token}_{group.rank}"
    problem = None
    try:
        if there and not _appears(root):
            problem = error(f"{root}, which rank 0 has, does not exist here", SAME_FOLDER)
        else:
            yield from measure_folder(mine, with_speed=group.is_first)
    except OSError as failed:
        problem = error(
            f"run_dir: {root} cannot be written to ({failed.strerror}: {failed.filename or root})",
            "make it writable, remove what is in the way, or choose another run_dir",
        )
    try:
        if problem is not None:
            yield problem
        if all(group.gather(problem is None)):
            # The first rank looks for the folders of all others, the others for the first rank's.
            others = [] if group.count == 1 else range(group.count) if group.is_first else [0]
            unseen = [rank for rank in others if not _appears(root / f"{token}_{rank}")]
            if unseen:
                what = f"what rank(s) {ranks_text(unseen)} wrote in {root} is not to be seen here"
                yield error(what, SAME_FOLDER)
            elif group.count > 1:
                yield from same({"shared": "yes"})
            group.gather(None)  # nobody removes what another still looks for
    finally:
        for folder in (mine, _unfinished(mine)):
            shutil.rmtree(folder, ignore_errors=True)
        with contextlib.suppress(StageError):  # an exchange that failed was reported
            group.gather(None)


def _appears(path: Path) -> bool:
    """Whether `path` exists now or soon, since network filesystems keep listings for a while."""
    deadline = time.monotonic() + SEEN_WITHIN_S
    while not path.exists():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.1)
    return True


def _unfinished(folder: Path) -> Path:
    return folder.with_name(f"{folder.name}.before")


def measure_folder(final: Path, with_speed: bool) -> Findings:
    """Write a file several times as all files of a run are written, which must replace it whole; time that.

    It lies in a folder that gets the name `final` in the end, as a checkpoint does.

    Raises:
        OSError: the disk refuses.
    """
    root, folder, seconds = final.parent, _unfinished(final), []
    path = folder / "file"
    folder.mkdir()
    for i in range(5):
        began_at = time.monotonic()
        atomic_write(path, f"{i}" * 4096)
        seconds.append(time.monotonic() - began_at)
    with path.open() as before:
        atomic_write(path, "new")
        whole = before.read() == "4" * 4096 and path.read_text() == "new"
    folder.rename(final)
    if not whole or folder.exists() or not final.is_dir():
        yield error(
            f"renaming in {root} is not atomic", "choose a run_dir on a POSIX filesystem (ext4, xfs, NFS, Lustre)"
        )
    fsync_s = statistics.median(seconds)
    yield Fact("write, sync, rename", fsync_s * 1000, "ms")
    if fsync_s > MAX_FSYNC_S:
        yield warning(
            f"writing and syncing a small file in {root} takes more than {MAX_FSYNC_S * 1000:.0f} ms",
            "choose a faster filesystem for run_dir, or write less often: a larger train.save_every_steps",
        )
    if with_speed and shutil.disk_usage(root).free > 4 * WRITTEN_BYTES:
        began_at = time.monotonic()
        atomic_write(final / path.name, os.urandom(1 << 20) * (WRITTEN_BYTES >> 20))
        yield Fact("writes", WRITTEN_BYTES / 1e6 / (time.monotonic() - began_at), "MB/s")
