"""Experiment folders as Applio, ARVC and RVC-WebUI leave them, cut from the demo voice."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import soundfile
import torch
from helpers import NARROW, RATE

import rvc_dist
from rvc_dist.config import FEATURE_RATE, ExtractConfig, Recipe
from rvc_dist.data import audio, decode
from rvc_dist.features.content import load_embedder
from rvc_dist.models.discriminator import MultiPeriodDiscriminator
from rvc_dist.models.generator import Generator
from rvc_dist.models.shape import GeneratorShape
from rvc_dist.models.state_dict import to_upstream

VOICE = Path(rvc_dist.__file__).parent / "demo_voice" / "voice"
FOLDERS = {
    "applio": ("sliced_audios", "sliced_audios_16k", "f0", "f0_voiced", "extracted"),
    "arvc": ("sliced_audios", "sliced_audios_16k", "f0", "f0_voiced", "v2_extracted"),
    "webui": ("0_gt_wavs", "1_16k_wavs", "2a_f0", "2b-f0nsf", "3_feature768"),
}
"""Of each tool: waves, waves at 16 kHz, coarse f0, f0 in Hz, content."""


def clips(tool: str) -> Iterator[tuple[str, int, audio.Wave]]:
    """(name, speaker, wave): two recordings, three clips of a second each; of Applio the second is of speaker 3."""
    for number, name in enumerate(("000", "005")):
        wave, rate = decode.decode(VOICE / f"{name}.flac")
        wave = audio.resample(wave[: 4 * rate], rate, RATE)
        speaker = 3 * number if tool == "applio" else 0
        prefix = "" if tool == "webui" else f"{speaker}_"
        for i in range(3):
            yield f"{prefix}{number}_{i}", speaker, wave[i * RATE : (i + 1) * RATE]


def make(folder: Path, tool: str, pitch: bool = True) -> Path:
    """Write an experiment with features of the encoder mfcc and a made-up pitch."""
    names = FOLDERS[tool]
    for name in names:
        if pitch or name not in names[2:4]:
            (folder / name).mkdir(parents=True)
    waves, waves_16k, coarse, hz, content = (folder / name for name in names)
    embedder = load_embedder(ExtractConfig(embedder_model="mfcc"), "v2", torch.device("cpu"))
    lines = []
    for number, (name, speaker, wave) in enumerate(clips(tool)):
        soundfile.write(waves / f"{name}.wav", wave, RATE, subtype="FLOAT")
        wave_16k = audio.resample(wave, RATE, FEATURE_RATE)
        soundfile.write(waves_16k / f"{name}.wav", wave_16k, FEATURE_RATE, subtype="FLOAT")
        np.save(content / f"{name}.npy", embedder(torch.from_numpy(wave_16k)[None])[0].numpy())
        fields = [waves / f"{name}.wav", content / f"{name}.npy"]
        if pitch:
            f0 = np.where(np.arange(len(wave_16k) // 160 + 1) % 4 == 0, 0.0, 110.0 + 10 * number)
            np.save(hz / f"{name}.wav.npy", f0)  # float64, one frame more than ours: as rmvpe gives it
            np.save(coarse / f"{name}.wav.npy", np.full(len(f0), 50))
            fields += [coarse / f"{name}.wav.npy", hz / f"{name}.wav.npy"]
        lines.append("|".join([*(str(f) for f in fields), str(speaker)]))
    # Spectrograms lie beside the waves there, and are of no use here.
    (waves / "0_0.spec.pt").write_bytes(b"a cache")
    (folder / "filelist.txt").write_text("\n".join(lines), encoding="utf-8")
    widths = {"n_heads": "num_heads", "n_layers": "num_layers"}
    keys = ("inter_channels", "hidden_channels", "filter_channels", "n_heads", "n_layers", "upsample_initial_channel")
    model = {k: getattr(NARROW, widths.get(k, k)) for k in (*keys, "gin_channels")} | {"spk_embed_dim": 5}
    rate_key = "sampling_rate" if tool == "webui" else "sample_rate"
    write_json(folder / "config.json", {"data": {rate_key: RATE}, "model": model})
    if tool == "applio":
        info = {"total_dataset_duration": "00:00:08", "total_seconds": 8.5, "embedder_model": "mfcc", "speakers_id": 2}
        write_json(folder / "model_info.json", info)
    return folder


def write_json(path: Path, data: dict[str, Any]) -> None:
    path.write_text(json.dumps(data, indent=4), encoding="utf-8")


def add_mutes(folder: Path, tool: str, count: int = 2) -> Path:
    """Silent clips beside the experiment, as logs/mute has them, listed by paths relative to the tool's folder."""
    mute = folder.parent / "mute"
    content = mute / FOLDERS[tool][4]
    content.mkdir(parents=True)
    np.save(content / "mute.npy", np.full((149, 768), 0.25, np.float32))
    relative = f"logs\\mute\\{FOLDERS[tool][4]}\\mute.npy"
    filelist = folder / "filelist.txt"
    speakers = sorted({line.rpartition("|")[2] for line in filelist.read_text().splitlines()})
    lines = [f"logs\\mute\\x\\mute{RATE}.wav|{relative}|a|b|{s}" for s in speakers for _ in range(count)]
    filelist.write_text("\n".join([filelist.read_text(), *lines]))
    return content / "mute.npy"


def add_weights(folder: Path, step: int, recipe: Recipe, content_channels: int = 768) -> dict[str, dict[str, Any]]:
    """G_{step}.pth and D_{step}.pth as the tools write them, with the moments of the optimizer; returns the weights."""
    torch.manual_seed(step)
    shape = GeneratorShape.from_recipe(recipe, content_channels, num_speakers=5)
    modules = {
        "G": Generator(shape),
        "D": MultiPeriodDiscriminator(recipe.model.version, recipe.model.discriminator_channels),
    }
    states = {}
    for letter, module in modules.items():
        states[letter] = to_upstream(module.state_dict())
        moments = {i: {"exp_avg": torch.zeros(3)} for i in range(2)}
        saved = {"model": states[letter], "iteration": 7, "optimizer": moments, "learning_rate": 1e-4}
        torch.save(saved, folder / f"{letter}_{step}.pth")
    return states


def add_index(folder: Path, tool: str) -> Path:
    """added_*.index over all frames, as RVC-WebUI writes it."""
    import faiss

    vectors = np.concatenate([np.load(p) for p in sorted((folder / FOLDERS[tool][4]).glob("*.npy"))])
    index = faiss.index_factory(vectors.shape[1], "IVF4,Flat")
    faiss.extract_index_ivf(index).nprobe = 1
    index.train(vectors)
    index.add(vectors)
    path = folder / f"added_IVF4_Flat_nprobe_1_{folder.name}_v2.index"
    faiss.write_index(index, str(path))
    faiss.write_index(index, str(folder / f"trained_IVF4_Flat_nprobe_1_{folder.name}_v2.index"))
    np.save(folder / "total_fea.npy", vectors)
    return path
