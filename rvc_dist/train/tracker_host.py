"""The experiment trackers of Accelerate, in a process beside training: train.trackers but TensorBoard.

    python -m rvc_dist.train.tracker_host PARENT

Their libraries start processes, redirect output and wait for networks; here none of it reaches the steps, and all of it
ends with this process. Standard input brings JSON lines, a `Start` and then each time {"values", "step"}; standard
output takes what the run's log is to say, "INFO ..." or "WARNING ...".
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import secrets
import signal
import sys
import threading
import time
from collections.abc import Mapping
from operator import attrgetter
from pathlib import Path
from typing import Any, TypedDict

from rvc_dist.files import ForeignFileError, read_bounded, write_json
from rvc_dist.runtime.background import Background
from rvc_dist.runtime.hang_killer import end_with_parent, ignore_signals_of_job
from rvc_dist.schema import Token, parse_json

logger = logging.getLogger("rvc_dist.train.tracker_host")

PROJECT = "rvc_dist"
"""What trackers call the runs of this program together."""
MAX_IDS_BYTES = 1 << 16
START_S, FINISH_S = 60.0, 30.0
"""How long all trackers may take to start, whose libraries take seconds, and to finish."""
LAST_LINES_S = 2
"""How long what the parent has written is read, when it is gone and something else holds its end of the pipe."""


class Start(TypedDict):
    names: list[str]
    run_name: str
    folder: str
    """Of the run."""
    recipe: dict[str, bool | int | float | str | None]
    """With dotted keys."""


class Ids:
    """RUN/trackers.json: what each tracker calls this run, so that it goes on there when training does."""

    def __init__(self, folder: Path) -> None:
        self.path, self._lock = folder / "trackers.json", threading.Lock()
        self._ids: dict[str, str] = {}
        with contextlib.suppress(OSError, ForeignFileError):
            self._ids = parse_json(read_bounded(self.path, MAX_IDS_BYTES), dict[str, Token])
        self.own = self._ids.get("own", "") or secrets.token_hex(16)
        """For trackers that let us choose it."""
        self.keep("own", self.own)

    def get(self, name: str) -> str | None:
        return self._ids.get(name)

    def keep(self, name: str, value: str) -> None:
        with self._lock:
            if self._ids.get(name) != value:
                self._ids[name] = value
                write_json(self.path, self._ids)


def options_of(name: str, start: Start, ids: Ids) -> dict[str, Any]:
    """What Accelerate's class of a tracker is made with: the run's name, its folder, and which run goes on."""
    folder, run_name, kept = Path(start["folder"]), start["run_name"], ids.get(name)
    if name == "mlflow":
        if "MLFLOW_TRACKING_URI" not in os.environ:
            os.environ["MLFLOW_TRACKING_URI"] = (folder / "mlruns").absolute().as_uri()
            os.environ.setdefault("MLFLOW_ALLOW_FILE_STORE", "true")
        return {"experiment_name": PROJECT, "run_name": run_name, "run_id": kept}
    os.environ.setdefault("WANDB_CONSOLE", "off")
    project = os.environ.get("WANDB_PROJECT", PROJECT) if name == "wandb" else PROJECT
    of_tracker: dict[str, dict[str, Any]] = {
        "wandb": {"name": run_name, "id": ids.own, "resume": "allow", "dir": str(folder)},
        "aim": {"logging_dir": str(folder), "run_hash": kept},
        "comet_ml": {"experiment_key": ids.own, "mode": "get_or_create"},
        "clearml": {
            "task_name": run_name,
            "continue_last_task": kept or False,
            "auto_connect_frameworks": False,
            "auto_connect_arg_parser": False,
        },
        "swanlab": {
            "experiment_name": run_name,
            "id": ids.own[:21],
            "resume": "allow",
            "logdir": str(folder / "swanlog"),
        },
        "trackio": {"name": f"{run_name}-{ids.own[:8]}", "resume": "allow"},
        "dvclive": {"dir": str(folder / "dvclive"), "resume": True, "save_dvc_exp": False},
    }
    return {"run_name": project} | of_tracker[name]


def id_of(name: str, tracker: Any) -> str | None:
    """What a tracker itself has called the run that it started."""
    place = {"mlflow": "info.run_id", "aim": "hash", "clearml": "id"}.get(name)
    return str(attrgetter(place)(tracker.tracker)) if place else None


class Hosted:
    """A tracker in a thread of its own: one that waits holds up no other."""

    def __init__(self, name: str, start: Start, ids: Ids) -> None:
        self.name, self._tracker = name, None
        self._background = Background(f"tracker {name}")
        self._background.call(lambda: self._start(start, ids))

    def log(self, values: Mapping[str, float], step: int) -> None:
        self._background.call(lambda: self._tracker.log(values, step=step) if self._tracker else None)

    def finish(self, limit_s: float) -> None:
        self._background.call(lambda: self._tracker.finish() if self._tracker else None)
        self._background.close(limit_s)

    def _start(self, start: Start, ids: Ids) -> None:
        from accelerate.tracking import LOGGER_TYPE_TO_CLASS

        goes_on = ids.get(self.name) is not None
        tracker = LOGGER_TYPE_TO_CLASS[self.name](**options_of(self.name, start, ids))
        tracker.start()
        self._tracker = tracker
        if (own := id_of(self.name, tracker)) is not None:
            ids.keep(self.name, own)
        logger.info("tracker %s: %s", self.name, where(self.name, tracker))
        if not (self.name == "mlflow" and goes_on):  # whose parameters never change
            tracker.store_init_configuration(start["recipe"])


def where(name: str, tracker: Any) -> str:
    """Where to look at the run."""
    if name == "wandb":
        run = tracker.tracker
        return str(run.url or f"offline; `wandb sync {Path(run.dir).parent}` sends it")
    if name == "mlflow":
        return f"{os.environ['MLFLOW_TRACKING_URI']}, run {tracker.tracker.info.run_id}"
    return "started"


class ParentEndedError(Exception):
    """In the place of the next line."""


def _parent_ended(*_: Any) -> None:
    raise ParentEndedError


def kill_children() -> None:
    """Of this process, and theirs."""
    import psutil

    for child in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.NoSuchProcess):
            child.kill()


def _end() -> None:
    kill_children()
    os.kill(os.getpid(), signal.SIGKILL)


def left_to_finish_s(began_at: float) -> float:
    """For trackers that began to start at that time.monotonic()."""
    return max(0.0, began_at + START_S - time.monotonic()) + FINISH_S


def main() -> None:
    began_at = time.monotonic()
    ignore_signals_of_job()
    signal.signal(signal.SIGUSR2, lambda *_: signal.alarm(LAST_LINES_S))
    signal.signal(signal.SIGALRM, _parent_ended)
    log = os.fdopen(os.dup(sys.stdout.fileno()), "w", encoding="utf-8", errors="backslashreplace")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())  # what libraries print
    screen = logging.StreamHandler(log)
    screen.setFormatter(logging.Formatter("%(levelname)s %(message)s"))
    root = logging.getLogger("rvc_dist")
    root.setLevel(logging.INFO)
    root.addHandler(screen)
    hosted: list[Hosted] = []
    with contextlib.suppress(ParentEndedError):
        end_with_parent(signal.SIGUSR2, int(sys.argv[1]))
        start: Start = json.loads(sys.stdin.readline())
        from accelerate.state import PartialState

        PartialState(cpu=True)  # Accelerate's classes ask it whether this is the main process
        ids = Ids(Path(start["folder"]))
        hosted = [Hosted(name, start, ids) for name in start["names"]]
        for line in sys.stdin:
            for tracker in hosted:
                tracker.log(**json.loads(line))
    signal.alarm(0)
    signal.signal(signal.SIGUSR2, signal.SIG_IGN)
    left_s = left_to_finish_s(began_at)
    guard = threading.Timer(left_s, _end)
    guard.daemon = True
    guard.start()
    for thread in [threading.Thread(target=tracker.finish, args=(left_s,)) for tracker in hosted]:
        thread.start()


if __name__ == "__main__":
    main()
