"""Every file that ships beside the code: recipes, launcher files, scripts, the demo voice and its licence."""

from __future__ import annotations

import os
import re
import subprocess
from pathlib import Path
from typing import Any

import pytest
import soundfile
import yaml

from rvc_dist import demo
from rvc_dist.config import Recipe, load_recipe
from rvc_dist.workspace import DEMO_VOICE_DIR

ROOT = Path(__file__).parents[1]
CONFIGS = sorted((ROOT / "configs").glob("*.yaml"))
LAUNCH = sorted(path for path in (ROOT / "launch").glob("*.yaml") if path.stem != "sky")  # which is SkyPilot's
SCRIPTS = sorted([*(ROOT / "launch").glob("*.sh"), *(ROOT / "slurm").glob("*.sbatch"), *(ROOT / "slurm").glob("*.sh")])

FAST: dict[str, Any] = {
    "train.fast_train": True,
    "train.multiscale_mel_loss": True,
    "train.lr_schedule": "cosine",
    "train.save_every_epochs": 25,
}
# The recommendations of the table that this package was written to (docs of Advanced-RVC-Inference, "Training Boost").
RECOMMENDED: dict[str, dict[str, Any]] = {
    "t4": FAST
    | {
        "train.bf16_adamw": False,
        "train.precision": "fp16",  # the table says fp32, from before there was a loss scale
        "train.compile": "auto",
        "train.max_epochs": 200,
        "train.batch_size": 4,
    },
    "a100_h100": FAST | {"train.bf16_adamw": True, "train.max_epochs": 200, "train.batch_size": 8},
    "rtx": FAST | {"train.bf16_adamw": True, "train.compile": "graphs", "train.max_epochs": 300, "train.batch_size": 6},
    "10min_max_accuracy": FAST
    | {
        "train.bf16_adamw": True,
        "train.max_epochs": 300,
        "train.batch_size": 4,
        "train.overtrain_detect": True,
        "train.overtrain_threshold": 50,
        "data.sample_rate": 48000,
        "preprocess.cut_method": "automatic",
        "preprocess.chunk_len": 3.0,
        "preprocess.overlap_len": 0.5,
        "preprocess.process_effects": True,
        "preprocess.normalization": "post",
        "extract.f0_method": "rmvpe",
        "index.algorithm": "auto",
        "model.version": "v2",
    },
    "32k": {"data.sample_rate": 32000, "train.batch_size": 4, "train.max_epochs": 200},
    "40k": {"data.sample_rate": 40000, "train.batch_size": 4, "train.max_epochs": 200},
    "48k": {"data.sample_rate": 48000, "train.batch_size": 4, "train.max_epochs": 200},
    "demo_cpu": {"name": "demo", "extract.embedder_model": "mfcc", "extract.f0_method": "swipe"},
}
SHARED: dict[str, Any] = {
    "preprocess.chunk_len": 3.0,
    "train.multiscale_mel_loss": True,
    "index.nprobe": 9,
    "model.version": "v2",
    "model.vocoder": "hifi-gan",
}
"""What holds in all of them."""


