"""The stages of `rvc-dist STAGE`: what each is, and what its command takes besides the recipe."""

from __future__ import annotations

from typing import NamedTuple


class Option(NamedTuple):
    """An option of one stage alone."""

    name: str
    about: str = ""
    """For the help, which does not show it without."""
    passes: str = ""
    """The argument of the stage's `run` that is True with it."""
    key: str = ""
    """The key of the recipe that it is short for."""
    value: str = ""
    """That key's value; empty: it follows the option."""


class Stage(NamedTuple):
    module: str
    """Module with `run(recipe, shard)`, which may return an exit code; imported only when the stage runs."""
    about: str
    takes_shard: bool = False
    folders: str = ""
    """The files and folders that it takes besides the recipe, as its usage has them; any number with `...`."""
    passes: str = ""
    """The arguments of `run` that these become: one each, or a list of all."""
    options: tuple[Option, ...] = ()
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
        "rvc_dist.voice.export",
        "Write voice files, base models or an experiment's folder from the run's checkpoints.",
        options=(Option("--as", key="export.format"), Option("--layout", key="export.format")),
    ),
    "push": Stage(
        "rvc_dist.voice.hub",
        "Put a run's newest voice on the Hugging Face hub.",
        folders="RUN OWNER/NAME",
        passes="run_dir repository",
    ),
    "infer": Stage(
        "rvc_dist.voice.infer", "Convert recordings with a trained voice.", takes_shard=True, keeps_log=False
    ),
    "blend": Stage(
        "rvc_dist.voice.blend",
        "Mix two voice files into one.",
        folders="A.pth B.pth",
        passes="first second",
        keeps_log=False,
    ),
    "run": Stage(
        "rvc_dist.pipeline",
        "All of it in order: preprocess, extract, index, train, export.",
        options=(Option("--look-ahead", "Begin nothing: look for what a stage will need.", passes="only_look"),),
    ),
    "import": Stage(
        "rvc_dist.tools.import_experiment",
        "Take over an experiment folder of Applio, ARVC, RVC-WebUI or rvc-next, such as logs/NAME.",
        folders="DIR",
        passes="folder",
    ),
    "dataset": Stage(
        "rvc_dist.tools.dataset_stats",
        "Show minutes, loudness and pitch of a run's clips, and what was left out; compare runs. --json prints JSON.",
        folders="RUN ...",
        passes="runs",
        options=(Option("--json", "Print JSON.", passes="as_json"),),
        keeps_log=False,
    ),
    "report": Stage(
        "rvc_dist.report.page",
        "Write RUN/report.html: what to keep, listen to and mind of a run; of several runs, how they differ.",
        folders="RUN ...",
        passes="runs",
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
        passes="paths",
        keeps_log=False,
    ),
    "bench": Stage(
        "rvc_dist.tools.bench",
        "Measure training steps; --parity compares losses with float32 ones.",
        options=(Option("--parity", key="bench.parity", value="true"),),
    ),
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
