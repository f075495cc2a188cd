"""What launch/gpu_check.sh measures on a machine with a GPU: `python -m rvc_dist.tools.gpu_check FOLDER PART`.

Each part is a process of its own. It prints a row as soon as it knows one and keeps it in FOLDER/rows.jsonl, so that a
part that fails or is cut short takes nothing from the others. The part `table` puts all rows into tables and into
FOLDER/gpu_check.json. Weights are random, of the shapes that users' networks have; with --tiny all is as small as can
be, to try the check itself on a machine without GPU.
"""

from __future__ import annotations

import argparse
import gc
import json
import logging
import os
import platform
import sys
import textwrap
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cache, cached_property, partial
from importlib import import_module, metadata
from itertools import islice
from pathlib import Path
from typing import Any, Literal, TypeAlias

import numpy as np
import torch
from torch import nn

from rvc_dist.choices import F0_METHODS, OPTIMIZERS, resolve
from rvc_dist.config import F0_PER_S, FEATURE_RATE, DataConfig, ExtractConfig, ModelConfig, Recipe, TrainConfig
from rvc_dist.data.audio import Wave
from rvc_dist.features import content, crepe, djcm, f0, penn, precision, rmvpe
from rvc_dist.features.extractor import Extractor
from rvc_dist.features.hub import make_torchaudio_importable
from rvc_dist.files import write_json
from rvc_dist.models.generator import Generator
from rvc_dist.models.shape import GeneratorShape
from rvc_dist.runtime import device as devices
from rvc_dist.tools import bench, bench_report
from rvc_dist.tools.measuring import MeasuredRun, Span, flop_counter, stopwatch
from rvc_dist.tools.peak import measured_peak
from rvc_dist.tools.tables import console, print_table, say
from rvc_dist.tools.tracing import tensor_bytes
from rvc_dist.train import networks
from rvc_dist.train.dataset import ClipTable
from rvc_dist.train.optimizers import make_optimizer, step_if
from rvc_dist.voice.file import Voice
from rvc_dist.voice.infer import Converter
from rvc_dist.voice.windows import convert
from rvc_dist.workspace import Shard, StageError

logger = logging.getLogger(__name__)

Row = dict[str, Any]
Rows = Iterator[tuple[str, Callable[[], Row]]]
"""Of a part: what each row is of, and what measures it."""

PACKAGES = ("accelerate", "transformers", "numpy", "faiss", "soundfile", "soxr", "torchcrepe", "deepspeed")
FAST: dict[str, Any] = {"fast_train": True, "compile": "never"}
STEPS: dict[str, dict[str, Any]] = {
    "plain": {},
    "fp32": {},
    "TF32": FAST,
    "bf16": FAST | {"precision": "bf16"},
    "fp16": FAST | {"precision": "fp16"},
    "bf16_adamw": FAST | {"bf16_adamw": True},
    "compiled": FAST | {"precision": "bf16", "compile": "always"},
    "CUDA graphs": FAST | {"precision": "bf16", "compile": "graphs"},
}
"""Settings of train for each way to take a step; plain is that of other trainers, in float32."""
Precision: TypeAlias = Literal["fp32", "bf16", "fp16"]
MOST_S = 3.0
"""A row's measurement, where a call takes long; at least two calls."""
SMALL = ModelConfig(
    inter_channels=16,
    hidden_channels=16,
    filter_channels=32,
    num_layers=1,
    upsample_initial_channel=32,
    gin_channels=8,
    discriminator_channels=64,
)
SMALL_ENCODER: dict[str, dict[str, Any]] = {
    "hubert": {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "conv_dim": (8,) * 7},
    "whisper": {"d_model": 16, "encoder_layers": 1, "encoder_attention_heads": 2},
}
ENCODERS: dict[str, dict[str, Any]] = {
    "hubert": {},  # transformers' defaults are HuBERT base, which contentvec and spin are, too
    "wavlm": {},
    "whisper": {"d_model": 768, "encoder_layers": 12, "encoder_attention_heads": 12, "encoder_ffn_dim": 3072},
}
"""Base and, of Whisper, small."""

