"""Torch files that others made: a zip of stored tensors, and a pickle of the plain data that holds them.

No pickle machine runs: the few instructions that torch.save writes for plain data are followed here, within the limits
below. Tensors are views of the mapped file, copied where they are written to, so that reading one costs no memory.
"""

from __future__ import annotations

import io
import math
import mmap
import pickletools
import struct
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from rvc_dist.files import ForeignFileError, regular_size

MAX_PICKLE = 1 << 22
"""Bytes of the pickle, and of the zip's directory; the largest of RVC, a checkpoint with its optimizer, has 0.5 MB."""
MAX_BYTES = 1 << 34
"""Of a file: that of the largest encoder has less than half."""
DTYPES = {"Half": torch.float16, "BFloat16": torch.bfloat16, "Float": torch.float32, "Double": torch.float64}
_DAMAGED = (
    *(zipfile.BadZipFile, struct.error, EOFError, NotImplementedError, RuntimeError),
    *(LookupError, OverflowError, TypeError, ValueError),
)
"""What reading raises on damaged files and on files of another kind."""
_VALUES = {"BININT", "BININT1", "BININT2", "LONG1", "BINFLOAT", "BINUNICODE"}
_CONSTANTS: dict[str, Callable[[], Any]] = {
    "EMPTY_DICT": dict,
    "EMPTY_LIST": list,
    "EMPTY_TUPLE": tuple,
    "NONE": lambda: None,
    "NEWTRUE": lambda: True,
    "NEWFALSE": lambda: False,
}


def load_pth(path: Path) -> Any:
    """The contents of a torch file, on the CPU; nothing in it is run.

    Raises:
        ForeignFileError: it is damaged, holds more than tensors and plain data, or takes more memory than its size.
        OSError: it cannot be opened.
    """
    if regular_size(path) > MAX_BYTES:
        raise ForeignFileError(f"it has more than {MAX_BYTES >> 30} GiB, which no voice and no encoder needs")
    with path.open("rb") as stream:
        if stream.read(2) != b"PK":
            raise ForeignFileError("damaged, no torch file, or one of torch before 1.6: save it again with a newer one")
        buffer = mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_COPY)
    try:
        return _Reader(buffer, _entries(path, buffer)).run()
    except ForeignFileError:
        raise
    except _DAMAGED as error:
        why = "damaged, or with more in it than tensors and plain data"
        raise ForeignFileError(f"{why}: {type(error).__name__}") from error


def weights(state: object, with_counters: bool = False) -> dict[str, Tensor]:
    """A state dict of finite floating numbers; `with_counters`, it may hold int64 too.

    Raises:
        ForeignFileError: it is something else; the tensor is named.
    """
    if not isinstance(state, Mapping) or not all(isinstance(v, Tensor) for v in state.values()):
        raise ForeignFileError("it holds something else than a mapping of names to tensors")
    allowed = {*DTYPES.values(), *([torch.int64] if with_counters else [])}
    for key, value in state.items():
        if value.dtype not in allowed:
            raise ForeignFileError(f"its tensor {str(key)[:80]} is of {value.dtype}, expected floating numbers")
        if not value.isfinite().all():
            raise ForeignFileError(f"its tensor {str(key)[:80]} holds numbers that are not finite (NaN or infinity)")
    return {str(key): value for key, value in state.items()}


class _Bounded(io.FileIO):
    """For zipfile, which takes the size of the directory from the file."""

    def read(self, size: int | None = -1, /) -> bytes:
        size = MAX_PICKLE if size is None or size < 0 else size
        if size > MAX_PICKLE:
            raise ForeignFileError(f"its directory takes {size} bytes, expected at most {MAX_PICKLE}")
        return super().read(size) or b""


def _entries(path: Path, buffer: mmap.mmap) -> dict[str, tuple[int, int]]:
    """Name of each entry, without the archive's own -> (first byte, number of bytes) in the file."""
    with _Bounded(path) as stream, zipfile.ZipFile(stream) as archive:
        found = archive.infolist()
    entries = {}
    for entry in found:
        if entry.compress_type != zipfile.ZIP_STORED or entry.compress_size != entry.file_size:
            raise ForeignFileError("its entries are compressed, expected stored ones as torch writes them")
        magic, name, extra = struct.unpack_from("<4s22xHH", buffer, entry.header_offset)
        first = entry.header_offset + 30 + name + extra
        if magic != b"PK\3\4" or first + entry.file_size > len(buffer):
            raise ForeignFileError("damaged: an entry of it lies outside the file")
        entries[entry.filename.partition("/")[2]] = first, entry.file_size
    if len(entries) != len(found) or sum(size for _, size in entries.values()) > len(buffer):
        raise ForeignFileError("damaged: entries of it have one name or share their bytes")
    return entries


class _Storage(NamedTuple):
    dtype: torch.dtype
    first: int
    num: int
    """Numbers, from byte `first` on."""


