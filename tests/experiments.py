"""Experiment folders as Applio, ARVC, RVC-WebUI and rvc-next leave them, cut from the demo voice."""

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
from rvc_dist.models.pitch import coarse_pitch
from rvc_dist.models.shape import GeneratorShape
from rvc_dist.models.state_dict import to_upstream, upstream_order

VOICE = Path(rvc_dist.__file__).parent / "demo_voice" / "voice"
WEBUI = ("0_gt_wavs", "1_16k_wavs", "2a_f0", "2b-f0nsf", "3_feature768")
FOLDERS = {
    "applio": ("sliced_audios", "sliced_audios_16k", "f0", "f0_voiced", "extracted"),
    "arvc": ("sliced_audios", "sliced_audios_16k", "f0", "f0_voiced", "v2_extracted"),
    "webui": WEBUI,
    "rvc-next": WEBUI,
}
"""Of each tool: waves, waves at 16 kHz, coarse f0, f0 in Hz, content."""
NAMES = {5: "7", 109: "Zoë B."}
"""Speakers of RVC-WebUI and rvc-next: one is called by another id, one has the last row of their table."""
ROWS = {"webui": 110, "rvc-next": 110}
REPEATS = {5: 2, 109: 1}


def clips(tool: str) -> Iterator[tuple[str, int, audio.Wave]]:
    """(name, speaker, wave): two recordings, three clips of a second each, of two speakers where the tool has some."""
    for number, name in enumerate(("000", "005")):
        wave, rate = decode.decode(VOICE / f"{name}.flac")
        wave = audio.resample(wave[: 4 * rate], rate, RATE)
        speaker = [*NAMES][number] if has_names(tool) else 3 * number if tool == "applio" else 0
        recording = f"ms{number:04d}_s{speaker:03d}_9f86d081" if has_names(tool) else f"{speaker}_{number}"
        for i in range(3):
            yield f"{recording}_{i}", speaker, wave[i * RATE : (i + 1) * RATE]


def has_names(tool: str) -> bool:
    return FOLDERS[tool] is WEBUI


