"""The index stage: content features -> a FAISS IVF-Flat index, as the tools of RVC read it.

Frames are streamed. However many there are, memory holds a sample of MAX_SAMPLE of them, a chunk, and the cell and
place of each (some 20 bytes a frame). Shapes: N vectors, Q queries, K neighbours, C channels.
"""

from __future__ import annotations

import contextlib
import json
import logging
import math
import subprocess
import sys
from bisect import bisect_left
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from functools import cache, partial
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, TypeVar

import numpy as np
import numpy.typing as npt

from rvc_dist.config import Recipe
from rvc_dist.features.index_file import (
    KMEANS_ABOVE,
    KMEANS_CENTRES,
    MAX_IN_MEMORY,
    NUM_NEIGHBOURS,
    Vectors,
    complete,
    index_name,
    load_faiss,
    wanted_fingerprint,
)
from rvc_dist.files import ForeignFileError, atomic_write, beside, disk_errors, remove_half_written, write_json
from rvc_dist.schema import Count, FileName, parse_json, record
from rvc_dist.screen import ProgressBar
from rvc_dist.workspace import Shard, StageError, Workspace, fingerprint

logger = logging.getLogger(__name__)

KMEANS_STEPS = 20
MAX_SAMPLE = 500_000
"""Most frames that k-means and the cells are trained on: 1.5 GB of 768 channels."""
VECTORS_A_CELL = 39
"""Training vectors that FAISS wants for each cell."""
SEED = 1234
"""Of the sample and of k-means."""
CHUNK = 8192
"""Vectors that are read, assigned and compared at once."""
NUM_QUERIES = 1000
"""Most frames on which the recall is measured."""
SAME_DISTANCE = 1.0 + 1e-5
"""Squared distances that differ by no more than this factor differ by their rounding alone."""
T = TypeVar("T")
NO_LISTS = b"il00"
"""How FAISS ends the file of an index without lists."""

Numbers = npt.NDArray[np.int64]
"""Positions of vectors."""


GPU_TRIAL = """
import faiss, numpy
print(faiss.get_num_gpus())
if faiss.get_num_gpus():
    index, vectors = faiss.index_cpu_to_all_gpus(faiss.IndexFlatL2(8)), numpy.zeros((8, 8), "float32")
    index.add(vectors)
    index.search(vectors, 1)
"""
TRIAL_S = 120.0


@cache
def _has_gpus() -> bool:
    """Whether faiss sees GPUs and can use them; if it sees them but cannot, the reason is logged.

    Tried in another process: of a driver or a GPU that it was not built for, faiss says so by ending the process.
    """
    if not hasattr(load_faiss(), "StandardGpuResources"):  # built for CPUs
        return False
    try:
        trial = subprocess.run(
            [sys.executable, "-c", GPU_TRIAL], capture_output=True, text=True, timeout=TRIAL_S, check=False
        )
    except subprocess.TimeoutExpired:
        logger.warning("index: on the CPU, since a trial of faiss on the GPU took more than %g s", TRIAL_S)
        return False
    if trial.returncode:
        reason = (trial.stderr.strip() or f"exit code {trial.returncode}").splitlines()[-1]
        logger.warning("index: on the CPU, since faiss cannot use the GPU: %s", reason)
    return trial.returncode == 0 and trial.stdout.strip() != "0"


def _on_gpus(what: str, compute: Callable[[Callable[[Any], Any]], T]) -> T:
    """`compute`, given what moves an index to every GPU that faiss sees; where there is none, or they fail, the CPU.

    GPUs add in another order, so near ties may fall the other way: a file of the same kind, with other bits.
    """
    if _has_gpus():
        try:
            return compute(load_faiss().index_cpu_to_all_gpus)
        except RuntimeError as error:  # such as too little memory
            reason = " ".join(str(error).split())
            logger.warning("index: %s on the CPU, since faiss failed on the GPU: %.300s", what, reason)
    return compute(lambda index: index)


