"""The loudness of a recording for what was made of it, as the other tools' rms_mix_rate.

Shapes: S samples, C channels. Loudness is the RMS of a second, every half second; each channel has its own.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

import numpy as np

from rvc_dist.data.decode import Samples

LEAST_RMS = 1e-6
"""What is made and softer than this is silence, and stays so."""


class Loudness:
    """How loud a stream [S] or [S, C] is; 2 numbers a second and channel are kept of it."""

    def __init__(self, rate: int) -> None:
        self.half = rate // 2
        self._sums: list[Any] = []
        """Of squares, of each half second."""
        self._filled = 0

    def add(self, block: Samples) -> None:
        while len(block):
            part = block[: self.half - self._filled]
            if not self._filled:
                self._sums.append(0.0)
            self._sums[-1] = self._sums[-1] + np.square(part, dtype=np.float64).sum(axis=0)
            self._filled = (self._filled + len(part)) % self.half
            block = block[len(part) :]

    def rms(self, at: int) -> Any:
        """Around the beginning of half second `at`, of each channel; beyond the ends is silence."""
        return np.sqrt(sum(self._sums[max(0, at - 1) : at + 1]) / (2 * self.half))

    def noted(self, blocks: Iterator[Samples]) -> Iterator[Samples]:
        """`blocks`, each heard before it is given."""
        for block in blocks:
            self.add(block)
            yield block


def matched(made: Iterator[Samples], rate: int, source: Loudness, own_share: float) -> Iterator[Samples]:
    """`made` [S] or [S, C], turned up and down until its RMS is own^own_share * source^(1 - own_share).

    Between two half seconds both are interpolated. `source` has to be a second ahead of `made`, or at its end.
    """
    own, held = Loudness(rate), None
    for at, half in enumerate(itertools.chain(_halves(made, rate), [None]), -1):
        if half is not None:
            own.add(half)
        if held is not None:
            time = (np.arange(len(held)) / own.half).reshape(-1, *[1] * (held.ndim - 1))
            wanted, found = (one.rms(at) * (1 - time) + one.rms(at + 1) * time for one in (source, own))
            gain = (wanted / np.maximum(found, LEAST_RMS)) ** (1.0 - own_share)
            yield (held * gain).astype(np.float32)
        held = half


def _halves(blocks: Iterator[Samples], rate: int) -> Iterator[Samples]:
    """The same stream in half seconds; the last may be shorter."""
    rest: Samples | None = None
    for block in blocks:
        rest = block if rest is None else np.concatenate([rest, block])
        while len(rest) > rate // 2:
            yield rest[: rate // 2]
            rest = rest[rate // 2 :]
    if rest is not None:
        yield rest
