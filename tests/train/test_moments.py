"""The optimizer's moments of another tool's training: it goes on as that tool would; what is not them is left out."""

from __future__ import annotations

import logging
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from rvc_dist.config import TrainConfig
from rvc_dist.files import ForeignFileError
from rvc_dist.models.torch_file import save_pth
from rvc_dist.train import moments
from rvc_dist.train.ddp import TrainedModule
from rvc_dist.train.optimizers import make_optimizer


class Network(nn.Module):
    """With a buffer, and a parameter that is trained there and not here."""

    def __init__(self, rows: int = 3) -> None:
        super().__init__()
        self.emb_g = nn.Embedding(rows, 4)
        self.conv = nn.utils.parametrizations.weight_norm(nn.Conv1d(2, 4, 3))
        self.register_buffer("filter", torch.ones(2))
        self.frozen = nn.Parameter(torch.ones(2))

    def loss(self, seed: int) -> torch.Tensor:
        wave = torch.randn(1, 2, 9, generator=torch.Generator().manual_seed(seed))
        return (self.conv(wave).square().mean() + self.emb_g.weight[1].square().sum() + 0.0 * self.frozen.sum()).sqrt()


def steps(network: Network, optimizer: torch.optim.Optimizer, seeds: range) -> None:
    for seed in seeds:
        optimizer.zero_grad()
        network.loss(seed).backward()
        optimizer.step()


@pytest.fixture
def trained(tmp_path: Path) -> tuple[Network, torch.optim.Optimizer, Path]:
    """Five steps of another tool, and its file."""
    torch.manual_seed(0)
    network = Network()
    optimizer = torch.optim.AdamW(network.parameters(), lr=1e-2, betas=(0.8, 0.99), eps=1e-9)
    steps(network, optimizer, range(5))
    path = tmp_path / "G_5.pth"
    torch.save({"model": network.state_dict(), "iteration": 1, "optimizer": optimizer.state_dict()}, path)
    return network, optimizer, path


def kept(path: Path, network: Network) -> Path:
    """As an import keeps it."""
    target = path.with_name("kept.pth")
    save_pth(target, {"model": network.state_dict(), moments.KEPT: moments.read(path, network)})
    return target


@pytest.mark.parametrize("name", ["adamw", "anyprecision_adamw"])
def test_the_run_goes_on_as_the_other_tool_would(name: str, trained: Any) -> None:
    theirs, their_optimizer, path = trained
    ours = Network()
    ours.load_state_dict(theirs.state_dict())
    ours.frozen.requires_grad_(False)
    config = TrainConfig(optimizer=name, learning_rate=1e-2)
    trained_module = TrainedModule.alone(ours, make_optimizer(config, ours))
    moments.begin_with(trained_module, kept(path, ours), name)
    steps(theirs, their_optimizer, range(5, 9))
    steps(ours, trained_module.optimizer, range(5, 9))
    anew = Network()
    anew.load_state_dict(torch.load(path, weights_only=True)["model"])
    steps(anew, torch.optim.AdamW(anew.parameters(), lr=1e-2, betas=(0.8, 0.99), eps=1e-9), range(5, 9))
    for key in ("emb_g.weight", "conv.bias", "conv.parametrizations.weight.original1"):
        error = (ours.state_dict()[key] - theirs.state_dict()[key]).abs().max()
        assert error < (1e-6 if name == "adamw" else 2e-3), key  # momentum in bfloat16
        assert error < (anew.state_dict()[key] - theirs.state_dict()[key]).abs().max() / 5, key


