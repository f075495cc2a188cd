"""`rvc-dist demo`: the whole job on the embedded demo voice, ending with what was made and how to hear it."""

from __future__ import annotations

import importlib
import statistics
import time
from pathlib import Path

from rvc_dist import pipeline
from rvc_dist.config import Recipe
from rvc_dist.workspace import Share, Workspace

VOICE_DIR = Path(__file__).parent / "demo_voice"
COMPARED_STEPS = 20


def recipe_file() -> Path:
    """configs/demo_cpu.yaml of an installed package, or of the checkout."""
    installed = Path(__file__).parent / "configs" / "demo_cpu.yaml"
    return installed if installed.is_file() else Path(__file__).parents[1] / "configs" / "demo_cpu.yaml"


def demo_arguments() -> list[str]:
    """The demo's recipe as command-line arguments; the user's own come after them."""
    return [
        *("--config", str(recipe_file())),
        *("--data.audio_dir", str(VOICE_DIR / "voice")),
        *("--infer.input", str(VOICE_DIR / "source" / "fr.flac")),
    ]


def run(recipe: Recipe, share: Share) -> None:
    """Every stage, then a conversion; the first rank prints where things are."""
    began_at = time.monotonic()
    pipeline.run(recipe, share)
    importlib.import_module("rvc_dist.infer").run(recipe, share)
    if share.is_first:
        report(recipe, time.monotonic() - began_at)


def report(recipe: Recipe, seconds: float) -> None:
    """Print what the run made; every number is read from its files."""
    from rich import print as show
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    work = Workspace(recipe.run_dir, recipe.name)
    events = EventAccumulator(str(work.tensorboard_dir), size_guidance={"scalars": 0})
    events.Reload()
    mel = [e.value for e in events.Scalars("loss/g_mel")]
    first, last = mel[:COMPARED_STEPS], mel[-COMPARED_STEPS:]
    show(
        f"\n[bold]The demo is done[/bold] in {seconds:.0f} s.\n"
        f"mel loss      {statistics.mean(first):.3f} over the first {len(first)} steps, "
        f"{statistics.mean(last):.3f} over the last {len(last)}\n"
        f"voice         {work.last_voice_file}\n"
        f"index         {work.index_file()}\n"
        f"converted     {recipe.infer.output}\n"
        f"  from        {recipe.infer.input}\n"
        f"TensorBoard   tensorboard --logdir {work.tensorboard_dir}"
    )
