"""Meters that never make the host wait for the device."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor

from rvc_dist.runtime.heartbeat import Heartbeat
from rvc_dist.screen import AUDIO, ProgressBar, duration, short
from rvc_dist.train.progress import Progress
from rvc_dist.train.trackers import Tracker

logger = logging.getLogger(__name__)


class Meter:
    """Running means of scalar tensors, kept on the device until they are read."""

    def __init__(self) -> None:
        self._names: tuple[str, ...] = ()
        self._sums: Tensor | None = None
        """[N + 1]: the sum of every value, and last the count of steps."""

    def update(self, values: Mapping[str, Tensor], good: Tensor) -> None:
        """Add one step's values, scalars; nothing when `good` [] is false. With other names the means begin anew."""
        row = torch.stack([*(v.detach().float() for v in values.values()), torch.ones_like(good, dtype=torch.float32)])
        row, names = row.where(good, 0.0), tuple(values)
        if self._sums is None or names != self._names:  # a run's losses become others where D joins
            self._names, self._sums = names, row
        else:
            self._sums = self._sums + row

    def read(self, accelerator: Accelerator) -> dict[str, float]:
        """The means since the last read, over all ranks; empty without a good step. The host waits for the device."""
        if self._sums is None:
            return {}
        sums, self._sums = self._sums, None
        *reduced, count = accelerator.reduce(torch.cat([sums[:-1] / sums[-1], sums[-1:]]), reduction="mean").tolist()
        return dict(zip(self._names, reduced, strict=True)) if count else {}

    def state(self, accelerator: Accelerator) -> dict[str, Any]:
        """What a checkpoint keeps, plain data: the sums of every rank, for a run that stops between two reads."""
        if self._sums is None:
            return {"names": [], "ranks": []}
        return {"names": list(self._names), "ranks": accelerator.gather(self._sums.unsqueeze(0)).tolist()}

    def load(self, state: Mapping[str, Any], rank: int, num_ranks: int, device: torch.device) -> None:
        """Go on from `state`; another number of ranks goes on from the mean over the ranks that there were."""
        self._names, self._sums = tuple(state["names"]), None
        if self._names:
            ranks = torch.tensor(state["ranks"], device=device)
            self._sums = ranks[rank] if len(ranks) == num_ranks else ranks.mean(0)


class PhaseTimer:
    """Time spent in the parts of a step. On CUDA by events, which are read only with `read`."""

    def __init__(self, device: torch.device, heartbeat: Heartbeat | None = None) -> None:
        self._cuda = device.type == "cuda"
        self._heartbeat = heartbeat or Heartbeat()
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
        with self._heartbeat.within(name):
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


def report_steps(
    values: Mapping[str, float],
    seconds: Mapping[str, float],
    progress: Progress,
    total: int,
    tracker: Tracker,
    bar: ProgressBar,
) -> None:
    """Write down means over the last steps and the `seconds` of a step's parts: curves, bar and log."""
    speed = values["perf/audio_s_per_s"]
    tracker.scalars({**values, **{f"perf/{name}_s": s for name, s in seconds.items()}}, progress.step)
    bar.done = progress.step
    bar.text = f"mel {values['loss/g_mel']:.4g}, {short(speed)} {AUDIO}/s"
    shown = {"mel": "loss/g_mel", "kl": "loss/g_kl", "g": "loss/g_total", "d": "loss/d"}
    losses = " ".join(f"{name} {values[key]:.4g}" for name, key in shown.items() if key in values)
    left = "" if bar.left_s is None else f", {duration(bar.left_s)} left"
    logger.info(f"step {progress.step}/{total} epoch {progress.epoch}: {losses}; {short(speed)} {AUDIO}/s{left}")
    logger.debug(f"step {progress.step}: seconds: {', '.join(f'{name} {s:.3f}' for name, s in seconds.items())}")
