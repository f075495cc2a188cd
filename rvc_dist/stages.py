"""The stages of `rvc-dist STAGE`: what each is, what of the recipe it reads, and what its command takes besides."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import NamedTuple


class Option(NamedTuple):
    """An option of one stage alone."""

    name: str
    about: str = ""
    """For the help, which does not show it without."""
    passes: str = ""
    """The argument of the stage's `run` that gets its value, or is True with it."""
    metavar: str = ""
    """What the help calls the value that follows it; empty: none does."""
    least: int | None = None
    """The value is a whole number, of at least this."""
    key: str = ""
    """The key of the recipe that it is short for, instead."""
    value: str = ""
    """That key's value; empty: it follows the option."""


class Stage(NamedTuple):
    module: str
    """Module with `run(recipe, shard)`, which may return an exit code; imported only when the stage runs."""
    about: str
    reads: str = "name run_dir"
    """The sections and single keys of the recipe that decide what it does, which its help has; empty: it takes none."""
    checks: str = ""
    """Those besides that it compares with what the stages before it made, or that are of interest to few."""
    examples: tuple[str, ...] = ()
    """Words after `rvc-dist STAGE`, each a command that works."""
    takes_shard: bool = False
    folders: str = ""
    """The files and folders that it takes besides the recipe, as its usage has them; any number with `...`."""
    passes: str = ""
    """The arguments of `run` that these become: one each, or a list of all."""
    options: tuple[Option, ...] = ()
    keeps_log: bool = True
    """Whether its lines belong into RUN/logs: not those of a stage that works on no run, or only looks at it."""
    function: str = "run"
    """The name of `run` in a module of several stages."""

    def load(self) -> Callable[..., int | None]:
        function: Callable[..., int | None] = getattr(importlib.import_module(self.module), self.function)
        return function

    def shows(self, key: str) -> bool:
        """Whether it reads the key of the recipe."""
        return any(key == entry or key.startswith(f"{entry}.") for entry in self.reads.split())


TRAINING = ("train", "run")
"""Stages that hold the run folder's lock."""

_RUN = "name run_dir data preprocess extract index model train export"
_REMOTE = "data.remote data.cache_dir data.cache_gb"
_KERNELS = "train.fast_train train.deterministic"
_SAMPLING = "data.holdout data.holdout_speakers data.balance data.read_order data.window_gb"
_CUTS = "preprocess.chunk_len preprocess.overlap_len preprocess.cut_method"
_FORMATS = "preprocess.clip_format extract.content_format"
_TRACKERS = "extract.f0_model extract.f0_penn_model extract.f0_djcm_model extract.f0_crepe_model"

