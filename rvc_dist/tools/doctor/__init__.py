"""`rvc-dist doctor`: is everything in order for this recipe on these ranks? Says it in seconds, before any training.

Every rank runs the same list of checks; what they found is gathered and the first rank prints it, a line a check, with
the ranks that differ side by side and a remedy for every problem. Nothing stays in the run folder. A new check is a
function that yields findings, and an entry in CHECKS.
"""

from __future__ import annotations

import logging
import socket
import time
from collections.abc import Callable, Sequence
from typing import NamedTuple

from rvc_dist.config import Recipe
from rvc_dist.features import index_file
from rvc_dist.tools.doctor import data, disk, machine, ranks, training, wire
from rvc_dist.tools.doctor.disk import SAME_FOLDER
from rvc_dist.tools.doctor.findings import EXIT_CODES, Finding, Findings, Problem, Severity, error, show, verdict
from rvc_dist.tools.doctor.ranks import NETWORK, DoctorContext
from rvc_dist.train.dataset import ClipTable
from rvc_dist.workspace import Shard, StageError

logger = logging.getLogger(__name__)

SAME_ENVIRONMENT = "give every node the same environment, such as one on a shared folder"
SAME_COMMAND = "start all ranks with the same command and the same recipe"
ONE_DEVICE = "training takes one kind of device: leave the others out"


class Check(NamedTuple):
    name: str
    run: Callable[[DoctorContext], Findings]
    alike: str = ""
    """Remedy when ranks differ in a fact that should be the same: an error."""
    ahead: str = ""
    """Who looks before the first stage: "run", the first rank of a run; "host", one rank of each host, of what every
    host has of its own; "trains", one of each host that will train."""


CHECKS = (
    Check("ranks", ranks.check_ranks, SAME_COMMAND),
    Check("versions", machine.check_versions, SAME_ENVIRONMENT),
    Check("devices", machine.check_devices, ONE_DEVICE),
    Check("precision", machine.check_precision, ONE_DEVICE),
    Check("object storage", data.check_remote, SAME_COMMAND),
    Check("data", data.check_data, SAME_FOLDER),
    Check("recordings", data.check_recordings, ahead="run"),
    Check("packages", machine.check_packages, SAME_FOLDER, ahead="host"),
    Check("content encoder", data.check_encoder, SAME_FOLDER, ahead="host"),
    Check("pitch tracker", data.check_pitch_tracker, SAME_FOLDER, ahead="host"),
    Check("weights", training.check_weights, SAME_FOLDER, ahead="run"),
    Check("shared memory", training.check_shared_memory, SAME_ENVIRONMENT, ahead="trains"),
    Check("disk space", disk.check_disk, SAME_FOLDER, ahead="run"),
    Check("run folder", disk.check_run_folder, SAME_FOLDER),
    Check("dry step", training.check_dry_step, SAME_FOLDER),
    Check("all-reduce", wire.check_all_reduce, SAME_FOLDER),
)
"""In their order: later ones use what earlier ones leave in the DoctorContext."""
START = Check("start", data.check_start, ahead="trains")


def look_ahead(recipe: Recipe, is_first: bool = True, trains_here: bool = True) -> None:
    """Look for all that a later stage would miss only after hours; without data stages to do, training looks.

    One rank of each host does it: where it is not the first of all, for what lies on its host. What only a host that
    trains must have is left out where others will train.

    Raises:
        StageError: it is not there; everything is listed, each with its remedy.
    """
    context = DoctorContext(recipe)
    context.data_stages_done = data.features_done(context)
    if context.data_stages_done and index_file.complete(recipe):
        return
    context.table = ClipTable.load(recipe) if context.data_stages_done else None
    logger.info("run: looking for what its stages need; a content encoder that is missing is fetched now")
    logging.disable(logging.INFO)  # training says it again
    lookers = {"host"} | ({"run"} if is_first else set()) | ({"trains"} if trains_here else set())
    try:
        findings = examine(context, [check for check in (START, *CHECKS) if check.ahead in lookers])
    finally:
        logging.disable(logging.NOTSET)
    problems = [p for found in findings for p in found if isinstance(p, Problem)]
    for problem in problems:
        if problem.severity == Severity.WARNING:
            logger.warning("run: %s\n    remedy: %s", problem.what, problem.remedy)
    errors = [p for p in problems if p.severity == Severity.ERROR]
    if errors:
        host = "" if is_first else f"{socket.gethostname()}: "
        raise StageError(
            f"{host}nothing was begun, since the run would fail later for want of {len(errors)} thing(s):",
            listed="".join(f"\n  {p.what}\n    remedy: {p.remedy}" for p in errors),
        )


def run(recipe: Recipe, shard: Shard) -> int:
    """Examine, print what was found on the first rank, and return the exit code: 0, 3 (warnings) or 1 (errors)."""
    del shard
    began_at = time.monotonic()
    context = ranks.join(recipe)
    group = context.group
    if group.is_first:
        logger.info("doctor: %d checks on %d ranks", len(CHECKS), group.count)
    findings = examine(context)
    try:
        of_all = group.gather(findings)
    except StageError as failed:
        findings[0].append(error(str(failed), NETWORK))
        of_all = [findings]
    verdicts = [verdict(check.name, check.alike, [rank[i] for rank in of_all]) for i, check in enumerate(CHECKS)]
    worst = max(v.severity for v in verdicts)
    title = f"{recipe.name} in {recipe.run_dir}, {len(of_all)} rank{'s' if len(of_all) > 1 else ''}"
    if group.rank == 0:
        show(title, verdicts, time.monotonic() - began_at)
    elif len(of_all) == 1 and worst >= Severity.WARNING:  # nobody else would say it
        show(f"{title}: {group.rank}", [v for v in verdicts if v.problems], time.monotonic() - began_at)
    return EXIT_CODES[worst]


def examine(context: DoctorContext, checks: Sequence[Check] | None = None) -> list[list[Finding]]:
    """What each of `checks` (CHECKS) finds, in order. One that cannot go on says why, and the next one begins."""
    found: list[list[Finding]] = []
    for check in CHECKS if checks is None else checks:
        findings: list[Finding] = []
        try:
            for finding in check.run(context):
                findings.append(finding)
        except StageError as failed:
            findings.append(Problem.of(failed))
        except OSError as failed:
            what = f"{failed.filename or context.work.root}: {failed.strerror}"
            findings.append(error(what, "make it readable and writable"))
        found.append(findings)
    return found
