"""launch/notebook.ipynb: its cells run here in their order, on two ranks of the CPU, with parameters that say so."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import types
from pathlib import Path

import nbformat
import pytest
import soundfile
from helpers import NARROW
from launching import ROOT, warm_cli

from rvc_dist.config import DataConfig, ExtractConfig, Recipe, TrainConfig
from rvc_dist.workspace import DEMO_VOICE_DIR

NOTEBOOK = ROOT / "launch" / "notebook.ipynb"


def code_cells() -> list[nbformat.NotebookNode]:
    return [cell for cell in nbformat.read(NOTEBOOK, as_version=4).cells if cell.cell_type == "code"]


def test_the_notebook_is_one_without_outputs() -> None:
    nbformat.validate(nbformat.read(NOTEBOOK, as_version=4))
    cells = code_cells()
    assert [cell.metadata.get("tags") for cell in cells] == [["parameters"]] + [None] * (len(cells) - 1)
    assert not any(cell.outputs or cell.execution_count for cell in cells)


@pytest.mark.slow
@pytest.mark.distributed
def test_the_cells_make_a_voice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As papermill does it: the first cell as it is, then a cell with other parameters, then the rest as it is."""
    for name in ("000", "010", "020"):
        (tmp_path / "audio").mkdir(exist_ok=True)
        shutil.copy(DEMO_VOICE_DIR / "voice" / f"{name}.flac", tmp_path / "audio")
    wave, rate = soundfile.read(DEMO_VOICE_DIR / "source" / "fr.flac", frames=2 * 16000)
    soundfile.write(tmp_path / "song.wav", wave, rate)
    small = Recipe(
        data=DataConfig(sample_rate=24000, holdout=0.2),
        extract=ExtractConfig(f0_method="yin", embedder_model="mfcc"),
        model=NARROW,
        train=TrainConfig(batch_size=1, max_steps=2, eval_every_steps=2, save_every_steps=2),
    )
    (tmp_path / "small.yaml").write_text(re.sub(r"^(name|run_dir|  audio_dir):.*\n", "", small.to_yaml(), flags=re.M))
    parameters = {
        "CODE": str(ROOT),
        "FOLDER": str(tmp_path),
        "AUDIO": str(tmp_path / "audio"),
        "SONG": str(tmp_path / "song.wav"),
        "SETTINGS": "--config small.yaml",
        "DEVICES": "--cpu 2",
        "EXTRAS": "",
    }
    shown: list[str] = []
    display = types.ModuleType("IPython.display")
    display.HTML = lambda filename: shown.append(filename)  # type: ignore[attr-defined]
    display.Audio = lambda file: shown.append(file)  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "IPython", types.ModuleType("IPython"))
    monkeypatch.setitem(sys.modules, "IPython.display", display)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "bin").mkdir()
    path = f"{tmp_path / 'bin'}:{os.environ['PATH']}"
    environment = os.environ | {"PATH": path, "PYTHONPATH": str(ROOT), "THIN": "1"}

    def shell(command: str) -> None:
        done = subprocess.run(
            command, shell=True, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
        )
        assert done.returncode in (0, 3), f"{command}\n{done.stdout[-3000:]}"  # 3: warnings of the doctor

    first, *others = (cell.source for cell in code_cells())
    names: dict[str, object] = {"shell": shell}
    exec(first, names)
    assert parameters.keys() < names.keys()
    names |= parameters
    warm_cli(tmp_path / "bin")
    for source in others:  # a line with an exclamation mark is one of the shell, with {names} filled in
        exec(re.sub(r"^( *)!(.*)$", lambda line: f"{line[1]}shell(f{line[2]!r})", source, flags=re.M), names)

    assert (tmp_path / "runs/my_voice/voice/my_voice_last.pth").is_file()
    assert shown == ["runs/my_voice/report.html", "converted.wav"]
    assert soundfile.info(tmp_path / "converted.wav").duration == pytest.approx(2.0, abs=0.1)
