"""The contracts of the tables: an entry made outside is all it takes to train, export and extract with it."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy
import soundfile
import torch
from accelerate.state import AcceleratorState
from helpers import RATE, changed, make_features, narrow_recipe, parse_recipe, tiny_recipe, tone, with_train
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from rvc_dist import schema
from rvc_dist.choices import (
    EMBEDDERS,
    F0_METHODS,
    OPTIMIZERS,
    VOCODERS,
    EmbedderSpec,
    F0Spec,
    OptimizerSpec,
    Package,
    VocoderSpec,
)
from rvc_dist.config import ConfigError, LossConfig
from rvc_dist.data import preprocess
from rvc_dist.features import extract
from rvc_dist.features.content import Embedder
from rvc_dist.features.f0 import F0Method, load_f0
from rvc_dist.features.identity import EmbedderId
from rvc_dist.models.vocoders import Vocoder
from rvc_dist.train import checkpoint, losses, trainer
from rvc_dist.voice import export
from rvc_dist.voice.file import Voice
from rvc_dist.workspace import Shard, Workspace, read_json

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def _fresh_accelerate_state():
    AcceleratorState._reset_state(reset_partial_state=True)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


def test_an_optimizer_from_outside_trains_and_goes_on(tmp_path, monkeypatch):
    class SignDescent(torch.optim.Optimizer):
        def __init__(self, params, lr, weight_decay):
            super().__init__(params, {"lr": lr, "weight_decay": weight_decay})

        @torch.no_grad()
        def step(self):
            for group in self.param_groups:
                for p in group["params"]:
                    state = self.state[p]
                    state["count"] = state.get("count", torch.zeros(())) + 1
                    p.mul_(1 - group["lr"] * group["weight_decay"]).sub_(group["lr"] * p.grad.sign())

    with pytest.raises(ConfigError, match=r"train\.optimizer: got 'sign', expected one of adamw, "):
        parse_recipe("train", ["--train.optimizer", "sign"])
    spec = OptimizerSpec(SignDescent, elementwise=True, more=lambda config: {"betas": None, "eps": None})
    monkeypatch.setitem(OPTIMIZERS, "sign", spec)
    assert parse_recipe("train", ["--train.optimizer", "sign"]).train.optimizer == "sign"
    recipe = tiny_recipe(tmp_path, optimizer="sign", max_steps=2)
    make_features(recipe)
    trainer.run(recipe, Shard())
    AcceleratorState._reset_state(reset_partial_state=True)
    trainer.run(with_train(recipe, max_steps=3), Shard())
    saved = checkpoint.latest(Workspace(recipe.run_dir, recipe.name).checkpoints_dir)
    for state in checkpoint.load(saved).optimizers.values():
        counts = [value for key, value in state.tensors.items() if key.endswith("/count")]
        assert counts
        assert all(count == 3 for count in counts)


def test_a_loss_from_outside_is_trained_and_logged(tmp_path, monkeypatch):
    @dataclass(frozen=True)
    class WithLoudness(LossConfig):
        loudness: float = 2.0

    def loudness(x):
        return (x.real.abs().mean() - x.out.wave.abs().mean()).abs() * x.batch.loss_scale

    monkeypatch.setitem(losses.GENERATOR_LOSSES, "loudness", loudness)
    monkeypatch.setattr("rvc_dist.config.LossConfig", WithLoudness)  # as if the field stood there
    monkeypatch.setattr("rvc_dist.schema._keys", schema._keys.__wrapped__)  # which remembers the other
    recipe = tiny_recipe(tmp_path, loss=WithLoudness(), max_steps=2, log_every_steps=1, trackers=("tensorboard",))
    make_features(recipe)
    trainer.run(recipe, Shard())
    events = EventAccumulator(str(Workspace(recipe.run_dir, recipe.name).events_dir), {"scalars": 0})
    events.Reload()
    curve = {
        name: [e.value for e in events.Scalars(f"loss/g_{name}")]
        for name in (*losses.wanted(recipe.train.loss), "total")
    }
    assert len(curve["loudness"]) == 2
    assert all(value > 0 for value in curve["loudness"])
    weights = {"mel": 45.0, "kl": 1.0, "fm": 1.0, "adv": 1.0, "loudness": 2.0}
    totals = [sum(weights[name] * curve[name][i] for name in weights) for i in range(2)]
    assert curve["total"] == pytest.approx(totals, rel=1e-5)


class Bright(Vocoder):
    """A vocoder that has nothing of the others: a layer, and each frame's channels are its samples."""

    def __init__(self, shape):
        super().__init__(shape)
        self.layer = torch.nn.Conv1d(shape.inter_channels, shape.hop, 3, padding=1)

    @classmethod
    def noise_shapes(cls, shape, num_frames):
        return [(num_frames, shape.hop)]

    def forward(self, z, f0, speaker, noise):
        (noise,) = noise
        excited = self.layer(z).transpose(1, 2) + 0.1 * noise * (f0 > 0).unsqueeze(2)
        return torch.tanh(excited.flatten(1).unsqueeze(1).float())


