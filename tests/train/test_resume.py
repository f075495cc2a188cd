"""A run that is killed and started again ends as one that never was: the same bits, the same curves."""

import random
from pathlib import Path

import pytest
from helpers import make_features, tiny_recipe, with_train
from launching import environment, ranks, rvc_dist
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from rvc_dist.config import Recipe, load_recipe
from rvc_dist.report.history import read_history
from rvc_dist.train import checkpoint

pytestmark = pytest.mark.usefixtures("thin")


def prepared(folder: Path, **train: object) -> Path:
    """A recipe file of a run whose features exist."""
    recipe = tiny_recipe(folder / "run", trackers=("tensorboard",), **train)
    make_features(recipe, num_clips=12)
    file = folder / "recipe.yaml"
    file.write_text(recipe.to_yaml())
    return file


def kill_at(recipe: Path, num_ranks: int, step: int, more_environment: dict[str, str] | None = None) -> bool:
    """Run until the history has `step`, then kill every process at once; False when the run ended before.

    The log shows steps only after ten seconds.
    """
    file = Path(load_recipe(recipe).run_dir) / "metrics.jsonl"
    begun = sum(line["kind"] == "run" for line in read_history(file))
    job = ranks.start(num_ranks, "", ["train", "--config", recipe], environment() | (more_environment or {}))
    try:
        while True:
            lines = read_history(file)
            runs = sum(line["kind"] == "run" for line in lines)
            if runs > begun and any(line["kind"] == "step" and line["step"] >= step for line in lines):
                return True
            if job.wait(0.02) and not job.ranks:
                return False
    finally:
        job.kill()


def curves(folder: Path) -> dict[str, list[tuple[int, float]]]:
    """Every scalar that does not measure time."""
    events = EventAccumulator(str(folder / "tensorboard" / "tiny"), {"scalars": 0})
    events.Reload()
    tags = [tag for tag in events.Tags()["scalars"] if not tag.startswith("perf/")]
    return {tag: [(e.step, e.value) for e in events.Scalars(tag)] for tag in tags}


def history(folder: Path) -> list[tuple[str, int, dict[str, object]]]:
    """What metrics.jsonl says that does not measure time."""
    lines = [line for line in read_history(folder / "metrics.jsonl") if line["kind"] in ("step", "validation")]
    return [
        (line["kind"], line["step"], {k: v for k, v in line["values"].items() if not k.startswith("perf/")})
        for line in lines
    ]


STEPS = 12
CASES = {
    "float32": {"num_workers": 2},
    "bf16, accumulated": {"bf16_adamw": True, "grad_accum_steps": 2, "batch_size": 1, "lr_schedule": "cosine"},
}


@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.parametrize(("case", "num_ranks"), [("float32", 1), ("bf16, accumulated", 2)])
def test_a_run_killed_at_random_steps_ends_in_the_same_bits(tmp_path, case, num_ranks):
    """Checkpoints fall inside epochs and inside log windows; the first of the runs is accelerate's."""
    launch_file = "bf16.yaml" if num_ranks > 1 else None
    options = {"max_steps": STEPS, "save_every_steps": 4, "log_every_steps": 3, "eval_every_steps": 5} | CASES[case]
    whole, killed = (prepared(tmp_path / name, **options) for name in ("whole", "killed"))
    rvc_dist(num_ranks, "train", "--config", whole, launch_file=launch_file)
    rng = random.Random(f"{case} {num_ranks}")
    for step in sorted(rng.sample(range(3, STEPS - 3), 2)):
        assert kill_at(killed, num_ranks, step)
    rvc_dist(num_ranks, "train", "--config", killed)
    folders = [checkpoint.latest(file.parent / "run" / "checkpoints") for file in (whole, killed)]
    assert [folder.name for folder in folders] == [f"step_{STEPS:08d}"] * 2
    for name in checkpoint.FILES:
        assert (folders[0] / name).read_bytes() == (folders[1] / name).read_bytes(), name
    reference, resumed = (curves(file.parent / "run") for file in (whole, killed))
    assert reference == resumed
    assert history(whole.parent / "run") == history(killed.parent / "run")
    assert [step for step, _ in resumed["loss/g_mel"]] == [*range(3, STEPS, 3), STEPS], "no step twice, none missing"


def train_to(
    file: Path, recipe: Recipe, num_ranks: int, step: int, launch_file: str | None = None
) -> dict[str, object]:
    batch_size = 4 // num_ranks
    file.write_text(with_train(recipe, batch_size=batch_size).to_yaml())
    output = rvc_dist(num_ranks, "train", "--config", file, "--train.max_steps", step, launch_file=launch_file)
    folder = checkpoint.latest(Path(recipe.run_dir) / "checkpoints")
    assert folder is not None
    assert folder.name == f"step_{step:08d}"
    return {"output": output} | {name: load_file(folder / f"{name}.safetensors") for name in checkpoint.MODELS}


@pytest.mark.slow
@pytest.mark.distributed
def test_a_run_goes_on_from_the_same_state_on_another_number_of_ranks(tmp_path):
    """The global batch stays the same here, so that the weights have to. Two launch files work without GPUs too."""
    results = {}
    moved = [(2, 3, "multi_gpu.yaml"), (1, 5, "one_gpu.yaml"), (2, 7)]
    for name, parts in {"steady": [(2, 7)], "moved": moved}.items():
        recipe = tiny_recipe(tmp_path / name, lr_schedule="constant", eval_every_steps=100)
        make_features(recipe, num_clips=12)
        for part in parts:
            results[name] = train_to(tmp_path / f"{name}.yaml", recipe, *part)
    assert "was made on 1 ranks, this run has 2" in results["moved"]["output"]
    for network in checkpoint.MODELS:
        for key, value in results["steady"][network].items():
            difference = (results["moved"][network][key] - value).norm()
            assert difference <= 1e-4 * value.norm(), f"{network}.{key}: {difference:.1e} of {value.norm():.1e}"
