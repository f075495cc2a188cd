"""The command line: `rvc-dist STAGE [--config FILE] [--section.key VALUE]`, equally `python -m rvc_dist`."""

from __future__ import annotations

import argparse
import errno
import importlib
import logging
import os
import shlex
import sys
import time
from contextlib import nullcontext, suppress
from pathlib import Path
from typing import Any

from rvc_dist import __version__
from rvc_dist.arguments import meant_by, parse
from rvc_dist.config import Recipe
from rvc_dist.files import NO_SPACE, remove_half_written, space
from rvc_dist.runtime.hang_killer import end_with_launcher
from rvc_dist.runtime.job_file import JobFile
from rvc_dist.runtime.logs import RankLog, rank_log, tell_launcher
from rvc_dist.runtime.run_lock import may_be_held
from rvc_dist.schema import nearest
from rvc_dist.screen import duration, set_up_logging, stoppable, without_details
from rvc_dist.stages import STAGES, TRAINING
from rvc_dist.workspace import Shard, StageError, Stopped, Workspace

logger = logging.getLogger("rvc_dist")

EXIT_FAILED, EXIT_USAGE, EXIT_STOPPED = 1, 2, 75
"""75 is EX_TEMPFAIL: a checkpoint was written and the same command continues the run. The doctor has a 3 besides."""


OTHER_RANK_S = 10.0
"""How long a rank that has nothing to say waits for the launcher to end it with the one that said what is wrong."""
OF_THE_DISK = NO_SPACE | {errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EEXIST, errno.EIO, errno.ESTALE}
"""Errors that are the disk's or the user's, also where the file is not known."""


def usage() -> str:
    lines = ["usage: rvc-dist STAGE [--config FILE] [--section.key VALUE ...]", "", "stages:"]
    lines += [f"  {name:<12}{stage.about}" for name, stage in STAGES.items()]
    lines += [
        "",
        "`rvc-dist STAGE --help` shows the keys that the stage reads, `--help all` every key of the recipe.",
        f"rvc_dist {__version__}",
    ]
    return "\n".join(lines)


def stopped_code(of_node: bool) -> int:
    """EXIT_STOPPED; under an agent that would take it for a failure and start the ranks again at once, 0.

    It is to do that where one of several nodes was asked to stop: its own agent has ended, and all others go on.
    """
    restarts = int(os.environ.get("TORCHELASTIC_MAX_RESTARTS", "0"))
    return 0 if restarts and not of_node else EXIT_STOPPED


def usage_error(message: str) -> int:
    """Say what is wrong with the command: of several ranks on a host once, and last of all that a launcher prints."""
    if os.environ.get("LOCAL_RANK", os.environ.get("SLURM_LOCALID", "0")) != "0":
        time.sleep(OTHER_RANK_S)
    elif not tell_launcher(message):
        print(message, file=sys.stderr)
    return EXIT_USAGE


def hint_of_stage(arguments: list[str]) -> str:
    """What was probably meant where the first of `arguments` is no stage."""
    name = arguments[0]
    if "." in name or name.startswith("-"):  # a file or an option
        stage = "run" if name.startswith("-") or name.endswith((".yaml", ".yml")) else "infer"
        words = arguments if name.startswith("-") else meant_by(stage, name) + arguments[1:]
        return f"did you mean: rvc-dist {stage} {shlex.join(words)}"
    near = nearest(name, STAGES)
    return f"did you mean {near}?" if near else f"expected one of {', '.join(STAGES)}"


def main(arguments: list[str] | None = None) -> int:
    end_with_launcher()
    arguments, detail = without_details(sys.argv[1:] if arguments is None else arguments)
    if not arguments or arguments[0] in ("-h", "--help"):
        print(usage())
        return 0 if arguments else EXIT_USAGE
    if arguments[0] == "--version":
        print(__version__)
        return 0
    name = arguments[0]
    if name not in STAGES:
        return usage_error(f"rvc-dist: unknown stage {name!r}; {hint_of_stage(arguments)}")
    try:
        recipe, shard, options = parse(name, arguments[1:])
    except (argparse.ArgumentError, ValueError, OSError) as error:
        return usage_error(f"rvc-dist {name}: {error}")
    set_up_logging(shard, detail)
    if not STAGES[name].keeps_log:
        return run_stage(name, recipe, shard, options)
    work = Workspace(recipe.run_dir, recipe.name)
    # What is refused because another job trains in the folder leaves nothing there.
    is_waiting = name in TRAINING and may_be_held(work.train_lock_file)
    with rank_log(work, shard, arguments, is_waiting) as log, JobFile(log, name, arguments) as job:
        try:
            job.code = run_stage(name, recipe, shard, options, log)
            return job.code
        except Exception as error:
            log.failed(error)
            log.write_stacks()
            raise


def disk_sentence(error: OSError, recipe: Recipe) -> str | None:
    """What to tell the user of an error of the disk or of a path; None where a traceback says more: a fault of ours."""
    file = os.fsdecode(error.filename) if isinstance(error.filename, (str, bytes)) else None
    if error.errno not in OF_THE_DISK and (file is None or Path(file).is_relative_to(Path(__file__).parent)):
        return None
    where = file or f"a file of the run in {recipe.run_dir}"
    if error.errno in NO_SPACE:
        free = "" if " free" in str(error) else f"; {space(Path(file or recipe.run_dir))}"
        return f"{where}: {error.strerror}{free}. Free some space, or raise the limit, and run the same command"
    return f"{where}: {error.strerror}; this path must exist or be free to make, on a disk that works and lets you in"


def end_words(name: str, recipe: Recipe, seconds: float) -> None:
    """What was made, where, and what comes next; a file that cannot be read is no failure of a stage that is done."""
    from rvc_dist.report.next_steps import next_steps  # late: numbers and pages need libraries

    with suppress(StageError, OSError):
        steps = list(next_steps(name, recipe))
        for line in [f"{name}: done in {duration(seconds)}", *(f"  {step}" for step in steps)] if steps else []:
            logger.info("%s", line)


def run_stage(name: str, recipe: Recipe, shard: Shard, options: dict[str, Any], log: RankLog | None = None) -> int:
    """Run a stage, tell the user's mistakes and the disk's in a sentence; its exit code."""
    began_at, level = time.monotonic(), logging.WARNING if shard.is_first or shard.array else logging.INFO
    if recipe.train.fast_train:  # before any stage uses a GPU: its allocator reads this once
        importlib.import_module("rvc_dist.runtime.device").set_allocator(recipe.train)
    try:
        if log is not None and shard.is_first:
            remove_half_written(log.work.root, ".*.tmp", "*/.*.tmp")
        with log.first_cause() if log is not None else nullcontext(), stoppable(name, level):
            code = STAGES[name].load()(recipe, shard, **options)
        if not code and shard.is_first and not shard.array and not options.get("only_look"):
            end_words(name, recipe, time.monotonic() - began_at)
    except Stopped as stopped:
        logger.warning("%s", stopped)
        return stopped_code(stopped.of_node)
    except (StageError, OSError) as error:
        reason = str(error) if isinstance(error, StageError) else disk_sentence(error, recipe)
        if reason is None:
            raise
        message = f"rvc-dist {name}: {reason}"
        print(message, file=sys.stderr, flush=True)
        if log is not None:
            log.failed(error, message)
        return EXIT_FAILED
    except KeyboardInterrupt:
        if shard.is_first or shard.array:
            print(f"rvc-dist {name}: interrupted; the same command continues", file=sys.stderr)
        return EXIT_STOPPED
    return code or 0


if __name__ == "__main__":
    sys.exit(main())
