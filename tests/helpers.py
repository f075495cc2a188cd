"""What several tests need: narrow voices, run folders without the stages before, and stand-ins for slow parts."""

from __future__ import annotations

import dataclasses
import json
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import safetensors.torch
import torch
from accelerate.state import AcceleratorState
from torch import Tensor, nn

from rvc_dist import __main__ as cli
from rvc_dist import choices
from rvc_dist.config import DataConfig, ExtractConfig, ModelConfig, Recipe, TrainConfig
from rvc_dist.data.audio import Wave
from rvc_dist.features.djcm import DJCM
from rvc_dist.features.energy import energy_arrays
from rvc_dist.features.f0 import F0Method
from rvc_dist.features.hub import make_torchaudio_importable
from rvc_dist.files import write_json
from rvc_dist.models import encoders, modules, spectral
from rvc_dist.models.generator import Generator
from rvc_dist.models.shape import GeneratorShape
from rvc_dist.models.state_dict import from_upstream, to_upstream
from rvc_dist.train import checkpoint, losses, trainer
from rvc_dist.train.optimizers import OptimizerState
from rvc_dist.train.progress import Progress
from rvc_dist.train.voice_file import Dataset, voice_dict
from rvc_dist.workspace import Shard, Unit, WorkList, Workspace, fingerprint, save_arrays

RATE = 24000
NARROW = ModelConfig(
    inter_channels=16,
    hidden_channels=16,
    filter_channels=32,
    num_layers=1,
    upsample_initial_channel=32,
    gin_channels=8,
    discriminator_channels=64,
)
"""The smallest networks that a recipe allows, nearly: a step takes milliseconds."""
WIDTH = 16
"""Of the content features that `make_features` makes up."""
NARROWEST = ModelConfig(
    inter_channels=8,
    hidden_channels=8,
    filter_channels=16,
    num_layers=1,
    upsample_initial_channel=32,
    gin_channels=4,
    discriminator_channels=64,
)
EMBEDDER = {"name": "mfcc", "width": 768, "hash": "0123456789abcdef"}


def narrow_recipe(folder: Path, **sections: Any) -> Recipe:
    """A recipe for a narrow 24 kHz voice in `folder`/run, with features that need no download; sections replace."""
    defaults: dict[str, Any] = {
        "data": DataConfig(audio_dir=str(folder / "audio"), sample_rate=RATE),
        "extract": ExtractConfig(f0_method="pyin", embedder_model="mfcc"),
        "model": NARROW,
    }
    return Recipe(name="tiny", run_dir=str(folder / "run"), **(defaults | sections))


def parse_recipe(stage: str, words: list[str]) -> Recipe:
    """The recipe that a command line gives."""
    return cli.parse(stage, words)[0]


def changed(recipe: Recipe, section: str, **values: Any) -> Recipe:
    """`recipe` with other values in one section."""
    return dataclasses.replace(recipe, **{section: dataclasses.replace(getattr(recipe, section), **values)})


def workspace_of(recipe: Recipe) -> Workspace:
    return Workspace(recipe.run_dir, recipe.name)


def tone(seconds: float, rate: int = RATE, f0_hz: float = 150.0, level: float = 0.2) -> Wave:
    """A buzz of ten harmonics, swelling four times a second: something voiced to cut, track and convert."""
    time = np.arange(round(seconds * rate)) / rate
    buzz = sum(np.sin(2 * np.pi * f0_hz * k * time) / k for k in range(1, 11))
    return (level * buzz * (0.6 + 0.4 * np.sin(2 * np.pi * 4 * time))).astype(np.float32)


def noise(seconds: float, rate: int = RATE, level: float = 0.1, seed: int = 0) -> Wave:
    return np.random.default_rng(seed).normal(0.0, level, round(seconds * rate)).astype(np.float32)