class _Reader:
    def __init__(self, buffer: mmap.mmap, entries: Mapping[str, tuple[int, int]]) -> None:
        self.buffer, self.entries, self.left = buffer, entries, len(buffer)
        self.stack: list[Any] = []
        self.marks: list[int] = []
        self.tensors: dict[Any, Tensor] = {}
        storages = {f"torch {name}Storage": dtype for name, dtype in (DTYPES | {"Long": torch.int64}).items()}
        self.names: dict[str, Any] = storages | {
            "collections OrderedDict": lambda: {},
            "torch Size": lambda size: size,
            "torch._utils _rebuild_tensor_v2": self.tensor,
            "torch._utils _rebuild_parameter": lambda tensor, *_: tensor,
        }

    def bytes_of(self, name: str) -> bytes:
        first, size = self.entries[name]
        if size > MAX_PICKLE:
            raise ForeignFileError(f"its {name} has {size} bytes, expected at most {MAX_PICKLE}")
        return self.buffer[first : first + size]

    def run(self) -> Any:
        if "byteorder" in self.entries and self.bytes_of("byteorder") != b"little":
            raise ForeignFileError("its numbers are big-endian, expected little-endian")
        memo: dict[Any, Any] = {}
        for op, argument, _ in pickletools.genops(self.bytes_of("data.pkl")):
            name = op.name
            if name in _VALUES:
                self.stack.append(argument)
            elif name in ("BINPUT", "LONG_BINPUT"):
                memo[argument] = self.stack[-1]
            elif name in ("BINGET", "LONG_BINGET"):
                self.stack.append(memo[argument])
            elif name in _CONSTANTS:
                self.stack.append(_CONSTANTS[name]())
            elif name == "GLOBAL":
                if str(argument) not in self.names:
                    raise ForeignFileError(f"with more in it than floating numbers and plain data: {argument!s:.80}")
                self.stack.append(self.names[str(argument)])
            elif name not in ("PROTO", "STOP"):
                self.combine(name)
        return self.stack.pop()

    def combine(self, name: str) -> None:
        if name == "MARK":
            self.marks.append(len(self.stack))
        elif name in ("TUPLE", "TUPLE1", "TUPLE2", "TUPLE3"):
            self.stack.append(tuple(self.popped(int(name[5:] or 0))))
        elif name in ("SETITEM", "SETITEMS"):
            items = self.popped(2 * (name == "SETITEM"))
            keys, target = items[::2], self.stack[-1]
            if type(target) is not dict or any(type(key) not in (str, int) for key in keys):
                raise TypeError  # other keys may take forever to hash
            target.update(zip(keys, items[1::2], strict=True))
        elif name in ("APPEND", "APPENDS"):
            items = self.popped(int(name == "APPEND"))
            if type(self.stack[-1]) is not list:
                raise TypeError
            self.stack[-1].extend(items)
        else:
            self.call(name)

    def call(self, name: str) -> None:
        pop, push = self.stack.pop, self.stack.append
        if name == "BINPERSID":
            kind, dtype, key, _, num = pop()
            first, size = self.entries[f"data/{key}"]
            if kind != "storage" or type(num) is not int or not 0 <= num * dtype.itemsize <= size:
                raise TypeError
            push(_Storage(dtype, first, num))
        elif name == "REDUCE":
            arguments = pop()
            push(pop()(*arguments))  # only `names` put anything on the stack that can be called
        elif name == "BUILD":
            pop()  # of a state dict, the versions of its modules
        else:
            raise ForeignFileError(f"with more in it than tensors and plain data: {name}")

    def popped(self, num: int) -> list[Any]:
        """The last `num` things on the stack; for 0, those since the last mark."""
        at = len(self.stack) - num if num else self.marks.pop()
        found = self.stack[at:]
        del self.stack[at:]
        return found

    def tensor(self, storage: Any, offset: Any, size: Any, stride: Any, *_: Any) -> Tensor:
        """A dense tensor. Those that share numbers share memory, and all together have no more bytes than the file."""
        numbers = (offset, *size, *stride)
        if type(storage) is not _Storage or any(type(n) is not int or n < 0 for n in numbers) or len(size) > 8:
            raise TypeError
        dtype, num, dense = storage.dtype, math.prod(size), 1
        for step, length in sorted((s, n) for n, s in zip(size, stride, strict=True) if n != 1):
            if step != dense and num:
                raise ForeignFileError(
                    f"a tensor of it, {list(size)}, has strides {list(stride)}, expected a dense one"
                )
            dense *= length
        if offset + num > storage.num:
            raise ForeignFileError(f"a tensor of it, {list(size)}, reaches beyond its storage")
        key = (storage, *numbers)
        if key not in self.tensors:
            self.left -= num * dtype.itemsize
            if self.left < 0:
                raise ForeignFileError("its tensors overlap")
            first = storage.first + offset * dtype.itemsize
            buffer: Any = self.buffer
            if first % dtype.itemsize:  # zipped by something else than torch
                buffer, first = bytearray(self.buffer[first : first + num * dtype.itemsize]), 0
            flat = (
                torch.frombuffer(buffer, dtype=dtype, count=num, offset=first) if num else torch.empty(0, dtype=dtype)
            )
            self.tensors[key] = flat.as_strided(size, stride)
        return self.tensors[key]
