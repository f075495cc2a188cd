"""What the files of a run folder say: its data, its recipe, its history, which step to keep.

Every part may be missing, of an older version, or damaged: then `Facts.notes` says so, and the rest is there.
"""

from __future__ import annotations

import json
import re
import shlex
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple, TypedDict

from rvc_dist.config import Recipe
from rvc_dist.data.clip_files import account, low_rates, of_speakers, upsampled_recordings
from rvc_dist.report import PAGE
from rvc_dist.report.history import read_history
from rvc_dist.schema import Count, Seconds, SpeakerId, record
from rvc_dist.workspace import (
    CHECKPOINT_MANIFEST,
    CHECKPOINT_STATE,
    FileEntry,
    Speakers,
    StageError,
    WorkList,
    Workspace,
    list_checkpoints,
    noted,
    printable,
    read_json,
)

MEASURE = "mel_distance"
"""By which the best step is chosen."""
LEVEL = 0.01
"""A mel distance that differs by less is the same to the ear, and often but chance."""
FEW = 3
"""Validations of which nothing can be said on where the voice is going."""
MAX_NAMES, MAX_WARNINGS = 3, 40
LOG_BYTES, MAX_LOGS = 1 << 20, 64
_LOG_LINE = re.compile(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d\S* (WARNING|ERROR|CRITICAL) (.*)")


class OfSpeaker(TypedDict):
    """As `clip_files.of_speakers` has it."""

    speaker: SpeakerId
    recordings: Count
    seconds_in: Seconds
    seconds_out: Seconds
    rates: dict[str, Seconds]


ClipsReport = record(
    False,
    clips=Count,
    clip_seconds=Seconds,
    seconds_in=Seconds,
    lost=dict[str, Seconds],
    files_used=Count,
    files_left_out=Count,
    files_not_listed=Count,
    of_speakers=list[OfSpeaker],
    low_rates=str,
    upsampled=str,
    files=list[FileEntry],
)
Best = record(best_metric=float | None, best_step=Count, best_epoch=Count)
CheckpointState = record(False, progress=Best)
"""Of a checkpoint, what says which step is the best."""


class Data(NamedTuple):
    """What clips/report.json says."""

    minutes_in: float
    minutes: float
    clips: int
    used: int
    left_out: int
    speakers: list[list[str]]
    """Rows of label, recordings, minutes in and out, and the recordings' rates."""
    account: str
    lost: list[tuple[str, float, float]]
    """(why, seconds, share of all)."""
    reasons: list[tuple[str, int, str]]
    """(why, how many recordings were left out or are incomplete, such as)."""
    remarks: list[str]
    """On rates."""


class Advice(NamedTuple):
    """Which step to keep."""

    step: int | None
    """None: no number says it."""
    epoch: float
    why: str
    then: str
    """What to do about it."""


class Conversion(NamedTuple):
    """How to convert with the step that is advised."""

    export: str
    """What has to be run before; nothing where the voice file is there."""
    infer: str
    remark: str


@dataclass
class Facts:
    """Of one run folder."""

    work: Workspace
    name: str
    recipe: Recipe | None
    speakers: Speakers
    data: Data | None
    history: list[dict[str, Any]]
    kept: dict[str, Any]
    """What the newest checkpoint says of the best step; empty without one."""
    notes: list[str] = field(default_factory=list)
    """What is missing or damaged, and what to do."""

    @property
    def is_older(self) -> bool:
        """Trained by a version that wrote no history."""
        return not self.history and self.work.checkpoints_dir.exists()

    def lines(self, kind: str) -> list[dict[str, Any]]:
        return [line for line in self.history if line["kind"] == kind]

    @property
    def step(self) -> int:
        return max((line["step"] for line in self.history), default=0)

    @property
    def hardware(self) -> dict[str, Any]:
        """The newest line of kind run."""
        return (self.lines("run") or [{}])[-1]

    @property
    def state(self) -> str:
        """How far training came, in a few words."""
        if not self.history:
            return "trained, without a history" if self.is_older else "not trained yet"
        total = self.hardware.get("total_steps")
        at = f"step {self.step}" + (f" of {total}" if total else "")
        kinds = [line["kind"] for line in self.history if line["kind"] in ("run", "step", "end")]
        if kinds[-1:] != ["end"]:
            return f"at {at}; not ended when this page was made"
        return f"{self.lines('end')[-1]['why']}, at {at}"

    @property
    def minutes(self) -> float:
        """Of training, without the times between its parts."""
        seconds = [now["time"] - before["time"] for before, now in pairwise(self.history) if now["kind"] != "run"]
        return float(sum(seconds)) / 60

    @property
    def validation_share(self) -> float | None:
        """Of the time that training took."""
        spent = sum(line.get("seconds", 0.0) for line in self.lines("validation"))
        return spent / (60 * self.minutes) if self.minutes > 0 and spent else None

    @property
    def speed(self) -> float | None:
        """Seconds of audio a second, all ranks together: of the last fifth of the history, in the middle."""
        found = [line["values"].get("perf/audio_s_per_s") for line in self.lines("step")]
        last = sorted(v for v in found[len(found) * 4 // 5 :] if v is not None)
        return last[len(last) // 2] if last else None


def read_facts(root: Path) -> Facts:
    """Of a run folder.

    Raises:
        StageError: it is none.
    """
    if not root.is_dir():
        what = "is a file" if root.exists() else "does not exist"
        raise StageError(f"{root} {what};", "expected a run folder: rvc-dist report RUN")
    notes: list[str] = []
    bare = Workspace(root, "")
    recipe = bare.kept_recipe()
    if recipe is None:
        how = "is not one that this version reads" if bare.config_file.exists() else "is missing"
        notes.append(f"{bare.config_file.name} {how}: nothing is known of the recipe.")
    work = Workspace(root, recipe.name if recipe else root.resolve().name)
    found = (work.clips_dir, work.history_file, work.checkpoints_dir, work.voice_dir)
    if recipe is None and not any(path.exists() for path in found):
        raise StageError(f"{root} has nothing of a run in it;", "expected a run folder: rvc-dist report RUN")
    facts = Facts(work, work.name, recipe, Speakers(), None, [], {}, notes)
    with noted(notes):
        facts.speakers = work.speakers()
    with noted(notes):
        facts.history = read_history(work.history_file)
    with noted(notes):
        facts.kept = read_kept(work)
    if facts.is_older:
        notes.append(
            f"{work.history_file.name} is missing or empty: this run was trained by an older version. Its curves are "
            f"in TensorBoard (tensorboard --logdir {shlex.quote(str(work.tensorboard_dir))}); training on from here "
            "writes one."
        )
    with noted(notes):
        facts.data = read_data(work, recipe or Recipe(), facts.speakers, notes)
    return facts


def read_kept(work: Workspace) -> dict[str, Any]:
    """What the newest whole checkpoint says of the best step.

    Raises:
        StageError: it is damaged.
    """
    whole = [path for path in list_checkpoints(work.checkpoints_dir) if (path / CHECKPOINT_MANIFEST).is_file()]
    return read_json(whole[-1] / CHECKPOINT_STATE, CheckpointState).get("progress", {}) if whole else {}


def read_data(work: Workspace, recipe: Recipe, speakers: Speakers, notes: list[str]) -> Data | None:
    """The data card; None, with a note, where clips are not made yet.

    Raises:
        StageError: a file is damaged.
    """
    if not work.clips_report_file.is_file():
        work_list = WorkList.load(work.work_list_file)
        if work_list is None:
            notes.append("There are no clips yet: `rvc-dist preprocess` makes them.")
        else:
            count, undone = len(work_list.units), len(work_list.undone(work))
            notes.append(f"{undone} of {count} units of clips are not made yet: `rvc-dist preprocess` makes them.")
        return None
    report = read_json(work.clips_report_file, ClipsReport)
    files = list(map(dict, report.get("files", [])))
    seconds_in, lost = report.get("seconds_in", 0.0), report.get("lost", {})
    used = [file for file in files if file["clips"]]
    rates = [(file["sample_rate"], file["seconds_in"]) for file in used if file.get("sample_rate")]
    low, remedy = low_rates(recipe, rates)
    remarks = [f"{low}; {remedy}"] * bool(low) + [upsampled_recordings(recipe, used)]
    if not_listed := report.get("files_not_listed", 0):
        told = "`rvc-dist dataset --survey` shows all"
        notes.append(f"{work.clips_report_file} does not list {not_listed} recordings with nothing to say of: {told}.")
        remarks = [report.get("low_rates", ""), report.get("upsampled", "")]
    return Data(
        minutes_in=seconds_in / 60,
        minutes=report.get("clip_seconds", 0.0) / 60,
        clips=report.get("clips", 0),
        used=report.get("files_used", len(used)),
        left_out=report.get("files_left_out", len(files) - len(used)),
        speakers=[_speaker_row(speakers, found) for found in report.get("of_speakers") or of_speakers(used)],
        account=f"{account(seconds_in, lost).capitalize()}.",
        lost=[(why, seconds, seconds / max(seconds_in, seconds)) for why, seconds in lost.items() if seconds],
        reasons=_reasons(files),
        remarks=[f"{text}." for text in remarks if text],
    )


def _speaker_row(speakers: Speakers, found: Mapping[str, Any]) -> list[str]:
    seconds = Counter(found["rates"])
    rates = [f"{rate} Hz: {part / 60:.1f} min" for rate, part in seconds.most_common(MAX_NAMES) if rate != "0"]
    told = ", ".join(rates) if len(seconds) > 1 else "".join(rates).partition(":")[0]
    sums = (f"{found[key] / 60:.1f}" for key in ("seconds_in", "seconds_out"))
    return [speakers.label(found["speaker"]), str(found["recordings"]), *sums, told or "not known"]


def _reasons(files: list[dict[str, Any]]) -> list[tuple[str, int, str]]:
    by_reason: dict[str, list[str]] = {}
    for file in files:
        if file["reason"]:
            by_reason.setdefault(file["reason"], []).append(printable(file["path"]))
    return [
        (why, len(paths), ", ".join(paths[:MAX_NAMES]) + ", ..." * (len(paths) > MAX_NAMES))
        for why, paths in sorted(by_reason.items(), key=lambda item: -len(item[1]))
    ]


def flat(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """`{"train": {"seed": 1}}` -> `{"train.seed": 1}`."""
    found: dict[str, Any] = {}
    for key, value in tree.items():
        found |= flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return found


def recipe_changes(recipe: Recipe) -> list[tuple[str, str, str]]:
    """(key, default, value) of every key that is not as by default."""
    default = flat(Recipe(name=recipe.name).to_dict())
    default["name"] = Recipe.name
    values = flat(recipe.to_dict())
    return [(k, text_of(default.get(k)), text_of(v)) for k, v in values.items() if v != default.get(k)]


def text_of(value: object) -> str:
    """As a recipe would have it."""
    return value if isinstance(value, str) and value else json.dumps(value, ensure_ascii=False)


def advice(facts: Facts) -> Advice:
    """Which step to keep, and what to do about it."""
    judged = [line for line in facts.lines("validation") if "values" in line]
    best = next((line for line in reversed(judged) if line.get("is_best")), None)
    if best is None and facts.kept.get("best_metric") is not None:
        why = f"So says the newest checkpoint: its mel distance on held-out speech was {facts.kept['best_metric']:.4f}."
        then = "How it came there is not known: compare it with the newest voice by ear."
        return Advice(facts.kept["best_step"], facts.kept["best_epoch"], why, then)
    if best is None:
        why = "No validation gave a finite number." if judged else "No validation has been made."
        then = "Choose by ear among the voices that are there; data.holdout above 0 lets validation choose."
        return Advice(None, 0.0, why, then)
    values = [line["values"].get(MEASURE) for line in judged]
    since = [v for line, v in zip(judged, values, strict=True) if line["step"] > best["step"] and v is not None]
    lowest = best["values"].get(MEASURE)
    why = best.get("why") or "It has the smallest mel distance on held-out speech."
    why = f"{why[0].upper()}{why[1:].rstrip('.')}."
    return Advice(best["step"], best.get("epoch", 0.0), why, _then(facts, len(judged), lowest, since))


def _then(facts: Facts, count: int, lowest: float | None, since: list[float]) -> str:
    """What to do, given how many validations there were and the distances after the best."""
    if count < FEW:
        return f"With {count} validation{'s' * (count > 1)} nobody can say yet where the voice is going: train on."
    if not since:
        ended = facts.lines("end") and facts.history[-1]["kind"] == "end"
        more = "raise train.max_epochs (or train.max_steps) and run the same command again" if ended else "let it go on"
        return f"The best is the newest: the voice is still improving. Train longer: {more}."
    worse = min(since[-FEW:]) / lowest - 1 if lowest else 0.0
    if len(since) >= FEW and worse > LEVEL:
        return (
            f"It overtrains: the last {min(len(since), FEW)} validations are at least {worse:.1%} worse than the best. "
            "More steps will not help: keep the best. More or cleaner recordings would help, or a base model "
            "(train.pretrained); train.overtrain_detect true stops such a run by itself."
        )
    others = f"Since then {len(since)} validation{'s' * (len(since) > 1)} came out"
    if worse > LEVEL:
        return (
            f"{others} worse, by at least {worse:.1%}. So few may be chance: train on, and see whether it overtrains."
        )
    return (
        f"{others} within chance of it: the voice has nearly stopped improving. Compare this step and the newest by "
        "ear below; a later one may sound better."
    )


def conversion(facts: Facts, advised: Advice) -> Conversion:
    """The command that converts with the advised step, or the newest voice."""
    work, root = facts.work, str(facts.work.root)
    file, remark = voice_file(facts, advised)
    config = ["--config", str(work.config_file)] if facts.recipe else []
    at = [] if facts.recipe and facts.recipe.run_dir == root else ["--run_dir", root]
    words = ["rvc-dist", "infer", *config, *at, "--infer.model", str(file)]
    words += ["--infer.input", "song.wav", "--infer.output", "converted.wav"]
    export = "" if file.is_file() else shlex.join(["rvc-dist", "export", *config, *at])
    return Conversion(export, shlex.join(words), remark)


def voice_file(facts: Facts, advised: Advice) -> tuple[Path, str]:
    """The voice of the advised step, else the nearest to it; and what to know of it."""
    work = facts.work
    steps = {int(found[1]): path for path in work.voice_dir.glob("*.pth") if (found := _STEP.search(path.name))}
    steps |= {line["step"]: work.root / line["path"] for line in facts.lines("voice")}
    steps = {step: path for step, path in steps.items() if path.is_file()}
    best = work.voice_dir / f"{facts.name}_best.pth"
    if advised.step is None:
        newest = steps[max(steps)] if steps else work.last_voice_file
        return newest, "This is the newest voice."
    if advised.step in steps:
        return steps[advised.step], f"This is the voice of step {advised.step}."
    judged_at = max((line["time"] for line in facts.lines("validation") if line.get("is_best")), default=0.0)
    if best.is_file() and best.stat().st_mtime >= judged_at:
        return best, f"This is the voice of step {advised.step}, as exported."
    return best, f"The voice of step {advised.step} is in a checkpoint, from which export writes it."


_STEP = re.compile(r"_(\d+)s\.pth$")


def warnings(facts: Facts) -> list[tuple[str, int]]:
    """(text, how often) of what was warned of: in the history, and in the logs of the ranks, also of data stages."""
    texts: Counter[str] = Counter()
    for path in sorted(facts.work.logs_dir.glob("rank_*.log"))[:MAX_LOGS]:
        with path.open("rb") as stream:
            stream.seek(max(0, stream.seek(0, 2) - LOG_BYTES))
            lines = stream.read(LOG_BYTES).decode("utf-8", "replace").splitlines()
        texts.update(found[2] for line in lines if (found := _LOG_LINE.match(line)) and found[2])
    for line in facts.lines("warning"):
        head = line["text"].partition("\n")[0]
        if head and head not in texts:
            texts[head] += 1
    others = [(text, count) for text, count in texts.items() if f"{PAGE}: " not in text]  # this one is made
    return others[-MAX_WARNINGS:]
