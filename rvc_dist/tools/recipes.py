"""`rvc-dist recipes`, `new` and `files`: what comes with rvc_dist besides its code, for the user to take and change."""

from __future__ import annotations

import re
import shutil
import sys
from pathlib import Path

from rvc_dist import packaged
from rvc_dist.config import Recipe, load_recipe, recipe_of
from rvc_dist.files import read_bounded
from rvc_dist.schema import MAX_YAML_BYTES, to_yaml
from rvc_dist.workspace import Shard, StageError

DEFAULT_RECIPE = "48k"
LINE = 90
"""Letters of a file's comment that fit beside its name."""
NEEDS_CHECKOUT = ("test.sh",)
"""Files of launch/ that are of no use without the tests."""


def recipes(_: Recipe, shard: Shard) -> None:
    """Print the recipes that come along, each with the first sentence of its comment."""
    if shard.is_first:
        known = packaged.recipes()
        lines = [f"{name:<20}{first_comment(path)}" for name, path in known.items()]
        lines += [
            "",
            f"They are in {packaged.folder('configs')}; --config takes their names, `rvc-dist new` copies one.",
        ]
        sys.stdout.write("\n".join(lines) + "\n")


def first_comment(path: Path) -> str:
    """The first sentence of the comment that a file begins with, below the line that says who runs it, a long one to
    its colon or semicolon; of a notebook its title."""
    lines = path.read_text(encoding="utf-8").removeprefix("#!/usr/bin/env bash\n").splitlines()
    until = next((i for i, line in enumerate(lines) if not line.startswith("# ")), len(lines))
    text = " ".join(line.removeprefix("# ") for line in lines[:until])
    if path.suffix == ".ipynb":
        text = next(
            (line.strip(' ",')[2:].removesuffix("\\n") for line in lines if line.lstrip().startswith('"# ')), ""
        )
    sentence = re.split(r"(?<=[.?])\s", text, maxsplit=1)[0]
    return sentence if len(sentence) < LINE else re.split("[:;] ", sentence, maxsplit=1)[0]


def new(_: Recipe, shard: Shard, name: str, recipe_name: str | None = None) -> None:
    """Write NAME.yaml into the working directory: a recipe's text with another name and a run folder of its own.

    Raises:
        StageError: the name cannot be one, the recipe is none, or the file or the run folder is there already.
    """
    if not shard.is_first:
        return
    target, run_dir = Path(f"{name}.yaml"), f"runs/{name}"
    if name.endswith((".yaml", ".yml")):
        raise StageError(f"got the name {name}, expected one without .yaml:", f"rvc-dist new {Path(name).stem}")
    try:
        recipe_of([("name", name)])
        source = packaged.recipe_file(recipe_name or DEFAULT_RECIPE)
        load_recipe(source)
    except (ValueError, OSError) as error:
        raise StageError(str(error)) from error
    for path in (target, Path(run_dir)):
        if path.exists() or path.is_symlink():
            raise StageError(f"{path} is there already, and is left alone;", "choose another name")
    text = with_name(read_bounded(source, MAX_YAML_BYTES).decode(), name, run_dir)
    with target.open("x", encoding="utf-8") as stream:
        stream.write(text)
    audio_dir = load_recipe(target).data.audio_dir
    sys.stdout.write(
        f"{target} is the recipe {source.stem} with the run folder {run_dir}. Put the recordings into {audio_dir}/, or "
        f"change data.audio_dir there; then\n  rvc-dist run --config {target}\n"
    )


def with_name(text: str, name: str, run_dir: str) -> str:
    """A recipe's text, comments and all, with its own `name` and `run_dir`."""
    own = to_yaml({"name": name, "run_dir": run_dir})
    text = re.sub(r"^run_dir:.*\n", "", text, flags=re.MULTILINE)
    text, count = re.subn(r"^name:.*\n", lambda _: own, text, count=1, flags=re.MULTILINE)
    return text if count else own + text


def files(_: Recipe, shard: Shard, folders: list[str]) -> None:
    """Print where launch/ and slurm/ are and what is in them, or copy them into a folder.

    Raises:
        StageError: several folders, or files are there that differ; nothing is copied then.
    """
    if not shard.is_first:
        return
    if len(folders) > 1:
        raise StageError(f"got {' and '.join(folders)}, expected one folder, or none:", "rvc-dist files [DIR]")
    root = packaged.folder("launch").parent
    sources = [p for kind in ("launch", "slurm") for p in sorted(packaged.folder(kind).rglob("*")) if p.is_file()]
    sources = [path for path in sources if path.name not in NEEDS_CHECKOUT]
    if not folders:
        lines = [f"{path.relative_to(root).as_posix():<34}{first_comment(path)}" for path in sources]
        lines += ["", f"They are in {root}; `rvc-dist files DIR` copies them into DIR."]
        sys.stdout.write("\n".join(lines) + "\n")
        return
    copies = {path: Path(folders[0], path.relative_to(root)) for path in sources}
    if differing := [str(c) for path, c in copies.items() if c.exists() and c.read_bytes() != path.read_bytes()]:
        raise StageError(
            f"{', '.join(differing)}: there already, and not as rvc_dist has it; nothing was copied:",
            "name another folder",
        )
    for path, copy in copies.items():
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, copy)
    sys.stdout.write(f"{len(copies)} files are in {Path(folders[0], 'launch')} and {Path(folders[0], 'slurm')}\n")
