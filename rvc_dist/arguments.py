"""What the words of a command line say: the recipe, the part of the work, and what a stage takes besides."""

from __future__ import annotations

import argparse
import ast
import dataclasses
import inspect
import os
import shlex
from collections.abc import Iterator
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any, get_type_hints

from rvc_dist import config
from rvc_dist.config import ConfigError, Recipe, recipe_of
from rvc_dist.schema import expected, nearest
from rvc_dist.stages import STAGES, Stage
from rvc_dist.workspace import Shard, adopt_slurm_ranks


class Given(argparse.Action):
    """Appends (key, text) to `given`: later options override earlier ones, those of files too."""

    def __call__(self, parser: object, namespace: argparse.Namespace, values: Any, option: object = None) -> None:
        namespace.given.append((self.dest, values or self.const or ""))


def recipe_parser(stage: str, about: str) -> argparse.ArgumentParser:
    """A parser of every key of the recipe, whose help has its meaning, what it may be, and its default."""
    parser = argparse.ArgumentParser(
        prog=f"rvc-dist {stage}",
        usage="%(prog)s [--config FILE] [--section.key VALUE ...]",
        description=about,
        formatter_class=partial(argparse.HelpFormatter, max_help_position=8, width=100),
        allow_abbrev=False,
        exit_on_error=False,
    )
    parser.set_defaults(given=[])
    parser.add_argument("--config", action=Given, metavar="FILE", help="Recipe (YAML); later options override it.")
    parser.add_argument("--print_config", action="store_true", help="Print the whole recipe, and do nothing.")
    docs = _docstrings()
    for prefix, kind in _sections(Recipe):
        group = parser.add_argument_group(description=str(kind.__doc__).partition("\n\n")[0])
        hints = get_type_hints(kind, include_extras=True)
        for field in dataclasses.fields(kind):
            default = "null" if field.default is None else field.default
            text = f"{docs.get((kind.__name__, field.name), '')} ({expected(hints[field.name])}; default: {default})"
            is_section = field.default is dataclasses.MISSING
            about = argparse.SUPPRESS if is_section else text.strip().replace("%", "%%")
            group.add_argument(f"--{prefix}{field.name}", action=Given, metavar="VALUE", help=about)
    return parser


def _docstrings() -> dict[tuple[str, str], str]:
    """The text below each field of the recipe, by class and field."""
    classes = [node for node in ast.parse(inspect.getsource(config)).body if isinstance(node, ast.ClassDef)]
    return {
        (node.name, ast.unparse(field.target)): ast.literal_eval(text.value)
        for node in classes
        for field, text in pairwise(node.body)
        if isinstance(field, ast.AnnAssign) and isinstance(text, ast.Expr)
    }


def _sections(kind: type[Any], prefix: str = "") -> Iterator[tuple[str, type[Any]]]:
    """Every section with its full key and a dot, the recipe itself first."""
    yield prefix, kind
    for name, hint in get_type_hints(kind).items():
        if isinstance(hint, type) and dataclasses.is_dataclass(hint):
            yield from _sections(hint, f"{prefix}{name}.")


def check_words(stage: str, words: list[str], others: list[str]) -> None:
    """Raises ConfigError where a command has words that are no option of it, with the options that were meant."""
    unknown = [word.partition("=")[0].removeprefix("--") for word in others if word.startswith("--")]
    if unknown:
        hints = [f"did you mean {near}?" if (near := nearest_key(key)) else "--help lists every key" for key in unknown]
        raise ConfigError("\n".join(f"unknown key {key}; {hint}" for key, hint in zip(unknown, hints, strict=True)))
    if not others:
        return
    rest, meant = list(others), []
    for word in words:
        is_other = bool(rest) and word == rest[0]
        meant += meant_by(stage, rest.pop(0)) if is_other else [word]
    inputs = [word for option, word in pairwise(meant) if option == "--infer.input"]
    if len(inputs) > 1:  # as `songs/*.wav` becomes
        at = meant.index("--infer.input")
        rest = [w for i, w in enumerate(meant) if "--infer.input" not in (w, meant[i - 1])]
        meant = [*rest[:at], "--infer.input", f"[{', '.join(inputs)}]", *rest[at:]]
    if meant != words:
        raise ConfigError(f"{others[0]!r} is no option; did you mean: rvc-dist {stage} {shlex.join(meant)}")
    raise ConfigError(f"{others[0]!r} is no option; expected --section.key VALUE (--help lists every key)")


