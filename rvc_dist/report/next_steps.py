"""What the end of a stage says: what was made, where, and which command comes next."""

from __future__ import annotations

import shlex
from collections.abc import Iterator

from rvc_dist.config import Recipe
from rvc_dist.report import PAGE
from rvc_dist.report.facts import advice, conversion, read_facts
from rvc_dist.workspace import Workspace

FOLLOWING = {"preprocess": "extract", "extract": "index", "index": "train", "import": "train"}
"""The stage after a stage."""
TRAINED = ("train", "export", "run", "demo")
"""Stages that end with a voice, or with what one is made of."""
SHOWN = 4
"""Voices that are named: the best and the last are at the end of the alphabet."""


def next_steps(stage: str, recipe: Recipe) -> Iterator[str]:
    """Lines for the screen: after a data stage which stage follows, after training how to hear, see and convert.

    Raises:
        StageError, OSError: a file of the run cannot be read.
    """
    work = Workspace(recipe.run_dir, recipe.name)
    if following := FOLLOWING.get(stage):
        if work.config_file.is_file():  # else nothing was made
            yield f"next       rvc-dist {following} --config {shlex.quote(str(work.config_file))}"
    elif stage in TRAINED and work.checkpoints_dir.is_dir():
        facts = read_facts(work.root)
        advised = advice(facts)
        command = conversion(facts, advised)
        if advised.step is not None:
            yield f"best step  {advised.step}: {advised.why}"
        voices = sorted(path.name for path in work.voice_dir.glob("*.pth"))
        if voices:
            yield f"voices     {', '.join(voices[-SHOWN:])} in {work.voice_dir}"
        if index := work.index_file():
            yield f"index      {index}"
        if command.export:
            yield f"export     {command.export}"
        yield f"convert    {command.infer}"
        page = work.root / PAGE
        yield f"page       {page if page.is_file() else f'rvc-dist report {shlex.quote(str(work.root))}'}"
        yield f"curves     tensorboard --logdir {shlex.quote(str(work.tensorboard_dir))}"
