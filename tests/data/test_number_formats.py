"""Formats of clips and features: what they lose, that every reader takes each, and that none is mixed with another."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import faiss
import numpy as np
import pytest
import soundfile
import torch
from helpers import RATE, SteadyPitch, changed, narrow_recipe, tone, train, workspace_of
from safetensors.torch import load_file

from rvc_dist.choices import F0_METHODS, F0Spec
from rvc_dist.config import ExtractConfig, PreprocessConfig, Recipe, TrainConfig, load_recipe
from rvc_dist.data import clip_files, preprocess
from rvc_dist.data.number_formats import float_wave, stored_content, stored_wave
from rvc_dist.features import extract, feature_files, index
from rvc_dist.report.history import read_history
from rvc_dist.tools import dataset_stats, import_experiment, plan, status
from rvc_dist.train.dataset import CachedClips, ClipDataset, ClipTable, cached_bytes
from rvc_dist.train.listening import joined
from rvc_dist.train.sampler import MicroBatchSpec
from rvc_dist.train.setup import load_clips
from rvc_dist.voice import export
from rvc_dist.workspace import DEMO_VOICE_DIR, Shard, StageError, read_json, unit_files

ALONE = Shard(0, 1)
FLOATS, STEPS = ("float32", "float32"), ("int16", "float32")
SHORT, BRAIN = ("int16", "float16"), ("int16", "bfloat16")
Runs = dict[tuple[str, str], Recipe]


def recipe_in(folder: Path, formats: tuple[str, str], **values: object) -> Recipe:
    recipe = narrow_recipe(
        folder,
        preprocess=PreprocessConfig(clip_format=formats[0], **values),  # type: ignore[arg-type]
        extract=ExtractConfig(f0_method="pm", embedder_model="mfcc", content_format=formats[1]),  # type: ignore[arg-type]
        train=TrainConfig(max_steps=5, batch_size=4, log_every_steps=1, report=False, samples=False, num_workers=1),
    )
    return replace(recipe, run_dir=str(folder / "_".join(formats)))


@pytest.fixture(autouse=True, scope="module")
def _quick_pitch() -> object:
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(F0_METHODS, "pm", F0Spec(SteadyPitch))
        yield


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Runs:
    """Runs on 40 s of speech, by formats, with an index."""
    folder = tmp_path_factory.mktemp("made")
    (folder / "audio").mkdir()
    for path in sorted((DEMO_VOICE_DIR / "voice").glob("*.flac"))[:5]:
        shutil.copy(path, folder / "audio")
    recipes = {formats: recipe_in(folder, formats) for formats in (FLOATS, STEPS, SHORT, BRAIN)}
    for recipe in recipes.values():
        for stage in (preprocess, extract, index):
            stage.run(recipe, ALONE)
    return recipes


# Numbers


def test_int16_rounds_halves_to_even_and_counts_what_it_clips() -> None:
    steps = np.array([0.5, 1.5, -0.5, -1.5, 3.4, 32767.0, 32768.0, -32768.0, 40000.0, -40000.0], np.float32)
    stored, clipped = stored_wave(steps / 32768, "int16")
    assert stored.tolist() == [0, 2, 0, -2, 3, 32767, 32767, -32768, 32767, -32768]
    assert (stored.dtype, clipped) == (np.int16, 2)
    every = np.arange(-32768, 32768, dtype=np.int16)
    assert np.array_equal(stored_wave(float_wave(every), "int16")[0], every), "recordings of 16 bits lose nothing"
    wave = np.random.default_rng(0).uniform(-1, 1 - 2**-15, 100_000).astype(np.float32)
    assert np.abs(float_wave(stored_wave(wave, "int16")[0]) - wave).max() <= 2**-16
    assert stored_wave(wave, "float32") == (wave, 0)


def test_short_content_is_the_nearest_number_and_never_infinite() -> None:
    content = np.random.default_rng(0).normal(0, 5, (1000, 7)).astype(np.float32)
    for form, bits in (("float16", 11), ("bfloat16", 8)):
        stored = stored_content(content, form)
        assert stored.dtype == getattr(torch, form)
        assert float((stored.float() - torch.tensor(content)).abs().div(torch.tensor(content).abs()).max()) <= 2**-bits
    huge = np.array([[1.0, -70000.0]], np.float32)
    with pytest.raises(StageError, match=r"content_format float16 holds numbers up to 65504, .* has 70000"):
        stored_content(huge, "float16")
    assert stored_content(huge, "bfloat16").tolist() == [[1.0, -70144.0]]


# Readers


def batch_of(recipe: Recipe, kind: type[ClipDataset] = ClipDataset) -> tuple[ClipDataset, tuple[torch.Tensor, ...]]:
    clips = ClipTable.load(recipe).train
    dataset = kind(recipe, clips, *([torch.device("cpu")] if kind is CachedClips else []))
    numbers = tuple(range(len(clips)))
    batch = dataset.read_batch(MicroBatchSpec(numbers, 0, 350, 1.0, 300.0))
    assert batch.wave_with_reach.dtype == batch.content.dtype == batch.f0.dtype == torch.float32
    return dataset, (batch.wave_with_reach, batch.content, batch.f0)


@pytest.mark.parametrize(("formats", "bits"), [(SHORT, 11), (BRAIN, 8)])
def test_files_halve_and_every_reader_takes_them(made: Runs, formats: tuple[str, str], bits: int) -> None:
    wide, short = made[FLOATS], made[formats]
    for name in ("clips", "features"):
        sizes = [sum(p.stat().st_size for p in unit_files(Path(r.run_dir) / name)) for r in (wide, short)]
        assert sizes[1] / sizes[0] == pytest.approx(0.5, abs=0.005)
    _, (wave, _, f0) = batch_of(wide)
    _, (_, content, _) = batch_of(made[STEPS])
    _, narrowed = batch_of(short)
    assert float((narrowed[0] - wave).abs().max()) <= 2**-16
    assert bool(((narrowed[1] - content).abs() <= 2**-bits * content.abs() + 1e-7).all())
    assert torch.equal(narrowed[2], f0), "pitch stays float32"
    cached, again = batch_of(short, CachedClips)
    assert all(torch.equal(a, b) for a, b in zip(again, narrowed, strict=True))
    assert isinstance(cached, CachedClips)
    held = sum(t.nbytes for tensors in cached._cache.values() for t in tensors if t is not None)
    assert cached_bytes(short, cached.clips, 768) == pytest.approx(held, rel=0.02)
    clips = ClipTable.load(short).holdout[:1]
    phrase, fed = joined(cached, clips, 300)
    assert phrase.dtype == fed.content.dtype == torch.float32
    assert float((phrase - joined(ClipDataset(wide, ()), clips, 300)[0]).abs().max()) <= 2**-16
    (a, b) = (dataset_stats.summarise(Path(r.run_dir)).total for r in (wide, short))
    assert b["rms_db"] == pytest.approx(a["rms_db"], abs=1e-3)
    assert b["peak_db"] == pytest.approx(a["peak_db"], abs=1e-3)


def test_an_index_of_short_content_finds_the_same_neighbours(made: Runs) -> None:
    found = []
    queries = np.load(workspace_of(made[STEPS]).vectors_file)[::7] + np.float32(0.01)
    for recipe in (made[STEPS], made[SHORT], made[BRAIN]):
        vectors = np.load(workspace_of(recipe).vectors_file)
        assert vectors.dtype == np.float32
        flat = faiss.IndexFlatL2(768)
        flat.add(vectors)
        found.append(flat.search(queries, 8)[1])
    overlaps = [np.mean([len({*a} & {*b}) / 8 for a, b in zip(found[0], other, strict=True)]) for other in found[1:]]
    assert overlaps[0] > 0.999  # 1.0 and 0.9992 as measured
    assert overlaps[1] > 0.995


@pytest.mark.slow
def test_training_from_either_gives_losses_within_a_bound(made: Runs, tmp_path: Path) -> None:
    """Measured: 1.2e-3 of the mel loss, and 2e-5 of the KL divergence by content alone."""
    curves = []
    for recipe in (made[FLOATS], made[SHORT]):
        copied = shutil.copytree(recipe.run_dir, tmp_path / Path(recipe.run_dir).name)
        train(replace(recipe, run_dir=str(copied)))
        lines = [line["values"] for line in read_history(copied / "metrics.jsonl") if line["kind"] == "step"]
        curves.append([[line[f"loss/{name}"] for name in ("g_mel", "g_kl", "g_fm", "d")] for line in lines])
    wide, short = np.array(curves)
    assert len(wide) == 5
    assert np.abs(short / wide - 1).max() < 3e-3
    assert np.abs(short / wide - 1).max() > 0, "they are not the same files"


# Nothing is mixed


def test_another_format_makes_units_stale_and_none_is_trained_half_made(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("rvc_dist.workspace.MIN_UNIT_S", 2.0)
    (tmp_path / "audio").mkdir()
    for number in range(3):
        soundfile.write(tmp_path / "audio" / f"{number}.wav", tone(3.0, f0_hz=150 + number), RATE)
    wide = recipe_in(tmp_path, FLOATS)
    assert not {key for key in clip_files.clip_settings(wide) | feature_files.feature_settings(wide) if "format" in key}
    for stage in (preprocess, extract):
        stage.run(wide, ALONE)
    work = workspace_of(wide)
    before = [path.read_bytes() for path in unit_files(work.features_dir)]
    content = changed(wide, "extract", content_format="float16")
    clips = changed(wide, "preprocess", clip_format="int16")
    key = "preprocess.clip_format: float32 -> int16"
    with pytest.raises(StageError, match=key):
        load_clips(clips, work)
    assert key in status._preprocess(work, clips).why
    key = "extract.content_format: float32 -> float16"
    with pytest.raises(StageError, match=key):
        load_clips(content, work)
    assert key in status._extract(work, content).why
    work_list = preprocess.make_work_list(clips, work, ALONE)
    preprocess.Preprocess(clips, work_list).make_unit(work_list.units[0])
    assert clip_files.complete(clips) is None
    with pytest.raises(StageError, match="features of other clips"):
        load_clips(clips, work)
    preprocess.run(clips, ALONE)
    with pytest.raises(StageError, match="features of other clips"):
        load_clips(clips, work)
    extract.run(clips, ALONE)
    load_clips(clips, work)
    with pytest.raises(StageError, match="int16 -> float32"):
        load_clips(wide, work)
    for stage in (preprocess, extract):
        stage.run(wide, ALONE)
    assert [path.read_bytes() for path in unit_files(work.features_dir)] == before


def test_clipped_samples_are_counted_by_recording(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "audio").mkdir()
    loud = tone(3.0)
    loud[[5000, 30000, 60000]] = 1.5, -1.25, 1.0
    soundfile.write(tmp_path / "audio" / "loud.wav", loud, RATE, subtype="FLOAT")
    soundfile.write(tmp_path / "audio" / "soft.wav", tone(3.0), RATE)
    recipe = recipe_in(tmp_path, SHORT, normalization="none", process_effects=False)
    preprocess.run(recipe, ALONE)
    work = workspace_of(recipe)
    assert read_json(work.clips_report_file)["clipped_samples"] == {"loud.wav": 2}
    assert "2 samples beyond full scale were clipped in 1 recordings" in caplog.text
    caplog.clear()
    preprocess.run(changed(recipe, "preprocess", clip_format="float32"), ALONE)
    assert "clipped_samples" not in read_json(work.clips_report_file)
    assert "full scale" not in caplog.text


# Elsewhere


@pytest.mark.slow
def test_short_units_are_exported_imported_and_planned(made: Runs, tmp_path: Path) -> None:
    folder = shutil.copytree(made[BRAIN].run_dir, tmp_path / "run")
    recipe = replace(changed(made[BRAIN], "train", max_steps=1), run_dir=str(folder))
    clips, features = plan.find_stored(recipe, 768)
    assert (clips.format, clips.made_format, features.format, features.made_format) == (*BRAIN[:1] * 2, *BRAIN[1:] * 2)
    assert clips.bytes_per_hour == 2 * RATE * 3600
    assert features.bytes_per_hour == (768 * 2 * 50 + 400) * 3600
    for stored in (clips, features):
        assert stored.made_bytes_per_hour == pytest.approx(stored.bytes_per_hour, rel=0.03)
    train(recipe)
    export.run(changed(recipe, "export", format="applio", folder=str(tmp_path / "voice")), ALONE)
    again = replace(recipe, run_dir=str(tmp_path / "again"))
    import_experiment.run(changed(again, "data", audio_dir=str(tmp_path / "voice")), ALONE)
    assert feature_files.complete(load_recipe(tmp_path / "again" / "config.yaml"))
    for name in ("clips", "features"):
        units = [[load_file(p) for p in unit_files(Path(r.run_dir) / name)] for r in (recipe, again)]
        sums = [sorted(float(t.double().sum()) for u in of_run for t in u.values()) for of_run in units]
        kinds = [{str(t.dtype) for u in of_run for t in u.values()} for of_run in units]
        assert kinds[0] == kinds[1] == ({"torch.int16"} if name == "clips" else {"torch.bfloat16", "torch.float32"})
        assert sums[0] == sums[1], "what was rounded before is not rounded again"
