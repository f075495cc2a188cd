"""The SVC architecture: the tensors that other tools have, its prior, and the way through training to a conversion."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from accelerate.state import AcceleratorState
from helpers import changed, make_features, thin_networks, tiny_recipe

from rvc_dist.config import ConfigError, DataConfig, ModelConfig, Recipe
from rvc_dist.models.generator import Generator
from rvc_dist.models.shape import GeneratorShape
from rvc_dist.models.state_dict import to_upstream
from rvc_dist.models.weights_file import facts_of
from rvc_dist.train import networks, trainer
from rvc_dist.voice import export
from rvc_dist.voice.file import Voice
from rvc_dist.workspace import Shard, StageError, Workspace


def svc(rate: int = 40000, **model: object) -> Recipe:
    return Recipe(data=DataConfig(sample_rate=rate), model=ModelConfig(architecture="svc", **model))


def test_its_tensors_are_those_of_other_tools():
    """so-vits-svc 4's generator with RVC's content features; all besides is RVC's."""
    recipe = svc()
    with torch.device("meta"):
        made = {
            architecture: networks.make_networks(found, GeneratorShape.from_recipe(found, 768, 3))
            for architecture, found in {"svc": recipe, "rvc": changed(recipe, "model", architecture="rvc")}.items()
        }
    ours, rvc = (
        {k: list(v.shape) for k, v in to_upstream(made[a]["generator"].state_dict()).items()} for a in ("svc", "rvc")
    )
    deeper = "enc_p.encoder.", "flow."
    new = {k: shape for k, shape in ours.items() if rvc.get(k) != shape and not k.startswith(deeper)}
    assert new == {
        "pre.weight": [192, 768, 5],
        "pre.bias": [192],
        "emb_uv.weight": [2, 192],
        "enc_p.f0_emb.weight": [256, 192],
        "dec.m_source.l_linear.weight": [1, 9],
    }
    gone = {k for k in rvc if k not in ours}
    assert gone == {"enc_p.emb_phone.weight", "enc_p.emb_phone.bias", "enc_p.emb_pitch.weight"}
    assert ours["enc_p.encoder.attn_layers.5.emb_rel_k"] == [1, 9, 96]
    assert ours["flow.flows.0.enc.in_layers.3.weight_v"] == [384, 192, 5]
    assert ours["flow.flows.6.enc.cond_layer.weight_v"] == [1536, 256, 1]
    told = facts_of(ours)
    assert [told[k] for k in ("model.architecture", "model.pitch_guidance")] == ["svc", "pitch"]
    assert [told[k] for k in ("extract.embedder_model", "model.hidden_channels")] == ["features 768 wide", "192"]
    scores = [d.period for d in made["svc"]["discriminator"].discriminators if hasattr(d, "period")]
    assert scores == [2, 3, 5, 7, 11]


def test_its_prior_by_hand():
    """Content by a convolution, whether a frame is voiced, and coarse pitch, unscaled into the transformer."""
    torch.manual_seed(0)
    net = Generator(GeneratorShape.from_recipe(svc(hidden_channels=32, filter_channels=64, num_layers=1), 16, 2)).eval()
    content, f0 = torch.randn(2, 30, 16), torch.rand(2, 30) * 300 * (torch.rand(2, 30) > 0.3)
    coarse, mask = torch.randint(1, 256, (2, 30)), torch.ones(2, 1, 30)
    mask[1, :, 20:] = 0
    state = net.state_dict()
    x = F.conv1d(content.transpose(1, 2), state["pre.weight"], state["pre.bias"], padding=2) * mask
    x = x + state["emb_uv.weight"][(f0 > 0).long()].transpose(1, 2)
    x = x + state["enc_p.f0_emb.weight"][coarse].transpose(1, 2)
    stats = F.conv1d(net.enc_p.encoder(x, mask), state["enc_p.proj.weight"], state["enc_p.proj.bias"]) * mask
    mean, deviation = net.prior(content, coarse, f0, mask, None)
    torch.testing.assert_close(torch.cat([mean, deviation], 1), stats)


def test_it_trains_and_its_voice_converts(tmp_path, monkeypatch):
    AcceleratorState._reset_state(reset_partial_state=True)
    thin_networks(monkeypatch.setattr)
    recipe = changed(tiny_recipe(tmp_path / "run", max_steps=1), "model", architecture="svc")
    make_features(recipe)
    trainer.run(recipe, Shard())
    AcceleratorState._reset_state(reset_partial_state=True)
    export.run(recipe, Shard())
    path = Workspace(recipe.run_dir, recipe.name).last_voice_file
    contents = torch.load(path, weights_only=True)
    assert (contents["architecture"], contents["f0"], contents["energy"]) == ("SVC", 1, False)
    generator = Voice.load(path, torch.device("cpu")).generator
    assert generator.shape.is_svc
    content = torch.randn(1, 40, generator.shape.content_channels)
    f0 = torch.full((1, 40), 200.0)
    wave = generator.infer(content, torch.tensor([40]), torch.full((1, 40), 99), f0, torch.tensor([0]))
    assert np.isfinite(wave.numpy()).all()
    assert wave.shape == (1, 1, 40 * 240)
    with pytest.raises(StageError, match=r"generator\.architecture: svc, now None"):
        trainer.run(changed(changed(recipe, "model", architecture="rvc"), "train", max_steps=2), Shard())
    AcceleratorState._reset_state(reset_partial_state=True)
    short = {k: v for k, v in contents["weight"].items() if k != "pre.weight"}
    at_44100 = [*contents["config"][:12], [8, 8, 2, 2, 2], 32, [16, 16, 4, 4, 4], *contents["config"][15:17], 44100]
    lies = {"architecture": "RVC"}, {"architecture": "VITS"}, {"energy": "yes"}, {"weight": short}, {"config": at_44100}
    for lie in lies:
        torch.save(contents | lie, tmp_path / "lies.pth")
        with pytest.raises(StageError, match=r"infer\.model: .*lies\.pth (holds no voice|does not fit)") as error:
            Voice.load(tmp_path / "lies.pth", torch.device("cpu"))
        assert len(str(error.value).splitlines()) == 1


@pytest.mark.parametrize(
    ("rate", "model", "key"),
    [
        (44100, {}, "data.sample_rate"),
        (40000, {"pitch_guidance": False}, "model.pitch_guidance"),
        (40000, {"energy": True}, "model.energy"),
    ],
)
def test_what_it_is_not_made_with_is_refused(rate, model, key):
    with pytest.raises(ConfigError, match=f"{key}: got .* with model.architecture svc"):
        svc(rate, **model)
