"""The doctor finds nothing on a healthy machine, names each fault with its remedy, and leaves no trace."""

from __future__ import annotations

import importlib
import logging
import pickle
import shutil
import socket
import sys
import time
from collections import namedtuple
from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import soundfile
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from helpers import (
    RATE,
    SteadyPitch,
    make_checkpoint,
    make_features,
    make_generator,
    make_ssl_folder,
    narrow_recipe,
    tiny_recipe,
    tone,
    with_train,
)
from huggingface_hub import constants
from launching import ROOT, launch

from rvc_dist import __main__ as cli
from rvc_dist import pipeline
from rvc_dist.choices import F0_METHODS, F0Spec
from rvc_dist.config import DataConfig, ExtractConfig, PreprocessConfig, Recipe, load_recipe
from rvc_dist.data import preprocess
from rvc_dist.features import extract
from rvc_dist.pipeline import DATA_STAGES
from rvc_dist.tools import doctor
from rvc_dist.tools.doctor import data, disk, findings, machine, ranks, training, wire
from rvc_dist.tools.doctor.findings import Fact, Finding, Problem, Severity, Skipped, warning
from rvc_dist.tools.doctor.ranks import DoctorContext, RankGroup
from rvc_dist.train import checkpoint, fingerprint, loader, networks
from rvc_dist.train.dataset import ClipTable
from rvc_dist.train.optimizers import OptimizerState
from rvc_dist.train.progress import Progress
from rvc_dist.workspace import Shard, SourceFile, StageError, Unit, WorkList, Workspace, save_arrays

Usage = namedtuple("Usage", "total used free")
LAUNCHER_VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "SLURM_STEP_NUM_TASKS", "SLURM_PROCID")


@pytest.fixture(autouse=True)
def _alone(monkeypatch):
    for name in LAUNCHER_VARIABLES:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(disk, "MAX_FSYNC_S", 3600.0)  # the disk of a busy test machine may be slow


@pytest.fixture
def recipe(tmp_path) -> Recipe:
    """Of a run whose features exist."""
    recipe = tiny_recipe(tmp_path / "run", batch_size=1, num_workers=1)
    make_features(recipe, num_clips=12)
    return recipe


def file_of(recipe: Recipe) -> str:
    path = Path(recipe.run_dir).with_suffix(".yaml")
    path.write_text(recipe.to_yaml())
    return str(path)


def files_in(folder: Path) -> dict[str, int]:
    return {str(p.relative_to(folder)): p.stat().st_mtime_ns for p in folder.rglob("*") if p.is_file()}


class Found:
    """What a check found on this rank."""

    def __init__(self, found: Iterable[Finding]) -> None:
        found = list(found)
        self.problems = [f for f in found if isinstance(f, Problem)]
        self.facts = {f.name: f.value for f in found if isinstance(f, Fact)}
        self.skipped = "".join(f.why for f in found if isinstance(f, Skipped))


def the_problem(found: Iterable[Finding] | Found, severity: Severity) -> Problem:
    found = found if isinstance(found, Found) else Found(found)
    (problem,) = found.problems
    assert problem.severity == severity
    assert problem.remedy
    return problem


def examined(check, context: DoctorContext) -> Found:
    """What a check finds, its StageError included."""
    (findings,) = doctor.examine(context, [doctor.Check("", check)])
    return Found(findings)


def full(free: int):
    return lambda _: Usage(2 * free, free, free)


# The whole


