"""`rvc-dist report RUN`: RUN/report.html, one page that needs nothing beside it; of several runs, how they differ.

Texts pass through `shown` and are escaped by the template: names of files and speakers may be anything. The page may
load nothing, by its own policy.
"""

from __future__ import annotations

import logging
import re
import secrets
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from rvc_dist import __version__
from rvc_dist.config import Recipe
from rvc_dist.files import atomic_write
from rvc_dist.report import PAGE, figures
from rvc_dist.report.facts import (
    Advice,
    Facts,
    advice,
    conversion,
    flat,
    read_facts,
    recipe_changes,
    text_of,
    warnings,
)
from rvc_dist.report.figures import Curve, Scale
from rvc_dist.report.sounds import Phrase, Samples, embed, read_samples
from rvc_dist.workspace import Shard

logger = logging.getLogger(__name__)

COMPARISON = "comparison.html"
MAX_SPECTROGRAMS = 6
MAX_CURVES = 6
"""Of a figure: speakers, or runs."""
MAX_ROWS = 40
"""Of a table."""


class Measure(NamedTuple):
    """A number of a validation."""

    label: str
    unit: str
    about: str
    text: str = "{:.3f}"


MEASURES = {
    "mel_distance": Measure("Mel distance", "log10", "how far the spectrum is from the recording's; 0 is the same"),
    "mcd_db": Measure("Mel-cepstral distance", "dB", "the same for the colour of the voice alone", "{:.2f}"),
    "f0_cents": Measure("Pitch error", "cents", "100 are a semitone", "{:.1f}"),
    "voicing_error": Measure("Voicing error", "share", "frames that are voiced in one of both alone"),
    "loudness_db": Measure("Loudness error", "dB", "how far frames are from the recording's loudness", "{:.2f}"),
    "similarity": Measure("Speaker similarity", "1 is the same", "how alike the voices are; the higher the better"),
    "content_similarity": Measure(
        "Content similarity", "1 is the same", "how alike the words are; the higher the better"
    ),
    "target_similarity": Measure("Similarity to the target", "1 is the same", "how alike result and target sound"),
}
CURVES: tuple[tuple[str, str, tuple[str, ...], Scale], ...] = (
    ("Mel loss", "loss", ("loss/g_mel",), "fitted"),
    ("Generator, weighted sum", "loss", ("loss/g_total",), "fitted"),
    ("Generator against discriminator", "loss", ("loss/g_adv", "loss/d"), "fitted"),
    ("Feature matching and KL", "loss", ("loss/g_fm", "loss/g_kl"), "fitted"),
    ("Learning rate", "", ("train/lr", "train/lr_d"), "from zero"),
    ("Gradient norms", "norm", ("grad/norm_g", "grad/norm_d"), "logarithmic"),
    ("Throughput", "s of audio a second", ("perf/audio_s_per_s",), "from zero"),
)
"""(title, unit, values, scale) of the first figures; every other loss has its own."""


WEIGHTS = {"values_raw": "raw weights", "values_ema": "their average"}
UNSEEN = "Of speakers whom training never hears, converted into trained voices, against their own recordings."


class Drawing(NamedTuple):
    title: str
    about: str
    svg: Markup


def run(recipe: Recipe, shard: Shard, runs: list[str] | None = None) -> None:
    """Write the page of the recipe's run or of the one in `runs`, or the comparison of several into the first of them.

    Raises:
        StageError: one of them is no run folder.
    """
    if not shard.is_first:
        return
    roots = [Path(root) for root in runs or [recipe.run_dir]]
    path = write_page(roots[0]) if len(roots) == 1 else write_comparison(roots)
    logger.info("%s: %.1f MB; open it in any browser", path, path.stat().st_size / 1e6)


