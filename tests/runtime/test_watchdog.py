"""A slow step names the rank that it waits for; right delays give no alarm; a rank that hangs ends all in time."""

import contextlib
import logging
import os
import re
import signal
import subprocess
import sys
import threading
import time
from dataclasses import asdict
from pathlib import Path

import psutil
import pytest
import torch
from helpers import make_features, tiny_recipe
from launching import ROOT, launch

from rvc_dist.config import ConfigError, TrainConfig
from rvc_dist.files import write_json
from rvc_dist.runtime import hang_killer, logs, watchdog
from rvc_dist.runtime.heartbeat import Heartbeat
from rvc_dist.runtime.watchdog import Watch
from rvc_dist.schema import faults
from rvc_dist.train import trainer
from rvc_dist.workspace import Shard, StageError, Workspace

pytestmark = pytest.mark.usefixtures("thin_ranks")
needs_two_gpus = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
TIMED_OUT = "[gloo/transport/tcp/unbound_buffer.cc:78] Timed out waiting 8000ms for recv operation to complete"


@pytest.fixture
def clock(monkeypatch):
    """The monotonic clock: clock[0] seconds."""
    now = [1000.0]
    monkeypatch.setattr(watchdog.time, "monotonic", lambda: now[0])
    return now


class Ranks:
    """Several ranks' watches in one process, driven by hand instead of by their threads."""

    def __init__(self, folder, count, clock):
        self.clock = clock
        self.all = [Watch(Workspace(folder, "x")) for _ in range(count)]
        for rank, each in enumerate(self.all):
            each._rank, each._num_ranks = rank, count
            each._me = {"rank": rank, "host": f"node{rank}", "pid": 70 + rank, "token": f"token{rank}"}

    def step(self, number, seconds, kind="other"):
        """All ranks do a whole step."""
        for each in self.all:
            each.heartbeat.begin_step(number, kind)
            for phase in "data", "g_forward", "d_step", "g_step":
                with each.heartbeat.within(phase):
                    pass
        self.clock[0] += seconds

    def wait(self, seconds, without=()):
        """Time passes, in which all threads but those of the ranks in `without` do what they do every second."""
        for _ in range(seconds):
            self.clock[0] += 1.0
            for rank, each in enumerate(self.all):
                if rank not in without:
                    each._beat()
            for rank, each in enumerate(self.all):
                if rank not in without:
                    each._judge()
                    each._end_wait_in_vain()


def warnings(caplog):
    return [r.getMessage() for r in caplog.records if r.levelno == logging.WARNING]


def test_a_slow_step_names_the_rank_that_is_behind_and_says_when_it_went_on(tmp_path, clock, caplog, monkeypatch):
    caplog.set_level(logging.INFO)
    stacks = []
    monkeypatch.setattr(watchdog, "write_stacks", lambda: stacks.append(1))
    ranks = Ranks(tmp_path, 3, clock)
    for number in range(1, 13):
        ranks.step(number, 2.0)
    fast, slow = [ranks.all[0], ranks.all[1]], ranks.all[2]
    for each in ranks.all:
        each.heartbeat.begin_step(13, "other")
    with slow.heartbeat.within("data"):
        for each in fast:
            each.heartbeat.enter("d_step")
            each.heartbeat.sent()
        ranks.wait(10)
        assert warnings(caplog) == []
        ranks.wait(1)
        assert warnings(caplog) == [
            "step 13 takes 11 s, 6 times the median of 2 s: rank 2 on node2 (pid 72) is in data of step 13 since 11 s; "
            "the others wait for it (rank 0 in d_step of step 13 (gradients sent))"
        ]
        assert len(stacks) == 3, "each rank into its own log"
        ranks.wait(59)
        assert len(warnings(caplog)) == 1
        ranks.wait(1)
        assert "step 13 takes 71 s, 36 times" in warnings(caplog)[1]
        assert len(stacks) == 3
    ranks.step(14, 0.0)
    ranks.wait(1)
    assert "step 13 went on after 72 s" in caplog.messages
    assert len(warnings(caplog)) == 2


