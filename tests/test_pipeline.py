"""Every stage by the command line on real voice, on one rank and on two, with a narrow network and no extra."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from launching import ONLY_CORE, ROOT, rvc_dist

import rvc_dist as package
from rvc_dist.config import load_recipe
from rvc_dist.pipeline import DATA_STAGES

pytestmark = [pytest.mark.slow, pytest.mark.distributed]

VOICE = Path(package.__file__).parent / "demo_voice" / "voice"
SOURCE = Path(package.__file__).parent / "demo_voice" / "source" / "fr.flac"
STAGES = ("preprocess", "extract", "index", "train", "export", "infer")


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    """Four recordings of the demo voice, and one that is none; some of the source lies beside them."""
    folder = tmp_path_factory.mktemp("data") / "audio"
    folder.mkdir()
    wave, rate = soundfile.read(SOURCE, frames=4 * 16000)
    soundfile.write(folder.parent / SOURCE.name, wave, rate)
    for name in ("000", "005", "025", "050"):
        shutil.copy(VOICE / f"{name}.flac", folder)
    (folder / "notes.wav").write_text("this is no sound")
    return folder


@pytest.fixture(scope="module")
def runs(dataset, tmp_path_factory):
    """Run folders of the same recipe, made by `run` on 1 rank and stage by stage on 2."""
    folders = {}
    environment = ONLY_CORE | {"THIN": "1"}
    for num_ranks in (1, 2):
        folder = folders[num_ranks] = tmp_path_factory.mktemp(f"ranks{num_ranks}")
        options = {
            "run_dir": folder,
            "data.audio_dir": dataset,
            "train.max_steps": 3,
            **dict.fromkeys(("train.pretrained_g", "train.pretrained_d"), "null"),
            "train.eval_every_steps": 2,
            "infer.input": dataset.parent / SOURCE.name,
            "infer.output": folder / "out.wav",
        }
        arguments = ["--config", ROOT / "configs" / "demo_cpu.yaml"]
        arguments += [x for key, value in options.items() for x in (f"--{key}", value)]
        stages = STAGES if num_ranks == 2 else ("run", "infer")
        if num_ranks == 2:
            arguments += ["--train.report", "false", "--train.samples", "false"]  # what the first rank does alone
        said = [rvc_dist(num_ranks, stage, *arguments, more_environment=environment) for stage in stages]
        (folder / "output.txt").write_text("".join(said))
        (folder / "again.txt").write_text(rvc_dist(num_ranks, "run", *arguments, more_environment=environment))
    return folders


def test_data_stages_give_the_same_bytes_on_one_rank_and_on_two(runs):
    for stage in ("clips", "features", "index"):
        names = sorted(p.name for p in (runs[1] / stage).iterdir())
        assert len(names) >= 3
        assert names == sorted(p.name for p in (runs[2] / stage).iterdir())
        for name in names:
            assert (runs[1] / stage / name).read_bytes() == (runs[2] / stage / name).read_bytes(), name


@pytest.mark.parametrize("num_ranks", [1, 2])
def test_the_bad_file_is_in_the_report_and_the_good_ones_are_used(runs, num_ranks):
    report = json.loads((runs[num_ranks] / "clips" / "report.json").read_text())
    bad = [f for f in report["files"] if not f["clips"]]
    assert [f["path"] for f in bad] == ["notes.wav"]
    assert "not readable" in bad[0]["reason"]
    assert report["total_dataset_duration"] == "00:00:26"
    assert "notes.wav" in (runs[num_ranks] / "output.txt").read_text()


@pytest.mark.parametrize("num_ranks", [1, 2])
def test_the_voice_converts(dataset, runs, num_ranks):
    folder = runs[num_ranks]
    voice = torch.load(folder / "voice" / "demo_last.pth", weights_only=True)
    assert voice["step"] == 3
    assert voice["config"][17] == voice["sr"] == 24000
    assert voice["embedder_model"] == "mfcc"
    assert (folder / "voice" / "demo_best.pth").is_file()
    assert len(list((folder / "index").glob("added_IVF*_Flat_nprobe_9_demo_v2.index"))) == 1
    wave, rate = soundfile.read(folder / "out.wav")
    source = soundfile.info(dataset.parent / SOURCE.name)
    assert rate == 24000
    assert len(wave) == round(source.duration * rate)
    assert np.isfinite(wave).all()
    assert 0 < np.abs(wave).max() < 1


@pytest.mark.parametrize("num_ranks", [1, 2])
def test_run_skips_what_is_done_and_saves_the_recipe(runs, num_ranks):
    again = (runs[num_ranks] / "again.txt").read_text()
    assert "0 to do here" in again
    assert "is up to date" in again
    assert "already trained" in again
    recipe = load_recipe(runs[num_ranks] / "config.yaml")
    assert recipe.train.max_steps == 3
    assert DATA_STAGES == ("data.preprocess", "features.extract", "features.index")