def write_page(root: Path) -> Path:
    """Make RUN/report.html of what is in the run folder now.

    Raises:
        StageError: it is no run folder.
        OSError: the page cannot be written.
    """
    began_at = time.monotonic()
    facts = read_facts(root)
    advised = advice(facts)
    samples = embed(read_samples(root / "samples", facts.notes), advised.step, facts.notes)
    return write(
        root / PAGE,
        "page.html.j2",
        facts=facts,
        advised=advised,
        conversion=conversion(facts, advised),
        drawings=list(drawings(facts, advised)),
        validations=validation_table(facts),
        unseen=validation_table(facts, "unseen"),
        about_unseen=UNSEEN,
        by_speaker=speaker_table(facts, advised),
        measures=MEASURES,
        most_rows=MAX_ROWS,
        warnings=warnings(facts),
        samples=samples,
        spectrograms=spectrograms(samples, advised),
        changes=recipe_changes(facts.recipe) if facts.recipe else [],
        seconds=lambda: time.monotonic() - began_at,
    )


def write_comparison(roots: Sequence[Path]) -> Path:
    """Make comparison.html in the first of several run folders.

    Raises:
        StageError, OSError: as `write_page`.
    """
    every = [read_facts(root) for root in roots]
    advised = [advice(facts) for facts in every]
    labels = run_labels(every)
    return write(
        roots[0] / COMPARISON,
        "comparison.html.j2",
        labels=labels,
        rows=comparison_rows(every, advised),
        recipes=differing_keys(every),
        drawings=list(comparison_drawings(every)),
        phrases_of=compared_phrases(every, advised, labels),
        notes=[f"{label}: {note}" for label, facts in zip(labels, every, strict=True) for note in facts.notes],
    )


