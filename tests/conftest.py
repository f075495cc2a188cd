"""One CPU thread, and how tests share the cores when pytest-xdist runs them on several (`pytest -n 2`).

There are half as many workers again as cores (launch/test.sh), since a quarter of the time a test waits. The tests of
one file run in one worker, one after the other: they share what their module's fixtures made. Those of the files in
`WATCHES` wait for limits of seconds, and never run beside each other. While a test marked `alone` runs, every other
worker waits.
"""

import fcntl
import os
from collections import Counter
from collections.abc import Generator, Iterator
from pathlib import Path

import pytest
import torch
from browser import browser  # noqa: F401 - a fixture of several files
from launching import ranks
from warm_cli import keep_what_is_imported

torch.set_num_threads(1)  # the networks are so small that waiting for a second thread costs more than it gives
os.environ.setdefault("OMP_NUM_THREADS", "1")  # the same in processes that a test starts
os.environ.setdefault("NUMBA_OPT", "1")  # pyin takes 20 s to compile instead of 30, and as long to run

WATCHES = {"test_doctor", "test_faults", "test_netns", "test_run_lock", "test_slurm", "test_watchdog"}
LONG = (
    "plan trainer f0 elastic exactness bench hostile networks docs deepspeed compilation frozen resume trackers"
    " gpu_check extract vocoders loss_scale infer clusters pipeline scale cloud shards preprocess batch account options"
    " number_formats base_model remote_run demo notebook accelerator stages fuzz many_recordings precision"
)
"""Files (`test_...`) that take a worker more than 20 s, the longest first, as they were last measured."""


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: object) -> object:
    """Not by marks of pytest-xdist (loadgroup): pytest 9.2 does not pass them on."""

    from xdist.scheduler import LoadScopeScheduling  # where pytest runs in one process, nobody needs it

    class ByFile(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            name = Path(nodeid.partition("::")[0]).stem
            return "watches" if name in WATCHES else name

    config.option.loadscopereorder = False  # by the number of tests: files of few long ones would come last
    return ByFile(config, log)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """On several cores the longest files come first, so that no worker is left with one at the end.

    Before them comes what is to be alone: later, the others would have to end first what they have begun.
    """
    if hasattr(config, "workerinput"):
        rank = {f"test_{name}": place for place, name in enumerate(LONG.split())}
        slow = Counter(item.path for item in items if item.get_closest_marker("slow"))

        def place(item: pytest.Item) -> tuple[bool, bool, int, int]:
            together, name = item.get_closest_marker("alone") is None, item.path.stem
            return together, name not in WATCHES, rank.get(name, len(rank)), -slow[item.path]

        items.sort(key=place)


def pytest_collection_finish() -> None:
    """Looking through it for garbage again and again takes a tenth of the tests' time."""
    keep_what_is_imported()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item) -> Generator[None, object, object]:
    """Hold the lock of all workers while a test runs: alone, or with others.

    Whoever wants it first takes the queue's lock. So a test that waits to be alone is not overtaken for ever.
    """
    if not hasattr(item.config, "workerinput"):
        return (yield)
    alone = item.get_closest_marker("alone") is not None
    folder = Path(item.config.getoption("basetemp")).parent  # of all workers
    with (folder / "queue.lock").open("w") as queue, (folder / "running.lock").open("w") as running:
        fcntl.flock(queue, fcntl.LOCK_EX)
        fcntl.flock(running, fcntl.LOCK_EX if alone else fcntl.LOCK_SH)
        fcntl.flock(queue, fcntl.LOCK_UN)
        try:
            return (yield)
        finally:
            fcntl.flock(running, fcntl.LOCK_UN)  # closing is not enough: a forked process may still hold it open


@pytest.fixture(scope="module")
def thin_ranks() -> Iterator[None]:
    """The forks that `launching` makes train networks of one layer of each kind: a step takes half as long."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("THIN", "1")
        yield


def pytest_sessionfinish(session: pytest.Session) -> None:
    if not hasattr(session.config, "workerinput"):
        ranks.close()
