"""Files of the Hugging Face hub, and a torchaudio that libraries of models can import."""

from __future__ import annotations

import logging
import sys
from functools import cache, partial
from pathlib import Path

import torch

Errors = tuple[type[Exception], ...]


def hub_file(repository: str, filename: str, revision: str = "") -> Path:
    """A file of a repository on the Hugging Face hub: from the cache, else downloaded (never under HF_HUB_OFFLINE).

    Raises FileNotFoundError that says where it looked.
    """
    from huggingface_hub import constants, hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError, HFValidationError

    logging.getLogger("huggingface_hub").handlers.clear()  # else each of its warnings is printed here and by the root
    download = partial(hf_hub_download, repository, filename, revision=revision or None)
    reasons: Errors = (OSError, EntryNotFoundError, HFValidationError, *_transport_errors())
    try:
        return Path(download(local_files_only=True))
    except reasons as error:
        missing, reason = error, "" if constants.HF_HUB_OFFLINE else hub_silence()
    if not constants.HF_HUB_OFFLINE and not reason:
        try:
            return Path(download())
        except reasons as error:
            missing, reason = error, str(error).splitlines()[0]
    where = f"{constants.HF_HUB_CACHE}/models--{repository.replace('/', '--')}"
    how = (
        "and HF_HUB_OFFLINE is set, so the hub was not asked."
        if constants.HF_HUB_OFFLINE
        else f"and {constants.ENDPOINT} did not give it ({reason})."
    )
    at = f" (revision {revision})" if revision else ""
    raise FileNotFoundError(f"{filename} of {repository}{at} is not in the cache {where}, {how}") from missing


@cache
def hub_silence() -> str:
    """Why the hub does not answer, or an empty text; asked once, since each of its own retries takes half a minute."""
    from huggingface_hub import constants, get_session

    reasons: Errors = (OSError, *_transport_errors())
    try:
        get_session().head(constants.ENDPOINT, timeout=constants.HF_HUB_ETAG_TIMEOUT / 2)
    except reasons as error:
        return (str(error) or type(error).__name__).splitlines()[0]
    return ""


def _transport_errors() -> Errors:
    """What the libraries raise that versions of huggingface_hub ask the hub by, where it is no OSError."""
    return tuple(sys.modules[name].HTTPError for name in ("httpx", "httpx2") if name in sys.modules)


def make_torchaudio_importable() -> None:
    """To be called before importing transformers, torchcrepe or torchfcpe, which import torchaudio.

    torchaudio 2.11, the newest on PyPI, refuses to be imported beside a torch built for another minor version of CUDA,
    such as torch 2.15 from PyPI (13.2 and 13.0). Its authors have since relaxed the check to the major version
    (pytorch/audio#4226, not released); this does the same. Nothing here uses torchaudio's compiled part.
    """
    try:
        import torchaudio
    except ModuleNotFoundError:
        return
    except RuntimeError:
        utils = sys.modules.get("torchaudio._extension.utils")
        if utils is None or torch.version.cuda is None:
            raise
        built_for = int(torch.ops._torchaudio.cuda_version()) // 1000
        if built_for != int(torch.version.cuda.split(".")[0]):
            raise
        utils._check_cuda_version = lambda: None  # type: ignore[attr-defined]
        import torchaudio  # noqa: F401
