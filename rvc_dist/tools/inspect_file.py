"""The inspect stage: what a file or folder is, and whether it fits a recipe.

Everything is read as the stages read it, by the same gates, and nothing in it is run. Text of a file is shown escaped.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from rvc_dist.choices import EMBEDDERS
from rvc_dist.config import ModelConfig, Recipe
from rvc_dist.features.content import MODELS, read_tensors
from rvc_dist.features.index_file import check_index
from rvc_dist.files import ForeignFileError, not_regular, read_bounded, read_npy
from rvc_dist.models.shape import GeneratorShape
from rvc_dist.models.state_dict import from_upstream
from rvc_dist.models.weights_file import (
    DISCRIMINATOR,
    GENERATOR,
    VOICE,
    Shapes,
    WeightsFile,
    facts_of,
    kind_of,
    misfits,
    shapes_of,
)
from rvc_dist.schema import MAX_JSON_BYTES, parse_json
from rvc_dist.tools.experiment import find_layout, read_experiment, weight_pairs
from rvc_dist.tools.made_up import CONTENT_WIDTH
from rvc_dist.tools.tables import console, say
from rvc_dist.train import checkpoint, networks
from rvc_dist.train.dataset import ClipTable
from rvc_dist.voice.file import Voice
from rvc_dist.workspace import (
    CHECKPOINT_MANIFEST,
    FeaturesReport,
    Shard,
    Speakers,
    StageError,
    Workspace,
    changes,
    list_checkpoints,
    printable,
    read_json,
    read_unit_file,
)

EXIT_UNKNOWN = 1
SHOWN = 10
"""Tensors that do not fit, and letters of a text of a file times eight."""
SHOWN_KEYS = ("model.version", "data.sample_rate", "model.pitch_guidance", "model.vocoder", "extract.embedder_model")
"""What is said of every network; widths only where they are not RVC's."""
OF_VOICES = ("model_name", "author", "epoch", "step", "creation_date", "dataset_length", "info", "embedder_model")
"""Fields of a voice file that are shown as they are."""


@dataclass
class Found:
    """What something is."""

    what: str
    facts: dict[str, str] = field(default_factory=dict)
    misfit: list[str] | None = None
    """Why it does not fit the recipe, nothing where it does; None where there is nothing to compare."""
    is_known: bool = True


def run(recipe: Recipe, shard: Shard, paths: list[str]) -> int:
    """Print what each of `paths` is; 1 where one of them is damaged or nothing of RVC's.

    Raises:
        StageError: there are none.
    """
    if not paths:
        raise StageError("got no file;", "say rvc-dist inspect FILE ..., which may be folders too")
    if not shard.is_first:
        return 0
    out, code = console(), 0
    for path in map(Path, paths):
        found = inspect(path, recipe)
        say(out, f"{printable(str(path))}: {found.what}")
        for name, value in found.facts.items():
            say(out, f"  {name}: {shown(value)}")
        if found.misfit is not None:
            say(out, "  this recipe: does not fit" if found.misfit else "  this recipe: fits")
            for line in found.misfit:
                say(out, f"    {line}")
        code = code if found.is_known else EXIT_UNKNOWN
    return code


def shown(value: object) -> str:
    """Text of a file for the screen: short, on one line, without control characters."""
    return printable(f"{value!s:.{8 * SHOWN}}")


def inspect(path: Path, recipe: Recipe) -> Found:
    """What is at `path`."""
    try:
        if path.is_dir():
            return _folder(path, recipe)
        if reason := not_regular(path.stat().st_mode):
            raise ForeignFileError(reason)
        with path.open("rb") as stream:
            head = stream.read(9)
        return _reader(path, head)(path, recipe)
    except FileNotFoundError:
        return Found("it does not exist", is_known=False)
    except (ForeignFileError, StageError, OSError) as error:
        return Found(f"nothing that can be used here: {error}", is_known=False)


def _reader(path: Path, head: bytes) -> Callable[[Path, Recipe], Found]:
    """What reads a file that begins so."""
    if head[:2] == b"PK":
        return _torch_file
    if head[:4] in (b"IxF2", b"IwFl") or path.suffix == ".index":
        return _index
    if head[8:9] == b"{" or path.suffix == ".safetensors":
        return _safetensors
    if head[:6] == b"\x93NUMPY":
        return _array
    raise ForeignFileError("no torch file, index, safetensors file or array")


