"""A run's units on object storage, through fsspec: a manifest says what is there, with sizes and checksums.

Of what libraries raise, nothing leaves this module but `StageError`, which names the object, and errors of the disk.
"""

from __future__ import annotations

import gzip
import logging
import os
import random
import re
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from hashlib import sha256
from pathlib import Path
from typing import Annotated, Any, TypedDict

from rvc_dist.choices import STORAGES
from rvc_dist.files import NO_SPACE, ForeignFileError, beside, read_bounded, sha256_of
from rvc_dist.schema import MAX_JSON_BYTES, Count, Rule, parse_json, record, within
from rvc_dist.workspace import FeaturesHeader, StageError

logger = logging.getLogger(__name__)

MANIFEST = "manifest.json"
"""Written last: what it lists is there."""
HEADERS = "headers.jsonl.gz"
"""The header of every features file, a line each: so clips are chosen before any unit is fetched."""
MAX_HEADER_BYTES = 1 << 26
ATTEMPTS, CHANGED_ATTEMPTS = 7, 3
"""How often an object is asked for, with 1, 2, 4, ... s between; and one that comes with other bytes."""
STALL_S = 60.0
"""A transfer of which nothing comes for so long is given up, and begun anew."""
_NAME = re.compile(
    r"(clips|features)/\d{5,9}\.safetensors|features/mute\.safetensors|(clips/(plan|report)|features/report|speakers)"
    r"\.json|headers\.jsonl\.gz",
    re.ASCII,
)
_OPTIONS: dict[str, dict[str, Any]] = {
    "file": {"auto_mkdir": True},
    # One request an object, whose file then grows steadily; what is tried again is our matter.
    "s3": {
        "max_concurrency": 1,
        "config_kwargs": {"connect_timeout": 10, "read_timeout": STALL_S, "retries": {"max_attempts": 1}},
    },
}
_HOPELESS = {"NoCredentialsError", "PartialCredentialsError", "ProfileNotFound", "ParamValidationError"}
"""Errors of botocore that come again."""


_HEADER = record(unit=Count, header=FeaturesHeader)


class Stored(TypedDict):
    """An object, as it was uploaded."""

    size: Count
    sha256: Annotated[str, Rule("64 hex digits", (str,), lambda text: bool(re.fullmatch("[0-9a-f]{64}", text)))]


ManifestFile = record(
    version=Annotated[int, within(1, 1)],
    files=dict[str, Stored],
    f0_medians=dict[str, Annotated[float, within(0.0, 1e4)]],
)
"""MANIFEST."""


@dataclass(frozen=True)
class Manifest:
    """What of a run is on the storage."""

    files: Mapping[str, Stored]
    """By path in the run folder."""
    f0_medians: Mapping[int | None, float]
    """`DatasetFacts.f0_medians`."""
    sha256: str
    """Of its own bytes."""

    @classmethod
    def read(cls, path: Path, where: str) -> Manifest:
        """The manifest in `path`, which came from `where`.

        Raises:
            StageError: it is none of ours.
        """
        try:
            data = read_bounded(path, MAX_JSON_BYTES)
            values = parse_json(data, ManifestFile)
            if wrong := [name for name in values["files"] if not _NAME.fullmatch(name)]:
                raise ForeignFileError(f"files: {wrong[0]!r} is no file of a run")
        except ForeignFileError as error:
            raise StageError(f"{where}: not a manifest of ours ({error});", "run `rvc-dist upload` again") from error
        medians = {int(k) if k.isdecimal() else None: v for k, v in values["f0_medians"].items()}
        return cls(values["files"], medians, sha256(data).hexdigest())

    @cached_property
    def unit_bytes(self) -> dict[int, int]:
        """Of each unit, its clips and features together."""
        units = sorted(int(name[9:-12]) for name in self.files if re.match(r"features/\d", name))
        return {unit: sum(self.files[name]["size"] for name in unit_names(unit)) for unit in units}

    @property
    def small(self) -> list[str]:
        """All that is no unit's."""
        return [name for name in self.files if not re.match(r"(clips|features)/\d", name)]


def unit_names(unit: int) -> tuple[str, str]:
    return f"clips/{unit:05d}.safetensors", f"features/{unit:05d}.safetensors"


def read_headers(path: Path) -> Iterator[tuple[int, FeaturesHeader]]:
    """Of the units in a file of HEADERS.

    Raises:
        StageError: it is damaged.
    """
    try:
        with gzip.open(path) as lines:
            while line := lines.readline(MAX_HEADER_BYTES):
                found = parse_json(line, _HEADER)
                yield found["unit"], found["header"]
    except (ForeignFileError, EOFError, gzip.BadGzipFile) as error:
        raise StageError(f"{path} is damaged ({error}):", "delete it; it is fetched again") from error


class TransferError(Exception):
    """An object did not come, or did not arrive; `attempts` is how often that is tried."""

    def __init__(self, why: str, attempts: int = ATTEMPTS) -> None:
        super().__init__(why)
        self.attempts = attempts


