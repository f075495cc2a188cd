"""Training on two hosts: the same weights as on one, whatever the network, the clocks, or what is killed.

Each host is a network namespace with a launcher of its own, started as README.md says for two machines.
"""

import os
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import netns
import psutil
import pytest
from helpers import make_features, tiny_recipe
from launching import ROOT, environment, ranks, rvc_dist
from warm_cli import CLIENT

from rvc_dist.runtime.heartbeat import read_beats
from rvc_dist.train import checkpoint
from rvc_dist.workspace import Workspace

pytestmark = netns.marks()

NUM_STEPS = 18
TIMEOUT_S = 8
"""What a rank waits for the others."""
START_S = 120
"""More than a machine with other work needs from the launch to the first step."""


def prepared(folder: Path) -> Path:
    """A recipe file of a run whose features exist."""
    folder.mkdir()
    recipe = tiny_recipe(folder / "run", max_steps=NUM_STEPS, save_every_steps=3, eval_every_steps=1000)
    make_features(recipe, num_clips=12)
    file = folder / "recipe.yaml"
    file.write_text(recipe.to_yaml())
    return file


def end_of(recipe: Path) -> dict[str, bytes]:
    """The files of the last checkpoint of the whole run."""
    folder = recipe.parent / "run" / "checkpoints" / f"step_{NUM_STEPS:08d}"
    return {name: (folder / name).read_bytes() for name in checkpoint.FILES}


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory) -> dict[str, bytes]:
    """The end of a run on 1 host x 2 ranks to which nothing happened."""
    recipe = prepared(tmp_path_factory.mktemp("unbroken") / "whole")
    rvc_dist(2, "train", "--config", recipe)
    return end_of(recipe)


class Job:
    """A run of `rvc-dist train` on two hosts, one rank on each."""

    def __init__(self, recipe: Path, hosts: list[netns.Host]) -> None:
        self.recipe, self.hosts = recipe, hosts
        self.launchers: list[subprocess.Popen[bytes]] = []
        self.num_launches = 0

    def screen(self, host: int) -> Path:
        return self.recipe.parent / f"screen{self.num_launches}_{host}.txt"

    def launch(self, *, max_restarts: int = 0, join_timeout_s: int = 60, only: int | None = None) -> None:
        self.num_launches += 1
        self.launchers = []
        rendezvous = f"join_timeout={join_timeout_s},read_timeout={join_timeout_s},keep_alive_max_attempt=2000"
        for i, host in enumerate(self.hosts):
            if only not in (None, i):
                continue
            command = [
                *["-m", "accelerate.commands.launch", "--config_file", ROOT / "launch/two_nodes.yaml"],
                *["--num_processes", 2, "--machine_rank", i, "--main_process_ip", self.hosts[0].name],
                *["--rdzv_backend", "c10d", "--rdzv_conf", rendezvous, "--max_restarts", max_restarts],
                *["-m", "rvc_dist", "train", "--config", self.recipe, "--train.timeout_s", TIMEOUT_S],
            ]
            more = environment()
            if i == 1:
                clock = str(ROOT / "tests" / "fast_clock")
                more |= {"CLOCK_AHEAD_S": "-3600", "PYTHONPATH": f"{clock}:{more['PYTHONPATH']}"}
            with self.screen(i).open("wb") as screen:
                self.launchers.append(
                    subprocess.Popen(
                        [*CLIENT.split(), *map(str, command)],
                        cwd=ROOT,
                        env=more | host.warm(ranks.server(more)) | {"TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"},
                        stdout=screen,
                        stderr=subprocess.STDOUT,
                        start_new_session=True,
                    )
                )

    def log(self) -> str:
        screens = [path for i in range(len(self.hosts)) if (path := self.screen(i)).is_file()]
        return "".join(f"--- {path.name}\n{path.read_text()[-3000:]}" for path in screens)

    def step(self) -> int:
        """The last step on the screen of the first host since the launch."""
        shown = [line.partition("step ")[2].partition("/")[0] for line in self.screen(0).read_text().splitlines()]
        return next((int(step) for step in reversed(shown) if step.isdecimal()), 0)

    def wait(self, happened: Callable[[], bool], timeout_s: float) -> float:
        """Seconds until `happened`."""
        began_at = time.monotonic()
        while not happened():
            assert time.monotonic() - began_at < timeout_s, f"not within {timeout_s} s:\n{self.log()}"
            time.sleep(0.05)
        return time.monotonic() - began_at

    def wait_for_step(self, step: int) -> None:
        self.wait(lambda: self.step() >= step or not self.is_running(), START_S)
        assert self.is_running(), self.log()

    def is_running(self) -> bool:
        return any([launcher.poll() is None for launcher in self.launchers]) or any(h.processes() for h in self.hosts)

    def all_gone(self, timeout_s: float) -> float:
        """Seconds until no process is left on either host."""
        return self.wait(lambda: not self.is_running(), timeout_s)

    @property
    def num_continued(self) -> int:
        """How often this launch went on from a checkpoint."""
        return self.screen(0).read_text().count("continuing from step")

    def verify_newest(self) -> None:
        newest = checkpoint.latest(self.recipe.parent / "run" / "checkpoints")
        assert newest is not None
        checkpoint.verify(newest)

    def codes(self) -> list[int]:
        return [launcher.wait() for launcher in self.launchers]

    def rank(self, host: int) -> int:
        """Process id of the rank there."""
        folder, found = Workspace(self.recipe.parent / "run", "tiny").logs_dir, list[int]()

        def writes() -> bool:  # it replaces its file, which can miss a reader
            mine = (beat["pid"] for beat in read_beats(folder, 0.0) if beat["host"] == self.hosts[host].name)
            found.extend(set(mine) & set(self.hosts[host].processes()))
            return bool(found)

        self.wait(writes, TIMEOUT_S)
        return found[0]

    def launcher(self, host: int) -> int:
        """Process id of the launcher there."""
        inside = set(self.hosts[host].processes())
        (found,) = (pid for pid in inside if psutil.Process(pid).ppid() not in inside)
        return found


