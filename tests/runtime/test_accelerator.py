"""Ranks, kernel settings, capability rules, and that a step on several ranks equals one on a single rank."""

import os
import queue
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from contextlib import ExitStack, nullcontext
from types import SimpleNamespace

import psutil
import pytest
import torch
import torch.distributed as dist
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from helpers import make_features, tiny_recipe
from launching import TIMEOUT_S, launch, rvc_dist
from torch import nn

from rvc_dist.config import TrainConfig
from rvc_dist.runtime import accelerator
from rvc_dist.runtime import device as devices
from rvc_dist.runtime.logs import rank_log
from rvc_dist.train import checkpoint
from rvc_dist.workspace import OtherRankError, Shard, StageError, Stopped, Workspace

pytestmark = pytest.mark.usefixtures("thin_ranks")


def test_ranks_with_different_settings_are_listed_side_by_side(monkeypatch):
    AcceleratorState._reset_state(reset_partial_state=True)
    mine = devices.kernel_settings(torch.device("cpu"))
    monkeypatch.setattr(accelerator, "gather_object", lambda _: [mine, mine | {"torch": "1.0"}])
    with pytest.raises(StageError) as caught:
        accelerator.check_same_settings(Accelerator(cpu=True), {})
    assert str({0: torch.__version__, 1: "1.0"}) in str(caught.value)


def test_only_connections_to_other_machines_break_when_nothing_answers(monkeypatch):
    """127.0.0.2 is another address than 127.0.0.1, as another machine's is."""
    kernel = socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT
    with ExitStack() as stack:
        ends = []
        for address in ("127.0.0.1", "127.0.0.2"):
            server = stack.enter_context(socket.create_server((address, 0)))
            ends.append(stack.enter_context(socket.create_connection(server.getsockname(), 5, ("127.0.0.1", 0))))
        stack.enter_context(socket.socketpair()[0])
        accelerator.notice_lost_machines()
        assert [end.getsockopt(*kernel) for end in ends] == [0, 0], "nobody asked for it"
        monkeypatch.setenv("RVC_DIST_LOST_AFTER_S", "15")
        num_open = len(os.listdir("/proc/self/fd"))
        accelerator.notice_lost_machines()
        assert len(os.listdir("/proc/self/fd")) == num_open
        assert [end.getsockopt(*kernel) for end in ends] == [0, 15000]
        assert [end.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE) for end in ends] == [0, 1]
    for wrong in ("soon", "1", "-5", "1e9"):
        monkeypatch.setenv("RVC_DIST_LOST_AFTER_S", wrong)
        with pytest.raises(StageError, match=f"RVC_DIST_LOST_AFTER_S: got '{wrong}', expected seconds of at least 3"):
            accelerator.notice_lost_machines()


GTX_1080, TITAN_V, T4, A100, H100 = (6, 1), (7, 0), (7, 5), (8, 0), (9, 0)


@pytest.mark.parametrize(
    ("precision", "capability", "outcome"),
    [
        ("bf16", GTX_1080, "bf16 needs 8.0 .* Set train.precision fp32"),
        ("fp16", GTX_1080, "fp16 needs 7.0 .* Set train.precision fp32"),
        ("bf16", TITAN_V, "bf16 needs 8.0 .* Set train.precision fp16"),
        ("bf16", T4, r"Card has compute capability 7\.5; bf16 needs 8.0 .* Set train.precision fp16"),
        ("fp16", A100, "advice: Card has bf16, as fast as fp16 .* set bf16"),
        ("fp16", None, "advice: fp16 on a CPU is for tests, .* set fp32 or bf16"),
        *[("bf16", fitting, "") for fitting in (A100, H100, None)],
        *[("fp16", fitting, "") for fitting in (TITAN_V, T4)],
        *[("fp32", fitting, "") for fitting in (GTX_1080, T4, H100, None)],
    ],
)
def test_a_precision_is_refused_or_advised_against_by_the_hardware(monkeypatch, precision, capability, outcome):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: capability)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "Card")
    device = torch.device("cuda", 0) if capability else torch.device("cpu")
    try:
        advice = devices.check_precision(precision, device)
        found = " ".join(advice).replace("train.precision", "advice") if advice else ""
    except StageError as refused:
        found = str(refused)
    assert re.search(outcome, found) if outcome else found == ""


