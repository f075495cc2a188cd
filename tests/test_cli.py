"""The command line as a user meets it: exit codes, quick answers, and a sentence for each mistake."""

from __future__ import annotations

import dataclasses
import errno
import os
import resource
import shlex
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import pytest
import soundfile
from helpers import RATE, changed, tone

from rvc_dist import __main__ as cli
from rvc_dist import __version__, demo, stages
from rvc_dist.arguments import key_types
from rvc_dist.config import Recipe
from rvc_dist.report.history import History
from rvc_dist.stages import STAGES, Stage
from rvc_dist.workspace import Shard, StageError, Stopped

SCRIPT = Path(sys.executable).with_name("rvc-dist")
HEAVY = ("torch", "numpy", "librosa", "accelerate", "transformers", "faiss", "soundfile", "tensorboard")


def rvc_dist(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "rvc_dist", *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False, env=environment or None)


@pytest.fixture(autouse=True)
def _alone(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(cli, "set_up_logging", lambda *_: None)


def cpu_s_of_children() -> float:
    """Of those that have ended. What they take says nothing of what else runs on the machine."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


# Help


def test_help_and_version(capsys: pytest.CaptureFixture[str]) -> None:
    for arguments, code in ([], 2), (["--help"], 0), (["-h"], 0):
        assert cli.main(arguments) == code
        text = capsys.readouterr().out
        assert text.startswith("usage: rvc-dist STAGE")
        for name, stage in STAGES.items():
            assert f"  {name} " in text
            assert stage.about in text
    assert cli.main(["--version"]) == 0
    assert capsys.readouterr().out == f"{__version__}\n"


def shown_keys(text: str) -> list[str]:
    """The keys of the recipe that a help has, in its order."""
    keys = key_types()
    return [key for line in text.splitlines() if (key := line.removeprefix("  --").partition(" ")[0]) in keys]


@pytest.mark.parametrize("name", STAGES)
def test_the_help_of_a_stage_has_its_keys_and_all_has_every_key(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    stage, texts = STAGES[name], []
    every = [key for key, kind in key_types().items() if not dataclasses.is_dataclass(kind)]
    for word, keys in ("", [key for key in every if stage.shows(key)]), ("all", every), ("pitch", PITCH_KEYS):
        with pytest.raises(SystemExit) as caught:
            cli.main([name, "--help", word] if word else [name, "--help"])
        assert caught.value.code == 0
        texts.append(capsys.readouterr().out)
        assert sorted(shown_keys(texts[-1])) == (sorted(keys) if stage.reads else [])
    assert texts[0].startswith(f"usage: rvc-dist {name}")
    assert stage.about in texts[0]
    assert ("--shard I/N" in texts[0]) is stage.takes_shard
    assert max(map(len, texts[0].splitlines())) <= 120
    if stage.examples:  # the last that one reads
        assert texts[0].endswith(f"  rvc-dist {name} {stage.examples[-1]}\n")


PITCH_KEYS = ["model.pitch_guidance", "infer.pitch", "infer.auto_pitch"]


def test_the_keys_of_an_entry_are_keys_of_the_recipe() -> None:
    named = {entry for stage in STAGES.values() for entry in f"{stage.reads} {stage.checks}".split()}
    assert named <= key_types().keys()


@pytest.mark.parametrize(("name", "example"), [(n, e) for n, stage in STAGES.items() for e in stage.examples])
def test_every_example_of_a_help_is_a_command(
    name: str, example: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for path in ("my.yaml", "runs/alice/config.yaml"):
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        Path(path).write_text("name: alice\n")
    words = shlex.split(example.partition(" > ")[0])
    recipe, shard, _ = cli.parse(name, words)
    assert isinstance(recipe, Recipe)
    assert shard.array is ("--shard" in words)


def test_the_words_of_a_help_say_what_a_value_may_be(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        cli.main(["train", "--help"])
    text = " ".join(capsys.readouterr().out.split())
    for part in (
        "--train.batch_size VALUE Clips a rank and micro-batch",
        "(a whole number, at least 1; default: 4)",
        "(one of fp32, bf16, fp16; default: fp32)",
        "(true or false; default: false)",
        "(a number, more than 0.0 or null; default: null)",
        "The networks (model):",
        "By default runs/NAME. (a text) ",
    ):
        assert part in text


def test_help_is_quick_and_imports_nothing_heavy() -> None:
    code = (
        "import sys\nfrom rvc_dist.__main__ import main\n"
        "try: main(sys.argv[1:])\nexcept SystemExit: pass\n"
        f"print('HEAVY', [m for m in {HEAVY} if m in sys.modules])"
    )
    for arguments in ["--help"], ["train", "--help"], ["demo", "--help"], ["infer", "--train.x", "1"]:
        began_at = cpu_s_of_children()
        done = subprocess.run(
            [sys.executable, "-c", code, *arguments], capture_output=True, text=True, check=True, timeout=20
        )
        assert done.stdout.splitlines()[-1] == "HEAVY []", arguments
        assert cpu_s_of_children() - began_at < 1.5, arguments


@pytest.mark.parametrize("arguments", [["--help"], ["trian"], ["infer", "--help"], ["train", "--nmae", "x"]])
def test_the_module_and_the_script_are_the_same(arguments: list[str]) -> None:
    module = rvc_dist(*arguments)
    script = subprocess.run([SCRIPT, *arguments], capture_output=True, text=True, check=False)
    assert (script.returncode, script.stdout, script.stderr) == (module.returncode, module.stdout, module.stderr)
    assert script.stdout + script.stderr


# Mistakes


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["trian"], "rvc-dist: unknown stage 'trian'; did you mean train?"),
        (["help"], "rvc-dist: unknown stage 'help'; expected one of new, recipes, preprocess, extract, index, train, "),
        (["train", "--train.batchsize", "3"], "unknown key train.batchsize; did you mean train.batch_size?"),
        (["train", "--trian.batch_size=3"], "unknown key trian.batch_size; did you mean train.batch_size?"),
        (["train", "--train.batch_size", "many"], "train.batch_size: got 'many', expected a whole number, at least 1"),
        (["train", "--train.batch_size", "0"], "train.batch_size: got 0, expected at least 1"),
        (["train", "--train.precision", "fp8"], "train.precision: got 'fp8', expected one of fp32, bf16, fp16"),
        (["train", "--name", "ä" * 91], "expected at most 180 bytes"),
        (["train", "--name", "a/b"], "name: got 'a/b', expected a file name"),
        (["train", "--config", "/none/recipe.yaml"], "--config: /none/recipe.yaml does not exist"),
        (["train", "surplus"], "'surplus' is no option; expected --section.key VALUE"),
        (["train", "--data.audio_dir", "my", "voice.wav"], "'voice.wav' is no option; expected --section.key VALUE"),
        (["train", "my recipe.yaml"], "did you mean: rvc-dist train --config 'my recipe.yaml'"),
        (["train", "-c", "my.yaml"], "did you mean: rvc-dist train --config my.yaml"),
        (["my.yaml"], "did you mean: rvc-dist run --config my.yaml"),
        (["--config", "my.yaml"], "did you mean: rvc-dist run --config my.yaml"),
        (["song.wav"], "did you mean: rvc-dist infer --infer.input song.wav"),
        (["infer", "a.wav", "b.wav", "--seed", "1"], "unknown key seed"),
        (["infer", "--infer.pitch", "1", "a.wav", "b.wav"], "--infer.pitch 1 --infer.input '[a.wav, b.wav]'"),
        (["infer", "a.pth", "song.wav"], "did you mean: rvc-dist infer --infer.model a.pth --infer.input song.wav"),
        (["train", "train.batchsize=4"], "unknown key train.batchsize; did you mean train.batch_size?"),
        (["train", "trian.batch_size=4"], "did you mean: rvc-dist train --train.batch_size=4"),
        (["train", "batch_size=4"], "did you mean: rvc-dist train --train.batch_size=4"),
        (["train", "--config", "49k"], "--config: 49k does not exist; did you mean the recipe 48k?"),
        (["train", "--config", "."], "--config: . is not a file"),
        (["train", "--help", "none"], "--help none: no key has 'none' in its name"),
        (["recipes", "--config", "48k"], "unknown option --config; rvc-dist recipes --help lists them"),
        (["recipes", "48k"], "'48k' is no option; expected those that --help lists"),
        (["new"], "rvc-dist new: got nothing, expected one: rvc-dist new NAME"),
        (["launch", "--gpus", "0", "--", "train"], "argument --gpus: got '0', expected a whole number, at least 1"),
        (["train", "--name", "a", "-batch_size", "4"], "did you mean: rvc-dist train --name a --train.batch_size 4"),
        (["train", "--train.batch-size", "4"], "unknown key train.batch-size; did you mean train.batch_size?"),
        (["train", "--config"], "--config"),
        (["extract", "--shard", "2/2"], "--shard: got '2/2', expected I/N with 0 <= I < N"),
        (["extract", "--shard=-1/2"], "--shard: got '-1/2'"),
        (["extract", "--shard", "half"], "--shard: got 'half'"),
        (["extract", "--shard"], "--shard: expected one argument"),
        (["extract", "--shard", "0/2", "--shard", "1/2"], "--shard: got 0/2, 1/2, expected one"),
        (
            ["train", "--shard", "0/2"],
            "--shard: train is not a stage that can be split so, only preprocess, extract, infer",
        ),
    ],
)
def test_a_mistake_is_told_and_exits_with_2(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stages, "importlib", None)  # no stage is as much as imported
    assert cli.main(arguments) == cli.EXIT_USAGE == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("rvc-dist")
    assert message in err


def test_a_recipe_with_a_typo_is_told_at_once_with_all_its_mistakes(tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text("name: a\ntrian:\n  batch_size: 2\ntrain:\n  batchsize: 2\n")
    began_at = cpu_s_of_children()
    done = rvc_dist("train", "--config", str(path))
    assert cpu_s_of_children() - began_at < 2.0
    assert done.returncode == 2
    assert f"{path}: unknown key trian; did you mean train?" in done.stderr
    assert f"{path}: unknown key train.batchsize; did you mean train.batch_size?" in done.stderr
    assert "Traceback" not in done.stderr


# What counts


@pytest.mark.parametrize(
    ("words", "name", "batch_size"),
    [
        (["--config", "a.yaml"], "a", 2),
        (["--config", "a.yaml", "--config", "b.yaml"], "b", 2),
        (["--config", "b", "--config=a.yaml"], "a", 2),  # NAME.yaml, and as one word
        (["--name", "c", "--config", "a.yaml"], "c", 2),
        (["--config", "a.yaml", "--name=c", "--config", "b.yaml"], "c", 2),
        (["name=c", "config=a.yaml", "train.batch_size=3"], "c", 3),
        (["train.batch_size=3", "--train.batch_size", "5", "--name", "train.batch_size=6"], "train.batch_size=6", 5),
        (["--train.batch_size", "5", "train.batch_size=3", "--config", "a.yaml"], "a", 3),
        (["--config", "32k"], "mine", 7),  # the working directory goes before the package
        (["--config", "40k"], "my_voice_40k", 4),
        (["--quiet", "train.batch_size=3", "--verbose", "name=c"], "c", 3),
        (["--config", "40k", "--config", "a.yaml"], "a", 2),
    ],
)
def test_keys_count_more_than_files_and_later_ones_more_than_earlier_ones(
    words: list[str], name: str, batch_size: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("a.yaml").write_text("name: a\ntrain: {batch_size: 2}\n")
    Path("b.yaml").write_text("name: b\n")
    Path("32k").write_text("name: mine\ntrain: {batch_size: 7}\n")
    Path("40k").mkdir()  # a folder is no recipe, and in nobody's way
    recipe, *_ = cli.parse("train", words)
    assert (recipe.name, recipe.train.batch_size) == (name, batch_size)


def test_a_command_line_with_an_old_key_works() -> None:
    assert cli.parse("train", ["--extract.reference", "a.wav"])[0].train.eval_reference == "a.wav"


def test_a_file_whose_name_has_an_equals_sign_is_no_key() -> None:
    _, _, more = cli.parse("inspect", ["a=b.pth", "./name=x", "runs/lr=1", "name=x"])
    assert more == {"paths": ["a=b.pth", "./name=x", "runs/lr=1"]}


@pytest.mark.slow
@pytest.mark.distributed
def test_the_launcher_says_a_mistake_once_and_last() -> None:
    """Not each rank, above the launcher's own traceback."""
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "-m", "rvc_dist"]
    done = subprocess.run([*command, "train", "trian.x=1"], capture_output=True, text=True, check=False)
    sentence = "rvc-dist train: 'trian.x=1' is no option"
    assert done.returncode == 1
    assert done.stderr.count(sentence) == 1
    assert sentence in done.stderr.splitlines()[-2]


