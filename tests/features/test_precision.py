"""Encoders and trackers in half precision: near to float32, and refused where a device only emulates it."""

from __future__ import annotations

from pathlib import Path

import pytest
import soundfile
import torch
from helpers import make_ssl_folder, make_whisper_folder
from torch import Tensor, nn

import rvc_dist
from rvc_dist.config import EmbedderMix, ExtractConfig
from rvc_dist.features import precision
from rvc_dist.features.content import Embedder, Pretrained, Version, load_embedder
from rvc_dist.features.f0 import F0Method, load_f0
from rvc_dist.features.penn import FCNF0
from rvc_dist.features.precision import check_device, lower
from rvc_dist.features.rmvpe import RMVPE
from rvc_dist.runtime.device import PRECISIONS
from rvc_dist.workspace import StageError

CPU, CUDA = torch.device("cpu"), torch.device("cuda", 0)
SPEECH = Path(rvc_dist.__file__).parent / "demo_voice" / "voice" / "000.flac"
ROUNDING = {"bf16": 2.0**-9, "fp16": 2.0**-12}
"""The largest relative error of one rounding."""
each_half = pytest.mark.parametrize("half", ROUNDING)


def speech(seconds: float) -> Tensor:
    return torch.from_numpy(soundfile.read(SPEECH, dtype="float32", frames=int(16000 * seconds))[0])


def difference(found: Tensor, wanted: Tensor) -> float:
    return float((found - wanted).norm() / wanted.norm())


@each_half
@pytest.mark.parametrize(
    ("kind", "version", "mix"),
    [
        ("Hubert", "v2", EmbedderMix()),
        ("Hubert", "v1", EmbedderMix((1,), 0.5)),
        ("Wav2Vec2", "v2", EmbedderMix((0, 2), 0.5)),
        ("WavLM", "v2", EmbedderMix()),
        ("Whisper", "v2", EmbedderMix((1,), 0.5)),
    ],
)
def test_an_encoder_gives_nearly_the_same(
    tmp_path: Path, kind: str, version: Version, mix: EmbedderMix, half: str
) -> None:
    if kind == "Whisper":
        make_whisper_folder(tmp_path / "enc", whole=False)
    else:
        make_ssl_folder(tmp_path / "enc", kind, position_groups=1)

    def load(name: str) -> Embedder:
        return load_embedder(
            ExtractConfig(embedder_model=str(tmp_path / "enc"), embedder_mix=mix, precision=name), version, CPU
        )

    waves, exact, embedder = speech(2.0).reshape(2, 16000), load("fp32"), load(half)
    found, wanted = embedder(waves), exact(waves)
    assert found.dtype == torch.float32
    assert ROUNDING[half] / 4 < difference(found, wanted) < 8 * ROUNDING[half]
    assert embedder.identity == exact.identity  # its voices are anybody's
    assert torch.equal(found, load(half)(waves))
    assert isinstance(embedder, Pretrained)
    kinds = {parameter.dtype for parameter in embedder.network.parameters()}
    assert kinds == {torch.float32, PRECISIONS[half]}


@each_half
@pytest.mark.parametrize("name", ["crepe-tiny", "fcpe", "pesto"])
def test_a_tracker_hears_nearly_the_same(name: str, half: str) -> None:
    wave = speech(3.0)[None]
    wanted = load_f0(ExtractConfig(f0_method=name), CPU)(wave)
    found = load_f0(ExtractConfig(f0_method=name, precision=half), CPU)(wave)
    assert found.dtype == torch.float32
    assert not torch.equal(found, wanted)
    assert ((found > 0) != (wanted > 0)).sum() <= 2
    both = (found > 0) & (wanted > 0)
    assert (1200 * (found[both] / wanted[both]).log2()).abs().quantile(0.95) < 10.0


