"""The look at recordings before anything is cut: what it finds, and that preprocess then keeps what it says."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import soundfile
from helpers import noise, tone
from recordings import write_made

from rvc_dist import __main__ as cli
from rvc_dist import workspace
from rvc_dist.config import DataConfig, PreprocessConfig, Recipe
from rvc_dist.data import cutting, preprocess
from rvc_dist.tools.dataset_stats import run
from rvc_dist.tools.raw_dataset import PROBLEMS, Loudness, look
from rvc_dist.workspace import Shard, StageError, Workspace, read_json

RATE = 24000


def recipe_of(folder: Path, **options: object) -> Recipe:
    data = DataConfig(str(folder / "audio"), sample_rate=RATE)
    return Recipe(run_dir=str(folder / "run"), data=data, preprocess=PreprocessConfig(**options, num_workers=2))


@pytest.mark.parametrize("seed", range(5))
def test_preprocess_keeps_what_the_look_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, seed: int) -> None:
    """To the last digit, of made datasets of every format and fault, long recordings cut into slices among them."""
    for module in (workspace, cutting):
        monkeypatch.setattr(module, "MAX_SLICE_S", 4.0)
    write_made(tmp_path / "audio", seed)
    recipe = recipe_of(tmp_path, cut_method=("automatic", "simple", "skip")[seed % 3])
    found = look(recipe, tmp_path / "audio")
    try:
        preprocess.run(recipe, Shard())
    except StageError:
        assert found.code == 1
        assert not found.report["clips"]
    else:
        report = read_json(Workspace(recipe.run_dir, recipe.name).clips_report_file)
        assert json.loads(json.dumps(found.report)) == report
        kept_s = report["seconds_in"] - sum(report["lost"].values())
        assert sum(r.kept_s for r in found.recordings) == pytest.approx(kept_s, abs=1e-3)


@pytest.fixture
def recordings(tmp_path: Path) -> Path:
    """One of each problem but for damaged ones, and two good ones, in the folder of a speaker called bob."""
    folder = tmp_path / "audio" / "bob"
    folder.mkdir(parents=True)
    voice = np.concatenate([np.zeros(RATE // 2, np.float32), tone(3.0), np.zeros(RATE // 2, np.float32)])
    voice += noise(4.0, level=1e-4)

    def write(name: str, wave: np.ndarray, rate: int = RATE) -> None:
        soundfile.write(folder / name, wave, rate)

    write("good.wav", voice)
    write("good2.flac", voice)
    write("too short.wav", voice[RATE // 2 :][: RATE // 4])
    write("silent.wav", np.zeros(RATE, np.float32))
    write("clipped.wav", np.clip(12 * voice, -1, 1))
    write("offset.wav", voice + 0.1)
    write("uneven.wav", 0.05 * voice)
    write("noisy.wav", voice + noise(4.0, level=0.05))
    write("channels cancel.wav", np.stack([voice, -voice], axis=1))
    write("low rate.wav", voice[::3], RATE // 3)
    (folder / "no recording.txt").write_text("x")
    (folder / "unreadable.wav").write_text("this is no sound")
    whole = (folder / "good.wav").read_bytes()
    (folder / "cut short.wav").write_bytes(whole[: len(whole) // 2])
    return tmp_path / "audio"


def test_each_problem_is_found_where_it_is(tmp_path: Path, recordings: Path) -> None:
    found = look(recipe_of(tmp_path), recordings)
    named = {name: {Path(r.file["path"]).stem for r in those} for name, those in found.problems.items()}
    for name in ("unreadable", "cut short", "silent", "too short", "low rate", "clipped", "channels cancel", "noisy"):
        assert named.pop(name) == {name}, name
    assert named.pop("no recording") == {"no recording"}
    assert "uneven" in named.pop("uneven")
    assert "offset" in named.pop("offset")
    assert named == {}
    assert found.code == 3
    assert "1 of 9 recordings" in found.warnings[0]
    good = next(r for r in found.recordings if r.file["path"].endswith("good.wav"))
    frames = soundfile.read(recordings / good.file["path"])[0].reshape(-1, RATE // 50)
    noise_db, speech_db = 20 * np.log10(np.percentile(frames.std(axis=1), [5, 95]))
    assert (good.noise_db, good.speech_db) == (pytest.approx(noise_db, abs=0.6), pytest.approx(speech_db, abs=0.6))
    assert good.file["seconds_in"] == 4.0


def test_slices_are_one_recording(tmp_path: Path, recordings: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Levels, counts and seconds, whatever the slices; no samples are kept."""
    whole = look(recipe_of(tmp_path), recordings)
    for module in (workspace, cutting):
        monkeypatch.setattr(module, "MAX_SLICE_S", 1.0)
    sliced = look(recipe_of(tmp_path), recordings)
    for one, other in zip(whole.recordings, sliced.recordings, strict=True):
        assert (one.speech_db, one.noise_db) == (
            pytest.approx(other.speech_db, abs=0.6),
            pytest.approx(other.noise_db, abs=0.6),
        )
        assert one.clipped_share == pytest.approx(other.clipped_share, abs=1e-4)
        assert one.file["seconds_in"] == pytest.approx(other.file["seconds_in"], abs=1e-3)
    levels = Loudness(RATE)
    levels.add(1.0 + np.resize(np.float32([0.5, -0.5]), (2, 100 * RATE + 7)).T)  # an offset is no sound
    assert len(levels._rest) == 7
    assert levels.counts.sum() == 5000
    assert levels.level_db(50) == pytest.approx(20 * np.log10(0.5), abs=0.3)