# Running a stage


def stage_that(monkeypatch: pytest.MonkeyPatch, error: BaseException | None) -> list[tuple[Recipe, Shard]]:
    """Put a stage in the place of preprocess that raises `error`; returns what it was called with."""
    calls = []
    module = ModuleType("stand_in")

    def run(recipe: Recipe, shard: Shard) -> None:
        calls.append((recipe, shard))
        if error is not None:
            raise error

    module.run = run  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "stand_in", module)
    monkeypatch.setitem(STAGES, "preprocess", Stage("stand_in", "", takes_shard=True))
    return calls


THIS_PATH = "; this path must exist or be free to make, on a disk that works and lets you in\n"
FREE = ". Free some space, or raise the limit, and run the same command\n"


@pytest.mark.parametrize(
    ("error", "code", "message"),
    [
        (None, 0, ""),
        (StageError("no audio: /a/b"), 1, "rvc-dist preprocess: no audio: /a/b\n"),
        (PermissionError(errno.EACCES, "Permission denied", "/a/b"), 1, ": /a/b: Permission denied" + THIS_PATH),
        (FileNotFoundError(errno.ENOENT, "No such file", "/proc/a"), 1, THIS_PATH),
        (OSError(errno.ENAMETOOLONG, "File name too long", "a" * 256), 1, THIS_PATH),
        (OSError(errno.ELOOP, "Too many levels of symbolic links", "/a/b"), 1, THIS_PATH),
        (
            OSError(errno.ENOSPC, "No space left; 1 MB needed, 0 MB free", "/a"),
            1,
            ": /a: No space left; 1 MB needed, 0 MB free" + FREE,
        ),
        (OSError(errno.EFBIG, "File too large"), 1, " MB free" + FREE),
        (OSError(errno.EIO, "Input/output error"), 1, ": Input/output error" + THIS_PATH),
        (Stopped("stopped at step 3"), 75, ""),
        (KeyboardInterrupt(), 75, "interrupted; the same command continues\n"),
    ],
)
def test_the_exit_code_says_how_it_went(
    error: BaseException | None,
    code: int,
    message: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    calls = stage_that(monkeypatch, error)
    assert cli.main(["preprocess", "--name", "x"]) == code
    assert [(recipe.name, share) for recipe, share in calls] == [("x", Shard(0, 1))]
    assert capsys.readouterr().err.endswith(message)


@pytest.mark.parametrize("place", ["/proc/x/run", "loop/run", "n" * 300])
@pytest.mark.parametrize("stage", ["preprocess", "extract", "index", "train", "export", "import", "bench"])
def test_a_run_folder_that_cannot_be_is_a_sentence(
    stage: str, place: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("loop").symlink_to("loop")
    Path("a", "sliced_audios").mkdir(parents=True)
    soundfile.write("a/sliced_audios/a.wav", tone(2.0), RATE)
    options = ["a"] if stage == "import" else ["--data.audio_dir", "a/sliced_audios"]
    options += ["--data.sample_rate", str(RATE), "--extract.f0_method", "pm", "--extract.embedder_model", "mfcc"]
    assert cli.main([stage, *options, "--run_dir", place]) == cli.EXIT_FAILED
    told = capsys.readouterr().err
    assert f"rvc-dist {stage}: " in told
    assert place.partition("/run")[0] in told
    assert "Traceback" not in told


def test_half_written_files_of_killed_jobs_are_removed_from_every_folder_of_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stage_that(monkeypatch, None)
    for folder in (".", "clips", "features", "voice", "index", "logs", "pretrained", "checkpoints"):
        (tmp_path / folder).mkdir(exist_ok=True)
        for name in (".0123456789abcdef.tmp", ".fedcba9876543210.tmp"):
            (tmp_path / folder / name).write_text("half")
        os.utime(tmp_path / folder / ".0123456789abcdef.tmp", (0, 0))
    assert cli.main(["preprocess", "--run_dir", str(tmp_path)]) == 0
    left = [p.name for p in tmp_path.rglob(".*.tmp")]
    assert left == [".fedcba9876543210.tmp"] * 8, "those of jobs that work now"


@pytest.mark.parametrize(
    "error",
    [
        FileNotFoundError(errno.ENOENT, "No such file"),
        FileNotFoundError(errno.ENOENT, "No such file", str(Path(cli.__file__).with_name("pipeline.py"))),
        OSError(errno.EBADF, "Bad file descriptor"),
        ValueError("a bug"),
        TypeError(),
    ],
)
def test_a_bug_keeps_its_traceback(error: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    stage_that(monkeypatch, error)
    with pytest.raises(type(error)):
        cli.main(["preprocess"])


@pytest.mark.parametrize(
    ("arguments", "rank", "shard"),
    [
        ([], None, Shard(0, 1)),
        ([], (1, 4), Shard(1, 4)),
        (["--shard", "2/5"], None, Shard(2, 5, array=True)),
        (["--shard=2/5"], None, Shard(2, 5, array=True)),
        # Two ranks in each of five array tasks: ten parts.
        (["--shard", "2/5"], (1, 2), Shard(5, 10, array=True)),
    ],
)
def test_the_shard_of_the_work(
    arguments: list[str], rank: tuple[int, int] | None, shard: Shard, monkeypatch: pytest.MonkeyPatch
) -> None:
    if rank is not None:
        monkeypatch.setenv("RANK", str(rank[0]))
        monkeypatch.setenv("WORLD_SIZE", str(rank[1]))
    calls = stage_that(monkeypatch, None)
    assert cli.main(["preprocess", "--name", "x", *arguments, "--run_dir", "y"]) == 0
    ((recipe, given),) = calls
    assert given == shard
    assert (recipe.name, recipe.run_dir) == ("x", "y")


def test_a_stage_by_hand(tmp_path: Path) -> None:
    """Fails with 1 and a sentence, works with 0 and a log, and an array task does its part."""
    options = ["--data.audio_dir", str(tmp_path / "audio"), "--data.sample_rate", "24000"]
    options += ["--run_dir", str(tmp_path / "run"), "--preprocess.cut_method", "simple"]
    failed = rvc_dist("preprocess", *options)
    assert failed.returncode == 1
    assert failed.stderr.splitlines()[-1].startswith("rvc-dist preprocess: ")
    assert str(tmp_path / "audio") in failed.stderr
    assert "Traceback" not in failed.stderr

    (tmp_path / "audio").mkdir()
    soundfile.write(tmp_path / "audio" / "a.wav", tone(4.0), RATE)
    done = rvc_dist("preprocess", *options, "--shard", "0/1")
    assert (done.returncode, done.stdout) == (0, "")
    assert "preprocess" in done.stderr
    assert (tmp_path / "run" / "clips" / "00000.safetensors").is_file()

    (tmp_path / "run2").write_text("a file in the place of the run folder")
    blocked = rvc_dist("preprocess", *options, "--run_dir", str(tmp_path / "run2"))
    assert blocked.returncode == 1
    assert "run2" in blocked.stderr
    assert "Traceback" not in blocked.stderr


# The demo


def test_the_demo_takes_its_recipe_and_the_users_changes() -> None:
    recipe, *_ = cli.parse("demo", ["--train.max_steps", "3"])
    assert (recipe.name, recipe.train.max_steps, recipe.data.sample_rate) == ("demo", 3, 24000)
    assert Path(recipe.data.audio_dir).is_dir()
    assert Path(recipe.infer.input).is_file()
    # It runs from any folder: what it reads is found, what it writes is below run_dir.
    assert Path(recipe.data.audio_dir).is_absolute()
    assert Path(recipe.infer.input).is_absolute()


def test_the_demos_result_follows_the_run_folder() -> None:
    recipe, *_ = cli.parse("demo", [])
    assert demo.with_output_in_run_dir(recipe) == recipe
    moved = demo.with_output_in_run_dir(replace(recipe, run_dir="/elsewhere"))
    assert moved.infer.output == "/elsewhere/converted.wav"
    chosen = changed(replace(recipe, run_dir="/elsewhere"), "infer", output="/mine/a.wav")
    assert demo.with_output_in_run_dir(chosen) == chosen


def test_the_demos_report_reads_what_was_logged(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    long_name = "a_folder_with_a_name_of_more_than_eighty_letters_[which_rich_would_wrap_or_take_for_markup]"
    recipe = Recipe(name="demo", run_dir=str(tmp_path / long_name))
    (tmp_path / long_name).mkdir()
    demo.report(recipe, 12.0)
    assert "not logged" in capsys.readouterr().out
    with History(tmp_path / long_name / "metrics.jsonl") as history:
        history.begin(0)
        for step in range(40):
            history.write("step", step, epoch=0.0, values={"loss/g_mel": 3.0 if step < 20 else 2.0}, seconds={})
    demo.report(recipe, 12.0)
    lines = capsys.readouterr().out.splitlines()
    assert "The demo is done in 12 s." in lines
    assert "mel loss      3.000 over the first 20 logged steps, 2.000 over the last 20" in lines
    assert f"converted     {recipe.infer.output}" in lines
