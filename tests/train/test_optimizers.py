"""Optimizers and the learning rate."""

import copy
import json
import math
import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.utils.parametrizations import weight_norm

from rvc_dist.choices import OPTIMIZERS
from rvc_dist.config import OptimConfig, TrainConfig
from rvc_dist.train import optimizers
from rvc_dist.train.optimizers import (
    AnyPrecisionAdamW,
    OptimizerState,
    learning_rate,
    load_optimizer_state,
    make_optimizer,
    optimizer_state,
)
from rvc_dist.workspace import StageError

PACKAGED = [name for name, spec in OPTIMIZERS.items() if spec.package]


LEARNING_RATES = {"prodigy": 1.0, "ranger21": 0.1}  # the second clips and smooths gradients until little is left


def config_of(name: str, **optim: float) -> TrainConfig:
    return TrainConfig(optimizer=name, learning_rate=LEARNING_RATES.get(name, 1e-2), optim=OptimConfig(**optim))


def small_net() -> nn.Module:
    """A parameter of each kind: matrix (of more than one 8-bit block), kernel, weight norm, bias, table, frozen."""
    torch.manual_seed(0)
    convolutions = (weight_norm(nn.Conv1d(16, 8, 3)), nn.Tanh(), nn.Conv1d(8, 1, 1))
    net = nn.Sequential(
        nn.Embedding(300, 16), nn.Linear(16, 16), nn.Flatten(1), nn.Unflatten(1, (16, 8)), *convolutions
    )
    net[1].bias.requires_grad_(False)
    return net


def step(net: nn.Module, optimizer: torch.optim.Optimizer, seed: int) -> float:
    draw = torch.Generator().manual_seed(seed)
    tokens, target = torch.randint(0, 300, (4, 8), generator=draw), torch.randn(4, 1, 6, generator=draw)
    optimizer.zero_grad()
    loss = (net(tokens) - target).square().mean()
    loss.backward()
    optimizer.step()
    return loss.item()


def train(optimizer_of, steps: int = 20) -> torch.Tensor:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 1))
    optimizer = optimizer_of(list(net.parameters()))
    x, y = torch.randn(64, 8), torch.randn(64, 1)
    for _ in range(steps):
        optimizer.zero_grad()
        (net(x) - y).square().mean().backward()
        optimizer.step()
    return torch.cat([p.detach().flatten() for p in net.parameters()])


def everything(net: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, torch.Tensor]:
    state = optimizer_state(optimizer, net)
    return state.tensors | {name: p.detach().clone() for name, p in net.named_parameters()}


