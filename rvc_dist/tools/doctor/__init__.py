"""`rvc-dist doctor`: is everything in order for this recipe on these ranks? Told in seconds, before any training.

Every rank runs the same list of checks; what they found is gathered and the first rank prints it, a line a check, with
the ranks that differ side by side and a remedy for every problem. Nothing stays in the run folder. A new check is a
function and an entry in CHECKS.
"""

from __future__ import annotations

import logging
import socket
import time
from collections.abc import Callable, Sequence
from typing import NamedTuple

from rvc_dist.config import Recipe
from rvc_dist.features import index_file
from rvc_dist.tools.doctor.ahead import (
    check_disk,
    check_encoder,
    check_pitch_tracker,
    check_recordings,
    check_start,
    features_done,
)
from rvc_dist.tools.doctor.disk import check_run_folder
from rvc_dist.tools.doctor.findings import EXIT_CODES, Result, Severity, show, verdict
from rvc_dist.tools.doctor.machine import check_devices, check_packages, check_precision, check_versions
from rvc_dist.tools.doctor.team import NETWORK, SAME_FOLDER, Exam, Team, check_ranks, join
from rvc_dist.tools.doctor.training import check_data, check_dry_step, check_shared_memory, check_weights
from rvc_dist.tools.doctor.wire import check_all_reduce
from rvc_dist.train.dataset import ClipTable
from rvc_dist.workspace import Shard, StageError

logger = logging.getLogger(__name__)

SAME_ENVIRONMENT = "give every node the same environment, such as one on a shared folder"


class Check(NamedTuple):
    name: str
    run: Callable[[Exam, Result], None]
    alike: str = ""
    """Remedy when ranks differ in a fact that should be the same: an error."""


CHECKS = (
    Check("ranks", check_ranks, "start all ranks with the same command and the same recipe"),
    Check("versions", check_versions, SAME_ENVIRONMENT),
    Check("devices", check_devices, "training takes one kind of device: leave the others out"),
    Check("precision", check_precision, "training takes one kind of device: leave the others out"),
    Check("data", check_data, SAME_FOLDER),
    Check("recordings", check_recordings),
    Check("packages", check_packages, SAME_FOLDER),
    Check("content encoder", check_encoder, SAME_FOLDER),
    Check("pitch tracker", check_pitch_tracker, SAME_FOLDER),
    Check("weights", check_weights, SAME_FOLDER),
    Check("shared memory", check_shared_memory, SAME_ENVIRONMENT),
    Check("disk space", check_disk, SAME_FOLDER),
    Check("run folder", check_run_folder, SAME_FOLDER),
    Check("dry step", check_dry_step, SAME_FOLDER),
    Check("all-reduce", check_all_reduce, SAME_FOLDER),
)
"""In their order: later ones use what earlier ones leave in the Exam."""


AHEAD = (
    Check("start", check_start),
    *(c for c in CHECKS if c.run in (check_recordings, check_packages, check_encoder, check_pitch_tracker)),
    *(c for c in CHECKS if c.run in (check_weights, check_shared_memory, check_disk)),
)
"""What the first rank of a run looks at before the first stage, if one of the data stages is still to be done."""
OF_A_HOST = (check_start, check_packages, check_encoder, check_pitch_tracker, check_shared_memory)
"""Of AHEAD, what every host has of its own; the run folder, which the first rank looks at, may change already."""


def look_ahead(recipe: Recipe, is_first: bool = True) -> None:
    """Look for all that a stage of `rvc-dist run` would miss only after hours; without data stages, training looks.

    One rank of each host does it: where it is not the first of all, for what lies on its host.

    Raises:
        StageError: it is not there; everything is listed, each with its remedy.
    """
    exam = Exam(recipe, Team())
    exam.data_stages_done = features_done(exam)
    if exam.data_stages_done and index_file.complete(recipe):
        return
    exam.table = ClipTable.load(recipe) if exam.data_stages_done else None
    logger.info("run: looking for what its stages need; a content encoder that is missing is fetched now")
    logging.disable(logging.INFO)  # training says it again
    try:
        checks = [check for check in AHEAD if is_first or check.run in OF_A_HOST]
        found = [p for result in examine(exam, checks) for p in result.problems]
    finally:
        logging.disable(logging.NOTSET)
    lines = [(p.severity, f"{p.what}\n    remedy: {p.remedy}") for p in found]
    for severity, line in lines:
        if severity == Severity.WARNING:
            logger.warning("run: %s", line)
    if errors := [line for severity, line in lines if severity == Severity.ERROR]:
        listed = "".join(f"\n  {line}" for line in errors)
        host = "" if is_first else f"{socket.gethostname()}: "
        raise StageError(
            f"{host}nothing was begun, since the run would fail later for want of {len(errors)} thing(s):{listed}"
        )


def run(recipe: Recipe, shard: Shard) -> int:
    """Examine, print what was found on the first rank, and return the exit code: 0, 3 (warnings) or 1 (errors)."""
    began_at = time.monotonic()
    exam = join(recipe)
    if exam.team.is_first:
        logger.info("doctor: %d checks on %d ranks", len(CHECKS), exam.team.count)
    results = examine(exam)
    try:
        ranks = exam.team.gather(results)
    except StageError as error:
        results[0].fail(str(error), NETWORK)
        ranks = [results]
    verdicts = [verdict(check.name, check.alike, [rank[i] for rank in ranks]) for i, check in enumerate(CHECKS)]
    worst = max(v.severity for v in verdicts)
    title = f"{recipe.name} in {recipe.run_dir}, {len(ranks)} rank{'s' if len(ranks) > 1 else ''}"
    if exam.team.rank == 0:
        show(title, verdicts, time.monotonic() - began_at)
    elif len(ranks) == 1 and worst >= Severity.WARNING:  # nobody else would tell it
        show(f"{title}: {exam.team.rank}", [v for v in verdicts if v.problems], time.monotonic() - began_at)
    del shard
    return EXIT_CODES[worst]


def examine(exam: Exam, checks: Sequence[Check] | None = None) -> list[Result]:
    """One result a check, in the order of `checks` (CHECKS). One that cannot go on says why, the next one begins."""
    results = []
    for check in CHECKS if checks is None else checks:
        result = Result()
        try:
            check.run(exam, result)
        except StageError as error:
            result.add(error)
        except OSError as error:
            result.fail(f"{error.filename or exam.work.root}: {error.strerror}", "make it readable and writable")
        results.append(result)
    return results