def _torch_file(path: Path, recipe: Recipe) -> Found:
    file = WeightsFile.read(path, with_counters=True)
    kind = kind_of(file.shapes)
    if file.is_voice and kind in (GENERATOR, VOICE):
        return _voice(path, file, recipe)
    found = _network(file.shapes, recipe)
    if kind in (GENERATOR, VOICE, DISCRIMINATOR):
        is_training = "optimizer" in file.data or "iteration" in file.data
        found.what = f"{found.what}, {'as training writes it' if is_training else 'weights alone'}"
        facts = {"epoch": file.data.get("iteration"), "learning rate": file.data.get("learning_rate")}
        found.facts |= {name: str(value) for name, value in facts.items() if value is not None}
        optimizer = file.data.get("optimizer")
        has_state = isinstance(optimizer, dict) and bool(optimizer.get("state"))
        found.facts["optimizer"] = "with its state" if has_state else "none"
        is_old = file.is_old_spelling
        found.facts["weight norm"] = "old (weight_g, weight_v)" if is_old else "new (original0, original1)"
    return found


def _voice(path: Path, file: WeightsFile, recipe: Recipe) -> Found:
    found = _network(file.shapes, recipe)
    has_posterior = kind_of(file.shapes) == GENERATOR
    found.what = f"a voice file, made to convert with ({_in_words(file.shapes)})"
    found.facts |= {name: str(file.data[name]) for name in OF_VOICES if file.data.get(name) not in (None, "")}
    try:
        voice = Voice.load(path, torch.device("cpu"))
        names = [f"{row} ({info['name']})" for row, info in voice.speakers.items()]
        trained = names or [str(row) for row in voice.trained_speakers]
        found.facts["converts here"] = f"yes, at {voice.rate} Hz with features of {voice.embedder}"
        found.facts |= {"trained speakers": ", ".join(trained)} if trained else {}
    except StageError as error:
        found.facts["converts here"] = f"no: {error.what.partition(': ')[2]}"
    found.facts["to train on from"] = (
        "yes: it kept its posterior encoder" if has_posterior else "no: it is a voice file"
    )
    return found


def _network(shapes: Shapes, recipe: Recipe) -> Found:
    """What network has such tensors, and whether it is the recipe's."""
    kind = kind_of(shapes)
    if kind not in (GENERATOR, VOICE, DISCRIMINATOR):
        names = ", ".join(shown(key) for key in list(shapes)[:3])
        return Found(kind or f"weights of no network of RVC ({len(shapes)} tensors: {names}, ...)", is_known=bool(kind))
    table = shapes.get("emb_g.weight", ())
    facts = {"speakers": str(table[0])} if table else {}
    wanted = _wanted(shapes, recipe)
    causes, tensors = misfits(shapes, wanted)
    more = [f"and {len(tensors) - SHOWN} more tensors"] if len(tensors) > SHOWN else []
    return Found(f"{kind} ({_in_words(shapes)})", facts, [*causes, *tensors[:SHOWN], *more])


def _wanted(shapes: Shapes, recipe: Recipe) -> Shapes:
    """The tensors of the recipe's network of that kind, with as many speakers and, of a voice, without enc_q."""
    kind, table = kind_of(shapes), shapes.get("emb_g.weight", ())
    content = shapes.get("enc_p.emb_phone.weight", shapes.get("pre.weight", (0, 0)))
    width = _content_width(recipe) or (content[1] if len(content) > 1 else 0)
    shape = GeneratorShape.from_recipe(recipe, max(width, 1), max(table[0] if table else 1, 1))
    with torch.device("meta"):  # only shapes are asked for
        modules = networks.make_networks(recipe, shape)
    wanted = shapes_of(modules["discriminator" if kind == DISCRIMINATOR else "generator"].state_dict())
    return {key: size for key, size in wanted.items() if kind != VOICE or not key.startswith("enc_q.")}


