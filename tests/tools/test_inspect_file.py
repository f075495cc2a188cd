"""What files and folders are, and whether they fit: those of every tool, made as the tools write them."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import faiss
import numpy as np
import pytest
import safetensors.torch
import torch
from experiments import FOLDERS
from helpers import (
    EMBEDDER,
    NARROW,
    WIDTH,
    changed,
    make_checkpoint,
    make_features,
    make_generator,
    make_ssl_folder,
    narrow_recipe,
    tiny_recipe,
    voice_contents,
    workspace_of,
)

from rvc_dist import __main__ as cli
from rvc_dist.choices import DISCRIMINATORS
from rvc_dist.config import ConfigError, DataConfig, ExtractConfig, Recipe
from rvc_dist.features.rmvpe import RMVPE
from rvc_dist.files import write_json
from rvc_dist.models.discriminator import MultiPeriodDiscriminator
from rvc_dist.models.state_dict import to_upstream
from rvc_dist.tools.inspect_file import Found, inspect
from rvc_dist.train import checkpoint, networks
from rvc_dist.train.dataset import ClipTable

RATE = 24000


def g(recipe: Recipe, width: int = 768) -> dict[str, torch.Tensor]:
    return to_upstream(make_generator(recipe, content_channels=width, num_speakers=5).state_dict())


def training_file(path: Path, recipe: Recipe, width: int = 768) -> Path:
    torch.save(
        {"model": g(recipe, width), "iteration": 7, "optimizer": {"state": {0: {"step": 1}}}, "learning_rate": 1e-4},
        path,
    )
    return path


def write_report(recipe: Recipe) -> None:
    """Features that are WIDTH wide, as `extract` reports them."""
    settings = {"embedder": EMBEDDER | {"width": WIDTH}}
    report = {"settings": settings, "clips": "tiny", "content_frames": 0}
    write_json(workspace_of(recipe).features_report_file, report)


@pytest.fixture
def recipe(tmp_path: Path) -> Recipe:
    return narrow_recipe(tmp_path)


def test_a_training_file_is_told_with_its_state_and_fits_or_says_why_not(tmp_path: Path, recipe: Recipe) -> None:
    file = training_file(tmp_path / "G_7.pth", recipe)
    found = inspect(file, recipe)
    assert found.what.startswith("a generator (v2, 24000 Hz, pitch, HiFi-GAN as vocoder, features 768 wide, inter_")
    assert found.what.endswith(", as training writes it")
    assert found.facts == {
        "speakers": "5",
        "epoch": "7",
        "learning rate": "0.0001",
        "optimizer": "with its state",
        "weight norm": "old (weight_g, weight_v)",
    }
    assert found.misfit == []
    other = replace(recipe, data=DataConfig(sample_rate=48000), model=replace(NARROW, pitch_guidance=False))
    (rate, pitch, *tensors) = inspect(file, other).misfit or []
    assert rate == "data.sample_rate: it has 24000 Hz, this recipe 48000 Hz"
    assert pitch == "model.pitch_guidance: it has pitch, this recipe no pitch"
    assert "enc_p.emb_pitch.weight: not part of this network" in tensors
    write_report(recipe)
    assert (inspect(file, recipe).misfit or [])[0] == (
        f"extract.embedder_model: it has features 768 wide, this recipe features {WIDTH} wide"
    )


def test_a_discriminator_and_bare_weights(tmp_path: Path, recipe: Recipe) -> None:
    torch.save(MultiPeriodDiscriminator(DISCRIMINATORS["v1"], 64).state_dict(), tmp_path / "D.pth")
    found = inspect(tmp_path / "D.pth", recipe)
    assert found.what.startswith("a discriminator (v1 (1 over scales, 6 over periods")
    assert found.what.endswith("), weights alone")
    assert found.facts == {"optimizer": "none", "weight norm": "new (original0, original1)"}
    assert (found.misfit or [""])[0].startswith("model.discriminator: it has v1")


def test_a_voice_is_told_with_what_it_needs_and_that_training_cannot_begin_with_it(
    tmp_path: Path, recipe: Recipe
) -> None:
    voice = voice_contents(recipe, make_generator(recipe)) | {"author": "me\x1b[31m"}
    torch.save(voice, tmp_path / "v.pth")
    found = inspect(tmp_path / "v.pth", recipe)
    assert found.what.startswith("a voice file, made to convert with (v2, 24000 Hz")
    assert found.facts["epoch"] == "2epoch"
    assert found.facts["converts here"] == "yes, at 24000 Hz with features of mfcc"
    assert found.facts["to train on from"] == "no: it is a voice file"
    assert found.misfit == []
    torch.save(voice | {"config": [1]}, tmp_path / "v.pth")
    assert inspect(tmp_path / "v.pth", recipe).facts["converts here"].startswith("no: ")


def test_networks_of_other_kinds(tmp_path: Path, recipe: Recipe, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rvc_dist.features.rmvpe.TOP_CHANNELS", 2)
    torch.save(RMVPE().state_dict(), tmp_path / "rmvpe.pt")
    assert inspect(tmp_path / "rmvpe.pt", recipe) == Found("the pitch tracker RMVPE")
    make_ssl_folder(tmp_path / "hubert", "Hubert", num_layers=1)
    assert inspect(tmp_path / "hubert", recipe) == Found("a content encoder (hubert), features 16 wide")
    assert inspect(tmp_path / "hubert" / "model.safetensors", recipe).what == "a content encoder"
    torch.save({"layer.weight": torch.ones(2, 2)}, tmp_path / "other.pth")
    found = inspect(tmp_path / "other.pth", recipe)
    assert (found.what, found.is_known) == ("weights of no network of RVC (1 tensors: layer.weight, ...)", False)


def test_an_index_and_arrays(tmp_path: Path, recipe: Recipe) -> None:
    vectors = np.random.default_rng(0).standard_normal((90, 768), np.float32)
    index = faiss.index_factory(768, "IVF2,Flat")
    index.train(vectors)
    index.add(vectors)
    faiss.write_index(index, str(tmp_path / "a.index"))
    assert inspect(tmp_path / "a.index", recipe) == Found("a retrieval index of 90 features 768 wide, 2 cells", {}, [])
    v1 = replace(recipe, model=replace(NARROW, version="v1"), extract=ExtractConfig())
    assert inspect(tmp_path / "a.index", v1).misfit == [
        "extract.embedder_model: it has features 768 wide, this recipe 256"
    ]
    np.save(tmp_path / "c.npy", vectors)
    assert inspect(tmp_path / "c.npy", v1).misfit == ["it is 768 wide, this recipe 256"]
    np.save(tmp_path / "p.npy", vectors[0])
    assert inspect(tmp_path / "p.npy", v1) == Found("a pitch: float32 [768]")


def test_a_run_its_units_and_its_checkpoint(tmp_path: Path) -> None:
    recipe = tiny_recipe(tmp_path / "run")
    make_features(recipe)
    write_report(recipe)
    work = workspace_of(recipe)
    work.work_list_file.write_text("{}")
    work.save_recipe(recipe)
    generator = make_generator(recipe, content_channels=WIDTH)
    table = ClipTable((), (), WIDTH, EMBEDDER | {"width": WIDTH}, 1)
    identity = networks.identity(recipe, generator.shape, table)
    folder = checkpoint.save(work.checkpoints_dir, replace(make_checkpoint(recipe, generator), identity=identity))
    found = inspect(tmp_path / "run", recipe)
    assert found.what == "a run of rvc_dist: tiny (v2, 24000 Hz, pitch)"
    assert found.facts["checkpoints"] == folder.name
    assert found.misfit == []
    assert inspect(tmp_path / "run", changed(recipe, "data", sample_rate=48000)).misfit == [
        "sample_rate: 24000 -> 48000"
    ]
    assert inspect(work.clips_file(0), recipe) == Found("a unit of clips (rvc-dist preprocess)", {"clips": "3"})
    assert inspect(work.features_file(0), recipe).what == "a unit of features of clips (rvc-dist extract)"
    found = inspect(folder, recipe)
    assert found.what == "a checkpoint of rvc_dist (v2, 24000 Hz, pitch, hifi-gan)"
    assert (found.facts["step"], found.facts["encoder"], found.misfit) == ("10", "mfcc", [])
    assert inspect(folder, changed(recipe, "data", sample_rate=32000)).misfit
    (folder / "generator.safetensors").write_bytes(b"x")
    found = inspect(folder, recipe)
    assert "a damaged checkpoint: generator.safetensors has 1 bytes" in found.what
    assert not found.is_known


@pytest.mark.parametrize("tool", FOLDERS)
def test_an_experiment_of_another_tool(tmp_path: Path, recipe: Recipe, tool: str) -> None:
    """Their waves and arrays are only counted: they need not be any."""
    waves, _, _, hz, content = (tmp_path / "exp" / name for name in FOLDERS[tool])
    for path in (waves, hz, content):
        path.mkdir(parents=True)
    (waves / "0_0_0.wav").touch()
    np.save(content / "0_0_0.npy", np.zeros((9, 768), np.float32))
    np.save(hz / "0_0_0.wav.npy", np.zeros(18))
    torch.save({}, tmp_path / "exp" / "G_7.pth")
    torch.save({}, tmp_path / "exp" / "D_7.pth")
    found = inspect(tmp_path / "exp", recipe)
    assert found.what.startswith("an experiment of ")
    assert "with 1 clips, for `rvc-dist import`" in found.what
    assert found.facts == {
        "features": "768 wide",
        "pitch": "yes",
        "unvoiced frames": "zero",
        "speakers": "0",
        "encoder": "not named",
        "weights of G and D": "7",
    }
    assert found.misfit == []


def test_a_hub_folder_of_a_voice(tmp_path: Path, recipe: Recipe) -> None:
    folder = tmp_path / "hub"
    folder.mkdir()
    state = {k: v for k, v in g(recipe).items() if not k.startswith("enc_q.")}
    safetensors.torch.save_file(state, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps({"spec_channels": 513, "sr": RATE}))
    found = inspect(folder, recipe)
    assert found.what.startswith("a hub folder with a voice: a generator without posterior encoder (v2, 24000 Hz")
    assert (found.facts["rate"], found.misfit) == (str(RATE), [])


FOREIGN: dict[str, Callable[[Path], Any]] = {
    "nothing": lambda p: None,
    "empty": lambda p: p.touch(),
    "text": lambda p: p.write_text("not a model"),
    "optimizer": lambda p: torch.save(torch.optim.SGD([torch.nn.Parameter(torch.ones(1))]).state_dict(), p),
    "code": lambda p: torch.save({"model": Path}, p),
    "cut": lambda p: p.write_bytes(b"PK\3\4" + bytes(40)),
    "nan": lambda p: torch.save({"model": {"enc_q.pre.bias": torch.tensor([torch.nan])}}, p),
    "index": lambda p: p.write_bytes(b"IwFl\xff\xff\xff\x7f" + bytes(60)),
    "safetensors": lambda p: p.write_bytes(b"\xff\xff\xff\xff\0\0\0\0{" + bytes(60)),
    "folder": lambda p: p.mkdir(),
    "pipe": lambda p: os.mkfifo(p),
}


@pytest.mark.parametrize("kind", FOREIGN)
def test_what_is_foreign_damaged_or_hostile_is_a_line_and_exit_1(
    tmp_path: Path, kind: str, capsys: pytest.CaptureFixture[str]
) -> None:
    FOREIGN[kind](tmp_path / "x.pth")
    assert cli.main(["inspect", str(tmp_path / "x.pth")]) == 1
    out = capsys.readouterr().out
    assert out.startswith(f"{tmp_path}/x.pth: ")
    assert ("it does not exist" if kind == "nothing" else "nothing that can be used here: ") in out
    assert ("the state of an optimizer" in out) is (kind == "optimizer")


def test_the_command_prints_escaped_text_and_fit(
    tmp_path: Path, recipe: Recipe, capsys: pytest.CaptureFixture[str]
) -> None:
    config = tmp_path / "r.yaml"
    config.write_text(recipe.to_yaml())
    voice = voice_contents(recipe, make_generator(recipe)) | {"author": "me\x1b[31m\nfits"}
    torch.save(voice, tmp_path / "v.pth")
    training_file(tmp_path / "G.pth", recipe)
    files = [str(tmp_path / name) for name in ("v.pth", "G.pth")]
    assert cli.main(["inspect", *files, "--config", str(config)]) == 0
    out = capsys.readouterr().out
    assert r"  author: 'me\x1b[31m\nfits'" in out
    assert out.count("  this recipe: fits\n") == 2
    assert cli.main(["inspect", files[1], "--config", str(config), "--data.sample_rate", "48000"]) == 0
    out = capsys.readouterr().out
    assert "  this recipe: does not fit\n    data.sample_rate: it has 24000 Hz, this recipe 48000 Hz\n" in out
    assert cli.main(["inspect"]) == 1
    with pytest.raises(ConfigError):
        cli.parse("inspect", ["--x", "y"])
