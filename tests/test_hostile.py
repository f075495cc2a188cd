"""Hostile files of every kind: a sentence and exit code 1, or no harm; within seconds, and without much memory."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hostile import KINDS

HERE = Path(__file__).parent
MOST_S = 10.0
MOST_BYTES = 4e8
"""More than before the input: the libraries alone take 0.5 GB, and a healthy conversion 0.9."""
LONGEST = 3000
"""Letters of what is said."""


def judge(folder: Path, first: int, count: int, *kinds: str) -> list[dict[str, Any]]:
    """What became of each input; fails at the first that did harm."""
    command = [sys.executable, HERE / "hostile.py", str(first), str(count), folder, *kinds]
    child = subprocess.run(command, capture_output=True, text=True, timeout=600, check=False)
    lines = [json.loads(line) for line in child.stdout.splitlines()]
    assert child.returncode == 0, (lines[-1:], child.returncode, child.stderr[-2000:])
    found = lines[1::2]
    assert len(found) == count * len(kinds)
    for line in found:
        assert not line["traceback"], (line["kind"], line["number"], line["traceback"])
        assert line["code"] in (0, 1), line
        assert line["code"] == 0 or 0 < len(line["said"][0]) < LONGEST, line
        assert line["s"] < MOST_S, line
        assert line["more"] < MOST_BYTES, line
    return found


def test_a_few(tmp_path: Path) -> None:
    found = judge(tmp_path, 100_000, 8, *KINDS)
    for kind in KINDS:
        assert len({json.dumps(line["said"]) for line in found if line["kind"] == kind}) > 1, kind


@pytest.mark.slow
def test_a_thousand(tmp_path: Path) -> None:
    """With -s it shows the table of kinds."""
    inputs, refused = 0, 0
    for name, kind in KINDS.items():
        found = judge(tmp_path, 0, kind.count, name)
        slowest, more, most = (max(line[key] for line in found) for key in ("s", "more", "bytes"))
        told = sum(bool(line["said"]) for line in found)
        sys.stdout.write(
            f"{name:<12}{len(found):5} inputs {told:5} refused {slowest:6.2f} s {more / 1e6:5.0f} MB more, "
            f"{most / 1e6:5.0f} MB\n"
        )
        inputs, refused = inputs + len(found), refused + told
    assert inputs >= 1000
    assert refused > inputs / 2
