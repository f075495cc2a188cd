"""The recipe: one tree of frozen dataclasses that every stage takes whole and reads its part of.

YAML files and the command line are only data for these classes, as `recipe_of` reads them. The type of a field
says what its value may be, and `rvc_dist.schema` checks it. Nothing heavy is imported here, so that `--help` and a typo
in a key answer at once.
"""

from __future__ import annotations

import contextlib
import dataclasses
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from functools import partial
from operator import attrgetter
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple, get_type_hints

from rvc_dist import choices, packaged
from rvc_dist.choices import BASE_MODELS, F0_METHODS, OPTIMIZERS, SOUNDS, STORAGES, TRACKERS, VOCODERS, HubFile
from rvc_dist.files import ForeignFileError, read_bounded
from rvc_dist.schema import (
    MAX_YAML_BYTES,
    UNCLEAN,
    Count,
    Positive,
    Rule,
    above,
    at_least,
    faults,
    multiple_of,
    one_of,
    parse_yaml,
    to_yaml,
    types_of,
    within,
)

FEATURE_RATE = 16000
"""Sample rate of the copy that content encoders and pitch trackers hear, in Hz."""
F0_HOP = 160
"""Hop of f0 in samples at FEATURE_RATE: 100 frames a second."""
F0_PER_S = FEATURE_RATE // F0_HOP
MAX_CLIP_FRAMES = 900
"""A training clip is cut to at most this many spectrogram frames."""
PRETRAINED_SPEAKERS = 109
"""Rows of the speaker table of every pretrained generator."""
MAX_SPEAKERS = 10_000
"""Speaker ids are below it."""
MAX_SEED = 2**31 - 1
MAX_NAME_BYTES = 180
"""A file name has at most 255, and those of an index have 60 besides the voice's."""


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

    def suits(self, vocoder: choices.VocoderSpec) -> bool:
        return vocoder.num_stages in (None, len(self.upsample_rates))


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


_TEXT = Rule("a text", (str,))
_CLEAN = Rule("no zero bytes and no halves of letters", (str,), lambda text: not UNCLEAN.search(text))
_KINDS = ", ".join(f".{kind}" for kind in SOUNDS)
_SOUND = Rule(
    f"a folder, or a file whose name ends in one of {_KINDS}",
    (str,),
    lambda t: t.endswith("/") or Path(t).suffix.lower() in ("", *(f".{kind}" for kind in SOUNDS)),
)
_PLAIN_NAME = Rule(
    "a file name without slashes",
    (str,),
    lambda t: t.isprintable() and t[:1] not in ("", ".") and not set(t) & set('/\\"'),
)
_SHORT = Rule(
    f"at most {MAX_NAME_BYTES} bytes", (str,), lambda t: len(t.encode("utf-8", "surrogateescape")) <= MAX_NAME_BYTES
)
Text = Annotated[str, _TEXT, _CLEAN]
"""May have bytes that are no UTF-8, as names of files do: lone surrogates in Python."""
Texts = Annotated[
    str | tuple[str, ...],
    Rule(
        "a text, or a list of texts such as [a.wav, b.wav]",
        (str, list, tuple),
        lambda x: isinstance(x, str) or (bool(x) and all(_TEXT.fits(t) for t in x)),
    ),
    Rule("no zero bytes and no halves of letters", (str, list, tuple), lambda x: not UNCLEAN.search("".join(x))),
]
"""One, or a list of them; what begins with a bracket is a list."""
_REMOTE = Rule(
    f"a folder's URL that begins with one of {', '.join(f'{kind}://' for kind in STORAGES)}",
    (str,),
    lambda t: t.partition("://")[0] in STORAGES and t.partition("://")[2].strip("/") != "",
)
Trackers = Annotated[
    str | tuple[str, ...],
    Rule(
        f"some of {', '.join(TRACKERS)}, such as [tensorboard, wandb], or [] for none",
        (str, list, tuple),
        lambda x: all(name in TRACKERS for name in ([x] if isinstance(x, str) else x)),
    ),
]
Layers = Annotated[
    tuple[int, ...],
    Rule(
        "rising layer numbers from 0, each once, such as [9]",
        (list, tuple),
        lambda layers: all(type(n) is int and n >= 0 for n in layers) and list(layers) == sorted(set(layers)),
        "a list",
    ),
]
SomeSpeakers = Annotated[
    int | tuple[str, ...],
    Rule(
        "a number of speakers, or a list of names or ids such as [alice, 12]",
        (int, list, tuple),
        lambda x: 0 <= x < MAX_SPEAKERS if type(x) is int else all(type(s) in (int, str) for s in x),
    ),
]
Fraction = Annotated[float, within(0.0, 1.0)]
AboveZero = Annotated[float, above(0.0)]
FromZero = Annotated[float, at_least(0.0)]
Decay = Annotated[float, Rule("at least 0.0 and less than 1.0", (int, float), lambda x: bool(0 <= x < 1), "a number")]
Seed = Annotated[int, within(0, MAX_SEED)]


