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
MOST_BYTES = 1e9
"""Of a process in which the libraries of several stages are loaded; a healthy conversion alone takes 0.9."""
FEW = tuple(kind for kind in KINDS if kind != "encoder")
GROUPS = (
    ("voice",),
    ("pretrained", "weights", "inspect"),
    ("features", "index"),
    ("npy", "import", "speakers"),
    ("run", "recipe", "lock", "beat", "results"),
    ("encoder",),
)
"""Kinds that share a process, since their stages need about the same libraries."""
LONGEST = 3000
"""Letters of what is said."""


def judge(folder: Path, count: int, *kinds: str) -> list[dict[str, Any]]:
    """What became of `count` inputs of each kind, of all it has for 0; fails at the first that did harm."""
    command = [sys.executable, HERE / "hostile.py", str(count), folder, *kinds]
    child = subprocess.run(command, capture_output=True, text=True, timeout=600, check=False)
    lines = [json.loads(line) for line in child.stdout.splitlines()]
    assert child.returncode == 0, (lines[-1:], child.returncode, child.stderr[-2000:])
    found = lines[1::2]
    assert len(found) == sum(count or KINDS[kind].count for kind in kinds)
    for line in found:
        assert not line["traceback"], (line["kind"], line["number"], line["traceback"])
        assert line["code"] in (0, 1), line
        assert line["code"] == 0 or 0 < len(line["said"][0]) < LONGEST, line
        assert line["s"] < MOST_S, line
    return found


def test_a_few(tmp_path: Path) -> None:
    found = judge(tmp_path, 8, *FEW)
    for kind in FEW:
        assert len({json.dumps(line["said"]) for line in found if line["kind"] == kind}) > 1, kind


@pytest.mark.slow
def test_a_thousand(tmp_path: Path) -> None:
    """With -s it shows the table of kinds."""
    assert sorted(kind for group in GROUPS for kind in group) == sorted(KINDS)
    found = [line for group in GROUPS for line in judge(tmp_path, 0, *group)]
    for name in KINDS:
        lines = [line for line in found if line["kind"] == name]
        slowest, more, most = (max(line[key] for line in lines) for key in ("s", "more", "bytes"))
        told = sum(bool(line["said"]) for line in lines)
        sys.stdout.write(
            f"{name:<12}{len(lines):5} inputs {told:5} told {slowest:6.2f} s {more / 1e6:5.0f} MB more, "
            f"{most / 1e6:5.0f} MB\n"
        )
        assert most < MOST_BYTES, name
    assert len(found) >= 1000
    assert sum(bool(line["said"]) for line in found) > len(found) / 2
