"""torch.compile: when it is tried, when it stays, and that it computes the same."""

import json
import logging
import time

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from helpers import make_features, thin_networks, tiny_recipe, with_train
from launching import torchrun
from safetensors.torch import load_file

from rvc_dist.config import TrainConfig
from rvc_dist.train import compilation, trainer
from rvc_dist.train.checkpoint import MODELS


@pytest.fixture(autouse=True)
def _fresh_accelerate_state():
    AcceleratorState._reset_state(reset_partial_state=True)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


class FakeStep:
    """Takes 20 ms; 10 with G compiled, 40 with D compiled, as on a CPU. Fails with a network compiled if told to."""

    def __init__(self, fails: str = ""):
        self.fails, self.calls = fails, []

    def __call__(self, which):
        self.calls.append(tuple(name for name, compiled in which.items() if compiled))
        if which.get(self.fails):
            raise RuntimeError("backend raised:\nno compiler\n\nand a long story")
        time.sleep(0.01 if which["generator"] else 0.04 if which["discriminator"] else 0.02)


def choose(step: FakeStep, steps_left: int = 10**6, **config) -> dict[str, bool]:
    return compilation.choose(TrainConfig(**config), Accelerator(cpu=True), MODELS, step, steps_left)


def test_each_network_stays_compiled_only_where_it_gains(caplog):
    with caplog.at_level(logging.INFO):
        chosen = choose(FakeStep(), fast_train=True)
    assert chosen == {"generator": True, "discriminator": False}
    assert "the generator is compiled: a step takes" in caplog.text
    assert "the discriminator is not compiled: a step takes" in caplog.text


def test_a_short_plan_is_not_worth_it_and_says_so(caplog):
    step = FakeStep()
    with caplog.at_level(logging.INFO):
        assert choose(step, steps_left=100, fast_train=True) == dict.fromkeys(MODELS, False)
    assert set(step.calls) == {()}, "nothing was compiled"
    assert "compile: not for 100 steps of 0.02 s" in caplog.text


@pytest.mark.parametrize("config", [{}, {"compile": "never", "fast_train": True}])
def test_nothing_is_tried_unasked(config):
    step = FakeStep()
    assert choose(step, **config) == dict.fromkeys(MODELS, False)
    assert step.calls == []


def test_always_asks_for_no_gain():
    step = FakeStep()
    assert choose(step, steps_left=1, compile="always") == dict.fromkeys(MODELS, True)
    assert () not in step.calls


def test_a_compiler_that_fails_leaves_the_network_eager_with_the_reason(caplog):
    with caplog.at_level(logging.INFO):
        chosen = choose(FakeStep(fails="generator"), compile="always")
    assert chosen == {"generator": False, "discriminator": True}
    assert "the generator stays eager, since compiling failed: RuntimeError: backend raised: no compiler" in caplog.text
    assert "long story" not in caplog.text


def test_a_choice_is_kept_with_the_run_until_what_it_depends_on_changes(tmp_path, monkeypatch):
    asked = []

    def choice(*_):
        asked.append(1)
        return dict.fromkeys(MODELS, False)

    monkeypatch.setattr(compilation, "choose", choice)
    recipe = tiny_recipe(tmp_path, fast_train=True)
    make_features(recipe)
    for changed in ({}, {}, {"precision": "bf16"}, {"max_steps": 9}):
        trainer.Trainer(with_train(recipe, **changed)).close()
    assert len(asked) == 3
    kept = json.loads((tmp_path / "compile.json").read_text())
    assert kept["compiled"] == dict.fromkeys(MODELS, False)
    assert kept["key"]["torch"] == torch.__version__


@pytest.mark.slow
def test_compiled_networks_train_as_eager_ones_without_a_graph_break(tmp_path, monkeypatch):
    """CPU inductor, clips of two lengths, validation, and a checkpoint. All layers in one graph: test_networks.py."""
    thin_networks(monkeypatch.setattr)
    losses, weights = [], []
    for mode in ("never", "always"):
        recipe = tiny_recipe(tmp_path / mode, compile=mode, max_steps=4, eval_every_steps=4)
        make_features(recipe, num_clips=9, seconds=0.9)
        torch._dynamo.reset()
        torch._dynamo.utils.counters.clear()
        AcceleratorState._reset_state(reset_partial_state=True)
        run = trainer.Trainer(recipe)
        assert run.compiled == dict.fromkeys(MODELS, mode == "always")
        shapes, steps = set(), run.loader.steps(run.progress)
        for _ in range(4):
            (batch,) = next(steps)
            shapes.add((len(batch.clips), batch.content.shape[1]))
            with compilation.eager_unless(len(batch.clips) == 2):
                run.train_step([batch])
            losses.append(run.meter.read(run.accelerator))
            run.progress = run.loader.advanced(run.progress)
        run.validate()
        weights.append({name: network.module.state_dict() for name, network in run.networks.items()})
        run.save()
        run.close()
    assert len({frames for _, frames in shapes}) == 2
    counters = torch._dynamo.utils.counters
    assert not counters["graph_break"]
    # G: one graph for the first length and one for any; D: for its own step, and for G's with the real and the fake.
    assert counters["stats"]["unique_graphs"] <= 5
    for eager, compiled in zip(losses[:4], losses[4:], strict=True):
        assert compiled == pytest.approx(eager, rel=1e-3)
    for name in MODELS:
        for key, value in weights[0][name].items():
            assert (weights[1][name][key] - value).norm() <= 1e-3 * value.norm(), f"{name}.{key}"


@pytest.mark.slow
@pytest.mark.distributed
def test_compiled_networks_inside_ddp_average_their_gradients(tmp_path, monkeypatch):
    monkeypatch.setenv("THIN", "1")
    recipe = tiny_recipe(tmp_path / "run")
    make_features(recipe, num_clips=15)
    recipes = tmp_path / "recipes"
    recipes.mkdir()
    for mode in ("never", "always"):
        (recipes / f"{mode}.yaml").write_text(with_train(recipe, compile=mode).to_yaml())
    torchrun(2, "step_on_ranks.py", recipes, 2, 1, tmp_path / "output")
    eager, compiled = (load_file(tmp_path / "output" / f"{mode}.safetensors") for mode in ("never", "always"))
    assert int(eager["bytes"]) == int(compiled["bytes"])
    for net in MODELS:
        gradients = [k for k in eager if k.startswith(f"grad.{net}.")]
        total = torch.stack([eager[k].norm() for k in gradients]).norm()
        for k in gradients:
            assert (compiled[k] - eager[k]).norm() <= 1e-4 * eager[k].norm() + 1e-6 * total, k
