"""The recipe: what it refuses, and that it says everything that is wrong at once."""

from __future__ import annotations

import dataclasses
import itertools
import math
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from helpers import parse_recipe

from rvc_dist.choices import BASE_MODELS
from rvc_dist.config import RATES, ConfigError, EmbedderMix, Recipe, load_recipe

NAN = math.nan


def build(values: dict[str, Any]) -> Recipe:
    """A recipe with `values` under their full keys."""

    def replaced(node: Any, path: list[str], value: Any) -> Any:
        # Around __init__, which would refuse the first wrong value before the next is set.
        copy = object.__new__(type(node))
        copy.__dict__.update(node.__dict__)
        copy.__dict__[path[0]] = replaced(getattr(node, path[0]), path[1:], value) if path[1:] else value
        return copy

    tree = Recipe()
    for key, value in values.items():
        tree = replaced(tree, key.split("."), value)
    return Recipe(**{f.name: getattr(tree, f.name) for f in dataclasses.fields(Recipe)})


def test_the_defaults_are_valid_and_documented_ones() -> None:
    recipe = Recipe()
    assert (recipe.data.sample_rate, recipe.preprocess.chunk_len, recipe.preprocess.overlap_len) == (48000, 3.0, 0.3)
    assert (recipe.preprocess.cut_method, recipe.preprocess.normalization) == ("automatic", "post")
    assert (recipe.train.batch_size, recipe.train.learning_rate, recipe.train.seed) == (4, 1e-4, 1234)
    assert (recipe.train.loss.mel, recipe.train.loss.kl, recipe.index.nprobe) == (45.0, 1.0, 9)


WRONG = [
    ("name", ""),
    ("name", "a/b"),
    ("name", ".hidden"),
    ("data.sample_rate", 22050),
    ("data.holdout", -0.01),
    ("data.holdout", 0.51),
    ("data.holdout", NAN),
    ("preprocess.chunk_len", 0.99),
    ("preprocess.chunk_len", 9.01),
    ("preprocess.overlap_len", -0.1),
    ("preprocess.overlap_len", 1.6),
    ("preprocess.overlap_len", NAN),
    ("preprocess.num_workers", 0),
    ("extract.f0_min", 0.0),
    ("extract.f0_max", 50.0),
    ("extract.f0_max", 4001.0),
    ("extract.embedder_mix.layers", [12, 9]),
    ("extract.embedder_mix.layers", [9, 9]),
    ("extract.embedder_mix.layers", [-1, 9]),
    ("extract.embedder_mix.ratio", -0.1),
    ("extract.embedder_mix.ratio", 1.1),
    ("extract.embedder_mix.ratio", NAN),
    ("extract.include_mutes", -1),
    ("extract.batch_clips", 0),
    ("extract.num_threads", 0),
    ("index.nprobe", 0),
    ("index.recall", 1.5),
    ("index.recall", -0.1),
    ("model.inter_channels", 3),
    ("model.hidden_channels", 0),
    ("model.num_heads", 5),
    ("model.num_layers", 0),
    ("model.filter_channels", 0),
    ("model.gin_channels", 0),
    ("model.upsample_initial_channel", 48),
    ("model.discriminator_channels", 100),
    ("train.batch_size", 0),
    ("train.max_epochs", 0),
    ("train.max_steps", 0),
    ("train.learning_rate", 0.0),
    ("train.learning_rate", NAN),
    ("train.lr_decay", 1.1),
    ("train.warmup_steps", -1),
    ("train.max_grad_norm", 0.0),
    ("train.seed", -1),
    ("train.save_every_steps", 0),
    ("train.save_every_epochs", 0),
    ("train.keep_checkpoints", 0),
    ("train.eval_every_steps", 0),
    ("train.log_every_steps", 0),
    ("train.overtrain_threshold", 0),
    ("train.num_workers", -1),
    ("train.loss.mel", -1.0),
    ("train.loss.adv", -0.1),
    ("infer.pitch", 49.0),
    ("infer.index_rate", 1.1),
    ("infer.protect", 0.6),
    ("infer.speaker", -1),
    ("infer.window_s", 1.0),
    ("infer.output", "a.m4a"),
    ("infer.f0_method", "rmvp"),
    ("infer.format", "m4a"),
]


@pytest.mark.parametrize(("key", "value"), WRONG)
def test_a_wrong_value_is_refused_under_its_full_key(key: str, value: Any) -> None:
    with pytest.raises(ConfigError) as caught:
        build({key: value})
    lines = str(caught.value).splitlines()
    assert [line.split(":")[0] for line in lines] == [key]
    assert lines[0].startswith(f"{key}: got {value!r}" if isinstance(value, str) else f"{key}: got {value}")
    assert ", expected " in lines[0]


