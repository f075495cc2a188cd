"""Which content encoder features are of: what features, checkpoints and voice files carry, and whether two agree."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from rvc_dist.choices import EMBEDDERS, embedder_called
from rvc_dist.config import EmbedderMix, Fraction, Layers
from rvc_dist.schema import check, record

IN_VOICES = {"name": "embedder_model", "hash": "embedder_hash", "mix": "embedder_mix"}
"""Keys of the features' headers -> those of voice files."""
_VOICE = record(False, embedder_model=str | None, embedder_hash=str | None)
_MIX = record(layers=Layers, ratio=Fraction)


@dataclass(frozen=True)
class EmbedderId:
    """A content encoder and the layers mixed into its features."""

    name: str
    """As the recipe gave it."""
    hash: str | None = None
    """`Embedder.weights_hash`; None where another tool's file or an import has only a name."""
    mix: EmbedderMix = field(default_factory=EmbedderMix)

    def __post_init__(self) -> None:
        if not self.mix.is_on:  # there are many ways to mix nothing
            object.__setattr__(self, "mix", EmbedderMix())

    @classmethod
    def from_features(cls, data: Mapping[str, Any]) -> EmbedderId:
        """What the features' headers and the checkpoints hold."""
        return cls(data["name"], data.get("hash") or None, _read_mix(data.get("mix")))

    def to_features(self) -> dict[str, Any]:
        mix = {"mix": asdict(self.mix) | {"layers": list(self.mix.layers)}} if self.mix.is_on else {}
        return {"name": self.name, "hash": self.hash} | mix

    @classmethod
    def from_voice(cls, data: dict[str, Any]) -> EmbedderId | None:
        """What a voice or another `.pth` file says at its top level; None when it says nothing.

        Raises:
            ValueError: the fields are there, but not as they are written.
        """
        check(data, _VOICE)
        fields = {key: data.get(name) for key, name in IN_VOICES.items()}
        if fields["name"] is None:
            return None
        name = fields["name"] if fields["hash"] else embedder_called(fields["name"])  # of another tool
        return cls.from_features(fields | {"name": name})

    def to_voice(self) -> dict[str, Any]:
        return {IN_VOICES[key]: value for key, value in self.to_features().items()}

    def agrees_with(self, other: EmbedderId) -> bool | None:
        """Whether both give the same features, or None where that cannot be told.

        Two hashes decide, whatever the names: a folder with the weights of contentvec is contentvec. Where one is
        missing, the names do: two different names in EMBEDDERS are two encoders; a folder's says nothing of what is in
        it. That a file without a hash says nothing of a mix does not mean that there was none.
        """
        if self.hash is not None and other.hash is not None:
            return (self.hash, self.mix) == (other.hash, other.mix)
        if self.name == other.name:
            return True if self.mix == other.mix else None
        return False if {self.name, other.name} <= EMBEDDERS.keys() else None

    def __str__(self) -> str:
        details = [f"weights {self.hash}"] if self.hash is not None else []
        if self.mix.is_on:
            details.append(f"{self.mix.ratio:g} of layers {', '.join(map(str, self.mix.layers))} mixed in")
        return f"{self.name} ({', '.join(details)})" if details else self.name


def _read_mix(data: Any) -> EmbedderMix:
    """The mix in a file.

    Raises:
        ValueError: it is none.
    """
    if data is None:
        return EmbedderMix()
    mix: dict[str, Any] = check(data, _MIX, "embedder_mix")
    return EmbedderMix(tuple(mix["layers"]), float(mix["ratio"]))