def test_a_rank_that_is_slow_within_a_phase_is_told_by_the_gradients_that_it_has_not_sent(tmp_path, clock, caplog):
    ranks = Ranks(tmp_path, 3, clock)
    for number in range(1, 13):
        ranks.step(number, 0.1)
    for rank, each in enumerate(ranks.all):
        each.heartbeat.begin_step(13, "other")
        each.heartbeat.enter("d_step")
        if rank != 1:
            each.heartbeat.sent()
    ranks.wait(6)
    (told,) = warnings(caplog)
    assert "rank 1 on node1 (pid 71) is in d_step of step 13 since 6 s; the others wait for it (rank 0 in" in told
    ranks.all[1].heartbeat.sent()
    ranks.wait(60)
    assert "all ranks are in d_step of step 13 (gradients sent)" in warnings(caplog)[1]


def test_a_slow_step_without_readable_beats_says_that(tmp_path, clock, caplog, monkeypatch):
    ranks = Ranks(tmp_path, 2, clock)
    for number in range(1, 13):
        ranks.step(number, 0.1)
    monkeypatch.setattr(Watch, "_beats", lambda *_: {})
    ranks.all[0].heartbeat.begin_step(13, "other")
    ranks.wait(6)
    (reported,) = warnings(caplog)
    assert reported.endswith("times the median of 0.1 s: nothing can be read of rank 0, 1")


def test_a_stopped_rank_is_not_heard_of_whatever_the_phase(tmp_path, clock, caplog):
    ranks = Ranks(tmp_path, 2, clock)
    for each in ranks.all:
        each.heartbeat.begin_step(1, "other")
        each.heartbeat.enter("validation")
    ranks.wait(30)
    assert warnings(caplog) == [], "validation may take long"
    ranks.wait(10, without=[1])
    assert warnings(caplog) == []
    ranks.wait(1, without=[1])
    (told,) = warnings(caplog)
    assert "step 1 takes 41 s: rank 1 on node1 (pid 71) has not been heard of for 11 s, last in validation" in told
    assert "times the median" not in told
    for file in tmp_path.glob("logs/rank_00001.beat"):
        file.unlink()
    ranks.wait(61, without=[1])
    assert len(warnings(caplog)) == 1, "a rank that has ended is not waited for by its beat"


def test_first_steps_validation_and_checkpoints_give_no_alarm(tmp_path, clock, caplog):
    ranks = Ranks(tmp_path, 2, clock)
    for each in ranks.all:
        each.heartbeat.begin_step(1, "other")
    ranks.wait(80)  # compiles
    for number in range(2, 30):
        ranks.step(number, 0.1)
    for phase in watchdog.EXEMPT:
        with ranks.all[0].heartbeat.within(phase), ranks.all[1].heartbeat.within(phase):
            ranks.wait(80)
        ranks.wait(2)
    ranks.step(30, 0.1)
    assert ranks.all[0].heartbeat.median_s == pytest.approx(0.1)
    # The host runs ahead of the device and waits at every log line: those steps are compared with their like.
    for number in range(31, 151):
        ranks.step(number, 0.01 if number % 10 else 7.0, "other" if number % 10 else "logged")
    ranks.all[0].heartbeat.begin_step(160, "logged")
    ranks.wait(20)
    assert warnings(caplog) == []


def test_few_beats_a_second_of_thousands_of_ranks(tmp_path, monkeypatch):
    class Fake:
        process_index, num_processes, device = 0, 3200, torch.device("cpu")

    watched = Watch(Workspace(tmp_path, "x"))
    monkeypatch.setattr(watched, "_acquire", lambda _: None)
    monkeypatch.setattr(threading.Thread, "start", lambda _: None)
    watched.start(Fake())
    assert watched._interval_s == 32.0
    assert watched._silent_after_s == 96.0


def test_a_phase_costs_microseconds():
    heartbeat, num = Heartbeat(), 20_000
    began_at = time.thread_time()
    for _ in range(num):
        with heartbeat.within("data"):
            heartbeat.sent()
    assert (time.thread_time() - began_at) / num < 50e-6, "a step has about ten, and takes tens of milliseconds"
    assert heartbeat.count == 3 * num


