"""A data stage is a small class: one from outside is sharded, resumed, checked and reported as those of the package."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

from rvc_dist import unit_stage
from rvc_dist.config import Recipe
from rvc_dist.files import write_json
from rvc_dist.schema import Count, record
from rvc_dist.unit_stage import UnitStage, in_threads, one_ahead
from rvc_dist.workspace import Shard, SourceFile, StageError, Unit, fingerprint, read_json, save_arrays

UNITS = [Unit(i, (SourceFile(f"{i}.wav", 0, 1, 1, float(i + 1)),)) for i in range(3)]
Header = record(stamp=str, length=Count)


class Lengths(UnitStage[dict[str, int]]):
    """Adds up how long the names of a unit's recordings are."""

    name = "lengths"
    folder = "lengths"
    header = Header

    def __init__(self, run_dir: Path, factor: int = 1, units: Sequence[Unit] = UNITS) -> None:
        super().__init__(Recipe(run_dir=str(run_dir)), units)
        self.factor, self.made = factor, list[int]()

    def fingerprints(self, unit: Unit) -> list[str]:
        return [fingerprint(self.factor, unit.id)]

    def make_units(self, units: Sequence[Unit]) -> None:
        for unit in units:
            self.made.append(unit.id)
            length = self.factor * sum(len(file.path) for file in unit.files)
            header = {"stamp": self.fingerprints(unit)[0], "clips": [], "length": length}
            save_arrays(self.file(unit), {"x": np.zeros(2, np.float32)}, header)

    def report(self, headers: list[dict[str, int]]) -> None:
        write_json(self.total_file, {"total": sum(h["length"] for h in headers)})

    @property
    def total_file(self) -> Path:
        return self.work.root / "total.json"


def test_a_stage_from_outside_is_sharded_resumed_and_reported(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    caplog.set_level("INFO")
    halves = [Lengths(tmp_path), Lengths(tmp_path)]
    halves[1].make(Shard(1, 2))
    assert "lengths: 3 units of 0.1 min, 1 to do here" in caplog.text
    assert "this part is done, 2 units are left to others" in caplog.text
    assert not halves[1].total_file.exists()
    halves[0].make(Shard(0, 2))
    assert [half.made for half in halves] == [[2, 0], [1]]  # the longest first
    assert read_json(halves[0].total_file) == {"total": 15}

    file = halves[0].file(UNITS[1])
    whole = file.read_bytes()
    file.write_bytes(whole[:-1])
    opened = []
    read = unit_stage.read_unit_file
    monkeypatch.setattr(unit_stage, "read_unit_file", lambda path: opened.append(path) or read(path))
    again = Lengths(tmp_path)
    again.make(Shard())
    assert again.made == [1]
    assert file.read_bytes() == whole
    assert opened == [again.file(unit) for unit in UNITS]  # once each for the report

    other = Lengths(tmp_path, factor=2)
    other.make(Shard())
    assert other.made == [2, 1, 0]
    assert read_json(other.total_file) == {"total": 30}
    with pytest.raises(StageError, match=r"lengths: 3 of 3 units in .*/lengths were replaced meanwhile"):
        again.finish(Shard())

    none = Lengths(tmp_path / "none", units=[])  # a work list that somebody emptied
    none.make(Shard())
    assert read_json(none.total_file) == {"total": 0}


def test_one_ahead_is_one_ahead() -> None:
    taken = []
    squares = one_ahead(lambda x: x * x, (taken.append(i) or i for i in range(4)))
    assert (next(squares), taken) == (0, [0, 1])
    assert list(squares) == [1, 4, 9]
    assert list(one_ahead(str, [])) == []
    failing = one_ahead(lambda x: 1 // x, [1, 0, 1])
    assert next(failing) == 1
    with pytest.raises(ZeroDivisionError):
        next(failing)


def test_an_error_in_a_thread_ends_the_others() -> None:
    done = []

    def work(number: int) -> None:
        done.append(number)
        if number == 1:
            raise ValueError("one")
        time.sleep(0.001)

    with pytest.raises(ValueError, match="one"):
        in_threads(1, work, range(500), "work", "numbers")
    assert len(done) < 500
