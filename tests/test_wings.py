"""The wings of the package: imports go one way, from what is used by all to what uses all."""

from __future__ import annotations

import ast
from pathlib import Path

import rvc_dist

PACKAGE = Path(rvc_dist.__file__).parent
FLOORS = (
    {"__init__", "choices", "command_line", "config", "workspace", "files", "schema"},
    {"models", "runtime"},
    {"data"},
    {"features"},
    {"train"},
    {"voice"},
    {"tools"},
    {"__main__", "pipeline", "demo"},
)


def wing(module: str) -> str:
    """`rvc_dist.train.step` -> `train`."""
    return module.split(".")[1] if "." in module else "__init__"


def imported(file: Path) -> set[str]:
    """The modules of this package that a file imports, at its top or later."""
    names = set()
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}: a relative import"
            names |= {node.module} if node.module != "rvc_dist" else {f"rvc_dist.{a.name}" for a in node.names}
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
