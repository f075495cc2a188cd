"""Files of weights that the tools of RVC write: what one holds, and why it does not fit a network.

What a network is, is read off the names and shapes of its tensors: files of training say nothing else about it.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from rvc_dist.choices import DISCRIMINATORS
from rvc_dist.config import RATES
from rvc_dist.files import ForeignFileError
from rvc_dist.models.state_dict import from_upstream
from rvc_dist.models.torch_file import load_pth, weights

Shapes = Mapping[str, Sequence[int]]

GENERATOR, DISCRIMINATOR, VOICE = "a generator", "a discriminator", "a voice: a generator without posterior encoder"
_KINDS = (
    ("enc_q.", GENERATOR),
    ("enc_p.", VOICE),
    ("discriminators.", DISCRIMINATOR),
    ("unet.encoder.", "the pitch tracker RMVPE"),
    ("feature_extractor.conv_layers.", "a content encoder"),
    ("hubert.feature_extractor.", "a content encoder"),
)
"""A prefix of names that only this kind of network has beside those before -> the kind."""
_VOCODERS = (
    ("dec.mrfs.", "MRF HiFi-GAN"),
    ("dec.mel_conv.", "RefineGAN"),
    ("dec.amps.", "BigVGAN"),
    ("dec.ups.", "HiFi-GAN"),
)
_STATES = ("model", "weight", "state_dict")
"""Where files keep their weights; those of encoders are the file itself."""
_FIRST_LAYER = re.compile(r"[^.]*\.[^.]*\.convs\.0\.(.*\.)?(weight|original1)")
"""Of each part of a discriminator."""
V1_WIDTH = 256
"""Of the content features of v1."""
NAME_LETTERS = 80
"""Of a tensor's name in a message."""


@dataclass(frozen=True)
class WeightsFile:
    """A torch file of weights."""

    state: dict[str, Tensor]
    """In this package's spelling of weight norm."""
    data: dict[str, Any]
    """All that the file holds at its top level."""
    is_old_spelling: bool

    @classmethod
    def read(cls, path: Path, with_counters: bool = False) -> WeightsFile:
        """The weights in `path`, all of them finite floating numbers; `with_counters`, whole ones too.

        Raises:
            ForeignFileError: it is no torch file of plain data, or holds no weights, or some that are not finite.
            FileNotFoundError: it does not exist.
        """
        data = load_pth(path)
        if not isinstance(data, dict) or not data:
            raise ForeignFileError(f"it holds no state dict but a {type(data).__name__}")
        state = next((data[key] for key in _STATES if isinstance(data.get(key), dict)), data)
        if not state or not all(isinstance(v, Tensor) for v in state.values()):
            optimizer = "; it is the state of an optimizer" if {"state", "param_groups"} <= data.keys() else ""
            raise ForeignFileError(f"it holds no state dict, but {_keys(data)}{optimizer}")
        found = weights(state, with_counters)
        ours = from_upstream(found)
        return cls(ours, data, any(key.endswith(".weight_g") for key in found))

    @property
    def shapes(self) -> Shapes:
        return shapes_of(self.state)

    @property
    def is_voice(self) -> bool:
        """Whether it is made to convert with: nothing says so but the `config` beside its weights."""
        return "weight" in self.data and "config" in self.data


def shapes_of(state: Mapping[str, Tensor]) -> Shapes:
    return {key: tuple(value.shape) for key, value in state.items()}


def kind_of(shapes: Shapes) -> str:
    """What network it is, for a sentence; nothing for none that RVC has."""
    return next((kind for prefix, kind in _KINDS if any(key.startswith(prefix) for key in shapes)), "")


def facts_of(shapes: Shapes) -> dict[str, str]:
    """What the shapes tell, by the key of the recipe that decides it; empty for what is neither G nor D."""
    kind = kind_of(shapes)
    if kind == DISCRIMINATOR:
        return dict(_discriminator_facts(shapes))
    return dict(_generator_facts(shapes)) if kind in (GENERATOR, VOICE) else {}


def misfits(found: Shapes, wanted: Shapes) -> tuple[list[str], list[str]]:
    """Why weights do not fit a network: the likely causes, and every tensor that differs."""
    tensors = [f"{key}: missing" for key in wanted if key not in found]
    tensors += [f"{key[:NAME_LETTERS]}: not part of this network" for key in found if key not in wanted]
    tensors += [
        f"{key}: {list(shape)}, this network has {list(wanted[key])}"
        for key, shape in found.items()
        if key in wanted and tuple(shape) != tuple(wanted[key])
    ]
    return (list(_causes(found, wanted)) if tensors else []), tensors


