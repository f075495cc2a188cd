"""The completion of command lines, in the shells themselves."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from rvc_dist import __main__ as cli
from rvc_dist.stages import STAGES


@pytest.fixture(scope="module")
def script(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The one for bash, in a folder with two files."""
    folder = tmp_path_factory.mktemp("completion")
    (folder / "my.yaml").touch()
    (folder / "voice.pth").touch()
    with (folder / "rvc-dist.bash").open("w") as stream:
        subprocess.run([sys.executable, "-m", "rvc_dist", "completion", "bash"], stdout=stream, check=True)
    return folder / "rvc-dist.bash"


@pytest.mark.parametrize(
    ("words", "there", "absent"),
    [
        ("", {*STAGES}, {"my.yaml"}),
        ("tr", {"train"}, {"infer"}),
        ("train --train.ba", {"--train.batch_size"}, {"--train.bf16_adamw"}),
        ("preprocess --", {"--preprocess.chunk_len", "--config", "--shard", "--help"}, {"--train.batch_size"}),
        ("train --train.precision ", {"fp32", "bf16", "fp16"}, {"my.yaml"}),
        ("train --train.fast_train ", {"true", "false"}, {"my.yaml"}),
        ("train --train.pretrained ", {"rvc", "titan"}, {"my.yaml"}),
        ("run --config ", {"48k", "rtx", "my.yaml"}, {"demo_cpu", "train"}),
        ("run --config my.yaml --train.precision b", {"bf16"}, {"fp16"}),
        ("new alice --recipe t", {"t4"}, {"rtx"}),
        ("infer --infer.model v", {"voice.pth"}, {"my.yaml"}),
        ("inspect v", {"voice.pth"}, {"my.yaml"}),
        ("launch --", {"--gpus", "--cpu"}, {"--config"}),
        ("completion z", {"zsh"}, {"bash"}),
    ],
)
def test_bash_completes(words: str, there: set[str], absent: set[str], script: Path) -> None:
    lines = [
        f"source {script.name}",
        f"COMP_WORDS=(rvc-dist {words}{'' if words and not words.endswith(' ') else chr(39) * 2})",
        "COMP_CWORD=$(( ${#COMP_WORDS[@]} - 1 ))",
        "_shtab_rvc_dist",
        'printf "%s\\n" "${COMPREPLY[@]}"',
    ]
    done = subprocess.run(
        ["bash", "-c", "\n".join(lines)], cwd=script.parent, capture_output=True, text=True, check=True
    )
    found = {line.strip() for line in done.stdout.splitlines()}
    assert there <= found
    assert not absent & found
    assert done.stderr == ""


@pytest.mark.parametrize("shell", ["bash", "zsh", "tcsh"])
def test_each_shell_takes_its_script(shell: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["completion", shell]) == 0
    text = capsys.readouterr().out
    assert "train.batch_size" in text
    if shutil.which(shell) and shell != "tcsh":  # zsh and bash say whether they can read it
        (tmp_path / "script").write_text(text)
        subprocess.run([shell, "-n", tmp_path / "script"], check=True)


def test_what_completion_cannot_do_is_a_sentence(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert cli.main(["completion", "cmd"]) == 1
    assert "got the shell cmd, expected one of bash, zsh" in capsys.readouterr().err
    monkeypatch.setitem(sys.modules, "shtab", None)
    assert cli.main(["completion", "bash"]) == 1
    assert "completion needs the package shtab (" in capsys.readouterr().err
