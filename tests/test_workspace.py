"""Files, work units, work lists and shares."""

from __future__ import annotations

import errno
import json
import os
import re
import resource
import time
from pathlib import Path

import numpy as np
import pytest

from rvc_dist import files, workspace
from rvc_dist.workspace import (
    Shard,
    SourceFile,
    StageError,
    Unit,
    WorkList,
    Workspace,
    adopt_slurm_ranks,
    tasks_per_node,
)

ODD_NAMES = ["sp ace.wav", "quo'te\".wav", "new\nline.wav", "ünï✓.wav", os.fsdecode(b"b\xff.wav"), "\u2028.wav"]


def source(path: str = "a.wav", duration_s: float = 1.0, speaker: int = 0) -> SourceFile:
    return SourceFile(path, speaker, size=100, mtime_ns=7, duration_s=duration_s)


def units(*durations_s: float) -> list[Unit]:
    return [Unit(i, (source(f"{i}.wav", s),)) for i, s in enumerate(durations_s)]


# Writing


def test_atomic_write_replaces_the_whole_file(tmp_path: Path) -> None:
    path = tmp_path / "new" / "folder" / "a.txt"
    files.atomic_write(path, "ä long text")
    assert path.read_text(encoding="utf-8") == "ä long text"
    files.atomic_write(path, b"short")
    assert path.read_bytes() == b"short"
    assert os.listdir(path.parent) == ["a.txt"]


@pytest.mark.parametrize("failing", ["fsync", "replace"])
def test_atomic_write_leaves_nothing_behind_on_failure(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failing: str
) -> None:
    path = tmp_path / "a.txt"
    path.write_text("before")

    def fail(*_: object) -> None:
        raise OSError("no space left on device")

    monkeypatch.setattr(os, "fsync", fail) if failing == "fsync" else monkeypatch.setattr(Path, "replace", fail)
    with pytest.raises(OSError, match="no space left"):
        files.atomic_write(path, "after")
    assert path.read_text() == "before"
    assert os.listdir(tmp_path) == ["a.txt"]


