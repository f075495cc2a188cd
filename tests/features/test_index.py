"""The retrieval index: the name and formulas of the tools of RVC, readable by plain FAISS, the same bytes each time."""

from __future__ import annotations

import errno
import os
import re
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import faiss
import numpy as np
import numpy.typing as npt
import pytest
from helpers import changed, narrow_recipe, workspace_of, write_features

from rvc_dist.config import IndexConfig, Recipe
from rvc_dist.features import index
from rvc_dist.features.index import Queries, Recall, VectorFile, num_cells
from rvc_dist.features.index_file import Retriever, complete, index_in, wanted_fingerprint
from rvc_dist.workspace import Shard, StageError, Workspace, fingerprint, read_json

ALONE = Shard(0, 1)
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
    # 16 sqrt(N) is the smaller from N = 389,376 on: 39^2 * 16^2. The sample's 500,000 / 39 = 12,820 end its growth.
    [
        *[(1, 1), (30, 1), (38, 1), (39, 1), (77, 1), (78, 2), (5000, 128), (200000, 5128)],
        *[(389376, 9984), (400000, 10119), (642102, 12820), (10**8, 12820)],
    ],
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
    assert (report["frames"], report["vectors"], report["trained_on"], report["cells"]) == (count, count, count, cells)
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
    assert complete(recipe) is None
    index.run(recipe, ALONE)
    assert complete(recipe) is True
    first = index_file(recipe).stat().st_mtime_ns
    index.run(recipe, ALONE)
    assert index_file(recipe).stat().st_mtime_ns == first

    other = changed(recipe, "index", nprobe=2)
    assert complete(other) is None
    index.run(other, ALONE)
    assert [p.name for p in folder(recipe).glob("*.index")] == ["added_IVF2_Flat_nprobe_2_tiny_v2.index"]

    write_features(recipe, [[frames(200, seed=1)]])
    assert complete(other) is None
    index.run(other, ALONE)
    assert np.array_equal(np.load(folder(recipe) / "total_fea.npy"), frames(200, seed=1))
    index_file(recipe).unlink()
    assert complete(other) is None


@pytest.mark.parametrize("speakers", ["each", "both"])
def test_each_speaker_has_an_index_of_their_own_frames(speakers: str, recipe: Recipe) -> None:
    recipe = changed(recipe, "index", speakers=speakers)
    anns, bobs = frames(100), frames(30, seed=1)
    units = [[anns[:40], bobs[:10], np.zeros((0, WIDTH), np.float32)], [anns[40:], bobs[10:]]]
    write_features(recipe, units, speakers=(3, 5, 7))
    assert complete(recipe) is None
    index.run(recipe, ALONE)
    work = workspace_of(recipe)
    expected = {3: (2, anns), 5: (1, bobs)}
    common = {"added_IVF3_Flat_nprobe_9_tiny_v2.index", "total_fea.npy"} if speakers == "both" else set()
    names = {i: f"added_IVF{cells}_Flat_nprobe_9_tiny_v2_spkid{i}.index" for i, (cells, _) in expected.items()}
    assert {p.name for p in folder(recipe).iterdir()} == {*names.values(), *common, "report.json", "made.jsonl"}
    for i, (_, vectors) in expected.items():
        file = work.index_file(i)
        assert file == folder(recipe) / names[i]
        read = faiss.read_index(str(file))
        assert np.array_equal(read.reconstruct_n(0, read.ntotal), vectors)
    assert work.index_file(7) == work.index_file(), "who has no frames has the common one"
    assert (work.index_file() is not None) == (speakers == "both")

    assert complete(recipe) is True
    of_bob = work.index_file(5)
    assert of_bob is not None
    of_bob.unlink()
    assert complete(recipe) is None
    index.run(recipe, ALONE)
    assert of_bob.is_file()
    again = changed(recipe, "index", speakers="common")
    of_before = {"algorithm": "auto", "nprobe": 9, "recall": None}
    features = read_json(work.features_report_file)
    assert wanted_fingerprint(again, work) == fingerprint(features, of_before, "tiny"), "indexes of old runs stay"
    assert complete(again) is None
    index.run(again, ALONE)
    assert {p.name for p in folder(recipe).iterdir()} == {index_file(recipe).name, "total_fea.npy", "report.json"}
    assert work.index_file(5) == index_file(recipe)


