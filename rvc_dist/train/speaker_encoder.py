"""Whose voice a wave is: the speaker encoder whose weights the optional package resemblyzer brings.

Of the package only the weights are read: its code needs a compiler to install, and a SciPy of years ago.

S samples at 16 kHz, T frames of 10 ms, P partial utterances.
"""

from __future__ import annotations

import importlib.util
import pickle
from functools import lru_cache
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rvc_dist.config import FEATURE_RATE
from rvc_dist.models.spectral import mel_bands, spectrogram_at_edges
from rvc_dist.workspace import StageError

PACKAGE = "resemblyzer"
NUM_MELS, WIDTH, NUM_LAYERS = 40, 256, 3
WINDOW, HOP = 400, 160
PARTIAL_FRAMES, STEP_FRAMES, LEAST_FRAMES = 160, 77, 120
"""Of a partial utterance, from one to the next, and of the last one what may not be missing."""
LEAST_RMS = 10.0 ** (-30 / 20)
"""Quieter waves are made so loud: 30 dB below full scale."""


class SpeakerEncoder(nn.Module):
    """An LSTM that was trained to tell speakers apart (GE2E, Wan et al. 2018, arXiv 1710.10467), as resemblyzer has it:
    [S] -> [WIDTH], of norm 1. Two of the same speaker have a product near 1."""

    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(NUM_MELS, WIDTH, NUM_LAYERS, batch_first=True)
        self.linear = nn.Linear(WIDTH, WIDTH)

    def forward(self, wave: Tensor) -> Tensor:
        rms = float(wave.square().mean().sqrt())
        wave = wave * max(1.0, LEAST_RMS / max(rms, 1e-9))
        power = spectrogram_at_edges(wave[None], WINDOW, HOP).square()
        mel = mel_bands(power, FEATURE_RATE, WINDOW, NUM_MELS)[0].mT  # [T, NUM_MELS], no logarithm
        num_partials = 1 + max(0, len(mel) - LEAST_FRAMES) // STEP_FRAMES
        reach = (num_partials - 1) * STEP_FRAMES + PARTIAL_FRAMES
        padded = F.pad(mel, (0, 0, 0, max(0, reach - len(mel))))[:reach]
        partials = padded.unfold(0, PARTIAL_FRAMES, STEP_FRAMES).mT  # [P, PARTIAL_FRAMES, NUM_MELS]
        _, (hidden, _) = self.lstm(partials)
        voices = F.normalize(self.linear(hidden[-1]).relu(), dim=1)
        return F.normalize(voices.mean(0), dim=0)


def weights_file() -> Path | None:
    """Of the package, where it is installed; nothing of it is run."""
    found = importlib.util.find_spec(PACKAGE)
    return None if found is None or found.origin is None else Path(found.origin).with_name("pretrained.pt")


@lru_cache(maxsize=2)
def speaker_encoder(device: torch.device) -> SpeakerEncoder | None:
    """The encoder on `device`, or None where the package is not installed.

    Raises:
        StageError: the package is there, and its weights are not.
    """
    path = weights_file()
    if path is None:
        return None
    with torch.device("meta"):  # weights that are overwritten are not drawn: training's random numbers stay as they are
        encoder = SpeakerEncoder()
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)["model_state"]
        encoder.load_state_dict({name: state[name] for name in encoder.state_dict()}, assign=True)
    except (OSError, pickle.UnpicklingError, EOFError, LookupError, TypeError, RuntimeError) as error:
        raise StageError(
            f"{path} does not hold the weights of a speaker encoder ({error!r}):",
            f"install the package again, pip install --no-deps --force-reinstall {PACKAGE}, or uninstall it",
        ) from error
    return encoder.eval().requires_grad_(False).to(device)
