"""The index stage: content features -> a FAISS IVF-Flat index, as the tools of RVC read it."""

from __future__ import annotations

import contextlib
import logging
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from rvc_dist.config import Recipe
from rvc_dist.workspace import (
    Share,
    StageError,
    Workspace,
    read_header,
    read_json,
    stamp,
    unit_files,
    write_json,
)

logger = logging.getLogger(__name__)

KMEANS_ABOVE = 200_000
"""More frames than this are first reduced to KMEANS_CENTRES."""
KMEANS_CENTRES = 10_000
NUM_NEIGHBOURS = 8
MIN_DISTANCE = 1e-9
ADD_BATCH = 8192
KMEANS_SEED, KMEANS_STEPS = 1234, 20

Vectors = npt.NDArray[np.float32]


def _faiss() -> Any:
    try:
        import faiss
    except ImportError as error:
        raise StageError(
            "faiss is not installed: `pip install faiss-cpu` (or faiss-gpu-cu12, but only one of them)"
        ) from error
    return faiss


def num_cells(num_vectors: int) -> int:
    """max(1, min(int(16 sqrt(N)), N // 39)): FAISS wants 39 training vectors a cell, and one cell always works."""
    return max(1, min(int(16 * math.sqrt(num_vectors)), num_vectors // 39))


def index_name(recipe: Recipe, cells: int) -> str:
    return f"added_IVF{cells}_Flat_nprobe_{recipe.index.nprobe}_{recipe.name}_{recipe.model.version}.index"


def run(recipe: Recipe, share: Share) -> None:
    """Build the index on the first rank.

    Raises:
        StageError: the features are missing or damaged, faiss is missing, or the folder cannot be written.
    """
    if not share.is_first:
        return
    work = Workspace(recipe.run_dir, recipe.name)
    wanted = wanted_stamp(recipe, work)
    if complete(recipe):
        logger.info("index: %s is up to date", work.index_file())
        return
    faiss = _faiss()
    vectors = gather(work)
    kept = reduce(recipe, vectors)
    cells = num_cells(len(kept))
    index = faiss.index_factory(kept.shape[1], f"IVF{cells},Flat")
    inverted = faiss.extract_index_ivf(index)
    inverted.nprobe = recipe.index.nprobe
    inverted.cp.min_points_per_centroid = 1  # fewer than 39 are meant, and no reason for a warning
    index.train(kept)
    for at in range(0, len(kept), ADD_BATCH):
        index.add(kept[at : at + ADD_BATCH])

    file = work.index_dir / index_name(recipe, cells)
    _write(work.vectors_file, lambda path: np.save(path, kept))
    _write(file, lambda path: faiss.write_index(index, str(path)))
    for old in work.index_dir.glob("added_*.index"):
        if old != file:
            old.unlink()
    report = {"stamp": wanted, "file": file.name, "frames": len(vectors), "vectors": len(kept), "cells": cells}
    write_json(work.index_report_file, report)
    logger.info("index: %d of %d frames in %d cells; %s", len(kept), len(vectors), cells, file)


def complete(recipe: Recipe) -> bool | None:
    """True when the index is there and made of the present features, else None."""
    work = Workspace(recipe.run_dir, recipe.name)
    file = work.index_file()
    current = file is not None and read_json(work.index_report_file)["stamp"] == wanted_stamp(recipe, work)
    return current or None


def wanted_stamp(recipe: Recipe, work: Workspace) -> str:
    if not work.features_report_file.is_file():
        raise StageError(f"{work.features_dir} has no features: run `rvc-dist extract` first")
    return stamp(read_json(work.features_report_file), recipe.index.algorithm, recipe.index.nprobe, recipe.name)


def gather(work: Workspace) -> Vectors:
    """Every content frame of the run in the order of the units, [N, C].

    Raises:
        StageError: there is none, or a file is damaged.
    """
    from safetensors import safe_open

    parts = []
    for path in unit_files(work.features_dir):
        header = read_header(path)
        if header is None:
            raise StageError(f"{path} is damaged: delete it and run `rvc-dist extract` again")
        with safe_open(path, framework="numpy") as file:
            found = [file.get_tensor(f"{i:05d}.content") for i in range(len(header["clips"]))]
        if not all(np.isfinite(content).all() for content in found):
            raise StageError(f"{path} holds numbers that are not finite: delete it and run `rvc-dist extract` again")
        parts += found
    if not sum(map(len, parts)):
        raise StageError(f"{work.features_dir} holds no frame: run `rvc-dist extract` first")
    return np.ascontiguousarray(np.concatenate(parts), dtype=np.float32)


def reduce(recipe: Recipe, vectors: Vectors) -> Vectors:
    """All vectors, or their k-means centres when there are too many to search quickly."""
    algorithm = recipe.index.algorithm
    if algorithm == "faiss" or (algorithm == "auto" and len(vectors) <= KMEANS_ABOVE):
        return vectors
    centres = min(KMEANS_CENTRES, len(vectors))
    logger.info("index: reducing %d frames to %d k-means centres", len(vectors), centres)
    kmeans = _faiss().Kmeans(vectors.shape[1], centres, niter=KMEANS_STEPS, seed=KMEANS_SEED, min_points_per_centroid=1)
    kmeans.train(vectors)
    return np.ascontiguousarray(kmeans.centroids, dtype=np.float32)


def _write(path: Path, write: Callable[[Path], None]) -> None:
    """Let a library write a file under another name, then rename it.

    Raises:
        StageError: it cannot; faiss raises a RuntimeError then.
    """
    beside = path.with_name(f".tmp.{path.name}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write(beside)
        beside.replace(path)
    except (OSError, RuntimeError) as error:
        reason = error.strerror if isinstance(error, OSError) else str(error).splitlines()[-1]
        raise StageError(f"{path} cannot be written ({reason})") from error
    finally:
        with contextlib.suppress(OSError):
            beside.unlink()


class Retriever:
    """Mixes content features with their nearest neighbours in an index.

    Raises:
        StageError: the file is not an index that faiss reads, or is of another kind or width.
    """

    def __init__(self, path: Path, width: int) -> None:
        faiss = _faiss()
        if not path.is_file():
            raise StageError(f"infer.index: {path} does not exist")
        try:
            self._index = faiss.read_index(str(path))
        except RuntimeError as error:
            raise StageError(f"infer.index: {path} is not a FAISS index") from error
        if self._index.d != width:
            raise StageError(f"infer.index: {path} holds features {self._index.d} wide, the voice's are {width} wide")
        if not self._index.ntotal:
            raise StageError(f"infer.index: {path} is empty")
        # Some other kinds keep no vectors, and faiss ends the process when asked for them.
        if not isinstance(faiss.downcast_index(self._index), (faiss.IndexIVF, faiss.IndexFlat)):
            raise StageError(f"infer.index: {path} is a {type(self._index).__name__}, expected an IVF index of RVC")
        self._vectors: Vectors = self._index.reconstruct_n(0, self._index.ntotal)

    def __call__(self, content: Vectors, rate: float) -> Vectors:
        """`content` [T, C] with the share `rate` replaced by the mean of 8 neighbours, weighted by (1/d)^2.

        d is FAISS's distance, which is squared. An exact hit takes all the weight instead of dividing by zero; a frame
        whose cells are all empty stays as it is.
        """
        distances, neighbours = self._index.search(np.ascontiguousarray(content, dtype=np.float32), NUM_NEIGHBOURS)
        is_found = neighbours >= 0
        weights = np.where(is_found, 1.0 / np.square(np.maximum(distances, MIN_DISTANCE, dtype=np.float64)), 0.0)
        weights /= np.maximum(weights.sum(axis=1, keepdims=True), np.finfo(np.float64).tiny)
        nearest = self._vectors[np.maximum(neighbours, 0)]
        found = np.einsum("tkc,tk->tc", nearest, weights.astype(np.float32))
        share = rate * is_found.any(axis=1, keepdims=True)
        mixed: Vectors = (share * found + (1.0 - share) * content).astype(np.float32)
        return mixed
