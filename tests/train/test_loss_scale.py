"""float16: the loss scale, what an overflow skips, and what a checkpoint keeps of it."""

import copy
import json
from types import SimpleNamespace

import pytest
import torch
from helpers import make_features, tiny_recipe
from launching import torchrun
from test_resume import prepared
from torch import nn

from rvc_dist.config import TrainConfig
from rvc_dist.runtime.launcher import check_deepspeed
from rvc_dist.train import bad_steps, checkpoint, loss_scale, run_state, setup, trainer
from rvc_dist.train.bad_steps import RecentStep
from rvc_dist.train.ddp import TrainedModule
from rvc_dist.train.loss_scale import LossScale
from rvc_dist.workspace import Shard, StageError

pytestmark = pytest.mark.usefixtures("thin")
CPU = torch.device("cpu")


def test_the_scale_is_that_of_torchs_scaler(monkeypatch):
    monkeypatch.setattr(loss_scale, "GROWTH_STEPS", 3)
    parameter = nn.Parameter(torch.ones(1))
    scaler = torch.amp.GradScaler("cpu", init_scale=loss_scale.FIRST_SCALE, growth_interval=3)
    optimizer, ours = torch.optim.SGD([parameter]), LossScale(CPU)
    for good in (True, True, True, True, False, False, True, True, True):
        assert ours.scaled(torch.tensor(3.0)) == scaler.scale(torch.tensor(3.0))
        parameter.grad = torch.tensor([1.0 if good else float("inf")])
        scaler.step(optimizer)
        scaler.update()
        assert ours.update(torch.tensor(good))
        state = scaler.state_dict()
        assert ours.state() == {"scale": state["scale"], "steps": state["_growth_tracker"]}
    for _ in range(40):
        could_be_lower = ours.update(torch.tensor(False))
    assert (bool(could_be_lower), ours.state()["scale"]) == (False, 1.0)


def network(scale: LossScale | None, optimizer: str) -> TrainedModule:
    torch.manual_seed(0)
    module = nn.Linear(8, 8)
    return TrainedModule.alone(module, setup.make_optimizer(TrainConfig(optimizer=optimizer), module), scale)


@pytest.mark.parametrize("optimizer", ["adamw", "anyprecision_adamw", "radam"])
@pytest.mark.parametrize("max_norm", [None, 0.1])
def test_a_scaled_step_is_the_step_without_a_scale(optimizer, max_norm):
    """To the bit, since scales are powers of two; of two micro-batches."""
    ends = []
    for scale in (None, LossScale(CPU)):
        net = network(scale, optimizer)
        for seed in (1, 2):
            net.backward(net.wrapped(torch.randn(4, 8, generator=torch.Generator().manual_seed(seed))).square().mean())
        done = net.update(max_norm)
        ends.append([done.norm, *net.module.parameters(), *(p.grad for p in net.module.parameters())])
        assert (bool(done.good), bool(done.bad)) == (True, False)
    assert all(torch.equal(a, b) for a, b in zip(*ends, strict=True))


@pytest.mark.parametrize("optimizer", ["adamw", "anyprecision_adamw", "radam"])
def test_an_overflow_changes_nothing_and_is_bad_only_at_the_least_scale(optimizer):
    net = network(LossScale(CPU), optimizer)
    x = torch.randn(4, 8)
    net.backward(net.wrapped(x).square().mean())
    net.update(1.0)
    for scale, is_bad in ((65536.0, False), (2.0, False), (1.0, True)):
        net.scale.load({"scale": scale, "steps": 5})
        before = copy.deepcopy([net.module.state_dict(), net.optimizer.state_dict()["state"]])
        net.optimizer.zero_grad()
        with torch.autocast("cpu", torch.float16):
            loss = (net.wrapped(x).float() * 1e30).mean()
        net.backward(loss)
        done = net.update(1.0)
        assert loss.isfinite()
        assert (bool(done.good), bool(done.bad)) == (False, is_bad)
        assert net.scale.state() == {"scale": max(1.0, scale / 2), "steps": 0}
        after = [net.module.state_dict(), net.optimizer.state_dict()["state"]]
        torch.testing.assert_close(after, before, rtol=0, atol=0)


