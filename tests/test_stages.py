"""What each stage reads of the recipe is what its entry says, in small runs of all of them."""

from __future__ import annotations

import contextlib
import sys
from dataclasses import asdict, replace
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
import soundfile
from helpers import RATE, SteadyPitch, narrow_recipe, tone

from rvc_dist import config
from rvc_dist.arguments import sections
from rvc_dist.choices import F0_METHODS, F0Spec
from rvc_dist.config import (
    BenchConfig,
    DataConfig,
    ExtractConfig,
    InferConfig,
    ModelConfig,
    PlanConfig,
    PreprocessConfig,
    Recipe,
    TrainConfig,
)
from rvc_dist.stages import STAGES
from rvc_dist.tools import plan
from rvc_dist.tools.tracing import TracedStep
from rvc_dist.workspace import Shard, StageError

WHOLE = {"__post_init__", "to_dict", "replace", "__eq__"}
"""Functions that look at all keys of a recipe, and decide nothing by them."""


def reader(frame: FrameType | None) -> str:
    """Who reads: the module of the first frame outside of dataclasses, or "" where the recipe is only copied."""
    while frame is not None:
        if frame.f_code.co_name in WHOLE:
            return ""
        if frame.f_globals.get("__name__") not in ("dataclasses", "copy", config.__name__):
            return str(frame.f_globals["__name__"])
        frame = frame.f_back
    return ""


@pytest.fixture
def found(monkeypatch: pytest.MonkeyPatch) -> set[str]:
    """The keys that are read, as they are."""
    keys: set[str] = set()
    kinds = {"": Recipe}
    for section, _, own in sections():
        names = {key.name.rpartition(".")[2]: key.name for key in own if not key.is_section}
        names = names if section != "extract.embedder_mix" else {}  # which voice files have as well
        kinds |= {key.name: key.kind for key in own if key.is_section}

        def get(self: object, name: str, names: dict[str, str] = names) -> Any:
            if name in names and names[name] not in keys and reader(sys._getframe(1)):
                keys.add(names[name])
            return object.__getattribute__(self, name)

        monkeypatch.setattr(kinds[section], "__getattribute__", get, raising=False)
    return keys


TRACED = TracedStep(100, 400, {"generator": 300, "discriminator": 100}, 800, 4000, flops=2e9, flops_per_frame=1e7)
OF_ALL = ("name", "run_dir")
"""Every command with a recipe reads them, for its log."""
NOT_RUN = {"push": "needs a hub", "demo": "run and infer", "run": "the five stages", "report": "shows all keys"}


@pytest.mark.slow
def test_a_stage_reads_what_its_entry_says(found: set[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing else, and of each section or key something: so its help is neither too short nor too long."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setitem(F0_METHODS, "pm", F0Spec(SteadyPitch))
    # A trace takes 20 s: it builds the networks, of all keys of `model`.
    monkeypatch.setattr(plan, "trace", lambda recipe, *_: replace(TRACED, frames=100 * bool(asdict(recipe.model))))
    Path("audio").mkdir()
    for number in range(2):
        soundfile.write(f"audio/{number}.wav", tone(8.0, f0_hz=150 + number), RATE)
    recipe = narrow_recipe(
        Path(),
        preprocess=PreprocessConfig(normalization="lufs", clean_dataset=True, cut_method="simple"),
        extract=ExtractConfig(f0_method="pm", embedder_model="mfcc", f0_autotune=True),
        train=TrainConfig(max_steps=2, batch_size=2, eval_every_steps=2, overtrain_detect=True, report=False),
        infer=InferConfig(input="audio/0.wav", output="converted.wav", autotune=0.5),
        bench=BenchConfig(warmup_steps=1, steps=1),
        plan=PlanConfig(ranks=2, step_s=1.0),
    )
    experiment = replace(recipe.export, format="applio", folder="experiment")
    imported = replace(recipe, run_dir="imported", data=replace(recipe.data, audio_dir="experiment"))
    there = replace(recipe.data, remote=Path("there").absolute().as_uri(), cache_dir="cache")
    elsewhere = replace(recipe, run_dir="elsewhere", data=there)
    pretrained = replace(recipe, model=ModelConfig(), data=DataConfig(), train=TrainConfig(pretrained="rvc"))
    voices = ["run/voice/tiny_last.pth"] * 2
    runs: list[tuple[str, Recipe, dict[str, Any]]] = [
        *((name, recipe, {}) for name in ("plan", "preprocess", "extract", "index", "train", "export", "infer")),
        ("export", replace(recipe, export=experiment), {}),
        ("upload", replace(recipe, data=there), {}),
        ("train", elsewhere, {}),
        ("import", imported, {}),
        *((name, recipe, {}) for name in ("doctor", "plan", "bench")),
        ("fetch", pretrained, {}),
        ("dataset", recipe, {"folders": ["audio", "run"]}),
        ("status", recipe, {"runs": [], "given": [], "as_json": False, "watches": False}),
        ("inspect", recipe, {"paths": ["run", *voices]}),
        ("blend", recipe, dict(zip(("first", "second"), voices, strict=True))),
    ]
    reads: dict[str, set[str]] = {}
    for name, of_stage, more in runs:
        found.clear()
        with contextlib.suppress(StageError) if name == "fetch" else contextlib.nullcontext():  # without network
            STAGES[name].load()(of_stage, Shard(), **more)
        reads.setdefault(name, set()).update(found)
    assert {*reads, *NOT_RUN} == {name for name, stage in STAGES.items() if stage.reads}
    undeclared, untouched = [], []
    for name, keys in reads.items():
        entries = f"{STAGES[name].reads} {STAGES[name].checks}".split()
        touched = {key: {entry for entry in entries if f"{key}.".startswith(f"{entry}.")} for key in keys}
        undeclared += [f"{name}: {key}" for key in sorted(keys) if not touched[key]]
        decisive = STAGES[name].reads.split()
        untouched += [f"{name}: {entry}" for entry in decisive if entry not in set().union(*touched.values(), OF_ALL)]
    assert (undeclared, untouched) == ([], [])