TRACKERS: dict[str, Callable[[], nn.Module]] = {
    "rmvpe": rmvpe.RMVPE,
    "penn": penn.FCNF0,
    "djcm": djcm.DJCM,
    "crepe": partial(crepe.Crepe, "full"),
}
"""Whose weights are downloaded."""


class LeftOutError(RuntimeError):
    """This machine cannot do it, which is no fault."""


@dataclass(frozen=True)
class Check:
    folder: Path
    tiny: bool

    @property
    def batch_sizes(self) -> tuple[int, ...]:
        return (1,) if self.tiny else (4, 8, 16)

    @property
    def precisions(self) -> tuple[Precision, ...]:
        """Of extraction; a CPU takes minutes for fp16."""
        return ("fp32", "bf16") if self.tiny else ("fp32", "bf16", "fp16")

    @cached_property
    def device(self) -> torch.device:
        return devices.local_device()

    @property
    def recipe(self) -> Recipe:
        small = {"data": DataConfig(sample_rate=24000), "model": SMALL} if self.tiny else {}
        return Recipe(name="gpu_check", run_dir=str(self.folder / "run"), **small)  # type: ignore[arg-type]

    def with_train(self, **train: Any) -> Recipe:
        recipe = replace(self.recipe, train=TrainConfig(**train))
        try:
            advice = devices.check_precision(recipe.train.autocast_precision, self.device)
        except StageError as error:
            raise LeftOutError(error) from error
        if recipe.train.compile == "graphs" and self.device.type != "cuda":
            raise LeftOutError("CUDA has them")
        if advice and self.device.type == "cpu":
            raise LeftOutError(advice[0])
        return recipe

    @cached_property
    def clips(self) -> list[Wave]:
        """Of the demo voice, each as long, at 16 kHz."""
        waves = [wave for _, _, wave in islice(bench.demo_clips(FEATURE_RATE), 8)]
        return [waves[0][:FEATURE_RATE]] if self.tiny else waves

    def timed(self, work: Callable[[], object]) -> Span:
        """One call, the first not counted: the mean of several, or of as many as MOST_S has room for."""
        with stopwatch(self.device) as first:
            work()
        count = 1 if self.tiny else max(2, min(10, int(MOST_S / first.wall_s)))
        with stopwatch(self.device) as span:
            for _ in range(count):
                work()
        return Span(span.wall_s / count, span.cpu_s / count)


def machine(check: Check) -> Rows:
    yield "this machine", partial(describe, check)
    for name, tf32 in {"fp32": False, "TF32": True, "bf16": True, "fp16": True}.items():
        yield f"peak {name}", partial(peak_row, check, name, tf32)
    yield "copying memory", partial(copy_row, check)


def describe(check: Check) -> Row:
    versions = {}
    for name in PACKAGES:
        try:
            import_module(name)
            versions[name] = metadata.version({"faiss": "faiss-cpu"}.get(name, name))
        except (ImportError, OSError) as error:
            versions[name] = f"missing ({error})"
    found: Row = {"python": platform.python_version(), "torch": torch.__version__} | versions
    if check.device.type == "cuda":
        card = torch.cuda.get_device_properties(check.device)
        found |= {"card": card.name, "cards": torch.cuda.device_count(), "GB": card.total_memory / 1e9}
        found |= {"capability": f"{card.major}.{card.minor}", "cuda": torch.version.cuda}
    return found


def peak_row(check: Check, name: str, tf32: bool) -> Row:
    if name == "TF32" and not devices.has_tf32(check.device):
        raise LeftOutError("not in this hardware")
    devices.apply_kernel_settings(check.with_train(fast_train=tf32, precision="fp32" if name == "TF32" else name).train)
    began_at = time.perf_counter()
    dtype = devices.PRECISIONS.get(name, torch.float32)
    return {"TFLOP/s": measured_peak(check.device, dtype) / 1e12, "measured in s": time.perf_counter() - began_at}


