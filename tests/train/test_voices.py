"""train.save_every_voices: a voice file beside every checkpoint, which are never pruned and never end a run."""

import logging
import os
import resource
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
from accelerate.state import AcceleratorState
from helpers import make_features, tiny_recipe, workspace_of

from rvc_dist.models.torch_file import load_pth
from rvc_dist.train import checkpoint, trainer, voice_file
from rvc_dist.voice import export
from rvc_dist.voice.file import Voice
from rvc_dist.workspace import Shard, Stopped


@pytest.fixture(autouse=True)
def _fresh_accelerate_state():
    AcceleratorState._reset_state(reset_partial_state=True)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


def train(recipe) -> None:
    AcceleratorState._reset_state(reset_partial_state=True)
    trainer.run(recipe, Shard())


def voices(recipe) -> list[str]:
    return sorted(p.name for p in workspace_of(recipe).voice_dir.glob("*"))


def kept(recipe) -> list[int]:
    return [checkpoint.progress_of(p).step for p in checkpoint.list_checkpoints(workspace_of(recipe).checkpoints_dir)]


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


@pytest.mark.parametrize("fault", ["no room for a checkpoint", "disk", "folder", "weights"])
def test_a_voice_that_cannot_be_written_costs_itself_alone(tmp_path, monkeypatch, caplog, fault):
    recipe = tiny_recipe(tmp_path, max_steps=4, save_every_steps=2, eval_every_steps=99)
    make_features(recipe)
    folder, told = workspace_of(recipe).voice_dir, "it would leave no room for a checkpoint"
    if fault == "no room for a checkpoint":
        usage = voice_file.shutil.disk_usage
        few = voice_file.SPARE_BYTES + 10**5
        monkeypatch.setattr(
            voice_file.shutil, "disk_usage", lambda path: usage(path)._replace(free=few if path == folder else 10**12)
        )
    elif fault == "disk":  # it ends within the file
        save = voice_file.save_pth
        told = "File too large"

        def limited(*what):
            soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
            handler = signal.getsignal(signal.SIGXFSZ)
            assert handler == signal.SIG_IGN  # as Python sets it
            resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, hard))
            try:
                save(*what)
            finally:
                resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))

        monkeypatch.setattr(voice_file, "save_pth", limited)
    elif fault == "folder":
        folder.write_text("in the way")
        told = "File exists"
    else:
        monkeypatch.setattr(voice_file, "halved", lambda weights, step: trainer.checkpoint.verify(tmp_path / "none"))
        told = "is damaged"
    train(recipe)
    assert kept(recipe) == [2, 4]
    assert caplog.text.count("is left out (") == 2
    assert told in caplog.text
    assert fault == "folder" or voices(recipe) == []


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


KILLED = """
import os, signal, sys, torch
from pathlib import Path
from rvc_dist.models import torch_file
os.fsync = lambda _: os.kill(os.getpid(), signal.SIGKILL)
torch_file.save_pth(Path(sys.argv[1]), {"weight": {"a": torch.zeros(1000)}, "config": []})
"""


def test_a_kill_leaves_no_half_of_a_voice_and_what_it_leaves_goes(tmp_path, caplog):
    recipe = tiny_recipe(tmp_path, max_steps=1)
    make_features(recipe)
    folder = workspace_of(recipe).voice_dir
    folder.mkdir()
    killed = subprocess.run([sys.executable, "-c", KILLED, str(folder / "tiny_1e_1s.pth")], check=False)
    (half,) = folder.iterdir()
    assert (killed.returncode, half.suffix) == (-signal.SIGKILL, ".tmp")
    os.utime(half, (0, 0))
    with caplog.at_level(logging.INFO):
        train(recipe)
    assert [Path(name).suffix for name in voices(recipe)] == [".pth"]
    assert f"saved {folder}" in caplog.text
