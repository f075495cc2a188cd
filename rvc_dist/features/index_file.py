"""FAISS index files, judged before faiss reads them: it trusts their sizes, and ends the process over some.

Read here are the two kinds that RVC has, in the format of FAISS's impl/index_write.cpp: an IndexFlat, and an
IndexIVFFlat over one, both of squared distances, with their lists in the same file.
"""

from __future__ import annotations

import re
import struct
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from rvc_dist.config import Recipe
from rvc_dist.files import ForeignFileError, regular_size
from rvc_dist.workspace import IndexReport, StageError, Workspace, fingerprint, read_json

FLAT, IVF_FLAT = b"IxF2", b"IwFl"
SQUARED_DISTANCE = 1
MAX_IN_MEMORY = 1_000_000_000
"""Bytes of an index file above which retrieval maps it instead of reading it."""
NUM_NEIGHBOURS = 8
MIN_DISTANCE = 1e-9
CHUNK = 1 << 22
"""Numbers that are looked at at once."""

OF_SPEAKER = re.compile(r"_spkid[0-9]+\.index$")
"""How the name of one speaker's index ends."""
KMEANS_ABOVE = 200_000
"""More frames than this are first reduced to KMEANS_CENTRES."""
KMEANS_CENTRES = 10_000

Vectors = npt.NDArray[np.float32]


def index_name(recipe: Recipe, cells: int, nprobe: int, speaker: int | None = None) -> str:
    """The name that other tools look for, of the index of all or of one speaker."""
    whose = "" if speaker is None else f"_spkid{speaker}"
    return f"added_IVF{cells}_Flat_nprobe_{nprobe}_{recipe.name}_{recipe.model.version}{whose}.index"


def index_in(folder: Path, speaker: int) -> Path:
    """Of the indexes of one voice in `folder`, as other tools keep them, the speaker's, else that of all.

    Raises:
        StageError: there is not exactly one.
    """
    files = sorted(path for path in folder.glob("*.index") if not path.name.startswith("trained_"))  # without vectors
    own = [path for path in files if path.name.endswith(f"_spkid{speaker}.index")]
    found = own or [path for path in files if not OF_SPEAKER.search(path.name)]
    if len(found) != 1:
        names = ", ".join(path.name for path in found[:3]) or "none"
        raise StageError(f"infer.index: {folder} has {len(found)} indexes for speaker {speaker} ({names});", "name one")
    return found[0]


def complete(recipe: Recipe) -> bool | None:
    """True when the index is there, or that of each speaker, and made of the present features, else None."""
    work = Workspace(recipe.run_dir, recipe.name)
    if not work.index_report_file.is_file():
        return None
    report = read_json(work.index_report_file, IndexReport)
    of_speakers = [entry["file"] for entry in report.get("speakers", [])]
    is_wanted = ("file" in report, bool(of_speakers)) == (recipe.index.has_common, recipe.index.has_each)
    names = of_speakers + ([report["file"]] if "file" in report else [])
    is_there = all((work.index_dir / name).is_file() for name in names)
    return (is_wanted and is_there and report.get("stamp") == wanted_fingerprint(recipe, work)) or None


def wanted_fingerprint(recipe: Recipe, work: Workspace) -> str:
    """Of the index of the present features.

    Raises:
        StageError: there are none.
    """
    if not work.features_report_file.is_file():
        raise StageError(f"{work.features_dir} has no features:", "run `rvc-dist extract` first")
    settings = asdict(recipe.index)
    if not recipe.index.has_each:  # as before there were others
        del settings["speakers"]
    return fingerprint(read_json(work.features_report_file), settings, recipe.name)


class IndexSize(NamedTuple):
    """What an index holds."""

    num_vectors: int
    num_cells: int
    """0 for an index without cells."""


def check_index(path: Path, width: int) -> IndexSize:
    """What is in an index file of vectors `width` wide, all of which is as faiss and RVC expect it.

    Raises:
        ForeignFileError: it is not.
        OSError: it cannot be opened.
    """
    file = _File(path)
    kind, num = file.head(width)
    if kind == FLAT:
        file.vectors(num, width)
        cells = 0
    else:
        cells = _check_cells(file, num, width)
    if file.left:
        raise ForeignFileError(f"it has {file.left} bytes after its end")
    return IndexSize(num, cells)


def _check_cells(file: _File, num: int, width: int) -> int:
    cells: int
    cells, nprobe = file.unpack("<QQ")
    kind, num_centres = file.head(width)
    if kind != FLAT or num_centres != cells or not cells or not nprobe:
        raise ForeignFileError(f"it has {cells} cells, {num_centres} centres and nprobe {nprobe}")
    file.vectors(cells, width)
    if file.unpack("<BQ") != (0, 0):
        raise ForeignFileError("it holds a direct map, which RVC's do not")
    lists, num_lists, code_size, form, count = file.unpack("<4sQQ4sQ")
    if (lists, num_lists, code_size) != (b"ilar", cells, 4 * width) or count > 2 * cells:
        raise ForeignFileError("it keeps its lists elsewhere or not at all")
    sizes = file.numbers("<u8", count)
    if form == b"sprs" and not count % 2:  # pairs of list and size
        order, sizes = sizes[::2], sizes[1::2]
        is_fit = bool((order < cells).all() and (order[1:] > order[:-1]).all())
    else:
        is_fit = form == b"full" and count == cells
    if not is_fit or sum(sizes.tolist()) != num or num * (4 * width + 8) > file.left:
        raise ForeignFileError("the sizes of its lists do not fit its cells, its vectors or the file")
    is_there = np.zeros(num, bool)
    for length in sizes[sizes > 0].tolist():
        vectors = file.numbers("<f4", length * width)
        if not file.is_large:  # a search looks at what it takes of a large one
            _check_finite(vectors)
        numbers = file.numbers("<u8", length)
        if numbers.max() >= num:
            raise ForeignFileError(f"it numbers a vector {numbers.max()} of {num}")
        is_there[numbers] = True
    if not is_there.all():
        raise ForeignFileError("it numbers several vectors alike")
    return cells


