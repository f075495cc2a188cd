"""What other tools train on from: an experiment's folder of Applio or of RVC-WebUI, and base models.

Shapes: S samples, T50 and T100 frames at 50 and 100 a second, C channels.
"""

from __future__ import annotations

import logging
import shutil
from collections import defaultdict
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import soundfile
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from rvc_dist.choices import DISCRIMINATORS
from rvc_dist.config import FEATURE_RATE, RATES, Recipe
from rvc_dist.data import audio
from rvc_dist.data.corpora import base_of
from rvc_dist.data.number_formats import float_wave
from rvc_dist.features.feature_files import SINCE
from rvc_dist.files import write_json
from rvc_dist.models.discriminator import MultiPeriodDiscriminator
from rvc_dist.models.generator import Generator
from rvc_dist.models.pitch import coarse_pitch
from rvc_dist.models.shape import GeneratorShape
from rvc_dist.models.state_dict import to_upstream, upstream_order
from rvc_dist.models.torch_file import save_pth
from rvc_dist.train.checkpoint import Checkpoint
from rvc_dist.train.optimizers import OptimizerState
from rvc_dist.train.voice_file import WEIGHTS, Dataset, embedder_of, halved
from rvc_dist.unit_stage import in_threads
from rvc_dist.workspace import (
    ClipsHeader,
    FeaturesClip,
    FeaturesHeader,
    MuteHeader,
    StageError,
    Workspace,
    fingerprint,
    read_header,
    unit_files,
    unit_header,
)

logger = logging.getLogger(__name__)

ADAMW = {"adamw", "anyprecision_adamw"}
"""Optimizers whose moments are AdamW's, the one that the tools train with."""
LETTERS = {"generator": "G", "discriminator": "D"}


class Layout(NamedTuple):
    """Where a tool keeps what of a clip, relative to the experiment's folder, and what it can train."""

    tool: str
    wave: str
    wave_16k: str
    content: dict[str, str]
    """By version."""
    coarse: str
    f0: str
    rate_key: str
    """What its config.json calls the sample rate."""
    rates: tuple[int, ...]
    unvoiced: str
    """The pitch of unvoiced frames that it trains on."""
    vocoders: tuple[str, ...]
    discriminators: tuple[str, ...]


LAYOUTS = {
    "applio": Layout(
        tool="Applio",
        wave="sliced_audios",
        wave_16k="sliced_audios_16k",
        content={"v1": "extracted", "v2": "extracted"},
        coarse="f0",
        f0="f0_voiced",
        rate_key="sample_rate",
        rates=tuple(RATES["v2"]),
        unvoiced="zero",
        vocoders=("hifi-gan", "mrf-hifi-gan", "refinegan"),
        discriminators=("v1", "v2", "v3"),
    ),
    "rvc": Layout(
        tool="RVC-WebUI",
        wave="0_gt_wavs",
        wave_16k="1_16k_wavs",
        content={"v1": "3_feature256", "v2": "3_feature768"},
        coarse="2a_f0",
        f0="2b-f0nsf",
        rate_key="sampling_rate",
        rates=(32000, 40000, 48000),
        unvoiced="interpolated",
        vocoders=("hifi-gan",),
        discriminators=("v1", "v2"),
    ),
}
"""By the values of export.format that stand for them."""


class Clip(NamedTuple):
    """A clip of the run, and what it is called in the experiment."""

    unit: Path
    key: str
    header: FeaturesClip
    recording: str
    """What the names of all clips of its recording begin with."""
    name: str


