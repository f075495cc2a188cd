"""The retrieval index: the name and formulas of the tools of RVC, readable by plain FAISS, the same bytes each time."""

from __future__ import annotations

import sys
from pathlib import Path

import faiss
import numpy as np
import numpy.typing as npt
import pytest
from helpers import changed, narrow_recipe, workspace_of, write_features

from rvc_dist import index
from rvc_dist.config import IndexConfig, Recipe
from rvc_dist.index import Retriever, num_cells
from rvc_dist.workspace import Share, StageError, read_json

ALONE = Share(0, 1)
WIDTH = 24


def frames(count: int, width: int = WIDTH, seed: int = 0) -> npt.NDArray[np.float32]:
    return np.random.default_rng(seed).normal(size=(count, width)).astype(np.float32)


@pytest.fixture
def recipe(tmp_path: Path) -> Recipe:
    return narrow_recipe(tmp_path)


def folder(recipe: Recipe) -> Path:
    return workspace_of(recipe).index_dir


def index_file(recipe: Recipe) -> Path:
    found = workspace_of(recipe).index_file()
    assert found is not None
    return found


@pytest.mark.parametrize(
    ("vectors", "cells"),
    # 16 sqrt(N) is the smaller from N = 389,376 on: 39^2 * 16^2.
    [(1, 1), (30, 1), (38, 1), (39, 1), (77, 1), (78, 2), (5000, 128), (200000, 5128), (389376, 9984), (400000, 10119)],
)
def test_the_number_of_cells(vectors: int, cells: int) -> None:
    assert num_cells(vectors) == cells


@pytest.mark.parametrize(("count", "cells"), [(1, 1), (30, 1), (39, 1), (5000, 128)])
def test_plain_faiss_reads_what_is_written(
    count: int, cells: int, recipe: Recipe, capfd: pytest.CaptureFixture[str]
) -> None:
    vectors = frames(count)
    half = count // 2
    write_features(recipe, [[vectors[:half]] if half else [], [vectors[half:]]])
    index.run(recipe, ALONE)
    names = sorted(p.name for p in folder(recipe).iterdir())
    assert names == [f"added_IVF{cells}_Flat_nprobe_9_tiny_v2.index", "report.json", "total_fea.npy"]
    assert np.array_equal(np.load(folder(recipe) / "total_fea.npy"), vectors)
    read = faiss.read_index(str(folder(recipe) / names[0]))
    inverted = faiss.extract_index_ivf(read)
    assert (read.ntotal, read.d, inverted.nlist, inverted.nprobe) == (count, WIDTH, cells, 9)
    assert read.metric_type == faiss.METRIC_L2
    assert isinstance(faiss.downcast_index(read), faiss.IndexIVFFlat)
    assert np.array_equal(read.reconstruct_n(0, count), vectors)
    distances, neighbours = read.search(vectors, 1)
    assert neighbours[:, 0].tolist() == list(range(count))
    assert distances.max() == 0.0
    report = read_json(folder(recipe) / "report.json")
    assert (report["frames"], report["vectors"], report["cells"]) == (count, count, cells)
    assert "WARNING" not in "".join(capfd.readouterr())


def test_two_builds_give_the_same_bytes_whatever_the_threads(tmp_path: Path) -> None:
    vectors = frames(2000)
    made = []
    before = faiss.omp_get_max_threads()
    for threads in (1, 2):
        recipe = narrow_recipe(tmp_path / str(threads))
        write_features(recipe, [[vectors]])
        faiss.omp_set_num_threads(threads)
        index.run(recipe, ALONE)
        made.append(index_file(recipe).read_bytes())
    faiss.omp_set_num_threads(before)
    assert made[0] == made[1]


def test_nprobe_and_name_and_version_are_in_the_file_name(tmp_path: Path) -> None:
    recipe = narrow_recipe(tmp_path, index=IndexConfig(nprobe=3))
    recipe = changed(recipe, "model", version="v1")
    write_features(recipe, [[frames(100)]])
    index.run(recipe, ALONE)
    assert index_file(recipe).name == "added_IVF2_Flat_nprobe_3_tiny_v1.index"
    assert faiss.extract_index_ivf(faiss.read_index(str(index_file(recipe)))).nprobe == 3