def copy_row(check: Check) -> Row:
    source = torch.zeros(1 << (20 if check.tiny else 28), device=check.device)
    target = torch.empty_like(source)
    return {"GB/s": 2 * source.nbytes / 1e9 / check.timed(lambda: target.copy_(source)).wall_s}


def steps(check: Check, *names: str) -> Rows:
    for name in names:
        for size in check.batch_sizes:
            yield f"{name}, batch {size}", partial(measured_step, check, name, size)


def scaling(check: Check) -> Rows:
    """Under a launcher: the same steps on several ranks."""
    size = check.batch_sizes[-1]
    yield f"batch {size} a rank", partial(measured_step, check, "fp32" if check.tiny else "bf16", size)


@cache
def peak_of(device: torch.device, dtype: torch.dtype, fast_train: bool) -> float:
    """With the kernel settings of now, which are those of fast_train or not."""
    return measured_peak(device, dtype)


def measured_step(check: Check, name: str, size: int) -> Row:
    """Steps on the longest clips; as in training, the host does not wait for the device between them."""
    gc.collect()  # of networks and optimizers that refer to one another: the last size's memory is needed
    recipe, device = check.with_train(batch_size=size, **STEPS[name]), check.device
    stage = bench.Bench(recipe, Shard())
    if int(os.environ.get("RANK", "0")) == 0:
        stage.prepare()
    run = MeasuredRun(stage.recipe())
    batches = run.longest()
    work: Callable[[], object] = partial(run.train_step, batches)
    if name == "plain":
        work = partial(run.plain_step, run.plain("fp32"), batches)
        with flop_counter() as counter:
            work()
        num_operations = counter.get_total_flops()
    else:
        num_operations = sum(run.count_flops(batches).values())
    with stopwatch(device) as first:
        work()
    run.forget_peak_memory()
    span = check.timed(work)
    seconds, spent = span.wall_s, span.wall_s if device.type == "cuda" else span.cpu_s
    peak = peak_of(device, devices.PRECISIONS[recipe.train.autocast_precision], recipe.train.fast_train)
    share = num_operations / spent / peak
    row = {
        "ranks": run.num_ranks,
        "s": seconds,
        "audio s/s": run.loader.audio_s(batches) / seconds,
        "TFLOP": num_operations / 1e12,
        "utilisation": share if share <= 1 else None,
        **{f"GB {kind}": num_bytes / 1e9 for kind, num_bytes in run.peak_memory().items()},
        "first step s": first.wall_s,
    }
    return row | (launches(work, device) if size == check.batch_sizes[0] else {})


def launches(work: Callable[[], object], device: torch.device) -> Row:
    """How often a step launches kernels or graphs of them, and the seconds that the device spends in them."""
    if device.type != "cuda":
        return {}
    kinds = torch.profiler.ProfilerActivity
    with torch.profiler.profile(activities=[kinds.CPU, kinds.CUDA]) as profile:
        work()
        devices.synchronize(device)
    events = profile.key_averages()
    names = ("cudaLaunch", "cuLaunch", "cudaGraphLaunch")
    in_kernels = sum(e.self_device_time_total for e in events if e.device_type.name == "CUDA")
    return {"launches": sum(e.count for e in events if e.key.startswith(names)), "s in kernels": in_kernels / 1e6}


def optimizers(check: Check) -> Rows:
    for name in OPTIMIZERS:
        yield name, partial(optimizer_row, check, name)


def optimizer_row(check: Check, name: str) -> Row:
    """One update of both networks."""
    config = replace(check.recipe.train, optimizer=name)
    modules = both_networks(check)
    made = [make_optimizer(config, module) for module in modules]
    good = torch.ones((), dtype=torch.bool, device=check.device)

    def update() -> None:
        for optimizer in made:
            step_if(optimizer, good)

    seconds = check.timed(update).wall_s
    numbers = sum(p.numel() for module in modules for p in module.parameters())
    state = sum(tensor_bytes(list(optimizer.state.values())) for optimizer in made)
    return {"ms": seconds * 1e3, "ns a weight": seconds * 1e9 / numbers, "bytes of state a weight": state / numbers}