class Experiment:
    """The run of a checkpoint, written as the experiment that it would have been in another tool."""

    def __init__(self, recipe: Recipe, saved: Checkpoint, dataset: Dataset, kind: str) -> None:
        self.recipe, self.saved, self.dataset, self.kind = recipe, saved, dataset, kind
        self.layout = LAYOUTS[kind]
        self.work = Workspace(recipe.run_dir, recipe.name)
        self.shape = GeneratorShape.from_identity(saved.identity)
        self.has_pitch = self.shape.pitch_guidance
        version = saved.identity["discriminator.version"]
        self.content, self.judged_by = self.layout.content[version], saved.identity.get("discriminator.kind", version)
        self.clips = list(self._named_clips())
        self.speakers = sorted({clip.header["speaker"] for clip in self.clips})

    def write(self, folder: Path, final: Path) -> None:
        """Write all of it into `folder`, which will be `final`: filelist.txt holds whole paths.

        Raises:
            StageError: the run's files are damaged, or `final` is no path for a filelist.txt.
        """
        if not str(final).isprintable() or "|" in str(final):
            raise StageError(f"export.folder: {final} has letters that no filelist.txt can hold;", "give another")
        for problem in self.misfits():
            logger.warning("export: %s %s", self.layout.tool, problem)
        folders = [self.layout.wave, self.layout.wave_16k, self.content]
        folders += [self.layout.coarse, self.layout.f0] if self.has_pitch else []
        for name in (*folders, *(f"mute/{name}" for name in folders)):
            (folder / name).mkdir(parents=True)
        by_unit: dict[Path, list[Clip]] = defaultdict(list)
        for clip in self.clips:
            by_unit[clip.unit].append(clip)
        write_unit = partial(self._write_unit, folder)
        in_threads(self.recipe.preprocess.num_workers, write_unit, list(by_unit.values()), "export", "units")
        lines = [
            self._line(final, clip.name, clip.name, clip.header["speaker"])
            for clip in self.clips
            for _ in range(clip.header.get("repeat", 1))
        ]
        lines += self._write_mute(folder, final)
        (folder / "filelist.txt").write_text("\n".join(lines), encoding="utf-8")
        self._write_descriptions(folder)
        for file in sorted(self.work.index_dir.glob("*.index")):
            shutil.copy2(file, folder / file.name)
        if self.work.vectors_file.is_file():
            shutil.copy2(self.work.vectors_file, folder / self.work.vectors_file.name)
        for name, letter in LETTERS.items():
            save_pth(folder / f"{letter}_{self.saved.progress.step}.pth", self.training_file(name))

    def misfits(self) -> Iterator[str]:
        """What the tool will not do as this run does, for a warning each."""
        rate, vocoder = self.shape.sample_rate, self.shape.vocoder
        if rate not in self.layout.rates:
            yield f"trains voices of {', '.join(map(str, self.layout.rates))} Hz, this one has {rate} Hz"
        if vocoder not in self.layout.vocoders:
            yield f"has no vocoder {vocoder} (only {', '.join(self.layout.vocoders)})"
        if self.judged_by not in self.layout.discriminators:
            yield f"has no discriminator {self.judged_by} (only {', '.join(self.layout.discriminators)})"
        if self.shape.energy or self.shape.architecture != "rvc":
            yield "has the networks of RVC alone, without energy: it cannot build this voice's"
        unvoiced = self.saved.identity.get("extract.unvoiced", SINCE["extract.unvoiced"])
        if self.has_pitch and unvoiced != self.layout.unvoiced:
            yield (
                f"extracts {self.layout.unvoiced} pitch for unvoiced frames, this run has {unvoiced}: "
                "train there on what is written, without extracting again"
            )
        if self.saved.identity.get("optimizer") not in ADAMW:
            yield f"trains with AdamW: the moments of {self.saved.identity.get('optimizer')} are left out"

    def _named_clips(self) -> Iterator[Clip]:
        """Every clip that has features, recording by recording."""
        found = []
        for path in unit_files(self.work.features_dir):
            header = unit_header(path, FeaturesHeader, "extract")
            found += [(path, f"{i:05d}", clip) for i, clip in enumerate(header["clips"])]
        found.sort(key=lambda c: (c[2]["speaker"], c[2]["source"], c[2]["slice_s"], c[2]["start_s"], c[0].name, c[1]))
        several = len({clip["speaker"] for _, _, clip in found}) > 1
        numbers: dict[tuple[int, str], int] = {}
        counts: dict[int, int] = defaultdict(int)
        for path, key, clip in found:
            speaker, source = clip["speaker"], str(clip["source"])
            number = numbers.setdefault((speaker, source), len(numbers))
            recording = f"{number}"
            if self.kind == "applio":
                recording = f"{speaker}_{number}"
            elif several:
                recording = f"ms{number:04d}_s{speaker:03d}_{fingerprint(source)[:10]}"
            yield Clip(path, key, clip, recording, f"{recording}_{counts[number]}")
            counts[number] += 1

    def _write_unit(self, folder: Path, clips: list[Clip]) -> None:
        features = load_file(clips[0].unit)
        clips_file = self.work.clips_dir / clips[0].unit.name
        unit_header(clips_file, ClipsHeader, "preprocess")
        waves = load_file(clips_file)
        for clip in clips:
            wave, content, f0 = waves[clip.key], features[f"{clip.key}.content"], features[f"{clip.key}.f0"]
            self._write_clip(folder, clip.name, clip.name, float_wave(wave.numpy()), content, f0)

    def _write_clip(
        self, folder: Path, wave_name: str, name: str, wave: audio.Wave, content: Tensor, f0: Tensor
    ) -> None:
        """Wave [S], content [T50, C] and f0 [T100] of a clip."""
        rate = self.shape.sample_rate
        wave_16k = audio.resample(wave, rate, FEATURE_RATE)
        soundfile.write(folder / self.layout.wave / f"{wave_name}.wav", wave, rate, subtype="FLOAT")
        soundfile.write(folder / self.layout.wave_16k / f"{wave_name}.wav", wave_16k, FEATURE_RATE, subtype="FLOAT")
        np.save(folder / self.content / f"{name}.npy", content.float().numpy())
        if self.has_pitch:
            np.save(folder / self.layout.coarse / f"{name}.wav.npy", coarse_pitch(f0).numpy())
            np.save(folder / self.layout.f0 / f"{name}.wav.npy", f0.numpy())

    def _line(self, final: Path, wave_name: str, name: str, speaker: int) -> str:
        """A line of filelist.txt; RVC-WebUI has the name of a speaker too, where there are several."""
        layout = self.layout
        files = [f"{layout.wave}/{wave_name}.wav", f"{self.content}/{name}.npy"]
        if self.has_pitch:
            files += [f"{layout.coarse}/{name}.wav.npy", f"{layout.f0}/{name}.wav.npy"]
        named = [self.speaker_name(speaker)] if self.names_speakers else []
        return "|".join([*((final / file).as_posix() for file in files), str(speaker), *named])

    @property
    def names_speakers(self) -> bool:
        """Whether the speakers' names are told: RVC-WebUI does so of several."""
        return self.kind == "rvc" and len(self.speakers) > 1

    def speaker_name(self, speaker: int) -> str:
        return self.saved.speakers.names.get(speaker, str(speaker))

    def _write_mute(self, folder: Path, final: Path) -> list[str]:
        """Write the silent clip, if the run has one; its lines in filelist.txt."""
        if not self.recipe.extract.include_mutes or read_header(self.work.mute_file) is None:
            return []
        header, arrays = unit_header(self.work.mute_file, MuteHeader, "extract"), load_file(self.work.mute_file)
        rate = self.shape.sample_rate
        wave_name = f"mute{rate}" if self.kind == "applio" else f"mute{rate // 1000}k"
        wave = np.zeros(header["num_samples"], np.float32)
        content, f0 = arrays["00000.content"], arrays["00000.f0"]
        self._write_clip(folder / "mute", wave_name, "mute", wave, content, f0)
        lines = [self._line(final / "mute", wave_name, "mute", speaker) for speaker in self.speakers]
        return lines * self.recipe.extract.include_mutes

    def _write_descriptions(self, folder: Path) -> None:
        """config.json, model_info.json, and for several speakers of RVC-WebUI its manifest."""
        recipe, spec, layout = self.recipe, self.recipe.rate_spec, self.layout
        train = {
            "log_interval": 200,
            "seed": recipe.train.seed,
            "epochs": recipe.train.max_epochs,
            "learning_rate": recipe.train.learning_rate,
            "betas": [recipe.train.optim.beta1, recipe.train.optim.beta2],
            "eps": recipe.train.optim.eps,
            "batch_size": recipe.train.batch_size,
            "fp16_run": recipe.train.autocast_precision == "fp16",
            "lr_decay": recipe.train.lr_decay,
            "segment_size": spec.segment,
            "init_lr_ratio": 1,
            "warmup_epochs": 0,
            "c_mel": recipe.train.loss.mel,
            "c_kl": recipe.train.loss.kl,
        }
        data = {
            "max_wav_value": 32768.0,
            layout.rate_key: self.shape.sample_rate,
            "filter_length": spec.n_fft,
            "hop_length": spec.hop,
            "win_length": spec.n_fft,
            "n_mel_channels": spec.num_mels,
            "mel_fmin": 0.0,
            "mel_fmax": None,
        }
        model = self.shape.to_upstream_arguments() | {"use_spectral_norm": False}
        for name in ("spec_channels", "segment_size", "sr"):  # which the tools take from `data` and `train`
            del model[name]
        if self.kind == "applio":
            model["text_enc_hidden_dim"] = self.shape.content_channels
        config: dict[str, Any] = {"train": train, "data": data, "model": model}
        info = [{"id": speaker, "name": self.speaker_name(speaker)} for speaker in self.speakers]
        if self.names_speakers:
            config["speaker_info"] = info
            entries = [self._recording(clip) for clip in {clip.recording: clip for clip in self.clips}.values()]
            write_json(folder / "multispeaker_manifest.json", {"version": 1, "speakers": info, "entries": entries})
        write_json(folder / "config.json", config)
        seconds = sum(clip.header["num_samples"] for clip in self.clips) / self.shape.sample_rate
        described = {"total_dataset_duration": self.dataset.length, "total_seconds": seconds}
        described |= {"embedder_model": embedder_of(self.saved).name, "speakers_id": len(self.speakers)}
        write_json(folder / "model_info.json", described)

    def _recording(self, clip: Clip) -> dict[str, Any]:
        """What the manifest says of a clip's recording."""
        speaker = clip.header["speaker"]
        return {
            "path": str(base_of(Path(self.recipe.data.audio_dir).absolute()) / clip.header["source"]),
            "speaker_name": self.speaker_name(speaker),
            "speaker_id": speaker,
            "repeat": clip.header.get("repeat", 1),
            "output_key": clip.recording,
        }

    def training_file(self, name: str) -> dict[str, Any]:
        """The contents of G_STEP.pth or D_STEP.pth, from which the tool goes on."""
        weights, progress, identity = self.saved.models[name], self.saved.progress, self.saved.identity
        with torch.device("meta"):  # for the order of its parameters, which no file of ours keeps
            judges = MultiPeriodDiscriminator(DISCRIMINATORS[self.judged_by], identity["discriminator.channels"])
            network = Generator(self.shape) if name == "generator" else judges
        names = upstream_order(network.state_dict(), self.kind)
        buffers = {key for key, _ in network.named_buffers()}
        parameters = {key: weights[key] for key in names if key not in buffers}
        is_adamw = identity.get("optimizer") in ADAMW
        return {
            "model": to_upstream({key: weights[key] for key in names}),
            "iteration": max(1, progress.epoch),
            "optimizer": adamw_state(self.saved.optimizers[name], parameters, self.recipe, is_adamw),
            "learning_rate": self.recipe.train.learning_rate,
        }


