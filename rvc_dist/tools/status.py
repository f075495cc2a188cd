"""`rvc-dist status RUN ...`: what is done of a run, what is stale and why, who works on it and how far they are.

Reads files of the run folder alone, imports no torch, and compares no clocks: a process on another host lives when its
file changes while one looks. Whether a stage is done is asked of the functions by which the stages themselves know it.
"""

from __future__ import annotations

import contextlib
import json
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rvc_dist.config import ConfigError, Recipe, recipe_of
from rvc_dist.data import clip_files
from rvc_dist.data.remote import cache_folder, cached
from rvc_dist.data.sources import list_sources, listing_of
from rvc_dist.features import feature_files, index_file
from rvc_dist.files import ForeignFileError
from rvc_dist.report.history import read_history
from rvc_dist.runtime.heartbeat import read_beats
from rvc_dist.runtime.job_file import read_jobs
from rvc_dist.runtime.logs import read_failure
from rvc_dist.runtime.run_lock import REFRESH_S, described, holder, is_running, job
from rvc_dist.screen import duration
from rvc_dist.tools.experiment import find_layout
from rvc_dist.train.progress import Progress, is_overtrained
from rvc_dist.workspace import (
    CHECKPOINT_MANIFEST,
    CHECKPOINT_STATE,
    Shard,
    StageError,
    WorkList,
    Workspace,
    changes,
    fingerprint,
    list_checkpoints,
    noted,
    printable,
    read_header,
    read_json,
)

EXIT_NO_RUN = 1
MISSING, PART, STALE, DONE, RUNNING, UNKNOWN = "missing", "part", "stale", "done", "running", "unknown"
WATCH_S = 5.0
SHOWN_RANKS = 4
"""Of more ranks only the one that is in its phase for the longest is shown; JSON has all."""


@dataclass(frozen=True)
class StageState:
    """How a stage stands."""

    state: str
    """MISSING, PART, STALE, DONE, RUNNING; UNKNOWN where there is no recipe to compare with."""
    why: str = ""
    done: int | None = None
    """Units; of training steps, of export voice files."""
    total: int | None = None


def run(
    recipe: Recipe, shard: Shard, runs: list[str], given: list[tuple[str, str]], as_json: bool, watches: bool
) -> int:
    """Print how each of `runs` stands, compared with its own recipe and the keys that are `given`.

    Returns:
        EXIT_NO_RUN where one of them is no run folder; what a run does or failed at is no failure of this command.
    """
    if not shard.is_first:
        return 0
    roots = [Path(run) for run in runs or [recipe.run_dir]]
    while True:
        states = [state_of(root, given) for root in roots]
        if watches and sys.stdout.isatty() and not as_json:
            sys.stdout.write("\x1b[2J\x1b[H")
        if as_json:
            text = json.dumps(states if len(states) != 1 else states[0], indent=None if watches else 1, default=str)
        else:
            text = "\n\n".join("\n".join(lines(state)) for state in states)
        sys.stdout.write(f"{text}\n")
        sys.stdout.flush()
        if not watches:
            return EXIT_NO_RUN if any(state["kind"] != "run" for state in states) else 0
        time.sleep(WATCH_S)


