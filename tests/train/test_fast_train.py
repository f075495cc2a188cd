"""`fast_train`: each of the six rows of the reference table, by what it sets and what can be seen of it.

What only a GPU shows is in test_gpu.py.
"""

import importlib
import logging
import os
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from accelerate.state import AcceleratorState
from helpers import make_features, tiny_recipe
from launching import ROOT, environment, rvc_dist

from rvc_dist import __main__ as cli
from rvc_dist.config import Recipe, TrainConfig
from rvc_dist.data import denoise
from rvc_dist.features import extract
from rvc_dist.runtime import device as devices
from rvc_dist.stages import STAGES
from rvc_dist.train import compilation, dataset
from rvc_dist.train.loader import loader_settings, make_loader
from rvc_dist.train.sampler import BucketBatchSampler
from rvc_dist.voice import infer
from rvc_dist.workspace import Shard, StageError

CPU, CUDA = torch.device("cpu"), torch.device("cuda", 0)
FAST = TrainConfig(fast_train=True)


@pytest.fixture(autouse=True)
def _switches_put_back(monkeypatch):
    before = (
        torch.backends.cuda.matmul.allow_tf32,
        torch.backends.cudnn.allow_tf32,
        torch.backends.cudnn.benchmark,
        torch.backends.cudnn.deterministic,
    )
    # As torch has them, whatever tests before left on.
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.benchmark = torch.backends.cudnn.deterministic = False
    torch.backends.cudnn.allow_tf32 = True
    for name in (*devices.ALLOCATOR_VARIABLES, "CUBLAS_WORKSPACE_CONFIG"):
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    yield
    torch.use_deterministic_algorithms(False)
    torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = before[:2]
    torch.backends.cudnn.benchmark, torch.backends.cudnn.deterministic = before[2:]


def fake_gpu(monkeypatch, capability, name):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: capability)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: name)


@pytest.mark.parametrize(
    ("capability", "name", "tf32"),
    [
        ((7, 5), "Tesla T4", "not in this hardware"),
        ((8, 0), "NVIDIA A100", "used"),
        ((9, 0), "NVIDIA H100", "used"),
    ],
)
def test_row_1_tf32_on_ampere_and_newer(monkeypatch, capability, name, tf32):
    fake_gpu(monkeypatch, capability, name)
    assert devices.kernel_settings(CUDA)["tf32"] == tf32, "torch lets cuDNN's convolutions use it unless it is told"
    devices.apply_kernel_settings(TrainConfig())
    assert not torch.backends.cudnn.allow_tf32
    assert devices.kernel_settings(CUDA)["tf32"] == "off"
    devices.apply_kernel_settings(FAST)
    settings = devices.kernel_settings(CUDA)
    assert settings["tf32 matmul"] is settings["tf32 cudnn"] is True
    assert (settings["tf32"], settings["device"]) == (tf32, name)
    assert torch.get_float32_matmul_precision() == "high"


def test_row_2_cudnn_searches_for_the_fastest_kernels():
    devices.apply_kernel_settings(FAST)
    assert devices.kernel_settings(CPU)["cudnn.benchmark"] is torch.backends.cudnn.benchmark is True


def test_row_3_kernels_are_not_deterministic_unless_asked_for():
    devices.apply_kernel_settings(FAST)
    assert devices.kernel_settings(CPU)["cudnn.deterministic"] is False
    assert not torch.are_deterministic_algorithms_enabled()
    devices.apply_kernel_settings(TrainConfig(fast_train=True, deterministic=True))
    settings = devices.kernel_settings(CPU)
    assert settings["cudnn.deterministic"] is True
    assert settings["cudnn.benchmark"] is False
    assert torch.are_deterministic_algorithms_enabled()
    assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"


@pytest.mark.parametrize("stage", STAGES)
def test_row_4_every_command_sets_the_allocator_before_its_stage_begins(monkeypatch, stage):
    seen = []
    module = importlib.import_module(STAGES[stage].module)
    monkeypatch.setattr(
        module, STAGES[stage].function, lambda *_, **__: seen.append(os.environ.get("PYTORCH_CUDA_ALLOC_CONF"))
    )
    for config in (TrainConfig(), FAST):
        cli.run_stage(stage, Recipe(train=config), Shard(), {})
    assert seen == [None, "expandable_segments:True"]