def adamw_state(
    state: OptimizerState, parameters: Mapping[str, Tensor], recipe: Recipe, with_moments: bool
) -> dict[str, Any]:
    """The state of torch.optim.AdamW over `parameters` in their order, with the run's moments if they are AdamW's.

    A parameter that does not change here (the bias of a key, which attention does not see) has none.
    """
    train, group = recipe.train, state.groups[0] if state.groups else {}
    over = {name: nn.Parameter(value) for name, value in parameters.items()}
    betas, rate = (train.optim.beta1, train.optim.beta2), group.get("lr", train.learning_rate)
    optimizer = torch.optim.AdamW(
        over.values(), lr=rate, betas=betas, eps=train.optim.eps, weight_decay=train.optim.weight_decay
    )
    for name, parameter in over.items():
        moments = {key: state.tensors.get(f"{name}/{key}") for key in ("exp_avg", "exp_avg_sq")}
        step = state.tensors.get(f"{name}/step", state.tensors.get("groups/0/step", group.get("step", 0)))
        if with_moments and None not in moments.values():
            optimizer.state[parameter] = {"step": torch.as_tensor(step, dtype=torch.float32)} | {
                key: value.float() for key, value in moments.items() if value is not None
            }
    written = optimizer.state_dict()
    written["param_groups"][0]["initial_lr"] = train.learning_rate  # for their schedulers, which go on from it
    return written


