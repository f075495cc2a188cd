from __future__ import annotations

import json
import zlib
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
from huggingface_hub import constants
from torch import Tensor

from rvc_dist.config import ExtractConfig
from rvc_dist.features.f0 import load_f0
from rvc_dist.features.rmvpe import RMVPE, RmvpePitch
from rvc_dist.workspace import StageError

CPU = torch.device("cpu")
GOLDEN = Path(__file__).parents[1] / "golden"


@pytest.fixture(scope="module")
def weights() -> dict[str, Tensor]:
    """The network filled by the rule of the golden vectors: every tensor from a generator seeded by its name."""
    tensors = {}
    for name, shape in json.loads((GOLDEN / "rmvpe_shapes.json").read_text()).items():
        if name.endswith("num_batches_tracked"):
            tensors[name] = torch.tensor(0)
            continue
        generator = np.random.Generator(np.random.PCG64(zlib.crc32(name.encode())))
        value = generator.standard_normal(shape).astype(np.float32) * np.float32(0.05)
        tensors[name] = torch.from_numpy(np.abs(value) + np.float32(0.5) if name.endswith("running_var") else value)
    return tensors


def wave_of(hz: float, num_samples: int = 4000) -> Tensor:
    return 0.3 * torch.sin(2 * torch.pi * hz * torch.arange(num_samples) / 16000)


def test_golden(weights: dict[str, Tensor]) -> None:
    network = RMVPE().eval()
    assert {key: list(value.shape) for key, value in network.state_dict().items()} == {
        key: list(value.shape) for key, value in weights.items()
    }
    network.load_state_dict(weights)
    with np.load(GOLDEN / "rmvpe.npz") as golden, torch.no_grad():
        salience = network(torch.from_numpy(golden["mel"]))
        torch.testing.assert_close(salience, torch.from_numpy(golden["salience"]), atol=1e-4, rtol=0)


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
def test_from_a_file_to_pitch(weights: dict[str, Tensor], tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"rmvpe{suffix}"
    # A salience that peaks at bin 200, whatever is heard: the plumbing behind the network is what is tested.
    tensors = {key: value.half() if value.is_floating_point() else value for key, value in weights.items()}
    tensors["fc.1.weight"] = torch.zeros(360, 512).half()
    tensors["fc.1.bias"] = torch.full((360,), -10.0).half()
    tensors["fc.1.bias"][199:202] = torch.tensor([0.0, 3.0, 0.0])
    (torch.save if suffix == ".pt" else safetensors.torch.save_file)(tensors, path)
    method = load_f0(ExtractConfig(f0_method="rmvpe", f0_model=str(path)), CPU)
    path.unlink()

    waves = torch.stack([wave_of(200.0), wave_of(300.0)])
    f0 = method(waves)
    expected = 10.0 * 2.0 ** ((20.0 * 200 + 1997.3794084376191) / 1200.0)
    torch.testing.assert_close(f0, torch.full((2, 25), expected), rtol=1e-3, atol=0)
    assert torch.equal(f0, torch.cat([method(row[None]) for row in waves]))
    assert not method(torch.zeros(1, 4000)).any()
    assert method(wave_of(200.0, 500)[None]).shape == (1, 3)  # shorter than the window and than 32 frames

    assert isinstance(method, RmvpePitch)
    batch = torch.stack([wave_of(200.0, 500), wave_of(300.0, 500)])
    alone = method.track_all(batch)
    method.device = torch.device("cuda")  # there all at once
    torch.testing.assert_close(method.track_all(batch), alone)
    method.device = CPU
    method.network.fc[1].bias.fill_(-4.0)  # sigmoid(-4) = 0.018, the threshold is 0.03
    assert not method(waves).any()


def test_other_weights_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "rmvpe.pt"
    torch.save({"some.weight": torch.zeros(1)}, path)
    with pytest.raises(ValueError, match="does not hold the weights of RMVPE"):
        load_f0(ExtractConfig(f0_method="rmvpe", f0_model=str(path)), CPU)
    path.write_bytes(b"not a checkpoint")
    with pytest.raises(ValueError, match="not a file of weights"):
        load_f0(ExtractConfig(f0_method="rmvpe", f0_model=str(path)), CPU)


def test_without_weights_the_error_says_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(StageError) as caught:
        load_f0(ExtractConfig(f0_method="rmvpe"), CPU)
    message = str(caught.value)
    for part in ("rmvpe.pt of lj1995/VoiceConversionWebUI", "models--lj1995--VoiceConversionWebUI", "HF_HUB_OFFLINE"):
        assert part in message
    assert "--extract.f0_model PATH" in message
    assert "--extract.f0_method swipe" in message

    with pytest.raises(StageError, match=r"missing\.pt is no file; it is not of the form"):
        load_f0(ExtractConfig(f0_method="rmvpe", f0_model="missing.pt"), CPU)