@each_half
@pytest.mark.parametrize("make", [RMVPE, FCNF0])
def test_networks_without_weights_here(make: type[nn.Module], half: str) -> None:
    """With random ones: what RMVPE and penn let their networks do."""
    torch.manual_seed(0)
    network = make().eval().requires_grad_(False)
    x = torch.randn(1, 128, 64) if isinstance(network, RMVPE) else torch.randn(8, 1, 1024)
    wanted = network(x)
    if isinstance(network, RMVPE):
        lower(network, PRECISIONS[half], network.unet.encoder["bn"], network.fc)
        assert network.fc[1].weight.dtype == network.unet.encoder["bn"].weight.dtype == torch.float32
        assert network.unet.intermediate.layers[0].conv[0].conv[1].running_var.dtype == torch.float32
        assert network.cnn.weight.dtype == PRECISIONS[half]
    else:
        assert isinstance(network, FCNF0)
        lower(network, PRECISIONS[half], last=network[-1])
    found = network(x)
    assert found.dtype == torch.float32
    assert 0 < difference(found, wanted) < 16 * ROUNDING[half]


def test_convolutions_that_come_out_wrong_are_refused(tmp_path: Path) -> None:
    make_ssl_folder(tmp_path / "enc", "Hubert", num_layers=1)  # of 8 channels a group
    with pytest.raises(ValueError, match=r"extract\.precision: .* groups of fewer than 16 channels.*; set fp32"):
        load_embedder(ExtractConfig(embedder_model=str(tmp_path / "enc"), precision="bf16"), "v2", CPU)


def test_float32_leaves_a_network_as_it_is() -> None:
    network = nn.Linear(2, 2)
    lower(network, torch.float32)
    assert not network._forward_hooks
    assert not network._forward_pre_hooks
    assert network.weight.dtype == torch.float32


@pytest.mark.parametrize("name", ["swift", "hybrid[swift+pm]"])
def test_a_tracker_that_cannot_says_so(name: str) -> None:
    with pytest.raises(ValueError, match=r"extract\.precision: got bf16 with extract\.f0_method swift.*set fp32"):
        load_f0(ExtractConfig(f0_method=name, precision="bf16"), CPU)
    method: F0Method = load_f0(ExtractConfig(f0_method="pm", precision="bf16"), CPU)  # has no network
    assert method(speech(1.0)[None]).any()


@pytest.mark.parametrize(
    ("capability", "half", "reason"),
    [
        (
            (7, 5),
            "bf16",
            r"Some GPU has compute capability 7\.5; bf16 needs 8\.0 .*set extract\.precision fp32",
        ),
        ((6, 1), "fp16", r"Some GPU has compute capability 6\.1; fp16 needs 7\.0"),
        ((7, 5), "fp16", ""),
        ((8, 0), "bf16", ""),
        ((6, 1), "fp32", ""),
    ],
)
def test_a_gpu_that_only_emulates_it_is_refused(
    monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int], half: str, reason: str
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: capability)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "Some GPU")
    if not reason:
        check_device(half, CUDA)
        return
    with pytest.raises(StageError, match=reason):
        check_device(half, CUDA)


def test_a_cpu_does_bf16_where_it_has_the_instructions(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(
        StageError, match=r"extract\.precision: fp16 is for GPUs, and on a CPU no faster than fp32; set"
    ):
        check_device("fp16", CPU)
    monkeypatch.setattr(precision, "_cpu_has_bf16", lambda: True)
    check_device("bf16", CPU)
    monkeypatch.setattr(precision, "_cpu_has_bf16", lambda: False)
    check_device("fp32", CPU)
    with pytest.raises(StageError, match=r"extract\.precision: this CPU has no instructions for bf16 \(AVX-512"):
        check_device("bf16", CPU)


def test_what_this_cpu_has_is_known() -> None:
    flags = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").is_file() else ""
    if "avx" in flags:
        assert precision._cpu_has_bf16() == ("avx512_bf16" in flags)