@cache
def both_networks(check: Check) -> list[nn.Module]:
    _, modules = networks.build(check.recipe, ClipTable((), (), 768, {}, 1))
    for module in modules.values():
        for parameter in module.to(check.device).parameters():
            parameter.grad = 1e-3 * torch.randn_like(parameter)
    return list(modules.values())


def extraction(check: Check) -> Rows:
    for kind in ENCODERS:
        for name in check.precisions:
            yield f"{kind} {name}", partial(features_row, check, name, kind, "")
    for method, spec in F0_METHODS.items():
        # Those of signal processing are the CPU's; the sizes of crepe in the middle lie between the two at the ends;
        # DJCM takes a CPU many seconds.
        left_out = ("crepe-large", "crepe-medium", "crepe-small", *(("djcm",) if check.tiny else ()))
        if "f0_signal" not in str(spec.make) and method not in left_out:
            for name in check.precisions[::2]:
                yield f"{method} {name}", partial(features_row, check, name, "", method)


def features_row(check: Check, name: Precision, kind: str, method: str) -> Row:
    try:
        precision.check_device(name, check.device)
    except StageError as error:
        raise LeftOutError(error) from error
    config = replace(extract_config(check, kind, method), precision=name)
    waves = torch.from_numpy(np.stack(check.clips))
    make = content.load_embedder(config, "v2", check.device) if kind else f0.load_f0(config, check.device)
    seconds = check.timed(lambda: make(waves).cpu()).wall_s
    return {"ms a clip": seconds * 1e3 / len(waves), "audio s/s": waves.numel() / FEATURE_RATE / seconds}


def extract_config(check: Check, kind: str, method: str) -> ExtractConfig:
    """With files of random weights for the encoder and the tracker, made when they are first asked for."""
    config = ExtractConfig(f0_method=method or "rmvpe", embedder_model="mfcc")
    if kind:
        folder = check.folder / kind
        if not folder.is_dir():
            make_torchaudio_importable()
            model = resolve(content.MODELS[kind])
            sizes = SMALL_ENCODER.get(kind, SMALL_ENCODER["hubert"]) if check.tiny else ENCODERS[kind]
            model(model.config_class(**sizes)).save_pretrained(folder)
        config = replace(config, embedder_model=str(folder))
    if network := TRACKERS.get(method):
        path = check.folder / f"{method}.pt"
        if not path.is_file():
            torch.save(network().state_dict(), path)
        name = str(path)
        config = replace(config, f0_model=name, f0_penn_model=name, f0_djcm_model=name, f0_crepe_model=name)
    return config


def conversion(check: Check) -> Rows:
    for kind, method in (("hubert", "rmvpe"), ("hubert", "yin")):
        yield f"{kind}, {method}", partial(conversion_row, check, kind, method)


def conversion_row(check: Check, kind: str, method: str) -> Row:
    recipe = replace(check.recipe, extract=extract_config(check, kind, method))
    extractor = Extractor.load(recipe)
    shape = GeneratorShape.from_recipe(recipe, extractor.embedder.width, 1)
    generator = Generator(shape, without_posterior=True).to(check.device).eval()
    voice = Voice(generator, extractor.embedder.identity, "v2")
    converter = Converter(voice, extractor, None, recipe, check.device, 0)
    wave = np.tile(np.concatenate(check.clips), 1 if check.tiny else 5)
    window = round(recipe.infer.window_s * F0_PER_S)
    seconds = check.timed(lambda: sum(map(len, convert(converter, iter([wave]), voice.rate, window)))).wall_s
    length_s = len(wave) / FEATURE_RATE
    return {"s": seconds, "recording s": length_s, "audio s/s": length_s / seconds}


