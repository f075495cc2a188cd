"""The networks of a run: their shapes, where their weights begin, and what a checkpoint must agree on."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from rvc_dist.config import Recipe
from rvc_dist.features.identity import EmbedderId
from rvc_dist.models.discriminator import MultiPeriodDiscriminator, PeriodDiscriminator, ScaleDiscriminator
from rvc_dist.models.encoders import Transformer
from rvc_dist.models.generator import Generator
from rvc_dist.models.modules import ResBlock, WaveNet
from rvc_dist.models.shape import GeneratorShape
from rvc_dist.train import checkpoint, memory
from rvc_dist.train.dataset import ClipTable
from rvc_dist.workspace import StageError

logger = logging.getLogger(__name__)

PRETRAINED = {"generator": "pretrained_g", "discriminator": "pretrained_d"}
"""The recipe's key of each network's first weights."""
RECOMPUTED = (ResBlock, WaveNet, Transformer, PeriodDiscriminator, ScaleDiscriminator)
"""What `train.activation_checkpointing` computes twice: nearly all activations are inside these."""


def build(
    recipe: Recipe, table: ClipTable, resumed: Mapping[str, Any] | None = None
) -> tuple[GeneratorShape, dict[str, nn.Module]]:
    """Both networks, by checkpoint.MODELS, the same on all ranks.

    They begin with the pretrained weights, unless a checkpoint with the identity `resumed` will fill them: then those
    files need not be there any more.

    Raises:
        StageError: a pretrained file is missing, or does not fit the recipe or the dataset.
    """
    config = recipe.train
    pretrained = {
        name: checkpoint.read_pretrained(Path(file), f"train.{key}")
        for name, key in PRETRAINED.items()
        if (file := getattr(config, key)) is not None and resumed is None
    }
    states = {name: file.state for name, file in pretrained.items()}
    if "generator" in pretrained:
        features = EmbedderId.from_features(table.embedder)
        checkpoint.check_embedder(
            Path(str(config.pretrained_g)), pretrained["generator"].embedder, features, "train.pretrained_g"
        )
    if resumed is None:
        num_speakers = _num_speakers(table, config.pretrained_g, states.get("generator"))
    else:
        num_speakers = max(table.num_speakers, resumed["generator.num_speakers"])
    shape = GeneratorShape.from_recipe(recipe, table.content_channels, num_speakers)
    torch.manual_seed(config.seed)
    modules: dict[str, nn.Module] = {
        "generator": Generator(shape),
        "discriminator": MultiPeriodDiscriminator(recipe.model.version, recipe.model.discriminator_channels),
    }
    for name, module in modules.items():
        key = PRETRAINED[name]
        if config.activation_checkpointing:
            memory.apply_activation_checkpointing(module, RECOMPUTED)
        if name in states:
            checkpoint.load_pretrained(Path(getattr(config, key)), states[name], module, f"train.{key}")
        elif resumed is None:
            logger.info("train.%s is not set: these weights start from random numbers", key)
    return shape, modules


def _num_speakers(table: ClipTable, file: str | None, state: Mapping[str, Tensor] | None) -> int:
    """One row a speaker; with a pretrained generator's `state`, as many as it has."""
    if state is None:
        return table.num_speakers
    if "emb_g.weight" not in state or state["emb_g.weight"].ndim != 2:
        raise StageError(f"train.pretrained_g: {file} holds no generator (no emb_g.weight)")
    rows = state["emb_g.weight"].shape[0]
    if rows < table.num_speakers:
        raise StageError(
            f"train.pretrained_g: {file} has {rows} speakers, the dataset's highest speaker id is "
            f"{table.num_speakers - 1}"
        )
    return rows


def identity(recipe: Recipe, shape: GeneratorShape, table: ClipTable) -> dict[str, Any]:
    """What a checkpoint must agree on to be continued; plain JSON data."""
    values = {f"generator.{k}": v for k, v in asdict(shape).items()} | {
        "discriminator.version": recipe.model.version,
        "discriminator.channels": recipe.model.discriminator_channels,
        "optimizer": recipe.train.optimizer_name,
        "embedder": table.embedder,
    }
    plain: dict[str, Any] = json.loads(json.dumps(values))
    return plain
