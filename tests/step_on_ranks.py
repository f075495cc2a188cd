"""Run by a launcher: the first steps of several runs on the ranks it finds; rank 0 saves what came of each.

Usage: step_on_ranks.py FOLDER BATCH_SIZE STEPS OUTPUT
Every FOLDER/*.yaml is a recipe, of which BATCH_SIZE replaces the batch size (times its grad_accum_steps); one whose
name begins with `short` starts with the epoch's short batch. OUTPUT/NAME.safetensors gets the gradients and losses of
the first step, the weights after the last, and the bytes sent in the first; of the recipe adamw what validation found
before it. COMPILER in the environment is the backend of torch.compile, and there is no trial before: inductor, and a
second time, take minutes.
"""

import os
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from accelerate.state import AcceleratorState
from safetensors.torch import save_file

from rvc_dist.config import Recipe, load_recipe
from rvc_dist.train import trainer, trial
from rvc_dist.train.checkpoint import MODELS


def first_steps(recipe: Recipe, num_steps: int, output: Path, short: bool) -> None:
    AcceleratorState._reset_state()  # in which DeepSpeed's settings would be those of the recipe before
    run = trainer.Trainer(recipe)
    if short:
        size, batches = run.loader.sampler.global_batch_size, run.loader.sampler.global_batches(0)
        position = next(i for i, clips in enumerate(batches) if len(clips) < size)
        if position:
            run.progress = replace(run.progress, batches_done=((size, position),))
        run.loader.left_in_epoch -= position
    tensors = {}
    if output.stem == "adamw":
        tensors["quality"] = torch.tensor(run.validation.measure(run.step.generator), dtype=torch.float64)
    averaged: dict[str, torch.Tensor] = {}
    for name, network in run.networks.items():
        keep = partial(keep_gradients, averaged, name, network.module)
        network.optimizer.register_step_pre_hook(keep)
    steps = run.loader.steps(run.progress)
    for step in range(num_steps):
        run.train_step(next(steps))
        run.progress = run.loader.advanced(run.progress)
        if step == 0:
            for name, network in run.networks.items():
                keep_gradients(tensors, name, network.module)
            tensors |= averaged
            losses = run.meter.read(run.accelerator)
            tensors |= {f"loss.{k}": torch.tensor(v) for k, v in losses.items() if k.startswith("loss/")}
            tensors["bytes"] = torch.tensor(run.reducer.num_bytes)
    averages = run.ema.state_dict() if run.ema is not None else {}
    tensors |= {f"weight.average.{k}": v for k, v in averages.items()}
    for name, network in run.networks.items():
        tensors |= {f"weight.{name}.{k}": p.detach() for k, p in network.module.named_parameters()}
    if run.accelerator.is_main_process:
        save_file({k: v.contiguous() for k, v in tensors.items()}, output)
    run.close()


def keep_gradients(kept: dict[str, torch.Tensor], name: str, module: torch.nn.Module, *_: object) -> None:
    """Before the optimizer's step, where there are any: ranger21 centralises and normalises them in their place."""
    gradients = {k: p.grad for k, p in module.named_parameters() if p.grad is not None}
    kept |= {f"grad.{name}.{k}": gradient.clone() for k, gradient in gradients.items()}


def main() -> None:
    folder, batch_size, num_steps, output = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]), Path(sys.argv[4])
    torch.set_num_threads(1)
    output.mkdir(exist_ok=True)
    if "COMPILER" in os.environ:
        compile_ = torch.compile
        torch.compile = lambda module, **_: compile_(module, backend=os.environ["COMPILER"], dynamic=False)
        trial.choose_compiled = lambda recipe, *_: dict.fromkeys(MODELS, recipe.train.compile == "always")
    for file in sorted(folder.glob("*.yaml")):
        recipe = load_recipe(file)
        size = batch_size // recipe.train.grad_accum_steps
        recipe = replace(recipe, train=replace(recipe.train, batch_size=size))
        first_steps(recipe, num_steps, output / f"{file.stem}.safetensors", file.stem.startswith("short"))


if __name__ == "__main__":
    main()
