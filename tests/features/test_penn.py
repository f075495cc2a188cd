"""penn with random weights: its published ones are too large for this repository, so that what it hears in a real voice
is tested nowhere. The golden vectors are of the package penn 1.0.0, network and decoder.
"""

from __future__ import annotations

import json
import math
import zlib
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
from huggingface_hub import constants
from test_f0 import check_protocol
from torch import Tensor

from rvc_dist.config import ExtractConfig
from rvc_dist.features.f0 import load_f0
from rvc_dist.features.penn import FCNF0, local_mean_hz, periodicity
from rvc_dist.workspace import StageError

CPU = torch.device("cpu")
GOLDEN = Path(__file__).parents[1] / "golden"


@pytest.fixture(scope="module")
def weights() -> dict[str, Tensor]:
    """The network filled by the rule of the golden vectors: every tensor from a generator seeded by its name."""
    tensors = {}
    for name, shape in json.loads((GOLDEN / "fcnf0_shapes.json").read_text()).items():
        generator = np.random.Generator(np.random.PCG64(zlib.crc32(name.encode())))
        tensors[name] = torch.from_numpy(generator.standard_normal(shape).astype(np.float32) * np.float32(0.05))
    return tensors


@pytest.fixture
def peaked(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Random but for the last layer, which prefers bin 720 whatever it hears: 31 Hz and three octaves, 248 Hz."""
    bias = torch.zeros(1440)
    bias[719:722] = torch.tensor([8.0, 12.0, 8.0])
    return weights | {"6.weight": torch.zeros_like(weights["6.weight"]), "6.bias": bias}


def made_from(path: Path, f0_min: float = 50.0, f0_max: float = 1100.0) -> object:
    return load_f0(ExtractConfig(f0_method="penn", f0_penn_model=str(path), f0_min=f0_min, f0_max=f0_max), CPU)


def test_golden(weights: dict[str, Tensor]) -> None:
    network = FCNF0().eval()
    assert {key: value.shape for key, value in network.state_dict().items()} == {
        key: value.shape for key, value in weights.items()
    }
    network.load_state_dict(weights)
    with np.load(GOLDEN / "fcnf0.npz") as golden, torch.no_grad():
        logits = network(torch.from_numpy(golden["frames"]))
        torch.testing.assert_close(logits, torch.from_numpy(golden["logits"]), atol=1e-4, rtol=0)
        sharp = torch.from_numpy(golden["logits"]) * 30.0
        sharp[:, :100] = sharp[:, 1300:] = -torch.inf
        # penn divides by the logarithm of all bins, here it is that of those allowed.
        expected = 1.0 - (1.0 - torch.from_numpy(golden["periodicity"])) * (math.log(1440) / math.log(1200))
        torch.testing.assert_close(periodicity(sharp), expected)
        path = torch.from_numpy(golden["path"])  # in the middle and at both ends of what is allowed
        torch.testing.assert_close(local_mean_hz(sharp, path), torch.from_numpy(golden["hz"]))


def test_periodicity_by_hand() -> None:
    certain = torch.full((1, 1440), -torch.inf)
    certain[0, 3] = 5.0
    even, even_of_four, one_of_two_of_four = torch.full((3, 1, 1440), -torch.inf)
    even[0] = 0.0
    even_of_four[0, 10:14] = 0.0
    one_of_two_of_four[0, 10:14] = torch.tensor([0.0, 0.0, -100.0, -100.0])  # log 2 of log 4
    found = periodicity(torch.cat([certain, even, even_of_four, one_of_two_of_four]))
    torch.testing.assert_close(found, torch.tensor([1.0, 0.0, 0.0, 0.5]), atol=1e-5, rtol=0)


@pytest.mark.parametrize("kind", ["checkpoint.pt", "bare.pt", "bare.safetensors"])
def test_from_a_file_to_pitch(peaked: dict[str, Tensor], tmp_path: Path, kind: str) -> None:
    path = tmp_path / kind
    if kind == "checkpoint.pt":  # as penn's training writes it
        torch.save({"model": peaked, "optimizer": {"state": {}}, "step": 250000}, path)
    else:
        (torch.save if kind == "bare.pt" else safetensors.torch.save_file)(peaked, path)
    method = made_from(path)
    path.unlink()
    wave = 0.3 * torch.sin(2 * torch.pi * 200.0 * torch.arange(4000) / 16000)
    torch.testing.assert_close(method(wave[None]), torch.full((1, 25), 248.0), rtol=1e-5, atol=0)


def test_what_is_not_allowed_is_never_entered(peaked: dict[str, Tensor], tmp_path: Path) -> None:
    torch.save(peaked, tmp_path / "w.pt")
    wave = 0.3 * torch.sin(2 * torch.pi * 200.0 * torch.arange(4000) / 16000)
    # Without its peak the network knows nothing, which is unvoiced.
    assert not made_from(tmp_path / "w.pt", 300.0, 600.0)(wave[None]).any()
    assert not made_from(tmp_path / "w.pt", 50.0, 247.5)(wave[None]).any()  # the foot of the peak is no pitch
    for low, high in ((10.0, 20.0), (2500.0, 3000.0)):
        with pytest.raises(ValueError, match=r"f0_max: got .* penn finds nothing: it hears 31\.0 to 1984\.0 Hz"):
            made_from(tmp_path / "w.pt", low, high)


def test_protocol(peaked: dict[str, Tensor], weights: dict[str, Tensor], tmp_path: Path) -> None:
    # The peak keeps it voiced, the random weights make it listen.
    torch.save(peaked | {"6.weight": weights["6.weight"] * 10.0}, tmp_path / "w.pt")
    check_protocol(made_from(tmp_path / "w.pt", 150.0, 300.0))


def test_other_weights_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "w.pt"
    torch.save({"model": {"some.weight": torch.zeros(1)}}, path)
    with pytest.raises(ValueError, match=r"extract\.f0_penn_model: .*w\.pt does not hold the weights of FCNF0\+\+"):
        made_from(path)
    torch.save({"model": 3}, path)
    with pytest.raises(ValueError, match=r"w\.pt is not a file of weights: it holds something else than a mapping"):
        made_from(path)
    path.write_bytes(b"not a checkpoint")
    with pytest.raises(ValueError, match=r"w\.pt is not a file of weights"):
        made_from(path)


def test_without_weights_the_error_says_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(StageError) as caught:
        load_f0(ExtractConfig(f0_method="hybrid[yin+penn]"), CPU)
    for part in ("fcnf0++.pt of maxrmorrison/fcnf0-plus-plus", "HF_HUB_OFFLINE", "--extract.f0_penn_model PATH"):
        assert part in str(caught.value)
