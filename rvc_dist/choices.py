"""What a recipe chooses by name: content encoders, pitch trackers, vocoders and optimizers, one entry each.

An entry says what makes the thing: a class, a function, or "module:name", which is imported when it is first made.
Nothing heavy is imported here, so that the recipe is checked against these tables at once.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from typing import TYPE_CHECKING, Any, NamedTuple, TypeAlias

if TYPE_CHECKING:
    from rvc_dist.config import TrainConfig

Maker: TypeAlias = str | Callable[..., Any]


def resolve(maker: Maker) -> Any:
    """The class or function itself; ImportError when its module cannot be imported."""
    if not isinstance(maker, str):
        return maker
    module, _, name = maker.partition(":")
    return getattr(import_module(module), name)


class Package(NamedTuple):
    """A package that only some choices need."""

    name: str
    """As pip knows it."""
    module: str


class EmbedderSpec(NamedTuple):
    """A content encoder: files on the Hugging Face hub, or what makes one that needs none."""

    repository: str = ""
    revision: str = ""
    folder: str = ""
    """Where in the repository its files are."""
    make: Maker | None = None
    """Of (version, EmbedderMix, device) a `rvc_dist.features.content.Embedder`."""

    def path(self, filename: str) -> str:
        return f"{self.folder}/{filename}" if self.folder else filename

    def __str__(self) -> str:
        return f"{self.repository} (folder {self.folder})" if self.folder else self.repository


def _of_applio(folder: str) -> EmbedderSpec:
    """An encoder as Applio hands it out: a voice that names it means these weights, whatever their origin has since."""
    revision = "70ed563897504c756ec94067c12c902c4fd42025"
    return EmbedderSpec("IAHispano/Applio", revision, f"Resources/embedders/{folder}")


EMBEDDERS: dict[str, EmbedderSpec] = {
    # ContentVec (Qian et al. 2022, arXiv:2204.09224) in the transformers format, with the final projection that v1
    # needs. Of this revision, pytorch_model.bin has the sha256 d8dd400e054ddf4e6be75dab5a2549db748cc99e756a097c496c099f
    # 65a4854e: the file that Applio ships as its contentvec.
    "contentvec": EmbedderSpec("lengyue233/content-vec-best", "ab04aa7067b99ee05cc82499bc64916b980a1967"),
    # Speaker-invariant clustering (Chang et al. 2023, arXiv:2305.11072) on HuBERT base.
    "spin": _of_applio("spin"),
    "spin-v2": _of_applio("spin-v2"),
    # HuBERT base (Hsu et al. 2021, arXiv:2106.07447) of one language. Their files are smaller than the others by the
    # final projection: they are for v2.
    "chinese-hubert-base": _of_applio("chinese_hubert_base"),
    "japanese-hubert-base": _of_applio("japanese_hubert_base"),
    "korean-hubert-base": _of_applio("korean_hubert_base"),
    "mfcc": EmbedderSpec(make="rvc_dist.features.content:Mfcc"),
}
"""By the name in `extract.embedder_model`, which may be a folder or a hub id instead."""


class F0Spec(NamedTuple):
    """A pitch tracker."""

    make: Maker
    """Of (ExtractConfig, device) a `rvc_dist.features.f0.F0Method`."""
    package: Package | None = None


_F0, _SIGNAL = "rvc_dist.features.f0", "rvc_dist.features.f0_signal"
_WORLD = Package("pyworld-prebuilt", "pyworld")

F0_METHODS: dict[str, F0Spec] = {
    "rmvpe": F0Spec("rvc_dist.features.rmvpe:RmvpePitch"),
    "crepe": F0Spec(f"{_F0}:CrepePitch"),
    "crepe-tiny": F0Spec(f"{_F0}:CrepeTinyPitch"),
    "fcpe": F0Spec(f"{_F0}:FcpePitch", Package("torchfcpe", "torchfcpe")),
    "penn": F0Spec("rvc_dist.features.penn:PennPitch"),
    "pesto": F0Spec(f"{_F0}:PestoPitch", Package("pesto-pitch", "pesto")),
    "swift": F0Spec(f"{_F0}:SwiftPitch", Package("swift-f0", "swift_f0")),
    "pyin": F0Spec(f"{_SIGNAL}:PyinPitch"),
    "yin": F0Spec(f"{_SIGNAL}:YinPitch"),
    "swipe": F0Spec(f"{_SIGNAL}:SwipePitch"),
    "harvest": F0Spec(f"{_SIGNAL}:HarvestPitch", _WORLD),
    "dio": F0Spec(f"{_SIGNAL}:DioPitch", _WORLD),
    "pm": F0Spec(f"{_SIGNAL}:PraatPitch", Package("praat-parselmouth", "parselmouth")),
    "piptrack": F0Spec(f"{_SIGNAL}:PiptrackPitch"),
}
"""By the name in `extract.f0_method`."""


class VocoderSpec(NamedTuple):
    """A decoder."""

    guided: Maker | None
    """Of a GeneratorShape a `rvc_dist.models.vocoders.Vocoder` that follows f0; None: it cannot."""
    plain: Maker | None
    """The same without pitch guidance."""
    voice_name: str
    """What voice files call it."""
    aliases: tuple[str, ...] = ()
    """What else the voice files of other tools call it."""


VOCODERS: dict[str, VocoderSpec] = {
    "hifi-gan": VocoderSpec(
        "rvc_dist.models.vocoders:NSFHiFiGAN", "rvc_dist.models.vocoders:HiFiGAN", "HiFi-GAN", aliases=("Default",)
    ),
    "mrf-hifi-gan": VocoderSpec("rvc_dist.models.mrf_hifigan:MRFHiFiGAN", None, "MRF HiFi-GAN", ("MRF-HiFi-GAN",)),
}
"""By the name in `model.vocoder`."""


def vocoder_of_voice(text: str) -> str:
    """The key into VOCODERS of what a voice file says; in lower case when there is none."""
    names = {name: key for key, spec in VOCODERS.items() for name in (key, spec.voice_name, *spec.aliases)}
    return names.get(text, text.lower())


Options: TypeAlias = Callable[["TrainConfig"], dict[str, Any]]


class OptimizerSpec(NamedTuple):
    """An optimizer."""

    make: Maker
    """Of (list of parameters, **options) a `torch.optim.Optimizer`."""
    elementwise: bool
    """It treats every number of a parameter alone, so that it does not matter how parameters are cut and joined."""
    package: Package | None = None
    more: Options = lambda config: {}
    """Options besides lr, betas, eps and weight_decay, or instead of them; None: it does not take this one."""

    def options(self, config: TrainConfig) -> dict[str, Any]:
        optim = config.optim
        common = {"lr": config.learning_rate, "betas": (optim.beta1, optim.beta2), "eps": optim.eps}
        options = common | {"weight_decay": optim.weight_decay} | self.more(config)
        return {key: value for key, value in options.items() if value is not None}


def _packaged(name: str, elementwise: bool, more: Options = lambda config: {}) -> OptimizerSpec:
    """A class of pytorch-optimizer, with decoupled weight decay."""
    package = Package("pytorch-optimizer", "pytorch_optimizer")
    return OptimizerSpec(
        f"pytorch_optimizer:{name}", elementwise, package, lambda config: {"weight_decouple": True} | more(config)
    )


OPTIMIZERS: dict[str, OptimizerSpec] = {
    "adamw": OptimizerSpec("rvc_dist.train.optimizers:adamw", True),
    "radam": OptimizerSpec("torch.optim:RAdam", True, more=lambda c: {"decoupled_weight_decay": True, "foreach": True}),
    "anyprecision_adamw": OptimizerSpec(
        "rvc_dist.train.optimizers:anyprecision_adamw",
        True,
        more=lambda c: {"variance_dtype": c.optim.variance_dtype, "kahan": c.optim.kahan_summation},
    ),
    "adamw_8bit": OptimizerSpec("rvc_dist.train.optimizers:adamw_8bit", False, Package("bitsandbytes", "bitsandbytes")),
    # arXiv 2010.07468: its eps is added to the variance in every step, where 1e-9 would rule; its own 1e-16 is kept.
    "adabelief": _packaged("AdaBelief", True, lambda c: {"eps": None}),
    # arXiv 2208.06677: decays of the gradient, of its differences (the package's default), and of the squares.
    "adan": _packaged("Adan", True, lambda c: {"betas": (c.optim.beta1, 0.92, c.optim.beta2)}),
    # arXiv 2409.03137: the third decay is that of the slow momentum, which is what the method is about.
    "ademamix": _packaged("AdEMAMix", True, lambda c: {"betas": (c.optim.beta1, c.optim.beta2, 0.9999)}),
    "adopt": _packaged("ADOPT", True),  # arXiv 2411.02853
    # arXiv 2307.02047: the third decay is that of the instability. Both its eps are added to squares: its own are kept.
    "came": _packaged("CAME", False, lambda c: {"betas": (c.optim.beta1, c.optim.beta2, 0.9999), "eps": None}),
    "lamb": _packaged("Lamb", False),  # arXiv 1904.00962
    # arXiv 2302.06675: signs alone, nothing is divided.
    "lion": _packaged("Lion", True, lambda c: {"eps": None}),
    # arXiv 2306.06101: a rate that rises from zero must not count as a measure of the distance.
    "prodigy": _packaged("Prodigy", False, lambda c: {"safeguard_warmup": c.warmup_steps > 0}),
    # RAdam (arXiv 1908.03265) with Lookahead (arXiv 1907.08610). Without this option, version 4.1 of the package takes
    # the steps before rectification sets in with a negative rate, up the gradient.
    "ranger": _packaged("Ranger", False, lambda c: {"degenerated_to_sgd": True}),
    # arXiv 2106.13731. The learning rate is the recipe's: its own schedule, and with it the length of the run, is off.
    "ranger21": _packaged("Ranger21", False, lambda c: {"num_iterations": 1, "disable_lr_scheduler": True}),
}
"""By the name in `train.optimizer`; those without a package are built in."""
