"""`rvc-dist completion SHELL`: a script by which the TAB key completes stages, options, files and values.

shtab writes it from the parsers of the stages. The script is complete in itself: pressing TAB starts no Python, which
on a cluster's shared disk would take seconds.
"""

from __future__ import annotations

import argparse
import re
import sys
from types import ModuleType
from typing import Any

from rvc_dist import packaged
from rvc_dist.arguments import key_types, stage_parser
from rvc_dist.choices import SHTAB
from rvc_dist.config import Recipe
from rvc_dist.schema import choices_of
from rvc_dist.stages import STAGES
from rvc_dist.workspace import Shard, StageError

PATHS = re.compile("dir|file|folder|input|output|model|index|reference|g|d")
"""Names of keys whose values are files or folders."""


def run(_: Recipe, shard: Shard, shell: str) -> None:
    """Print the script.

    Raises:
        StageError: shtab is not installed, or does not know the shell.
    """
    try:
        import shtab
    except ImportError as error:
        raise StageError(*SHTAB.missing("completion", error)) from error
    if shell not in shtab.SUPPORTED_SHELLS:
        raise StageError(f"got the shell {shell},", f"expected one of {', '.join(shtab.SUPPORTED_SHELLS)}")
    if shard.is_first:
        sys.stdout.write(shtab.complete(parser_of_all(shtab), shell) + "\n")


def parser_of_all(shtab: ModuleType) -> argparse.ArgumentParser:
    """Every stage with the options that its help shows, and what may follow them."""
    names = " ".join(packaged.recipes())
    recipes: dict[str, Any] = {
        "bash": "_rvc_dist_recipes",
        "zsh": "_rvc_dist_recipes",
        "preamble": {
            "bash": f'_rvc_dist_recipes() {{ compgen -W "{names}" -- $1; compgen -f -- $1; }}',
            "zsh": f"_rvc_dist_recipes() {{ compadd {names}; _files; }}",
        },
    }
    kinds = key_types()
    parser = argparse.ArgumentParser(prog="rvc-dist")
    parser.add_argument("--version", action="store_true", help="Print the version.")
    stages = parser.add_subparsers()
    for name, stage in STAGES.items():
        of_stage = stage_parser(name, stage.shows)
        action: Any  # shtab looks for an attribute `complete`, and finds actions so itself
        for action in of_stage._actions:
            key = action.option_strings[-1].removeprefix("--")
            if key in ("config", "recipe"):
                action.complete = recipes
            elif key in kinds:
                action.choices = choices_of(kinds[key]) or None
                if PATHS.fullmatch(key.rpartition(".")[2].rpartition("_")[2]):
                    action.complete = shtab.FILE
        if stage.folders:
            choices = {"command": list(STAGES), "shell": shtab.SUPPORTED_SHELLS}.get(stage.passes)
            action = of_stage.add_argument("words", nargs="*", choices=choices)
            if choices is None:
                action.complete = shtab.FILE
        stages.add_parser(name, help=stage.about, parents=[of_stage], add_help=False)
    return parser
