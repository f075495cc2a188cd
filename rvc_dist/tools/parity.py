"""`rvc-dist bench --parity`: the same steps in plain float32 and as the recipe says, and the difference in every loss.

Both sides begin with the same weights and see the same clips with the same noise.
"""

from __future__ import annotations

import gc
import statistics
from dataclasses import replace
from typing import Any

from rvc_dist.config import Recipe, TrainConfig
from rvc_dist.tools.measuring import MeasuredRun
from rvc_dist.workspace import StageError

PLAIN = {
    "fast_train": False,
    "bf16_adamw": False,
    "precision": "fp32",
    "optimizer": "adamw",
    "compile": "never",
    "grad_compression": "none",
}
"""The settings of the float32 side; all others are the recipe's."""


def asked_for(config: TrainConfig, num_ranks: int) -> list[str]:
    """The settings of a recipe that can make its losses differ from the float32 side's.

    Raises:
        StageError: there is none.
    """
    effective = {name: getattr(config, name) for name in PLAIN}
    if config.compile == "auto":  # it compiles only with fast_train, which is named already
        effective["compile"] = "never"
    if num_ranks == 1:
        effective["grad_compression"] = "none"
    settings = [f"{name} {str(value).lower()}" for name, value in effective.items() if value != PLAIN[name]]
    if not settings:
        raise StageError(
            "--parity: nothing to compare, since the recipe already trains in plain float32 with AdamW;",
            "set train.fast_train, train.bf16_adamw, train.precision, train.optimizer or train.compile",
        )
    return settings


def measure(recipe: Recipe, num_ranks: int) -> dict[str, Any]:
    """Train `bench.steps` steps on both sides; plain data, the same on all ranks.

    Raises:
        StageError: as `asked_for` does.
    """
    settings = asked_for(recipe.train, num_ranks)
    # prodigy multiplies a rate that it finds by itself, so its 1.0 means nothing to AdamW.
    own = {"learning_rate": TrainConfig.learning_rate, "learning_rate_d": None}
    rates = own if recipe.train.optimizer == "prodigy" else {}
    plain = replace(recipe, train=replace(recipe.train, **(PLAIN | rates)))  # type: ignore[arg-type]
    sides = {name: _follow(side) for name, side in (("float32", plain), ("recipe", recipe))}
    curves = {name: side.pop("losses") for name, side in sides.items()}
    names = list(dict.fromkeys(key for step in curves["float32"] for key in step))
    return {
        "key": sides["recipe"]["key"] | {"steps": recipe.bench.steps, "seed": recipe.train.seed},
        "settings": settings,
        "sides": sides,
        "curves": {key: {name: [step.get(key) for step in curve] for name, curve in curves.items()} for key in names},
        "compared": {key: _compare(*([step.get(key) for step in curve] for curve in curves.values())) for key in names},
    }


def _follow(recipe: Recipe) -> dict[str, Any]:
    run = MeasuredRun(recipe)
    samples = list(run.sampled(recipe.bench.steps))
    key, machine = run.key(), run.machine()
    del run
    gc.collect()  # of networks and optimizers that refer to one another: the other side needs their memory
    seconds = statistics.median(s.span.wall_s - s.parts["data"].wall_s for s in samples[1:] or samples)
    return {"losses": [s.losses for s in samples], "step_s": seconds, "key": key, "machine": machine}


def _compare(ours: list[float | None], theirs: list[float | None]) -> dict[str, Any] | None:
    """Two curves in numbers; steps without finite gradients on either side are left out."""
    pairs = [(a, b) for a, b in zip(ours, theirs, strict=True) if a is not None and b is not None]
    if not pairs:
        return None
    means = [statistics.fmean(side) for side in zip(*pairs, strict=True)]
    difference = statistics.fmean(abs(a - b) for a, b in pairs)
    size = statistics.fmean(abs(a) for a, _ in pairs)
    return {
        "first": pairs[0],
        "last": pairs[-1],
        "mean": means,
        "steps": len(pairs),
        "absolute": difference,
        "relative": difference / size if size else 0.0,
    }
