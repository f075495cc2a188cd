"""Checkpoints of more recordings than a JSON text should hold: these are in a file beside it, all else is as ever."""

import json
from dataclasses import replace

import pytest
import torch
from helpers import make_features, newest, tiny_recipe, train, with_train, workspace_of

from rvc_dist import workspace
from rvc_dist.train import checkpoint
from rvc_dist.workspace import StageError

pytestmark = pytest.mark.usefixtures("thin")


@pytest.fixture
def few_are_many(monkeypatch):
    monkeypatch.setattr(workspace, "MAX_PLAIN_RECORDINGS", 2)
    monkeypatch.setattr(workspace, "RECORDINGS_A_LINE", 2)


@pytest.mark.slow
def test_a_run_goes_on_to_the_bit_from_the_old_form_and_from_the_new_one(tmp_path, request):
    plain, split = (tiny_recipe(tmp_path / name) for name in ("plain", "split"))
    for recipe in plain, split:
        make_features(recipe)
    expected = train(with_train(plain, max_steps=6))
    train(with_train(split, max_steps=2))
    request.getfixturevalue("few_are_many")
    train(with_train(split, max_steps=4))
    path = checkpoint.latest(workspace_of(split).checkpoints_dir)
    state = json.loads((path / "state.json").read_text())
    in_file = {"recordings": 3, "held_from_s": len(expected.data["held_from_s"])}
    assert (state["format"], state["data"]["in_file"]) == (3, in_file)
    assert not {"recordings", "held_from_s"} & state["data"].keys()
    found = train(with_train(split, max_steps=6))
    assert found.data == expected.data == workspace_of(split).trained_on()[1]
    assert found.progress == expected.progress
    for name, weights in expected.models.items():
        assert all(torch.equal(tensor, found.models[name][key]) for key, tensor in weights.items())
        moments = expected.optimizers[name].tensors
        assert all(torch.equal(tensor, found.optimizers[name].tensors[key]) for key, tensor in moments.items())


def test_what_is_missing_or_damaged_of_them_is_refused(tmp_path, few_are_many):
    recipe = tiny_recipe(tmp_path)
    make_features(recipe)
    saved = train(with_train(recipe, max_steps=1))
    data = {"recordings": {f"{i:02x}": f"\udcff {i}.wav" for i in range(5)}, "held_from_s": {"03": 1.5}, "train": "x"}
    folder = tmp_path / "saved"
    path = checkpoint.save(folder, replace(saved, data=data))
    checkpoint.verify(path)
    assert checkpoint.load(path).data == data
    lines = (path / "recordings.jsonl").read_text().splitlines(keepends=True)
    assert [len(json.loads(line).popitem()[1]) for line in lines] == [2, 2, 1, 1]

    for text, reason in (
        ("".join(lines[1:]), "other recordings than its checkpoint says"),
        ("".join(lines) + '{"others": {}}\n', "others"),
        (lines[0] + "{", "not valid JSON"),
        (lines[0][:-2] + "\n", "not valid JSON"),
        ('{"recordings": {"00": 5}}\n', "recordings.00: got 5, expected a name"),
        (None, "No such file"),
    ):
        (path / "recordings.jsonl").unlink() if text is None else (path / "recordings.jsonl").write_text(text)
        with pytest.raises(StageError, match=r"recordings\.jsonl"):
            checkpoint.verify(path)
        with pytest.raises(StageError, match=reason):
            checkpoint.load(path)
    checkpoint.save(folder, replace(saved, data=data | {"recordings": {"00": "0.wav"}}))
    assert not (path / "recordings.jsonl").exists(), "few are in the state, as ever"
    assert json.loads((path / "state.json").read_text())["format"] == 2
    assert newest(recipe).data == saved.data