class SteadyPitch(F0Method):
    """A tracker that takes everything that sounds for `HZ`: put it into F0_METHODS in the place of a slow one."""

    HZ = 220.0

    def track(self, wave: Tensor) -> Tensor:
        return torch.full((wave.shape[0] // 160,), self.HZ)


def write_djcm(path: Path, n_fft: int = 1024, separates: bool = False, peak: int = 180) -> Path:
    """Weights of DJCM, random but for the last layer, which prefers one bin whatever the others hear."""
    with torch.random.fork_rng([]):
        torch.manual_seed(0)
        weights = DJCM(n_fft, separates).state_dict()
    weights["pe_decoder.fc.1.bias"] -= 10.0
    weights["pe_decoder.fc.1.bias"][peak - 1 : peak + 2] += torch.tensor([10.0, 13.0, 10.0])
    (torch.save if path.suffix == ".pt" else safetensors.torch.save_file)(weights, path)
    return path


def write_features(
    recipe: Recipe, units: Sequence[Sequence[npt.NDArray[np.float32]]], speakers: Sequence[int] = (0,)
) -> None:
    """A finished features folder: for each unit its clips' content [T50, C], of `speakers` in turn; f0 is 150 Hz.

    Each clip counts as a source file of its own. Beside it lie the work list and the report of the clips, but no clips.
    """
    work = workspace_of(recipe)
    seconds = 0.0
    for number, contents in enumerate(units):
        arrays: dict[str, Any] = {}
        clips = []
        for i, content in enumerate(contents):
            num_f0 = 2 * len(content)
            arrays[f"{i:05d}.content"] = content
            arrays[f"{i:05d}.f0"] = np.full(num_f0, 150.0, np.float32)
            num_samples = len(content) * recipe.data.sample_rate // 50
            seconds += len(content) / 50
            sizes = {"num_samples": num_samples, "num_content": len(content), "num_f0": num_f0}
            clips.append(
                {"source": f"{number}_{i}.wav", "speaker": speakers[i % len(speakers)], "start_s": 0.0} | sizes
            )
        width = contents[0].shape[1] if contents else EMBEDDER["width"]
        header = {
            "stamp": fingerprint(number, [float(content.sum()) for content in contents]),
            "sample_rate": recipe.data.sample_rate,
            "embedder": EMBEDDER | {"width": width},
            "clips": clips,
        }
        save_arrays(work.features_file(number), arrays, header)
    frames = sum(len(c) for contents in units for c in contents)
    total = sum(float(c.sum()) for contents in units for c in contents)
    write_json(work.features_report_file, {"settings": {}, "clips": fingerprint(total), "content_frames": frames})
    work_list = WorkList(fingerprint("listing"), {}, tuple(Unit(i, ()) for i in range(len(units))), ())
    work.clips_dir.mkdir(parents=True, exist_ok=True)
    work.work_list_file.write_text(work_list.dumps(), encoding="utf-8")
    write_json(work.clips_report_file, {"total_dataset_duration": f"00:00:{round(seconds):02d}"})


def make_generator(recipe: Recipe, *, content_channels: int = 768, num_speakers: int = 1) -> Generator:
    """The recipe's generator with random weights, of a seed with which the narrow ones are neither silent nor clip."""
    with torch.random.fork_rng([]):
        torch.manual_seed(3)
        return Generator(GeneratorShape.from_recipe(recipe, content_channels, num_speakers))


def golden_weights(network: nn.Module, prefix: str = "") -> nn.Module:
    """`network` with every parameter drawn from its upstream name, as the golden vectors were made."""
    state = network.state_dict()
    for name, value in to_upstream(dict(network.named_parameters(prefix))).items():
        noise = np.random.Generator(np.random.PCG64(zlib.crc32(name.encode()))).standard_normal(tuple(value.shape))
        tensor = torch.from_numpy(noise.astype(np.float32) * np.float32(0.05))
        tensor = tensor.abs() + 0.5 if name.endswith("weight_g") else tensor
        state |= from_upstream({name.removeprefix(f"{prefix}."): tensor})
    network.load_state_dict(state)
    return network.eval()


def make_checkpoint(recipe: Recipe, generator: Generator, progress: Progress | None = None) -> checkpoint.Checkpoint:
    """A checkpoint as the trainer makes them, but for the discriminator and the optimizers, which are empty."""
    identity = {f"generator.{k}": v for k, v in dataclasses.asdict(generator.shape).items()}
    identity["discriminator.version"] = recipe.model.version
    identity["embedder"] = EMBEDDER | {"width": generator.shape.content_channels}
    return checkpoint.Checkpoint(
        progress=progress or Progress(step=10, epoch=2),
        identity=json.loads(json.dumps(identity)),
        models={"generator": generator.state_dict(), "discriminator": {}},
        optimizers={name: OptimizerState({}, []) for name in checkpoint.MODELS},
    )


def voice_contents(recipe: Recipe, generator: Generator) -> dict[str, Any]:
    """What a voice file of `generator` holds."""
    voice = voice_dict(recipe, make_checkpoint(recipe, generator), Dataset("00:01:00", generator.shape.num_speakers))
    del voice["embedder_hash"]  # made up, and would be refused
    return voice


def make_ssl_folder(
    folder: Path, kind: str, num_layers: int = 10, projection: bool = True, position_groups: int = 2
) -> Any:
    """A random encoder of `kind` with ten layers of 16 channels, saved as transformers does; returns the network."""
    make_torchaudio_importable()
    import transformers

    torch.manual_seed(0)
    config = getattr(transformers, f"{kind}Config")(
        hidden_size=16,
        num_hidden_layers=num_layers,
        num_attention_heads=2,
        intermediate_size=32,
        conv_dim=(8,) * 7,
        num_conv_pos_embeddings=16,
        num_conv_pos_embedding_groups=position_groups,
        classifier_proj_size=6,
    )
    network = getattr(transformers, f"{kind}Model")(config).eval()
    tensors = {key: value.contiguous() for key, value in network.state_dict().items()}
    if projection:
        tensors["final_proj.weight"] = torch.randn(6, 16)
        tensors["final_proj.bias"] = torch.randn(6)
    folder.mkdir()
    config.save_pretrained(folder)
    safetensors.torch.save_file(tensors, folder / "model.safetensors")
    return network


def make_whisper_folder(folder: Path, whole: bool) -> Any:
    make_torchaudio_importable()
    import transformers
    from transformers.models.whisper.modeling_whisper import WhisperEncoder

    torch.manual_seed(0)
    config = transformers.WhisperConfig(
        d_model=16,
        encoder_layers=2,
        encoder_attention_heads=2,
        encoder_ffn_dim=32,
        decoder_layers=1,
        decoder_attention_heads=2,
        decoder_ffn_dim=32,
        vocab_size=20,
        pad_token_id=0,
    )
    network = (transformers.WhisperModel if whole else WhisperEncoder)(config).eval()
    folder.mkdir()
    config.save_pretrained(folder)
    tensors = {key: value.clone() for key, value in network.state_dict().items()}
    safetensors.torch.save_file(tensors, folder / "model.safetensors")
    return network.encoder if whole else network


def train(recipe: Recipe) -> checkpoint.Checkpoint:
    """On one rank, in this process, as if none had trained in it before; the newest checkpoint."""
    AcceleratorState._reset_state(reset_partial_state=True)
    trainer.run(recipe, Shard(0, 1))
    return newest(recipe)


def newest(recipe: Recipe) -> checkpoint.Checkpoint:
    path = checkpoint.latest(workspace_of(recipe).checkpoints_dir)
    assert path is not None
    return checkpoint.load(path)


def tiny_recipe(run_dir: Path, **train: Any) -> Recipe:
    """A recipe for a run that trains in a second, on features that `make_features` makes up."""
    defaults: dict[str, Any] = {"batch_size": 2, "max_epochs": 100, "max_steps": 4, "log_every_steps": 1}
    defaults |= {"report": False, "samples": False, "trackers": ()}  # they take seconds of a core
    return Recipe(
        name="tiny",
        run_dir=str(run_dir),
        data=DataConfig(sample_rate=24000, holdout=0.25),
        extract=ExtractConfig(embedder_model="mfcc", f0_method="yin", include_mutes=1),
        model=NARROWEST,
        train=TrainConfig(**(defaults | train)),
    )


def make_features(
    recipe: Recipe, num_clips: int = 9, seconds: float = 0.6, speakers: Sequence[int] = (0,), voice: str = "ours"
) -> None:
    """Write what preprocess and extract would: three clips a unit and source, lengths that differ a little.

    `voice` stands for what is in the recordings. As with HuBERT, content ends some 25 ms before the wave, whose length
    is no whole number of frames.
    """
    work, rate, rng = workspace_of(recipe), recipe.data.sample_rate, np.random.default_rng(0)
    for unit in range(-(-num_clips // 3)):
        waves: dict[str, Any] = {}
        features: dict[str, Any] = {}
        clips = []
        for i in range(min(3, num_clips - 3 * unit)):
            num_content = int(seconds * 50) + 4 * i
            num_samples = (num_content + 1) * rate // 50 + 2 * i + 1
            hz = 100.0 + 20 * (3 * unit + i)
            waves[f"{i:05d}"] = (0.3 * np.sin(2 * np.pi * hz * np.arange(num_samples) / rate)).astype(np.float32)
            content = rng.standard_normal((num_content, WIDTH)).cumsum(axis=0) / 5
            features[f"{i:05d}.content"] = content.astype(np.float32)
            features[f"{i:05d}.f0"] = np.full(2 * num_content + 2, hz, dtype=np.float32)
            sizes = {"num_samples": num_samples, "num_content": num_content, "num_f0": 2 * num_content + 2}
            where = {"source": f"{unit}.wav", "content": f"{voice} {unit}", "start_s": round(i * seconds, 4)}  # overlap
            clips.append({"speaker": speakers[unit % len(speakers)], **where, **sizes})
        quiet = (np.resize(wave, 160 * len(features[f"{key}.f0"])) for key, wave in waves.items())
        features |= energy_arrays(recipe, features, quiet)
        header = {"stamp": "tiny", "sample_rate": rate, "clips": clips}
        save_arrays(work.clips_file(unit), waves, header)
        save_arrays(work.features_file(unit), features, header | {"embedder": EMBEDDER | {"width": WIDTH}})
    mute = {"00000.content": np.zeros((50, WIDTH), np.float32), "00000.f0": np.zeros(100, np.float32)}
    mute |= energy_arrays(recipe, mute, [np.zeros(16000, np.float32)])
    save_arrays(work.mute_file, mute, {"stamp": "tiny", "num_samples": rate, "num_content": 50, "num_f0": 100})
    settings = {"model.energy": True} if recipe.model.energy else {}
    write_json(work.features_report_file, {"settings": settings, "clips": "tiny", "content_frames": 0})
    write_json(work.clips_report_file, {"total_dataset_duration": "00:00:05", "total_seconds": 5.0})


def with_train(recipe: Recipe, **train: Any) -> Recipe:
    return changed(recipe, "train", **train)


def thin_networks(patch: Callable[[object, str, object], None]) -> None:
    """Leave of each kind of layer one, in every shape that a recipe gives: a compiler takes minutes for many.

    And two of the posterior encoder's sixteen layers, and of the mel loss one scale, of few bands, whose windows seldom
    find silence: the others took a third of a step.
    `patch(object, name, value)` sets an attribute, as pytest's monkeypatch.setattr does.
    """
    one_layer_of_each(patch)
    wavenet = modules.WaveNet
    patch(encoders, "WaveNet", lambda *sizes, num_layers, **more: wavenet(*sizes, num_layers=2, **more))
    patch(spectral, "MULTISCALE_MELS", (20,))
    patch(losses, "scale_weights", spectral.scale_weights.__wrapped__)  # which remembers none of other scales


def one_layer_of_each(patch: Callable[[object, str, object], None]) -> None:
    """`thin_networks` as the numbers of tests/train/frozen.json had them."""
    whole = GeneratorShape.from_recipe.__func__  # type: ignore[attr-defined]

    def thin(cls: type[GeneratorShape], *arguments: Any, **options: Any) -> GeneratorShape:
        shape = whole(cls, *arguments, **options)
        return dataclasses.replace(shape, resblock_kernels=(3,), resblock_dilations=((1,),))

    patch(GeneratorShape, "from_recipe", classmethod(thin))
    thin_specs = {
        name: choices.DiscriminatorSpec((2,), spec.resolutions[:1], min(spec.num_light, 1))
        for name, spec in choices.DISCRIMINATORS.items()
    }
    patch(choices, "DISCRIMINATORS", thin_specs)
