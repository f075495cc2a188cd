"""DeepSpeed's ZeRO-1 and -2 train what DDP trains, and their checkpoints are the same checkpoints."""

from __future__ import annotations

import json
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from helpers import make_features, tiny_recipe, with_train
from launching import rvc_dist, torchrun
from safetensors.torch import load_file
from test_resume import curves, kill_at, prepared
from torch import nn

from rvc_dist.choices import OPTIMIZERS
from rvc_dist.config import Recipe, TrainConfig
from rvc_dist.runtime.launcher import ZERO_STAGES, check_deepspeed, fill_deepspeed_settings
from rvc_dist.tools.doctor.findings import Fact
from rvc_dist.tools.doctor.machine import check_versions
from rvc_dist.tools.doctor.ranks import DoctorContext
from rvc_dist.train import checkpoint
from rvc_dist.train.optimizers import make_optimizer
from rvc_dist.workspace import StageError

pytestmark = pytest.mark.usefixtures("thin", "warm")
STEPS = 2
CASES: dict[str, dict[str, Any]] = {
    "clipped": {"max_grad_norm": 0.5},
    "accumulated": {"grad_accum_steps": 2, "activation_checkpointing": True},
    "base": {"adversarial_from_step": 1, "ema_decay": 0.9},
    "bf16": {"bf16_adamw": True, "grad_compression": "bf16"},
}