def state_of(root: Path, given: list[tuple[str, str]] | None = None) -> dict[str, Any]:
    """All that is known of the run in `root`, as plain data: docs/run-folder.md has its keys."""
    state: dict[str, Any] = {"run": str(root), "kind": "run", "what": "", "notes": []}
    if what := no_run(root):
        return state | {"kind": "none", "what": what}
    notes: list[str] = state["notes"]
    recipe = recipe_in(root, given or [], notes)
    work = Workspace(root, recipe.name if recipe else root.name)
    with noted(notes):
        state["name"] = work.name
    jobs, lock = list(read_jobs(work)), None
    with noted(notes):
        lock = holder(work.train_lock_file)
    look_for_life(work, [*jobs, *([lock] if lock else [])])
    state["lock"] = lock
    state["running"] = [j for j in jobs if j["alive"] is not False and (j["rank"] == 0 or j["array"])]
    state["last"] = last_of(jobs, state["running"])
    path, progress, damaged = newest_checkpoint(work)
    state["data"] = remote_data(recipe, notes) if recipe and recipe.data.remote else None
    state["checkpoint"] = progress and {"path": str(path), "step": progress.step, "epoch": progress.epoch}
    state["damaged_checkpoints"] = damaged
    state["voices"] = sorted(p.name for p in work.voice_dir.glob("*.pth"))
    state["training"] = training(work, progress, state["running"], notes)
    state["stages"] = {name: vars(stage) for name, stage in stages(work, recipe, path, progress, notes)}
    now = {name for j in state["running"] for name in (j["stage"], (j["doing"] or {}).get("what", "").split(":")[0])}
    now |= {"train"} if state["training"] and state["training"]["ranks"] else set()
    for name in now & state["stages"].keys():
        state["stages"][name]["state"] = RUNNING
    state["requeue"] = None
    with noted(notes):
        state["requeue"] = read_json(work.requeue_file) if work.requeue_file.is_file() else None
    state["failures"] = list(failures(work, max((j["began_at"] for j in jobs), default=0.0)))
    state["state"] = overall(state)
    return state


def no_run(root: Path) -> str:
    """What a folder is that no run of rvc_dist is in, or nothing."""
    if not root.exists():
        return "does not exist"
    if not root.is_dir():
        return "is a file, expected a run folder"
    work = Workspace(root, "")
    ours = (work.config_file, work.work_list_file, work.checkpoints_dir, work.logs_dir, work.features_dir)
    if any(path.exists() for path in ours):
        return ""
    with contextlib.suppress(StageError, OSError):
        layout = find_layout(root)
        return f"is an experiment of {layout.tools}: `rvc-dist import {root}` takes it over"
    if not any(root.iterdir()):
        return "is empty: nothing was begun here"
    inside = sorted(p.name for p in root.iterdir() if (p / "config.yaml").is_file())
    more = f"; it holds runs: {', '.join(map(printable, inside[:5]))}" if inside else ""
    return f"is no run folder of rvc_dist{more}"


def recipe_in(root: Path, given: list[tuple[str, str]], notes: list[str]) -> Recipe | None:
    """The run's own recipe with what is `given`; None where there is none."""
    own = root / "config.yaml"
    if not own.is_file() and not any(key == "config" for key, _ in given):
        notes.append(f"{own} is missing: what was made cannot be compared with a recipe (--config FILE names one)")
        return None
    try:
        return recipe_of([*([("config", str(own))] if own.is_file() else []), *given, ("run_dir", str(root))])
    except (ConfigError, OSError) as error:
        notes.append(str(error))
        return None


def look_for_life(work: Workspace, jobs: list[dict[str, Any]]) -> None:
    """Set `alive` of each of `jobs`: None for one that is not seen from here and gave no sign for some seconds."""
    mine = job()
    for other in jobs:
        other["alive"] = False if other.get("ended") else is_running(other, mine)
    unseen = [other for other in jobs if other["alive"] is None]
    deadline = time.monotonic() + 3 * REFRESH_S
    while unseen and time.monotonic() < deadline:
        time.sleep(0.25)
        beats = {j["path"]: j["beat"] for j in read_jobs(work)}
        with contextlib.suppress(StageError, OSError):
            beats |= {lock["path"]: lock["beat"] for lock in [holder(work.train_lock_file)] if lock}
        for other in unseen:
            if beats.get(other["path"], other["beat"]) != other["beat"]:
                other["alive"] = True
        unseen = [other for other in unseen if other["alive"] is None]


def last_of(jobs: list[dict[str, Any]], running: list[dict[str, Any]]) -> dict[str, Any] | None:
    """The command that ended last: killed where it did so without a word."""
    over = [j for j in jobs if j["rank"] == 0 and not running]
    return {**over[0], "ended": over[0]["ended"] or "killed"} if over else None


