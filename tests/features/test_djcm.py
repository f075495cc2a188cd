"""DJCM with random weights: its published ones are too large for this repository, so that what it hears in a real voice
is tested nowhere. The golden vectors are of the published network, without and with its first U-net.
"""

from __future__ import annotations

import json
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import write_djcm
from test_f0 import check_protocol
from torch import Tensor

from rvc_dist.config import ExtractConfig
from rvc_dist.features import djcm
from rvc_dist.features.djcm import DJCM, DjcmPitch
from rvc_dist.features.f0 import load_f0, peak_hz
from rvc_dist.features.rmvpe import magnitudes
from rvc_dist.workspace import StageError

CPU = torch.device("cpu")
GOLDEN = Path(__file__).parents[1] / "golden"
each_kind = pytest.mark.parametrize(("n_fft", "separates"), [(1024, False), (2048, True)])


def load(path: Path, **values: object) -> DjcmPitch:
    method = load_f0(ExtractConfig(f0_method="djcm", f0_djcm_model=str(path), **values), CPU)
    assert isinstance(method, DjcmPitch)
    return method


@pytest.mark.parametrize("kind", ["djcm", "djcm_svs"])
def test_golden(kind: str) -> None:
    """Filled by the rule of the golden vectors, and the weights of norms with |x| + 0.5 too, lest nothing is left."""
    weights = {}
    for name, shape in json.loads((GOLDEN / "djcm_shapes.json").read_text())[kind].items():
        generator = np.random.Generator(np.random.PCG64(zlib.crc32(name.encode())))
        value = generator.standard_normal(shape).astype(np.float32) * np.float32(0.05)
        if name.endswith("running_var") or ("bn" in name and name.endswith(".weight")):
            value = np.abs(value) + np.float32(0.5)
        counts = name.endswith("num_batches_tracked")
        weights[name] = torch.tensor(0) if counts else torch.from_numpy(value)
    network = DJCM.of(weights).eval()
    network.load_state_dict(weights)
    num_bins = len(weights["bn.weight"])
    noise = np.random.Generator(np.random.PCG64(7)).standard_normal((1, num_bins, 12))
    with np.load(GOLDEN / "djcm.npz") as golden, torch.no_grad():
        salience = network(torch.from_numpy(np.abs(noise).astype(np.float32) * 4))
        wanted = torch.from_numpy(golden[f"{kind}_salience"])
    assert wanted.std(dim=1).mean() > 0.003  # the frames differ
    torch.testing.assert_close(salience, wanted, atol=1e-5, rtol=0)


@pytest.fixture
def narrow(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(djcm, "WIDTHS", (4, 4, 4, 4, 4, 4))


@pytest.mark.usefixtures("narrow")
@pytest.mark.parametrize(("n_fft", "separates", "suffix"), [(1024, False, ".pt"), (2048, True, ".safetensors")])
def test_from_a_file_to_pitch(n_fft: int, separates: bool, suffix: str, tmp_path: Path) -> None:
    path = write_djcm(tmp_path / f"djcm{suffix}", n_fft, separates, peak=200)
    method = load(path, f0_min=150.0, f0_max=400.0)
    path.unlink()
    wave = 0.3 * torch.sin(2 * torch.pi * 200.0 * torch.arange(4000) / 16000)
    expected = 10.0 * 2.0 ** ((20.0 * 200 + 1997.3794084376191) / 1200.0)
    torch.testing.assert_close(method(wave[None]), torch.full((1, 25), expected), rtol=1e-3, atol=0)
    method.network.pe_decoder.fc[1].bias -= 4.0  # sigmoid(3 - 4) = 0.27, the threshold is 0.3
    assert not method(wave[None]).any()


@pytest.mark.usefixtures("narrow")
@each_kind
def test_protocol_and_half_precision(
    n_fft: int, separates: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(djcm, "SEGMENT", 64)
    path = write_djcm(tmp_path / "djcm.pt", n_fft, separates, peak=180)  # 250 Hz
    check_protocol(load(path, f0_min=150.0, f0_max=300.0))
    exact, half = (load(path, precision=name) for name in ("fp32", "bf16"))
    wave = 0.1 * torch.randn(1, 4000, generator=torch.Generator().manual_seed(0))
    found, wanted = half(wave), exact(wave)
    assert found.dtype == torch.float32
    assert not torch.equal(found, wanted)
    torch.testing.assert_close(found, wanted, rtol=1e-2, atol=0)
    assert half.network.pe_decoder.after_conv2.weight.dtype == torch.bfloat16
    assert half.network.pe_decoder.fc[1].weight.dtype == half.network.bn.weight.dtype == torch.float32


def strongest(spectrum: Tensor) -> Tensor:
    """In the place of the network: in each frame the bin whose number is that of the strongest frequency."""
    return torch.nn.functional.one_hot(spectrum.argmax(dim=1), 360).float()


@pytest.mark.usefixtures("narrow")
@pytest.mark.parametrize("num_frames", [1, 31, 32, 33, 64, 200])
def test_segments_join_where_they_belong(num_frames: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(djcm, "SEGMENT", 64)
    method = load(write_djcm(tmp_path / "djcm.pt"))
    method.network = strongest
    time = torch.arange(160 * num_frames + 7) / 16000
    sweep = torch.sin(2 * torch.pi * (100.0 * time + 500.0 * time**2))
    padded = torch.nn.functional.pad(sweep, (5120, 5120))[None]  # 32 frames of silence on either side
    wanted = peak_hz(strongest(magnitudes(padded, method.window)), 0.3)[0, 32 : 32 + num_frames]
    assert torch.equal(method.track(sweep)[:num_frames], wanted)


class Runs:
    """Unpickled, it makes a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, ...]:
        return Path.touch, (self.path,)


@pytest.mark.usefixtures("narrow")
def test_other_weights_are_refused(tmp_path: Path) -> None:
    path = write_djcm(tmp_path / "djcm.pt", 2048, True)
    weights = torch.load(path)
    other = {
        "no network": {"some.weight": torch.zeros(1)},
        "another spectrum": {"bn.weight": torch.zeros(()), "bn.bias": torch.zeros(0)},
        "half of it missing": {key: value for key, value in weights.items() if not key.startswith("pe_encoder")},
        "one shape": weights | {"pe_decoder.fc.1.bias": torch.zeros(1440)},
    }
    for tensors in other.values():
        torch.save(tensors, path)
        with pytest.raises(
            ValueError, match=r"^extract\.f0_djcm_model: .* does not hold the weights of DJCM: "
        ) as told:
            load(path)
        assert len(str(told.value)) < 800
    for content in weights | {"bn.bias": torch.full((1025,), torch.nan)}, {"bn.weight": Runs(tmp_path / "ran")}:
        torch.save(content, path)
        with pytest.raises(ValueError, match=r"djcm\.pt is not a file of weights"):
            load(path)
    assert not (tmp_path / "ran").exists()
    path.write_bytes(path.read_bytes()[:-1000])
    with pytest.raises(ValueError, match=r"djcm\.pt is not a file of weights"):
        load(path)
    with pytest.raises(
        StageError, match=r"^extract\.f0_djcm_model is not set: djcm has no weights of its own; say --ex"
    ):
        load_f0(ExtractConfig(f0_method="djcm"), CPU)
