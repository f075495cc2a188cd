"""AnyPrecisionAdamW's step as one Triton kernel: every number is read once and written once, 24 bytes a weight.

Triton comes with torch for GPUs, and needs a C compiler; only optimizers.py imports this, for a GPU.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls, allow-untyped-decorators
# Triton takes no annotations but its own.
from __future__ import annotations

import math
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
def _at(column, aligned: tl.constexpr, kind: tl.constexpr):
    """Where the tensor of an address in a column begins."""
    beginning = tl.load(column).to(tl.pointer_type(kind))
    if aligned:
        beginning = tl.multiple_of(beginning, 16)
    return beginning


@triton.jit
def _load(pointers, wanted, masked: tl.constexpr):
    return tl.load(pointers, mask=wanted, other=0.0) if masked else tl.load(pointers)


@triton.jit
def _store(pointers, numbers, wanted, masked: tl.constexpr):
    if masked:
        tl.store(pointers, numbers, mask=wanted)
    else:
        tl.store(pointers, numbers)


@triton.jit
def _update(
    column,
    num_tensors,
    place,
    size,
    factors,
    beta1,
    rest1,
    beta2,
    rest2,
    eps,
    decay,
    half_variance: tl.constexpr,
    kahan: tl.constexpr,
    aligned: tl.constexpr,
    masked: tl.constexpr,
):
    """The arithmetic of `optimizers._adamw_`, in its order, for the elements `place` of one tensor."""
    wanted = place < size
    variance_type = tl.uint16 if half_variance else tl.float32
    weights = _at(column, aligned, tl.float32) + place
    gradients = _at(column + num_tensors, aligned, tl.float32) + place
    momenta = _at(column + 2 * num_tensors, aligned, tl.uint16) + place
    variances = _at(column + 3 * num_tensors, aligned, variance_type) + place

    gradient = _load(gradients, wanted, masked)
    change = _from_bfloat16(_load(momenta, wanted, masked)) * beta1 + gradient * rest1
    _store(momenta, _to_bfloat16(change), wanted, masked)
    square = _load(variances, wanted, masked)
    if half_variance:
        square = _from_bfloat16(square)
    square = square * beta2 + rest2 * gradient * gradient
    _store(variances, _to_bfloat16(square) if half_variance else square, wanted, masked)
    denominator = tl.sqrt_rn(square) * tl.load(factors) + eps
    change = tl.div_rn(change, denominator) * tl.load(factors + 1)
    weight = _load(weights, wanted, masked)
    change += weight * decay
    if kahan:
        compensations = _at(column + 4 * num_tensors, aligned, tl.uint16) + place
        change += _from_bfloat16(_load(compensations, wanted, masked))
        _store(compensations, _to_bfloat16(change - ((weight + change) - weight)), wanted, masked)
    _store(weights, weight + change, wanted, masked)


@triton.jit
def _step(
    addresses,  # [columns, tensors]: of weights, gradients, momenta, variances and compensations
    sizes,  # [tensors]
    first_blocks,  # [tensors]
    owners,  # [blocks]: the tensor
    factors,  # [2]: of the root of the variance, and of the update
    found_inf,  # [1]: of no step if it is not zero
    num_tensors,
    beta1,
    rest1,
    beta2,
    rest2,
    eps,
    decay,
    half_variance: tl.constexpr,
    kahan: tl.constexpr,
    aligned: tl.constexpr,  # every tensor begins at a multiple of 16 bytes
    block_size: tl.constexpr,
):
    if tl.load(found_inf) == 0:
        block = tl.program_id(0)
        tensor = tl.load(owners + block)
        size = tl.load(sizes + tensor)
        start = (block - tl.load(first_blocks + tensor)) * block_size
        place = start + tl.arange(0, block_size)
        column = addresses + tensor
        # Without a mask a thread moves 16 bytes at a time; a mask would be asked for each number.
        if start + block_size <= size:
            _update(
                column, num_tensors, place, size, factors, beta1, rest1, beta2, rest2, eps, decay,
                half_variance, kahan, aligned, False,
            )  # fmt: skip
        else:
            _update(
                column, num_tensors, place, size, factors, beta1, rest1, beta2, rest2, eps, decay,
                half_variance, kahan, False, True,
            )  # fmt: skip


@triton.jit
def _count(
    step,  # [1] float64: how many were taken
    found_inf,  # [1]
    constants,  # [3] float64: the logarithms of the betas, and the learning rate
    factors,  # [2]: for `_step`
):
    """Count the step, unless it is skipped, and correct the moments' bias; in float64, as 1 - 0.99 ** 1 needs it."""
    count = tl.load(step) + tl.where(tl.load(found_inf) == 0, 1, 0)
    tl.store(step, count)
    bias1 = 1 - tl.exp(count * tl.load(constants))
    bias2 = 1 - tl.exp(count * tl.load(constants + 1))
    tl.store(factors, (1 / tl.sqrt(bias2)).to(tl.float32))
    tl.store(factors + 1, (-tl.load(constants + 2) / bias1).to(tl.float32))


class Kernel:
    """Keeps on the device, from step to step, where the tensors are and which blocks belong to which."""

    def __init__(self) -> None:
        self._sizes: list[int] = []
        self._layout: list[Tensor] = []
        """sizes, first_blocks and owners."""
        self._addresses: list[int] = []
        self._columns = torch.empty(0, dtype=torch.int64)
        self._num_blocks = 0
        self._is_aligned = False
        self._constants: tuple[float, ...] = ()
        self._constants_there = torch.empty(0)

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
            self._is_aligned = all(address % 16 == 0 for address in addresses)

    def step(self, group: dict[str, Any], rows: Sequence[tuple[Tensor, ...]], found_inf: Tensor | None) -> None:
        """One step, counted in group["step"], for rows of (parameter, gradient, momentum, variance[, compensation]).

        All are contiguous. `found_inf` is a float [1] on the device: not zero where nothing is to change.
        """
        self._locate(rows)
        device = self._columns.device
        (beta1, beta2), lr = group["betas"], group["lr"]
        constants = (*(math.log(beta) if beta else -math.inf for beta in group["betas"]), lr)
        if constants != self._constants:
            self._constants_there = torch.tensor(constants, dtype=torch.float64).to(device, non_blocking=True)
            self._constants = constants
        if not isinstance(group["step"], Tensor):
            group["step"] = torch.full((), group["step"], dtype=torch.float64, device=device)
        if found_inf is None:
            found_inf = torch.zeros(1, device=device)
        factors = torch.empty(2, device=device)
        with torch.cuda.device_of(rows[0][0]):
            _count[(1,)](group["step"], found_inf, self._constants_there, factors)
            _step[(self._num_blocks,)](
                self._columns,
                *self._layout,
                factors,
                found_inf,
                len(rows),
                beta1,
                1 - beta1,
                beta2,
                1 - beta2,
                group["eps"],
                -lr * group["weight_decay"],
                half_variance=rows[0][3].dtype == torch.bfloat16,
                kahan=len(rows[0]) == 5,
                aligned=self._is_aligned,
                block_size=BLOCK,
                enable_fp_fusion=False,
            )
        torch.autograd.graph.increment_version([row[0] for row in rows])
