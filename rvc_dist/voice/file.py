"""Voice files as they are read, ours and those of other tools of RVC; `train/voice_file.py` writes ours."""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any, Literal, TypeAlias

import torch
import yaml
from torch import nn
from torch.nn.modules.module import register_module_parameter_registration_hook

from rvc_dist.features.identity import EmbedderId
from rvc_dist.files import ForeignFileError
from rvc_dist.models.generator import Generator
from rvc_dist.models.shape import GeneratorShape
from rvc_dist.models.state_dict import SPEAKER_TABLE, from_upstream
from rvc_dist.models.torch_file import load_pth, weights
from rvc_dist.schema import MAX_YAML_BYTES, check, parse_yaml, record, within
from rvc_dist.train.voice_file import Pitched, SpeakerInfo
from rvc_dist.workspace import StageError

logger = logging.getLogger(__name__)


Unvoiced: TypeAlias = Literal["zero", "interpolated"]
"""The f0 of unvoiced frames that a voice was trained with: 0 Hz, or drawn on between the voiced frames around them."""


class _Fields(Pitched, total=False):
    """What is read of a voice file besides its weights and what `GeneratorShape` and `EmbedderId` read."""

    version: Literal["v1", "v2"]
    vocoder: str | None
    trained_speakers: list[int]
    speaker_info: list[SpeakerInfo] | None
    unvoiced: Unvoiced
    energy: bool | None
    architecture: Literal["RVC", "SVC"] | None
    recipe: str | None


CONVERTED_AS = {
    "preprocess": ("process_effects",),
    "extract": ("f0_method", "f0_min", "f0_max", "f0_autotune", "f0_autotune_strength"),
}
"""Of the recipe in a voice file, what conversion does as training did."""


@dataclass(frozen=True)
class Voice:
    """A voice file, ready to use."""

    generator: Generator
    """Without its posterior encoder."""
    embedder: EmbedderId
    """contentvec where the file says nothing."""
    version: Literal["v1", "v2"]
    trained_speakers: tuple[int, ...] = ()
    """Rising rows of the speaker table that were trained; none where the file does not say, as those of other tools."""
    speakers: Mapping[int, SpeakerInfo] = field(default_factory=dict)
    """By row, those whose name the file says."""
    unvoiced: Unvoiced | None = None
    """None where the file does not say, as those of other tools."""
    f0_median: float | None = None
    """Of all voiced frames that it was trained on, in Hz, where the file says it."""
    trained_with: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    """CONVERTED_AS by section and key, as far as the file says it; a `Recipe` will judge the values."""

    def speaker(self, asked: int | str | None) -> int:
        """The row to speak with: that of an id or a name, or the voice's only one, or the lowest of several (logged).

        An id goes before a name of the same digits.

        Raises:
            StageError: `asked` was never trained, or is the name of several speakers.
        """
        known = self.trained_speakers or range(self.generator.shape.num_speakers)
        names = {row: one["name"] for row, one in self.speakers.items() if row in known and one["name"] != str(row)}
        listed = (f"{row} ({names[row]})" if row in names else str(row) for row in self.trained_speakers)
        ids = ", ".join(listed) or f"0 to {len(known) - 1}"
        if asked is None:
            if len(self.trained_speakers) > 1:
                logger.info("infer: speaker %d of those trained (%s); infer.speaker chooses another", known[0], ids)
            return known[0]
        rows = [row for row in known if str(row) == str(asked)] or [row for row in names if names[row] == str(asked)]
        if len(rows) > 1:
            raise StageError(f"infer.speaker: {asked} is the name of the speakers {ids};", "give an id")
        if not rows:
            what = "was trained on" if self.trained_speakers else "has"
            raise StageError(f"infer.speaker: got {asked}, this voice {what} speaker{'s' * (len(known) > 1)} {ids}")
        return rows[0]

    def median_f0(self, speaker: int) -> float | None:
        """The median pitch in Hz of a speaker, or of the whole voice; None where the file says neither."""
        own = self.speakers[speaker].get("f0_median") if speaker in self.speakers else None
        return own or self.f0_median

    def trained_with_yaml(self) -> str:
        """What is known of the recipe, as a voice file holds it."""
        return yaml.safe_dump({part: dict(values) for part, values in self.trained_with.items()}, sort_keys=False)

    @property
    def rate(self) -> int:
        return self.generator.shape.sample_rate

    @classmethod
    def load(cls, path: Path, device: torch.device, key: str = "infer.model") -> Voice:
        """A voice of ours or of another RVC tool; nothing in its file is run. `key` is what names it.

        Raises:
            StageError: no such file, or not a voice that this package can build.
        """
        data = _read(path, key)
        try:
            fields = check(data, _Fields)
            version = fields.get("version", "v1")
            state = {k: v for k, v in from_upstream(weights(data["weight"])).items() if not k.startswith("enc_q.")}
            is_svc = fields.get("architecture") == "SVC"
            shape = GeneratorShape.from_export_config(
                data["config"],
                version=version,
                f0=bool(int(data.get("f0", 1))),
                content_channels=state["pre.weight" if is_svc else "enc_p.emb_phone.weight"].shape[1],
                vocoder=fields.get("vocoder") or "HiFi-GAN",
                energy=bool(fields.get("energy")),
                architecture="SVC" if is_svc else "RVC",
            )
            # The list carries one row a speaker of the network it was made from; the table itself is what counts.
            num_speakers = state[SPEAKER_TABLE].shape[0]
            with _numbers_of_at_most(sum(v.numel() for v in state.values())):
                generator = Generator(replace(shape, num_speakers=num_speakers), without_posterior=True)
            embedder = EmbedderId.from_voice(data) or EmbedderId("contentvec")
            trained_with = _trained_with(fields.get("recipe") or "")
            named = {info["id"]: info for info in fields.get("speaker_info") or []}
            trained = tuple(sorted(set(fields.get("trained_speakers") or named)))
            for name, rows in ("trained_speakers", trained), ("speaker_info", tuple(named)):
                check(rows, list[Annotated[int, within(0, num_speakers - 1)]], name)
        except (AttributeError, IndexError, KeyError, OverflowError, RuntimeError, TypeError, ValueError) as error:
            reason = f"it has no {error}" if isinstance(error, KeyError) else str(error)[:300]
            raise StageError(f"{key}: {path} holds no voice that can be built here ({reason})") from error
        wanted = {k: v.shape for k, v in generator.state_dict().items()}
        got = {k: v.shape for k, v in state.items()}
        if wanted != got:
            differ = sorted(k[:80] for k in {**wanted, **got} if wanted.get(k) != got.get(k))
            raise StageError(f"{key}: {path} does not fit its own config: {', '.join(differ[:10])}")
        generator.load_state_dict(state)
        told: dict[str, Any] = {
            # rvc-next, which tells the median pitch, does not tell that it draws on.
            "unvoiced": fields.get("unvoiced") or ("interpolated" if fields.get("f0_median") else None),
            "f0_median": fields.get("f0_median") or None,
            "trained_with": trained_with,
        }
        return cls(generator.to(device).eval(), embedder, version, trained, named, **told)


