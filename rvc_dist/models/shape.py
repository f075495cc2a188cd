"""What shapes a generator: from a recipe, and from and to the `config` list of a voice file."""

from __future__ import annotations

import math
import reprlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from rvc_dist.choices import vocoder_of_voice
from rvc_dist.config import RATES, Recipe

_EXPORT_ENTRIES = 18


@dataclass(frozen=True)
class GeneratorShape:
    """Everything that shapes the generator; the defaults are the widths of RVC."""

    content_channels: int
    """Width of the content features: 256 for v1; for v2 that of the encoder, mostly 768."""
    spec_channels: int
    """Bins of the linear spectrogram, n_fft / 2 + 1."""
    segment_frames: int
    """Frames of a clip that are decoded in training."""
    upsample_rates: tuple[int, ...]
    upsample_kernels: tuple[int, ...]
    num_speakers: int
    sample_rate: int
    inter_channels: int = 192
    hidden_channels: int = 192
    filter_channels: int = 768
    num_heads: int = 2
    num_layers: int = 6
    kernel_size: int = 3
    dropout: float = 0.0
    resblock_kernels: tuple[int, ...] = (3, 7, 11)
    resblock_dilations: tuple[tuple[int, ...], ...] = ((1, 3, 5),) * 3
    upsample_initial_channel: int = 512
    gin_channels: int = 256
    """Width of the speaker embedding."""
    pitch_guidance: bool = True
    vocoder: str = "hifi-gan"
    """The key into `choices.VOCODERS`."""

    @property
    def hop(self) -> int:
        """Samples a frame."""
        return math.prod(self.upsample_rates)

    @property
    def segment_samples(self) -> int:
        return self.segment_frames * self.hop

    @property
    def least_weights(self) -> int:
        """Numbers that a voice file of this shape holds at the least: those of its largest layers."""
        from rvc_dist.models.vocoders import vocoder_class  # whose constructors take this class

        hidden = self.hidden_channels
        count = self.num_layers * hidden * (4 * hidden + 2 * self.filter_channels * self.kernel_size)
        count += 12 * hidden * (10 * hidden + 2 * self.gin_channels)
        return count + vocoder_class(self).least_weights(self)

    @classmethod
    def from_recipe(cls, recipe: Recipe, content_channels: int, num_speakers: int) -> GeneratorShape:
        """The generator that a recipe asks for, given what the features and the dataset turned out to be."""
        model, rate = recipe.model, recipe.rate_spec
        return cls(
            content_channels=content_channels,
            spec_channels=rate.n_fft // 2 + 1,
            segment_frames=rate.segment // rate.hop,
            upsample_rates=rate.upsample_rates,
            upsample_kernels=rate.upsample_kernels,
            num_speakers=num_speakers,
            sample_rate=recipe.data.sample_rate,
            inter_channels=model.inter_channels,
            hidden_channels=model.hidden_channels,
            filter_channels=model.filter_channels,
            num_heads=model.num_heads,
            num_layers=model.num_layers,
            upsample_initial_channel=model.upsample_initial_channel,
            gin_channels=model.gin_channels,
            pitch_guidance=model.pitch_guidance,
            vocoder=model.vocoder,
        )

    def to_export_config(self) -> list[Any]:
        """The `config` list of a voice file, which other tools read by position."""
        return [
            self.spec_channels,
            32,  # a segment length that no reader uses
            self.inter_channels,
            self.hidden_channels,
            self.filter_channels,
            self.num_heads,
            self.num_layers,
            self.kernel_size,
            self.dropout,
            "1",
            list(self.resblock_kernels),
            [list(dilations) for dilations in self.resblock_dilations],
            list(self.upsample_rates),
            self.upsample_initial_channel,
            list(self.upsample_kernels),
            self.num_speakers,
            self.gin_channels,
            self.sample_rate,
        ]

    @classmethod
    def from_export_config(
        cls, config: Sequence[Any], *, version: str, f0: bool, content_channels: int, vocoder: str
    ) -> GeneratorShape:
        """The generator of a voice file; `vocoder` is what the file calls it.

        Raises ValueError for a list of another length, an entry that no network can have, or a rate that `version`
        lacks or that the upsampling does not give.
        """
        if len(config) != _EXPORT_ENTRIES:
            raise ValueError(f"config of the voice: got {len(config)} entries, expected {_EXPORT_ENTRIES}")
        for name, got, is_fit in _export_checks(config):
            if not is_fit:
                raise ValueError(f"config of the voice: got {name} {reprlib.repr(got)}, which no network of RVC has")
        rate = config[17]
        if rate not in RATES.get(version, {}):
            raise ValueError(f"config of the voice: got version {version!r} at {rate} Hz, which RVC does not have")
        rate_spec = RATES[version][rate]
        if math.prod(config[12]) != rate_spec.hop:
            raise ValueError(
                f"config of the voice: its upsample_rates {list(config[12])} give {math.prod(config[12])} samples a "
                f"frame, {rate} Hz needs {rate_spec.hop}"
            )
        return cls(
            content_channels=content_channels,
            spec_channels=config[0],
            segment_frames=rate_spec.segment // rate_spec.hop,
            upsample_rates=tuple(config[12]),
            upsample_kernels=tuple(config[14]),
            num_speakers=config[15],
            sample_rate=rate,
            inter_channels=config[2],
            hidden_channels=config[3],
            filter_channels=config[4],
            num_heads=config[5],
            num_layers=config[6],
            kernel_size=config[7],
            dropout=config[8],
            resblock_kernels=tuple(config[10]),
            resblock_dilations=tuple(tuple(dilations) for dilations in config[11]),
            upsample_initial_channel=config[13],
            gin_channels=config[16],
            pitch_guidance=f0,
            vocoder=vocoder_of_voice(vocoder),
        )


