"""What the page of base models says of hours."""

import re
from dataclasses import replace
from pathlib import Path

from rvc_dist.config import recipe_of
from rvc_dist.tools.plan import training_clips
from rvc_dist.train.dataset import MUTE_SOURCE

PAGE = Path(__file__).parents[2] / "docs" / "base-models.md"


def test_the_page_plans_hours_that_are_not_there():
    """Its table has the steps of 10, 100 and 500 hours, as the trainer's sampler counts them: 2.7 s a clip."""
    (command,) = re.findall(r"^rvc-dist plan (.*)$", PAGE.read_text(), re.MULTILINE)
    words = command.split()
    given = list(zip((word.removeprefix("--") for word in words[::2]), words[1::2], strict=True))
    recipe = recipe_of(given)
    assert recipe.plan.hours == 100
    table = re.findall(r"^\| (\d+) \| (\d+) \| ([\d,]+) \|", PAGE.read_text(), re.MULTILINE)
    assert len(table) == 9
    for hours, ranks, steps in table:
        clips, source = training_clips(replace(recipe, plan=replace(recipe.plan, hours=float(hours))))
        assert "plan.hours" in source
        assert not any(clip.source == MUTE_SOURCE for clip in clips.train[:1])
        assert len(clips.train) == round(0.995 * round(int(hours) * 3600 / 2.7))
        assert int(steps.replace(",", "")) == -(-len(clips.train) // (32 * int(ranks)))
