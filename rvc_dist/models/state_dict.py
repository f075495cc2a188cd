"""The one mapping between our state-dict keys and those of upstream RVC.

They differ only in weight norm: X.weight_g and X.weight_v there, X.parametrizations.weight.original0 and .original1
here.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

from torch import Tensor

_OURS = re.compile(r"\.parametrizations\.weight\.original([01])$")
_UPSTREAM = re.compile(r"\.weight_([gv])$")


def to_upstream(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The same tensors under the old spelling, which every tool reads."""
    return {_OURS.sub(lambda match: ".weight_" + "gv"[int(match[1])], key): value for key, value in state.items()}


def from_upstream(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The same tensors under the keys of our modules; accepts both spellings."""
    return {
        _UPSTREAM.sub(lambda match: f".parametrizations.weight.original{'gv'.index(match[1])}", key): value
        for key, value in state.items()
    }