def _trained_with(text: str) -> dict[str, dict[str, Any]]:
    """What a voice file's recipe says of CONVERTED_AS.

    Raises:
        ValueError: it is no recipe.
    """
    if len(text) > MAX_YAML_BYTES:
        raise ValueError(f"its recipe has {len(text)} letters, expected at most {MAX_YAML_BYTES}")
    tree = check(parse_yaml(text.encode()) or {}, record(False, **dict.fromkeys(CONVERTED_AS, dict)), "its recipe")
    return {part: {k: v for k, v in tree.get(part, {}).items() if k in keys} for part, keys in CONVERTED_AS.items()}


def _read(path: Path, key: str) -> dict[str, Any]:
    """The contents of a voice file.

    Raises:
        StageError: no such file, or not one with `weight` and `config`.
    """
    try:
        data = load_pth(path)
    except FileNotFoundError as error:
        raise StageError(f"{key}: {path} does not exist;", "train one, or name another") from error
    except ForeignFileError as error:
        raise StageError(f"{key}: {path} is not a voice file ({error})") from error
    if isinstance(data, dict) and {"weight", "config"} <= data.keys():
        return data
    hint = "; it looks like a training checkpoint" if isinstance(data, dict) and "model" in data else ""
    raise StageError(f"{key}: {path} is not a voice file: expected `weight` and `config` in it{hint}")


@contextmanager
def _numbers_of_at_most(count: int) -> Iterator[None]:
    """Inside, a network that would take more memory than twice its file's `count` numbers is not built.

    Twice, since a weight that is normed is registered once as itself and then in two parts.

    Raises:
        ValueError: a layer is too much; its memory was not touched yet.
    """
    left, builder = 2 * count, threading.get_ident()

    def register(module: nn.Module, name: str, parameter: nn.Parameter | None) -> None:
        nonlocal left
        if parameter is None or threading.get_ident() != builder:  # the hook hears what any thread builds
            return
        left -= parameter.numel()
        if left < 0:
            raise ValueError(f"its config asks for more weights than the {count} that it holds")

    hook = register_module_parameter_registration_hook(register)
    try:
        yield
    finally:
        hook.remove()
