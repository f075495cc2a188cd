"""A launcher, such as torchrun, whose ranks are forks of it instead of new processes, which would import all anew.

They are its children, in sessions of their own, with pids that it knows. They are made before it has threads, and wait
for what they are to run. Ranks that it starts again later are new processes.

Usage, in a process that `warm_cli` forked: forked_launcher.py NUM_RANKS MODULE WORDS, for `python -m MODULE WORDS`.
"""

import json
import os
import runpy
import subprocess
import sys
from collections.abc import Callable
from typing import Any

from torch.distributed.elastic.multiprocessing.subprocess_handler import subprocess_handler
from torch.distributed.elastic.rendezvous import dynamic_rendezvous
from warm_cli import end_as_python

waiting: list[tuple[int, int]] = []
"""Process ids, and the pipes by which they hear what they are to run."""


def run(words: list[str]) -> Callable[[], object]:
    """What Python does with `words`: `-m MODULE` or a script, and its own."""
    sys.argv = words[1:] if words[0] == "-m" else words
    if words[0] == "-m":
        return lambda: runpy.run_module(words[1], run_name="__main__", alter_sys=True)
    return lambda: runpy.run_path(words[0], run_name="__main__")


def make_rank() -> None:
    heard, told = os.pipe()
    if pid := os.fork():
        os.close(heard)
        waiting.append((pid, told))
        return
    os.setsid()
    for pipe in (told, *(pipe for _, pipe in waiting)):
        os.close(pipe)
    with os.fdopen(heard) as stream:
        asked = stream.read()
    if not asked:  # the launcher has ended
        os._exit(0)
    words, environment = json.loads(asked)
    os.environ.clear()
    os.environ.update(environment)
    end_as_python(run(words[words[1] == "-u" :][1:]))


class ForkedRank(subprocess.Popen):  # type: ignore[type-arg]
    def _execute_child(self, *options: Any) -> None:
        """Of `Popen`: `options` are the command, ... and, as the seventh, the environment."""
        if not waiting or [*options[0]][:1] != [sys.executable]:
            super()._execute_child(*options)  # type: ignore[misc]
            return
        self.pid, told = waiting.pop(0)
        self._child_created = True
        with os.fdopen(told, "w") as stream:
            json.dump([options[0], options[6]], stream)


def become(_: str, command: list[str], environment: dict[str, str]) -> None:
    """In the place of `os.execve`, by which `rvc-dist launch` gives its process to torchrun."""
    os.environ.clear()
    os.environ.update(environment)
    run(command[1:])()
    sys.exit()


def fork_ranks(count: int) -> None:
    """So many of those that a launcher in this process starts are forks."""
    for _ in range(count):
        make_rank()
    # It asks inspect.stack() for its caller's name, which takes longer the more is imported: a second, here.
    dynamic_rendezvous.get_method_name = lambda depth=2: sys._getframe(depth).f_code.co_name
    subprocess_handler.Popen = ForkedRank  # type: ignore[misc]
    subprocess.Popen = ForkedRank  # type: ignore[misc]  # by which accelerate starts one rank
    os.execve = become  # type: ignore[assignment]


if __name__ == "__main__":
    fork_ranks(int(sys.argv[1]))
    run(["-m", *sys.argv[2:]])()