def newest_checkpoint(work: Workspace) -> tuple[Path | None, Progress | None, list[str]]:
    """The newest checkpoint whose files are as long as they were written, where it stands, and those that are not."""
    damaged: list[str] = []
    for path in reversed(list_checkpoints(work.checkpoints_dir)):
        try:
            sizes = {name: file["bytes"] for name, file in read_json(path / CHECKPOINT_MANIFEST).items()}
            if any((path / name).stat().st_size != size for name, size in sizes.items()):
                raise StageError("a file is shorter or longer than it was written")
            return path, Progress.from_file(read_json(path / CHECKPOINT_STATE)["progress"]), damaged
        except (StageError, OSError, KeyError, TypeError, ValueError, AttributeError):
            damaged.append(path.name)
    return None, None, damaged


def training(
    work: Workspace, progress: Progress | None, running: list[dict[str, Any]], notes: list[str]
) -> dict[str, Any] | None:
    """Where training is, from its history, its newest checkpoint and what its ranks say now."""
    history: list[dict[str, Any]] = []
    with noted(notes):
        history = read_history(work.history_file)
    last = {line["kind"]: line for line in history}
    beats = list(read_beats(work.logs_dir, min(j["began_at"] for j in running))) if running else []
    bars = [j["doing"] for j in running if j["doing"] and j["doing"]["what"] == "train"]
    if not (last or progress or beats):
        return None
    steps = [line["step"] for line in history[-1:]] + [beat["step"] for beat in beats[:1]]
    best = [line for line in history if line["kind"] == "validation" and line.get("is_best")]
    return {
        "step": max([*steps, progress.step if progress else 0]),
        "total_steps": last.get("run", {}).get("total_steps"),
        "epoch": last["step"]["epoch"] if "step" in last else progress.epoch if progress else 0,
        "left_s": bars[0]["left_s"] if bars else None,
        "values": last["step"]["values"] if "step" in last else {},
        "validation": last.get("validation"),
        "best_step": best[-1]["step"] if best else progress.best_step if progress and progress.best_step else None,
        "end": last["end"]["why"] if "end" in last and not running else None,
        "ranks": [{key: beat[key] for key in ("rank", "host", "pid", "step", "phase", "in_phase_s")} for beat in beats],
    }


def stages(
    work: Workspace, recipe: Recipe | None, path: Path | None, progress: Progress | None, notes: list[str]
) -> Iterator[tuple[str, StageState]]:
    """Each stage of `run` and how it stands; what `data.remote` holds was made elsewhere, and needs no index."""
    is_remote = recipe is not None and recipe.data.remote is not None
    for name, ask in (("preprocess", _preprocess), ("extract", _extract), ("index", _index)):
        found = StageState(DONE, "elsewhere: data.remote") if is_remote else StageState(UNKNOWN)
        if recipe is not None and (not is_remote or (name == "index" and work.index_report_file.is_file())):
            with noted(notes):
                found = ask(work, recipe)
        yield name, found
    yield "train", _train(recipe, progress)
    yield "export", _export(work, path, progress)


def remote_data(recipe: Recipe, notes: list[str]) -> dict[str, Any]:
    """Where the clips come from, and how much of them this machine's cache has."""
    found = None
    with noted(notes):
        found = cached(recipe)
    state = {"remote": recipe.data.remote, "cache": str(cache_folder(recipe)), "cache_gb": recipe.data.cache_gb}
    return state | (found._asdict() if found else {"units": None})


def _preprocess(work: Workspace, recipe: Recipe) -> StageState:
    work_list = WorkList.load(work.work_list_file)
    if work_list is None:
        return StageState(MISSING)
    total = len(work_list.units)
    count = total - len(work_list.undone(work)), total
    if not clip_files.complete(recipe):
        wanted = clip_files.clip_settings(recipe)
        if work_list.imported_from is not None:
            wanted = clip_files.imported_clip_settings(recipe)
        why = changes(clip_files.SINCE | work_list.settings, clip_files.SINCE | wanted)
        return StageState(STALE if why else PART, why, *count)
    if work_list.imported_from is None:
        try:
            sources, _ = list_sources(Path(recipe.data.audio_dir), work)
        except StageError as error:
            return StageState(DONE, f"the recordings are not there now: {error}", *count)
        if listing_of(sources) != work_list.listing:
            return StageState(STALE, f"recordings in {recipe.data.audio_dir} are new, changed or gone", *count)
    return StageState(DONE, "", *count)