@pytest.fixture
def two(tmp_path):
    """A job on two hosts, not yet launched, and the cable between them."""
    with netns.two_hosts(tmp_path) as (first, second, cable):
        for host in (first, second):
            host.set_tcp_retries(5)  # 12.6 s, so that a launcher ends in time
        yield Job(prepared(tmp_path / "two"), [first, second]), cable


@pytest.mark.parametrize(("started", "error"), [(0, "RendezvousTimeoutError"), (1, "RendezvousConnectionError")])
def test_a_node_that_never_joins_ends_the_others_launcher_with_a_reason(two, started, error):
    job, _ = two
    job.launch(join_timeout_s=3, only=started)
    assert job.all_gone(3 + 10 + START_S) >= 3
    assert job.codes() == [1]
    assert error in job.log().splitlines()[-1]


def test_what_a_network_does_and_what_is_killed_changes_no_bit(two, unbroken):
    """The clock of the second host is an hour behind all the time."""
    job, cable = two
    job.launch(max_restarts=1)
    job.wait_for_step(3)
    cable.is_cut = True
    time.sleep(5)  # TCP tries again 6.2 s after the cut
    cable.is_cut = False
    job.wait_for_step(4)
    lost_in_cut = cable.num_lost
    cable.delay_s, cable.loss = 0.1, 0.02
    job.wait_for_step(5)
    cable.delay_s, cable.loss = 0.0, 0.0
    assert cable.num_lost > lost_in_cut > 0
    assert job.num_continued == 0, "neither was a reason to start again"

    os.kill(job.rank(1), signal.SIGKILL)
    job.wait_for_step(job.step() + 3)  # it goes on from a checkpoint at most 3 steps before
    assert job.num_continued == 1

    os.kill(job.launcher(0), signal.SIGKILL)  # the coordinator
    job.all_gone(TIMEOUT_S + 10)
    assert all(job.codes()), job.log()
    job.verify_newest()

    job.launch()
    job.wait_for_step(1)  # of this launch
    stopped = job.rank(1)
    os.kill(stopped, signal.SIGSTOP)
    job.all_gone(TIMEOUT_S + 10)
    assert job.codes() == [1, 1], job.log()
    assert f"(pid {stopped}), last in" in job.screen(0).read_text(), "the other host's rank named it"
    assert f"process {stopped} hangs" in job.screen(1).read_text(), "its guard ended it"
    job.verify_newest()

    job.launch()
    job.wait_for_step(1)
    cable.is_cut = True  # for good: the other launcher waits for TCP besides
    job.all_gone(TIMEOUT_S + 15)
    assert job.codes() == [1, 1], job.log()
    job.verify_newest()

    rvc_dist(2, "train", "--config", job.recipe)
    assert end_of(job.recipe) == unbroken
