"""The plan stage: what a run will cost on any number of ranks, before it starts, and how many are worth it.

Steps come from the clips of the run and the trainer's own sampler, seconds from RUN/bench/results.json or from what the
recipe says, memory and operations from a traced step. `rvc_dist.tools.forecast` has the formulas.
"""

from __future__ import annotations

import logging
import math
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open

from rvc_dist.config import MAX_CLIP_FRAMES, PRETRAINED_SPEAKERS, Recipe, TrainConfig
from rvc_dist.data import clip_files, decode
from rvc_dist.data.cutting import measure
from rvc_dist.data.number_formats import FORMATS, clip_bytes_per_s, feature_bytes_per_s
from rvc_dist.data.sources import list_sources
from rvc_dist.files import write_json
from rvc_dist.tools import bench
from rvc_dist.tools.forecast import (
    HIDDEN_SHARE,
    WORLD_SIZES,
    Cluster,
    Forecast,
    Limit,
    Measured,
    Pace,
    data_limit,
    forecasts,
    loads,
    sampler_on,
    speed_limit,
)
from rvc_dist.tools.made_up import CONTENT_WIDTH
from rvc_dist.tools.measuring import recipe_key
from rvc_dist.tools.tables import console, print_table, say
from rvc_dist.tools.tracing import TracedStep, trace
from rvc_dist.train.clips import ClipRef
from rvc_dist.train.dataset import ClipTable, cached_bytes
from rvc_dist.workspace import ClipsHeader, Shard, StageError, Workspace, read_json, unit_files, unit_header

logger = logging.getLogger(__name__)

FORMAT = 1
"""Of RUN/plan.json."""
ESTIMATE = "an estimate"
"""Of the clips: where nothing is cut yet, other clips may be held out than will be."""
WARMUP_STEPS, STEPS = 2, 3
"""Of the measurement when there is none."""
LOCAL_BANDWIDTH_GB_S, BANDWIDTH_GB_S = 10.0, 3.0
"""Assumed between the ranks of a node (PCI Express 4.0 gives more) and between nodes (25 Gbit/s Ethernet)."""
MOST_RANKS = 2**31
USUAL_RANKS_PER_NODE = 8
RANKS_FOR_THREADS = "0.77 to 0.90 of the audio a second (2 ranks of 1 thread, each with half the batch of 1 rank of 2)"
"""As measured; the least in bf16 on a CPU with AMX."""
RUNTIME_BYTES = 1_000_000_000
"""Of a rank: the interpreter and the libraries of training, or about as much for the CUDA context and NCCL."""
WORKSPACE_SHARE = 0.2
"""Of the traced peak, what allocators and kernels' workspaces take on top. On a CPU, steps of the full 48 kHz networks
on 1 and 4 clips of 300 frames, traced at 2.5 and 4.0 GB, took 3.2 and 4.9 GB besides the libraries."""


def run(recipe: Recipe, shard: Shard) -> None:
    """Print the forecast and write it to RUN/plan.json.

    Raises:
        StageError: there is nothing to train on yet, or no step time can be had.
    """
    if shard.count > 1:
        raise StageError(
            "plan: started on several ranks; it is one process, for any number of ranks (plan.ranks). `rvc-dist bench` "
            "measures on several, and plan reads what it kept"
        )
    plan = make_plan(recipe)
    path = Path(recipe.run_dir) / "plan.json"
    write_json(path, plan.to_dict())
    show(plan)
    say(console(), f"written: {path}")


