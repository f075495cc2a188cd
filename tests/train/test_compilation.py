"""torch.compile: when it is tried, when it stays, and that it computes the same."""

import json
import logging
import subprocess
import sys
import time
from collections.abc import Callable
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from functorch.compile import make_boxed_func
from helpers import make_features, tiny_recipe, with_train
from launching import torchrun
from safetensors.torch import load_file
from torch._dynamo.backends.common import aot_autograd
from torch.nn.parallel import DistributedDataParallel

from rvc_dist import choices
from rvc_dist.config import TrainConfig
from rvc_dist.models.discriminator import MultiPeriodDiscriminator, PeriodDiscriminator
from rvc_dist.train import compilation, trainer
from rvc_dist.train.checkpoint import MODELS

pytestmark = pytest.mark.usefixtures("thin")


def by_backend(compile_: Callable[..., Any], backend: Any) -> Callable[..., Any]:
    """torch.compile with another backend than inductor."""
    return lambda module, **_: compile_(module, backend=backend, dynamic=False)


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


@pytest.mark.parametrize(
    ("config", "tried"),
    [
        ({}, False),
        ({"fast_train": True}, True),
        ({"compile": "always"}, True),
        ({"compile": "never", "fast_train": True}, False),
        ({"fast_train": True, "deterministic": True}, False),
        ({"compile": "always", "deterministic": True}, True),
        ({"compile": "graphs"}, True),
        ({"compile": "graphs", "deterministic": True}, True),
    ],
)
def test_compiling_is_tried_where_it_is_asked_for(config, tried):
    assert compilation.asked_for(TrainConfig(**config)) == tried


def test_what_is_deterministic_is_compiled_without_measuring_or_not_at_all(monkeypatch, caplog):
    given = []
    monkeypatch.setattr(torch, "compile", lambda module, **options: given.append(options["options"]) or module)
    compilation.compiled(torch.nn.Linear(1, 1), torch.device("cpu"), TrainConfig(deterministic=True))
    assert given[0]["deterministic"]
    assert hasattr(torch._inductor.config, "deterministic"), "the option is known"
    monkeypatch.setattr(compilation, "compiles_deterministically", lambda: False)
    with caplog.at_level(logging.INFO):
        assert not compilation.asked_for(TrainConfig(compile="always", deterministic=True))
    assert "compile: not with train.deterministic, since this torch's compiler decides by measured times" in caplog.text


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
    assert kept["compiled"] == kept["channels_last"] == dict.fromkeys(MODELS, False)
    assert kept["key"]["torch"] == torch.__version__


@pytest.mark.slow
def test_compiled_networks_train_as_eager_ones_without_a_graph_break(tmp_path, monkeypatch):
    """Clips of two lengths, validation, and a checkpoint. All layers in one graph: test_networks.py."""
    monkeypatch.setattr(torch, "compile", by_backend(torch.compile, "aot_eager"))
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
        run.evaluate()
        weights.append({name: network.module.state_dict() for name, network in run.networks.items()})
        run.save()
        run.close()
    assert len({frames for _, frames in shapes}) == 2
    counters = torch._dynamo.utils.counters
    assert not counters["graph_break"]
    # The trial's, with which one rank goes on: the decoder has one graph; D has one for its own step, and for G's one
    # of the real and one of the fake clips.
    assert counters["stats"]["unique_graphs"] == 4
    for eager, compiled in zip(losses[:4], losses[4:], strict=True):
        assert compiled == pytest.approx(eager, rel=1e-3)
    for name in MODELS:
        for key, value in weights[0][name].items():
            assert (weights[1][name][key] - value).norm() <= 1e-3 * value.norm(), f"{name}.{key}"


