"""Several speakers by the command line, from the names of their folders to a conversion."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from launching import ROOT, rvc_dist

import rvc_dist as package

VOICE = Path(package.__file__).parent / "demo_voice" / "voice"


@pytest.mark.slow
@pytest.mark.distributed
def test_two_speakers_on_two_ranks_with_loader_processes(tmp_path):
    """Two recordings of one, one of the other, which counts three times."""
    for path in ("alice_7_1/000.flac", "alice_7_1/025.flac", "bob_2_3/005.flac"):
        (tmp_path / "audio" / path).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(VOICE / Path(path).name, tmp_path / "audio" / path)
    options = {
        "run_dir": tmp_path / "run",
        "data.audio_dir": tmp_path / "audio",
        "extract.f0_method": "swipe",
        "index.speakers": "both",
        "train.max_steps": 2,
        **dict.fromkeys(("train.pretrained_g", "train.pretrained_d"), "null"),
        **dict.fromkeys(("train.report", "train.samples"), "false"),
        "train.num_workers": 1,
        "infer.input": VOICE / "050.flac",
        "infer.output": tmp_path / "out.wav",
    }
    arguments = ["--config", ROOT / "configs" / "demo_cpu.yaml"]
    arguments += [x for key, value in options.items() for x in (f"--{key}", value)]
    output = rvc_dist(2, "run", *arguments, more_environment={"THIN": "1"})
    assert "preprocess: speakers 2 (bob), 7 (alice)" in output
    info = [{"id": 2, "name": "bob"}, {"id": 7, "name": "alice"}]
    run = tmp_path / "run"
    assert json.loads((run / "speakers.json").read_text()) == {"speakers": info, "trained": [2, 7]}
    voice = torch.load(run / "voice" / "demo_last.pth", weights_only=True)
    assert [{key: one[key] for key in ("id", "name")} for one in voice["speaker_info"]] == info
    assert voice["trained_speakers"] == [2, 7]
    (index,) = (run / "index").glob("added_IVF*_Flat_nprobe_9_demo_v2_spkid7.index")
    assert len(list((run / "index").glob("*.index"))) == 3

    assert f"infer: index {index}" in rvc_dist(1, "infer", *arguments, "--infer.speaker", "alice")
    assert (tmp_path / "out.wav").is_file()
    refused = rvc_dist(1, "infer", *arguments, "--infer.speaker", "0", code=1)
    assert "infer.speaker: got 0, this voice was trained on speakers 2 (bob), 7 (alice)" in refused
