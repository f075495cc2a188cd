"""The average of G's weights, and the phase without the discriminator: hand-worked, and over a run that stops."""

import logging
import shutil
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from helpers import changed, make_features, tiny_recipe, train, with_train, workspace_of
from safetensors.torch import load_file
from torch import nn

from rvc_dist.config import ExportConfig, Recipe, TrainConfig
from rvc_dist.models.state_dict import to_upstream
from rvc_dist.report.history import read_history
from rvc_dist.train import checkpoint
from rvc_dist.train.ema import Ema, decay_after
from rvc_dist.train.optimizers import learning_rate
from rvc_dist.train.progress import Progress
from rvc_dist.train.quality import Quality
from rvc_dist.train.validation import Validation
from rvc_dist.train.voice_file import Dataset, voice_dict
from rvc_dist.voice import export
from rvc_dist.workspace import Shard, StageError

pytestmark = pytest.mark.usefixtures("thin")
BASE = {"ema_decay": 0.9, "adversarial_from_step": 3, "max_steps": 6, "eval_every_steps": 2, "save_every_steps": 1}
GOOD = Quality(0.5, 6.0, 30.0, 0.05, 1.5, 0.9)
WANTED = [
    (True, "chosen", True),
    (False, "chosen", False),
    (None, "chosen", True),
    (True, "raw", False),
    (False, "ema", True),
]
ADVERSARIAL = {"loss/d", "loss/g_adv", "loss/g_fm", "grad/norm_d"}


def test_the_average_follows_the_weights_by_a_decay_that_warms_up():
    module = nn.Linear(1, 1, bias=False)
    module.weight.data.fill_(10.0)
    ema = Ema(module, 0.5)
    expected = 10.0
    for step, weight in enumerate([20.0, 0.0, 40.0, -8.0, 5.0, 5.0, 5.0, 5.0, 5.0, 7.0]):
        module.weight.data.fill_(weight)
        ema.update(step)
        decay = min(0.5, (1 + step) / (10 + step))
        expected = decay * expected + (1 - decay) * weight
        assert ema.state_dict()["weight"].item() == pytest.approx(expected, rel=1e-6)
        assert module.weight.item() == weight
    assert [decay_after(0.5, n) for n in (0, 2, 8, 10**6)] == [0.1, 0.25, 0.5, 0.5]
    with ema.applied():
        assert module.weight.item() == pytest.approx(expected, rel=1e-6)
    assert module.weight.item() == 7.0


def test_the_average_is_float32_of_all_parameters_with_the_modules_buffers():
    module = nn.BatchNorm1d(2).bfloat16()
    module.running_mean.fill_(3.0)
    state = Ema(module, 0.9).state_dict()
    assert state.keys() == module.state_dict().keys()
    assert state["weight"].dtype == torch.float32
    assert state["running_mean"].tolist() == [3.0, 3.0]


def test_a_discriminator_that_joins_later_warms_up_from_there():
    config = TrainConfig(warmup_steps=4, lr_schedule="constant", learning_rate=1.0, adversarial_from_step=10)
    of_d = [learning_rate(config, step, 0, 100, 1, None, 10) for step in (0, 9, 10, 11, 13, 14, 99)]
    assert of_d == [0.0, 0.0, 0.25, 0.5, 1.0, 1.0, 1.0]
    assert learning_rate(config, 10, 0, 100, 1) == 1.0
    cosine = replace(config, lr_schedule="cosine")
    assert learning_rate(cosine, 11, 0, 100, 1, None, 10) == 0.5 * learning_rate(cosine, 11, 0, 100, 1)


@pytest.fixture(scope="module")
def whole(tmp_path_factory, thin) -> Recipe:
    """A run of six steps, of which D sees the last three."""
    recipe = tiny_recipe(tmp_path_factory.mktemp("whole"), **BASE, keep_checkpoints=9, num_workers=1)
    make_features(recipe, num_clips=12, speakers=(0, 1))
    train(recipe)
    return recipe


def saved_at(recipe: Recipe, step: int) -> checkpoint.Checkpoint:
    path = workspace_of(recipe).checkpoints_dir / f"step_{step:08d}"
    checkpoint.verify(path)
    return checkpoint.load(path)


