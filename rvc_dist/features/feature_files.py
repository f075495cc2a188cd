"""The features of a run's clips: the settings that they depend on, their files and their report.

Shapes: T50 and T100 frames at 50 and 100 a second, C channels.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from typing import Any

import numpy as np

from rvc_dist.config import F0_HOP, Recipe
from rvc_dist.data.number_formats import stored_content
from rvc_dist.features.energy import energy_arrays
from rvc_dist.files import write_json
from rvc_dist.unit_stage import check_settings
from rvc_dist.workspace import (
    FeaturesHeader,
    FeaturesReport,
    StageError,
    Unit,
    WorkList,
    Workspace,
    fingerprint,
    is_done,
    read_json,
    save_arrays,
)

SINCE: dict[str, str | bool | None] = {
    "extract.precision": "fp32",
    "extract.content_format": "float32",
    "extract.unvoiced": "zero",
    "extract.f0_djcm_model": None,
    "extract.f0_crepe_model": None,
    "model.energy": False,
}
"""Settings that came later, and what features were made with before: it is left out, so that those are not stale."""


def complete(recipe: Recipe) -> bool | None:
    """True when the report says that all of this recipe's features are made of the present clips, else None."""
    work = Workspace(recipe.run_dir, recipe.name)
    report = read_report(work)
    if report is None:
        return None
    settings, embedder = report["settings"], report["settings"].get("embedder", {})
    known = settings in (feature_settings(recipe) | {"embedder": embedder}, imported_feature_settings(recipe, embedder))
    done = known and report["clips"] == fingerprint(list(clip_fingerprints(work).values()))
    return (done and mute_done(recipe, work, settings)) or None


def check_made(recipe: Recipe, work: Workspace, work_list: WorkList | None) -> None:
    """Nothing, unless the run's features were made with other settings than the recipe's.

    Raises:
        StageError: they were, or of other clips than those that the run's `work_list` now asks for.
    """
    if (report := read_report(work)) is not None:
        remedy = "run `rvc-dist extract` again"
        made_with = SINCE | report["settings"]
        check_settings(work.features_dir, made_with, SINCE | feature_settings(recipe), remedy)
        if work_list is not None and report["clips"] != fingerprint(list(work_list.fingerprints().values())):
            raise StageError(
                f"{work.features_dir} holds features of other clips than those of {work.clips_dir}:",
                "run `rvc-dist preprocess` to its end, and `rvc-dist extract` again",
            )


def read_report(work: Workspace) -> FeaturesReport | None:
    try:
        return read_json(work.features_report_file, FeaturesReport)
    except FileNotFoundError:  # another rank may withdraw it at any moment
        return None


def feature_settings(recipe: Recipe) -> dict[str, Any]:
    """The settings that the bytes of a feature depend on, under their recipe keys; those of SINCE where they differ."""
    values = asdict(recipe.extract)
    del values["include_mutes"]
    mix = values.pop("embedder_mix")
    values |= {"embedder_mix.layers": list(mix["layers"]), "embedder_mix.ratio": mix["ratio"]}
    of_model = {"model.version": recipe.model.version, "model.energy": recipe.model.energy}
    settings = of_model | {f"extract.{k}": v for k, v in values.items()}
    return {key: value for key, value in settings.items() if (key, value) not in SINCE.items()}


def imported_feature_settings(recipe: Recipe, embedder: dict[str, Any]) -> dict[str, Any]:
    """What imported features are taken to be made with: the recipe's settings, by an encoder of unknown weights.

    Without pitch guidance they may lack the pitch, and are not those of a recipe that asks for it.
    """
    settings = feature_settings(recipe) | {"embedder": embedder | {"hash": ""}}
    return settings if recipe.model.pitch_guidance else settings | {"model.pitch_guidance": False}


def clip_fingerprints(work: Workspace) -> dict[Unit, str]:
    """Every unit of the work list and the fingerprint of its clips file.

    Raises:
        StageError: the preprocess stage has not run, or not to its end.
    """
    work_list = WorkList.load(work.work_list_file)
    if work_list is None:
        raise StageError(f"{work.clips_dir} has no clips:", "run `rvc-dist preprocess` first")
    if missing := [work.clips_file(unit.id).name for unit in work_list.undone(work)]:
        raise StageError(
            f"{work.clips_dir}: {len(missing)} of {len(work_list.units)} units are missing or stale "
            f"({', '.join(missing[:5])}):",
            "run `rvc-dist preprocess` to its end first",
        )
    return work_list.fingerprints()


def pack_unit(
    clips_header: Mapping[str, Any],
    lengths: Sequence[int],
    features: Iterable[tuple[int, Any, Any]],
    embedder: dict[str, Any],
    wanted: str,
    content_format: str,
) -> tuple[dict[str, Any], dict[str, Any]]:
    """The features of one unit and their header, as `save_arrays` takes them.

    Args:
        lengths: of the unit's clips in samples.
        features: (clip, content [T50, C], f0 [T100]), as an extractor yields them. Its batches never cross a unit, so
            the bytes do not depend on the ranks.
        wanted: the fingerprint.
    """
    arrays: dict[str, Any] = {}
    clips: list[dict[str, Any]] = [dict(c) for c in clips_header["clips"]]
    for i, content, f0 in features:
        arrays[f"{i:05d}.content"], arrays[f"{i:05d}.f0"] = stored_content(content, content_format), f0
        clips[i] |= {"num_samples": lengths[i], "num_content": len(content), "num_f0": len(f0)}
    header = {"stamp": wanted, "sample_rate": clips_header["sample_rate"], "embedder": embedder, "clips": clips}
    return arrays, header


def write_mute(
    recipe: Recipe, work: Workspace, settings: dict[str, Any], content: Any, num_f0: int, num_samples: int
) -> None:
    """Write the silent clip: its content features [T50, C], and no pitch."""
    header = {
        "stamp": mute_fingerprint(recipe, settings),
        "num_samples": num_samples,
        "num_content": len(content),
        "num_f0": num_f0,
    }
    stored = stored_content(content, recipe.extract.content_format)
    arrays = {"00000.content": stored, "00000.f0": np.zeros(num_f0, np.float32)}
    silence = np.zeros(num_f0 * F0_HOP, np.float32)
    save_arrays(work.mute_file, arrays | energy_arrays(recipe, arrays, [silence]), header)


def mute_fingerprint(recipe: Recipe, settings: dict[str, Any]) -> str:
    return fingerprint(settings, recipe.preprocess.chunk_len, recipe.data.sample_rate)


def mute_done(recipe: Recipe, work: Workspace, settings: dict[str, Any]) -> bool:
    return not recipe.extract.include_mutes or is_done(work.mute_file, mute_fingerprint(recipe, settings))


def write_report(
    work: Workspace, settings: dict[str, Any], clips: Mapping[Unit, str], headers: Iterable[FeaturesHeader]
) -> int:
    """Write the report of features that are all there, and return how many content frames they have."""
    frames = sum(c["num_content"] for h in headers for c in h["clips"])
    report = {"settings": settings, "clips": fingerprint(list(clips.values())), "content_frames": frames}
    write_json(work.features_report_file, report)
    return frames