@dataclass(frozen=True)
class DataConfig:
    """What is trained on."""

    audio_dir: Text = "audio"
    """Folder of recordings of one speaker, or of a sub-folder a speaker, all named alike: by id (0, 1, ...), by name
    (alice), or Name_ID_Repeat (alice_0_3: each clip counts three times). Or a corpus: a folder in the layout of
    LibriTTS, LibriSpeech, VCTK or HiFi-TTS, a manifest (corpus.jsonl), lists of Lhotse, or hf:OWNER/NAME (hub)."""
    sample_rate: Annotated[int, one_of(_V2)] = 48000
    """Sample rate of the voice in Hz: 24000, 32000, 40000, 44100 or 48000."""
    holdout: Annotated[float, within(0.0, 0.5)] = 0.05
    """Share of each speaker's seconds kept out of training, for validation and the choice of the best checkpoint: at
    least about 10 s of a speaker who has enough, never above 10% unless this says so."""
    holdout_speakers: SomeSpeakers = 0
    """Speakers whom training never hears: validation converts their speech into trained voices, and says apart how well
    pitch, voicing, loudness and content follow. It does not choose the best checkpoint."""
    balance: Fraction = 0.0
    """How equal speakers are in an epoch, whose clips stay as many: 0 gives each clip one turn, 1 all speakers equally
    many turns, and between them one of n clips has turns in proportion to n ** (1 - balance)."""
    read_order: Literal["auto", "shuffled", "local"] = "auto"
    """shuffled: all clips; local: units, and clips within windows of units, for data that exceeds the memory; auto:
    local where clips and features take more than half of it (of the node that has least; a run keeps the choice)."""
    window_gb: AboveZero | None = None
    """Of local: clips and features that are shuffled together; null: a quarter of that memory."""
    remote: Annotated[Text, _REMOTE] | None = None
    """Where training reads clips and features from instead of the run folder, and `upload` puts them: s3://bucket/path,
    gs://bucket/path, hf://datasets/owner/name/path, or file:///folder for a slow disk. Needs the extra s3 or gcs."""
    cache_dir: Text | None = None
    """With remote, a folder on a disk of each machine that units are fetched to; null: in TMPDIR."""
    cache_gb: AboveZero = 20.0
    """With remote, the most that units may take there, in GB (1e9 bytes), for all ranks of a machine together."""


@dataclass(frozen=True)
class PreprocessConfig:
    """How recordings become clips."""

    cut_method: Literal["automatic", "simple", "skip"] = "automatic"
    """automatic: at silences, then windows; simple: fixed windows and what is left; skip: one clip a file."""
    chunk_len: Annotated[float, within(1.0, 9.0)] = 3.0
    """Length of a clip in seconds."""
    overlap_len: FromZero = 0.3
    """Overlap of neighbouring clips in seconds."""
    process_effects: bool = True
    """High-pass at 48 Hz (5th-order Butterworth)."""
    normalization: Literal["none", "pre", "post", "lufs"] = "post"
    """Level recordings before cutting (pre), each clip after it (post), all clips to one loudness (lufs), or nothing
    (none)."""
    loudness: Annotated[float, within(-60.0, -5.0)] | None = None
    """Of lufs, in LUFS: lowered for all clips where one of them would peak above -1 dB; null: the most they bear."""
    clean_dataset: bool = False
    """Reduce noise by spectral gating, on the GPU if there is one; it also takes a little of the voice."""
    clean_strength: Fraction = 0.5
    """Share of the noise's amplitude that clean_dataset takes away, 0 to 1."""
    clip_format: Literal["float32", "int16"] = "float32"
    """Of the samples of clips. int16 takes half the disk and memory; what is beyond full scale is clipped, and told."""
    num_workers: Positive = 2
    """Threads a rank."""


def f0_method_names(text: str) -> tuple[str, ...]:
    """`extract.f0_method` -> the methods it names: one, or those of hybrid[a+b+...].

    Raises:
        ValueError: an unknown name, or a hybrid of fewer than two different methods.
    """
    hybrid = re.fullmatch(r"hybrid\[(.*)\]", text)
    names = tuple(hybrid[1].split("+")) if hybrid else (text,)
    for name in names:
        if name.startswith("hybrid"):
            where = "a hybrid takes no other hybrid" if hybrid else "a hybrid names its methods"
            raise ValueError(f"extract.f0_method: got {text!r}, but {where}; write hybrid[crepe+fcpe], for example")
        if name not in F0_METHODS:
            got = f"{name!r} in {text!r}" if hybrid else f"{text!r}"
            choices = one_of([*F0_METHODS, "hybrid[a+b+...]"])
            raise ValueError(f"extract.f0_method: got {got}, expected {choices.expects(name)}")
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

    layers: Layers = ()
    """Layers to mix in, such as [9]; 0 is what enters the first layer. Empty: off."""
    ratio: Fraction = 0.5
    """Their share, 0 (off) to 1 (nothing of the usual layer)."""

    @property
    def is_on(self) -> bool:
        return bool(self.layers) and self.ratio > 0