@pytest.mark.parametrize(
    ("kind", "has", "precision", "outcome"),
    [
        ("mps", False, "bf16", "macOS before 14 has no bf16 .* Set train.precision fp16"),
        ("mps", True, "bf16", ""),
        ("mps", False, "fp16", ""),
        ("xpu", False, "bf16", "Card has no bf16. Set train.precision fp16"),
        ("xpu", True, "bf16", ""),
        ("cuda", "gfx1030", "bf16", "Card is of gfx1030, which has no instructions for bf16. Set train.precision fp16"),
        ("cuda", "gfx906:sramecc+:xnack-", "fp16", ""),
        ("cuda", "gfx90a:sramecc+:xnack-", "bf16", ""),
        ("cuda", "gfx942", "fp16", "advice: Card has bf16"),
    ],
)
def test_other_backends_know_their_precisions(monkeypatch, kind, has, precision, outcome):
    """An AMD GPU passes for CUDA, with a capability that is no NVIDIA's: (9, 0) for gfx906 too."""
    monkeypatch.setattr(torch.version, "hip", "7.0" if kind == "cuda" else None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (9, 0))
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: SimpleNamespace(gcnArchName=has))
    monkeypatch.setattr(torch.xpu, "is_bf16_supported", lambda including_emulation: has)
    monkeypatch.setattr(torch.backends.mps, "is_macos_or_newer", lambda *_: has)
    for module in (torch.cuda, torch.xpu):
        monkeypatch.setattr(module, "get_device_name", lambda _: "Card")
    device = torch.device(kind, 0)
    assert not devices.has_tf32(device)
    try:
        found = " ".join(devices.check_precision(precision, device) or ()).replace("train.precision", "advice")
    except StageError as refused:
        found = str(refused)
    assert re.search(outcome, found) if outcome else found == ""


@pytest.mark.parametrize(
    ("there", "environment", "chosen"),
    [
        ((), {}, "cpu"),
        (("cuda",), {"LOCAL_RANK": "5"}, "cuda:1"),
        (("xpu",), {"LOCAL_RANK": "1"}, "xpu:1"),
        (("mps",), {}, "mps"),
        (("cuda", "mps"), {"ACCELERATE_USE_CPU": "true"}, "cpu"),
    ],
)
def test_the_device_of_every_stage_is_the_one_that_accelerate_chooses(monkeypatch, there, environment, chosen):
    """So that extraction does not begin on a GPU that training is told to leave alone."""
    AcceleratorState._reset_state(reset_partial_state=True)
    monkeypatch.setattr("accelerate.state.is_xpu_available", lambda: "xpu" in there)  # which it remembers
    monkeypatch.delenv("ACCELERATE_USE_CPU", raising=False)
    for kind, module in (("cuda", torch.cuda), ("xpu", torch.xpu)):
        monkeypatch.setattr(module, "device_count", lambda: 4)
        monkeypatch.setattr(module, "is_available", lambda kind=kind: kind in there)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: "mps" in there)
    monkeypatch.setattr(torch.backends.mps, "is_built", lambda: "mps" in there)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    device = devices.local_device()
    assert device == torch.device(chosen)
    monkeypatch.delenv("LOCAL_RANK", raising=False)  # else it would look for the other ranks
    assert Accelerator().device.type == device.type
    AcceleratorState._reset_state(reset_partial_state=True)


