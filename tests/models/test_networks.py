"""The networks: the same numbers, keys and shapes as upstream RVC."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers import golden_weights
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from rvc_dist.choices import DISCRIMINATORS
from rvc_dist.config import RATES, DataConfig, ModelConfig, Recipe
from rvc_dist.models import modules
from rvc_dist.models.discriminator import MultiPeriodDiscriminator, PeriodDiscriminator
from rvc_dist.models.encoders import RelativeAttention
from rvc_dist.models.generator import Generator, GeneratorOutput, Noise
from rvc_dist.models.modules import (
    Conv1d,
    ConvTranspose1d,
    channels_last,
    frame_mask,
    slice_frames,
    slice_samples,
    use_channels_last,
)
from rvc_dist.models.shape import GeneratorShape
from rvc_dist.models.spectral import spectrogram
from rvc_dist.models.state_dict import from_upstream, to_upstream, upstream_order
from rvc_dist.models.vocoders import sine_excitation
from rvc_dist.train.losses import (
    discriminator_loss,
    feature_matching_loss,
    generator_adversarial_loss,
    kl_loss,
    multiscale_mel_loss,
)

ATTENTION_WINDOW = 10
GOLDEN = Path(__file__).parents[1] / "golden"
SHAPES = json.loads((GOLDEN / "state_dict_shapes.json").read_text())
NARROW = ModelConfig(
    inter_channels=16,
    hidden_channels=16,
    filter_channels=32,
    num_layers=2,
    upsample_initial_channel=32,
    gin_channels=8,
    discriminator_channels=64,
)


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """Layers this narrow gain nothing from threads, and lose much when another process has the other core."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def no_noise(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "randn", lambda *shape, generator=None, **options: torch.zeros(*shape, **options))
    monkeypatch.setattr(torch, "rand", lambda *shape, generator=None, **options: torch.zeros(*shape, **options))


@pytest.fixture(scope="module")
def full_discriminator() -> nn.Module:
    return golden_weights(MultiPeriodDiscriminator(DISCRIMINATORS["v2"]))


def shape_of(version: str, rate: int, model: ModelConfig | None = None, content_channels: int = 768) -> GeneratorShape:
    recipe = Recipe(data=DataConfig(sample_rate=rate), model=replace(model or ModelConfig(), version=version))
    return GeneratorShape.from_recipe(recipe, content_channels, num_speakers=109)


def narrow_shape(rate: int = 48000, **changes: object) -> GeneratorShape:
    return replace(shape_of("v2", rate, NARROW, content_channels=12), num_speakers=2, **changes)


def random_inputs(shape: GeneratorShape, num_frames: int, batch: int = 2) -> dict[str, Tensor | None]:
    pitched = shape.pitch_guidance
    return {
        "content": torch.randn(batch, num_frames, shape.content_channels),
        "lengths": torch.arange(num_frames, num_frames - 3 * batch, -3),
        "coarse": torch.randint(1, 256, (batch, num_frames)) if pitched else None,
        "f0": torch.rand(batch, num_frames) * 300 if pitched else None,
        "spec": torch.rand(batch, shape.spec_channels, num_frames),
        "speaker": torch.arange(batch) % shape.num_speakers,
        "noise": Noise.draw(shape, range(batch), num_frames, torch.device("cpu")),
    }


@pytest.mark.parametrize("rate", [40000, 48000])
@pytest.mark.usefixtures("no_noise")
@torch.no_grad()
def test_golden_vectors(rate: int, full_discriminator: nn.Module) -> None:
    golden = {name: torch.from_numpy(value) for name, value in np.load(GOLDEN / f"v2_{rate}.npz").items()}
    generator = golden_weights(Generator(shape_of("v2", rate)))
    inputs = [golden[name] for name in ("phone", "lengths", "pitch", "f0")]

    noise = Noise.draw(generator.shape, [0, 0], golden["spec"].shape[2], torch.device("cpu"))
    out = generator(*inputs, golden["spec"], golden["sid"], noise)
    got = {name: getattr(out, name) for name in ("z_p", "m_p", "logs_p", "m_q", "logs_q")}
    got |= {"infer_wave": generator.infer(*inputs, golden["sid"]), "train_wave": out.wave, "slice_start": out.start}
    real, fake = full_discriminator(golden["real"]), full_discriminator(golden["train_wave"])
    got["loss_disc"] = discriminator_loss(real.scores, fake.scores)
    got["loss_gen"] = generator_adversarial_loss(fake.scores)
    got["loss_fm"] = feature_matching_loss(real.features, fake.features)
    got["loss_kl"] = kl_loss(out.z_p, out.logs_q, out.m_p, out.logs_p, out.mask)
    for name, value in got.items():
        torch.testing.assert_close(value, golden[name], rtol=0, atol=1e-4, msg=lambda text, n=name: f"{n}: {text}")