@dataclass(frozen=True)
class RunPlan:
    """All that the stage says."""

    recipe: Recipe
    clips: ClipTable
    clips_from: str
    traced: TracedStep
    pace: Pace
    pace_from: str
    cluster: Cluster
    assumed: tuple[str, ...]
    rows: dict[int, Forecast]
    """For WORLD_SIZES and plan.ranks."""
    bench_memory: dict[str, int]
    """Bytes by kind, as a benchmark on the longest clips measured them; empty without one."""
    disk: tuple[Stored, ...]
    """What units take: of clips and of features."""

    @property
    def chosen(self) -> Forecast:
        return self.rows[self.recipe.plan.ranks]

    @property
    def sensible(self) -> list[Forecast]:
        """Up to the first world size whose one step an epoch takes every clip, and the chosen one."""
        num_clips = len(self.clips.train)
        return [
            f for f in self.rows.values() if f.global_batch < 2 * num_clips or f.ranks in (1, self.recipe.plan.ranks)
        ]

    def memory_bytes(self, ranks: int) -> dict[str, int]:
        """Of a rank, by what it is for."""
        gradients = sum(self.traced.gradient_bytes.values())
        parts = {
            "weights": self.traced.weight_bytes,
            "gradients": gradients,
            "optimizer": self.traced.optimizer_bytes,
            "activations": self.traced.activation_bytes,
            "workspaces": round(WORKSPACE_SHARE * self.traced.peak_bytes),
            "libraries": RUNTIME_BYTES,
        }
        if ranks > 1:  # DDP's buckets stay when gradients go; at the peak of one rank the generator's may be gone
            parts["gradient buckets"] = self.traced.gradient_bytes["generator"]
            if self.recipe.train.grad_compression == "bf16":
                parts["compressed gradients"] = gradients // 2
        if self.recipe.train.cache_on_device:
            parts["dataset"] = cached_bytes(self.recipe, self.clips.train, self.clips.content_channels)
        return parts

    def limits(self) -> dict[str, Limit | None]:
        train = self.recipe.train
        return {
            "data": data_limit(len(self.clips.train), train.global_batch(1), train.keep_global_batch),
            "speed": speed_limit([self.rows[w] for w in WORLD_SIZES]),
        }

    def verdict(self) -> Limit:
        """The smaller of both limits; at least one rank is needed in any case."""
        binding = min((limit for limit in self.limits().values() if limit is not None), key=lambda limit: limit.ranks)
        return binding._replace(ranks=max(1, binding.ranks))

    def to_dict(self) -> dict[str, Any]:
        verdict = self.verdict()
        return {
            "format": FORMAT,
            "clips": {"from": self.clips_from, "train": len(self.clips.train), "held_out": len(self.clips.holdout)},
            "step": {"from": self.pace_from, **asdict(self.pace)},
            "cluster": {k: v for k, v in asdict(self.cluster).items() if v != math.inf},
            "assumed": list(self.assumed),
            "traced": asdict(self.traced),
            "disk": [asdict(stored) for stored in self.disk],
            "forecasts": [
                asdict(f) | {"wall_s": f.wall_s, "rank_hours": f.rank_hours, "memory_bytes": self.memory_bytes(f.ranks)}
                for f in self.rows.values()
            ],
            "limits": {name: limit and limit._asdict() for name, limit in self.limits().items()},
            "pays_up_to": verdict._asdict(),
        }


@dataclass(frozen=True)
class Stored:
    """What an hour of clips takes on the disk, in the recipe's format and in the units that are there."""

    what: str
    format: str
    bytes_per_hour: int
    """An estimate: of the numbers alone."""
    made_format: str | None = None
    """Of the units that are there; None where not all are."""
    made_bytes_per_hour: int | None = None
    """Measured: their files by their clips' seconds."""

    def text(self) -> str:
        made = f"the units that are there {_gb(self.made_bytes_per_hour)} as {self.made_format}"
        return f"{self.what} {_gb(self.bytes_per_hour)} as {self.format}" + f" ({made})" * bool(self.made_format)


def _gb(num_bytes: int | None) -> str:
    return f"{(num_bytes or 0) / 1e9:.3f} GB"


def find_stored(recipe: Recipe, width: int) -> Iterator[Stored]:
    """Of clips, and of features with a content `width` wide."""
    work = Workspace(recipe.run_dir, recipe.name)
    report = read_json(work.clips_report_file) if work.clips_report_file.is_file() else {}
    hours = float(report.get("clip_seconds", 0.0)) / 3600
    clip, content = recipe.preprocess.clip_format, recipe.extract.content_format
    for what, form, bytes_per_s, report_file, key in (
        ("clips", clip, clip_bytes_per_s(recipe), work.clips_report_file, "00000"),
        ("features", content, feature_bytes_per_s(recipe, width), work.features_report_file, "00000.content"),
    ):
        files = list(unit_files(report_file.parent)) if hours and report_file.is_file() else []
        made_format = next(filter(None, (_format_of(path, key) for path in files)), None)
        per_hour = round(sum(path.stat().st_size for path in files) / hours) if made_format else None
        yield Stored(what, form, 3600 * bytes_per_s, made_format, per_hour)