def test_what_a_backend_cannot_do_is_said_at_the_start(monkeypatch):
    monkeypatch.delenv("ACCELERATE_USE_CPU", raising=False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    devices.check_backend(TrainConfig(fast_train=True), 1)
    with pytest.raises(StageError, match=r"2 ranks were started, .* no collective for MPS; train on one device"):
        devices.check_backend(TrainConfig(), 2)
    with pytest.raises(StageError, match=r"train\.compile: networks are not compiled on MPS"):
        devices.check_backend(TrainConfig(compile="always"), 1)
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    devices.check_backend(TrainConfig(compile="always"), 2)
    monkeypatch.setattr(devices, "local_device", lambda: torch.device("xpu", 0))
    for has_xccl in (True, False):
        monkeypatch.setattr(dist, "is_xccl_available", lambda has_xccl=has_xccl: has_xccl)
        with nullcontext() if has_xccl else pytest.raises(StageError, match="no collective for XPU"):
            devices.check_backend(TrainConfig(), 2)


@pytest.mark.parametrize("kind", [StageError, ValueError])
def test_an_error_of_the_first_rank_is_told_to_the_others_whatever_its_kind(kind):
    """They would wait for it until their timeout."""
    told = []
    ranks = [
        SimpleNamespace(is_main_process=is_main, device="cpu", reduce=lambda flag: told.append(flag.item()) or flag)
        for is_main in (True, False)
    ]

    def fail():
        raise kind("its reason")

    with pytest.raises(kind, match="its reason"):
        accelerator.on_first_rank(ranks[0], fail)
    assert told == [2]
    assert not accelerator.on_first_rank(ranks[1], fail), "not its work"
    assert accelerator.on_first_rank(ranks[0], lambda: "something")
    ranks[1].reduce = lambda flag: torch.full_like(flag, 2)
    with pytest.raises(OtherRankError, match="rank 0 failed"):
        accelerator.on_first_rank(ranks[1], fail)


def test_a_missing_rank_is_noticed(monkeypatch):
    AcceleratorState._reset_state(reset_partial_state=True)
    alone = Accelerator(cpu=True)
    monkeypatch.setattr(accelerator, "Accelerator", lambda **_: alone)
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    with pytest.raises(StageError, match="2 ranks were started, which cannot find each other: MASTER_PORT not set"):
        accelerator.make_accelerator(TrainConfig())
    monkeypatch.setenv("MASTER_PORT", "29500")
    with pytest.raises(StageError, match="asked for 2 ranks but 1 joined"):
        accelerator.make_accelerator(TrainConfig())


@pytest.fixture
def fake_gpus(monkeypatch):
    """Rank 3 of 4 on a host, of whose GPUs this task sees some; what DDP and barriers are given."""
    given = SimpleNamespace(visible=1, ddp=[], barrier=[])
    AcceleratorState._reset_state(reset_partial_state=True)
    launched = {"RANK": "3", "LOCAL_RANK": "3", "WORLD_SIZE": "4", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}
    for name, value in launched.items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("ACCELERATE_USE_CPU", raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: given.visible)
    monkeypatch.setattr(torch.cuda, "set_device", lambda _: None)
    monkeypatch.setattr(dist, "is_initialized", lambda: True)
    monkeypatch.setattr(dist, "get_world_size", lambda: 4)
    monkeypatch.setattr(dist, "get_rank", lambda: 3)
    monkeypatch.setattr(dist, "barrier", lambda device_ids: given.barrier.append(device_ids))
    monkeypatch.setattr(nn.Module, "to", lambda module, _: module)
    monkeypatch.setattr(
        nn.parallel,
        "DistributedDataParallel",
        lambda module, device_ids, output_device, **_: given.ddp.append((device_ids, output_device)) or module,
    )
    yield given
    AcceleratorState._reset_state(reset_partial_state=True)


def test_a_lone_ranks_gpu_has_a_number(monkeypatch):
    """Accelerate calls it "cuda", and torch's allocator answers no question about that."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.delenv("ACCELERATE_USE_CPU", raising=False)
    AcceleratorState._reset_state(reset_partial_state=True)
    try:
        assert accelerator.make_accelerator(TrainConfig()).device == torch.device("cuda", 0)
    finally:
        AcceleratorState._reset_state(reset_partial_state=True)


@pytest.mark.parametrize(("visible", "index"), [(1, 0), (4, 3)])
def test_ddp_and_barriers_get_the_number_of_the_ranks_device(fake_gpus, visible, index):
    """Under `srun --gpus-per-task=1` that is not the rank's number on its host; so does DeepSpeed, by LOCAL_RANK."""
    fake_gpus.visible = visible
    made = accelerator.make_accelerator(TrainConfig())
    made.prepare_model(nn.Linear(1, 1))
    made.wait_for_everyone()
    assert made.device == devices.local_device() == torch.device("cuda", index)
    assert fake_gpus.ddp == [([index], index)]
    assert fake_gpus.barrier == [[index]]
    assert os.environ["LOCAL_RANK"] == str(index)
    assert (made.process_index, made.num_processes) == (3, 4)


def test_more_ranks_than_gpus_are_refused(fake_gpus, monkeypatch):
    fake_gpus.visible = 3
    with pytest.raises(StageError, match=r"number 3 \(from 0\) on its host but sees 3 GPUs"):
        accelerator.make_accelerator(TrainConfig())
    store = dist.HashStore()
    monkeypatch.setattr(dist.distributed_c10d, "_get_default_store", lambda: store)
    gpus = {0: "GPU-a", 1: "GPU-b"}
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(uuid=gpus[device.index]))
    accelerator.check_own_device(torch.device("cpu", 0))  # as Accelerate calls it on every rank
    for rank, index in ((3, 0), (2, 1), (3, 0)):  # --parity makes two accelerators, one after the other
        monkeypatch.setattr(dist, "get_rank", lambda rank=rank: rank)
        accelerator.check_own_device(torch.device("cuda", index))
    monkeypatch.setattr(dist, "get_rank", lambda: 1)
    with pytest.raises(StageError, match=r"ranks 3 and 1 compute on the same GPU of .*GPU-a"):
        accelerator.check_own_device(torch.device("cuda", 0))