@pytest.fixture(scope="module")
def warm():
    """Each rank would import DeepSpeed, and with it MLflow and torch's compiler, and Transformers, for 8 s."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("IMPORTED", "deepspeed.runtime.zero.muon.muon_optimizer transformers.integrations.deepspeed")
        yield


def as_zero(stage: int) -> dict[str, str]:
    """What `accelerate launch` puts into the environment."""
    return {"ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_DEEPSPEED_ZERO_STAGE": str(stage)}


def assert_same_steps(folder: Path, num_ranks: int, environment: dict[str, str]) -> None:
    """Of no stage and of each stage, in weights, losses and bytes sent."""
    recipe = tiny_recipe(folder / "run", save_every_steps=10_000)
    make_features(recipe, num_clips=27)
    recipes = folder / "recipes"
    recipes.mkdir()
    for name, train in CASES.items():
        (recipes / f"{name}.yaml").write_text(with_train(recipe, **train).to_yaml())
    saved = []
    for stage in (0, *ZERO_STAGES):
        output, more = folder / f"stage{stage}", environment | (as_zero(stage) if stage else {})
        torchrun(num_ranks, "step_on_ranks.py", recipes, 2, STEPS, output, more_environment=more)
        saved.append({name: load_file(output / f"{name}.safetensors") for name in CASES})
    plain = saved[0]
    for stage, tensors in zip(ZERO_STAGES, saved[1:], strict=True):
        for name in CASES:
            # Rounding of gradients to bf16, and of what follows, is not the same rounding twice.
            bound = 1e-2 if name == "bf16" else 1e-5
            compared = [k for k in plain[name] if k.startswith(("weight.", "loss."))]
            assert len(compared) > 100
            for key in compared:
                one, other = plain[name][key].double(), tensors[name][key].double()
                assert (one - other).norm() <= bound * one.norm(), (stage, name, key)
        if num_ranks > 1:
            micro_batches = 2 if stage == 2 else 1
            sent = {n: int(plain[n]["bytes"]) * (micro_batches if n == "accumulated" else 1) for n in CASES}
            assert {name: int(tensors[name]["bytes"]) for name in CASES} == sent


@pytest.mark.slow
@pytest.mark.distributed
def test_the_steps_are_those_of_ddp(tmp_path: Path) -> None:
    assert_same_steps(tmp_path, 2, {})


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_the_steps_on_a_gpu_are_those_of_one_without_deepspeed(tmp_path: Path) -> None:
    pytest.importorskip("deepspeed")
    assert_same_steps(tmp_path, 1, {"ACCELERATE_USE_CPU": "false"})


@pytest.mark.slow
@pytest.mark.distributed
def test_a_stopped_run_goes_on_exactly_and_moves_to_and_from_ddp(tmp_path: Path) -> None:
    whole, stopped = (prepared(tmp_path / n, max_steps=4, save_every_steps=2, keep_checkpoints=9) for n in "ab")
    assert "ZeRO stage 2" in rvc_dist(2, "train", "--config", whole, launch_file="zero2.yaml")
    assert kill_at(stopped, 2, 3, as_zero(2))
    assert "continuing from step 2" in rvc_dist(2, "train", "--config", stopped, launch_file="zero2.yaml")
    last = [folder / "run" / "checkpoints" / "step_00000004" for folder in (whole.parent, stopped.parent)]
    assert all((last[0] / file).read_bytes() == (last[1] / file).read_bytes() for file in checkpoint.FILES)
    assert curves(whole.parent / "run") == curves(stopped.parent / "run")

    rvc_dist(1, "train", "--config", stopped, "--train.max_steps", 5)
    ddp = checkpoint.load(stopped.parent / "run" / "checkpoints" / "step_00000005")
    rvc_dist(1, "train", "--config", stopped, "--train.max_steps", 6, launch_file="zero1.yaml")
    zeroed = checkpoint.load(stopped.parent / "run" / "checkpoints" / "step_00000006")
    for name in checkpoint.MODELS:
        one, other = ddp.optimizers[name], zeroed.optimizers[name]
        assert {k: (v.shape, v.dtype) for k, v in one.tensors.items()} == {
            k: (v.shape, v.dtype) for k, v in other.tensors.items()
        }
        assert one.groups[0].keys() == other.groups[0].keys()
        assert all(float(v) == 6 for k, v in other.tensors.items() if k.endswith("/step"))


@pytest.mark.slow
@pytest.mark.distributed
def test_a_gradient_that_is_not_finite_changes_nothing(tmp_path: Path) -> None:
    recipe = prepared(tmp_path, max_steps=4, save_every_steps=1, keep_checkpoints=9, max_bad_steps=3)
    fault = {"FAULT": "1:3:nan"}
    output = torchrun(2, "faulty.py", "train", "--config", recipe, more_environment=as_zero(1) | fault)
    assert "step 3: no update, since a gradient was not finite" in output
    before, bad, after = (checkpoint.load(tmp_path / "run" / "checkpoints" / f"step_0000000{n}") for n in (2, 3, 4))
    for name in checkpoint.MODELS:
        states = [(c.models[name], c.optimizers[name].tensors) for c in (before, bad, after)]
        for kept, same, changed in zip(*states, strict=True):
            assert all(torch.equal(v, same[k]) for k, v in kept.items()), name
            assert not all(torch.equal(v, changed[k]) for k, v in kept.items()), name
    assert (bad.progress.bad_streak, after.progress.bad_streak) == (1, 0)


def test_only_optimizers_that_see_single_numbers_are_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each of them takes the same steps on parameters and on two halves of all numbers; the others do not."""
    shapes = [(8, 512), (4096,), (16, 16, 3)]

    def drawn(seed: int, scale: int) -> list[torch.Tensor]:
        generator = torch.Generator().manual_seed(seed)
        return [torch.randn(shape, generator=generator) * scale**i for i, shape in enumerate(shapes)]

    def halves(tensors: list[torch.Tensor]) -> list[torch.Tensor]:
        return list(torch.cat([t.reshape(-1) for t in tensors]).chunk(2))

    def steps(name: str, cut: bool) -> torch.Tensor:
        parameters = [nn.Parameter(v) for v in (halves(drawn(0, 3)) if cut else drawn(0, 3))]
        config = TrainConfig(optimizer=name, learning_rate=1.0 if name == "prodigy" else 1e-2)
        parts = [[p] for p in parameters] if cut else [parameters]
        optimizers = [make_optimizer(config, nn.ParameterList(part)) for part in parts]
        for step in range(8):
            gradients = drawn(1 + step, 10)
            for parameter, gradient in zip(parameters, halves(gradients) if cut else gradients, strict=True):
                parameter.grad = gradient + 10 * parameter.detach()  # towards zero: prodigy measures the way
            for optimizer in optimizers:
                optimizer.step()
        return torch.cat([p.detach().reshape(-1) for p in parameters])

    alike = {name for name in OPTIMIZERS if torch.allclose(steps(name, False), steps(name, True), rtol=1e-5, atol=1e-7)}
    assert alike == {name for name, spec in OPTIMIZERS.items() if spec.elementwise}

    for name in OPTIMIZERS.keys() - alike:
        rate = 1.0 if name == "prodigy" else 1e-4
        with pytest.raises(StageError, match=rf"train.optimizer: {name} .* ZeRO .* adamw, .* launch/multi_gpu.yaml"):
            check_deepspeed(TrainConfig(optimizer=name, learning_rate=rate))
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(StageError, match=r"needs the package deepspeed: pip install deepspeed "):
        check_deepspeed(TrainConfig())