@pytest.mark.parametrize(
    ("flags", "faults_of_others", "streak"),
    [
        # (good, bad, finite here) of two steps after one that was bad
        ([(False, False, True), (False, False, True)], [0.0, 0.0], 1),
        ([(False, False, True), (False, True, True)], [0.0], 2),
        ([(False, False, True), (False, False, False)], [0.0, 0.0], 2),
        ([(False, False, True), (False, False, True)], [0.0, 1.0], 2),
        ([(False, False, True), (True, False, True)], [0.0], 0),
    ],
)
def test_an_overflow_is_no_bad_step_unless_a_loss_of_some_rank_was_not_finite(flags, faults_of_others, streak, caplog):
    caplog.set_level("INFO")
    accelerator = SimpleNamespace(device=CPU, reduce=lambda faults: faults + torch.tensor(faults_of_others))
    clips = [SimpleNamespace(source="a.wav", unit=0, key="00000")]
    steps = [RecentStep(i, [(0,)], *map(torch.tensor, (g, b, [f]))) for i, (g, b, f) in enumerate(flags)]
    assert bad_steps.check_recent_steps(accelerator, steps, 1, 2, clips) == (streak, streak == 2)
    assert "no update in step 0" in caplog.text
    assert ("step 1: no update, since" in caplog.text) == (streak == 2)
    assert ("a.wav" in caplog.text) == (not flags[1][2])


@pytest.mark.slow
def test_a_run_that_was_stopped_goes_on_to_the_same_bits(tmp_path):
    ends = []
    for name, stops in {"whole": (5,), "halves": (3, 5)}.items():
        for stop in stops:
            recipe = tiny_recipe(tmp_path / name, max_steps=stop, precision="fp16", lr_schedule="constant")
            if stop == stops[0]:
                make_features(recipe)
            trainer.run(recipe, Shard())
        ends.append(checkpoint.latest(tmp_path / name / "checkpoints"))
    for file in checkpoint.FILES:
        assert (ends[0] / file).read_bytes() == (ends[1] / file).read_bytes(), file
    scales = json.loads((ends[0] / checkpoint.STATE).read_text())["loss_scales"]
    assert scales == checkpoint.load(ends[0]).loss_scales
    assert all(s["scale"] <= 1024 and s["steps"] > 0 for s in scales.values())
    # Weights of a checkpoint that knows no scale, as one of bf16 or of an older version, go on with the first.
    saved = checkpoint.load(ends[0])
    networks = {name: network(LossScale(CPU), "adamw") for name in checkpoint.MODELS}
    networks["generator"].module.emb_g = torch.nn.Embedding(*saved.models["generator"]["emb_g.weight"].shape)
    for net in networks.values():
        net.load = lambda weights, state: None
    for known, scale in ((scales, scales["generator"]["scale"]), ({}, 1024.0)):
        networks["generator"].scale = LossScale(CPU)
        run_state.load_weights(checkpoint.replace(saved, loss_scales=known), networks, None)
        assert networks["generator"].scale.state()["scale"] == scale


@pytest.mark.slow
@pytest.mark.distributed
def test_an_overflow_on_one_rank_is_skipped_by_all_and_the_scale_goes_on_with_fewer_ranks(tmp_path):
    options = {"max_steps": 4, "save_every_steps": 1, "keep_checkpoints": 9, "max_bad_steps": 1, "batch_size": 1}
    recipe = prepared(tmp_path, precision="fp16", **options)
    scaled = {"FAULT": "1:3:overflow"}
    output = torchrun(2, "faulty.py", "train", "--config", recipe, more_environment=scaled)
    assert "no update in step 3: a gradient overflowed" in output
    before, skipped, after = (checkpoint.load(tmp_path / "run/checkpoints" / f"step_0000000{n}") for n in (2, 3, 4))
    for name in checkpoint.MODELS:
        states = [c.models[name] | c.optimizers[name].tensors for c in (before, skipped, after)]
        assert all(torch.equal(v, states[1][k]) for k, v in states[0].items()), name
        assert not all(torch.equal(v, states[2][k]) for k, v in states[0].items()), name
        assert before.loss_scales[name]["scale"] == 2 * skipped.loss_scales[name]["scale"]
    assert skipped.progress.bad_streak == 0
    torchrun(1, "faulty.py", "train", "--config", recipe, "--train.max_steps", 5, more_environment=scaled)
    moved = checkpoint.load(tmp_path / "run/checkpoints/step_00000005")
    assert moved.loss_scales == {n: s | {"steps": s["steps"] + 1} for n, s in after.loss_scales.items()}


def test_deepspeed_is_refused_in_float16():
    with pytest.raises(StageError, match=r"train\.precision: fp16 with DeepSpeed.*multi_gpu"):
        check_deepspeed(TrainConfig(precision="fp16"))