def test_a_finished_index_is_kept_and_a_stale_one_made_again(recipe: Recipe) -> None:
    write_features(recipe, [[frames(100)]])
    assert index.complete(recipe) is None
    index.run(recipe, ALONE)
    assert index.complete(recipe) is True
    first = index_file(recipe).stat().st_mtime_ns
    index.run(recipe, ALONE)
    assert index_file(recipe).stat().st_mtime_ns == first

    other = changed(recipe, "index", nprobe=2)
    assert index.complete(other) is None
    index.run(other, ALONE)
    assert [p.name for p in folder(recipe).glob("*.index")] == ["added_IVF2_Flat_nprobe_2_tiny_v2.index"]

    write_features(recipe, [[frames(200, seed=1)]])
    assert index.complete(other) is None
    index.run(other, ALONE)
    assert np.array_equal(np.load(folder(recipe) / "total_fea.npy"), frames(200, seed=1))
    index_file(recipe).unlink()
    assert index.complete(other) is None


def test_other_ranks_leave_it_to_the_first(recipe: Recipe) -> None:
    write_features(recipe, [[frames(10)]])
    index.run(recipe, Share(1, 2))
    assert not folder(recipe).exists()


# Too many frames


def clusters(num: int, size: int) -> npt.NDArray[np.float32]:
    """`num` tight groups of `size` vectors around far points, in turns."""
    centres = 100.0 * frames(num, seed=1)
    spread: npt.NDArray[np.float32] = np.tile(centres, (size, 1)) + 0.01 * frames(num * size, seed=2)
    return spread


def test_above_the_threshold_centres_stand_for_the_frames(recipe: Recipe, monkeypatch: pytest.MonkeyPatch) -> None:
    assert (index.KMEANS_ABOVE, index.KMEANS_CENTRES) == (200_000, 10_000)
    monkeypatch.setattr(index, "KMEANS_ABOVE", 299)
    monkeypatch.setattr(index, "KMEANS_CENTRES", 90)
    vectors = clusters(30, 10)
    write_features(recipe, [[vectors]])
    index.run(recipe, ALONE)
    kept = np.load(folder(recipe) / "total_fea.npy")
    assert kept.shape == (90, WIDTH)
    assert index_file(recipe).name == "added_IVF2_Flat_nprobe_9_tiny_v2.index"
    # Each centre lies in a group, and each group has one.
    distances = np.square(vectors[:30, None] - kept[None]).sum(axis=2)
    assert distances.min(axis=0).max() < 1.0
    assert distances.min(axis=1).max() < 1.0
    report = read_json(folder(recipe) / "report.json")
    assert (report["frames"], report["vectors"]) == (300, 90)


