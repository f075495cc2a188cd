"""The blend stage: two voices mixed into one, weight by weight, as the model fusion of other tools does it."""

from __future__ import annotations

import logging
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rvc_dist.config import Recipe
from rvc_dist.models.state_dict import SPEAKER_TABLE, to_upstream
from rvc_dist.models.torch_file import save_pth
from rvc_dist.train.voice_file import Dataset, SpeakerInfo, voice_fields
from rvc_dist.voice.file import Voice
from rvc_dist.workspace import Shard, StageError

logger = logging.getLogger(__name__)


def run(recipe: Recipe, shard: Shard, first: str, second: str) -> None:
    """Write blend.output: blend.ratio of the voice file `first`, the rest of `second`.

    Raises:
        StageError: one is no voice file, both are not of one kind, or the output is one of them.
    """
    if not shard.is_first:
        return
    paths, target = (Path(first), Path(second)), Path(recipe.blend.output)
    if any(target.exists() and path.exists() and target.samefile(path) for path in paths):
        raise StageError(f"blend.output: {target} is one of the voices that are blended;", "give another")
    a, b = (Voice.load(path, torch.device("cpu"), "blend") for path in paths)
    check_alike(paths, a, b)
    save_pth(target, blended(a, b, recipe, paths))
    logger.info("blend: %s: %g of %s, the rest of %s", target, recipe.blend.ratio, *paths)


def check_alike(paths: tuple[Path, Path], a: Voice, b: Voice) -> None:
    """Nothing, unless the two voices cannot be mixed; what may spoil the mix is warned of.

    Raises:
        StageError: their networks or their content encoders differ; says in what.
    """
    of_a, of_b = ({**asdict(v.generator.shape), "version": v.version, "num_speakers": 0} for v in (a, b))
    differ = [f"{key} ({of_a[key]} and {of_b[key]})" for key in of_a if of_a[key] != of_b[key]]
    agree = a.embedder.agrees_with(b.embedder)
    if agree is False:
        differ.append(f"content encoder ({a.embedder} and {b.embedder})")
    if differ:
        raise StageError(f"blend: {paths[0]} and {paths[1]} are not of one kind: they differ in {', '.join(differ)}")
    if agree is None:
        logger.warning("blend: whether %s and %s are one content encoder cannot be told", a.embedder, b.embedder)
    if None not in (a.unvoiced, b.unvoiced) and a.unvoiced != b.unvoiced:
        logger.warning(
            "blend: the pitch of unvoiced frames is %s and %s: the mix is fed the first's", a.unvoiced, b.unvoiced
        )


def blended(a: Voice, b: Voice, recipe: Recipe, paths: tuple[Path, Path]) -> dict[str, Any]:
    """The contents of the voice file of both, which lie in `paths`."""
    ratio, name = recipe.blend.ratio, Path(recipe.blend.output).stem
    states = (to_upstream(voice.generator.state_dict()) for voice in (a, b))
    own, other = ({key: value.cpu() for key, value in state.items()} for state in states)
    table, pairs = blended_speakers(own[SPEAKER_TABLE], other[SPEAKER_TABLE], a, b, ratio)
    weight = {key: torch.lerp(other[key], value, ratio) for key, value in own.items() if key != SPEAKER_TABLE}
    trained = sorted(pairs) if a.trained_speakers and b.trained_speakers else []
    dataset = Dataset(
        length="00:00:00",
        num_speakers=1 + max(pairs),
        speakers=[info for row in trained if (info := _info(row, *pairs[row], a, b, ratio))],
        f0_median=_mean(a.f0_median, b.f0_median, ratio),
    )
    shape = replace(a.generator.shape, num_speakers=len(table))
    halves = {key: value.half() for key, value in (weight | {SPEAKER_TABLE: table}).items()}
    fields = voice_fields(halves, shape, a.version, a.embedder, name, recipe.export.author, dataset)
    told: dict[str, Any] = {"trained_speakers": trained, "unvoiced": a.unvoiced or b.unvoiced}
    return (
        fields
        | {key: value for key, value in told.items() if value}
        | {
            "epoch": "0epoch",
            "step": 0,
            "info": f"{ratio:g} of {paths[0].stem}, {1 - ratio:g} of {paths[1].stem}, blended by rvc_dist",
            "overtrain_info": "not measured",
            "recipe": a.trained_with_yaml(),
        }
    )


Pair = tuple[int | None, int | None]


def blended_speakers(own: Tensor, other: Tensor, a: Voice, b: Voice, ratio: float) -> tuple[Tensor, dict[int, Pair]]:
    """The speaker table of both, and for each of its rows those of `a` and of `b` that it is made of.

    The only speakers of two voices become one, whatever their ids. Else speakers of one id do, and who was trained in
    one voice alone stays as there.
    """
    known = [v.trained_speakers or range(len(t)) for v, t in ((a, own), (b, other))]
    pairs: dict[int, Pair]
    if len(known[0]) == len(known[1]) == 1:
        pairs = {known[0][0]: (known[0][0], known[1][0])}
    else:
        rows = sorted({*known[0], *known[1]})
        pairs = {row: (row if row in known[0] else None, row if row in known[1] else None) for row in rows}
    table = (own if len(own) >= len(other) else other).clone()
    for row, (mine, yours) in pairs.items():
        if mine is not None and yours is not None:
            table[row] = torch.lerp(other[yours], own[mine], ratio)
        else:
            table[row] = own[mine] if mine is not None else other[yours]
    return table, pairs


def _info(row: int, mine: int | None, yours: int | None, a: Voice, b: Voice, ratio: float) -> SpeakerInfo | None:
    """Who speaks from a row of the new table; None where neither voice has a name for it."""
    own, other = (voice.speakers.get(-1 if i is None else i) for voice, i in ((a, mine), (b, yours)))
    names = dict.fromkeys(info["name"] for info in (own, other) if info is not None)
    medians = [info.get("f0_median") if info is not None else None for info in (own, other)]
    if not names:
        return None
    return SpeakerInfo(id=row, name=" + ".join(names), f0_median=_mean(medians[0], medians[1], ratio))


def _mean(own: float | None, other: float | None, ratio: float) -> float | None:
    """Of two pitches in Hz, or the one that is known."""
    if own is None or other is None:
        return own or other
    return round(ratio * own + (1 - ratio) * other, 2)