RANK = """
import os, signal, sys, time
from rvc_dist.runtime.hang_killer import end_with_launcher
signal.signal(signal.SIGTERM, lambda *_: print("asked to stop", flush=True) or os._exit(0))
parent = os.getppid()
print("started", flush=True)
while sys.argv[1] == "late" and os.getppid() == parent:
    time.sleep(0.01)
end_with_launcher()
print("ready", flush=True)
time.sleep(1)
print("went on", flush=True)
"""
LAUNCHER = "import subprocess, sys; subprocess.run([sys.executable, '-c', *sys.argv[1:]])"


@pytest.mark.parametrize(
    ("name", "when", "last"),
    [
        ("TORCHELASTIC_RUN_ID", "early", "asked to stop"),
        ("TORCHELASTIC_RUN_ID", "late", "asked to stop"),
        ("ACCELERATE_MIXED_PRECISION", "early", "asked to stop"),  # how one rank of `accelerate launch` is known
        ("NONE", "early", "went on"),  # a shell that is closed
    ],
)
def test_a_rank_whose_launcher_is_gone_is_asked_to_stop(name, when, last):
    """Also when the launcher is killed before the rank has come so far as to watch it."""
    command = [sys.executable, "-c", LAUNCHER, RANK, when]
    plain = {k: v for k, v in os.environ.items() if k not in ("TORCHELASTIC_RUN_ID", "ACCELERATE_MIXED_PRECISION")}
    launcher = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=plain | {name: "no"})
    for line in launcher.stdout:
        if line == {"early": "ready\n", "late": "started\n"}[when]:
            break
    launcher.kill()
    assert launcher.communicate(timeout=10)[0].splitlines()[-1] == last


