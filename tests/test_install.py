"""What is installed for which job: the extras of pyproject.toml, and what users are told to install."""

import ast
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from helpers import make_ssl_folder
from launching import ONLY_CORE, OPTIONAL, ROOT, finish, start

from rvc_dist.choices import F0_METHODS

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
EXTRAS = PROJECT["optional-dependencies"]


def project(requirement: str) -> str:
    """`torch>=2.6` -> `torch`."""
    return re.match(r"[\w.-]+", requirement)[0]


def test_each_package_comes_with_the_extra_that_its_message_names() -> None:
    for package in OPTIONAL:
        assert package.name in map(project, EXTRAS[package.extra]), package
        assert f"pip install {package.name} (the extra {package.extra} " in " ".join(package.missing("this"))


def test_the_core_holds_nothing_that_only_an_extra_needs() -> None:
    core, heavy = set(map(project, PROJECT["dependencies"])), {"librosa", "torchaudio", "torchcrepe", "onnxruntime"}
    assert not core & (heavy | {project(name) for names in EXTRAS.values() for name in names})


def test_what_is_imported_is_of_the_core_or_optional_and_then_late() -> None:
    brought = {"huggingface_hub", "yaml", "markupsafe", "packaging", "fsspec"}  # or brought by jinja2, torch
    core = {*map(project, PROJECT["dependencies"]), *brought}
    optional = {package.module for package in OPTIONAL}
    known = {"rvc_dist", *sys.stdlib_module_names, *core, *optional, "faiss", "triton"}  # triton is torch's for CUDA
    for file in (ROOT / "rvc_dist").rglob("*.py"):
        tree = ast.parse(file.read_text(encoding="utf-8"))
        assert {name for node in ast.walk(tree) for name in imported_by(node)} <= known, file
        assert not {name for node in tree.body for name in imported_by(node)} & optional, file


def imported_by(node: ast.AST) -> list[str]:
    names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
    return [name.partition(".")[0] for name in (*names, getattr(node, "module", None) or "__future__")]


def test_what_users_are_told_to_install_is_on_the_package_index() -> None:
    """What this package names there is what it requires itself, and so was found there; it is not there itself."""
    every = {project(name) for names in (PROJECT["dependencies"], *EXTRAS.values()) for name in names}
    files = [f for folder in ("rvc_dist", "docs", "launch", "slurm") for f in (ROOT / folder).rglob("*.*")]
    files = [f for f in (*files, *ROOT.glob("*.md")) if f.suffix in (".py", ".md", ".sh", ".yaml", ".sbatch", ".ipynb")]
    install = re.compile(r"pip install (?:-\S+ )*[\"']?([\w.][\w.-]*(?:\[[\w,]+\])?)")
    told = [(file.name, name) for file in files for name in install.findall(file.read_text(encoding="utf-8"))]
    assert len(told) > 5
    # "all of them"; and one that is no requirement, since its own need a compiler: its weights alone are read.
    ours = re.compile(rf"pip|\.(\[({'|'.join(EXTRAS)})(,({'|'.join(EXTRAS)}))*\])?")
    assert [
        (file, name) for file, name in told if name not in {*every, "all", "resemblyzer"} and not ours.fullmatch(name)
    ] == []


@pytest.mark.slow
def test_encoders_need_no_extra_and_trackers_name_theirs(tmp_path: Path) -> None:
    """The other stages without extras: tests/test_pipeline.py."""
    make_ssl_folder(tmp_path / "encoder", "Hubert")
    code = (
        "import sys, torch\n"
        "from rvc_dist.config import ExtractConfig\n"
        "from rvc_dist.features.content import load_embedder\n"
        "from rvc_dist.features.f0 import load_f0\n"
        "cpu = torch.device('cpu')\n"
        "print(load_embedder(ExtractConfig(embedder_model=sys.argv[1]), 'v2', cpu)(torch.zeros(1, 16000)).shape)\n"
        "for name in ('pyin', 'piptrack', 'fcpe'):\n"
        "    try: load_f0(ExtractConfig(f0_method=name), cpu)\n"
        "    except ImportError as error: print(error)\n"
    )
    said = finish(start([sys.executable, "-c", code, str(tmp_path / "encoder")], ONLY_CORE))
    assert said.startswith("torch.Size([1, 49, 16])\n"), said
    for name in ("pyin", "piptrack", "fcpe"):
        package = F0_METHODS[name].package
        install = rf"pip install {package.name} \(the extra {package.extra} has it\)"
        assert re.search(rf"extract\.f0_method {name} needs the package {package.name} \(.*\): {install}", said), said


@pytest.mark.slow
def test_torchaudio_is_imported_beside_a_torch_that_its_libraries_do_not_fit() -> None:
    """As PyPI's does not fit a torch for CPUs; what trackers use of it is written in Python."""
    code = (
        "import torch\n"
        "from rvc_dist.features.hub import make_torchaudio_importable\n"
        "def refuse(path): raise OSError(f'Could not load this library: {path}')\n"
        "torch.ops.load_library = refuse\n"
        "try: import torchaudio\n"
        "except OSError as error: print(error)\n"
        "make_torchaudio_importable()\n"
        "from torchaudio.transforms import Resample\n"
        "print(Resample(16000, 8000)(torch.zeros(1600)).shape)\n"
    )
    said = finish(start([sys.executable, "-c", code]))
    assert re.fullmatch(r"Could not load this library: .*torchaudio.*\ntorch\.Size\(\[800\]\)\n", said), said


def installed(folder: Path, settings: str, uv_code: int = 0) -> list[str]:
    """What launch/setup.sh runs in an environment with these `settings` of pip, whose uv ends with `uv_code`."""
    done = folder / "done"
    python = f'if [[ $* == *" config list" ]]; then exec {sys.executable} "$@"; fi\necho "$*" >> {done}'
    uv = f'echo "uv $* $UV_DEFAULT_INDEX|$UV_INDEX|$UV_FIND_LINKS|$UV_CONSTRAINT" >> {done}\nexit {uv_code}'
    (folder / "bin").mkdir(parents=True)
    for name, script in ("python", python), ("uv", uv):
        (folder / "bin" / name).write_text(f"#!/bin/bash\n{script}\n")
        (folder / "bin" / name).chmod(0o755)
    (folder / "pip.conf").write_text(settings)
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("PIP_", "UV_"))}
    pip = {"CONFIG_FILE": str(folder / "pip.conf"), "INDEX_URL": "http://index", "CONSTRAINT": "/c"}
    pip |= {"EXTRA_INDEX_URL": "\nhttp://x\nhttp://y", "FIND_LINKS": "/a /b"}
    environment = kept | {"VENV": str(folder)} | {f"PIP_{name}": value for name, value in pip.items()}
    subprocess.run(["bash", "-c", "source launch/setup.sh cpu"], cwd=ROOT, env=environment, check=True)
    return done.read_text().splitlines()


def test_setup_installs_by_uv_as_pip_is_set_and_else_by_pip(tmp_path: Path) -> None:
    indexes = "http://index|http://index http://x http://y"
    uv = f"uv pip install --quiet --python {tmp_path}/%s/bin/python -e .[cpu] {indexes}|/a,/b|/c"
    pip = [f"-m pip --quiet --disable-pip-version-check install {what}" for what in ("--upgrade pip", "-e .[cpu]")]
    assert installed(tmp_path / "known", "[global]\nindex-url = http://other\ntimeout = 9\n") == [uv % "known"]
    assert installed(tmp_path / "more", "[install]\npre = true\n") == pip
    assert installed(tmp_path / "fails", "", uv_code=2) == [uv % "fails", *pip]
