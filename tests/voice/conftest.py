"""A narrow voice, and a conversion with it that works."""

from __future__ import annotations

from pathlib import Path

import pytest
import soundfile
from helpers import RATE, SteadyPitch, make_generator, narrow_recipe, tone, voice_contents

from rvc_dist.choices import F0_METHODS, F0Spec
from rvc_dist.config import InferConfig, Recipe
from rvc_dist.models.torch_file import save_pth


@pytest.fixture
def quick_pitch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(F0_METHODS, "pyin", F0Spec(SteadyPitch))


@pytest.fixture(scope="session")
def voice_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("voice")
    config = narrow_recipe(folder)
    path = folder / "tiny.pth"
    save_pth(path, voice_contents(config, make_generator(config, num_speakers=2)))
    return path


@pytest.fixture
def recipe(tmp_path: Path, voice_file: Path) -> Recipe:
    """A conversion of one second of tone that works."""
    soundfile.write(tmp_path / "in.wav", tone(1.0), RATE)
    config = InferConfig(
        input=str(tmp_path / "in.wav"), output=str(tmp_path / "out.wav"), model=str(voice_file), index_rate=0.0
    )
    return narrow_recipe(tmp_path, infer=config)
