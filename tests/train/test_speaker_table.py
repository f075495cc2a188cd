"""Speakers in training: the rows of the speaker table that they begin with."""

import logging
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from accelerate.state import AcceleratorState
from helpers import make_features, tiny_recipe, with_train, workspace_of

from rvc_dist.config import Recipe
from rvc_dist.models.state_dict import SPEAKER_TABLE, to_upstream
from rvc_dist.train import checkpoint, networks, trainer
from rvc_dist.train.dataset import ClipTable
from rvc_dist.workspace import Shard, StageError

pytestmark = pytest.mark.usefixtures("thin")

ROWS = 3
"""Of the base model's speaker table."""


@pytest.fixture
def recipe(tmp_path: Path) -> Recipe:
    """Of the speakers 1 and 4, and a base model that knows 0 to 2."""
    recipe = tiny_recipe(tmp_path / "run")
    make_features(recipe, speakers=(1, 4))
    table = ClipTable.load(recipe)
    shape, modules = networks.build(recipe, replace(table, num_speakers=ROWS))
    assert shape.num_speakers == ROWS
    files = {}
    for name, module in modules.items():
        files[networks.PRETRAINED[name]] = str(tmp_path / f"{name}.pth")
        torch.save({"model": to_upstream(module.state_dict())}, tmp_path / f"{name}.pth")
    return with_train(recipe, **files)


def speaker_rows(recipe: Recipe) -> torch.Tensor:
    shape, modules = networks.build(recipe, ClipTable.load(recipe))
    rows = modules["generator"].state_dict()[SPEAKER_TABLE]
    assert len(rows) == shape.num_speakers == 5
    return rows


@pytest.mark.parametrize(("fresh", "new"), [(False, [3, 4]), (True, [1, 3, 4])])
def test_more_speakers_than_the_base_model_has_grow_its_table(recipe, fresh, new, caplog):
    caplog.set_level(logging.INFO)
    base = torch.load(recipe.train.pretrained_g)["model"][SPEAKER_TABLE]
    recipe = with_train(recipe, fresh_speakers=fresh)
    rows = speaker_rows(recipe)
    assert [i for i in range(5) if i >= ROWS or not torch.equal(rows[i], base[i])] == new
    torch.testing.assert_close(rows[new].norm(dim=1), base.norm(dim=1).mean().expand(len(new)))
    assert len(rows.unique(dim=0)) == 5
    torch.manual_seed(99)
    assert torch.equal(speaker_rows(recipe), rows), "the same on every rank"
    assert not torch.equal(speaker_rows(with_train(recipe, seed=2))[new], rows[new])
    assert "its speaker table grows from 3 to 5 rows, since the dataset's highest speaker id is 4" in caplog.text
    assert ("train.fresh_speakers: 2 of the dataset begin with new rows" in caplog.text) == fresh


def test_fresh_speakers_without_a_base_model_are_said_to_be_nothing_else(recipe, caplog):
    networks.build(with_train(recipe, pretrained_g=None, fresh_speakers=True), ClipTable.load(recipe))
    assert "train.fresh_speakers does nothing: without a pretrained generator all speakers are new" in caplog.text


def test_a_base_model_without_a_speaker_table_is_refused(recipe):
    state = torch.load(recipe.train.pretrained_g)["model"]
    for table in (None, torch.zeros(0, 4), torch.zeros(4)):
        torch.save({"model": state | {SPEAKER_TABLE: table}}, recipe.train.pretrained_g)
        with pytest.raises(StageError, match=r"train\.pretrained_g"):
            speaker_rows(recipe)


def test_a_trained_run_takes_more_speakers(tmp_path, caplog):
    caplog.set_level(logging.INFO)
    recipe = tiny_recipe(tmp_path, max_steps=2, learning_rate=1e-9, num_workers=1)
    make_features(recipe, speakers=(1,))
    first = trained(recipe)
    make_features(recipe, num_clips=12, speakers=(1, 4))
    second = trained(with_train(recipe, max_steps=3))
    before, after = (saved.models["generator"][SPEAKER_TABLE] for saved in (first, second))
    torch.testing.assert_close(after[:2], before, atol=1e-6, rtol=0)
    torch.testing.assert_close(after[2:].norm(dim=1), before.norm(dim=1).mean().expand(3), atol=1e-5, rtol=0)
    assert "the checkpoint of step 2: its speaker table grows from 2 to 5 rows" in caplog.text
    assert (second.identity["generator.num_speakers"], second.speakers.trained) == (5, (1, 4))


def trained(recipe: Recipe) -> checkpoint.Checkpoint:
    AcceleratorState._reset_state(reset_partial_state=True)
    trainer.run(recipe, Shard())
    path = checkpoint.latest(workspace_of(recipe).checkpoints_dir)
    assert path is not None
    return checkpoint.load(path)
