"""What the checks find on each rank, and how the first rank shows what all of them found."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from enum import IntEnum
from typing import NamedTuple

from rich.table import Table
from rich.text import Text

from rvc_dist.tools.tables import console
from rvc_dist.workspace import StageError


class Severity(IntEnum):
    OK = 0
    SKIPPED = 1
    WARNING = 2
    ERROR = 3


MEND = "mend what it names, then run the same command again"
EXIT_CODES = {Severity.OK: 0, Severity.SKIPPED: 0, Severity.WARNING: 3, Severity.ERROR: 1}


class Problem(NamedTuple):
    severity: Severity
    what: str
    remedy: str


@dataclass
class Result:
    """What one rank found in one check: plain data, which the ranks exchange."""

    same: dict[str, str] = field(default_factory=dict)
    """Facts that every rank should find alike."""
    own: dict[str, str] = field(default_factory=dict)
    """Facts in which ranks may differ."""
    measured: dict[str, tuple[float, str]] = field(default_factory=dict)
    """(value, unit)"""
    problems: list[Problem] = field(default_factory=list)
    skipped: str = ""
    """Why there was nothing to check."""

    def warn(self, what: str, remedy: str) -> None:
        self.problems.append(Problem(Severity.WARNING, what, remedy))

    def fail(self, what: str, remedy: str) -> None:
        self.problems.append(Problem(Severity.ERROR, what, remedy))

    def add(self, error: StageError, severity: Severity = Severity.ERROR, remedy: str = MEND) -> None:
        """What a stage would end with; `remedy` where it names none."""
        self.problems.append(Problem(severity, error.what, error.remedy or remedy))


def first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__


class Verdict(NamedTuple):
    """One check over all ranks."""

    name: str
    severity: Severity
    facts: str
    problems: tuple[Problem, ...]


def verdict(name: str, alike: str, results: Sequence[Result]) -> Verdict:
    """Of check `name`; `results` are those of every rank in order, `alike` is the remedy when ranks differ."""
    problems: dict[Problem, list[int]] = {}
    for rank, result in enumerate(results):
        for problem in result.problems:
            problems.setdefault(problem, []).append(rank)
    told = [
        Problem(p.severity, p.what if len(ranks) == len(results) else f"{_ranks(ranks)}: {p.what}", p.remedy)
        for p, ranks in problems.items()
    ]
    differ = {name: values for name, values in _same_facts(results).items() if len(set(values)) > 1}
    if differ:
        listed = "; ".join(f"{name} ({side_by_side(values)})" for name, values in differ.items())
        told.append(Problem(Severity.ERROR, f"ranks differ in {listed}", alike))
    skipped = next((r.skipped for r in results if r.skipped), "")
    severity = max((p.severity for p in told), default=Severity.SKIPPED if skipped else Severity.OK)
    facts = [fact for fact in (skipped, *_facts(results)) if fact]
    return Verdict(name, severity, ", ".join(facts), tuple(sorted(told, key=lambda p: -p.severity)))


def _same_facts(results: Sequence[Result]) -> dict[str, list[str]]:
    """Of every fact that should be the same, what each rank found; without those that a rank had no chance to find."""
    names = dict.fromkeys(name for r in results for name in r.same)
    failed = [any(p.severity == Severity.ERROR for p in r.problems) for r in results]
    found = {name: [r.same.get(name, "missing") for r in results] for name in names}
    return {
        name: values
        for name, values in found.items()
        if not any(fail and name not in r.same for r, fail in zip(results, failed, strict=True))
    }


def _facts(results: Sequence[Result]) -> Iterator[str]:
    for name, values in _same_facts(results).items():
        if len(set(values)) == 1:  # else it is a problem
            yield f"{name} {values[0]}"
    for name in dict.fromkeys(name for r in results for name in r.own):
        values = [r.own.get(name, "unknown") for r in results]
        yield f"{name} {values[0]}" if len(set(values)) == 1 else f"{name} ({side_by_side(values)})"
    for name in dict.fromkeys(name for r in results for name in r.measured):
        numbers = [r.measured[name] for r in results if name in r.measured]
        low, high = (f"{v:.0f}" if v >= 100 else f"{v:.3g}" for v, _ in (min(numbers), max(numbers)))
        yield f"{name} {low if low == high else f'{low} to {high}'} {numbers[0][1]}".strip()


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


STYLES = {Severity.OK: "green", Severity.SKIPPED: "dim", Severity.WARNING: "yellow", Severity.ERROR: "bold red"}


def show(title: str, verdicts: Sequence[Verdict], seconds: float) -> None:
    """Print a line a check, and below it each problem with its remedy."""
    out = console()
    out.print(Text(f"rvc-dist doctor: {title}"), soft_wrap=True)
    widths = len(Severity.WARNING.name), max(len(v.name) for v in verdicts)
    for verdict in verdicts:
        line = Table.grid(padding=(0, 2))
        for width in widths:
            line.add_column(width=width, no_wrap=True)
        state = Text(verdict.severity.name.lower(), STYLES[verdict.severity])
        line.add_row(state, Text(verdict.name), Text(verdict.facts))
        out.print(line)
        indent = " " * (sum(widths) + 4)
        for problem in verdict.problems:  # not wrapped: remedies are there to be copied
            what = Text(f"{indent}{problem.severity.name}: {problem.what}", STYLES[problem.severity])
            out.print(what, soft_wrap=True)
            out.print(Text(f"{indent}remedy: {problem.remedy}"), soft_wrap=True)
    found = [p.severity for v in verdicts for p in v.problems]
    counts = {"error": found.count(Severity.ERROR), "warning": found.count(Severity.WARNING)}
    told = ", ".join(f"{count} {name}{'' if count == 1 else 's'}" for name, count in counts.items())
    out.print(Text(f"{told}; {seconds:.1f} s"))
