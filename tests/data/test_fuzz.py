"""The preprocess stage on 200 damaged recordings among good ones."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import soundfile
from recordings import damaged, write_every_kind
from safetensors.numpy import load_file

from rvc_dist import workspace
from rvc_dist.data import audio, preprocess

VOICE = Path(preprocess.__file__).parents[1] / "demo_voice" / "voice"
NUM_DAMAGED = 200
MOST_S = 10.0
"""Of CPU, which other tests have no say in; one that waits for ever is seen by the time limit of all."""

CHILD = """
import json, sys, time
from rvc_dist.data import preprocess, work_list
from rvc_dist.config import DataConfig, PreprocessConfig, Recipe
from rvc_dist.workspace import Shard

spent = {}
def timed(function, path_of):
    def call(*arguments, **options):
        started_at = time.thread_time()
        try:
            return function(*arguments, **options)
        finally:
            path = path_of(arguments)
            spent[path] = spent.get(path, 0.0) + time.thread_time() - started_at
    return call
work_list._facts = timed(work_list._facts, lambda a: a[2].path)
preprocess.cut_file = timed(preprocess.cut_file, lambda a: a[1].path)
preprocess.run(
    Recipe(run_dir=sys.argv[2], data=DataConfig(audio_dir=sys.argv[1], sample_rate=24000)), Shard()
)
print(json.dumps(spent))
"""


@pytest.mark.slow
def test_damaged_recordings_are_named_and_the_good_ones_are_done(tmp_path: Path) -> None:
    voice, rate = soundfile.read(sorted(VOICE.iterdir())[0], dtype="float32")
    wave = audio.resample(voice[: 2 * rate], rate, 48000)
    good = write_every_kind(tmp_path / "audio", wave, 48000)
    assert len(good) == 15
    bad = list(damaged(good, tmp_path / "audio" / "0", NUM_DAMAGED, seed=1))
    for suffix, kind in {"flac": ("FLAC", "PCM_16"), "ogg": ("OGG", "VORBIS"), "opus": ("OGG", "OPUS")}.items():
        with soundfile.SoundFile(tmp_path / "audio" / f"bomb.{suffix}", "w", 48000, 1, kind[1], None, kind[0]) as file:
            for _ in range(1200):
                file.write(np.zeros(48000, np.float32))

    command = [sys.executable, "-c", CHILD, str(tmp_path / "audio"), str(tmp_path / "run")]
    result = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert result.returncode == 0, result.stderr[-2000:]
    spent = json.loads(result.stdout.splitlines()[-1])
    slowest = max(spent, key=spent.__getitem__)
    assert spent[slowest] < MOST_S, (slowest, spent[slowest])

    files = {f["path"]: f for f in json.loads((tmp_path / "run" / "clips" / "report.json").read_text())["files"]}
    assert len(files) == len(good) + len(bad) + 3
    for path in good:
        assert files[path.name]["clips"] == 1, files[path.name]
        assert files[path.name]["reason"] == ""
    for path in bad:
        entry = files[f"0/{path.name}"]
        assert entry["clips"] or entry["reason"], entry
    for suffix in ("flac", "ogg", "opus"):
        assert "silence" in files[f"bomb.{suffix}"]["reason"]
    unreadable = [f for f in files.values() if not f["clips"]]
    assert len(unreadable) > NUM_DAMAGED / 3  # the damage was real
    for file in workspace.unit_files(tmp_path / "run" / "clips"):
        assert all(np.isfinite(clip).all() for clip in load_file(file).values())
