"""Run on its own: makes a run of many tiny clips, and measures the steps that go through all of them.

Usage: scaling.py FOLDER NUM_CLIPS
Prints a JSON object: for each step [seconds of CPU, of the clock, MB by which its process grew at most meanwhile],
without the pages of mapped files, which the system takes back as it likes. Each clip is a recording of its own. The
unit files are written as the stages write them, but with noise, since computing so many would take hours. k-means and
the cells are trained on few frames: what that takes is bounded in any case, and rises faster up to that bound.
"""

from __future__ import annotations

import json
import multiprocessing
import sys
import threading
import time
import wave
from collections.abc import Callable
from functools import partial
from io import BytesIO
from pathlib import Path
from typing import Any

import faiss  # noqa: F401 - here, so that no step is charged for its import
import numpy as np
from helpers import EMBEDDER, RATE, changed, narrow_recipe, workspace_of

from rvc_dist.config import DataConfig, ExtractConfig, Recipe
from rvc_dist.data import clip_files, preprocess
from rvc_dist.features import feature_files, index, index_file
from rvc_dist.files import write_json
from rvc_dist.train.dataset import ClipTable
from rvc_dist.workspace import Shard, SourceFile, WorkList, cut_units, fingerprint, save_arrays

WIDTH, NUM_CONTENT, FILES_A_SPEAKER = 32, 40, 1000
NUM_SAMPLES = NUM_CONTENT * RATE // 50
EMBEDDER_USED = EMBEDDER | {"width": WIDTH}
ALONE = Shard(0, 1)
FORK = multiprocessing.get_context("fork")


def make_recordings(folder: Path, count: int) -> None:
    """Half a second each, 8-bit at 8 kHz: 4 kB. No two are alike."""
    stream = BytesIO()
    with wave.open(stream, "wb") as file:
        file.setparams((1, 1, 8000, 4000, "NONE", ""))
        file.writeframes(np.random.default_rng(0).integers(0, 256, 4000, np.uint8).tobytes())
    start = stream.getvalue()[:-4]
    for i in range(count):
        speaker = folder / str(i // FILES_A_SPEAKER)
        if i % FILES_A_SPEAKER == 0:
            speaker.mkdir(parents=True)
        (speaker / f"{i:06d}.wav").write_bytes(start + i.to_bytes(4, "little"))


def make_units(recipe: Recipe, count: int, per_speaker: int | None = None) -> None:
    """Clips and features of `count` recordings of 3 s, with the work list and the reports of both stages.

    All are of one speaker, or `per_speaker` of each.
    """
    work = workspace_of(recipe)
    sources = [SourceFile(f"{i:06d}.wav", i // (per_speaker or count), 1000, 1, 3.0) for i in range(count)]
    work_list = WorkList(fingerprint("listing"), clip_files.clip_settings(recipe), cut_units(sources), ())
    settings = feature_files.feature_settings(recipe) | {"embedder": EMBEDDER_USED}
    rng = np.random.default_rng(0)
    fingerprints, recordings = [], []
    for unit in work_list.units:
        waves, features, clips, sized, files = {}, {}, [], [], []
        for i, source in enumerate(unit.files):
            waves[f"{i:05d}"] = np.zeros(8, np.float32)
            features[f"{i:05d}.content"] = rng.normal(size=(NUM_CONTENT, WIDTH)).astype(np.float32)
            features[f"{i:05d}.f0"] = np.full(2 * NUM_CONTENT, 150.0, np.float32)
            clips.append({"speaker": source.speaker, "source": source.path, "start_s": 0.0})
            made = {"sample_rate": RATE, "effective_rate": RATE, "clips": 1, "seconds_out": 3.0}
            files.append(clip_files.file_entry(source, 3.0) | made)
            sizes = {"num_samples": NUM_SAMPLES, "num_content": NUM_CONTENT, "num_f0": 2 * NUM_CONTENT}
            sized.append(clips[-1] | sizes)
        fingerprints.append(unit.fingerprint(work_list.settings))
        header = {"stamp": fingerprints[-1], "sample_rate": RATE, "clips": clips, "files": files}
        recordings += files
        save_arrays(work.clips_file(unit.id), waves, header)
        header = {"stamp": fingerprint(settings, fingerprints[-1]), "sample_rate": RATE, "clips": sized}
        save_arrays(work.features_file(unit.id), features, header | {"embedder": EMBEDDER_USED})
    work.work_list_file.write_text(work_list.dumps(), encoding="utf-8")
    write_json(work.clips_report_file, clip_files.cut_report(recipe, recordings)[0])
    frames = count * NUM_CONTENT
    write_json(
        work.features_report_file, {"settings": settings, "clips": fingerprint(fingerprints), "content_frames": frames}
    )


def memory_mb() -> float:
    """What this process holds besides pages of files."""
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("RssAnon:")) / 1024


def measure(step: Callable[[], Any]) -> tuple[float, float, float]:
    before = memory_mb()
    seen, is_over = [before], threading.Event()

    def watch() -> None:
        while not is_over.wait(0.005):
            seen.append(memory_mb())

    watcher = threading.Thread(target=watch)
    watcher.start()
    cpu, clock = time.process_time(), time.perf_counter()
    result = step()
    cpu, clock = time.process_time() - cpu, time.perf_counter() - clock
    is_over.set()
    watcher.join()
    assert result is not None
    return round(cpu, 3), round(clock, 3), round(max(seen) - before, 1)


def apart(function: Callable[[], Any]) -> Any:
    """What `function` returns in a process of its own, in which no earlier step has left memory to use again."""
    results = FORK.SimpleQueue()
    process = FORK.Process(target=lambda: results.put(function()))
    process.start()
    process.join()
    assert process.exitcode == 0
    return results.get()


def main(folder: Path, count: int) -> None:
    index.MAX_SAMPLE, index.KMEANS_CENTRES = 20_000, 200
    data = DataConfig(audio_dir=str(folder / "audio"), sample_rate=RATE)
    features = ExtractConfig(f0_method="pyin", embedder_model="mfcc", include_mutes=0)
    recipe = narrow_recipe(folder, data=data, extract=features)
    planned = narrow_recipe(folder / "planned", data=data)
    apart(lambda: make_recordings(folder / "audio", count))
    apart(lambda: make_units(recipe, count))

    def work_list() -> WorkList:
        return preprocess.make_work_list(planned, workspace_of(planned), ALONE)

    def build(algorithm: str) -> bool | None:
        chosen = changed(recipe, "index", algorithm=algorithm)
        index.run(chosen, ALONE)
        return index_file.complete(chosen)

    steps: dict[str, Callable[[], Any]] = {
        "work list": work_list,
        "work list, again": work_list,
        "preprocess: is it complete": lambda: clip_files.complete(recipe),
        "extract: is it complete": lambda: feature_files.complete(recipe),
        "index of all frames": lambda: build("faiss"),
        "index of k-means centres": lambda: build("kmeans"),
        "index: is it complete": lambda: index_file.complete(changed(recipe, "index", algorithm="kmeans")),
        "clip table": lambda: ClipTable.load(recipe),
    }
    json.dump({name: apart(partial(measure, step)) for name, step in steps.items()}, sys.stdout)


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
