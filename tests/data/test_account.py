"""Seconds in = seconds in clips + seconds told, over made datasets of every kind, level, cut and fault."""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path

import pytest
from recordings import write_made

from rvc_dist import workspace
from rvc_dist.config import DataConfig, PreprocessConfig, Recipe
from rvc_dist.data import cutting, preprocess
from rvc_dist.workspace import Shard, Workspace, read_json

WITHIN_S = 0.002
"""A slice: rounding to samples of two rates, and of the account."""
LOSSY_S = {".ogg": 0.05, ".mp3": 0.15, ".m4a": 0.15, ".aac": 0.15, ".ac3": 0.15, ".wma": 0.3, ".mka": 0.01}
"""Encoders pad their first and last frame, of a joined recording twice; time stamps of some are rounded."""


def recipe_of(folder: Path, seed: int) -> Recipe:
    """Sixty seeds give every one there is."""
    cut = ("automatic", "simple", "skip")[seed % 3]
    chunk, overlap = ((3.0, 0.3), (1.0, 0.0), (2.0, 0.5), (1.5, 0.75))[seed // 3 % 4]
    normalization = ("post", "pre", "none")[seed // 2 % 3]
    options = PreprocessConfig(cut, chunk, overlap, bool(seed % 2), normalization, num_workers=1)
    rate = (24000, 48000, 40000)[seed // 5 % 3]
    return Recipe(
        run_dir=str(folder / "run"), data=DataConfig(str(folder / "audio"), sample_rate=rate), preprocess=options
    )


def seconds_in_clips(work: Workspace) -> dict[str, float]:
    """Of each recording, from the clips alone; a second that several clips hold counts once."""
    from safetensors import safe_open

    spans: dict[str, list[tuple[float, float]]] = defaultdict(list)
    for path in workspace.unit_files(work.clips_dir):
        header = workspace.read_header(path)
        assert header is not None
        with safe_open(path, framework="numpy") as file:
            for i, clip in enumerate(header["clips"]):
                length_s = file.get_slice(f"{i:05d}").get_shape()[0] / header["sample_rate"]
                spans[clip["source"]].append((clip["start_s"], clip["start_s"] + length_s))
    total: dict[str, float] = defaultdict(float)
    for source, found in spans.items():
        until = 0.0
        for start, stop in sorted(found):
            total[source] += max(0.0, stop - max(start, until))
            until = max(until, stop)
    return total


def worst_deviation(folder: Path, seed: int) -> float:
    """Make the clips of a made dataset, hold the account of each recording against them, and give the largest gap."""
    held = write_made(folder / "audio", seed)
    recipe = recipe_of(folder, seed)
    work = Workspace(recipe.run_dir, recipe.name)
    told = ""
    try:
        preprocess.run(recipe, Shard())
    except workspace.StageError as error:
        told = str(error)
    if told:  # all silent, short or damaged: each is named
        assert all(name in told for name in held), told
        return 0.0
    report = read_json(work.clips_report_file)
    assert {f["path"] for f in report["files"]} == set(held)
    in_clips, worst = seconds_in_clips(work), 0.0
    for file in report["files"]:
        name, seconds = file["path"], held[file["path"]]
        assert all(lost > 0 for lost in file["lost"].values())
        gap = abs(file["seconds_in"] - in_clips[name] - sum(file["lost"].values()))
        slices = 1 + file["seconds_in"] // workspace.MAX_SLICE_S
        assert gap <= WITHIN_S * slices, (seed, file, in_clips[name])
        if seconds is not None:  # what it holds was heard, too
            near = LOSSY_S.get(Path(name).suffix, 0.0) + 1e-4 * slices
            assert file["seconds_in"] == pytest.approx(seconds, abs=near), (seed, file)
        assert file["clips"] or file["reason"], file
        worst = max(worst, gap)
    assert sum(report["lost"].values()) == pytest.approx(
        sum(sum(f["lost"].values()) for f in report["files"]), abs=0.01
    )
    assert report["seconds_in"] == pytest.approx(sum(f["seconds_in"] for f in report["files"]), abs=0.01)
    return worst


@pytest.mark.parametrize("seed", [*range(20), pytest.param(range(20, 60), marks=pytest.mark.slow)])
def test_seconds_in_are_seconds_in_clips_and_seconds_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, seed: int | range
) -> None:
    monkeypatch.setattr(workspace, "MIN_UNIT_S", 2.0)
    for module in (workspace, cutting):
        monkeypatch.setattr(module, "MAX_SLICE_S", 4.0)
    seeds = seed if isinstance(seed, range) else [seed]
    worst = max((worst_deviation(tmp_path / str(s), s), s) for s in seeds)
    print(f"worst deviation {1000 * worst[0]:.3f} ms (seed {worst[1]})")  # noqa: T201 - what a run of it is for
