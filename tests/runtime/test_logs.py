"""What a run leaves in RUN/logs, and what comes last on the screen when a rank fails."""

import json
import logging
import re
import resource
import subprocess
import sys
import threading
import time
from types import ModuleType

import pytest

from rvc_dist import __main__ as cli
from rvc_dist import __version__
from rvc_dist.config import Recipe
from rvc_dist.runtime import logs
from rvc_dist.stages import STAGES, Stage
from rvc_dist.train.trackers import Tracker
from rvc_dist.workspace import OtherRankError, Shard, StageError, Workspace

GLOO = "[pair.cc:561 of gloo] Connection closed by peer [127.0.0.1]:34482"


@pytest.fixture(autouse=True)
def _alone(monkeypatch):
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "TORCHELASTIC_ERROR_FILE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(cli, "set_up_logging", lambda *_: None)
    logger = logging.getLogger("rvc_dist")
    before = logger.level
    logger.setLevel(logging.INFO)
    yield
    logger.setLevel(before)


def stage_that(monkeypatch, action, **stage):
    """Put a stage in the place of extract that does `action(recipe, shard)`."""
    module = ModuleType("stand_in")
    module.run = action
    monkeypatch.setitem(sys.modules, "stand_in", module)
    monkeypatch.setitem(STAGES, "extract", Stage("stand_in", "", takes_shard=True, **stage))


def make_and_say(recipe, shard):
    Workspace(recipe.run_dir, recipe.name).root.mkdir(exist_ok=True)
    logging.getLogger("rvc_dist.features.extract").info("part %d does its work", shard.index)


def raises(error):
    def action(recipe, shard):
        make_and_say(recipe, shard)
        raise error

    return action


# The file of a rank


def test_every_rank_writes_all_of_it_with_who_and_what_it_is(tmp_path, monkeypatch):
    stage_that(monkeypatch, make_and_say)
    run = tmp_path / "run"
    monkeypatch.setenv("WORLD_SIZE", "2")
    for rank in (0, 1, 1):
        monkeypatch.setenv("RANK", str(rank))
        assert cli.main(["extract", "--run_dir", str(run), "--name", "a b"]) == 0
    assert sorted(p.name for p in (run / "logs").glob("*.log")) == ["rank_00000.log", "rank_00001.log"]
    assert json.loads(Workspace(run, "").job_file(1).read_text())["ended"] == "done"
    lines = Workspace(run, "").rank_log(1).read_text().splitlines()
    assert len(lines) == 4, "the second time appends"
    assert f"rvc-dist extract --run_dir {run} --name 'a b'; in " in lines[0]
    assert f"rvc_dist {__version__}, Python 3" in lines[0]
    assert "rank 1 of 2 on " in lines[0]
    assert lines[1].endswith("INFO part 1 does its work")
    assert not [h for h in logging.getLogger().handlers if isinstance(h, logs.RankLog)]


def test_tasks_of_an_array_write_files_of_their_own(tmp_path, monkeypatch):
    stage_that(monkeypatch, make_and_say)
    monkeypatch.setenv("WORLD_SIZE", "2")
    for task in range(2):
        for rank in range(2):
            monkeypatch.setenv("RANK", str(rank))
            assert cli.main(["extract", "--run_dir", str(tmp_path), "--shard", f"{task}/2"]) == 0
    assert sorted(p.name for p in (tmp_path / "logs").glob("*.log")) == [f"rank_{i:05d}.log" for i in range(4)]


def test_a_command_that_made_nothing_leaves_no_folder_behind(tmp_path, monkeypatch):
    def fails(recipe, shard):
        logging.getLogger("rvc_dist").info("looking")
        raise StageError("no audio")

    stage_that(monkeypatch, fails)
    run = tmp_path / "run"
    for arguments, code in (["extract"], 1), (["extract", "--name", "/"], 2), (["extract", "--shard", "x"], 2):
        assert cli.main([*arguments, "--run_dir", str(run)]) == code
    with pytest.raises(SystemExit):
        cli.main(["extract", "--run_dir", str(run), "--help"])
    assert not run.exists()
    run.mkdir()
    assert cli.main(["extract", "--run_dir", str(run)]) == 1
    log = (run / "logs" / "rank_00000.log").read_text()
    assert log.index("looking") < log.index("rvc-dist extract: no audio") < log.index("Traceback")


def test_a_stage_that_only_looks_at_a_run_writes_nothing_there(tmp_path, monkeypatch):
    stage_that(monkeypatch, make_and_say, keeps_log=False)
    assert cli.main(["extract", "--run_dir", str(tmp_path)]) == 0
    assert list(tmp_path.iterdir()) == []
    assert not STAGES["infer"].keeps_log
    assert not STAGES["dataset"].keeps_log
    assert all(STAGES[name].keeps_log for name in ("preprocess", "index", "train", "export", "run", "demo"))