def test_the_layout_of_each_network_is_what_its_step_is_faster_in(monkeypatch, caplog):
    cuda = SimpleNamespace(device=torch.device("cuda"))
    monkeypatch.setattr(compilation, "_slowest", lambda _, seconds: seconds)
    modules = {name: torch.nn.Module() for name in MODELS}
    for module in modules.values():
        module.channels_last = False
    seconds = iter([1.0, 0.5, 0.49])
    monkeypatch.setattr(compilation, "_median_s", lambda *_: next(seconds))
    half = TrainConfig(fast_train=True, precision="bf16")
    with caplog.at_level(logging.INFO):
        layout = compilation.choose_layout(half, cuda, modules, lambda: None, 10**6)
    assert layout == {name: module.channels_last for name, module in modules.items()}
    assert layout == {"generator": True, "discriminator": False}
    assert "the generator is channels-last: a step takes 0.500 s with it so, 1.000 s without" in caplog.text
    for config, accelerator in (
        (half, Accelerator(cpu=True)),
        (TrainConfig(fast_train=True), cuda),
        (TrainConfig(precision="bf16", deterministic=True), cuda),
    ):
        assert not any(compilation.choose_layout(config, accelerator, modules, lambda: None, 10**6).values())
    seconds = iter([1.0])
    assert not any(compilation.choose_layout(half, cuda, modules, lambda: None, 35).values()), "not repaid: not tried"


def in_a_pool(pool: list[torch.UntypedStorage]):
    """A backend that computes eagerly; what it returns is listed in `pool`, as memory of CUDA graphs would be."""

    def compiler(graph, _):
        def run(*inputs):
            outputs = graph(*inputs)
            given = {t.untyped_storage().data_ptr() for t in inputs if isinstance(t, torch.Tensor)}
            made = [t.untyped_storage() for t in outputs if isinstance(t, torch.Tensor)]
            pool.extend(storage for storage in made if storage.data_ptr() not in given)
            return outputs

        return make_boxed_func(run)

    return aot_autograd(fw_compiler=compiler)


@pytest.mark.slow
def test_the_first_step_of_a_process_that_had_no_trial_is_marked_too():
    """As a resumed run's: without a mark, torch would let D's graph take the memory of the wave that G made."""
    script = (
        "import torch; from rvc_dist.config import TrainConfig; from rvc_dist.train import compilation\n"
        "torch.compiler.cudagraph_mark_step_begin = lambda: print('marked')\n"
        "compilation.begin_step(); print('nothing is compiled')\n"
        "compilation.compiled(torch.nn.Linear(2, 2), torch.device('cuda'), TrainConfig(fast_train=True))\n"
        "compilation.begin_step()\n"
    )
    shown = subprocess.run([sys.executable, "-c", script], text=True, capture_output=True, check=True).stdout
    assert shown == "nothing is compiled\nmarked\n"


@pytest.mark.slow
def test_gradients_of_micro_batches_are_whole_though_cuda_graphs_reuse_their_memory(tmp_path, monkeypatch):
    """What compiled passes returned becomes NaN when a step begins, as it is overwritten on a GPU."""
    pool: list[torch.UntypedStorage] = []
    monkeypatch.setattr(torch, "compile", by_backend(torch.compile, in_a_pool(pool)))
    monkeypatch.setitem(sys.modules, "torch._inductor.cudagraph_trees", ModuleType("trees"))

    def overwrite():
        for storage in pool:
            storage.fill_(0xFF)
        pool.clear()

    monkeypatch.setattr(torch.compiler, "cudagraph_mark_step_begin", overwrite)
    results = []
    for mode in ("never", "always"):
        recipe = tiny_recipe(tmp_path / mode, compile=mode, grad_accum_steps=2, batch_size=1)
        make_features(recipe)
        AcceleratorState._reset_state(reset_partial_state=True)
        run = trainer.Trainer(recipe)
        steps = run.loader.steps(run.progress)
        for _ in range(2):
            run.train_step(next(steps))
        assert bool(pool) == (mode == "always")
        results.append(run.meter.read(run.accelerator))
        run.close()
    assert results[1] == pytest.approx(results[0], rel=1e-3)


