"""The extract stage: whole or not at all, the same bytes from any number of ranks, and stale features made again."""

from __future__ import annotations

import dataclasses
import logging
import sys
import weakref
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import torch
from helpers import (
    RATE,
    SteadyPitch,
    changed,
    make_ssl_folder,
    make_whisper_folder,
    narrow_recipe,
    noise,
    tone,
    workspace_of,
    write_djcm,
)
from safetensors.numpy import load_file
from torch import Tensor

from rvc_dist import workspace
from rvc_dist.choices import F0_METHODS, F0Spec
from rvc_dist.config import EmbedderMix, PreprocessConfig, Recipe
from rvc_dist.data import preprocess
from rvc_dist.features import djcm, extract, feature_files, index
from rvc_dist.features.content import Embedder, Mfcc
from rvc_dist.features.extractor import Extractor
from rvc_dist.workspace import Shard, StageError, WorkList, read_header, read_json, unit_files

ALONE = Shard(0, 1)


@pytest.fixture(autouse=True)
def any_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """One that emulates half precision does for the tests."""
    monkeypatch.setattr("rvc_dist.features.precision._cpu_has_bf16", lambda: True)


@pytest.fixture
def quick_pitch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(F0_METHODS, "pyin", F0Spec(SteadyPitch))


@pytest.fixture
def recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Recipe:
    """Six recordings cut into clips of three lengths, in three units."""
    monkeypatch.setattr(workspace, "MIN_UNIT_S", 2.0)
    (tmp_path / "audio").mkdir()
    for i in range(6):
        wave = np.concatenate([tone(0.8 + 0.1 * (i % 3), f0_hz=100.0 + 20 * i), noise(0.2, seed=i)])
        soundfile.write(tmp_path / "audio" / f"{i}.wav", wave, RATE)
    recipe = narrow_recipe(tmp_path, preprocess=PreprocessConfig(chunk_len=1.0, overlap_len=0.2))
    preprocess.run(recipe, ALONE)
    assert len(list(unit_files(workspace_of(recipe).clips_dir))) == 3
    return recipe


def folder(recipe: Recipe) -> Path:
    return workspace_of(recipe).features_dir


def contents(recipe: Recipe) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in folder(recipe).iterdir()}


def mtimes(recipe: Recipe) -> dict[str, int]:
    return {p.name: p.stat().st_mtime_ns for p in folder(recipe).glob("*.safetensors")}


def elsewhere(recipe: Recipe, tmp_path: Path, name: str) -> Recipe:
    """The same clips in another run folder."""
    other = dataclasses.replace(recipe, run_dir=str(tmp_path / name))
    workspace_of(other).root.mkdir()
    workspace_of(other).clips_dir.symlink_to(workspace_of(recipe).clips_dir)
    return other


# What is written