def test_a_healthy_run_has_no_problem_and_is_left_as_it_was(recipe, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(cli, "set_up_logging", lambda *_: None)
    before = files_in(Path(recipe.run_dir))
    began_at = time.process_time()  # other processes may keep this one waiting
    assert cli.main(["doctor", "--config", file_of(recipe), "--data.audio_dir", str(tmp_path / "none")]) == 0
    assert time.process_time() - began_at < 20
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == f"rvc-dist doctor: tiny in {recipe.run_dir}, 1 rank"
    assert lines[-1].startswith("0 errors, 0 warnings; ")
    states = {line[7:].strip().split("  ")[0]: line.split()[0] for line in lines[1:-1] if line[:1].strip()}
    skipped = dict.fromkeys(("object storage", "recordings", "all-reduce"), "skipped")
    assert states == {check.name: "ok" for check in doctor.CHECKS} | skipped
    assert files_in(Path(recipe.run_dir)) == before


def test_without_data_the_machine_is_checked_and_no_folder_is_left(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(cli, "set_up_logging", lambda *_: None)
    recipe = tiny_recipe(tmp_path / "runs" / "new", batch_size=1)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "recipe.yaml").write_text(recipe.to_yaml())
    assert cli.main(["doctor", "--config", "recipe.yaml"]) == 0
    out = capsys.readouterr().out
    assert "no recipe with data was given" in out
    assert "data made up, batch 1 clip(s) of 50 frames" in out
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(("severity", "code"), [(warning, 3), (findings.error, 1)])
def test_the_exit_code_is_that_of_the_worst_problem(recipe, severity, code, capsys, monkeypatch):
    monkeypatch.setattr(cli, "set_up_logging", lambda *_: None)
    checks = (
        doctor.Check("good", lambda _: iter([Fact("size", "3 GB")])),
        doctor.Check("bad", lambda _: iter([severity("it [hurts]", "rest")])),
        doctor.Check("careful", lambda _: iter([warning("hm", "look")])),
    )
    monkeypatch.setattr(doctor, "CHECKS", checks)
    assert cli.main(["doctor", "--config", file_of(recipe)]) == code
    lines = [line.rstrip() for line in capsys.readouterr().out.splitlines()]
    assert any(line.startswith("ok ") and line.endswith("size 3 GB") for line in lines)
    name = severity.__name__.upper()
    at = next(i for i, line in enumerate(lines) if line.endswith(f"{name}: it [hurts]"))
    assert lines[at + 1].endswith("remedy: rest")


def test_a_check_that_fails_is_told_and_the_next_one_begins(recipe, monkeypatch):
    def lost(_context: DoctorContext) -> Iterator[Finding]:
        yield Fact("half", "done")
        raise StageError("run/clips has no clips:", "run `rvc-dist preprocess` first")

    def unreadable(_context: DoctorContext) -> Iterator[Finding]:
        raise PermissionError(13, "Permission denied", "/a/b")

    checks = (doctor.Check("a", lost), doctor.Check("b", unreadable), doctor.Check("c", lambda _: iter(())))
    monkeypatch.setattr(doctor, "CHECKS", checks)
    first, second, third = doctor.examine(DoctorContext(recipe))
    wanted = (Severity.ERROR, "run/clips has no clips", "run `rvc-dist preprocess` first")
    assert first == [("half", "done", "", False), wanted]
    assert the_problem(second, Severity.ERROR).what == "/a/b: Permission denied"
    assert third == []


@pytest.mark.slow
@pytest.mark.distributed
def test_two_ranks_check_each_other_and_a_rank_that_differs_stands_beside_the_others(recipe, tmp_path):
    def doctor_on_two(*arguments: object, code: int) -> list[str]:
        ended, output = launch(2, ROOT / "tests" / "doctor_on_ranks.py", *arguments).finish(120)
        assert ended == code, output
        return [line.rstrip() for line in output.splitlines()]

    before = files_in(Path(recipe.run_dir))
    healthy = doctor_on_two(file_of(recipe), code=0)
    assert any("0 errors, 0 warnings; " in line for line in healthy)
    assert any("ranks 2, hosts 1, backend gloo" in line for line in healthy)
    assert any("all-reduce" in line and "MB a step" in line for line in healthy)
    assert any("run folder" in line and "shared yes" in line for line in healthy)
    assert sum("rvc-dist doctor" in line for line in healthy) == 1, "only the first rank prints"

    other = tmp_path / "other"
    sick = doctor_on_two(file_of(recipe), other, code=1)
    numpy = machine.installed("numpy")
    assert any(f"ERROR: ranks differ in numpy (rank 0: {numpy}; rank 1: 1.0)" in line for line in sick)
    assert any("ERROR: rank 1: numpy 1.0; rvc_dist needs numpy>=" in line for line in sick)
    assert any("ERROR: ranks differ in run_dir (rank 0: " in line for line in sick)
    assert any(f"ERROR: rank 1: {other}, which rank 0 has, does not exist here" in line for line in sick)
    assert any(line.endswith(f"remedy: {disk.SAME_FOLDER}") for line in sick)
    assert files_in(Path(recipe.run_dir)) == before
    assert not other.exists()


# Findings


def test_runs_of_ranks_are_shortened():
    assert findings.ranks_text([0, 1, 2, 3, 7, 9, 10]) == "0-3, 7, 9-10"
    assert findings.side_by_side(["2.6"] * 7 + ["2.5"]) == "ranks 0-6: 2.6; rank 7: 2.5"


def test_a_verdict_tells_what_differs_and_who_has_a_problem():
    def rank(torch_version: str, host: str, free: float) -> list[Finding]:
        return [Fact("torch", torch_version, alike=True), Fact("host", host), Fact("free", free, "GB")]

    found = [rank("2.6", "a", 1000.0), [*rank("2.6", "a", 1000.0), warning("hot", "cool it")], rank("2.5", "b", 1.5)]
    verdict = findings.verdict("versions", "install the same", found)
    assert verdict.severity == Severity.ERROR
    assert verdict.facts == ("host (ranks 0-1: a; rank 2: b), free 1.5 to 1000 GB")
    assert verdict.problems == (
        (Severity.ERROR, "ranks differ in torch (ranks 0-1: 2.6; rank 2: 2.5)", "install the same"),
        (Severity.WARNING, "rank 1: hot", "cool it"),
    )


def test_a_problem_of_all_ranks_is_told_once():
    lost, everything = findings.error("lost", "look"), Fact("all", "done", alike=True)
    half = Fact("half", "done", alike=True)
    verdict = findings.verdict("x", "", [[half, everything, lost], [everything, lost]])
    assert verdict.problems == ((Severity.ERROR, "lost", "look"),)
    assert verdict.facts == "all done"
    verdict = findings.verdict("x", "", [[half, everything, lost], [everything]])  # it could have found the other half
    assert "ranks differ in half (rank 0: done; rank 1: missing)" in str(verdict.problems)


def test_a_stages_error_ends_with_the_remedy():
    error = StageError("a is damaged and was not used;", "remove a to continue", "\n  b is missing")
    assert str(error) == "a is damaged and was not used; remove a to continue\n  b is missing"
    others = StageError("train.pretrained_g: G.pth does not exist")
    assert [Problem.of(e) for e in (pickle.loads(pickle.dumps(error)), others)] == [
        (Severity.ERROR, "a is damaged and was not used\n  b is missing", "remove a to continue"),
        (Severity.ERROR, "train.pretrained_g: G.pth does not exist", findings.MEND),
    ]


# Ranks


def test_tasks_that_cannot_meet_say_what_to_export(recipe, monkeypatch):
    AcceleratorState._reset_state(reset_partial_state=True)
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "1")
    context = ranks.join(recipe)
    assert (context.group.rank, context.group.count) == (1, 1)
    problem = the_problem([context.not_joined], Severity.ERROR)
    assert "MASTER_ADDR and MASTER_PORT not set" in problem.what
    assert "export MASTER_ADDR=" in problem.remedy
    assert "did not find each other" in examined(training.check_dry_step, context).skipped
    assert "did not find each other" in examined(wire.check_all_reduce, context).skipped