GUARDED = """
import os, subprocess, sys, time
guard = subprocess.Popen([sys.executable, "-S", *sys.argv[1:], str(os.getpid())])
print(guard.pid, flush=True)
time.sleep(60)
"""


def guarded(work: Workspace, token: str) -> tuple[subprocess.Popen[str], psutil.Process]:
    """A process that sleeps, and its guard."""
    command = [sys.executable, "-c", GUARDED, hang_killer.__file__, str(work.hanging_file), token, "0.1"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    its_guard = psutil.Process(int(process.stdout.readline()))
    status = Path(f"/proc/{its_guard.pid}/status")
    while not int(re.search(r"SigIgn:\s+(\w+)", status.read_text())[1], 16) >> (signal.SIGUSR1 - 1) & 1:
        time.sleep(0.01)  # it is starting
    return process, its_guard


def test_a_timeout_names_the_rank_that_hangs_and_its_guard_ends_it(tmp_path):
    """Stopped, so that no signal but KILL reaches it; the guards hear no signal that is meant for ranks."""
    work = Workspace(tmp_path, "x")
    work.logs_dir.mkdir()
    (hung, its_guard), (alive, other_guard) = (guarded(work, f"token{rank}") for rank in (1, 2))
    try:
        ranks = Ranks(tmp_path, 3, None)
        me = ranks.all[0]
        me._interval_s = 0.2
        for each in ranks.all:
            each.heartbeat.begin_step(8, "other")
            each.heartbeat.enter("g_step")
            each._beat()
        ranks.all[2]._thread = threading.Thread(target=ranks.all[2]._run)
        ranks.all[2]._interval_s = 0.1
        ranks.all[2]._thread.start()
        hung.send_signal(signal.SIGSTOP)
        for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT):
            other_guard.send_signal(number)
        with pytest.raises(RuntimeError, match="gloo"), me.explain_timeouts(8.0):
            raise RuntimeError(TIMED_OUT)  # before the ranks have met: nothing is known of them
        assert not work.hanging_file.exists()
        me._thread = threading.Thread()
        with pytest.raises(StageError) as caught, me.explain_timeouts(8.0):
            raise RuntimeError(TIMED_OUT)
        assert isinstance(caught.value.__cause__, RuntimeError)
        assert str(caught.value).startswith(
            "rank 0 waited for train.timeout_s = 8 s, in g_step of step 8, for rank 1 on node1 (pid 71), "
            f"last in g_step of step 8. Where each rank was is in {work.logs_dir}"
        )
        assert hung.wait(5) == -signal.SIGKILL
        assert alive.poll() is None
        assert other_guard.is_running()
        with pytest.raises(RuntimeError, match="shapes"), me.explain_timeouts(8.0):
            raise RuntimeError("shapes differ")
        alive.kill()
        assert not psutil.wait_procs([its_guard, other_guard], timeout=5)[1], "a guard outlived its rank"
    finally:
        ranks.all[2]._ended.set()
        for process in (hung, alive, its_guard, other_guard):
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        hung.wait()
        alive.wait()