def alone(timeout_s: float) -> accelerator.StopSignal:
    return accelerator.StopSignal(SimpleNamespace(num_processes=1, process_index=0), timeout_s)


@pytest.mark.parametrize("asked", ["never", "before", "while it waits"])
def test_a_wait_has_a_limit_and_hears_signals(monkeypatch, asked):
    monkeypatch.setattr(accelerator.StopSignal, "NEXT_S", 0.1)
    began_at = time.monotonic()
    with alone(timeout_s=30.0 if asked != "never" else 0.1) as stop:
        if asked == "before":
            os.kill(os.getpid(), signal.SIGUSR1)
        elif asked == "while it waits":
            threading.Timer(0.1, os.kill, (os.getpid(), signal.SIGTERM)).start()
        with stop.limit("the clips of step 2", "do this"):
            pass
        with pytest.raises(StageError) as caught, stop.limit("the clips of step 3", "do that"):
            queue.SimpleQueue().get()
        time.sleep(1.1)  # no alarm is left
    me = f"rank 0 on {os.uname().nodename} waited"
    told = {
        "never": f"{me} in vain for train.timeout_s = 0.1 s for the clips of step 3: do that; the same",
        "before": f"SIGUSR1 asked for the end while {me} for the clips of step 3",
        "while it waits": f"SIGTERM asked for the end while {me} for the clips of step 3",
    }
    assert str(caught.value).startswith(told[asked])
    assert time.monotonic() - began_at < 5


def test_a_signal_that_is_sent_twice_at_once_is_one_and_later_a_second_one(monkeypatch, caplog):
    heard, told = [], "SIGTERM: stopping after this step, with a checkpoint from which the same command continues"
    previous = signal.signal(signal.SIGTERM, lambda *_: heard.append("second"))
    try:
        with alone(timeout_s=30.0) as stop:
            for _ in range(3):
                os.kill(os.getpid(), signal.SIGTERM)
            assert stop.poll() == signal.SIGTERM
            assert heard == []
            monkeypatch.setattr(accelerator.StopSignal, "SAME_S", 0.0)
            os.kill(os.getpid(), signal.SIGTERM)
            assert heard == ["second"]
        deadline = time.monotonic() + 10
        while len(caplog.messages) < 2 and time.monotonic() < deadline:
            time.sleep(0.01)
        again, first = sorted(caplog.messages)  # each by a thread of its own
        assert first.startswith(told), "said once, at once"
        assert again.startswith("SIGTERM again: ending at once")
    finally:
        signal.signal(signal.SIGTERM, previous)


def test_sigusr1_may_be_repeated_until_a_rank_has_ended(monkeypatch, caplog):
    """launch/node.sh sends it twice a second, for as long as the checkpoint takes."""
    monkeypatch.setattr(accelerator.StopSignal, "SAME_S", 0.0)
    heard = []
    previous = [signal.signal(number, lambda number, _: heard.append(number)) for number in accelerator.STOP_SIGNALS]
    try:
        stop = alone(timeout_s=30.0)
        stop.__enter__()
        for _ in range(3):
            os.kill(os.getpid(), signal.SIGUSR1)
        assert stop.poll() == signal.SIGUSR1
        stop.__exit__(Stopped, None, None)
        os.kill(os.getpid(), signal.SIGUSR1)
        assert heard == []
        with alone(timeout_s=30.0):
            for number in (signal.SIGUSR1, signal.SIGTERM):
                os.kill(os.getpid(), number)
        assert heard == [signal.SIGTERM], "who does not want the checkpoint says so"
        deadline = time.monotonic() + 10
        while len(caplog.messages) < 3 and time.monotonic() < deadline:  # each is said by a thread of its own
            time.sleep(0.01)
        (first,) = {message for message in caplog.messages if message.startswith("SIGUSR1")}
        assert "a SIGTERM, 0 s from now or later, ends at once without one" in first
    finally:
        for number, handler in zip(accelerator.STOP_SIGNALS, previous, strict=True):
            signal.signal(number, handler)


