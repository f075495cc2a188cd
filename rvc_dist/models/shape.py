"""What shapes a generator: from a recipe, and from and to the `config` list of a voice file."""

from __future__ import annotations

import math
import reprlib
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Annotated, Any, Literal, get_type_hints

from rvc_dist.choices import vocoder_of_voice
from rvc_dist.config import RATES, Fraction, Recipe
from rvc_dist.schema import Rule, check, multiple_of, record, within

_Width = Annotated[int, within(1, 1 << 17)]
_Kernel = Annotated[int, within(1, 31)]
_UpTo64 = Annotated[int, within(1, 64)]


_UPSTREAM = {
    "segment": "segment_size",
    "num_heads": "n_heads",
    "num_layers": "n_layers",
    "dropout": "p_dropout",
    "resblock_kernels": "resblock_kernel_sizes",
    "resblock_dilations": "resblock_dilation_sizes",
    "upsample_kernels": "upsample_kernel_sizes",
    "num_speakers": "spk_embed_dim",
    "sample_rate": "sr",
}
"""What the networks of the tools call those of their arguments that have other names here."""
_FIXED = {"segment": 32, "resblock": "1"}
"""Entries that are no fields of a GeneratorShape: no reader uses the length of a segment."""


@dataclass(frozen=True)
class GeneratorShape:
    """Everything that shapes the generator; the defaults are the widths of RVC."""

    content_channels: int
    """Width of the content features: 256 for v1; for v2 that of the encoder, mostly 768."""
    spec_channels: _Width
    """Bins of the linear spectrogram, n_fft / 2 + 1."""
    segment_frames: int
    """Frames of a clip that are decoded in training."""
    upsample_rates: tuple[_UpTo64, ...]
    upsample_kernels: tuple[Annotated[int, within(1, 128)], ...]
    num_speakers: _Width
    sample_rate: _Width
    inter_channels: Annotated[int, multiple_of(2), within(1, 1 << 17)] = 192
    hidden_channels: _Width = 192
    filter_channels: _Width = 768
    num_heads: _Width = 2
    num_layers: _UpTo64 = 6
    kernel_size: _Kernel = 3
    dropout: Fraction = 0.0
    resblock_kernels: tuple[_Kernel, ...] = (3, 7, 11)
    resblock_dilations: tuple[tuple[_UpTo64, ...], ...] = ((1, 3, 5),) * 3
    upsample_initial_channel: _Width = 512
    gin_channels: _Width = 256
    """Width of the speaker embedding."""
    pitch_guidance: bool = True
    energy: bool = False
    """It follows the energy of frames too."""
    architecture: Literal["rvc", "svc"] = "rvc"
    vocoder: str = "hifi-gan"
    """The key into `choices.VOCODERS`."""

    @property
    def is_svc(self) -> bool:
        return self.architecture == "svc"

    @property
    def attention_window(self) -> int:
        """Frames to either side that have a learnt relative position."""
        return 4 if self.is_svc else 10

    @property
    def hop(self) -> int:
        """Samples a frame."""
        return math.prod(self.upsample_rates)

    @property
    def segment_samples(self) -> int:
        return self.segment_frames * self.hop

    @classmethod
    def from_recipe(cls, recipe: Recipe, content_channels: int, num_speakers: int) -> GeneratorShape:
        """The generator that a recipe asks for, given what the features and the dataset turned out to be."""
        rate = recipe.rate_spec
        widths = {name: value for name, value in asdict(recipe.model).items() if name in cls.__dataclass_fields__}
        return cls(
            **widths,
            content_channels=content_channels,
            spec_channels=rate.n_fft // 2 + 1,
            segment_frames=rate.segment // rate.hop,
            upsample_rates=rate.upsample_rates,
            upsample_kernels=rate.upsample_kernels,
            num_speakers=num_speakers,
            sample_rate=recipe.data.sample_rate,
        )

    @classmethod
    def from_identity(cls, identity: Mapping[str, Any]) -> GeneratorShape:
        """The generator of a checkpoint's identity; ValueError when it says something else."""
        fields = {k.removeprefix("generator."): v for k, v in identity.items() if k.startswith("generator.")}
        check(fields, cls)
        return cls(**fields)

    def to_export_config(self) -> list[Any]:
        """The `config` list of a voice file."""
        fields = asdict(self) | _FIXED
        return [_nested(list, fields[name]) for name in _POSITIONS]

    def to_upstream_arguments(self) -> dict[str, Any]:
        """The arguments of the tools' own networks, by name."""
        named = zip(_POSITIONS, self.to_export_config(), strict=True)
        return {_UPSTREAM.get(name, name): value for name, value in named} | {"segment_size": self.segment_frames}

    @classmethod
    def from_export_config(
        cls,
        config: Sequence[Any],
        *,
        version: str,
        f0: bool,
        content_channels: int,
        vocoder: str,
        energy: bool = False,
        architecture: str = "RVC",
    ) -> GeneratorShape:
        """The generator of a voice file; `vocoder` is what the file calls it.

        Raises ValueError for a list of another length, an entry that no network can have, or a rate that `version`
        lacks or that the upsampling does not give.
        """
        if len(config) != len(_POSITIONS):
            raise ValueError(f"config: got {len(config)} entries, expected {len(_POSITIONS)}")
        entries: dict[str, Any] = check(dict(zip(_POSITIONS, config, strict=True)), VoiceConfig, "config")
        if misfit := _misfit(entries):
            got = reprlib.repr(entries[misfit])
            raise ValueError(f"config.{misfit}: got {got}, which no network of RVC has beside the other entries")
        rate, rates = entries["sample_rate"], entries["upsample_rates"]
        if rate not in RATES.get(version, {}):
            raise ValueError(f"config: got version {version!r} at {rate} Hz, which RVC does not have")
        rate_spec = RATES[version][rate]
        if math.prod(rates) != rate_spec.hop:
            raise ValueError(
                f"config: its upsample_rates {list(rates)} give {math.prod(rates)} samples a frame, {rate} Hz needs "
                f"{rate_spec.hop}"
            )
        if architecture not in ("RVC", "SVC") or (architecture == "SVC" and (rate == 44100 or not f0)):
            what = f"architecture {reprlib.repr(architecture)} at {rate} Hz with{'' if f0 else 'out'} pitch"
            raise ValueError(f"config: got {what}, which cannot be built here")
        fields: dict[str, Any] = {name: _nested(tuple, v) for name, v in entries.items() if name not in _FIXED}
        return cls(
            **fields,
            content_channels=content_channels,
            segment_frames=rate_spec.segment // rate_spec.hop,
            pitch_guidance=f0,
            energy=energy,
            architecture="svc" if architecture == "SVC" else "rvc",
            vocoder=vocoder_of_voice(vocoder),
        )


