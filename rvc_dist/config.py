"""The recipe: one tree of frozen dataclasses that every stage takes whole and reads its part of.

YAML files and the command line are only data for these classes (`rvc_dist.cli` parses them); this module imports
nothing heavy, so that `--help` and a typo in a key answer at once.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple

from rvc_dist.schema import MAX_YAML_BYTES, SchemaError, parse_yaml, read_bounded

FEATURE_RATE = 16000
"""Sample rate of the copy that content encoders and pitch trackers hear, in Hz."""
F0_HOP = 160
"""Hop of f0 in samples at FEATURE_RATE: 100 frames a second."""
F0_PER_S = FEATURE_RATE // F0_HOP
MAX_CLIP_FRAMES = 900
"""A training clip is cut to at most this many spectrogram frames."""
MAX_SPEAKERS = 109
"""Rows of the speaker table of every pretrained generator."""
MAX_SEED = 2**31 - 1
MAX_NAME_BYTES = 180
"""A file name has at most 255, and those of an index have 60 besides the voice's."""
MAX_INT = 2**53
"""No number of a recipe means anything above it."""


class RateSpec(NamedTuple):
    """The numbers that an RVC version fixes for one sample rate (samples, except where said)."""

    n_fft: int
    hop: int
    num_mels: int
    segment: int
    upsample_rates: tuple[int, ...]
    upsample_kernels: tuple[int, ...]

    @property
    def reach(self) -> int:
        """How far a frame's window reaches beyond its hop, on either side: n_fft - hop is even everywhere."""
        return (self.n_fft - self.hop) // 2


_V2 = {
    24000: RateSpec(1024, 240, 80, 8640, (10, 6, 2, 2), (20, 12, 4, 4)),
    32000: RateSpec(1024, 320, 80, 12800, (10, 8, 2, 2), (20, 16, 4, 4)),
    40000: RateSpec(2048, 400, 125, 12800, (10, 10, 2, 2), (16, 16, 4, 4)),
    44100: RateSpec(2048, 512, 80, 10240, (8, 8, 2, 2, 2), (16, 16, 4, 4, 4)),
    48000: RateSpec(2048, 480, 128, 17280, (12, 10, 2, 2), (24, 20, 4, 4)),
}
RATES: dict[str, dict[int, RateSpec]] = {
    "v2": _V2,
    "v1": _V2
    | {
        32000: RateSpec(1024, 320, 80, 12800, (10, 4, 2, 2, 2), (16, 16, 4, 4, 4)),
        48000: RateSpec(2048, 480, 128, 11520, (10, 6, 2, 2, 2), (16, 16, 4, 4, 4)),
    },
}
"""RATES[version][sample rate]; the source of every derived size in the package."""


class ConfigError(ValueError):
    """The recipe is wrong; the message names every key at fault, what it got and what it may be."""


def _at_least(key: str, value: float | None, low: float) -> Iterator[str]:
    if value is not None and not low <= value < math.inf:
        yield f"{key}: got {value}, expected at least {low}"


def _above(key: str, value: float | None, low: float) -> Iterator[str]:
    if value is not None and not low < value < math.inf:
        yield f"{key}: got {value}, expected more than {low}"


def _within(key: str, value: float, low: float, high: float) -> Iterator[str]:
    if not low <= value <= high:
        yield f"{key}: got {value}, expected {low} to {high}"


@dataclass(frozen=True)
class DataConfig:
    """What is trained on."""

    audio_dir: str = "audio"
    """Folder of recordings of one speaker, or of sub-folders named by integer speaker id."""
    sample_rate: int = 48000
    """Sample rate of the voice in Hz: 24000, 32000, 40000, 44100 or 48000."""
    holdout: float = 0.05
    """Share of each speaker's seconds kept out of training, for validation and the choice of the best checkpoint: at
    least about 10 s of a speaker who has enough, never above 10% unless this says so."""

    def problems(self) -> Iterator[str]:
        if self.sample_rate not in _V2:
            yield f"data.sample_rate: got {self.sample_rate}, expected one of {', '.join(map(str, _V2))}"
        yield from _within("data.holdout", self.holdout, 0.0, 0.5)


