"""The one way to write a file, and files that others made, judged before they are read. Nothing heavy is imported.

Every gate raises `ForeignFileError` with a reason that does not name the file: the caller knows what the file is for.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import itertools
import json
import math
import os
import re
import secrets
import shutil
import stat
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

STALE_TMP_S = 86400.0
"""A half-written file that has not grown for so long has no writer any more: an index of days of speech takes hours."""
BESIDE_GLOB = "." + "[0-9a-f]" * 16 + ".tmp"
"""The names that `beside` gives."""
NO_SPACE = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
"""A full disk, a quota, a limit on the size of files."""
_NPY = re.compile(
    rb"\x93NUMPY(?:[\1]\0(?P<short>..)|[\2\3]\0(?P<long>....))"
    rb"\{'descr': '(?P<dtype><f[248]|[<|][iu][1248])', 'fortran_order': (?P<order>True|False), "
    rb"'shape': \((?P<shape>[\d, ]{0,100})\), ?\} *\n",
    re.DOTALL,
)
_NPY_HEAD = 1 << 12
"""Bytes within which the header of an .npy file ends: NumPy's takes 128."""


class ForeignFileError(ValueError):
    """A file is not what it should be; the message is the reason."""


def regular_size(path: Path) -> int:
    """The bytes of a regular file. To be called before opening: a FIFO may never answer, a device never end.

    Raises:
        ForeignFileError: it is something else, or cannot be looked at.
        FileNotFoundError: it does not exist.
    """
    try:
        status = path.stat()
    except OSError as error:
        if error.errno in (errno.ENOENT, errno.ESTALE):  # the latter over NFS: it was removed meanwhile
            raise
        raise ForeignFileError(f"it cannot be read ({error.strerror})") from error
    if reason := not_regular(status.st_mode):
        raise ForeignFileError(reason)
    return status.st_size


def read_bounded(path: Path, most: int) -> bytes:
    """All of a regular file.

    Raises:
        ForeignFileError: it is something else, or larger than `most` bytes.
        OSError: it cannot be read.
    """
    size = regular_size(path)
    if size > most:
        raise ForeignFileError(f"{size} bytes, expected at most {most}")
    with path.open("rb") as stream:
        return stream.read(size)


def sha256_of(path: Path) -> str:
    """Of a file's bytes, in hex digits."""
    return hash_of(path, hashlib.sha256())


def hash_of(path: Path, digest: Any) -> str:
    """In hex digits, what an object of hashlib makes of a file's bytes, after what it was given before."""
    with path.open("rb") as stream:
        while block := stream.read(1 << 22):
            digest.update(block)
    found: str = digest.hexdigest()
    return found


def not_regular(mode: int) -> str:
    """Why something of that mode is not opened, or nothing."""
    kind = "folder" if stat.S_ISDIR(mode) else "FIFO, socket or device"
    return "" if stat.S_ISREG(mode) else f"it is a {kind}, expected a file"


def read_npy(path: Path) -> npt.NDArray[np.generic]:
    """The numbers of an .npy file, mapped and not read; its header is matched and not evaluated.

    Raises:
        ForeignFileError: it is no .npy file of real numbers, or its size is not what the header says.
        OSError: it cannot be opened.
    """
    import numpy as np

    size = regular_size(path)
    with path.open("rb") as stream:
        found = _NPY.match(stream.read(_NPY_HEAD))
    if found is None:
        raise ForeignFileError("no .npy file of plain numbers")
    shape = tuple(int(n) for n in found["shape"].replace(b" ", b"").split(b",") if n)
    dtype = np.dtype(found["dtype"].decode())
    told = int.from_bytes(found["short"] or found["long"], "little") + found.start("dtype") - len("{'descr': '")
    expected = found.end() + math.prod(shape) * dtype.itemsize
    if told != found.end() or size != expected or not expected > found.end():
        raise ForeignFileError(f"an .npy file of {dtype} {list(shape)} that has {size} bytes, expected {expected}")
    return np.memmap(path, dtype, "r", found.end(), shape, "F" if found["order"] == b"True" else "C")


@contextlib.contextmanager
def beside(path: Path, num_bytes: int | None = None) -> Iterator[Path]:
    """A name in the folder of `path`, to open with mode "x" and to rename when whole; what is not renamed is removed.

    What a killed process leaves, `remove_half_written` removes. `num_bytes` is what will be written.

    Raises:
        OSError: naming `path`, with what is needed and free where the disk has not enough.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    # Random: array tasks on several hosts may write the same file, and in a folder that others may write to, nobody
    # can put a link there before. Short, whatever the file's name is.
    name = path.with_name(f".{secrets.token_hex(8)}.tmp")
    try:
        with disk_errors(path, num_bytes):
            yield name
    finally:
        with contextlib.suppress(OSError):
            name.unlink()


@contextlib.contextmanager
def disk_errors(path: Path, num_bytes: int | None = None) -> Iterator[None]:
    """Inside, an error of the disk that names no file, or one beside `path`, names `path`.

    Raises:
        OSError: the same, with what is needed and free where the disk has not enough.
    """
    try:
        yield
    except OSError as error:
        if error.errno is None or not (error.filename is None or str(error.filename).endswith(".tmp")):
            raise
        room = f"; {space(path, num_bytes)}" if error.errno in NO_SPACE else ""
        raise OSError(error.errno, os.strerror(error.errno) + room, str(path)) from error


def existing_folder(path: Path) -> Path:
    """The folder `path`, or the nearest above it that exists: whose disk it will be on."""
    return next(p for p in (path, *path.absolute().parents) if p.is_dir())


def space(path: Path, num_bytes: int | None = None) -> str:
    """For a sentence: what a file or folder needs, what its disk has, and what this process may write."""
    free = shutil.disk_usage(existing_folder(path)).free
    parts = [f"{num_bytes / 1e6:.3f} MB needed"] if num_bytes is not None else []
    parts.append(f"{free / 1e6:.0f} MB free")
    with contextlib.suppress(ImportError):
        import resource  # not everywhere

        most, _ = resource.getrlimit(resource.RLIMIT_FSIZE)
        if most != resource.RLIM_INFINITY:
            parts.append(f"no file may have more than {most / 1e6:.3f} MB (ulimit -f)")
    return ", ".join(parts)


def atomic_write(path: Path, data: bytes | str) -> None:
    """Write `path` whole or not at all, through a file beside it that is synced and renamed."""
    data = data.encode() if isinstance(data, str) else data
    with beside(path, len(data)) as half:
        with half.open("xb") as stream:
            stream.write(data)
            stream.flush()
            os.fsync(stream.fileno())
        half.replace(path)


def to_json(data: Any) -> str:
    """Readable JSON. Bytes of a file name that are no UTF-8 (lone surrogates in Python) become JSON escapes."""
    text = json.dumps(data, indent=1, ensure_ascii=False) + "\n"
    return text.encode("utf-8", "backslashreplace").decode("utf-8")


def write_json(path: Path, data: Any) -> None:
    atomic_write(path, to_json(data))


def remove_half_written(folder: Path, *patterns: str) -> None:
    """Remove the files that killed processes left half-written in `folder`: those of `patterns`, by default all."""
    for path in itertools.chain.from_iterable(folder.glob(pattern) for pattern in patterns or (".*.tmp",)):
        with contextlib.suppress(OSError):  # gone, somebody else's, or a folder: half a checkpoint
            if time.time() - path.lstat().st_mtime > STALE_TMP_S:
                path.unlink()
