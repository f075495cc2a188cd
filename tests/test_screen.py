"""Progress on a terminal of any width, in a pipe and in a log; what --quiet and --verbose show."""

from __future__ import annotations

import fcntl
import logging
import os
import pty
import re
import signal
import struct
import subprocess
import sys
import termios
import time
from collections.abc import Mapping
from types import SimpleNamespace

import pytest

from rvc_dist import screen
from rvc_dist.screen import ProgressBar, duration, without_details
from rvc_dist.train.metrics import report_steps
from rvc_dist.train.progress import Progress

PROGRAM = """
import logging, sys, time
from rvc_dist import screen
from rvc_dist.workspace import Shard

rank, detail = int(sys.argv[1]), sys.argv[2] if len(sys.argv) > 2 else ""
screen.FIRST_LINE_S = screen.TICK_S = 0.02
screen.set_up_logging(Shard(rank, 2), detail)
log = logging.getLogger("rvc_dist.x")
with screen.ProgressBar("extract", 3600.0, screen.AUDIO) as bar:
    for number in range(5):
        bar.advance(360.0, num_failed=number % 2)
        bar.text = f"{number}/10 units and a name that is much too long for it"
        time.sleep(0.06)
    log.debug("told in detail")
    log.info("told in passing")
    log.warning("told in any case")
"""
CODES = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")


def in_pipe(*arguments: str, **environment: str) -> str:
    return subprocess.run(
        [sys.executable, "-c", PROGRAM, *arguments],
        env=os.environ | environment,
        stderr=subprocess.PIPE,
        text=True,
        check=True,
        timeout=60,
    ).stderr


def in_terminal(columns: int, *arguments: str, environment: Mapping[str, str] | None = None) -> str:
    """All that a terminal of so many columns is sent."""
    unset = {key: value for key, value in os.environ.items() if key not in ("COLUMNS", "CI", "NO_COLOR")}
    here, there = pty.openpty()
    fcntl.ioctl(there, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
    command = [sys.executable, "-c", PROGRAM, *arguments]
    variables = unset | {"TERM": "xterm"} | dict(environment or {})
    with subprocess.Popen(command, env=variables, stdin=there, stdout=there, stderr=there) as process:
        os.close(there)
        parts = []
        while True:
            try:
                part = os.read(here, 1 << 16)
            except OSError:  # its other end is closed
                break
            if not part:
                break
            parts.append(part)
    os.close(here)
    assert process.returncode == 0
    return b"".join(parts).decode()


def test_a_pipe_gets_whole_lines_without_codes() -> None:
    told = in_pipe("0", FORCE_COLOR="1", TTY_COMPATIBLE="1")  # as CI services set them
    assert "\x1b" not in told
    assert "\r" not in told
    line = r"\d\d:\d\d:\d\d \[rank 0\] extract: 40%, 24 min/1 h 0 min, \d+ s audio/s, 0 s left, 1 failed, 3/10 units"
    assert re.search(line.replace("40%, 24", r"\d+%, \d+").replace("1 failed, 3", r"\d failed, \d"), told)
    assert "told in passing" in told


@pytest.mark.parametrize("columns", [20, 40, 80, 120])
def test_a_bar_fits_the_terminal(columns: int) -> None:
    told = in_terminal(columns, "0")
    drawn = [line for line in re.split(r"[\r\n]+", CODES.sub("", told)) if line.startswith("extract ")]
    assert drawn
    assert max(map(len, drawn)) <= columns
    assert any("left" in line for line in drawn) == (columns > 20)
    assert any("━" in line for line in drawn) == (columns > 40)
    assert any("s audio/s" in line for line in drawn) == (columns >= 80)
    assert "told in passing" in CODES.sub("", told).replace("\r\n", " ").replace("  ", " ")


@pytest.mark.parametrize(
    ("environment", "has_bar", "has_color"),
    [
        ({}, True, True),
        ({"NO_COLOR": "1"}, True, False),
        ({"CI": "true"}, False, False),
        ({"TERM": "dumb"}, False, False),
    ],
)
def test_the_environment_has_its_say(environment: dict[str, str], has_bar: bool, has_color: bool) -> None:
    told = in_terminal(80, "0", environment=environment)
    assert ("━" in told) == has_bar
    assert (re.search(r"\x1b\[[39][0-9]m", told) is not None) == has_color
    assert ("failed" in told and "] extract: " in told) != has_bar


@pytest.mark.parametrize(
    ("rank", "detail", "shown"),
    [
        ("0", "--quiet", ["any case"]),
        ("0", "", ["passing", "any case"]),
        ("0", "--verbose", ["detail", "passing", "any case"]),
        ("1", "", ["any case"]),
        ("1", "--verbose", ["detail", "passing", "any case"]),
    ],
)
def test_what_is_shown_of_which_rank(rank: str, detail: str, shown: list[str]) -> None:
    told = CODES.sub("", in_terminal(80, rank, *([detail] if detail else [])))
    assert [word for word in ("detail", "passing", "any case") if word in told] == shown
    assert ("━" in told) == (rank == "0" and detail != "--quiet")


def test_the_options_may_stand_anywhere() -> None:
    assert without_details(["--quiet", "run", "--verbose", "--name", "x"]) == (["run", "--name", "x"], "--verbose")
    assert without_details(["launch", "--", "run", "--quiet"]) == (["launch", "--", "run", "--quiet"], "")


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.4, "0 s"), (99.4, "99 s"), (99.5, "2 min"), (3569, "59 min"), (3570, "1 h 0 min"), (8000, "2 h 13 min"),
     (359_000, "99 h 43 min"), (400_000, "4 d 15 h")],
)  # fmt: skip
def test_durations(seconds: float, text: str) -> None:
    assert duration(seconds) == text


