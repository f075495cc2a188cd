"""The bench stage: what a training step of this recipe costs on this machine, and how it scales over ranks.

Everything it writes lies in RUN/bench: `results.json` and `parity.json`, and the run folder of the trainer that is
measured, with links to the run's own features or with clips of the embedded demo voice.
"""

from __future__ import annotations

import json
import logging
import os
import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from datetime import datetime, timezone
from pathlib import Path
from typing import Annotated, Any

import numpy as np
from accelerate.utils import gather_object

from rvc_dist.config import F0_PER_S, BenchConfig, Recipe
from rvc_dist.data import audio, decode
from rvc_dist.data.number_formats import stored_wave
from rvc_dist.features.feature_files import pack_unit
from rvc_dist.files import ForeignFileError, atomic_write, write_json
from rvc_dist.runtime.device import PRECISIONS
from rvc_dist.schema import Count, Positive, Seconds, Word, above, check, record
from rvc_dist.tools import bench_report, parity
from rvc_dist.tools.made_up import CONTENT_WIDTH, made_up_pitch
from rvc_dist.tools.measuring import MADE_UP, PARTS, MeasuredRun, gradient_bytes
from rvc_dist.tools.peak import measured_peak
from rvc_dist.tools.tables import console, say
from rvc_dist.workspace import (
    DEMO_VOICE_DIR,
    Shard,
    StageError,
    Workspace,
    fingerprint,
    read_json,
    remove_leftovers,
    save_arrays,
    wait_for,
)

logger = logging.getLogger(__name__)

PARITY_FILE = "parity.json"
FORMAT = 1
"""Of results.json and parity.json."""
CLIP_S = 3.0


def run(recipe: Recipe, shard: Shard) -> None:
    """Measure, write the result into RUN/bench, and print it with the earlier ones of other numbers of ranks.

    Raises:
        StageError: RUN/bench cannot be written, the features do not fit the recipe, or there is nothing to compare.
    """
    config = recipe.bench
    if config.plain and recipe.train.grad_accum_steps > 1:
        raise StageError(
            f"bench.plain: got train.grad_accum_steps {recipe.train.grad_accum_steps}; the plain step knows no "
            "micro-batches:",
            "set it to 1, or train.batch_size to the product of both",
        )
    if config.parity:
        parity.asked_for(recipe.train, shard.count)  # nothing to compare is an error before anything is written
    bench = Bench(recipe, shard)
    results_file = bench.folder / (PARITY_FILE if config.parity else "results.json")
    if shard.is_first:
        bench.prepare()
        load_results(results_file)  # a damaged file is an error before anything is measured
    result = bench.measured()
    if not shard.is_first:
        return
    try:
        results = store(results_file, result)
    except OSError as error:
        raise StageError(f"{results_file}: cannot be written ({error.strerror})") from error
    if config.parity:
        bench_report.show_parity(result)
    else:
        bench_report.show_result(result, results)
    say(console(), f"written: {results_file}")