def filled(settings: dict[str, Any], **train: Any) -> dict[str, Any]:
    """DeepSpeed's settings from those of a launcher and a recipe."""
    settings = {"zero_optimization": {"stage": 1}} | settings
    state = SimpleNamespace(deepspeed_plugin=SimpleNamespace(deepspeed_config=settings))
    fill_deepspeed_settings(SimpleNamespace(state=state), TrainConfig(**train))
    return json.loads(json.dumps(settings))


def test_the_recipe_completes_the_launchers_settings() -> None:
    own = {"gradient_clipping": "auto", "train_batch_size": "auto", "train_micro_batch_size_per_gpu": "auto"}
    own |= {"gradient_accumulation_steps": 3, "bf16": {"enabled": "auto"}}
    assert filled(own, batch_size=6, grad_accum_steps=3, max_grad_norm=2.5, grad_compression="bf16") == {
        "zero_optimization": {"stage": 1, "reduce_bucket_size": 1 << 23, "allgather_bucket_size": 1 << 23},
        "train_micro_batch_size_per_gpu": 6,
        "gradient_clipping": 2.5,
        "gradient_accumulation_steps": 1,
        "communication_data_type": "bf16",
    }
    kept = filled({"zero_optimization": {"stage": 2, "reduce_bucket_size": 1000}})["zero_optimization"]
    assert kept["reduce_bucket_size"] == 1000


def test_settings_that_do_not_fit_are_all_named() -> None:
    zero_settings = {"stage": 3, "offload_optimizer": {"device": "cpu"}, "round_robin_gradients": True}
    wrong = {"zero_optimization": zero_settings, "gradient_clipping": 1.0, "train_micro_batch_size_per_gpu": 9}
    wrong |= {"gradient_accumulation_steps": 5, "fp16": {"enabled": True}, "optimizer": {"type": "Adam"}}
    with pytest.raises(StageError, match="do not fit") as caught:
        filled(wrong, batch_size=4, grad_accum_steps=2)
    problems = [line.split(":")[0].strip() for line in str(caught.value).splitlines()[1:]]
    assert problems == [
        "zero stage 3",
        "offload_optimizer to cpu",
        "round_robin_gradients",
        "train_micro_batch_size_per_gpu 9",
        "gradient_clipping 1.0",
        "gradient_accumulation_steps 5",
        "fp16",
        "optimizer",
    ]


def test_the_doctor_compares_the_versions_of_deepspeed_where_it_is_used(monkeypatch: pytest.MonkeyPatch) -> None:
    def versions() -> dict[str, str]:
        found = check_versions(DoctorContext(Recipe()))
        return {fact.name: str(fact.value) for fact in found if isinstance(fact, Fact)}

    assert "deepspeed" not in versions()
    for name, value in as_zero(1).items():
        monkeypatch.setenv(name, value)
    assert versions()["deepspeed"] == version("deepspeed")
