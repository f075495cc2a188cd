"""What is exported for other tools to train on from, read as they read it, and imported again."""

from __future__ import annotations

import hashlib
import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import experiments
import numpy as np
import pytest
import soundfile
import torch
from helpers import RATE, changed, narrow_recipe, newest, parse_recipe, train, workspace_of
from safetensors.numpy import load_file

from rvc_dist.config import Recipe, load_recipe
from rvc_dist.features import index
from rvc_dist.models.state_dict import to_upstream
from rvc_dist.tools import import_experiment
from rvc_dist.voice import export
from rvc_dist.voice.layouts import LAYOUTS
from rvc_dist.workspace import Shard, StageError, read_header, unit_files

ALONE = Shard(0, 1)
SHAPES = json.loads((Path(__file__).parents[1] / "golden" / "state_dict_shapes.json").read_text())


def imported(folder: Path, run_dir: Path, **sections: Any) -> Recipe:
    recipe = changed(narrow_recipe(run_dir.parent, **sections), "data", audio_dir=str(folder))
    quick = {"max_steps": 2, "batch_size": 2, "num_workers": 1, "samples": False, "report": False}
    recipe = changed(replace(recipe, run_dir=str(run_dir)), "train", **quick)
    import_experiment.run(recipe, ALONE)
    return load_recipe(workspace_of(recipe).config_file)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Recipe:
    """A run of two steps, of two speakers, with silent clips and an index."""
    folder = tmp_path_factory.mktemp("trained")
    experiment = experiments.make(folder / "logs" / "voice", "applio")
    experiments.add_mutes(experiment, "applio")
    recipe = imported(experiment, folder / "run")
    index.run(recipe, ALONE)
    train(recipe)
    return recipe


def exported(recipe: Recipe, kind: str, folder: Path) -> Path:
    export.run(changed(recipe, "export", format=kind, folder=str(folder)), ALONE)
    return folder


def clips(recipe: Recipe) -> list[tuple[int, str, str, str]]:
    """Of each clip its speaker, and hashes of its wave, content and pitch."""
    work, found = workspace_of(recipe), []
    for path in unit_files(work.features_dir):
        header, features, waves = read_header(path), load_file(path), load_file(work.clips_dir / path.name)
        assert header is not None
        for i, clip in enumerate(header["clips"]):
            arrays = waves[f"{i:05d}"], features[f"{i:05d}.content"], features[f"{i:05d}.f0"]
            assert all(a.dtype == np.float32 for a in arrays)
            found.append((clip["speaker"], *(hashlib.sha256(a.tobytes()).hexdigest() for a in arrays)))
    return sorted(found)


@pytest.mark.parametrize("kind", LAYOUTS)
def test_an_exported_experiment_is_imported_as_the_same_run(kind: str, trained: Recipe, tmp_path: Path) -> None:
    folder = exported(trained, kind, tmp_path / "logs" / "voice")
    again = imported(folder, tmp_path / "again")
    assert clips(again) == clips(trained)
    assert again.model == trained.model
    assert again.data.sample_rate == trained.data.sample_rate
    assert (again.extract.embedder_model, again.extract.include_mutes) == ("mfcc", 2)
    mutes = [load_file(workspace_of(recipe).mute_file)["00000.content"] for recipe in (trained, again)]
    np.testing.assert_array_equal(*mutes)
    vectors = [np.load(workspace_of(recipe).vectors_file) for recipe in (trained, again)]
    np.testing.assert_array_equal(*vectors)
    before = to_upstream(newest(trained).models["generator"])
    assert again.train.pretrained_g is not None
    kept = torch.load(again.train.pretrained_g, weights_only=True)["model"]
    assert all(torch.equal(kept[key], value) for key, value in before.items())
    after = train(again)
    assert after.progress.step == 2
    steps = {key: int(value) for key, value in after.optimizers["generator"].tensors.items() if key.endswith("/step")}
    assert set(steps.values()) == {4}  # its moments went on too
    assert not torch.equal(after.models["generator"]["emb_g.weight"], before["emb_g.weight"])


