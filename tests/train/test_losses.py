"""The losses, by hand-worked values."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any
from unittest.mock import patch

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from rvc_dist.choices import DISCRIMINATORS
from rvc_dist.models.spectral import MULTISCALE_MELS, log_mel, mel_from_spectrogram, multiscale_mels
from rvc_dist.train.losses import (
    discriminator_loss,
    feature_matching_loss,
    generator_adversarial_loss,
    kl_loss,
    mel_loss,
    multiscale_mel_loss,
    stft_loss,
)


def test_adversarial_losses() -> None:
    real = [torch.tensor([[1.0, 0.5]]), torch.tensor([[0.0]])]
    fake = [torch.tensor([[0.0, 0.5]]), torch.tensor([[2.0]])]
    # (0 + 0.25) / 2 + (0 + 0.25) / 2, then 1 + 4
    assert discriminator_loss(real, fake).item() == pytest.approx(5.25)
    # (1 + 0.25) / 2, then 1
    assert generator_adversarial_loss(fake).item() == pytest.approx(1.625)
    # The later ones of v3 count a quarter.
    assert discriminator_loss(real, fake, (1.0, 0.25)).item() == pytest.approx(0.25 + 5 / 4)
    assert generator_adversarial_loss(fake, (1.0, 0.25)).item() == pytest.approx(0.625 + 1 / 4)
    assert DISCRIMINATORS["v3"].score_weights == (1.0,) * 5 + (0.25,) * 4
    assert set(DISCRIMINATORS["v2"].score_weights) == {1.0}


def test_feature_matching_loss() -> None:
    real = [[torch.tensor([1.0, 2.0]), torch.tensor([0.0])], [torch.tensor([[3.0]])]]
    fake = [[torch.tensor([0.0, 4.0]), torch.tensor([0.5])], [torch.tensor([[1.0]])]]
    # 2 * (1.5 + 0.5 + 2)
    assert feature_matching_loss(real, fake).item() == pytest.approx(8.0)


def test_feature_matching_teaches_only_the_fake() -> None:
    real, fake = torch.ones(3, requires_grad=True), torch.zeros(3, requires_grad=True)
    feature_matching_loss([[real]], [[fake]]).backward()
    assert real.grad is None
    assert fake.grad is not None
    assert fake.grad.sum().item() == pytest.approx(-2.0)


def test_kl_loss() -> None:
    """Two channels, three frames, of which two are valid."""
    mask = torch.tensor([[[1.0, 1.0, 0.0]]])
    z_p = torch.tensor([[[1.0, 0.0, 9.0], [2.0, 0.0, 9.0]]])
    zeros = torch.zeros_like(z_p)
    logs_p = torch.full_like(z_p, math.log(2))
    # Every valid entry gives log 2 - 0.5; the squares 1 and 4 give 0.5 * 5 / 4.
    total = 4 * (math.log(2) - 0.5) + 0.625
    assert kl_loss(z_p, zeros, zeros, logs_p, mask).item() == pytest.approx(total / 2)
    assert kl_loss(z_p, zeros, zeros, logs_p, mask, num_frames=5.0).item() == pytest.approx(total / 5)
    assert kl_loss(z_p, zeros, zeros, logs_p, mask, num_frames=torch.tensor(4.0)).item() == pytest.approx(total / 4)


def test_kl_loss_is_zero_on_average_when_the_posterior_is_the_prior() -> None:
    torch.manual_seed(0)
    mean, log_deviation = torch.randn(4, 64, 100), 0.3 * torch.randn(4, 64, 100)
    z_p = mean + torch.randn_like(mean) * log_deviation.exp()
    kl = kl_loss(z_p, log_deviation, mean, log_deviation, torch.ones(4, 1, 100))
    assert kl.item() / 64 == pytest.approx(0, abs=0.02)


def test_mel_losses() -> None:
    """Ten times the amplitude is one unit of log10 in every band that is above the floors."""
    torch.manual_seed(0)
    wave = 0.5 * torch.randn(2, 1, 8640)
    numbers = {"rate": 24000, "n_fft": 1024, "hop": 240, "num_mels": 80}
    assert mel_loss(wave, wave, **numbers).item() == 0
    assert multiscale_mel_loss(wave, wave, 24000).item() == 0
    assert mel_loss(wave, 10 * wave, **numbers).item() == pytest.approx(math.log(10), rel=1e-3)

    quiet = 0.3 * wave
    expected = (log_mel(wave.squeeze(1), 24000, 1024, 240, 80) - log_mel(quiet.squeeze(1), 24000, 1024, 240, 80)).abs()
    assert mel_loss(wave, quiet, **numbers).item() == pytest.approx(expected.mean().item())
    distance = (multiscale_mels(wave, 24000) - multiscale_mels(quiet, 24000)).abs()
    scales = [scale.mean().item() for scale in distance.split(MULTISCALE_MELS, dim=1)]
    assert multiscale_mel_loss(wave, quiet, 24000).item() == pytest.approx(sum(scales) / 8)


def test_losses_are_float32() -> None:
    scores = [torch.full((1, 3), 0.3, dtype=torch.bfloat16)]
    wave = torch.randn(1, 1, 8640)
    latent, mask = torch.randn(1, 2, 3).bfloat16(), torch.ones(1, 1, 3)
    with torch.autocast("cpu", torch.bfloat16):
        losses = (
            discriminator_loss(scores, scores),
            generator_adversarial_loss(scores),
            feature_matching_loss([scores], [scores]),
            kl_loss(latent, latent, latent, latent, mask),
            mel_loss(wave, wave.bfloat16(), rate=24000, n_fft=1024, hop=240, num_mels=80),
            multiscale_mel_loss(wave, wave.bfloat16(), 24000),
            stft_loss(wave, wave.bfloat16()),
        )
    assert {loss.dtype for loss in losses} == {torch.float32}


def test_stft_loss() -> None:
    """Per clip, so that it does not matter which clips a rank has together; silence is not divided by."""
    torch.manual_seed(0)
    wave = 0.5 * torch.randn(2, 1, 8640)
    assert stft_loss(wave, wave).item() == 0
    # Half the amplitude: |R - F| / |R| is a half, and the logarithms are log 2 apart.
    assert stft_loss(wave, 0.5 * wave).item() == pytest.approx(0.5 + math.log(2), rel=1e-3)
    fake = wave * torch.tensor([0.5, 1.0]).reshape(2, 1, 1)
    clips = [stft_loss(wave[i : i + 1], fake[i : i + 1]).item() for i in range(2)]
    assert stft_loss(wave, fake).item() == pytest.approx(sum(clips) / 2)
    # By torch's own STFT, at one resolution.
    resolutions = [(1024, 120, 600)]
    with patch("rvc_dist.train.losses.STFT_RESOLUTIONS", resolutions):
        padded = [F.pad(w, (452, 452), mode="reflect")[:, 0] for w in (wave, fake)]
        window = torch.hann_window(600)
        bins = [torch.stft(w, 1024, 120, 600, window, center=False, return_complex=True).abs() for w in padded]
        real, made = ((b.square() + 1e-6).sqrt() for b in bins)
        convergence = ((real - made).flatten(1).norm(dim=1) / real.flatten(1).norm(dim=1)).mean()
        expected = convergence + (real.log() - made.log()).abs().mean()
        assert stft_loss(wave, fake).item() == pytest.approx(expected.item(), rel=1e-5)
    assert stft_loss(torch.zeros_like(wave), 0.01 * wave).item() < 10


def test_gradients_of_the_stft_loss_are_not_made_of_rounding_noise() -> None:
    """A tone has bins with nothing in them: what of them a rounding changes must not rule the gradients."""
    torch.manual_seed(0)
    time = torch.arange(8640) / 24000
    real, fake = (level * torch.sin(2 * math.pi * 200 * time).reshape(1, 1, -1) for level in (0.3, 0.02))

    def gradient(wave: Tensor) -> Tensor:
        wave = wave.clone().requires_grad_()
        return torch.autograd.grad(stft_loss(real, wave), wave)[0]

    exact, rounded = gradient(fake), gradient(fake * (1 + 1e-7 * torch.randn_like(fake)))
    assert (exact - rounded).norm() < 1e-4 * exact.norm()


def test_mel_frames_at_the_edges_of_hops() -> None:
    """As `torch.stft` has them, in other tools of RVC; every frame half a hop earlier than in the middle, and one more.

    The losses are alike, their gradients are not.
    """
    torch.manual_seed(0)
    real, fake = 0.5 * torch.randn(2, 2, 1, 8640)
    window = torch.hann_window(1024)
    bins = torch.stft(real[:, 0], 1024, 240, window=window, center=True, pad_mode="reflect", return_complex=True)
    mels = mel_from_spectrogram((bins.abs().square() + 1e-6).sqrt(), 24000, 1024, 80) / math.log(10)
    at_edges = multiscale_mels(real, 24000, at_edges=True)
    first = sum(MULTISCALE_MELS[: MULTISCALE_MELS.index(80)])
    torch.testing.assert_close(at_edges[:, first : first + 80], mels, rtol=1e-4, atol=1e-5)
    assert at_edges.shape[2] == multiscale_mels(real, 24000).shape[2] + 1 == 37
    fake.requires_grad_()
    losses = [multiscale_mel_loss(real, fake, 24000, at_edges) for at_edges in (False, True)]
    assert losses[0].item() == pytest.approx(losses[1].item(), rel=0.05)
    middle, edge = (torch.autograd.grad(loss, fake)[0].flatten() for loss in losses)
    assert 0.1 < F.cosine_similarity(middle, edge, dim=0) < 0.9


@pytest.mark.parametrize(
    "loss",
    [partial(multiscale_mel_loss, rate=24000), partial(multiscale_mel_loss, rate=24000, at_edges=True), stft_loss],
)
def test_spectral_losses_have_finite_gradients_in_silence(loss: Callable[[Tensor, Tensor], Tensor]) -> None:
    for real in (torch.randn(1, 1, 8640), torch.zeros(1, 1, 8640)):
        fake = torch.zeros(1, 1, 8640, requires_grad=True)
        loss(real, fake).backward()
        assert fake.grad is not None
        assert fake.grad.isfinite().all()


def test_mel_losses_transform_both_waves_in_one_pass() -> None:
    """Eight scales have seven windows; a launch for each wave, on its own, would be sixteen transforms."""
    ffts = []

    class Count(TorchDispatchMode):  # type: ignore[no-untyped-call]
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            ffts.extend([func] * (func is torch.ops.aten._fft_r2c.default))
            return func(*args, **(kwargs or {}))

    real, fake = torch.randn(2, 2, 1, 8640, requires_grad=True).unbind()
    with Count():
        multiscale_mel_loss(real, fake, 24000)
        assert len(ffts) == 7
        loss = mel_loss(real, fake, rate=24000, n_fft=1024, hop=240, num_mels=80)
        assert len(ffts) == 8
    grad_real, grad_fake = torch.autograd.grad(loss, (real, fake))
    assert not grad_real.any()
    assert grad_fake.any()
