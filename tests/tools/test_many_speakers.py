"""What looks at all clips does so once, however many speakers there are: lines of Python that run are counted."""

from __future__ import annotations

import sys
from collections.abc import Callable
from types import FrameType
from typing import Any

import pytest
import scaling_speakers
from helpers import workspace_of

from rvc_dist.config import Recipe
from rvc_dist.features.index import Frames
from rvc_dist.report.facts import read_facts
from rvc_dist.tools import dataset_stats, status

CLIPS_A_SPEAKER = 1
FEW, MANY = 200, 800
STEPS: dict[str, Callable[[Recipe], Any]] = {
    "dataset": lambda recipe: dataset_stats.summarise(workspace_of(recipe).root),
    "status": lambda recipe: status.state_of(workspace_of(recipe).root),
    "report": lambda recipe: read_facts(workspace_of(recipe).root),
    "index": lambda recipe: Frames.find(workspace_of(recipe)).by_speaker(),
}


def lines_of(step: Callable[[], Any]) -> int:
    """How many lines of Python ran; a loop counts as often as it goes round."""
    count = 0

    def each(frame: FrameType, event: str, _: Any) -> Any:
        nonlocal count
        count += event == "line"
        return each

    before = sys.gettrace()
    sys.settrace(each)
    try:
        step()
    finally:
        sys.settrace(before)
    return count


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> tuple[Recipe, Recipe]:
    """Of 200 speakers and of 800."""
    made = []
    for count in (FEW, MANY):
        made.append(scaling_speakers.recipe_in(tmp_path_factory.mktemp("run")))
        scaling_speakers.make_run(made[-1], count, CLIPS_A_SPEAKER)
    return made[0], made[1]


@pytest.mark.slow
@pytest.mark.parametrize("name", STEPS)
def test_four_times_the_speakers_are_four_times_the_work(name: str, runs: tuple[Recipe, Recipe]) -> None:
    step = STEPS[name]
    step(runs[0])  # imports
    few, many = (lines_of(lambda recipe=recipe: step(recipe)) for recipe in runs)
    assert few > 5 * FEW, "they are counted"
    assert many < 4.3 * few, f"{few} lines for {FEW} clips, {many} for {MANY}; their square would be {16 * few}"
