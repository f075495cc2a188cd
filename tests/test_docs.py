"""The commands of README and docs/: they parse, and those that need no other hardware run in a scratch folder.

A block of commands is fenced as `sh`. One that this test cannot run has a comment before it that says what it lacks:
`<!-- needs: gpu -->`; the words are those of NEEDS.
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple, get_type_hints

import pytest
import soundfile
from helpers import NARROW
from launching import ROOT, warm_cli

from rvc_dist.arguments import parse
from rvc_dist.config import BenchConfig, DataConfig, ExtractConfig, Recipe, TrainConfig
from rvc_dist.stages import STAGES
from rvc_dist.workspace import DEMO_VOICE_DIR

NEEDS = {"gpu", "slurm", "network", "machines", "browser"}
"""What a block may lack here; `machines`: more than one; `browser`: somebody who looks at it."""
FIRST = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md", ROOT / "docs" / "first-voice.md"]
PAGES = [*FIRST, *sorted(set((ROOT / "docs").glob("*.md")) - set(FIRST))]
"""In the order in which their commands run: the first voice is that of the others."""
LANGUAGES = {"sh", "text", "yaml", "json", "csv"}
WARNS = {"doctor": 3, "dataset": 3}
"""Exit codes besides 0 that say that a command did its work."""
BLOCK = re.compile(
    r"(?:^<!-- needs: (?P<needs>[^\n]*) -->\n)?^(?P<indent> *)```(?P<language>\w*)\n(?P<text>.*?)^ *```$", re.M | re.S
)
LINK = re.compile(r"\]\((?!https?:)([^)#]*)")
INLINE = re.compile(r"`([^`\n]+)`")
KEY = re.compile(r"(?<![\w/.-])-{0,2}([a-z_]+(?:\.[a-z0-9_]+)+)")
FILES = (".py", ".sh", ".yaml", ".lock", ".json", ".safetensors")
FOLDERS = ("launch/", "slurm/", "configs/", "tests/", "docs/")


class Block(NamedTuple):
    """A fenced block of a page."""

    page: Path
    line: int
    language: str
    needs: frozenset[str]
    text: str

    def __str__(self) -> str:
        return f"{self.page.relative_to(ROOT)}:{self.line}"


def blocks(page: Path) -> Iterator[Block]:
    text = page.read_text(encoding="utf-8")
    for found in BLOCK.finditer(text):
        needs = frozenset((found["needs"] or "").replace(",", " ").split())
        body = "".join(line.removeprefix(found["indent"]) for line in found["text"].splitlines(keepends=True))
        yield Block(page, text.count("\n", 0, found.start("language")) + 1, found["language"], needs, body)


COMMANDS = [block for page in PAGES for block in blocks(page) if block.language == "sh"]


def keys(kind: type[Any] = Recipe, prefix: str = "") -> Iterator[str]:
    """Every key and every section of the recipe."""
    for name, hint in get_type_hints(kind).items():
        yield prefix + name
        if dataclasses.is_dataclass(hint):
            yield from keys(hint, f"{prefix}{name}.")


def stages_of(block: Block) -> Iterator[tuple[str, list[str]]]:
    """The stage and the words of each command of rvc-dist in a block, whoever launches it."""
    for line in block.text.replace("\\\n", " ").splitlines():
        words = shlex.split(line, comments=True)
        for i, word in enumerate(words):
            if word == "rvc-dist" or (word == "rvc_dist" and words[i - 1] == "-m"):
                yield (
                    words[i + 1],
                    list(itertools.takewhile(lambda w: w not in ("|", "&&", ";", ">", "&"), words[i + 2 :])),
                )
            elif re.fullmatch(r"(slurm/.*\.sbatch|slurm/pipeline\.sh|launch/cloud\.sh)", word):
                rest = list(itertools.takewhile(lambda w: w != "--", words[i + 2 :]))
                yield (
                    "run",
                    ["--config", words[i + 1], *itertools.dropwhile(lambda w: not re.match(r"--\w+\.", w), rest)],
                )


@pytest.fixture
def scratch(tmp_path: Path) -> Path:
    """A folder like a checkout, with a user's recipe, recordings and voices; the voices come when my.yaml has run."""
    for name in ("configs", "launch", "slurm", "rvc_dist"):
        (tmp_path / name).symlink_to(ROOT / name)
    recipe = Recipe(
        name="my_voice",
        data=DataConfig(sample_rate=24000, holdout=0.2),
        extract=ExtractConfig(f0_method="yin", embedder_model="mfcc"),
        model=NARROW,
        train=TrainConfig(batch_size=2, max_steps=2, eval_every_steps=2, save_every_steps=2, log_every_steps=1),
        bench=BenchConfig(warmup_steps=1, steps=1),
    )
    (tmp_path / "my.yaml").write_text(recipe.to_yaml())
    (tmp_path / "audio").mkdir()
    for name in ("000", "010", "020"):
        shutil.copy(DEMO_VOICE_DIR / "voice" / f"{name}.flac", tmp_path / "audio")
    wave, rate = soundfile.read(DEMO_VOICE_DIR / "source" / "fr.flac", frames=3 * 16000)
    (tmp_path / "songs").mkdir()
    for name in ("song.wav", "songs/a.wav", "songs/b.wav"):
        soundfile.write(tmp_path / name, wave, rate)
    for name, made in {"A": "last", "B": "best", "voice": "last"}.items():
        (tmp_path / f"{name}.pth").symlink_to(f"runs/my_voice/voice/my_voice_{made}.pth")
    (tmp_path / "runs").mkdir()
    for name in ("first", "second"):
        (tmp_path / "runs" / name).symlink_to("my_voice")
    return tmp_path