def lines_of(recipe: Recipe, kind: str) -> dict[int, dict]:
    history = read_history(workspace_of(recipe).history_file)
    return {line["step"]: line for line in history if line["kind"] == kind}


def test_until_it_joins_the_discriminator_rests_and_no_loss_asks_it(whole):
    names = {step: line["values"].keys() for step, line in lines_of(whole, "step").items()}
    assert [step for step in names if names[step] >= ADVERSARIAL] == [4, 5, 6]
    assert [step for step in names if not names[step] & ADVERSARIAL] == [1, 2, 3]
    assert all(n >= {"loss/g_mel", "loss/g_kl", "loss/g_total", "grad/norm_g"} for n in names.values())
    assert not saved_at(whole, 2).optimizers["discriminator"].tensors
    before, after = (saved_at(whole, step).models["discriminator"] for step in (2, 6))
    assert not any(torch.equal(before[key], after[key]) for key in before)
    first = lines_of(whole, "step")[1]["values"]
    assert first["loss/g_total"] == pytest.approx(45.0 * first["loss/g_mel"] + first["loss/g_kl"], rel=1e-5)


@pytest.mark.slow
def test_the_mean_of_a_log_line_has_one_kind_of_step(tmp_path, whole):
    """Of the steps 1 to 6 those after the discriminator joined."""
    coarse = replace(with_train(whole, log_every_steps=6), run_dir=str(tmp_path))
    make_features(coarse, num_clips=12, speakers=(0, 1))
    train(coarse)
    (line,), fine = lines_of(coarse, "step").values(), lines_of(whole, "step")
    for name in ("loss/d", "loss/g_mel"):
        assert line["values"][name] == pytest.approx(sum(fine[s]["values"][name] for s in (4, 5, 6)) / 3, rel=1e-5)


def test_the_best_begins_anew_when_the_discriminator_joins(whole, monkeypatch):
    found = iter([0.1, 0.2, 0.3, 0.3])
    monkeypatch.setattr(Validation, "measure", lambda *_: [quality(next(found))])
    run = Validation.__new__(Validation)
    run.recipe, run.clips, run._first, run._ended_at = whole, [SimpleNamespace(speaker=0)], None, None
    run._has_warned, run.measure_unseen = False, lambda _: None
    run.tracker = SimpleNamespace(scalars=lambda *_: None)
    progress = Progress()
    for step, is_best, best_step in ((2, True, 2), (3, False, 2), (4, True, 4), (6, False, 4)):
        verdict = run.judge(None, replace(progress, step=step))
        progress = verdict.progress
        assert (verdict.is_best, progress.best_step) == (is_best, best_step)


def quality(distance: float) -> Quality:
    return Quality(distance, *GOOD[1:])


def test_a_run_that_stops_goes_on_to_the_same_average(tmp_path, whole):
    """In the phase without the discriminator, with loader processes, and within what a log line is the mean of."""
    halves = replace(with_train(whole, max_steps=2, log_every_steps=4), run_dir=str(tmp_path))
    make_features(halves, num_clips=12, speakers=(0, 1))
    train(halves)
    train(with_train(halves, max_steps=6))
    folders = [workspace_of(recipe).checkpoints_dir / "step_00000006" for recipe in (whole, halves)]
    for name in ("generator_ema", "generator", "discriminator", "optimizer_discriminator"):
        one, other = (load_file(folder / f"{name}.safetensors") for folder in folders)
        assert one.keys() == other.keys()
        assert all(torch.equal(one[key], other[key]) for key in one), name


def test_the_average_is_that_of_all_steps(whole):
    average = saved_at(whole, 1).ema
    for step in range(2, 7):
        saved, decay = saved_at(whole, step), min(0.9, step / (9 + step))
        assert saved.ema.keys() == saved.models["generator"].keys()
        average = {k: torch.lerp(average[k], v, 1.0 - decay) for k, v in saved.models["generator"].items()}
        assert all(torch.allclose(saved.ema[key], value, atol=1e-7) for key, value in average.items())
        assert not torch.equal(saved.ema["dec.conv_pre.weight"], saved.models["generator"]["dec.conv_pre.weight"])


