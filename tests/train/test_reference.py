"""extract.reference: a recording of one's own to listen to, which changes nothing else."""

from pathlib import Path

import numpy as np
import pytest
import soundfile
from accelerate.state import AcceleratorState
from helpers import changed, thin_networks, tiny_recipe
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from rvc_dist.data import preprocess
from rvc_dist.features import extract
from rvc_dist.train import checkpoint, trainer
from rvc_dist.workspace import Shard, StageError, Workspace

RATE = 24000


def tone(path: Path, hz: float, seconds: float, rate: int = RATE) -> None:
    path.parent.mkdir(exist_ok=True)
    soundfile.write(path, 0.3 * np.sin(2 * np.pi * hz * np.arange(int(rate * seconds)) / rate), rate)


def heard(recipe, name: str) -> float:
    """Seconds of the newest sound in TensorBoard."""
    events = EventAccumulator(str(Workspace(recipe.run_dir, recipe.name).events_dir), {"audio": 0})
    events.Reload()
    return events.Audio(name)[-1].length_frames / RATE


def test_it_is_what_validations_convert_and_changes_no_weight(tmp_path, monkeypatch):
    thin_networks(monkeypatch.setattr)
    tone(tmp_path / "audio" / "voice.wav", 150.0, 5.2)
    tone(tmp_path / "mine" / "song.flac", 220.0, 2.5, 16000)
    plain = changed(tiny_recipe(tmp_path / "run", max_steps=1), "data", audio_dir=str(tmp_path / "audio"))
    plain = changed(plain, "preprocess", cut_method="simple", chunk_len=1.0, overlap_len=0.0)
    plain = changed(plain, "extract", f0_method="yin")
    asked = changed(plain, "extract", reference=str(tmp_path / "mine" / "song.flac"))
    work, results = Workspace(plain.run_dir, plain.name), []
    preprocess.run(plain, Shard())
    for recipe in (plain, asked):
        extract.run(recipe, Shard())
        AcceleratorState._reset_state(reset_partial_state=True)
        trainer.run(changed(recipe, "train", seed=1234), Shard())
        folder = checkpoint.latest(work.checkpoints_dir)
        files = {p.name: p.read_bytes() for p in [*work.features_dir.iterdir(), folder / "generator.safetensors"]}
        results.append((files, heard(recipe, "audio/real"), heard(recipe, "audio/generated")))
        checkpoint.discard(folder)
    (before, *held_out), (after, *reference) = results
    assert after.pop("reference.safetensors")
    assert before == after
    assert held_out == pytest.approx([1.0, 1.0], abs=0.05)
    assert reference == pytest.approx([2.5, 2.5], abs=0.05)

    tone(tmp_path / "mine" / "song.flac", 200.0, 2.0)
    AcceleratorState._reset_state(reset_partial_state=True)
    with pytest.raises(StageError, match=r"reference.safetensors is not of extract.reference .*extract` again"):
        trainer.run(asked, Shard())
    extract.run(asked, Shard())
    (tmp_path / "mine" / "song.flac").unlink()
    trainer.run(asked, Shard())
    assert heard(asked, "audio/real") == pytest.approx(2.0, abs=0.05)
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.mark.parametrize(
    ("content", "message"), [(None, "No such file"), (b"RIFF", "song.wav: "), ("short", "shorter")]
)
def test_a_reference_that_cannot_be_read_is_one_error(tmp_path, content, message):
    tone(tmp_path / "audio" / "voice.wav", 150.0, 2.0)
    song = tmp_path / "song.wav"
    if content == "short":
        tone(song, 100.0, 0.5)
    elif content is not None:
        song.write_bytes(content)
    recipe = changed(tiny_recipe(tmp_path / "run"), "data", audio_dir=str(tmp_path / "audio"))
    recipe = changed(recipe, "extract", f0_method="yin", reference=str(song))
    preprocess.run(recipe, Shard())
    with pytest.raises(StageError, match=f"extract.reference: .*{message}"):
        extract.run(recipe, Shard())