def test_where_shapes_differ_or_weights_are_new_a_parameter_begins_without(
    trained: Any, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    _, _, path = trained
    grown = Network(rows=5)
    found = moments.read(path, grown)
    assert {key.rpartition("/")[0] for key in found} == dict(grown.named_parameters()).keys() - {"emb_g.weight"}
    for network, without in (grown, ""), (Network(), "emb_g.weight"):
        optimizer = make_optimizer(TrainConfig(), network)
        moments.begin_with(TrainedModule.alone(network, optimizer), kept(path, network), "adamw", without)
        assert network.emb_g.weight not in optimizer.state
        assert float(optimizer.state[network.conv.bias]["step"]) == 5.0
        steps(network, optimizer, range(2))
    assert caplog.text.count("the moments of 4 parameters") == 2


def test_another_optimizer_and_a_file_without_moments_begin_anew(
    trained: Any, caplog: pytest.LogCaptureFixture
) -> None:
    theirs, _, path = trained
    optimizer = torch.optim.SGD(theirs.parameters())
    moments.begin_with(TrainedModule.alone(theirs, optimizer), path, "lion")
    assert not caplog.text, "pretrained weights bring no moments, only those that an import kept"
    moments.begin_with(TrainedModule.alone(theirs, optimizer), kept(path, theirs), "lion")
    assert "the moments of the optimizer are left out: lion has others, expected one of adamw" in caplog.text
    assert not optimizer.state


def changed(key: str, value: Any, number: int = 0) -> Callable[[dict[str, Any]], None]:
    return lambda optimizer: optimizer["state"][number].update({key: value})


class Evil:
    def __reduce__(self) -> tuple[Any, ...]:
        return print, ("run",)


@pytest.mark.parametrize(
    ("spoil", "expected"),
    [
        (lambda o: o.clear(), "there are none"),
        (lambda o: o.update(state=[1]), "there are none"),
        (lambda o: o["state"].update({"0": o["state"].pop(0)}), "not numbered as the 5 parameters"),
        (lambda o: o["state"].update({7: o["state"].pop(0)}), "not numbered as the 5 parameters"),
        (lambda o: o["state"].update({True: 5}), "not numbered"),
        (lambda o: o["state"].update({0: o["state"][4]}), "are not shaped like it"),
        (lambda o: o["state"][0].pop("exp_avg"), "those of frozen are not Adam's"),
        (changed("exp_avg_sq", torch.tensor([-1.0, 1.0])), "a square or a count of steps below 0"),
        (changed("step", -1), "a square or a count of steps below 0"),
        (changed("step", 10**400), "something else than a mapping of names to tensors"),
        (changed("step", torch.ones(2)), "are not shaped like it"),
        (changed("exp_avg", "text"), "something else than a mapping of names to tensors"),
        (changed("exp_avg", torch.tensor([float("nan"), 1.0])), "not finite"),
        (changed("exp_avg", torch.ones(2, dtype=torch.int64)), "torch.int64"),
        (changed("exp_avg", Evil()), "more in it than floating numbers and plain data"),
    ],
)
def test_what_is_no_moments_is_named_and_nothing_of_it_is_run(
    spoil: Callable[[dict[str, Any]], None], expected: str, trained: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    theirs, _, path = trained
    file = torch.load(path, weights_only=True)
    spoil(file["optimizer"])
    torch.save(file, path, pickle_module=pickle)
    with pytest.raises(ForeignFileError, match=expected):
        moments.read(path, theirs)
    assert "run" not in capsys.readouterr().out


def test_a_foreign_file_with_our_key_is_told(trained: Any, caplog: pytest.LogCaptureFixture) -> None:
    theirs, _, path = trained
    optimizer = make_optimizer(TrainConfig(), theirs)
    kept_moments = moments.read(path, theirs)
    hostile = {"conv.bias/exp_avg_sq": -torch.ones(4), "conv.bias/exp_avg": torch.ones(5), "conv.bias/step": Evil}
    for key, value in hostile.items():
        values = [1] if value is Evil else kept_moments | {key: value}
        save_pth(path, {"model": theirs.state_dict(), moments.KEPT: values})
        moments.begin_with(TrainedModule.alone(theirs, optimizer), path, "adamw")
    assert caplog.text.count("the moments of the optimizer are left out") == 3
    assert not optimizer.state