STAGES = {
    "new": Stage(
        "rvc_dist.tools.recipes",
        "Write NAME.yaml, a recipe with a run folder of its own, from one that comes with rvc_dist.",
        reads="",
        examples=("alice", "alice --recipe rtx"),
        folders="NAME",
        passes="name",
        options=(Option("--recipe", "The recipe to begin with (48k).", passes="recipe_name", metavar="RECIPE"),),
        keeps_log=False,
        function="new",
    ),
    "recipes": Stage(
        "rvc_dist.tools.recipes",
        "List the recipes that come with rvc_dist; --config takes their names.",
        reads="",
        keeps_log=False,
        function="recipes",
    ),
    "preprocess": Stage(
        "rvc_dist.data.preprocess",
        "Cut recordings into clips.",
        reads="name run_dir data.audio_dir data.sample_rate preprocess model.version",
        checks=_KERNELS,
        examples=("--config my.yaml", "--config my.yaml --data.audio_dir recordings", "--config my.yaml --shard 0/8"),
        takes_shard=True,
    ),
    "extract": Stage(
        "rvc_dist.features.extract",
        "Compute content features and pitch of the clips.",
        reads="name run_dir data.sample_rate extract model.version model.energy model.pitch_guidance",
        checks=f"data.audio_dir preprocess {_KERNELS}",
        examples=("--config my.yaml", "--config my.yaml --extract.f0_method fcpe", "--config my.yaml --shard 0/8"),
        takes_shard=True,
    ),
    "index": Stage(
        "rvc_dist.features.index",
        "Build the retrieval index over the content features.",
        reads="name run_dir index model.version",
        examples=("--config my.yaml", "--config my.yaml --index.speakers each"),
    ),
    "train": Stage(
        "rvc_dist.train.trainer",
        "Train the voice; continues from the newest checkpoint.",
        reads=f"name run_dir data.sample_rate {_SAMPLING} {_REMOTE} extract.include_mutes model train",
        checks="data.audio_dir preprocess extract export.author export.weights infer",
        examples=("--config my.yaml", "--config rtx run_dir=runs/alice train.batch_size=8 train.pretrained=rvc"),
    ),
    "export": Stage(
        "rvc_dist.voice.export",
        "Write voice files, base models or an experiment's folder from the run's checkpoints.",
        reads="name run_dir export",
        checks="data extract model preprocess.num_workers train",
        examples=("--config my.yaml", "--config my.yaml --layout applio", "--config my.yaml --as pretrained"),
        options=(Option("--as", key="export.format"), Option("--layout", key="export.format")),
    ),
    "push": Stage(
        "rvc_dist.voice.hub",
        "Put a run's newest voice on the Hugging Face hub.",
        reads="export",
        checks="name data extract model train",
        examples=("runs/alice me/alice",),
        folders="RUN OWNER/NAME",
        passes="run_dir repository",
    ),
    "infer": Stage(
        "rvc_dist.voice.infer",
        "Convert recordings with a trained voice.",
        reads=f"name run_dir infer {_TRACKERS} extract.unvoiced",
        checks=f"extract preprocess.process_effects model.version {_KERNELS}",
        examples=(
            "--infer.model voice.pth --infer.input song.wav --infer.output converted.wav --infer.pitch 5",
            "--config runs/alice/config.yaml --infer.input songs/ --infer.output converted/",
        ),
        takes_shard=True,
        keeps_log=False,
    ),
    "blend": Stage(
        "rvc_dist.voice.blend",
        "Mix two voice files into one.",
        reads="blend export.author",
        examples=("A.pth B.pth --blend.ratio 0.3 --blend.output mix.pth",),
        folders="A.pth B.pth",
        passes="first second",
        keeps_log=False,
    ),
    "run": Stage(
        "rvc_dist.pipeline",
        "All of it in order: preprocess, extract, index, train, export.",
        reads=_RUN,
        examples=("--config my.yaml", "--config 48k name=alice data.audio_dir=recordings train.pretrained=rvc"),
        options=(Option("--look-ahead", "Begin nothing: look for what a stage will need.", passes="only_look"),),
    ),
    "launch": Stage(
        "rvc_dist.launching",
        "Run a stage on several ranks: prints the launcher's command, and becomes it.",
        reads="",
        examples=(
            "--gpus 4 -- run --config my.yaml",
            "--cpu 2 -- train --config my.yaml",
            "--gpus 8 --nodes 2 --node_rank 0 --main_ip 10.0.0.1 -- run --config my.yaml",
            "--gpus 8 --nodes 1:4 --main_ip 10.0.0.1 -- run --config my.yaml",
        ),
        folders="-- STAGE ...",
        passes="command",
        options=(
            Option("--gpus", "GPUs of this machine, one rank each (all that it has).", "gpus", "N", 1),
            Option("--cpu", "Ranks on the CPU instead, to try things.", "cpu", "N", 1),
            Option(
                "--nodes",
                "Machines, or FEWEST:MOST where they come and go; give the command on each (1).",
                "nodes",
                "N",
            ),
            Option("--node_rank", "Which of them this is, from 0.", "node_rank", "R", 0),
            Option("--main_ip", "Address of machine 0, or of the meeting point.", "main_ip", "HOST"),
            Option("--main_port", "A port there that is free (29500).", "main_port", "PORT", 1),
            Option("--meeting_point", "Start no ranks: be the meeting point of others' --nodes.", "meeting_point"),
            Option("--dry-run", "Print the command alone.", "only_print"),
        ),
        keeps_log=False,
    ),
    "import": Stage(
        "rvc_dist.tools.import_experiment",
        "Take over an experiment folder of Applio, ARVC, RVC-WebUI or rvc-next, such as logs/NAME.",
        reads="name run_dir data extract index model preprocess.num_workers preprocess.clip_format",
        checks="preprocess train",
        examples=("logs/alice", "logs/alice --extract.embedder_model FOLDER"),
        folders="DIR",
        passes="folder",
    ),
    "dataset": Stage(
        "rvc_dist.tools.dataset_stats",
        "Look at recordings before they are cut, and at what the recipe would keep; or at the clips of runs.",
        reads="name run_dir data.audio_dir data.sample_rate preprocess model.version",
        checks=_KERNELS,
        examples=("audio --config 40k", "corpus.jsonl --config my.yaml --survey", "runs/alice runs/bob --json"),
        takes_shard=True,
        folders="DIR ...",
        passes="folders",
        options=(
            Option("--json", "Print JSON.", passes="as_json"),
            Option("--survey", "Of a corpus, lengths, rates and speakers alone: for ranks and --shard.", "surveys"),
        ),
        keeps_log=False,
    ),
    "report": Stage(
        "rvc_dist.report.page",
        "Write RUN/report.html: what to keep, listen to and mind of a run; of several runs, how they differ.",
        folders="RUN ...",
        passes="runs",
        keeps_log=False,
    ),
    "status": Stage(
        "rvc_dist.tools.status",
        "Say what is done of a run, what is stale and why, who works on it now and how far that is.",
        checks=_RUN,
        examples=("runs/alice", "runs/* --json", "runs/alice --config my.yaml"),
        folders="RUN ...",
        passes="runs",
        options=(
            Option("--json", "Print JSON, whose keys stay what they are.", passes="as_json"),
            Option("--watch", "Look again every few seconds.", passes="watches"),
        ),
        keeps_log=False,
    ),
    "fetch": Stage(
        "rvc_dist.tools.fetch",
        "Get the encoder, the pitch tracker's weights and the base model from the hub, for work without network.",
        reads="extract train.pretrained train.pretrained_g train.pretrained_d model data.sample_rate",
        examples=("--config my.yaml",),
        keeps_log=False,
    ),
    "inspect": Stage(
        "rvc_dist.tools.inspect_file",
        "Say what a .pth, index, checkpoint, run or experiment is, and whether it fits the recipe.",
        reads="name run_dir data.sample_rate model extract.embedder_model",
        examples=("voice.pth", "G_2333333.pth runs/alice --config my.yaml"),
        folders="FILE ...",
        passes="paths",
        keeps_log=False,
    ),
    "upload": Stage(
        "rvc_dist.tools.upload",
        "Put clips and features on object storage, to train from there.",
        reads="name run_dir data.remote",
        examples=("--config my.yaml --data.remote s3://bucket/alice", "--config my.yaml --shard 0/8"),
        takes_shard=True,
    ),
    "bench": Stage(
        "rvc_dist.tools.bench",
        "Measure training steps; --parity compares losses with float32 ones.",
        reads=f"name run_dir data.sample_rate {_SAMPLING} model train bench",
        checks="data.audio_dir data.remote preprocess extract",
        examples=("--config my.yaml", "--config my.yaml --bench.plain true", "--config my.yaml --parity"),
        options=(Option("--parity", key="bench.parity", value="true"),),
    ),
    "doctor": Stage(
        "rvc_dist.tools.doctor",
        "Check ranks, devices, network, disk, data and weights before training; exits with 1 on errors, 3 on warnings.",
        reads="name run_dir data preprocess extract model train",
        examples=("--config my.yaml",),
        keeps_log=False,
    ),
    "plan": Stage(
        "rvc_dist.tools.plan",
        "Say what the run will cost on any number of ranks, and how many are worth it.",
        reads=f"name run_dir data {_CUTS} {_FORMATS} extract.include_mutes model train plan",
        checks="bench",
        examples=("--config my.yaml --plan.ranks 16",),
        keeps_log=False,
    ),
    "demo": Stage(
        "rvc_dist.demo",
        "The whole job on the embedded demo voice.",
        reads=f"{_RUN} infer",
        examples=("", "--run_dir runs/demo"),
    ),
    "files": Stage(
        "rvc_dist.tools.recipes",
        "Say where the files of launch/ and slurm/ are; with a folder, copy them into it to work from there.",
        reads="",
        examples=("", "."),
        folders="[DIR] ...",
        passes="folders",
        keeps_log=False,
        function="files",
    ),
    "completion": Stage(
        "rvc_dist.completion",
        "Print a script that lets the TAB key complete commands in bash, zsh or tcsh.",
        reads="",
        examples=("bash > ~/.local/share/bash-completion/completions/rvc-dist", "zsh > ~/.zfunc/_rvc-dist"),
        folders="SHELL",
        passes="shell",
        keeps_log=False,
    ),
}