class Bench:
    """RUN/bench and the data in it."""

    def __init__(self, recipe: Recipe, shard: Shard) -> None:
        self._recipe, self._shard = recipe, shard
        self.run = Workspace(recipe.run_dir, recipe.name)
        self.folder = self.run.root / "bench"
        self.data = "run" if self.run.features_report_file.is_file() else "demo"
        """Whose clips are trained on."""
        self.work = Workspace(self.folder / self.data, recipe.name)
        self._formats = recipe.preprocess.clip_format, recipe.extract.content_format

    def recipe(self) -> Recipe:
        """The recipe with the trainer's run folder in RUN/bench, as soon as the first rank has prepared it."""
        here = replace(self._recipe.data, remote=None)  # the clips are in that folder
        recipe = replace(self._recipe, run_dir=str(self.work.root), data=here)
        if self.data == "run":
            wait_for("the links to the features", lambda: self.work.features_report_file.is_file() or None)
            return recipe
        wait_for("the clips of the demo voice", self._is_cut)
        # Every clip counts, and speed does not depend on which ones are left out.
        return replace(recipe, data=replace(recipe.data, holdout=0.0))

    def measured(self) -> dict[str, Any]:
        """The benchmark, or the comparison if that is asked for: plain data, the same on all ranks."""
        recipe = self.recipe()
        result = parity.measure(recipe, self._shard.count) if recipe.bench.parity else measured_result(recipe)
        result["key"]["data"] = self.data
        return result

    def prepare(self) -> None:
        """Links to the run's features, or else clips of the demo voice.

        Raises:
            StageError: RUN/bench cannot be written to.
        """
        try:
            for folder in (self.folder, self.work.root):
                folder.mkdir(parents=True, exist_ok=True)
                atomic_write(folder / ".probe", "")
                (folder / ".probe").unlink()
            if self.data == "run":
                for link, target in ((self.work.clips_dir, "clips"), (self.work.features_dir, "features")):
                    _link(link, self.run.root / target)
            elif not self._is_cut():
                self._cut()
        except OSError as error:
            raise StageError(
                f"{error.filename or self.folder}: the benchmark's files cannot be written ({error.strerror});",
                f"make {self.run.root} writable, remove what is in the way, or choose another run_dir",
            ) from error

    def _is_cut(self) -> bool | None:
        files = self.work.features_report_file, self.work.features_file(0), self.work.clips_file(0)
        return (all(f.is_file() for f in files) and read_json(files[0]) == self._report()) or None

    def _report(self) -> dict[str, Any]:
        """As extract's; the clips of the demo voice depend on the rate and the width of the content."""
        rate, width = self._recipe.data.sample_rate, CONTENT_WIDTH[self._recipe.model.version]
        stamp = fingerprint("bench", rate, width, CLIP_S, *self._formats)
        return {"stamp": stamp, "settings": {}, "clips": stamp, "content_frames": 0}

    def _cut(self) -> None:
        """Write what preprocess and extract would: a unit of clips of 3 s, with made-up content and pitch."""
        rate, width = self._recipe.data.sample_rate, CONTENT_WIDTH[self._recipe.model.version]
        report, rng = self._report(), np.random.default_rng(0)
        num_f0, demo = round(CLIP_S * F0_PER_S), list(demo_clips(rate))
        clips = [{"speaker": 0, "source": source, "start_s": start_s} for source, start_s, _ in demo]
        contents = (rng.standard_normal((num_f0 // 2, width), dtype=np.float32) for _ in demo)
        features = [(number, content, made_up_pitch(num_f0)) for number, content in enumerate(contents)]
        header = {"stamp": report["stamp"], "sample_rate": rate, "clips": clips}
        embedder = {"name": MADE_UP, "width": width, "hash": report["stamp"]}
        clip_format, content_format = self._formats
        lengths = [len(wave) for *_, wave in demo]
        packed = pack_unit(header, lengths, features, embedder, report["stamp"], content_format)
        self.work.features_report_file.unlink(missing_ok=True)
        stored = {f"{i:05d}": stored_wave(wave, clip_format)[0] for i, (*_, wave) in enumerate(demo)}
        save_arrays(self.work.clips_file(0), stored, header)
        save_arrays(self.work.features_file(0), *packed)
        for folder in (self.work.clips_dir, self.work.features_dir):
            remove_leftovers(folder, 1)
        write_json(self.work.features_report_file, report)
        logger.info("%d clips of the demo voice in %s", len(clips), self.work.root)


def demo_clips(rate: int) -> Iterator[tuple[str, float, audio.Wave]]:
    """Clips of the demo voice, CLIP_S long: recording, where in it they begin in seconds, and samples at `rate`."""
    for source in sorted((DEMO_VOICE_DIR / "voice").glob("*.flac")):
        wave, source_rate = decode.decode(source)
        length = round(CLIP_S * source_rate)
        for i in range(len(wave) // length):
            yield source.name, i * CLIP_S, audio.resample(wave[i * length : (i + 1) * length], source_rate, rate)


def _link(link: Path, target: Path) -> None:
    """Relative, so that a run folder can be moved; a link to something else is replaced."""
    wanted = os.path.relpath(target.resolve(), link.parent.resolve())
    if link.is_symlink():
        if os.readlink(link) == wanted:
            return
        link.unlink()
    link.parent.mkdir(parents=True, exist_ok=True)
    link.symlink_to(wanted)


def measured_result(recipe: Recipe) -> dict[str, Any]:
    """Measure the recipe's steps on the ranks that the launcher started; plain data, the same on all ranks."""
    run = MeasuredRun(recipe)
    ranks = gather_object([_measure(run, recipe.bench)])
    key, machine = run.key(), run.machine()
    modules = {name: network.module for name, network in run.step.networks.items()}
    summary = summarise(ranks, run.device.type == "cuda", key["precision"])
    summary["parameters"] = {name: sum(p.numel() for p in module.parameters()) for name, module in modules.items()}
    summary["gradient_bytes"] = {name: gradient_bytes(module) for name, module in modules.items()}
    return {"key": key, "machine": machine, "summary": summary, "ranks": ranks}


def _measure(run: MeasuredRun, config: BenchConfig) -> dict[str, Any]:
    """The raw numbers of this rank. Last what lets the weights of the ranks part ways."""
    warmup, count = config.warmup_steps, config.steps
    longest = run.longest()
    run.forget_peak_memory()
    logger.info("bench: %d + %d steps as the sampler deals them", warmup, count)
    steps = run.sampled(warmup + count)
    for _ in range(warmup):
        next(steps)
    sent = run.reducer.num_bytes
    samples = {"dealt": list(steps)}
    sent = run.reducer.num_bytes - sent
    if run.has_one_length:
        samples["longest"] = samples["dealt"]
    else:
        logger.info("bench: %d + %d steps on the longest clips", warmup, count)
        samples["longest"] = [run.measure(lambda: longest) for _ in range(warmup + count)][warmup:]
    mine: dict[str, Any] = {
        "samples": {name: [s.to_dict() for s in steps] for name, steps in samples.items()},
        "longest_frames": longest[0].content.shape[1],
        "wire_bytes_per_step": sent / count,
        "memory": run.peak_memory(),
        "peak_flops": {
            name: measured_peak(run.device, PRECISIONS[name])
            for name in dict.fromkeys(("fp32", run.config.autocast_precision))
        },
    }
    if config.plain:
        logger.info("bench: %d + %d steps in turn with the plain step", warmup, count)
        plain = run.plain(config.plain_precision)
        losses = run.compare_losses(plain, longest)  # the first steps of the warm-up
        pairs = run.in_turn(warmup - 1 + count, lambda: run.train_step(longest), lambda: run.plain_step(plain, longest))
        mine["plain"] = {"pairs": pairs[warmup - 1 :], "losses": losses, "precision": config.plain_precision}
    if run.num_ranks > 1:
        logger.info("bench: %d steps with and without communication", count)
        pairs = run.in_turn(1 + count, lambda: run.train_step(longest), lambda: run.step_alone(longest))
        mine["with_and_without_wire"] = pairs[1:]
    mine["flops"] = run.count_flops(longest)
    text = json.dumps(mine, default=asdict)
    rounded: dict[str, Any] = json.loads(text, parse_float=lambda number: float(f"{float(number):.9g}"))
    return rounded


def summarise(ranks: Sequence[dict[str, Any]], on_cuda: bool, precision: str) -> dict[str, Any]:
    """Medians over steps. Ranks step together, so that a step takes as long as on the slowest of them.

    A utilisation of more than 1 cannot be, and is None: the peak is an error of the benchmark's.
    """
    series = {name: _series([rank["samples"][name] for rank in ranks]) for name in ("dealt", "longest")}
    flops = ranks[0]["flops"] | {"step": sum(ranks[0]["flops"].values())}
    peak = {name: statistics.fmean(rank["peak_flops"][name] for rank in ranks) for name in ranks[0]["peak_flops"]}
    clock = "wall_s" if on_cuda else "cpu_s"
    spent = series["longest"]["parts"] | {"step": series["longest"]}
    shares = {name: flops[name] / max(spent[name][clock], 1e-9) / peak[precision] for name in flops if name in spent}
    summary = {
        "series": series,
        "flops": flops,
        "peak_flops": peak,
        "peak_clock": clock,
        "utilisation": {name: share if share <= 1 else None for name, share in shares.items()},
        "memory": {name: max(rank["memory"][name] for rank in ranks) for name in ranks[0]["memory"]},
        "wire_bytes_per_step": max(rank["wire_bytes_per_step"] for rank in ranks),
        "longest_frames": ranks[0]["longest_frames"],
    }
    if "with_and_without_wire" in ranks[0]:
        summary["communication"] = _communication([rank["with_and_without_wire"] for rank in ranks])
    if "plain" in ranks[0]:
        summary["plain"] = _against_plain([rank["plain"] for rank in ranks])
    return summary


def medians(spans: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Of the seconds and of the CPU-seconds of several spans."""
    return {clock: statistics.median(span[clock] for span in spans) for clock in ("wall_s", "cpu_s")}


def _series(ranks: Sequence[Sequence[dict[str, Any]]]) -> dict[str, Any]:
    """Of each rank's samples, which are as many."""
    walls = np.array([[sample["wall_s"] for sample in samples] for samples in ranks]).max(axis=0)
    audio_s = [sample["audio_s"] for sample in ranks[0]]
    every = [sample for samples in ranks for sample in samples]
    return {
        "wall_s": float(np.median(walls)),
        "cpu_s": medians(every)["cpu_s"],
        "audio_s_per_s": float(np.median(audio_s / walls)),
        "parts": {name: medians([s["parts"][name] for s in every]) for name in PARTS if name in every[0]["parts"]},
    }


def _communication(ranks: Sequence[Sequence[Sequence[dict[str, float]]]]) -> dict[str, Any]:
    """Of each rank's pairs of steps, with and without it."""
    walls = np.array([[[span["wall_s"] for span in pair] for pair in pairs] for pairs in ranks])
    together, without = np.median(walls.max(axis=0), axis=0).tolist()
    alone = np.median(walls[:, :, 1], axis=1).tolist()
    slowest, fastest = alone.index(max(alone)), alone.index(min(alone))
    return {
        "with_s": together,
        "without_s": without,
        "share": 1 - without / together,
        "slowest_rank": slowest,
        "slowest_s": alone[slowest],
        "fastest_rank": fastest,
        "fastest_s": alone[fastest],
    }


def _against_plain(ranks: Sequence[dict[str, Any]]) -> dict[str, Any]:
    pairs = [pair for rank in ranks for pair in rank["pairs"]]
    real, plain = (medians(side) for side in zip(*pairs, strict=True))
    losses = ranks[0]["losses"]
    return {
        "precision": ranks[0]["precision"],
        "real": real,
        "plain": plain,
        "ratio": {clock: plain[clock] / max(real[clock], 1e-9) for clock in real},
        "losses": losses,
        "difference": max(abs(a - b) / max(abs(a), 1e-9) for a, b in losses.values()),
    }


MEASURE = Annotated[Seconds, above(0.0)]
DEALT = record(audio_s_per_s=MEASURE, parts=record(data=record(wall_s=Seconds)))
WITH_KEY = record(key=record(ranks=Positive, device=Word, cpu=Word))
MEASURED = record(
    machine=record(cores=Positive, threads=Positive),
    summary=record(
        series=record(longest=record(wall_s=MEASURE), dealt=DEALT), longest_frames=Positive, memory=dict[str, Count]
    ),
)
ON_RANKS = record(communication=record(with_s=Seconds, without_s=MEASURE, share=float))
"""What is read of kept results."""


def load_results(path: Path) -> list[dict[str, Any]]:
    """The results kept in `path`, none when there is no such file.

    Raises:
        StageError: the file is not one of ours.
    """
    if not path.is_file():
        return []
    try:
        data = read_json(path)
        if data.get("format") != FORMAT:
            raise ForeignFileError(f"not results of this version of rvc_dist (format {FORMAT})")
        results: list[dict[str, Any]] = check(data.get("results"), list[dict[str, Any]])
        for result in results:
            check(result, WITH_KEY)
            if path.name != PARITY_FILE:
                summary = check(result, MEASURED)["summary"]
                if result["key"]["ranks"] > 1 or "communication" in summary:
                    check(summary, ON_RANKS)
    except ForeignFileError as error:
        raise StageError(f"{path}: {error};", "move it away") from error
    return results


def store(path: Path, result: dict[str, Any]) -> list[dict[str, Any]]:
    """Keep `result`, measured now, in the place of one with the same key, and all others; returns all of them."""
    now = datetime.now(timezone.utc).isoformat(timespec="seconds")
    plain = json.loads(json.dumps({"measured_at": now} | result))
    results = [r for r in load_results(path) if r["key"] != plain["key"]] + [plain]
    write_json(path, {"format": FORMAT, "results": results})
    return results
