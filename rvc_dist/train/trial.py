"""Which networks a run compiles, and in which memory layout: as a trial finds on its next batch, kept with the run."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypedDict

from accelerate import Accelerator
from accelerate.utils import broadcast_object_list

from rvc_dist.config import Recipe
from rvc_dist.files import write_json
from rvc_dist.models.modules import use_channels_last
from rvc_dist.runtime.device import BACKENDS
from rvc_dist.train import checkpoint, compilation, out_of_memory
from rvc_dist.train.ddp import TrainedModule
from rvc_dist.train.loader import StepLoader
from rvc_dist.train.optimizers import make_optimizer
from rvc_dist.train.run_state import Origin
from rvc_dist.train.step import GanStep
from rvc_dist.workspace import Workspace, read_json


class Networks(TypedDict):
    generator: bool
    discriminator: bool


class OldCompiled(TypedDict):
    key: dict[str, Any]
    compiled: Networks


class Compiled(OldCompiled, total=False):
    """RUN/compile.json."""

    channels_last: Networks
    """Older files, whose key is never a run's, lack it."""


def choose_compiled(
    recipe: Recipe, accelerator: Accelerator, work: Workspace, origin: Origin, total: int, loader: StepLoader
) -> dict[str, bool]:
    """Which networks to compile for a run of `total` steps: as it did before, else by a trial with its next batch.

    Their memory layout, which the same trial finds, is set already.
    """
    config, device, modules = recipe.train, accelerator.device, origin.modules
    if not (compilation.asked_for(config) and BACKENDS[device.type].compiles):
        return dict.fromkeys(modules, False)
    key = compilation.key(config, device, total)
    kept = read_json(work.compile_file, Compiled) if work.compile_file.is_file() else None
    (kept,) = broadcast_object_list([kept])
    if kept is not None and kept["key"] == key:
        for name, on in kept.get("channels_last", {}).items():
            use_channels_last(modules[name], bool(on))
        chosen: dict[str, bool] = dict(kept["compiled"])
        return chosen
    compiled = {name: compilation.compiled(module, device, config) for name, module in modules.items()}
    optimizers = {name: make_optimizer(config, module) for name, module in modules.items()}
    batch = loader.next_batch(origin.progress)

    def trial(which: Mapping[str, bool]) -> GanStep:
        calls = {name: compiled[name] if which.get(name) else module for name, module in modules.items()}
        return GanStep(recipe, {n: TrainedModule(m, calls[n], calls[n], optimizers[n]) for n, m in modules.items()})

    with out_of_memory.advice(trial({}), batch, accelerator.process_index):
        steps_left = total - origin.progress.step
        layout = compilation.choose_layout(
            config, accelerator, modules, lambda: trial({}).local_dry_run(batch), steps_left
        )
        chosen = compilation.choose(
            config, accelerator, checkpoint.MODELS, lambda which: trial(which).local_dry_run(batch), steps_left
        )
    if accelerator.is_main_process:
        write_json(work.compile_file, {"key": key, "compiled": chosen, "channels_last": layout})
    return chosen
