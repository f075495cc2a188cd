"""Files that others made are judged before they are read."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest

from rvc_dist.files import ForeignFileError, read_npy, regular_size


def test_only_regular_files_are_opened(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"abc")
    assert regular_size(tmp_path / "file") == 3
    (tmp_path / "link").symlink_to("file")
    assert regular_size(tmp_path / "link") == 3
    os.mkfifo(tmp_path / "fifo")
    for path in (tmp_path / "fifo", Path("/dev/zero")):
        with pytest.raises(ForeignFileError, match="it is a FIFO, socket or device, expected a file"):
            regular_size(path)
    with pytest.raises(ForeignFileError, match="it is a folder"):
        regular_size(tmp_path)
    with pytest.raises(FileNotFoundError):
        regular_size(tmp_path / "none")


@pytest.mark.parametrize(
    "array",
    [
        np.arange(6, dtype=np.float32).reshape(2, 3),
        np.arange(6.0).reshape(2, 3).T,
        np.ones((1, 1, 2), np.float16),
        np.arange(4),
        np.arange(3, dtype=np.uint8),
    ],
)
@pytest.mark.parametrize("version", [(1, 0), (2, 0), (3, 0)])
def test_numbers_come_back_as_numpy_saved_them(array: np.ndarray, version: tuple[int, int], tmp_path: Path) -> None:
    with (tmp_path / "a.npy").open("wb") as stream:
        np.lib.format.write_array(stream, array, version)
    found = read_npy(tmp_path / "a.npy")
    assert found.dtype == array.dtype
    assert np.array_equal(found, array)


def header(text: bytes, length: int | None = None) -> bytes:
    return b"\x93NUMPY\x01\0" + (len(text) if length is None else length).to_bytes(2, "little") + text


FLOATS = b"{'descr': '<f4', 'fortran_order': False, 'shape': (%s,), }\n"


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\x93NUMPY\x01\0",
        header(b"{'descr': " + b"(" * 4000 + b"}\n"),
        header(b"{'descr': '|O', 'fortran_order': False, 'shape': (1,), }\n") + bytes(8),
        header(b"{'descr': [('a', '<f4')], 'fortran_order': False, 'shape': (1,), }\n") + bytes(4),
        header(FLOATS % b"99999999999999999999") + bytes(8),
        header(FLOATS % b"2", 9) + bytes(8),
        header(FLOATS % b"3") + bytes(8),
        header(FLOATS % b"1") + bytes(8),
        header(FLOATS % b"0"),
        header(FLOATS % b"-1") + bytes(8),
    ],
)
def test_an_npy_file_that_is_not_what_its_header_says_is_refused(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "a.npy").write_bytes(content)
    with pytest.raises(ForeignFileError, match=r"\.npy file"):
        read_npy(tmp_path / "a.npy")
