"""From words and YAML files to a recipe: `[--config FILE] [--section.key VALUE] ...`, and the help about it."""

from __future__ import annotations

import argparse
import ast
import contextlib
import dataclasses
import inspect
import shlex
from collections.abc import Iterable, Iterator
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any, get_type_hints

from rvc_dist import config
from rvc_dist.config import ConfigError, Recipe
from rvc_dist.schema import MAX_YAML_BYTES, SchemaError, expected, faults, nearest, parse_yaml, read_bounded, types_of


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


def recipe_of(given: Iterable[tuple[str, str]]) -> Recipe:
    """The recipe of (key, text) in their order; the key `config` stands for a file's keys.

    Raises:
        ConfigError: unknown keys in a file, wrong types, values out of range, or a file that cannot be read.
    """
    tree: dict[str, Any] = {}
    problems: list[str] = []
    for key, text in given:
        where = ""
        found: Any = text
        if key == "config":
            where, found = f"{text}: ", _read_file(Path(text))
        else:
            for part in reversed(key.split(".")):
                found = {part: found}
        found = as_types(found, Recipe)
        problems += [where + fault.sentence for fault in faults(found, Recipe) if not fault.is_bound]
        _merge(tree, found)
    if problems:
        problems += [fault.sentence for fault in faults(tree, Recipe) if fault.is_bound]
        raise ConfigError("\n".join(problems))
    recipe: Recipe = _build(Recipe, tree)
    return recipe


def load_recipe(path: Path) -> Recipe:
    """The recipe in a YAML file."""
    return recipe_of([("config", str(path))])


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


def as_types(value: Any, kind: Any) -> Any:
    """`value` with what is text read as YAML, and whole numbers made others, where `kind` says so."""
    types = types_of(kind)
    if isinstance(value, str) and value.strip() and str not in types:
        with contextlib.suppress(SchemaError, UnicodeError):
            value = parse_yaml(value.encode())
    if value in ("null", "~") and type(None) in types:
        return None
    if type(value) is int and float in types:
        return float(value)
    if isinstance(value, list) and tuple in types:
        return tuple(as_types(item, int) for item in value)
    if isinstance(value, dict) and dataclasses.is_dataclass(kind):
        hints = get_type_hints(kind, include_extras=True)
        return {k: as_types(v, hints[k]) if k in hints else v for k, v in value.items()}
    return value


def _read_file(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise ConfigError(f"--config: {path} {'is not a file' if path.exists() else 'does not exist'}")
    try:
        tree = parse_yaml(read_bounded(path, MAX_YAML_BYTES))
    except (SchemaError, OSError) as error:
        raise ConfigError(f"--config: {path} is no recipe: {error}") from error
    if not isinstance(tree, dict | None):
        raise ConfigError(f"--config: {path} holds a {type(tree).__name__}, expected keys such as name: and train:")
    return tree or {}


def _merge(tree: dict[str, Any], more: dict[str, Any]) -> None:
    for key, value in more.items():
        if isinstance(value, dict) and isinstance(tree.get(key), dict):
            _merge(tree[key], value)
        else:
            tree[key] = value


def _build(kind: type[Any], values: dict[str, Any]) -> Any:
    """A dataclass of `kind` from nested plain data."""
    hints = get_type_hints(kind)
    return kind(**{k: _build(hints[k], v) if dataclasses.is_dataclass(hints[k]) else v for k, v in values.items()})


def _sections(kind: type[Any], prefix: str = "") -> Iterator[tuple[str, type[Any]]]:
    """Every section with its full key and a dot, the recipe itself first."""
    yield prefix, kind
    for name, hint in get_type_hints(kind).items():
        if isinstance(hint, type) and dataclasses.is_dataclass(hint):
            yield from _sections(hint, f"{prefix}{name}.")
