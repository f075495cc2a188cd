"""Where a run's networks begin: in files that fit, or with one error that says all that does not."""

from __future__ import annotations

import pickle
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from helpers import NARROW, WIDTH, changed, narrow_recipe
from torch import nn

from rvc_dist.config import ConfigError, DataConfig, Recipe
from rvc_dist.models.state_dict import to_upstream
from rvc_dist.train import checkpoint, networks
from rvc_dist.train.dataset import ClipTable
from rvc_dist.workspace import StageError

TABLE = ClipTable((), (), WIDTH, {"name": "mfcc", "width": WIDTH, "hash": ""}, 1)


def write_pair(folder: Path, recipe: Recipe) -> dict[str, nn.Module]:
    """G.pth and D.pth of the recipe's networks, as the tools write them."""
    _, modules = networks.build(recipe, TABLE)
    for name, letter in zip(checkpoint.MODELS, "GD", strict=True):
        torch.save({"model": to_upstream(modules[name].state_dict())}, folder / f"{letter}.pth")
    return modules


def test_all_that_is_wrong_with_both_files_is_one_error_with_the_likely_causes(tmp_path: Path) -> None:
    recipe = narrow_recipe(tmp_path)
    other = replace(
        recipe, data=DataConfig(sample_rate=32000), model=replace(NARROW, version="v1", pitch_guidance=False)
    )
    write_pair(tmp_path, other)
    files = {f"pretrained_{letter.lower()}": str(tmp_path / f"{letter}.pth") for letter in "GD"}
    with pytest.raises(networks.PretrainedError) as caught:
        networks.build(changed(recipe, "train", **files), TABLE)
    told = str(caught.value)
    for part in (
        "train.pretrained_g: ",
        "likely cause: data.sample_rate: it has 32000 Hz, this recipe 24000 Hz",
        "likely cause: model.pitch_guidance: it has no pitch, this recipe pitch",
        "enc_p.emb_pitch.weight: missing",
        "train.pretrained_d: ",
        "likely cause: model.discriminator: it has v1 (1 over scales, 6 over periods, 0 over resolutions), this recipe",
    ):
        assert part in told, part
    assert len(caught.value.each) == 2
    assert str(pickle.loads(pickle.dumps(caught.value))) == told
    with pytest.raises(StageError, match=r"(?s)G\.pth does not fit.*it is a generator, expected a discriminator"):
        networks.build(changed(recipe, "train", pretrained_d=files["pretrained_g"]), TABLE)


def test_a_base_model_is_taken_from_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = replace(narrow_recipe(tmp_path), data=DataConfig(sample_rate=48000))
    wanted, asked = write_pair(tmp_path, recipe), list[tuple[str, str]]()

    def hub_file(repository: str, path: str, *_: str) -> Path:
        asked.append((repository, path))
        return tmp_path / f"{path[-8]}.pth"

    monkeypatch.setattr(networks, "hub_file", hub_file)
    recipe = changed(recipe, "train", pretrained="rvc", seed=7)
    _, found = networks.build(recipe, TABLE)
    assert asked == [("lj1995/VoiceConversionWebUI", f"pretrained_v2/f0{n}48k.pth") for n in "GD"]
    for name, module in found.items():
        states = module.state_dict(), wanted[name].state_dict()
        assert all(torch.equal(states[0][key], states[1][key]) for key in states[1])
    torch.save({"model": {}, "x": 1}, tmp_path / "D.pth")
    with pytest.raises(
        StageError, match=r"train\.pretrained \(rvc, discriminator\): .*D\.pth is not a file of weights"
    ):
        networks.build(recipe, TABLE)


def test_a_base_model_that_is_not_to_be_had_says_what_to_do(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def missing(*_: str) -> Path:
        raise FileNotFoundError("f0G48k.pth is not in the cache.")

    monkeypatch.setattr(networks, "hub_file", missing)
    recipe = replace(narrow_recipe(tmp_path), data=DataConfig(sample_rate=48000))
    with pytest.raises(
        StageError, match=r"train\.pretrained: the generator of titan .* Run `rvc-dist fetch` where"
    ) as error:
        networks.build(changed(recipe, "train", pretrained="titan"), TABLE)
    assert "the discriminator of titan" in str(error.value)


def test_discriminators_over_spectrograms_join_pretrained_ones(tmp_path: Path, caplog) -> None:
    recipe = narrow_recipe(tmp_path)
    wanted = write_pair(tmp_path, recipe)["discriminator"].state_dict()
    recipe = changed(recipe, "train", pretrained_d=str(tmp_path / "D.pth"))
    with caplog.at_level("INFO"):
        found = networks.build(changed(recipe, "model", discriminator="v2-mrd"), TABLE)[1]["discriminator"]
    state = found.state_dict()
    assert all(torch.equal(state[key], value) for key, value in wanted.items())
    assert len(found.discriminators) == 12
    assert "D.pth has no discriminators over spectrograms: they start from random numbers" in caplog.text
    with pytest.raises(StageError, match=r"it has v2 \(1 over scales, 8 over periods, 0 over res.*this recipe v3"):
        networks.build(changed(recipe, "model", discriminator="v3"), TABLE)


def test_refinegan_is_judged_by_v3_alone(tmp_path: Path) -> None:
    recipe = changed(narrow_recipe(tmp_path), "model", vocoder="refinegan")
    recipe = changed(recipe, "train", multiscale_mel_loss=False)
    assert (recipe.model.discriminator_kind, recipe.multiscale_mel_loss) == ("v3", True)
    shape, modules = networks.build(recipe, TABLE)
    assert len(modules["discriminator"].discriminators) == 9
    identity = networks.identity(recipe, shape, TABLE)
    assert (identity["discriminator.version"], identity["discriminator.kind"]) == ("v2", "v3")
    plain = narrow_recipe(tmp_path)
    assert "discriminator.kind" not in networks.identity(plain, networks.build(plain, TABLE)[0], TABLE)
    with pytest.raises(
        ConfigError, match=r"^model\.discriminator: got v2 with vocoder refinegan, which is trained with v3"
    ):
        changed(recipe, "model", discriminator="v2")
