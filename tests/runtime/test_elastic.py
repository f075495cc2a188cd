"""A run on nodes that come and go: it goes on within seconds, and every epoch has every clip once.

Each node is a pod: launch/node.sh with NODES=1:2, whose launcher and ranks are in a network namespace. The meeting
point is a process of its own on the first host, which stays when that pod dies.
"""

import collections
import itertools
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import netns
import pytest
from helpers import make_features, newest, tiny_recipe
from launching import ROOT, environment, ranks
from warm_cli import CLIENT

from rvc_dist.report.history import read_history
from rvc_dist.train.dataset import ClipTable
from rvc_dist.workspace import Workspace

pytestmark = netns.marks()

NUM_STEPS = 90
START_S = 200
"""More than a machine with other work needs from the launch to the first step."""
LOST_AFTER_S = 5
TIMEOUT_S = 2.0 * START_S
"""What ranks wait for each other: so long that nothing here is noticed by it."""
PYTHON = """#!/usr/bin/env bash
[[ $1 != -c || $2 != *device_count* ]] || {{ echo 0; exit; }}
[[ $1 != -c ]] || exec {python} "$@"
exec {client} "$@"
"""
"""What node.sh finds: it asks for GPUs, for the run's folder, and becomes the launcher."""


class ElasticJob:
    """A run of `rvc-dist train` on one or two hosts, one rank on each."""

    def __init__(self, folder: Path, hosts: list[netns.Host], cable: netns.Cable) -> None:
        self.recipe = tiny_recipe(
            folder / "run", max_steps=NUM_STEPS, save_every_steps=3, eval_every_steps=10_000, timeout_s=TIMEOUT_S
        )
        make_features(self.recipe, num_clips=24)
        self.folder, self.hosts, self.cable, self.num_launches = folder, hosts, cable, 0
        self.file, self.seen = folder / "recipe.yaml", folder / "seen"
        self.file.write_text(self.recipe.to_yaml())
        self.seen.mkdir()
        self.set_pace(1.0)
        (folder / "bin").mkdir()
        self.python = folder / "bin" / "python"
        self.python.write_text(PYTHON.format(python=sys.executable, client=CLIENT))
        self.python.chmod(0o755)

    def set_pace(self, seconds: float) -> None:
        (self.seen / "pace.new").write_text(str(seconds))
        (self.seen / "pace.new").rename(self.seen / "pace")

    def start(self, host: int, *command: object, **more: str) -> subprocess.Popen[bytes]:
        """Begin a command whose `python` is on that host."""
        self.num_launches += 1
        own = environment() | {"SEEN": str(self.seen), "RVC_DIST_LOST_AFTER_S": str(LOST_AFTER_S)}
        own |= self.hosts[host].warm(ranks.server(own)) | {"PATH": f"{self.python.parent}:{own['PATH']}"}
        with (self.folder / f"screen{self.num_launches}_node{host}.txt").open("wb") as screen:
            return subprocess.Popen(
                [str(word) for word in command],
                cwd=ROOT,
                env=own | more,
                stdout=screen,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def launch(self, host: int) -> subprocess.Popen[bytes]:
        pod = {"NODES": "1:2", "HEAD_ADDR": "node0", "RANKS": "1", "JOB_COMPLETION_INDEX": str(host)}
        command = ["bash", ROOT / "launch" / "node.sh", "--", "train", "--config", self.file]
        return self.start(host, *command, **pod)

    def meetings(self) -> list[list[dict[str, Any]]]:
        """The lines of each meeting of the ranks, in the order of meetings."""
        found = collections.defaultdict(list)
        for path in self.seen.glob("*_*.jsonl"):
            lines = path.read_text().splitlines(keepends=True)
            found[path.name.partition("_")[0]] += [json.loads(line) for line in lines if line.endswith("\n")]
        return sorted(found.values(), key=lambda lines: min(line["at"] for line in lines))

    def steps(self) -> list[dict[str, Any]]:
        """The lines of steps of the last meeting that has made one."""
        made = [[line for line in lines if "step" in line] for lines in self.meetings()]
        return next((steps for steps in reversed(made) if steps), [])

    def wait(self, happened: Callable[[], bool], timeout_s: float = START_S) -> None:
        began_at = time.monotonic()
        while not happened():
            screens = sorted(self.folder.glob("screen*.txt"))
            log = "".join(f"--- {path.name}\n{path.read_text()[-2500:]}" for path in screens)
            assert time.monotonic() - began_at < timeout_s, f"not within {timeout_s} s:\n{log}"
            time.sleep(0.1)

    def goes_on(self, ranks: int, since: float) -> tuple[float, float]:
        """Wait until so many ranks that were started after `since` have trained a few steps.

        Returns:
            Seconds until they were started, and until their first step was done.
        """

        def news() -> list[dict[str, Any]]:
            return [line for line in self.steps() if line["at"] > since and line["ranks"] == ranks]

        self.wait(lambda: len({line["step"] for line in news()}) >= 4)
        began_at = max(line["began_at"] for line in self.meetings()[-1] if "began_at" in line)
        assert began_at > since
        return began_at - since, min(line["at"] for line in news()) - since

    def comes(self) -> tuple[subprocess.Popen[bytes], tuple[float, float]]:
        """Launch the second pod again; the first trains hardly on until it has come."""
        self.set_pace(3.0)
        came_at = time.time()
        pod = self.launch(1)
        self.wait(lambda: any(line.get("began_at", 0.0) > came_at for line in self.meetings()[-1]))
        self.set_pace(1.0)
        return pod, self.goes_on(ranks=2, since=came_at)

    def log(self, rank: int) -> str:
        return Workspace(self.recipe.run_dir, self.recipe.name).rank_log(rank).read_text()

    def counted(self) -> dict[int, collections.Counter[int]]:
        """How often each clip was seen in each epoch, by steps that no later meeting made again."""
        counts: dict[int, collections.Counter[int]] = collections.defaultdict(collections.Counter)
        first_after = NUM_STEPS + 1
        for lines in reversed(self.meetings()):
            begun = [line for line in lines if "begun" in line]
            for line in begun:
                if line["begun"] < first_after:
                    counts[line["epoch"]].update(line["clips"])
            first_after = min([first_after, *(line["begun"] for line in begun)])
        return counts


@pytest.fixture
def job(tmp_path):
    with netns.two_hosts(tmp_path) as (first, second, cable):
        yield ElasticJob(tmp_path, [first, second], cable)


def test_a_run_goes_on_without_a_node_that_leaves_or_is_lost_or_dies_and_with_one_that_comes(job, record_property):
    """The last fault is the death of the first node's launcher and rank."""
    job.start(0, job.python, "-m", "rvc_dist", "launch", "--meeting_point")
    job.wait(lambda: "machines meet at port" in (job.folder / "screen1_node0.txt").read_text())
    meeting_point = set(job.hosts[0].processes())
    first, second = job.launch(0), job.launch(1)
    job.goes_on(ranks=2, since=0.0)
    seconds: dict[str, tuple[float, float]] = {}

    second.send_signal(signal.SIGTERM)  # a drained node, or the notice of a spot instance
    seconds["SIGTERM to a pod"] = job.goes_on(ranks=1, since=time.time())
    assert second.wait(20) == 75
    job.wait(lambda: not job.hosts[1].processes(), 10)  # helpers of a rank see that it has ended, and end
    assert first.poll() is None

    second, seconds["a node comes"] = job.comes()

    job.cable.is_cut = True
    cut_at, last = time.time(), job.steps()[-1]["step"]
    seconds["a machine vanishes"] = job.goes_on(ranks=1, since=cut_at)
    assert last - 3 <= job.steps()[0]["step"] - 1 <= last + 1, "from the last checkpoint"
    assert f"the machine at {job.hosts[1].address} does not answer" in job.log(0)
    job.hosts[1].kill_all()
    second.wait()
    job.cable.is_cut = False

    second, seconds["a machine comes back"] = job.comes()

    died_at = time.time()
    for pid in set(job.hosts[0].processes()) - meeting_point:
        os.kill(pid, signal.SIGKILL)
    first.wait()
    seconds["a node dies"] = job.goes_on(ranks=1, since=died_at)

    job.set_pace(0.0)
    job.wait(lambda: second.poll() is not None)
    assert second.returncode == 0
    job.wait(lambda: not job.hosts[1].processes(), 10)  # helpers of a rank see that it has ended, and end
    for what, took_s in seconds.items():
        record_property(what, " and ".join(f"{s:.1f}" for s in took_s))

    saved = newest(job.recipe)
    assert saved.progress.step == NUM_STEPS
    num_clips, epochs = len(ClipTable.load(job.recipe).train), job.counted()
    whole = saved.progress.epoch
    assert whole >= 3
    assert set(epochs) - {whole} == set(range(whole))
    for epoch, seen in epochs.items():
        assert set(seen.values()) == {1}, f"epoch {epoch} has a clip twice"
        assert len(seen) == num_clips or epoch == whole, f"epoch {epoch} lacks clips"
    work = Workspace(job.recipe.run_dir, job.recipe.name)
    runs = [line for line in read_history(work.history_file) if line["kind"] == "run"]
    # A node that is slow may come after the first have begun.
    batches = [key for key, _ in itertools.groupby((len(line["ranks"]), line["global_batch"]) for line in runs)]
    assert batches[batches[0] == (1, 2) :] == [(2, 4), (1, 2)] * 3
