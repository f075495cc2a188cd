"""Meters that never make the host wait for the device, and the tracker that writes TensorBoard."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor


class Meter:
    """Running means of scalar tensors, kept on the device until they are read."""

    def __init__(self) -> None:
        self._sums: dict[str, Tensor] = {}
        self._counts: dict[str, int] = {}

    def update(self, values: Mapping[str, Tensor]) -> None:
        for name, value in values.items():
            detached = value.detach().float()
            self._sums[name] = self._sums[name] + detached if name in self._sums else detached
            self._counts[name] = self._counts.get(name, 0) + 1

    def read(self, accelerator: Accelerator) -> dict[str, float]:
        """The means since the last read, over all ranks; the one place where the host waits for the device."""
        if not self._sums:
            return {}
        means = torch.stack([total / self._counts[name] for name, total in self._sums.items()])
        reduced = accelerator.reduce(means, reduction="mean").tolist()
        names = list(self._sums)
        self._sums, self._counts = {}, {}
        return dict(zip(names, reduced, strict=True))


class PhaseTimer:
    """Time spent in the parts of a step. On CUDA by events, which are read only with `read`."""

    def __init__(self, device: torch.device) -> None:
        self._cuda = device.type == "cuda"
        self._spans: list[tuple[str, Any, Any]] = []
        self.num_steps = 0

    def _now(self) -> Any:
        if not self._cuda:
            return time.perf_counter()
        event: Any = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        event.record()
        return event

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        begin = self._now()
        yield
        self._spans.append((name, begin, self._now()))

    def read(self) -> dict[str, float]:
        """Seconds a step in each part, since the last read."""
        if self._cuda:
            torch.cuda.synchronize()
        totals: dict[str, float] = {}
        for name, begin, end in self._spans:
            seconds = begin.elapsed_time(end) / 1000 if self._cuda else end - begin
            totals[name] = totals.get(name, 0.0) + seconds
        steps = max(1, self.num_steps)
        self._spans, self.num_steps = [], 0
        return {name: total / steps for name, total in totals.items()}


class Tracker:
    """TensorBoard on the main rank, nothing on the others.

    `purge_step` hides what an earlier run wrote at or after the step that this one continues from.
    """

    def __init__(self, folder: Path, purge_step: int, enabled: bool) -> None:
        self._writer: Any = None
        if enabled:
            from torch.utils.tensorboard.writer import SummaryWriter

            self._writer = SummaryWriter(str(folder), purge_step=purge_step)

    def scalars(self, values: Mapping[str, float], step: int) -> None:
        if self._writer:
            for name, value in values.items():
                self._writer.add_scalar(name, value, step)

    def mel_picture(self, name: str, mels: list[Tensor], step: int) -> None:
        """Log-mel spectrograms [M, T] above one another, low frequencies at the bottom."""
        if self._writer:
            stacked = torch.cat([m.float().cpu().flip(0) for m in mels])
            low, high = stacked.min(), stacked.max()
            self._writer.add_image(name, ((stacked - low) / (high - low).clamp_min(1e-6)).unsqueeze(0), step)

    def sound(self, name: str, wave: Tensor, rate: int, step: int) -> None:
        """A wave [S] in -1..1."""
        if self._writer:
            self._writer.add_audio(name, wave.float().cpu().clamp(-1, 1).unsqueeze(0), step, sample_rate=rate)

    def flush(self) -> None:
        if self._writer:
            self._writer.flush()

    def close(self) -> None:
        if self._writer:
            self._writer.close()