def parity(check: Check) -> Rows:
    for settings in ({"bf16_adamw": True}, {"precision": "fp16"}):
        (key,) = settings
        yield f"{key} {settings[key]}", partial(parity_row, check, settings)


def parity_row(check: Check, settings: dict[str, Any]) -> Row:
    """Mean relative difference of each loss from float32 over as many steps as bench takes; its table is printed."""
    recipe = check.with_train(batch_size=check.batch_sizes[0], **FAST, **settings)
    options = replace(recipe.bench, parity=True, steps=2 if check.tiny else 20)
    stage = bench.Bench(replace(recipe, bench=options), Shard())
    stage.prepare()
    result = stage.measured()
    bench_report.show_parity(result)
    compared = result["compared"].items()
    return {name: row["relative"] if row else None for name, row in compared if name.startswith("loss/")}


PARTS: dict[str, Callable[..., Rows]] = {
    "machine": machine,
    "steps": steps,
    "scaling": scaling,
    "optimizers": optimizers,
    "extraction": extraction,
    "conversion": conversion,
    "parity": parity,
}
MISSING = (LeftOutError, ImportError, FileNotFoundError, torch.OutOfMemoryError)
"""What a row may end with, itself or as the cause, that is no fault: this machine has not what it needs."""
FAULTS = (StageError, RuntimeError, ValueError, TypeError, LookupError, OSError)
"""Others that are kept as failed, and the part goes on."""


def measure(check: Check, part: str, *names: str) -> bool:
    """All rows of a part, printed and kept one by one: whether none of them failed."""
    succeeded = True
    for what, work in PARTS[part](check, *names):
        try:
            row = work()
        except (*MISSING, *FAULTS) as error:
            is_fault = not isinstance(error, MISSING) and not isinstance(error.__cause__, MISSING)
            if is_fault:
                logger.exception("%s: %s", part, what)
            row = {"FAILED" if is_fault else "left out": textwrap.shorten(str(error), 200)}
            succeeded &= not is_fault
        if int(os.environ.get("RANK", "0")) == 0:
            say(console(), f"{part}: {what}: " + ", ".join(f"{key} {shown(key, row[key])}" for key in row))
            with (check.folder / "rows.jsonl").open("a") as file:
                file.write(json.dumps({"part": part, "what": what} | row) + "\n")
    return succeeded


def shown(key: str, value: Any) -> str:
    if key == "utilisation":
        return "error: above the measured peak" if value is None else f"{value:.1%}"
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def table(check: Check) -> None:
    """All that was measured, part by part."""
    rows = [json.loads(line) for line in (check.folder / "rows.jsonl").read_text().splitlines()]
    for part in PARTS:
        mine = [row for row in rows if row["part"] == part]
        columns = list(dict.fromkeys(key for row in mine for key in row if key not in ("part", "what")))
        cells = ([row["what"], *(shown(key, row[key]) if key in row else "" for key in columns)] for row in mine)
        if part == "machine":
            cells = ([f"{row['what']}: {key}", shown(key, row[key])] for row in mine for key in columns if key in row)
            columns = [""]
        if mine:
            say(console(), f"\n{part}")
            print_table(console(), ["", *columns], cells)
    write_json(check.folder / "gpu_check.json", rows)
    say(console(), f"\nwritten: {check.folder / 'gpu_check.json'}")


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m rvc_dist.tools.gpu_check", description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("part", choices=[*PARTS, "table"])
    parser.add_argument("names", nargs="*", help=f"of the part steps: {', '.join(STEPS)}")
    parser.add_argument("--tiny", action="store_true")
    options = parser.parse_args()
    logging.basicConfig(level=logging.WARNING)
    devices.set_allocator(TrainConfig(fast_train=True))
    options.folder.mkdir(parents=True, exist_ok=True)
    check = Check(options.folder, options.tiny)
    if options.part == "table":
        table(check)
        return 0
    return 0 if measure(check, options.part, *options.names) else 1


if __name__ == "__main__":
    sys.exit(main())