def _causes(found: Shapes, wanted: Shapes) -> Iterator[str]:
    is_, should = kind_of(found), kind_of(wanted)
    if is_ != should:
        yield f"it is {is_ or 'no network of RVC'}, expected {should or 'another network'}"
    if {is_, should} - {GENERATOR, VOICE} and is_ != should:
        return
    has, needs = facts_of(found), facts_of(wanted)
    is_other_version = has.get("model.version") != needs.get("model.version")
    for key, value in needs.items():
        if has.get(key) == value or (key == "extract.embedder_model" and is_other_version):
            continue
        if key in has:
            yield f"{key}: it has {has[key]}, this recipe {value}"


def _generator_facts(shapes: Shapes) -> Iterator[tuple[str, str]]:
    def size(key: str, axis: int) -> int | None:
        shape = shapes.get(key, ())
        return shape[axis] if axis < len(shape) else None

    def layers(prefix: str) -> int:
        return len({key[len(prefix) :].partition(".")[0] for key in shapes if key.startswith(prefix)})

    first = "pre.weight" if "emb_uv.weight" in shapes else "enc_p.emb_phone.weight"
    content = size(first, 1)
    # The versions differ in the width of their features, but a v2 may have those of any encoder.
    likely = ("v1", "v2") if content == V1_WIDTH else ("v2", "v1")
    version = next((v for v in likely if _rates(shapes, v)), likely[0])
    yield "model.version", version
    yield "data.sample_rate", " or ".join(f"{rate} Hz" for rate in _rates(shapes, version)) or "a rate that RVC lacks"
    yield "model.pitch_guidance", "pitch" if {"enc_p.emb_pitch.weight", "emb_uv.weight"} & shapes.keys() else "no pitch"
    yield "model.architecture", "svc" if "emb_uv.weight" in shapes else "rvc"
    vocoder = next((name for prefix, name in _VOCODERS if any(key.startswith(prefix) for key in shapes)), "an unknown")
    yield "model.energy", "energy" if "enc_p.emb_energy.weight" in shapes else "no energy"
    yield "model.vocoder", f"{vocoder} as vocoder"
    yield "extract.embedder_model", f"features {content} wide"
    widths = {
        "inter_channels": (size("enc_p.proj.weight", 0) or 0) // 2,
        "hidden_channels": size(first, 0),
        "filter_channels": size("enc_p.encoder.ffn_layers.0.conv_1.weight", 0),
        "num_layers": layers("enc_p.encoder.attn_layers."),
        "upsample_initial_channel": size("dec.conv_pre.weight", 0),
        "gin_channels": size("emb_g.weight", 1),
    }
    yield from ((f"model.{key}", str(width)) for key, width in widths.items() if width)


def _rates(shapes: Shapes, version: str) -> list[int]:
    """The sample rates in Hz whose networks have such a posterior encoder, upsampling and excitation."""
    bins = shapes.get("enc_q.pre.weight", ())[1:2]
    kernels, strides = _kernels(shapes, "dec.ups", "dec.upsamples"), _kernels(shapes, "dec.noise_convs")
    fitting = []
    for rate, spec in RATES[version].items():
        ups = spec.upsample_rates
        after = [math.prod(ups[i + 1 :]) for i in range(len(ups))]
        excitation = [2 * samples if samples > 1 else 1 for samples in after]
        checks = ((bins, [spec.n_fft // 2 + 1]), (kernels, spec.upsample_kernels), (strides, excitation))
        if all(not found or list(found) == list(wanted) for found, wanted in checks):
            fitting.append(rate)
    return fitting


def _kernels(shapes: Shapes, *layers: str) -> list[int]:
    """The kernel sizes of the numbered `layers`, whichever of these there are."""
    found: list[int] = []
    for name in layers:
        for i in range(len(shapes)):
            key = f"{name}.{i}.weight"
            shape = shapes.get(key, shapes.get(f"{name}.{i}.parametrizations.weight.original1"))
            if shape is None:
                break
            found += shape[2:3]
    return found


def _discriminator_facts(shapes: Shapes) -> Iterator[tuple[str, str]]:
    firsts = [shape for key, shape in shapes.items() if _FIRST_LAYER.fullmatch(key)]
    kinds = Counter("scales" if len(s) == 3 else "periods" if s[-1] == 1 else "resolutions" for s in firsts if s)
    parts = (kinds["scales"], kinds["periods"], kinds["resolutions"])
    text = f"{parts[0]} over scales, {parts[1]} over periods, {parts[2]} over resolutions"
    known = {(1, len(spec.periods), len(spec.resolutions)): name for name, spec in DISCRIMINATORS.items()}
    yield "model.discriminator", f"{known[parts]} ({text})" if parts in known else text
    last = shapes.get("discriminators.0.conv_post.parametrizations.weight.original1", ())[1:2]
    yield from (("model.discriminator_channels", str(width)) for width in last)


def _keys(data: Mapping[Any, Any]) -> str:
    shown = ", ".join(str(key)[:40] for key in list(data)[:6])
    return f"{shown} and {len(data) - 6} more" if len(data) > 6 else shown