def assert_same_bits(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> None:
    assert a.keys() == b.keys()
    for key, value in a.items():
        assert (value.dtype, value.shape) == (b[key].dtype, b[key].shape), key
        assert torch.equal(value.reshape(-1).view(torch.uint8), b[key].reshape(-1).view(torch.uint8)), key


def through_files(state: OptimizerState, folder: Path) -> OptimizerState:
    save_file(state.tensors, folder / "optimizer.safetensors")
    (folder / "optimizer.json").write_text(json.dumps(state.groups))
    groups = json.loads((folder / "optimizer.json").read_text())
    assert groups == state.groups
    return OptimizerState(load_file(folder / "optimizer.safetensors"), groups)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_every_optimizer_lowers_a_loss(name):
    torch.manual_seed(0)
    net = nn.Linear(4, 1)
    optimizer = make_optimizer(config_of(name), net)
    x = torch.randn(32, 4)
    target = x @ torch.tensor([[1.0], [2.0], [-1.0], [0.5]])
    values = []
    for _ in range(100):
        optimizer.zero_grad()
        loss = (net(x) - target).square().mean()
        loss.backward()
        optimizer.step()
        values.append(loss.item())
    assert values[-1] < 0.75 * values[0]


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_no_optimizer_climbs_in_its_first_steps(name):
    gradient = torch.tensor([1.0, 3.0, -2.0])
    parameter = nn.Parameter(torch.ones(3))
    optimizer = make_optimizer(config_of(name, weight_decay=0.0), nn.ParameterList([parameter]))
    for _ in range(4):  # then Lookahead goes half the way back
        before = parameter.detach().clone()
        parameter.grad = gradient.clone()
        optimizer.step()
        assert (parameter - before) @ gradient <= 0


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_options_come_from_the_recipe_where_the_optimizer_has_them(name):
    config = config_of(name, beta1=0.7, beta2=0.95, eps=1e-5, weight_decay=0.1)
    group = make_optimizer(config, small_net()).param_groups[0]
    betas = {"adan": (0.7, 0.92, 0.95), "ademamix": (0.7, 0.95, 0.9999), "came": (0.7, 0.95, 0.9999)}
    own_eps = {"adabelief": 1e-16, "adabelief_v2": 1e-16, "came": None, "lion": None}
    assert group["betas"] == betas.get(name, (0.7, 0.95))
    assert group.get("eps") == own_eps.get(name, 1e-5)
    assert group["weight_decay"] == 0.1
    assert group["lr"] == config.learning_rate
    assert len(group["params"]) == 7  # without the frozen bias


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_weight_decay_is_decoupled(name):
    # With no gradient only the decay is left: 2 (1 - lr wd). Coupled, Adam's would be a whole lr. Prodigy's rate is
    # times its distance of 1e-6.
    parameter = nn.Parameter(torch.full((2, 3), 2.0))
    optimizer = make_optimizer(config_of(name, weight_decay=0.1), nn.ParameterList([parameter]))
    parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    if name == "ranger21":  # its decay is divided by the gradients' spread, of which there is none
        return
    rate = 0.0 if name == "prodigy" else 1e-2
    torch.testing.assert_close(parameter.detach(), torch.full((2, 3), 2.0 * (1 - rate * 0.1)), rtol=1e-6, atol=0)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_three_steps_saved_and_three_more_are_six(name, tmp_path):
    config = config_of(name)
    straight, half, fresh = small_net(), small_net(), small_net()
    optimizer = make_optimizer(config, straight)
    for seed in range(6):
        step(straight, optimizer, seed)

    first = make_optimizer(config, half)
    for seed in range(3):
        step(half, first, seed)
    saved = through_files(optimizer_state(first, half), tmp_path)
    fresh.load_state_dict(half.state_dict())
    second = make_optimizer(config, fresh)
    load_optimizer_state(second, fresh, saved)
    assert_same_bits(everything(fresh, second), everything(half, first))
    assert optimizer_state(second, fresh).groups == optimizer_state(first, half).groups
    for seed in range(3, 6):
        step(fresh, second, seed)
    assert_same_bits(everything(fresh, second), everything(straight, optimizer))
    assert optimizer_state(second, fresh).groups == optimizer_state(optimizer, straight).groups


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_saved_state_is_a_copy(name):
    net = small_net()
    optimizer = make_optimizer(config_of(name), net)
    step(net, optimizer, 0)
    state = optimizer_state(optimizer, net)
    before = {key: value.clone() for key, value in state.tensors.items()}
    for seed in range(1, 7):
        step(net, optimizer, seed)
    assert_same_bits(state.tensors, before)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_an_optimizer_that_never_stepped_loads(name, tmp_path):
    net, fresh = small_net(), small_net()
    optimizer, other = (make_optimizer(config_of(name), n) for n in (net, fresh))
    load_optimizer_state(other, fresh, through_files(optimizer_state(optimizer, net), tmp_path))
    assert step(net, optimizer, 0) == step(fresh, other, 0)
    assert_same_bits(everything(fresh, other), everything(net, optimizer))


def test_numbers_keep_their_types_and_settings_are_the_recipes(tmp_path):
    net = small_net()
    optimizer = make_optimizer(config_of("prodigy"), net)
    for _ in range(10):
        step(net, optimizer, 0)
    state = through_files(optimizer_state(optimizer, net), tmp_path)
    fresh = make_optimizer(config_of("prodigy", weight_decay=0.5, beta1=0.5), net)
    load_optimizer_state(fresh, net, state)
    old, new = optimizer.param_groups[0], fresh.param_groups[0]
    assert new["step"] == old["step"] == 11
    assert isinstance(new["step"], int)
    assert new["d"] == old["d"] > 1e-6
    assert torch.equal(new["d_numerator"], old["d_numerator"])
    assert (new["weight_decay"], new["betas"]) == (0.5, (0.5, 0.99))


def test_a_changed_type_of_the_variance_is_honoured():
    net = small_net()
    optimizer = make_optimizer(config_of("anyprecision_adamw"), net)
    step(net, optimizer, 0)
    fresh = make_optimizer(config_of("anyprecision_adamw", variance_dtype="bfloat16"), net)
    load_optimizer_state(fresh, net, optimizer_state(optimizer, net))
    assert fresh.state[net[0].weight]["exp_avg_sq"].dtype is torch.bfloat16


def test_a_state_that_does_not_fit_is_refused_with_every_mismatch_and_changes_nothing():
    net = small_net()
    optimizer = make_optimizer(config_of("adamw"), net)
    step(net, optimizer, 0)
    state = optimizer_state(optimizer, net)
    before = everything(net, optimizer)
    tensors = dict(state.tensors)
    del tensors["0.weight/exp_avg"]
    tensors["1.weight/exp_avg_sq"] = torch.zeros(3, 2)
    tensors["1.weight/momentum"] = torch.zeros(1)
    tensors["other/exp_avg"] = torch.zeros(1)
    groups = json.loads(json.dumps(state.groups))
    groups[0]["speed"] = 1
    groups[0]["parameters"]["ghost"] = None
    del groups[0]["parameters"]["6.bias"], groups[0]["amsgrad"]
    with pytest.raises(ValueError, match="does not fit") as caught:
        load_optimizer_state(optimizer, net, OptimizerState(tensors, groups))
    problems = str(caught.value).splitlines()[1:]
    assert [p.strip() for p in problems] == [
        "0.weight/exp_avg: missing",
        "1.weight/momentum: not state of this optimizer",
        "1.weight/exp_avg_sq: [3, 2], expected [16, 16]",
        "6.bias: missing",
        "ghost: not a parameter of this optimizer",
        "groups/0/amsgrad: missing",
        "groups/0/speed: not an option of this optimizer",
        "6.bias/step: not state of this optimizer",
        "6.bias/exp_avg: not state of this optimizer",
        "6.bias/exp_avg_sq: not state of this optimizer",
        "other/exp_avg: not state of this optimizer",
    ]
    assert_same_bits(everything(net, optimizer), before)


def test_on_mps_adamw_is_not_fused():
    """Its fused kernel takes found_inf and ignores it, so a bad step would change the weights."""
    with FakeTensorMode():
        for device, fused in (("mps", False), ("cpu", True)):
            optimizer = make_optimizer(TrainConfig(), nn.ParameterList([torch.empty(2, device=device)]))
            assert optimizer.param_groups[0]["fused"] is fused
            assert getattr(optimizer, "_step_supports_amp_scaling", False) is fused


def test_another_optimizers_state_is_refused():
    net = small_net()
    optimizer = make_optimizer(config_of("adamw"), net)
    step(net, optimizer, 0)
    state = optimizer_state(optimizer, net)
    with pytest.raises(ValueError, match=r"0\.weight/exp_avg_sq: not state of this optimizer"):
        load_optimizer_state(make_optimizer(config_of("lion"), net), net, state)


@pytest.mark.parametrize("name", PACKAGED)
def test_a_missing_package_is_named_with_the_command_that_installs_it(name, monkeypatch):
    monkeypatch.setitem(sys.modules, "pytorch_optimizer", None)
    monkeypatch.setitem(sys.modules, "bitsandbytes.optim", None)
    with pytest.raises(
        StageError, match=rf"train\.optimizer {name} needs the package .*: pip install .* \(the extra optim "
    ):
        make_optimizer(config_of(name), nn.Linear(1, 1))


def test_a_device_that_8_bit_cannot_use_is_named(monkeypatch):
    def no_kernel(*_: object, **__: object) -> None:
        raise NotImplementedError("no kernel for this device")

    monkeypatch.setattr("bitsandbytes.functional.optimizer_update_8bit_blockwise", no_kernel)
    with pytest.raises(StageError, match=r"train\.optimizer: adamw_8bit does not run on cpu .*no kernel.*anyprecision"):
        make_optimizer(config_of("adamw_8bit"), nn.Linear(1, 1))


def test_8_bit_is_close_to_adamw_in_a_quarter_of_the_memory():
    def run(name: str) -> tuple[torch.Tensor, int]:
        net = small_net()
        optimizer = make_optimizer(config_of(name), net)
        for seed in range(20):
            step(net, optimizer, seed)
        state = optimizer.state[net[0].weight]
        moved = net[0].weight.detach() - small_net()[0].weight.detach()
        return moved, sum(v.nbytes for k, v in state.items() if isinstance(v, torch.Tensor) and "qmap" not in k)

    (mine, bytes_8bit), (reference, bytes_adamw) = run("adamw_8bit"), run("adamw")
    assert (mine - reference).norm() < 0.2 * reference.norm()
    assert bytes_8bit < 0.27 * bytes_adamw


def test_anyprecision_by_hand():
    # m = 0.2 * 2, v = 0.01 * 4; corrected 2 and 4; 1 - 0.1 * 2 / 2 - 0.1 * 0.5 * 1. Then g = 0: m = 0.32, v = 0.0396,
    # corrected 0.32 / 0.36 and 0.0396 / 0.0199.
    parameter = nn.Parameter(torch.tensor([1.0]))
    optimizer = AnyPrecisionAdamW([parameter], lr=0.1, weight_decay=0.5, momentum_dtype=torch.float32)
    parameter.grad = torch.tensor([2.0])
    optimizer.step()
    assert parameter.item() == pytest.approx(0.85, rel=1e-6)
    assert optimizer.state[parameter]["exp_avg"].item() == pytest.approx(0.4)
    assert optimizer.state[parameter]["exp_avg_sq"].item() == pytest.approx(0.04)
    parameter.grad = torch.tensor([0.0])
    optimizer.step()
    second = 0.85 - 0.1 * (0.32 / 0.36) / math.sqrt(0.0396 / 0.0199) - 0.1 * 0.5 * 0.85
    assert parameter.item() == pytest.approx(second, rel=1e-6)
    assert optimizer.param_groups[0]["step"] == 2


def test_anyprecision_in_float32_is_adamw():
    mine = train(lambda p: AnyPrecisionAdamW(p, lr=1e-2, momentum_dtype=torch.float32))
    reference = train(lambda p: torch.optim.AdamW(p, 1e-2, (0.8, 0.99), 1e-9, 0.01))
    torch.testing.assert_close(mine, reference, rtol=1e-5, atol=1e-6)


def test_anyprecision_momentum_is_bfloat16_and_stays_close():
    mine = train(lambda p: AnyPrecisionAdamW(p, lr=1e-2))
    reference = train(lambda p: torch.optim.AdamW(p, 1e-2, (0.8, 0.99), 1e-9, 0.01))
    assert not torch.equal(mine, reference)
    assert (mine - reference).norm() < 0.02 * reference.norm()


def test_anyprecision_state_takes_three_quarters_of_adamws_memory():
    parameter = nn.Parameter(torch.zeros(1000))
    parameter.grad = torch.ones(1000)
    optimizer = AnyPrecisionAdamW([parameter])
    optimizer.step()
    state = optimizer.state[parameter]
    assert state["exp_avg"].dtype is torch.bfloat16
    assert sum(v.nbytes for v in state.values()) == 6000  # AdamW: 8000


def test_kahan_summation_keeps_updates_that_bfloat16_parameters_would_lose():
    def drift(kahan: bool) -> float:
        parameter = nn.Parameter(torch.full((100,), 100.0, dtype=torch.bfloat16))
        optimizer = AnyPrecisionAdamW([parameter], lr=1e-2, weight_decay=0.0, kahan=kahan)
        for _ in range(100):
            parameter.grad = torch.ones_like(parameter)
            optimizer.step()
        return float(parameter.detach().float().mean())

    assert drift(kahan=False) == 100.0
    assert drift(kahan=True) == pytest.approx(99.0, abs=0.5)


@pytest.mark.parametrize("options", [{}, {"kahan": True}, {"variance_dtype": torch.bfloat16}])
@pytest.mark.parametrize("chunk", [1, 7, 40])
def test_the_size_of_chunks_changes_no_bit(monkeypatch, options, chunk):
    whole = train(lambda p: AnyPrecisionAdamW(p, lr=1e-2, **options), steps=3)
    monkeypatch.setattr("rvc_dist.train.optimizers.CPU_RUN", chunk)
    assert torch.equal(whole, train(lambda p: AnyPrecisionAdamW(p, lr=1e-2, **options), steps=3))


def test_parameters_in_another_memory_order_are_updated_alike(monkeypatch):
    def run(order: torch.memory_format) -> torch.Tensor:
        torch.manual_seed(0)
        parameter = nn.Parameter(torch.randn(4, 3, 5, 2).to(memory_format=order))
        optimizer = AnyPrecisionAdamW([parameter, nn.Parameter(torch.ones(3))], lr=1e-2)
        for _ in range(2):
            parameter.grad = torch.randn(4, 3, 5, 2)
            optimizer.step()
        return parameter.detach()

    monkeypatch.setattr("rvc_dist.train.optimizers.CPU_RUN", 50)
    assert torch.equal(run(torch.contiguous_format), run(torch.channels_last))


def test_pytorchs_own_state_dict_keeps_anyprecision_exact():
    net, other = small_net(), small_net()
    optimizer = AnyPrecisionAdamW(net.parameters(), lr=1e-2)
    step(net, optimizer, 0)
    other.load_state_dict(net.state_dict())
    fresh = AnyPrecisionAdamW(other.parameters())
    fresh.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for n, o in ((net, optimizer), (other, fresh)):
        step(n, o, 1)
    assert_same_bits(everything(other, fresh), everything(net, optimizer))


SKIPPING = {
    "adamw": lambda p: torch.optim.AdamW(p, lr=1e-2, fused=True),
    "anyprecision": lambda p: AnyPrecisionAdamW(p, lr=1e-2),
    "anyprecision with all options": lambda p: AnyPrecisionAdamW(p, lr=1e-2, variance_dtype=torch.bfloat16, kahan=True),
}


def poison(net: nn.Module) -> None:
    trainable = [p for p in net.parameters() if p.requires_grad]
    for value, parameter in zip((math.nan, math.inf, -math.inf) * 9, trainable, strict=False):
        parameter.grad = torch.full_like(parameter, value)


@pytest.mark.parametrize("kind", SKIPPING)
@pytest.mark.parametrize("done", [0, 2])
def test_a_step_with_found_inf_changes_no_bit_and_does_not_count(kind, done):
    net, undisturbed = small_net(), small_net()
    optimizer, reference = SKIPPING[kind](net.parameters()), SKIPPING[kind](undisturbed.parameters())
    for seed in range(done):
        step(net, optimizer, seed)
        step(undisturbed, reference, seed)
    before = {name: p.detach().clone() for name, p in net.named_parameters()}
    poison(net)
    optimizer.found_inf = torch.tensor(1.0)  # no dimensions: fused AdamW takes no other
    optimizer.step()
    assert_same_bits({name: p.detach() for name, p in net.named_parameters()}, before)
    optimizer.found_inf.zero_()
    step(net, optimizer, 9)
    step(undisturbed, reference, 9)
    assert_same_bits(everything(net, optimizer), everything(undisturbed, reference))


@pytest.mark.parametrize("chunk", [10, 1 << 17])
@pytest.mark.parametrize("shape", [(), (1,)])
@pytest.mark.parametrize("kind", ["anyprecision", "anyprecision with all options"])
def test_the_skip_on_the_device_changes_no_bit_either(monkeypatch, kind, shape, chunk):
    """The way of a GPU, which masks every change, taken on the CPU."""
    monkeypatch.setattr("rvc_dist.train.optimizers.CPU_RUN", chunk)
    monkeypatch.setattr(AnyPrecisionAdamW, "host_devices", ())
    net, undisturbed = small_net(), small_net()
    for n in (net, undisturbed):
        n[0].weight.data[0] = -0.0  # to which adding nothing is a change
    optimizer, reference = SKIPPING[kind](net.parameters()), SKIPPING[kind](undisturbed.parameters())
    optimizer.found_inf = torch.zeros(shape)
    for seed in range(3):
        optimizer.found_inf.fill_(3.0)
        poison(net)
        before = everything(net, optimizer)
        optimizer.step()
        if seed:
            assert_same_bits(everything(net, optimizer) | {"groups/0/step": before["groups/0/step"]}, before)
        assert optimizer.param_groups[0]["step"] == seed
        optimizer.found_inf.zero_()
        step(net, optimizer, seed)
        step(undisturbed, reference, seed)
    weights = [{name: p.detach() for name, p in n.named_parameters()} for n in (net, undisturbed)]
    assert_same_bits(*weights)
    assert torch.equal(optimizer.param_groups[0]["step"], torch.tensor(3.0, dtype=torch.float64))


def test_anyprecision_divides_gradients_that_a_scaler_multiplied():
    plain, scaled = (nn.Parameter(torch.ones(5)) for _ in range(2))
    ours, theirs = AnyPrecisionAdamW([plain]), AnyPrecisionAdamW([scaled])
    plain.grad, scaled.grad = torch.arange(5.0), torch.arange(5.0) * 1024
    theirs.grad_scale, theirs.found_inf = torch.tensor(1024.0), torch.zeros(1)
    ours.step()
    theirs.step()
    assert torch.equal(plain, scaled)


def test_a_scaler_skips_and_goes_on():
    parameter = nn.Parameter(torch.ones(3))
    optimizer, scaler = AnyPrecisionAdamW([parameter], lr=0.1, weight_decay=0.0), torch.amp.GradScaler("cpu", 4.0)
    scaler.scale(parameter.sum() * math.inf).backward()
    scaler.step(optimizer)
    scaler.update()
    assert torch.equal(parameter, torch.ones(3))
    optimizer.zero_grad()
    scaler.scale(parameter.sum()).backward()
    scaler.step(optimizer)
    torch.testing.assert_close(parameter.detach(), torch.full((3,), 0.9))
    assert optimizer.param_groups[0]["step"] == 1


KERNEL_OPTIONS = [{}, {"variance_dtype": torch.bfloat16}, {"kahan": True}]


def steps_by_kernel_and_without(device: str) -> None:
    """Three steps and one that is skipped: moments to a rounding of what they are kept in, weights of float32."""
    for options in KERNEL_OPTIONS:
        ends = []
        for kernel_devices in ((device,), ()):
            net = small_net().to(device)
            optimizer = AnyPrecisionAdamW(net.parameters(), lr=1e-2, **options)
            optimizer.kernel_devices, optimizer.host_devices = kernel_devices, ()
            for seed in range(4):
                draw = torch.Generator().manual_seed(seed)
                for parameter in (p for p in net.parameters() if p.requires_grad):
                    parameter.grad = (100**seed * torch.randn(parameter.shape, generator=draw)).to(device)
                optimizer.found_inf = torch.tensor(float(seed == 1), device=device)
                if seed == 1:
                    before = everything(net, optimizer)
                    poison(net)
                optimizer.step()
                if seed == 1:
                    assert_same_bits(everything(net, optimizer), before)
            assert (optimizer._kernel is not None) == bool(kernel_devices)
            ends.append(everything(net, optimizer))
        by_kernel, without = ends
        assert by_kernel.keys() == without.keys()
        for key, value in without.items():
            if not key.endswith("compensation"):  # which is such a rounding itself
                rounding = 1e-6 if value.dtype == torch.float32 else 8e-3
                torch.testing.assert_close(by_kernel[key], value, rtol=rounding, atol=1e-7, msg=f"{options} {key}")


@pytest.mark.slow
def test_the_kernel_takes_the_same_steps():
    """In Triton's interpreter, which is chosen when the kernel is imported: in a process of its own."""
    pytest.importorskip("triton", reason="needs triton, which torch brings for GPUs")
    script = "import test_optimizers as t\nt.steps_by_kernel_and_without('cpu')"
    environment = os.environ | {"TRITON_INTERPRET": "1", "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
    subprocess.run([sys.executable, "-c", script], env=environment, check=True)


@pytest.mark.parametrize("capability", [75, 80, 90])
def test_the_kernel_compiles_for_gpus_and_touches_24_bytes_a_weight(capability):
    triton = pytest.importorskip("triton", reason="needs triton, which torch brings for GPUs")
    from triton.backends.compiler import GPUTarget

    from rvc_dist.train import adamw_kernel

    constants = {"half_variance": False, "kahan": False, "aligned": True, "block_size": 128 * 4}
    known = {"addresses": "*i64", "factors": "*fp32", "found_inf": "*fp32", "num_tensors": "i32"}
    known |= dict.fromkeys(("sizes", "first_blocks", "owners"), "*i32") | dict.fromkeys(constants, "constexpr")
    types = {name: known.get(name, "fp32") for name in adamw_kernel._step.arg_names}
    source = triton.compiler.ASTSource(fn=adamw_kernel._step, signature=types, constexprs=constants)
    options = {"enable_fp_fusion": False, "num_warps": 4}
    ptx = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options).asm["ptx"]
    assert not re.search(r"fma\.|\.approx|\.ftz", ptx)
    touched = re.findall(r"(?:ld|st)\.global(?:\.v(\d))?\.b(16|32)\b", ptx)
    # Once for all elements of a program: found_inf, size, first block, owner, and two factors in either branch.
    tables = (4 + 2 * 2) * 4
    # Each of 128 threads has four elements, in one branch by 16 bytes at a time, in the other each by a mask.
    assert sum(int(width or 1) * int(bits) // 8 for width, bits in touched) - tables == 2 * 4 * 24
    assert touched.count(("4", "32")) == 5  # weights and variances in and out, gradients


def test_without_triton_the_steps_are_those_without_the_kernel(monkeypatch, caplog):
    monkeypatch.setitem(sys.modules, "rvc_dist.train.adamw_kernel", None)
    monkeypatch.setattr(AnyPrecisionAdamW, "kernel_devices", ("cpu",))
    assert torch.equal(train(lambda p: AnyPrecisionAdamW(p, lr=1e-2)), train(SKIPPING["anyprecision"]))
    assert caplog.text.count("without its kernel") == 2  # once an optimizer


@pytest.mark.parametrize(("ours_s", "warned"), [(1.0e-3, False), (1.29e-3, False), (1.31e-3, True)])
def test_bf16_adamw_says_at_the_start_which_optimizer_is_faster(monkeypatch, caplog, ours_s, warned):
    times = {"anyprecision_adamw": ours_s, "adamw": 1e-3}
    monkeypatch.setattr(optimizers, "step_seconds", lambda config, device: times[config.optimizer_name])
    caplog.set_level("INFO")
    optimizers.report_speed(TrainConfig(bf16_adamw=True), torch.device("cuda"))
    assert f"{ours_s * 1e3:.2f} ms for 34 million weights, fused AdamW 1.00 ms" in caplog.text
    assert ("is slower than adamw on this device" in caplog.text) == warned
    caplog.clear()
    optimizers.report_speed(TrainConfig(), torch.device("cuda"))
    optimizers.report_speed(TrainConfig(bf16_adamw=True), torch.device("cpu"))
    assert not caplog.text


def test_the_time_of_a_step_is_of_the_recipes_optimizer(monkeypatch):
    monkeypatch.setattr(optimizers, "PROBE_WEIGHTS", 1 << 12)
    assert 0 < optimizers.step_seconds(TrainConfig(bf16_adamw=True), torch.device("cpu")) < 1


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_the_kernel_on_a_gpu_takes_the_same_steps_in_at_most_1_3_times_the_time_of_fused_adamw():
    steps_by_kernel_and_without("cuda")
    device = torch.device("cuda")
    ours_s = optimizers.step_seconds(TrainConfig(optimizer="anyprecision_adamw"), device)
    assert ours_s <= 1.3 * optimizers.step_seconds(TrainConfig(), device)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_step_on_the_gpu_never_waits_for_it_and_skips_to_the_bit():
    net = small_net().cuda()
    optimizer = AnyPrecisionAdamW(net.parameters(), lr=1e-2, kahan=True)
    poison(net)
    optimizer.found_inf = torch.ones(1, device="cuda")
    optimizer.step()
    before = everything(net, optimizer)
    torch.cuda.set_sync_debug_mode("error")
    try:
        optimizer.step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert_same_bits(everything(net, optimizer), before)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_noise_in_the_gradients_stays_noise_in_the_weights(name):
    """What lets a run on many ranks, whose sums round otherwise, be compared with a run on one."""

    def run(noise: float) -> torch.Tensor:
        draw = torch.Generator().manual_seed(0)

        def disturb(optimizer: torch.optim.Optimizer, *_: object) -> None:
            for p in optimizer.param_groups[0]["params"]:
                p.grad.mul_(1 + noise * torch.randn(p.shape, generator=draw))

        net = small_net()
        optimizer = make_optimizer(config_of(name), net)
        optimizer.register_step_pre_hook(disturb)
        for seed in range(5):
            step(net, optimizer, seed)
        return torch.cat([p.detach().flatten() for p in net.parameters()])

    exact, noisy = run(0.0), run(1e-7)
    assert (exact - noisy).norm() < 1e-5 * exact.norm()


def test_bf16_adamw_chooses_anyprecision():
    assert isinstance(make_optimizer(TrainConfig(bf16_adamw=True), nn.Linear(1, 1)), AnyPrecisionAdamW)


def test_learning_rate_by_hand():
    exponential = TrainConfig(learning_rate=1e-4, lr_decay=0.5)
    assert learning_rate(exponential, step=99, epoch=3, total_steps=100, num_ranks=8) == pytest.approx(1.25e-5)
    cosine = TrainConfig(learning_rate=1e-4, lr_schedule="cosine")
    assert learning_rate(cosine, 0, 0, 100, 1) == pytest.approx(1e-4)
    assert learning_rate(cosine, 50, 0, 100, 1) == pytest.approx(5e-5)
    assert learning_rate(cosine, 100, 0, 100, 1) == pytest.approx(0.0, abs=1e-12)
    warm = TrainConfig(learning_rate=1e-4, lr_schedule="constant", warmup_steps=4)
    assert [learning_rate(warm, s, 0, 9, 1) for s in range(5)] == pytest.approx([2.5e-5, 5e-5, 7.5e-5, 1e-4, 1e-4])


@pytest.mark.parametrize(("scaling", "factor"), [("none", 1.0), ("sqrt", math.sqrt(8)), ("linear", 8.0)])
def test_the_number_of_ranks_changes_the_rate_only_when_asked(scaling, factor):
    config = TrainConfig(learning_rate=1e-4, lr_schedule="constant", lr_scaling=scaling)
    assert learning_rate(config, 0, 0, 10, 8) == pytest.approx(1e-4 * factor)
    kept = replace(config, batch_size=4, keep_global_batch=32)
    for ranks in (1, 3, 8):
        assert learning_rate(kept, 0, 0, 10, ranks) == pytest.approx(1e-4 * factor), "8 batches, on any number of ranks"
