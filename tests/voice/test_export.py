"""Voice files: every field that the tools of RVC read, in the type and spelling in which they read it."""

from __future__ import annotations

import dataclasses
import datetime
import json
import logging
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers import (
    EMBEDDER,
    NARROW,
    RATE,
    changed,
    make_checkpoint,
    make_generator,
    narrow_recipe,
    noise,
    workspace_of,
    write_features,
)

from rvc_dist.choices import VOCODERS
from rvc_dist.config import ExportConfig, InferConfig, Recipe, load_recipe
from rvc_dist.features.identity import EmbedderId
from rvc_dist.models.generator import Generator
from rvc_dist.train import checkpoint
from rvc_dist.train.progress import Progress
from rvc_dist.train.voice_file import Dataset, voice_dict
from rvc_dist.voice import export
from rvc_dist.voice.file import Voice
from rvc_dist.voice.infer import Converter
from rvc_dist.workspace import Shard, Speakers, StageError

ALONE = Shard(0, 1)
SHAPES = json.loads((Path(__file__).parents[1] / "golden" / "state_dict_shapes.json").read_text())
BEST = {"best_metric": 1.25, "best_step": 10, "best_epoch": 2}


@pytest.fixture
def recipe(tmp_path: Path) -> Recipe:
    """A run folder with features, as after training."""
    recipe = narrow_recipe(tmp_path, export=ExportConfig(author="A. Singer"))
    write_features(recipe, [[np.zeros((90, 768), np.float32)] * 2])
    return recipe


@pytest.fixture(scope="module")
def generator(tmp_path_factory: pytest.TempPathFactory) -> Generator:
    return make_generator(narrow_recipe(tmp_path_factory.mktemp("unused")))


def save(recipe: Recipe, generator: Generator, **progress: Any) -> Path:
    saved = make_checkpoint(recipe, generator, Progress(**progress))
    return checkpoint.save(workspace_of(recipe).checkpoints_dir, saved)


def load(path: Path) -> dict[str, Any]:
    voice: dict[str, Any] = torch.load(path, weights_only=True)
    return voice


def names(recipe: Recipe) -> list[str]:
    return sorted(p.name for p in workspace_of(recipe).voice_dir.iterdir())


def test_every_field_that_readers_know(recipe: Recipe, generator: Generator) -> None:
    save(recipe, generator, step=10, epoch=2, **BEST)
    export.run(recipe, ALONE)
    voice = load(workspace_of(recipe).voice_dir / "tiny_2e_10s.pth")
    weight, config = voice.pop("weight"), voice.pop("config")
    assert config == [
        *(513, 32, 16, 16, 32, 2, 1, 3, 0.0, "1"),
        *([3, 7, 11], [[1, 3, 5], [1, 3, 5], [1, 3, 5]], [10, 6, 2, 2], 32, [20, 12, 4, 4], 1, 8, 24000),
    ]
    assert len(config) == 18
    assert all(value.dtype == torch.float16 for value in weight.values())
    assert all(value.device.type == "cpu" for value in weight.values())
    assert not [key for key in weight if key.startswith("enc_q.") or "parametrizations" in key]
    assert weight["dec.ups.0.weight_g"].shape == (32, 1, 1)
    assert weight["dec.ups.0.weight_v"].shape == (32, 16, 20)

    created = datetime.datetime.fromisoformat(voice.pop("creation_date"))
    assert datetime.timedelta(0) <= datetime.datetime.now() - created < datetime.timedelta(minutes=1)
    assert re.fullmatch("[0-9a-f]{64}", voice.pop("model_hash"))
    assert isinstance(voice.pop("info"), str)
    assert "1.25" in voice["overtrain_info"]
    assert "step 10" in voice.pop("overtrain_info")
    assert voice.pop("recipe") == recipe.to_yaml()
    expected: dict[str, Any] = {
        "epoch": "2epoch",
        "step": 10,
        "sr": 24000,
        "f0": 1,
        "version": "v2",
        "model_name": "tiny",
        "author": "A. Singer",
        "vocoder": "HiFi-GAN",
        "energy": False,
        "speakers_id": 1,
        "trained_speakers": [0],
        "architecture": "RVC",
        "embedder_model": "mfcc",
        "embedder_hash": EMBEDDER["hash"],
        "dataset_length": "00:00:04",
        "unvoiced": "zero",
        "f0_median": 150.0,
    }
    assert voice == expected
    assert {k: type(v) for k, v in voice.items()} == {k: type(v) for k, v in expected.items()}