def test_atomic_write_takes_the_longest_name_and_names_no_process(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    beside: list[str] = []
    replace = Path.replace

    def spy(self: Path, target: Path) -> Path:
        beside.append(self.name)
        return replace(self, target)

    monkeypatch.setattr(Path, "replace", spy)
    path = tmp_path / ("n" * 255)
    for _ in range(2):
        files.atomic_write(path, "text")
    assert path.read_text() == "text"
    # Two array tasks on two hosts can have one process id.
    assert len(set(beside)) == 2
    assert all(name.startswith(".") and name.endswith(".tmp") for name in beside)


def test_nothing_is_written_through_a_link_and_files_have_the_umasks_mode(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mine, there = tmp_path / "mine", tmp_path / "there"
    mine.write_text("before")
    with files.beside(there) as half:
        half.symlink_to(mine)
        with pytest.raises(FileExistsError):
            half.open("xb")
    assert os.listdir(tmp_path) == ["mine"]
    there.symlink_to(mine)
    before = os.umask(0o027)
    try:
        files.atomic_write(there, "new")
    finally:
        os.umask(before)
    assert mine.read_text() == "before"
    assert not there.is_symlink()
    assert there.stat().st_mode & 0o777 == 0o640


def test_an_error_of_the_disk_names_the_file_what_it_needs_and_what_is_free(tmp_path: Path) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (4000, hard))
        with pytest.raises(OSError, match="large") as caught:
            files.atomic_write(tmp_path / "a", b"x" * 5000)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    text = r"File too large; 0\.005 MB needed, \d+ MB free, no file may have more than 0\.004 MB \(ulimit -f\): '.*/a'$"
    assert re.search(text, str(caught.value))
    assert caught.value.errno == errno.EFBIG
    (tmp_path / "file").write_text("")
    with pytest.raises(FileExistsError, match=r"'.*/file'$"):
        files.atomic_write(tmp_path / "file" / "a", "")


@pytest.mark.parametrize("name", ODD_NAMES)
def test_json_keeps_every_file_name(tmp_path: Path, name: str) -> None:
    path = tmp_path / "a.json"
    files.write_json(path, {"path": name})
    assert workspace.read_json(path) == {"path": name}
    assert json.loads(path.read_bytes().decode("utf-8")) == {"path": name}


def test_json_stays_readable(tmp_path: Path) -> None:
    files.write_json(tmp_path / "a.json", {"path": "ünï✓"})
    assert "ünï✓" in (tmp_path / "a.json").read_text(encoding="utf-8")


def test_read_json_names_a_damaged_file(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    for damaged in (b'{"a": ', b"\xff\xfe", b""):
        path.write_bytes(damaged)
        with pytest.raises(StageError, match=r"a\.json: not valid JSON .*delete it"):
            workspace.read_json(path)


def test_printable_escapes_only_what_breaks_a_line() -> None:
    assert workspace.printable("ünï ✓.wav") == "ünï ✓.wav"
    assert workspace.printable("new\nline") == r"'new\nline'"
    assert workspace.printable(os.fsdecode(b"b\xff")) == r"'b\udcff'"


# Unit files


def test_arrays_and_header_come_back(tmp_path: Path) -> None:
    from safetensors.numpy import load_file

    path = tmp_path / "00000.safetensors"
    header = {"stamp": "s", "clips": [{"source": name} for name in ODD_NAMES]}
    workspace.save_arrays(path, {"00000": np.arange(3, dtype=np.float32)}, header)
    assert workspace.read_header(path) == header
    assert load_file(path)["00000"].tolist() == [0.0, 1.0, 2.0]
    assert workspace.is_done(path, "s")
    assert not workspace.is_done(path, "t")


def test_a_unit_without_clips_is_a_file_too(tmp_path: Path) -> None:
    path = tmp_path / "00000.safetensors"
    workspace.save_arrays(path, {}, {"stamp": "s"})
    assert workspace.is_done(path, "s")


def test_read_header_of_missing_damaged_and_foreign_files_is_none(tmp_path: Path) -> None:
    from safetensors.numpy import save

    path = tmp_path / "00000.safetensors"
    assert workspace.read_header(path) is None
    workspace.save_arrays(path, {"a": np.zeros(1000, np.float32)}, {"stamp": "s"})
    whole = path.read_bytes()
    array = {"a": np.zeros(1, np.float32)}
    foreign = [save(array), *(save(array, metadata={workspace.HEADER_KEY: text}) for text in ("{", "[]"))]
    for content in (b"", b"text", whole[:100], whole[:-1], *foreign):
        path.write_bytes(content)
        assert workspace.read_header(path) is None
        assert not workspace.is_done(path, "s")


def test_unit_files_come_in_the_order_of_their_numbers(tmp_path: Path) -> None:
    work = Workspace(tmp_path, "v")
    for name in ("100000", "00002", "99999", "00000", "mute", "x1"):
        files.atomic_write(work.clips_dir / f"{name}.safetensors", b"")
    assert [p.stem for p in workspace.unit_files(work.clips_dir)] == ["00000", "00002", "99999", "100000"]
    assert work.clips_file(2) == work.clips_dir / "00002.safetensors"


def test_remove_leftovers_takes_units_beyond_the_work_list_and_old_tmp_files(tmp_path: Path) -> None:
    for name in ("00000.safetensors", "00001.safetensors", "00002.safetensors", "mute.safetensors", "plan.json"):
        (tmp_path / name).touch()
    old, new = tmp_path / ".old.tmp", tmp_path / ".new.tmp"
    for path in (old, new):
        path.touch()
    os.utime(old, (time.time() - 2 * files.STALE_TMP_S,) * 2)
    workspace.remove_leftovers(tmp_path, 1)
    assert sorted(os.listdir(tmp_path)) == [".new.tmp", "00000.safetensors", "mute.safetensors", "plan.json"]


# Units and work lists


def test_cut_units_by_hand() -> None:
    files = [source(f"{i}.wav", s) for i, s in enumerate([15.0, 4.0, 3.0, 25.0, 1.0])]  # a unit ends at 20 s or more
    cut = workspace.cut_units(files)
    assert [[f.path for f in unit.files] for unit in cut] == [["0.wav", "1.wav", "2.wav"], ["3.wav"], ["4.wav"]]
    assert [unit.id for unit in cut] == [0, 1, 2]
    assert [unit.duration_s for unit in cut] == [22.0, 25.0, 1.0]
    assert workspace.cut_units([]) == ()


def test_cut_units_bounds_the_count_and_the_length_of_units() -> None:
    # 40,960 s in 10 s files: 80 s a unit; 4,096,000 s: 600 s, however many that gives
    assert len(workspace.cut_units([source(duration_s=10.0)] * 4096)) == workspace.MAX_UNITS
    assert {u.duration_s for u in workspace.cut_units([source(duration_s=100.0)] * 40960)} == {600.0, 400.0}


def test_work_list_comes_back(tmp_path: Path) -> None:
    work_list = WorkList("listing", {"a": 1.5}, tuple(units(1.0, 2.0)), tuple(source(name) for name in ODD_NAMES))
    path = tmp_path / "plan.json"
    assert WorkList.load(path) is None
    files.atomic_write(path, work_list.dumps())
    assert WorkList.load(path) == work_list


def test_work_list_of_another_version_is_none_and_a_foreign_one_is_named(tmp_path: Path) -> None:
    path = tmp_path / "plan.json"
    files.write_json(path, {"version": workspace.FORMAT_VERSION + 1})
    assert WorkList.load(path) is None
    version = {"version": workspace.FORMAT_VERSION}
    for foreign in ([], version, {**version, "listing": "", "settings": {}, "units": [[{"x": 1}]], "excluded": []}):
        files.write_json(path, foreign)
        with pytest.raises(StageError, match=r"plan\.json: .*; delete it and run the stage again"):
            WorkList.load(path)


def test_stamp_depends_on_data_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    assert workspace.fingerprint({"a": 1, "b": 2}) == workspace.fingerprint({"b": 2, "a": 1})
    assert workspace.fingerprint({"a": 1}) != workspace.fingerprint({"a": 2})
    assert workspace.fingerprint(*ODD_NAMES) != workspace.fingerprint(*reversed(ODD_NAMES))
    before = workspace.fingerprint(1)
    monkeypatch.setattr(workspace, "FORMAT_VERSION", workspace.FORMAT_VERSION + 1)
    assert workspace.fingerprint(1) != before


def test_unit_stamp_follows_size_time_and_speaker_of_its_files() -> None:
    def stamp_of(**changed: int) -> str:
        file = SourceFile(**({"path": "a.wav", "speaker": 0, "size": 1, "mtime_ns": 1} | changed))  # type: ignore[arg-type]
        return Unit(0, (file,)).fingerprint({"x": 1})

    assert len({stamp_of(), stamp_of(size=2), stamp_of(mtime_ns=2), stamp_of(speaker=2), stamp_of(content="a")}) == 5
    assert stamp_of(content="a") == stamp_of(content="a", size=2, mtime_ns=2)
    assert stamp_of() == stamp_of()


def test_changes_by_hand() -> None:
    assert (
        workspace.changes({"a": 1, "b": 2, "c": 3}, {"a": 1, "b": 5, "d": 4}) == "b: 2 -> 5, c: 3 -> None, d: None -> 4"
    )
    assert workspace.changes({"a": 3}, {"a": 3.0}) == ""


# Shares


@pytest.mark.parametrize(("text", "index", "count"), [("0/1", 0, 1), ("0/8", 0, 8), ("7/8", 7, 8)])
def test_share_parse(text: str, index: int, count: int) -> None:
    assert Shard.parse(text) == Shard(index, count, array=True)


@pytest.mark.parametrize(
    "text", ["", "1", "/", "1/", "/2", "2/2", "0/0", "-1/2", "1/2/3", "a/b", " 0/8", "0.5/2", "٣/8"]
)
def test_share_parse_refuses(text: str) -> None:
    with pytest.raises(ValueError, match=r"--shard: got .*, expected I/N with 0 <= I < N"):
        Shard.parse(text)


@pytest.mark.parametrize(
    "environment",
    [
        {},
        {"RANK": "1", "WORLD_SIZE": "4", "SLURM_STEP_NUM_TASKS": "2", "SLURM_PROCID": "0"},
        {"SLURM_NTASKS": "4", "SLURM_PROCID": "0"},  # a batch script, which is no rank
        {"SLURM_STEP_NUM_TASKS": "1", "SLURM_PROCID": "0"},
    ],
)
def test_a_launchers_ranks_are_left_alone(environment):
    before = dict(environment)
    adopt_slurm_ranks(environment)
    assert environment == before


def test_tasks_of_srun_are_ranks():
    slurm = {"SLURM_STEP_NUM_TASKS": "5", "SLURM_PROCID": "3", "SLURM_LOCALID": "1", "SLURM_NODEID": "1"}
    environment = slurm | {"SLURM_STEP_TASKS_PER_NODE": "2(x2),1"}
    adopt_slurm_ranks(environment)
    wanted = {"RANK": "3", "WORLD_SIZE": "5", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2"}
    assert wanted.items() <= environment.items()
    assert tasks_per_node("2(x2),1") == [2, 2, 1]


def test_share_from_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RANK", raising=False)
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    assert Shard.from_environment() == Shard(0, 1)
    monkeypatch.setenv("RANK", "3")
    monkeypatch.setenv("WORLD_SIZE", "4")
    shard = Shard.from_environment()
    assert shard == Shard(3, 4, array=False)
    assert not shard.is_first


def test_shares_take_every_unit_once_and_the_longest_first() -> None:
    listed = units(5.0, 9.0, 1.0, 9.0, 7.0)
    assert [[u.id for u in Shard(i, 2).take(listed)] for i in range(2)] == [[1, 4, 2], [3, 0]]
    for count in (1, 2, 3, 8):
        taken = [u.id for i in range(count) for u in Shard(i, count).take(listed)]
        assert sorted(taken) == [0, 1, 2, 3, 4]


def test_wait_for_polls_until_there_is_something() -> None:
    answers = iter([None, None, 5])
    assert workspace.wait_for("it", lambda: next(answers), poll_s=0.0) == 5


def test_index_file_is_found_through_its_report(tmp_path: Path) -> None:
    work = Workspace(tmp_path, "v")
    assert work.index_file() is None
    files.write_json(work.index_report_file, {"stamp": "", "file": "a.index"})
    assert work.index_file() is None
    (work.index_dir / "a.index").touch()
    assert work.index_file() == work.index_dir / "a.index"
