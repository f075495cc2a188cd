"""Options of training that are off by default: what each changes, and exact resume. On ranks: test_exactness.py."""

from dataclasses import replace
from typing import cast

import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState
from helpers import changed, make_features, tiny_recipe, with_train
from test_exactness import MODELS

from rvc_dist.config import ConfigError, LossConfig, Recipe, TrainConfig
from rvc_dist.features.extractor import Extractor
from rvc_dist.models.state_dict import to_upstream
from rvc_dist.train import checkpoint, losses, networks, trainer
from rvc_dist.train.dataset import ClipTable
from rvc_dist.train.optimizers import make_optimizer
from rvc_dist.voice import export, infer
from rvc_dist.voice.file import Voice
from rvc_dist.workspace import Shard, StageError, Workspace

pytestmark = pytest.mark.usefixtures("thin")
EVERY_OPTION = {
    "d_updates": 2,
    "learning_rate_d": 3e-4,
    "optimizer": "adabelief_v2",
    "loss": LossConfig(stft=2.5, energy=0.1),
    "mel_frames": "edge",
    "grad_accum_steps": 2,
}


def trained(recipe: Recipe, *steps: int) -> checkpoint.Checkpoint:
    """The newest checkpoint after runs to each of `steps`."""
    for last in steps:
        trainer.run(with_train(recipe, max_steps=last), Shard())
        AcceleratorState._reset_state(reset_partial_state=True)
    return checkpoint.load(checkpoint.latest(Workspace(recipe.run_dir, recipe.name).checkpoints_dir))


def differ(a: checkpoint.Checkpoint, b: checkpoint.Checkpoint) -> set[str]:
    """The networks whose weights do."""
    return {
        name
        for name, weights in a.models.items()
        if any(not torch.equal(value, b.models[name][key]) for key, value in weights.items())
    }


@pytest.mark.slow
@pytest.mark.parametrize("model", MODELS)
def test_a_run_that_stops_and_goes_on_ends_in_the_same_bits(tmp_path, model):
    results = []
    for folder, steps in (("straight", (4,)), ("halved", (2, 4))):
        recipe = tiny_recipe(tmp_path / folder, eval_every_steps=100, batch_size=1, **EVERY_OPTION)
        recipe = changed(recipe, "model", **MODELS[model])
        make_features(recipe)
        results.append(trained(recipe, *steps))
    assert not differ(*results)
    for name, state in results[0].optimizers.items():
        other = results[1].optimizers[name]
        assert state.groups == other.groups
        assert all(torch.equal(value, other.tensors[key]) for key, value in state.tensors.items())


def test_d_learns_at_its_own_rate_by_the_same_schedule(tmp_path):
    results = {}
    for name, options in {"alike": {}, "apart": {"learning_rate_d": 3e-4}}.items():
        recipe = tiny_recipe(tmp_path / name, warmup_steps=2, lr_schedule="constant", **options)
        make_features(recipe)
        results[name] = trained(recipe, 1)
    # D's first update precedes G's, which sees another D.
    assert differ(*results.values()) == {"generator", "discriminator"}
    rates = {name: [s.groups[0]["lr"] for s in found.optimizers.values()] for name, found in results.items()}
    assert rates == {"alike": [5e-5, 5e-5], "apart": [5e-5, 1.5e-4]}
    with pytest.raises(ConfigError, match=r"train\.learning_rate_d: got 0\.0001 with prodigy"):
        with_train(tiny_recipe(tmp_path), optimizer="prodigy", learning_rate=1.0, learning_rate_d=1e-4)


def test_d_is_updated_twice_from_the_same_slices_before_g_sees_it(tmp_path):
    """By hand: D's step, again from what G made before, and then G's gradients through that D."""
    recipe = tiny_recipe(tmp_path, d_updates=2, eval_every_steps=100)
    make_features(recipe)
    ours, by_hand = (trainer.Trainer(recipe) for _ in range(2))
    batches = next(ours.loader.steps(ours.progress))
    ours.train_step(batches)
    step = by_hand.step
    step.set_learning_rates(generator=1e-4, discriminator=1e-4)
    out, real = step.generate(batches[0])
    for _ in range(2):
        step.d.optimizer.zero_grad()
        step.discriminator_backward(real, out.wave.detach(), batches[0])
        step.d.update(None)
    with step.d.frozen(torch.float32):
        step.generator_backward(out, real, batches[0])
    for mine, its in zip(ours.networks.values(), by_hand.networks.values(), strict=True):
        for (name, p), q in zip(mine.module.named_parameters(), its.module.parameters(), strict=True):
            assert p.grad is None or torch.equal(p.grad, q.grad), name
    counts = [{int(s["step"]) for s in n.optimizer.state.values()} for n in ours.networks.values()]
    assert counts == [{1}, {2}]
    ours.close()
    by_hand.close()