@pytest.mark.parametrize(
    ("key", "value"),
    [
        *(("data.sample_rate", rate) for rate in (24000, 32000, 40000, 44100, 48000)),
        ("data.holdout", 0.0),
        ("data.holdout", 0.5),
        ("preprocess.chunk_len", 1.0),
        ("preprocess.chunk_len", 9.0),
        ("preprocess.overlap_len", 0.0),
        ("preprocess.overlap_len", 1.5),
        ("extract.embedder_mix.layers", (0, 12)),
        ("extract.embedder_mix.ratio", 0.0),
        ("extract.embedder_mix.ratio", 1.0),
        ("extract.include_mutes", 0),
        ("extract.f0_max", 4000.0),
        ("model.inter_channels", 2),
        ("model.upsample_initial_channel", 32),
        ("model.discriminator_channels", 64),
        ("train.max_steps", None),
        ("train.max_grad_norm", None),
        ("train.lr_decay", 1.0),
        ("train.warmup_steps", 0),
        ("train.num_workers", 0),
        ("train.loss.mel", 0.0),
        ("infer.protect", 0.5),
        ("infer.index_rate", 0.0),
        ("infer.output", "b/a.FLAC"),
        ("name", "Ünï voice 2"),
    ],
)
def test_the_edges_of_every_range_are_accepted(key: str, value: Any) -> None:
    node: Any = build({key: value})
    for part in key.split("."):
        node = getattr(node, part)
    assert node == value


def test_each_recipe_has_a_run_folder_of_its_own() -> None:
    recipes = [load_recipe(path) for path in (Path(__file__).parent.parent / "configs").glob("*.yaml")]
    assert len({r.run_dir for r in recipes}) == len({r.name for r in recipes}) == len(recipes) >= 8
    assert Recipe(name="ann").run_dir == "runs/ann"
    assert Recipe(name="ann", run_dir="here").run_dir == "here"


def test_all_problems_are_told_at_once() -> None:
    wrong = {
        "name": "a/b",
        "data.sample_rate": 1,
        "preprocess.chunk_len": 10.0,
        "preprocess.overlap_len": 11.0,
        "extract.f0_min": 0.0,
        "index.nprobe": 0,
        "model.num_layers": 0,
        "train.batch_size": 0,
        "train.loss.kl": -1.0,
        "infer.protect": 1.0,
    }
    with pytest.raises(ConfigError) as caught:
        build(wrong)
    assert sorted(line.split(":")[0] for line in str(caught.value).splitlines()) == sorted(wrong)


def test_two_settings_that_contradict_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"train\.optimizer: got radam with train\.bf16_adamw"):
        build({"train.optimizer": "radam", "train.bf16_adamw": True})
    with pytest.raises(ConfigError, match=r"train\.precision: got fp16 with train\.bf16_adamw"):
        build({"train.precision": "fp16", "train.bf16_adamw": True})
    recipe = build({"train.bf16_adamw": True})
    assert recipe.train.autocast_precision == "bf16"
    assert recipe.train.optimizer_name == "anyprecision_adamw"


@pytest.mark.parametrize(
    ("values", "reason"),
    [
        ({"train.pretrained_d": "D.pth"}, "got rvc with train.pretrained_g or train.pretrained_d; set only one"),
        (
            {"data.sample_rate": 44100},
            "no weights for v2 at 44100 Hz with pitch guidance and hifi-gan; no base model has",
        ),
        ({"train.pretrained": "titan", "model.version": "v1"}, "no weights for v1 at 48000 Hz .*; expected rvc$"),
        (
            {"train.pretrained": "rin-e3", "data.sample_rate": 32000},
            "at 32000 Hz .*; expected rvc or titan or ov2super or klm4$",
        ),
        ({"train.pretrained": "klm4", "model.pitch_guidance": False}, "without pitch guidance .*; expected rvc$"),
        ({"train.pretrained": "titn"}, "did you mean titan"),
    ],
)
def test_a_base_model_goes_with_the_recipe_or_is_refused(values: dict[str, Any], reason: str) -> None:
    with pytest.raises(ConfigError, match=rf"train\.pretrained: .*{reason}"):
        build({"train.pretrained": "rvc"} | values)