@dataclass(frozen=True)
class ExtractConfig:
    """How clips become content features and pitch."""

    f0_method: Text = "rmvpe"
    """Pitch tracker: rmvpe, crepe, crepe-large, crepe-medium, crepe-small, crepe-tiny, djcm, fcpe, penn, pesto, swift
    (networks), pyin, yin, swipe, harvest, dio, pm, piptrack (signal processing), or the median of several:
    hybrid[crepe+fcpe+swift]."""
    f0_model: Text = "lj1995/VoiceConversionWebUI/rmvpe.pt"
    """Weights of rmvpe: a local file, or owner/repository/file on the hub."""
    f0_penn_model: Text = "maxrmorrison/fcnf0-plus-plus/fcnf0++.pt"
    """Weights of penn, likewise."""
    f0_djcm_model: Text | None = None
    """Weights of djcm, likewise; with or without its separation of voice and music."""
    f0_crepe_model: Text | None = None
    """Weights of crepe-small, -medium or -large, likewise. Other methods bring their own or need none."""
    f0_min: AboveZero = 50.0
    """Lowest pitch in Hz."""
    f0_max: Annotated[float, within(0.0, FEATURE_RATE / 4)] = 1100.0
    """Highest pitch in Hz."""
    f0_autotune: bool = False
    """Move the pitch of voiced frames toward the nearest semitone (A4 = 440 Hz); in conversion too."""
    f0_autotune_strength: Fraction = 1.0
    """How far: 0 (not at all) to 1 (onto the semitone), as a share of the way in cents."""
    unvoiced: Literal["zero", "interpolated"] = "zero"
    """Pitch of unvoiced frames: 0 as in Applio, or drawn on between the voiced ones as in RVC-WebUI and rvc-next. A
    voice knows which, and is fed it in conversion; this key is also for voice files of other tools, which do not."""
    embedder_model: Text = "contentvec"
    """Content encoder: contentvec, spin, spin-v2, chinese-hubert-base, japanese-hubert-base, korean-hubert-base, mfcc,
    a hub id, or a folder with config.json and model.safetensors."""
    embedder_mix: EmbedderMix = field(default_factory=EmbedderMix)
    include_mutes: Count = 2
    """Silent clips a speaker that join the training list."""
    batch_clips: Positive = 8
    """Most clips of equal length that the encoder and the pitch tracker take at once."""
    num_threads: Positive = 1
    """CPU threads a rank: fixed, since the last bits of a feature depend on it."""
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    """Of the networks of encoder and tracker, on devices that have it; conversion always computes in fp32."""
    content_format: Literal["float32", "float16", "bfloat16"] = "float32"
    """Of the content features. The short ones take half the disk and memory; float16 is the more exact one, bfloat16
    holds numbers above 65504."""


@dataclass(frozen=True)
class IndexConfig:
    """How content features become a retrieval index."""

    algorithm: Literal["auto", "faiss", "kmeans"] = "auto"
    """faiss: all frames; kmeans: 10,000 centres; auto: kmeans above 200,000 frames."""
    nprobe: Positive = 9
    """Cells searched a query; more is slower and finds nearer neighbours."""
    recall: Fraction | None = None
    """Raise nprobe until this share of the 8 nearest neighbours is found, 0 to 1; 1 may search every cell."""
    speakers: Literal["common", "each", "both"] = "common"
    """common: one index of all; each: one a speaker, which conversion takes; both."""

    @property
    def has_common(self) -> bool:
        return self.speakers != "each"

    @property
    def has_each(self) -> bool:
        return self.speakers != "common"


@dataclass(frozen=True)
class ModelConfig:
    """The networks. The widths are RVC's; narrower ones train faster and load no pretrained weights."""

    version: Literal["v1", "v2"] = "v2"
    """v1: 6 period discriminators, 256 features; v2: 8, and the encoder's own width."""
    vocoder: Annotated[str, one_of(VOCODERS)] = "hifi-gan"
    """Decoder: hifi-gan (NSF-HiFiGAN; without pitch guidance plain HiFiGAN), mrf-hifi-gan (the same with overtones),
    refinegan, or bigvgan."""
    pitch_guidance: bool = True
    """Follow f0: right for speech and singing alike."""
    energy: bool = False
    """Follow how loud the source is, too, frame by frame."""
    architecture: Literal["rvc", "svc"] = "rvc"
    """svc: the generator of so-vits-svc 4 with RVC's features, for weights of other tools' SVC."""
    inter_channels: Annotated[int, multiple_of(2)] = 192
    hidden_channels: Annotated[int, multiple_of(2)] = 192
    filter_channels: Positive = 768
    num_heads: Positive = 2
    num_layers: Positive = 6
    upsample_initial_channel: Annotated[int, multiple_of(32)] = 512
    gin_channels: Positive = 256
    """Width of the speaker embedding."""
    discriminator_channels: Annotated[int, multiple_of(64)] = 1024
    """Width of the widest discriminator layer; the others keep their proportion to it."""
    discriminator: Literal["auto", "v0", "v1", "v2", "v3", "v2-mrd"] = "auto"
    """v0, v1 and v2 look at periods, v3 at fewer and at spectrograms of three resolutions, v2-mrd at v2's and at those
    three. auto: the version's; v3 for refinegan and bigvgan; v0 for hifi-gan in the SVC architecture."""

    @property
    def discriminator_kind(self) -> str:
        """The key into `choices.DISCRIMINATORS`."""
        return self.discriminator if self.discriminator != "auto" else self.own_discriminator

    @property
    def own_discriminator(self) -> str:
        """What `auto` stands for."""
        vocoder = VOCODERS[self.vocoder]
        of_svc = vocoder.svc_discriminator if self.architecture == "svc" else None
        return of_svc or vocoder.discriminator or self.version

    @property
    def discriminator_spec(self) -> choices.DiscriminatorSpec:
        return choices.DISCRIMINATORS[self.discriminator_kind]