def flat(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in tree.items():
        found |= flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return found


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_every_recipe_loads_and_says_what_it_is_for(path: Path) -> None:
    recipe = load_recipe(path)
    assert recipe != Recipe()
    values = flat(recipe.to_dict())
    assert {key: values[key] for key in SHARED} == SHARED
    assert path.read_text(encoding="utf-8").startswith("# ")


@pytest.mark.parametrize("name", RECOMMENDED)
def test_a_recipe_has_the_recommended_values(name: str) -> None:
    values = flat(load_recipe(ROOT / "configs" / f"{name}.yaml").to_dict())
    wanted = RECOMMENDED[name]
    assert {key: values[key] for key in wanted} == wanted


def test_only_the_overlap_of_the_small_dataset_differs() -> None:
    overlaps = {path.stem: load_recipe(path).preprocess.overlap_len for path in CONFIGS}
    assert {name for name, overlap in overlaps.items() if overlap != 0.3} == {"10min_max_accuracy"}


# Launchers


@pytest.mark.parametrize("path", LAUNCH, ids=lambda path: path.stem)
def test_accelerate_reads_every_launcher_file(path: Path) -> None:
    from accelerate.commands.config.config_args import load_config_from_file

    config = load_config_from_file(str(path))
    assert config.num_processes % config.num_machines == 0
    # The recipe decides on these: a launcher that sets them too would contradict it.
    assert str(config.mixed_precision) == ("bf16" if path.stem == "bf16" else "no")
    assert yaml.safe_load(path.read_text(encoding="utf-8"))["dynamo_backend"] == "no"
    is_zero = re.fullmatch(r"zero(\d)", path.stem)
    assert config.deepspeed_config.get("zero_stage") == (int(is_zero[1]) if is_zero else None)
    if config.num_machines > 1:
        assert config.main_process_port
        # Accelerate's parser ignores this key of a file: only the command line can say it.
        assert "rdzv_backend" not in yaml.safe_load(path.read_text(encoding="utf-8"))
        assert "--rdzv_backend c10d" in path.read_text(encoding="utf-8")


@pytest.mark.parametrize("path", [*LAUNCH, *SCRIPTS], ids=lambda path: path.name)
def test_the_launch_commands_in_a_file_are_of_stages_that_exist(path: Path) -> None:
    from rvc_dist.stages import STAGES

    text = path.read_text(encoding="utf-8")
    stages = re.findall(r"(?:-m rvc_dist|\brvc-dist) ([a-z]+)", text)
    assert set(stages) <= set(STAGES)
    assert stages or path.suffix != ".yaml"


def test_accelerate_knows_the_options_that_the_scripts_and_comments_use() -> None:
    from accelerate.commands.launch import launch_command_parser

    parser = launch_command_parser()
    known = {option for action in parser._actions for option in action.option_strings}
    used = set()
    for path in [*LAUNCH, *SCRIPTS]:
        text = path.read_text(encoding="utf-8").replace("\\\n", " ")
        for line in re.findall(r"accelerate launch (.*?)-m rvc_dist", text):
            used |= set(re.findall(r"--[a-z_]+", line))
    assert {"--config_file", "--num_processes"} <= used
    assert used <= known


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.name)
def test_every_script_is_valid_bash(path: Path) -> None:
    checked = subprocess.run(["bash", "-n", str(path)], capture_output=True, text=True, check=False)
    assert (checked.returncode, checked.stderr) == (0, "")
    text = path.read_text(encoding="utf-8")
    is_sourced = text.startswith("# Sourced")
    assert is_sourced or text.startswith("#!")
    assert is_sourced or "set -euo pipefail" in text
    if path.parent.name == "launch":
        assert os.access(path, os.X_OK) is not is_sourced


def test_the_two_scripts_of_the_readme_are_there() -> None:
    assert {"demo.sh", "test.sh"} <= {path.name for path in SCRIPTS}


# The demo voice


def test_the_demo_voice_is_whole_and_licensed() -> None:
    folder = DEMO_VOICE_DIR
    text = (folder / "README.md").read_text(encoding="utf-8")
    # The licences ask for the names of the speakers and of the licences.
    for owed in ("Allison Smith", "June Wallack", "Maxim Topal", "CC-BY-SA-3.0", "CC-BY-3.0", "creativecommons.org"):
        assert owed in text
    files = sorted((folder / "voice").glob("*.flac"))
    seconds = sum(soundfile.info(path).duration for path in files)
    assert len(files) == 13
    assert 90 < seconds < 110
    assert {path.name for path in (folder / "source").glob("*.flac")} == {"fr.flac", "ru.flac"}
    assert sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()) < 4_000_000
    assert {path.suffix for path in folder.rglob("*") if path.is_file()} == {".flac", ".md"}


def test_the_package_has_a_licence() -> None:
    assert "MIT License" in (ROOT / "LICENSE").read_text(encoding="utf-8")
    assert 'license = { text = "MIT" }' in (ROOT / "pyproject.toml").read_text(encoding="utf-8")


def test_the_demo_recipe_is_the_one_of_the_configs() -> None:
    assert demo.recipe_file().name == "demo_cpu.yaml"
    assert demo.recipe_file() in CONFIGS