def pitch_of(tool: str, number: int, num_frames: int) -> dict[str, np.ndarray]:
    """The pitch of clip `number`, a quarter of it unvoiced, as `true` and as the tool writes it: `hz` and `coarse`."""
    voiced = np.arange(num_frames) % 20 >= 5
    true = np.where(voiced, 110.0 + 10 * number, 0.0)
    hz = true
    if tool == "arvc":
        around = np.lib.stride_tricks.sliding_window_view(np.pad(np.maximum(true, 50.0), 1, mode="edge"), 3)
        hz = np.median(around, axis=1)
    if has_names(tool):
        hz = np.interp(np.arange(num_frames), np.flatnonzero(voiced), true[voiced])
    coarse = coarse_pitch(torch.from_numpy(hz if has_names(tool) else true)).numpy()
    return {"true": true, "hz": hz, "coarse": coarse}


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
            f0 = pitch_of(tool, number, len(wave_16k) // 160 + 1)
            np.save(hz / f"{name}.wav.npy", f0["hz"])  # float64, one frame more than ours: as rmvpe gives it
            np.save(coarse / f"{name}.wav.npy", f0["coarse"])
            fields += [coarse / f"{name}.wav.npy", hz / f"{name}.wav.npy"]
        whose = f"{speaker}|{NAMES[speaker]}" if has_names(tool) else str(speaker)
        lines += ["|".join([*(str(f) for f in fields), whose])] * (REPEATS[speaker] if has_names(tool) else 1)
    # Spectrograms lie beside the waves there, and are of no use here.
    (waves / "0_0.spec.pt").write_bytes(b"a cache")
    (folder / "filelist.txt").write_text("\n".join(lines), encoding="utf-8")
    widths = {"n_heads": "num_heads", "n_layers": "num_layers"}
    keys = ("inter_channels", "hidden_channels", "filter_channels", "n_heads", "n_layers", "upsample_initial_channel")
    model = {k: getattr(NARROW, widths.get(k, k)) for k in (*keys, "gin_channels")}
    config: dict[str, Any] = {"data": {"sampling_rate" if has_names(tool) else "sample_rate": RATE}}
    config["model"] = model | {"spk_embed_dim": ROWS.get(tool, 5)}
    if tool == "applio":
        info = {"total_dataset_duration": "00:00:08", "total_seconds": 8.5, "embedder_model": "mfcc", "speakers_id": 2}
        write_json(folder / "model_info.json", info)
    if tool == "rvc-next":
        write_json(folder / "experiment.json", {"name": folder.name, "embedder": "mfcc", "f0_method": "rmvpe"})
    if has_names(tool):
        config["speaker_info"] = [{"id": i, "name": name} for i, name in NAMES.items()]
        keys_of = {name.rpartition("_")[0]: speaker for name, speaker, _ in clips(tool)}
        entries = [
            {"output_key": key, "path": f"/data/{NAMES[i]}_{i}_{REPEATS[i]}/a.wav", "speaker_id": i}
            | {"speaker_name": NAMES[i], "repeat": REPEATS[i]}
            for key, i in keys_of.items()
        ]
        manifest = {"version": 1, "speakers": config["speaker_info"], "entries": entries}
        write_json(folder / "multispeaker_manifest.json", manifest)
    write_json(folder / "config.json", config)
    return folder


def write_json(path: Path, data: dict[str, Any]) -> None:
    path.write_text(json.dumps(data, indent=4), encoding="utf-8")


def add_mutes(folder: Path, tool: str, count: int = 2) -> Path:
    """Silent clips as the tool has them: of several speakers in the experiment, by the path where it once lay; of one
    beside it, by paths relative to the tool's folder.
    """
    mute, written = folder.parent / "mute", f"logs\\mute\\{FOLDERS[tool][4]}\\mute.npy"
    if has_names(tool):
        mute, written = folder / "mute", f"/where/it/was/logs/voice/mute/{FOLDERS[tool][4]}/mute.npy"
    content = mute / FOLDERS[tool][4]
    content.mkdir(parents=True)
    np.save(content / "mute.npy", np.full((149, 768), 0.25, np.float32))
    filelist = folder / "filelist.txt"
    text = filelist.read_text(encoding="utf-8")
    speakers = [f"{i}|{name}" for i, name in NAMES.items()]
    if not has_names(tool):
        speakers = sorted({line.rpartition("|")[2] for line in text.splitlines()})
    lines = [f"logs\\mute\\x\\mute{RATE}.wav|{written}|a|b|{s}" for s in speakers for _ in range(count)]
    filelist.write_text("\n".join([text, *lines]), encoding="utf-8")
    return content / "mute.npy"


def add_weights(
    folder: Path, step: int, recipe: Recipe, content_channels: int = 768, tool: str = "applio"
) -> dict[str, dict[str, Any]]:
    """G_{step}.pth and D_{step}.pth as the tools write them, with the moments of the optimizer; returns the weights.

    Moments are `moments_of` each weight, numbered in the tool's order.
    """
    torch.manual_seed(step)
    shape = GeneratorShape.from_recipe(recipe, content_channels, num_speakers=ROWS.get(tool, 5))
    modules = {
        "G": Generator(shape),
        "D": MultiPeriodDiscriminator(recipe.model.discriminator_spec, recipe.model.discriminator_channels),
    }
    states = {}
    for letter, module in modules.items():
        state = to_upstream(module.state_dict())
        order = upstream_order(state, "rvc" if has_names(tool) else "applio")
        states[letter] = {name: state[name] for name in order}
        moments = {i: moments_of(state[name]) | {"step": torch.tensor(float(step))} for i, name in enumerate(order)}
        options = {"lr": 1e-4, "betas": (0.8, 0.99), "eps": 1e-9, "weight_decay": 0.01, "params": [*moments]}
        optimizer = {"state": moments, "param_groups": [options]}
        saved = {"model": states[letter], "iteration": 7, "optimizer": optimizer, "learning_rate": 1e-4}
        torch.save(saved, folder / f"{letter}_{step}.pth")
    return states


def moments_of(weight: torch.Tensor) -> dict[str, torch.Tensor]:
    return {"exp_avg": weight / 100, "exp_avg_sq": (weight / 10) ** 2}


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