@pytest.mark.parametrize(("algorithm", "above", "kept"), [("auto", 300, 300), ("faiss", 299, 300), ("kmeans", 300, 90)])
def test_the_algorithm_decides_whether_frames_are_reduced(
    algorithm: str, above: int, kept: int, recipe: Recipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(index, "KMEANS_ABOVE", above)
    monkeypatch.setattr(index, "KMEANS_CENTRES", 90)
    recipe = changed(recipe, "index", algorithm=algorithm)
    assert len(index.reduce(recipe, clusters(30, 10))) == kept
    assert len(index.reduce(recipe, frames(5))) == 5


# What is wrong


def test_missing_features_are_told(recipe: Recipe) -> None:
    with pytest.raises(StageError, match=r"has no features: run `rvc-dist extract` first"):
        index.run(recipe, ALONE)


def test_features_without_a_frame_are_told(recipe: Recipe) -> None:
    write_features(recipe, [[], [frames(0)]])
    with pytest.raises(StageError, match="holds no frame"):
        index.run(recipe, ALONE)


def test_damaged_features_are_named(recipe: Recipe) -> None:
    bad = frames(10)
    bad[3, 3] = np.nan
    write_features(recipe, [[frames(10)], [bad]])
    with pytest.raises(StageError, match=r"00001\.safetensors holds numbers that are not finite"):
        index.run(recipe, ALONE)
    workspace_of(recipe).features_file(1).write_bytes(b"damaged")
    with pytest.raises(StageError, match=r"00001\.safetensors is damaged"):
        index.run(recipe, ALONE)


def test_a_folder_that_cannot_be_written_is_told(recipe: Recipe) -> None:
    write_features(recipe, [[frames(10)]])
    folder(recipe).write_text("a file in its place")
    with pytest.raises(StageError, match=r"total_fea\.npy cannot be written"):
        index.run(recipe, ALONE)
    folder(recipe).unlink()
    (folder(recipe) / "added_IVF1_Flat_nprobe_9_tiny_v2.index" / "x").mkdir(parents=True)
    with pytest.raises(StageError, match=r"tiny_v2\.index cannot be written"):
        index.run(recipe, ALONE)
    assert index.complete(recipe) is None
    assert not list(folder(recipe).glob(".tmp*"))


def test_what_faiss_cannot_write_is_told(recipe: Recipe, monkeypatch: pytest.MonkeyPatch) -> None:
    write_features(recipe, [[frames(10)]])

    def fail(*_: object) -> None:
        raise RuntimeError("Error in faiss::FileIOWriter\nno space left")

    monkeypatch.setattr(faiss, "write_index", fail)
    with pytest.raises(StageError, match=r"tiny_v2\.index cannot be written \(no space left\)"):
        index.run(recipe, ALONE)


def test_a_missing_faiss_is_told_with_the_remedy(recipe: Recipe, monkeypatch: pytest.MonkeyPatch) -> None:
    write_features(recipe, [[frames(10)]])
    monkeypatch.setitem(sys.modules, "faiss", None)
    with pytest.raises(StageError, match="pip install faiss-cpu"):
        index.run(recipe, ALONE)


# Retrieval


def retriever(tmp_path: Path, vectors: npt.NDArray[np.float32], cells: int = 1) -> Retriever:
    made = faiss.index_factory(vectors.shape[1], f"IVF{cells},Flat")
    faiss.extract_index_ivf(made).cp.min_points_per_centroid = 1
    made.train(vectors)
    made.add(vectors)
    faiss.write_index(made, str(tmp_path / "i.index"))
    return Retriever(tmp_path / "i.index", vectors.shape[1])


def test_neighbours_weigh_by_the_inverse_square_of_faiss_distance(tmp_path: Path) -> None:
    # Of the query (0, 0) the squared distances are 1 and 4: weights 1 and 1/16, normalised 16/17 and 1/17.
    find = retriever(tmp_path, np.array([[1, 0], [0, 2]], np.float32))
    found = find(np.zeros((1, 2), np.float32), 1.0)
    np.testing.assert_allclose(found, [[16 / 17, 2 / 17]], rtol=1e-6)
    half = find(np.zeros((1, 2), np.float32), 0.5)
    np.testing.assert_allclose(half, [[8 / 17, 1 / 17]], rtol=1e-6)
    np.testing.assert_array_equal(find(np.ones((3, 2), np.float32), 0.0), np.ones((3, 2)))


def test_only_eight_neighbours_count(tmp_path: Path) -> None:
    ring = np.array([[np.cos(a), np.sin(a)] for a in np.arange(8) * np.pi / 4], np.float32)
    find = retriever(tmp_path, np.concatenate([1.5 * ring, ring]))
    # All eight of the inner ring are at distance 1, and their mean is its centre.
    np.testing.assert_allclose(find(np.zeros((1, 2), np.float32), 1.0), [[0, 0]], atol=1e-6)


def test_an_exact_hit_takes_all_the_weight(tmp_path: Path) -> None:
    vectors = frames(100)
    find = retriever(tmp_path, vectors)
    found = find(vectors, 1.0)
    assert np.isfinite(found).all()
    np.testing.assert_allclose(found, vectors, atol=1e-5)
    twice = retriever(tmp_path, np.concatenate([vectors, vectors]))
    np.testing.assert_allclose(twice(vectors, 1.0), vectors, atol=1e-5)


def test_a_frame_without_neighbours_stays_as_it_is(tmp_path: Path) -> None:
    """Other tools write nprobe 1, and a cell may have lost its vectors."""
    far = np.array([[0, 0], [100, 100]], np.float32)
    cells = faiss.IndexFlatL2(2)
    cells.add(far)
    made = faiss.IndexIVFFlat(cells, 2, 2)
    made.train(far)
    made.add(far[:1] + 1)
    faiss.write_index(made, str(tmp_path / "i.index"))
    find = Retriever(tmp_path / "i.index", 2)
    found = find(far, 1.0)
    np.testing.assert_allclose(found, [[1, 1], [100, 100]], atol=1e-5)


def test_an_index_of_another_kind_is_refused(tmp_path: Path) -> None:
    made = faiss.IndexIDMap(faiss.IndexFlatL2(4))
    made.add_with_ids(frames(5, 4), np.arange(5))
    faiss.write_index(made, str(tmp_path / "i.index"))
    with pytest.raises(StageError, match=r"infer\.index: .*i\.index is a IndexIDMap, expected an IVF index"):
        Retriever(tmp_path / "i.index", 4)