class _File:
    """An index file, mapped and read from its beginning on; nothing beyond its end is."""

    def __init__(self, path: Path) -> None:
        self.left = regular_size(path)
        self.is_large = self.left > MAX_IN_MEMORY
        self.bytes = np.memmap(path, np.uint8, "r") if self.left else np.zeros(0, np.uint8)

    def numbers(self, dtype: str, count: int) -> npt.NDArray[Any]:
        """The next `count` numbers."""
        first, size = len(self.bytes) - self.left, count * np.dtype(dtype).itemsize
        if size > self.left:
            raise ForeignFileError("it is cut short")
        self.left -= size
        return self.bytes[first : first + size].view(dtype)

    def unpack(self, form: str) -> tuple[Any, ...]:
        return struct.unpack(form, self.numbers("u1", struct.calcsize(form)).tobytes())

    def head(self, width: int) -> tuple[bytes, int]:
        """(kind, number of vectors) of what begins here."""
        kind, found, num, _, _, is_trained, metric = self.unpack("<4siqqqBi")
        if kind not in (FLAT, IVF_FLAT):
            raise ForeignFileError(f"it is of FAISS's kind {kind!r}, expected an IVF,Flat or Flat index of distances")
        if (is_trained, metric) != (1, SQUARED_DISTANCE) or num < 0:
            raise ForeignFileError(
                f"it has {num} vectors, metric {metric} and is_trained {is_trained}, expected 1 and 1"
            )
        if found != width:
            raise ForeignFileError(f"it holds features {found} wide, expected {width}")
        return kind, num

    def vectors(self, num: int, width: int) -> None:
        (count,) = self.unpack("<Q")
        if count != num * width:
            raise ForeignFileError(f"it has {count} numbers for {num} vectors {width} wide")
        _check_finite(self.numbers("<f4", count))


def _check_finite(numbers: npt.NDArray[Any]) -> None:
    for first in range(0, len(numbers), CHUNK):
        if not np.isfinite(numbers[first : first + CHUNK]).all():
            raise ForeignFileError("it holds numbers that are not finite")


def load_faiss() -> Any:
    """The module, imported late: it takes a second.

    Raises:
        StageError: it is not installed.
    """
    try:
        import faiss
    except ImportError as error:
        raise StageError(
            "faiss is not installed:", "`pip install faiss-cpu` (or faiss-gpu-cu12, but only one of them)"
        ) from error
    return faiss


class Retriever:
    """Mixes content features with their nearest neighbours in an index; a large index stays on the disk.

    Raises:
        StageError: the file is not an index of RVC, or is of another width.
    """

    def __init__(self, path: Path, width: int) -> None:
        faiss = load_faiss()
        try:
            if not check_index(path, width).num_vectors:
                raise ForeignFileError("it is empty")
        except FileNotFoundError as error:
            raise StageError(f"infer.index: {path} does not exist") from error
        except ForeignFileError as error:
            raise StageError(
                f"infer.index: {path} is no index for this voice: {error};",
                "give the added_*.index that was made with it, or --infer.index_rate 0",
            ) from error
        self.path, is_large = path, path.stat().st_size > MAX_IN_MEMORY
        self._index = faiss.read_index(str(path), faiss.IO_FLAG_MMAP if is_large else 0)
        self._vectors: Vectors | None = None if is_large else self._index.reconstruct_n(0, self._index.ntotal)

    def __call__(self, content: Vectors, rate: float) -> Vectors:
        """`content` [T, C] with the share `rate` replaced by the mean of 8 neighbours, weighted by (1/d)^2.

        d is FAISS's distance, which is squared. An exact hit takes all the weight instead of dividing by zero; a frame
        whose cells are all empty stays as it is.
        """
        queries = np.ascontiguousarray(content, dtype=np.float32)
        if self._vectors is None:
            distances, neighbours, nearest = self._index.search_and_reconstruct(queries, NUM_NEIGHBOURS)
            nearest[neighbours < 0] = 0.0  # FAISS fills them with NaN
            if not np.isfinite(nearest).all():  # of a small index, its file was looked at
                raise StageError(f"infer.index: {self.path} holds numbers that are not finite;", "make it again")
        else:  # faster
            distances, neighbours = self._index.search(queries, NUM_NEIGHBOURS)
            nearest = self._vectors[np.maximum(neighbours, 0)]
        is_found = neighbours >= 0
        weights = np.where(is_found, 1.0 / np.square(np.maximum(distances, MIN_DISTANCE, dtype=np.float64)), 0.0)
        weights /= np.maximum(weights.sum(axis=1, keepdims=True), np.finfo(np.float64).tiny)
        found = np.einsum("tkc,tk->tc", nearest, weights.astype(np.float32))
        share = rate * is_found.any(axis=1, keepdims=True)
        mixed: Vectors = (share * found + (1.0 - share) * content).astype(np.float32)
        return mixed
