"""From words and YAML files to a recipe: `[--config FILE] [--section.key VALUE] ...`, and the help about it."""

from __future__ import annotations

import ast
import contextlib
import dataclasses
import inspect
import textwrap
from collections.abc import Iterable, Iterator
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any, TypeAlias, get_type_hints

from rvc_dist import config
from rvc_dist.config import ConfigError, Recipe
from rvc_dist.schema import MAX_YAML_BYTES, SchemaError, expected, faults, nearest, parse_yaml, read_bounded, types_of

FLAGS = {"-h", "--help", "--print_config", "--json", "--parity"}
"""Options that no value follows."""
Options: TypeAlias = list[tuple[str, str | None]]
"""(option, its value), ("", word) of a word that is neither; None: a flag has no value, or it is lacking."""


def split_words(words: Iterable[str]) -> Options:
    options: Options = []
    rest = iter(words)
    for word in rest:
        option, equals, value = word.partition("=")
        if not word.startswith("-"):
            options.append(("", word))
        elif equals:
            options.append((option, value))
        else:
            options.append((option, None if option in FLAGS else next(rest, None)))
    return options


def join_words(options: Options) -> list[str]:
    return [word for option in options for word in option if word]


def parse_recipe(stage: str, words: Iterable[str], about: str = "") -> Recipe:
    """The recipe that the words of a command line give: `recipe_of` them."""
    return recipe_of(stage, split_words(words), about)


def recipe_of(stage: str, options: Options, about: str = "") -> Recipe:
    """The recipe that options give; later ones override earlier ones.

    `--help` prints every key, `--print_config` the whole recipe; then it exits.

    Raises:
        ConfigError: unknown keys, wrong types, values out of range, or a file that cannot be read.
    """
    flags = {option for option, value in options if value is None}
    if {"-h", "--help"} & flags:
        print(help_text(stage, about))  # noqa: T201
        raise SystemExit(0)
    tree: dict[str, Any] = {}
    problems: list[str] = []
    for option, value in options:
        key = option.removeprefix("--")
        if option == "--print_config":
            continue
        if key not in KEYS and key != "config":
            near = nearest_key(key)
            problems.append(f"unknown key {key}; " + (f"did you mean {near}?" if near else "--help lists every key"))
            continue
        if value is None:
            problems.append(f"{option}: got no value")
            continue
        is_file = key == "config"
        found = as_types(_read_file(Path(value)) if is_file else _nested(key, value), Recipe)
        where = f"{value}: " if is_file else ""
        problems += [where + fault.sentence for fault in faults(found, Recipe) if not fault.is_bound]
        _merge(tree, found)
    if problems:
        problems += [fault.sentence for fault in faults(tree, Recipe) if fault.is_bound]
        raise ConfigError("\n".join(problems))
    recipe: Recipe = _build(Recipe, tree)
    if "--print_config" in flags:
        print(recipe.to_yaml(), end="")  # noqa: T201
        raise SystemExit(0)
    return recipe


def load_recipe(path: Path) -> Recipe:
    """The recipe in a YAML file."""
    return recipe_of("", [("--config", str(path))])


def nearest_key(text: str) -> str:
    """The key of the recipe that `text` resembles most, or an empty text."""
    return nearest(text.replace("-", "_"), ["config", *KEYS])


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


def _nested(key: str, value: str) -> dict[str, Any]:
    first, _, rest = key.partition(".")
    return {first: _nested(rest, value) if rest else value}


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


KEYS = [f"{prefix}{field.name}" for prefix, kind in _sections(Recipe) for field in dataclasses.fields(kind)]


def help_text(stage: str, about: str) -> str:
    """What the stage does, and every key with its meaning, what it may be, and its default."""
    wrap = partial(textwrap.wrap, width=100, initial_indent=" " * 8, subsequent_indent=" " * 8)
    lines = [f"usage: rvc-dist {stage} [--config FILE] [--section.key VALUE ...]", "", *textwrap.wrap(about, 100), ""]
    lines += ["  --config FILE", *wrap("Recipe file (YAML); later options override it.")]
    lines += ["  --print_config", *wrap("Print the whole recipe, and do nothing.")]
    docs = _docstrings()
    for prefix, kind in _sections(Recipe):
        lines += ["", *textwrap.wrap(str(kind.__doc__).partition("\n\n")[0], 100)]
        hints = get_type_hints(kind, include_extras=True)
        for field in dataclasses.fields(kind):
            if field.default is not dataclasses.MISSING:
                default = "null" if field.default is None else field.default
                text = docs.get(f"{kind.__name__}.{field.name}", "")
                lines += [
                    f"  --{prefix}{field.name}",
                    *wrap(f"{text} ({expected(hints[field.name])}; default: {default})"),
                ]
    return "\n".join(lines)


def _docstrings() -> dict[str, str]:
    """The text below each field of the recipe, by CLASS.FIELD."""
    classes = [node for node in ast.parse(inspect.getsource(config)).body if isinstance(node, ast.ClassDef)]
    return {
        f"{node.name}.{ast.unparse(field.target)}": ast.literal_eval(text.value)
        for node in classes
        for field, text in pairwise(node.body)
        if isinstance(field, ast.AnnAssign) and isinstance(text, ast.Expr)
    }