@pytest.mark.parametrize("name", SHAPES)
def test_keys_and_shapes_are_upstream(name: str) -> None:
    kind, version, *rest = name.split("_")
    with torch.device("meta"):
        if kind == "D":
            network: nn.Module = MultiPeriodDiscriminator(DISCRIMINATORS[version])
        else:
            # The 44.1 kHz reference has a speaker embedding of its own width.
            model = ModelConfig(pitch_guidance="nopitch" not in rest, gin_channels=SHAPES[name]["emb_g.weight"][1])
            network = Generator(shape_of(version, int(rest[0]), model, 256 if version == "v1" else 768))
    shapes = {key: list(value.shape) for key, value in to_upstream(network.state_dict()).items()}
    assert shapes == SHAPES[name]
    assert upstream_order(shapes, "applio") == list(SHAPES[name])  # in which optimizers number the parameters
    if kind == "G" and "nopitch" not in rest:
        layers = list(dict.fromkeys(key.split(".")[1] for key in upstream_order(shapes, "rvc") if "dec." in key))
        assert layers == ["m_source", "noise_convs", "conv_pre", "ups", "resblocks", "conv_post", "cond"]


def test_both_spellings_load() -> None:
    source, target = Generator(narrow_shape()), Generator(narrow_shape())
    ours, upstream = source.state_dict(), to_upstream(source.state_dict())
    assert any(key.endswith("original1") for key in ours)
    assert not any("parametrizations" in key for key in upstream)
    for spelling in (ours, upstream):
        for value in target.state_dict().values():
            value.zero_()
        target.load_state_dict(from_upstream(spelling))
        assert all(torch.equal(value, ours[key]) for key, value in target.state_dict().items())


def test_export_config_round_trip() -> None:
    shape = narrow_shape(32000)
    config = json.loads(json.dumps(shape.to_export_config()))
    assert len(config) == 18
    assert config[:2] == [513, 32]
    assert config[9] == "1"
    assert config[-3:] == [2, 8, 32000]
    keywords = {"version": "v2", "f0": True, "content_channels": 12, "vocoder": "HiFi-GAN"}
    assert GeneratorShape.from_export_config(config, **keywords) == shape
    with pytest.raises(ValueError, match="17 entries, expected 18"):
        GeneratorShape.from_export_config(config[:-1], **keywords)
    with pytest.raises(ValueError, match=r"config\.resblock: got '2', expected .1."):
        GeneratorShape.from_export_config([*config[:9], "2", *config[10:]], **keywords)
    with pytest.raises(ValueError, match="22050"):
        GeneratorShape.from_export_config([*config[:-1], 22050], **keywords)


def test_unknown_names_are_refused() -> None:
    with pytest.raises(ValueError, match=r"vocoder: got 'wavernn'.*expected hifi-gan with pitch"):
        Generator(narrow_shape(vocoder="wavernn"))


@pytest.mark.parametrize(("version", "rate"), [(version, rate) for version in RATES for rate in RATES[version]])
def test_shape_of_every_rate(version: str, rate: int) -> None:
    shape, numbers = shape_of(version, rate), RATES[version][rate]
    assert shape.hop == numbers.hop
    assert shape.segment_samples == numbers.segment


