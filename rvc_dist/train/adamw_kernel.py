"""AnyPrecisionAdamW's step as one Triton kernel: every number is read once and written once, 24 bytes a weight.

Triton comes with torch for GPUs, and needs a C compiler; only optimizers.py imports this, for a GPU.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls, allow-untyped-decorators
# Triton takes no annotations but its own.
from __future__ import annotations

from collections.abc import Sequence
from subprocess import CalledProcessError
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.errors import TritonError

BLOCK = 1024
"""Elements of one program, all of the same tensor."""


@triton.jit
def _from_bfloat16(bits):
    return (bits.to(tl.uint32) << 16).to(tl.float32, bitcast=True)


@triton.jit
def _to_bfloat16(numbers):
    """To the nearest, ties to even; by integers, which older GPUs and Triton's interpreter round rightly too."""
    bits = numbers.to(tl.uint32, bitcast=True)
    rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
    return tl.where(numbers == numbers, rounded, 0x7FC0).to(tl.uint16)


@triton.jit
def _step(
    addresses,  # [columns, tensors]: of weights, gradients, momenta, variances and compensations
    sizes,  # [tensors]
    first_blocks,  # [tensors]
    owners,  # [blocks]: the tensor
    factors,  # [2]: of the root of the variance, and of the update
    skip,  # [1]
    num_tensors,
    beta1,
    rest1,
    beta2,
    rest2,
    eps,
    decay,
    half_variance: tl.constexpr,
    kahan: tl.constexpr,
    block_size: tl.constexpr,
):
    """The arithmetic of `optimizers._adamw_`, in its order."""
    block = tl.program_id(0)
    tensor = tl.load(owners + block)
    place = (block - tl.load(first_blocks + tensor)) * block_size + tl.arange(0, block_size)
    wanted = (place < tl.load(sizes + tensor)) & (tl.load(skip) == 0)
    variance_type = tl.uint16 if half_variance else tl.float32
    column = addresses + tensor
    weights = tl.load(column).to(tl.pointer_type(tl.float32)) + place
    gradients = tl.load(column + num_tensors).to(tl.pointer_type(tl.float32)) + place
    momenta = tl.load(column + 2 * num_tensors).to(tl.pointer_type(tl.uint16)) + place
    variances = tl.load(column + 3 * num_tensors).to(tl.pointer_type(variance_type)) + place

    gradient = tl.load(gradients, mask=wanted, other=0.0)
    change = _from_bfloat16(tl.load(momenta, mask=wanted, other=0)) * beta1 + gradient * rest1
    tl.store(momenta, _to_bfloat16(change), mask=wanted)
    square = tl.load(variances, mask=wanted, other=0)
    if half_variance:
        square = _from_bfloat16(square)
    square = square * beta2 + rest2 * gradient * gradient
    tl.store(variances, _to_bfloat16(square) if half_variance else square, mask=wanted)
    denominator = tl.sqrt_rn(square) * tl.load(factors) + eps
    change = tl.div_rn(change, denominator) * tl.load(factors + 1)
    weight = tl.load(weights, mask=wanted, other=0.0)
    change += weight * decay
    if kahan:
        compensations = tl.load(column + 4 * num_tensors).to(tl.pointer_type(tl.uint16)) + place
        change += _from_bfloat16(tl.load(compensations, mask=wanted, other=0))
        tl.store(compensations, _to_bfloat16(change - ((weight + change) - weight)), mask=wanted)
    tl.store(weights, weight + change, mask=wanted)


class Kernel:
    """Keeps on the device, from step to step, where the tensors are and which blocks belong to which."""

    def __init__(self) -> None:
        self._sizes: list[int] = []
        self._layout: list[Tensor] = []
        """sizes, first_blocks and owners."""
        self._addresses: list[int] = []
        self._columns = torch.empty(0, dtype=torch.int64)
        self._num_blocks = 0

    @classmethod
    def tried(cls, device: torch.device) -> Kernel:
        """One that has compiled and run on `device`.

        Raises:
            RuntimeError: it cannot.
        """
        kernel, group = cls(), {"betas": (0.9, 0.9), "lr": 0.0, "eps": 1.0, "weight_decay": 0.0, "step": 1}
        dtypes = (torch.float32, torch.float32, torch.bfloat16, torch.float32)
        try:
            kernel.step(group, [tuple(torch.ones(1, device=device, dtype=dtype) for dtype in dtypes)], None)
        except (TritonError, CalledProcessError, OSError) as error:
            raise RuntimeError(f"{type(error).__name__}: {error}") from error
        return kernel

    @staticmethod
    def takes(rows: Sequence[tuple[Tensor, ...]]) -> bool:
        """Whether `rows`, as of `step`, are of the types that the kernel knows."""
        float32, half = torch.float32, torch.bfloat16
        kinds = {tuple(tensor.dtype for tensor in row) for row in rows}
        fitting = [(float32, float32, half, variance) for variance in (float32, half)]
        return len(kinds) == 1 and kinds <= {*fitting, *((*kind, half) for kind in fitting)}

    def _locate(self, rows: Sequence[tuple[Tensor, ...]]) -> None:
        """Bring what is on the device up to date; tensors mostly stay where they were."""
        device, sizes = rows[0][0].device, [row[0].numel() for row in rows]
        addresses = [tensor.data_ptr() for column in zip(*rows, strict=True) for tensor in column]
        if sizes != self._sizes or device != self._columns.device:
            per_tensor = -(-torch.tensor(sizes) // BLOCK)
            owners = torch.repeat_interleave(torch.arange(len(sizes)), per_tensor)
            tables = (torch.tensor(sizes), per_tensor.cumsum(0) - per_tensor, owners)
            # Not pinned, so the copy is staged at once; not blocking, so the host does not wait for the device.
            self._layout = [table.to(device, torch.int32, non_blocking=True) for table in tables]
            self._sizes, self._num_blocks, self._addresses = sizes, len(owners), []
        if addresses != self._addresses:
            self._columns = torch.tensor(addresses).to(device, non_blocking=True)
            self._addresses = addresses

    def step(self, group: dict[str, Any], rows: Sequence[tuple[Tensor, ...]], skip: Tensor | None) -> None:
        """One step for contiguous rows of (parameter, gradient, momentum, variance[, Kahan compensation]).

        `skip` is a bool [] on the device, None for none.
        """
        self._locate(rows)
        device = self._columns.device
        (beta1, beta2), lr = group["betas"], group["lr"]
        bias1, bias2 = (1 - beta ** torch.as_tensor(group["step"], dtype=torch.float64) for beta in (beta1, beta2))
        factors = torch.stack([bias2**-0.5, -lr / bias1]).float().to(device, non_blocking=True)
        if skip is None:
            skip = torch.zeros((), dtype=torch.bool, device=device)
        with torch.cuda.device_of(rows[0][0]):
            _step[(self._num_blocks,)](
                self._columns,
                *self._layout,
                factors,
                skip.reshape(1).to(torch.uint8),
                len(rows),
                beta1,
                1 - beta1,
                beta2,
                1 - beta2,
                group["eps"],
                -lr * group["weight_decay"],
                half_variance=rows[0][3].dtype == torch.bfloat16,
                kahan=len(rows[0]) == 5,
                block_size=BLOCK,
                enable_fp_fusion=False,
            )
        torch.autograd.graph.increment_version([row[0] for row in rows])
