"""The wings of the package: imports go one way, from what is used by all to what uses all."""

from __future__ import annotations

import ast
from pathlib import Path

import rvc_dist
from rvc_dist.stages import STAGES

PACKAGE = Path(rvc_dist.__file__).parent
FLOORS = (
    {"__init__", "choices", "config", "workspace", "files", "schema", "screen", "packaged", "unit_stage"},
    {"models", "runtime"},
    {"data"},
    {"report"},
    {"features"},
    {"train"},
    {"voice"},
    {"tools"},
    {"__main__", "arguments", "stages", "completion", "launching", "pipeline", "demo"},
)
LOANS = {("rvc_dist.tools.plan", "rvc_dist.tools.bench")}
"""Stages that import another: plan measures with the means of bench."""


def wing(module: str) -> str:
    """`rvc_dist.train.step` -> `train`."""
    return module.split(".")[1] if "." in module else "__init__"


def imported(file: Path) -> set[str]:
    """The modules of this package that a file imports, or imports from, at its top or later."""
    names = set()
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}: a relative import"
            inside = {f"{node.module}.{alias.name}" for alias in node.names}
            names |= inside if node.module == "rvc_dist" else inside | {node.module}
        elif isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
    return {name for name in names if name and name.split(".")[0] == "rvc_dist" and name != "rvc_dist.__version__"}


def test_imports_go_from_the_lower_floors_to_the_higher() -> None:
    floor_of = {name: i for i, names in enumerate(FLOORS) for name in names}
    there = {p.stem for p in PACKAGE.iterdir() if p.suffix == ".py" or (p / "__init__.py").exists()}
    assert there == floor_of.keys()
    wrong = [
        f"{file.relative_to(PACKAGE)} imports {name}"
        for file in PACKAGE.rglob("*.py")
        for name in imported(file)
        for own, other in [(file.relative_to(PACKAGE).with_suffix("").parts[0], wing(name))]
        if floor_of[other] > floor_of[own] or (own != other and {own, other} == FLOORS[1])
    ]
    assert wrong == []


def test_stages_never_import_each_other() -> None:
    """What two of them need lies below both; those on the top floor are made of stages."""
    stages = {s.module for s in STAGES.values()} - {f"rvc_dist.{name}" for name in FLOORS[-1]}

    def stage_of(module: str) -> str:
        return next((s for s in stages if module == s or module.startswith(f"{s}.")), "")

    found = {
        (own, other)
        for file in PACKAGE.rglob("*.py")
        for name in imported(file)
        for own in [stage_of(".".join(file.relative_to(PACKAGE.parent).with_suffix("").parts))]
        for other in [stage_of(name)]
        if own and other and own != other
    }
    assert found == LOANS
