"""Run on its own: makes a run of many tiny clips of many speakers, and measures what looks at all of them.

Usage: scaling_speakers.py FOLDER NUM_CLIPS [CLIPS_A_SPEAKER]
Prints a JSON object as scaling.py does, and before it a line for each step as it ends.
"""

from __future__ import annotations

import json
import logging
import os
import sys
from collections.abc import Callable, Iterator
from functools import partial
from io import StringIO
from pathlib import Path
from typing import Any

import scaling
from helpers import changed, narrow_recipe, workspace_of
from rich.console import Console
from scaling import ALONE, apart, measure

from rvc_dist.config import DataConfig, ExtractConfig, PlanConfig, Recipe
from rvc_dist.data import clip_files
from rvc_dist.features import index
from rvc_dist.report.facts import read_facts
from rvc_dist.tools import dataset_stats, plan, status
from rvc_dist.tools.doctor import data as doctor_data
from rvc_dist.tools.doctor.ranks import DoctorContext
from rvc_dist.workspace import Speakers, WorkList

WIDTH, NUM_CONTENT, SECONDS = 8, 20, 3.0


def make_run(recipe: Recipe, count: int, per_speaker: int) -> None:
    """Units of clips as `scaling` makes them, with their speakers, who have names, and preprocess's report."""
    scaling.WIDTH, scaling.NUM_CONTENT = WIDTH, NUM_CONTENT
    scaling.EMBEDDER_USED["width"] = WIDTH
    scaling.make_units(recipe, count, per_speaker)
    work = workspace_of(recipe)
    speakers = range(-(-count // per_speaker))
    work.save_speakers(Speakers({i: f"speaker {i:04d}" for i in speakers}, tuple(speakers)))
    work.save_recipe(recipe)


def quietly(function: Callable[[], Any]) -> Any:
    """Its result, while what it prints goes nowhere."""
    out, sys.stdout = sys.stdout, StringIO()
    try:
        return function()
    finally:
        sys.stdout = out


def steps(recipe: Recipe) -> Iterator[tuple[str, Callable[[], Any]]]:
    work = workspace_of(recipe)
    plain = changed(recipe, "index", speakers="each")

    def show_dataset() -> Any:
        dataset_stats.show(Console(file=StringIO(), width=160), dataset_stats.summarise(work.root), with_pitch=True)
        return True

    yield "work list: read", lambda: WorkList.load(work.work_list_file)
    yield "headers: is it complete", lambda: clip_files.complete(recipe)
    yield "dataset", show_dataset
    yield "status", lambda: status.state_of(work.root)
    yield "report: facts", lambda: read_facts(work.root)
    yield "doctor: data", lambda: list(doctor_data.check_data(DoctorContext(recipe)))
    yield "plan", lambda: plan.make_plan(recipe)
    yield "speakers of a voice", lambda: work.speakers().trained_info
    yield "index of each speaker", lambda: index.run(plain, ALONE) or len(list(work.index_dir.glob("*.index")))


def recipe_in(folder: Path) -> Recipe:
    """Of a run in `folder`."""
    features = ExtractConfig(f0_method="pyin", embedder_model="mfcc", include_mutes=0)
    data = DataConfig(audio_dir=str(folder / "audio"), sample_rate=scaling.RATE)
    return narrow_recipe(folder / "run", data=data, extract=features, plan=PlanConfig(step_s=1.0))


def main(folder: Path, count: int, per_speaker: int) -> None:
    logging.disable(logging.INFO)
    recipe = recipe_in(folder)
    if not workspace_of(recipe).root.exists():
        apart(lambda: make_run(recipe, count, per_speaker))
    found = {}
    only = os.environ.get("ONLY")
    for name, step in steps(recipe):
        if only and only not in name:
            continue
        found[name] = apart(partial(measure, partial(quietly, step)))
        sys.stderr.write(f"{count:>8} {name:<26} {found[name]}\n")
    json.dump(found, sys.stdout)


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]) if len(sys.argv) > 3 else 500)