def _extract(work: Workspace, recipe: Recipe) -> StageState:
    report, work_list = feature_files.read_report(work), WorkList.load(work.work_list_file)
    clips = work_list.fingerprints() if work_list is not None else {}
    settings, made, done = feature_files.feature_settings(recipe), 0, 0
    for unit, wanted in clips.items():
        if header := read_header(work.features_file(unit.id)):
            embedder = header.get("embedder", {})
            known = (settings | {"embedder": embedder}, feature_files.imported_feature_settings(recipe, embedder))
            made, done = made + 1, done + (header.get("stamp") in [fingerprint(s, wanted) for s in known])
    if work_list is None or not (report or made):
        return StageState(MISSING)
    count = done, len(clips)
    if work_list.undone(work):
        return StageState(STALE, "the clips are not all made", *count)
    if feature_files.complete(recipe):
        return StageState(DONE, "", *count)
    if report is None:
        return StageState(PART, "", *count)
    before, now = feature_files.SINCE | report["settings"], feature_files.SINCE | settings
    return StageState(STALE, changes(before, now, shared=True) or "the clips are others than they were", *count)


def _index(work: Workspace, recipe: Recipe) -> StageState:
    if not work.index_report_file.is_file():
        return StageState(MISSING)
    if not work.features_report_file.is_file():
        return StageState(STALE, "the features are not all made")
    return StageState(DONE) if index_file.complete(recipe) else StageState(STALE, "other features or index settings")


def _train(recipe: Recipe | None, progress: Progress | None) -> StageState:
    if progress is None:
        return StageState(MISSING)
    if recipe is None:
        return StageState(UNKNOWN, done=progress.step)
    config = recipe.train
    if is_overtrained(config, progress):
        return StageState(DONE, "overtrained", progress.step)
    is_over = progress.epoch >= config.max_epochs or (config.max_steps or progress.step + 1) <= progress.step
    return StageState(DONE if is_over else PART, "", progress.step)


def _export(work: Workspace, path: Path | None, progress: Progress | None) -> StageState:
    count = len(list(work.voice_dir.glob("*.pth")))
    if not work.last_voice_file.is_file():
        return StageState(PART if count else MISSING, "", count or None)
    if path is None or progress is None:
        return StageState(DONE, "no checkpoint is left", count)
    if work.last_voice_file.stat().st_mtime < (path / CHECKPOINT_MANIFEST).stat().st_mtime:
        return StageState(STALE, f"step {progress.step} is newer than {work.last_voice_file.name}", count)
    return StageState(DONE, "", count)


def failures(work: Workspace, began_at: float) -> Iterator[dict[str, Any]]:
    """What ranks failed at since the last command began, by the clock of the disk."""
    for path in work.failure_files():
        with contextlib.suppress(OSError, ForeignFileError):
            if path.stat().st_mtime >= began_at:
                yield read_failure(path)


def overall(state: dict[str, Any]) -> str:
    """running, failed, stopped, killed, done or unfinished."""
    if state["running"]:
        return RUNNING
    if state["failures"]:
        return "failed"
    if state["requeue"]:
        return "stopped"
    if all(stage["state"] == DONE for stage in state["stages"].values()):
        return DONE
    ended = state["last"] and state["last"]["ended"]
    return ended if ended in ("failed", "stopped", "killed") else "unfinished"


