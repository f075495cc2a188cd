"""The one mapping between our state-dict keys and those of upstream RVC, and the one way to read others' files.

They differ only in weight norm: X.weight_g and X.weight_v there, X.parametrizations.weight.original0 and .original1
here.
"""

from __future__ import annotations

import pickle
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

_OURS = re.compile(r"\.parametrizations\.weight\.original([01])$")
_UPSTREAM = re.compile(r"\.weight_([gv])$")


_UNREADABLE = (
    *(pickle.UnpicklingError, RuntimeError, EOFError, OSError, ValueError, LookupError),
    *(AttributeError, TypeError, ArithmeticError, AssertionError),
)
"""What torch.load raises on damaged files and on files of another kind."""


def load_pth(path: Path) -> Any:
    """The contents of a torch file, on the CPU; nothing in it is run.

    Raises:
        ValueError: it is damaged, or holds more than tensors and plain data; without the file's name.
    """
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except _UNREADABLE as error:
        # torch's own message advises to load the file without weights_only, which would run whatever is in it.
        why = "damaged, or with more in it than tensors and plain data"
        raise ValueError(f"{why}: {type(error).__name__}") from error


def to_upstream(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The same tensors under the old spelling, which every tool reads."""
    return {_OURS.sub(lambda match: ".weight_" + "gv"[int(match[1])], key): value for key, value in state.items()}


def from_upstream(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The same tensors under the keys of our modules; accepts both spellings."""
    return {
        _UPSTREAM.sub(lambda match: f".parametrizations.weight.original{'gv'.index(match[1])}", key): value
        for key, value in state.items()
    }