def test_adabelief_v2_divides_by_the_largest_variance_so_far():
    """AdaBelief (arXiv 2010.07468) with AMSGrad (arXiv 1904.09237) and decoupled decay, by hand."""
    config = TrainConfig(optimizer="adabelief_v2", learning_rate=1e-2)
    parameter = torch.nn.Parameter(torch.tensor([1.0, -2.0]))
    optimizer = make_optimizer(config, torch.nn.ParameterList([parameter]))
    weight, momentum, variance, largest = parameter.detach().double(), 0.0, 0.0, torch.zeros(2).double()
    (beta1, beta2), eps = (0.8, 0.99), 1e-16
    for number, gradient in enumerate(([1.0, -3.0], [-2.0, 0.5], [0.0, 0.0], [0.0, 0.0]), 1):
        parameter.grad = torch.tensor(gradient)
        optimizer.step()
        g = torch.tensor(gradient).double()
        momentum = beta1 * momentum + (1 - beta1) * g
        variance = beta2 * variance + (1 - beta2) * (g - momentum) ** 2 + eps
        largest = torch.maximum(largest, variance)
        weight = weight * (1 - 1e-2 * 0.01)
        scale = (largest.sqrt() / (1 - beta2**number) ** 0.5 + eps) * (1 - beta1**number)
        weight = weight - 1e-2 * momentum / scale
        torch.testing.assert_close(parameter.detach().double(), weight, rtol=1e-5, atol=1e-7)


def test_losses_that_are_off_are_not_computed(tmp_path, monkeypatch):
    monkeypatch.setattr("rvc_dist.train.losses.stft_loss", lambda *_: pytest.fail("nobody asked for it"))
    recipe = tiny_recipe(tmp_path, max_steps=1, loss=replace(LossConfig(), kl=0.0))
    make_features(recipe)
    trained(recipe, 1)


def test_energy_goes_into_the_prior_and_the_voice_file(tmp_path):
    recipe = changed(tiny_recipe(tmp_path / "run", eval_every_steps=1), "model", energy=True)
    make_features(recipe)
    saved = trained(recipe, 1)
    assert saved.identity["generator.energy"] is True
    assert saved.models["generator"]["enc_p.emb_energy.weight"].shape == (recipe.model.hidden_channels, 1)
    export.run(recipe, Shard())
    path = Workspace(recipe.run_dir, recipe.name).last_voice_file
    assert torch.load(path, weights_only=True)["energy"] is True
    voice = Voice.load(path, torch.device("cpu"))
    generator = voice.generator
    content = torch.randn(1, 40, generator.shape.content_channels)
    inputs = content, torch.tensor([40]), torch.full((1, 40), 99), torch.full((1, 40), 200.0), torch.tensor([0])
    waves = []
    for level in (0.01, 0.01, 0.3):
        torch.manual_seed(0)
        waves.append(generator.infer(*inputs, torch.full((1, 40), level)))
    assert torch.equal(waves[0], waves[1])
    assert not torch.allclose(waves[0], waves[2])
    # A conversion hears the energy of its source, of the very same content and pitch.
    content = np.zeros((50, generator.shape.content_channels), np.float32)
    extractor = cast(Extractor, lambda _: [(0, content, np.full(100, 200.0, np.float32))])
    convert = infer.Converter(voice, extractor, None, recipe, torch.device("cpu"), 0)
    tone = np.sin(np.arange(16000) / 10).astype(np.float32)
    converted = []
    for level in (0.1, 0.1, 0.5):
        torch.manual_seed(0)
        converted.append(convert(level * tone))
    assert np.array_equal(converted[0], converted[1])
    assert not np.allclose(converted[0], converted[2])
    with pytest.raises(StageError, match=r"model\.energy: True -> False"):
        trained(changed(recipe, "model", energy=False), 2)


def test_weights_without_energy_begin_as_what_they_were(tmp_path):
    """Its layer is zero at first; and without the option a network has no such layer, nor its checkpoint the key."""
    without = tiny_recipe(tmp_path / "without")
    make_features(without)
    saved = trained(without, 1)
    assert "generator.energy" not in saved.identity
    assert not [key for key in saved.models["generator"] if "energy" in key]
    torch.save({"model": to_upstream(saved.models["generator"])}, tmp_path / "G.pth")
    recipe = changed(tiny_recipe(tmp_path / "run", pretrained_g=str(tmp_path / "G.pth")), "model", energy=True)
    make_features(recipe)
    _, modules = networks.build(recipe, ClipTable.load(recipe))
    state = modules["generator"].state_dict()
    new = {key: value for key, value in state.items() if key not in saved.models["generator"]}
    assert set(new) == {"enc_p.emb_energy.weight", "enc_p.emb_energy.bias"}
    assert not any(value.any() for value in new.values())
    assert all(torch.equal(value, state[key]) for key, value in saved.models["generator"].items())


def test_energy_loss_is_of_the_loudness_of_frames():
    """By hand: constants of 0.5 and 0.2, whatever their sign."""
    real, fake = torch.full((1, 1, 8640), 0.5), torch.full((1, 1, 8640), -0.2, requires_grad=True)
    loss = losses.energy_loss(real, fake, 24000)
    assert loss.item() == pytest.approx(0.3, rel=1e-4)
    loss.backward()
    assert fake.grad.isfinite().all()
    silent = torch.zeros_like(real).requires_grad_()
    losses.energy_loss(torch.zeros_like(real), silent, 24000).backward()
    assert silent.grad.isfinite().all()
