"""A cache of bounded size between object storage and training: what it holds, whom it serves, how it fails."""

from __future__ import annotations

import contextlib
import errno
import multiprocessing
import os
import shutil
import time
from collections.abc import Iterator
from dataclasses import replace
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import psutil
import pytest
from helpers import changed, make_features, tiny_recipe, workspace_of

from rvc_dist.config import Recipe
from rvc_dist.data import fetcher, remote, storage
from rvc_dist.data.fetcher import POSITION, POSITIONS, SCHEDULE, Cache, Window
from rvc_dist.data.remote import Fetcher, RemoteRun, data_of
from rvc_dist.data.storage import Manifest, Storage, unit_names
from rvc_dist.files import write_json
from rvc_dist.tools import doctor, status, upload
from rvc_dist.tools.doctor import data
from rvc_dist.tools.doctor.findings import Problem, Severity
from rvc_dist.tools.doctor.ranks import DoctorContext
from rvc_dist.train.voice_file import f0_medians
from rvc_dist.workspace import Shard, StageError, Workspace

UNITS = 6


@pytest.fixture
def recipe(tmp_path: Path) -> Iterator[Recipe]:
    """A run of UNITS units that was uploaded, and is read from there with room for all of them."""
    made = tiny_recipe(tmp_path / "run")
    make_features(made, num_clips=3 * UNITS, speakers=(0, 1))
    workspace_of(made).clips_report_file.write_text('{"total_dataset_duration": "00:00:10"}')
    there = {"remote": (tmp_path / "bucket" / "alice").as_uri(), "cache_dir": str(tmp_path / "cache")}
    made = changed(made, "data", **there)
    upload.run(made, Shard())
    yield made
    remote._remote_run.cache_clear()


def elsewhere(recipe: Recipe) -> Recipe:
    """The same on a machine that has nothing but the recipe."""
    return replace(recipe, run_dir=recipe.run_dir + "_elsewhere")


def opened(recipe: Recipe) -> RemoteRun:
    run = data_of(recipe)
    assert isinstance(run, RemoteRun)
    return run


@contextlib.contextmanager
def served(run: RemoteRun) -> Iterator[Fetcher]:
    with contextlib.closing(Fetcher(run)) as serving:
        yield serving


def limited(recipe: Recipe, units: float) -> Recipe:
    """With room for so many units."""
    sizes = opened(recipe).manifest.unit_bytes
    return changed(recipe, "data", cache_gb=units * max(sizes.values()) / 1e9)


def cache_of(recipe: Recipe, units: float, num_ranks: int = 1) -> Cache:
    run = opened(recipe)
    most = round(units * max(run.manifest.unit_bytes.values()))
    return Cache(Storage(run.url), run.root, run.manifest, most, num_ranks)


def work_until(cache: Cache, *units: int, limit_s: float = 20.0) -> None:
    """Until exactly these are there and nothing is fetched."""
    until = time.monotonic() + limit_s
    while cache.here != set(units) or cache.busy:
        assert time.monotonic() < until, f"{cache.here}, expected {units}"
        cache.step()
    for _ in range(4):
        cache.step()
    assert cache.here == set(units)
    assert cache.busy == set()


def plan(cache: Cache, *windows: Window) -> None:
    write_json(cache.folder / SCHEDULE, {"windows": windows})


def at(cache: Cache, *positions: int) -> None:
    (cache.folder / POSITIONS).write_bytes(b"".join(map(POSITION.pack, positions)))


def test_a_table_of_clips_is_the_same_and_needs_no_unit(recipe: Recipe) -> None:
    there = elsewhere(recipe)
    local = list(workspace_of(recipe).unit_headers())
    assert [(u, p.name, h) for u, p, h in opened(there).unit_headers()] == [(u, p.name, h) for u, p, h in local]
    assert not list(opened(there).root.glob("features/0*.safetensors"))
    assert f0_medians(opened(there)) == f0_medians(workspace_of(recipe))
    assert opened(there).clips_report_file.read_bytes() == workspace_of(recipe).clips_report_file.read_bytes()