def test_a_vocoder_from_outside_trains_and_is_exported_and_read(tmp_path, monkeypatch):
    with pytest.raises(ConfigError, match=r"model\.vocoder: got 'bright', expected one of hifi-gan"):
        parse_recipe("train", ["--model.vocoder", "bright"])
    monkeypatch.setitem(VOCODERS, "bright", VocoderSpec(Bright, None, "Bright-GAN", aliases=("BrightV1",)))
    recipe = changed(tiny_recipe(tmp_path, max_steps=1), "model", vocoder="bright")
    make_features(recipe)
    trainer.run(recipe, Shard())
    export.run(recipe, Shard())
    path = Workspace(recipe.run_dir, recipe.name).voice_dir / "tiny_last.pth"
    contents = torch.load(path, weights_only=True)
    assert contents["vocoder"] == "Bright-GAN"
    torch.save(contents | {"vocoder": "BrightV1"}, tmp_path / "other.pth")
    for voice in (path, tmp_path / "other.pth"):
        assert isinstance(Voice.load(voice, CPU).generator.dec, Bright)
    with pytest.raises(ConfigError, match=r"model\.pitch_guidance: got False with vocoder bright, .* expected True"):
        changed(recipe, "model", pitch_guidance=False)


def extracted(recipe):
    """The features of 4 s of a tone."""
    Path(recipe.data.audio_dir).mkdir()
    soundfile.write(Path(recipe.data.audio_dir) / "a.wav", tone(4.0), RATE)
    preprocess.run(recipe, Shard())
    extract.run(recipe, Shard())
    return safetensors.numpy.load_file(Workspace(recipe.run_dir, recipe.name).features_file(0))


class Loudness(Embedder):
    """An encoder that hears how loud each frame is."""

    name, width, weights_hash = "loudness", 3, "0123456789abcdef"

    def __init__(self, version, mix, device):
        super().__init__(device)

    def encode(self, wave):
        return wave.unfold(1, 320, 320).abs().mean(2, keepdim=True).expand(-1, -1, self.width)


def test_an_encoder_from_outside_extracts(tmp_path, monkeypatch):
    assert EmbedderId("loudness").agrees_with(EmbedderId("mfcc")) is None
    monkeypatch.setitem(EMBEDDERS, "loudness", EmbedderSpec(make="test_choices:Loudness"))
    assert EmbedderId("loudness").agrees_with(EmbedderId("mfcc")) is False  # published now
    recipe = changed(narrow_recipe(tmp_path), "extract", embedder_model="loudness")
    content = extracted(recipe)["00000.content"]
    assert content.shape[1] == 3
    assert content.max() > 0.01
    report = read_json(Workspace(recipe.run_dir, recipe.name).features_report_file)
    assert report["settings"]["embedder"] == {"name": "loudness", "hash": "0123456789abcdef", "width": 3}


class Zero(F0Method):
    """A tracker that hears 123 Hz in everything."""

    def track(self, wave):
        return torch.full((wave.shape[0] // 160,), 123.0)


class Lacking(Zero):
    def __init__(self, *_):
        import a_package_that_is_not_there  # noqa: F401


def test_a_pitch_tracker_from_outside_extracts(tmp_path: Path, monkeypatch):
    with pytest.raises(ConfigError, match=r"extract\.f0_method: got 'flat', expected one of rmvpe, "):
        parse_recipe("extract", ["--extract.f0_method", "flat"])
    monkeypatch.setitem(F0_METHODS, "flat", F0Spec(Zero))
    recipe = changed(narrow_recipe(tmp_path), "extract", f0_method="flat")
    features = extracted(recipe)
    assert set(np.unique(features["00000.f0"])) <= {np.float32(0.0), np.float32(123.0)}
    assert features["00000.f0"].max() == 123.0

    package = Package("a-package", "a_package_that_is_not_there", "f0")
    monkeypatch.setitem(F0_METHODS, "lacking", F0Spec("test_choices:Lacking", package))
    with pytest.raises(ImportError, match=r"f0_method lacking needs the package a-package .*pip install a-package"):
        load_f0(changed(recipe, "extract", f0_method="hybrid[flat+lacking]").extract, CPU)
