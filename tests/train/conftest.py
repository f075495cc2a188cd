"""Every test of training begins without the ranks and the precision of the one before; smaller networks for many."""

import pytest
from accelerate.state import AcceleratorState
from helpers import thin_networks

from rvc_dist import choices
from rvc_dist.models.shape import GeneratorShape

WHOLE_SHAPE, WHOLE_DISCRIMINATORS = GeneratorShape.__dict__["from_recipe"], choices.DISCRIMINATORS


@pytest.fixture(scope="module")
def thin(thin_ranks):
    """One layer of each kind also here, for the tests of a module, but for those with `whole_networks`."""
    with pytest.MonkeyPatch.context() as patch:
        thin_networks(patch.setattr)
        yield


@pytest.fixture
def whole_networks(monkeypatch):
    """For what is proved of all layers, in a module that has `thin`."""
    monkeypatch.setattr(GeneratorShape, "from_recipe", WHOLE_SHAPE)
    monkeypatch.setattr(choices, "DISCRIMINATORS", WHOLE_DISCRIMINATORS)
    monkeypatch.delenv("THIN")


@pytest.fixture(autouse=True)
def _fresh_accelerate_state():
    AcceleratorState._reset_state(reset_partial_state=True)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)