def test_a_rank_without_a_gpu_of_its_own_number_does_not_start(recipe, monkeypatch):
    monkeypatch.setenv("LOCAL_RANK", "2")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    problem = the_problem([ranks.join(recipe).not_joined], Severity.ERROR)
    assert "number 2 (from 0) on its host but sees 2 GPUs" in problem.what
    assert "no more ranks than GPUs" in problem.remedy


def test_a_launcher_whose_ranks_do_not_join_is_told(recipe, monkeypatch):
    def lonely(*_):
        raise StageError("the launcher asked for 2 ranks but 1 joined;", "on CPUs launch with X")

    monkeypatch.setattr(ranks, "make_accelerator", lonely)
    context = ranks.join(recipe)
    problem = the_problem([context.not_joined], Severity.ERROR)
    assert problem.what == "the launcher asked for 2 ranks but 1 joined"
    assert problem.remedy == "on CPUs launch with X"


def test_a_rendezvous_that_fails_is_told(recipe, monkeypatch):
    def unreachable(*_):
        raise RuntimeError("The client socket has timed out after 60000ms (host1, 29500).\nmore")

    monkeypatch.setattr(ranks, "make_accelerator", unreachable)
    problem = the_problem([ranks.join(recipe).not_joined], Severity.ERROR)
    assert problem.what.endswith("(host1, 29500).")
    assert "MASTER_ADDR" in problem.remedy
    assert "NCCL_SOCKET_IFNAME" in problem.remedy


def test_clocks_that_disagree_are_a_warning():
    result = Found(ranks.skewed_clocks([100.0, 104.0, 99.5]))
    assert result.problems == []
    result = Found(ranks.skewed_clocks([100.0, 160.0, 98.0]))
    assert "rank 1 is 62 s ahead of rank 2's" in the_problem(result, Severity.WARNING).what


# The machine


@pytest.mark.parametrize(
    ("cuda", "driver", "works", "severity"),
    [
        ("12.6", True, True, None),
        (None, False, False, None),
        ("12.6", False, False, None),
        (None, True, False, Severity.WARNING),
        ("13.0", True, False, Severity.ERROR),
    ],
)
def test_torch_must_fit_the_driver(cuda, driver, works, severity):
    result = Found(machine.torch_and_driver(cuda, driver, works))
    if severity is None:
        assert result.problems == []
    else:
        assert "torch" in the_problem(result, severity).what


def test_outdated_and_missing_packages_are_named():
    versions = {"torch": "2.5.1", "numpy": "2.0.0"}
    requirements = ["torch>=2.6", "numpy>=1.26", "rich>=13", "faiss-cpu>=1.8; extra == 'cpu'"]
    result = Found(machine.outdated(requirements, lambda name: versions.get(name, "")))
    assert [(p.what, p.remedy) for p in result.problems] == [
        ("torch 2.5.1; rvc_dist needs torch>=2.6", "pip install 'torch>=2.6'"),
        ("rich is not installed; rvc_dist needs rich>=13", "pip install 'rich>=13'"),
    ]


def test_the_packages_of_a_recipe(tmp_path):
    (tmp_path / "audio").mkdir()
    (tmp_path / "audio" / "a.m4a").write_bytes(b"x")
    recipe = replace(
        tiny_recipe(tmp_path / "run", optimizer="lion"),
        data=DataConfig(audio_dir=str(tmp_path / "audio")),
        extract=ExtractConfig(f0_method="hybrid[fcpe+dio+pyin]"),
        preprocess=PreprocessConfig(clean_dataset=True),
    )
    wanted = machine.wanted_packages(DoctorContext(recipe))
    assert set(wanted) == {"faiss", "torchfcpe", "pyworld", "librosa", "noisereduce", "pytorch_optimizer", "av"}
    assert wanted["pyworld"][0] == "pyworld-prebuilt"
    assert wanted["av"] == ("av", "a.m4a in data.audio_dir")
    eight_bit = with_train(recipe, optimizer="adamw_8bit")
    assert "bitsandbytes" in machine.wanted_packages(DoctorContext(eight_bit))
    tracked = with_train(recipe, trackers=("tensorboard", "mlflow"))
    assert machine.wanted_packages(DoctorContext(tracked))["mlflow"] == ("mlflow-skinny", "train.trackers mlflow")


@pytest.mark.parametrize("done", [False, True])
def test_a_missing_package_is_an_error_as_long_as_a_stage_needs_it(recipe, done, monkeypatch):
    def without(name, *_):
        if name in ("torchfcpe", "pytorch_optimizer"):
            raise ImportError(f"No module named '{name}'")
        return real(name)

    real = importlib.import_module
    monkeypatch.setattr(machine.importlib, "import_module", without)
    context = DoctorContext(replace(recipe, extract=ExtractConfig(f0_method="fcpe")), data_stages_done=done)
    result = examined(machine.check_packages, context)
    problem = the_problem(result, Severity.WARNING if done else Severity.ERROR)
    assert problem.what.startswith("extract.f0_method fcpe needs the package torchfcpe")
    assert problem.remedy == "pip install torchfcpe"
    context = DoctorContext(with_train(recipe, optimizer="lion"), data_stages_done=done)
    assert (
        the_problem(examined(machine.check_packages, context), Severity.ERROR).remedy == "pip install pytorch-optimizer"
    )


def test_ranks_on_one_gpu_are_an_error():
    placements = [machine.RankPlacement("a", gpu, 1, frozenset(range(8))) for gpu in ("G0", "G1", "G1")]
    placements.append(machine.RankPlacement("b", "G1", 1, frozenset(range(8))))
    result = Found(machine.shared_placements(placements))
    problem = the_problem(result, Severity.ERROR)
    assert problem.what == "ranks 1-2 compute on the same GPU (G1 of a)"
    assert "one rank a GPU" in problem.remedy


