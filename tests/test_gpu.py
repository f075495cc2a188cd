"""What only a CUDA device shows. Skipped where there is none; `pytest -m gpu` runs these alone."""

import gc
import re
import shutil
import subprocess
import sys

import pytest
import torch
from accelerate.state import AcceleratorState
from helpers import make_features, tiny_recipe, with_train

from rvc_dist.config import TrainConfig
from rvc_dist.models.spectral import mel_from_spectrogram
from rvc_dist.runtime import device as devices
from rvc_dist.train import checkpoint, compilation, trainer
from rvc_dist.train.dataset import Batch
from rvc_dist.train.loader import copied_ahead
from rvc_dist.workspace import Shard, StageError

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
needs_bf16 = pytest.mark.skipif(
    torch.cuda.is_available() and torch.cuda.get_device_capability() < devices.MIN_BF16_CAPABILITY,
    reason="needs compute capability 8.0",
)


@pytest.fixture(autouse=True)
def _fresh_state():
    AcceleratorState._reset_state(reset_partial_state=True)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)
    torch.use_deterministic_algorithms(False)
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.benchmark = False
    torch.backends.cudnn.deterministic = False


def losses_of(recipe, num_steps: int) -> list[dict[str, float]]:
    AcceleratorState._reset_state(reset_partial_state=True)
    run, values = trainer.Trainer(recipe), []
    steps = run.loader.steps(run.progress)
    for _ in range(num_steps):
        run.train_step(next(steps))
        run.progress = run.loader.advanced(run.progress)
        values.append(run.meter.read(run.accelerator))
    run.close()
    return values


@needs_bf16
@pytest.mark.parametrize("kernel", [torch.matmul, torch.nn.functional.conv1d])
def test_tf32_is_used_by_fast_train_alone(kernel):
    """In products and in convolutions, where torch lets cuDNN use it unless it is told not to."""
    torch.manual_seed(0)
    a, b = torch.randn(2, 512, 512, 4, device="cuda")
    if kernel is torch.matmul:
        a, b = a[..., 0], b[..., 0]
    exact = kernel(a.double(), b.double())
    for fast in (True, False):
        devices.apply_kernel_settings(TrainConfig(fast_train=fast))
        difference = (kernel(a, b) - exact).norm() / exact.norm()
        assert 1e-5 < difference < 2e-3 if fast else difference < 2e-6


@needs_bf16
def test_mel_bands_are_never_in_tf32():
    spec = torch.rand(4, 1025, 200, device="cuda")
    exact = mel_from_spectrogram(spec, 48000, 2048, 128)
    devices.apply_kernel_settings(TrainConfig(fast_train=True))
    assert torch.equal(mel_from_spectrogram(spec, 48000, 2048, 128), exact)


def test_the_allocator_has_the_settings_of_fast_train():
    """In a process of its own, since the allocator reads them once."""
    script = (
        "import torch\nfrom rvc_dist.config import TrainConfig\n"
        "from rvc_dist.runtime.device import allocator_settings, set_allocator\n"
        "set_allocator(TrainConfig(fast_train=True))\ntorch.zeros(1, device='cuda')\n"
        "print(allocator_settings(torch.device('cuda')))\n"
    )
    shown = subprocess.run([sys.executable, "-c", script], text=True, capture_output=True, check=True).stdout
    assert shown.split() == ["expandable_segments:True"]


@pytest.mark.parametrize("mode", ["graphs", pytest.param("always", marks=pytest.mark.slow)])
def test_cuda_graphs_of_two_networks_do_not_overwrite_each_others_outputs(tmp_path, mode):
    """G's output feeds D, D's features feed G's loss: values over several steps, two lengths and micro-batches."""
    for accum in (1, 2):
        runs = []
        for how in ("never", mode):
            recipe = tiny_recipe(tmp_path / f"{how}{accum}", compile=how, grad_accum_steps=accum, learning_rate=1e-5)
            make_features(recipe, num_clips=15)
            runs.append(losses_of(recipe, 8))
        for eager, compiled in zip(*runs, strict=True):
            assert compiled == pytest.approx(eager, rel=1e-2)


def test_a_new_process_goes_on_with_cuda_graphs(tmp_path):
    """It had no trial, in which the networks were called before."""
    recipe = tiny_recipe(tmp_path, compile="graphs", max_steps=4, save_every_steps=2)
    make_features(recipe)
    path = tmp_path / "recipe.yaml"
    path.write_text(recipe.to_yaml())
    for _ in range(2):
        command = [sys.executable, "-m", "rvc_dist", "train", "--config", str(path)]
        result = subprocess.run(command, text=True, capture_output=True)
        assert result.returncode == 0, result.stderr
        shutil.rmtree(tmp_path / "checkpoints" / "step_00000004")
    assert "continuing from step 2" in result.stderr
    assert "trained to step 4" in result.stderr
    assert "compile: the" not in result.stderr, "the choice is the run's"