def contents(recipe: Recipe) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in folder(recipe).iterdir()}


@pytest.mark.parametrize("speakers", ["each", "both"])
def test_who_was_killed_goes_on_after_the_last_index_and_makes_the_same_bytes(
    speakers: str, recipe: Recipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = changed(recipe, "index", speakers=speakers)
    units = [[frames(40, seed=i) for i in range(4)], [frames(60, seed=i) for i in range(4, 8)]]
    write_features(recipe, units, speakers=(0, 1, 2, 3))
    index.run(recipe, ALONE)
    expected, whole = contents(recipe), 4 + (speakers == "both")
    shutil.rmtree(folder(recipe))

    made, is_killed = list[int | None](), list[bool]()
    build = index.build

    def killed_at_the_third(recipe: Recipe, work: Workspace, own: index.Frames, s: int | None = None) -> dict[str, Any]:
        made.append(s)
        if len(made) == 3 and not is_killed:
            is_killed.append(True)
            raise KeyboardInterrupt
        return build(recipe, work, own, s)

    monkeypatch.setattr(index, "build", killed_at_the_third)
    with pytest.raises(KeyboardInterrupt):
        index.run(recipe, ALONE)
    with (folder(recipe) / "made.jsonl").open("ab") as stream:
        stream.write(b'{"inputs": "ab')  # half a line
    assert complete(recipe) is None
    first = made[:2]
    index.run(recipe, ALONE)
    assert len(made) - 1 == whole == len(first) + len({*made} - {*first}), "none was made twice"
    assert contents(recipe) == expected

    made.clear()
    write_features(recipe, [units[0], [*units[1][:3], frames(60, seed=99)]], speakers=(0, 1, 2, 3))
    index.run(recipe, ALONE)
    assert len(made) == whole, "all have frames in the unit that is another"
    made.clear()
    for file in folder(recipe).glob("*_spkid2.index"):
        file.write_bytes(file.read_bytes()[:-1])
    (folder(recipe) / "report.json").unlink()
    index.run(recipe, ALONE)
    assert made == [2], "whose file is not as it was written"


@pytest.mark.parametrize(
    ("names", "speaker", "expected"),
    [
        (["added_a.index", "added_a_spkid1.index", "trained_a.index"], 1, "added_a_spkid1.index"),
        (["added_a.index", "added_a_spkid1.index", "trained_a.index"], 11, "added_a.index"),
        (["added_a_spkid1.index"], 0, "has 0 indexes for speaker 0 (none); name one"),
        (["added_a.index", "added_b.index"], 0, "has 2 indexes for speaker 0 (added_a.index, added_b.index); name one"),
    ],
)
def test_of_a_folder_the_speakers_index_is_taken(names: list[str], speaker: int, expected: str, tmp_path: Path) -> None:
    for name in names:
        (tmp_path / name).touch()
    if expected in names:
        assert index_in(tmp_path, speaker).name == expected
        return
    with pytest.raises(StageError, match=re.escape(expected)):
        index_in(tmp_path, speaker)


def test_other_ranks_leave_it_to_the_first(recipe: Recipe) -> None:
    write_features(recipe, [[frames(10)]])
    index.run(recipe, Shard(1, 2))
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
    assert (report["frames"], report["vectors"], report["trained_on"], report["queries"]) == (300, 90, 300, 300)


@pytest.mark.parametrize(("algorithm", "above", "kept"), [("auto", 300, 300), ("faiss", 299, 300), ("kmeans", 300, 90)])
def test_the_algorithm_decides_whether_frames_are_reduced(
    algorithm: str, above: int, kept: int, recipe: Recipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(index, "KMEANS_ABOVE", above)
    monkeypatch.setattr(index, "KMEANS_CENTRES", 90)
    recipe = changed(recipe, "index", algorithm=algorithm)
    write_features(recipe, [[clusters(30, 10)]])
    index.run(recipe, ALONE)
    assert np.load(folder(recipe) / "total_fea.npy").shape == (kept, WIDTH)


def test_fewer_frames_than_centres_are_their_own(recipe: Recipe) -> None:
    recipe = changed(recipe, "index", algorithm="kmeans")
    write_features(recipe, [[frames(5)]])
    index.run(recipe, ALONE)
    kept = np.load(folder(recipe) / "total_fea.npy")
    assert sorted(kept.tolist()) == sorted(frames(5).tolist())


# More frames than a sample


def test_a_sample_is_spread_evenly_and_is_always_the_same() -> None:
    assert index.spread(5, 5).tolist() == [0, 1, 2, 3, 4]
    assert index.spread(3, 5).tolist() == [0, 1, 2]
    chosen = index.spread(1000, 300)
    # One in each stretch of 1000 / 300 frames, not always at the same place in it.
    assert [(int(c) * 300 + 299) // 1000 for c in chosen] == list(range(300))
    assert len(set((chosen * 300 % 1000).tolist())) > 5
    assert np.array_equal(index.spread(1000, 300), chosen)


def test_cells_are_trained_on_the_sample_and_hold_all_frames(recipe: Recipe, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(index, "MAX_SAMPLE", 400)
    vectors = frames(3000)
    write_features(recipe, [[vectors[:1000], vectors[1000:1001]], [vectors[1001:]]])
    index.run(recipe, ALONE)
    read = faiss.read_index(str(index_file(recipe)))
    assert (read.ntotal, read.nlist) == (3000, 10)  # 400 // 39
    assert np.array_equal(read.reconstruct_n(0, 3000), vectors)
    assert np.array_equal(np.load(folder(recipe) / "total_fea.npy"), vectors)
    expected = faiss.IndexIVFFlat(faiss.IndexFlatL2(WIDTH), WIDTH, 10)
    expected.train(vectors[index.spread(3000, 400)])
    assert np.array_equal(read.quantizer.reconstruct_n(0, 10), expected.quantizer.reconstruct_n(0, 10))
    report = read_json(folder(recipe) / "report.json")
    assert (report["frames"], report["trained_on"], report["queries"]) == (3000, 400, 400)


def test_centres_are_those_of_the_sample(recipe: Recipe, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(index, "MAX_SAMPLE", 100)
    monkeypatch.setattr(index, "KMEANS_CENTRES", 100)
    recipe = changed(recipe, "index", algorithm="kmeans")
    vectors = frames(1000)
    write_features(recipe, [[vectors[:300]], [vectors[300:]]])
    index.run(recipe, ALONE)
    kept = np.load(folder(recipe) / "total_fea.npy")
    # As many centres as frames are these frames.
    assert sorted(kept.tolist()) == sorted(vectors[index.spread(1000, 100)].tolist())


@pytest.mark.parametrize("same", [1, 400])
def test_the_file_is_what_faiss_would_write(same: int, recipe: Recipe, monkeypatch: pytest.MonkeyPatch) -> None:
    """With many equal frames most cells are empty, which FAISS writes in another way."""
    monkeypatch.setattr(index, "CHUNK", 100)
    vectors = np.repeat(frames(1600 // same), same, axis=0)
    write_features(recipe, [[vectors[:700]], [vectors[700:]]])
    index.run(recipe, ALONE)
    expected = faiss.IndexIVFFlat(faiss.IndexFlatL2(WIDTH), WIDTH, 41)
    expected.cp.min_points_per_centroid = 1
    expected.nprobe = 9
    expected.train(vectors)
    for at in range(0, 1600, 100):
        expected.add(vectors[at : at + 100])
    assert index_file(recipe).read_bytes() == faiss.serialize_index(expected).tobytes()
    assert (b"sprs" in index_file(recipe).read_bytes()) is (same > 1)


def test_a_large_index_says_what_it_takes_to_read_it(
    recipe: Recipe, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    write_features(recipe, [[frames(100)]])
    index.run(recipe, ALONE)
    assert "other tools of RVC" not in caplog.text
    monkeypatch.setattr(index, "MAX_IN_MEMORY", 1000)
    index.run(changed(recipe, "index", nprobe=1), ALONE)
    assert "GB, which `rvc-dist infer` reads in parts; other tools of RVC need that much memory" in caplog.text


def made_on_gpus(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, move: Callable[[Any], Any] | None) -> bytes:
    """The index file when faiss has GPUs, to which `move` brings an index; None: it has none."""
    monkeypatch.setattr(index, "_has_gpus", lambda: move is not None)
    monkeypatch.setattr(faiss, "index_cpu_to_all_gpus", move)
    recipe = narrow_recipe(tmp_path / str(move), index=IndexConfig(algorithm="kmeans"))
    write_features(recipe, [[frames(200)]])
    index.run(recipe, ALONE)
    return index_file(recipe).read_bytes()


def test_gpus_train_and_assign_when_faiss_sees_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Here the GPUs' copy is the index itself, so that the same file must come out."""
    moved: list[Any] = []
    on_gpus = made_on_gpus(tmp_path, monkeypatch, lambda cpu: moved.append(cpu) or cpu)
    assert len(moved) == 4  # to reduce the frames, to find the cells, to fill them, to search exactly
    assert on_gpus == made_on_gpus(tmp_path, monkeypatch, None)


def test_where_gpus_fail_the_cpu_goes_on_and_the_reason_is_logged(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """k-means when its index is moved there, the others when they compute."""
    moved: list[Any] = []

    class Full(faiss.IndexFlatL2):  # type: ignore[misc]
        def search(self, *_: Any, **__: Any) -> Any:
            raise RuntimeError("Error in allocMemory:\nStandardGpuResources: alloc fail (out of memory [2])")

    def move(cpu: Any) -> Any:
        moved.append(cpu)
        if len(moved) == 1:
            raise RuntimeError("no streams left")
        return cpu if len(moved) == 2 else Full(cpu.d)

    on_gpus = made_on_gpus(tmp_path, monkeypatch, move)
    failed = "on the CPU, since faiss failed on the GPU:"
    assert f"index: k-means {failed} no streams left" in caplog.text
    for what in ("the filling of the cells", "the exact search"):
        assert f"{what} {failed} Error in allocMemory: StandardGpuResources: alloc fail (out of mem" in caplog.text
    assert caplog.text.count(failed) == 3
    assert on_gpus == made_on_gpus(tmp_path, monkeypatch, None)


@pytest.mark.parametrize(
    ("trial", "can", "reason"),
    [
        ("print(2)", True, ""),
        ("print(0)", False, ""),
        (
            "import os; print(2, flush=True); os.write(2, b'Faiss assertion failed: CUDA error 209'); os.abort()",
            False,
            "since faiss cannot use the GPU: Faiss assertion failed: CUDA error 209",
        ),
        ("import os; os.abort()", False, "since faiss cannot use the GPU: exit code -6"),
        ("import time; time.sleep(60)", False, "since a trial of faiss on the GPU took more than 0.5 s"),
    ],
)
def test_faiss_is_tried_where_its_end_does_no_harm(
    trial: str, can: bool, reason: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    assert not index._has_gpus.__wrapped__()  # faiss-cpu
    monkeypatch.setattr(faiss, "StandardGpuResources", object, raising=False)
    assert not index._has_gpus.__wrapped__()  # the trial itself, with a faiss that has no GPUs
    assert not caplog.text
    monkeypatch.setattr(index, "GPU_TRIAL", trial)
    monkeypatch.setattr(index, "TRIAL_S", 0.5)
    assert index._has_gpus.__wrapped__() is can
    assert reason in caplog.text
    assert bool(caplog.text) == bool(reason)


# Recall


def on_a_line() -> npt.NDArray[np.float32]:
    """Places 0 to 39 on a line, and 1000 to 1039."""
    return np.concatenate([np.arange(40), 1000 + np.arange(40)]).astype(np.float32)[:, None]


def two_cells(vectors: npt.NDArray[np.float32], centres: list[float]) -> Any:
    cells = faiss.IndexFlatL2(1)
    made = faiss.IndexIVFFlat(cells, 1, len(centres))
    made.train(np.array(centres, np.float32)[:, None])
    made.add(vectors)
    return made


def recall_of(tmp_path: Path, vectors: npt.NDArray[np.float32], queries: list[int]) -> Recall:
    np.save(tmp_path / "v.npy", vectors)
    return Recall(VectorFile(tmp_path / "v.npy"), Queries(vectors[queries], np.array(queries)))


def test_recall_counts_the_neighbours_besides_oneself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(index, "CHUNK", 7)
    vectors = np.arange(20, dtype=np.float32)[:, None]
    made = two_cells(vectors, [4.5, 14.5])  # 0 to 9 and 10 to 19
    # Of 9 the nearest are 5 to 8 and 10 to 13: half of them lie in its cell. Of 4: 0 to 3 and 5 to 8, all in its cell.
    recall = recall_of(tmp_path, vectors, [9, 4])
    assert recall(made, 1) == 0.75
    assert recall(made, 2) == 1.0


def test_recall_of_frames_that_centres_stand_for(tmp_path: Path) -> None:
    vectors = np.arange(20, dtype=np.float32)[:, None]
    np.save(tmp_path / "v.npy", vectors)
    # The nearest of 9.4 are 6 to 13: four of eight, none of which is the query itself.
    recall = Recall(VectorFile(tmp_path / "v.npy"), Queries(np.array([[9.4]], np.float32), np.array([-1])))
    assert recall(two_cells(vectors, [4.5, 14.5]), 1) == 0.5


def test_equal_frames_stand_for_one_another(tmp_path: Path) -> None:
    """Silence gives many equal frames, of which any is as near as the other, far away from the origin too."""
    vectors = np.full((200, 16), 1000.0, np.float32)
    vectors[100:] += 0.01 * frames(100, 16)
    made = faiss.index_factory(16, "IVF1,Flat")
    made.train(vectors)
    made.add(vectors)
    np.save(tmp_path / "v.npy", vectors)
    recall = Recall(VectorFile(tmp_path / "v.npy"), Queries(vectors, np.arange(200)))
    assert recall(made, 1) == 1.0


@pytest.mark.parametrize("count", [1, 2, 5])
def test_recall_with_fewer_than_eight_others(count: int, tmp_path: Path) -> None:
    vectors = np.arange(count, dtype=np.float32)[:, None]
    assert recall_of(tmp_path, vectors, list(range(count)))(two_cells(vectors, [0.0]), 1) == 1.0


@pytest.mark.parametrize(
    ("nprobe", "wanted", "expected"),
    [
        *[(9, None, (9, 0.09)), (9, 0.0, (9, 0.09)), (9, 0.09, (9, 0.09)), (9, 0.1, (10, 0.1))],
        *[(1, 0.5, (50, 0.5)), (3, 0.96, (96, 0.96)), (3, 1.0, (100, 1.0)), (200, 1.0, (200, 1.0))],
    ],
)
def test_nprobe_is_raised_no_more_than_needed(nprobe: int, wanted: float | None, expected: tuple[int, float]) -> None:
    tried: list[int] = []

    def recall(probes: int) -> float:
        tried.append(probes)
        return min(1.0, probes / 100)

    assert index.raised(recall, nprobe, 100, wanted) == expected
    assert max(tried) <= max(nprobe, 100)
    assert len(tried) <= 14


def test_what_all_cells_do_not_reach_ends_the_search() -> None:
    assert index.raised(lambda nprobe: nprobe / 1000, 9, 100, 0.5) == (100, 0.1)


def test_the_recipes_recall_raises_nprobe_in_name_file_and_report(
    recipe: Recipe, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    recipe = changed(recipe, "index", nprobe=1)
    write_features(recipe, [[frames(3000)]])
    index.run(recipe, ALONE)
    plain = index_file(recipe).read_bytes()
    before = read_json(folder(recipe) / "report.json")
    assert before["nprobe"] == 1
    assert 0.01 < before["recall"] < 0.5

    asking = changed(recipe, "index", recall=0.8)
    assert complete(asking) is None
    index.run(asking, ALONE)
    report = read_json(folder(recipe) / "report.json")
    nprobe = report["nprobe"]
    assert 0.8 <= report["recall"] < 0.9
    assert f"nprobe {nprobe}, not 1, for index.recall 0.8" in caplog.text
    assert f"nprobe {nprobe}, recall@8 {report['recall']:.3f}" in caplog.text
    assert [p.name for p in folder(recipe).glob("*.index")] == [f"added_IVF76_Flat_nprobe_{nprobe}_tiny_v2.index"]
    read = faiss.read_index(str(index_file(recipe)))
    assert read.nprobe == nprobe
    read.nprobe = 1
    assert faiss.serialize_index(read).tobytes() == plain

    # By another way: the eight nearest of 1000 frames, by their distances in float64, and a search by FAISS.
    read.nprobe = nprobe
    vectors = frames(3000).astype(np.float64)
    chosen = index.spread(3000, 1000)
    squares = np.square(vectors[chosen]).sum(axis=1)[:, None] + np.square(vectors).sum(axis=1)
    squares -= 2 * vectors[chosen] @ vectors.T
    exact = np.argsort(squares, axis=1)[:, 1:9]
    found = read.search(frames(3000)[chosen], 9)[1][:, 1:]
    share = np.mean([len(set(e) & set(f)) / 8 for e, f in zip(exact.tolist(), found.tolist(), strict=True)])
    assert report["recall"] == pytest.approx(share, abs=1e-4)

    index.run(changed(recipe, "index", recall=1.0), ALONE)
    assert read_json(folder(recipe) / "report.json")["recall"] == 1.0
    assert "out of reach" not in caplog.text


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


@pytest.mark.parametrize("cut", [10, 500])
def test_features_cut_short_are_named(cut: int, recipe: Recipe) -> None:
    write_features(recipe, [[frames(10)], [frames(10)]])
    path = workspace_of(recipe).features_file(1)
    path.write_bytes(path.read_bytes()[:-cut])
    with pytest.raises(
        StageError, match=r"00001\.safetensors is damaged( \(.+\))?: delete it and run `rvc-dist extract` again"
    ):
        index.run(recipe, ALONE)


def test_features_that_their_header_does_not_describe_are_damaged(recipe: Recipe) -> None:
    write_features(recipe, [[frames(10)], [frames(10, WIDTH + 1)]])
    with pytest.raises(StageError, match=r"0000\d\.safetensors is damaged"):
        index.run(recipe, ALONE)
    assert not list(folder(recipe).iterdir())


def test_a_folder_that_cannot_be_written_is_told(recipe: Recipe) -> None:
    write_features(recipe, [[frames(10)]])
    folder(recipe).write_text("a file in its place")
    with pytest.raises(FileExistsError, match=f"'{folder(recipe)}'"):
        index.run(recipe, ALONE)
    folder(recipe).unlink()
    (folder(recipe) / "added_IVF1_Flat_nprobe_9_tiny_v2.index" / "x").mkdir(parents=True)
    with pytest.raises(IsADirectoryError, match=r"tiny_v2\.index'"):
        index.run(recipe, ALONE)
    assert complete(recipe) is None
    assert not list(folder(recipe).glob(".tmp*"))


def test_a_full_disk_is_told_and_leaves_nothing_half_written(recipe: Recipe, monkeypatch: pytest.MonkeyPatch) -> None:
    write_features(recipe, [[frames(10)]])

    def fail(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(VectorFile, "rows", fail)
    with pytest.raises(OSError, match=r"No space left on device; 0\.0\d\d MB needed, \d+ MB free: '.*tiny_v2\.index'"):
        index.run(recipe, ALONE)
    assert not list(folder(recipe).iterdir())


def test_a_kill_never_leaves_a_report_that_calls_another_datasets_index_its_own(
    recipe: Recipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    one, other = [[frames(10)]], [[frames(11)]]  # of as many cells: the files have the same names
    write_features(recipe, one)
    index.run(recipe, ALONE)
    before = workspace_of(recipe).index_file()
    write_features(recipe, other)
    monkeypatch.setattr(index, "write_json", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        index.run(recipe, ALONE)
    monkeypatch.undo()
    write_features(recipe, one)
    assert complete(recipe) is None
    index.run(recipe, ALONE)
    assert workspace_of(recipe).index_file() == before
    assert len(np.load(workspace_of(recipe).vectors_file)) == 10


def test_what_a_killed_process_left_is_removed(recipe: Recipe) -> None:
    write_features(recipe, [[frames(10)]])
    folder(recipe).mkdir(parents=True)
    old, new = folder(recipe) / ".0123456789abcdef.tmp", folder(recipe) / ".fedcba9876543210.tmp"
    for path in (old, new):
        path.write_bytes(b"half")
    os.utime(old, (0, 0))
    index.run(recipe, ALONE)
    assert [p.name for p in folder(recipe).glob(".*")] == [new.name]  # perhaps another job's, that works now


def test_a_missing_faiss_is_told_with_the_remedy(recipe: Recipe, monkeypatch: pytest.MonkeyPatch) -> None:
    write_features(recipe, [[frames(10)]])
    monkeypatch.setitem(sys.modules, "faiss", None)
    with pytest.raises(StageError, match="pip install faiss-cpu"):
        index.run(recipe, ALONE)


# Retrieval, from memory and from the disk


@pytest.fixture(params=["memory", "disk"])
def held(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Where the index stays: in memory, or as a large one on the disk."""
    if request.param == "disk":
        monkeypatch.setattr("rvc_dist.features.index_file.MAX_IN_MEMORY", 0)
    return str(request.param)


def retriever(tmp_path: Path, vectors: npt.NDArray[np.float32], cells: int = 1) -> Retriever:
    made = faiss.index_factory(vectors.shape[1], f"IVF{cells},Flat")
    faiss.extract_index_ivf(made).cp.min_points_per_centroid = 1
    made.train(vectors)
    made.add(vectors)
    faiss.write_index(made, str(tmp_path / "i.index"))
    return Retriever(tmp_path / "i.index", vectors.shape[1])


@pytest.mark.usefixtures("held")
def test_neighbours_weigh_by_the_inverse_square_of_faiss_distance(tmp_path: Path) -> None:
    # Of the query (0, 0) the squared distances are 1 and 4: weights 1 and 1/16, normalised 16/17 and 1/17.
    find = retriever(tmp_path, np.array([[1, 0], [0, 2]], np.float32))
    found = find(np.zeros((1, 2), np.float32), 1.0)
    np.testing.assert_allclose(found, [[16 / 17, 2 / 17]], rtol=1e-6)
    half = find(np.zeros((1, 2), np.float32), 0.5)
    np.testing.assert_allclose(half, [[8 / 17, 1 / 17]], rtol=1e-6)
    np.testing.assert_array_equal(find(np.ones((3, 2), np.float32), 0.0), np.ones((3, 2)))


@pytest.mark.usefixtures("held")
def test_only_eight_neighbours_count(tmp_path: Path) -> None:
    ring = np.array([[np.cos(a), np.sin(a)] for a in np.arange(8) * np.pi / 4], np.float32)
    find = retriever(tmp_path, np.concatenate([1.5 * ring, ring]))
    # All eight of the inner ring are at distance 1, and their mean is its centre.
    np.testing.assert_allclose(find(np.zeros((1, 2), np.float32), 1.0), [[0, 0]], atol=1e-6)


@pytest.mark.usefixtures("held")
def test_an_exact_hit_takes_all_the_weight(tmp_path: Path) -> None:
    vectors = frames(100)
    find = retriever(tmp_path, vectors)
    found = find(vectors, 1.0)
    assert np.isfinite(found).all()
    np.testing.assert_allclose(found, vectors, atol=1e-5)
    twice = retriever(tmp_path, np.concatenate([vectors, vectors]))
    np.testing.assert_allclose(twice(vectors, 1.0), vectors, atol=1e-5)


@pytest.mark.usefixtures("held")
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


@pytest.mark.usefixtures("held")
def test_an_index_of_another_kind_is_refused(tmp_path: Path) -> None:
    made = faiss.IndexIDMap(faiss.IndexFlatL2(4))
    made.add_with_ids(frames(5, 4), np.arange(5))
    faiss.write_index(made, str(tmp_path / "i.index"))
    with pytest.raises(
        StageError, match=r"infer\.index: .*i\.index is no .*: it is of FAISS's kind b'IxMp', expected an IVF,Flat"
    ):
        Retriever(tmp_path / "i.index", 4)


def test_from_the_disk_comes_what_comes_from_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    vectors, queries = frames(1000), frames(60, seed=9)
    in_memory = retriever(tmp_path, vectors, cells=20)
    monkeypatch.setattr("rvc_dist.features.index_file.MAX_IN_MEMORY", 0)
    from_disk = Retriever(tmp_path / "i.index", WIDTH)
    assert isinstance(faiss.downcast_InvertedLists(from_disk._index.invlists), faiss.OnDiskInvertedLists)
    assert np.array_equal(from_disk(queries, 0.7), in_memory(queries, 0.7))


@pytest.mark.parametrize("odd", [np.nan, np.inf])
@pytest.mark.parametrize("of", ["vectors", "centres"])
def test_numbers_of_a_large_index_that_are_not_finite_reach_no_voice(
    odd: float, of: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The vectors of a file of more than a GB are looked at when a search finds them; the centres always."""
    vectors = frames(1000)
    retriever(tmp_path, vectors, cells=4)
    path = tmp_path / "i.index"
    whole = bytearray(path.read_bytes())
    at = whole.find(vectors[:1].tobytes()) if of == "vectors" else whole.find(b"IxF2") + 45
    whole[at : at + 4] = np.float32(odd).tobytes()
    path.write_bytes(whole)
    monkeypatch.setattr(index, "MAX_IN_MEMORY", 0)
    with pytest.raises(StageError, match="it holds numbers that are not finite"):
        Retriever(path, WIDTH)
    monkeypatch.setattr("rvc_dist.features.index_file.MAX_IN_MEMORY", 0)
    if of == "centres":
        with pytest.raises(StageError, match="it holds numbers that are not finite"):
            Retriever(path, WIDTH)
        return
    find = Retriever(path, WIDTH)
    find._index.nprobe = 4
    found = find(vectors, 1.0)
    assert np.isfinite(found).all()
    np.testing.assert_allclose(found[1:], vectors[1:], atol=1e-4)
    monkeypatch.setattr("rvc_dist.features.index_file.NUM_NEIGHBOURS", 1000)  # of all vectors too
    assert np.isfinite(find(vectors[:3], 1.0)).all()
    fills = find._index.search_and_reconstruct
    monkeypatch.setattr(find._index, "search_and_reconstruct", lambda *a: (*fills(*a)[:2], np.full((1, 1000, 9), odd)))
    with pytest.raises(StageError, match=r"i\.index holds numbers that are not finite"):
        find(vectors[:1], 1.0)


@pytest.mark.usefixtures("held")
@pytest.mark.parametrize("cut", [1, 10000, 40000])
def test_an_index_cut_short_is_refused(cut: int, tmp_path: Path) -> None:
    retriever(tmp_path, frames(1000), cells=20)
    path = tmp_path / "i.index"
    path.write_bytes(path.read_bytes()[:-cut])
    with pytest.raises(
        StageError,
        match=r"infer\.index: .*i\.index is no index for this voice: (it is cut short|the sizes of its lists)",
    ):
        Retriever(path, WIDTH)


@pytest.mark.usefixtures("held")
def test_a_flat_index_does_too(tmp_path: Path) -> None:
    flat = faiss.IndexFlatL2(WIDTH)
    flat.add(frames(30))
    faiss.write_index(flat, str(tmp_path / "i.index"))
    np.testing.assert_allclose(Retriever(tmp_path / "i.index", WIDTH)(frames(30), 1.0), frames(30), atol=1e-5)