def _content_width(recipe: Recipe) -> int:
    """Of the content features: the run's, else those of a named encoder; 0 where that is not known."""
    report = Workspace(recipe.run_dir, recipe.name).features_report_file
    if report.is_file() and (embedder := read_json(report, FeaturesReport)["settings"].get("embedder")):
        return int(embedder["width"])
    named = recipe.extract.embedder_model in EMBEDDERS or recipe.model.version == "v1"
    return CONTENT_WIDTH[recipe.model.version] if named else 0


def _in_words(shapes: Shapes) -> str:
    facts, usual = facts_of(shapes), {f"model.{k}": str(v) for k, v in asdict(ModelConfig()).items()}
    unusual = {k.partition(".")[2]: v for k, v in facts.items() if k not in SHOWN_KEYS and v != usual.get(k)}
    plain = [unusual.pop(key) for key in ("energy", "discriminator") if key in unusual]
    more = [*(text for text in plain if text != "no energy"), *(f"{key} {width}" for key, width in unusual.items())]
    return ", ".join([*(facts[key] for key in SHOWN_KEYS if key in facts), *more])


def _index(path: Path, recipe: Recipe) -> Found:
    with path.open("rb") as stream:
        head = stream.read(8)
    if len(head) < 8:
        raise ForeignFileError("it is cut short")
    (width,) = struct.unpack("<4xi", head)
    size = check_index(path, width)
    cells = f"{size.num_cells} cells" if size.num_cells else "no cells"
    wanted = _content_width(recipe)
    wrong = [f"extract.embedder_model: it has features {width} wide, this recipe {wanted}"] if wanted != width else []
    return Found(
        f"a retrieval index of {size.num_vectors} features {width} wide, {cells}", {}, wrong if wanted else None
    )


def _safetensors(path: Path, recipe: Recipe) -> Found:
    unit = read_unit_file(path)
    if unit is not None:
        header, _ = unit
        is_features = "embedder" in header or "clips" not in header
        kind = "features of clips (rvc-dist extract)" if is_features else "clips (rvc-dist preprocess)"
        return Found(f"a unit of {kind}", {"clips": str(len(header.get("clips", [1])))})
    try:
        state = read_tensors(path)
    except ValueError as error:
        raise ForeignFileError(str(error).partition(": ")[2]) from error
    return _network(shapes_of(from_upstream(state)), recipe)


def _array(path: Path, recipe: Recipe) -> Found:
    data = read_npy(path)
    kind = {1: "a pitch", 2: "content features"}.get(data.ndim, "an array")
    wanted, misfit = _content_width(recipe), None
    if data.ndim == 2 and wanted:
        misfit = [f"it is {data.shape[1]} wide, this recipe {wanted}"] if data.shape[1] != wanted else []
    return Found(f"{kind}: {data.dtype} {list(data.shape)}", {}, misfit)


def _folder(path: Path, recipe: Recipe) -> Found:
    """What a folder is, by the files that only its kind has."""
    if (path / CHECKPOINT_MANIFEST).is_file():
        return _checkpoint(path, recipe)
    if (path / "clips" / "plan.json").is_file() or (path / "features" / "report.json").is_file():
        return _run_folder(path, recipe)
    if (path / "config.json").is_file() and any(path.glob("*.safetensors")) | any(path.glob("pytorch_model.bin")):
        return _model_folder(path, recipe)
    find_layout(path)  # says what it expected
    return _experiment(path, recipe)


def _checkpoint(path: Path, recipe: Recipe) -> Found:
    if problems := checkpoint.find_corruption(path):
        raise ForeignFileError(f"a damaged checkpoint: {'; '.join(problems[:SHOWN])}")
    state = checkpoint.state_of(path)
    made_with, progress = state["identity"], state["progress"]
    try:
        saved = GeneratorShape.from_identity(made_with)
    except ValueError as error:
        raise ForeignFileError(f"a checkpoint of no network of this version: {error}") from error
    width = _content_width(recipe) or saved.content_channels
    shape = GeneratorShape.from_recipe(recipe, width, saved.num_speakers)
    table = ClipTable((), (), width, made_with["embedder"], saved.num_speakers)
    misfit = []
    try:
        checkpoint.check_identity(path, made_with, networks.identity(recipe, shape, table))
    except StageError as error:
        misfit = str(error).splitlines()[1:]
    facts = {
        "step": str(progress["step"]),
        "epoch": str(progress["epoch"]),
        "encoder": str(made_with["embedder"]["name"]),
        "speakers": str(saved.num_speakers),
        "optimizer": str(made_with.get("optimizer")),
    }
    kind = f"{made_with['discriminator.version']}, {saved.sample_rate} Hz, {'' if saved.pitch_guidance else 'no '}pitch"
    return Found(f"a checkpoint of rvc_dist ({kind}, {saved.vocoder})", facts, [line.strip() for line in misfit])


