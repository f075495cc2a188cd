"""What the end of a stage says: where its results are, and commands that work."""

from __future__ import annotations

import shlex
from pathlib import Path

import pytest

from rvc_dist import __main__ as cli
from rvc_dist.arguments import parse
from rvc_dist.config import Recipe
from rvc_dist.report.history import History
from rvc_dist.report.next_steps import next_steps
from rvc_dist.workspace import Workspace


@pytest.fixture
def run(tmp_path: Path) -> Recipe:
    """A run folder with a space in its name."""
    recipe = Recipe(name="tiny", run_dir=str(tmp_path / "a run"))
    Workspace(recipe.run_dir, recipe.name).save_recipe(recipe)
    return recipe


def told(stage: str, recipe: Recipe) -> dict[str, str]:
    return dict(line.split(maxsplit=1) for line in next_steps(stage, recipe))


@pytest.mark.parametrize(
    ("stage", "following"),
    [("preprocess", "extract"), ("extract", "index"), ("index", "train"), ("import", "train")],
)
def test_a_data_stage_names_the_next_one(stage: str, following: str, run: Recipe) -> None:
    line = told(stage, run)["next"]
    assert line == f"rvc-dist {following} --config '{run.run_dir}/config.yaml'"
    assert parse(following, shlex.split(line)[2:])[0] == run


@pytest.mark.parametrize("stage", ["train", "export", "run", "demo"])
def test_training_ends_with_how_to_hear_see_and_convert(stage: str, run: Recipe) -> None:
    work = Workspace(run.run_dir, run.name)
    assert told(stage, run) == {}, "nothing was trained"
    work.checkpoints_dir.mkdir()
    lines = told(stage, run)
    assert shlex.split(lines["export"])[:2] == ["rvc-dist", "export"]
    assert lines["page"] == f"rvc-dist report '{run.run_dir}'"
    work.voice_dir.mkdir()
    for name in ("tiny_1e_10s", "tiny_2e_20s", "tiny_last"):
        (work.voice_dir / f"{name}.pth").write_bytes(b"x")
    (work.root / "report.html").write_text("x")
    with History(work.history_file) as history:
        history.begin(0)
        history.write("validation", 10, epoch=1.0, values={"mel_distance": 0.5}, is_best=True, why="the first")
    lines = told(stage, run)
    assert lines["best"] == "step  10: The first."
    assert lines["voices"] == f"tiny_1e_10s.pth, tiny_2e_20s.pth, tiny_last.pth in {work.voice_dir}"
    assert lines["page"] == str(work.root / "report.html")
    assert lines["curves"] == f"tensorboard --logdir '{work.tensorboard_dir}'"
    recipe = parse("infer", shlex.split(lines["convert"])[2:])[0]
    assert recipe.infer.model == str(work.voice_dir / "tiny_1e_10s.pth"), "the voice of the best step"
    assert "export" not in lines


def test_a_damaged_file_is_no_failure_of_a_stage_that_is_done(run: Recipe, caplog: pytest.LogCaptureFixture) -> None:
    work = Workspace(run.run_dir, run.name)
    work.checkpoints_dir.mkdir()
    work.index_dir.mkdir()
    work.index_report_file.write_text("{")
    cli.end_words("train", run, 75.0)
    assert caplog.messages == []