@pytest.mark.usefixtures("quick_pitch")
def test_each_clip_has_content_and_pitch_and_their_sizes(recipe: Recipe) -> None:
    extract.run(recipe, ALONE)
    work = workspace_of(recipe)
    assert sorted(contents(recipe)) == [f"{i:05d}.safetensors" for i in range(3)] + ["mute.safetensors", "report.json"]
    total = 0
    for unit in range(3):
        clips_header, header = read_header(work.clips_file(unit)), read_header(work.features_file(unit))
        assert clips_header is not None
        assert header is not None
        waves, arrays = load_file(work.clips_file(unit)), load_file(work.features_file(unit))
        assert len(arrays) == 2 * len(waves)
        assert header["sample_rate"] == RATE
        assert (header["embedder"]["name"], header["embedder"]["width"]) == ("mfcc", 768)
        for i, clip in enumerate(header["clips"]):
            wave, content, f0 = waves[f"{i:05d}"], arrays[f"{i:05d}.content"], arrays[f"{i:05d}.f0"]
            assert clip.items() > clips_header["clips"][i].items()
            assert (clip["num_samples"], clip["num_content"], clip["num_f0"]) == (len(wave), len(content), len(f0))
            num_16k = round(len(wave) * 16000 / RATE)
            assert content.shape == (num_16k // 320, 768)
            assert f0.shape == (num_16k // 160,)
            assert content.dtype == f0.dtype == np.float32
            assert np.isfinite(content).all()
            assert set(f0.tolist()) <= {0.0, SteadyPitch.HZ}
            total += len(content)
    assert read_json(work.features_report_file)["content_frames"] == total
    assert feature_files.complete(recipe) is True


@pytest.mark.usefixtures("quick_pitch")
def test_the_silent_clip(recipe: Recipe) -> None:
    extract.run(recipe, ALONE)
    work = workspace_of(recipe)
    header, arrays = read_header(work.mute_file), load_file(work.mute_file)
    assert header is not None
    assert (header["num_samples"], header["num_content"], header["num_f0"]) == (RATE, 50, 100)
    assert arrays["00000.content"].shape == (50, 768)
    assert not arrays["00000.f0"].any()
    assert arrays["00000.f0"].shape == (100,)


@pytest.mark.usefixtures("quick_pitch")
def test_no_silent_clip_unless_it_is_asked_for(recipe: Recipe) -> None:
    without = changed(recipe, "extract", include_mutes=0)
    extract.run(without, ALONE)
    assert not workspace_of(recipe).mute_file.exists()
    assert feature_files.complete(without) is True
    # A rank that waits may not go on before the first has made it.
    assert feature_files.complete(recipe) is None
    before = mtimes(recipe)
    extract.run(recipe, ALONE)
    assert feature_files.complete(recipe) is True
    assert {k: v for k, v in mtimes(recipe).items() if k != "mute.safetensors"} == before


@pytest.mark.usefixtures("quick_pitch")
def test_the_index_takes_them_in_the_order_of_the_units(recipe: Recipe) -> None:
    extract.run(recipe, ALONE)
    index.run(recipe, ALONE)
    vectors = np.load(workspace_of(recipe).vectors_file)
    first = load_file(workspace_of(recipe).features_file(0))["00000.content"]
    last_unit = load_file(workspace_of(recipe).features_file(2))
    last = last_unit[max(k for k in last_unit if k.endswith("content"))]
    assert len(vectors) == read_json(workspace_of(recipe).features_report_file)["content_frames"]
    assert np.array_equal(vectors[: len(first)], first)
    assert np.array_equal(vectors[-len(last) :], last)


# Any number of ranks, any interruption


@pytest.mark.parametrize(
    ("f0_method", "precision"),
    [
        ("pyin", "fp32"),
        *(pytest.param(*case, marks=pytest.mark.slow) for case in [("crepe-tiny", "fp32"), ("djcm", "fp32")]),
        ("crepe-tiny", "bf16"),
    ],
)
def test_the_bytes_do_not_depend_on_the_ranks(
    f0_method: str, precision: str, recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_whisper_folder(tmp_path / "enc", whole=False)
    encoder = "mfcc" if precision == "fp32" else str(tmp_path / "enc")
    recipe = changed(recipe, "extract", f0_method=f0_method, embedder_model=encoder, precision=precision)
    if f0_method == "pyin":  # a quarter of the candidates
        recipe = changed(recipe, "extract", f0_max=250.0)
    if f0_method == "djcm":
        monkeypatch.setattr(djcm, "WIDTHS", (4, 4, 4, 4, 4, 4))
        monkeypatch.setattr(djcm, "SEGMENT", 64)
        weights = write_djcm(tmp_path / "djcm.pt", 2048, True, peak=99)  # 99.5 Hz
        recipe = changed(recipe, "extract", f0_djcm_model=str(weights), unvoiced="interpolated")
    extract.run(recipe, ALONE)
    halves = elsewhere(recipe, tmp_path, "halves")
    torch.set_num_threads(2)  # what a launcher chooses has no effect
    try:
        extract.run(halves, Shard(1, 2))
        assert not workspace_of(halves).features_report_file.exists()
        assert feature_files.complete(halves) is None
        extract.run(halves, Shard(0, 2))
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(1)
    assert contents(halves) == contents(recipe)
    voiced = load_file(workspace_of(recipe).features_file(0))["00000.f0"]
    voiced = voiced[voiced > 0]
    assert abs(np.median(voiced) - 100.0) < 3.0


def test_the_threads_are_the_recipes_and_not_the_launchers(recipe: Recipe, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []

    class Watching(SteadyPitch):
        def track(self, wave: torch.Tensor) -> torch.Tensor:
            seen.append(torch.get_num_threads())
            return super().track(wave)

    monkeypatch.setitem(F0_METHODS, "pyin", F0Spec(Watching))
    extract.run(changed(recipe, "extract", num_threads=2), ALONE)
    assert set(seen) == {2}
    assert torch.get_num_threads() == 1


@pytest.mark.usefixtures("quick_pitch")
def test_array_tasks_need_no_first_rank(recipe: Recipe, tmp_path: Path) -> None:
    extract.run(recipe, ALONE)
    tasks = elsewhere(recipe, tmp_path, "tasks")
    for i in (3, 1, 2, 0):  # the last has no unit left
        extract.run(tasks, Shard(i, 4, array=True))
    assert contents(tasks) == contents(recipe)


@pytest.mark.usefixtures("quick_pitch")
def test_the_last_rank_waits_with_the_report_for_the_silent_clip(recipe: Recipe) -> None:
    extract.run(recipe, ALONE)
    workspace_of(recipe).mute_file.unlink()
    workspace_of(recipe).features_report_file.unlink()
    extract.run(recipe, Shard(1, 2))
    assert not workspace_of(recipe).features_report_file.exists()
    extract.run(recipe, Shard(0, 2))
    assert feature_files.complete(recipe) is True


@pytest.mark.usefixtures("quick_pitch")
def test_only_what_is_missing_or_damaged_is_made_again(recipe: Recipe) -> None:
    extract.run(recipe, ALONE)
    whole, before = contents(recipe), mtimes(recipe)
    extract.run(recipe, ALONE)
    assert mtimes(recipe) == before
    work = workspace_of(recipe)
    work.features_file(0).unlink()
    work.features_file(2).write_bytes(b"damaged")
    extract.run(recipe, ALONE)
    assert contents(recipe) == whole
    assert mtimes(recipe)["00001.safetensors"] == before["00001.safetensors"]


@pytest.mark.usefixtures("quick_pitch")
@pytest.mark.parametrize(
    ("section", "values", "why"),
    [
        ("extract", {"f0_method": "fcpe"}, "extract.f0_method: pyin -> fcpe"),
        ("extract", {"f0_max": 800.0}, "extract.f0_max: 1100.0 -> 800.0"),
        ("extract", {"precision": "bf16"}, "extract.precision: fp32 -> bf16"),
        ("extract", {"unvoiced": "interpolated"}, "extract.unvoiced: zero -> interpolated"),
        ("model", {"version": "v1"}, "model.version: v2 -> v1"),
    ],
)
def test_a_changed_setting_makes_all_again(
    section: str,
    values: dict[str, Any],
    why: str,
    recipe: Recipe,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setitem(F0_METHODS, "fcpe", F0Spec(SteadyPitch))
    extract.run(recipe, ALONE)
    before = mtimes(recipe)
    other = changed(recipe, section, **values)
    assert feature_files.complete(other) is None
    with caplog.at_level(logging.INFO, logger="rvc_dist"):
        extract.run(other, ALONE)
    assert why in caplog.text
    assert all(mtimes(recipe)[name] != at for name, at in before.items())
    assert feature_files.complete(other) is True
    assert feature_files.complete(recipe) is None


@pytest.mark.usefixtures("quick_pitch")
@pytest.mark.parametrize(
    ("key", "default", "value"), [("precision", "fp32", "bf16"), ("unvoiced", "zero", "interpolated")]
)
def test_features_of_before_there_was_a_setting_are_good(key: str, default: str, value: str, recipe: Recipe) -> None:
    """The default's fingerprint is what it was; features of another value are not taken for those of the default."""
    extract.run(recipe, ALONE)
    report = read_json(workspace_of(recipe).features_report_file)
    assert f"extract.{key}" not in report["settings"]
    other = changed(recipe, "extract", **{key: value})
    extract.run(other, ALONE)
    work_list = WorkList.load(workspace_of(recipe).work_list_file)
    feature_files.check_made(other, workspace_of(recipe), work_list)
    with pytest.raises(StageError, match=rf"set back what differs \(extract\.{key}: {value} -> {default}\)"):
        feature_files.check_made(recipe, workspace_of(recipe), work_list)


def test_the_pitch_of_unvoiced_frames(recipe: Recipe, monkeypatch: pytest.MonkeyPatch) -> None:
    """Drawn on clip by clip over what the tracker leaves unvoiced; a clip without any pitch, and silence, stay 0."""

    class Gaps(SteadyPitch):
        def track(self, wave: Tensor) -> Tensor:
            frames = torch.arange(wave.shape[0] // 160)
            f0 = torch.where(frames % 30 < 20, 100.0 + frames, torch.nan)
            return f0 if wave.shape[0] < 17000 else torch.zeros_like(f0)

    monkeypatch.setitem(F0_METHODS, "pyin", F0Spec(Gaps))
    made = {}
    for unvoiced in "zero", "interpolated":
        extract.run(changed(recipe, "extract", unvoiced=unvoiced), ALONE)
        made[unvoiced] = [load_file(p) for p in sorted(folder(recipe).glob("*.safetensors"))]
    sorts = set()
    for zero, drawn in zip(*made.values(), strict=True):
        for key, array in zero.items():
            voiced = array.nonzero()
            assert np.array_equal(drawn[key][voiced], array[voiced])
            if key.endswith("f0"):
                sorts.add((bool(array.all()), bool(array.any())))
                assert drawn[key].all() == array.any()
                assert drawn[key].dtype == np.float32
    assert sorts == {(False, True), (False, False)}
    drawn_f0 = made["interpolated"][0]["00000.f0"]
    assert drawn_f0[19:31].tolist() == [*range(119, 131)]
    assert drawn_f0[-1] == drawn_f0.max()


@pytest.mark.usefixtures("quick_pitch")
def test_old_and_new_features_together_are_never_a_whole(recipe: Recipe) -> None:
    """Stopped while all is made again: the report of the old ones must not vouch for the mixture."""
    extract.run(recipe, ALONE)
    extract.run(changed(recipe, "extract", f0_max=800.0), Shard(1, 2))
    with pytest.raises(StageError, match=r"has no features: run `rvc-dist extract` first"):
        index.run(recipe, ALONE)


@pytest.mark.usefixtures("quick_pitch")
def test_changed_clips_make_their_features_again(recipe: Recipe, tmp_path: Path) -> None:
    extract.run(recipe, ALONE)
    soundfile.write(tmp_path / "audio" / "5.wav", tone(1.1, f0_hz=90.0), RATE)
    before = mtimes(recipe)
    preprocess.run(recipe, ALONE)
    assert feature_files.complete(recipe) is None
    extract.run(recipe, ALONE)
    assert feature_files.complete(recipe) is True
    redone = [name for name, at in mtimes(recipe).items() if before.get(name) != at]
    assert redone == ["00002.safetensors"]


@pytest.mark.usefixtures("quick_pitch")
def test_units_of_a_longer_plan_are_removed(recipe: Recipe, tmp_path: Path) -> None:
    extract.run(recipe, ALONE)
    for i in range(2, 6):
        (tmp_path / "audio" / f"{i}.wav").unlink()
    preprocess.run(recipe, ALONE)
    extract.run(recipe, ALONE)
    assert [p.name for p in unit_files(folder(recipe))] == ["00000.safetensors"]


# Batches


def test_clips_in_a_batch_agree_with_clips_alone(recipe: Recipe) -> None:
    waves = [tone(0.5, 16000, 110.0), tone(0.7, 16000), noise(0.5, 16000), tone(0.5, 16000, 300.0)]
    batched = {i: (content, f0) for i, content, f0 in Extractor.load(recipe)(waves)}
    assert sorted(batched) == [0, 1, 2, 3]
    alone = Extractor.load(changed(recipe, "extract", batch_clips=1))
    for i, content, f0 in alone(waves):
        np.testing.assert_allclose(batched[i][0], content, atol=1e-5)
        assert np.array_equal(batched[i][1], f0)
    assert not np.allclose(batched[0][0], batched[3][0], atol=1e-2)


@pytest.mark.parametrize(
    ("hz", "told"), [(40.0, "lower extract.f0_min"), (220.0, ""), (1500.0, "raise extract.f0_max")]
)
def test_a_voice_beyond_the_range_is_reported(
    hz: float, told: str, recipe: Recipe, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setitem(F0_METHODS, "pyin", F0Spec(type("Steady", (SteadyPitch,), {"HZ": hz})))
    extract.run(recipe, Shard())
    warnings = [r.getMessage() for r in caplog.records if "frames with a pitch" in r.getMessage()]
    assert len(warnings) == bool(told)
    assert all("100% of the frames" in w and f"{told} if" in w for w in warnings)


@pytest.mark.usefixtures("quick_pitch")
def test_only_clips_of_one_length_share_a_batch_and_never_too_many(recipe: Recipe) -> None:
    extractor = Extractor.load(changed(recipe, "extract", batch_clips=2))
    shapes = []
    embedder = extractor.embedder

    def spy(wave: torch.Tensor) -> torch.Tensor:
        shapes.append(tuple(wave.shape))
        return embedder(wave)

    spy.device = embedder.device  # type: ignore[attr-defined]
    watched = extractor._replace(embedder=spy)  # type: ignore[arg-type]
    waves = [noise(0.1 * n, 16000) for n in (3, 4, 3, 3, 4, 3, 3)]
    assert sorted(i for i, _, _ in watched(waves)) == list(range(7))
    assert sorted(shapes) == [(1, 4800), (2, 4800), (2, 4800), (2, 6400)]


# The device


def test_nothing_waits_for_the_content_before_the_pitch_is_on_its_way(
    recipe: Recipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    events: list[str] = []
    copy = torch.Tensor.cpu

    class Watching(SteadyPitch):
        def track(self, wave: torch.Tensor) -> torch.Tensor:
            events.append("pitch")
            return super().track(wave)

    monkeypatch.setitem(F0_METHODS, "pyin", F0Spec(Watching))
    monkeypatch.setattr(Mfcc, "encode", lambda self, wave: events.append("content") or wave[:, None])
    monkeypatch.setattr(torch.Tensor, "cpu", lambda self: events.append("copy") or copy(self))
    list(Extractor.load(recipe)([tone(0.5, 16000), tone(0.5, 16000)]))
    assert events == ["content", "pitch", "pitch", "copy", "copy"]


@pytest.mark.usefixtures("quick_pitch")
def test_numbers_too_large_for_half_precision_are_told(recipe: Recipe, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Mfcc, "encode", lambda _self, wave: (wave[:, None] + 1.0).half() * 1e5)
    with pytest.raises(
        StageError, match=r"mfcc gives numbers that are not finite; .*extract\.precision fp16: then set bf16"
    ):
        extract.run(recipe, ALONE)


@pytest.mark.usefixtures("quick_pitch")
def test_the_index_finds_the_memory_of_the_networks_free(recipe: Recipe, monkeypatch: pytest.MonkeyPatch) -> None:
    alive: list[weakref.ref[Embedder]] = []
    freed: list[bool] = []
    load = Extractor.load

    def remembered(*args: Any) -> Extractor:
        extractor = load(*args)
        alive.append(weakref.ref(extractor.embedder))
        return extractor

    monkeypatch.setattr(Extractor, "load", remembered)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: freed.append(alive[0]() is None))
    extract.run(recipe, ALONE)
    assert freed == [True]


# What is wrong


@pytest.mark.usefixtures("quick_pitch")
def test_a_mix_of_layers_is_part_of_what_features_are(
    recipe: Recipe, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    make_ssl_folder(tmp_path / "enc", "Hubert", num_layers=2)
    plain = changed(recipe, "extract", embedder_model=str(tmp_path / "enc"))
    extract.run(plain, ALONE)
    header = read_header(workspace_of(recipe).features_file(0))
    assert header is not None
    assert "mix" not in header["embedder"]
    first = contents(recipe)
    mixed = changed(plain, "extract", embedder_mix=EmbedderMix((0, 1), 0.25))
    assert feature_files.complete(mixed) is None
    with caplog.at_level(logging.INFO):
        extract.run(mixed, ALONE)
    assert "extract.embedder_mix.layers: [] -> [0, 1]" in caplog.text
    again = read_header(workspace_of(recipe).features_file(0))
    assert again is not None
    assert again["embedder"] == header["embedder"] | {"mix": {"layers": [0, 1], "ratio": 0.25}}
    assert feature_files.complete(mixed) is True
    assert feature_files.complete(plain) is None
    before = mtimes(recipe)
    extract.run(mixed, ALONE)
    assert mtimes(recipe) == before
    extract.run(plain, ALONE)
    assert contents(recipe) == first


def test_without_clips(tmp_path: Path) -> None:
    recipe = narrow_recipe(tmp_path)
    with pytest.raises(StageError, match=r"run/clips has no clips: run `rvc-dist preprocess` first"):
        extract.run(recipe, ALONE)
    assert not Path(recipe.run_dir).exists()


def test_with_only_some_of_the_clips(recipe: Recipe) -> None:
    workspace_of(recipe).clips_file(1).unlink()
    with pytest.raises(
        StageError, match=r"1 of 3 units are missing or stale \(00001\.safetensors\): run `rvc-dist preprocess` to its"
    ):
        extract.run(recipe, ALONE)
    assert not folder(recipe).exists()


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"f0_method": "penn", "f0_penn_model": "/none/p.pt"}, r"extract\.f0_penn_model: .*--extract\.f0_method swipe"),
        ({"f0_method": "rmvpe", "f0_model": "/none/rmvpe.pt"}, r"extract\.f0_model: .*--extract\.f0_method swipe"),
        ({"embedder_model": "/none/encoder"}, r"extract\.embedder_model: /none/encoder is no folder"),
        (
            {"embedder_model": "contentvec"},
            r"the encoder contentvec cannot be had\..*HF_HUB_OFFLINE.*--extract\.embedder_model FOLDER, or say "
            r"--extract\.embedder_model mfcc",
        ),
    ],
)
def test_what_cannot_be_loaded_is_told_with_the_remedy(
    values: dict[str, str], message: str, recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    with pytest.raises(StageError, match=message):
        extract.run(changed(recipe, "extract", **values), ALONE)
    assert not folder(recipe).exists()


def test_a_missing_package_is_told_with_the_command_that_helps(recipe: Recipe, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torchfcpe", None)
    with pytest.raises(StageError, match=r"pip install torchfcpe"):
        extract.run(changed(recipe, "extract", f0_method="fcpe"), ALONE)


def test_an_extractor_describes_its_encoder_and_can_do_without_pitch(tmp_path: Path) -> None:
    recipe = narrow_recipe(tmp_path)
    extractor = Extractor.load(recipe)
    described = extractor.embedder.describe()
    assert (described["name"], described["width"]) == ("mfcc", 768)
    assert len(described["hash"]) == 16
    without = Extractor.load(recipe, with_pitch=False)
    ((_, _, f0),) = without([tone(0.5, 16000)])
    assert f0.shape == (50,)
    assert not f0.any()