def test_more_threads_than_cores_are_a_warning():
    halves = [machine.RankPlacement("a", "", 4, frozenset(range(at, at + 4))) for at in (0, 4)]
    result = Found(machine.shared_placements(halves))
    assert result.problems == []
    result = Found(machine.shared_placements([s._replace(cores=frozenset(range(4))) for s in halves]))
    problem = the_problem(result, Severity.WARNING)
    assert problem.what == "a: 2 rank(s) have 8 threads for 4 core(s)"
    assert "OMP_NUM_THREADS=2" in problem.remedy


def test_a_gpu_that_others_use_is_a_warning():
    result = Found(machine.crowded_gpu(80 << 30, 1 << 30))
    assert result.problems == []
    result = Found(machine.crowded_gpu(80 * 10**9, 20 * 10**9))
    assert "20.0 of the GPU's 80.0 GB are taken" in the_problem(result, Severity.WARNING).what


def test_an_old_gpu_has_no_bf16(recipe, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (7, 5))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "Tesla T4")
    gpu = RankGroup()
    gpu.device = torch.device("cuda", 0)
    result = examined(machine.check_precision, DoctorContext(with_train(recipe, bf16_adamw=True), gpu))
    problem = the_problem(result, Severity.ERROR)
    assert "Tesla T4 has compute capability 7.5" in problem.what
    assert "train.precision fp16" in problem.remedy
    assert (result.facts["fp16"], result.facts["TF32"]) == ("yes", "no")
    result = examined(machine.check_precision, DoctorContext(with_train(recipe, fast_train=True), gpu))
    assert result.problems == []
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (9, 0))
    result = examined(machine.check_precision, DoctorContext(with_train(recipe, bf16_adamw=True, fast_train=True), gpu))
    assert result.problems == []
    assert (result.facts["bf16"], result.facts["TF32"]) == ("yes", "used")
    result = examined(machine.check_precision, DoctorContext(with_train(recipe, precision="fp16"), gpu))
    assert "has bf16" in the_problem(result, Severity.WARNING).what


# Disk and memory


def test_a_small_shared_memory_names_the_size_that_it_needs(recipe, monkeypatch):
    context = DoctorContext(replace(recipe, train=replace(recipe.train, batch_size=2, num_workers=2)))
    context.table = ClipTable.load(context.recipe)
    # Clips of at most 0.84 s are padded to 100 frames of 240 samples, 16 features and a pitch, with what the windows
    # reach beyond; four steps a worker, and two besides.
    step = 2 * (100 * (240 + 16 + 1) + 2 * context.recipe.rate_spec.reach) * 4
    needed = step * (2 * 4 + 2)
    monkeypatch.setattr(loader.shutil, "disk_usage", full(needed))
    result = examined(training.check_shared_memory, context)
    assert result.problems == []
    assert result.facts["needed"] == needed / 1e6
    monkeypatch.setattr(loader.shutil, "disk_usage", full(needed - 1))
    problem = the_problem(examined(training.check_shared_memory, context), Severity.WARNING)
    assert "3 ahead fit" in problem.what
    monkeypatch.setattr(loader.shutil, "disk_usage", full(4 * step - 1))
    problem = the_problem(examined(training.check_shared_memory, context), Severity.ERROR)
    assert "--shm-size=1g" in problem.remedy
    assert "train.num_workers 0" in problem.remedy
    context.recipe = with_train(context.recipe, num_workers=0)
    assert examined(training.check_shared_memory, context).skipped == "no loader processes"


@pytest.mark.parametrize(("free", "severity"), [(900, Severity.ERROR), (4000, Severity.WARNING), (5000, None)])
def test_a_disk_must_hold_the_checkpoints(free, severity, tmp_path, monkeypatch):
    monkeypatch.setattr(disk.shutil, "disk_usage", full(free * 10**6))
    result = Found(disk.room(tmp_path, one=10**9, total=5 * 10**9))
    if severity is None:
        assert result.problems == []
    else:
        problem = the_problem(result, severity)
        assert f"the disk has {'900 MB' if free == 900 else '4.00 GB'} free" in problem.what
        assert "train.keep_checkpoints" in problem.remedy


