"""The command line: `rvc-dist STAGE [--config FILE] [--section.key VALUE]`, equally `python -m rvc_dist`."""

from __future__ import annotations

import argparse
import ast
import dataclasses
import errno
import importlib
import inspect
import logging
import os
import shlex
import sys
from collections.abc import Iterator
from contextlib import nullcontext
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple, get_type_hints

from rvc_dist import __version__, config
from rvc_dist.config import ConfigError, Recipe, recipe_of
from rvc_dist.files import NO_SPACE, remove_half_written, space
from rvc_dist.runtime.hang_killer import end_with_launcher
from rvc_dist.runtime.logs import RankLog, rank_log
from rvc_dist.runtime.run_lock import may_be_held
from rvc_dist.schema import expected, nearest
from rvc_dist.workspace import Shard, StageError, Stopped, Workspace, adopt_slurm_ranks

EXIT_FAILED, EXIT_USAGE, EXIT_STOPPED = 1, 2, 75
"""75 is EX_TEMPFAIL: a checkpoint was written and the same command continues the run. The doctor has a 3 besides."""


OF_THE_DISK = NO_SPACE | {errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EEXIST, errno.EIO, errno.ESTALE}
"""Errors that are the disk's or the user's, also where the file is not known."""


class Stage(NamedTuple):
    module: str
    """Module with `run(recipe, shard)`, which may return an exit code; imported only when the stage runs."""
    about: str
    takes_shard: bool = False
    folders: str = ""
    """The folders that it takes besides the recipe, as its usage writes them."""
    keeps_log: bool = True
    """Whether its lines belong into RUN/logs: not those of a stage that works on no run, or only looks at it."""


TRAINING = ("train", "run")
"""Stages that hold the run folder's lock."""

STAGES = {
    "preprocess": Stage("rvc_dist.data.preprocess", "Cut recordings into clips.", takes_shard=True),
    "extract": Stage("rvc_dist.features.extract", "Compute content features and pitch of the clips.", takes_shard=True),
    "index": Stage("rvc_dist.features.index", "Build the retrieval index over the content features."),
    "train": Stage("rvc_dist.train.trainer", "Train the voice; continues from the newest checkpoint."),
    "export": Stage(
        "rvc_dist.voice.export", "Write voice files, base models or an experiment's folder from the run's checkpoints."
    ),
    "push": Stage("rvc_dist.voice.hub", "Put a run's newest voice on the Hugging Face hub.", folders="RUN OWNER/NAME"),
    "infer": Stage(
        "rvc_dist.voice.infer", "Convert recordings with a trained voice.", takes_shard=True, keeps_log=False
    ),
    "blend": Stage("rvc_dist.voice.blend", "Mix two voice files into one.", folders="A.pth B.pth", keeps_log=False),
    "run": Stage("rvc_dist.pipeline", "All of it in order: preprocess, extract, index, train, export."),
    "import": Stage(
        "rvc_dist.tools.import_experiment",
        "Take over an experiment folder of Applio, ARVC, RVC-WebUI or rvc-next.",
        folders="DIR",
    ),
    "dataset": Stage(
        "rvc_dist.tools.dataset_stats",
        "Show minutes, loudness and pitch of a run's clips, and what was left out; compare runs. --json prints JSON.",
        folders="RUN ...",
        keeps_log=False,
    ),
    "fetch": Stage(
        "rvc_dist.tools.fetch",
        "Get the encoder, the pitch tracker's weights and the base model from the hub, for work without network.",
        keeps_log=False,
    ),
    "inspect": Stage(
        "rvc_dist.tools.inspect_file",
        "Say what a .pth, index, checkpoint, run or experiment is, and whether it fits the recipe.",
        folders="FILE ...",
        keeps_log=False,
    ),
    "bench": Stage("rvc_dist.tools.bench", "Measure training steps; --parity compares losses with float32 ones."),
    "doctor": Stage(
        "rvc_dist.tools.doctor",
        "Check ranks, devices, network, disk, data and weights before training; exits with 1 on errors, 3 on warnings.",
        keeps_log=False,
    ),
    "plan": Stage(
        "rvc_dist.tools.plan",
        "Say what the run will cost on any number of ranks, and how many are worth it.",
        keeps_log=False,
    ),
    "demo": Stage("rvc_dist.demo", "The whole job on the embedded demo voice."),
}


