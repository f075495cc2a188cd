"""Files of weights say what they are, and why they do not fit, by the shapes of the published networks."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import NARROW, make_generator, narrow_recipe
from torch import Tensor, nn
from torch.nn.utils.parametrizations import weight_norm

from rvc_dist.choices import DISCRIMINATORS, VOCODERS
from rvc_dist.config import DataConfig
from rvc_dist.files import ForeignFileError
from rvc_dist.models.discriminator import MultiPeriodDiscriminator
from rvc_dist.models.state_dict import from_upstream, to_upstream
from rvc_dist.models.weights_file import (
    DISCRIMINATOR,
    GENERATOR,
    VOICE,
    Shapes,
    WeightsFile,
    facts_of,
    kind_of,
    misfits,
    shapes_of,
)

SHAPES = Path(__file__).parents[1] / "golden" / "state_dict_shapes.json"
PUBLISHED: dict[str, Shapes] = {name: from_upstream(s) for name, s in json.loads(SHAPES.read_text()).items()}


def network() -> nn.Module:
    torch.manual_seed(1)
    return nn.Sequential(weight_norm(nn.Linear(3, 4)), nn.Linear(4, 1))


def trained(state: dict[str, Tensor], **more: Any) -> dict[str, Any]:
    """As RVC-WebUI, Applio, ARVC and rvc-next write G_*.pth, with the moments of AdamW."""
    net = network()
    optimizer = torch.optim.AdamW(net.parameters(), 1e-4, (0.8, 0.99))
    net(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    return {"model": state, "iteration": 3, "optimizer": optimizer.state_dict(), "learning_rate": 1e-4} | more


FORMS: dict[str, Callable[[dict[str, Tensor]], dict[str, Any]]] = {
    "old spelling": lambda s: trained(to_upstream(s)),
    "new spelling": trained,
    "no optimizer": lambda s: {"model": to_upstream(s), "iteration": 3, "learning_rate": 1e-4},
    "weights alone": to_upstream,
    "float16": lambda s: {"model": {k: v.half() for k, v in s.items()}},
    "compiled, with a loss scale": lambda s: trained(
        {f"_orig_mod.{k}": v for k, v in to_upstream(s).items()}, gradscaler={"scale": 65536.0, "_growth_tracker": 3}
    ),
    "wrapped for several GPUs": lambda s: trained({f"module._orig_mod.{k}": v for k, v in s.items()}),
    "optimizer of 8 bits": lambda s: (
        {"model": s, "optimizer": {"state": {0: {"state1": torch.zeros(9, dtype=torch.uint8)}}}}
    ),
}


@pytest.mark.parametrize("form", FORMS)
def test_the_training_files_of_all_tools_hold_the_same_weights(tmp_path: Path, form: str) -> None:
    state = network().state_dict()
    torch.save(FORMS[form](state), tmp_path / "G.pth")
    found = WeightsFile.read(tmp_path / "G.pth")
    assert found.state.keys() == state.keys()
    assert all(
        torch.equal(found.state[k].float(), v.half().float() if form == "float16" else v) for k, v in state.items()
    )
    assert found.is_old_spelling is not (
        form in ("new spelling", "float16", "optimizer of 8 bits") or "wrapped" in form
    )


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ([1, 2], "holds no state dict but a list"),
        ({}, "holds no state dict but a dict"),
        (torch.optim.AdamW([nn.Parameter(torch.ones(1))]).state_dict(), "it is the state of an optimizer"),
        ({"model": {"a": 1}}, "holds no state dict, but model"),
        ({"model": {"a.weight_g": torch.ones(1), "a.parametrizations.weight.original0": torch.ones(1)}}, "twice"),
        (
            {"a": torch.ones(1), "b": torch.full((2,), torch.nan), "c": torch.full((2,), torch.inf)},
            r"in its tensors b, c$",
        ),
        ({"model": {"a": torch.ones(2, dtype=torch.int32)}}, "of torch.int32: its tensor a$"),
        ({"model": {"a": Path}}, "with more in it than"),
    ],
)
def test_what_holds_no_weights_is_refused_with_the_reason(tmp_path: Path, content: object, reason: str) -> None:
    torch.save(content, tmp_path / "G.pth")
    with pytest.raises(ForeignFileError, match=reason):
        WeightsFile.read(tmp_path / "G.pth")


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_published_network_is_known_by_its_shapes(name: str) -> None:
    shapes, (letter, version, *more) = PUBLISHED[name], name.split("_")
    facts = facts_of(shapes)
    if letter == "D":
        assert kind_of(shapes) == DISCRIMINATOR
        assert facts["model.discriminator"].startswith(version)
        assert facts["model.discriminator_channels"] == "1024"
        return
    assert kind_of(shapes) == GENERATOR
    assert facts["model.version"] == version
    assert facts["data.sample_rate"] == f"{more[0]} Hz"
    assert facts["model.pitch_guidance"] == ("no pitch" if "nopitch" in more else "pitch")
    assert facts["model.vocoder"] == "HiFi-GAN as vocoder"
    assert facts["extract.embedder_model"] == f"features {256 if version == 'v1' else 768} wide"
    widths = ("inter_channels", "hidden_channels", "filter_channels", "num_layers", "upsample_initial_channel")
    assert [facts[f"model.{w}"] for w in (*widths, "gin_channels")] == [
        *("192", "192", "768", "6", "512"),
        "768" if name == "G_v2_44100" else "256",
    ]
    assert kind_of({k: v for k, v in shapes.items() if not k.startswith("enc_q.")}) == VOICE
    assert misfits(shapes, shapes) == ([], [])


@pytest.mark.parametrize(
    ("found", "wanted", "causes"),
    [
        ("G_v2_40000", "G_v2_48000", ["data.sample_rate: it has 40000 Hz, this recipe 48000 Hz"]),
        ("G_v2_44100", "G_v2_48000", ["data.sample_rate: it has 44100 Hz, this recipe 48000 Hz", "model.gin_channels"]),
        ("G_v1_40000", "G_v2_40000", ["model.version: it has v1, this recipe v2"]),
        ("G_v2_48000_nopitch", "G_v2_48000", ["model.pitch_guidance: it has no pitch, this recipe pitch"]),
        (
            "D_v1",
            "D_v2",
            ["model.discriminator: it has v1 (1 over scales, 6 over periods, 0 over resolutions), this recipe v2"],
        ),
        ("D_v2", "G_v2_48000", ["it is a discriminator, expected a generator"]),
        ("G_v2_48000", "D_v2", ["it is a generator, expected a discriminator"]),
    ],
)
def test_the_likely_cause_of_a_misfit(found: str, wanted: str, causes: list[str]) -> None:
    told, tensors = misfits(PUBLISHED[found], PUBLISHED[wanted])
    assert len(told) == len(causes)
    assert all(t.startswith(c) for t, c in zip(told, causes, strict=True)), told
    assert tensors


def test_several_causes_are_told_together() -> None:
    other = dict(PUBLISHED["G_v1_40000"]) | {"emb_g.weight": (109, 128), "dec.mrfs.0.0.convs1.0.bias": (256,)}
    other = {k: v for k, v in other.items() if not k.startswith("enc_q.")}
    told, _ = misfits(other, PUBLISHED["G_v2_48000"])
    assert [t.partition(":")[0] for t in told] == [
        "it is a voice",
        *("model.version", "data.sample_rate", "model.vocoder", "model.gin_channels"),
    ]
    wide = dict(PUBLISHED["G_v2_48000"]) | {"enc_p.emb_phone.weight": (192, 1024)}
    assert misfits(wide, PUBLISHED["G_v2_48000"]) == (
        ["extract.embedder_model: it has features 1024 wide, this recipe features 768 wide"],
        ["enc_p.emb_phone.weight: [192, 1024], this network has [192, 768]"],
    )


@pytest.mark.parametrize("name", VOCODERS)
@pytest.mark.parametrize("rate", [32000, 40000, 48000])
def test_every_vocoder_is_known_by_the_names_of_its_tensors(tmp_path: Path, name: str, rate: int) -> None:
    recipe = replace(narrow_recipe(tmp_path), model=replace(NARROW, vocoder=name), data=DataConfig(sample_rate=rate))
    facts = facts_of(shapes_of(make_generator(recipe).state_dict()))
    assert facts["model.vocoder"] == f"{VOCODERS[name].voice_name} as vocoder"
    assert f"{rate} Hz" in facts["data.sample_rate"]
    assert facts["model.energy"] == "no energy"


@pytest.mark.parametrize("name", DISCRIMINATORS)
def test_every_discriminator_is_known_by_its_parts(name: str) -> None:
    shapes = shapes_of(MultiPeriodDiscriminator(DISCRIMINATORS[name], 64).state_dict())
    facts = facts_of(shapes)
    assert facts["model.discriminator"].partition(" ")[0] == name
    assert facts["model.discriminator_channels"] == "64"