def meant_by(stage: str, word: str) -> list[str]:
    """The options that a word which belongs to none was probably meant as."""
    text, equals, value = word.partition("=")
    suffix = Path(word).suffix
    if word == "-c":  # the file's name follows
        return []
    if not equals and suffix in (".yaml", ".yml"):
        return ["--config", word]
    if not equals and stage == "infer" and suffix:
        return [{".pth": "--infer.model", ".index": "--infer.index"}.get(suffix, "--infer.input"), word]
    key = nearest_key(text.lstrip("-"))
    return [f"--{key}{equals}{value}"] if key else [word]


def nearest_key(text: str) -> str:
    """The key of the recipe that `text` resembles most, or an empty text."""
    keys = [f"{prefix}{field.name}" for prefix, kind in _sections(Recipe) for field in dataclasses.fields(kind)]
    return nearest(text.replace("-", "_"), ["config", *keys])


def shard_of(name: str, shards: list[str]) -> Shard:
    """Which part of a stage's work this process does, given the values of --shard."""
    if not shards:  # tasks of srun that were given theirs are not ranks
        adopt_slurm_ranks(os.environ)
    shard = Shard.from_environment()
    if shards and not STAGES[name].takes_shard:
        takers = ", ".join(n for n, s in STAGES.items() if s.takes_shard)
        raise ValueError(f"--shard: {name} is not a stage that can be split so, only {takers}")
    if len(shards) > 1:
        raise ValueError(f"--shard: got {', '.join(shards)}, expected one")
    for part in map(Shard.parse, shards):
        # Under a launcher too, each rank takes its part of the shard.
        shard = Shard(part.index * shard.count + shard.index, part.count * shard.count, array=True)
    return shard


def add_own_options(stage: Stage, parser: argparse.ArgumentParser) -> None:
    """Options of one stage alone, and short forms of keys."""
    for option in stage.options:
        about = option.about or argparse.SUPPRESS
        if option.passes:
            parser.add_argument(option.name, action="store_true", dest=option.passes, help=about)
        elif option.value:
            parser.add_argument(option.name, action=Given, dest=option.key, nargs=0, const=option.value, help=about)
        else:
            parser.add_argument(option.name, action=Given, dest=option.key, metavar="VALUE", help=about)


def with_folders(name: str, folders: list[str]) -> dict[str, Any]:
    """The files and folders of a command line as the arguments that the stage calls them.

    Raises:
        ValueError: there are more or fewer than it takes.
    """
    stage = STAGES[name]
    if stage.folders.endswith("...") or not stage.folders:
        return {stage.passes: folders} if stage.folders else {}
    names = stage.passes.split()
    if len(folders) != len(names):
        count = {1: "one", 2: "two"}[len(names)]
        raise ValueError(f"got {' and '.join(folders) or 'nothing'}, expected {count}: rvc-dist {name} {stage.folders}")
    return dict(zip(names, folders, strict=True))


def with_keys_of_stage(name: str, given: list[tuple[str, str]], more: dict[str, Any]) -> list[tuple[str, str]]:
    """The keys that are `given`, with those that stand before and after them in the commands of some stages."""
    if name == "demo":
        from rvc_dist.demo import demo_options

        return demo_options() + given
    if name == "push":
        run_dir = more.pop("run_dir")
        return [("config", os.path.join(run_dir, "config.yaml")), *given, ("run_dir", run_dir)]
    if name == "import":
        folder = os.path.abspath(more.pop("folder"))
        voice = os.path.basename(folder)  # the run is called after it
        more["given"] = [("name", voice), ("run_dir", f"runs/{voice}"), *given]
        return [*more["given"], ("data.audio_dir", folder)]
    return given


def parse(name: str, words: list[str]) -> tuple[Recipe, Shard, dict[str, Any]]:
    """The recipe, which part of the work this process does, and what the stage's `run` is given besides."""
    stage = STAGES[name]
    about = stage.about + (" --shard I/N does every N-th unit of work, for job arrays." if stage.takes_shard else "")
    parser = recipe_parser(f"{name} {stage.folders}".strip(), about)
    parser.add_argument("--shard", action="append", default=[], help=argparse.SUPPRESS)
    add_own_options(stage, parser)
    found, others = parser.parse_known_args(words)
    folders = [word for word in others if stage.folders and not word.startswith("-")]
    check_words(name, words, [word for word in others if word not in folders])
    shard = shard_of(name, found.shard)
    more = with_folders(name, folders)
    more |= {option.passes: getattr(found, option.passes) for option in stage.options if option.passes}
    recipe = recipe_of(with_keys_of_stage(name, found.given, more))
    if found.print_config:
        print(recipe.to_yaml(), end="")
        raise SystemExit(0)
    return recipe, shard, more
