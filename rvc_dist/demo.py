"""`rvc-dist demo`: the whole job on the embedded demo voice, ending with what was made and how to hear it."""

from __future__ import annotations

import importlib
import statistics
import sys
import time
from dataclasses import replace
from pathlib import Path

from rvc_dist import packaged, pipeline
from rvc_dist.config import Recipe, load_recipe
from rvc_dist.report.history import read_history
from rvc_dist.workspace import DEMO_BASE_DIR, DEMO_VOICE_DIR, Shard, Workspace

COMPARED_STEPS = 20
MEL_LOSS = "loss/g_mel"


def recipe_file() -> Path:
    return packaged.folder("configs") / f"{packaged.DEMO}.yaml"


def demo_options() -> list[tuple[str, str]]:
    """The demo's recipe as options; the user's own come after them."""
    files = {
        "config": recipe_file(),
        "data.audio_dir": DEMO_VOICE_DIR / "voice",
        "train.pretrained_g": DEMO_BASE_DIR / "f0G24k_demo_base.pth",
        "train.pretrained_d": DEMO_BASE_DIR / "f0D24k_demo_base.pth",
        "infer.input": DEMO_VOICE_DIR / "source" / "fr.flac",
    }
    return [(key, str(path)) for key, path in files.items()]


def run(recipe: Recipe, shard: Shard) -> None:
    """Every stage, then a conversion; the first rank prints where things are.

    Raises:
        StageError, Stopped: as the stages do.
    """
    began_at = time.monotonic()
    recipe = with_output_in_run_dir(recipe)
    pipeline.run(recipe, shard)
    importlib.import_module("rvc_dist.voice.infer").run(recipe, shard)
    if shard.is_first:
        report(recipe, time.monotonic() - began_at)


def with_output_in_run_dir(recipe: Recipe) -> Recipe:
    """Unless the user says where the result goes, it follows run_dir: nothing else is written elsewhere."""
    if recipe.infer.output != load_recipe(recipe_file()).infer.output:
        return recipe
    return replace(recipe, infer=replace(recipe.infer, output=str(Path(recipe.run_dir) / "converted.wav")))


def report(recipe: Recipe, seconds: float) -> None:
    """Print what the run made; every number is read from its files."""
    work = Workspace(recipe.run_dir, recipe.name)
    logged = [line["values"].get(MEL_LOSS) for line in read_history(work.history_file) if line["kind"] == "step"]
    mel = [value for value in logged if value is not None]
    first, last = mel[:COMPARED_STEPS], mel[-COMPARED_STEPS:]
    compared = (
        f"{statistics.mean(first):.3f} over the first {len(first)} logged steps, "
        f"{statistics.mean(last):.3f} over the last {len(last)}"
        if mel
        else "not logged (train.log_every_steps)"
    )
    sys.stdout.write(
        f"\nThe demo is done in {seconds:.0f} s.\n"
        f"mel loss      {compared}\n"
        f"converted     {recipe.infer.output}\n"
        f"  from        {recipe.infer.input}\n"
    )
