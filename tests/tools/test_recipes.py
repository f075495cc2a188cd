"""`rvc-dist recipes`, `new` and `files`, of a checkout and of an installed package."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from rvc_dist import __main__ as cli
from rvc_dist import packaged
from rvc_dist.config import Recipe, load_recipe

ROOT = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def _there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def test_recipes_are_listed_with_a_line_each(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["recipes"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert "rtx                 NVIDIA RTX 30xx, 40xx and newer: bf16, the fast kernels and CUDA graphs." in lines
    assert [line.split()[0] for line in lines[:-2]] == list(packaged.recipes())
    assert all(20 < len(line) <= 120 for line in lines[:-2])
    assert packaged.DEMO not in packaged.recipes()


@pytest.mark.parametrize("name", ["alice", "Ä b", "yes", "1e3", "a: b #c", "'"])
@pytest.mark.parametrize("source", ["48k", "rtx", "own.yaml"])
def test_a_new_recipe_is_the_old_one_with_its_name_and_folder(name: str, source: str) -> None:
    Path("own.yaml").write_text("# Mine.\ntrain:\n  batch_size: 3 # small\nrun_dir: runs/own\n")
    assert cli.main(["new", name, "--recipe", source]) == 0
    made = Path(f"{name}.yaml")
    old = packaged.recipe_file(source)
    expected = load_recipe(old).to_dict() | {"name": name, "run_dir": f"runs/{name}"}
    assert load_recipe(made).to_dict() == expected
    comments = re.findall("#.*", old.read_text())
    assert [c for c in re.findall("#.*", made.read_text()) if c in comments] == comments


def test_new_begins_with_48k_and_says_what_comes_next(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["new", "alice"]) == 0
    assert load_recipe(Path("alice.yaml")) == Recipe(name="alice", run_dir="runs/alice")
    assert "Put the recordings into audio/" in (told := capsys.readouterr().out)
    assert told.endswith("  rvc-dist run --config alice.yaml\n")
    assert cli.parse("train", ["--config", "alice"])[0].run_dir == "runs/alice"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["there"], "there.yaml is there already, and is left alone; choose another name"),
        (["loop"], "loop.yaml is there already"),
        (["trained"], "runs/trained is there already"),
        (["a/b"], "name: got 'a/b', expected a file name without slashes"),
        ([".."], "name: got '..', expected a file name"),
        (["ä" * 91], "expected at most 180 bytes"),
        (["alice.yaml"], "expected one without .yaml: rvc-dist new alice"),
        (["alice", "--recipe", "rtxx"], "rtxx does not exist; did you mean the recipe rtx?"),
        (["alice", "--recipe", "list.yaml"], "list.yaml holds a list, expected keys"),
    ],
)
def test_new_overwrites_nothing_and_checks_its_name(
    words: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("there.yaml").write_text("mine")
    Path("list.yaml").write_text("[1]")
    Path("loop.yaml").symlink_to("loop.yaml")
    Path("runs/trained").mkdir(parents=True)
    before = sorted(Path().iterdir())
    assert cli.main(["new", *words]) == 1
    assert message in capsys.readouterr().err
    assert sorted(Path().iterdir()) == before
    assert Path("there.yaml").read_text() == "mine"


def installed(folder: Path) -> dict[str, str]:
    """The package as a wheel has it, by pyproject.toml, without the checkout; the environment to use it in."""
    text = (ROOT / "pyproject.toml").read_text()
    included = re.search(r"^force-include = \{(.*)\}$", text, re.MULTILINE)
    assert included is not None
    shutil.copytree(ROOT / "rvc_dist", folder / "rvc_dist", ignore=shutil.ignore_patterns("__pycache__"))
    for source, target in re.findall(r'"([^"]*)" = "([^"]*)"', included[1]):
        shutil.copytree(ROOT / source, folder / target)
    return os.environ | {"PYTHONPATH": str(folder)}


def test_an_installed_package_has_recipes_launchers_and_batch_files(tmp_path: Path) -> None:
    environment = installed(tmp_path / "site")

    def told(*words: str, code: int = 0) -> str:
        command = [sys.executable, "-m", "rvc_dist", *words]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        assert done.returncode == code, done.stderr
        return done.stdout + done.stderr

    inside = tmp_path / "site" / "rvc_dist"
    assert f"They are in {inside / 'configs'};" in told("recipes")
    assert yaml.safe_load(told("train", "--config", "t4", "--print_config"))["train"]["precision"] == "fp16"
    assert f"--config_file {inside / 'launch' / 'cpu.yaml'}" in told("launch", "--cpu", "2", "--dry-run", "--", "train")
    listed = told("files")
    assert f"They are in {inside};" in listed
    assert "launch/notebook.ipynb             A voice on Colab or Kaggle\n" in listed

    assert "files are in work/launch and work/slurm" in told("files", "work")
    assert "files are in work/launch" in told("files", "work"), "the same files again"
    names = {*(ROOT / "launch").rglob("*.*"), *(ROOT / "slurm").iterdir()} - {ROOT / "launch" / "test.sh"}
    assert "launch/kubernetes/train.yaml      Training on several nodes, one rank a GPU" in listed
    assert {ROOT / path.relative_to("work") for path in Path("work").rglob("*.*")} == names
    for copy in Path("work").rglob("*.*"):
        source = ROOT / copy.relative_to("work")
        assert (copy.read_bytes(), copy.stat().st_mode) == (source.read_bytes(), source.stat().st_mode)
    Path("work/slurm/common.sh").write_text("mine")
    Path("work/launch/cpu.yaml").unlink()
    assert "work/slurm/common.sh: there already, and not as rvc_dist has it; nothing" in told("files", "work", code=1)
    assert not Path("work/launch/cpu.yaml").exists()
    assert "expected one folder, or none: rvc-dist files [DIR]" in told("files", "a", "b", code=1)

    # Scripts of the copy find their brothers and the installed package, and work where they are.
    Path("work/my.yaml").write_text("name: alice\n")
    commands = ["bash slurm/pipeline.sh my.yaml --dry-run --nodes 2", "source launch/setup.sh cpu && type -p python"]
    dry, python = (
        subprocess.run(
            ["bash", "-c", c], cwd="work", env=environment, capture_output=True, text=True, check=True
        ).stdout
        for c in commands
    )
    assert "slurm/train_multinode.sbatch" in dry
    assert python.strip() == shutil.which("python")
    broken = environment | {"PYTHONPATH": "/nowhere", "PATH": "/usr/bin:/bin", "VENV": "none"}
    done = subprocess.run(
        ["bash", "launch/demo.sh"], cwd="work", env=broken, capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stderr.splitlines()[-1]) == (
        1,
        "rvc_dist is neither in none nor in the python on the PATH; say where with VENV=/path/to/environment",
    )