@dataclass(frozen=True)
class LossConfig:
    """Weights of the generator's losses."""

    mel: FromZero = 45.0
    kl: FromZero = 1.0
    fm: FromZero = 1.0
    adv: FromZero = 1.0
    stft: FromZero = 0.0
    """Multi-resolution STFT loss beside the mel loss; 0: not computed."""
    energy: FromZero = 0.0
    """Loudness (RMS) of frames, likewise."""


@dataclass(frozen=True)
class OptimConfig:
    """Settings of the optimizers; each takes those that it has."""

    beta1: Decay = 0.8
    """Decay of the momentum. RVC's betas and eps are those of VITS (arXiv 2106.06103)."""
    beta2: Decay = 0.99
    """Decay of the variance."""
    eps: AboveZero = 1e-9
    weight_decay: FromZero = 0.01
    variance_dtype: Literal["float32", "bfloat16"] = "float32"
    """Of anyprecision_adamw, whose momentum is always bfloat16."""
    kahan_summation: bool = False
    """Of anyprecision_adamw: carry the rounding error of each update to the next."""


@dataclass(frozen=True)
class TrainConfig:
    """The training loop. A run ends at max_epochs or max_steps, whichever comes first."""

    batch_size: Positive = 4
    """Clips a rank and micro-batch; the global batch is this times grad_accum_steps times the number of ranks."""
    grad_accum_steps: Positive = 1
    """Micro-batches a step. All but one run G's forward pass twice, so that D's step precedes all of G's."""
    keep_global_batch: Positive | None = None
    """Clips a step on any number of ranks, instead of grad_accum_steps: each rank takes its share, in micro-batches of
    at most batch_size. lr_scaling then counts them in units of batch_size; null: the global batch follows the ranks."""
    max_epochs: Positive = 200
    """Times that every clip is seen."""
    max_steps: Positive | None = None
    """Optimizer steps, for runs that are not counted in epochs."""
    learning_rate: AboveZero = 1e-4
    """Of G and D alike; it does not depend on the number of ranks unless lr_scaling says so."""
    learning_rate_d: AboveZero | None = None
    """Of D, where it is to learn faster or slower than G; null: learning_rate."""
    d_updates: Positive = 1
    """Updates of D a step, on the same clips and what G made of them before the first; G's is one."""
    lr_scaling: Literal["none", "sqrt", "linear"] = "none"
    """Multiply learning_rate by 1, the square root of the number of ranks, or the number of ranks."""
    lr_schedule: Literal["exponential", "cosine", "constant"] = "exponential"
    """exponential: times lr_decay an epoch; cosine: to zero at the end of the run."""
    lr_decay: Fraction = 0.999875
    """Factor of the exponential schedule, an epoch."""
    warmup_steps: Count = 0
    """Steps over which the learning rate rises linearly from zero."""
    kl_warmup_steps: Count = 0
    """Steps over which the weight of the KL loss rises linearly from zero."""
    adversarial_from_step: Count = 0
    """Steps before the discriminator joins: until then it rests, and G has no adversarial and no feature matching
    loss. Its warmup_steps begin there; which step is the best begins anew."""
    ema_decay: Decay = 0.0
    """Keep an average of G's weights over about 1 / (1 - this) steps: 0.999 or 0.9999; 0: none. After n steps it is at
    most (1 + n) / (10 + n). Validation measures both, and its choice is exported (export.weights)."""
    max_grad_norm: AboveZero | None = None
    """Clip the gradient norm of G and of D to this."""
    optimizer: Annotated[str, one_of(OPTIMIZERS)] = "adamw"
    """The first three are built in; adamw_8bit needs bitsandbytes, the others pytorch-optimizer (extra: optim)."""
    optim: OptimConfig = field(default_factory=OptimConfig)
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    """Of the networks by autocast; parameters, losses and spectrograms stay float32. fp16: for GPUs without bf16."""
    fast_train: bool = False
    """TF32, cuDNN benchmark, allocator, compile and loader settings on every rank; changes no formula."""
    bf16_adamw: bool = False
    """Shortcut for precision bf16 and optimizer anyprecision_adamw; needs a GPU with bf16, or a CPU."""
    compile: Literal["auto", "graphs", "always", "never"] = "auto"
    """D and G's decoder. auto: with fast_train, where the plan repays it and a trial here gains: on CUDA as CUDA graphs
    of PyTorch's kernels, elsewhere by torch.compile. graphs: so without a trial. always: torch.compile without one."""
    activation_checkpointing: bool = False
    """Compute activations again in the backward pass instead of keeping them: less memory, more time."""
    grad_compression: Literal["none", "bf16"] = "none"
    """Send gradients between ranks as bf16: half the bytes."""
    cache_on_device: bool = False
    """Keep the whole dataset in the device's memory, where it fits."""
    deterministic: bool = False
    """Deterministic CUDA kernels, for bit-exact resume; the CPU's always are."""
    seed: Seed = 1234
    multiscale_mel_loss: bool = True
    """Mel loss over eight resolutions instead of one."""
    mel_frames: Literal["middle", "edge"] = "middle"
    """Where the windows of the eight resolutions are centred: in the middle of each hop, as those of the spectrograms
    are, or at its edges, as in other tools of RVC."""
    loss: LossConfig = field(default_factory=LossConfig)
    pretrained: Annotated[str, one_of(BASE_MODELS)] | None = None
    """Base model to start from, by name: the files of this version, rate and pitch guidance, from the hub."""
    pretrained_g: Text | None = None
    """Generator weights to start from instead (.pth)."""
    pretrained_d: Text | None = None
    """Discriminator weights to start from instead (.pth)."""
    fresh_speakers: bool = False
    """Begin the dataset's speakers with new rows of the mean norm, not with those of the base model's speakers."""
    save_every_steps: Positive = 1000
    """Steps between checkpoints; one is always written at the end and when the run is stopped."""
    save_every_epochs: Positive | None = None
    """Epochs between checkpoints, instead of save_every_steps."""
    keep_checkpoints: Positive = 3
    """Newest checkpoints kept, besides the best and the one that the last stop wrote."""
    save_every_voices: bool = True
    """Write a voice file beside every checkpoint but a stop's, and keep them all, so that every one of them can be
    chosen later: 57 MB each at RVC's widths (float16 without the posterior encoder), a 23rd of a checkpoint."""
    eval_every_steps: Positive = 500
    """Steps between evaluations: validation on held-out clips, and phrases to listen to in RUN/samples."""
    eval_reference: Text | None = None
    """Recording of any kind whose first 8 s the voice speaks at every evaluation, beside its own held-out phrases and
    another speaker's."""
    samples: bool = True
    """Speak those phrases, and keep them in RUN/samples."""
    report: bool = True
    """Make RUN/report.html at every evaluation, by a process that takes what training leaves of the CPU."""
    overtrain_detect: bool = False
    """Stop when validation has not improved for overtrain_threshold epochs."""
    overtrain_threshold: Positive = 50
    """Epochs without improvement that end the run."""
    max_bad_steps: Positive = 3
    """Steps in a row without finite gradients after which the run goes back to its last checkpoint, or stops."""
    trackers: Trackers = ("tensorboard",)
    """Where curves are shown: tensorboard, wandb, mlflow (extras of these names), aim, clearml, comet_ml, dvclive,
    swanlab, trackio, as Accelerate has them; several in brackets: [tensorboard, wandb]."""
    log_every_steps: Positive = 10
    """Steps between log lines; only then does the host wait for the device."""
    num_workers: Count | None = None
    """Loader processes a rank; 0 loads in the training process; null: 1, or with fast_train half of a rank's cores, at
    most 8."""
    timeout_s: Annotated[float, at_least(1.0)] = 600.0
    """Seconds that a rank waits for the others before the run ends: more than the longest that one of them may take."""

    def global_batch(self, num_ranks: int) -> int:
        """Clips a step."""
        return self.keep_global_batch or self.batch_size * self.grad_accum_steps * num_ranks

    def micro_batches(self, num_ranks: int) -> int:
        """Of a rank, a step."""
        return -(-self.global_batch(num_ranks) // (self.batch_size * num_ranks))

    def micro_batch(self, num_ranks: int) -> float:
        """Clips of a micro-batch of a full step, on average: they have one more or less where this is no whole one."""
        return self.global_batch(num_ranks) / (self.micro_batches(num_ranks) * num_ranks)

    @property
    def starts_from_generator(self) -> bool:
        """Whether its first weights, and with them its speaker table, come from a file."""
        return self.pretrained is not None or self.pretrained_g is not None

    @property
    def autocast_precision(self) -> str:
        """Of the networks: fp32, bf16 or fp16."""
        return "bf16" if self.bf16_adamw else self.precision

    @property
    def tracker_names(self) -> tuple[str, ...]:
        """Each once, in their order."""
        names = (self.trackers,) if isinstance(self.trackers, str) else self.trackers
        return tuple(dict.fromkeys(names))

    @property
    def optimizer_name(self) -> str:
        return "anyprecision_adamw" if self.bf16_adamw else self.optimizer


@dataclass(frozen=True)
class ExportConfig:
    """What is written of a trained run."""

    author: Text = ""
    """Named in voice files and on the card of a hub folder."""
    format: Literal["voice", "pretrained", "hub", "applio", "rvc"] = "voice"
    """voice: files to convert with; pretrained: G and D as base models are shared; hub: a folder for the Hugging Face
    hub; applio, rvc: an experiment's folder in which Applio or RVC-WebUI trains on. Short for it: --as, --layout."""
    each_speaker: bool = False
    """With the voice of all speakers, one of each, NAME_spkid3_last.pth: who takes it hears speaker 3 under any id."""
    weights: Literal["chosen", "raw", "ema"] = "chosen"
    """With train.ema_decay, which of the generator: those of training (raw), their average (ema), or those that the
    validation before the checkpoint found better; the average where there was none. applio and rvc get raw ones."""
    folder: Text = ""
    """Where anything but voice files goes, a folder that is not there yet; by default RUN/export/FORMAT."""
    private: bool = True
    """Whether a repository that `push` makes on the hub is private."""


@dataclass(frozen=True)
class InferConfig:
    """Conversion of recordings. A voice file is enough: nothing else of the recipe is needed."""

    input: Texts = "input.wav"
    """Recording to convert, of any length and rate; or a folder of them; or a list: [a.wav, b.mp3]."""
    output: Annotated[Text, _SOUND] = "output.wav"
    """Where the result goes: a file (wav, flac, mp3, ogg or opus), or a folder, which several recordings need."""
    format: Annotated[str, one_of(SOUNDS)] = "wav"
    """Kind of the files that go into a folder: wav, flac, mp3, ogg or opus."""
    model: Text | None = None
    """Voice file; by default the run's voice/NAME_last.pth."""
    index: Text | None = None
    """Retrieval index, or a folder of a voice's, of which the speaker's is taken; by default the run's."""
    embedder_model: Text | None = None
    """Content encoder; by default the one that the voice file names. One given here is used even if it is another."""
    f0_method: Text | None = None
    """Pitch tracker (extract.f0_method); by default the one that the voice was trained with."""
    f0_min: AboveZero | None = None
    """Lowest pitch in Hz; by default the voice's, as f0_max. A voice of another tool takes these from `extract`."""
    f0_max: AboveZero | None = None
    """Highest pitch in Hz."""
    f0_file: Text | None = None
    """Pitch of the result: a file of lines `seconds,hz` (0: unvoiced), between which it is interpolated. It is not
    transposed; before its first and after its last line the recording's own pitch counts."""
    pitch: Annotated[float, within(-48.0, 48.0)] = 0.0
    """Transposition in semitones."""
    auto_pitch: bool = False
    """Transpose by whole semitones that bring the recording's median pitch nearest to the voice's; `pitch` is added."""
    autotune: Fraction | None = None
    """Move the pitch toward the nearest semitone, 0 (not at all) to 1; null: as the voice was trained."""
    index_rate: Fraction = 0.75
    """Share of retrieved features, 0 (no index) to 1."""
    protect: Annotated[float, within(0.0, 0.5)] = 0.33
    """Share of retrieved features kept in unvoiced frames; 0.5 turns the protection off."""
    speaker: Count | Text | None = None
    """Id or name of a trained speaker; null: the only one, the lowest of several, or 0 where the voice does not say."""
    channels: Literal["mix", "keep"] = "mix"
    """mix: the mean of all channels is converted; keep: each of them, and the result has as many."""
    loudness_mix: Fraction = 1.0
    """Share of the result's own loudness: 1 leaves it, 0 gives it the recording's, second by second (rms_mix_rate)."""
    window_s: Annotated[float, within(2.0, 600.0)] = 30.0
    """Longest piece converted at once, in seconds: bounds the memory."""
    seed: Seed = 1234


@dataclass(frozen=True)
class BlendConfig:
    """What `rvc-dist blend A B` makes of two voices."""

    ratio: Fraction = 0.5
    """Share of the first voice, 0 to 1."""
    output: Text = "blend.pth"
    """Where the new voice file goes."""


@dataclass(frozen=True)
class BenchConfig:
    """What `rvc-dist bench` measures; all of it is kept in RUN/bench."""

    warmup_steps: Positive = 3
    """Steps before the measured ones: the first make what later ones reuse."""
    steps: Positive = 10
    """Steps that are measured, or trained on each side of --parity."""
    plain: bool = False
    """Also measure a plain RVC step on the same networks, in turn with the real one."""
    plain_precision: Literal["recipe", "fp32"] = "recipe"
    """Precision of the plain step: the recipe's, or float32."""
    parity: bool = False
    """Instead, train the same steps in float32 with AdamW and as the recipe says, and compare every loss (--parity)."""


@dataclass(frozen=True)
class PlanConfig:
    """The cluster that `rvc-dist plan` foretells the run on. Bandwidths are in gigabytes (10^9) a second."""

    hours: AboveZero | None = None
    """Hours of speech of a corpus that is not there yet; null: of the run's clips or recordings."""
    ranks: Positive = 8
    """Ranks that the run is to have; the table shows powers of two beside it."""
    ranks_per_node: Positive | None = None
    """Ranks of a machine; null: its GPUs, or without any its cores over the threads of a rank."""
    bandwidth_gb_s: AboveZero | None = None
    """Between nodes, of a node in each direction; null: as `bench` measured it, else 3 (25 Gbit/s Ethernet)."""
    local_bandwidth_gb_s: AboveZero | None = None
    """Between the ranks of a node; null: as `bench` measured it on several ranks, else 10 (PCI Express)."""
    latency_s: FromZero = 5e-5
    """Of one message between two ranks, in seconds."""
    step_s: AboveZero | None = None
    """Seconds of a full step on one rank; null: as `bench` measured it, and it is measured now if it never was."""
    device_tflop_s: AboveZero | None = None
    """Estimate step_s instead: TFLOP/s that a device really reaches, often a tenth to a third of its data sheet's."""


@dataclass(frozen=True)
class Recipe:
    """Everything that decides what a run produces."""

    name: Annotated[str, _TEXT, _PLAIN_NAME, _SHORT] = "voice"
    """Name of the voice; files are called after it."""
    run_dir: Text = ""
    """Folder of the run: clips, features, index, checkpoints, voice. By default runs/NAME."""
    data: DataConfig = field(default_factory=DataConfig)
    preprocess: PreprocessConfig = field(default_factory=PreprocessConfig)
    extract: ExtractConfig = field(default_factory=ExtractConfig)
    index: IndexConfig = field(default_factory=IndexConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    export: ExportConfig = field(default_factory=ExportConfig)
    infer: InferConfig = field(default_factory=InferConfig)
    blend: BlendConfig = field(default_factory=BlendConfig)
    bench: BenchConfig = field(default_factory=BenchConfig)
    plan: PlanConfig = field(default_factory=PlanConfig)

    def __post_init__(self) -> None:
        found = list(faults(self.to_dict(), Recipe))
        problems = {fault.key: fault.sentence for fault in found}
        if all(fault.is_bound for fault in found):  # else the values may not be comparable
            problems = dict(_contradictions(self)) | problems
        if problems:
            raise ConfigError("\n".join(problems.values()))
        if not self.run_dir:
            object.__setattr__(self, "run_dir", f"runs/{self.name}")

    @property
    def rate_spec(self) -> RateSpec:
        return RATES[self.model.version][self.data.sample_rate]

    @property
    def multiscale_mel_loss(self) -> bool:
        """Whether the mel loss has all scales: also for vocoders that are always trained with it."""
        return self.train.multiscale_mel_loss or VOCODERS[self.model.vocoder].discriminator is not None

    @property
    def base_model_files(self) -> dict[str, HubFile]:
        """The files of train.pretrained, by `checkpoint.MODELS`; empty without it, or where it lacks this kind."""
        return self.files_of_base_model(self.train.pretrained) if self.train.pretrained is not None else {}

    def files_of_base_model(self, name: str) -> dict[str, HubFile]:
        """Those of a model in BASE_MODELS that this recipe's networks could begin with."""
        kind = self.model.version, self.data.sample_rate, self.model.pitch_guidance
        is_plain = (self.model.vocoder, self.model.architecture) == ("hifi-gan", "rvc")
        return BASE_MODELS[name].files(*kind) if is_plain else {}

    def to_dict(self) -> dict[str, Any]:
        """The whole tree as plain data, for YAML and JSON."""
        return dataclasses.asdict(self)

    def to_yaml(self) -> str:
        return to_yaml(self.to_dict())


def _unknown_trackers(recipe: Recipe) -> Iterator[tuple[str, str]]:
    methods = {"extract.f0_method": recipe.extract.f0_method, "infer.f0_method": recipe.infer.f0_method}
    for key, method in methods.items():
        try:
            if method is not None:
                f0_method_names(method)
        except ValueError as error:
            yield key, str(error).replace("extract.f0_method", key)


def _contradictions(recipe: Recipe) -> Iterator[tuple[str, str]]:
    """(key, sentence) of every value that does not go with another."""
    cut, pitch, model, plan = recipe.preprocess, recipe.extract, recipe.model, recipe.plan
    wrong = partial(_wrong, recipe)
    if cut.overlap_len > cut.chunk_len / 2:
        yield wrong("preprocess.overlap_len", f", expected at most half of preprocess.chunk_len ({cut.chunk_len})")
    yield from _unknown_trackers(recipe)
    if pitch.f0_max <= pitch.f0_min:
        yield wrong("extract.f0_max", f", expected more than extract.f0_min ({pitch.f0_min})")
    vocoder = VOCODERS.get(model.vocoder)
    if vocoder and (vocoder.guided if model.pitch_guidance else vocoder.plain) is None:
        why = f" with vocoder {model.vocoder}, which cannot; expected {not model.pitch_guidance}"
        yield wrong("model.pitch_guidance", why)
    rates = [rate for rate, spec in RATES[model.version].items() if vocoder and spec.suits(vocoder)]
    if vocoder and recipe.data.sample_rate not in rates:
        why = f" with vocoder {model.vocoder}, which has no layers for it; expected {' or '.join(map(str, rates))}"
        yield wrong("data.sample_rate", why)
    if vocoder and vocoder.discriminator and model.discriminator not in ("auto", vocoder.discriminator):
        why = f" with vocoder {model.vocoder}, which is trained with {vocoder.discriminator}; expected auto"
        yield wrong("model.discriminator", why)
    if model.num_heads and model.hidden_channels % model.num_heads:
        yield wrong("model.num_heads", f", expected a divisor of model.hidden_channels ({model.hidden_channels})")
    if recipe.train.keep_global_batch is not None and recipe.train.grad_accum_steps > 1:
        yield wrong("train.grad_accum_steps", " with train.keep_global_batch, which decides it; expected 1")
    if plan.step_s is not None and plan.device_tflop_s is not None:
        yield wrong("plan.device_tflop_s", f" with plan.step_s {plan.step_s}; set only one")
    if model.architecture == "svc":
        yield from (wrong(key, SVC_LACKS_IT) for key, value in SVC_LACKS.items() if attrgetter(key)(recipe) == value)
    yield from _train_contradictions(recipe.train, wrong)
    yield from _contradictions_of_base_model(recipe)


SVC_LACKS = {"model.pitch_guidance": False, "model.energy": True, "data.sample_rate": 44100}
"""What the SVC architecture is never made with; at 44.1 kHz other tools give it another hop."""
SVC_LACKS_IT = " with model.architecture svc, which is not made so; set back one of them"


def _wrong(recipe: Recipe, key: str, why: str) -> tuple[str, str]:
    return key, f"{key}: got {attrgetter(key)(recipe)}{why}"


def _train_contradictions(
    train: TrainConfig, wrong: Callable[[str, str], tuple[str, str]]
) -> Iterator[tuple[str, str]]:
    fitting = {"optimizer": ("adamw", "anyprecision_adamw"), "precision": ("fp32", "bf16")}  # defaults and its choices
    for name in (n for n, values in fitting.items() if train.bf16_adamw and getattr(train, n) not in values):
        yield wrong(f"train.{name}", f" with train.bf16_adamw, which chooses {fitting[name][-1]}; set only one")
    for name in ("learning_rate", "learning_rate_d") if train.optimizer == "prodigy" else ():
        if (getattr(train, name) or 1.0) < 0.1:
            why = " with prodigy, which finds the rate by itself and multiplies it by this; expected 1.0 or near it"
            yield wrong(f"train.{name}", why)


def _contradictions_of_base_model(recipe: Recipe) -> Iterator[tuple[str, str]]:
    model, train, got = recipe.model, recipe.train, f"train.pretrained: got {recipe.train.pretrained}"
    if train.pretrained not in BASE_MODELS:
        return
    if train.pretrained_g or train.pretrained_d:
        yield "train.pretrained", f"{got} with train.pretrained_g or train.pretrained_d; set only one of the kinds"
    elif not recipe.base_model_files:
        kind = f"{model.version} at {recipe.data.sample_rate} Hz with{'' if model.pitch_guidance else 'out'} pitch"
        fitting = [name for name in BASE_MODELS if recipe.files_of_base_model(name)]
        remedy = f"expected {' or '.join(fitting)}" if fitting else "no base model has, so leave it out"
        yield "train.pretrained", f"{got}, which has no weights for {kind} guidance and {model.vocoder}; {remedy}"


def recipe_of(given: Iterable[tuple[str, str]]) -> Recipe:
    """The recipe of (key, text) in their order; the key `config` stands for a file's keys.

    Raises:
        ConfigError: unknown keys in a file, wrong types, values out of range, or a file that cannot be read.
    """
    tree: dict[str, Any] = {}
    problems: list[str] = []
    for key, text in given:
        where = ""
        found: Any = text
        if key == "config":
            where, found = f"{text}: ", _read_file(text)
        else:
            for part in reversed(key.split(".")):
                found = {part: found}
        found = as_types(found, Recipe)
        _rename(found)
        problems += [where + fault.sentence for fault in faults(found, Recipe) if not fault.is_bound]
        _merge(tree, found)
    if problems:
        problems += [fault.sentence for fault in faults(tree, Recipe) if fault.is_bound]
        raise ConfigError("\n".join(problems))
    recipe: Recipe = _build(Recipe, tree)
    return recipe


OLD_KEYS = ("extract.reference",)
"""Those that `_rename` knows."""


def _rename(tree: dict[str, Any]) -> None:
    """Give the keys of older recipes, which run folders keep, the names of today."""
    if isinstance(tree.get("extract"), dict) and "reference" in tree["extract"]:
        reference = tree["extract"].pop("reference")
        _merge(tree, {"train": {"eval_reference": reference}} if reference is not None else {})


def load_recipe(path: Path) -> Recipe:
    """The recipe in a YAML file."""
    return recipe_of([("config", str(path))])


def as_types(value: Any, kind: Any) -> Any:
    """`value` with what is text read as YAML, and whole numbers made others, where `kind` says so."""
    types = types_of(kind)
    is_list = isinstance(value, str) and tuple in types and value.lstrip().startswith("[")
    if isinstance(value, str) and value.strip() and (is_list or str not in types):
        with contextlib.suppress(ForeignFileError, UnicodeError):
            value = parse_yaml(value.encode())
    if value in ("null", "~") and type(None) in types:
        return None
    if type(value) is int and float in types:
        return float(value)
    if isinstance(value, list) and tuple in types:
        return tuple(as_types(item, str if str in types else int) for item in value)
    if isinstance(value, dict) and dataclasses.is_dataclass(kind):
        hints = get_type_hints(kind, include_extras=True)
        return {k: as_types(v, hints[k]) if k in hints else v for k, v in value.items()}
    return value


def _read_file(text: str) -> dict[str, Any]:
    """The keys of the file that `--config TEXT` means."""
    try:
        path = packaged.recipe_file(text)
        tree = parse_yaml(read_bounded(path, MAX_YAML_BYTES))
    except FileNotFoundError as error:
        raise ConfigError(f"--config: {error}") from error
    except (ForeignFileError, OSError) as error:
        raise ConfigError(f"--config: {text} is no recipe: {error}") from error
    if not isinstance(tree, dict | None):
        raise ConfigError(f"--config: {text} holds a {type(tree).__name__}, expected keys such as name: and train:")
    return tree or {}


def _merge(tree: dict[str, Any], more: dict[str, Any]) -> None:
    for key, value in more.items():
        if isinstance(value, dict) and isinstance(tree.get(key), dict):
            _merge(tree[key], value)
        else:
            tree[key] = value


def _build(kind: type[Any], values: dict[str, Any]) -> Any:
    """A dataclass of `kind` from nested plain data."""
    hints = get_type_hints(kind)
    return kind(**{k: _build(hints[k], v) if dataclasses.is_dataclass(hints[k]) else v for k, v in values.items()})
