"""ZeRO stages 1 and 2 (arXiv 1910.02054) by DeepSpeed: each rank keeps and updates its part of every network.

Stage 1 divides the optimizer's state among the ranks, stage 2 the averaged gradients too. Checkpoints are the same as
without: a run can change between DDP and ZeRO, and change its number of ranks.

DeepSpeed lays a network's parameters one after the other, pads them, and gives every rank one of equally long parts: N
elements, float32. That part is the only parameter that the optimizer sees.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from accelerate import Accelerator
from torch import Tensor, nn
from torch.optim import Optimizer

from rvc_dist.runtime.launcher import zero_stage
from rvc_dist.train.ddp import GradientReducer, TrainedModule, Update
from rvc_dist.train.optimizers import PARAMETERS, OptimizerState, load_optimizer_state, optimizer_state
from rvc_dist.workspace import StageError

PART = "part"
"""What this rank's part is called where others name a parameter."""


class _Autocast(nn.Module):
    """DeepSpeed ends the autocast that it is called in: here it begins again."""

    def __init__(self, call: nn.Module, autocast: torch.autocast) -> None:
        super().__init__()
        self.call, self.autocast = call, autocast

    def forward(self, *inputs: Any) -> Any:
        with self.autocast:
            return self.call(*inputs)


@dataclass
class ZeroNetwork(TrainedModule):
    """A network whose gradients DeepSpeed averages and whose optimizer updates this rank's part."""

    engine: Any
    reducer: GradientReducer
    sends_every_pass: bool
    """Stage 2 has no room for the gradients of several passes."""

    @classmethod
    def prepare(
        cls,
        accelerator: Accelerator,
        module: nn.Module,
        compiled: nn.Module,
        optimizer: Optimizer,
        reducer: GradientReducer,
        autocast: torch.autocast,
    ) -> ZeroNetwork:
        """`module`, computed as `compiled`; from here on `optimizer` sees this rank's part.

        Raises:
            StageError: this version of DeepSpeed divides parameters in a way that this program does not know.
        """
        accelerator.deepspeed_engine_wrapped = None  # for Accelerator.backward, which knows one engine alone
        engine, _ = accelerator.prepare(_Autocast(compiled, autocast), optimizer)
        network = cls(
            module, compiled, engine, optimizer, engine, reducer, sends_every_pass=zero_stage(accelerator) == 2
        )
        groups = [group["params"] for group in optimizer.param_groups]
        if [len(g) for g in groups] != [1] or not torch.equal(network.part, network._part_of(network._parameters())):
            from deepspeed import __version__

            raise StageError(
                f"DeepSpeed {__version__} divides a network's parameters among the ranks in a way that is not known "
                "here;",
                "install another version (0.19 is known), or launch with launch/multi_gpu.yaml",
            )
        return network

    @property
    def part(self) -> Tensor:
        """[N] of the parameters."""
        part: Tensor = self.optimizer.param_groups[0]["params"][0]
        return part

    def named_parameters(self) -> Iterator[tuple[str, Tensor]]:
        """Of the optimizer."""
        yield PART, self.part

    def _parameters(self) -> list[Tensor]:
        return [p.detach() for p in self.module.parameters() if p.requires_grad]

    def _names(self) -> list[str]:
        return [name for name, p in self.module.named_parameters() if p.requires_grad]

    def _part_of(self, tensors: Sequence[Tensor]) -> Tensor:
        """[N] of one tensor for each parameter, shaped like it."""
        flat = torch.cat([tensor.reshape(-1) for tensor in tensors])
        length = self.part.numel()
        padded = F.pad(flat, (0, length * dist.get_world_size() - flat.numel()))
        return torch.split(padded, length)[dist.get_rank()]

    def _whole(self, part: Tensor) -> list[Tensor]:
        """Of every rank's `part` [N], one tensor for each parameter, on the host of rank 0; empty elsewhere."""
        part = part.to(self.part.device)
        parts = [torch.empty_like(part) for _ in range(dist.get_world_size())] if dist.get_rank() == 0 else None
        dist.gather(part, parts)
        if parts is None:
            return []
        flat, shapes = torch.cat(parts).cpu(), [p.shape for p in self._parameters()]
        lengths = [shape.numel() for shape in shapes]
        pieces = torch.split(flat[: sum(lengths)], lengths)
        return [piece.reshape(shape).clone() for piece, shape in zip(pieces, shapes, strict=True)]

    def no_sync(self, on: bool = True) -> AbstractContextManager[None]:
        self.engine.set_gradient_accumulation_boundary(not on)
        return nullcontext()

    def backward(self, loss: Tensor) -> None:
        self.engine.backward(loss, scale_wrt_gas=False)
        if self.sends_every_pass or self.engine.is_gradient_accumulation_boundary():
            self.reducer.count(sum(p.numel() for p in self._parameters()), torch.float32)

    def update(self, max_norm: float | None) -> Update:
        """As TrainedModule's; DeepSpeed knows `max_norm` already, and the host waits for the device."""
        self.engine.step()
        norm = torch.as_tensor(self.engine.get_global_grad_norm(), dtype=torch.float32, device=self.part.device)
        good = norm.isfinite()
        return Update(norm, good, ~good)

    def optimizer_state(self, wanted: bool) -> OptimizerState | None:
        mine = optimizer_state(self.optimizer, self)
        names, tensors = self._names(), {}
        for key, value in mine.tensors.items():
            owner, _, kind = key.rpartition("/")
            if owner != PART:
                tensors[key] = value
            elif value.shape == self.part.shape:
                tensors |= {f"{name}/{kind}": whole for name, whole in zip(names, self._whole(value), strict=False)}
            else:
                tensors |= {f"{name}/{kind}": value.clone() for name in names}
        (group,) = mine.groups
        numbers = group[PARAMETERS][PART]
        groups = [group | {PARAMETERS: {name: None if numbers is None else dict(numbers) for name in names}}]
        return OptimizerState(tensors, groups) if wanted else None

    def load(self, weights: Mapping[str, Tensor], state: OptimizerState) -> None:
        self.module.load_state_dict(weights)
        with torch.no_grad():
            self.part.copy_(self._part_of(self._parameters()))
        load_optimizer_state(self.optimizer, self, self._divided(state))

    def _divided(self, state: OptimizerState) -> OptimizerState:
        """This rank's part of the state of all parameters."""
        names, shapes = self._names(), [p.shape for p in self._parameters()]
        tensors, of_parameters = {}, dict[str, dict[str, Tensor]]()
        for key, value in state.tensors.items():
            owner, _, kind = key.rpartition("/")
            if owner.startswith("groups/"):
                tensors[key] = value
            else:
                of_parameters.setdefault(kind, {})[owner] = value
        problems = []
        for kind, values in of_parameters.items():
            if missing := [name for name in names if name not in values]:
                problems += [f"{name}/{kind}: missing" for name in missing]
                continue
            ordered = [values.pop(name) for name in names]
            problems += [f"{name}/{kind}: not a parameter of this optimizer" for name in values]
            if [t.shape for t in ordered] == shapes:
                tensors[f"{PART}/{kind}"] = self._part_of(ordered)
            elif all(torch.equal(t, ordered[0]) for t in ordered):
                tensors[f"{PART}/{kind}"] = ordered[0]
            else:
                problems.append(f"{kind}: neither shaped like the parameters nor the same for all")
        if len(state.groups) != 1:
            problems.append(f"{len(state.groups)} groups, expected 1")
        numbers = state.groups[0][PARAMETERS]
        different = [name for name in names if numbers.get(name) != numbers.get(names[0])]
        problems += [f"{name}: other numbers than those of {names[0]}" for name in different]
        if problems:
            raise ValueError("the optimizer's state does not fit:" + "".join(f"\n  {problem}" for problem in problems))
        return OptimizerState(tensors, [state.groups[0] | {PARAMETERS: {PART: numbers.get(names[0])}}])

    def detach(self) -> None:
        self.engine.destroy()
