"""Every vocoder that follows f0: upstream's keys and numbers, every rate, every gradient, one graph."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import NARROWEST, changed, golden_weights
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from rvc_dist.choices import VOCODERS
from rvc_dist.config import RATES, ConfigError, DataConfig, Recipe
from rvc_dist.features.hub import make_torchaudio_importable
from rvc_dist.models.modules import Conv1d, use_channels_last
from rvc_dist.models.refinegan import decimate
from rvc_dist.models.shape import GeneratorShape
from rvc_dist.models.state_dict import to_upstream
from rvc_dist.models.vocoders import Vocoder, vocoder_class

GOLDEN = Path(__file__).parents[1] / "golden"
SHAPES = json.loads((GOLDEN / "vocoder_shapes.json").read_text())


def decoder(vocoder: str, rate: int = 24000, version: str = "v2", **changes: object) -> tuple[Vocoder, GeneratorShape]:
    recipe = changed(Recipe(data=DataConfig(sample_rate=rate)), "model", vocoder=vocoder, version=version)
    shape = dataclasses.replace(GeneratorShape.from_recipe(recipe, 768, 1), **changes)
    return vocoder_class(shape)(shape), shape


def narrow(vocoder: str, rate: int = 24000, version: str = "v2", **changes: object) -> tuple[Vocoder, GeneratorShape]:
    widths = ("inter_channels", "upsample_initial_channel", "gin_channels")
    torch.manual_seed(0)
    return decoder(vocoder, rate, version, **{name: getattr(NARROWEST, name) for name in widths}, **changes)


def inputs(network: Vocoder, shape: GeneratorShape, num_frames: int) -> tuple[Tensor, Tensor, Tensor, list[Tensor]]:
    """Of two clips, half voiced."""
    f0 = torch.cat([torch.zeros(2, num_frames // 2), 100 + 300 * torch.rand(2, num_frames - num_frames // 2)], 1)
    noise = [torch.randn(2, *size) for size in network.noise_shapes(shape, num_frames)]
    return torch.randn(2, shape.inter_channels, num_frames), f0, torch.randn(2, shape.gin_channels, 1), noise


@pytest.mark.parametrize("vocoder", SHAPES)
@torch.no_grad()
def test_golden_vectors(vocoder: str) -> None:
    network, shape = decoder(vocoder, 40000)
    upstream = {f"dec.{key}": list(value.shape) for key, value in to_upstream(network.state_dict()).items()}
    assert upstream == SHAPES[vocoder]
    golden = {name: torch.from_numpy(value) for name, value in np.load(GOLDEN / f"vocoder_{vocoder}.npz").items()}
    silent = [torch.zeros(1, *size) for size in network.noise_shapes(shape, golden["z"].shape[2])]
    wave = golden_weights(network, "dec")(golden["z"], golden["f0"], golden["g"], silent)
    torch.testing.assert_close(wave, golden["wave"], rtol=0, atol=1e-3 * golden["wave"].std().item())


@pytest.mark.parametrize(
    ("vocoder", "version", "rate"),
    [
        (name, version, rate)
        for name, spec in VOCODERS.items()
        for version, rates in RATES.items()
        for rate, numbers in rates.items()
        if numbers.suits(spec) and (version == "v2" or numbers != RATES["v2"][rate])
    ],
)
def test_every_rate_has_its_length_and_every_parameter_its_gradient(vocoder: str, version: str, rate: int) -> None:
    network, shape = narrow(vocoder, rate, version)
    z, f0, speaker, noise = inputs(network, shape, 7)
    wave = network(z, f0, speaker, noise)
    assert (wave.shape, wave.dtype) == ((2, 1, 7 * RATES[version][rate].hop), torch.float32)
    assert wave.abs().max() <= 1
    wave.square().mean().backward()
    for name, parameter in network.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name
        assert parameter.grad.any(), name


@pytest.mark.parametrize("vocoder", VOCODERS)
def test_pitch_noise_and_layout_count_as_they_should(vocoder: str) -> None:
    network, shape = narrow(vocoder)
    z, f0, speaker, noise = inputs(network, shape, 6)
    with torch.no_grad():
        wave = network(z, f0, speaker, noise)
        assert not torch.equal(network(z, 2 * f0, speaker, noise), wave)
        for i, drawn in enumerate(noise):
            other = [*noise[:i], torch.randn_like(drawn), *noise[i + 1 :]]
            assert not torch.equal(network(z, f0, speaker, other), wave), i
        use_channels_last(network)
        torch.testing.assert_close(network(z, f0, speaker, noise), wave)
        with torch.autocast("cpu", torch.bfloat16):
            half = network(z, f0, speaker, noise)
    assert half.dtype == torch.float32
    torch.testing.assert_close(half, wave, rtol=0, atol=0.1)


@pytest.mark.parametrize("vocoder", VOCODERS)
def test_on_cuda_layers_keep_the_layout_and_nothing_is_on_the_host(vocoder: str) -> None:
    """Tensors on the host would keep CUDA from recording a graph."""

    class Devices(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            made = func(*args, **(kwargs or {}))
            found.update([made.device.type] if isinstance(made, Tensor) else [])
            return made

    found, layouts = set[str](), dict[str, bool]()
    with FakeTensorMode():
        with torch.device("cuda"):
            network, shape = decoder(vocoder, inter_channels=16, upsample_initial_channel=128, gin_channels=8)
            given = inputs(network, shape, 8)
        use_channels_last(network)
        for name, layer in network.named_modules():
            if isinstance(layer, Conv1d) and name != "conv_pre":
                layer.register_forward_hook(lambda _, x, y, name=name: layouts.update({name: x[0].stride(1) == 1}))
        with Devices():
            assert network(*given).device.type == "cuda"
    assert found == {"cuda"}
    assert len(layouts) > 70
    assert all(layouts.values()), layouts


@pytest.mark.slow
@pytest.mark.parametrize("vocoder", [name for name in VOCODERS if name != "hifi-gan"])
def test_a_vocoder_compiles_as_one_graph(vocoder: str) -> None:
    network, shape = narrow(vocoder, resblock_kernels=(3,), resblock_dilations=((1,),))
    given = inputs(network, shape, 6)
    compiled = torch.compile(network, fullgraph=True, dynamic=False, backend="aot_eager")
    plain, fused = network(*given), compiled(*given)
    fused.square().mean().backward()
    torch.testing.assert_close(fused, plain, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("vocoder", ["hifi-gan", *SHAPES])
@torch.no_grad()
def test_a_voice_from_random_numbers_hears_its_pitch(vocoder: str) -> None:
    """Its sine begins so loud that training cannot lose it before it is used: from 0 no gradient leads back."""
    network, shape = narrow(vocoder)
    noise = [torch.zeros(1, *size) for size in network.noise_shapes(shape, 20)]
    sources = [module for name, module in network.named_modules() if name == "m_source"]
    sine = sources[0](torch.full((1, 20), 200.0), noise[0])
    assert 0.85 < sine.abs().max() < 1


def test_rates_that_a_vocoder_has_no_layers_for_are_refused() -> None:
    recipe = Recipe(data=DataConfig(sample_rate=44100))
    with pytest.raises(ConfigError, match=r"^data\.sample_rate: got 44100 with vocoder refinegan.*expected 24000 or"):
        changed(recipe, "model", vocoder="refinegan")
    shape = GeneratorShape.from_recipe(recipe, 768, 1)
    with pytest.raises(ValueError, match="refinegan got 5 upsample_rates, expected 4"):
        vocoder_class(dataclasses.replace(shape, vocoder="refinegan"))


@pytest.mark.parametrize("vocoder", [name for name, spec in VOCODERS.items() if not spec.plain])
def test_vocoders_without_a_plain_form_follow_pitch(vocoder: str) -> None:
    with pytest.raises(ConfigError, match=rf"^model\.pitch_guidance: got False with vocoder {vocoder}, which cannot"):
        changed(Recipe(), "model", vocoder=vocoder, pitch_guidance=False)


def test_samples_are_left_out_as_by_torchaudio() -> None:
    make_torchaudio_importable()
    resample = pytest.importorskip("torchaudio").functional.resample
    x = torch.randn(2, 3, 120)
    for rate in (2, 12):
        settings = {"lowpass_filter_width": 64, "rolloff": 0.9475937167399596, "beta": 14.769656459379492}
        expected = resample(x, rate, 1, resampling_method="sinc_interp_kaiser", **settings)
        torch.testing.assert_close(decimate(x, rate), expected, rtol=0, atol=1e-5)
