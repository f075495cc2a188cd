"""train.save_every_voices: a voice file beside every checkpoint, which are never pruned and never end a run."""

import os
import resource
import signal
import threading

import pytest
import torch
from helpers import WIDTH, make_checkpoint, make_features, make_generator, tiny_recipe, train, workspace_of

from rvc_dist.models.torch_file import load_pth
from rvc_dist.train import checkpoint, trainer, voice_file
from rvc_dist.train.dataset import ClipTable
from rvc_dist.voice import export
from rvc_dist.voice.file import Voice
from rvc_dist.workspace import Shard, Stopped

pytestmark = pytest.mark.usefixtures("thin")


def voices(recipe) -> list[str]:
    return sorted(p.name for p in workspace_of(recipe).voice_dir.glob("*"))


def kept(recipe) -> list[int]:
    return [checkpoint.progress_of(p).step for p in checkpoint.list_checkpoints(workspace_of(recipe).checkpoints_dir)]


@pytest.mark.slow
def test_every_checkpoint_but_a_stops_has_a_voice_and_export_makes_it_no_second_time(tmp_path, monkeypatch):
    recipe = tiny_recipe(tmp_path, max_steps=6, save_every_steps=2, keep_checkpoints=1, eval_every_steps=99)
    make_features(recipe, speakers=(1, 3))
    step = trainer.Trainer.train_step

    def signalled(self, batch):
        step(self, batch)
        if self.progress.step in (2, 4):
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(trainer.Trainer, "train_step", signalled)
    files = ["tiny_0e_2s.pth", "tiny_0e_4s.pth", "tiny_1e_6s.pth"]
    for stopped_at, written in ((3, files[:1]), (5, files[:2])):
        with pytest.raises(Stopped):
            train(recipe)
        assert kept(recipe) == [stopped_at - 1, stopped_at]
        assert voices(recipe) == written
    monkeypatch.undo()
    train(recipe)
    assert kept(recipe) == [6]
    made = [workspace_of(recipe).voice_dir / name for name in files]
    before = {path: (path.read_bytes(), path.stat().st_ino) for path in made}
    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "load", lambda path: pytest.fail(f"{path} is read, though its voice is there"))
        export.run(recipe, Shard())
    assert {path: (path.read_bytes(), path.stat().st_ino) for path in made} == before
    assert voices(recipe) == sorted([*files, "tiny_best.pth", "tiny_last.pth"])
    of_training = load_pth(made[-1])
    made[-1].unlink()
    export.run(recipe, Shard())
    of_export = load_pth(made[-1])
    assert of_export.pop("weight").keys() == of_training.pop("weight").keys()
    assert of_export == of_training, "the same, with the hash of the weights"
    for path in made:
        assert Voice.load(path, torch.device("cpu")).rate == recipe.data.sample_rate


def test_no_voice_is_written_where_none_is_asked_for(tmp_path):
    recipe = tiny_recipe(tmp_path, max_steps=1, save_every_voices=False)
    make_features(recipe)
    train(recipe)
    assert voices(recipe) == []


@pytest.fixture
def saved(tmp_path):
    """A run with a checkpoint, and what makes voices of it."""
    recipe = tiny_recipe(tmp_path)
    make_features(recipe)
    made = make_checkpoint(recipe, make_generator(recipe, content_channels=WIDTH))
    path = checkpoint.save(workspace_of(recipe).checkpoints_dir, made)
    return voice_file.VoiceWriter(recipe, ClipTable.load(recipe)), made, path


@pytest.mark.parametrize("fault", ["no room for a checkpoint", "disk", "folder", "weights"])
def test_a_voice_that_cannot_be_written_costs_itself_alone(saved, monkeypatch, caplog, fault):
    writer, made, path = saved
    folder = writer.work.voice_dir
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    if fault == "no room for a checkpoint":
        usage, few = voice_file.shutil.disk_usage, voice_file.SPARE_BYTES + 10**5
        monkeypatch.setattr(voice_file.shutil, "disk_usage", lambda path: usage(path)._replace(free=few))
        told = "it would leave no room for a checkpoint"
    elif fault == "disk":  # it ends within the file
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, hard))
        told = "File too large"
    elif fault == "folder":
        folder.write_text("in the way")
        told = "File exists"
    else:
        made.models["generator"]["emb_g.weight"][0] = 70000.0
        told = "weights that are not finite numbers of 16 bits"
    try:
        assert writer(made, path) is None
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert "tiny_2e_10s.pth is left out (" in caplog.text
    assert told in caplog.text
    assert fault == "folder" or not list(folder.iterdir())


def test_what_a_killed_run_left_half_written_goes(saved):
    writer, made, path = saved
    writer.work.voice_dir.mkdir()
    halves = [writer.work.voice_dir / f".{16 * digit}.tmp" for digit in "ab"]
    for half in halves:
        half.touch()
    os.utime(halves[0], (0, 0))  # of nobody who still writes
    file = writer(made, path)
    assert {*writer.work.voice_dir.iterdir()} == {file, halves[1]}


def test_training_goes_on_while_a_voice_is_written(tmp_path, monkeypatch):
    recipe = tiny_recipe(tmp_path, max_steps=4, save_every_steps=3, eval_every_steps=99)
    make_features(recipe)
    step, save, later, threads = trainer.Trainer.train_step, voice_file.save_pth, threading.Event(), set()

    def fourth(self, batch):
        step(self, batch)
        if self.progress.step == 3:
            later.set()

    def slow(*what):
        threads.add(threading.current_thread().name)
        assert later.wait(30), "step 4 waits for the voice of step 3"
        save(*what)

    monkeypatch.setattr(trainer.Trainer, "train_step", fourth)
    monkeypatch.setattr(voice_file, "save_pth", slow)
    train(recipe)
    assert threads == {"checkpoint writer"}
    assert len(voices(recipe)) == 2