def test_upload_sends_only_what_changed_and_any_shard_ends_it(
    recipe: Recipe, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    sent: list[str] = []
    put = Storage.put
    monkeypatch.setattr(Storage, "put", lambda self, path, name: (sent.append(name), put(self, path, name))[1])
    bucket = tmp_path / "bucket" / "alice"
    before = (bucket / "manifest.json").read_bytes()
    upload.run(recipe, Shard())
    assert not [name for name in sent if "0000" in name]
    assert (bucket / "manifest.json").read_bytes() == before, "the same run gives the same manifest"

    (bucket / "clips" / "00001.safetensors").unlink()  # somebody cleared up
    work = workspace_of(recipe)
    os.utime(work.clips_file(2))  # touched, not changed
    data = bytearray(work.features_file(3).read_bytes())
    data[-1] ^= 1
    work.features_file(3).write_bytes(data)
    sent.clear()
    upload.run(recipe, Shard(0, 2, array=True))
    assert not [name for name in sent if "0000" in name], "units 0, 2 and 4 are as they were"
    assert (bucket / "manifest.json").read_bytes() == before, "a part of the work is no manifest"
    upload.run(recipe, Shard(1, 2, array=True))
    assert sorted(n for n in sent if "0000" in n) == ["clips/00001.safetensors", "features/00003.safetensors"]
    assert (bucket / "manifest.json").read_bytes() != before
    assert sent[-1] == "manifest.json", "last of all"


def test_upload_wants_a_url_and_features(recipe: Recipe, tmp_path: Path) -> None:
    with pytest.raises(StageError, match=r"data\.remote is not set: say where to"):
        upload.run(changed(recipe, "data", remote=None), Shard())
    with pytest.raises(StageError, match="has no features: run `rvc-dist extract`"):
        upload.run(replace(recipe, run_dir=str(tmp_path / "nothing")), Shard())


def test_units_come_ahead_and_go_when_no_rank_needs_them(recipe: Recipe) -> None:
    """Room for four: two windows of two."""
    cache = cache_of(recipe, 4.5, num_ranks=2)
    plan(cache, Window([4, 1], 0, 10), Window([0, 5], 10, 20), Window([2, 3, 4], 20, 30))
    work_until(cache, 4, 1, 0, 5)
    at(cache, 12, 9)
    work_until(cache, 4, 1, 0, 5)  # the slower rank is in the first window yet
    at(cache, 12, 10)
    work_until(cache, 4, 0, 5, 2)  # 4 is needed again, and stays
    at(cache, 20, 20)
    cache.step()
    work_until(cache, 4, 2, 3, 5)
    left = {p.name for p in (cache.folder / "features").glob("0*")}
    assert left == {f"{unit:05d}.safetensors" for unit in cache.here}


def test_what_somebody_waits_for_comes_first_and_the_farthest_gives_way(recipe: Recipe) -> None:
    cache = cache_of(recipe, 4.5)
    plan(cache, Window([0, 1], 0, 10), Window([2, 3], 10, 20))
    work_until(cache, 0, 1, 2, 3)
    (cache.folder / fetcher.ASKED / "00005.now.1").touch()
    work_until(cache, 0, 1, 2, 5)
    (cache.folder / fetcher.ASKED / "00004.ahead.1").touch()
    work_until(cache, 0, 1, 2, 5)  # a loader process is ahead of the plan: it waits until there is room
    (cache.folder / fetcher.ASKED / "00005.now.1").unlink()
    at(cache, 20)
    work_until(cache, 1, 2, 4, 5)  # one that nobody needs any more gave way


def test_a_cache_that_holds_no_window_says_what_it_needs(recipe: Recipe) -> None:
    cache = cache_of(recipe, 2.5)
    plan(cache, Window([0, 1, 2], 0, 10))
    with pytest.raises(StageError, match=r"data.cache_gb .* take \S+ GB; set data.cache_gb to \S+ or more, or data.re"):
        work_until(cache, 0, 1, 2)


def test_a_disk_that_fills_makes_the_cache_smaller_and_then_ends_it(
    recipe: Recipe, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """It holds `room` units, as a disk that others fill."""
    cache, room, whole = cache_of(recipe, 6.5), [3], Storage.fetch

    def fetch(self: Storage, name: str, path: Path, stored: storage.Stored) -> None:
        there = len(list(path.parent.glob("0*")))
        if there >= room[0]:
            raise OSError(errno.ENOSPC, "No space left on device", str(path))
        whole(self, name, path, stored)

    monkeypatch.setattr(Storage, "fetch", fetch)
    monkeypatch.setattr(fetcher, "FETCHES", 1)
    monkeypatch.setattr(fetcher, "RETRY_S", 0.01)
    monkeypatch.setattr(fetcher, "DISK_S", 0.5)
    plan(cache, Window([0, 1], 0, 10), Window([2, 3], 10, 20), Window([4, 5, 3], 20, 30))
    work_until(cache, 0, 1, 2)
    assert "No space left" in caplog.text
    assert "the cache makes do with" in caplog.text
    at(cache, 10)
    work_until(cache, 2, 3, 4)
    at(cache, 20)
    work_until(cache, 3, 4, 5)
    room[0] = 2
    at(cache, 0)
    plan(cache, Window([0, 1, 2], 0, 10))
    with pytest.raises(StageError, match=r"No space left.*do not fit there; make room there, or set data.cache_dir"):
        work_until(cache, 0, 1, 2)


def test_a_reader_waits_for_units_that_nobody_announced(recipe: Recipe) -> None:
    """In turns, with room for two: each is there until its reader asks for another."""
    run = opened(limited(elsewhere(recipe), 2.5))
    with served(run):
        for unit in (3, 0, 5, 1, 3):
            assert run.features_file(unit).read_bytes() == workspace_of(recipe).features_file(unit).read_bytes()
            assert run.clips_file(unit).read_bytes() == workspace_of(recipe).clips_file(unit).read_bytes()
        assert len(list(run.root.glob("features/0*"))) <= 2
        assert run.has_removed()
        assert not run.has_removed()


def read_unit(run: RemoteRun, unit: int, told: multiprocessing.Queue) -> None:
    try:
        told.put(run.features_file(unit).stat().st_size)
    except StageError as error:
        told.put(str(error))


def test_a_unit_that_cannot_be_had_ends_who_waits_for_it(recipe: Recipe, tmp_path: Path) -> None:
    """In a loader process too, which the rank forked."""
    run = opened(recipe)
    (tmp_path / "bucket" / "alice" / "features" / "00004.safetensors").unlink()
    context, told = multiprocessing.get_context("fork"), multiprocessing.Queue()
    with served(run):
        reader = context.Process(target=read_unit, args=(run, 4, told))
        reader.start()
        message = told.get(timeout=30)
        reader.join()
    assert "features/00004.safetensors was not fetched (there is no such object): see whether" in message


def test_two_jobs_do_not_share_a_cache(recipe: Recipe, monkeypatch: pytest.MonkeyPatch) -> None:
    run = opened(recipe)
    with served(run) as serving:
        monkeypatch.setattr(remote, "SERVE_S", 30.0)
        with pytest.raises(StageError, match="another job of this machine fetches into it: end it, or"):
            Fetcher(run)
        assert serving._process.poll() is None
    with served(run):
        assert run.clips_file(0).is_file()


def test_what_a_killed_job_left_is_cleared_and_its_units_are_kept(recipe: Recipe, tmp_path: Path) -> None:
    run = opened(recipe)
    with served(run):
        run.clips_file(0), run.clips_file(1)
    (run.root / "clips" / ".0123456789abcdef.tmp").write_bytes(b"half")
    kept = run.clips_file(0).stat().st_ino
    assert (run.root / fetcher.ASKED).glob("*")

    work = workspace_of(recipe)  # what unit 1 is has changed since
    data = bytearray(work.clips_file(1).read_bytes())
    data[-1] ^= 1
    work.clips_file(1).write_bytes(data)
    upload.run(recipe, Shard())
    remote._remote_run.cache_clear()
    again = opened(recipe)
    assert again.sha256 != run.sha256
    assert not (run.root / "clips" / ".0123456789abcdef.tmp").exists()
    assert not list((run.root / fetcher.ASKED).glob("*"))
    assert {p.name for p in run.root.glob("clips/0*")} == {"00000.safetensors"}
    with served(again):
        assert again.clips_file(0).stat().st_ino == kept
        assert again.clips_file(1).read_bytes() == bytes(data)


def hold(run: RemoteRun, told: Connection) -> None:
    told.send(Fetcher(run)._process.pid)
    time.sleep(60)


def test_the_fetcher_ends_with_a_rank_that_is_killed(recipe: Recipe) -> None:
    told, tell = multiprocessing.Pipe(duplex=False)
    rank = multiprocessing.get_context("fork").Process(target=hold, args=(opened(recipe), tell))
    rank.start()
    assert told.poll(30)
    fetching = psutil.Process(told.recv())
    rank.kill()
    rank.join()
    fetching.wait(5)


def test_a_run_that_is_not_there_is_named(recipe: Recipe, tmp_path: Path) -> None:
    nowhere = changed(recipe, "data", remote=(tmp_path / "nowhere").as_uri())
    with pytest.raises(StageError, match=r"nowhere/manifest.json was not fetched .*: was `rvc-dist upload`"):
        data_of(nowhere)


def test_manifests_know_units_by_both_files(recipe: Recipe) -> None:
    manifest = opened(recipe).manifest
    assert list(manifest.unit_bytes) == list(range(UNITS))
    work = Workspace(recipe.run_dir, recipe.name)
    assert manifest.unit_bytes[2] == sum((work.root / name).stat().st_size for name in unit_names(2))
    assert isinstance(manifest, Manifest)
    assert {"features/report.json", "clips/report.json", "headers.jsonl.gz"} <= set(manifest.small)


def test_status_tells_how_much_is_cached_and_doctor_whether_it_will_do(
    recipe: Recipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    away = elsewhere(recipe)
    workspace_of(away).save_recipe(away)
    url, folder = away.data.remote, remote.cache_folder(away)

    def look() -> tuple[dict[str, Any], str]:
        state = status.state_of(Path(away.run_dir))
        return state, next(line for line in status.lines(state) if line.startswith("  data "))

    state, line = look()
    assert line == f"  data       {url}; in {folder}: nothing was fetched to this machine yet"
    assert {name: stage["state"] for name, stage in state["stages"].items() if name[0] in "pei"} == {
        **dict.fromkeys(("preprocess", "extract", "index"), "done"),
        "export": "missing",
    }
    context = DoctorContext(away)
    assert not problems(context), "it answers, and there is room"
    assert context.table is not None
    assert len(context.table.train) + len(context.table.holdout) > 0

    run = opened(away)
    with served(run):
        run.features_file(2), run.clips_file(2)
    state, line = look()
    sizes = run.manifest.unit_bytes
    assert (state["data"]["units"], state["data"]["all_units"]) == (1, UNITS)
    assert state["data"]["bytes"] == sizes[2]
    assert state["data"]["all_bytes"] == sum(sizes.values())
    assert f"1 of {UNITS} units, " in line

    largest, total = max(sizes.values()), sum(sizes.values())
    (small,) = problems(DoctorContext(limited(away, 0.5)))
    assert (small.severity, "the largest unit takes" in small.what) == (Severity.ERROR, True)
    usage = type(shutil.disk_usage("/"))
    for free, severity in (largest, Severity.WARNING), (0, Severity.ERROR):
        monkeypatch.setattr(data.shutil, "disk_usage", lambda _, free=free: usage(total, total, free))
        cached = sizes[2] if free else 0
        monkeypatch.setattr(data, "cached", lambda _, size=cached: remote.Cached(1, size, UNITS, total))
        (full,) = problems(DoctorContext(away))
        assert full.severity == severity
        assert f"the cache in {folder} may take" in full.what
        assert "data.cache_dir" in full.remedy
    monkeypatch.setattr(storage.time, "sleep", lambda _: None)
    (gone,) = problems(DoctorContext(changed(away, "data", remote=f"{url}_of_nobody")))
    assert f"{url}_of_nobody/manifest.json was not fetched" in gone.what


def problems(context: DoctorContext) -> list[Problem]:
    """What doctor's checks of data on object storage find."""
    checks = [check for check in doctor.CHECKS if check.name in ("object storage", "data")]
    return [
        f
        for found in doctor.examine(context, checks)
        for f in found
        if isinstance(f, Problem) and "batch" not in f.what
    ]