@dataclass(frozen=True)
class PreprocessConfig:
    """How recordings become clips."""

    cut_method: Literal["automatic", "simple", "skip"] = "automatic"
    """automatic: at silences, then windows; simple: fixed windows and what is left; skip: one clip a file."""
    chunk_len: float = 3.0
    """Length of a clip in seconds."""
    overlap_len: float = 0.3
    """Overlap of neighbouring clips in seconds."""
    process_effects: bool = True
    """High-pass at 48 Hz (5th-order Butterworth)."""
    normalization: Literal["none", "pre", "post"] = "post"
    """Level recordings before cutting (pre), each clip after it (post), or not at all (none)."""
    clean_dataset: bool = False
    """Reduce noise by spectral gating, on the GPU if there is one; it also takes a little of the voice."""
    clean_strength: float = 0.5
    """Share of the noise's amplitude that clean_dataset takes away, 0 to 1."""
    num_workers: int = 2
    """Threads a rank."""

    def problems(self) -> Iterator[str]:
        yield from _within("preprocess.chunk_len", self.chunk_len, 1.0, 9.0)
        yield from _at_least("preprocess.overlap_len", self.overlap_len, 0.0)
        if self.overlap_len > self.chunk_len / 2:
            yield (
                f"preprocess.overlap_len: got {self.overlap_len}, expected at most half of "
                f"preprocess.chunk_len ({self.chunk_len})"
            )
        yield from _within("preprocess.clean_strength", self.clean_strength, 0.0, 1.0)
        yield from _at_least("preprocess.num_workers", self.num_workers, 1)


# fmt: off
F0_METHOD_NAMES = (
    "rmvpe", "crepe", "crepe-tiny", "fcpe", "penn", "pesto", "swift",
    "pyin", "yin", "swipe", "harvest", "dio", "pm", "piptrack",
)
# fmt: on
"""The table of them is `rvc_dist.features.f0.F0_METHODS`."""


def f0_method_names(text: str) -> tuple[str, ...]:
    """`extract.f0_method` -> the methods it names: one, or those of hybrid[a+b+...].

    Raises:
        ValueError: an unknown name, or a hybrid of fewer than two different methods.
    """
    import difflib
    import re

    hybrid = re.fullmatch(r"hybrid\[(.*)\]", text)
    names = tuple(hybrid[1].split("+")) if hybrid else (text,)
    for name in names:
        if name.startswith("hybrid"):
            where = "a hybrid takes no other hybrid" if hybrid else "a hybrid names its methods"
            raise ValueError(f"extract.f0_method: got {text!r}, but {where}; write hybrid[crepe+fcpe], for example")
        if name not in F0_METHOD_NAMES:
            got = f"{name!r} in {text!r}" if hybrid else f"{text!r}"
            near = difflib.get_close_matches(name, F0_METHOD_NAMES, n=1)
            hint = f"; did you mean {near[0]}?" if near else ""
            raise ValueError(
                f"extract.f0_method: got {got}, expected one of {', '.join(F0_METHOD_NAMES)} or hybrid[a+b+...]{hint}"
            )
    if hybrid and len(set(names)) < max(2, len(names)):
        raise ValueError(f"extract.f0_method: got {text!r}, expected at least two methods, each named once")
    return names


@dataclass(frozen=True)
class EmbedderMix:
    """Layers of the content encoder beside its usual one: (1 - ratio) * usual layer + ratio * mean of `layers`.

    The usual layer is the last (v1: 9, and the mix goes through the final projection). With one layer it is what other
    tools call `embedders_mix`. Whisper and the large encoders normalise only what the last layer gives: the layers
    before it are louder there, and weigh more than the ratio says.
    """

    layers: tuple[int, ...] = ()
    """Layers to mix in, such as [9]; 0 is what enters the first layer. Empty: off."""
    ratio: float = 0.5
    """Their share, 0 (off) to 1 (nothing of the usual layer)."""

    @property
    def is_on(self) -> bool:
        return bool(self.layers) and self.ratio > 0

    def problems(self) -> Iterator[str]:
        key, layers = "extract.embedder_mix", list(self.layers)
        if layers != sorted(set(layers)) or min(layers, default=0) < 0:
            yield f"{key}.layers: got {layers}, expected rising layer numbers from 0, each once"
        yield from _within(f"{key}.ratio", self.ratio, 0.0, 1.0)


