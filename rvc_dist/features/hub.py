"""Files of the Hugging Face hub, and a torchaudio that libraries of models can import."""

from __future__ import annotations

import hashlib
import inspect
import logging
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import cache, partial
from pathlib import Path
from typing import Any

from rvc_dist.files import NO_SPACE, hash_of, space
from rvc_dist.screen import ProgressBar
from rvc_dist.workspace import StageError

logger = logging.getLogger(__name__)

Errors = tuple[type[Exception], ...]
_LOOKED_AT: ContextVar[list[Path] | None] = ContextVar("_LOOKED_AT", default=None)
"""Inside `checked`, the files that were given."""


def hub_file(repository: str, filename: str, revision: str = "", sha256: str = "") -> Path:
    """A file of a repository on the Hugging Face hub: from the cache, else downloaded (never under HF_HUB_OFFLINE).

    One process downloads it, the others that want it wait: huggingface_hub locks each file of the cache. What was
    downloaded has the hash that the hub names, and `sha256` where one is given; what was in the cache before is looked
    at inside `checked` alone.

    Raises:
        FileNotFoundError: it is not to be had; says where it was looked for, and why.
        StageError: the disk of the cache has no room.
    """
    from huggingface_hub import constants, hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError, HFValidationError

    logging.getLogger("huggingface_hub").handlers.clear()  # else each of its warnings is printed here and by the root
    download = partial(hf_hub_download, repository, filename, revision=revision or None)
    reasons: Errors = (OSError, EntryNotFoundError, HFValidationError, *transport_errors())
    missing: Exception
    damage = ""
    try:
        path = Path(download(local_files_only=True))
        damage = _damage(path, sha256) if _LOOKED_AT.get() is not None else ""
        if not damage:
            return _given(path)
        missing = OSError(damage)
    except reasons as error:
        missing = error
    it_is = f"the file there is damaged: {damage}; " if damage else ""
    if constants.HF_HUB_OFFLINE:
        how = f"{it_is}and HF_HUB_OFFLINE is set, so the hub was not asked."
    else:
        reason = hub_silence()
        try:
            if not reason:
                if damage:
                    logger.warning(f"{path}: damaged: {damage}; it is fetched again")
                    path.resolve().unlink()
                logger.info(f"fetching {filename} of {repository} from {constants.ENDPOINT}")
                with ProgressBar(f"fetching {filename}", None, "MB") as bar:
                    path = Path(download(**_shown_on(bar)))
                if not (reason := _damage(path, sha256)):
                    logger.info(f"fetched {filename} of {repository}, {path.stat().st_size / 1e6:.1f} MB")
                    return _given(path)
                path.resolve().unlink()  # so that nothing takes it for the file
        except reasons as error:
            if isinstance(error, OSError) and error.errno in NO_SPACE:
                raise StageError(
                    f"{filename} of {repository} cannot be written to the cache {constants.HF_HUB_CACHE} "
                    f"({os.strerror(error.errno or 0)}; {space(Path(constants.HF_HUB_CACHE))}):",
                    "free some space, or let HF_HOME name a folder on another disk",
                ) from error
            missing, reason = error, f"{' '.join(str(error).split()):.200}"
        how = f"{it_is}and {constants.ENDPOINT} did not give it ({reason})."
    where = f"{constants.HF_HUB_CACHE}/models--{repository.replace('/', '--')}"
    at = f" (revision {revision})" if revision else ""
    raise FileNotFoundError(f"{filename} of {repository}{at} is not in the cache {where}, {how}") from missing


@contextmanager
def checked() -> Iterator[list[Path]]:
    """Inside, files of the cache are compared with their hashes as well, and fetched again where they differ.

    Yields the files that were given, each once.
    """
    files: list[Path] = []
    token = _LOOKED_AT.set(files)
    try:
        yield files
    finally:
        _LOOKED_AT.reset(token)


def _shown_on(bar: ProgressBar) -> dict[str, type]:
    """What makes huggingface_hub count on `bar`; older versions of it show a bar of their own."""
    from huggingface_hub import hf_hub_download
    from huggingface_hub.utils import tqdm  # type: ignore[attr-defined]

    class Counter(tqdm):
        def __init__(self, *arguments: Any, total: float | None = None, initial: float = 0, **options: Any) -> None:
            super().__init__(*arguments, **options | {"disable": True})  # type: ignore[no-untyped-call]
            bar.total = total and total / 1e6
            bar.begin(initial / 1e6)

        def update(self, n: float | None = 1) -> None:
            bar.advance((n or 0) / 1e6)

    return {"tqdm_class": Counter} if "tqdm_class" in inspect.signature(hf_hub_download).parameters else {}


def _given(path: Path) -> Path:
    files = _LOOKED_AT.get()
    if files is not None and path not in files:
        files.append(path)
    return path


def _damage(path: Path, sha256: str) -> str:
    """Why a file of the cache is not what the hub has, or nothing.

    The cache calls a file after the hub's hash of it: SHA-256 of a large one, git's of a small one.
    """
    file = path.resolve()
    size, wanted = file.stat().st_size, sha256 or file.name
    if len(wanted) not in (40, 64):  # a cache without links, as on some disks
        return ""
    git_hash = hashlib.sha1(f"blob {size}\0".encode(), usedforsecurity=False)
    found = hash_of(file, git_hash if len(wanted) == 40 else hashlib.sha256())
    return "" if found == wanted else f"it has {size} bytes and the hash {found[:16]}..., expected {wanted[:16]}..."


@cache
def hub_silence() -> str:
    """Why the hub does not answer, or an empty text; asked once, since each of its own retries takes half a minute."""
    from huggingface_hub import constants, get_session

    reasons: Errors = (OSError, *transport_errors())
    try:
        get_session().head(constants.ENDPOINT, timeout=constants.HF_HUB_ETAG_TIMEOUT / 2)
    except reasons as error:
        return (str(error) or type(error).__name__).splitlines()[0]
    return ""


def transport_errors() -> Errors:
    """What the libraries raise that versions of huggingface_hub ask the hub by, where it is no OSError."""
    return tuple(sys.modules[name].HTTPError for name in ("httpx", "httpx2") if name in sys.modules)


def make_torchaudio_importable() -> None:
    """To be called before importing transformers, torchcrepe or torchfcpe, which import torchaudio.

    torchaudio refuses to be imported beside a torch that its compiled part does not fit: PyPI's, built for CUDA, beside
    a torch for CPUs or for another version of CUDA. Nothing here uses that part, so it is left out then.
    """
    try:
        import torchaudio
    except ModuleNotFoundError:
        return
    except (OSError, RuntimeError):
        utils = sys.modules.get("torchaudio._extension.utils")
        if utils is None:
            raise
        utils._load_lib = lambda _: False  # type: ignore[attr-defined]
        import torchaudio  # noqa: F401
