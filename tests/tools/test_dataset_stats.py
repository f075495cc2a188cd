"""The dataset table: hand-worked levels, shares and pitches, what was left out, and mistakes."""

from __future__ import annotations

import json
import math
import re
import subprocess
import sys
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from rvc_dist import __main__ as cli
from rvc_dist.config import Recipe
from rvc_dist.files import atomic_write, write_json
from rvc_dist.tools import dataset_stats
from rvc_dist.tools.dataset_stats import BAND_CENTS, LOWEST_HZ, NUM_CENTS, bands, hz_of, note, percentile, summarise
from rvc_dist.workspace import Shard, SourceFile, StageError, Unit, WorkList, Workspace, save_arrays

RATE = 24000
SETTINGS = {"data.sample_rate": RATE}


def sine(amplitude: float, seconds: float) -> np.ndarray:
    """100 Hz: whole periods in every frame of 20 ms, whose RMS is amplitude / sqrt(2)."""
    return (amplitude * np.sin(2 * np.pi * 100.0 * np.arange(round(seconds * RATE)) / RATE)).astype(np.float32)


def make_run(
    root: Path,
    clips: list[list[tuple[int, np.ndarray]]],
    f0: list[list[np.ndarray] | None] | None = None,
    reasons: dict[str, str] | None = None,
    unmade: int = 0,
) -> Path:
    """A run of one unit for each list of (speaker, wave); each clip has a recording of twice its length."""
    work = Workspace(root, "x")
    units = tuple(
        Unit(i, tuple(SourceFile(f"{i}_{j}.wav", s, 1, 1, len(w) / RATE) for j, (s, w) in enumerate(of_unit)))
        for i, of_unit in enumerate(clips)
    ) + tuple(Unit(len(clips) + i, ()) for i in range(unmade))
    excluded = tuple(SourceFile(path, 0, 1, 1, reason=reason) for path, reason in (reasons or {}).items())
    for unit, of_unit in zip(units, clips, strict=False):
        header = {
            "stamp": unit.fingerprint(SETTINGS),
            "sample_rate": RATE,
            "clips": [
                {"speaker": s, "source": f.path, "start_s": 0.0} for f, (s, _) in zip(unit.files, of_unit, strict=True)
            ],
            "files": [
                {
                    "path": f.path,
                    "speaker": f.speaker,
                    "seconds_in": 2 * f.duration_s,
                    "clips": 1,
                    "seconds_out": f.duration_s,
                    "lost": {"silence": f.duration_s},
                    "reason": "",
                }
                for f in unit.files
            ],
        }
        save_arrays(work.clips_file(unit.id), {f"{j:05d}": w for j, (_, w) in enumerate(of_unit)}, header)
        if f0 and (of_f0 := f0[unit.id]) is not None:
            save_features(work.features_file(unit.id), of_f0, header)
    atomic_write(work.work_list_file, WorkList("", SETTINGS, units, excluded).dumps())
    return root


def save_features(path: Path, of_f0: list[np.ndarray], clips_header: dict[str, Any]) -> None:
    sizes = [{"num_samples": 1, "num_content": 1, "num_f0": len(f0)} for f0 in of_f0]
    clips = [clip | size for clip, size in zip(clips_header["clips"], sizes, strict=True)]
    arrays = {f"{j:05d}.f0": f0 for j, f0 in enumerate(of_f0)}
    arrays |= {f"{j:05d}.content": np.zeros((1, 1), np.float32) for j in range(len(of_f0))}
    embedder = {"name": "mfcc", "hash": "", "width": 1}
    save_arrays(path, arrays, clips_header | {"clips": clips, "embedder": embedder})


def hz(*values: float) -> np.ndarray:
    return np.array(values, np.float32)


