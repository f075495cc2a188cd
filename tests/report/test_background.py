"""The page of a run that is training: nobody waits for it, and a fault in it is a warning."""

from __future__ import annotations

import sys
import time
from contextlib import suppress
from pathlib import Path

import made_run
import psutil
import pytest

from rvc_dist.report import PAGE, background
from rvc_dist.report.background import PageMaker
from rvc_dist.report.history import History
from rvc_dist.workspace import Workspace


def makers(root: Path) -> list[psutil.Process]:
    """The processes that this one started to make a page of `root`."""
    return [child for child in psutil.Process().children() if str(root) in child.cmdline()]


def test_a_page_is_made_beside_and_the_last_has_the_end(tmp_path: Path) -> None:
    work = Workspace(tmp_path, "anna")
    made_run.history(work, ())
    with PageMaker(tmp_path) as pages:
        began_at = time.monotonic()
        pages.begin()
        pages.begin()  # that one has to do
        assert time.monotonic() - began_at < 2.0
        assert not (tmp_path / PAGE).exists()
        assert len(makers(tmp_path)) == 1
        lines = History(work.history_file)
        lines.begin(made_run.TOTAL, epoch=100, total_steps=3000, ranks=[], versions={}, global_batch=16)
        lines.write("end", 2500, why="stopped by SIGTERM")
        lines.close()
    assert "stopped by SIGTERM, at step 2500 of 3000" in (tmp_path / PAGE).read_text(encoding="utf-8")


def test_without_a_beginning_there_is_no_page(tmp_path: Path) -> None:
    with PageMaker(tmp_path):
        pass
    PageMaker(tmp_path, enabled=False).finish()
    assert list(tmp_path.iterdir()) == []


def test_a_page_that_is_never_made_is_given_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    waits = tmp_path / "waits"
    waits.write_text(f"#!{sys.executable}\nimport time\ntime.sleep(100)\n")
    waits.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(waits))
    monkeypatch.setattr(background, "EXIT_S", 0.5)
    monkeypatch.setattr(background, "MOST_S", 0.0)
    began_at = time.monotonic()
    with suppress(KeyboardInterrupt), PageMaker(tmp_path) as pages:
        pages.begin()
        time.sleep(0.1)
        pages.begin()
        raise KeyboardInterrupt  # who stops a run waits for less time than who finishes it
    assert time.monotonic() - began_at < 5.0
    assert makers(tmp_path) == []
    assert [m.partition("; ")[0] for m in caplog.messages] == [
        f"{tmp_path / PAGE}: not made within {limit} s" for limit in ("0", "0.5")
    ]
