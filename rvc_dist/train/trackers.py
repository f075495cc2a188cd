"""What a run shows while it trains: TensorBoard, and the other trackers of Accelerate."""

from __future__ import annotations

import importlib.util
import json
import logging
import os
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import IO, Any

import psutil
from torch import Tensor

from rvc_dist.choices import TRACKERS
from rvc_dist.config import Recipe
from rvc_dist.runtime.background import Background
from rvc_dist.runtime.logs import EXIT_S
from rvc_dist.train.tensorboard import TensorBoard, plain_recipe
from rvc_dist.train.tracker_host import left_to_finish_s
from rvc_dist.workspace import StageError, Workspace

logger = logging.getLogger(__name__)

LAUNCHED = ("ACCELERATE_", "TORCHELASTIC_", "MASTER_", "LOCAL_", "GROUP_", "ROLE_", "OMPI_", "PMI_", "MV2_")
"""Variables by which launchers make a process a rank."""


def check_trackers(recipe: Recipe) -> None:
    """Nothing, if all that train.trackers names are installed.

    Raises:
        StageError: one is not.
    """
    for name in recipe.train.tracker_names:
        package = TRACKERS[name]
        if importlib.util.find_spec(package.module) is None:
            raise StageError(*package.missing(f"train.trackers: {name}"))


class Tracker:
    """Shows values in all of train.trackers, on the main rank; on others, where it is not `enabled`, nothing.

    Nothing of it waits for a disk or network, and what fails is a warning. `first_step` is the first that this run
    makes.
    """

    def __init__(self, recipe: Recipe, first_step: int, enabled: bool) -> None:
        work, names = Workspace(recipe.run_dir, recipe.name), recipe.train.tracker_names if enabled else ()
        self._board = TensorBoard(recipe, work, first_step) if "tensorboard" in names else None
        others = [name for name in names if name != "tensorboard"]
        self._host = TrackerHost(recipe, work, others) if others else None

    def scalars(self, values: Mapping[str, float], step: int) -> None:
        if self._board is not None:
            self._board.scalars(values, step)
        if self._host is not None:
            self._host.log(values, step)

    def spectrograms(self, name: str, rows: Sequence[tuple[str, Tensor]], rate: int, step: int) -> None:
        """Of titled waves [S] above one another, in TensorBoard."""
        if self._board is not None:
            self._board.spectrograms(name, rows, rate, step)

    def samples(self, folder: Path, step: int) -> None:
        """What was made to listen to at `step`, in TensorBoard."""
        if self._board is not None:
            self._board.samples(folder, step)

    def flush(self) -> None:
        """Return when TensorBoard's curves are on the disk, or when it has not answered for some seconds."""
        if self._board is not None:
            self._board.flush()

    def close(self) -> None:
        """Return when all is shown, or after some seconds."""
        if self._board is not None:
            self._board.close()
        if self._host is not None:
            self._host.close()


class TrackerHost:
    """The process of `tracker_host`."""

    def __init__(self, recipe: Recipe, work: Workspace, names: list[str]) -> None:
        self.what = f"train.trackers: {', '.join(names)}"
        where = {"run_name": recipe.name, "folder": str(work.root.absolute())}
        start: dict[str, Any] = {"names": names, "recipe": plain_recipe(recipe)} | where
        environment = {k: v for k, v in os.environ.items() if not k.startswith(LAUNCHED)}
        for name in ("RANK", "WORLD_SIZE"):
            environment.pop(name, None)
        command = [sys.executable, "-m", "rvc_dist.train.tracker_host", str(os.getpid())]
        work.logs_dir.mkdir(parents=True, exist_ok=True)
        with (work.logs_dir / "trackers.log").open("ab") as log:
            self._process = subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                env=environment | {"CUDA_VISIBLE_DEVICES": ""},
                start_new_session=True,
            )
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._began_at = time.monotonic()
        self._background = Background(self.what)
        self._input: IO[bytes] = self._process.stdin
        self._listener = threading.Thread(target=self._listen, args=(self._process.stdout,), daemon=True)
        self._listener.start()
        self._send(start)

    def log(self, values: Mapping[str, float], step: int) -> None:
        self._send({"values": dict(values), "step": step})

    def close(self) -> None:
        """Let the trackers finish, and end those that have not after some seconds."""
        self._background.call(self._input.close)
        limit_s = left_to_finish_s(self._began_at)
        try:
            self._process.wait(limit_s)
        except subprocess.TimeoutExpired:
            logger.warning("%s: not finished after %.0f s, and ended", self.what, limit_s)
            process = psutil.Process(self._process.pid)
            for one in [*process.children(recursive=True), process]:
                one.kill()
            self._process.wait(EXIT_S)
        self._listener.join(EXIT_S)
        self._background.close()

    def _send(self, line: Mapping[str, Any]) -> None:
        self._background.call(partial(self._write, f"{json.dumps(line)}\n".encode()))

    def _write(self, line: bytes) -> None:
        self._input.write(line)
        self._input.flush()

    def _listen(self, output: IO[bytes]) -> None:
        for line in output:
            level, _, text = line.decode("utf-8", "replace").strip().partition(" ")
            logger.log(logging.WARNING if level == "WARNING" else logging.INFO, "%s", text)
