"""What a run shows while it trains: TensorBoard, wandb and MLflow, each as its own library or page reads it."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import soundfile
from accelerate.tracking import LOGGER_TYPE_TO_CLASS
from helpers import make_features, tiny_recipe, with_train
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.custom_scalar.layout_pb2 import Layout
from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData

from rvc_dist.__main__ import main
from rvc_dist.choices import TRACKERS
from rvc_dist.config import ConfigError, Recipe, recipe_of
from rvc_dist.train import trackers
from rvc_dist.train.tensorboard import LAYOUT
from rvc_dist.train.trackers import Tracker
from rvc_dist.workspace import Workspace

RATE = 24000


def make_samples(root: Path, step: int) -> Path:
    """As `listening` does: a held-out phrase of four seconds and its original."""
    folder, seconds = root / "samples" / f"step_{step:08d}", np.arange(4 * RATE) / RATE
    for path in (folder / "own_1.flac", root / "samples" / "originals" / "own_1.flac"):
        path.parent.mkdir(parents=True, exist_ok=True)
        soundfile.write(path, 0.3 * np.sin(2 * np.pi * (200 + step) * seconds), RATE)
    sample = {"file": "own_1.flac", "kind": "own", "title": "held-out phrase 1", "speaker": 0, "speaker_name": "0"}
    sample |= {"source": "a.wav at 1 s", "original": "../originals/own_1.flac", "seconds": 4.0, "rate": RATE}
    (folder / "samples.json").write_text(json.dumps([sample | {"index": False}]))
    return folder


def show(recipe: Recipe, first: int, last: int) -> None:
    """What a run from step `first` to `last` shows."""
    tracker = Tracker(recipe, first, enabled=True)
    for step in range(first, last + 1):
        losses = {"loss/g_total": 40.0 / step, "loss/g_mel": 20.0 / step, "loss/d": 2.0, "grad/norm_g": 1.0}
        tracker.scalars(losses | {"perf/audio_s_per_s": 9.0, "perf/data_s": 0.1, "perf/d_step_s": 0.2}, step)
    tracker.scalars({"validation/mel_distance": 1.0, "best/mel_distance": 0.5, "best/step": first}, last)
    tracker.samples(make_samples(Path(recipe.run_dir), last), last)
    tracker.close()


def events_of(recipe: Recipe) -> EventAccumulator:
    events = EventAccumulator(str(Workspace(recipe.run_dir, recipe.name).events_dir))
    return events.Reload()


def hparams(events: EventAccumulator, tag: str) -> HParamsPluginData:
    return HParamsPluginData.FromString(events.SummaryMetadata(f"_hparams_/{tag}").plugin_data.content)


def test_tensorboard_has_layout_recipe_hyperparameters_samples_and_pictures_once_after_a_resume(tmp_path):
    recipe = tiny_recipe(tmp_path)
    folder = Workspace(tmp_path, "tiny").events_dir
    folder.parent.mkdir()
    (folder.parent / "events.out.tfevents.1.older.1.0").touch()
    show(recipe, 1, 9)
    changed = with_train(recipe, learning_rate=3e-4)
    show(changed, 6, 8)
    assert [p.name for p in folder.parent.iterdir()] == ["tiny"], "no run beside it, not even of older versions"
    assert len([*folder.glob("*.card")]) == 1
    events = events_of(changed)
    assert [e.step for e in events.Scalars("loss/g_mel")] == [*range(1, 9)], "no step twice, and none that was undone"
    layout = Layout.FromString(events.Tensors("custom_scalars__config__")[0].tensor_proto.string_val[0])
    assert {c.title: [chart.title for chart in c.chart] for c in layout.category} == {
        k: [*v] for k, v in LAYOUT.items()
    }
    matched = [tag for c in layout.category for chart in c.chart for tag in chart.multiline.tag]
    shown = [tag for tag in events.Tags()["scalars"] if tag != "best/step"]
    assert all(any(re.fullmatch(pattern, tag) for pattern in matched) for tag in shown), "the layout has all of them"
    start = hparams(events, "session_start_info").session_start_info.hparams
    assert start["train.learning_rate"].number_value == 3e-4, "of the run as it is now"
    assert start["model.vocoder"].string_value == "hifi-gan"
    assert "train.lr_decay" not in start, "which is as by default"
    metrics = [m.name.tag for m in hparams(events, "experiment").experiment.metric_infos]
    assert {"best/mel_distance", "validation/mel_distance", "loss/g_mel"} <= {*metrics}
    texts = [t.tensor_proto.string_val[0].decode() for t in events.Tensors("recipe/changes/text_summary")]
    assert [("train.learning_rate" in text) for text in texts] == [False, True]
    for name in ("samples/own_1", "originals/own_1"):
        assert [(e.step, e.length_frames / e.sample_rate) for e in events.Audio(name)] == [(8, 4.0)]
    (picture,) = events.Images("spectrograms/own_1")
    assert picture.step == 8
    assert min(picture.width, picture.height) > 300, "with room for axes"


TEXT = """
const texts = root => [...root.querySelectorAll('*')].flatMap(element => [
  ...(element.shadowRoot ? texts(element.shadowRoot) : []),
  ...[...element.childNodes].filter(node => node.nodeType === Node.TEXT_NODE).map(node => node.textContent.trim()),
])
return texts(document)
"""
TABS = {
    "timeseries": ["voice_a/tensorboard/tiny", "voice_b/tensorboard/tiny", "best/mel_distance"],
    "custom_scalars": ["Losses", "Validation on held-out speech", "Throughput", "seconds of audio a second"],
    "images": ["spectrograms"],
    "audio": ["samples", "originals"],
    "text": ["train.learning_rate", "0.0003"],
    "hparams": ["train.learning_rate", "best/mel_distance", "validation/mel_distance"],
}


@pytest.mark.slow
def test_the_page_of_tensorboard_tells_runs_apart_and_has_every_tab(tmp_path, browser):
    for name in ("voice_a", "voice_b"):
        show(with_train(tiny_recipe(tmp_path / name), learning_rate=3e-4), 1, 9)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "tensorboard.main", "--logdir", tmp_path, "--port", str(port)]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, start_new_session=True)
    try:
        assert process.stderr is not None
        next(line for line in process.stderr if b"Press CTRL+C" in line)
        for tab, wanted in TABS.items():
            browser.open(f"http://127.0.0.1:{port}/?tab={tab}#{tab}")
            deadline, missing = time.monotonic() + 60, set(wanted)
            while missing and time.monotonic() < deadline:
                time.sleep(0.3)
                missing -= {*browser.evaluate(TEXT)}
            assert not missing, tab
            assert browser.errors() == []
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


# Other trackers


def test_a_name_that_is_unknown_or_not_installed_is_told_before_training(tmp_path, monkeypatch, capsys):
    assert TRACKERS.keys() == LOGGER_TYPE_TO_CLASS.keys()
    assert recipe_of([("train.trackers", "wandb")]).train.tracker_names == ("wandb",)
    assert recipe_of([("train.trackers", "[mlflow, wandb, mlflow]")]).train.tracker_names == ("mlflow", "wandb")
    assert recipe_of([("train.trackers", "[]")]).train.tracker_names == ()
    with pytest.raises(ConfigError, match=r"train\.trackers: got \['wandv'\], expected some of tensorboard, wandb, .*"):
        recipe_of([("train.trackers", "[wandv]")])
    recipe = tiny_recipe(tmp_path, trackers=("aim",))
    make_features(recipe)
    (tmp_path / "recipe.yaml").write_text(recipe.to_yaml())
    monkeypatch.setattr(trackers.importlib.util, "find_spec", lambda name: None)
    assert main(["train", "--config", str(tmp_path / "recipe.yaml")]) == 1
    assert "train.trackers: aim needs the package aim: pip install aim" in capsys.readouterr().err
    assert not (tmp_path / "checkpoints").exists()
