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
MOST_BYTES = 2e8
"""More than before."""
FEW = 8
"""Inputs of each kind that do not wait for the slow tests."""
QUICK = tuple(kind for kind in KINDS if kind != "encoder")
LONGEST = 3000
"""Letters of what is said."""


def judge(folder: Path, first: int, end: int, *kinds: str) -> list[dict[str, Any]]:
    """What became of these inputs of each kind, of all it has for an end of 0; fails at the first that did harm."""
    command = [sys.executable, HERE / "hostile.py", str(first), str(end), folder, *kinds]
    child = subprocess.run(command, capture_output=True, text=True, timeout=600, check=False)
    lines = [json.loads(line) for line in child.stdout.splitlines()]
    assert child.returncode == 0, (lines[-1:], child.returncode, child.stderr[-2000:])
    found = lines[1::2]
    assert len(found) == sum((end or KINDS[kind].count) - first for kind in kinds)
    for line in found:
        assert not line["traceback"], (line["kind"], line["number"], line["traceback"])
        assert line["code"] in (0, 1), line
        assert line["code"] == 0 or 0 < len(line["said"][0]) < LONGEST, line
        assert line["s"] < MOST_S, line
        assert line["more"] < MOST_BYTES, line
    return found


def test_a_few(tmp_path: Path) -> None:
    found = judge(tmp_path, 0, FEW, *QUICK)
    for kind in QUICK:
        assert len({json.dumps(line["said"]) for line in found if line["kind"] == kind}) > 1, kind


@pytest.mark.slow
def test_a_thousand(tmp_path: Path) -> None:
    """With the few. With -s it shows the table of kinds."""
    found = judge(tmp_path, FEW, 0, *KINDS)
    for name in KINDS:
        lines = [line for line in found if line["kind"] == name]
        slowest, more = (max(line[key] for line in lines) for key in ("s", "more"))
        told = sum(bool(line["said"]) for line in lines)
        sys.stdout.write(f"{name:<12}{len(lines):5} inputs {told:5} told {slowest:6.2f} s {more / 1e6:5.0f} MB more\n")
    assert len(found) + FEW * len(QUICK) >= 1000
    assert sum(bool(line["said"]) for line in found) > len(found) / 2
