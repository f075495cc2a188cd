"""Torch files that others made: a zip of stored tensors, and a pickle of the plain data that holds them.

Of the pickle machine only the few instructions are left that torch.save writes for plain data. torch.load with
weights_only would not do: a file can make it hash a key without end, or give it a tensor of more numbers than bytes.
Tensors are views of the mapped file, copied where they are written to, so that reading one costs no memory.
"""

from __future__ import annotations

import io
import math
import mmap
import pickle
import pickletools
import struct
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import torch
from torch import Tensor

from rvc_dist.files import ForeignFileError, atomic_write, regular_size

MAX_PICKLE = 1 << 22
"""Bytes of the pickle, and of the zip's directory; the largest of RVC, a checkpoint with its optimizer, has 0.5 MB."""
MAX_BYTES = 1 << 34
"""Of a file: that of the largest encoder has less than half."""
DTYPES = {"Half": torch.float16, "BFloat16": torch.bfloat16, "Float": torch.float32, "Double": torch.float64}
_BESIDE = {"Long": torch.int64, "Int": torch.int32, "Short": torch.int16, "Char": torch.int8, "Byte": torch.uint8}
"""Of the counters of networks and in the states of optimizers, those of 8 bits among them."""
_DAMAGED = (
    *(zipfile.BadZipFile, struct.error, EOFError, NotImplementedError, RuntimeError),
    *(AttributeError, LookupError, OverflowError, TypeError, ValueError, pickle.UnpicklingError),
)
"""What reading raises on damaged files and on files of another kind."""
_INSTRUCTIONS = {ord(op.code): op.name for op in pickletools.opcodes}
_PLAIN = {
    *("PROTO", "STOP", "MARK", "BINPUT", "LONG_BINPUT", "BINGET", "LONG_BINGET", "GLOBAL", "BINPERSID", "REDUCE"),
    *("NONE", "NEWTRUE", "NEWFALSE", "BININT", "BININT1", "BININT2", "LONG1", "BINFLOAT", "BINUNICODE"),
    *("EMPTY_TUPLE", "TUPLE", "TUPLE1", "TUPLE2", "TUPLE3", "EMPTY_LIST", "APPEND", "APPENDS", "EMPTY_DICT"),
}
"""What torch.save writes for plain data, besides SETITEM, SETITEMS and BUILD."""


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
        return _Reader(buffer, _entries(path, buffer)).load()
    except ForeignFileError:
        raise
    except _DAMAGED as error:
        why = "damaged, or with more in it than tensors and plain data"
        raise ForeignFileError(f"{why}: {type(error).__name__}") from error


def save_pth(path: Path, contents: dict[str, Any]) -> None:
    """Write a torch file whole or not at all."""
    buffer = io.BytesIO()  # of a full disk PyTorch would not say that it is one
    torch.save(contents, buffer)
    atomic_write(path, buffer.getvalue())


def weights(state: object, with_counters: bool = False) -> dict[str, Tensor]:
    """A state dict of finite floating numbers; `with_counters`, it may hold int64 too.

    Raises:
        ForeignFileError: it is something else; the tensors are named.
    """
    if not isinstance(state, Mapping) or not all(isinstance(v, Tensor) for v in state.values()):
        raise ForeignFileError("it holds something else than a mapping of names to tensors")
    allowed = {*DTYPES.values(), *([torch.int64] if with_counters else [])}
    odd = [key for key, value in state.items() if value.dtype not in allowed]
    if odd:
        raise ForeignFileError(f"not of floating numbers, but of {state[odd[0]].dtype}: its {_tensors(odd)}")
    infinite = [key for key, value in state.items() if not value.isfinite().all()]
    if infinite:
        raise ForeignFileError(f"numbers that are not finite (NaN or infinity) in its {_tensors(infinite)}")
    return {str(key): value for key, value in state.items()}


def _tensors(keys: list[object]) -> str:
    """For a sentence: their names, and how many more there are."""
    names = ", ".join(str(key)[:80] for key in keys[:5])
    return f"tensor{'s' * (len(keys) > 1)} {names}{f' and {len(keys) - 5} more' if len(keys) > 5 else ''}"


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


class _Dispatch(dict[int, Callable[[Any], None]]):
    """What follows an instruction, by its byte."""

    def __missing__(self, code: int) -> NoReturn:
        raise ForeignFileError(f"with more in it than tensors and plain data: {_INSTRUCTIONS[code]}")


class _Reader(pickle._Unpickler):
    """The standard library's pickle machine in Python, without the instructions that torch.save does not write for
    plain data, nor any that looks for methods in what it read.
    """

    stack: list[Any]

    def __init__(self, buffer: mmap.mmap, entries: Mapping[str, tuple[int, int]]) -> None:
        self.buffer, self.entries, self.left = buffer, entries, len(buffer)
        if "byteorder" in entries and self.bytes_of("byteorder") != b"little":
            raise ForeignFileError("its numbers are big-endian, expected little-endian")
        super().__init__(io.BytesIO(self.bytes_of("data.pkl")), fix_imports=False)
        self.tensors: dict[Any, Tensor] = {}
        storages = {f"torch {name}Storage": dtype for name, dtype in (DTYPES | _BESIDE).items()}
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

    def find_class(self, module: str, name: str) -> Any:
        """Only these put anything on the stack that can be called."""
        if f"{module} {name}" not in self.names:
            raise ForeignFileError(f"with more in it than floating numbers and plain data: {f'{module} {name}':.80}")
        return self.names[f"{module} {name}"]

    def persistent_load(self, pid: Any) -> _Storage:
        kind, dtype, key, _, num = pid
        first, size = self.entries[f"data/{key}"]
        if kind != "storage" or type(num) is not int or not 0 <= num * dtype.itemsize <= size:
            raise TypeError
        return _Storage(dtype, first, num)

    def set_items(self, items: list[Any]) -> None:
        keys, target = items[::2], self.stack[-1]
        if type(target) is not dict or any(type(key) not in (str, int) for key in keys):
            raise TypeError  # other keys may take forever to hash
        target.update(zip(keys, items[1::2], strict=True))

    dispatch = _Dispatch({c: pickle._Unpickler.dispatch[c] for c, name in _INSTRUCTIONS.items() if name in _PLAIN})
    dispatch[ord(pickle.SETITEM)] = lambda self: self.set_items([self.stack.pop(-2), self.stack.pop()])
    dispatch[ord(pickle.SETITEMS)] = lambda self: self.set_items(self.pop_mark())
    dispatch[ord(pickle.BUILD)] = lambda self: self.stack.pop()  # of a state dict, the versions of its modules

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