@dataclass(frozen=True)
class ExtractConfig:
    """How clips become content features and pitch."""

    f0_method: str = "rmvpe"
    """Pitch tracker: rmvpe, crepe, crepe-tiny, fcpe, penn, pesto, swift (networks), pyin, yin, swipe, harvest, dio, pm,
    piptrack (signal processing), or the median of several: hybrid[crepe+fcpe+swift]."""
    f0_model: str = "lj1995/VoiceConversionWebUI/rmvpe.pt"
    """Weights of rmvpe: a local file, or owner/repository/file on the hub."""
    f0_penn_model: str = "maxrmorrison/fcnf0-plus-plus/fcnf0++.pt"
    """Weights of penn, likewise. Other methods bring their own or need none."""
    f0_min: float = 50.0
    """Lowest pitch in Hz."""
    f0_max: float = 1100.0
    """Highest pitch in Hz."""
    f0_autotune: bool = False
    """Move the pitch of voiced frames toward the nearest semitone (A4 = 440 Hz); in conversion too."""
    f0_autotune_strength: float = 1.0
    """How far: 0 (not at all) to 1 (onto the semitone), as a share of the way in cents."""
    embedder_model: str = "contentvec"
    """Content encoder: contentvec, spin, spin-v2, chinese-hubert-base, japanese-hubert-base, korean-hubert-base, mfcc,
    a hub id, or a folder with config.json and model.safetensors."""
    embedder_mix: EmbedderMix = field(default_factory=EmbedderMix)
    include_mutes: int = 2
    """Silent clips a speaker that join the training list."""
    batch_clips: int = 8
    """Most clips of equal length that the encoder and the pitch tracker take at once."""
    num_threads: int = 1
    """CPU threads a rank: fixed, since the last bits of a feature depend on it."""

    def problems(self) -> Iterator[str]:
        try:
            f0_method_names(self.f0_method)
        except ValueError as error:
            yield str(error)
        yield from _above("extract.f0_min", self.f0_min, 0.0)
        if not self.f0_max > self.f0_min:
            yield f"extract.f0_max: got {self.f0_max}, expected more than extract.f0_min ({self.f0_min})"
        if self.f0_max > FEATURE_RATE / 4:
            yield f"extract.f0_max: got {self.f0_max}, expected at most {FEATURE_RATE // 4}"
        yield from self.embedder_mix.problems()
        yield from _within("extract.f0_autotune_strength", self.f0_autotune_strength, 0.0, 1.0)
        yield from _at_least("extract.include_mutes", self.include_mutes, 0)
        yield from _at_least("extract.batch_clips", self.batch_clips, 1)
        yield from _at_least("extract.num_threads", self.num_threads, 1)


@dataclass(frozen=True)
class IndexConfig:
    """How content features become a retrieval index."""

    algorithm: Literal["auto", "faiss", "kmeans"] = "auto"
    """faiss: all frames; kmeans: 10,000 centres; auto: kmeans above 200,000 frames."""
    nprobe: int = 9
    """Cells searched a query; more is slower and finds nearer neighbours."""
    recall: float | None = None
    """Raise nprobe until this share of the 8 nearest neighbours is found, 0 to 1; 1 may search every cell."""

    def problems(self) -> Iterator[str]:
        yield from _at_least("index.nprobe", self.nprobe, 1)
        if self.recall is not None:
            yield from _within("index.recall", self.recall, 0.0, 1.0)


