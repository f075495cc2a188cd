"""The optional speaker encoder: only its weights are read, and a package without them is one error."""

import importlib
import sys

import pytest
import torch
from helpers import tiny_recipe

from rvc_dist.train import speaker_encoder
from rvc_dist.train.quality import Ear
from rvc_dist.train.speaker_encoder import SpeakerEncoder
from rvc_dist.workspace import StageError

CPU = torch.device("cpu")


@pytest.fixture
def package(tmp_path, monkeypatch):
    """A package of that name with weights of its own, whose code nobody runs."""
    folder = tmp_path / "site" / speaker_encoder.PACKAGE
    folder.mkdir(parents=True)
    (folder / "__init__.py").write_text("raise ImportError('webrtcvad')\n")
    torch.manual_seed(0)
    state = SpeakerEncoder().state_dict() | {"similarity_weight": torch.ones(1)}
    torch.save({"model_state": state}, folder / "pretrained.pt", _use_new_zipfile_serialization=False)
    monkeypatch.syspath_prepend(folder.parent)
    monkeypatch.delitem(sys.modules, speaker_encoder.PACKAGE, raising=False)
    importlib.invalidate_caches()
    speaker_encoder.speaker_encoder.cache_clear()
    yield folder
    speaker_encoder.speaker_encoder.cache_clear()


def test_similarity_is_by_the_encoder_where_its_package_is_installed(tmp_path, package):
    ear, before = Ear(tiny_recipe(tmp_path), CPU), torch.random.get_rng_state()
    noise = 0.1 * torch.randn(2, 48000, generator=torch.Generator().manual_seed(0))
    heard = [ear.hear(wave) for wave in noise]
    assert torch.equal(torch.random.get_rng_state(), before)
    assert heard[0].embedding.norm() == pytest.approx(1.0)
    assert ear.compare(heard[0], noise[0]).similarity == pytest.approx(1.0)
    assert ear.compare(heard[0], noise[1]).similarity == pytest.approx(float(heard[0].embedding @ heard[1].embedding))


@pytest.mark.parametrize(("frames", "partials"), [(20, 1), (160, 1), (196, 1), (197, 2), (273, 2), (274, 3)])
def test_partial_utterances_are_those_of_the_package(frames, partials):
    encoder, seen = SpeakerEncoder(), []
    encoder.lstm.register_forward_hook(lambda module, inputs, output: seen.append(inputs[0].shape))
    wave = 1e-3 * torch.randn(160 * (frames - 1), generator=torch.Generator().manual_seed(0))
    embedding = encoder(wave)
    assert seen == [(partials, 160, 40)]
    torch.testing.assert_close(embedding, encoder(wave / 10), msg="quiet waves are made equally loud")


@pytest.mark.parametrize("content", [b"", b"PK", None])
def test_a_package_without_its_weights_is_one_error(package, content):
    (package / "pretrained.pt").unlink() if content is None else (package / "pretrained.pt").write_bytes(content)
    with pytest.raises(StageError, match=r"pretrained.pt does not hold the weights .* uninstall it"):
        speaker_encoder.speaker_encoder(CPU)