def _format_of(path: Path, key: str) -> str | None:
    """Of an array in a unit's file; None where no recording of the unit gave a clip."""
    with safe_open(path, framework="numpy") as file:
        return FORMATS[file.get_slice(key).get_dtype()] if key in file.keys() else None  # noqa: SIM118


def sent_bytes(config: TrainConfig, gradient_bytes: Mapping[str, int]) -> list[int]:
    """Bytes of every sending of gradients in a step, given those of each network."""
    compressed = 2 if config.grad_compression == "bf16" else 1
    updates = {"generator": 1, "discriminator": config.d_updates}
    return [n // compressed for name, n in gradient_bytes.items() for _ in range(updates[name])]


def make_plan(recipe: Recipe) -> RunPlan:
    """Raises: StageError: as `run`."""
    table, clips_from = training_clips(recipe)
    lengths = [c.num_frames for c in table.train]
    frames = [step.padded_frames for step in loads(sampler_on(1, recipe.train, lengths))]
    fewest = PRETRAINED_SPEAKERS if recipe.train.starts_from_generator else 1
    num_speakers = max(table.num_speakers, fewest)
    traced = trace(recipe, table.content_channels, num_speakers, max(frames))
    pace, pace_from, machine = find_pace(recipe, traced, statistics.fmean(frames))
    cluster, pace, assumed = find_cluster(recipe, pace, machine)
    rows = forecasts(
        recipe.train,
        lengths,
        sorted({*WORLD_SIZES, recipe.plan.ranks}),
        pace,
        cluster,
        sent_bytes(recipe.train, traced.gradient_bytes),
        recipe.rate_spec.hop / recipe.data.sample_rate,
    )
    assumed += [
        f"{HIDDEN_SHARE:.0%} of a step's compute hides communication, where no benchmark measured it",
        f"{WORKSPACE_SHARE:.0%} of the traced memory for workspaces, {RUNTIME_BYTES / 1e9:g} GB for libraries",
    ]
    memory = machine.get("memory", {})
    disk = tuple(find_stored(recipe, table.content_channels))
    return RunPlan(recipe, table, clips_from, traced, pace, pace_from, cluster, tuple(assumed), rows, memory, disk)


# What there is to train on


def training_clips(recipe: Recipe) -> tuple[ClipTable, str]:
    """The clips of the run, or what preprocess will make of the recordings; and a word on which of it.

    Raises:
        StageError: there are none.
    """
    work = Workspace(recipe.run_dir, recipe.name)
    if recipe.plan.hours is not None:
        return _clips_of_hours(recipe, recipe.plan.hours), f"{ESTIMATE} of plan.hours {recipe.plan.hours:g}"
    if work.features_report_file.is_file():
        return ClipTable.load(recipe), "the run's clips"
    if work.clips_report_file.is_file():
        clips = list(_cut_clips(recipe, work))
        source = "the run's clips, without features yet"
    else:
        clips = list(_expected_clips(recipe, work))
        source = f"{ESTIMATE} from the durations of the recordings in {recipe.data.audio_dir}"
        if recipe.preprocess.cut_method == "automatic":
            source += ", silences taken for speech"
    spec = recipe.rate_spec
    clips = [c for c in clips if c.num_frames > spec.segment // spec.hop]
    if not clips:
        raise StageError(f"plan: no clip is long enough to train on ({source})")
    silence = round(recipe.preprocess.chunk_len * recipe.data.sample_rate) // spec.hop
    table = ClipTable.split(
        recipe,
        clips,
        lambda speaker: [ClipRef(-1, "00000", speaker, "", silence)] * recipe.extract.include_mutes,
        {"width": CONTENT_WIDTH[recipe.model.version]},
    )
    return table, source


def _clips_of_hours(recipe: Recipe, hours: float) -> ClipTable:
    """Windows as preprocess cuts them of speech that never pauses; whole speakers that are held out take nothing."""
    cut, spec, rate = recipe.preprocess, recipe.rate_spec, recipe.data.sample_rate
    count = max(1, round(hours * 3600 / (cut.chunk_len - cut.overlap_len)))
    clip = ClipRef(0, "00000", 0, "given", round(cut.chunk_len * rate) // spec.hop)
    held = round(recipe.data.holdout * count)
    width = CONTENT_WIDTH[recipe.model.version]
    return ClipTable((clip,) * (count - held), (clip,) * held, width, {"width": width}, PRETRAINED_SPEAKERS)


def _cut_clips(recipe: Recipe, work: Workspace) -> Iterator[ClipRef]:
    for path in unit_files(work.clips_dir):
        header = unit_header(path, ClipsHeader, "preprocess")
        if header["sample_rate"] != recipe.data.sample_rate:
            raise StageError(
                f"{path} holds clips of {header['sample_rate']} Hz, the recipe says data.sample_rate "
                f"{recipe.data.sample_rate}:",
                "run `rvc-dist preprocess` again",
            )
        with safe_open(path, framework="numpy") as file:
            for i in range(len(header["clips"])):
                (num_samples,) = file.get_slice(f"{i:05d}").get_shape()
                yield ClipRef.of(header, int(path.stem), i, num_samples, num_samples // recipe.rate_spec.hop)


def _expected_clips(recipe: Recipe, work: Workspace) -> Iterator[ClipRef]:
    """As preprocess cuts, of recordings that are never silent."""
    rate, hop = recipe.data.sample_rate, recipe.rate_spec.hop
    audio_dir = Path(recipe.data.audio_dir)
    for number, source in enumerate(list_sources(audio_dir, work)[0]):
        if source.reason:
            continue
        try:
            measured = measure(audio_dir, source)
        except decode.AudioError as error:
            logger.warning("%s: left out of the estimate: %s", source.path, error)
            continue
        for part in measured.slices():
            wave = np.broadcast_to(np.float32(0), round(part.duration_s * rate))  # takes no memory
            for start, piece in clip_files.pieces(recipe, wave, has_silences=False):
                where = (part.start_s + start / rate, len(piece) / rate)
                key = f"{start:09d}@{part.start_s:.0f}"
                yield ClipRef(number, key, part.speaker, part.path, len(piece) // hop, *where, repeat=part.repeat)


# What a step takes


def find_pace(recipe: Recipe, traced: TracedStep, mean_frames: float) -> tuple[Pace, str, dict[str, Any]]:
    """The pace, where it comes from in words, and what is known of the machine that it was measured on.

    Raises:
        StageError: nothing was measured, and it cannot be done now.
    """
    config, growing = recipe.plan, traced.growing_share
    if config.step_s is not None:
        growing *= mean_frames / (traced.frames * (1 - growing) + growing * mean_frames)
        return Pace(config.step_s, mean_frames, growing), f"given: plan.step_s {config.step_s:g} s", {}
    if (speed := config.device_tflop_s) is not None:
        work = f"{traced.flops / 1e12:.2f} TFLOP a step at plan.device_tflop_s {speed:g}"
        pace = Pace(traced.flops / (speed * 1e12), traced.frames, growing)
        return pace, f"an ESTIMATE, nothing was measured: {work}", {}
    results = kept_results(recipe)
    if not results:
        measure_now(recipe)
        results = kept_results(recipe)
    return pace_of_results(results, traced)


def kept_results(recipe: Recipe) -> list[dict[str, Any]]:
    """The newest benchmark of the recipe and those that differ from it in the number of ranks alone, fewest first."""
    wanted = recipe_key(recipe)
    results = bench.load_results(Path(recipe.run_dir) / "bench" / "results.json")
    fitting = [r for r in results if wanted.items() <= r["key"].items()]
    if not fitting:
        return []
    newest = fitting[-1]["key"]  # `store` puts it last
    alike = [r for r in fitting if r["key"] | {"ranks": newest["ranks"]} == newest]
    return sorted(alike, key=lambda r: int(r["key"]["ranks"]))


def measure_now(recipe: Recipe) -> None:
    """A short benchmark on this rank, kept like any other.

    Raises:
        StageError: it cannot be done; the message says what to set instead.
    """
    options = replace(recipe.bench, warmup_steps=WARMUP_STEPS, steps=STEPS, plain=False, parity=False)
    stage = bench.Bench(replace(recipe, bench=options), Shard())
    logger.info(
        f"plan: no benchmark of this recipe in {stage.folder}: measuring {STEPS} steps on this machine (plan.step_s or "
        "plan.device_tflop_s spare that)"
    )
    try:
        stage.prepare()
        result = stage.measured()
    except StageError as error:
        raise StageError(
            f"{error}\nplan: a step cannot be measured here;", "set plan.step_s or plan.device_tflop_s"
        ) from error
    bench.store(stage.folder / "results.json", result)


def pace_of_results(results: Sequence[dict[str, Any]], traced: TracedStep) -> tuple[Pace, str, dict[str, Any]]:
    """Of benchmarks that differ in the number of ranks alone, fewest first."""
    first, *_ = results
    ranks, summary = first["key"]["ranks"], first["summary"]
    full_s = summary["series"]["longest"]["wall_s"] if ranks == 1 else summary["communication"]["without_s"]
    frames = summary["longest_frames"]
    fixed, growing = 1 - traced.growing_share, traced.growing_share * frames / traced.frames
    measured = {}
    for result in results:
        if wire := result["summary"].get("communication"):
            exposed = max(0.0, wire["with_s"] - wire["without_s"])
            measured[result["key"]["ranks"]] = Measured(wire["without_s"] / full_s, exposed)
    data_s = summary["series"]["dealt"]["parts"]["data"]["wall_s"]
    key, machine = first["key"], first["machine"]
    counts = ", ".join(str(r["key"]["ranks"]) for r in results)
    chip = key["cpu"] if key["device"] == "cpu" else key["device"]
    source = f"measured on {chip} by steps on {counts} {'rank' if counts == '1' else 'ranks'}: RUN/bench/results.json"
    known = {**machine, "device": key["device"], "memory": summary["memory"]}
    return Pace(full_s, frames, growing / (fixed + growing), data_s, measured), source, known


def find_cluster(recipe: Recipe, pace: Pace, machine: dict[str, Any]) -> tuple[Cluster, Pace, list[str]]:
    """The recipe's cluster, what it leaves open filled in; the pace; and what of all that is assumed, in words.

    Where the recipe gives the bandwidth of a link, what was measured of it does not count any more.
    """
    config, assumed = recipe.plan, []
    free_cores = machine["cores"] / machine["threads"] if machine.get("device") == "cpu" else math.inf
    per_node = config.ranks_per_node
    if per_node is None:
        own = free_cores if free_cores < math.inf else torch.cuda.device_count() or USUAL_RANKS_PER_NODE
        per_node = max(1, int(own))
        assumed.append(f"{ranks_of(per_node)} a node (plan.ranks_per_node)")
    links = {
        "local_bandwidth_gb_s": (config.local_bandwidth_gb_s, LOCAL_BANDWIDTH_GB_S, range(2, per_node + 1)),
        "bandwidth_gb_s": (config.bandwidth_gb_s, BANDWIDTH_GB_S, range(per_node + 1, MOST_RANKS)),
    }
    measured, speeds = dict(pace.measured), {}
    for key, (given, usual, sizes) in links.items():
        known = [w for w in measured if w in sizes]
        if given is not None:
            measured |= {w: measured[w]._replace(exposed_s=None) for w in known}
        elif not known and sizes:
            assumed.append(f"plan.{key} {usual:g} GB/s")
        speeds[key] = (usual if given is None else given) * 1e9
    if not measured:
        assumed.append("ranks of a node do not slow one another down (bench on several ranks would tell)")
        if free_cores < math.inf:
            assumed[-1] += f"; instead of more threads, ranks on a CPU bring {RANKS_FOR_THREADS}"
    cluster = Cluster(per_node, speeds["bandwidth_gb_s"], speeds["local_bandwidth_gb_s"], config.latency_s, free_cores)
    return cluster, replace(pace, measured=measured), assumed


# What is printed


def show(plan: RunPlan) -> None:
    out = console()
    recipe, table = plan.recipe, plan.clips
    model, train = recipe.model, recipe.train
    frames = sum(min(c.num_frames, MAX_CLIP_FRAMES) for c in table.train)
    audio_h = frames * recipe.rate_spec.hop / recipe.data.sample_rate / 3600
    micro = f" x {train.grad_accum_steps}" if train.grad_accum_steps > 1 else ""
    micro += f", {train.keep_global_batch} clips a step" if train.keep_global_batch else ""
    say(
        out,
        f"\n{model.version} {recipe.data.sample_rate} Hz, batch {train.batch_size}{micro}, "
        f"{train.autocast_precision}, {train.optimizer_name}; {len(table.train)} clips, {audio_h:.2f} h "
        f"({'about ' * plan.clips_from.startswith(ESTIMATE)}{len(table.holdout)} held out): {plan.clips_from}\n",
    )
    columns: dict[str, Callable[[Forecast], str]] = {
        "ranks": lambda f: f"{f.ranks}{' <' if f.ranks == recipe.plan.ranks else ''}",
        "steps/epoch": lambda f: str(f.steps_per_epoch),
        "steps": lambda f: str(f.total_steps),
        "s/step": lambda f: f"{f.step_s:.3g}",
        "wall h:mm:ss": lambda f: clock(f.wall_s),
        "audio h/h": lambda f: f"{f.audio_s_per_s:.2f}",
        "efficiency": lambda f: f"{f.efficiency:.0%}",
        "MB sent/step": lambda f: f"{f.sent_bytes / 1e6:.1f}",
        "GB/rank": lambda f: f"{sum(plan.memory_bytes(f.ranks).values()) / 1e9:.2f}",
    }
    print_table(out, [*columns], ([cell(row) for cell in columns.values()] for row in plan.sensible))
    for line in sentences(plan):
        say(out, line)


def clock(seconds: float) -> str:
    """h:mm:ss."""
    minutes, second = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02d}:{second:02d}"


def sentences(plan: RunPlan) -> Iterator[str]:
    train, mine, alone = plan.recipe.train, plan.chosen, plan.rows[1]
    yield (
        f"\n{ranks_of(mine.ranks)}: {mine.total_steps} steps of {mine.global_batch} clips in {clock(mine.wall_s)}, "
        f"{mine.rank_hours:.2f} rank-hours (on 1 rank {alone.total_steps} steps, {alone.rank_hours:.2f}); "
        f"{mine.exposed_s / mine.step_s:.0%} of a step is communication. Not in it: start, validation, checkpoints."
    )
    epochs = [f.total_steps / f.steps_per_epoch for f in (mine, alone)]
    if train.max_steps is not None and mine.total_steps == train.max_steps:
        yield (
            f"train.max_steps {train.max_steps} ends the run: more ranks do not shorten it, they see more clips in it: "
            f"{epochs[0]:.1f} epochs instead of {epochs[1]:.1f} on 1 rank."
        )
    elif mine.ranks > 1:
        yield (
            f"train.max_epochs {train.max_epochs} ends the run: {ranks_of(mine.ranks)} make {mine.total_steps} updates "
            f"of the weights, 1 rank {alone.total_steps}. If that is too few, raise train.max_epochs."
        )
    limit = plan.verdict()
    past = " The recipe's ranks are past that." if mine.ranks > limit.ranks else ""
    yield f"More ranks pay up to {limit.ranks}; what ends it is {limit.reason}.{past}"
    yield f"Clips: {plan.clips_from}."
    yield f"Step time: {plan.pace_from}."
    yield f"Assumed: {'; '.join(plan.assumed)}."
    parts = plan.memory_bytes(mine.ranks)
    listed = ", ".join(f"{name} {num_bytes / 1e9:.2f}" for name, num_bytes in parts.items())
    line = (
        f"Memory of a rank, longest clips ({plan.traced.frames} frames), {sum(parts.values()) / 1e9:.2f} GB: {listed}."
    )
    if plan.bench_memory:
        measured = ", ".join(f"{num_bytes / 1e9:.2f} GB {name}" for name, num_bytes in plan.bench_memory.items())
        line += f" bench measured {measured}."
    yield line
    yield f"Disk, for each hour of clips: {', '.join(stored.text() for stored in plan.disk)}."


def ranks_of(count: int) -> str:
    return f"{count} rank" if count == 1 else f"{count} ranks"