@dataclass(frozen=True)
class ModelConfig:
    """The networks. The widths are RVC's; narrower ones train faster and load no pretrained weights."""

    version: Literal["v1", "v2"] = "v2"
    """v1: 6 period discriminators, 256 features; v2: 8, and the encoder's own width."""
    vocoder: Literal["hifi-gan"] = "hifi-gan"
    """Decoder: NSF-HiFiGAN (without pitch guidance, plain HiFiGAN)."""
    pitch_guidance: bool = True
    """Follow f0: right for speech and singing alike."""
    inter_channels: int = 192
    hidden_channels: int = 192
    filter_channels: int = 768
    num_heads: int = 2
    num_layers: int = 6
    upsample_initial_channel: int = 512
    gin_channels: int = 256
    """Width of the speaker embedding."""
    discriminator_channels: int = 1024
    """Width of the widest discriminator layer; the others keep their proportion to it."""

    def problems(self) -> Iterator[str]:
        for name in ("inter_channels", "hidden_channels"):
            value = getattr(self, name)
            if value < 2 or value % 2:
                yield f"model.{name}: got {value}, expected an even number of at least 2"
        if self.num_heads < 1 or self.hidden_channels % self.num_heads:
            yield (
                f"model.num_heads: got {self.num_heads}, expected a divisor of "
                f"model.hidden_channels ({self.hidden_channels})"
            )
        yield from _at_least("model.filter_channels", self.filter_channels, 1)
        yield from _at_least("model.num_layers", self.num_layers, 1)
        yield from _at_least("model.gin_channels", self.gin_channels, 1)
        value = self.upsample_initial_channel
        if value < 32 or value % 32:
            yield f"model.upsample_initial_channel: got {value}, expected a multiple of 32 of at least 32"
        value = self.discriminator_channels
        if value < 64 or value % 64:
            yield f"model.discriminator_channels: got {value}, expected a multiple of 64 of at least 64"


@dataclass(frozen=True)
class LossConfig:
    """Weights of the generator's losses."""

    mel: float = 45.0
    kl: float = 1.0
    fm: float = 1.0
    adv: float = 1.0

    def problems(self) -> Iterator[str]:
        for name in ("mel", "kl", "fm", "adv"):
            yield from _at_least(f"train.loss.{name}", getattr(self, name), 0.0)


# fmt: off
OptimizerName = Literal[
    "adamw", "radam", "anyprecision_adamw", "adamw_8bit",
    "adabelief", "adan", "ademamix", "adopt", "came", "lamb", "lion", "prodigy", "ranger", "ranger21",
]
# fmt: on


@dataclass(frozen=True)
class OptimConfig:
    """Settings of the optimizers; each takes those that it has."""

    beta1: float = 0.8
    """Decay of the momentum. RVC's betas and eps are those of VITS (arXiv 2106.06103)."""
    beta2: float = 0.99
    """Decay of the variance."""
    eps: float = 1e-9
    weight_decay: float = 0.01
    variance_dtype: Literal["float32", "bfloat16"] = "float32"
    """Of anyprecision_adamw, whose momentum is always bfloat16."""
    kahan_summation: bool = False
    """Of anyprecision_adamw: carry the rounding error of each update to the next."""

    def problems(self) -> Iterator[str]:
        for name in ("beta1", "beta2"):
            if not 0.0 <= getattr(self, name) < 1.0:
                yield f"train.optim.{name}: got {getattr(self, name)}, expected at least 0.0 and less than 1.0"
        yield from _above("train.optim.eps", self.eps, 0.0)
        yield from _at_least("train.optim.weight_decay", self.weight_decay, 0.0)