def num_cells(num_vectors: int) -> int:
    """max(1, min(int(16 sqrt(N)), S // 39)), where S = min(N, MAX_SAMPLE) of the vectors train the cells.

    FAISS wants 39 training vectors a cell, and one cell always works. From N = 642,102 on, S bounds the cells.
    """
    return max(1, min(int(16 * math.sqrt(num_vectors)), min(num_vectors, MAX_SAMPLE) // VECTORS_A_CELL))


def run(recipe: Recipe, shard: Shard) -> None:
    """Build the index, or one of each speaker, on the first rank, and measure the recall.

    Raises:
        StageError: the features are missing or damaged, faiss is missing, or the folder cannot be written.
    """
    if not shard.is_first:
        return
    work = Workspace(recipe.run_dir, recipe.name)
    work.check_name()
    wanted = wanted_fingerprint(recipe, work)
    if complete(recipe):
        logger.info("index: %s is up to date", work.index_file() or work.index_dir)
        return
    load_faiss()  # before all frames are read, not after
    remove_half_written(work.index_dir)
    frames, has_each = Frames.find(work), recipe.index.has_each
    wanted_of: dict[int | None, Frames] = {None: frames} if recipe.index.has_common else {}
    wanted_of |= frames.by_speaker() if has_each else {}
    made = Made(recipe, work, wanted_of) if has_each else None
    entries = {s: made.entry(s, own) if made else build(recipe, work, own, s) for s, own in wanted_of.items()}
    report = entries.pop(None, {}) | (
        {"speakers": [{"speaker": s, **e} for s, e in entries.items()]} if has_each else {}
    )
    files = {entry["file"] for entry in (report, *report.get("speakers", [])) if "file" in entry}
    for old in work.index_dir.glob("added_*.index"):
        if old.name not in files:
            old.unlink(missing_ok=True)  # by another job too
    if made is None:
        (work.index_dir / MADE).unlink(missing_ok=True)
    if not recipe.index.has_common:
        work.vectors_file.unlink(missing_ok=True)
    write_json(work.index_report_file, {"stamp": wanted, **report})


MADE = "made.jsonl"
MadeLine = record(inputs=str, bytes=list[Count], entry=record(file=FileName))


class Made:
    """Which indexes are there, by a fingerprint of what each was made of: who is killed goes on behind the last.

    A line of RUN/index/made.jsonl is written when its index is whole. Those of other inputs go before any index is
    made, so that none speaks of a file that was replaced.
    """

    def __init__(self, recipe: Recipe, work: Workspace, wanted: Mapping[int | None, Frames]) -> None:
        self.recipe, self.work, self.path = recipe, work, work.index_dir / MADE
        settings = {key: value for key, value in asdict(recipe.index).items() if key != "speakers"}
        settings |= {"name": recipe.name, "version": recipe.model.version}
        self._inputs = {speaker: fingerprint(speaker, settings, own.inputs) for speaker, own in wanted.items()}
        self._lines: dict[str, dict[str, Any]] = {}
        for line in self.path.read_bytes().splitlines() if self.path.is_file() else ():
            with contextlib.suppress(ForeignFileError):  # half a line, of one that was killed
                found = parse_json(line, MadeLine)
                self._lines[found["inputs"]] = found
        kept = [self._lines[i] for s, i in self._inputs.items() if i in self._lines and self._is_there(s)]
        self._lines = {line["inputs"]: line for line in kept}
        atomic_write(self.path, "".join(f"{json.dumps(line)}\n" for line in kept))
        if kept:
            logger.info("index: %d of %d indexes are there, of the same frames and settings", len(kept), len(wanted))

    def _is_there(self, speaker: int | None) -> bool:
        line = self._lines[self._inputs[speaker]]
        return bool(self._sizes(speaker, line["entry"]["file"]) == line["bytes"])

    def _sizes(self, speaker: int | None, name: str) -> list[int]:
        files = [self.work.index_dir / name] + [self.work.vectors_file] * (speaker is None)
        return [file.stat().st_size for file in files if file.is_file()]

    def entry(self, speaker: int | None, frames: Frames) -> dict[str, Any]:
        """That of `build` in the report, which is made where it is not there yet."""
        inputs = self._inputs[speaker]
        if inputs in self._lines:
            entry: dict[str, Any] = self._lines[inputs]["entry"]
            return entry
        entry = build(self.recipe, self.work, frames, speaker)
        line = {"inputs": inputs, "bytes": self._sizes(speaker, entry["file"]), "entry": entry}
        with disk_errors(self.path), self.path.open("ab") as stream:
            stream.write(f"{json.dumps(line)}\n".encode())
        return entry


def build(recipe: Recipe, work: Workspace, frames: Frames, speaker: int | None = None) -> dict[str, Any]:
    """Build one index, of all speakers or of one, and return its entry in the report.

    total_fea.npy stays beside that of all speakers.
    """
    with beside(work.vectors_file, 4 * len(frames) * frames.width) as vectors_beside:
        sample, queries = save_vectors(recipe, frames, vectors_beside)
        vectors = VectorFile(vectors_beside)
        logger.info("index: %d frames; training the cells on %d vectors", len(frames), len(sample))
        index = train(sample, num_cells(len(vectors)))
        del sample
        index.nprobe = recipe.index.nprobe
        file = work.index_dir / index_name(recipe, index.nlist, index.nprobe, speaker)
        with beside(file, 4 * len(vectors) * frames.width) as index_beside:
            write_index(index, vectors, index_beside)
            found = fit_nprobe(recipe, index, index_beside, Recall(vectors, queries))
            file = work.index_dir / index_name(recipe, index.nlist, index.nprobe, speaker)
            # From here to the end no report may call files of two datasets one index that is up to date.
            work.index_report_file.unlink(missing_ok=True)
            index_beside.replace(file)
        if speaker is None:
            vectors_beside.replace(work.vectors_file)
    entry = {
        "file": file.name,
        "frames": len(frames),
        "vectors": len(vectors),
        "trained_on": min(len(frames), MAX_SAMPLE),
        "cells": index.nlist,
        "nprobe": index.nprobe,
        "recall": round(found, 4),
        "queries": len(queries.vectors),
    }
    logger.info(
        "index: %(vectors)d of %(frames)d frames in %(cells)d cells, nprobe %(nprobe)d, recall@%(of)d %(recall).3f; "
        "%(file)s",
        entry | {"of": NUM_NEIGHBOURS, "file": file},
    )
    size = file.stat().st_size
    if size > MAX_IN_MEMORY:
        logger.info(
            "index: %.1f GB, which `rvc-dist infer` reads in parts; other tools of RVC need that much memory and more, "
            "so index.algorithm kmeans suits a voice that is passed on",
            size / 1e9,
        )
    return entry


def spread(num: int, most: int) -> Numbers:
    """Ascending numbers below `num`: all, or `most` of them, one drawn from each of as many equal stretches."""
    if num <= most:
        return np.arange(num)
    edges = np.arange(most + 1) * num // most
    return np.random.Generator(np.random.PCG64(SEED)).integers(edges[:-1], edges[1:])


class Queries(NamedTuple):
    """Frames to look for in an index."""

    vectors: Vectors
    """[Q, C]"""
    own: Numbers
    """[Q]: which vector of the index each of them is, -1 for none."""

    def some(self, most: int) -> Queries:
        chosen = spread(len(self.own), most)
        return Queries(self.vectors[chosen], self.own[chosen])


class ClipFrames(NamedTuple):
    """The content of a clip in a features file."""

    number: int
    speaker: int
    length: int


@dataclass(frozen=True)
class Frames:
    """Content frames of a run, in the order of the units; nothing is read but headers until it is asked for."""

    units: list[tuple[Path, list[ClipFrames]]]
    width: int
    stamps: Mapping[Path, str]
    """Of the files of all units."""

    @property
    def inputs(self) -> list[Any]:
        """What the frames are of, as plain data."""
        return [self.width, [(path.name, self.stamps[path], clips) for path, clips in self.units]]

    def __len__(self) -> int:
        return sum(clip.length for _, clips in self.units for clip in clips)

    def by_speaker(self) -> dict[int | None, Frames]:
        """Those of each speaker who has any, by rising id."""
        found: dict[int, dict[Path, list[ClipFrames]]] = {}
        for path, clips in self.units:
            for clip in clips:
                found.setdefault(clip.speaker, {}).setdefault(path, []).append(clip)
        every = {speaker: replace(self, units=list(found[speaker].items())) for speaker in sorted(found)}
        return {speaker: own for speaker, own in every.items() if len(own)}

    @classmethod
    def find(cls, work: Workspace) -> Frames:
        """Count the frames of the run.

        Raises:
            StageError: there is none, or a file is damaged.
        """
        units, width, stamps = [], 0, {}
        for _, path, header in work.unit_headers():
            clips = [ClipFrames(i, c["speaker"], c["num_content"]) for i, c in enumerate(header["clips"])]
            width = header["embedder"]["width"] if any(clip.length for clip in clips) else width
            units.append((path, clips))
            stamps[path] = header["stamp"]
        if not width:
            raise StageError(f"{work.features_dir} holds no frame:", "run `rvc-dist extract` first")
        return cls(units, width, stamps)

    def clips(self) -> Iterator[Vectors]:
        """The content of each clip, [T50, C].

        Raises:
            StageError: a file is damaged, or holds numbers that are not finite.
        """
        from safetensors import SafetensorError, safe_open

        for path, clips in self.units:
            try:
                with safe_open(path, framework="pt") as file:  # numpy has no bfloat16
                    for clip in clips:
                        content = file.get_tensor(f"{clip.number:05d}.content").float().numpy()
                        if content.shape != (clip.length, self.width) and clip.length:
                            raise _unfit(path, "is damaged")
                        if not np.isfinite(content).all():
                            raise _unfit(path, "holds numbers that are not finite")
                        yield content
            except SafetensorError as error:
                raise _unfit(path, "is damaged") from error

    def sample(self, copy: BinaryIO | None = None) -> Queries:
        """At most MAX_SAMPLE frames, evenly spread, with their positions; all frames are written to `copy`."""
        chosen = spread(len(self), MAX_SAMPLE)
        vectors = np.empty((len(chosen), self.width), np.float32)
        first = taken = 0
        with ProgressBar("index: reading", len(self), "frames") as bar:
            for content in self.clips():
                if copy is not None:
                    copy.write(content.data)
                upto = int(np.searchsorted(chosen, first + len(content)))
                vectors[taken:upto] = content[chosen[taken:upto] - first]
                first, taken = first + len(content), upto
                bar.done = first
        return Queries(vectors, chosen)


def _unfit(path: Path, why: str) -> StageError:
    return StageError(f"{path} {why}:", "delete it and run `rvc-dist extract` again")


def save_vectors(recipe: Recipe, frames: Frames, path: Path) -> tuple[Vectors, Queries]:
    """Write what will be total_fea.npy: all frames, or their k-means centres when there are too many to search quickly.

    Returns:
        What the cells are trained on, and the queries of the recall. Frames that the file holds know their places in
        it; those that centres stand for have none.
    """
    algorithm = recipe.index.algorithm
    if algorithm == "faiss" or (algorithm == "auto" and len(frames) <= KMEANS_ABOVE):
        with path.open("xb") as file:
            header = {"descr": "<f4", "fortran_order": False, "shape": (len(frames), frames.width)}
            np.lib.format.write_array_header_1_0(file, header)
            sample = frames.sample(file)
        return sample.vectors, sample.some(NUM_QUERIES)
    sample = frames.sample()
    centres = reduce(sample.vectors)
    with path.open("xb") as file:
        np.save(file, centres)
    queries = sample.some(NUM_QUERIES)
    return centres, queries._replace(own=np.full_like(queries.own, -1))


def reduce(vectors: Vectors) -> Vectors:
    """The k-means centres of `vectors`."""
    faiss, width = load_faiss(), vectors.shape[1]
    centres = min(KMEANS_CENTRES, len(vectors))
    logger.info("index: reducing the frames to %d k-means centres, found on %d of them", centres, len(vectors))
    kmeans = faiss.Kmeans(width, centres, niter=KMEANS_STEPS, seed=SEED, min_points_per_centroid=1)

    def found(move: Callable[[Any], Any]) -> Vectors:
        kmeans.index = move(faiss.IndexFlatL2(width))
        kmeans.train(vectors)
        return np.ascontiguousarray(kmeans.centroids, dtype=np.float32)

    with ProgressBar("index: k-means", None, ""):
        return _on_gpus("k-means", found)


def train(vectors: Vectors, cells: int) -> Any:
    """An empty IVF-Flat index whose cells are made of `vectors`. Its bytes do not depend on the number of threads."""
    faiss, width = load_faiss(), vectors.shape[1]

    def trained(move: Callable[[Any], Any]) -> Any:
        index = faiss.index_factory(width, f"IVF{cells},Flat")
        index.cp.min_points_per_centroid = 1  # fewer than 39 are meant, and no reason for a warning
        trainer = move(faiss.IndexFlatL2(width))
        index.clustering_index = trainer
        index.train(vectors)
        index.clustering_index = None  # it ends with this function
        return index

    with ProgressBar("index: training the cells", None, ""):
        return _on_gpus("the training of the cells", trained)


class VectorFile:
    """The vectors of a .npy file of float32 [N, C].

    Mapped only while rows are taken out of it: what stays mapped counts as this process's memory.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.num, self.width = np.load(path, mmap_mode="r").shape

    def __len__(self) -> int:
        return int(self.num)

    def rows(self, which: slice | Numbers) -> Vectors:
        return np.array(np.load(self.path, mmap_mode="r")[which])

    def chunks(self, what: str) -> Iterator[tuple[int, Vectors]]:
        """All vectors in order: the position of the first of each chunk, and the chunk. A bar calls it `what`."""
        with ProgressBar(f"index: {what}", len(self), "vectors") as bar:
            for first in range(0, len(self), CHUNK):
                bar.done = first
                yield first, self.rows(slice(first, first + CHUNK))


def write_index(index: Any, vectors: VectorFile, path: Path) -> None:
    """Write the trained, empty `index` with `vectors` in its cells, byte for byte as faiss.write_index would.

    FAISS writes either lists that it holds in memory, or lists in a second file whose path the first one names, which
    other tools do not find. So the lists are written here, in FAISS's format of lists in memory ("ilar" in its
    impl/index_write.cpp): one file that every faiss reads, and maps too.
    """

    def nearest_cells(move: Callable[[Any], Any]) -> npt.NDArray[np.int32]:
        cells, centres = np.empty(len(vectors), np.int32), move(index.quantizer)
        for first, chunk in vectors.chunks("filling the cells"):
            cells[first : first + len(chunk)] = centres.search(chunk, 1)[1][:, 0]
        return cells

    cells = _on_gpus("the filling of the cells", nearest_cells)
    sizes = np.bincount(cells, minlength=index.nlist)
    order = np.argsort(cells, kind="stable")
    del cells
    index.ntotal = len(vectors)
    filled = np.flatnonzero(sizes)
    is_sparse = len(filled) <= index.nlist // 2
    counts = np.stack([filled, sizes[filled]], axis=1).ravel() if is_sparse else sizes
    with path.open("xb") as file:
        file.write(_head(index))
        file.write(b"ilar")
        file.write(np.array([index.nlist, index.code_size], "<u8").data)
        file.write(b"sprs" if is_sparse else b"full")
        file.write(np.array([len(counts), *counts], "<u8").data)
        for members in np.split(order, np.cumsum(sizes)[:-1]):
            for at in range(0, len(members), CHUNK):
                file.write(vectors.rows(members[at : at + CHUNK]).data)
            file.write(members.astype("<i8").data)


def _head(index: Any) -> bytes:
    """What stands before the lists in the file of `index`, by FAISS itself."""
    index.replace_invlists(None, False)
    data: bytes = load_faiss().serialize_index(index).tobytes()
    assert data.endswith(NO_LISTS)
    return data[: -len(NO_LISTS)]


class Recall:
    """Recall@8: of the 8 nearest vectors of each query, itself excluded, the share that an index finds.

    The exact distances come from a search through all vectors. A vector counts as found by its distance, not by its
    number: of frames that are equal, such as silence, any is as good as the other. With k-means, the vectors are the
    centres.
    """

    def __init__(self, vectors: VectorFile, queries: Queries) -> None:
        faiss = load_faiss()
        self.queries, self.num = queries, min(NUM_NEIGHBOURS, len(vectors) - 1)

        def search(move: Callable[[Any], Any]) -> Any:
            flat, best = move(faiss.IndexFlatL2(vectors.width)), faiss.ResultHeap(len(queries.own), self.num + 1)
            for first, chunk in vectors.chunks("exact search"):
                flat.add(chunk)
                distances, numbers = flat.search(queries.vectors, min(self.num + 1, len(chunk)))
                best.add_result(distances, first + numbers)
                flat.reset()
            best.finalize()
            return best

        best = _on_gpus("the exact search", search)
        _, numbers = self._others(best.D, best.I)
        # That search is quick, but rounds like the vectors' norms instead of their distances: only its order counts.
        nearest = vectors.rows(numbers.ravel()).reshape(*numbers.shape, vectors.width)
        squares = np.square(nearest - queries.vectors[:, None]).sum(axis=2, dtype=np.float64)
        self.radius = squares.max(axis=1, initial=0.0, keepdims=True)
        """[Q, 1] squared distance of the farthest of the nearest"""

    def _others(self, distances: Vectors, numbers: Numbers) -> tuple[Vectors, Numbers]:
        """[Q, K + 1] neighbours -> [Q, K] without the query itself, or without the last where it is not among them."""
        others = np.argsort(numbers == self.queries.own[:, None], axis=1, kind="stable")[:, :-1]
        return np.take_along_axis(distances, others, 1), np.take_along_axis(numbers, others, 1)

    def __call__(self, index: Any, nprobe: int) -> float:
        """The recall of `index` when it searches `nprobe` cells, 0 to 1; 1 when there is nothing to find."""
        if not self.num:
            return 1.0
        index.nprobe = nprobe
        distances, _ = self._others(*index.search(self.queries.vectors, self.num + 1))
        return float((distances <= SAME_DISTANCE * self.radius).mean())


def fit_nprobe(recipe: Recipe, index: Any, path: Path, recall: Recall) -> float:
    """The recall of the index in `path`, after its nprobe, and that of `index`, is raised as the recipe wants."""
    faiss = load_faiss()
    written = faiss.read_index(str(path), faiss.IO_FLAG_MMAP)
    cells, wanted = index.nlist, recipe.index.recall
    index.nprobe, found = raised(partial(recall, written), recipe.index.nprobe, cells, wanted)
    if index.nprobe != recipe.index.nprobe:
        logger.info("index: nprobe %d, not %d, for index.recall %g", index.nprobe, recipe.index.nprobe, wanted)
        with path.open("r+b") as file:
            file.write(_head(index))
    if wanted is not None and found < wanted:
        logger.warning(
            "index: all %d cells give a recall of %.4f, index.recall %g is out of reach", cells, found, wanted
        )
    return found


def raised(recall: Callable[[int], float], nprobe: int, cells: int, wanted: float | None) -> tuple[int, float]:
    """The least number of cells, from `nprobe` on, that reaches the `wanted` recall, and the recall that it reaches.

    All `cells` are an exact search. More cells never find less, so the number is doubled, then bisected.
    """
    if wanted is None:
        return nprobe, recall(nprobe)
    recall, short = cache(recall), nprobe
    while recall(nprobe) < wanted and nprobe < cells:
        short, nprobe = nprobe, min(2 * nprobe, cells)
    if nprobe > short:
        nprobe = bisect_left(range(nprobe), wanted, lo=short + 1, key=recall)
    return nprobe, recall(nprobe)
