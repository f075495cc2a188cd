"""Run by torchrun: one training step on the ranks it finds, without noise; rank 0 saves gradients and losses.

Usage: step_on_ranks.py RUN_DIR BATCH_SIZE STEP_IN_EPOCH OUTPUT
"""

import sys
from pathlib import Path

import torch
from safetensors.torch import save_file
from tiny import tiny_recipe

from rvc_dist import trainer


def main() -> None:
    run_dir, batch_size, step, output = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]), Path(sys.argv[4])
    torch.set_num_threads(1)
    torch.randn_like = torch.zeros_like  # the same noise on every rank: none
    torch.rand = lambda size, **options: torch.zeros(size, **options)
    recipe = tiny_recipe(run_dir, batch_size=batch_size)
    one = trainer.Trainer(recipe)
    one.step_in_epoch = step
    one.train_step(next(one._batches()))
    losses = one.meter.read(one.accelerator)
    if one.accelerator.is_main_process:
        tensors = {f"g.{k}": p.grad for k, p in one.g.raw.named_parameters()}
        tensors |= {f"d.{k}": p.grad for k, p in one.d.raw.named_parameters()}
        tensors |= {f"loss.{k}": torch.tensor(v) for k, v in losses.items() if k.startswith("loss/")}
        save_file({k: v.contiguous() for k, v in tensors.items()}, output)
    one.accelerator.end_training()


if __name__ == "__main__":
    main()