class Storage:
    """The folder of a run on object storage.

    Raises:
        StageError: the package for it is missing.
    """

    def __init__(self, url: str, attempts: int = ATTEMPTS) -> None:
        self.url, self.attempts = url.rstrip("/"), attempts
        scheme = self.url.partition("://")[0]
        try:
            import fsspec

            options = _OPTIONS.get(scheme, {})
            self.fs, self.root = fsspec.url_to_fs(self.url, use_listings_cache=False, **options)
        except ImportError as error:
            raise StageError(*STORAGES[scheme].missing(f"data.remote: {url}", error)) from error
        except (ValueError, OSError) as error:
            raise StageError(f"data.remote: {url} cannot be opened ({reason(error)})") from error

    def fetch(self, name: str, path: Path, stored: Stored | None = None) -> None:
        """Let `path` be a copy of an object, whole and as it is `stored`.

        Raises:
            StageError: it is not there, or did not come after several attempts.
            OSError: the disk.
        """
        remedy = "see whether the storage answers, with the same credentials; the same command goes on"

        def attempt() -> None:
            with beside(path, stored and stored["size"]) as half:
                self._watched(lambda: self.fs.get_file(f"{self.root}/{name}", str(half)), half)
                if stored is not None:
                    _compare(half, stored)
                with half.open("rb") as stream:
                    os.fsync(stream.fileno())
                half.replace(path)

        self._try(attempt, f"{self.url}/{name} was not fetched", remedy)

    def put(self, path: Path, name: str) -> None:
        """Let an object be a copy of the file `path`.

        Raises:
            StageError: that failed several times.
        """
        remedy = "see whether you may write there; the same command goes on"
        self._try(
            lambda: self._watched(lambda: self.fs.put_file(str(path), f"{self.root}/{name}"), None),
            f"{self.url}/{name} was not written",
            remedy,
        )

    def sizes(self) -> dict[str, int]:
        """Of all objects, by name.

        Raises:
            StageError: they cannot be listed.
        """
        found: dict[str, Any] = {}

        def attempt() -> None:
            try:
                found.update(self.fs.find(self.root, detail=True))
            except FileNotFoundError:
                return  # nothing is there yet
            except Exception as error:
                raise _transfer_error(error) from error

        self._try(attempt, f"{self.url} cannot be listed", "see whether it is there and you may read it")
        return {path[len(self.root) :].lstrip("/"): info["size"] or 0 for path, info in found.items()}

    def _try(self, attempt: Callable[[], None], what: str, remedy: str) -> None:
        for number in range(1, ATTEMPTS + 1):
            try:
                return attempt()
            except TransferError as error:
                if number >= min(error.attempts, self.attempts):
                    times = f" {number} times" if number > 1 else ""
                    raise StageError(f"{what}{times} ({error}):", remedy) from error
                delay_s = 2 ** (number - 1) * random.uniform(0.5, 1.0)
                logger.warning("%s (%s); again in %.1f s", what, error, delay_s)
                time.sleep(delay_s)
        return None

    def _watched(self, transfer: Callable[[], object], grows: Path | None) -> None:
        """`transfer` in a thread, which is left to itself when the file `grows` no longer does.

        Raises:
            TransferError: what a library raised.
            OSError: the disk.
        """
        failed: list[Exception] = []

        def run() -> None:
            try:
                transfer()
            except Exception as error:  # noqa: BLE001 - of whatever library
                failed.append(error)

        thread = threading.Thread(target=run, daemon=True)
        thread.start()
        seen, seen_at = _state(grows), time.monotonic()
        while thread.is_alive():
            thread.join(0.2)
            if (now := _state(grows)) != seen or grows is None:
                seen, seen_at = now, time.monotonic()
            elif time.monotonic() - seen_at > STALL_S:
                raise TransferError(f"nothing came for {STALL_S:.0f} s")
        if failed:
            raise _transfer_error(failed[0]) from failed[0]


def _state(path: Path | None) -> tuple[int, int] | None:
    try:
        status = path.stat() if path is not None else None
    except OSError:
        return None
    return status and (status.st_size, status.st_mtime_ns)


def _transfer_error(error: Exception) -> Exception:
    """What is raised for an error of a library: those of a full disk as they are."""
    if isinstance(error, OSError) and error.errno in NO_SPACE and not isinstance(error, PermissionError):
        return OSError(error.errno, os.strerror(error.errno))
    if isinstance(error, FileNotFoundError):
        return TransferError("there is no such object", 1)
    hopeless = isinstance(error, PermissionError) or type(error).__name__ in _HOPELESS
    return TransferError(reason(error), 1 if hopeless else ATTEMPTS)


def reason(error: BaseException) -> str:
    """What an error says, in one line."""
    return " ".join(str(error).split())[:300] or type(error).__name__


def _compare(path: Path, stored: Stored) -> None:
    """Raises TransferError when the file is not what was stored."""
    size = path.stat().st_size
    if size < stored["size"]:
        raise TransferError(f"{size} of {stored['size']} bytes came")
    if size > stored["size"] or sha256_of(path) != stored["sha256"]:
        raise TransferError(
            "other bytes came than its manifest says: it was changed since, or is damaged. `rvc-dist upload` puts it "
            "right",
            CHANGED_ATTEMPTS,
        )
