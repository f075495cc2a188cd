"""What goes through all clips of a run takes time in proportion to them; the index takes no memory in proportion."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import pytest
from launching import ROOT, finish, start

FEW, MANY = 1_000, 8_000
FRAME_BYTES, FRAMES_A_CLIP = 128, 40
"""Of scaling.py: 32 channels of float32."""

Measured = dict[str, tuple[float, float, float]]

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> tuple[Measured, Measured]:
    """Seconds of CPU, seconds and MB of every step, for few clips and for many."""
    folder = tmp_path_factory.mktemp("scale")
    return scaling(folder / "few", FEW), scaling(folder / "many", MANY)


def scaling(folder: Path, num_clips: int) -> Measured:
    process = start([sys.executable, str(ROOT / "tests" / "scaling.py"), str(folder), str(num_clips)])
    output = finish(process, timeout_s=900)
    shutil.rmtree(folder, ignore_errors=True)  # many are 0.3 GB
    assert process.returncode == 0, output[-5000:]
    result: Measured = json.loads(output.splitlines()[-1])
    return result


def test_time_grows_linearly(measured: tuple[Measured, Measured]) -> None:
    few, many = measured
    assert len(few) == 8
    for step, (cpu_s, _, _) in many.items():
        # CPU time: what else runs on the machine has no say. Eight times the clips; n log n would be 10 times, n^2 64.
        assert cpu_s < 16 * few[step][0] + 0.25, f"{step}: {few[step]} for {FEW} clips, {many[step]} for {MANY}"


def test_memory_does_not(measured: tuple[Measured, Measured]) -> None:
    few, many = measured
    frames_mb = MANY * FRAMES_A_CLIP * FRAME_BYTES / 1e6  # 41
    for step in ("index of all frames", "index of k-means centres", "index: is it complete", "clip table"):
        grown_mb = many[step][2]
        assert grown_mb < few[step][2] + 0.4 * frames_mb, f"{step}: {few[step]} and {many[step]}"
