"""RUN/metrics.jsonl: written beside training, read back whatever became of the file."""

import contextlib
import json
import logging
import os
import re
import resource
import threading
import time
from argparse import Namespace

import pytest

from rvc_dist.files import ForeignFileError
from rvc_dist.report import history
from rvc_dist.report.history import History, read_history
from rvc_dist.runtime import background
from rvc_dist.workspace import StageError, Stopped

START = {"epoch": 0.0, "total_steps": 9, "ranks": [], "versions": {}, "global_batch": 4}


def written(path, *steps, begin=0, **values):
    with History(path) as writer:
        writer.begin(begin, **START)
        for step in steps:
            writer.write("step", step, epoch=step / 7, values={"loss/d": step * 1.5} | values, seconds={"data": 0.1})


def shown(path):
    return [(line["kind"], line["step"]) for line in read_history(path)]


def test_a_line_is_what_was_written_and_the_handler_is_gone_after_the_end(tmp_path):
    path, logger = tmp_path / "metrics.jsonl", logging.getLogger("rvc_dist.train.x")
    ranks = [{"rank": 0, "host": "h", "device": "cuda:0", "name": "NVIDIA H100"}]
    values = {"loss/d": float("nan"), "loss/g": -float("inf"), "lr": 1e-4}
    with History(path) as writer:
        logger.warning("early %d", 1)
        assert not path.exists()
        writer.begin(3, **START | {"ranks": ranks})
        writer.step = 4
        writer.emit(logging.LogRecord("x", logging.WARNING, "", 0, "a bad step: %s", ("\udcff.wav",), None))
        logger.info("no warning")
        writer.write("step", 4, epoch=0.5, values=values, seconds={})
    logger.warning("late")
    run, early, bad, step = lines = read_history(path)
    assert (run["kind"], run["step"], run["total_steps"], run["ranks"][0]["name"]) == ("run", 3, 9, "NVIDIA H100")
    assert (early["kind"], early["step"], early["text"]) == ("warning", 3, "early 1")
    assert (bad["step"], bad["text"]) == (4, "a bad step: \\udcff.wav")
    assert step["values"] == {"loss/d": None, "loss/g": None, "lr": 1e-4}
    assert all(abs(line["time"] - time.time()) < 60 for line in lines)
    assert [json.loads(text) for text in path.read_text().splitlines()] == lines


def test_a_resumed_run_hides_the_steps_that_it_repeats(tmp_path):
    path = tmp_path / "metrics.jsonl"
    written(path, 1, 2, 3, 4)
    written(path, 4, 5, begin=3)
    written(path, begin=4)
    assert shown(path) == [("run", 0), *[("step", i) for i in (1, 2, 3)], ("run", 3), ("step", 4), ("run", 4)]
    written(path, begin=0)
    assert shown(path) == [("run", 0), ("run", 0)]


@pytest.mark.parametrize(
    "foreign",
    [
        b'{"kind": "step", "ti',
        b"[" * 100_000,
        b'{"kind": "step", "time": 1.0, "step": 1, "epoch": 1.0, "values": {"a": "b"}, "seconds": {}}',
        b'{"kind": "step", "time": 1.0, "step": 1, "epoch": NaN, "values": {}, "seconds": {}}',
        b'{"kind": "step", "time": 1.0, "step": -1, "epoch": 1.0, "values": {}, "seconds": {}}',
        b'{"kind": "new", "time": 1.0, "step": 1}',
        b'{"kind": "end", "time": 1.0, "step": 1, "why": ["done"]}',
        b"\xff\xfe\0",
        b"3",
    ],
)
def test_what_is_no_line_is_passed_over_and_costs_no_other_line(tmp_path, foreign):
    """The first is what a killed run leaves: the next one does not append to it."""
    path = tmp_path / "metrics.jsonl"
    written(path, 1)
    with path.open("ab") as stream:
        stream.write(foreign)
    assert shown(path) == [("run", 0), ("step", 1)]
    written(path, 2, begin=1)
    assert shown(path) == [("run", 0), ("step", 1), ("run", 1), ("step", 2)]


def test_of_a_huge_file_the_end_is_read_and_what_is_no_file_is_refused(tmp_path):
    path = tmp_path / "metrics.jsonl"
    assert read_history(path) == []
    written(path, *range(1, 200))
    assert shown(path)[0] == ("run", 0)
    assert shown(path)[-50:] == [(line["kind"], line["step"]) for line in read_history(path, 10_000)][-50:]
    assert 50 < len(read_history(path, 10_000)) < 150
    os.mkfifo(tmp_path / "fifo")
    with pytest.raises(ForeignFileError, match="FIFO"):
        read_history(tmp_path / "fifo")


def test_a_full_disk_is_told_once_and_its_lines_come_later(tmp_path, caplog):
    path = tmp_path / "metrics.jsonl"
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    writer = History(path)
    writer.begin(0, **START)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, hard))
        for step in range(1, 21):
            writer.write("step", step, epoch=0.0, values={"loss/d": 1.0}, seconds={})
        deadline = time.monotonic() + 10
        while "too large" not in caplog.text and time.monotonic() < deadline:
            time.sleep(0.01)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert path.stat().st_size == 1000
    writer.write("end", 20, why="done")
    writer.close()
    told = [r.getMessage() for r in caplog.records]
    assert len(told) == 1
    assert re.fullmatch(rf"{path}: File too large; .* MB free.*; the run goes on without it", told[0])
    kinds = [line for line in shown(path) if line[0] != "warning"]
    assert kinds == [("run", 0), *[("step", i) for i in range(1, 21)], ("end", 20)]


def test_a_disk_that_does_not_answer_holds_neither_steps_nor_the_end(tmp_path, monkeypatch, caplog):
    answers = threading.Event()
    monkeypatch.setattr(History, "_append", lambda *_: answers.wait())
    monkeypatch.setattr(background, "EXIT_S", 0.1)
    began = time.monotonic()
    written(tmp_path / "metrics.jsonl", *range(100))
    answers.set()
    assert time.monotonic() - began < 5
    assert "metrics.jsonl has not answered for 0 s: going on without it" in caplog.text


@pytest.mark.parametrize(
    ("error", "why"),
    [
        (None, []),
        (Stopped("stopped by SIGTERM"), []),
        (StageError("the disk is full;", "free some"), ["failed: the disk is full; free some"]),
        (KeyboardInterrupt(), ["failed: KeyboardInterrupt()"]),
        (RuntimeError("[gloo/pair.cc:1] Connection closed by peer"), ["failed: rank 1 on b failed first: ..."]),
    ],
)
def test_the_end_says_what_failed(tmp_path, monkeypatch, error, why):
    log = Namespace(first_failure=lambda: "rank 1 on b failed first: ...")
    monkeypatch.setattr(history, "rank_logs", lambda: [log])
    with contextlib.suppress(BaseException), History(tmp_path / "metrics.jsonl") as writer:
        writer.begin(0, **START)
        writer.step = 7
        if error:
            raise error
    assert [line["why"] for line in read_history(tmp_path / "metrics.jsonl") if line["kind"] == "end"] == why


def test_other_ranks_write_nothing(tmp_path):
    with History(tmp_path / "metrics.jsonl") as writer:
        logging.getLogger("rvc_dist").warning("seen elsewhere")
        writer.write("end", 1, why="done")
    assert list(tmp_path.iterdir()) == []
