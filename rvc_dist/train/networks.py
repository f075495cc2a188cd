"""The networks of a run: their shapes, where their weights begin, and what a checkpoint must agree on."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from rvc_dist.config import Recipe
from rvc_dist.features.feature_files import SINCE
from rvc_dist.features.hub import hub_file
from rvc_dist.features.identity import EmbedderId
from rvc_dist.files import ForeignFileError
from rvc_dist.models.discriminator import (
    MultiPeriodDiscriminator,
    ResolutionDiscriminator,
    SubDiscriminator,
)
from rvc_dist.models.encoders import Transformer
from rvc_dist.models.generator import Generator
from rvc_dist.models.modules import ResBlock, ResidualLayers, WaveNet
from rvc_dist.models.shape import GeneratorShape
from rvc_dist.models.state_dict import SPEAKER_TABLE
from rvc_dist.models.weights_file import GENERATOR, WeightsFile, kind_of, misfits, shapes_of
from rvc_dist.train import memory
from rvc_dist.train.checkpoint import Checkpoint
from rvc_dist.train.dataset import ClipTable
from rvc_dist.workspace import StageError

logger = logging.getLogger(__name__)

PRETRAINED = {"generator": "pretrained_g", "discriminator": "pretrained_d"}
"""The recipe's key of each network's first weights."""
ENERGY = "enc_p.emb_energy."
"""What a generator that follows energy has besides: where its first weights lack it, it begins as nothing."""
SHAPE_SINCE = {"energy": False, "architecture": "rvc"}
"""Fields of a GeneratorShape that came later, and what checkpoints without them have."""
RECOMPUTED = (ResBlock, ResidualLayers, WaveNet, Transformer, SubDiscriminator)
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
    config, problems = recipe.train, list[StageError]()
    pretrained = {} if resumed is not None else read_pretrained(recipe, problems)
    num_speakers = table.num_speakers
    if resumed is not None:
        num_speakers = max(num_speakers, resumed["generator.num_speakers"])
    elif "generator" in pretrained:  # one row a speaker, as many as it has
        with gathered(problems):
            pretrained["generator"].check_embedder(EmbedderId.from_features(table.embedder))
        with gathered(problems):
            fresh = table.trained_speakers if config.fresh_speakers else ()
            pretrained["generator"] = pretrained["generator"].with_speakers(num_speakers, fresh, config.seed)
            num_speakers = len(pretrained["generator"].state[SPEAKER_TABLE])
    elif config.fresh_speakers:
        logger.warning("train.fresh_speakers does nothing: without a pretrained generator all speakers are new")
    shape = GeneratorShape.from_recipe(recipe, table.content_channels, num_speakers)
    torch.manual_seed(config.seed)
    modules = make_networks(recipe, shape)
    for name, module in modules.items():
        if config.activation_checkpointing:
            memory.apply_activation_checkpointing(module, RECOMPUTED)
        if name in pretrained:
            with gathered(problems):
                pretrained[name].fill(module)
        elif resumed is None and not problems:
            logger.info(f"train.{PRETRAINED[name]} is not set: these weights start from random numbers")
    if problems:
        raise PretrainedError(problems)
    return shape, modules


def make_networks(recipe: Recipe, shape: GeneratorShape) -> dict[str, nn.Module]:
    """Both networks with random weights, by checkpoint.MODELS."""
    return {
        "generator": Generator(shape),
        "discriminator": MultiPeriodDiscriminator(recipe.model.discriminator_spec, recipe.model.discriminator_channels),
    }


class PretrainedError(StageError):
    """Pretrained weights that a run cannot begin with: all that is wrong with either file."""

    def __init__(self, each: list[StageError]) -> None:
        super().__init__("\n".join(map(str, each)))
        self.args = (each,)  # so that it can be pickled
        self.each = each


@contextmanager
def gathered(problems: list[StageError]) -> Iterator[None]:
    """Inside, a StageError is added to `problems` and ends nothing else."""
    try:
        yield
    except StageError as error:
        problems.append(error)


def read_pretrained(recipe: Recipe, problems: list[StageError]) -> dict[str, Pretrained]:
    """The first weights of each network that has some; those of a base model are fetched where they are not there."""
    found = {}
    for name, key in PRETRAINED.items():
        with gathered(problems):
            if (file := getattr(recipe.train, key)) is not None:
                found[name] = Pretrained.read(Path(file), f"train.{key}")
            elif name in recipe.base_model_files:
                path = base_model_file(recipe, name)
                found[name] = Pretrained.read(path, f"train.pretrained ({recipe.train.pretrained}, {name})", name)
    return found


def base_model_file(recipe: Recipe, name: str) -> Path:
    """The file of the recipe's base model for a network.

    Raises:
        StageError: it is not to be had.
    """
    try:
        return hub_file(*recipe.base_model_files[name])
    except FileNotFoundError as error:
        raise StageError(
            f"train.pretrained: the {name} of {recipe.train.pretrained} cannot be had. {error}",
            "Run `rvc-dist fetch` where the hub answers, or give its files as train.pretrained_g and pretrained_d",
        ) from error


def identity(recipe: Recipe, shape: GeneratorShape, table: ClipTable) -> dict[str, Any]:
    """What a checkpoint must agree on to be continued; plain JSON data."""
    values = {f"generator.{k}": v for k, v in asdict(shape).items() if (k, v) not in SHAPE_SINCE.items()} | {
        "discriminator.version": recipe.model.version,
        "discriminator.channels": recipe.model.discriminator_channels,
        "optimizer": recipe.train.optimizer_name,
        "embedder": table.embedder,
    }
    if recipe.model.pitch_guidance and recipe.extract.unvoiced != SINCE["extract.unvoiced"]:
        values["extract.unvoiced"] = recipe.extract.unvoiced
    if recipe.model.discriminator_kind != recipe.model.version:
        values["discriminator.kind"] = recipe.model.discriminator_kind
    plain: dict[str, Any] = json.loads(json.dumps(values))
    return plain


def speaker_table(known: Tensor, count: int, fresh: Sequence[int], seed: int, where: str) -> Tensor:
    """The speaker table `known` of `where` with `count` rows; those that it lacks, and the `fresh` ones, are new.

    New rows point in random directions and have the mean norm of the others: the networks meet somebody who is no
    farther off than those whom they know.
    """
    if count > len(known):
        logger.info(
            f"{where}: its speaker table grows from {len(known)} to {count} rows, since the dataset's highest speaker "
            f"id is {count - 1}"
        )
    random = torch.Generator().manual_seed(seed)
    drawn = nn.functional.normalize(torch.randn(count, known.shape[1], generator=random))
    drawn *= known.norm(dim=1).mean()
    table = torch.cat([known, drawn[len(known) :]])
    rows = list(fresh)
    table[rows] = drawn[rows]
    return table


def with_speakers(saved: Checkpoint, count: int) -> Checkpoint:
    """`saved` with at least `count` rows in its speaker table; of new ones the optimizer remembers nothing."""
    known, step, state = saved.models["generator"][SPEAKER_TABLE], saved.progress.step, saved.optimizers["generator"]
    missing = count - len(known)
    if missing <= 0:
        return saved
    table = speaker_table(known, count, (), step, f"the checkpoint of step {step}")
    moments = {
        key: torch.cat([moment, moment.new_zeros(missing, *moment.shape[1:])])
        for key, moment in state.tensors.items()
        if key.startswith(f"{SPEAKER_TABLE}/") and moment.ndim and len(moment) == len(known)
    }
    return replace(
        saved,
        models={**saved.models, "generator": {**saved.models["generator"], SPEAKER_TABLE: table}},
        ema=saved.ema and saved.ema | {SPEAKER_TABLE: torch.cat([saved.ema[SPEAKER_TABLE], table[len(known) :]])},
        optimizers={**saved.optimizers, "generator": replace(state, tensors=state.tensors | moments)},
    )


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
    def read(cls, path: Path, key: str, network: str = "") -> Pretrained:
        """Read the weights that the recipe names in `key`, of a `network` of checkpoint.MODELS.

        Raises:
            StageError: no such file, or not one that holds weights for training, all of them finite.
        """
        where = f"{key}: {path}"
        try:
            file = WeightsFile.read(path)
        except FileNotFoundError as error:
            raise StageError(f"{where} does not exist") from error
        except ForeignFileError as error:
            raise StageError(
                f"{where} is not a file of weights that can be trained on from ({error});",
                "`rvc-dist inspect FILE` says what a file is",
            ) from error
        if file.is_voice and kind_of(file.shapes) != GENERATOR:
            letter = network[:1].upper() or key[-1].upper()
            raise StageError(
                f"{where} is a voice file, made to convert with: it has no "
                f"{'posterior encoder (enc_q)' if letter == 'G' else 'discriminator'}, which training needs;",
                f"give the {letter}_*.pth of the training that it came from, or pretrained weights such as "
                f"f0{letter}48k.pth",
            )
        try:
            return cls(where, file.state, EmbedderId.from_voice(file.data))
        except ValueError as error:
            raise StageError(f"{where} does not say what it was trained with: {error}") from error

    def with_speakers(self, count: int, fresh: Sequence[int], seed: int) -> Pretrained:
        """With at least `count` rows in the generator's speaker table; those that it lacks and `fresh` ones are new.

        Raises:
            StageError: it is no generator.
        """
        known = self.state.get(SPEAKER_TABLE)
        if known is None or known.ndim != 2 or not len(known):
            raise StageError(f"{self.where} holds no generator (no {SPEAKER_TABLE})")
        num_rows = max(count, len(known))
        table = speaker_table(known.float(), num_rows, fresh, seed, self.where)
        if fresh:
            logger.info(f"train.fresh_speakers: {len(fresh)} of the dataset begin with new rows")
        return replace(self, state={**self.state, SPEAKER_TABLE: table})

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
        """Give `module` these weights; discriminators over spectrograms keep theirs where these are of periods alone.

        Raises:
            StageError: keys or shapes do not fit, all of them listed.
        """
        own = module.state_dict()
        of_spectrograms = tuple(f"{k}." for k, d in module.named_modules() if isinstance(d, ResolutionDiscriminator))
        state = self.state
        if of_spectrograms and not any(k.startswith(of_spectrograms) for k in state):
            logger.info(f"{self.where} has no discriminators over spectrograms: they start from random numbers")
            state = state | {k: v for k, v in own.items() if k.startswith(of_spectrograms)}
        energy = {k: torch.zeros_like(v) for k, v in own.items() if k.startswith(ENERGY) and k not in state}
        if energy:
            logger.info(f"{self.where} knows no energy: it begins to follow it from nothing")
            state = state | energy
        causes, tensors = misfits(shapes_of(state), shapes_of(own))
        if tensors:
            shown = [*(f"likely cause: {cause}" for cause in causes), *tensors[:20]]
            more = f"\n  and {len(tensors) - 20} more" if len(tensors) > 20 else ""
            raise StageError(
                f"{self.where} does not fit this recipe's network:" + "".join(f"\n  {line}" for line in shown) + more
            )
        module.load_state_dict({k: v.float() for k, v in state.items()})
        logger.info(self.where)