@pytest.mark.parametrize("case", ["it fails", "it failed", "it has ended", "nobody is behind"])
def test_a_timeout_says_of_the_others_what_is_true(tmp_path, monkeypatch, case):
    """A rank whose own wait was in vain is about to say so: it is not ended, and its reason is the reason."""
    ranks = Ranks(tmp_path, 2, None)
    me, other = ranks.all
    me._thread, me._interval_s = threading.Thread(), 9.0  # nobody is silent for having no new beat yet
    monkeypatch.setattr(watchdog.time, "sleep", lambda _: None)
    for each in ranks.all:
        each.heartbeat.begin_step(8, "other")
    with contextlib.suppress(StageError, RuntimeError), other.heartbeat.within("data"):
        if case == "it fails":
            raise StageError("waited in vain")
        raise RuntimeError(TIMED_OUT)
    with me.heartbeat.within("data"):
        pass
    if case == "nobody is behind":
        me.heartbeat.count = other.heartbeat.count
    for each in ranks.all:
        each._beat()
    if case in ("it failed", "it has ended"):
        other.work.beat_file(1).unlink()
    work = Workspace(tmp_path, "x")
    with logs.rank_log(work, Shard(0, 2), ["train"]):
        logging.getLogger().warning("opens the log")
        if case == "it failed":
            write_json(work.failure_file(1), {"rank": 1, "host": "node1", "time": 1.0, "error": "disk full"})
        with pytest.raises(StageError) as caught, me.explain_timeouts(8.0):
            raise RuntimeError(TIMED_OUT)
    log = work.rank_log(1)
    assert {
        "it fails": f"rank 1 on node1 (pid 71) failed first: see {log}: waited in vain",
        "it failed": f"rank 1 on node1 failed first: see {log}: disk full",
        "it has ended": "in after data of step 8, for rank 1, which has ended. Where",
        "nobody is behind": "in after data of step 8, for the others, all of which did the same. Where",
    }[case] in str(caught.value)
    assert work.hanging_file.exists() == (case in ("it has ended", "nobody is behind"))
    assert not work.hanging_file.exists() or work.hanging_file.read_text() == ""


@pytest.fixture
def ends(monkeypatch):
    """After how many seconds processes were to end by force."""
    found = []
    monkeypatch.setattr(watchdog.faulthandler, "dump_traceback_later", lambda seconds, **_: found.append(seconds))
    return found


def in_step_13(tmp_path, clock, phases, on_gpu=True):
    """Ranks in these phases of a step, after 12 short ones; they may wait for 30 s and cannot hear of it."""
    ranks = Ranks(tmp_path, len(phases), clock)
    for number in range(1, 13):
        ranks.step(number, 0.1)
    for each, so_far in zip(ranks.all, phases, strict=True):
        each._timeout_s, each._on_gpu = 30.0, on_gpu
        each.heartbeat.begin_step(13, "other")
        for phase in so_far:
            each.heartbeat.enter(phase)
    ranks.wait(1)
    return ranks


@pytest.mark.parametrize("case", ["behind", "silent", "failed", "all in a step"])
def test_a_rank_that_cannot_hear_of_its_timeout_names_who_hangs_and_ends(tmp_path, clock, caplog, ends, case):
    """As on a GPU: no collective fails, the host sits in a copy from the device."""
    ranks = in_step_13(tmp_path, clock, [["data", "log"], ["data", "log"][: 2 if case == "all in a step" else 1]])
    me, other = ranks.all
    if case == "failed":
        other.heartbeat.failure = "disk full"
    without = [1] if case == "silent" else []
    ranks.wait(29, without)
    assert me._reason is None
    ranks.wait(4, without)
    assert str(me._reason) in caplog.text
    expected = {
        "failed": "rank 1 on node1 (pid 71) failed first",
        "all in a step": "rank 0 waited for train.timeout_s = 30 s, in log of step 13, for the others, all of",
    }
    hangs = "rank 0 waited for train.timeout_s = 30 s, in log of step 13, for rank 1 on node1 (pid 71), last in data of"
    assert str(me._reason).startswith(expected.get(case, hangs))
    assert me.work.hanging_file.exists() == (case != "failed")
    assert case == "failed" or me.work.hanging_file.read_text() == ("" if case in expected else "token1\n")
    assert ends == [watchdog.LAST_S] * (2 if case == "all in a step" else 1), "who hangs does not speak"


def test_a_rank_that_hangs_before_the_first_step_is_named(tmp_path, clock, ends):
    ranks = Ranks(tmp_path, 2, clock)
    for each in ranks.all:
        each._timeout_s = 30.0
    ranks.all[0].heartbeat.enter("reading the checkpoint")
    ranks.wait(34)
    assert "for rank 1 on node1 (pid 71), last in start of step 0" in str(ranks.all[0]._reason)
    assert len(ends) == 1


