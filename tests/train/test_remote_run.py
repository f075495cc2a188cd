"""Training from object storage: the bits of training from the disk, whatever happens to connections and ranks."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import pytest
from helpers import changed, make_features, tiny_recipe, workspace_of
from launching import rvc_dist
from object_store import URL, served
from safetensors.torch import load_file
from test_resume import kill_at

from rvc_dist.config import Recipe
from rvc_dist.tools import upload
from rvc_dist.voice import export
from rvc_dist.workspace import Shard, list_checkpoints

pytestmark = pytest.mark.usefixtures("thin")

STEPS = 12


def written(recipe: Recipe, file: Path) -> Path:
    file.write_text(recipe.to_yaml())
    return file


@pytest.mark.slow
@pytest.mark.distributed
def test_two_ranks_train_to_the_bits_of_a_local_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """From a storage that fails in every way, through a cache of half, killed in between, with the recipe alone."""
    local = tiny_recipe(tmp_path / "run", max_steps=STEPS, save_every_steps=4, eval_every_steps=8, num_workers=2)
    make_features(local, num_clips=36, speakers=(0, 1))
    units = sum(path.stat().st_size for path in (tmp_path / "run").glob("*/0*.safetensors"))
    local = changed(local, "data", read_order="local", window_gb=units / 8 / 1e9)
    workspace_of(local).clips_report_file.write_text('{"total_dataset_duration": "00:00:30"}')
    rvc_dist(2, "train", "--config", written(local, tmp_path / "local.yaml"))
    with served() as (environment, faults):
        for name, value in environment.items():
            monkeypatch.setenv(name, value)
        there = changed(local, "data", remote=URL, cache_dir=str(tmp_path / "cache"), cache_gb=units / 2 / 1e9)
        upload.run(there, Shard())
        there = replace(there, run_dir=str(tmp_path / "elsewhere"))
        file = written(there, tmp_path / "remote.yaml")
        faults.next |= {
            "features/00003.safetensors": ["reset", "503"],
            "clips/00005.safetensors": ["cut", "truncated"],
            "clips/00001.safetensors": ["flipped"],
            "manifest.json": ["reset"],
        }
        assert kill_at(file, 2, 6)
        output = rvc_dist(2, "train", "--config", file)
        assert "continuing from step 4" in output
        assert re.search("[1-9] of 12 units are in", output), "what was fetched before is kept"
        cached = sum(path.stat().st_size for path in (tmp_path / "cache").glob("*/*/0*.safetensors"))
        assert 0 < cached <= units / 2
        assert max(faults.asked[f"features/{unit:05d}.safetensors"] for unit in range(12)) > 1, "it holds not all"
        assert not any(faults.next.values()), "all of them happened"
        export.run(there, Shard())
    ends = [list_checkpoints(workspace_of(recipe).checkpoints_dir)[-1] for recipe in (local, there)]
    for name in ("generator.safetensors", "discriminator.safetensors"):
        one, other = (load_file(end / name) for end in ends)
        assert all(one[key].equal(other[key]) for key in one | other), name
    assert (tmp_path / "elsewhere" / "voice" / "tiny_last.pth").is_file()
