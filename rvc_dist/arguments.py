"""What the words of a command line say: the recipe, the part of the work, and what a stage takes besides."""

from __future__ import annotations

import argparse
import ast
import dataclasses
import inspect
import os
import re
import shlex
import shutil
import textwrap
from collections.abc import Callable, Iterator
from functools import cache, partial
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple, get_type_hints

from rvc_dist import config
from rvc_dist.config import ConfigError, Recipe, recipe_of
from rvc_dist.schema import expected, nearest
from rvc_dist.screen import DETAILS
from rvc_dist.stages import STAGES, Stage
from rvc_dist.workspace import Shard, adopt_slurm_ranks

CONFIG_HELP = (
    "A recipe: a YAML file, or the name of one that comes with rvc_dist (rvc-dist recipes), where no file NAME or "
    "NAME.yaml is here. Of several the later ones count; keys of the command line count more than any."
)
HELP_OPTIONS = ("-h", "--help")


class Given(argparse.Action):
    """Appends (key, text) to `given`, in the order of the command line."""

    def __call__(self, parser: object, namespace: argparse.Namespace, values: Any, option: object = None) -> None:
        namespace.given.append((self.dest, values or self.const or ""))


class WholeNames(argparse.RawDescriptionHelpFormatter):
    """Breaks no line within a name such as crepe-tiny, which is copied from it."""

    def _split_lines(self, text: str, width: int) -> list[str]:
        return textwrap.wrap(" ".join(text.split()), width, break_on_hyphens=False)


def stage_parser(name: str, shows: Callable[[str], bool] = lambda key: True) -> argparse.ArgumentParser:
    """A parser of all that a stage takes. Its help has those keys of the recipe that `shows` says: what each means,
    what it may be, and its default."""
    stage = STAGES[name]
    words = ["[--config FILE] [--section.key VALUE ...]"] if stage.reads else []
    own = [f"[{f'{option.name} {option.metavar}'.strip()}]" for option in stage.options if option.about]
    words += own if len(own) < 3 else ["[OPTIONS]"]
    columns = shutil.get_terminal_size((100, 24)).columns
    parser = argparse.ArgumentParser(
        prog=f"rvc-dist {name}",
        usage=" ".join(["%(prog)s", *words, stage.folders]).strip(),
        description=stage.about,
        epilog=epilog(name),
        formatter_class=partial(WholeNames, max_help_position=36, width=max(80, min(120, columns))),
        allow_abbrev=False,
        add_help=False,
        exit_on_error=False,
    )
    parser.set_defaults(given=[])
    about = "Show this; with `all` every key of the recipe, with another word the keys that have it."
    parser.add_argument(*HELP_OPTIONS, nargs="?", const="", metavar="all", help=about if stage.reads else "Show this.")
    parser.add_argument("--quiet", action="store_true", help="Show warnings and errors alone, and no progress.")
    parser.add_argument("--verbose", action="store_true", help="Show every line of every rank.")
    add_own_options(stage, parser)
    if stage.reads:
        parser.add_argument("--config", action=Given, metavar="FILE", help=CONFIG_HELP)
        parser.add_argument("--print_config", action="store_true", help="Print the whole recipe, and do nothing.")
        add_keys(parser, shows)
        for key in config.OLD_KEYS:
            parser.add_argument(f"--{key}", action=Given, help=argparse.SUPPRESS)
    return parser


def epilog(name: str) -> str:
    """What stands below the options of a stage: where the other keys are, and commands that work."""
    stage = STAGES[name]
    others = f"Keys of other stages: rvc-dist {name} --help all; section.key=VALUE is the same as --section.key VALUE."
    examples = [f"  rvc-dist {name} {example}".rstrip() for example in stage.examples]
    return "\n".join(([others, ""] if stage.reads else []) + (["examples:", *examples] if examples else []))


def add_own_options(stage: Stage, parser: argparse.ArgumentParser) -> None:
    """Options of one stage alone, and short forms of keys."""
    shard_help = "Do every N-th unit of work, for job arrays." if stage.takes_shard else argparse.SUPPRESS
    parser.add_argument("--shard", action="append", default=[], metavar="I/N", help=shard_help)
    for option in stage.options:
        add = partial(parser.add_argument, option.name, help=option.about or argparse.SUPPRESS)
        if option.key and option.value:
            add(action=Given, dest=option.key, nargs=0, const=option.value)
        elif option.key:
            add(action=Given, dest=option.key, metavar=option.metavar or "VALUE")
        elif option.metavar:
            read = str if option.least is None else partial(whole_number, option.least)
            add(dest=option.passes, metavar=option.metavar, type=read)
        else:
            add(action="store_true", dest=option.passes)


def whole_number(least: int, text: str) -> int:
    """Raises ArgumentTypeError where `text` is none, or below `least`."""
    if not (text.isascii() and text.isdecimal() and least <= int(text) <= 1_000_000):
        raise argparse.ArgumentTypeError(f"got {text!r}, expected a whole number, at least {least}")
    return int(text)


def add_keys(parser: argparse.ArgumentParser, shows: Callable[[str], bool]) -> None:
    """Every key of the recipe, one group a section."""
    for section, about, keys in sections():
        title = re.split("[.:]", about)[0]
        group = parser.add_argument_group(f"{title} ({section})" if section else title)
        for key in keys:
            default = key.default and f"; default: {key.default}"
            text = f"{key.meaning} ({expected(key.kind)}{default})".strip().replace("%", "%%")
            is_hidden = key.is_section or not shows(key.name)
            about = argparse.SUPPRESS if is_hidden else text
            group.add_argument(f"--{key.name}", action=Given, metavar="VALUE", help=about)


