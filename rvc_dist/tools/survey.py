"""`rvc-dist dataset CORPUS --survey`: who speaks in a corpus and for how long, before a sample of it is decoded.

It is the pass with which preprocess begins, which ranks and array tasks share and which goes on after a kill; what it
finds is kept in the run folder, where preprocess takes it from.
"""

from __future__ import annotations

import statistics
from collections import defaultdict
from dataclasses import dataclass
from typing import Any

from rich.console import Console

from rvc_dist.config import Recipe
from rvc_dist.data.clip_files import by_reason
from rvc_dist.data.work_list import make_work_list
from rvc_dist.tools.tables import Columns, Figures, cells, plain_speakers, print_table, say
from rvc_dist.workspace import Shard, SourceFile, WorkList, Workspace, printable

MAX_SPEAKERS_SHOWN, MAX_REASONS_SHOWN = 20, 20
COLUMNS: Columns = {
    "recordings": (str, "recordings"),
    "min": ("{:.2f}".format, "minutes"),
    "shortest s": ("{:.2f}".format, "shortest_s"),
    "median s": ("{:.2f}".format, "median_s"),
    "longest s": ("{:.2f}".format, "longest_s"),
}


@dataclass(frozen=True)
class Survey:
    """What a work list tells of its recordings, or parts of recordings."""

    corpus: str
    seconds: dict[int, list[float]]
    """Of each recording, by speaker."""
    rate_s: dict[int, float]
    """Seconds by sample rate in Hz."""
    left_out: list[SourceFile]
    names: dict[int, str]

    @classmethod
    def of(cls, work_list: WorkList, names: dict[int, str]) -> Survey:
        lengths: dict[tuple[int, str, float], float] = defaultdict(float)
        rate_s: dict[int, float] = defaultdict(float)
        for file in (file for unit in work_list.units for file in unit.files):
            lengths[file.speaker, file.path, file.from_s] += file.duration_s  # of its slices
            rate_s[file.rate] += file.duration_s
        seconds: dict[int, list[float]] = defaultdict(list)
        for (speaker, _, _), length_s in sorted(lengths.items()):
            seconds[speaker].append(length_s)
        return cls(work_list.corpus, dict(seconds), dict(sorted(rate_s.items())), list(work_list.excluded), names)

    def to_plain(self) -> dict[str, Any]:
        every = [s for its in self.seconds.values() for s in its]
        speakers = plain_speakers({i: _figures(its) for i, its in self.seconds.items()}, self.names)
        reasons = [{"path": printable(f.path), "reason": f.reason} for f in self.left_out]
        rates = [{"sample_rate": rate, "minutes": seconds / 60} for rate, seconds in self.rate_s.items()]
        total = {"speakers": len(speakers), **_figures(every)}
        return {"corpus": self.corpus, "total": total, "sample_rates": rates, "speakers": speakers, "left_out": reasons}

    def show(self, out: Console) -> None:
        """All, sample rates, the speakers with the most and the least, and how much was left out for which reason."""
        by_minutes = sorted(self.seconds.items(), key=lambda found: (-sum(found[1]), found[0]))
        every = [s for its in self.seconds.values() for s in its]
        say(out, f"{self.corpus or 'Folders by speaker'}: {len(by_minutes)} speakers, {sum(every) / 3600:.2f} hours")
        minutes = [sum(its) / 60 for its in self.seconds.values()]
        least, middle, most = min(minutes), statistics.median(minutes), max(minutes)
        say(out, f"Minutes of a speaker: {least:.2f} the least, {middle:.2f} half of them, {most:.2f} the most")
        rates = ", ".join(f"{rate} Hz {seconds / 3600:.2f} h" for rate, seconds in self.rate_s.items())
        say(out, f"Sample rates: {rates}")
        half = MAX_SPEAKERS_SHOWN // 2
        shown = by_minutes if len(by_minutes) <= MAX_SPEAKERS_SHOWN else [*by_minutes[:half], *by_minutes[-half:]]
        named = [*((f"{i} ({self.names.get(i, i)})", its) for i, its in shown), ("all", every)]
        rows = [[name, *cells(_figures(its), COLUMNS)] for name, its in named]
        if len(shown) < len(by_minutes):
            rows.insert(half, [f"{len(by_minutes) - len(shown)} more, which --json has", *[""] * len(COLUMNS)])
        print_table(out, ["speaker", *COLUMNS], rows, "By minutes")
        alike = sorted(by_reason(self.left_out, lambda file: file.reason), key=len, reverse=True)
        for first, *others in alike[:MAX_REASONS_SHOWN]:
            say(out, f"Left out: {1 + len(others)}, as {printable(first.path)}: {first.reason}")


def survey(recipe: Recipe, shard: Shard) -> Survey:
    """Do this process's share of the pass, and once all is done say what it found.

    Raises:
        StageError: there is nothing that can be used.
    """
    work = Workspace(recipe.run_dir, recipe.name)
    return Survey.of(make_work_list(recipe, work, shard), work.speakers().names)


def _figures(seconds: list[float]) -> Figures:
    return {
        "recordings": len(seconds),
        "minutes": sum(seconds) / 60,
        "shortest_s": min(seconds),
        "median_s": statistics.median(seconds),
        "longest_s": max(seconds),
    }