_NAMES = (
    "spec_channels segment inter_channels hidden_channels filter_channels num_heads num_layers kernel_size dropout "
    "resblock resblock_kernels resblock_dilations upsample_rates upsample_initial_channel upsample_kernels "
    "num_speakers gin_channels sample_rate"
)
_POSITIONS = tuple(_NAMES.split())
"""The entries of a voice file's `config` in their order: it is a list that other tools read by position."""
_RESBLOCK = Annotated[str, Rule('"1"', (int, str), lambda value: str(value) == "1")]
_TYPES = {"segment": Any, "resblock": _RESBLOCK} | get_type_hints(GeneratorShape, include_extras=True)
VoiceConfig = record(**{name: _TYPES[name] for name in _POSITIONS})


def _nested(kind: type[list[Any]] | type[tuple[Any, ...]], value: Any) -> Any:
    """`value`, with lists and tuples in it turned into `kind`."""
    return kind(_nested(kind, item) for item in value) if isinstance(value, (list, tuple)) else value


def _misfit(entries: Mapping[str, Any]) -> str | None:
    """The first entry that does not go with the others."""
    kernels, dilations = entries["resblock_kernels"], entries["resblock_dilations"]
    rates, ups = entries["upsample_rates"], entries["upsample_kernels"]
    fits = {
        "num_heads": entries["hidden_channels"] % entries["num_heads"] == 0,
        "resblock_kernels": 0 < len(kernels) <= 8 and all(k % 2 for k in kernels),
        "resblock_dilations": len(dilations) == len(kernels) and all(0 < len(d) <= 8 for d in dilations),
        "upsample_rates": 0 < len(rates) <= 8 and entries["upsample_initial_channel"] % 2 ** len(rates) == 0,
        "upsample_kernels": len(ups) == len(rates)
        and all(k >= rate and (k - rate) % 2 == 0 for k, rate in zip(ups, rates, strict=True)),
    }
    return next((name for name, fit in fits.items() if not fit), None)