@pytest.mark.parametrize(("rate", "pitch_guidance"), [*((rate, True) for rate in RATES["v2"]), (32000, False)])
def test_narrow_networks_train_a_step(rate: int, pitch_guidance: bool) -> None:
    torch.manual_seed(0)
    shape = narrow_shape(rate, pitch_guidance=pitch_guidance)
    generator = Generator(shape)
    discriminator = MultiPeriodDiscriminator(DISCRIMINATORS["v2"], NARROW.discriminator_channels)
    num_frames = shape.segment_frames + 5
    inputs = random_inputs(shape, num_frames)
    wave = 0.1 * torch.randn(2, 1, num_frames * shape.hop)
    inputs["spec"] = spectrogram(wave.squeeze(1), 2 * (shape.spec_channels - 1), shape.hop)
    assert inputs["spec"].shape[2] == num_frames

    out = generator(**inputs)
    real = slice_samples(wave, out.start, shape.segment_frames, shape.hop)
    judged = discriminator(torch.cat([real, out.wave]))
    real_features, fake_features = ([[f.chunk(2)[i] for f in layers] for layers in judged.features] for i in (0, 1))
    loss = multiscale_mel_loss(real, out.wave, rate) + kl_loss(out.z_p, out.logs_q, out.m_p, out.logs_p, out.mask)
    loss = loss + generator_adversarial_loss([score.chunk(2)[1] for score in judged.scores])
    loss = loss + feature_matching_loss(real_features, fake_features)
    loss.backward()
    for network in (generator, discriminator):
        for name, parameter in network.named_parameters():
            if name.endswith("conv_k.bias"):  # softmax does not see it
                continue
            assert parameter.grad is not None, name
            assert parameter.grad.isfinite().all(), name
    before = generator.dec.conv_post.weight.clone()
    torch.optim.AdamW(generator.parameters(), 1e-3).step()
    assert not torch.equal(before, generator.dec.conv_post.weight)


def test_slices_start_at_random_valid_frames() -> None:
    x = torch.arange(2 * 3 * 10.0).reshape(2, 3, 10)
    cut = slice_frames(x, torch.tensor([0, 4]), 5)
    assert torch.equal(cut[0], x[0, :, 0:5])
    assert torch.equal(cut[1], x[1, :, 4:9])
    wave = torch.arange(2 * 40.0).reshape(2, 1, 40)
    samples = slice_samples(wave, torch.tensor([0, 4]), 5, hop=4)
    assert torch.equal(samples[1], wave[1, :, 16:36])

    torch.manual_seed(0)
    shape = narrow_shape(segment_frames=6)
    generator = Generator(shape)
    inputs = random_inputs(shape, 12, batch=80) | {"lengths": torch.tensor([12, 5] * 40)}
    starts = generator(**inputs).start
    assert set(starts[::2].tolist()) == set(range(7))
    assert starts[1::2].eq(0).all(), "a clip shorter than the segment starts at its first frame"


def test_frame_mask() -> None:
    assert frame_mask(torch.tensor([0, 2, 3]), 3).tolist() == [[[0, 0, 0]], [[1, 1, 0]], [[1, 1, 1]]]


@pytest.mark.parametrize("num_frames", [1, 4, ATTENTION_WINDOW, 3 * ATTENTION_WINDOW])
def test_relative_attention_is_its_definition(num_frames: int) -> None:
    torch.manual_seed(0)
    attention = RelativeAttention(8, num_heads=2, dropout=0.0, window=ATTENTION_WINDOW)
    x, valid = torch.randn(1, 8, num_frames), max(1, num_frames - 2)
    mask = frame_mask(torch.tensor([valid]), num_frames)
    query, key, value = (
        conv(x).reshape(2, 4, num_frames) for conv in (attention.conv_q, attention.conv_k, attention.conv_v)
    )
    expected = torch.zeros(2, 4, num_frames)
    offsets = range(-ATTENTION_WINDOW, ATTENTION_WINDOW + 1)
    rel_k, rel_v = (dict(zip(offsets, emb[0], strict=True)) for emb in (attention.emb_rel_k, attention.emb_rel_v))
    for head in range(2):
        for i in range(num_frames):
            keys = [key[head, :, j] + rel_k.get(j - i, 0) for j in range(valid)]
            values = [value[head, :, j] + rel_v.get(j - i, 0) for j in range(valid)]
            weights = torch.stack([query[head, :, i] @ k / 2 for k in keys]).softmax(0)
            expected[head, :, i] = sum(w * v for w, v in zip(weights, values, strict=True))
    torch.testing.assert_close(attention(x, mask), attention.conv_o(expected.reshape(1, 8, num_frames)))


def test_padding_changes_nothing() -> None:
    torch.manual_seed(0)
    shape = narrow_shape(segment_frames=4)
    generator = Generator(shape).eval()
    inputs = random_inputs(shape, 9, batch=1)
    padded = {
        name: F.pad(value, (0, 0) * (name == "content") + (0, 7))
        if name in ("content", "coarse", "f0", "spec")
        else value
        for name, value in inputs.items()
    }
    noise = inputs["noise"]
    padded["noise"] = noise._replace(posterior=F.pad(noise.posterior, (0, 7)))
    short, long = generator(**inputs), generator(**padded)
    for name in ("m_p", "logs_p", "m_q", "logs_q"):
        torch.testing.assert_close(getattr(long, name)[:, :, :9], getattr(short, name))
        assert getattr(long, name)[:, :, 9:].eq(0).all()