def usage() -> str:
    lines = ["usage: rvc-dist STAGE [--config FILE] [--section.key VALUE ...]", "", "stages:"]
    lines += [f"  {name:<12}{stage.about}" for name, stage in STAGES.items()]
    lines += ["", "`rvc-dist STAGE --help` lists every key of the recipe.", f"rvc_dist {__version__}"]
    return "\n".join(lines)


class StderrHandler(logging.Handler):
    """Writes to where sys.stderr points now: a live progress bar takes it over to print lines above itself."""

    def emit(self, record: logging.LogRecord) -> None:
        print(self.format(record), file=sys.stderr, flush=True)


def set_up_logging(shard: Shard) -> None:
    """On the screen INFO of the first rank, warnings of the others, each line with its rank when there are several."""
    rank = f"[rank {shard.index}] " if shard.count > 1 else ""
    screen = StderrHandler(logging.INFO if shard.is_first or shard.array else logging.WARNING)
    logging.basicConfig(
        level=logging.WARNING, format=f"%(asctime)s {rank}%(message)s", datefmt="%H:%M:%S", handlers=[screen]
    )
    logging.getLogger("rvc_dist").setLevel(logging.INFO)


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


def add_own_options(name: str, parser: argparse.ArgumentParser) -> None:
    """Options of one stage alone, and short forms of keys."""
    if name == "dataset":
        parser.add_argument("--json", action="store_true", help="Print JSON.")
    if name == "bench":
        parser.add_argument(
            "--parity", action=Given, dest="bench.parity", nargs=0, const="true", help=argparse.SUPPRESS
        )
    if name == "export":
        parser.add_argument("--as", "--layout", action=Given, dest="export.format", help=argparse.SUPPRESS)
    if name == "run":
        parser.add_argument("--look-ahead", action="store_true", help="Begin nothing: look for what a stage will need.")


def with_folders(
    name: str, folders: list[str], given: list[tuple[str, str]], more: dict[str, Any]
) -> tuple[list[tuple[str, str]], dict[str, Any]]:
    """What the folders of a command line add to the keys that are `given`, and to what the stage's `run` is given."""
    if name in ("push", "blend") and len(folders) != 2:
        got, expected = " and ".join(folders) or "nothing", f"rvc-dist {name} {STAGES[name].folders}"
        raise ValueError(f"got {got}, expected two: {expected}")
    if name == "push":
        run_dir, more["repository"] = folders
        given = [("config", os.path.join(run_dir, "config.yaml")), *given, ("run_dir", run_dir)]
    if name == "blend":
        more = dict(zip(("first", "second"), folders, strict=True))
    if name == "inspect":
        more = {"paths": folders}
    if name == "import":
        if len(folders) != 1:
            got = " and ".join(folders) or "no folder"
            raise ValueError(f"got {got}, expected one: rvc-dist import DIR, an experiment's folder, such as logs/NAME")
        folder = os.path.abspath(folders[0])
        voice = os.path.basename(folder)  # the run is called after it
        given = [("name", voice), ("run_dir", f"runs/{voice}"), *given]
        more = {"given": given}
        given = [*given, ("data.audio_dir", folder)]
    return given, more


def parse(name: str, words: list[str]) -> tuple[Recipe, Shard, dict[str, Any]]:
    """The recipe, which part of the work this process does, and what the stage's `run` is given besides."""
    stage = STAGES[name]
    about = stage.about + (" --shard I/N does every N-th unit of work, for job arrays." if stage.takes_shard else "")
    parser = recipe_parser(f"{name} {stage.folders}".strip(), about)
    parser.add_argument("--shard", action="append", default=[], help=argparse.SUPPRESS)
    add_own_options(name, parser)
    found, others = parser.parse_known_args(words)
    folders = [word for word in others if stage.folders and not word.startswith("-")]
    check_words(name, words, [word for word in others if word not in folders])
    shard, given, more = shard_of(name, found.shard), found.given, {}
    if name == "demo":
        from rvc_dist.demo import demo_options

        given = demo_options() + given
    if name == "run":
        more = {"only_look": found.look_ahead}
    if name == "dataset":
        more = {"runs": folders, "as_json": found.json}
    given, more = with_folders(name, folders, given, more)
    recipe = recipe_of(given)
    if found.print_config:
        print(recipe.to_yaml(), end="")
        raise SystemExit(0)
    return recipe, shard, more