def test_a_disk_that_refuses_the_file_is_told_once_and_ends_nothing(tmp_path, monkeypatch, caplog):
    stage_that(monkeypatch, make_and_say)
    (tmp_path / "logs").write_text("a file in the place of the folder")
    assert cli.main(["extract", "--run_dir", str(tmp_path)]) == 0
    warnings = [r.getMessage() for r in caplog.records if r.levelno == logging.WARNING]
    assert len(warnings) == 1
    assert f"{tmp_path}/logs/rank_00000.log cannot be written" in warnings[0]
    assert cli.main(["extract", "--run_dir", str(tmp_path)]) == 0


def test_a_bug_and_what_threads_die_of_go_to_the_file_too(tmp_path, monkeypatch):
    def fails(recipe, shard):
        make_and_say(recipe, shard)
        thread = threading.Thread(target=lambda: {}["in a thread"], name="reader")
        thread.start()
        thread.join()
        raise TypeError("a bug")

    stage_that(monkeypatch, fails)
    shown = []
    monkeypatch.setattr(threading, "excepthook", lambda error: shown.append(error.exc_type))
    with pytest.raises(TypeError):
        cli.main(["extract", "--run_dir", str(tmp_path)])
    log = (tmp_path / "logs" / "rank_00000.log").read_text()
    assert "in thread reader:\nTraceback" in log
    assert "KeyError: 'in a thread'" in log
    assert "TypeError: a bug" in log
    assert "most recent call first" in log, "the stacks of all threads"
    assert shown == [KeyError], "the screen shows it as before"


def test_dying_in_native_code_leaves_the_stack_in_the_file(tmp_path):
    code = (
        "import os, logging\n"
        "from rvc_dist.runtime.logs import rank_log\n"
        "from rvc_dist.workspace import Shard, Workspace\n"
        f"with rank_log(Workspace({str(tmp_path)!r}, 'x'), Shard(2, 4), ['train']):\n    os.abort()\n"
    )
    done = subprocess.run([sys.executable, "-c", code], check=False)
    assert done.returncode == -6
    log = (tmp_path / "logs" / "rank_00002.log").read_text()
    assert "rank 2 of 4" in log
    assert "Fatal Python error: Aborted" in log
    assert 'File "<string>", line 5' in log


# Which rank failed first


def test_what_is_left_to_end_when_python_ends_holds_it_up_no_more():
    """As the steps of a training that nobody closed, whose loader has processes: no thread starts any more."""
    script = (
        "from rvc_dist.runtime.logs import ends_within\n"
        "def steps(ends_within=ends_within, print=print):\n"
        "    try:\n        yield\n"
        "    finally:\n        print(ends_within(60.0, 'the loader', print))\n"
        "left = steps()\n"
        "next(left)\n"
    )
    ended = subprocess.run([sys.executable, "-c", script], text=True, capture_output=True, timeout=60, check=True)
    assert ended.stdout == "False\n"


def test_a_rank_that_fails_says_so_to_the_others_and_to_the_launcher(tmp_path, monkeypatch):
    told = tmp_path / "error.json"
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(told))
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "3")
    stage_that(monkeypatch, raises(StageError("line one\nthe last line")))
    work = Workspace(tmp_path / "run", "x")
    assert cli.main(["extract", "--run_dir", str(work.root)]) == 1
    assert json.loads(work.failure_file(1).read_text())["error"] == "the last line"
    message = json.loads(told.read_text())["message"]
    assert message["message"] == message["extraInfo"]["py_callstack"] == "rvc-dist extract: line one\nthe last line"
    stage_that(monkeypatch, raises(ValueError("a bug")))
    with pytest.raises(ValueError, match="a bug"):
        cli.main(["extract", "--run_dir", str(work.root)])
    assert json.loads(work.failure_file(1).read_text())["error"] == "ValueError: a bug"
    assert "in action\n" in json.loads(told.read_text())["message"]["extraInfo"]["py_callstack"]
    stage_that(monkeypatch, make_and_say)
    assert cli.main(["extract", "--run_dir", str(work.root)]) == 0
    assert not work.failure_file(1).exists(), "of the last stage only"


def test_a_rank_whose_peer_failed_names_it_in_the_place_of_its_own_traceback(tmp_path, monkeypatch, capsys):
    told = tmp_path / "error.json"
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(told))
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "3")
    work = Workspace(tmp_path, "x")
    work.logs_dir.mkdir()

    def fail(rank, at):
        failure = {"rank": rank, "host": f"node{rank}", "time": at, "error": f"ValueError: of {rank}"}
        work.failure_file(rank).write_text(json.dumps(failure))

    def peers_fail(recipe, shard):
        fail(2, 7.0)
        fail(1, 9.0)
        raise RuntimeError(GLOO)

    fail(1, 1.0)  # in an earlier run
    fail(3, 2.0)
    stage_that(monkeypatch, peers_fail)
    assert cli.main(["extract", "--run_dir", str(tmp_path)]) == 1
    log = work.rank_log(2)
    assert capsys.readouterr().err == f"rvc-dist extract: rank 2 on node2 failed first: see {log}: ValueError: of 2\n"
    assert GLOO in work.rank_log(0).read_text(), "its own log has it all"
    assert not work.failure_file(0).exists()
    assert f"rank 2 on node2 failed first: see {log}: ValueError: of 2" in told.read_text()