def test_levels_and_shares_are_those_worked_by_hand(tmp_path: Path) -> None:
    """Speaker 0: a sine of amplitude 0.5, and a second of nothing; speaker 2: amplitude 0.1, 2 s of each."""
    loud, silent, quiet = sine(0.5, 1.0), np.zeros(RATE, np.float32), sine(0.1, 2.0)
    f0 = [[hz(220, 220, 0, 0), hz(0, 0, 0, 440)], [hz(110, 110, 0, 110)]]
    summary = summarise(make_run(tmp_path, [[(0, loud), (0, silent)], [(2, quiet)]], f0))
    assert (summary.sample_rate, summary.units, summary.missing_units, summary.units_without_features) == (
        RATE,
        2,
        0,
        0,
    )
    first, second = summary.speakers[0], summary.speakers[2]
    assert (first["files"], first["clips"]) == (2, 2)
    assert first["minutes"] == pytest.approx(2 / 60)
    assert first["minutes_in"] == pytest.approx(4 / 60)
    loud_db = 20 * math.log10(0.5 / math.sqrt(2))  # -9.03
    assert first["rms_db"] == pytest.approx(loud_db - 10 * math.log10(2), abs=1e-4)  # half of the samples are silent
    assert first["clip_rms_db_p5"] == pytest.approx(-120 + 0.05 * (loud_db + 120), abs=1e-3)
    assert first["clip_rms_db_p95"] == pytest.approx(-120 + 0.95 * (loud_db + 120), abs=1e-3)
    assert first["peak_db"] == pytest.approx(20 * math.log10(0.5), abs=1e-4)
    assert first["silence_share"] == 0.5
    assert first["voiced_share"] == 3 / 8
    assert first["f0_hz_median"] == pytest.approx(220)
    assert first["f0_hz_p95"] == pytest.approx(440)
    assert (second["files"], second["clips"]) == (1, 1)
    assert second["rms_db"] == pytest.approx(20 * math.log10(0.1 / math.sqrt(2)), abs=1e-4)
    assert second["clip_rms_db_p5"] == pytest.approx(second["rms_db"])
    assert (second["silence_share"], second["voiced_share"]) == (0.0, 0.75)
    assert second["f0_hz_p5"] == second["f0_hz_median"] == second["f0_hz_p95"] == pytest.approx(110)
    total = summary.total
    assert (total["files"], total["clips"]) == (3, 3)
    assert total["minutes"] == pytest.approx(4 / 60)
    energy = (1.0 * 0.125 + 2.0 * 0.005) / 4.0
    assert total["rms_db"] == pytest.approx(10 * math.log10(energy), abs=1e-4)
    assert total["silence_share"] == 0.25
    assert total["voiced_share"] == 0.5
    assert total["f0_hz_median"] == pytest.approx(110)


@pytest.mark.parametrize(
    ("settings", "unvoiced", "told", "share"),
    [
        ({}, 0.0, "", 0.6),
        ({"extract.unvoiced": "interpolated"}, 220.0, "as the features say", None),
        ({}, 220.0, "do not say: import again", None),  # of an import before it was looked for
        ({}, 50.0, "50 Hz, as ARVC writes them: import again", None),
    ],
)
def test_what_unvoiced_frames_have_is_told_instead_of_a_share_of_all(
    settings: dict[str, str], unvoiced: float, told: str, share: float | None, tmp_path: Path, capsys: Any
) -> None:
    f0 = np.where(np.arange(1500) % 50 < 30, 220.0, unvoiced).astype(np.float32)
    make_run(tmp_path, [[(0, sine(0.5, 15.0))]], [[f0]])
    embedder = {"name": "mfcc", "hash": "", "width": 1}
    report = {"settings": settings | {"embedder": embedder}, "clips": "", "content_frames": 1}
    write_json(tmp_path / "features" / "report.json", report)
    summary = summarise(tmp_path)
    assert summary.total["voiced_share"] == summary.speakers[0]["voiced_share"] == share
    assert summary.total["f0_hz_median"] == pytest.approx(220, abs=0.1)
    text = shown(capsys, tmp_path)
    assert told in text
    assert row(text, "0", "-" if share is None else "60.0%", "220 Hz A3", "220 Hz A3", "220 Hz A3") == (unvoiced != 50)


def test_silence_is_what_lies_below_the_level_at_which_recordings_are_cut(tmp_path: Path) -> None:
    at = 10 ** (-42 / 20) * math.sqrt(2)
    wave = np.concatenate([sine(1.01 * at, 1.0), sine(0.99 * at, 3.0), sine(0.99 * at, 0.01)])
    summary = summarise(make_run(tmp_path, [[(0, wave)]]))
    assert summary.total["silence_share"] == pytest.approx(151 / 201)  # the last frame is half a frame long


