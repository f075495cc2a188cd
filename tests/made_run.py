"""A run folder as training leaves it, with numbers and sounds that nobody had to train for."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import soundfile

from rvc_dist.config import recipe_of
from rvc_dist.files import write_json
from rvc_dist.report.history import History
from rvc_dist.workspace import Speakers, Workspace

RATE = 24000
TOTAL = 2000
IMPROVING = (0.9, 0.7, 0.6, 0.55, 0.52)
OVERTRAINED = (0.9, 0.6, 0.5, 0.55, 0.6, 0.66)


def data(work: Workspace, speakers: Sequence[str], short: str = "short.wav") -> None:
    """What preprocess reports: of every speaker two recordings with clips and one without."""
    files: list[dict[str, Any]] = []
    for i, _ in enumerate(speakers):
        rates = {"sample_rate": 44100, "effective_rate": 44100}
        for path in ("a.wav", "b.wav"):
            lost = {"silence": 1.5}
            used = {"path": f"{i}/{path}", "speaker": i, "seconds_in": 61.5, "clips": 20, "seconds_out": 66.0}
            files.append({**used, "reason": "", "lost": lost, **rates})
        bad = {"path": f"{i}/{short}", "speaker": i, "seconds_in": 0.4, "clips": 0, "seconds_out": 0.0}
        files.append({**bad, "reason": "shorter than 0.5 s", "lost": {"too short": 0.4}})
    lost = {"silence": 3.0 * len(speakers), "too short": 0.4 * len(speakers)}
    total = {"clips": 40 * len(speakers), "clip_seconds": 132.0 * len(speakers), "lost": lost}
    write_json(work.clips_report_file, {"seconds_in": 123.4 * len(speakers), "files": files, **total})
    work.save_speakers(Speakers(dict(enumerate(speakers)), tuple(range(len(speakers)))))


def validated_at(distances: Sequence[float]) -> list[int]:
    return [TOTAL * (i + 1) // len(distances) // 10 * 10 for i in range(len(distances))]


def history(work: Workspace, distances: Sequence[float], num_speakers: int = 1, warning: str = "slow") -> None:
    """Lines of a run that was validated at equal intervals, with these mel distances."""
    rng = np.random.default_rng(1)
    lines = History(work.history_file)
    ranks = [{"rank": i, "host": f"node{i}", "device": f"cuda:{i}", "name": "NVIDIA H100"} for i in range(2)]
    versions = {"rvc_dist": "1.0", "torch": "2.11"}
    lines.begin(0, epoch=0, total_steps=TOTAL, ranks=ranks, versions=versions, global_batch=16)
    step_at = dict(zip(validated_at(distances), distances, strict=True))
    for step in range(10, TOTAL + 1, 10):
        noise = 1 + 0.1 * rng.standard_normal(3)
        falling = math.exp(-step / 600)
        values = {"loss/g_mel": (0.35 + 0.6 * falling) * noise[0], "loss/g_adv": 2.2 * noise[1], "loss/d": 3 * noise[2]}
        values |= {"loss/g_fm": 4.1 * noise[2], "loss/g_kl": 1.2 * noise[0] + falling}
        values |= {"grad/norm_g": 30 * noise[1] ** 8, "grad/norm_d": 10 * noise[2]}
        values |= {"train/lr": 1e-4 * 0.9999**step, "perf/audio_s_per_s": 240 * noise[1]}
        seconds = {"data": 0.01, "g_forward": 0.05, "d_step": 0.06 * noise[0], "g_step": 0.09 * noise[1]}
        lines.write("step", step, epoch=step / 20, values=values, seconds=seconds)
        if step in step_at:
            judge(lines, step, step_at, num_speakers)
    lines.write("warning", TOTAL, text=warning)
    lines.write("end", TOTAL, why="done")
    lines.close()


def judge(lines: History, step: int, step_at: dict[int, float], num_speakers: int) -> None:
    distance, before = step_at[step], [d for at, d in step_at.items() if at < step]
    is_best = distance < min(before, default=math.inf)
    values = {"mel_distance": distance, "mcd_db": 10 * distance, "f0_cents": 40 * distance}
    values["similarity"] = 1 - distance / 4
    speakers = {str(i): {name: value * (1 - i / 20) for name, value in values.items()} for i in range(num_speakers)}
    why = f"mel distance {distance:.4f} is {'below' if is_best else 'above'} all before it"
    more = {"speakers": speakers, "clips": 12, "seconds": 0.01, "is_best": is_best, "why": why}
    lines.write("validation", step, epoch=step / 20, values=values, **more)


def tone(seconds: float, hz: float, harmonics: int = 12) -> np.ndarray[Any, np.dtype[np.float32]]:
    """A voice-like sound [S]: harmonics under a slow envelope."""
    t = np.arange(round(seconds * RATE)) / RATE
    phase = 2 * np.pi * np.cumsum(hz * (1 + 0.1 * np.sin(2 * np.pi * 0.8 * t))) / RATE
    wave = sum(np.sin(k * phase) / k for k in range(1, harmonics + 1)) * (0.2 + 0.1 * np.sin(2 * np.pi * 2 * t))
    return np.asarray(0.6 * wave, np.float32)


def samples(root: Path, steps: Sequence[int], seconds: float = 1.25, title: str = "phrase") -> None:
    """What listening leaves: a phrase of each kind at every step."""
    folder = root / "samples"
    (folder / "originals").mkdir(parents=True, exist_ok=True)
    for i, kind in enumerate(("own", "foreign", "reference")):
        soundfile.write(folder / "originals" / f"{kind}.flac", tone(seconds + i / 4, 160 + 40 * i), RATE)
    for step in steps:
        here = folder / f"step_{step:08d}"
        here.mkdir()
        entries = []
        for i, kind in enumerate(("own", "foreign", "reference")):
            hiss = np.random.default_rng(step).standard_normal(round((seconds + i / 4) * RATE)) / step
            soundfile.write(here / f"{kind}.flac", tone(seconds + i / 4, 160 + 40 * i, 6) + hiss, RATE)
            entry = {"file": f"{kind}.flac", "kind": kind, "title": title, "speaker": 0, "speaker_name": "anna"}
            entry |= {"source": "000.flac, 1.0 to 2.3 s", "original": f"../originals/{kind}.flac", "rate": RATE}
            entries.append({**entry, "seconds": seconds + i / 4, "index": kind != "own"})
        (here / "samples.json").write_text(json.dumps(entries), encoding="utf-8")


def made_run(
    root: Path, distances: Sequence[float] = IMPROVING, speakers: Sequence[str] = ("anna",), text: str = "phrase"
) -> Workspace:
    """A whole run: recipe, data, history, samples of each validation and a voice of the last step.

    `text` is the title of samples, the name of recordings that are left out, and what is warned of.
    """
    recipe = recipe_of([("name", "anna"), ("run_dir", str(root)), ("train.seed", "7"), ("data.sample_rate", "24000")])
    work = Workspace(root, "anna")
    work.save_recipe(recipe)
    data(work, speakers, short=text)
    history(work, distances, len(speakers), warning=text)
    samples(root, validated_at(distances), title=text)
    work.voice_dir.mkdir()
    (work.voice_dir / f"anna_100e_{TOTAL}s.pth").touch()
    return work