def write_base_models(recipe: Recipe, saved: Checkpoint, dataset: Dataset, folder: Path, final: Path) -> None:
    """Write G and D as base models are shared: float16 weights, with what they were trained with beside them.

    Raises:
        StageError: a weight is not a finite number of float16, or there are not the weights that export.weights names.
    """
    generator, averaged = saved.generator(recipe.export.weights)
    if saved.ema:
        logger.info("export: G has %s of step %d", WEIGHTS[averaged], saved.progress.step)
    shape = GeneratorShape.from_identity(saved.identity)
    told = {
        "iteration": saved.progress.epoch,
        "learning_rate": recipe.train.learning_rate,
        "sr": shape.sample_rate,
        "f0": int(shape.pitch_guidance),
        "version": saved.identity["discriminator.version"],
        **embedder_of(saved).to_voice(),
    }
    for name, letter in LETTERS.items():
        state = generator if name == "generator" else saved.models[name]
        weights = halved(to_upstream(state), saved.progress.step)
        rate = f"{shape.sample_rate // 1000}k"
        file = f"{'f0' * shape.pitch_guidance}{letter}{rate}_{recipe.name}.pth"
        save_pth(folder / file, {"model": weights} | told)


def write_experiment(recipe: Recipe, saved: Checkpoint, dataset: Dataset, folder: Path, final: Path) -> None:
    """Write the experiment's folder that export.format names."""
    Experiment(recipe, saved, dataset, recipe.export.format).write(folder, final)