def _run_folder(path: Path, recipe: Recipe) -> Found:
    kept = Workspace(path, "").kept_recipe()
    if kept is None:
        raise ForeignFileError("a run folder of rvc_dist without a config.yaml that this version reads")
    work = Workspace(path, kept.name)
    names = {
        "checkpoints": [p.name for p in list_checkpoints(work.checkpoints_dir)],
        "voices": sorted(p.name for p in work.voice_dir.glob("*.pth")),
        "indices": sorted(p.name for p in work.index_dir.glob("*.index")),
    }
    facts = {kind: ", ".join(found[-3:]) if found else "none" for kind, found in names.items()}
    facts["features"] = f"of {kept.extract.embedder_model}" if work.features_report_file.is_file() else "none"
    facts |= {"speakers": ", ".join(work.speakers().names.values())} if work.speakers_file.is_file() else {}
    before, now = ({**asdict(r.model), "sample_rate": r.data.sample_rate} for r in (kept, recipe))
    differ = changes(before, now)
    kind = f"{kept.model.version}, {kept.data.sample_rate} Hz, {'' if kept.model.pitch_guidance else 'no '}pitch"
    return Found(f"a run of rvc_dist: {shown(kept.name)} ({kind})", facts, [differ] if differ else [])


def _model_folder(path: Path, recipe: Recipe) -> Found:
    """A network in a format of the hub: a content encoder, or a voice as ZeroRVC reads it."""
    config: dict[str, Any] = parse_json(read_bounded(path / "config.json", MAX_JSON_BYTES), dict)
    if config.get("model_type") in MODELS:
        width = config.get("hidden_size", config.get("d_model"))
        return Found(f"a content encoder ({config['model_type']}), features {shown(width)} wide")
    weights = path / "model.safetensors"
    if "spec_channels" not in config or not weights.is_file():
        raise ForeignFileError(f"a folder of another model ({shown(config.get('model_type', 'without model_type'))})")
    found = _safetensors(weights, recipe)
    return replace(found, what=f"a hub folder with {found.what}", facts=found.facts | {"rate": shown(config.get("sr"))})


def _experiment(path: Path, recipe: Recipe) -> Found:
    experiment = read_experiment(path)
    weights, known = [step for step, _, _ in weight_pairs(path)], Speakers(dict(experiment.names))
    waves = [wave.name for wave in experiment.waves_dir.glob("*.wav")]
    facts = {
        "features": f"{experiment.width} wide" if experiment.width else "none",
        "pitch": "yes" if experiment.f0_dir else "no",
        "unvoiced frames": experiment.unvoiced,
        "speakers": ", ".join(known.label(i) for i in sorted({*map(experiment.speaker_of, waves)})),
        "encoder": experiment.encoder or "not named",
        "weights of G and D": _some(weights) or "none",
    }
    wanted = _content_width(recipe)
    misfit = []
    if experiment.width and wanted and experiment.width != wanted:
        misfit = [f"extract.embedder_model: its features are {experiment.width} wide, this recipe's {wanted}"]
    if experiment.width and recipe.model.pitch_guidance and not experiment.f0_dir:
        misfit.append("model.pitch_guidance: it has no pitch")
    what = f"an experiment of {experiment.layout.tools} with {len(waves)} clips, for `rvc-dist import`"
    return Found(what, facts, misfit)


def _some(numbers: Iterable[int]) -> str:
    found = sorted(numbers)
    return ", ".join(map(str, found[:SHOWN])) + (f" and {len(found) - SHOWN} more" if len(found) > SHOWN else "")
