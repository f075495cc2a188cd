from __future__ import annotations

import builtins
from pathlib import Path
from typing import get_args, get_type_hints

import numpy as np
import pytest
import soundfile
import torch
from torch import Tensor

import rvc_dist
from rvc_dist.config import ExtractConfig
from rvc_dist.features.f0 import (
    F0_METHODS,
    F0Method,
    check_f0_method,
    coarse_pitch,
    load_f0,
    local_average_hz,
    viterbi,
)

CPU = torch.device("cpu")
RATE = 16000
SPEECH = Path(rvc_dist.__file__).parent / "demo_voice" / "voice" / "000.flac"
LIGHT = ("crepe-tiny", "fcpe", "pyin")


@pytest.fixture(scope="module")
def methods() -> dict[str, F0Method]:
    return {name: load_f0(ExtractConfig(f0_method=name), CPU) for name in LIGHT}


def voice(base_hz: float, duration_s: float = 1.5, slope_hz_per_s: float = 0.0) -> tuple[Tensor, Tensor]:
    """A harmonic tone with vibrato and a little noise, and its f0 at samples 0, 160, 320, ..."""
    t = np.arange(int(duration_s * RATE)) / RATE
    vibrato = 0.0 if slope_hz_per_s else 0.02
    f0 = base_hz * (1.0 + vibrato * np.sin(2 * np.pi * 5.0 * t)) + slope_hz_per_s * t
    phase = 2 * np.pi * np.cumsum(f0) / RATE
    wave = sum(0.1 / k * np.sin(k * phase) for k in range(1, 12))
    wave += 0.002 * np.random.default_rng(0).standard_normal(len(t))
    return torch.from_numpy(wave).float(), torch.from_numpy(f0[::160][: len(t) // 160]).float()


def cents(f0: Tensor, reference: Tensor) -> Tensor:
    voiced = (f0 > 0) & (reference > 0)
    return 1200.0 * torch.log2(f0[voiced] / reference[voiced])


def check_accuracy(method: F0Method, base_hz: float) -> None:
    wave, truth = voice(base_hz)
    f0 = method(wave[None])[0]
    assert f0.shape == truth.shape
    assert (f0 > 0).float().mean() > 0.95
    assert (cents(f0, truth).abs() < 20.0).float().mean() > 0.95


@pytest.mark.parametrize("name", LIGHT)
@pytest.mark.parametrize("base_hz", [110.0, 330.0])
def test_known_pitch_within_20_cents(methods: dict[str, F0Method], name: str, base_hz: float) -> None:
    check_accuracy(methods[name], base_hz)


@pytest.mark.slow
def test_crepe_full_known_pitch() -> None:
    check_accuracy(load_f0(ExtractConfig(f0_method="crepe"), CPU), 180.0)


@pytest.mark.parametrize("name", LIGHT)
def test_frame_t_is_centred_at_sample_160_t(methods: dict[str, F0Method], name: str) -> None:
    wave, truth = voice(120.0, slope_hz_per_s=100.0)
    f0 = methods[name](wave[None])[0]
    lead_s = (f0 - truth)[f0 > 0].median() / 100.0
    assert lead_s.abs() < 0.005  # half a frame


@pytest.mark.parametrize("name", LIGHT)
def test_silence_is_unvoiced(methods: dict[str, F0Method], name: str) -> None:
    assert torch.equal(methods[name](torch.zeros(2, 8000)), torch.zeros(2, 50))
    half = torch.cat([torch.zeros(8000), voice(200.0, 0.5)[0]])
    f0 = methods[name](half[None])[0]
    assert not f0[:40].any()
    assert (f0[60:] > 0).float().mean() > 0.9


@pytest.mark.parametrize("name", LIGHT)
def test_batch_equals_one_at_a_time(methods: dict[str, F0Method], name: str) -> None:
    waves = torch.stack([voice(hz, 0.5)[0] for hz in (100.0, 250.0)])
    together = methods[name](waves)
    assert torch.equal(together, torch.cat([methods[name](row[None]) for row in waves]))


@pytest.mark.parametrize("name", LIGHT)
def test_same_clip_gives_same_bits(methods: dict[str, F0Method], name: str) -> None:
    # torchcrepe's own decoders draw dither from NumPy's global generator.
    wave = voice(150.0, 0.4)[0][None]
    assert torch.equal(methods[name](wave), methods[name](wave))


@pytest.mark.parametrize("name", LIGHT)
@pytest.mark.parametrize("num_samples", [1600, 5555])
def test_length_is_samples_over_hop(methods: dict[str, F0Method], name: str, num_samples: int) -> None:
    f0 = methods[name](voice(200.0)[0][None, :num_samples])
    assert f0.shape == (1, num_samples // 160)
    assert f0.dtype == torch.float32
    assert not f0.requires_grad


@pytest.mark.parametrize("name", LIGHT)
def test_range_is_kept(name: str) -> None:
    method = load_f0(ExtractConfig(f0_method=name, f0_min=150.0, f0_max=300.0), CPU)
    sweep = voice(80.0, 1.0, slope_hz_per_s=400.0)[0]
    f0 = method(sweep[None])[0]
    voiced = f0[f0 > 0]
    assert len(voiced) > 20
    assert voiced.min() >= 150.0
    assert voiced.max() <= 300.0


def test_methods_agree_on_speech(methods: dict[str, F0Method]) -> None:
    wave = torch.from_numpy(soundfile.read(SPEECH, dtype="float32", frames=3 * RATE)[0])[None]
    f0 = {name: method(wave)[0] for name, method in methods.items()}
    for name in ("fcpe", "pyin"):
        assert ((f0[name] > 0) == (f0["crepe-tiny"] > 0)).float().mean() > 0.85
        assert (cents(f0[name], f0["crepe-tiny"]).abs() < 50.0).float().mean() > 0.85


def test_unknown_method_lists_the_known() -> None:
    for call in (check_f0_method, lambda name: load_f0(ExtractConfig(f0_method=name), CPU)):
        with pytest.raises(ValueError, match=r"extract.f0_method: got 'harvest', expected one of rmvpe, crepe"):
            call("harvest")
    for name in F0_METHODS:
        check_f0_method(name)


def test_missing_package_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def without_fcpe(name: str, *args: object, **kwargs: object) -> object:
        if name == "torchfcpe":
            raise ModuleNotFoundError(f"No module named {name!r}")
        return real(name, *args, **kwargs)  # type: ignore[arg-type]

    monkeypatch.setattr(builtins, "__import__", without_fcpe)
    with pytest.raises(ImportError, match="pip install torchfcpe"):
        load_f0(ExtractConfig(f0_method="fcpe"), CPU)


def test_coarse_pitch_by_hand() -> None:
    # mel(50) = 77.755, mel(1100) = 1064.408; 440 Hz: mel 549.639, (549.639 - 77.755) * 254 / 986.653 + 1 = 122.48
    f0 = torch.tensor([[0.0, 50.0, 440.0, 1100.0, 2000.0, 30.0]])
    coarse = coarse_pitch(f0)
    assert coarse.dtype == torch.int64
    assert coarse.tolist() == [[1, 1, 122, 255, 255, 1]]


def test_local_average_of_a_symmetric_peak_is_its_centre() -> None:
    salience = torch.zeros(2, 360)
    salience[0, 199:202] = torch.tensor([0.5, 1.0, 0.5])
    salience[1, :2] = torch.tensor([1.0, 1.0])  # the window hangs over the edge
    hz = local_average_hz(salience, torch.tensor([200, 0]))
    expected = [10.0 * 2.0 ** ((20.0 * bin_ + 1997.3794084376191) / 1200.0) for bin_ in (200.0, 0.5)]
    torch.testing.assert_close(hz, torch.tensor(expected))


def test_viterbi_prefers_a_smooth_path() -> None:
    score = np.zeros((5, 360), np.float32)
    score[:, 100] = 0.8
    score[2, 300] = 1.0  # an octave error: a higher score, but out of reach
    assert viterbi(score).tolist() == [100] * 5
    score[:, 100] = -np.inf
    assert 100 not in viterbi(score)


def test_the_recipe_knows_every_method() -> None:
    assert set(get_args(get_type_hints(ExtractConfig)["f0_method"])) == set(F0_METHODS)