def test_checkpoints_that_are_there_need_no_room_again(recipe, monkeypatch):
    context = DoctorContext(recipe)
    examined(training.check_weights, context)
    needs = []
    monkeypatch.setattr(disk, "room", lambda _folder, _one, total: needs.append(total) or iter(()))
    examined(disk.check_disk, context)
    folder = context.work.checkpoints_dir / "step_00000001"
    folder.mkdir(parents=True)
    (folder / "x").write_bytes(bytes(1000))
    examined(disk.check_disk, context)
    weights = sum(p.nbytes for module in context.modules.values() for p in module.parameters())
    generator = sum(p.nbytes for p in context.modules["generator"].parameters())
    assert needs[0] == 5 * (3 * weights + checkpoint.SPARE_BYTES) + 3 * (generator // 2)
    assert needs[1] == needs[0] - 1000


def test_a_file_in_the_place_of_the_run_folder(tmp_path):
    (tmp_path / "run").write_text("in the way")
    result = examined(disk.check_run_folder, DoctorContext(tiny_recipe(tmp_path / "run")))
    problem = the_problem(result, Severity.ERROR)
    assert str(tmp_path / "run") in problem.what
    assert "remove what is in the way" in problem.remedy
    assert (tmp_path / "run").read_text() == "in the way"


def test_a_slow_disk_is_a_warning_and_a_refusing_one_leaves_no_trace(tmp_path, monkeypatch):
    context = DoctorContext(tiny_recipe(tmp_path / "run"))
    monkeypatch.setattr(disk, "MAX_FSYNC_S", 0.0)
    result = examined(disk.check_run_folder, context)
    assert "train.save_every_steps" in the_problem(result, Severity.WARNING).remedy
    assert set(result.facts) == {"write, sync, rename", "writes"}
    assert not (tmp_path / "run").exists()

    def refuse(self, _target):
        raise OSError(1, "Operation not permitted", str(self))

    (tmp_path / "run").mkdir()
    monkeypatch.setattr(Path, "rename", refuse)
    assert "Operation not permitted" in the_problem(examined(disk.check_run_folder, context), Severity.ERROR).what
    assert list((tmp_path / "run").iterdir()) == []


def test_renaming_that_does_not_replace_is_an_error(tmp_path, monkeypatch):
    # As on a filesystem that overwrites in place: who has the old file open sees the new text.
    def overwrite(path: Path, data: bytes | str) -> None:
        path.write_bytes(data.encode() if isinstance(data, str) else data)

    monkeypatch.setattr(disk, "atomic_write", overwrite)
    result = examined(disk.check_run_folder, DoctorContext(tiny_recipe(tmp_path / "run")))
    assert "not atomic" in the_problem(result, Severity.ERROR).what


# Data and weights


def test_what_is_there_before_the_data_stages(tmp_path):
    audio = tmp_path / "audio"
    recipe = replace(tiny_recipe(tmp_path / "run"), data=DataConfig(audio_dir=str(audio), sample_rate=24000))
    assert "does not exist" in the_problem(examined(data.check_data, DoctorContext(recipe)), Severity.ERROR).what
    audio.mkdir()
    (audio / "a.wav").write_bytes(b"x")
    (audio / "b.txt").write_bytes(b"x")
    result = examined(data.check_data, DoctorContext(recipe))
    assert result.facts == {"recordings": "1", "left out": "1"}
    assert result.skipped.endswith("rvc-dist run makes them")
    write_work_list(recipe)
    problem = the_problem(examined(data.check_data, DoctorContext(recipe)), Severity.WARNING)
    assert "no finished features" in problem.what


@pytest.mark.parametrize("planned", [False, True])
def test_recordings_below_the_voices_rate_are_a_warning(tmp_path, planned):
    (tmp_path / "audio").mkdir()
    for rate in (16000, 48000):
        soundfile.write(tmp_path / "audio" / f"{rate}.wav", [0.0] * (60 * rate), rate)
    recordings = DataConfig(audio_dir=str(tmp_path / "audio"), sample_rate=48000)
    context = DoctorContext(replace(tiny_recipe(tmp_path / "run"), data=recordings))
    if planned:  # a recording of two slices is one
        slices = [SourceFile("48000.wav", 0, 1, 1, 30.0, rate=48000, start_s=at) for at in (0.0, 30.0)]
        unit = Unit(0, (SourceFile("16000.wav", 0, 1, 1, 60.0, rate=16000), *slices))
        context.work.clips_dir.mkdir(parents=True, exist_ok=True)
        context.work.work_list_file.write_text(WorkList("", {}, (unit,), ()).dumps())
        shutil.rmtree(tmp_path / "audio")
    problem = examined(data.check_data, context).problems[0]
    assert problem.severity == Severity.WARNING
    assert problem.what.startswith("1 of 2 recordings (1.0 of 2.0 min) have a rate below data.sample_rate 48000")
    assert problem.remedy == "set data.sample_rate 24000, or give recordings of 48000 Hz"


def write_work_list(recipe: Recipe) -> WorkList:
    """For the four units of `recipe`'s twelve clips."""
    work_list = WorkList("listing", {}, tuple(Unit(i, ()) for i in range(4)), ())
    work = Workspace(recipe.run_dir, recipe.name)
    work.clips_dir.mkdir(parents=True, exist_ok=True)
    work.work_list_file.write_text(work_list.dumps())
    return work_list


def test_features_of_other_clips_or_settings_are_a_warning(recipe):
    context, work = DoctorContext(recipe), Workspace(recipe.run_dir, recipe.name)
    work_list = write_work_list(recipe)
    problem = the_problem(examined(data.check_data, context), Severity.WARNING)
    assert "4 of 4 units are missing or stale" in problem.what
    assert "rvc-dist preprocess" in problem.remedy
    for unit in work_list.units:
        save_arrays(work.clips_file(unit.id), {}, {"stamp": unit.fingerprint({}), "sample_rate": 24000, "clips": []})
    problem = the_problem(examined(data.check_data, context), Severity.WARNING)
    assert "were made with other settings, or of other clips" in problem.what
    assert not context.data_stages_done


def test_missing_features_damaged_files_and_another_rate(recipe):
    work = Workspace(recipe.run_dir, recipe.name)
    work.clips_file(1).unlink()
    work.clips_file(2).write_bytes(b"damaged")
    problem = the_problem(examined(data.check_data, DoctorContext(recipe)), Severity.ERROR)
    assert "2 of 4 clips files are missing or damaged (00001.safetensors, 00002.safetensors)" in problem.what
    assert "preprocess" in problem.remedy
    other_rate = replace(recipe, data=replace(recipe.data, sample_rate=48000))
    problem = the_problem(examined(data.check_data, DoctorContext(other_rate)), Severity.ERROR)
    assert "24000 Hz" in problem.what
    assert problem.remedy.startswith("run `rvc-dist preprocess`")
    work.features_file(3).write_bytes(b"damaged")
    problem = the_problem(examined(data.check_data, DoctorContext(recipe)), Severity.ERROR)
    assert "00003.safetensors is damaged" in problem.what


def test_a_global_batch_too_large_for_the_data_is_a_warning(recipe):
    context = DoctorContext(with_train(recipe, batch_size=2, grad_accum_steps=2))
    problem = the_problem(examined(data.check_data, context), Severity.WARNING)
    assert problem.what == "the global batch of 4 is more than a quarter of the 10 clips"


def test_pretrained_weights_that_do_not_fit(recipe, tmp_path):
    file = tmp_path / "G.pth"
    result = examined(training.check_weights, DoctorContext(with_train(recipe, pretrained_g=str(file))))
    assert "does not exist" in the_problem(result, Severity.ERROR).what
    torch.save({"model": {"emb_g.weight": torch.zeros(1, 7)}}, file)
    context = DoctorContext(with_train(recipe, pretrained_g=str(file)))
    context.table = ClipTable.load(recipe)
    assert (
        "does not fit this recipe's network"
        in the_problem(examined(training.check_weights, context), Severity.ERROR).what
    )
    assert examined(training.check_dry_step, context).skipped == "the networks could not be built"


def test_one_pretrained_network_of_two_is_a_warning(recipe, tmp_path, caplog):
    context = DoctorContext(recipe, table=ClipTable.load(recipe))
    _, modules = networks.build(recipe, context.table)
    torch.save({"model": modules["discriminator"].state_dict()}, tmp_path / "D.pth")
    context.recipe = with_train(recipe, pretrained_d=str(tmp_path / "D.pth"))
    with caplog.at_level(logging.ERROR):
        result = examined(training.check_weights, context)
    assert result.facts["begins with"] == "D.pth"
    assert "train.pretrained_g is not set" in the_problem(result, Severity.WARNING).what


def test_a_damaged_checkpoint_and_one_of_another_recipe(recipe):
    context = DoctorContext(recipe, table=ClipTable.load(recipe))
    shape, modules = networks.build(recipe, context.table)
    saved = checkpoint.Checkpoint(
        progress=Progress(step=7),
        identity=networks.identity(recipe, shape, context.table),
        models={name: module.state_dict() for name, module in modules.items()},
        optimizers={name: OptimizerState({}, []) for name in checkpoint.MODELS},
    )
    path = checkpoint.save(context.work.checkpoints_dir, saved)
    result = examined(training.check_weights, context)
    assert result.problems == []
    assert result.facts["begins with"] == "step_00000007"
    other = DoctorContext(with_train(recipe, bf16_adamw=True), table=context.table)
    problem = the_problem(examined(training.check_weights, other), Severity.ERROR)
    assert "optimizer: adamw, now anyprecision_adamw" in problem.what
    assert "another run_dir" in problem.remedy
    (path / "generator.safetensors").write_bytes(b"damaged")
    problem = the_problem(examined(training.check_weights, context), Severity.ERROR)
    assert "is damaged" in problem.what
    assert "generator.safetensors has 7 bytes" in problem.what


# A step, and the network


def on_cpu() -> RankGroup:
    AcceleratorState._reset_state(reset_partial_state=True)
    return RankGroup(accelerator=Accelerator(cpu=True))


def test_the_dry_step_is_a_whole_step_of_the_recipe(recipe):
    context = DoctorContext(
        with_train(recipe, bf16_adamw=True, grad_accum_steps=3), on_cpu(), table=ClipTable.load(recipe)
    )
    examined(training.check_weights, context)
    before = {name: p.detach().clone() for name, p in context.modules["generator"].named_parameters()}
    generator = context.modules["generator"]
    result = examined(training.check_dry_step, context)
    assert result.problems == []
    assert any(not torch.equal(p, before[name]) for name, p in generator.named_parameters()), "weights are updated"
    assert 0 < result.facts["mel loss"] < 10
    seconds = result.facts["took"]
    assert context.step_s == pytest.approx(3 * seconds)
    assert result.facts["batch"] == "1 clip(s) of 100 frames"


def test_a_step_that_is_not_finite_is_an_error(recipe):
    context = DoctorContext(recipe, on_cpu(), table=ClipTable.load(recipe))
    examined(training.check_weights, context)
    with torch.no_grad():
        next(context.modules["generator"].parameters()).fill_(float("nan"))
    problem = the_problem(examined(training.check_dry_step, context), Severity.ERROR)
    assert "not finite" in problem.what
    assert "loss/g_total" in problem.what
    assert "fp32" in problem.remedy


def test_a_clip_that_cannot_be_read_is_an_error(recipe):
    context = DoctorContext(recipe, on_cpu(), table=ClipTable.load(recipe))
    examined(training.check_weights, context)
    for unit in range(4):
        save_arrays(context.work.clips_file(unit), {}, {"stamp": "tiny"})
    problem = the_problem(examined(training.check_dry_step, context), Severity.ERROR)
    assert "cannot be read" in problem.what


def test_a_step_that_runs_out_of_memory_is_an_error(recipe, monkeypatch):
    def greedy(_step, _batches):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")

    context = DoctorContext(recipe, on_cpu(), table=ClipTable.load(recipe))
    examined(training.check_weights, context)
    monkeypatch.setattr(training.GanStep, "__call__", greedy)
    monkeypatch.setattr(training.out_of_memory, "remedy", lambda *_: "train.batch_size 3 would fit")
    problem = the_problem(examined(training.check_dry_step, context), Severity.ERROR)
    assert "not enough memory" in problem.what.replace("has not enough", "not enough")
    assert "train.batch_size 3 would fit" in problem.what + problem.remedy


def test_wrong_sums_are_found():
    pattern = torch.arange(1000) % 3 + 1
    for dtype in (torch.float32, torch.bfloat16):
        total = (pattern * 6).to(dtype)  # ranks 0, 1 and 2 gave 1, 2 and 3 times the pattern
        assert not list(wire.wrong_sum(total, pattern, 3))
        total[17] = 0.0
        assert "off by up to 100 %" in the_problem(wire.wrong_sum(total, pattern, 3), Severity.ERROR).what
        the_problem(wire.wrong_sum(total.fill_(float("nan")), pattern, 3), Severity.ERROR)


def test_the_bytes_of_a_steps_gradients(recipe):
    table = ClipTable.load(recipe)
    shape, modules = networks.build(recipe, table)
    real = sum(p.nbytes for module in modules.values() for p in module.parameters() if p.requires_grad)
    assert wire.gradient_bytes(DoctorContext(recipe, shape=shape)) == real
    assert wire.gradient_bytes(DoctorContext(with_train(recipe, grad_compression="bf16"), shape=shape)) == real // 2
    assert wire.gradient_bytes(DoctorContext(Recipe())) == pytest.approx(436e6, rel=0.005)


def test_a_network_slower_than_the_device_is_a_warning(recipe):
    assert not [*wire.slow_network(0.5, 1.0, recipe), *wire.slow_network(0.5, None, recipe)]
    problem = the_problem(wire.slow_network(2.0, 1.0, recipe), Severity.WARNING)
    assert "takes 2.00 s, computing it 1.00 s" in problem.what
    assert "train.grad_compression bf16" in problem.remedy


def test_an_all_reduce_that_fails_is_told(recipe, monkeypatch):
    def broken(*_):
        raise RuntimeError("NCCL error: unhandled system error\nmore")

    two = RankGroup()
    two.count = 2
    monkeypatch.setattr(wire, "summed", broken)
    monkeypatch.setattr(wire.dist, "get_backend", lambda: "nccl")
    problem = the_problem(examined(wire.check_all_reduce, DoctorContext(recipe, two)), Severity.ERROR)
    assert problem.what == "all-reduce over nccl fails: NCCL error: unhandled system error"
    assert "NCCL_DEBUG" in problem.remedy


def test_a_rank_that_does_not_answer_leaves_the_others_alone(monkeypatch):
    def silent(*_args, **_options):
        raise RuntimeError("Timed out waiting 60000ms for recv operation to complete")

    two = RankGroup()
    two.count, two._group = 2, SimpleNamespace()
    monkeypatch.setattr(ranks.dist, "all_gather_object", silent)
    with pytest.raises(StageError, match="a rank did not answer within 60 s"):
        two.gather(1)
    assert two.gather(2) == [2]
    assert two.count == 1


# Before the first stage of a run


@pytest.fixture
def new_run(tmp_path, monkeypatch) -> Recipe:
    """Of recordings of two speakers alone, with an encoder in a folder."""
    for speaker in (0, 1):
        folder = tmp_path / "audio" / str(speaker)
        folder.mkdir(parents=True)
        soundfile.write(folder / "a.wav", tone(4.0), RATE)
    monkeypatch.setitem(F0_METHODS, "pyin", F0Spec(SteadyPitch))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    make_ssl_folder(tmp_path / "encoder", "Hubert", num_layers=1)
    return narrow_recipe(tmp_path, extract=ExtractConfig(f0_method="pyin", embedder_model=str(tmp_path / "encoder")))


def test_a_run_that_lacks_nothing_begins_and_looks_no_more_once_its_data_is_made(new_run, tmp_path, monkeypatch):
    doctor.look_ahead(new_run)
    assert not Path(new_run.run_dir).exists()
    for stage in DATA_STAGES:
        importlib.import_module(f"rvc_dist.{stage}").run(new_run, Shard())
    shutil.rmtree(tmp_path / "encoder")
    doctor.look_ahead(new_run)
    extract.run(new_run, Shard())  # nor does the stage need what made the features that it has
    with pytest.raises(StageError, match="encoder is no folder"):
        extract.run(replace(new_run, extract=replace(new_run.extract, f0_max=1000.0)), Shard())
    context = DoctorContext(new_run)
    examined(data.check_data, context)
    assert examined(data.check_encoder, context).facts == {new_run.extract.embedder_model: "not needed any more"}
    shutil.rmtree(context.work.index_dir)  # which needs faiss, but neither encoder nor tracker
    doctor.look_ahead(new_run)
    with monkeypatch.context() as without:
        without.setitem(sys.modules, "faiss", None)
        with pytest.raises(StageError, match=r"for want of 1 thing.*\n  the index stage needs the package faiss"):
            doctor.look_ahead(new_run)
    soundfile.write(tmp_path / "audio" / "1" / "b.wav", tone(4.0), RATE)  # needs the encoder again
    with pytest.raises(StageError, match=r"for want of 1 thing.*\n  extract\.embedder_model: .*encoder is no folder"):
        doctor.look_ahead(new_run)


def test_all_that_a_run_lacks_is_told_at_once_before_anything_is_made(new_run, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "faiss", None)
    monkeypatch.setattr(disk.shutil, "disk_usage", full(10**6))
    torch.save({"model": {"enc_q.x": torch.zeros(1)}}, tmp_path / "G.pth")
    recipe = with_train(
        replace(new_run, extract=ExtractConfig(f0_method="hybrid[rmvpe+yin]", embedder_model="contentvec")),
        pretrained_g=str(tmp_path / "G.pth"),
        pretrained_d=str(tmp_path / "D48k.pth"),
        eval_reference=str(tmp_path / "song.wav"),
    )
    with pytest.raises(StageError) as caught:
        pipeline.run(recipe, Shard())
    told = str(caught.value)
    for part in (
        "faiss-cpu",
        "the encoder contentvec cannot be had",
        "--extract.embedder_model FOLDER",
        "the weights of rmvpe",
        "train.pretrained_g: ",
        "holds no generator (no emb_g.weight)",
        "D48k.pth does not exist",
        "song.wav is no file",
        "/dev/shm has 1 MB free",
        "the disk has 1 MB free",
    ):
        assert part in told, part
    assert "for want of 9 thing" in told
    assert not Path(recipe.run_dir).exists()


def test_other_recordings_in_a_trained_run_are_refused_before_anything_is_replaced(new_run):
    """Of the same names and sizes, as another speaker's take of the same text may be."""
    soundfile.write(Path(new_run.data.audio_dir, "1", "a.wav"), tone(4.0, f0_hz=180.0), RATE)
    for stage in DATA_STAGES:
        importlib.import_module(f"rvc_dist.{stage}").run(new_run, Shard())
    folder, work = Path(new_run.data.audio_dir), Workspace(new_run.run_dir, new_run.name)
    saved = make_checkpoint(new_run, make_generator(new_run, content_channels=16, num_speakers=2))
    saved = replace(saved, data=fingerprint.of_data(new_run, ClipTable.load(new_run)))
    checkpoint.save(work.checkpoints_dir, saved)
    before = files_in(work.root)
    for speaker in (0, 1):
        soundfile.write(folder / str(speaker) / "a.wav", tone(4.0, f0_hz=200.0 + speaker), RATE)
    context = DoctorContext(new_run)
    assert not data.features_done(context)
    problem = the_problem(examined(data.check_recordings, context), Severity.ERROR)
    assert problem.what.endswith(
        "was trained on other recordings (2 (0/a.wav, 1/a.wav)) than those that are there now "
        "(2 (0/a.wav, 1/a.wav)): none is the same"
    )
    assert problem.remedy.startswith("Give the new voice another run_dir")
    for refused in (doctor.look_ahead, lambda r: preprocess.run(r, Shard()), lambda r: pipeline.run(r, Shard())):
        with pytest.raises(StageError, match=r"other recordings.*\n?.*none is the same"):
            refused(new_run)
    assert files_in(work.root) == before
    soundfile.write(folder / "0" / "b.wav", tone(4.0), RATE)  # one that it knows, by another name
    assert not examined(data.check_recordings, DoctorContext(new_run)).problems
    preprocess.run(new_run, Shard())
    assert files_in(work.clips_dir) != before


def test_training_alone_does_not_change_where_the_clips_are_from(new_run, tmp_path, caplog):
    work = Workspace(new_run.run_dir, new_run.name)
    preprocess.run(new_run, Shard())
    elsewhere = replace(new_run, data=replace(new_run.data, audio_dir=str(tmp_path / "elsewhere")))
    extract.run(elsewhere, Shard())
    assert load_recipe(work.config_file) == new_run
    work.save_recipe(with_train(elsewhere, max_steps=7))
    assert load_recipe(work.config_file) == with_train(new_run, max_steps=7)
    assert caplog.text.count("data.audio_dir: the clips were cut from") == 2
    (tmp_path / "audio").rename(tmp_path / "elsewhere")
    preprocess.run(elsewhere, Shard())
    assert load_recipe(work.config_file) == elsewhere, "the recordings moved"


def test_the_dataset_is_walked_once(new_run, monkeypatch):
    walked = []
    monkeypatch.setattr(ranks, "list_sources", lambda *a, walk=ranks.list_sources: walked.append(a) or walk(*a))
    doctor.look_ahead(new_run)
    assert len(walked) == 1
    assert not examined(data.check_data, DoctorContext(new_run)).problems
    assert len(walked) == 2


@pytest.mark.parametrize(("rank", "local_rank", "looks"), [(0, "0", [True]), (2, "0", [False]), (3, "1", [])])
def test_the_first_rank_of_each_host_looks(new_run, monkeypatch, rank, local_rank, looks):
    looked = []
    stage = SimpleNamespace(run=lambda *_: None, look_ahead=lambda _, is_first, trains_here: looked.append(is_first))
    monkeypatch.setenv("LOCAL_RANK", local_rank)
    monkeypatch.setattr(pipeline, "DATA_STAGES", ())
    monkeypatch.setattr(pipeline.importlib, "import_module", lambda _name: stage)
    pipeline.run(new_run, Shard(rank, 4))
    assert looked == looks


def test_who_only_looks_begins_nothing_and_does_not_judge_the_machine_for_those_that_train(new_run, monkeypatch):
    monkeypatch.setattr(loader.shutil, "disk_usage", lambda path: Usage(1, 1, 1 if path == loader.SHM else 10**12))
    with pytest.raises(StageError, match="/dev/shm has 0 MB free"):
        pipeline.run(new_run, Shard())
    pipeline.run(new_run, Shard(), only_look=True)
    assert not Path(new_run.run_dir).exists()


def test_another_host_that_lacks_the_encoder_is_named_and_its_disk_is_not_looked_at(new_run, tmp_path, monkeypatch):
    monkeypatch.setattr(disk.shutil, "disk_usage", full(10**6))
    shutil.rmtree(tmp_path / "encoder")
    monkeypatch.setenv("LOCAL_RANK", "0")
    with pytest.raises(StageError) as caught:
        pipeline.run(new_run, Shard(1, 2))
    told = str(caught.value)
    assert told.startswith(f"{socket.gethostname()}: nothing was begun, since the run would fail later for want of ")
    assert "encoder is no folder" in told
    assert "the disk has" not in told


def test_pretrained_weights_are_compared_with_the_encoder_before_there_are_features(new_run, tmp_path):
    table = data.stand_in_table(DoctorContext(new_run, embedder={"name": "x", "width": 768}))
    assert (table.num_speakers, table.content_channels) == (2, 768)
    _, modules = networks.build(new_run, table)
    torch.save({"model": modules["generator"].state_dict()}, tmp_path / "G48k.pth")
    torch.save({"model": modules["discriminator"].state_dict()}, tmp_path / "D48k.pth")
    recipe = with_train(new_run, pretrained_g=str(tmp_path / "G48k.pth"), pretrained_d=str(tmp_path / "D48k.pth"))
    with pytest.raises(StageError, match=r"enc_p\.emb_phone\.weight: \[16, 768\], this network has \[16, 16\]"):
        doctor.look_ahead(recipe)
    context = DoctorContext(with_train(recipe, pretrained_g=None))
    problems = examined(training.check_weights, context).problems
    assert any("D48k.pth is of 48 kHz by its name, the voice is of 24000 Hz" in p.what for p in problems)


def test_room_is_asked_for_in_seconds_of_recordings(new_run):
    context = DoctorContext(new_run, embedder={"name": "x", "width": 16})
    data, vectors = disk.data_bytes(context)
    seconds = 8.0 / 0.9  # clips of 3 s overlap by 0.3
    assert data == pytest.approx(seconds * (RATE + 50 * 16 + 100) * 4)
    assert vectors == pytest.approx(2 * seconds * 50 * 16 * 4)
