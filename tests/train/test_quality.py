"""Distances of two waves whose right values are known without measuring."""

import math

import numpy as np
import pytest
import torch
from helpers import tiny_recipe
from scipy.fft import dct

from rvc_dist.train import quality
from rvc_dist.train.quality import BROKEN, Ear, Quality, mean_quality, mel_cepstra, mel_cepstral_distance

RATE = 24000


@pytest.fixture(scope="module")
def ear(tmp_path_factory) -> Ear:
    return Ear(tiny_recipe(tmp_path_factory.mktemp("run")), torch.device("cpu"))


def voice(hz: float, seconds: float = 1.0, gain: float = 0.1) -> torch.Tensor:
    """Twenty harmonics over faint noise."""
    times = torch.arange(round(seconds * RATE)) / RATE
    noise = torch.randn(len(times), generator=torch.Generator().manual_seed(1))
    harmonics = sum(torch.sin(2 * math.pi * k * hz * times) / k for k in range(1, 21))
    return gain * (harmonics + 0.02 * noise)


def test_the_same_wave_is_at_no_distance(ear):
    assert ear.compare(ear.hear(voice(150.0)), voice(150.0)) == Quality(0, 0, 0, 0, 0, pytest.approx(1.0))


def test_a_gain_of_6_db_is_a_loudness_error_of_6_db_and_nothing_else(ear):
    found = ear.compare(ear.hear(voice(150.0)), voice(150.0) * 10 ** (6 / 20))
    assert found.loudness_db == pytest.approx(6.0, abs=0.01)
    assert found.mel_distance == pytest.approx(6 / 20, rel=0.02), "of log10 magnitudes"
    assert found[1:4] == pytest.approx((0.0, 0.0, 0.0), abs=0.1)


@pytest.mark.parametrize("cents", [100, -50])
def test_a_shift_in_pitch_is_measured_in_cents(ear, cents):
    found = ear.compare(ear.hear(voice(150.0)), voice(150.0 * 2 ** (cents / 1200)))
    assert found.f0_cents == pytest.approx(abs(cents), abs=2)
    assert found.voicing_error == 0.0


def test_a_voice_that_stops_halfway_is_half_a_voicing_error_and_no_error_of_pitch(ear):
    half = voice(150.0, gain=0.3)
    half[RATE // 2 :] = 0.001 * torch.randn(RATE - RATE // 2, generator=torch.Generator().manual_seed(0))
    found = ear.compare(ear.hear(voice(150.0, gain=0.3)), half)
    assert found.voicing_error == pytest.approx(0.5, abs=0.05)
    assert found.f0_cents < 10


def test_mel_cepstra_are_those_of_scipy_and_their_distance_is_in_db():
    real, fake = np.random.default_rng(0).standard_normal((2, 80, 5))
    ours = [mel_cepstra(torch.from_numpy(mel).float()) for mel in (real, fake)]
    theirs = [dct(mel, axis=0)[1:14] / 80 for mel in (real, fake)]
    np.testing.assert_allclose(ours[0], theirs[0], atol=1e-6)
    wanted = 10 / np.log(10) * np.sqrt(2 * ((theirs[0] - theirs[1]) ** 2).sum(0))
    np.testing.assert_allclose(mel_cepstral_distance(*ours), wanted, rtol=1e-5)
    # A ripple over the bands of 3 dB in the root of the mean square: 20 log10 of the magnitudes.
    ripple = math.sqrt(2) * 3 * math.log(10) / 20 * np.cos(np.pi * 4 * (np.arange(80) + 0.5) / 80)
    rippled = mel_cepstra(torch.from_numpy(real + ripple[:, None]).float())
    np.testing.assert_allclose(mel_cepstral_distance(ours[0], rippled), 3.0, rtol=1e-4)


def test_the_a_curve_is_that_of_the_standard():
    table = {10**1.5: -39.4, 100: -19.1, 1000: 0.0, 10**3.4: 1.3, 10**3.9: -1.1}  # by their exact frequencies
    gains = 10 * quality.a_weighting(torch.tensor([*table])).log10()
    np.testing.assert_allclose(gains, [*table.values()], atol=0.06)


def test_voices_are_alike_by_the_overlap_of_their_cepstra():
    cepstra = torch.randn(13, 1000, generator=torch.Generator().manual_seed(0))
    cepstra = (cepstra - cepstra.mean(1, keepdim=True)) / cepstra.std(1, keepdim=True)
    assert quality.spread_similarity(cepstra, cepstra) == pytest.approx(1.0)
    assert quality.spread_similarity(cepstra, cepstra + 2) == pytest.approx(math.exp(-(2**2) / 8), rel=1e-3)
    assert quality.spread_similarity(cepstra, 3 * cepstra) == pytest.approx(math.sqrt(2 * 3 / (1 + 9)), rel=1e-3)


def test_silence_is_compared_by_what_it_has(ear):
    silence, speech = torch.zeros(RATE), voice(150.0)
    both = ear.compare(ear.hear(silence), silence)
    assert (both.mel_distance, both.voicing_error) == (0.0, 0.0)
    assert all(map(math.isnan, (both.mcd_db, both.f0_cents, both.loudness_db, both.similarity)))
    mute = ear.compare(ear.hear(speech), silence)
    assert mute.mel_distance > 0.3
    assert mute.mcd_db > 10
    assert mute.loudness_db == pytest.approx(quality.RANGE_DB, abs=5), "no level is infinitely far"
    assert (mute.voicing_error, mute.similarity) == (1.0, 0.0)
    assert math.isnan(mute.f0_cents)


@pytest.mark.parametrize("samples", [1, 100, 2000])
def test_clips_shorter_than_the_windows_are_measured(ear, samples):
    short = voice(150.0)[:samples]
    assert ear.compare(ear.hear(short), short).mel_distance == 0.0
    assert ear.compare(ear.hear(short), 0.5 * short).mel_distance > 0


@pytest.mark.parametrize("value", [math.nan, math.inf, 1e30])
def test_a_wave_that_is_not_finite_is_at_an_infinite_distance(ear, value):
    broken = voice(150.0)
    broken[1000] = value
    assert ear.compare(ear.hear(voice(150.0)), broken) == BROKEN


def test_a_mean_is_of_those_that_have_the_number_and_hangs_on_no_order():
    rng = np.random.default_rng(0)
    every = [Quality(*row, math.nan, 1.0) for row in rng.standard_normal((50, 4)).tolist()]
    every[3] = every[3]._replace(f0_cents=math.nan, loudness_db=7.0)
    mean = mean_quality(every)
    assert mean == pytest.approx(mean_quality([every[i] for i in rng.permutation(50)]), rel=0, nan_ok=True)
    assert mean.loudness_db == 7.0
    assert mean.f0_cents == pytest.approx(np.mean([q.f0_cents for i, q in enumerate(every) if i != 3]))
    assert math.isnan(mean_quality([Quality(1, 1, math.nan, 1, 1, 1)] * 2).f0_cents)
    assert mean_quality([BROKEN, every[0]]).mel_distance == math.inf