def write(path: Path, template: str, **values: Any) -> Path:
    """The page that `template` makes of the `values`."""
    environment = Environment(
        loader=PackageLoader("rvc_dist.report", "."),
        autoescape=True,
        finalize=shown,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    made_at = time.strftime("%Y-%m-%d %H:%M:%S %Z")
    nonce = secrets.token_urlsafe(12)  # of the only script that may run
    html = environment.get_template(template).render(values, version=__version__, made_at=made_at, nonce=nonce)
    atomic_write(path, html.encode("utf-8", "backslashreplace"))
    return path


def shown(value: object) -> object:
    """A text with what cannot be seen, or turns the direction of what follows, as escapes; anything else as it is."""
    if not isinstance(value, str) or isinstance(value, Markup) or value.isprintable():
        return value
    return re.sub(
        r"[^\n]", lambda c: c[0] if c[0].isprintable() else c[0].encode("unicode_escape").decode("ascii"), value
    )


def curve(facts: Facts, name: str, label: str, kind: str = "step", speaker: str = "", part: str = "values") -> Curve:
    """A value of the history over its steps; what was not finite is left out."""
    found = [
        (line["step"], value)
        for line in facts.lines(kind)
        for values in [line.get("speakers", {}).get(speaker, {}) if speaker else line.get(part, {})]
        if (value := values.get(name)) is not None
    ]
    return Curve(label, [step for step, _ in found], [value for _, value in found])


def drawings(facts: Facts, advised: Advice) -> Iterator[Drawing]:
    """All curves of a run."""
    marks = {} if advised.step is None else {"best": float(advised.step)}
    for name in values_of(facts, "validation"):
        measure = measure_of(name)
        lines = [curve(facts, name, "mean", "validation")]
        judged = facts.lines("validation")[-1].get("speakers", {})
        if len(judged) > 1:
            lines += [curve(facts, name, f"speaker {s}", "validation", s) for s in list(judged)[: MAX_CURVES - 1]]
        about = f"On held-out speech: {measure.about}." if measure.about else "On held-out speech."
        about += f" The first speakers of {len(judged)}." if len(judged) >= MAX_CURVES else ""
        for part, label in WEIGHTS.items():
            lines += [curve(facts, name, label, "validation", part=part)]
        yield from drawing(measure.label, about, lines, measure.unit, marks=marks)
    for name in values_of(facts, "validation", "unseen"):
        measure, lines = measure_of(name), [curve(facts, name, "mean", "validation", part="unseen")]
        yield from drawing(f"Unseen speakers: {measure.label.lower()}", UNSEEN, lines, measure.unit)
    logged = values_of(facts, "step")
    groups = list(CURVES)
    known = {name for group in groups for name in group[2]} | {"train/epoch"}
    groups += [(name, "loss", (name,), "fitted") for name in logged if name not in known and name.startswith("loss/")]
    for title, unit, names, scale in groups:
        lines = [curve(facts, name, name.partition("/")[2]) for name in names if name in logged]
        yield from drawing(title, "", lines, unit, scale)
    steps = [line for line in facts.lines("step") if line.get("seconds")]
    if steps:
        parts = list(dict.fromkeys(name for line in steps for name in line["seconds"]))
        values = {name: [line["seconds"].get(name) or 0.0 for line in steps] for name in parts}
        svg = figures.shares([line["step"] for line in steps], values, "What a step's seconds are spent on")
        yield Drawing("Seconds a step", "Where its time goes; data is the wait for clips.", svg)


def drawing(
    title: str,
    about: str,
    lines: Sequence[Curve],
    unit: str,
    scale: Scale = "fitted",
    marks: dict[str, float] | None = None,
) -> Iterator[Drawing]:
    """Nothing where there is nothing to draw."""
    if lines := [line for line in lines if line.steps]:
        yield Drawing(title, about, figures.curves(lines, unit, f"{title} over steps", scale, marks))


def values_of(facts: Facts, kind: str, part: str = "values") -> list[str]:
    """The names of all values in lines of a kind."""
    return in_order(name for line in facts.lines(kind) for name in line.get(part, {}))


def in_order(names: Iterable[str]) -> list[str]:
    """Each once, those of MEASURES first."""
    found = dict.fromkeys(names)
    return [name for name in MEASURES if name in found] + [name for name in found if name not in MEASURES]


def measure_of(name: str) -> Measure:
    return MEASURES.get(name, Measure(name, "", ""))


def number(values: Mapping[str, float | None], name: str) -> str:
    if name not in values:
        return ""
    value = values[name]
    return "not finite" if value is None else measure_of(name).text.format(value)


Table = tuple[list[str], list[list[str]]]
"""Head and rows."""


def table(first: str, rows: Sequence[tuple[str, Mapping[str, float | None]]]) -> Table:
    """Of (what was judged, its values)."""
    names = in_order(name for _, values in rows for name in values)
    head = [first, *(measure_of(name).label for name in names)]
    return head, [[label, *(number(values, name) for name in names)] for label, values in rows]


def validation_table(facts: Facts, part: str = "values") -> Table:
    """All validations, the newest first, or as many as a table bears and the best among them."""
    lines = [line for line in facts.lines("validation") if part in line]
    best = [line["step"] for line in lines if line.get("is_best")][-1:]
    kept = [line for i, line in enumerate(lines) if i >= len(lines) - MAX_ROWS or line["step"] in best]
    return table("step", [(f"{s['step']}{' ★' * (s['step'] in best)}", s[part]) for s in reversed(kept)])


def speaker_table(facts: Facts, advised: Advice) -> Table:
    """The speakers, where there are several, at the advised step or the last."""
    lines = [line for line in facts.lines("validation") if len(line.get("speakers", {})) > 1]
    lines = [line for line in lines if line["step"] == advised.step] or lines
    judged = lines[-1]["speakers"].items() if lines else ()
    return table("speaker", [(facts.speakers.label(int(s)) if s.isdecimal() else s, v) for s, v in judged][:MAX_ROWS])


def spectrograms(samples: Samples, advised: Advice) -> list[Drawing]:
    """What was made of each phrase at the advised step and the last, below the original."""
    found = []
    for phrase in samples.phrases[:MAX_SPECTROGRAMS]:
        made = [sound for sound in phrase.sounds if sound.step is not None]
        wanted = [s for s in phrase.sounds if s.step is None] + [s for s in made if s.step == advised.step]
        wanted += [s for s in made[-1:] if s not in wanted]
        rows = [(s.label + " (best)" * (s.step == advised.step is not None), s.wave, s.rate) for s in wanted]
        svg = figures.spectrograms(rows, "Spectrograms, the original first")
        found.append(Drawing(phrase.title, phrase.kind_label, svg))
    return found


def run_labels(every: Sequence[Facts]) -> list[str]:
    """Short names, each once."""
    names = [facts.work.root.resolve().name for facts in every]
    return [name if names.count(name) == 1 else f"{name} ({i + 1})" for i, name in enumerate(names)]


def comparison_rows(every: Sequence[Facts], advice_of: Sequence[Advice]) -> list[list[str]]:
    """A row a quantity, a cell a run."""
    judged = in_order(name for facts in every for name in values_of(facts, "validation"))
    columns = []
    for facts, advised in zip(every, advice_of, strict=True):
        at = [line for line in facts.lines("validation") if line["step"] == advised.step and "values" in line]
        ranks = facts.hardware.get("ranks", [])
        column = {
            "state": facts.state,
            "minutes in clips": f"{facts.data.minutes:.1f}" if facts.data else "",
            "speakers": str(len(facts.data.speakers)) if facts.data else "",
            "steps": str(facts.step),
            "minutes of training": f"{facts.minutes:.1f}",
            "ranks": str(len(ranks)),
            "device": ", ".join(dict.fromkeys(rank["name"] for rank in ranks)),
            "clips a step": str(facts.hardware.get("global_batch", "")),
            "seconds of audio a second": "" if facts.speed is None else f"{facts.speed:.1f}",
            "best step": "" if advised.step is None else str(advised.step),
        }
        values = at[-1]["values"] if at else {}
        columns.append(column | {f"{measure_of(name).label} (best step)": number(values, name) for name in judged})
    rows = ([name, *(column[name] for column in columns)] for name in columns[0])
    return [row for row in rows if any(row[1:])]


def differing_keys(every: Sequence[Facts]) -> list[list[str]]:
    """(key, its value in each run) of every key of the recipes that is not the same in all."""
    trees = [flat(facts.recipe.to_dict()) if facts.recipe else {} for facts in every]
    keys = dict.fromkeys(key for tree in trees for key in tree)
    cells = ([key, *(text_of(tree[key]) if key in tree else "not known" for tree in trees)] for key in keys)
    return [row for row in cells if len(set(row[1:])) > 1 and row[0] not in ("name", "run_dir")]


def comparison_drawings(every: Sequence[Facts]) -> Iterator[Drawing]:
    names = in_order(name for facts in every for name in values_of(facts, "validation"))
    wanted = [(name, "validation", measure_of(name)) for name in names]
    wanted += [(name, "step", Measure(name, unit, "")) for _, unit, names, _ in CURVES for name in names]
    for name, kind, measure in wanted:
        lines = [curve(facts, name, f"{i}", kind) for i, facts in enumerate(every[:MAX_CURVES], 1)]
        yield from drawing(measure.label, measure.about, lines, measure.unit)


def compared_phrases(every: Sequence[Facts], advised: Sequence[Advice], labels: Sequence[str]) -> list[Phrase]:
    """The phrases that several runs have, each with one sound of every run: its best step's, else its newest."""
    together: dict[tuple[str, str, str], Phrase] = {}
    for i, (facts, best) in enumerate(zip(every, advised, strict=True)):
        for phrase in read_samples(facts.work.root / "samples", facts.notes):
            steps = sorted(phrase.files)
            step = best.step if best.step in phrase.files else steps[-1]
            key = phrase.kind, phrase.title, re.sub(r", [+-]\d+ semitones$", "", phrase.source)
            same = together.setdefault(key, Phrase(*key, "", None))
            same.original = same.original or phrase.original
            same.files[i] = phrase.files[step]
    shared = [phrase for phrase in together.values() if len(phrase.files) > 1]
    notes: list[str] = []
    samples = embed(shared, None, notes)
    for phrase in samples.phrases:
        phrase.sounds = [s if s.step is None else s._replace(label=labels[s.step]) for s in phrase.sounds]
    return samples.phrases