def stopped_code() -> int:
    """EXIT_STOPPED; under an agent that would take it for a failure and start the ranks again at once, 0."""
    return 0 if int(os.environ.get("TORCHELASTIC_MAX_RESTARTS", "0")) else EXIT_STOPPED


def main(arguments: list[str] | None = None) -> int:
    end_with_launcher()
    arguments = sys.argv[1:] if arguments is None else arguments
    if not arguments or arguments[0] in ("-h", "--help"):
        print(usage())
        return 0 if arguments else EXIT_USAGE
    if arguments[0] == "--version":
        print(__version__)
        return 0
    name = arguments[0]
    if name not in STAGES:
        near = nearest(name, STAGES)
        hint = f"did you mean {near}?" if near else f"expected one of {', '.join(STAGES)}"
        if "." in name or name.startswith("-"):  # a file or an option
            stage = "run" if name.startswith("-") or name.endswith((".yaml", ".yml")) else "infer"
            words = arguments if name.startswith("-") else meant_by(stage, name) + arguments[1:]
            hint = f"did you mean: rvc-dist {stage} {shlex.join(words)}"
        print(f"rvc-dist: unknown stage {name!r}; {hint}", file=sys.stderr)
        return EXIT_USAGE
    try:
        recipe, shard, options = parse(name, arguments[1:])
    except (argparse.ArgumentError, ValueError, OSError) as error:
        print(f"rvc-dist {name}: {error}", file=sys.stderr)
        return EXIT_USAGE
    set_up_logging(shard)
    if not STAGES[name].keeps_log:
        return run_stage(name, recipe, shard, options)
    work = Workspace(recipe.run_dir, recipe.name)
    # What is refused because another job trains in the folder leaves nothing there.
    is_waiting = name in TRAINING and may_be_held(work.train_lock_file)
    with rank_log(work, shard, arguments, is_waiting) as log:
        try:
            return run_stage(name, recipe, shard, options, log)
        except Exception as error:
            log.failed(error)
            log.write_stacks()
            raise


def disk_sentence(error: OSError, recipe: Recipe) -> str | None:
    """What to tell the user of an error of the disk or of a path; None where a traceback says more: a fault of ours."""
    file = os.fsdecode(error.filename) if isinstance(error.filename, (str, bytes)) else None
    if error.errno not in OF_THE_DISK and (file is None or Path(file).is_relative_to(Path(__file__).parent)):
        return None
    where = file or f"a file of the run in {recipe.run_dir}"
    if error.errno in NO_SPACE:
        free = "" if " free" in str(error) else f"; {space(Path(file or recipe.run_dir))}"
        return f"{where}: {error.strerror}{free}. Free some space, or raise the limit, and run the same command"
    return f"{where}: {error.strerror}; this path must exist or be free to make, on a disk that works and lets you in"


def run_stage(name: str, recipe: Recipe, shard: Shard, options: dict[str, Any], log: RankLog | None = None) -> int:
    """Run a stage, tell the user's mistakes and the disk's in a sentence; its exit code."""
    if recipe.train.fast_train:  # before any stage uses a GPU: its allocator reads this once
        importlib.import_module("rvc_dist.runtime.device").set_allocator(recipe.train)
    try:
        if log is not None and shard.is_first:
            remove_half_written(log.work.root, ".*.tmp", "*/.*.tmp")
        with log.first_cause() if log is not None else nullcontext():
            code: int | None = importlib.import_module(STAGES[name].module).run(recipe, shard, **options)
    except Stopped as stopped:
        logging.getLogger("rvc_dist").warning("%s", stopped)
        return stopped_code()
    except (StageError, OSError) as error:
        reason = str(error) if isinstance(error, StageError) else disk_sentence(error, recipe)
        if reason is None:
            raise
        message = f"rvc-dist {name}: {reason}"
        print(message, file=sys.stderr, flush=True)
        if log is not None:
            log.failed(error, message)
        return EXIT_FAILED
    except KeyboardInterrupt:
        print(f"rvc-dist {name}: interrupted; the same command continues", file=sys.stderr)
        return EXIT_STOPPED
    return code or 0


if __name__ == "__main__":
    sys.exit(main())