def test_row_4_what_is_told_of_the_allocator_is_its_own_word():
    """In a process of its own: importing the trainer must not have started CUDA by then, and it reads but once."""
    script = (
        "import os, torch, rvc_dist.train.trainer\n"
        "from rvc_dist.config import TrainConfig\n"
        "from rvc_dist.runtime.device import allocator_settings, set_allocator\n"
        "set_allocator(TrainConfig(fast_train=True))\n"
        "print(torch.cuda.is_initialized(), allocator_settings(torch.device('cuda')))\n"
        "os.environ['PYTORCH_CUDA_ALLOC_CONF'] = 'max_split_size_mb:512'\n"
        "print(allocator_settings(torch.device('cuda')))\n"
    )
    command = [sys.executable, "-c", script]
    shown = subprocess.run(command, env=environment(), cwd=ROOT, text=True, capture_output=True, check=True).stdout
    assert shown.split() == ["False", "expandable_segments:True", "expandable_segments:True"]
    assert devices.allocator_settings(CPU) == "the system's"


@pytest.mark.parametrize("name", ["PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_HIP_ALLOC_CONF"])
def test_row_4_what_the_user_set_stays(monkeypatch, name):
    """Under any of its names: torch lets the second of them win over the first."""
    monkeypatch.setenv(name, "expandable_segments:True,max_split_size_mb:512")
    devices.set_allocator(FAST)
    assert [n for n in devices.ALLOCATOR_VARIABLES if n in os.environ] == [name]


def test_row_4_other_allocators_are_told_by_name(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_allocator_backend", lambda: "cudaMallocAsync")
    assert devices.allocator_settings(CUDA) == "cudaMallocAsync"


def cores(monkeypatch, mine, launchers, num_ranks=1):
    """This host has `num_ranks` ranks; this one may use so many cores, its launcher so many."""
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(launchers if pid else mine)))
    monkeypatch.setenv("LOCAL_WORLD_SIZE", str(num_ranks))


@pytest.mark.parametrize("given", ["", "3"])
def test_row_5_both_networks_are_compiled_with_cuda_graphs_on_cuda(monkeypatch, given):
    """By as many threads as the rank has cores, or as the user says."""
    options = []
    monkeypatch.setattr(torch, "compile", lambda module, **given: options.append(given) or module)
    cores(monkeypatch, 64, 64, 4)
    monkeypatch.setenv("TORCHINDUCTOR_COMPILE_THREADS", given)
    if not given:
        monkeypatch.delenv("TORCHINDUCTOR_COMPILE_THREADS")
    for device, compile in ((CUDA, "auto"), (CUDA, "graphs"), (CUDA, "always"), (CPU, "auto")):
        compilation.compiled(torch.nn.Linear(1, 1), device, TrainConfig(compile=compile))
    assert [given.pop("dynamic") for given in options] == [False] * 4
    graphs = {"backend": "cudagraphs"}
    by_inductor = ({"options": {"triton.cudagraphs": on}} for on in (True, False))
    assert options == [graphs, graphs, *by_inductor]
    assert os.environ["TORCHINDUCTOR_COMPILE_THREADS"] == (given or "16")
    # That it tries both, and keeps what gains: test_compilation.py.


@pytest.mark.parametrize(
    ("mine", "launchers", "num_ranks", "expected"),
    [
        (12, 12, 1, 6),
        (64, 64, 1, 8),
        (64, 64, 8, 4),  # torchrun: the ranks have them in common
        (8, 64, 8, 4),  # srun --cpus-per-task=8: a rank has its own
        (32, 64, 8, 4),  # bound to one of two NUMA nodes: four ranks have one in common
        (1, 1, 4, 1),
    ],
)
def test_row_6_loader_processes_by_the_cores_that_a_rank_has(monkeypatch, mine, launchers, num_ranks, expected):
    monkeypatch.setattr(os, "cpu_count", lambda: 256)  # of the host: a container or a job has fewer
    cores(monkeypatch, mine, launchers, num_ranks)
    assert loader_settings(FAST, CUDA, cached=False)["num_workers"] == expected
    for given in (0, 1, 3, 20):
        assert loader_settings(replace(FAST, num_workers=given), CUDA, cached=False)["num_workers"] == given