def _export_checks(config: Sequence[Any]) -> Iterator[tuple[str, Any, bool]]:
    """(what, its value, whether it is one) of each entry; a later one is only asked for when the earlier ones are."""

    def counts(value: Any, most: int) -> bool:
        return type(value) in (list, tuple) and 0 < len(value) <= 8 and all(count(v, most) for v in value)

    def count(value: Any, most: int = 1 << 15) -> bool:
        return type(value) is int and 0 < value <= most

    widths = {0: "spec_channels", 2: "inter_channels", 3: "hidden_channels", 4: "filter_channels", 5: "num_heads"}
    widths |= {13: "upsample_initial_channel", 15: "num_speakers", 16: "gin_channels", 17: "sample rate"}
    for at, name in widths.items():
        yield name, config[at], count(config[at], 1 << 17)
    yield "num_layers", config[6], count(config[6], 64)
    yield "kernel_size", config[7], count(config[7], 31)
    yield "num_heads", config[5], config[3] % config[5] == 0 and config[2] % 2 == 0
    yield "dropout", config[8], type(config[8]) in (int, float) and 0 <= config[8] <= 1
    yield "resblock", config[9], type(config[9]) in (int, str) and str(config[9]) == "1"
    kernels, dilations, rates, ups = config[10], config[11], config[12], config[14]
    yield "resblock_kernels", kernels, counts(kernels, 31) and all(k % 2 for k in kernels)
    is_fit = type(dilations) in (list, tuple) and len(dilations) == len(kernels)
    yield "resblock_dilations", dilations, is_fit and all(counts(d, 64) for d in dilations)
    yield "upsample_rates", rates, counts(rates, 64) and config[13] % 2 ** len(rates) == 0
    is_fit = counts(ups, 128) and len(ups) == len(rates)
    yield "upsample_kernels", ups, is_fit and all(k >= r and (k - r) % 2 == 0 for k, r in zip(ups, rates, strict=True))