@dataclass(frozen=True)
class TrainConfig:
    """The training loop. A run ends at max_epochs or max_steps, whichever comes first."""

    batch_size: int = 4
    """Clips a rank and micro-batch; the global batch is this times grad_accum_steps times the number of ranks."""
    grad_accum_steps: int = 1
    """Micro-batches a step. All but one run G's forward pass twice, so that D's step precedes all of G's."""
    max_epochs: int = 200
    """Times that every clip is seen."""
    max_steps: int | None = None
    """Optimizer steps, for runs that are not counted in epochs."""
    learning_rate: float = 1e-4
    """Of G and D alike; it does not depend on the number of ranks unless lr_scaling says so."""
    lr_scaling: Literal["none", "sqrt", "linear"] = "none"
    """Multiply learning_rate by 1, the square root of the number of ranks, or the number of ranks."""
    lr_schedule: Literal["exponential", "cosine", "constant"] = "exponential"
    """exponential: times lr_decay an epoch; cosine: to zero at the end of the run."""
    lr_decay: float = 0.999875
    """Factor of the exponential schedule, an epoch."""
    warmup_steps: int = 0
    """Steps over which the learning rate rises linearly from zero."""
    kl_warmup_steps: int = 0
    """Steps over which the weight of the KL loss rises linearly from zero."""
    max_grad_norm: float | None = None
    """Clip the gradient norm of G and of D to this."""
    optimizer: OptimizerName = "adamw"
    """The first three are built in; adamw_8bit needs bitsandbytes, the others pytorch-optimizer (extra: optim)."""
    optim: OptimConfig = field(default_factory=OptimConfig)
    precision: Literal["fp32", "bf16"] = "fp32"
    """bf16: autocast; parameters, losses and spectrograms stay float32."""
    fast_train: bool = False
    """TF32, cuDNN benchmark, allocator, compile and loader settings on every rank; changes no formula."""
    bf16_adamw: bool = False
    """Shortcut for precision bf16 and optimizer anyprecision_adamw; needs a GPU with bf16, or a CPU."""
    compile: Literal["auto", "always", "never"] = "auto"
    """torch.compile of G and of D. auto: with fast_train, where the plan repays it and a trial on this device gains."""
    activation_checkpointing: bool = False
    """Compute activations again in the backward pass instead of keeping them: less memory, more time."""
    grad_compression: Literal["none", "bf16"] = "none"
    """Send gradients between ranks as bf16: half the bytes."""
    cache_on_device: bool = False
    """Keep the whole dataset in the device's memory, where it fits."""
    deterministic: bool = False
    """Deterministic CUDA kernels, for bit-exact resume; the CPU's always are."""
    seed: int = 1234
    multiscale_mel_loss: bool = True
    """Mel loss over eight resolutions instead of one."""
    loss: LossConfig = field(default_factory=LossConfig)
    pretrained_g: str | None = None
    """Generator weights to start from (.pth)."""
    pretrained_d: str | None = None
    """Discriminator weights to start from (.pth)."""
    save_every_steps: int = 1000
    """Steps between checkpoints; one is always written at the end and when the run is stopped."""
    save_every_epochs: int | None = None
    """Epochs between checkpoints, instead of save_every_steps."""
    keep_checkpoints: int = 3
    """Newest checkpoints kept, besides the best."""
    eval_every_steps: int = 500
    """Steps between validations on held-out clips."""
    overtrain_detect: bool = False
    """Stop when validation has not improved for overtrain_threshold epochs."""
    overtrain_threshold: int = 50
    """Epochs without improvement that end the run."""
    max_bad_steps: int = 3
    """Steps in a row without finite gradients after which the run goes back to its last checkpoint, or stops."""
    log_every_steps: int = 10
    """Steps between log lines; only then does the host wait for the device."""
    num_workers: int = 1
    """Loader processes a rank; 0 loads in the training process."""
    timeout_s: float = 600.0
    """Seconds that a rank waits for the others before the run ends: more than the longest that one of them may take."""

    @property
    def use_bf16(self) -> bool:
        return self.precision == "bf16" or self.bf16_adamw

    @property
    def optimizer_name(self) -> str:
        return "anyprecision_adamw" if self.bf16_adamw else self.optimizer

    def problems(self) -> Iterator[str]:
        for name in ("batch_size", "grad_accum_steps", "max_epochs", "max_steps", "save_every_steps"):
            yield from _at_least(f"train.{name}", getattr(self, name), 1)
        for name in ("save_every_epochs", "keep_checkpoints", "eval_every_steps", "log_every_steps"):
            yield from _at_least(f"train.{name}", getattr(self, name), 1)
        for name in ("overtrain_threshold", "max_bad_steps"):
            yield from _at_least(f"train.{name}", getattr(self, name), 1)
        yield from _above("train.learning_rate", self.learning_rate, 0.0)
        yield from _within("train.lr_decay", self.lr_decay, 0.0, 1.0)
        yield from _above("train.max_grad_norm", self.max_grad_norm, 0.0)
        for name in ("warmup_steps", "kl_warmup_steps", "num_workers"):
            yield from _at_least(f"train.{name}", getattr(self, name), 0)
        yield from _within("train.seed", self.seed, 0, MAX_SEED)
        yield from _at_least("train.timeout_s", self.timeout_s, 1.0)
        if self.bf16_adamw and self.optimizer not in ("adamw", "anyprecision_adamw"):
            yield (
                f"train.optimizer: got {self.optimizer} with train.bf16_adamw, which chooses anyprecision_adamw; "
                "set only one"
            )
        if self.optimizer == "prodigy" and self.learning_rate < 0.1:
            yield (
                f"train.learning_rate: got {self.learning_rate} with prodigy, which finds the rate by itself and "
                "multiplies it by this; expected 1.0 or near it"
            )
        yield from self.optim.problems()
        yield from self.loss.problems()