def test_row_6_the_loader(monkeypatch, tmp_path):
    cores(monkeypatch, 12, 12)
    settings = loader_settings(FAST, CUDA, cached=False)
    assert settings == {"num_workers": 6, "prefetch_factor": 16, "pin_memory": True, "persistent_workers": True}
    assert loader_settings(TrainConfig(), CUDA, cached=False)["num_workers"] == 1
    cached = {"num_workers": 0, "prefetch_factor": None, "pin_memory": False, "persistent_workers": False}
    assert loader_settings(FAST, CUDA, cached=True) == cached
    settings |= {"num_workers": 1}  # so many as this machine has
    recipe = tiny_recipe(tmp_path)
    make_features(recipe)
    its_dataset = dataset.ClipDataset(recipe, dataset.ClipTable.load(recipe).train)
    sampler = BucketBatchSampler([80] * len(its_dataset.clips), 2, 1, 0, seed=1)
    loader = make_loader(its_dataset, sampler, settings)
    assert {name: getattr(loader, name) for name in settings} == settings


@pytest.mark.slow
@pytest.mark.distributed
def test_every_rank_has_the_settings_and_they_are_printed_once(tmp_path):
    recipe = tiny_recipe(tmp_path, fast_train=True, max_steps=2)
    make_features(recipe)
    (tmp_path / "recipe.yaml").write_text(recipe.to_yaml())
    output = rvc_dist(2, "train", "--config", tmp_path / "recipe.yaml")
    (line,) = [line for line in output.splitlines() if "2 ranks: tf32" in line]
    for setting in (
        "tf32 matmul True",
        "tf32 cudnn True",
        "cudnn.benchmark True",
        "cudnn.deterministic False",
        "allocator the system's",
        "compiled generator False",
        "compiled discriminator False",
    ):
        assert setting in line
    assert output.count("compile: not for 2 steps of") == 1


def test_stages_that_do_not_train_compute_in_true_float32(monkeypatch, tmp_path):
    """Whatever a training in the same process left on."""
    recipe = tiny_recipe(tmp_path, fast_train=True)
    began = []

    def began_with(*_, **__):
        began.append(devices.kernel_settings(CPU))
        raise StageError("enough")

    monkeypatch.setattr(extract, "clip_fingerprints", lambda _: {})
    monkeypatch.setattr(extract.clip_files, "check_made", lambda *_: None)
    monkeypatch.setattr(extract.Extractor, "load", began_with)
    monkeypatch.setattr(infer.Voice, "load", began_with)
    monkeypatch.setattr(torch.nn.Module, "to", began_with)  # the noise gate
    stages = (
        lambda: denoise.NoiseGate(16000, 0.5),
        lambda: extract.run(recipe, Shard()),
        lambda: infer.Converter.load(recipe),
    )
    for stage in stages:
        devices.apply_kernel_settings(recipe.train)
        with pytest.raises(StageError, match="enough"):
            stage()
    assert [[s[k] for k in ("tf32 matmul", "tf32 cudnn", "cudnn.benchmark")] for s in began] == [[False] * 3] * 3


def test_a_stage_on_a_gpu_says_what_is_set(monkeypatch, caplog):
    fake_gpu(monkeypatch, (8, 0), "NVIDIA A100")
    monkeypatch.setattr(devices, "local_device", lambda: CUDA)
    caplog.set_level(logging.INFO)
    assert devices.compute_exactly("extract") == CUDA
    assert "extract: tf32 off, tf32 matmul False, tf32 cudnn False" in caplog.text
    assert "device NVIDIA A100" in caplog.text
    AcceleratorState._reset_state(reset_partial_state=True)