def test_the_parts_of_set_up_that_wait_for_other_ranks_are_phases(tmp_path, monkeypatch):
    phases = []
    monkeypatch.setattr(Heartbeat, "enter", lambda _, phase: phases.append(phase))
    recipe = tiny_recipe(tmp_path)
    make_features(recipe)
    trainer.Trainer(recipe).close()
    assert phases[:3] == ["reading the checkpoint", "making the networks", "preparing the run folder"]
    assert phases[3:] == ["preparing what is to be listened to"]


@pytest.mark.parametrize("case", ["a CPU", "validation", "first steps", "suspended", "moving", "own error"])
def test_a_rank_does_not_end_while_the_others_may_come(tmp_path, clock, ends, case):
    """A collective on CPUs fails by itself; the first steps compile; who has an error of its own says that."""
    phase = "validation" if case == "validation" else "data"
    is_behind = case in ("suspended", "moving", "own error")
    ranks = in_step_13(tmp_path, clock, [[phase] * (1 + is_behind), [phase]], on_gpu=case != "a CPU")
    if case == "first steps":
        ranks.all[0].heartbeat._recent.clear()
    if case == "own error":
        ranks.all[0].heartbeat.failure = "disk full"
    for _ in range(8 if case == "suspended" else 60):
        clock[0] += 1000.0 if case == "suspended" and clock[0] < 2000.0 else 0.0
        if case == "moving":
            ranks.all[1].heartbeat.count += 1
            ranks.all[0].heartbeat.count = 1000
        ranks.wait(1)
    assert ranks.all[0]._reason is None
    assert len(ends) == (case in ("own error", "first steps")), "of the other rank"


def test_a_rank_that_hears_in_time_ends_with_the_reason_that_its_watch_gave(tmp_path, monkeypatch):
    calls = []
    monkeypatch.setattr(watchdog.faulthandler, "cancel_dump_traceback_later", lambda: calls.append("goes on"))
    (me,) = Ranks(tmp_path, 1, None).all
    me._thread, me._reason = threading.Thread(), StageError("rank 1 hangs")
    with pytest.raises(StageError, match="rank 1 hangs"), me.explain_timeouts(8.0):
        raise RuntimeError("[gloo/transport/tcp/pair.cc:547] Connection closed by peer")
    with pytest.raises(ValueError, match="another"), me.explain_timeouts(8.0):
        raise ValueError("another")
    assert calls == ["goes on"] * 2


def test_what_goes_wrong_at_the_end_leaves_nothing_undone(tmp_path, monkeypatch, caplog):
    """Whatever its kind; and the first error is what ends the run."""
    work = Workspace(tmp_path, "x")
    for error in (ValueError("no text"), PermissionError(1, "Operation not permitted")):
        watched = Watch(work)
        assert watched.lock.try_acquire()
        watched._beat()

        def fail(error=error):
            raise error

        monkeypatch.setattr(watched.lock, "check", fail)
        with pytest.raises(type(error)), watched:
            pass
        assert watched.lock._stream is None
        assert not work.beat_file(0).exists()
        assert logs.ends_within(1.0, "nothing", work.train_lock_file.unlink)
    watched = Watch(work)
    monkeypatch.setattr(watched.lock, "release", fail)
    with pytest.raises(StageError, match="the reason"), watched:
        raise StageError("the reason")
    assert f"{work.train_lock_file}: cannot be removed" in caplog.text


def test_the_timeout_is_checked():
    assert list(faults(asdict(TrainConfig(timeout_s=1.0)), TrainConfig)) == []
    assert [fault.sentence for fault in faults(asdict(TrainConfig(timeout_s=0.0)), TrainConfig)] == [
        "timeout_s: got 0.0, expected at least 1.0"
    ]
    assert issubclass(ConfigError, ValueError)