def test_base_models_have_the_files_that_are_published() -> None:
    files = build({"train.pretrained": "rvc", "data.sample_rate": 40000}).base_model_files
    assert [file.path for file in files.values()] == ["pretrained_v2/f0G40k.pth", "pretrained_v2/f0D40k.pth"]
    nameless = build({"train.pretrained": "rvc", "model.version": "v1", "model.pitch_guidance": False})
    assert [file.path for file in nameless.base_model_files.values()] == ["pretrained/G48k.pth", "pretrained/D48k.pth"]
    assert Recipe().base_model_files == {}
    for name, spec in BASE_MODELS.items():
        kinds = itertools.product(RATES, RATES["v2"], (True, False))
        reached = [file.path for kind in kinds for file in spec.files(*kind).values()]
        assert sorted(reached) == sorted(spec.hashes), name
        assert all(re.fullmatch("([0-9a-f]{64})?", sha256) for sha256 in spec.hashes.values()), name


def test_nothing_can_be_changed_after_loading() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        Recipe().name = "b"  # type: ignore[misc]
    with pytest.raises(dataclasses.FrozenInstanceError):
        Recipe().train.loss.mel = 1.0  # type: ignore[misc]


@pytest.mark.parametrize("version", ["v1", "v2"])
def test_upsampling_makes_a_hop_and_segments_are_whole_frames(version: str) -> None:
    assert sorted(RATES[version]) == [24000, 32000, 40000, 44100, 48000]
    for rate, spec in RATES[version].items():
        assert math.prod(spec.upsample_rates) == spec.hop
        assert len(spec.upsample_rates) == len(spec.upsample_kernels)
        assert spec.segment % spec.hop == 0
        assert spec.hop == (512 if rate == 44100 else rate // 100)
        assert build({"data.sample_rate": rate, "model.version": version}).rate_spec is spec


# Files and the command line


@pytest.mark.parametrize("name", ["Ünï", "1e3", "2026-11-26", "yes"])  # texts, whatever YAML takes them for
def test_a_recipe_file_comes_back(name: str, tmp_path: Path) -> None:
    values = {"name": name, "train.loss.mel": 15.0, "train.max_steps": 7, "preprocess.cut_method": "simple"}
    recipe = build(values | {"extract.embedder_mix.layers": (9, 10), "extract.embedder_mix.ratio": 0.25})
    path = tmp_path / "config.yaml"
    path.write_text(recipe.to_yaml(), encoding="utf-8")
    assert load_recipe(path) == recipe


def test_the_command_line_overrides_the_file(tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    path.write_text("name: a\npreprocess: {chunk_len: 2, overlap_len: 0.1}\n")
    recipe = parse_recipe("preprocess", ["--config", str(path), "--preprocess.chunk_len", "4"])
    assert (recipe.name, recipe.preprocess.chunk_len, recipe.preprocess.overlap_len) == ("a", 4.0, 0.1)
    recipe = parse_recipe("extract", ["--extract.embedder_mix.layers", "[9, 10]", "--extract.embedder_mix.ratio=1"])
    assert recipe.extract.embedder_mix == EmbedderMix((9, 10), 1.0)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "preprocess: {chunk_length: 2}",
            r"unknown key preprocess\.chunk_length; did you mean preprocess\.chunk_len\?",
        ),
        ("preprocess: {chunk_len: long}", r"preprocess\.chunk_len: "),
        ("preprocess: {cut_method: random}", r"preprocess\.cut_method: "),
        (
            "extract: {embedder_mix: {layers: 9}}",
            r"embedder_mix\.layers: got 9, expected a list, rising layer numbers .* such as \[9\]$",
        ),
        (
            "extract: {embedder_mix: {layers: [last]}}",
            r"embedder_mix\.layers: got \['last'\], expected rising",
        ),
        (
            "extract: {embedder_mix: {ratio: [0.5]}}",
            r"embedder_mix\.ratio: got \[0\.5\], expected a number, 0\.0 to 1\.0$",
        ),
        ("extract: {embedder_mix: [9]}", r"extract\.embedder_mix: got \[9\], expected keys such as layers: \.\.\.$"),
        ("preprocess: {chunk_len: 10}", r"preprocess\.chunk_len: got 10\.0, expected 1\.0 to 9\.0"),
        ("[1, 2]", "holds a list"),
        ("a: [", "not valid YAML"),
    ],
)
def test_a_wrong_file_is_refused_with_its_key(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "config.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=message):
        load_recipe(path)


def test_a_missing_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="does not exist"):
        load_recipe(tmp_path / "config.yaml")


def test_importing_the_recipe_loads_nothing_heavy() -> None:
    code = "import sys, rvc_dist.config; print(sorted({'torch', 'numpy'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
