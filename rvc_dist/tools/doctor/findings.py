"""What the checks find on each rank, and how the first rank shows what all of them found."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from enum import IntEnum
from typing import NamedTuple, TypeAlias

from rich.table import Table
from rich.text import Text

from rvc_dist.tools.tables import console
from rvc_dist.workspace import StageError


class Severity(IntEnum):
    OK = 0
    SKIPPED = 1
    WARNING = 2
    ERROR = 3


EXIT_CODES = {Severity.OK: 0, Severity.SKIPPED: 0, Severity.WARNING: 3, Severity.ERROR: 1}
STYLES = {Severity.OK: "green", Severity.SKIPPED: "dim", Severity.WARNING: "yellow", Severity.ERROR: "bold red"}
MEND = "mend what it names, then run the same command again"


class Problem(NamedTuple):
    severity: Severity
    what: str
    remedy: str

    @classmethod
    def of(cls, error: StageError, severity: Severity = Severity.ERROR, remedy: str = MEND) -> Problem:
        """What a stage would end with; `remedy` where the error names none."""
        return cls(severity, error.what, error.remedy or remedy)


class Fact(NamedTuple):
    name: str
    value: str | float
    unit: str = ""
    """Of a number; the ranks' lowest and highest are shown."""
    alike: bool = False
    """Whether every rank should find the same."""


class Skipped(NamedTuple):
    """There was nothing to check."""

    why: str


Finding: TypeAlias = Problem | Fact | Skipped
Findings: TypeAlias = Iterator[Finding]
"""What a check yields on one rank: plain data, which the ranks exchange."""


def warning(what: str, remedy: str) -> Problem:
    return Problem(Severity.WARNING, what, remedy)


def error(what: str, remedy: str) -> Problem:
    return Problem(Severity.ERROR, what, remedy)


def same(facts: Mapping[str, str]) -> Iterator[Fact]:
    """Facts that every rank should find alike."""
    return (Fact(name, value, alike=True) for name, value in facts.items())


def first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__


class Verdict(NamedTuple):
    """One check over all ranks."""

    name: str
    severity: Severity
    facts: str
    problems: tuple[Problem, ...]


def verdict(name: str, remedy: str, ranks: Sequence[Sequence[Finding]]) -> Verdict:
    """Of check `name`; `ranks` has what each rank found, `remedy` is for ranks that differ."""
    found_by: dict[Problem, list[int]] = {}
    facts: dict[str, dict[int, Fact]] = {}
    shown: list[str] = []
    differ: list[str] = []
    for rank, findings in enumerate(ranks):
        for finding in findings:
            if isinstance(finding, Problem):
                found_by.setdefault(finding, []).append(rank)
            elif isinstance(finding, Fact):
                facts.setdefault(finding.name, {})[rank] = finding
            elif finding.why not in shown:
                shown.append(finding.why)
    skipped = bool(shown)
    failed = {rank for problem, theirs in found_by.items() if problem.severity == Severity.ERROR for rank in theirs}
    for fact, found in facts.items():
        alike = any(f.alike for f in found.values())
        if alike and failed - found.keys():  # it had no chance to find this
            continue
        values = _values(found, len(ranks), "missing" if alike else "unknown")
        text = values[0] if len(set(values)) == 1 else f"({side_by_side(values)})"
        (differ if alike and len(set(values)) > 1 else shown).append(f"{fact} {text}".strip())
    problems = [
        p._replace(what=p.what if len(theirs) == len(ranks) else f"{_ranks(theirs)}: {p.what}")
        for p, theirs in found_by.items()
    ]
    if differ:
        problems.append(error(f"ranks differ in {'; '.join(differ)}", remedy))
    problems.sort(key=lambda p: -p.severity)
    severity = problems[0].severity if problems else Severity.SKIPPED if skipped else Severity.OK
    return Verdict(name, severity, ", ".join(shown), tuple(problems))


def _values(found: Mapping[int, Fact], num_ranks: int, lacking: str) -> list[str]:
    """A fact as each rank has it, by `lacking` where it has not; of numbers, one text for all."""
    if numbers := [f.value for f in found.values() if not isinstance(f.value, str)]:
        low, high = (f"{v:.0f}" if v >= 100 else f"{v:.3g}" for v in (min(numbers), max(numbers)))
        unit = next(iter(found.values())).unit
        return [f"{low if low == high else f'{low} to {high}'} {unit}".strip()]
    return [str(found[rank].value) if rank in found else lacking for rank in range(num_ranks)]


def side_by_side(values: Sequence[str]) -> str:
    """`ranks 0-6: a; rank 7: b`."""
    groups: dict[str, list[int]] = {}
    for rank, value in enumerate(values):
        groups.setdefault(value, []).append(rank)
    return "; ".join(f"{_ranks(ranks)}: {value}" for value, ranks in groups.items())


def _ranks(ranks: Sequence[int]) -> str:
    return f"rank{'s' if len(ranks) > 1 else ''} {ranks_text(ranks)}"


def ranks_text(ranks: Sequence[int]) -> str:
    """Rising numbers with their runs shortened: `0-3, 7`."""
    runs: list[list[int]] = []
    for rank in ranks:
        if runs and rank == runs[-1][-1] + 1:
            runs[-1].append(rank)
        else:
            runs.append([rank])
    return ", ".join(f"{run[0]}-{run[-1]}" if len(run) > 1 else str(run[0]) for run in runs)


def show(title: str, verdicts: Sequence[Verdict], seconds: float) -> None:
    """Print a line a check, and below it each problem with its remedy."""
    out = console()
    out.print(Text(f"rvc-dist doctor: {title}"), soft_wrap=True)
    widths = len(Severity.WARNING.name), max(len(v.name) for v in verdicts)
    indent = " " * (sum(widths) + 4)
    for verdict in verdicts:
        line = Table.grid(padding=(0, 2))
        for width in widths:
            line.add_column(width=width, no_wrap=True)
        line.add_row(Text(verdict.severity.name.lower(), STYLES[verdict.severity]), verdict.name, Text(verdict.facts))
        out.print(line)
        for problem in verdict.problems:  # not wrapped: remedies are there to be copied
            what = Text(f"{indent}{problem.severity.name}: {problem.what}", STYLES[problem.severity])
            out.print(what, soft_wrap=True)
            out.print(Text(f"{indent}remedy: {problem.remedy}"), soft_wrap=True)
    found = [p.severity for v in verdicts for p in v.problems]
    counts = {"error": found.count(Severity.ERROR), "warning": found.count(Severity.WARNING)}
    listed = ", ".join(f"{count} {name}{'' if count == 1 else 's'}" for name, count in counts.items())
    out.print(Text(f"{listed}; {seconds:.1f} s"))