@pytest.mark.parametrize("first_to_end", [0, 1])
def test_a_launcher_takes_the_rank_that_failed_for_the_cause_whichever_ends_first(tmp_path, monkeypatch, first_to_end):
    """By its own rule, where rank 1 failed and rank 0, which lost it, ends within the same second."""
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure

    monkeypatch.setattr(time, "time", lambda: 1000.7)
    errors = {1: RuntimeError("a bug"), 0: OtherRankError("rank 1 failed first")}
    for rank, error in errors.items():
        monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(tmp_path / f"{rank}.json"))
        logs.RankLog(Workspace(tmp_path, "x"), Shard(rank, 2)).failed(error)
    ended = {
        rank: ProcessFailure(rank, 1, 1, str(tmp_path / f"{rank}.json")) for rank in (first_to_end, 1 - first_to_end)
    }
    told = str(ChildFailedError("rvc-dist", ended))
    assert "RuntimeError: a bug" in told.partition("Root Cause (first observed failure)")[2]
    assert "rank 1 failed first" in told.partition("Root Cause (first observed failure)")[0]


def test_without_a_known_cause_the_error_stays(tmp_path, monkeypatch):
    log = logs.RankLog(Workspace(tmp_path, "x"), Shard(0, 2))
    monkeypatch.setattr(logs.RankLog.first_failure, "__defaults__", (0.2,))
    with pytest.raises(RuntimeError, match="Connection closed"), log.first_cause():
        raise RuntimeError(GLOO)
    for error in (ValueError(GLOO), RuntimeError("shapes differ"), StageError("gloo")):
        with pytest.raises(type(error)) as caught, log.first_cause():
            raise error
        assert caught.value is error


def test_which_errors_come_from_other_ranks():
    import torch.distributed as dist

    for error in dist.DistBackendError("NCCL error"), dist.DistNetworkError("gone"), RuntimeError(GLOO):
        assert logs.is_collective_error(error)
        assert not logs.is_timeout(error)
    assert logs.is_timeout(RuntimeError("[gloo/unbound_buffer.cc:78] Timed out waiting 8000ms for recv"))
    assert logs.is_timeout(dist.DistStoreError("wait timeout after 300000ms"))
    for error in RuntimeError("Timed out"), OtherRankError("gloo"), ValueError("gloo timeout"):
        assert not logs.is_timeout(error)


def test_a_machine_that_does_not_answer_is_told_from_a_rank_that_waited_too_long():
    """The first two are gloo's words for errors of the kernel, the others those of its own limit and of an end."""
    where = "[/pytorch/third_party/gloo/gloo/transport/tcp/pair.cc:545] "
    errors = {
        f"{where}Read error [10.213.7.2]:42704: Connection timed out. This is typically caused by": "10.213.7.2",
        f"{where}writev [fd00::2]:42704: No route to host": "fd00::2",
        f"{where}Timed out waiting 20000ms for recv operation to complete": None,
        f"{where}Connection closed by peer [10.213.7.2]:42704": None,
    }
    assert {text: logs.lost_address(RuntimeError(text)) for text in errors} == errors
    assert logs.lost_address(OSError("[10.213.7.2]:42704: Connection timed out")) is None, "another's connection"


def test_a_full_disk_of_curves_is_told_once_and_the_threads_traceback_is_in_the_log(tmp_path, monkeypatch, caplog):
    """TensorBoard's thread writes them, and gives its error to who writes next."""
    work, shown = Workspace(tmp_path, "x"), []
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    tracker = Tracker(Recipe(name="x", run_dir=str(tmp_path)), 1, enabled=True)
    tracker.flush()
    monkeypatch.setattr(threading, "excepthook", shown.append)

    def fill():
        for step in range(200):
            tracker.scalars({"loss/g_mel": 1.0}, step)
            tracker.flush()

    try:
        with logs.rank_log(work, Shard(0, 1), ["train"]):
            size = max(file.stat().st_size for file in work.events_dir.iterdir())
            resource.setrlimit(resource.RLIMIT_FSIZE, (size + 1000, hard))
            fill()
            deadline = time.monotonic() + 5
            while "File too large" not in work.rank_log(0).read_text() and time.monotonic() < deadline:
                time.sleep(0.01)  # the thread has raised and is about to end
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    tracker.close()
    (told,) = [record.getMessage() for record in caplog.records]
    assert re.search(rf"writer in {work.events_dir}: File too large; \d+ MB free.*; the run goes on without it", told)
    assert shown == []
    assert "Traceback" in work.rank_log(0).read_text()