def test_the_command_says_it_in_tables_and_in_json(
    tmp_path: Path, recordings: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    options = ["--data.sample_rate", str(RATE), "--run_dir", str(tmp_path / "run")]
    assert cli.main(["dataset", str(recordings), *options]) == 3
    said = capsys.readouterr().out
    for name in (
        "0 (bob)",
        "Sample rates: 8000 Hz 1 (0.1 min), 24000 Hz",
        *(p for p in PROBLEMS if p in str(recordings)),
    ):
        assert name in said, said
    assert "bob/unreadable.wav: not readable as audio" in said
    assert said.splitlines()[-1].startswith("The recipe would make ")
    assert cli.main(["dataset", "--json", *options]) == 3  # the recipe's own folder, of which there is no run yet
    (plain,) = json.loads(capsys.readouterr().out)
    assert plain["folder"] == "audio"
    assert plain["speakers"][0]["name"] == "bob"
    assert {p["name"] for p in plain["problems"]} <= PROBLEMS.keys()
    assert plain["total"]["clips"] == plain["clips"] == sum(r["clips"] for r in plain["recordings"])
    assert not (tmp_path / "run").exists()
    for name in recordings.rglob("*.*"):
        if "good" not in name.name:
            name.unlink()
    assert run(recipe_of(tmp_path), Shard(), [str(recordings)]) == 0
    assert "Problems" not in capsys.readouterr().out


@pytest.mark.parametrize(
    ("files", "message"),
    [
        (None, r"nowhere does not exist; expected a run folder, or a folder of recordings"),
        ({}, r"holds no usable recording; expected files of the kinds wav "),
        ({"a.txt": "x", "b.pdf": "x"}, r"holds no usable recording; .*a\.txt: not one of wav"),
    ],
)
def test_a_folder_without_recordings_is_told(tmp_path: Path, files: dict[str, str] | None, message: str) -> None:
    folder = tmp_path / "nowhere"
    for name, text in (files or {}).items():
        folder.mkdir(exist_ok=True)
        (folder / name).write_text(text)
    if files == {}:
        folder.mkdir()
    with pytest.raises(StageError, match=rf"(?s){message}"):
        run(recipe_of(tmp_path), Shard(), [str(folder)])
    folder.mkdir(exist_ok=True)
    (folder / "bad.wav").write_text("no sound")
    assert run(recipe_of(tmp_path), Shard(), [str(folder)]) == 1