def test_the_voice_says_what_pitch_unvoiced_frames_were_trained_with(recipe: Recipe, generator: Generator) -> None:
    saved = make_checkpoint(recipe, generator)
    drawn = dataclasses.replace(saved, identity=saved.identity | {"extract.unvoiced": "interpolated"})
    checkpoint.save(workspace_of(recipe).checkpoints_dir, drawn)
    export.run(recipe, ALONE)  # the recipe's key does not count: it may have changed since
    assert Voice.load(workspace_of(recipe).last_voice_file, torch.device("cpu")).unvoiced == "interpolated"


def test_the_datasets_length_is_that_of_the_checkpoint(recipe: Recipe, generator: Generator) -> None:
    """The recordings in the run folder may be others, or more, by now."""
    saved = make_checkpoint(recipe, generator, Progress(step=10, epoch=2))
    for step, data, length in ((10, {"dataset_length": "01:02:03"}, "01:02:03"), (20, {}, "00:00:04")):
        of_step = dataclasses.replace(saved, progress=Progress(step=step, epoch=2), data=data)
        checkpoint.save(workspace_of(recipe).checkpoints_dir, of_step)
        export.run(recipe, ALONE)
        assert load(workspace_of(recipe).voice_dir / f"tiny_2e_{step}s.pth")["dataset_length"] == length


def test_the_weights_are_those_of_the_checkpoint(recipe: Recipe, generator: Generator) -> None:
    save(recipe, generator, step=10, epoch=2)
    export.run(recipe, ALONE)
    state = generator.state_dict()
    weight = load(workspace_of(recipe).last_voice_file)["weight"]
    kept = {k for k in state if not k.startswith("enc_q.")}
    assert len(weight) == len(kept)
    assert torch.equal(weight["emb_g.weight"], state["emb_g.weight"].half())
    assert torch.equal(weight["dec.ups.0.weight_g"], state["dec.ups.0.parametrizations.weight.original0"].half())
    assert torch.equal(weight["dec.ups.0.weight_v"], state["dec.ups.0.parametrizations.weight.original1"].half())


def test_each_speaker_may_have_a_voice_of_their_own(recipe: Recipe) -> None:
    write_features(recipe, [[np.ones((100, 768), np.float32)] * 2], speakers=(1, 3))
    saved = make_checkpoint(recipe, make_generator(recipe, num_speakers=5))
    known = Speakers({1: "1", 3: "alice"}, trained=(1, 3))
    checkpoint.save(workspace_of(recipe).checkpoints_dir, dataclasses.replace(saved, speakers=known))
    export.run(changed(recipe, "export", each_speaker=True), ALONE)
    prefixes, folder = ("tiny", "tiny_spkid1", "tiny_spkid3"), workspace_of(recipe).voice_dir
    assert names(recipe) == sorted(f"{prefix}_{word}.pth" for prefix in prefixes for word in ("2e_10s", "last"))
    whole, alice = (load(folder / f"{prefix}_last.pth") for prefix in ("tiny", "tiny_spkid3"))
    assert [(info["id"], info["name"]) for info in whole["speaker_info"]] == [(1, "1"), (3, "alice")]
    assert alice["speaker_info"] == whole["speaker_info"][1:]
    assert torch.equal(alice["weight"]["emb_g.weight"], whole["weight"]["emb_g.weight"][[3] * 5])
    assert alice["config"] == whole["config"]
    voice = Voice.load(folder / "tiny_spkid3_last.pth", torch.device("cpu"))
    assert (voice.speaker(None), voice.speaker("alice"), voice.speaker(3)) == (3, 3, 3)
    with pytest.raises(StageError, match=r"got 1, this voice was trained on speaker 3 \(alice\)$"):
        voice.speaker(1)


