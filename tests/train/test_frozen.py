"""Twenty steps and a checkpoint as they were before the code was rearranged: a change of structure changes no bit.

`PYTHONPATH=tests python tests/train/test_frozen.py` writes the fixture anew, for a change that is meant to change the
numbers.
"""

import copy
import hashlib
import json
import math
import platform
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState
from frozen_on_ranks import train_all
from helpers import make_features, one_layer_of_each, tiny_recipe
from launching import torchrun
from safetensors.torch import load_file

from rvc_dist.report.history import read_history
from rvc_dist.train import checkpoint

FIXTURE = Path(__file__).with_name("frozen.json")
STEPS = 20
CASES = {
    "fp32": {},
    "bf16": {"precision": "bf16"},
    "accumulated": {"grad_accum_steps": 3, "batch_size": 1, "kl_warmup_steps": 5},
    "anyprecision": {"optimizer": "anyprecision_adamw", "max_grad_norm": 50.0, "lr_schedule": "cosine"},
}
SCALARS = ("d", "g_adv", "g_fm", "g_kl", "g_mel", "g_total", "norm_d", "norm_g")


def machine() -> dict[str, str]:
    """What decides how sums are rounded: where it is another, numbers agree to a few roundings only."""
    info = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").is_file() else ""
    lines = dict(line.partition(":")[::2] for line in info.splitlines() if ":" in line)
    cpu = {key.strip(): value.strip() for key, value in lines.items()}
    return {
        "torch": torch.__version__,
        "capability": torch.backends.cpu.get_cpu_capability(),
        "cpu": " ".join(cpu.get(key, "") for key in ("vendor_id", "cpu family", "model")) or platform.machine(),
    }


def run_cases(folder: Path, num_ranks: int) -> dict[str, Any]:
    """Train every case, and what came of each."""
    for name, options in CASES.items():
        recipe = tiny_recipe(folder / name, max_steps=STEPS, eval_every_steps=10, save_every_steps=STEPS, **options)
        make_features(recipe)
        (folder / f"{name}.yaml").write_text(recipe.to_yaml())
    if num_ranks == 1:
        AcceleratorState._reset_state(reset_partial_state=True)
        train_all(folder)
        AcceleratorState._reset_state(reset_partial_state=True)
    else:
        torchrun(num_ranks, "frozen_on_ranks.py", folder)
    return {name: result_of(folder / name, with_tensors=(name, num_ranks) == ("fp32", 1)) for name in CASES}


def result_of(run: Path, with_tensors: bool) -> dict[str, Any]:
    """Curves of every loss and gradient norm, and the checkpoint; of every tensor where they are asked for."""
    steps = [line["values"] for line in read_history(run / "metrics.jsonl") if line["kind"] == "step"]
    tags = [tag for tag in steps[0] if tag.startswith(("loss/", "grad/"))]
    # Nine digits tell every float32.
    curves = {t.partition("/")[2]: [float(f"{np.float32(v[t]):.9g}") for v in steps] for t in sorted(tags)}
    saved = run / "checkpoints" / f"step_{STEPS:08d}"
    state = json.loads((saved / checkpoint.STATE).read_text())
    files = [f for f in checkpoint.FILES if f != checkpoint.STATE and with_tensors]
    return {
        "curves": curves,
        "files": {
            file: entry["sha256"] for file, entry in json.loads((saved / checkpoint.MANIFEST).read_text()).items()
        },
        "state": {key: state[key] for key in ("format", "identity", "num_ranks", "trained_speakers", "data")},
        "place": {key: state["progress"][key] for key in ("step", "epoch", "seen", "best_step")},
        "tensors": {f: {k: [digest(v), norm(v)] for k, v in load_file(saved / f).items()} for f in files},
    }


def digest(tensor: torch.Tensor) -> str:
    described = f"{tensor.dtype} {list(tensor.shape)} ".encode()
    return hashlib.sha256(described + tensor.reshape(-1).contiguous().view(torch.uint8).numpy().tobytes()).hexdigest()[
        :16
    ]


def norm(tensor: torch.Tensor) -> float:
    return float(f"{float(tensor.double().norm()):.9g}")


def rounding(case: str, curve: str) -> float:
    """What another CPU may change in a curve, relative to its values; bf16 keeps three digits of each number."""
    if case == "bf16":
        return 0.1
    return 1e-4 if curve.startswith("norm") else 1e-5


def assert_equal(now: dict[str, Any], then: dict[str, Any], exact: bool, case: str) -> None:
    assert set(now["curves"]) == set(SCALARS)
    assert all(len(c) == STEPS and all(map(math.isfinite, c)) for c in now["curves"].values())
    assert set(now["files"]) == set(checkpoint.FILES)
    assert (now["state"], now["place"]) == (then["state"], then["place"]), case
    for name, curve in then["curves"].items():
        off = rounding(case, name)
        wanted = curve if exact else pytest.approx(curve, rel=off, abs=off * max(curve))
        assert now["curves"][name] == wanted, f"{case}: {name}"
    for name, tensors in then["tensors"].items():
        assert now["tensors"][name].keys() == tensors.keys(), f"{case}: {name}"
        for key, (bits, size) in tensors.items():
            got_bits, got_size = now["tensors"][name][key]
            assert got_bits == bits if exact else got_size == pytest.approx(size, rel=1e-2), f"{case}: {name}.{key}"
    assert now["files"] == then["files"] or not exact, case


@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.parametrize("num_ranks", [1, 2])
def test_the_same_steps_and_the_same_checkpoint_as_ever(tmp_path, monkeypatch, num_ranks):
    one_layer_of_each(monkeypatch.setattr)
    fixture = json.loads(FIXTURE.read_text())
    now, then = run_cases(tmp_path, num_ranks), fixture["ranks"][str(num_ranks)]
    assert now.keys() == then.keys() == CASES.keys()
    for case in CASES:
        assert_equal(now[case], then[case], fixture["machine"] == machine(), case)


@pytest.mark.parametrize("exact", [True, False])
@pytest.mark.parametrize("case", CASES)
def test_a_number_that_changed_is_found(case, exact):
    then = json.loads(FIXTURE.read_text())["ranks"]["1"][case]
    now = copy.deepcopy(then)
    assert_equal(now, then, exact, case)
    now["curves"]["g_mel"][-1] += 2 * rounding(case, "g_mel") * max(now["curves"]["g_mel"])
    with pytest.raises(AssertionError, match=f"{case}: g_mel"):
        assert_equal(now, then, exact, case)


def write_fixture() -> None:
    one_layer_of_each(setattr)
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        ranks = {str(n): run_cases(Path(folder) / str(n), n) for n in (1, 2)}
    FIXTURE.write_text(json.dumps({"machine": machine(), "ranks": ranks}, indent=0) + "\n")
    sys.stdout.write(f"{FIXTURE}\n")


if __name__ == "__main__":
    write_fixture()