def test_blocks_say_what_they_are() -> None:
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        for block in blocks(page):
            assert block.language in LANGUAGES, f"{block}: a block of {block.language or 'nothing'}"
            assert block.needs <= NEEDS, f"{block}: needs {block.needs - NEEDS}, expected of {NEEDS}"
            is_remote = re.search(r"^(?:.* )?(pip|git|sbatch|srun|rclone|tensorboard) ", block.text, re.M)
            assert block.language != "sh" or block.needs or not is_remote, f"{block}: what does {is_remote} need?"
        rest = BLOCK.sub("", text)
        assert "```" not in rest, f"{page}: a fence that does not end"
        assert not re.search(r"\n\n {4}\S", rest), f"{page}: an indented block; a fenced one says what it is"
    assert COMMANDS


@pytest.mark.parametrize("block", COMMANDS, ids=str)
def test_commands_parse(block: Block, scratch: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(scratch)
    shutil.copy("configs/48k.yaml", "my_voice.yaml")
    (scratch / "runs" / "my_voice").mkdir()
    shutil.copy("my.yaml", "runs/my_voice/config.yaml")
    for stage, words in stages_of(block):
        with contextlib.suppress(SystemExit):  # --print_config
            parse(stage, words)


@pytest.mark.parametrize("page", [page for page in PAGES if page.stem != "CHANGELOG"], ids=lambda page: page.name)
def test_sentences_name_what_exists(page: Path) -> None:
    """Stages, keys and files of the checkout in `code` between the blocks; a changelog names what is gone."""
    known = set(keys())
    for text in INLINE.findall(BLOCK.sub("", page.read_text(encoding="utf-8"))):
        words = text.split()
        if words[0] == "rvc-dist" and len(words) > 1 and not words[1].isupper():
            assert words[1] in STAGES, f"{page.name}: `{text}`: no such stage"
        for key in KEY.findall(text):
            if key.partition(".")[0] in known and not key.endswith(FILES):
                assert key in known, f"{page.name}: `{text}`: no such key"
        for word in words:
            if word.startswith(FOLDERS):
                assert (ROOT / word).exists(), f"{page.name}: `{text}`: no such file"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_work_where_the_code_is_hosted(page: Path) -> None:
    """mkdocs sees to those of the site, and to headings."""
    for target in LINK.findall(page.read_text(encoding="utf-8")):
        assert not target or (page.parent / target).is_file(), f"{page.name}: {target}"


def test_errors_are_those_of_the_program() -> None:
    """The messages in the tables of errors.md stand in the code."""
    code = " ".join(path.read_text(encoding="utf-8") for path in (ROOT / "rvc_dist").rglob("*.py"))
    rows = re.findall(r"^\| (`[^|]+`) \|", (ROOT / "docs" / "errors.md").read_text(encoding="utf-8"), re.M)
    assert len(rows) > 20
    missing = [text for row in rows for text in INLINE.findall(row) if text not in code and text != os.strerror(28)]
    assert not missing


@pytest.mark.slow
@pytest.mark.distributed
def test_commands_run(scratch: Path) -> None:
    """Page by page, in one folder, as a reader would type them who has my.yaml, recordings and no GPU.

    What `rvc-dist new` writes for a card becomes as narrow as my.yaml, and networks have a layer of each kind.
    """
    (scratch / "bin").mkdir()
    environment = os.environ | {
        "PATH": f"{scratch / 'bin'}:{Path(sys.executable).parent}:{os.environ['PATH']}",
        "HOME": str(scratch),
        "PYTHONPATH": str(ROOT),
        "HF_HUB_OFFLINE": "1",
        "ACCELERATE_USE_CPU": "true",
        "THIN": "1",
    }
    warm_cli(scratch / "bin")
    for block in (block for block in COMMANDS if not block.needs):
        for command in block.text.replace("\\\n", " ").splitlines():
            done = subprocess.run(
                ["bash", "-euo", "pipefail", "-c", command],
                cwd=scratch,
                env=environment,
                text=True,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                timeout=120,
            )
            fine = {0} | {code for stage, code in WARNS.items() if f"rvc-dist {stage}" in command}
            if made := re.match(r"rvc-dist new (\w+)", command):
                shutil.copy(scratch / "my.yaml", scratch / f"{made[1]}.yaml")
            assert done.returncode in fine, f"{block}: {command}\n{done.stdout[-3000:]}"