@dataclass(frozen=True)
class ExportConfig:
    """The voice file."""

    author: str = ""


@dataclass(frozen=True)
class InferConfig:
    """Conversion of one file. A voice file is enough: nothing else of the recipe is needed."""

    input: str = "input.wav"
    """Recording to convert, of any length and rate."""
    output: str = "output.wav"
    """Where the result goes (wav or flac)."""
    model: str | None = None
    """Voice file; by default the run's voice/NAME_last.pth."""
    index: str | None = None
    """Retrieval index; by default the run's, when there is one."""
    embedder_model: str | None = None
    """Content encoder; by default the one that the voice file names. One given here is used even if it is another."""
    pitch: float = 0.0
    """Transposition in semitones."""
    index_rate: float = 0.75
    """Share of retrieved features, 0 (no index) to 1."""
    protect: float = 0.33
    """Share of retrieved features kept in unvoiced frames; 0.5 turns the protection off."""
    speaker: int | None = None
    """Id of a trained speaker; null: the only one, the lowest of several, or 0 where the voice does not say."""
    window_s: float = 30.0
    """Longest piece converted at once, in seconds: bounds the memory."""
    seed: int = 1234

    def problems(self) -> Iterator[str]:
        yield from _within("infer.pitch", self.pitch, -48.0, 48.0)
        yield from _within("infer.index_rate", self.index_rate, 0.0, 1.0)
        yield from _within("infer.protect", self.protect, 0.0, 0.5)
        yield from _at_least("infer.speaker", self.speaker, 0)
        yield from _within("infer.window_s", self.window_s, 2.0, 600.0)
        yield from _within("infer.seed", self.seed, 0, MAX_SEED)
        if Path(self.output).suffix.lower() not in (".wav", ".flac"):
            yield f"infer.output: got {self.output!r}, expected a name that ends in .wav or .flac"


@dataclass(frozen=True)
class BenchConfig:
    """What `rvc-dist bench` measures; all of it is kept in RUN/bench."""

    warmup_steps: int = 3
    """Steps before the measured ones: the first make what later ones reuse."""
    steps: int = 10
    """Steps that are measured, or trained on each side of --parity."""
    plain: bool = False
    """Also measure a plain RVC step on the same networks, in turn with the real one."""
    plain_precision: Literal["recipe", "fp32"] = "recipe"
    """Precision of the plain step: the recipe's, or float32."""
    parity: bool = False
    """Instead, train the same steps in float32 with AdamW and as the recipe says, and compare every loss (--parity)."""

    def problems(self) -> Iterator[str]:
        for name in ("warmup_steps", "steps"):
            yield from _at_least(f"bench.{name}", getattr(self, name), 1)


@dataclass(frozen=True)
class PlanConfig:
    """The cluster that `rvc-dist plan` foretells the run on. Bandwidths are in gigabytes (10^9) a second."""

    ranks: int = 8
    """Ranks that the run is to have; the table shows powers of two beside it."""
    ranks_per_node: int | None = None
    """Ranks of a machine; null: its GPUs, or without any its cores over the threads of a rank."""
    bandwidth_gb_s: float | None = None
    """Between nodes, of a node in each direction; null: as `bench` measured it, else 3 (25 Gbit/s Ethernet)."""
    local_bandwidth_gb_s: float | None = None
    """Between the ranks of a node; null: as `bench` measured it on several ranks, else 10 (PCI Express)."""
    latency_s: float = 5e-5
    """Of one message between two ranks, in seconds."""
    step_s: float | None = None
    """Seconds of a full step on one rank; null: as `bench` measured it, and it is measured now if it never was."""
    device_tflop_s: float | None = None
    """Estimate step_s instead: TFLOP/s that a device really reaches, often a tenth to a third of its data sheet's."""

    def problems(self) -> Iterator[str]:
        for name in ("ranks", "ranks_per_node"):
            yield from _at_least(f"plan.{name}", getattr(self, name), 1)
        for name in ("bandwidth_gb_s", "local_bandwidth_gb_s", "step_s", "device_tflop_s"):
            yield from _above(f"plan.{name}", getattr(self, name), 0.0)
        yield from _at_least("plan.latency_s", self.latency_s, 0.0)
        if self.step_s is not None and self.device_tflop_s is not None:
            yield f"plan.device_tflop_s: got {self.device_tflop_s} with plan.step_s {self.step_s}; set only one"


