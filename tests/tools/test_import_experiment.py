"""Experiments of the three tools become runs that go on; what cannot be taken over is named."""

from __future__ import annotations

import json
import logging
import os
import pickle
import shutil
import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

import experiments
import faiss
import numpy as np
import pytest
import soundfile
import torch
from experiments import FOLDERS
from helpers import (
    RATE,
    SteadyPitch,
    changed,
    make_checkpoint,
    make_generator,
    narrow_recipe,
    thin_networks,
    workspace_of,
)
from safetensors.numpy import load_file

from rvc_dist import __main__ as cli
from rvc_dist.choices import F0_METHODS, F0Spec
from rvc_dist.config import Recipe, TrainConfig, load_recipe
from rvc_dist.data import preprocess
from rvc_dist.features import extract, feature_files, index, index_file
from rvc_dist.features.unvoiced import UnvoicedCount
from rvc_dist.models.state_dict import from_upstream
from rvc_dist.tools import experiment, import_experiment
from rvc_dist.train import checkpoint, trainer
from rvc_dist.train.dataset import ClipTable
from rvc_dist.voice import export
from rvc_dist.workspace import Shard, StageError, WorkList, read_header, read_json, unit_files

TOOLS = tuple(FOLDERS)


@pytest.fixture(scope="module", params=TOOLS)
def made(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path]:
    return request.param, experiments.make(tmp_path_factory.mktemp(request.param) / "logs" / "voice", request.param)


