"""Conversion of any length: a stream is cut into windows, each converted with its context, and joined without clicks.

Shapes: S samples, C channels. Positions are counted in frames of 10 ms.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from typing import TypeAlias

import numpy as np

from rvc_dist.config import F0_HOP, F0_PER_S, FEATURE_RATE
from rvc_dist.data.decode import Samples, Wave
from rvc_dist.train.conversion import CONTEXT

WindowConverter: TypeAlias = Callable[[Wave, int], Wave]
"""A window [S] at 16 kHz, and the frame at which it begins behind its context -> its samples at the voice's rate."""
FADE = 4
"""Frames over which neighbouring windows are cross-faded."""
SEARCH_SHARE = 0.25
"""The join is put at the quietest place of this last part of a window."""


def convert(
    converter: WindowConverter, blocks: Iterator[Samples], rate: int, window: int, num_samples: int | None = None
) -> Iterator[Samples]:
    """Convert a stream of 16 kHz blocks into a stream of blocks at the voice's rate, of the same total length.

    Blocks are [S], or [S, C]: each channel is converted, with the same noise and the same joins. `window` is in frames;
    `num_samples` is that length where it is known better than 16 kHz tell it: to the sample of the voice's rate.

    Each window is converted with a second of context on both sides; windows meet where the input is quietest and are
    cross-faded there, so that no join clicks. At most two windows are in memory.
    """
    per_frame = rate // F0_PER_S
    context, fade = CONTEXT * per_frame, FADE * per_frame
    half = fade // 2
    ramp = (0.5 - 0.5 * np.cos(np.pi * (np.arange(fade) + 0.5) / fade)).astype(np.float32)
    tail: Samples | None = None
    at = done = 0
    for piece, length, last in windows(blocks, window):
        size = length * rate // FEATURE_RATE
        if last and num_samples is not None and abs(num_samples - done - size) < per_frame:
            size = num_samples - done
        done += size
        made = _all_channels(converter, piece, at)[context - half : context + size + half]  # a half fade more
        at += length // F0_HOP
        fade_in = ramp.reshape(-1, *[1] * (made.ndim - 1))
        if tail is None:
            made = made[half:]
        else:
            yield tail * (1 - fade_in) + made[:fade] * fade_in
            made = made[fade:]
        if last:
            yield made[:-half]
        else:
            yield made[:-fade]
            tail = made[-fade:]


def _all_channels(converter: WindowConverter, piece: Samples, at: int) -> Samples:
    """A window [S] or [S, C], converted; one that is silent or alike in all channels is converted once."""
    if piece.ndim == 1:
        return converter(piece, at)
    different = np.unique(piece, axis=1, return_inverse=True)
    made = [converter(np.ascontiguousarray(wave), at) for wave in different[0].T]
    return np.stack([made[i] for i in different[1].ravel()], axis=1)


def windows(blocks: Iterator[Samples], window: int) -> Iterator[tuple[Samples, int, bool]]:
    """Cut a stream of 16 kHz blocks [S] or [S, C] into pieces of at most `window` frames, with context around each.

    Yields (piece with CONTEXT frames of context on both sides, silence beyond the ends; samples that it stands for;
    whether it is the last).
    """
    context, most = CONTEXT * F0_HOP, window * F0_HOP
    first = next(blocks)
    buffer = silence = np.zeros((context, *first.shape[1:]), dtype=np.float32)
    for block in itertools.chain([first], blocks, [silence]):
        # buffer[0] is always `context` samples before the next window.
        buffer = np.concatenate([buffer, block])
        while len(buffer) - 2 * context > most:
            cut = quietest_frame(buffer[context : context + most]) * F0_HOP
            yield buffer[: cut + 2 * context], cut, False
            buffer = buffer[cut:]
    # Whole frames: the encoders and the pitch tracker count in them.
    length = len(buffer) - 2 * context
    yield np.concatenate([buffer, silence[: -len(buffer) % F0_HOP]]), length, True


def quietest_frame(wave: Samples) -> int:
    """The 10 ms frame in the last part of `wave` before and after which a fade would meet the least energy.

    At least one fade is left on either side of it.
    """
    energy = np.square(wave[: len(wave) // F0_HOP * F0_HOP]).reshape(len(wave) // F0_HOP, -1).sum(axis=1)
    # faded[i] is the energy of the frames i .. i + FADE - 1, which a cut at frame i + FADE // 2 fades over.
    faded = np.convolve(energy, np.ones(FADE), mode="valid")
    first = max(FADE, int(len(energy) * (1 - SEARCH_SHARE)))
    candidates = faded[first - FADE // 2 : len(energy) - FADE - FADE // 2 + 1]
    return first + int(np.argmin(candidates))
