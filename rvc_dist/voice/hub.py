"""A voice on the Hugging Face hub: the folder as ZeroRVC's `from_pretrained` reads it, and the push stage.

Beside config.json and model.safetensors lie the voice file and the index, for the tools that take those.
"""

from __future__ import annotations

import logging
import shutil
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

from safetensors.torch import save_file

from rvc_dist.config import DataConfig, ExportConfig, InferConfig, Recipe
from rvc_dist.features.hub import transport_errors
from rvc_dist.files import write_json
from rvc_dist.models.shape import GeneratorShape
from rvc_dist.models.torch_file import save_pth
from rvc_dist.train.checkpoint import Checkpoint
from rvc_dist.train.voice_file import Dataset, voice_dict
from rvc_dist.voice.trained import Trained
from rvc_dist.workspace import Shard, StageError, Workspace

logger = logging.getLogger(__name__)

CARD = """
# {name}

A voice for RVC (retrieval-based voice conversion), trained with [rvc_dist]: {epochs} epochs on {length} of recordings.

| | |
|---|---|
{rows}

{pth} is for Applio, RVC-WebUI, rvc-next and `rvc-dist infer --infer.model {pth}`{with_index}. config.json and
model.safetensors are for ZeroRVC's `from_pretrained`.
"""


def write_folder(recipe: Recipe, saved: Checkpoint, dataset: Dataset, folder: Path, final: Path) -> None:
    """Write what the hub shall have of a checkpoint: the same bytes whenever it is written.

    Raises:
        StageError: a weight is not a finite number of float16.
    """
    from huggingface_hub import ModelCardData

    shape = GeneratorShape.from_identity(saved.identity)
    voice = voice_dict(recipe, saved, dataset)
    voice["recipe"] = _without_places(recipe).to_yaml()
    is_plain = shape.vocoder == "hifi-gan" and shape.architecture == "rvc" and not shape.energy
    if not (voice["version"] == "v2" and shape.pitch_guidance and is_plain):
        logger.warning("export: ZeroRVC reads voices of v2 with pitch guidance and hifi-gan; this one it does not")
    pth = folder / f"{recipe.name}.pth"
    save_pth(pth, voice)
    save_file(voice["weight"], folder / "model.safetensors", metadata={"format": "pt"})
    told = {key: value for key, value in voice.items() if key not in ("weight", "config", "recipe")}
    write_json(folder / "config.json", shape.to_upstream_arguments() | told)
    index = Workspace(recipe.run_dir, recipe.name).index_file()
    if index is not None:
        shutil.copyfile(index, folder / f"{recipe.name}.index")
    names = ", ".join(saved.speakers.label(speaker) for speaker in saved.speakers.trained)
    facts = {"sample rate": f"{shape.sample_rate} Hz", "version": voice["version"], "vocoder": voice["vocoder"]}
    facts |= {"content encoder": voice["embedder_model"], "speakers": names, "author": recipe.export.author}
    card = CARD.format(
        name=recipe.name,
        epochs=saved.progress.epoch,
        length=dataset.length,
        rows="\n".join(f"| {key} | {value} |" for key, value in facts.items() if value),
        pth=pth.name,
        with_index=f", {recipe.name}.index its retrieval index" if index is not None else "",
    )
    header = ModelCardData(pipeline_tag="audio-to-audio", tags=["rvc", "voice-conversion"]).to_yaml()
    (folder / "README.md").write_text(f"---\n{header}\n---\n{card}", encoding="utf-8")


def _without_places(recipe: Recipe) -> Recipe:
    """The recipe without what only says where things lie on this machine."""
    return replace(
        recipe,
        run_dir="",
        data=replace(recipe.data, audio_dir=DataConfig.audio_dir),
        train=replace(recipe.train, pretrained_g=None, pretrained_d=None),
        export=ExportConfig(author=recipe.export.author),
        infer=InferConfig(),
    )


def run(recipe: Recipe, shard: Shard, repository: str) -> None:
    """Write the newest checkpoint's hub folder into `repository` (OWNER/NAME), which is made if it is not there.

    What it has already is not uploaded again.

    Raises:
        StageError: there is nothing to push, no token, no network, or the repository holds other files or is refused.
    """
    if not shard.is_first:
        return
    from huggingface_hub import CommitOperationAdd, HfApi, constants, get_token
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    silent: tuple[type[Exception], ...] = (OSError, *transport_errors())

    if constants.HF_HUB_OFFLINE:
        raise StageError("push: HF_HUB_OFFLINE is set, so the hub is not asked;", "unset it")
    if get_token() is None:
        raise StageError("push: there is no token of the hub;", "log in with `hf auth login`, or set HF_TOKEN")
    trained = Trained.of(recipe)
    api = HfApi(endpoint=constants.ENDPOINT)
    with tempfile.TemporaryDirectory(prefix=".push", dir=trained.work.root) as temporary:
        folder = Path(temporary)
        write_folder(recipe, *trained.load(trained.checkpoints[-1]), folder, folder)
        files = {path.name: path for path in sorted(folder.iterdir())}
        try:
            api.create_repo(repository, private=recipe.export.private, exist_ok=True)
            others = sorted({*api.list_repo_files(repository)} - files.keys() - {".gitattributes"})
            if others:
                raise StageError(
                    f"push: {repository} exists and holds other files ({', '.join(others[:5])});",
                    "give a repository of the voice's own",
                )
            before = api.repo_info(repository).sha
            operations: list[Any] = [CommitOperationAdd(name, path) for name, path in files.items()]
            message = f"{recipe.name} after step {int(trained.checkpoints[-1].name.rpartition('_')[2])}"
            commit = api.create_commit(repository, operations, commit_message=message)
        except HFValidationError as error:
            raise StageError(f"push: {repository!a} is no name of a repository;", "expected OWNER/NAME") from error
        except HfHubHTTPError as error:
            status = error.response.status_code if error.response is not None else "an error"
            why = {401: "the token is not valid", 403: "the token may not write there"}.get(status, str(error))
            raise StageError(f"push: {constants.ENDPOINT} refuses {repository} ({status}): {_line(why)}") from error
        except silent as error:
            raise StageError(f"push: {constants.ENDPOINT} does not answer ({_line(error)});", "try again") from error
        except (AttributeError, LookupError, TypeError, ValueError) as error:  # a page to log in, a proxy
            raise StageError(f"push: {constants.ENDPOINT} does not answer as the hub does ({_line(error)})") from error
    what = "has it already, nothing is uploaded" if commit.oid == before else f"{len(files)} files"
    logger.info("push: %s/%s: %s", constants.ENDPOINT, repository, what)


def _line(error: object) -> str:
    """The first line of a message."""
    return (str(error).strip() or type(error).__name__).splitlines()[0][:200]