@pytest.mark.parametrize("kind", LAYOUTS)
def test_the_tools_find_every_file_of_a_line(kind: str, trained: Recipe, tmp_path: Path) -> None:
    """As their loaders do: a line's columns, and how many frames its arrays have."""
    folder = exported(trained, kind, tmp_path / "voice")
    lines = (folder / "filelist.txt").read_text().splitlines()
    named = kind == "rvc"
    assert len(lines) == 6 + 2 * 2  # clips, and silent ones of each speaker
    for line in lines:
        wave, content, coarse, hz, speaker, *name = line.split("|")
        assert (speaker in "03", len(name)) == (True, named)
        samples, rate = soundfile.read(wave, dtype="float32")
        phone, pitch, pitchf = (np.load(file) for file in (content, coarse, hz))
        assert rate == RATE
        assert phone.shape[1:] == (768,)
        assert pitch.shape == pitchf.shape
        assert pitch.dtype == np.int64
        assert 1 <= pitch.min() <= pitch.max() <= 255
        assert abs(2 * len(phone) - len(samples) * 100 // rate) <= 2
        assert (pitch == 1).all() == ("mute" in wave)
    config = json.loads((folder / "config.json").read_text())
    assert config["data"][LAYOUTS[kind].rate_key] == RATE
    assert config["data"]["hop_length"] == 240
    assert config["train"]["segment_size"] == 8640
    assert config["model"]["upsample_rates"] == [10, 6, 2, 2]
    assert config["model"]["spk_embed_dim"] == 4
    info = json.loads((folder / "model_info.json").read_text())
    assert (info["embedder_model"], info["speakers_id"]) == ("mfcc", 2)
    if named:
        manifest = json.loads((folder / "multispeaker_manifest.json").read_text())
        assert [entry["speaker_id"] for entry in manifest["entries"]] == [0, 3]
        assert config["speaker_info"] == manifest["speakers"]
        keys = {Path(line.split("|")[0]).stem.rpartition("_")[0] for line in lines if "mute" not in line}
        assert keys == {entry["output_key"] for entry in manifest["entries"]}


@pytest.mark.parametrize("letter", ["G", "D"])
@pytest.mark.parametrize("kind", LAYOUTS)
def test_the_tools_go_on_with_weights_moments_and_rate(kind: str, letter: str, trained: Recipe, tmp_path: Path) -> None:
    folder = exported(trained, kind, tmp_path / "voice")
    data = torch.load(folder / f"{letter}_2.pth", weights_only=True)
    saved, name = newest(trained), {"G": "generator", "D": "discriminator"}[letter]
    assert data.keys() == {"model", "iteration", "optimizer", "learning_rate"}
    assert (data["iteration"], data["learning_rate"]) == (1, trained.train.learning_rate)
    ours = to_upstream(dict.fromkeys(saved.models[name]))
    upstream = [key for key in SHAPES["G_v2_24000" if letter == "G" else "D_v2"] if key in ours]
    if kind == "rvc" and letter == "G":  # whose decoder makes these first
        first = [key for key in upstream if "dec.noise_convs" in key]
        upstream = [key for key in upstream if key not in first]
        at = upstream.index("dec.conv_pre.weight")
        upstream[at:at] = first
    assert upstream == list(data["model"])
    # As they do: an optimizer over their network, and a schedule that goes on at this epoch.
    parameters = [torch.nn.Parameter(data["model"][key]) for key in upstream]
    optimizer = torch.optim.AdamW(parameters, trained.train.learning_rate, betas=(0.8, 0.99), eps=1e-9)
    optimizer.load_state_dict(data["optimizer"])
    torch.optim.lr_scheduler.ExponentialLR(optimizer, gamma=0.999875, last_epoch=data["iteration"] - 1)
    moments = {to_key(key): value for key, value in saved.optimizers[name].tensors.items()}
    for key, parameter in zip(upstream, parameters, strict=True):
        if not key.endswith("conv_k.bias"):  # which does not change here
            assert optimizer.state[parameter]["step"] == 2
        for moment, value in optimizer.state[parameter].items():
            assert moment == "step" or torch.equal(value, moments[f"{key}/{moment}"]), key
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()


def to_key(key: str) -> str:
    """PARAMETER/MOMENT in the old spelling."""
    name, _, moment = key.rpartition("/")
    return f"{next(iter(to_upstream({name: torch.zeros(())})))}/{moment}"


def test_base_models_are_those_of_the_run_and_train(trained: Recipe, tmp_path: Path) -> None:
    recipe = parse_recipe("export", ["--as", "pretrained", "--export.folder", str(tmp_path / "base")])
    assert recipe.export.format == "pretrained"
    folder = exported(trained, "pretrained", tmp_path / "base")
    assert sorted(p.name for p in folder.iterdir()) == ["f0D24k_tiny.pth", "f0G24k_tiny.pth"]
    for letter, name in (("G", "generator"), ("D", "discriminator")):
        data = torch.load(folder / f"f0{letter}24k_tiny.pth", weights_only=True)
        for key, value in to_upstream(newest(trained).models[name]).items():
            assert torch.equal(data["model"][key], value.half())
    pretrained = {f"pretrained_{x}": str(folder / f"f0{x.upper()}24k_tiny.pth") for x in "gd"}
    other = changed(replace(trained, run_dir=str(tmp_path / "run")), "train", **pretrained)
    shutil.copytree(workspace_of(trained).features_dir, workspace_of(other).features_dir)
    shutil.copytree(workspace_of(trained).clips_dir, workspace_of(other).clips_dir)
    assert train(other).progress.step == 2


def test_what_is_there_is_not_overwritten_and_nothing_half_is_left(trained: Recipe, tmp_path: Path) -> None:
    (tmp_path / "taken").mkdir()
    with pytest.raises(StageError, match=r"export\.folder: .*taken is there already; remove it, or give another"):
        exported(trained, "rvc", tmp_path / "taken")
    with pytest.raises(StageError, match=r"export\.folder: .* has letters that no filelist\.txt can hold"):
        exported(trained, "rvc", tmp_path / "a|b")
    assert [p.name for p in tmp_path.iterdir()] == ["taken"]