def test_the_rate_is_of_late_and_lines_become_rarer(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    now = [0.0]
    monkeypatch.setattr(screen.time, "monotonic", lambda: now[0])
    caplog.set_level(logging.INFO, logger="rvc_dist")
    bar = ProgressBar("train", 10_000, "steps", 1000)
    for second in range(1, 1201):
        now[0] = float(second)
        bar.advance(0 if second <= 300 else 2)  # five minutes go by before the first step
        bar.tick()
    assert bar.rate == pytest.approx(2.0, rel=0.02)
    assert bar.left_s == pytest.approx((9000 - 1800) / 2, rel=0.02)
    lines = [r.getMessage() for r in caplog.records]
    assert lines[0] == "train: 10%, 1000/10000 steps"
    assert lines[-1].endswith(" 2.0 steps/s, 1 h 0 min left")
    assert 25 < len(lines) < 45


def test_a_bar_within_another_shows_nothing(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(screen, "TICK_S", 0.01)
    monkeypatch.setattr(screen, "FIRST_LINE_S", 0.01)
    caplog.set_level(logging.INFO, logger="rvc_dist")
    with ProgressBar("outer", 2, "units", look=lambda bar: bar.advance()), ProgressBar("inner", 2, "units"):
        time.sleep(0.1)
    told = {r.getMessage().partition(":")[0] for r in caplog.records}
    assert told == {"outer"}
    assert ProgressBar.opened == []


STAGE = """
import logging, signal, sys, time
from rvc_dist import __main__ as cli, stages
from rvc_dist.unit_stage import in_threads

signal.signal(signal.SIGINT, signal.default_int_handler)  # a job in the background has none

def run(recipe, shard):
    sys.stdout.write("ready\\n")
    sys.stdout.flush()
    in_threads(1, lambda _: time.sleep(1.5), range(100), "work", "units")

cli.STAGES["dataset"] = stages.Stage("__main__", "", keeps_log=False)
sys.exit(cli.main(["dataset"]))
"""


@pytest.mark.parametrize("times", [1, 2])
def test_ctrl_c_says_at_once_what_it_does(times: int) -> None:
    command = [sys.executable, "-c", STAGE]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        assert process.stdout.readline() == "ready\n"
        time.sleep(0.3)
        began_at = time.monotonic()
        process.send_signal(signal.SIGINT)
        told = process.stderr.readline()
        assert time.monotonic() - began_at < 1.0, "not when what is being made is done"
        assert (
            "Ctrl-C: dataset stops, what is done is kept and the same command continues; a second Ctrl-C ends it"
            in told
        )
        if times == 2:
            process.send_signal(signal.SIGINT)
        rest = process.communicate(timeout=30)[1]
    assert process.returncode == (75 if times == 1 else -signal.SIGINT)
    assert ("interrupted; the same command continues" in rest) == (times == 1)


def test_step_lines_are_short(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    """With large numbers, behind the time and the rank."""
    now = [0.0]
    monkeypatch.setattr(screen.time, "monotonic", lambda: now[0])
    caplog.set_level(logging.INFO, logger="rvc_dist")
    bar = ProgressBar("train", 4_400_000, "steps", 999_000)
    now[0], bar.done = 1000.0, 1_000_000
    values = {"loss/g_mel": 123.456, "loss/g_kl": 12.3456, "loss/g_total": 1234.567, "loss/d": 0.0012345}
    values["perf/audio_s_per_s"] = 12345.67
    progress = Progress(step=1_000_000, epoch=1234)
    report_steps(values, {"data": 0.01}, progress, 4_400_000, SimpleNamespace(scalars=lambda *_: None), bar)
    (line,) = caplog.messages
    assert line == (
        "step 1000000/4400000 epoch 1234: mel 123.5 kl 12.35 g 1235 d 0.001234; 12346 s audio/s, 39 d 8 h left"
    )
    assert len(f"12:00:00 [rank 0] {line}") < 120