def test_after_the_trial_networks_are_compiled_anew_inside_ddp_in_parts(monkeypatch):
    """Parts whose gradients are sent while those of others are still computed."""
    graphs: list[torch.fx.GraphModule] = []

    def record(graph, _):
        graphs.append(graph)
        return graph.forward

    monkeypatch.setattr(torch, "compile", by_backend(torch.compile, record))
    monkeypatch.setattr(dist, "_DEFAULT_FIRST_BUCKET_BYTES", 1000)
    network, wave = torch.nn.Sequential(*(torch.nn.Linear(32, 32) for _ in range(3))), torch.randn(2, 32)
    cpu = torch.device("cpu")

    def step(which):
        (compilation.compiled(network, cpu, TrainConfig()) if which["generator"] else network)(wave).sum().backward()

    ranks = SimpleNamespace(num_processes=2, device=cpu, gather=lambda values: values)
    choose = compilation.choose
    assert choose(TrainConfig(compile="always"), ranks, ("generator",), step, 9) == {"generator": True}
    assert len(graphs) == 1
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        DistributedDataParallel(compilation.compiled(network, cpu, TrainConfig()))(wave).sum().backward()
    finally:
        dist.destroy_process_group()
    assert len(graphs) > 2


def test_parts_that_are_recorded_inside_ddp_have_the_same_gradients(monkeypatch):
    """By PyTorch's own backend, which on a CPU computes what it would record on a GPU."""
    monkeypatch.setattr(compilation, "records_graphs", lambda *_: True)
    monkeypatch.setattr(dist, "_DEFAULT_FIRST_BUCKET_BYTES", 1000)
    discriminator = MultiPeriodDiscriminator(choices.DISCRIMINATORS["v2"], 64)
    wave, cpu, ends = torch.randn(2, 1, 2400), torch.device("cpu"), []
    torch._dynamo.utils.counters.clear()
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        for network in (discriminator, compilation.compiled(discriminator, cpu, TrainConfig())):
            wrapped = DistributedDataParallel(network)
            for _ in range(2):
                discriminator.zero_grad()
                sum(score.square().mean() for score in wrapped(wave).scores).backward()
            ends.append([p.grad.clone() for p in discriminator.parameters()])
    finally:
        dist.destroy_process_group()
    assert torch._dynamo.utils.counters["aot_autograd"]["total"] > 1
    for eager, recorded in zip(*ends, strict=True):
        torch.testing.assert_close(recorded, eager, rtol=1e-4, atol=1e-7)


@pytest.mark.slow
def test_what_is_compiled_on_a_cpu_is_inductors_and_computes_the_same():
    """A discriminator over one period: each layer takes seconds of a C++ compiler."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    network, wave = PeriodDiscriminator(3, 64), torch.randn(2, 1, 2400)
    ends = []
    for each in (network, compilation.compiled(network, torch.device("cpu"), TrainConfig(deterministic=True))):
        network.zero_grad()
        score, _ = each(wave)
        score.square().mean().backward()
        ends.append([score.detach(), *(p.grad.clone() for p in network.parameters())])
    assert torch._dynamo.utils.counters["inductor"]
    torch.testing.assert_close(ends[1], ends[0], rtol=1e-4, atol=1e-6)


@pytest.mark.slow
@pytest.mark.distributed
def test_compiled_networks_inside_ddp_average_their_gradients(tmp_path):
    recipe = tiny_recipe(tmp_path / "run")
    make_features(recipe, num_clips=15)
    recipes = tmp_path / "recipes"
    recipes.mkdir()
    for mode in ("never", "always"):
        (recipes / f"{mode}.yaml").write_text(with_train(recipe, compile=mode).to_yaml())
    torchrun(2, "step_on_ranks.py", recipes, 2, 1, tmp_path / "output", more_environment={"COMPILER": "aot_eager"})
    eager, compiled = (load_file(tmp_path / "output" / f"{mode}.safetensors") for mode in ("never", "always"))
    assert int(eager["bytes"]) == int(compiled["bytes"])
    for net in MODELS:
        gradients = [k for k in eager if k.startswith(f"grad.{net}.")]
        total = torch.stack([eager[k].norm() for k in gradients]).norm()
        for k in gradients:
            assert (compiled[k] - eager[k]).norm() <= 1e-4 * eager[k].norm() + 1e-6 * total, k