def test_last_is_the_newest_and_best_the_best(
    recipe: Recipe, generator: Generator, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    save(recipe, generator, step=10, epoch=2, **BEST)
    save(recipe, generator, step=9, epoch=1)
    export.run(recipe, ALONE)
    save(recipe, generator, step=100, epoch=3, **BEST)
    export.run(recipe, ALONE)
    assert names(recipe) == [
        *("tiny_1e_9s.pth", "tiny_2e_10s.pth", "tiny_3e_100s.pth", "tiny_best.pth", "tiny_last.pth"),
    ]
    folder = workspace_of(recipe).voice_dir
    assert (folder / "tiny_last.pth").read_bytes() == (folder / "tiny_3e_100s.pth").read_bytes()
    assert (folder / "tiny_best.pth").read_bytes() == (folder / "tiny_2e_10s.pth").read_bytes()
    assert load(folder / "tiny_last.pth")["step"] == 100
    assert (
        "tiny_best.pth is of step 10, epoch 2: its mel distance on the held-out clips, 1.2500, is the low"
        in caplog.text
    )


def test_without_validation_there_is_no_best(
    recipe: Recipe, generator: Generator, caplog: pytest.LogCaptureFixture
) -> None:
    save(recipe, generator, step=10, epoch=2)
    export.run(recipe, ALONE)
    assert "no tiny_best.pth is written: no checkpoint was validated" in caplog.text
    assert names(recipe) == ["tiny_2e_10s.pth", "tiny_last.pth"]
    assert load(workspace_of(recipe).last_voice_file)["overtrain_info"] == "not measured"


def test_a_best_checkpoint_that_is_gone_is_warned_of(
    recipe: Recipe, generator: Generator, caplog: pytest.LogCaptureFixture
) -> None:
    save(recipe, generator, step=20, epoch=4, **BEST)
    with caplog.at_level(logging.WARNING):
        export.run(recipe, ALONE)
    assert names(recipe) == ["tiny_4e_20s.pth", "tiny_last.pth"]
    assert "no tiny_best.pth is written: the checkpoint of step 10, the best, is gone" in caplog.text


def test_the_hash_is_of_the_weights_alone(recipe: Recipe, generator: Generator) -> None:
    def hash_of(recipe: Recipe, generator: Generator) -> str:
        voice = voice_dict(recipe, make_checkpoint(recipe, generator), Dataset("00:00:01", 1))
        digest: str = voice["model_hash"]
        return digest

    first = hash_of(recipe, generator)
    assert hash_of(changed(recipe, "export", author="B"), generator) == first
    other = make_generator(recipe)
    with torch.no_grad():
        other.emb_g.weight[0, 0] += 1.0
    assert hash_of(recipe, other) != first


def test_the_recipe_comes_back_from_the_voice(recipe: Recipe, generator: Generator, tmp_path: Path) -> None:
    save(recipe, generator, step=10, epoch=2)
    export.run(recipe, ALONE)
    (tmp_path / "again.yaml").write_text(load(workspace_of(recipe).last_voice_file)["recipe"], encoding="utf-8")
    assert load_recipe(tmp_path / "again.yaml") == recipe


@pytest.mark.parametrize(
    ("vocoder", "guided"), [("hifi-gan", False), *((name, True) for name, spec in VOCODERS.items() if spec.guided)]
)
def test_an_exported_voice_converts(vocoder: str, guided: bool, tmp_path: Path) -> None:
    config = InferConfig(index_rate=0.0, embedder_model="mfcc")
    model = dataclasses.replace(NARROW, vocoder=vocoder, pitch_guidance=guided)
    recipe = narrow_recipe(tmp_path, model=model, infer=config)
    write_features(recipe, [[np.zeros((90, 768), np.float32)]])
    generator = make_generator(recipe)
    save(recipe, generator, step=10, epoch=2)
    export.run(recipe, ALONE)
    assert load(workspace_of(recipe).last_voice_file)["vocoder"] == VOCODERS[vocoder].voice_name
    voice = Voice.load(workspace_of(recipe).last_voice_file, torch.device("cpu"))
    assert voice.generator.shape == generator.shape
    assert (voice.embedder, voice.version, voice.rate) == (EmbedderId("mfcc", EMBEDDER["hash"]), "v2", RATE)
    for key, value in voice.generator.state_dict().items():
        if not key.startswith("enc_q."):
            assert torch.equal(value, generator.state_dict()[key].half().float()), key
    wave = Converter.load(recipe)(noise(0.5, 16000))
    assert wave.shape == (RATE // 2,)
    assert np.isfinite(wave).all()
    assert wave.std() > 1e-4


def test_the_voice_carries_the_mix_of_its_features(recipe: Recipe, generator: Generator) -> None:
    saved = make_checkpoint(recipe, generator)
    saved.identity["embedder"] = {"name": "spin", "hash": "00ff", "mix": {"layers": [9, 10], "ratio": 0.25}}
    voice = voice_dict(recipe, saved, Dataset("00:00:01", 1))
    assert (voice["embedder_model"], voice["embedder_hash"]) == ("spin", "00ff")
    assert voice["embedder_mix"] == {"layers": [9, 10], "ratio": 0.25}


def test_a_voice_trained_from_pretrained_weights_keeps_their_speaker_table(recipe: Recipe) -> None:
    save(recipe, make_generator(recipe, num_speakers=109), step=10, epoch=2)
    export.run(recipe, ALONE)
    voice = load(workspace_of(recipe).last_voice_file)
    assert (voice["config"][15], voice["speakers_id"]) == (109, 1)
    assert voice["weight"]["emb_g.weight"].shape == (109, 8)


@pytest.mark.parametrize(
    ("rate", "guided", "golden"),
    [(48000, True, "G_v2_48000"), (48000, False, "G_v2_48000_nopitch")],
)
def test_a_full_width_voice_has_the_keys_and_shapes_of_rvc(
    rate: int, guided: bool, golden: str, tmp_path: Path
) -> None:
    recipe = Recipe(run_dir=str(tmp_path))
    recipe = changed(changed(recipe, "data", sample_rate=rate), "model", pitch_guidance=guided)
    voice = voice_dict(
        recipe, make_checkpoint(recipe, make_generator(recipe, num_speakers=109)), Dataset("00:00:01", 1)
    )
    expected = {k: v for k, v in SHAPES[golden].items() if not k.startswith("enc_q.")}
    assert len(expected) > 300
    assert {k: list(v.shape) for k, v in voice["weight"].items()} == expected
    assert voice["f0"] == int(guided)


# What is wrong


def test_what_is_missing_is_told(recipe: Recipe, generator: Generator) -> None:
    work = workspace_of(recipe)
    with pytest.raises(StageError, match=r"checkpoints has no checkpoint: run `rvc-dist train` first"):
        export.run(recipe, ALONE)
    save(recipe, generator, step=10, epoch=2)
    work.clips_report_file.unlink()
    with pytest.raises(StageError, match=r"report\.json is missing: run `rvc-dist preprocess` first"):
        export.run(recipe, ALONE)
    assert not work.voice_dir.exists()


def test_a_damaged_checkpoint_is_not_exported(recipe: Recipe, generator: Generator) -> None:
    path = save(recipe, generator, step=10, epoch=2)
    with (path / "generator.safetensors").open("r+b") as stream:
        stream.seek(-1, 2)
        stream.write(b"\xff")
    with pytest.raises(StageError, match=r"step_00000010 is damaged .*\n.*generator\.safetensors was changed"):
        export.run(recipe, ALONE)
    assert not workspace_of(recipe).voice_dir.exists()


def test_what_is_damaged_is_passed_over_where_a_whole_one_is_there(
    recipe: Recipe, generator: Generator, caplog: pytest.LogCaptureFixture
) -> None:
    work = workspace_of(recipe)
    save(recipe, generator, step=10, epoch=2, **BEST)
    export.run(recipe, ALONE)
    half, damaged = (save(recipe, generator, step=step, epoch=step, **BEST) for step in (9, 11))
    save(recipe, generator, step=20, epoch=4, **BEST)
    (half / "manifest.json").unlink()
    (damaged / "state.json").write_text("{}")
    (work.checkpoints_dir / "step_00000010").rename(work.checkpoints_dir / "step_best")
    export.run(recipe, ALONE)
    assert names(recipe) == ["tiny_2e_10s.pth", "tiny_4e_20s.pth", "tiny_best.pth", "tiny_last.pth"]
    assert load(work.last_voice_file)["step"] == 20
    for told in ("step_00000009 is damaged and was passed over (manifest.json is missing)", "step_00000011 is damaged"):
        assert told in caplog.text
    assert load(work.voice_dir / "tiny_best.pth")["step"] == 10, "its checkpoint is gone, its voice is not"


@pytest.mark.parametrize("value", [float("nan"), 70000.0])  # float16 ends at 65504
def test_weights_that_are_no_float16_are_not_exported(value: float, recipe: Recipe) -> None:
    broken = make_generator(recipe)
    broken.state_dict()["dec.ups.0.parametrizations.weight.original0"][0] = value
    save(recipe, broken, step=10, epoch=2)
    with pytest.raises(StageError, match=r"step 10 has weights that are not finite .*\(dec\.ups\.0\.weight_g\)"):
        export.run(recipe, ALONE)
    assert not workspace_of(recipe).voice_dir.exists()


def test_only_the_first_rank_exports(recipe: Recipe, generator: Generator) -> None:
    save(recipe, generator, step=10, epoch=2)
    export.run(recipe, Shard(1, 2))
    assert not workspace_of(recipe).voice_dir.exists()
