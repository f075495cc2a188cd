"""Files that come with rvc_dist beside its modules: recipes, launcher files and batch scripts."""

from __future__ import annotations

from pathlib import Path

from rvc_dist.schema import nearest

DEMO = "demo_cpu"
"""The recipe of `rvc-dist demo`, for that stage alone: it names files of the package."""


def folder(kind: str) -> Path:
    """`configs`, `launch` or `slurm`: of an installed package inside it, of a checkout beside it."""
    installed = Path(__file__).parent / kind
    return installed if installed.is_dir() else Path(__file__).parents[1] / kind


def recipes() -> dict[str, Path]:
    """The files of all recipes but the demo's, by the names that `--config` takes."""
    return {path.stem: path for path in sorted(folder("configs").glob("*.yaml")) if path.stem != DEMO}


def recipe_file(text: str) -> Path:
    """The file that `--config TEXT` means: TEXT itself, else TEXT.yaml, else the recipe of that name that came along.

    Raises:
        FileNotFoundError: none of them is there; its text says which was probably meant.
    """
    known = recipes()
    for path in (Path(text), Path(f"{text}.yaml"), known.get(text, Path(text))):
        if path.is_file():
            return path
    if Path(text).exists():
        raise FileNotFoundError(f"{text} is not a file")
    near = nearest(Path(text).stem, known) if Path(text).name == text else ""
    raise FileNotFoundError(f"{text} does not exist" + (f"; did you mean the recipe {near}?" if near else ""))