@dataclass(frozen=True)
class Recipe:
    """Everything that decides what a run produces."""

    name: str = "voice"
    """Name of the voice; files are called after it."""
    run_dir: str = ""
    """Folder of the run: clips, features, index, checkpoints, voice. By default runs/NAME."""
    data: DataConfig = field(default_factory=DataConfig)
    preprocess: PreprocessConfig = field(default_factory=PreprocessConfig)
    extract: ExtractConfig = field(default_factory=ExtractConfig)
    index: IndexConfig = field(default_factory=IndexConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    export: ExportConfig = field(default_factory=ExportConfig)
    infer: InferConfig = field(default_factory=InferConfig)
    bench: BenchConfig = field(default_factory=BenchConfig)
    plan: PlanConfig = field(default_factory=PlanConfig)

    def __post_init__(self) -> None:
        problems = []
        if not self.name or not self.name.isprintable() or set(self.name) & set('/\\"') or self.name.startswith("."):
            problems.append(f"name: got {self.name!r}, expected a file name without slashes")
        elif len(self.name.encode("utf-8", "surrogateescape")) > MAX_NAME_BYTES:
            problems.append(f"name: got {self.name!r}, expected at most {MAX_NAME_BYTES} bytes")
        sections = (
            self.data,
            self.preprocess,
            self.extract,
            self.index,
            self.model,
            self.train,
            self.infer,
            self.bench,
            self.plan,
        )
        for section in sections:
            problems.extend(section.problems())
        problems.extend(_unusable(self.to_dict()))
        if problems:
            raise ConfigError("\n".join(problems))
        if not self.run_dir:
            object.__setattr__(self, "run_dir", f"runs/{self.name}")

    @property
    def rate_spec(self) -> RateSpec:
        return RATES[self.model.version][self.data.sample_rate]

    def to_dict(self) -> dict[str, Any]:
        """The whole tree as plain data, for YAML and JSON."""
        return dataclasses.asdict(self)

    def to_yaml(self) -> str:
        import yaml

        text: str = yaml.safe_dump(self.to_dict(), sort_keys=False, allow_unicode=True)
        return text


def _unusable(tree: dict[str, Any]) -> Iterator[str]:
    """Values of which nothing can be made, whatever they stand for."""
    import re

    for key, value in _leaves(tree):
        for item in value if isinstance(value, tuple | list) else (value,):
            if isinstance(item, int) and abs(item) > MAX_INT:
                yield f"{key}: got a number beyond {MAX_INT}"
            elif isinstance(item, str) and re.search("[\0\ud800-\udc7f\udd00-\udfff]", item):
                yield f"{key}: got {item!a}, expected a text that has no zero bytes and no halves of letters"


def parse_recipe(stage: str, arguments: list[str], about: str = "") -> Recipe:
    """`[--config FILE] [--section.key VALUE]` -> the recipe; `--help` prints every key and exits.

    Raises:
        ConfigError: an unknown key, a wrong type, a value out of range, or a file that cannot be read.
    """
    import jsonargparse

    jsonargparse.set_parsing_settings(docstring_parse_attribute_docstrings=True)
    parser = jsonargparse.ArgumentParser(
        prog=f"rvc-dist {stage}", description=about, exit_on_error=False, allow_abbrev=False
    )
    parser.add_argument("--config", action="config", help="Recipe file (YAML); later options override it.")
    parser.add_class_arguments(Recipe, as_group=False)
    problems = [p for file in _config_files(arguments) for p in _unknown_keys(file)]
    if problems:
        raise ConfigError("\n".join(problems))
    try:
        values = parser.parse_args(arguments)
    except jsonargparse.ArgumentError as error:
        raise ConfigError(_readable(str(error))) from error
    recipe: Recipe = _build(Recipe, values.as_dict())
    return recipe


def load_recipe(path: Path) -> Recipe:
    """The recipe in a YAML file."""
    return parse_recipe("", ["--config", str(path)])


def _build(kind: type[Any], values: dict[str, Any]) -> Any:
    """A dataclass of `kind` from nested plain data, its sections included."""
    hints: dict[str, Any] = {
        f.name: f.default_factory for f in dataclasses.fields(kind) if isinstance(f.default_factory, type)
    }
    arguments = {k: _build(hints[k], v) if k in hints else v for k, v in values.items() if k != "config"}
    return kind(**arguments)


def _config_files(arguments: list[str]) -> Iterator[Path]:
    for i, argument in enumerate(arguments):
        if argument == "--config" and i + 1 < len(arguments):
            yield Path(arguments[i + 1])
        elif argument.startswith("--config="):
            yield Path(argument.removeprefix("--config="))


def _unknown_keys(path: Path) -> Iterator[str]:
    """Every key of a recipe file that no section has, with its full path and the nearest key that exists."""
    import difflib

    if not path.is_file():
        raise ConfigError(f"--config: {path} {'is not a file' if path.exists() else 'does not exist'}")
    try:
        tree = parse_yaml(read_bounded(path, MAX_YAML_BYTES)) or {}
    except (SchemaError, OSError) as error:
        raise ConfigError(f"--config: {path} is no recipe: {error}") from error
    if not isinstance(tree, dict):
        raise ConfigError(f"--config: {path} holds a {type(tree).__name__}, expected keys such as name: and train:")

    # A key may be null exactly when it is null by default.
    optional = {key for key, value in _leaves(Recipe().to_dict()) if value is None}

    def walk(values: dict[str, Any], known: dict[str, Any], prefix: str) -> Iterator[str]:
        for key, value in values.items():
            if key not in known:
                near = difflib.get_close_matches(str(key), list(known), n=1)
                hint = f"; did you mean {prefix}{near[0]}?" if near else f"; expected one of {', '.join(known)}"
                yield f"{path}: unknown key {prefix}{key}{hint}"
            elif isinstance(known[key], dict):
                if isinstance(value, dict):
                    yield from walk(value, known[key], f"{prefix}{key}.")
                else:
                    yield f"{path}: {prefix}{key}: got {value!r}, expected keys such as {next(iter(known[key]))}: ..."
            elif value is None and f"{prefix}{key}" not in optional:
                yield f"{path}: {prefix}{key}: got null, expected a value"

    yield from walk(tree, Recipe().to_dict(), "")


def _readable(message: str) -> str:
    """jsonargparse's message in the form of ours: `key: got X, expected Y`."""
    import re

    unknown = re.fullmatch(r"unrecognized arguments: --([\w.-]+).*", message, re.DOTALL)
    if unknown:
        near = nearest_key(unknown[1])
        return f"unknown key {unknown[1]}" + (f"; did you mean {near}?" if near else "; --help lists every key")
    found = re.search(r'Parser key "(.+?)":\s*(.*)', message, re.DOTALL)
    if not found:
        return message
    key, rest = found[1], " ".join(found[2].split())
    union = re.search(r"Expected a <class '(\w+)'>.*Given value: (.*)", rest)  # of a key that may be null
    if union:
        return f"{key}: got {union[2]}, expected {union[1]} or null"
    typed = re.search(r"Expected an? (.+?)\. Got value: (.*)", rest)
    if not typed:
        return f"{key}: {rest}"
    kind = re.sub(r"<class '(?:\w+\.)*(\w+)'>|typing\.Literal", lambda m: m[1] or "one of ", typed[1])
    return f"{key}: got {typed[2]}, expected {'a list such as [9]' if kind == 'tuple' else kind}"


def nearest_key(text: str) -> str:
    """The key of the recipe that `text` resembles most, or an empty text."""
    import difflib

    keys = ["config", *(key for key, _ in _leaves(Recipe().to_dict()))]
    return next(iter(difflib.get_close_matches(text.replace("-", "_"), keys, n=1)), "")


def _leaves(tree: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Every key of a nested dict with its full path, and its value."""
    for key, value in tree.items():
        if isinstance(value, dict):
            yield from _leaves(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value