class Key(NamedTuple):
    """A key of the recipe; a whole section is one too."""

    name: str
    """In full."""
    kind: Any
    meaning: str
    default: str
    """As YAML writes it; empty where the meaning says what counts without a value."""
    is_section: bool


def sections(kind: type[Any] = Recipe, prefix: str = "") -> Iterator[tuple[str, str, list[Key]]]:
    """Every section: its full name (empty for the recipe itself), what it is, and its keys."""
    docs, hints, keys = _docstrings(), get_type_hints(kind, include_extras=True), []
    for field in dataclasses.fields(kind):
        default: Any = field.default
        is_section = default is dataclasses.MISSING
        text = "" if is_section else {None: "null", (): "[]"}.get(default, str(default))
        text = text.lower() if isinstance(default, bool) else text
        meaning = docs.get((kind.__name__, field.name), "")
        keys.append(Key(f"{prefix}{field.name}", hints[field.name], meaning, text, is_section))
    yield prefix.rstrip("."), str(kind.__doc__), keys
    for key in keys:
        if key.is_section:
            yield from sections(key.kind, f"{key.name}.")


@cache
def _docstrings() -> dict[tuple[str, str], str]:
    """The text below each field of the recipe, by class and field."""
    classes = [node for node in ast.parse(inspect.getsource(config)).body if isinstance(node, ast.ClassDef)]
    return {
        (node.name, ast.unparse(field.target)): ast.literal_eval(text.value)
        for node in classes
        for field, text in pairwise(node.body)
        if isinstance(field, ast.AnnAssign) and isinstance(text, ast.Expr)
    }


def key_types() -> dict[str, Any]:
    """Every key of the recipe, and the type of its value."""
    return {key.name: key.kind for _, _, keys in sections() for key in keys}


def as_options(stage: Stage, words: list[str]) -> list[str]:
    """`words` with `--` before each `key=value`, unless it is the value of an option."""
    takes_none = {*HELP_OPTIONS, *DETAILS, "--print_config"}
    takes_none |= {o.name for o in stage.options if o.value or not (o.key or o.metavar)}
    keys = {"config", *key_types()}
    found = []
    for before, word in pairwise(["", *words]):
        is_value = before.startswith("--") and "=" not in before and before not in takes_none
        key, equals, _ = word.partition("=")
        is_key = key in keys or (key.partition(".")[0] in keys and "." in key)  # the latter is told with what was meant
        found.append(f"--{word}" if equals and is_key and not is_value else word)
    return found


def check_words(stage: str, words: list[str], others: list[str]) -> None:
    """Raises ConfigError where a command has words that are no option of it, with the options that were meant."""
    unknown = [word.partition("=")[0].removeprefix("--") for word in others if word.startswith("--")]
    if unknown and not STAGES[stage].reads:
        raise ConfigError(f"unknown option --{unknown[0]}; rvc-dist {stage} --help lists them")
    if unknown:
        hints = [
            f"did you mean {near}?" if (near := nearest_key(key)) else "--help all lists every key" for key in unknown
        ]
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
    wanted = "--section.key VALUE (--help all lists every key)" if STAGES[stage].reads else "those that --help lists"
    raise ConfigError(f"{others[0]!r} is no option; expected {wanted}")


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
    return nearest(text.replace("-", "_"), ["config", *key_types()])


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
    if name == "status":
        more["given"] = given  # each run has a recipe of its own
    if name == "import":
        folder = os.path.abspath(more.pop("folder"))
        voice = os.path.basename(folder)  # the run is called after it
        more["given"] = [("name", voice), ("run_dir", f"runs/{voice}"), *given]
        return [*more["given"], ("data.audio_dir", folder)]
    return given


def parse(name: str, words: list[str]) -> tuple[Recipe, Shard, dict[str, Any]]:
    """The recipe, which part of the work this process does, and what the stage's `run` is given besides.

    Raises:
        argparse.ArgumentError, ValueError, OSError: the user's mistake, in a sentence.
        SystemExit: it was asked for help or for the recipe, which is printed.
    """
    stage = STAGES[name]
    command: list[str] = []
    if stage.passes == "command":  # the words behind `--` are those of another stage
        at = next((i for i, word in enumerate(words) if word == "--" or word in STAGES), len(words))
        if words[at:] and words[at] != "--":
            meant = shlex.join(["rvc-dist", name, *words[:at], "--", *words[at:]])
            raise ConfigError(f"the stage stands behind --; did you mean: {meant}")
        words, command = words[:at], words[at + 1 :]
    words = as_options(stage, words)
    found, others = stage_parser(name).parse_known_args(words)
    if found.help is not None:
        print_help(name, found.help)
    folders = [word for word in others if stage.folders and not command and not word.startswith("-")]
    check_words(name, words, [word for word in others if word not in folders])
    shard = shard_of(name, found.shard)
    more = with_folders(name, folders + command)
    more |= {option.passes: getattr(found, option.passes) for option in stage.options if option.passes}
    files_first = sorted(found.given, key=lambda key_and_text: key_and_text[0] != "config")
    recipe = recipe_of(with_keys_of_stage(name, files_first, more))
    if stage.reads and found.print_config:
        print(recipe.to_yaml(), end="")
        raise SystemExit(0)
    return recipe, shard, more


def print_help(name: str, word: str) -> None:
    """The stage's keys, or with a word (`all`: every one) those that have it in their name.

    Raises:
        ConfigError: no key has it.
        SystemExit: always else.
    """
    if word not in ("", "all") and not any(word in key for key in key_types()):
        raise ConfigError(f"--help {word}: no key has {word!r} in its name; --help all lists every key")
    shows = STAGES[name].shows if not word else lambda key: word == "all" or word in key
    stage_parser(name, shows).print_help()
    raise SystemExit(0)