def test_a_checkpoint_without_an_average_goes_on_with_one_and_back(tmp_path, whole, caplog):
    caplog.set_level(logging.INFO)
    plain = replace(with_train(whole, max_steps=2, ema_decay=0.0), run_dir=str(tmp_path))
    make_features(plain, num_clips=12, speakers=(0, 1))
    before = train(plain)
    assert not before.ema
    assert "uses_ema" not in (workspace_of(plain).checkpoints_dir / "step_00000002" / checkpoint.STATE).read_text()
    after = train(with_train(plain, max_steps=3, ema_decay=0.9))
    assert "train.ema_decay: the average of G's weights begins with those of step 2" in caplog.text
    key = "dec.conv_pre.weight"
    decay = decay_after(0.9, 2)
    expected = decay * before.models["generator"][key] + (1 - decay) * after.models["generator"][key]
    assert torch.allclose(after.ema[key], expected, rtol=1e-5, atol=1e-7)
    assert not train(with_train(plain, max_steps=4)).ema
    assert "train.ema_decay is 0: the average of G's weights up to step 3 is given up" in caplog.text


def test_a_damaged_average_is_found(tmp_path, whole):
    folder = shutil.copytree(workspace_of(whole).checkpoints_dir / "step_00000006", tmp_path / "step_00000006")
    average = folder / "generator_ema.safetensors"
    average.write_bytes(average.read_bytes()[:-1] + b"?")
    assert checkpoint.find_corruption(folder) == ["generator_ema.safetensors was changed (its SHA-256 differs)"]
    average.unlink()
    assert checkpoint.find_corruption(folder) == ["generator_ema.safetensors is missing"]


def test_validation_hears_both_and_the_better_ones_count(whole):
    for step, line in lines_of(whole, "validation").items():
        raw, ema = line["values_raw"], line["values_ema"]
        better = min(raw, ema, key=lambda values: values["mel_distance"])
        assert line["values"] == better
        assert saved_at(whole, step).progress.uses_ema is (better is ema)
        assert line["why"].endswith(", with the average of weights" if better is ema else ", with raw weights")
    assert raw != ema


@pytest.mark.parametrize(("uses_ema", "weights", "averaged"), WANTED)
def test_which_weights_a_voice_has(whole, uses_ema, weights, averaged):
    saved = saved_at(whole, 6)
    saved = replace(saved, progress=replace(saved.progress, uses_ema=uses_ema))
    voice = voice_dict(changed(whole, "export", weights=weights), saved, Dataset("00:00:01", 2))
    wanted = to_upstream(saved.ema if averaged else saved.models["generator"])
    assert all(torch.equal(value, wanted[key].half()) for key, value in voice["weight"].items())
    assert voice.get("weights") == ("ema" if averaged else None)


def test_export_takes_what_validation_chose_and_a_key_overrules_it(tmp_path, whole):
    saved = saved_at(whole, 6)
    run = replace(whole, run_dir=str(tmp_path))
    make_features(run)
    checkpoint.save(workspace_of(run).checkpoints_dir, replace(saved, progress=replace(saved.progress, uses_ema=True)))
    hashes = []
    for weights in ("chosen", "raw", "ema"):  # the file that is there is not taken for another's
        export.run(changed(run, "export", weights=weights), Shard(0, 1))
        hashes.append(torch.load(workspace_of(run).last_voice_file, weights_only=True)["model_hash"])
    assert hashes[0] == hashes[2] != hashes[1]
    export.run(changed(run, "export", format="pretrained"), Shard(0, 1))
    base = torch.load(tmp_path / "export" / "pretrained" / "f0G24k_tiny.pth", weights_only=True)["model"]
    wanted = to_upstream(saved.ema)
    assert base.keys() == wanted.keys()
    assert all(torch.equal(base[key], wanted[key].half()) for key in base)


def test_an_average_that_is_not_there_is_not_exported(tmp_path, whole):
    run = replace(whole, run_dir=str(tmp_path), export=ExportConfig(weights="ema"))
    make_features(run)
    checkpoint.save(workspace_of(run).checkpoints_dir, replace(saved_at(whole, 6), ema={}))
    with pytest.raises(
        StageError, match=r"export.weights: the checkpoint of step 6 has no average of its weights; leave"
    ):
        export.run(run, Shard(0, 1))