@pytest.mark.parametrize(
    "options", [{}, pytest.param({"bf16_adamw": True, "max_grad_norm": 1.0}, marks=needs_bf16), {"grad_accum_steps": 2}]
)
def test_a_step_never_waits_for_the_device(tmp_path, options):
    recipe = tiny_recipe(tmp_path, log_every_steps=1000, **options)
    make_features(recipe, num_clips=15)
    run = trainer.Trainer(recipe)
    steps = run.loader.steps(run.progress)
    run.train_step(next(steps))
    batches = [next(steps) for _ in range(3)]
    torch.cuda.set_sync_debug_mode("error")
    try:
        for batch in batches:
            run.train_step(batch)
    finally:
        torch.cuda.set_sync_debug_mode("default")
        run.close()


@pytest.mark.parametrize("options", [{}, pytest.param({"bf16_adamw": True}, marks=needs_bf16)])
def test_resume_is_exact_with_deterministic_kernels(tmp_path, options):
    ends = []
    for name, stops in {"whole": (6,), "halves": (3, 6)}.items():
        for stop in stops:
            AcceleratorState._reset_state(reset_partial_state=True)
            recipe = tiny_recipe(tmp_path / name, max_steps=stop, lr_schedule="constant", deterministic=True, **options)
            if stop == stops[0]:
                make_features(recipe)
            trainer.run(recipe, Shard())
        ends.append(checkpoint.load(checkpoint.latest(tmp_path / name / "checkpoints")))
    for name in checkpoint.MODELS:
        assert all(torch.equal(value, ends[1].models[name][key]) for key, value in ends[0].models[name].items())


def test_bad_steps_change_nothing_on_the_device(tmp_path):
    for optimizer in ("adamw", "anyprecision_adamw"):
        AcceleratorState._reset_state(reset_partial_state=True)
        recipe = tiny_recipe(tmp_path / optimizer, optimizer=optimizer)
        make_features(recipe)
        run = trainer.Trainer(recipe)
        steps = run.loader.steps(run.progress)
        run.train_step(next(steps))
        before = {n: {k: v.clone() for k, v in net.module.state_dict().items()} for n, net in run.networks.items()}
        (batch,) = next(steps)
        batch.wave.mul_(float("nan"))
        run.train_step([batch])
        for name, network in run.networks.items():
            assert all(torch.equal(v, before[name][k]) for k, v in network.module.state_dict().items())
        run.close()


def test_batches_copied_ahead_come_whole_and_their_memory_is_not_used_early():
    """While the device is behind the host by several steps."""

    def batch(number):
        values = torch.full((1, 1, 1 << 20), float(number)).pin_memory()
        return Batch(values, values, values, values, values, (number,), (0,), 1.0, 1.0, 0)

    sums = []
    for batches in copied_ahead(([batch(n)] for n in range(1, 41)), torch.device("cuda", 0)):
        torch.cuda._sleep(10_000_000)
        sums.append(sum(t.sum() for t in (batches[0].content, batches[0].f0)))
        del batches
    assert torch.stack(sums).tolist() == [2.0 * n * (1 << 20) for n in range(1, 41)]


def test_out_of_memory_names_a_batch_that_fits(tmp_path):
    recipe = tiny_recipe(tmp_path, batch_size=512, cache_on_device=True)
    make_features(recipe, num_clips=700)
    gc.collect()  # what other tests left would count
    torch.cuda.empty_cache()
    limit = 2e9 / torch.cuda.get_device_properties(0).total_memory
    torch.cuda.set_per_process_memory_fraction(limit)
    try:
        with pytest.raises(StageError, match=r"not enough memory for train\.batch_size 512") as caught:
            trainer.run(recipe, Shard())
        fits = int(re.search(r"train\.batch_size (\d+) would fit", str(caught.value))[1])
        assert 1 <= fits < 512
        caught = None  # its traceback holds the run that failed: a user begins the next in a new process
        gc.collect()
        torch.cuda.empty_cache()
        trainer.run(with_train(recipe, batch_size=fits, max_steps=3), Shard())
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)


def test_compiling_is_judged_by_a_trial(tmp_path):
    recipe = tiny_recipe(tmp_path, fast_train=True, max_steps=2)
    make_features(recipe)
    run = trainer.Trainer(recipe)
    assert run.compiled == {"generator": False, "discriminator": False}, "two steps do not repay it"
    assert compilation.key(recipe.train, run.device, 2)["device"] == torch.cuda.get_device_name()
    run.close()