@pytest.fixture(scope="module")
def applio(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return experiments.make(tmp_path_factory.mktemp("applio") / "logs" / "voice", "applio")


@pytest.fixture
def copied(applio: Path, tmp_path: Path) -> Path:
    """An experiment to change."""
    return Path(shutil.copytree(applio, tmp_path / "logs" / "voice"))


def recipe_for(folder: Path, run_dir: Path, **sections: Any) -> Recipe:
    """The narrow recipe, except what the import is to find out by itself."""
    recipe = changed(narrow_recipe(run_dir.parent, **sections), "data", audio_dir=str(folder), sample_rate=48000)
    widths = {"inter_channels": 192, "hidden_channels": 192, "num_heads": 2, "num_layers": 6}
    recipe = changed(recipe, "model", **widths)
    return replace(recipe, run_dir=str(run_dir))


def imported(recipe: Recipe) -> Recipe:
    """Import, and read the recipe that the run keeps."""
    import_experiment.run(recipe, Shard())
    return load_recipe(workspace_of(recipe).config_file)


def units(folder: Path) -> dict[str, np.ndarray]:
    """Every clip by the source's name and number, over all units."""
    found = {}
    for path in sorted(folder.glob("[0-9]*.safetensors")):
        arrays = load_file(path)
        header = read_header(path)
        names = [f["path"] for f in header["files"] if f["clips"]] if "files" in header else None
        for i in range(len(header["clips"])):
            name = names[i] if names else f"{path.stem}/{i}"
            found |= {f"{name}{k[5:]}": v for k, v in arrays.items() if k.startswith(f"{i:05d}")}
    return found


def reasons(recipe: Recipe) -> dict[str, str]:
    return {f["path"]: f["reason"] for f in read_json(workspace_of(recipe).clips_report_file)["files"] if f["reason"]}


# What is taken over


def test_energy_is_measured_where_the_recipe_asks_for_it(applio: Path, tmp_path: Path) -> None:
    recipe = imported(changed(recipe_for(applio, tmp_path / "run"), "model", energy=True))
    work = workspace_of(recipe)
    feature_files.check_made(recipe, work, WorkList.load(work.work_list_file))
    found = {k: v for path in unit_files(work.features_dir) for k, v in load_file(path).items()}
    energies = {k: v for k, v in found.items() if k.endswith(".energy")}
    assert len(energies) == len(found) / 3 > 0
    for key, energy in energies.items():
        assert energy.shape == found[key.replace("energy", "f0")].shape
        assert energy.max() > 0


def test_waves_features_and_speakers_are_taken_over_to_the_last_bit(made: tuple[str, Path], tmp_path: Path) -> None:
    tool, folder = made
    recipe = imported(recipe_for(folder, tmp_path / "run"))
    work = workspace_of(recipe)
    waves = units(work.clips_dir)
    expected = {f"{name}.wav": (speaker, wave) for name, speaker, wave in experiments.clips(tool)}
    assert waves.keys() == expected.keys()
    for name, (_, wave) in expected.items():
        np.testing.assert_array_equal(waves[name], wave)

    content = FOLDERS[tool][4]
    work_list = WorkList.load(work.work_list_file)
    assert work_list is not None
    for unit in work_list.units:
        arrays, header = load_file(work.features_file(unit.id)), read_header(work.features_file(unit.id))
        assert header["embedder"] == {"name": "mfcc", "width": 768, "hash": ""}
        assert header["sample_rate"] == RATE
        for i, (file, clip) in enumerate(zip(unit.files, header["clips"], strict=True)):
            stem = Path(file.path).stem
            assert clip["speaker"] == expected[file.path][0]
            assert (clip["source"], clip["start_s"]) == (stem.rpartition("_")[0], round(0.7 * int(stem[-1]), 1))
            assert clip["guessed"]
            assert clip.get("repeat", 1) == (experiments.REPEATS[clip["speaker"]] if experiments.has_names(tool) else 1)
            assert (clip["num_samples"], clip["num_content"], clip["num_f0"]) == (RATE, 50, 101)
            np.testing.assert_array_equal(arrays[f"{i:05d}.content"], np.load(folder / content / f"{stem}.npy"))
            number = list(expected).index(file.path)
            f0 = experiments.pitch_of(tool, number, 101)["true" if tool == "arvc" else "hz"]
            assert arrays[f"{i:05d}.f0"].dtype == np.float32
            np.testing.assert_array_equal(arrays[f"{i:05d}.f0"], f0.astype(np.float32))

    report = read_json(work.clips_report_file)
    assert (report["clips"], report["clip_seconds"], report["files_left_out"]) == (6, 6.0, 0)
    assert report["files_without_features"] == 0
    assert report["total_dataset_duration"] == ("00:00:08" if tool == "applio" else "00:00:06")
    assert report["speakers"] == sorted({speaker for speaker, _ in expected.values()})
    names = experiments.NAMES if experiments.has_names(tool) else {i: str(i) for i in report["speakers"]}
    assert work.speakers().names == names
    assert (recipe.data.sample_rate, recipe.data.audio_dir) == (RATE, str(folder))
    assert (recipe.model.version, recipe.model.pitch_guidance) == ("v2", True)
    assert (recipe.model.inter_channels, recipe.model.num_layers) == (16, 1)
    assert (recipe.extract.embedder_model, recipe.extract.include_mutes) == ("mfcc", 0)
    assert recipe.extract.unvoiced == ("interpolated" if experiments.has_names(tool) else "zero")


@pytest.mark.parametrize("made", ["applio", "webui", "rvc-next"], indirect=True)
def test_the_run_goes_on_from_the_weights_to_a_voice(
    made: tuple[str, Path], tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    tool, original = made
    if tool != "applio":  # one with whole networks will do
        thin_networks(monkeypatch.setattr)
    folder = Path(shutil.copytree(original, tmp_path / "logs" / "voice"))
    narrow = changed(narrow_recipe(tmp_path), "data", sample_rate=RATE)
    experiments.add_weights(folder, 40, narrow, tool=tool)
    states = experiments.add_weights(folder, 100, narrow, tool=tool)
    (folder / "G_2333333.pth").write_bytes(b"a save that was cut short")
    shutil.copy(folder / "D_100.pth", folder / "D_2333333.pth")
    given = experiments.add_index(folder, tool)
    caplog.set_level(logging.INFO)
    train = TrainConfig(
        batch_size=2, max_steps=2, num_workers=1, eval_every_steps=2, report=tool == "applio", samples=False
    )
    recipe = imported(recipe_for(folder, tmp_path / "run", train=train))
    work = workspace_of(recipe)
    assert "the weights of step 2333333 are left out" in caplog.text
    assert "training starts from G_100.pth and D_100.pth" in caplog.text
    kept = torch.load(recipe.train.pretrained_g, weights_only=True)
    assert kept.keys() == {"model", "moments"}
    assert kept["model"].keys() == states["G"].keys()
    assert all(torch.equal(kept["model"][k], v) for k, v in states["G"].items())
    wanted = {n: experiments.moments_of(w) for n, w in from_upstream(states["G"]).items() if "conv_k.bias" not in n}
    found = {f"{name}/{key}": m for name, moments in wanted.items() for key, m in moments.items()}
    assert kept["moments"].keys() - found.keys() == {f"{name}/step" for name in wanted}
    assert all(torch.equal(kept["moments"][key], m) for key, m in found.items())  # numbered in the tool's order there
    assert Path(recipe.train.pretrained_d).parent == work.root / "pretrained"

    # No encoder and no tracker is as much as looked for.

    def no_encoder(*_: object) -> None:
        raise StageError("there is no encoder here")

    monkeypatch.setattr(extract.Extractor, "load", no_encoder)  # it costs samples of other recordings alone
    before = {p: p.read_bytes() for p in work.root.rglob("*.safetensors")}
    caplog.clear()
    shutil.rmtree(folder)
    for stage in (preprocess, extract, index):
        stage.run(recipe, Shard())
        assert stage.complete(recipe)
    assert f"preprocess: the clips were imported from {folder}" in caplog.text
    assert "extract: the features were imported with the clips" in caplog.text
    assert "is up to date" in caplog.text
    assert {p: p.read_bytes() for p in work.root.rglob("*.safetensors")} == before
    assert work.index_file().name == "added_IVF4_Flat_nprobe_9_tiny_v2.index"
    assert np.load(work.vectors_file).shape == (300, 768)
    assert not given.exists()

    caplog.clear()
    trainer.run(recipe, Shard())
    assert f"train.pretrained_g: {recipe.train.pretrained_g}" in caplog.text
    assert caplog.text.count("the optimizer goes on with the moments of") == 2
    saved = checkpoint.load(checkpoint.latest(work.checkpoints_dir))
    assert {float(t) for k, t in saved.optimizers["generator"].tensors.items() if k.endswith("step")} == {102.0}
    export.run(recipe, Shard())
    voice = torch.load(work.last_voice_file, weights_only=True)
    assert (voice["step"], voice["speakers_id"]) == (2, 1 + max(s for _, s, _ in experiments.clips(tool)))
    assert voice["weight"]["emb_g.weight"].shape[0] == experiments.ROWS.get(tool, 5)
    if experiments.has_names(tool):
        assert {s["id"]: s["name"] for s in voice["speaker_info"]} == {5: "7", 109: "Zoë B."}
        assert voice["unvoiced"] == "interpolated"
    trained, start = voice["weight"]["enc_p.emb_phone.weight"].float(), states["G"]["enc_p.emb_phone.weight"]
    assert 0 < (trained - start).abs().max() < 1e-3  # two steps away from the experiment's weights
    num_speakers = len({speaker for _, speaker, _ in experiments.clips(tool)})
    table = ClipTable.load(changed(recipe, "data", holdout=0.34))
    held = {c.source: c.start_s for c in table.holdout}
    assert len(held) == len(table.holdout) == num_speakers, "of each speaker a clip"
    assert set(held.values()) == {1.4}, "the last of a recording"
    assert len({c.key for c in table.train}) == 6 - 2 * len(held), "the one beside it is on neither side"
    assert all(c.start_s == 0.0 for c in table.train if c.source in held)


@pytest.mark.parametrize("tool", ["applio", "rvc-next"])
def test_silent_clips_are_found_by_the_paths_of_another_machine(tool: str, tmp_path: Path) -> None:
    folder = experiments.make(tmp_path / "logs" / "voice", tool)
    path = experiments.add_mutes(folder, tool)
    recipe = imported(recipe_for(folder, tmp_path / "run"))
    assert recipe.extract.include_mutes == 2
    work = workspace_of(recipe)
    arrays, header = load_file(work.mute_file), read_header(work.mute_file)
    np.testing.assert_array_equal(arrays["00000.content"], np.load(path))
    assert not arrays["00000.f0"].any()
    assert (header["num_content"], header["num_f0"], header["num_samples"]) == (149, 298, 149 * RATE // 50)
    assert feature_files.complete(recipe)
    mutes = [c for c in ClipTable.load(recipe).train if c.unit == -1]
    assert sorted(c.speaker for c in mutes) == ([0, 0, 3, 3] if tool == "applio" else [5, 5, 109, 109])


def test_silent_clips_that_are_gone_or_do_not_fit_are_left_out(
    copied: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = experiments.add_mutes(copied, "applio")
    np.save(path, np.zeros((149, 256), np.float32))
    assert imported(recipe_for(copied, tmp_path / "run")).extract.include_mutes == 0
    assert "256 wide, the clips' features 768" in caplog.text
    path.unlink()
    assert imported(recipe_for(copied, tmp_path / "run2")).extract.include_mutes == 0
    assert "mute.npy is not to be found" in caplog.text


def test_without_a_pitch_folder_the_voice_has_no_pitch_guidance(tmp_path: Path) -> None:
    folder = experiments.make(tmp_path / "voice", "webui", pitch=False)
    recipe = imported(recipe_for(folder, tmp_path / "run"))
    assert not recipe.model.pitch_guidance
    assert feature_files.complete(recipe)
    f0 = [v for k, v in load_file(workspace_of(recipe).features_file(0)).items() if k.endswith("f0")]
    assert len(f0) == 6
    assert not any(v.any() for v in f0)
    # A recipe that asks for the pitch must not take these zeros for it.
    assert not feature_files.complete(changed(recipe, "model", pitch_guidance=True))


def test_clipped_pitch_is_mended_from_the_coarse_pitch_or_without_it(tmp_path: Path, copied: Path) -> None:
    (copied / "f0_voiced").rename(copied / "gone")
    recipe, hz, coarse = recipe_for(copied, tmp_path / "run"), copied / "f0_voiced", copied / "f0"
    hz.mkdir()
    for number, (name, _, _) in enumerate(experiments.clips("applio")):
        f0 = experiments.pitch_of("arvc", number, 101)
        f0["coarse"][2] = 80  # a voiced frame among unvoiced ones: smoothing took it for one
        np.save(hz / f"{name}.wav.npy", f0["hz"])
        np.save(coarse / f"{name}.wav.npy", f0["coarse"])

    def f0_of(run: str) -> dict[int, np.ndarray]:
        imported(replace(recipe, run_dir=str(tmp_path / run)))
        arrays = load_file(workspace_of(replace(recipe, run_dir=str(tmp_path / run))).features_file(0))
        return {int(k[:5]): v for k, v in arrays.items() if k.endswith("f0")}

    for i, f0 in f0_of("run").items():
        true = experiments.pitch_of("arvc", i, 101)["true"]
        assert f0[2] == pytest.approx(284.73, abs=0.01), "the middle of step 80"
        np.testing.assert_array_equal(np.delete(f0, 2), np.delete(true, 2).astype(np.float32))
    np.save(coarse / "0_0_0.wav.npy", np.zeros(101))
    np.save(coarse / "0_0_1.wav.npy", np.ones(50))
    found = imported(replace(recipe, run_dir=str(tmp_path / "damaged")))
    assert reasons(found) == {
        "0_0_0.wav": "features not imported: f0: 101 steps from 0 to 0, expected 101 from 1 to 255",
        "0_0_1.wav": "features not imported: f0: 50 steps from 1 to 1, expected 101 from 1 to 255",
    }
    shutil.rmtree(coarse)
    for i, f0 in f0_of("no coarse").items():
        np.testing.assert_array_equal(f0, experiments.pitch_of("arvc", i, 101)["true"].astype(np.float32))


@pytest.mark.parametrize(
    ("f0", "expected"),
    [
        ([[0, 0, 200, 200, 0, 0, 210, 0]], "zero"),
        ([[0, 0, 200, 200, 205, 210, 0, 0], [0] * 8], "interpolated"),  # padded with zeros; a clip without any voice
        ([[50, 50, 200, 200, 50, 50, 210, 50]], "clipped"),
        ([[200] * 8, [200] * 4 + [0] + [200] * 3], "zero"),  # most clips are voiced throughout
        ([[0] * 8], "zero"),
        ([], "zero"),
    ],
)
def test_what_unvoiced_frames_have_is_told_by_the_numbers(f0: list[list[float]], expected: str) -> None:
    counts = [UnvoicedCount.of(np.array(clip, np.float32)) for clip in f0]
    assert sum(counts, UnvoicedCount()).convention == expected


def test_features_256_wide_are_of_v1(tmp_path: Path, applio: Path) -> None:
    folder = Path(shutil.copytree(applio, tmp_path / "voice"))
    (folder / "extracted").rename(folder / "v1_extracted")
    for path in (folder / "v1_extracted").iterdir():
        np.save(path, np.load(path)[:, :256])
    recipe = imported(recipe_for(folder, tmp_path / "run"))
    assert recipe.model.version == "v1"
    assert read_header(workspace_of(recipe).features_file(0))["embedder"]["width"] == 256


@pytest.mark.parametrize(
    ("info", "chosen", "expected"),
    [
        ({"embedder_model": "spin"}, "contentvec", "spin"),
        ({"embedder_model": "hubert_base"}, "contentvec", "contentvec"),
        ({"embedder_model": "spin"}, "/my/encoder", "/my/encoder"),
        ({"embedder_model": "someone/evil"}, "contentvec", "custom"),  # nothing is fetched because a file names it
        ({"embedder_model": "spin_v1"}, "contentvec", "spin"),  # of codename-rvc-fork
        ({"embedder": "spin_v2"}, "contentvec", "spin-v2"),  # rvc-next's key
        ({}, "contentvec", "contentvec"),
    ],
)
def test_the_encoder_is_that_of_the_experiment_unless_the_user_names_one(
    copied: Path, tmp_path: Path, info: dict[str, str], chosen: str, expected: str
) -> None:
    experiments.write_json(copied / ("experiment.json" if "embedder" in info else "model_info.json"), info)
    recipe = changed(recipe_for(copied, tmp_path / "run"), "extract", embedder_model=chosen)
    assert imported(recipe).extract.embedder_model == expected


def test_speakers_without_a_filelist_come_from_the_names(tmp_path: Path, applio: Path) -> None:
    folder = Path(shutil.copytree(applio, tmp_path / "voice"))
    (folder / "filelist.txt").unlink()
    assert read_json(workspace_of(imported(recipe_for(folder, tmp_path / "run"))).clips_report_file)["speakers"] == [
        0,
        3,
    ]
    assert experiment.speaker_in("4_17_0.wav") == 4
    assert experiment.speaker_in("17_0.wav") == 0  # RVC-WebUI: recording 17
    assert experiment.recording_of("4_17_0.wav") == ("4_17", 0)
    assert experiment.recording_of("17_10.wav") == ("17", 10)
    assert experiment.recording_of("ms0001_s000_0a1b2c_3.wav") == ("ms0001_s000_0a1b2c", 3)
    assert experiment.recording_of("song.wav") == ("song.wav", 0)


@pytest.mark.parametrize(
    ("line", "speaker", "name"),
    [
        ("w.wav|c|f|h|5|7", 5, "7"),
        ("w.wav|c|5|7", 5, "7"),
        ("C:\\RVC\\w.wav|c|f|h|109|Zoë  B.", 109, "Zoë  B."),
        ("w.wav|c|f|h|3", 3, None),
        ("w.wav|c|3", 3, None),
        ("w.wav|c|f|h|energy.npy|3", 3, None),  # ARVC's with energy
        ("w.wav|c|energy.npy|3", 3, None),
        ("w.wav|c|f|h|5|", 5, None),
    ],
)
def test_a_line_ends_in_an_id_or_in_an_id_and_a_name(line: str, speaker: int, name: str | None, tmp_path: Path) -> None:
    (tmp_path / "filelist.txt").write_text(f"{line}\n{line}\n", encoding="utf-8")
    found = experiment.read_filelist(tmp_path / "filelist.txt")
    assert (found.speakers, found.repeats) == ({"w.wav": speaker}, {"w.wav": 2})
    assert found.names == ({speaker: name} if name else {})


def test_what_is_wrong_in_a_list_is_one_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    lines = ["a.wav|c|f|h|5|al", "no line", "b.wav|c|f|h|5|bo", "a.wav|c|f|h|6|cy", "c.wav|c|x", *["d.wav|c|-1"] * 9]
    (tmp_path / "filelist.txt").write_text("\n".join(lines))
    found = experiment.read_filelist(tmp_path / "filelist.txt")
    assert (found.speakers, found.names) == ({"a.wav": 5, "b.wav": 5}, {5: "al", 6: "cy"})
    (record,) = caplog.records
    assert record.getMessage().partition(": ")[2].partition(": ")[2] == (
        "line 2, 5, 6, 7, 8, ... is not `wave|features|...|speaker id[|name]`; "
        "a.wav: listed for several speakers, the first counts; speaker 5 has several names, the first counts"
    )


@pytest.mark.parametrize(
    ("names", "expected", "told"),
    [
        ({0: "bob", 3: "Bob"}, {0: "bob", 3: "speaker 3"}, "3 (Bob)"),
        ({3: "0"}, {3: "0", 0: "speaker 0"}, ""),
        ({0: "\x1b[2J", 3: "a" * 300}, {0: "speaker 0", 3: "speaker 3"}, "0 ('\\x1b[2J'), 3 (aaa"),
        ({0: "speaker 3", 3: "SPEAKER 3"}, {0: "speaker 3", 3: "speaker 3'"}, "3 (SPEAKER 3)"),
    ],
)
def test_names_that_tell_nobody_apart_are_replaced(
    names: dict[int, str], expected: dict[int, str], told: str, copied: Path, tmp_path: Path, caplog: Any
) -> None:
    info = {"speaker_info": [{"id": i, "name": name} for i, name in names.items()]}
    experiments.write_json(copied / "config.json", read_json(copied / "config.json") | info)
    recipe = imported(recipe_for(copied, tmp_path / "run"))
    assert workspace_of(recipe).speakers().names == expected
    assert told in caplog.text
    assert ("called by the id" in caplog.text) == bool(told)


def test_the_manifest_tells_speakers_and_repeats_where_the_list_is_gone(tmp_path: Path) -> None:
    folder = experiments.make(tmp_path / "logs" / "voice", "rvc-next")
    (folder / "filelist.txt").unlink()
    (folder / "config.json").unlink()
    recipe = imported(recipe_for(folder, tmp_path / "run"))
    assert workspace_of(recipe).speakers().names == experiments.NAMES
    clips = [c for p in unit_files(workspace_of(recipe).clips_dir) for c in read_header(p)["clips"]]
    assert {(c["speaker"], c.get("repeat", 1)) for c in clips} == {*experiments.REPEATS.items()}
    assert experiment.speaker_in("ms0001_s042_9f86d081_3.wav") == 42


@pytest.mark.parametrize("name", ["experiment.json", "multispeaker_manifest.json", "config.json"])
@pytest.mark.parametrize(
    "contents",
    [
        b"{",
        b"[" * 100_000,
        b"x" * (33 << 20),
        b'{"speaker_info": [{"id": -1, "name": "a"}], "speakers": [{"id": true}], "embedder": 3',
        b'{"speaker_info": [{"id": 5, "name": 3}], "speakers": [7], "entries": [{"repeat": 1e99}], "embedder": "../x"}',
    ],
)
def test_a_damaged_foreign_or_hostile_text_is_named_and_left_out(
    name: str, contents: bytes, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "0_gt_wavs").mkdir()
    (tmp_path / "0_gt_wavs" / "0_0.wav").write_bytes(b"")
    (tmp_path / name).write_bytes(contents)
    found = experiment.read_experiment(tmp_path)
    assert not found.names
    assert not found.recordings
    assert (len(caplog.records), str(tmp_path / name) in caplog.text) == ((0, False) if found.encoder else (1, True))


def test_a_name_that_is_no_utf8_is_that_of_the_filelist(copied: Path, tmp_path: Path) -> None:
    waves = copied / "sliced_audios"
    (waves / "0_0_0.wav").rename(os.fsdecode(os.fsencode(waves) + b"/\xff\xfe.wav"))
    with (copied / "filelist.txt").open("ab") as stream:
        stream.write(b"\nx/\xff\xfe.wav|features|5")
    found = imported(recipe_for(copied, tmp_path / "run"))
    headers = [read_header(path) for path in unit_files(workspace_of(found).clips_dir)]
    assert 5 in [clip["speaker"] for header in headers for clip in header["clips"]]
    assert reasons(found)["0_0_0.wav"] == "in filelist.txt, but the wave is missing"


def test_the_filelist_goes_before_the_names(copied: Path, tmp_path: Path) -> None:
    text = (copied / "filelist.txt").read_text()
    (copied / "filelist.txt").write_text("\n".join(f"{line.rpartition('|')[0]}|7" for line in text.splitlines()))
    assert read_json(workspace_of(imported(recipe_for(copied, tmp_path / "run"))).clips_report_file)["speakers"] == [7]


# What is not


def spoil(folder: Path) -> dict[str, str]:
    """One clip of each sort that cannot be taken over whole -> what is said of it."""
    content, f0, waves = folder / "extracted", folder / "f0_voiced", folder / "sliced_audios"
    (content / "0_0_0.npy").unlink()
    np.save(content / "0_0_1.npy", np.zeros((20, 768), np.float32))
    array = np.load(f0 / "0_0_2.wav.npy")
    array[3] = np.nan
    np.save(f0 / "0_0_2.wav.npy", array)
    (content / "3_1_0.npy").write_bytes(pickle.dumps({"run": "me"}))
    (waves / "3_1_1.wav").write_text("no wave")
    for name in ("9_9_9.wav", "20000_0_0.wav"):
        with (folder / "filelist.txt").open("a") as stream:
            stream.write(f"\n/x/{name}|/x/a.npy|/x/b|/x/c|{name.split('_')[0]}")
    shutil.copy(waves / "3_1_2.wav", waves / "20000_0_0.wav")
    return {
        "0_0_0.wav": "features not imported: extracted: missing",
        "0_0_1.wav": "features not imported: extracted: 0.40 s long, the clip 1.00 s",
        "0_0_2.wav": "features not imported: f0_voiced: values that are not finite",
        "3_1_0.wav": "features not imported: extracted: no .npy file of plain numbers",
        "3_1_1.wav": "not readable as audio (Format not recognised)",
        "9_9_9.wav": "in filelist.txt, but the wave is missing",
        "20000_0_0.wav": "speaker id 20000 is above 9999",
    }


def test_what_is_left_out_is_named_and_the_rest_computed(
    copied: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = spoil(copied)
    # A unit a clip: one is whole, those of the others' features are to be made.
    monkeypatch.setattr("rvc_dist.workspace.MIN_UNIT_S", 0.5)
    recipe = imported(recipe_for(copied, tmp_path / "run"))
    assert reasons(recipe) == expected
    assert all(reason in caplog.text for reason in expected.values())
    work = workspace_of(recipe)
    report = read_json(work.clips_report_file)
    assert (report["clips"], report["files_left_out"], report["files_without_features"]) == (5, 3, 4)
    assert recipe.extract.include_mutes == 2  # the encoder is needed anyway
    (whole,) = work.features_dir.glob("0*.safetensors")
    assert not feature_files.complete(recipe)
    kept = whole.read_bytes()

    caplog.set_level(logging.INFO)
    monkeypatch.setitem(F0_METHODS, "pyin", F0Spec(SteadyPitch))
    extract.run(recipe, Shard())
    assert "extract: 5 units of 0.1 min, 4 to do here" in caplog.text
    assert feature_files.complete(recipe)
    assert whole.read_bytes() == kept
    pitch = {float(v.max()) for p in work.features_dir.glob("0*") for k, v in load_file(p).items() if "f0" in k}
    assert pitch == {160.0, SteadyPitch.HZ}
    caplog.clear()
    extract.run(recipe, Shard())
    assert "extract: 5 units of 0.1 min, 0 to do here" in caplog.text


def test_imported_features_that_are_gone_or_not_those_asked_for_are_made(
    tmp_path: Path, applio: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    caplog.set_level(logging.INFO)
    monkeypatch.setitem(F0_METHODS, "pyin", F0Spec(SteadyPitch))
    recipe = imported(recipe_for(applio, tmp_path / "run"))
    file = workspace_of(recipe).features_file(0)
    file.unlink()
    extract.run(recipe, Shard())
    assert load_file(file)["00000.f0"].max() == SteadyPitch.HZ

    recipe = imported(recipe_for(applio, tmp_path / "run2"))
    extract.run(changed(recipe, "extract", f0_min=60.0), Shard())
    assert "making features again: extract.f0_min: 50.0 -> 60.0" in caplog.text
    assert read_header(workspace_of(recipe).features_file(0))["embedder"]["hash"] != ""


def test_without_features_extract_makes_them_all(copied: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("extracted", "f0", "f0_voiced"):
        shutil.rmtree(copied / name)
    recipe = imported(recipe_for(copied, tmp_path / "run"))
    assert recipe.model.pitch_guidance
    assert read_json(workspace_of(recipe).clips_report_file)["files_without_features"] == 6
    preprocess.run(recipe, Shard())
    assert not feature_files.complete(recipe)
    monkeypatch.setitem(F0_METHODS, "pyin", F0Spec(SteadyPitch))
    extract.run(recipe, Shard())
    assert feature_files.complete(recipe)


def test_weights_and_an_index_that_do_not_fit_are_left_out(
    copied: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    narrow = changed(narrow_recipe(tmp_path), "data", sample_rate=RATE)
    experiments.add_weights(copied, 5, changed(narrow, "model", filter_channels=64))
    (copied / "G_6.pth").write_bytes(b"")
    path = experiments.add_index(copied, "applio")
    (copied / "extracted" / "0_0_0.npy").rename(tmp_path / "gone.npy")
    recipe = recipe_for(copied, tmp_path / "run")
    (copied / "sliced_audios" / "0_0_0.wav").rename(tmp_path / "gone.wav")
    found = imported(recipe)
    assert found.train.pretrained_g is None
    assert "G_6.pth is left out: D_6.pth is missing" in caplog.text
    assert "the weights of step 5 are left out: train.pretrained_g" in caplog.text
    assert "does not fit this recipe's network" in caplog.text
    assert f"{path.name} is of no use: it has 300 vectors, the features 250 frames" in caplog.text
    assert not workspace_of(recipe).index_dir.exists()
    index.run(found, Shard())
    assert index_file.complete(found)

    flat = faiss.IndexFlatL2(768)
    flat.add(np.zeros((250, 768), np.float32))
    wide = faiss.IndexFlatL2(256)
    others = {b"no index": "it is cut short"}
    others |= {faiss.serialize_index(flat).tobytes(): "it has no cells"}
    others |= {faiss.serialize_index(wide).tobytes(): "it holds features 256 wide, expected 768"}
    for number, (contents, reason) in enumerate(others.items()):
        caplog.clear()
        path.write_bytes(contents)
        imported(replace(recipe, run_dir=str(tmp_path / f"other{number}")))
        assert f"{path.name} is of no use: {reason}" in caplog.text


def test_weights_that_the_user_names_go_before(copied: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    narrow = changed(narrow_recipe(tmp_path), "data", sample_rate=RATE)
    experiments.add_weights(copied, 5, narrow)
    recipe = changed(recipe_for(copied, tmp_path / "run"), "train", pretrained_g="mine_g.pth")
    caplog.set_level(logging.INFO)
    assert imported(recipe).train.pretrained_g == "mine_g.pth"
    assert "training starts from the recipe's weights" in caplog.text
    assert not (tmp_path / "run" / "pretrained").exists()


# Mistakes


def test_a_folder_that_is_no_experiment(tmp_path: Path, copied: Path) -> None:
    def error(folder: Path) -> str:
        with pytest.raises(StageError) as caught:
            import_experiment.run(recipe_for(folder, tmp_path / "run"), Shard())
        return str(caught.value)

    assert (
        error(tmp_path / "none")
        == f"{tmp_path / 'none'} does not exist; expected the folder of an experiment, such as logs/NAME"
    )
    assert "is a file" in error(copied / "config.json")
    assert "expected .wav files in sliced_audios/ (Applio, ARVC) or 0_gt_wavs/ (RVC-WebUI, rvc-next)" in error(
        copied / "f0"
    )
    assert "found 0_0_0.wav.npy, " in error(copied / "f0")
    (copied.parent / "mute" / "sliced_audios").mkdir(parents=True)
    assert f"{copied.parent} is no experiment but holds some: name one of them (voice)" in error(copied.parent)
    (tmp_path / "empty").mkdir()
    assert "found an empty folder" in error(tmp_path / "empty")
    shutil.copytree(copied / "sliced_audios", copied / "0_gt_wavs")
    assert "has waves in sliced_audios/ and 0_gt_wavs/" in error(copied)
    assert not (tmp_path / "run").exists()


def test_one_sample_rate_is_expected(tmp_path: Path, copied: Path) -> None:
    def error() -> str:
        with pytest.raises(StageError) as caught:
            import_experiment.run(recipe_for(copied, tmp_path / "run"), Shard())
        return str(caught.value)

    waves = sorted((copied / "sliced_audios").glob("*.wav"))
    soundfile.write(waves[0], np.zeros(32000), 32000)
    assert "several sample rates, expected one (24000 Hz: 5 clips (0_0_1.wav, " in error()
    assert "32000 Hz: 1 clips (0_0_0.wav))" in error()
    for wave in waves:
        soundfile.write(wave, np.zeros(32000), 32000)
    assert error() == f"{copied / 'config.json'} says {RATE} Hz, the waves have 32000 Hz"
    (copied / "config.json").unlink()
    for wave in waves:
        soundfile.write(wave, np.zeros(22050), 22050)
    assert "has waves of 22050 Hz, expected one of 24000, 32000, 40000, 44100, 48000" in error()
    for wave in waves:
        wave.write_bytes(b"")
    assert "none of 6 clips can be used\n  0_0_0.wav: " in error()
    assert not (tmp_path / "run").exists()


def test_a_config_with_impossible_widths(tmp_path: Path, copied: Path, caplog: pytest.LogCaptureFixture) -> None:
    experiments.write_json(copied / "config.json", {"model": {"n_heads": "two"}})
    with pytest.raises(StageError, match=r"config\.json describes no network of ours: model\.num_heads: got 'two'"):
        import_experiment.run(recipe_for(copied, tmp_path / "run"), Shard())
    experiments.write_json(copied / "config.json", {"model": {"n_heads": 5}})
    with pytest.raises(StageError, match=r"model\.num_heads: got 5"):
        import_experiment.run(recipe_for(copied, tmp_path / "run"), Shard())
    (copied / "config.json").write_text("{")
    (copied / "model_info.json").write_text("[1]")
    imported(recipe_for(copied, tmp_path / "run"))
    assert f"{copied / 'config.json'} is not what its name says" in caplog.text
    assert f"{copied / 'model_info.json'} is not what its name says" in caplog.text


def test_a_run_folder_that_holds_something_else_is_not_overwritten(tmp_path: Path, applio: Path, copied: Path) -> None:
    recipe = recipe_for(applio, tmp_path / "run")
    imported(recipe)
    before = {p: p.read_bytes() for p in (tmp_path / "run").rglob("*") if p.is_file()}
    with pytest.raises(StageError, match=rf"already holds an import of {applio} \(plan.json\); give another --run_dir"):
        import_experiment.run(recipe_for(copied, tmp_path / "run"), Shard())
    assert {p: p.read_bytes() for p in (tmp_path / "run").rglob("*") if p.is_file()} == before
    own = tmp_path / "own"
    (own / "checkpoints").mkdir(parents=True)
    with pytest.raises(StageError, match=r"already holds a run \(checkpoints\)"):
        import_experiment.run(recipe_for(copied, own), Shard())
    (tmp_path / "file").write_text("")
    with pytest.raises(StageError, match="is a file; expected a folder"):
        import_experiment.run(recipe_for(copied, tmp_path / "file"), Shard())


def test_preprocess_never_replaces_imported_clips(tmp_path: Path, applio: Path) -> None:
    recipe = imported(recipe_for(applio, tmp_path / "run"))
    work = workspace_of(recipe)
    before = {p: p.read_bytes() for p in work.clips_dir.iterdir()}
    for section, values in ("data", {"audio_dir": str(experiments.VOICE)}), ("data", {"sample_rate": 48000}):
        key, value = next(iter(values.items()))
        with pytest.raises(StageError, match=rf"other recordings do not replace.*data.{key}: .* -> {value}"):
            preprocess.run(changed(recipe, section, **values), Shard())
    assert {p: p.read_bytes() for p in work.clips_dir.iterdir()} == before
    work.clips_report_file.unlink()
    with pytest.raises(StageError, match=f"half an import: run `rvc-dist import {applio}` again"):
        preprocess.run(recipe, Shard())


# Again, and on several ranks


def test_a_second_import_has_nothing_to_do(tmp_path: Path, applio: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    recipe = recipe_for(applio, tmp_path / "run")
    imported(recipe)
    before = {p: p.stat().st_mtime_ns for p in (tmp_path / "run").rglob("*") if p.is_file()}
    imported(recipe)
    assert f"{applio} was imported before, nothing to do" in caplog.text
    assert {p: p.stat().st_mtime_ns for p in (tmp_path / "run").rglob("*") if p.is_file()} == before


def test_a_copied_experiment_is_known_by_its_content_and_changed_arrays_of_the_same_time_are_not(
    tmp_path: Path, copied: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    recipe = recipe_for(copied, tmp_path / "run")
    work = workspace_of(recipe)
    imported(recipe)
    before = {p: p.stat().st_mtime_ns for p in work.root.rglob("*.safetensors")}
    for path in copied.rglob("*.*"):
        os.utime(path, ns=(1, 1))
    imported(recipe)
    assert "was imported before, nothing to do" in caplog.text
    assert {p: p.stat().st_mtime_ns for p in before} == before
    changed_file = copied / "extracted" / "0_0_0.npy"
    array = np.load(changed_file)
    np.save(changed_file, array + 1)
    os.utime(changed_file, ns=(1, 1))
    imported(recipe)
    arrays = {k: v for p in unit_files(work.features_dir) for k, v in load_file(p).items()}
    assert any(a.shape == array.shape and np.array_equal(a, array + 1) for a in arrays.values())
    saved = make_checkpoint(recipe, make_generator(recipe))
    checkpoint.save(work.checkpoints_dir, replace(saved, data={"recordings": {"another": "a.wav"}}))
    np.save(changed_file, array)
    before = {p: p.stat().st_mtime_ns for p in work.root.rglob("*") if p.is_file()}
    with pytest.raises(StageError, match="was trained on other recordings"):
        import_experiment.run(recipe, Shard())
    assert {p: p.stat().st_mtime_ns for p in before} == before


def test_a_killed_import_goes_on_to_the_same_bytes(
    tmp_path: Path, copied: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("rvc_dist.workspace.MIN_UNIT_S", 0.5)
    imported(recipe_for(copied, tmp_path / "whole"))
    whole = {p.name: p.read_bytes() for p in (tmp_path / "whole").rglob("*") if p.is_file() and p.suffix != ".yaml"}
    recipe = changed(recipe_for(copied, tmp_path / "run"), "preprocess", num_workers=1)
    num_saved = 0
    save = import_experiment.save_arrays

    def killed(*arguments: Any) -> None:
        nonlocal num_saved
        num_saved += 1
        if num_saved >= 6:
            raise KeyboardInterrupt
        save(*arguments)

    monkeypatch.setattr(import_experiment, "save_arrays", killed)
    with pytest.raises(KeyboardInterrupt):
        import_experiment.run(recipe, Shard())
    assert not import_experiment.complete(recipe)
    done = sorted((tmp_path / "run" / "clips").glob("0*"))
    assert len(done) == 2
    times = [p.stat().st_mtime_ns for p in done]
    monkeypatch.setattr(import_experiment, "save_arrays", save)
    import_experiment.run(recipe, Shard())
    assert [p.stat().st_mtime_ns for p in done] == times
    found = {p.name: p.read_bytes() for p in (tmp_path / "run").rglob("*") if p.is_file() and p.suffix != ".yaml"}
    assert found == whole


def test_a_changed_experiment_is_imported_anew(tmp_path: Path, copied: Path) -> None:
    (copied / "extracted" / "0_0_0.npy").rename(tmp_path / "0_0_0.npy")
    recipe = recipe_for(copied, tmp_path / "run")
    assert not feature_files.complete(imported(recipe))
    (tmp_path / "0_0_0.npy").rename(copied / "extracted" / "0_0_0.npy")
    (copied / "sliced_audios" / "3_1_2.wav").unlink()
    found = imported(recipe)
    assert reasons(found) == {"3_1_2.wav": "in filelist.txt, but the wave is missing"}
    assert feature_files.complete(found)


def test_new_names_repeats_and_an_older_versions_import_are_imported_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = experiments.make(tmp_path / "logs" / "voice", "rvc-next")
    recipe, filelist = recipe_for(folder, tmp_path / "run"), folder / "filelist.txt"
    work = workspace_of(recipe)
    with monkeypatch.context() as older:
        older.setattr(experiment, "_convention", lambda *_: "zero")
        assert imported(recipe).extract.unvoiced == "zero"
    assert imported(recipe).extract.unvoiced == "interpolated"
    lines = filelist.read_text(encoding="utf-8").replace("|7", "|Ann").splitlines()
    filelist.write_text("\n".join([*lines, lines[0]]), encoding="utf-8")
    imported(recipe)
    assert work.speakers().names == {5: "Ann", 109: "Zoë B."}
    clips = [c for p in unit_files(work.clips_dir) for c in read_header(p)["clips"]]
    assert sorted(c.get("repeat", 1) for c in clips if c["speaker"] == 5) == [2, 2, 3]


def test_other_ranks_wait_for_the_first(tmp_path: Path, applio: Path) -> None:
    recipe = recipe_for(applio, tmp_path / "run")
    other = threading.Thread(target=import_experiment.run, args=(recipe, Shard(1, 2)), daemon=True)
    other.start()
    other.join(0.5)
    assert other.is_alive()
    assert not (tmp_path / "run").exists()
    import_experiment.run(recipe, Shard(0, 2))
    other.join(10)
    assert not other.is_alive()


# The command line


def test_the_command(
    tmp_path: Path, applio: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert cli.main(["import", "--extract.embedder_model", "mfcc", str(applio)]) == 0
    recipe = load_recipe(tmp_path / "runs" / "voice" / "config.yaml")
    assert (recipe.name, recipe.run_dir) == ("voice", "runs/voice")
    assert cli.main(["import", str(applio), "--name", "other", "--run_dir=mine"]) == 0
    assert load_recipe(tmp_path / "mine" / "config.yaml").name == "other"
    capsys.readouterr()
    assert cli.main(["import", str(tmp_path / "none")]) == 1
    assert "none does not exist" in capsys.readouterr().err
    for arguments, got in ([], "nothing"), (["a", "b"], "a and b"), (["--name", "a"], "nothing"):
        assert cli.main(["import", *arguments]) == 2
        assert f"rvc-dist import: got {got}, expected one: rvc-dist import DIR" in capsys.readouterr().err
    with pytest.raises(SystemExit) as caught:
        cli.main(["import", "--help"])
    assert caught.value.code == 0
    assert "usage: rvc-dist import " in capsys.readouterr().out


def test_keys_that_the_experiment_overrules_are_told(
    tmp_path: Path, applio: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.yaml").write_text("extract: {unvoiced: interpolated}\nmodel: {gin_channels: 8}\n")
    given = ["--config", "mine.yaml", "--data.sample_rate", "48000", "--data.audio_dir=elsewhere", "--name", "a"]
    given += ["--extract.include_mutes", "2", "--model.version", "v2", "--extract.embedder_model", "contentvec"]
    told = (
        f"the experiment decides otherwise than the recipe: data.audio_dir: elsewhere -> {applio}, "
        "data.sample_rate: 48000 -> 24000, extract.unvoiced: interpolated -> zero, extract.include_mutes: 2 -> 0"
    )
    for _ in range(2):  # the second time there is nothing to do
        assert cli.main(["import", str(applio), *given]) == 0
        assert told in caplog.text
        assert "the encoder is contentvec, as the recipe says; the experiment names mfcc" in caplog.text
        caplog.clear()
    assert cli.main(["import", str(applio), "--run_dir", "b"]) == 0
    assert "decides otherwise" not in caplog.text


def test_reports_are_plain_json(tmp_path: Path, applio: Path) -> None:
    recipe = imported(recipe_for(applio, tmp_path / "run"))
    report = json.loads((tmp_path / "run" / "clips" / "report.json").read_text())
    assert report["imported"] == str(applio)
    assert recipe.data.audio_dir == str(applio)


@pytest.mark.parametrize(
    ("listed", "expected"),
    [
        ("a|b|0\n" * 300_002, "more than 300000 lines"),
        ("x" * (1 << 25) + "|b|0", "bytes, expected at most"),
    ],
)
def test_a_list_has_bounds(listed: str, expected: str, tmp_path: Path) -> None:
    (tmp_path / "filelist.txt").write_text(listed)
    with pytest.raises(StageError, match=expected):
        experiment.read_filelist(tmp_path / "filelist.txt")


def test_a_fifo_among_the_waves_is_named_and_not_waited_for(tmp_path: Path, copied: Path) -> None:
    os.mkfifo(copied / "sliced_audios" / "0_7_7.wav")
    (copied / "sliced_audios" / "0_7_8.wav").symlink_to("nowhere")
    recipe = recipe_for(copied, tmp_path / "run")
    imported(recipe)
    assert reasons(recipe)["0_7_7.wav"] == "it is a FIFO, socket or device, expected a file"
    assert "cannot be read" in reasons(recipe)["0_7_8.wav"]


@pytest.mark.parametrize("written", ["/etc/passwd", "/home/me/secret.npy", "logs/mute/../../x/mute.npy", "mute.npy\0"])
def test_a_list_names_no_file_but_a_silent_clips(written: str, tmp_path: Path, applio: Path) -> None:
    assert experiment._find_mute(experiment.read_experiment(applio), written) is None
