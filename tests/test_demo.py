"""The demo is heard: its base model, and what it makes of the French recording."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from launching import rvc_dist
from pitch_following import autocorrelation, following

from rvc_dist import __main__ as cli
from rvc_dist import demo
from rvc_dist.config import load_recipe
from rvc_dist.features.content import load_embedder
from rvc_dist.models.shape import GeneratorShape
from rvc_dist.report.history import read_history
from rvc_dist.train.networks import Pretrained, make_networks
from rvc_dist.workspace import DEMO_BASE_DIR, DEMO_VOICE_DIR

RATE = 24000
SOURCE = DEMO_VOICE_DIR / "source" / "fr.flac"


def sine(hz: float, seconds: float = 1.0) -> np.ndarray:
    return np.sin(2 * np.pi * hz * np.arange(round(seconds * RATE)) / RATE).astype(np.float32)


@pytest.mark.parametrize(("hz", "expected"), [(200, 1.0), (400, 1.0), (300, -1.0), (250, 0.0)])
def test_the_measure_is_the_correlation_one_period_later(hz: float, expected: float) -> None:
    """A period of 200 Hz is 1, 2, 1.5 and 1.25 of these sines: cosines of whole, half and quarter turns."""
    f0 = np.full(100, 200.0, np.float32)
    assert autocorrelation(sine(hz), RATE, f0) == pytest.approx(expected, abs=0.01)


def test_the_measure_looks_at_voiced_frames_inside_the_wave() -> None:
    f0 = np.zeros(100, np.float32)
    f0[[0, 10, 99]] = 200.0  # the first and the last have no whole window
    assert autocorrelation(sine(200), RATE, f0) == pytest.approx([1.0])
    assert autocorrelation(np.zeros(RATE, np.float32), RATE, f0) == pytest.approx([0.0])
    noise = np.random.default_rng(0).normal(size=RATE).astype(np.float32)
    assert abs(np.median(autocorrelation(noise, RATE, np.full(100, 200.0, np.float32)))) < 0.1


def test_the_base_model_fits_the_demo_and_is_small_and_licensed() -> None:
    recipe, *_ = cli.parse("demo", [])
    base = load_recipe(demo.recipe_file().with_name("demo_base.yaml"))
    assert (base.model, base.extract, base.preprocess) == (recipe.model, recipe.extract, recipe.preprocess)
    assert base.data.sample_rate == recipe.data.sample_rate
    files = {"generator": recipe.train.pretrained_g, "discriminator": recipe.train.pretrained_d}
    found = {name: Pretrained.read(Path(str(file)), name) for name, file in files.items()}
    embedder = load_embedder(recipe.extract, recipe.model.version, torch.device("cpu"))
    shape = GeneratorShape.from_recipe(recipe, embedder.width, 4)
    for name, module in make_networks(recipe, shape).items():
        found[name].check_embedder(embedder.identity)
        found[name].fill(module)
    folder = DEMO_BASE_DIR
    assert {Path(str(file)).parent for file in files.values()} == {folder}
    assert {path.suffix for path in folder.iterdir()} == {".pth", ".md"}
    assert sum(path.stat().st_size for path in folder.iterdir()) <= 8_000_000
    text = (folder / "README.md").read_text(encoding="utf-8")
    owed = (
        "June Wallack",
        "Carlo Flora",
        "Maxim Topal",
        "Nickolay V. Shmyrev",
        "Digium",
        "Silvia Petrin",
        "festvox-ru",
    )
    for word in (*owed, "CC-BY-SA-3.0", "CC-BY-3.0", "licenses/by-sa/3.0", "ALL WARRANTIES", "launch/demo_base.sh"):
        assert word in text, word


@pytest.mark.slow
def test_the_demo_follows_its_source_after_few_steps(tmp_path: Path) -> None:
    """Networks from random numbers are at 0.75 of mel distance then, and 12 dB below their source."""
    options = ["--run_dir", tmp_path, "--train.max_steps", 10, "--train.eval_every_steps", 10]
    rvc_dist(1, "demo", *options, "--train.samples", "false", "--train.report", "false")
    heard = following(tmp_path / "converted.wav", SOURCE)
    assert heard.periodicity >= 0.6
    assert abs(heard.level_db) <= 3.0
    history = read_history(tmp_path / "metrics.jsonl")
    (distance,) = (line["values"]["mel_distance"] for line in history if line["kind"] == "validation")
    assert distance < 0.45
