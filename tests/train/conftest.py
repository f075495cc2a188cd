"""Every test of training begins without the ranks and the precision of the one before; smaller networks for many."""

from typing import Any

import pytest
from accelerate.state import AcceleratorState
from helpers import thin_networks

WHOLE: list[tuple[Any, str, object]] = []
"""Objects, names of attributes, and what they are without `thin_networks`."""
thin_networks(lambda thing, name, _: WHOLE.append((thing, name, vars(thing)[name])))


@pytest.fixture(scope="module")
def thin(thin_ranks):
    """One layer of each kind also here, for the tests of a module, but for those with `whole_networks`."""
    with pytest.MonkeyPatch.context() as patch:
        thin_networks(patch.setattr)
        yield


@pytest.fixture
def whole_networks(monkeypatch):
    """For what is proved of all layers, in a module that has `thin`."""
    for thing, name, value in WHOLE:
        monkeypatch.setattr(thing, name, value)
    monkeypatch.delenv("THIN")


@pytest.fixture(autouse=True)
def _fresh_accelerate_state():
    AcceleratorState._reset_state(reset_partial_state=True)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)
