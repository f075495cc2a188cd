"""Files that others made: judged before they are read. This module imports nothing heavy.

Every gate raises `ForeignFileError` with a reason that does not name the file: the caller knows what the file is for.
"""

from __future__ import annotations

import errno
import math
import re
import stat
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

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