def test_flow_inverts_itself() -> None:
    torch.manual_seed(0)
    flow = Generator(narrow_shape()).flow
    for parameter in flow.parameters():
        nn.init.normal_(parameter, 0.0, 0.3)
    mask, voice, z = frame_mask(torch.tensor([7, 5]), 7), torch.randn(2, 8, 1), torch.randn(2, 16, 7)
    z_p = flow(z * mask, mask, voice)
    assert (z_p - z * mask).abs().max() > 0.1
    torch.testing.assert_close(flow(z_p, mask, voice, reverse=True), z * mask, rtol=1e-4, atol=1e-4)


def test_sine_keeps_its_phase_for_minutes() -> None:
    """The last half second of five minutes at 440 Hz is the sine it should be, and silence is silent."""
    rate, hop, num_frames = 48000, 480, 30000
    f0 = torch.full((1, num_frames), 440.0)
    f0[0, 100:200] = 0
    sine = sine_excitation(f0, torch.zeros(1, num_frames, hop), rate)
    assert sine[0, 100 * hop : 200 * hop].eq(0).all()
    seconds = (torch.arange(num_frames * hop, dtype=torch.float64)[-rate // 2 :] + 1 - 100 * hop) / rate
    expected = 0.1 * torch.sin(2 * torch.pi * 440 * seconds)
    torch.testing.assert_close(sine[0, -rate // 2 :].double(), expected, rtol=0, atol=1e-5)


def test_noise_of_a_clip_is_its_seeds_alone() -> None:
    shape = narrow_shape()
    both, one = (Noise.draw(shape, seeds, 40, torch.device("cpu")) for seeds in ([5, 6], [6]))
    for pair, single in zip((*both[:2], *both.vocoder), (*one[:2], *one.vocoder), strict=True):
        assert torch.equal(pair[1:], single)
        assert not torch.equal(pair[0], pair[1])
    assert Noise.draw(narrow_shape(pitch_guidance=False), [5], 40, torch.device("cpu")).vocoder == ()


def test_the_phase_is_summed_on_the_host_where_the_device_has_no_float64():
    """As MPS, on which a tensor in float64 is an error."""

    class Float64(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            made = func(*args, **(kwargs or {}))
            devices.update([made.device.type] if getattr(made, "dtype", None) == torch.float64 else [])
            return made

    for kind, in_float64 in (("mps", False), ("cuda", True)):
        devices: set[str] = set()
        with FakeTensorMode(), Float64():
            f0, noise = torch.empty(2, 5, device=kind), torch.empty(2, 5, 480, device=kind)
            assert sine_excitation(f0, noise, 48000).device.type == kind
        assert ("cpu" in devices) is not in_float64
        assert (kind in devices) is in_float64


def test_sine_noise_is_louder_where_unvoiced() -> None:
    torch.manual_seed(0)
    f0 = torch.tensor([[0.0, 200.0]]).repeat_interleave(100, 1)
    noise = sine_excitation(f0, torch.randn(1, 200, 480), 48000)[0, : 100 * 480]
    assert noise.std().item() == pytest.approx(0.1 / 3, rel=0.02)


def test_autocast_keeps_what_needs_float32() -> None:
    torch.manual_seed(0)
    shape = narrow_shape()
    generator, discriminator = Generator(shape), MultiPeriodDiscriminator(DISCRIMINATORS["v2"], 64)
    inputs = random_inputs(shape, shape.segment_frames + 4)
    dtypes = []
    generator.dec.m_source.register_forward_hook(lambda _module, _inputs, output: dtypes.append(output.dtype))
    with torch.autocast("cpu", torch.bfloat16):
        out = generator(**inputs)
        scores = discriminator(out.wave).scores
        wave = generator.infer(*(inputs[name] for name in ("content", "lengths", "coarse", "f0", "speaker")))
    assert dtypes == [torch.float32, torch.float32]
    assert out.wave.dtype == wave.dtype == torch.float32
    for tensor in (wave, *out, *scores):
        assert tensor.isfinite().all()
    for tensor in (out.z_p, out.m_p, out.logs_p, out.m_q, out.logs_q):
        assert tensor.dtype == torch.float32


@pytest.mark.slow
@pytest.mark.parametrize(("pitch_guidance", "backend"), [(True, "aot_eager"), (False, "eager")])
def test_generator_compiles_as_one_graph(pitch_guidance: bool, backend: str) -> None:
    torch.manual_seed(0)
    once = {"num_layers": 1, "resblock_kernels": (3,), "resblock_dilations": ((1, 3),)}
    shape = narrow_shape(24000, pitch_guidance=pitch_guidance, **once)
    generator = Generator(shape)
    compiled = torch.compile(generator, fullgraph=True, backend=backend)
    inputs = random_inputs(shape, shape.segment_frames + 6)
    outputs: list[GeneratorOutput] = [generator(**inputs), compiled(**inputs)]
    outputs[1].wave.sum().backward()
    for plain, fused in zip(*outputs, strict=True):
        torch.testing.assert_close(fused, plain, rtol=1e-4, atol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["v1", "v3"])
def test_discriminator_compiles_as_one_graph(kind: str) -> None:
    torch.manual_seed(0)
    discriminator = MultiPeriodDiscriminator(DISCRIMINATORS[kind], 64)
    wave = torch.randn(2, 1, 4000)
    compiled = torch.compile(discriminator, fullgraph=True, backend="eager")
    for plain, fused in zip(discriminator(wave).scores, compiled(wave).scores, strict=True):
        torch.testing.assert_close(fused, plain)


def test_reflection_is_the_same_with_deterministic_kernels() -> None:
    ends = []
    for deterministic in (False, True):
        torch.use_deterministic_algorithms(deterministic)
        try:
            wave = torch.randn(2, 1, 50, generator=torch.Generator().manual_seed(0)).requires_grad_()
            outputs = [modules.reflected(wave, left, right) for left, right in ((0, 0), (7, 3), (0, 49), (49, 0))]
            sum((x * torch.arange(x.shape[2])).sum() for x in outputs).backward()
        finally:
            torch.use_deterministic_algorithms(False)
        ends.append([*outputs, wave.grad])
    assert all(torch.equal(*pair) for pair in zip(*ends, strict=True))


@pytest.mark.parametrize("kind", ["v3", "v2-mrd"])
def test_discriminators_over_spectrograms(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    spec = DISCRIMINATORS[kind]
    discriminator = MultiPeriodDiscriminator(spec, 64)
    wave = torch.randn(2, 1, 4800, requires_grad=True)
    output = discriminator(wave)
    assert len(output.scores) == len(spec.score_weights) == 1 + len(spec.periods) + 3
    assert spec.score_weights[-3:] == (0.25, 0.25, 0.25)
    torch.stack([score.sum() for score in output.scores]).sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in discriminator.parameters())
    # The one of 1024 points, hop 120 and window 600, by its definition: frame 7 sees 600 samples in its middle.
    first = discriminator.discriminators[-3]
    frame = F.pad(wave, (452, 452), mode="reflect")[0, 0, 7 * 120 + 212 :][:600]
    seen = first.fold(wave)
    assert seen.shape == (2, 1, 513, 40)
    torch.testing.assert_close(seen[0, 0, :, 7], torch.fft.rfft(F.pad(frame, (212, 212))).abs(), rtol=1e-4, atol=1e-4)
    assert [tuple(layer.shape[2:]) for layer in output.features[-3]] == [(513, n) for n in (40, 20, 10, 5, 5, 5)]
    assert output.scores[-3].shape == (2, 513 * 5)
    # Gradients of a batch are the mean of those of its halves, but for rounding.
    first.double()
    monkeypatch.setattr("rvc_dist.models.discriminator.rectangular_spectrogram", lambda x, *_: x.reshape(-1, 48, 100))
    double = wave.detach().double()
    halves = [torch.autograd.grad(first(w)[0].square().mean(), list(first.parameters())) for w in double.split(1)]
    whole = torch.autograd.grad(first(double)[0].square().mean(), list(first.parameters()))
    for gradient, *parts in zip(whole, *halves, strict=True):
        torch.testing.assert_close(gradient, sum(parts) / 2, rtol=1e-9, atol=1e-12)
    first.float()
    monkeypatch.undo()
    silence = torch.zeros(1, 1, 4800, requires_grad=True)
    first(silence)[0].sum().backward()
    assert silence.grad.isfinite().all()


def test_folded_period_discriminator_equals_its_2d_form() -> None:
    torch.manual_seed(0)
    discriminator = PeriodDiscriminator(3, 64)
    wave = torch.randn(2, 1, 1000)
    score, features = discriminator(wave)
    x = F.pad(wave, (0, 2), mode="reflect").reshape(2, 1, 334, 3)
    for i, conv in enumerate([*discriminator.convs, discriminator.conv_post]):
        x = F.conv2d(x, conv.weight, conv.bias, conv.stride, conv.padding)
        x = x if conv is discriminator.conv_post else F.leaky_relu(x, 0.1)
        folded = features[i].reshape(2, 3, *features[i].shape[1:]).permute(0, 2, 3, 1)
        torch.testing.assert_close(folded, x)
    assert score.shape == (2, x[0].numel())


@pytest.mark.parametrize(
    ("ours", "plain"),
    [
        (Conv1d(6, 4, 3, stride=2, padding=2, dilation=2, groups=2), nn.Conv1d(6, 4, 3, 2, 2, 2, 2)),
        (ConvTranspose1d(6, 4, 5, stride=3, padding=1), nn.ConvTranspose1d(6, 4, 5, 3, 1)),
    ],
)
def test_convolutions_keep_the_layout_and_the_numbers(ours: nn.Module, plain: nn.Module) -> None:
    torch.manual_seed(0)
    plain.load_state_dict(ours.state_dict())
    x = torch.randn(2, 6, 20)
    expected = plain(x)
    for layout in (x, channels_last(x)):
        y = ours(layout)
        torch.testing.assert_close(y, expected)
        assert y.stride(1) == (y.shape[2] if layout is x else 1)
    assert torch.equal(channels_last(x), x)


@pytest.mark.parametrize(("kernel_size", "dilation"), [(3, 1), (5, 3), (1, 1)])
def test_gradients_of_weights_are_the_same_in_pieces(
    kernel_size: int, dilation: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    conv = Conv1d(6, 4, kernel_size, padding=dilation * (kernel_size // 2), dilation=dilation)
    x, pulled = channels_last(torch.randn(2, 6, 40)).requires_grad_(), torch.randn(2, 4, 40)
    wanted = (x, conv.weight, conv.bias)
    whole = torch.autograd.grad(conv(x), wanted, pulled)
    monkeypatch.setattr(modules, "LONGEST_PIECE", 15)  # 3 pieces do not fit, 4 of 10 samples do
    y = conv(x)
    assert "InPieces" in str(y.grad_fn.next_functions)
    torch.testing.assert_close(torch.autograd.grad(y, wanted, pulled), whole)
    monkeypatch.setattr(modules, "LONGEST_PIECE", 23)
    for samples in (23, 59):  # short, and of no length that fits
        y = conv(channels_last(torch.randn(2, 6, samples)))
        assert "InPieces" not in str(y.grad_fn.next_functions)


def test_networks_compute_channels_last_when_asked() -> None:
    torch.manual_seed(0)
    generator, discriminator = Generator(narrow_shape()), MultiPeriodDiscriminator(DISCRIMINATORS["v2"], 64)
    wave = torch.randn(2, 1, 4000)
    keys = list(discriminator.state_dict())
    expected = discriminator(wave)
    use_channels_last(discriminator)
    seen = discriminator(wave)
    torch.testing.assert_close(seen, expected)
    assert list(discriminator.state_dict()) == keys
    for features in seen.features:
        assert all(x.stride(1) == 1 for x in features[1:-1])
    use_channels_last(discriminator, on=False)
    assert discriminator(wave).features[0][1].stride(1) > 1
    use_channels_last(generator)
    assert generator.dec.channels_last


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradients_repeat_bit_by_bit(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    generator, discriminator = Generator(narrow_shape()), MultiPeriodDiscriminator(DISCRIMINATORS["v2"], 64)
    inputs = random_inputs(generator.shape, generator.shape.segment_frames + 4)
    runs = []
    for _ in range(2):
        torch.manual_seed(1)
        with torch.autocast("cpu", dtype, enabled=dtype == torch.bfloat16):
            scores = discriminator(generator(**inputs).wave).scores
        loss = generator_adversarial_loss(scores)
        networks = (generator.dec, discriminator)
        runs.append(torch.autograd.grad(loss, [p for network in networks for p in network.parameters()]))
    assert all(torch.equal(first, second) for first, second in zip(*runs, strict=True))
