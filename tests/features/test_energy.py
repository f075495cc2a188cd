"""Energy of frames: measured as other tools do, in features files where the model follows it, and nowhere else."""

import librosa
import numpy as np
import pytest
import soundfile
from helpers import changed, tiny_recipe
from safetensors.numpy import load_file

from rvc_dist.data import preprocess
from rvc_dist.features import extract, feature_files
from rvc_dist.features.energy import frame_energy
from rvc_dist.workspace import Shard, StageError, WorkList, Workspace


@pytest.mark.parametrize("size", [16000, 8001, 1500])
def test_it_is_the_rms_that_other_tools_take(size):
    wave = 0.1 * np.random.default_rng(0).standard_normal(size).astype(np.float32)
    expected = librosa.feature.rms(y=wave, frame_length=2048, hop_length=160, pad_mode="reflect")[0]
    np.testing.assert_allclose(frame_energy(wave, len(expected)), expected, rtol=1e-5)
    assert frame_energy(np.zeros(size, np.float32), 3).tolist() == [0, 0, 0]


def test_features_hold_it_where_the_model_follows_it_and_are_the_same_besides(tmp_path):
    recipe = tiny_recipe(tmp_path / "run")
    recipe = changed(recipe, "data", audio_dir=str(tmp_path / "audio"))
    (tmp_path / "audio").mkdir()
    wave = np.sin(2 * np.pi * 200 * np.arange(48000) / 24000) * np.linspace(0.01, 0.5, 48000)
    soundfile.write(tmp_path / "audio" / "a.wav", wave, 24000)
    preprocess.run(recipe, Shard())
    work, found = Workspace(recipe.run_dir, recipe.name), {}
    following = changed(recipe, "model", energy=True)
    for name, asked in {"off": recipe, "on": following, "off again": recipe}.items():
        extract.run(asked, Shard())
        found[name] = {p.name: p.read_bytes() for p in work.features_dir.iterdir()}
        if name == "on":
            clip, mute = load_file(work.features_file(0)), load_file(work.mute_file)
            feature_files.check_made(following, work, WorkList.load(work.work_list_file))
            with pytest.raises(StageError, match=r"model\.energy: True -> False"):
                feature_files.check_made(recipe, work, WorkList.load(work.work_list_file))
    assert found["off"] == found["off again"]
    assert b"energy" not in b"".join(found["off"].values())
    assert clip["00000.energy"].shape == clip["00000.f0"].shape
    assert clip["00000.energy"][150] > 2 * clip["00000.energy"][20] > 0
    assert not mute["00000.energy"].any()