def lines(state: dict[str, Any]) -> Iterator[str]:
    """For people."""
    if state["kind"] != "run":
        yield f"{printable(state['run'])} {state['what']}"
        return
    yield f"{printable(state['run'])}: {state['name']}, {state['state']}"
    rows = [("running", _running(found)) for found in state["running"]]
    rows += [("data", _data(state["data"]))] if state["data"] else []
    rows += [(name, _stage(name, stage, state["training"])) for name, stage in state["stages"].items()]
    rows += _trained(state["training"]) if state["training"] else []
    rows += _ends(state)
    if state["checkpoint"]:
        rows.append(("checkpoint", state["checkpoint"]["path"]))
    rows += [("damaged", name) for name in state["damaged_checkpoints"]]
    if state["voices"]:
        rows.append(("voices", ", ".join(map(printable, state["voices"]))))
    rows += [("note", note) for note in state["notes"]]
    for label, text in rows:
        yield f"  {label:<11}{text}".rstrip()


def _data(data: dict[str, Any]) -> str:
    here = "nothing was fetched to this machine yet"
    if data["units"] is not None:
        here = (
            f"{data['units']} of {data['all_units']} units, {data['bytes'] / 1e9:.3g} of {data['all_bytes'] / 1e9:.3g}"
        )
        here += f" GB, of at most {data['cache_gb']:g}"
    return f"{data['remote']}; in {data['cache']}: {here}"


def _ends(state: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """Who holds the lock, and how the last command ended."""
    if state["lock"]:
        alive = {True: "", False: ", which runs no more", None: ", of which nothing was heard while this looked"}
        yield "lock", f"{described(state['lock'])}{alive[state['lock']['alive']]}"
    for failure in state["failures"]:
        yield "failed", f"rank {failure['rank']} on {failure['host']}: {failure['error']}"
    if stop := state["requeue"]:
        yield "stopped", f"by {stop.get('signal')} at step {stop.get('step')}; the same command continues"
    last = state["last"]
    if last and last["ended"] == "killed":
        yield "killed", f"rvc-dist {last['command']} ({described(last)}) runs no more and has not said why"


def _running(found: dict[str, Any]) -> str:
    who = f"{'part' if found['array'] else 'rank'} {found['rank']} of {found['ranks']}, {described(found)}"
    unsure = "" if found["alive"] else "; nothing was heard of it while this looked"
    doing, how_far = found["doing"], ""
    if doing and doing["total"]:
        left = "" if doing["left_s"] is None else f", {duration(doing['left_s'])} left"
        failed = f", {doing['num_failed']} failed" if doing["num_failed"] else ""
        text = f", {doing['text']}" if doing["text"] else ""
        how_far = f": {doing['what']} {100 * doing['done'] / doing['total']:.0f}%{text}{failed}{left}"
    return f"{found['stage']} ({who}){how_far or (doing and ': ' + doing['what']) or ''}{unsure}"


def _stage(name: str, stage: dict[str, Any], trained: dict[str, Any] | None) -> str:
    count = ""
    if name == "train" and trained:
        total = f"/{trained['total_steps']}" if trained["total_steps"] else ""
        left = "" if trained["left_s"] is None else f", {duration(trained['left_s'])} left"
        count = f"step {trained['step']}{total}, epoch {trained['epoch']:.1f}{left}"
    elif stage["total"]:
        count = f"{stage['done']}/{stage['total']} units"
    elif stage["done"]:
        count = f"{stage['done']} files"
    return f"{stage['state']:<9}{'; '.join(part for part in (count, stage['why']) if part)}"


def _trained(trained: dict[str, Any]) -> Iterator[tuple[str, str]]:
    if found := trained["validation"]:
        values = ", ".join(f"{name} {value:.4g}" for name, value in found["values"].items() if value is not None)
        yield "validation", f"step {found['step']}: {values}"
    if trained["best_step"] is not None:
        yield "best", f"step {trained['best_step']}"
    if trained["end"] not in (None, DONE):
        yield "ended", trained["end"]
    slowest = max((rank["in_phase_s"] for rank in trained["ranks"]), default=0.0)
    for rank in trained["ranks"]:
        if len(trained["ranks"]) <= SHOWN_RANKS or rank["in_phase_s"] == slowest:
            where = f"{rank['phase']} of step {rank['step']} for {duration(rank['in_phase_s'])}"
            yield f"rank {rank['rank']}", f"{where}, pid {rank['pid']} on {rank['host']}"
