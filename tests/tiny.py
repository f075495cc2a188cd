"""A run folder small enough to train in a second: tones as clips, smooth random features, a very narrow network."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from rvc_dist.config import DataConfig, ExtractConfig, ModelConfig, Recipe, TrainConfig
from rvc_dist.models import discriminator
from rvc_dist.models.shape import GeneratorShape
from rvc_dist.workspace import Workspace, save_arrays, write_json

WIDTH = 16
EMBEDDER = {"name": "mfcc", "width": WIDTH, "hash": "0123456789abcdef"}
NARROW = ModelConfig(
    inter_channels=8,
    hidden_channels=8,
    filter_channels=16,
    num_layers=1,
    upsample_initial_channel=32,
    gin_channels=4,
    discriminator_channels=64,
)


def tiny_recipe(run_dir: Path, **train: object) -> Recipe:
    defaults = {"batch_size": 2, "max_epochs": 100, "max_steps": 4, "log_every_steps": 1}
    return Recipe(
        name="tiny",
        run_dir=str(run_dir),
        data=DataConfig(sample_rate=24000, holdout=0.25),
        extract=ExtractConfig(embedder_model="mfcc", f0_method="pyin", include_mutes=1),
        model=NARROW,
        train=TrainConfig(**(defaults | train)),
    )


def make_features(
    recipe: Recipe, num_clips: int = 9, seconds: float = 0.6, speakers: Sequence[int] = (0,), voice: str = "ours"
) -> None:
    """Write what preprocess and extract would: three clips a unit and source, lengths that differ a little.

    `voice` stands for what is in the recordings. As with HuBERT, content ends some 25 ms before the wave, whose length
    is no whole number of frames.
    """
    work, rate, rng = Workspace(recipe.run_dir, recipe.name), recipe.data.sample_rate, np.random.default_rng(0)
    for unit in range(-(-num_clips // 3)):
        waves, features, clips = {}, {}, []
        for i in range(min(3, num_clips - 3 * unit)):
            num_content = int(seconds * 50) + 4 * i
            num_samples = (num_content + 1) * rate // 50 + 2 * i + 1
            hz = 100.0 + 20 * (3 * unit + i)
            waves[f"{i:05d}"] = (0.3 * np.sin(2 * np.pi * hz * np.arange(num_samples) / rate)).astype(np.float32)
            content = rng.standard_normal((num_content, WIDTH)).cumsum(axis=0) / 5
            features[f"{i:05d}.content"] = content.astype(np.float32)
            features[f"{i:05d}.f0"] = np.full(2 * num_content + 2, hz, dtype=np.float32)
            sizes = {"num_samples": num_samples, "num_content": num_content, "num_f0": 2 * num_content + 2}
            where = {"source": f"{unit}.wav", "content": f"{voice} {unit}"}
            where["start_s"] = round(i * seconds, 4)  # they overlap a little
            clips.append({"speaker": speakers[unit % len(speakers)]} | where | sizes)
        header = {"stamp": "tiny", "sample_rate": rate, "clips": clips}
        save_arrays(work.clips_file(unit), waves, header)
        save_arrays(work.features_file(unit), features, header | {"embedder": EMBEDDER})
    mute = {"00000.content": np.zeros((50, WIDTH), np.float32), "00000.f0": np.zeros(100, np.float32)}
    save_arrays(work.mute_file, mute, {"stamp": "tiny", "num_samples": rate, "num_content": 50, "num_f0": 100})
    write_json(work.features_report_file, {"settings": {}, "clips": "tiny", "content_frames": 0})
    write_json(work.clips_report_file, {"total_dataset_duration": "00:00:05", "total_seconds": 5.0})


def with_train(recipe: Recipe, **train: object) -> Recipe:
    return replace(recipe, train=replace(recipe.train, **train))


def thin_networks(patch) -> None:
    """Leave of each kind of layer one: what a compiler takes minutes for is the number of different layers.

    `patch(object, name, value)` sets an attribute, as pytest's monkeypatch.setattr does.
    """
    whole = GeneratorShape.from_recipe.__func__

    def thin(cls, *arguments, **options):
        shape = whole(cls, *arguments, **options)
        return replace(shape, resblock_kernels=(3,), resblock_dilations=((1,),))

    patch(GeneratorShape, "from_recipe", classmethod(thin))
    patch(discriminator, "PERIODS", {"v1": (2,), "v2": (2,)})
