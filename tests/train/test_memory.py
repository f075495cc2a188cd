"""Activation checkpointing, and that a step never makes the host wait for the device."""

import pytest
import torch
from accelerate.state import AcceleratorState
from helpers import make_features, tiny_recipe
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from rvc_dist.train import trainer
from rvc_dist.train.optimizers import AnyPrecisionAdamW

pytestmark = pytest.mark.usefixtures("thin")


def first_step(recipe) -> tuple[trainer.Trainer, int]:
    """A trainer after one step, and the bytes that its backward passes found saved."""
    AcceleratorState._reset_state(reset_partial_state=True)
    run = trainer.Trainer(recipe)
    parameters = {p.data_ptr() for n in run.networks.values() for p in n.module.parameters()}
    saved = {}

    def pack(tensor):
        if tensor.data_ptr() not in parameters:
            saved[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    batches = next(run.loader.steps(run.progress))
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        out, real = run.step.generate(batches[0])
        sum(score.sum() for score in run.step.d.compiled(torch.cat([real, out.wave])).scores).backward()
    run.step.g.optimizer.zero_grad()
    run.step.d.optimizer.zero_grad()
    run.train_step(batches)
    run.close()
    return run, sum(saved.values())


def test_activation_checkpointing_keeps_less_and_gives_the_same_bits(tmp_path):
    plain, frugal = (
        tiny_recipe(tmp_path / name, activation_checkpointing=name == "frugal") for name in ("plain", "frugal")
    )
    for recipe in (plain, frugal):
        make_features(recipe)
    (whole, kept), (again, less) = first_step(plain), first_step(frugal)
    for name, network in whole.networks.items():
        other = again.networks[name].module.state_dict()
        assert all(torch.equal(value, other[key]) for key, value in network.module.state_dict().items())
    assert less < 0.4 * kept


class SyncCounter(TorchFunctionMode):
    """Names every call from Python that would make the host wait for a device."""

    WAITING = (
        *(torch.Tensor.item, torch.Tensor.tolist, torch.Tensor.cpu, torch.Tensor.numpy, torch.Tensor.__bool__),
        *(torch.Tensor.__float__, torch.Tensor.__int__, torch.Tensor.__index__, torch.Tensor.__contains__),
        *(torch.Tensor.nonzero, torch.nonzero, torch.equal, torch.Tensor.equal, torch.allclose),
    )

    def __init__(self, on_host=frozenset()):
        super().__init__()
        self.calls = []
        self.on_host = on_host

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func in self.WAITING and args[0].data_ptr() not in self.on_host:
            self.calls.append(func.__name__)
        return func(*args, **(kwargs or {}))


class ScalarReads(TorchDispatchMode):
    """Names every operator whose result the host must know."""

    WAITING = ("_local_scalar_dense", "nonzero", "masked_select", "is_nonzero", "equal")

    def __init__(self, on_host=frozenset()):
        super().__init__()
        self.calls = []
        self.on_host = on_host

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.overloadpacket.__name__ in self.WAITING and args[0].data_ptr() not in self.on_host:
            self.calls.append(str(func))
        return func(*args, **(kwargs or {}))


def syncs(recipe, num_steps: int) -> list[str]:
    """What made the host wait in as many steps."""
    AcceleratorState._reset_state(reset_partial_state=True)
    run = trainer.Trainer(recipe)
    steps = run.loader.steps(run.progress)
    run.train_step(next(steps))  # fills the caches of windows and mel filters, and makes the optimizers' state
    batches = [next(steps) for _ in range(num_steps)]
    states = (state for n in run.networks.values() for state in n.optimizer.state.values())
    fused = all(group.get("fused") for n in run.networks.values() for group in n.optimizer.param_groups)
    # Unless they are fused, PyTorch's optimizers keep their step counts in the host's memory, also of CUDA parameters.
    on_host = set() if fused else {state["step"].data_ptr() for state in states if "step" in state}
    with SyncCounter(on_host) as calls, ScalarReads(on_host) as reads:
        for batch in batches:
            run.train_step(batch)
    with SyncCounter() as logged:
        run.meter.read(run.accelerator)
    run.close()
    assert logged.calls, "the counter counts"
    return calls.calls + reads.calls


@pytest.mark.slow
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"bf16_adamw": True, "max_grad_norm": 1.0, "kl_warmup_steps": 5},
        {"grad_accum_steps": 2, "activation_checkpointing": True},
    ],
)
def test_the_host_waits_for_the_device_only_to_log(tmp_path, monkeypatch, options):
    monkeypatch.setattr(AnyPrecisionAdamW, "host_devices", ())  # decide as on a GPU
    recipe = tiny_recipe(tmp_path, batch_size=2, log_every_steps=1000, **options)
    make_features(recipe, num_clips=15)
    assert syncs(recipe, 3) == []


def test_optimizers_that_cannot_skip_a_step_on_the_device_wait_once_for_each_network(tmp_path):
    recipe = tiny_recipe(tmp_path, batch_size=2, log_every_steps=1000, optimizer="radam")
    make_features(recipe, num_clips=15)
    assert syncs(recipe, 3).count("__bool__") == 2 * 3
