"""Optimizers and the learning rate."""

import math

import pytest
import torch
from torch import nn

from rvc_dist.config import TrainConfig
from rvc_dist.optim import OPTIMIZERS, AnyPrecisionAdamW, learning_rate, make_optimizer


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
    assert sum(state[k].nbytes for k in ("exp_avg", "exp_avg_sq")) == 6000  # AdamW: 8000


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


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_every_optimizer_lowers_a_loss(name):
    torch.manual_seed(0)
    net = nn.Linear(4, 1)
    optimizer = make_optimizer(TrainConfig(optimizer=name, learning_rate=1e-2), net)
    x = torch.randn(32, 4)
    target = x @ torch.tensor([[1.0], [2.0], [-1.0], [0.5]])
    values = []
    for _ in range(100):
        optimizer.zero_grad()
        loss = (net(x) - target).square().mean()
        loss.backward()
        optimizer.step()
        values.append(loss.item())
    assert values[-1] < 0.7 * values[0]
    assert optimizer.param_groups[0]["betas"] == (0.8, 0.99)
    assert optimizer.param_groups[0]["eps"] == 1e-9


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
