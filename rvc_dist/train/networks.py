"""The networks of a run: their shapes, where their weights begin, and what a checkpoint must agree on."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from rvc_dist.config import Recipe
from rvc_dist.features.feature_files import SINCE
from rvc_dist.features.identity import EmbedderId
from rvc_dist.files import ForeignFileError
from rvc_dist.models.discriminator import MultiPeriodDiscriminator, PeriodDiscriminator, ScaleDiscriminator
from rvc_dist.models.encoders import Transformer
from rvc_dist.models.generator import Generator
from rvc_dist.models.modules import ResBlock, ResidualLayers, WaveNet
from rvc_dist.models.shape import GeneratorShape
from rvc_dist.models.state_dict import from_upstream
from rvc_dist.models.torch_file import load_pth, weights
from rvc_dist.train import memory
from rvc_dist.train.dataset import ClipTable
from rvc_dist.workspace import StageError

logger = logging.getLogger(__name__)

PRETRAINED = {"generator": "pretrained_g", "discriminator": "pretrained_d"}
"""The recipe's key of each network's first weights."""
RECOMPUTED = (ResBlock, ResidualLayers, WaveNet, Transformer, PeriodDiscriminator, ScaleDiscriminator)
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
        name: Pretrained.read(Path(file), f"train.{key}")
        for name, key in PRETRAINED.items()
        if (file := getattr(config, key)) is not None and resumed is None
    }
    num_speakers = table.num_speakers
    if resumed is not None:
        num_speakers = max(num_speakers, resumed["generator.num_speakers"])
    elif "generator" in pretrained:  # one row a speaker, as many as it has
        pretrained["generator"].check_embedder(EmbedderId.from_features(table.embedder))
        num_speakers = pretrained["generator"].num_speakers(num_speakers)
    shape = GeneratorShape.from_recipe(recipe, table.content_channels, num_speakers)
    torch.manual_seed(config.seed)
    modules: dict[str, nn.Module] = {
        "generator": Generator(shape),
        "discriminator": MultiPeriodDiscriminator(recipe.model.version, recipe.model.discriminator_channels),
    }
    for name, module in modules.items():
        if config.activation_checkpointing:
            memory.apply_activation_checkpointing(module, RECOMPUTED)
        if name in pretrained:
            pretrained[name].fill(module)
        elif resumed is None:
            logger.info(f"train.{PRETRAINED[name]} is not set: these weights start from random numbers")
    return shape, modules


def identity(recipe: Recipe, shape: GeneratorShape, table: ClipTable) -> dict[str, Any]:
    """What a checkpoint must agree on to be continued; plain JSON data."""
    values = {f"generator.{k}": v for k, v in asdict(shape).items()} | {
        "discriminator.version": recipe.model.version,
        "discriminator.channels": recipe.model.discriminator_channels,
        "optimizer": recipe.train.optimizer_name,
        "embedder": table.embedder,
    }
    if recipe.model.pitch_guidance and recipe.extract.unvoiced != SINCE["extract.unvoiced"]:
        values["extract.unvoiced"] = recipe.extract.unvoiced
    plain: dict[str, Any] = json.loads(json.dumps(values))
    return plain


@dataclass(frozen=True)
class Pretrained:
    """The contents of a `G_*.pth` or `D_*.pth`: weights that a run begins with."""

    where: str
    """The recipe's key and the file, for messages."""
    state: dict[str, Tensor]
    """In this package's spelling of weight norm."""
    embedder: EmbedderId | None
    """The content encoder that it was trained with, where the file says so: those of RVC do not."""

    @classmethod
    def read(cls, path: Path, key: str) -> Pretrained:
        """Read the weights that the recipe names in `key`.

        Raises:
            StageError: no such file, or not one that holds weights alone.
        """
        where = f"{key}: {path}"
        try:
            data = load_pth(path)
        except FileNotFoundError as error:
            raise StageError(f"{where} does not exist") from error
        except ForeignFileError as error:
            raise StageError(f"{where} is not a file of plain weights ({error})") from error
        state = data.get("model", data.get("weight", data)) if isinstance(data, dict) else None
        if not isinstance(state, dict) or not state or not all(isinstance(v, Tensor) for v in state.values()):
            raise StageError(f"{where} holds no state dict;", "expected a dict with `model`, as G_*.pth and D_*.pth")
        if "weight" in data and "config" in data and not any(str(k).startswith("enc_q.") for k in state):
            kind = key[-1].upper()
            raise StageError(
                f"{where} is a voice file, made to convert with: it has no "
                f"{'posterior encoder (enc_q)' if kind == 'G' else 'discriminator'}, which training needs;",
                f"give the {kind}_*.pth of the training that it came from, or pretrained weights such as "
                f"f0{kind}48k.pth",
            )
        try:
            network = from_upstream(weights(state))
        except ForeignFileError as error:
            raise StageError(f"{where} cannot be trained on from: {error};", "give another file") from error
        try:
            return cls(where, network, EmbedderId.from_voice(data))
        except ValueError as error:
            raise StageError(f"{where} does not say what it was trained with: {error}") from error

    def num_speakers(self, wanted: int) -> int:
        """The speakers that this generator has: at least as many as are `wanted`.

        Raises:
            StageError: it has fewer, or it is no generator.
        """
        table = self.state.get("emb_g.weight")
        if table is None or table.ndim != 2:
            raise StageError(f"{self.where} holds no generator (no emb_g.weight)")
        if len(table) < wanted:
            raise StageError(
                f"{self.where} has {len(table)} speakers, the dataset's highest speaker id is {wanted - 1}"
            )
        return len(table)

    def check_embedder(self, features: EmbedderId) -> None:
        """Make sure that these weights know the content features that they are to go on with.

        Raises:
            StageError: they were trained with another content encoder or another mix of its layers.
        """
        if self.embedder is None:
            if features.name != "contentvec":
                logger.warning(
                    f"{self.where} does not say which content encoder it was trained with; those of RVC were trained "
                    f"with contentvec, and the features are of {features}"
                )
            return
        agrees = features.agrees_with(self.embedder)
        if agrees is None:
            logger.warning(
                f"{self.where} was trained with {self.embedder}, the features are of {features}: whether these are "
                "the same cannot be told, since the file has no hash of the encoder's weights. If they are not, use "
                "other weights or extract again"
            )
        elif not agrees:
            raise StageError(
                f"{self.where} was trained with {self.embedder}, the features are of {features}.",
                "Run `rvc-dist extract` with that encoder (extract.embedder_model and extract.embedder_mix), or leave "
                f"{self.where.partition(':')[0]} out",
            )

    def fill(self, module: nn.Module) -> None:
        """Give `module` these weights.

        Raises:
            StageError: keys or shapes do not fit, all of them listed.
        """
        wanted = module.state_dict()
        problems = [f"{k}: missing" for k in wanted if k not in self.state]
        problems += [f"{k}: not part of this network" for k in self.state if k not in wanted]
        problems += [
            f"{k}: {list(v.shape)}, this network has {list(wanted[k].shape)}"
            for k, v in self.state.items()
            if k in wanted and v.shape != wanted[k].shape
        ]
        if problems:
            shown = "".join(f"\n  {p}" for p in problems[:20])
            more = f"\n  and {len(problems) - 20} more" if len(problems) > 20 else ""
            raise StageError(
                f"{self.where} does not fit this recipe's network (version, sample rate, pitch guidance, widths and "
                f"the encoder's width must be those it was trained with):{shown}{more}"
            )
        module.load_state_dict({k: v.float() for k, v in self.state.items()})
        logger.info(self.where)