def test_a_wave_of_any_length_is_measured_block_by_block(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wave = np.random.default_rng(0).normal(0.0, 0.1, 20 * RATE + 7).astype(np.float32)
    make_run(tmp_path, [[(0, wave)]])
    whole = summarise(tmp_path)
    monkeypatch.setattr(dataset_stats, "BLOCK_FRAMES", 10)
    tracemalloc.start()
    parts = summarise(tmp_path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < wave.nbytes
    assert parts.total["rms_db"] == pytest.approx(whole.total["rms_db"], abs=1e-9)
    assert parts.total["rms_db"] == pytest.approx(20 * math.log10(np.sqrt(np.mean(wave.astype(np.float64) ** 2))))
    assert (parts.total["silence_share"], parts.total["peak_db"]) == (
        whole.total["silence_share"],
        whole.total["peak_db"],
    )


def test_percentiles_notes_and_bands() -> None:
    cents = np.zeros(NUM_CENTS, np.int64)
    assert percentile(cents, 0.5) is None
    assert bands(cents) == ()
    cents[[1200, 2400, 3600]] = 1, 2, 1
    assert percentile(cents, 0.25) == pytest.approx(2 * LOWEST_HZ)
    assert percentile(cents, 0.5) == pytest.approx(4 * LOWEST_HZ)
    assert percentile(cents, 0.76) == pytest.approx(8 * LOWEST_HZ)
    assert [note(f) for f in (440.0, 220.0, 261.63, 466.16, 16.35, 30.87)] == ["A4", "A3", "C4", "A#4", "C0", "B0"]
    found = bands(cents)
    assert len(found) == 7
    assert [b.voiced_share for b in found] == [0.25, 0, 0, 0.5, 0, 0, 0.25]
    assert found[0].from_hz == pytest.approx(32.703, abs=1e-3)  # C1
    assert found[0].to_hz == pytest.approx(hz_of(4 * BAND_CENTS)) == pytest.approx(41.203, abs=1e-3)  # E1


def test_clips_alone_are_enough(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make_run(tmp_path, [[(0, sine(0.5, 1.0))]], unmade=2)
    summary = summarise(tmp_path)
    assert (summary.missing_units, summary.units_without_features) == (2, 1)
    assert summary.total["voiced_share"] is None
    assert summary.total["f0_hz_median"] is None
    text = shown(capsys, tmp_path)
    assert "2 of 3 units are not made yet: run `rvc-dist preprocess` to its end" in text
    assert "1 of 1 units have no features: `rvc-dist extract` gives the pitch" in text
    assert "Pitch" not in text
    assert "No recording was left out." in text
    assert re.search(r"Of \d+\.\d s of recordings (\d+\.\d) s are in clips, \1 s not \(silence \1 s\)", text)


def shown(capsys: pytest.CaptureFixture[str], *runs: Path, **options: Any) -> str:
    dataset_stats.run(Recipe(), Shard(), [str(r) for r in runs], **options)
    return capsys.readouterr().out


def row(text: str, *cells: str) -> bool:
    """Whether a line of the tables has exactly these cells."""
    return any([c.strip() for c in line.split("  ") if c.strip()] == [*cells] for line in text.splitlines())


def test_the_tables(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    reasons = {f"{i}.wav": "empty file" for i in range(5)} | {"a[b].wav": "speaker id 200 is above 108"}
    make_run(tmp_path, [[(0, sine(0.5, 3.0)), (7, sine(0.05, 3.0))]], [[hz(220, 0), hz(110, 110)]], reasons)
    text = shown(capsys, tmp_path)
    assert f"{tmp_path}: {RATE} Hz" in text
    assert row(text, "0", "1", "0.10", "1", "0.05", "-9.0", "-9.0 .. -9.0", "-6.0", "0.0%")
    assert row(text, "7", "1", "0.10", "1", "0.05", "-29.0", "-29.0 .. -29.0", "-26.0", "0.0%")
    assert row(text, "all", "2", "0.20", "2", "0.10", "-12.0", "-28.0 .. -10.0", "-6.0", "0.0%")
    assert row(text, "0", "50.0%", "220 Hz A3", "220 Hz A3", "220 Hz A3")
    assert row(text, "7", "100.0%", "110 Hz A2", "110 Hz A2", "110 Hz A2")
    assert row(text, "all", "75.0%", "110 Hz A2", "110 Hz A2", "220 Hz A3")
    assert row(text, "G#2 .. C3", "104 .. 131", "66.7% " + "█" * 24)
    assert row(text, "C3 .. E3", "131 .. 165", "0.0%")
    assert row(text, "G#3 .. C4", "208 .. 262", "33.3% " + "█" * 12)
    assert "Left out, or incomplete: 6" in text
    lines = text.splitlines()
    assert "     5  empty file: 0.wav, 1.wav, 2.wav, ..." in lines
    assert "     1  speaker id 200 is above 108: a[b].wav" in lines
    assert max(len(line.rstrip()) for line in lines if str(tmp_path) not in line) <= 80


def test_a_long_list_of_reasons_ends(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make_run(tmp_path, [[(0, sine(0.5, 1.0))]], reasons={f"{i}.wav": f"reason {i:02d}" for i in range(53)})
    lines = shown(capsys, tmp_path).splitlines()
    assert sum(line.startswith("     1  reason") for line in lines) == 50
    assert lines[-1] == "  and 3 more, for 3 other reasons"


def test_runs_are_compared_side_by_side(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)  # a long path is broken at the width of the table
    make_run(tmp_path / "a", [[(0, sine(0.5, 3.0))]], [[hz(220)]])
    make_run(tmp_path / "b", [[(0, sine(0.05, 6.0)), (1, sine(0.05, 6.0))]], reasons={"x.wav": "empty file"})
    text = shown(capsys, Path("a"), Path("b"))
    head, _, rest = text.partition(f"a: {RATE} Hz")
    assert row(head, "speakers", "1", "2")
    assert row(head, "min", "0.05", "0.20")
    assert row(head, "RMS dB", "-9.0", "-29.0")
    assert row(head, "f0 median", "220 Hz A3", "-")
    assert row(head, "left out, incomplete", "0", "1")
    assert row(head, "G#3 .. C4", "208 .. 262", "100.0% " + "█" * 24, "0.0%")
    assert f"b: {RATE} Hz" in rest
    assert "1  empty file: x.wav" in rest


def test_json(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make_run(tmp_path, [[(0, sine(0.5, 3.0))]], [[hz(220, 0)]], {"x.wav": "empty file"})
    (plain,) = json.loads(shown(capsys, tmp_path, as_json=True))
    assert plain["run"] == str(tmp_path)
    assert plain["left_out"] == [{"path": "x.wav", "reason": "empty file"}]
    assert plain["total"]["f0_hz_median"] == pytest.approx(220)
    assert [s["speaker"] for s in plain["speakers"]] == [0]
    assert [b["voiced_share"] for b in plain["pitch"]] == [1.0]


def test_a_run_without_clips_is_an_error(tmp_path: Path) -> None:
    def error(path: Path) -> str:
        with pytest.raises(StageError) as caught:
            summarise(path)
        return str(caught.value)

    assert (
        error(tmp_path / "none")
        == f"{tmp_path / 'none'} does not exist; expected a run folder, or a folder of recordings"
    )
    (tmp_path / "file").write_text("")
    assert "is a file" in error(tmp_path / "file")
    assert error(tmp_path) == f"{tmp_path / 'clips'} has no clips: run `rvc-dist preprocess` or `import` first"
    make_run(tmp_path / "planned", [], unmade=2)
    assert "has no clips yet" in error(tmp_path / "planned")


def test_features_of_other_clips_are_not_counted(tmp_path: Path) -> None:
    make_run(tmp_path, [[(0, sine(0.5, 1.0))]], [[hz(220)]])
    make_run(tmp_path, [[(0, sine(0.5, 1.0)), (1, sine(0.5, 1.0))]])
    assert summarise(tmp_path).units_without_features == 1


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make_run(tmp_path / "a", [[(0, sine(0.5, 1.0))]])
    make_run(tmp_path / "b", [[(0, sine(0.5, 2.0))]])
    a, b = str(tmp_path / "a"), str(tmp_path / "b")
    for arguments, expected in (
        ([a], [a]),
        (["--run_dir", b], [b]),
        (["--name", "c", a, "--run_dir=x", b], [a, b]),
    ):
        assert cli.main(["dataset", *arguments, "--json"]) == 0
        assert [s["run"] for s in json.loads(capsys.readouterr().out)] == expected
    assert cli.main(["dataset", a]) == 0
    assert f"{a}: {RATE} Hz" in capsys.readouterr().out
    assert cli.main(["dataset", str(tmp_path)]) == 1
    assert "rvc-dist dataset: " in capsys.readouterr().err
    assert cli.main(["dataset", a, "--train.batchsize", "2"]) == 2
    assert "did you mean train.batch_size?" in capsys.readouterr().err


def test_it_starts_without_torch(tmp_path: Path) -> None:
    make_run(tmp_path, [[(0, sine(0.5, 1.0))]], [[hz(220)]])
    code = (
        "import sys\nfrom rvc_dist.__main__ import main\n"
        "assert main(['dataset', sys.argv[1]]) == 0\n"
        "print([m for m in ('torch', 'librosa', 'scipy', 'soundfile', 'soxr') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"