def test_a_rank_that_fails_may_say_why_though_its_launcher_ends_it(monkeypatch, tmp_path):
    heard, log = [], tmp_path / "logs" / "rank_00000.log"
    previous = signal.signal(signal.SIGTERM, lambda *_: heard.append("second"))
    log.parent.mkdir()
    try:
        with rank_log(Workspace(str(tmp_path), "x"), Shard(0, 1), ["train"]) as handler:
            with pytest.raises(RuntimeError) as caught, alone(timeout_s=30.0):
                raise RuntimeError("Connection closed by peer")
            os.kill(os.getpid(), signal.SIGTERM)
            handler.failed(caught.value)
            assert heard == []
            monkeypatch.setattr(accelerator.StopSignal, "SAME_S", 0.0)
            os.kill(os.getpid(), signal.SIGTERM)
            assert heard == ["second"], "who asks again means it"
        assert "Connection closed by peer" in log.read_text()
        os.kill(os.getpid(), signal.SIGTERM)
        assert heard == ["second"] * 2, "all is as before"
    finally:
        signal.signal(signal.SIGTERM, previous)


@pytest.mark.parametrize(
    ("variable", "value", "train", "message"),
    [
        ("ACCELERATE_MIXED_PRECISION", "bf16", {}, "mixed_precision is bf16, the recipe's train.precision fp32"),
        ("ACCELERATE_MIXED_PRECISION", "fp16", {"precision": "bf16"}, "mixed_precision is fp16, .* bf16: the recipe"),
        ("ACCELERATE_USE_DEEPSPEED", "true", {"optimizer": "lamb"}, "train.optimizer: lamb .* ZeRO cuts"),
        ("ACCELERATE_USE_FSDP", "1", {}, "asks for FSDP"),
    ],
)
def test_what_a_launcher_asks_for_in_vain_is_refused(monkeypatch, variable, value, train, message):
    monkeypatch.setenv(variable, value)
    with pytest.raises(StageError, match=message):
        accelerator.make_accelerator(TrainConfig(**train))


@pytest.mark.parametrize(("value", "train"), [("bf16", {"bf16_adamw": True}), ("fp16", {"precision": "fp16"})])
def test_a_launcher_may_say_what_the_recipe_says(monkeypatch, value, train):
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", value)
    accelerator.check_launcher(TrainConfig(**train))


@pytest.mark.slow
@pytest.mark.distributed
def test_a_signal_to_one_rank_stops_all_at_one_step_and_the_run_goes_on(tmp_path):
    recipe = tiny_recipe(tmp_path, max_steps=100_000)
    make_features(recipe)
    config = tmp_path / "recipe.yaml"
    config.write_text(recipe.to_yaml())
    job = launch(2, "-m", "rvc_dist", "train", "--config", config, launch_file="cpu.yaml")
    try:
        written = tmp_path / "metrics.jsonl"
        deadline = time.monotonic() + TIMEOUT_S
        while not (written.is_file() and written.read_text().count("loss/g_mel") > 2):
            assert time.monotonic() < deadline
            assert not job.wait(0.2), job.said()
        workers = psutil.Process(job.pid).children()
        assert len(workers) == 2
        workers[1].send_signal(signal.SIGUSR1)
        code, output = job.finish(60)
    finally:
        job.kill()
    assert code != 0
    assert "stopped by SIGUSR1 at step" in output
    path = checkpoint.latest(tmp_path / "checkpoints")
    assert path is not None
    saved = checkpoint.load(path)
    assert saved.num_ranks == 2
    stopped_at = saved.progress.step
    rvc_dist(2, "train", "--config", config, "--train.max_steps", stopped_at + 2)
    assert checkpoint.load(checkpoint.latest(tmp_path / "checkpoints")).progress.step == stopped_at + 2