@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.parametrize(
    ("kind", "waits_in", "on_cpu"),
    [
        ("device", "log", "true"),  # the other never notices
        ("driver", "d_step", "true"),  # gloo notices that the rank has ended
        pytest.param("driver", r"\w+", "false", marks=[pytest.mark.gpu, needs_two_gpus]),
    ],
)
def test_ranks_that_no_signal_and_no_collective_reaches_are_named_and_end_within_the_timeout(
    tmp_path, monkeypatch, kind, waits_in, on_cpu
):
    """As on GPUs: one hangs in a driver, the other waits for the device to log; NCCL would wait for longer."""
    timeout_s = 6.0
    recipe = tiny_recipe(tmp_path, max_steps=100_000, max_epochs=100_000, eval_every_steps=10**6, timeout_s=timeout_s)
    make_features(recipe)
    file = tmp_path / "recipe.yaml"
    file.write_text(recipe.to_yaml())
    monkeypatch.setenv("FAULT", f"1:4:{kind}")
    job = launch(2, ROOT / "tests" / "faulty.py", "train", "--config", file, ACCELERATE_USE_CPU=on_cpu)
    ranks = []
    try:
        for line in job.lines():
            if "step 3/" in line:
                ranks = psutil.Process(job.pid).children()
                hangs_since = time.monotonic()
        code, text = job.finish(60)
    finally:
        job.kill()
    assert len(ranks) == 2, text[-5000:]
    assert time.monotonic() - hangs_since < timeout_s + 12
    assert code == 1
    assert not any(p.is_running() and p.status() != psutil.STATUS_ZOMBIE for p in ranks)
    reason = (
        rf"rank 0 waited for train.timeout_s = {timeout_s:g} s, in {waits_in} of step \d+, for rank 1 on .* "
        rf"\(pid {ranks[1].pid}\), last in after data of step 4\. Where each rank was is in {tmp_path / 'logs'}"
    )
    assert re.search(reason, text)
    assert f"process {ranks[1].pid} hangs, the other ranks waited in vain: ending it" in text
    log = (tmp_path / "logs" / "rank_00000.log").read_text()
    assert "Thread 0x" in log.partition("most recent call first")[0], "where it waited"
    assert re.search(reason, (tmp_path / "logs" / "failed_rank_00000.json").read_text())
    assert text.count("Traceback (most recent call last)") == 1, "the launcher's own"


@pytest.mark.slow
@pytest.mark.distributed
def test_a_sleeping_rank_is_named_and_a_stopped_one_ends_all_within_the_timeout(tmp_path, monkeypatch):
    """The sleeper in the first half of the run; then it is stopped, and its launcher's SIGTERM does not reach it."""
    timeout_s = 12.0
    recipe = tiny_recipe(tmp_path, max_steps=100_000, max_epochs=100_000, eval_every_steps=10**6, timeout_s=timeout_s)
    make_features(recipe)
    file = tmp_path / "recipe.yaml"
    file.write_text(recipe.to_yaml())
    monkeypatch.setenv("FAULT", "1:14:sleep")
    job = launch(2, ROOT / "tests" / "faulty.py", "train", "--config", file)
    stopped_at = None
    try:
        for line in job.lines():
            if stopped_at is None and "step 14 went on after" in line:
                ranks = psutil.Process(job.pid).children()
                ranks[1].suspend()
                stopped_at = time.monotonic()
        code, text = job.finish(60)
    finally:
        job.kill()
    assert stopped_at is not None, text[-5000:]
    assert time.monotonic() - stopped_at < timeout_s + 10
    assert code == 1
    assert not any(p.is_running() and p.status() != psutil.STATUS_ZOMBIE for p in ranks)
    slow = next(line for line in text.splitlines() if "step 14 takes" in line)
    assert "times the median" in slow
    assert "(pid" in slow.partition(": rank 1 on ")[2]
    assert "is in after data of step 14 since" in slow
    assert "the others wait for it (rank 0 in d_step of step 14 (gradients sent))" in slow
    log = (tmp_path / "logs" / "rank_00001.log").read_text()
    assert 'faulty.py", line' in log.partition("most recent call first")[2], "where it slept"
    assert f"rank 0 waited for train.timeout_s = {timeout_s:g} s" in text
    assert f"for rank 1 on {os.uname().nodename} (pid {ranks[1].pid}), last in" in text
