"""The STFT and the mel filters."""

from __future__ import annotations

import math
from pathlib import Path

import librosa
import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from rvc_dist.config import RATES
from rvc_dist.models.spectral import (
    MULTISCALE_MELS,
    log_mel,
    mel_bank,
    mel_from_spectrogram,
    multiscale_mels,
    spectrogram,
)

GOLDEN = Path(__file__).parents[1] / "golden"


@pytest.mark.parametrize("rate", [40000, 48000])
def test_golden_tone(rate: int) -> None:
    golden = np.load(GOLDEN / f"v2_{rate}.npz")
    n_fft, hop, num_mels = RATES["v2"][rate][:3]
    spec = spectrogram(torch.from_numpy(golden["tone"]), n_fft, hop)
    mel = mel_from_spectrogram(spec, rate, n_fft, num_mels)
    assert spec.shape == (1, n_fft // 2 + 1, 100)
    np.testing.assert_allclose(spec.mean(), golden["tone_spec_mean"], rtol=0, atol=1e-4)
    # The vectors' name says column 100; they are of frame 50.
    np.testing.assert_allclose(spec[0, :, 50], golden["tone_spec_col100"], rtol=0, atol=1e-4)
    np.testing.assert_allclose(mel[0, :, 50], golden["tone_mel_col100"], rtol=0, atol=1e-4)


@pytest.mark.parametrize("rate", RATES["v2"])
def test_one_frame_a_hop(rate: int) -> None:
    n_fft, hop, num_mels = RATES["v2"][rate][:3]
    wave = 0.1 * torch.randn(2, 37 * hop)
    assert log_mel(wave, rate, n_fft, hop, num_mels).shape == (2, num_mels, 37)
    assert spectrogram(wave[:, :-1], n_fft, hop).shape[2] == 36


def test_silence_is_the_floor() -> None:
    silence = torch.zeros(1, 4800)
    torch.testing.assert_close(spectrogram(silence, 1024, 240), torch.full((1, 513, 20), 1e-3))
    mel = mel_from_spectrogram(torch.zeros(1, 513, 3), 24000, 1024, 80)
    torch.testing.assert_close(mel, torch.full((1, 80, 3), math.log(1e-5)))


def test_mel_filters_are_slaney_up_to_half_the_rate() -> None:
    spec = torch.rand(1, 513, 4)
    bank = librosa.filters.mel(sr=24000, n_fft=1024, n_mels=80, fmin=0, fmax=12000)
    torch.testing.assert_close(mel_from_spectrogram(spec, 24000, 1024, 80).exp(), torch.from_numpy(bank) @ spec)


@pytest.mark.filterwarnings("ignore:Empty filters")
@pytest.mark.parametrize("rate", [16000, 22050, 24000, 32000, 40000, 44100, 48000])
def test_the_mel_bank_is_librosas_to_the_bit(rate: int) -> None:
    """Those of losses and of what generators hear, RMVPE's (a HTK scale), and mfcc's (triangles of one height)."""
    for n_fft, num_mels in ((64, 5), (512, 40), (1024, 80), (1024, 128), (2048, 125), (4096, 480)):
        ours = mel_bank(rate, n_fft, num_mels), mel_bank(rate, n_fft, num_mels, 30.0, htk=True)
        ours = (*ours, mel_bank(rate, n_fft, num_mels, 20.0, htk=True, area=False))
        settings = {}, {"fmin": 30.0, "htk": True}, {"fmin": 20.0, "htk": True, "norm": None}
        for bank, more in zip(ours, settings, strict=True):
            theirs = librosa.filters.mel(sr=rate, n_fft=n_fft, n_mels=num_mels, **more)
            assert (bank.dtype, bank.tobytes()) == (theirs.dtype, theirs.tobytes())


@pytest.mark.parametrize(("n_fft", "hop"), [(64, 16), (64, 63), (64, 441), (16, 480)])
def test_windows_are_centred_on_their_hop(n_fft: int, hop: int) -> None:
    """A click in the middle of hop 3 is loudest in frame 3, also where a window is shorter than its hop."""
    wave = torch.zeros(1, 8 * hop)
    wave[0, 3 * hop + hop // 2] = 1
    spec = spectrogram(wave, n_fft, hop)
    assert spec.shape[2] == 8
    assert spec.sum((0, 1)).argmax() == 3
    assert spec[0, 0, 3].item() == pytest.approx(1, abs=0.01)


@pytest.mark.parametrize("rate", RATES["v2"])
def test_multiscale_shapes(rate: int) -> None:
    segment = RATES["v2"][rate].segment
    wave = 0.1 * torch.randn(2, 1, segment)
    mels = multiscale_mels(wave, rate)
    assert mels.shape == (2, sum(MULTISCALE_MELS), segment // (rate // 100))
    assert torch.equal(mels, multiscale_mels(wave.squeeze(1), rate))


def test_multiscale_windows_and_base() -> None:
    """Scale 20 at 48 kHz: window 256 (the power of two at or below 16 * 20), hop 480, base 10."""
    wave = 0.1 * torch.randn(1, 9600)
    expected = mel_from_spectrogram(spectrogram(wave, 256, 480), 48000, 256, 20) / math.log(10)
    torch.testing.assert_close(multiscale_mels(wave, 48000)[:, 15:35], expected)


def test_float32_under_autocast() -> None:
    wave = 0.1 * torch.randn(1, 4800)
    expected = log_mel(wave, 48000, 1024, 480, 80)
    with torch.autocast("cpu", torch.bfloat16):
        mel = log_mel(wave, 48000, 1024, 480, 80)
    assert mel.dtype == torch.float32
    assert torch.equal(mel, expected)
    assert log_mel(wave.bfloat16(), 48000, 1024, 480, 80).dtype == torch.float32


def test_filters_made_under_inference_mode_serve_training() -> None:
    with torch.inference_mode():
        log_mel(torch.randn(1, 4800), 48000, 512, 480, 61)
    wave = torch.randn(1, 4800, requires_grad=True)
    log_mel(wave, 48000, 512, 480, 61).sum().backward()
    assert wave.grad is not None
    assert wave.grad.isfinite().all()


class Tf32Seen(TorchDispatchMode):
    """Notes for each matrix product whether TF32 was allowed."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[bool] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.overloadpacket in (torch.ops.aten.mm, torch.ops.aten.bmm):
            self.seen.append(torch.backends.cuda.matmul.allow_tf32)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("fast", [False, True])
def test_mel_bands_and_their_gradients_are_never_in_tf32(monkeypatch: pytest.MonkeyPatch, fast: bool) -> None:
    """As on CUDA, on the CPU."""
    monkeypatch.setattr(torch.Tensor, "is_cuda", True)
    spec = torch.rand(2, 513, 7, requires_grad=True)
    torch.backends.cuda.matmul.allow_tf32 = fast
    try:
        with Tf32Seen() as products:
            mel_from_spectrogram(spec, 48000, 1024, 80).sum().backward()
        assert torch.backends.cuda.matmul.allow_tf32 is fast
    finally:
        torch.backends.cuda.matmul.allow_tf32 = False
    assert len(products.seen) >= 2
    assert not any(products.seen)
    monkeypatch.undo()
    again = spec.detach().requires_grad_()
    mel_from_spectrogram(again, 48000, 1024, 80).sum().backward()
    torch.testing.assert_close(spec.grad, again.grad)
