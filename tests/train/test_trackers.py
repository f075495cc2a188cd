"""What a run shows while it trains: TensorBoard, wandb and MLflow, each as its own library or page reads it."""

import json
import os
import re
import signal
import socket
import struct
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import psutil
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
from rvc_dist.report.history import read_history
from rvc_dist.train import trackers, trainer
from rvc_dist.train.tensorboard import LAYOUT
from rvc_dist.train.trackers import Tracker
from rvc_dist.workspace import Shard, Workspace

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
    recipe = tiny_recipe(tmp_path, trackers=("tensorboard",))
    folder = Workspace(tmp_path, "tiny").events_dir
    folder.parent.mkdir()
    (folder.parent / "events.out.tfevents.1.older.1.0").touch()
    show(recipe, 1, 9)
    changed = with_train(recipe, learning_rate=3e-4)
    time.sleep(1)  # files of one second and process come by the letters of their number, of which 10 is before 9
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
    seconds = next(chart for c in layout.category for chart in c.chart if chart.title.startswith("seconds a step"))
    matches = [
        re.fullmatch(seconds.multiline.tag[0], tag) is not None for tag in ("perf/d_step_s", "perf/audio_s_per_s")
    ]
    assert matches == [True, False]
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
    "timeseries": ["voice_a/tensorboard/tiny", "voice_b/tensorboard/tiny", "best", "loss"],
    "custom_scalars": ["Losses", "Validation on held-out speech", "Throughput", "seconds of audio a second"],
    "images": ["spectrograms"],
    "audio": ["samples", "originals"],
    "text": ["train.learning_rate", "0.0003"],
    "hparams": ["train.learning_rate", "best/mel_distance", "validation/mel_distance"],
}


@pytest.mark.slow
def test_the_page_of_tensorboard_tells_runs_apart_and_has_every_tab(tmp_path, browser):
    for name in ("voice_a", "voice_b"):
        show(with_train(tiny_recipe(tmp_path / name, trackers=("tensorboard",)), learning_rate=3e-4), 1, 9)
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


SHOW_AND_WAIT = """
import sys, time
from rvc_dist.config import load_recipe
from rvc_dist.train.trackers import Tracker
tracker = Tracker(load_recipe(sys.argv[1]), 1, enabled=True)
for step in range(1, 6):
    tracker.scalars({"loss/g_mel": 1.0 / step}, step)
time.sleep(300)
"""


def wandb_steps(folder: Path) -> dict[str, list[int]]:
    """Of the files that `wandb sync` sends: by the run's id, the steps."""
    from wandb.proto.wandb_internal_pb2 import Record

    found: dict[str, list[int]] = {}
    for file in sorted(folder.glob("wandb/offline-run-*/*.wandb")):
        data, at = file.read_bytes(), 7
        assert len(data) < 1 << 15, "one block of LevelDB's log format"
        while at < len(data):
            _, size, _ = struct.unpack_from("<IHB", data, at)
            record = Record.FromString(data[at + 7 : at + 7 + size])
            at += 7 + size
            if record.HasField("history"):
                found.setdefault(file.stem, []).append(record.history.step.num)
    return found


@pytest.fixture
def begun():
    """What this process has begun since the test did: a browser of other tests may live all the time."""
    before = psutil.Process().children(recursive=True)
    return lambda: [child for child in psutil.Process().children(recursive=True) if child not in before]


def alive(processes: list[psutil.Process]) -> list[str]:
    """Those that have not ended after some seconds; one that its parent, by now init, has yet to reap has."""
    running = psutil.wait_procs(processes, 10)[1]
    return [str(process) for process in running if process.status() != psutil.STATUS_ZOMBIE]


@pytest.mark.slow
def test_wandb_and_mlflow_go_on_in_the_same_run_after_a_kill_that_their_processes_do_not_outlive(
    tmp_path, monkeypatch, begun
):
    monkeypatch.setenv("WANDB_MODE", "offline")
    recipe = tiny_recipe(tmp_path / "run", trackers=("wandb", "mlflow"))
    (tmp_path / "recipe.yaml").write_text(recipe.to_yaml())
    killed = subprocess.Popen([sys.executable, "-c", SHOW_AND_WAIT, tmp_path / "recipe.yaml"])
    try:
        deadline = time.monotonic() + 120
        while not ([*tmp_path.glob("run/mlruns/*/*/metrics/*/*")] and [*tmp_path.glob("run/wandb/*/*.wandb")]):
            assert killed.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.2)
        below = psutil.Process(killed.pid).children(recursive=True)
        assert len(below) >= 2, "the trackers' process and wandb's"
    finally:
        killed.kill()
        killed.wait()
    assert psutil.wait_procs(below, 90)[1] == []
    tracker = Tracker(recipe, 4, enabled=True)
    below = begun()
    assert below
    for step in range(4, 8):
        tracker.scalars({"loss/g_mel": 1.0 / step}, step)
    tracker.close()
    assert not alive(below)
    ((_, steps),) = wandb_steps(tmp_path / "run").items()
    assert steps == [1, 2, 3, 4, 5, 4, 5, 6, 7]
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    from mlflow.tracking import MlflowClient

    client = MlflowClient((tmp_path / "run" / "mlruns").as_uri())
    (experiment,) = [e for e in client.search_experiments() if e.name == "rvc_dist"]
    (run,) = client.search_runs([experiment.experiment_id])
    assert (run.info.run_name, run.data.params["train.batch_size"]) == ("tiny", "2")
    metrics = client.get_metric_history(run.info.run_id, "loss/g_mel")
    assert [m.step for m in metrics] == [1, 2, 3, 4, 5, 4, 5, 6, 7]
    assert all(m.value == 1.0 / m.step for m in metrics)


@pytest.mark.slow
def test_trackers_that_reach_no_network_cost_a_warning_and_the_run_ends_as_without_them(
    tmp_path, monkeypatch, caplog, begun
):
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        address = f"http://127.0.0.1:{closed.getsockname()[1]}"
    for name, value in {"WANDB_BASE_URL": address, "WANDB_API_KEY": "a" * 40, "MLFLOW_TRACKING_URI": address}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(trackers, "left_to_finish_s", lambda began_at: 8.0)
    recipe = tiny_recipe(tmp_path, trackers=("wandb", "mlflow"))
    make_features(recipe)
    below: list[psutil.Process] = []
    begin = trackers.TrackerHost.log

    def log(self, *values):
        below.extend(begun())
        begin(self, *values)

    monkeypatch.setattr(trackers.TrackerHost, "log", log)
    trainer.run(recipe, Shard())
    assert "train.trackers: wandb, mlflow: not finished after 8 s, and ended" in caplog.text
    assert below
    assert not alive(below)
    lines = read_history(tmp_path / "metrics.jsonl")
    (end,) = (place for place, line in enumerate(lines) if line["kind"] == "end")
    assert lines[end]["why"] == "done"
    after = [line["text"] for line in lines[end + 1 :]]
    assert any("not finished" in text for text in after)
    assert all("tracker" in text for text in after), "what they say when they are ended may come too"
