"""A base model of several speakers, exported and fine-tuned on another; and what its page says of hours."""

import re
import statistics
from dataclasses import replace
from pathlib import Path

import pytest
from helpers import changed, make_features, tiny_recipe, train, with_train, workspace_of

from rvc_dist.config import Recipe, recipe_of
from rvc_dist.report.history import read_history
from rvc_dist.tools.plan import training_clips
from rvc_dist.train.clips import MUTE_SOURCE
from rvc_dist.voice import export
from rvc_dist.workspace import Shard

PAGE = Path(__file__).parents[2] / "docs" / "base-models.md"


def mel_losses(recipe: Recipe) -> list[float]:
    lines = read_history(workspace_of(recipe).history_file)
    return [line["values"]["loss/g_mel"] for line in lines if line["kind"] == "step"]


@pytest.mark.slow
@pytest.mark.usefixtures("thin")
def test_a_base_model_is_a_better_beginning_for_a_new_speaker_than_random_numbers(tmp_path):
    options = {"adversarial_from_step": 50, "ema_decay": 0.9, "warmup_steps": 5, "learning_rate": 2e-3}
    base = tiny_recipe(tmp_path / "base", max_steps=60, eval_every_steps=60, save_every_steps=60, **options)
    base = changed(base, "data", holdout_speakers=1)
    make_features(base, num_clips=12, speakers=(0, 1, 2, 3))
    saved = train(base)
    assert saved.ema
    export.run(changed(base, "export", format="pretrained"), Shard(0, 1))
    folder = tmp_path / "base" / "export" / "pretrained"
    files = {"pretrained_g": str(folder / "f0G24k_tiny.pth"), "pretrained_d": str(folder / "f0D24k_tiny.pth")}

    found = {}
    cases = {"scratch": (5, {}, 6), "a row of the base": (2, files, 4), "a new row": (5, files, 6)}
    for name, (speaker, given, rows) in cases.items():
        recipe = with_train(tiny_recipe(tmp_path / name, max_steps=6), **given)
        make_features(recipe, num_clips=9, speakers=(speaker,), voice="another")
        assert len(train(recipe).models["generator"]["emb_g.weight"]) == rows
        found[name] = statistics.mean(mel_losses(recipe))
    assert max(found["a row of the base"], found["a new row"]) < 0.7 * found["scratch"], found


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
