"""Run by a launcher: the first steps of a run on the ranks it finds; rank 0 saves what came of them.

Usage: step_on_ranks.py RECIPE STEPS OUTPUT [LAST_STEP_OF_EPOCH]
OUTPUT (safetensors) gets the gradients and losses of the first step, the weights after the last, and the bytes sent.
"""

import sys
from pathlib import Path

import torch
from safetensors.torch import save_file

from rvc_dist import trainer
from rvc_dist.config import load_recipe
from rvc_dist.workspace import StageError


def main() -> None:
    recipe, num_steps, output = load_recipe(Path(sys.argv[1])), int(sys.argv[2]), Path(sys.argv[3])
    torch.set_num_threads(1)
    run = trainer.Trainer(recipe)
    if sys.argv[4:]:  # begin with the epoch's short batch
        size, steps = run.sampler.global_batch_size, run.sampler.global_batches(0)
        short = next(i for i, clips in enumerate(steps) if len(clips) < size)
        run.progress = trainer.replace(run.progress, seen=((size, short),))
        run.left_in_epoch -= short
    tensors = {}
    steps = run._steps()
    for step in range(num_steps):
        run.train_step(next(steps))
        run._advance()
        if step == 0:
            tensors = {
                f"grad.{name}.{key}": p.grad.clone()
                for name, network in run.networks.items()
                for key, p in network.raw.named_parameters()
                if p.grad is not None
            }
            losses = run.meter.read(run.accelerator)
            tensors |= {f"loss.{k}": torch.tensor(v) for k, v in losses.items()}
            tensors["bytes"] = torch.tensor(run.wire.num_bytes)
    tensors |= {
        f"weight.{name}.{key}": p.detach()
        for name, network in run.networks.items()
        for key, p in network.raw.named_parameters()
    }
    if run.accelerator.is_main_process:
        save_file({k: v.contiguous() for k, v in tensors.items()}, output)
    run.close()
    run.accelerator.end_training()


if __name__ == "__main__":
    try:
        main()
    except StageError as error:
        sys.exit(str(error))
