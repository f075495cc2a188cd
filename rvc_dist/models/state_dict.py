"""The one mapping between our state-dict keys and those of upstream RVC.

They differ only in weight norm: X.weight_g and X.weight_v there, X.parametrizations.weight.original0 and .original1
here. Some training files also have the names of what wrapped the network: torch.compile and DistributedDataParallel.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from itertools import accumulate

from torch import Tensor

from rvc_dist.files import ForeignFileError

_OURS = re.compile(r"\.parametrizations\.weight\.original([01])$")
_UPSTREAM = re.compile(r"\.weight_([gv])$")
_WRAPPERS = re.compile(r"_orig_mod\.|^module\.")

_AFTER = ("resblocks", "conv_post", "cond", "cond_layer")
_ORDERS = {
    "applio": ("m_source", "conv_pre", "ups", "noise_convs", *_AFTER),
    "rvc": ("m_source", "noise_convs", "conv_pre", "ups", *_AFTER),
}
"""Layers that the networks of Applio and ARVC, and of RVC-WebUI, rvc-next and ZeroRVC, have in another order."""

SPEAKER_TABLE = "emb_g.weight"
"""Of the generator, [speakers, gin_channels]."""


def upstream_order(names: Iterable[str], tool: str) -> list[str]:
    """Our networks' parameters in the order in which the optimizers of a tool (`applio`, `rvc`) number them.

    `names` are in the order of our module, in either spelling.
    """
    order, first = _ORDERS[tool], dict[str, int]()
    paths = {name: list(accumulate(name.split("."), "{}.{}".format)) for name in names}
    for path in paths.values():
        for prefix in path:
            first.setdefault(prefix, len(first))

    def place(name: str) -> list[tuple[int, int]]:
        parts = zip(name.split("."), paths[name], strict=True)
        return [(order.index(part) + 1 if part in order else 0, first[prefix]) for part, prefix in parts]

    return sorted(paths, key=place)


def to_upstream(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The same tensors under the old spelling, which every tool reads."""
    return {_OURS.sub(lambda match: ".weight_" + "gv"[int(match[1])], key): value for key, value in state.items()}


def from_upstream(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The same tensors under the keys of our modules; accepts both spellings and wrapped networks.

    Raises:
        ForeignFileError: two tensors have the same key then.
    """
    ours = {
        _UPSTREAM.sub(
            lambda match: f".parametrizations.weight.original{'gv'.index(match[1])}", _WRAPPERS.sub("", key)
        ): value
        for key, value in state.items()
    }
    if len(ours) != len(state):
        raise ForeignFileError("it holds tensors twice, under two spellings of their names")
    return ours
