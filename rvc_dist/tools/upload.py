"""`rvc-dist upload`: puts a run's clips and features on object storage, for training from there (`data.remote`).

Any rank or array task does its part; a unit's record in RUN/uploaded is written when both of its files are there, and
whoever finds all records writes the manifest, last of all. What has not changed is not sent again.
"""

from __future__ import annotations

import gzip
import json
import logging
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import TypedDict

from rvc_dist.config import Recipe
from rvc_dist.data.storage import HEADERS, MANIFEST, Storage, Stored, unit_names
from rvc_dist.features.feature_files import clip_fingerprints
from rvc_dist.files import beside, sha256_of, write_json
from rvc_dist.train.voice_file import f0_medians
from rvc_dist.unit_stage import in_threads
from rvc_dist.workspace import Shard, StageError, Workspace, read_json, unit_files

logger = logging.getLogger(__name__)

THREADS = 4
SMALL = ("clips/plan.json", "clips/report.json", "features/report.json", "features/mute.safetensors", "speakers.json")


class Record(TypedDict):
    """RUN/uploaded/00000.json: a unit that is there."""

    url: str
    local: list[list[int]]
    """Size and time of change of each of its files when it was sent."""
    files: dict[str, Stored]


def run(recipe: Recipe, shard: Shard) -> None:
    """Upload this process's part, and the manifest once all is there.

    Raises:
        StageError: `data.remote` is not set, the run has no features yet, or the storage does not take them.
    """
    if recipe.data.remote is None:
        raise StageError("data.remote is not set:", "say where to, such as --data.remote s3://bucket/alice")
    work = Workspace(recipe.run_dir, recipe.name)
    if not work.features_report_file.is_file():
        raise StageError(f"{work.features_dir} has no features:", "run `rvc-dist extract` to its end first")
    if work.work_list_file.is_file():
        clip_fingerprints(work)  # all are there
    upload = Upload(work, Storage(recipe.data.remote))
    units = [int(path.stem) for path in unit_files(work.features_dir)]
    mine = units[shard.index :: shard.count]
    sent = sum(in_threads(THREADS, upload.put_unit, mine, "upload", "units"))
    logger.info("upload: %d units, %d of them here, %.3f GB sent", len(units), len(mine), sent / 1e9)
    if left := [unit for unit in units if upload.record(unit) is None]:
        logger.info("upload: this part is done, %d units are left to others", len(left))
        return
    upload.finish(units)


class Upload:
    """From a run to `storage`."""

    def __init__(self, work: Workspace, storage: Storage) -> None:
        self.work, self.storage = work, storage
        self.folder = work.root / "uploaded"
        self.there = storage.sizes()

    def record(self, unit: int) -> Record | None:
        """Of a unit that was sent there as it is now."""
        found = self._last(unit)
        return found if found is not None and found["local"] == self._local(unit) else None

    def put_unit(self, unit: int) -> int:
        """Let a unit's files be there; how many bytes were sent."""
        if (record := self.record(unit)) is not None and self._is_there(record["files"]):
            return 0
        before, last = self._local(unit), self._last(unit)
        files = {name: _stored(self.work.root / name) for name in unit_names(unit)}
        known = last["files"] if last is not None else {}
        sent = [name for name in files if files[name] != known.get(name) or not self._is_there({name: files[name]})]
        for name in sent:
            self.storage.put(self.work.root / name, name)
        if self._local(unit) != before:
            raise StageError(
                f"unit {unit} of {self.work.root} changed while it was sent;", "run `rvc-dist upload` again"
            )
        write_json(self._path(unit), Record(url=self.storage.url, local=before, files=files))
        return sum(files[name]["size"] for name in sent)

    def finish(self, units: list[int]) -> None:
        """Write all that is no unit, and the manifest of all."""
        headers = self.folder / HEADERS
        with beside(headers) as half:
            with half.open("xb") as raw, gzip.GzipFile(fileobj=raw, mode="wb", filename="", mtime=0) as lines:
                for unit, _, header in self.work.unit_headers():
                    lines.write(json.dumps({"unit": unit, "header": header}).encode() + b"\n")
            half.replace(headers)
        files: dict[str, Stored] = {}
        for unit in units:
            if (record := self.record(unit)) is None:
                raise StageError(f"unit {unit} of {self.work.root} changed while it was sent;", "run it again")
            files |= record["files"]
        small = [self.work.root / name for name in SMALL if (self.work.root / name).is_file()] + [headers]
        for path in small:
            name = HEADERS if path is headers else path.relative_to(self.work.root).as_posix()
            files[name] = _stored(path)
            self.storage.put(path, name)
        medians = {"" if speaker is None else str(speaker): hz for speaker, hz in f0_medians(self.work).items()}
        manifest = self.folder / MANIFEST
        write_json(manifest, {"version": 1, "files": files, "f0_medians": medians})
        self.storage.put(manifest, MANIFEST)
        total = sum(stored["size"] for stored in files.values())
        logger.info("upload: %d files, %.3f GB are in %s", len(files), total / 1e9, self.storage.url)
        if others := self.there.keys() - files.keys() - {MANIFEST}:
            logger.info("upload: %d objects there are none of this run, such as %s", len(others), min(others))

    def _path(self, unit: int) -> Path:
        return self.folder / f"{unit:05d}.json"

    def _last(self, unit: int) -> Record | None:
        with suppress(FileNotFoundError):
            found = read_json(self._path(unit), Record)
            return found if found["url"] == self.storage.url else None
        return None

    def _local(self, unit: int) -> list[list[int]]:
        found = [(self.work.root / name).stat() for name in unit_names(unit)]
        return [[status.st_size, status.st_mtime_ns // 1000] for status in found]

    def _is_there(self, files: Mapping[str, Stored]) -> bool:
        return all(self.there.get(name) == stored["size"] for name, stored in files.items())


def _stored(path: Path) -> Stored:
    return Stored(size=path.stat().st_size, sha256=sha256_of(path))
