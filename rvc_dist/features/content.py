"""Content encoders: what is said, without who says it.

B clips, S samples at 16 kHz, T frames at 50 per second, C features.
"""

from __future__ import annotations

import hashlib
import logging
import math
import struct
from abc import ABC, abstractmethod
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, NamedTuple, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rvc_dist.config import FEATURE_RATE, EmbedderMix, ExtractConfig
from rvc_dist.features.hub import hub_file, make_torchaudio_importable
from rvc_dist.files import ForeignFileError, regular_size
from rvc_dist.models.torch_file import MAX_PICKLE, load_pth, weights
from rvc_dist.schema import Rule, SchemaError, check, parse_json, read_bounded, record, within
from rvc_dist.workspace import StageError

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

logger = logging.getLogger(__name__)

Version = Literal["v1", "v2"]
Errors: TypeAlias = tuple[type[Exception], ...]

FRAME_SAMPLES = 320
"""Samples a content frame at 16 kHz: 50 frames a second."""
V1_LAYER = 9
"""Transformer layer whose output v1 projects."""
V1_WIDTH = 256
MFCC_WIDTH = {"v1": V1_WIDTH, "v2": 768}


class HubEncoder(NamedTuple):
    """A published encoder that has a name of its own here."""

    repository: str
    revision: str
    folder: str = ""
    """Where in the repository its files are."""

    def path(self, filename: str) -> str:
        return f"{self.folder}/{filename}" if self.folder else filename

    def __str__(self) -> str:
        return f"{self.repository} (folder {self.folder})" if self.folder else self.repository


def _of_applio(folder: str) -> HubEncoder:
    """An encoder as Applio hands it out: a voice that names it means these weights, whatever their origin has since."""
    revision = "70ed563897504c756ec94067c12c902c4fd42025"
    return HubEncoder("IAHispano/Applio", revision, f"Resources/embedders/{folder}")


EMBEDDERS = {
    # ContentVec (Qian et al. 2022, arXiv:2204.09224) in the transformers format, with the final projection that v1
    # needs. Of this revision, pytorch_model.bin has the sha256 d8dd400e054ddf4e6be75dab5a2549db748cc99e756a097c496c099f
    # 65a4854e: the file that Applio ships as its contentvec.
    "contentvec": HubEncoder("lengyue233/content-vec-best", "ab04aa7067b99ee05cc82499bc64916b980a1967"),
    # Speaker-invariant clustering (Chang et al. 2023, arXiv:2305.11072) on HuBERT base.
    "spin": _of_applio("spin"),
    "spin-v2": _of_applio("spin-v2"),
    # HuBERT base (Hsu et al. 2021, arXiv:2106.07447) of one language. Their files are smaller than the others by the
    # final projection: they are for v2.
    "chinese-hubert-base": _of_applio("chinese_hubert_base"),
    "japanese-hubert-base": _of_applio("japanese_hubert_base"),
    "korean-hubert-base": _of_applio("korean_hubert_base"),
}

Few = Annotated[int, within(1, 256)]
"""Layers, of which the largest published encoder has 48, and bands."""
Size = Annotated[int, within(1, 1 << 16)]
Sizes = Annotated[
    list[int],
    Rule(
        "at most 16 whole numbers of 1 to 65536",
        (list,),
        lambda sizes: len(sizes) <= 16 and all(type(n) is int and 0 < n <= 1 << 16 for n in sizes),
    ),
]
_KEYS = {
    Few: "num_hidden_layers encoder_layers num_mel_bins",
    Sizes: "conv_dim conv_kernel conv_stride",
    Size: "hidden_size intermediate_size num_attention_heads num_conv_pos_embeddings num_conv_pos_embedding_groups "
    "num_buckets max_bucket_distance d_model encoder_attention_heads encoder_ffn_dim max_source_positions "
    "n_fft hop_length",
    Size | None: "adapter_attn_dim",
    bool: "conv_bias conv_pos_batch_norm do_stable_layer_norm feat_proj_layer_norm scale_embedding",
    float: "layer_norm_eps",
    str: "hidden_act feat_extract_activation feat_extract_norm activation_function",
}
SETTINGS = record(False, **{key: kind for kind, keys in _KEYS.items() for key in keys.split()})
"""The keys of config.json and Whisper's preprocessor_config.json that count here; others are for training."""
MODEL_CLASSES = {
    "hubert": ("HubertConfig", "HubertModel"),
    "wav2vec2": ("Wav2Vec2Config", "Wav2Vec2Model"),
    "wavlm": ("WavLMConfig", "WavLMModel"),
    "whisper": ("WhisperConfig", "WhisperModel"),
}
"""`model_type` of a config.json -> the classes of transformers that read it."""

MAX_CONFIG_BYTES = 1 << 20
WEIGHT_FILES = ("model.safetensors", "pytorch_model.bin")
WITHOUT_FILES = ", or say --extract.embedder_model mfcc, which needs no files"
"""The other way out when an encoder cannot be had; none for a voice that was trained with one."""


class Embedder(ABC):
    """A content encoder.

    Called with `wave` [B, S] (float32, 16 kHz, rows of equal true length: no padding, which the encoders' own
    normalisation over time would hear), it returns features [B, T, width] float32 on the encoder's device, T about
    S // 320: HuBERT and its kin give (S - 80) // 320. The rows of a batch agree with the clips alone to about 1e-5, not
    to the last bit: batched matrix products choose their order of summation by the shape.
    """

    name: str
    """As the recipe gives it: a name in EMBEDDERS, mfcc, a hub id or a folder."""
    width: int
    weights_hash: str
    """First 16 hex digits of a sha256 over the weights: features with another hash are of another encoder."""
    mix = EmbedderMix()
    """The layers that are mixed in; off for encoders without layers."""

    @abstractmethod
    def encode(self, wave: Tensor) -> Tensor:
        """[B, S] on the device -> [B, T, width]."""

    def __init__(self, device: torch.device) -> None:
        self.device = device

    @torch.no_grad()
    def __call__(self, wave: Tensor) -> Tensor:
        assert wave.dim() == 2, f"expected [B, S], got {list(wave.shape)}"
        return self.encode(wave.to(self.device, torch.float32)).float()


class Mfcc(Embedder):
    """Cepstra with their movement and their neighbours: an encoder without weights, for demos and tests.

    The mean and deviation of each coefficient over the clip are removed, and most of the speaker's vocal tract and of
    the channel with them. In training they are a clip's, in the conversion of a long recording a window's.

    Frame t is centred in the samples 320 t .. 320 (t + 1) that it stands for.
    """

    N_FFT = 512
    NUM_MELS = 40
    NUM_CEPSTRA = 16
    CONTEXT = 2
    """Neighbours on each side."""
    FLOOR = 1e-6
    """Added to the power: about what one step of 16-bit audio gives."""

    name = "mfcc"

    def __init__(self, version: Version, device: torch.device) -> None:
        super().__init__(device)
        from librosa.filters import mel

        self.width = MFCC_WIDTH[version]
        constants = (self.N_FFT, FRAME_SAMPLES, self.NUM_MELS, self.NUM_CEPSTRA, self.CONTEXT, self.FLOOR, self.width)
        self.weights_hash = hashlib.sha256(repr(("mfcc", 1, *constants)).encode()).hexdigest()[:16]
        self.window = torch.hann_window(self.N_FFT, device=device)
        mels = mel(sr=FEATURE_RATE, n_fft=self.N_FFT, n_mels=self.NUM_MELS, fmin=20.0, htk=True, norm=None)
        self.mel_filters = torch.from_numpy(mels.T.copy()).to(device)
        bands = torch.arange(self.NUM_MELS, dtype=torch.float64) + 0.5
        order = torch.arange(self.NUM_CEPSTRA, dtype=torch.float64)
        self.dct = torch.cos(math.pi / self.NUM_MELS * bands[:, None] * order).float().to(device)
        num_features = 3 * self.NUM_CEPSTRA * (2 * self.CONTEXT + 1)
        self.basis = _dct4_rows(num_features, self.width).to(device)

    def encode(self, wave: Tensor) -> Tensor:
        num_pad = (self.N_FFT - FRAME_SAMPLES) // 2
        wave = F.pad(wave, (num_pad, num_pad))
        spectrum = torch.stft(
            wave, self.N_FFT, FRAME_SAMPLES, window=self.window, center=False, return_complex=True
        ).abs()
        log_mel = (spectrum.square().transpose(1, 2) @ self.mel_filters + self.FLOOR).log()
        cepstra = _normalize_over_time(log_mel @ self.dct)
        delta = _slope(cepstra)
        features = torch.cat([cepstra, _normalize_over_time(delta), _normalize_over_time(_slope(delta))], dim=2)
        stacked = _edge_pad(features, self.CONTEXT).unfold(1, 2 * self.CONTEXT + 1, 1).flatten(2)
        return stacked @ self.basis


def _dct4_rows(num_rows: int, width: int) -> Tensor:
    """`num_rows` rows of the orthonormal DCT-IV of size `width`: float32 [num_rows, width].

    A closed formula gives the same matrix on every machine, unlike a seeded generator or a decomposition. Orthonormal
    rows keep distances between frames, which the retrieval index compares, and spread every cepstrum over all channels.
    """
    rows = torch.arange(num_rows, dtype=torch.float64) * (width // num_rows) + 0.5
    columns = torch.arange(width, dtype=torch.float64) + 0.5
    return (math.sqrt(2.0 / width) * torch.cos(math.pi / width * rows[:, None] * columns)).float()


def _normalize_over_time(x: Tensor) -> Tensor:
    """[B, T, C], each channel of each clip to mean 0 and deviation 1; what hardly moves (silence) stays near 0."""
    x = x - x.mean(dim=1, keepdim=True)
    return x / (x.square().mean(dim=1, keepdim=True).sqrt() + 1e-2)


def _edge_pad(x: Tensor, num: int) -> Tensor:
    return F.pad(x.transpose(1, 2), (num, num), mode="replicate").transpose(1, 2)


def _slope(x: Tensor) -> Tensor:
    """Least-squares slope over 5 frames, edges repeated: [B, T, C]."""
    padded = _edge_pad(x, 2)
    num = x.shape[1]
    left2, left1, right1, right2 = (padded[:, start : start + num] for start in (0, 1, 3, 4))
    return (2.0 * (right2 - left2) + (right1 - left1)) / 10.0


class SelfSupervised(Embedder):
    """HuBERT, wav2vec 2.0 or WavLM: v2 takes the last hidden state, v1 layer 9 through `final_proj`.

    Other layers are mixed in before the projection.
    """

    def __init__(self, source: _Source, version: Version, mix: EmbedderMix, device: torch.device) -> None:
        super().__init__(device)
        self.name = source.name
        self.weights_hash = _hash(source.tensors)
        self.normalize = bool(source.preprocessor.get("do_normalize", False))
        self.network = _build(source).to(device)
        settings: Any = self.network.config
        _check_frames(math.prod(settings.conv_stride), source)
        self.mix = _checked_mix(mix, source, settings.num_hidden_layers)
        self.projection: nn.Linear | None = None
        self.width: int = settings.hidden_size
        if version == "v1":
            self.projection = _final_projection(source, self.width, settings.num_hidden_layers).to(device)
            self.width = self.projection.out_features

    def encode(self, wave: Tensor) -> Tensor:
        if self.normalize:
            wave = wave - wave.mean(dim=1, keepdim=True)
            wave = wave / (wave.square().mean(dim=1, keepdim=True) + 1e-7).sqrt()
        out = self.network(wave, output_hidden_states=self.mix.is_on or self.projection is not None)
        # hidden_states[0] is what enters the first layer.
        hidden: Tensor = out.last_hidden_state if self.projection is None else out.hidden_states[V1_LAYER]
        if self.mix.is_on:
            hidden = _mixed(hidden, out.hidden_states, self.mix)
        features: Tensor = hidden if self.projection is None else self.projection(hidden)
        return features


class Whisper(Embedder):
    """The encoder of Whisper (Radford et al. 2022, arXiv:2212.04356), v2 only.

    It was trained on 30 s, shorter recordings padded with zeros. Here the positional embedding is cut to the clip's
    length instead, so that a 3 s clip costs a tenth. One second of silence stays behind the clip, and its frames are
    dropped: attention rests on silence, and would rest on a frame of speech if there were none.
    """

    TAIL_SAMPLES = FEATURE_RATE

    def __init__(self, source: _Source, mix: EmbedderMix, device: torch.device) -> None:
        super().__init__(device)
        make_torchaudio_importable()
        from transformers import WhisperFeatureExtractor

        self.name = source.name
        self.weights_hash = _hash(source.tensors)
        self.network = _build(source).to(device)
        settings: Any = self.network.config
        self.width: int = settings.d_model
        window = _settings(source.preprocessor, source.where)
        extractor: Any = WhisperFeatureExtractor(settings.num_mel_bins, **window)  # type: ignore[no-untyped-call]
        self.n_fft: int = extractor.n_fft
        self.hop: int = extractor.hop_length
        _check_frames(2 * self.hop, source)
        self.window = torch.hann_window(self.n_fft, device=device)
        self.mel_filters = torch.from_numpy(extractor.mel_filters).float().T.contiguous().to(device)
        self.mix = _checked_mix(mix, source, settings.encoder_layers)
        self.max_samples = settings.max_source_positions * 2 * self.hop

    def encode(self, wave: Tensor) -> Tensor:
        # Beyond the positions it knows: equal pieces, so that none of them is a scrap without context.
        num_pieces = -(-wave.shape[1] // self.max_samples)
        piece = -(-wave.shape[1] // (num_pieces * FRAME_SAMPLES)) * FRAME_SAMPLES
        parts = [part for part in torch.split(wave, piece, dim=1) if part.shape[1] >= FRAME_SAMPLES]
        return torch.cat([self._encode_piece(part) for part in parts], dim=1)

    def _encode_piece(self, wave: Tensor) -> Tensor:
        net: Any = self.network
        num_frames = wave.shape[1] // FRAME_SAMPLES
        wave = F.pad(wave, (0, min(self.TAIL_SAMPLES, self.max_samples - wave.shape[1])))
        x: Tensor = F.gelu(net.conv2(F.gelu(net.conv1(self._log_mel(wave))))).transpose(1, 2)
        x = x + net.embed_positions.weight[: x.shape[1]]
        states = [x]
        for layer in net.layers:
            out = layer(x, None)
            x = out[0] if isinstance(out, tuple) else out  # a tuple before transformers 5
            states.append(x)
        features: Tensor = net.layer_norm(x)
        states[-1] = features
        if self.mix.is_on:
            features = _mixed(features, states, self.mix)
        return features[:, :num_frames]

    def _log_mel(self, wave: Tensor) -> Tensor:
        """[B, S] -> [B, mels, S // hop], within about -1..1."""
        spectrum = torch.stft(wave, self.n_fft, self.hop, window=self.window, return_complex=True)
        mel = (self.mel_filters @ spectrum[..., :-1].abs().square()).clamp_min(1e-10).log10()
        mel = torch.maximum(mel, mel.amax(dim=(1, 2), keepdim=True) - 8.0)
        return (mel + 4.0) / 4.0


def _mixed(usual: Tensor, states: Sequence[Tensor], mix: EmbedderMix) -> Tensor:
    """[B, T, C] of the usual layer and of all layers -> [B, T, C]."""
    others = torch.stack([states[layer] for layer in mix.layers]).mean(dim=0)
    return (1.0 - mix.ratio) * usual + mix.ratio * others


def _checked_mix(mix: EmbedderMix, source: _Source, num_layers: int) -> EmbedderMix:
    if mix.is_on and mix.layers[-1] > num_layers:
        raise ValueError(
            f"extract.embedder_mix.layers: got {list(mix.layers)}, {source.name} has {num_layers} layers: expected "
            f"numbers from 0 (what enters the first) to {num_layers}"
        )
    return mix


def load_embedder(config: ExtractConfig, version: Version, device: torch.device) -> Embedder:
    """The content encoder that the recipe names, on `device`, in float32 and without gradients.

    `extract.embedder_model` is mfcc, an existing folder (which wins over every other meaning), a name in EMBEDDERS or a
    hub id. Raises StageError when the encoder cannot be had, ValueError when it is of no use here.
    """
    name, mix = config.embedder_model, config.embedder_mix
    if name == "mfcc" and not Path(name).is_dir():
        if mix.is_on:
            raise ValueError(
                f"extract.embedder_mix.layers: got {list(mix.layers)} with mfcc, which has no layers; leave it empty "
                "or choose another extract.embedder_model"
            )
        return Mfcc(version, device)
    source = _read_source(name)
    if source.model_type != "whisper":
        return SelfSupervised(source, version, mix, device)
    if version == "v1":
        raise ValueError(_no_projection(source))
    return Whisper(source, mix, device)


class _Source(NamedTuple):
    """An encoder's files, read."""

    name: str
    where: str
    config: dict[str, Any]
    preprocessor: dict[str, Any]
    tensors: dict[str, Tensor]

    @property
    def model_type(self) -> str:
        return str(self.config["model_type"])


def _read_source(name: str) -> _Source:
    if Path(name).is_dir():
        return _read_folder(name)
    if name not in EMBEDDERS and (name.startswith((".", "~", "/")) or name.count("/") > 1):
        raise StageError(f"extract.embedder_model: {Path(name).absolute()} is no folder")
    encoder = EMBEDDERS.get(name, HubEncoder(name, ""))
    try:
        config = _read_json(hub_file(encoder.repository, encoder.path("config.json"), encoder.revision))
        _check_model_type(config, str(encoder))
        weights = _hub_weights(encoder)
    except FileNotFoundError as error:
        raise StageError(
            f"extract.embedder_model: the encoder {name} cannot be had. {Path(name).absolute()} is no folder; {error}",
            f"Put config.json and {' or '.join(WEIGHT_FILES)} of {encoder} into a folder and say "
            f"--extract.embedder_model FOLDER{WITHOUT_FILES}",
        ) from error
    # The named encoders are given the wave as it is, by every tool, and have no such file.
    preprocessor = {} if name in EMBEDDERS else _hub_preprocessor(encoder.repository)
    return _Source(name, str(encoder), config, preprocessor, _encoder_tensors(read_tensors(weights)))


def _read_folder(name: str) -> _Source:
    folder = Path(name)
    found = ", ".join(sorted(path.name for path in folder.iterdir())) or "nothing"
    if not (folder / "config.json").is_file():
        raise ValueError(
            f"extract.embedder_model: {folder.absolute()} holds {found}; expected config.json (the transformers "
            f"format) with {' or '.join(WEIGHT_FILES)}"
        )
    config = _read_json(folder / "config.json")
    _check_model_type(config, str(folder))
    weights = next((folder / file for file in WEIGHT_FILES if (folder / file).is_file()), None)
    if weights is None:
        raise ValueError(
            f"extract.embedder_model: {folder.absolute()} holds {found}; expected {' or '.join(WEIGHT_FILES)} "
            "(weights in one file)"
        )
    settings = folder / "preprocessor_config.json"
    preprocessor = _read_json(settings) if settings.is_file() else {}
    return _Source(name, str(folder), config, preprocessor, _encoder_tensors(read_tensors(weights)))


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content: dict[str, Any] = parse_json(read_bounded(path, MAX_CONFIG_BYTES), dict)
    except SchemaError as error:
        raise ValueError(f"{path} is no configuration: {error}") from error
    return content


def _check_model_type(config: Mapping[str, Any], where: str) -> None:
    if config.get("model_type") not in MODEL_CLASSES:
        raise ValueError(
            f"extract.embedder_model: {where}/config.json has model_type {config.get('model_type')!r}, expected one of "
            f"{', '.join(MODEL_CLASSES)}"
        )


def _settings(config: dict[str, Any], where: str) -> dict[str, Any]:
    """The SETTINGS that are in a configuration."""
    try:
        check(config, SETTINGS)
    except SchemaError as error:
        raise ValueError(f"extract.embedder_model: the configuration in {where}: {error}") from error
    return {key: config[key] for key in SETTINGS.__annotations__ if key in config}


def _build(source: _Source) -> nn.Module:
    """The network of a config.json with its weights. Nothing is allocated before both are known to be of one size."""
    make_torchaudio_importable()
    import huggingface_hub.errors
    import transformers

    shape = _settings(source.config, source.where)
    config_name, model_name = MODEL_CLASSES[source.model_type]
    strict: type[Exception] = getattr(huggingface_hub.errors, "StrictDataclassError", ValueError)
    wrong: Errors = (strict, ArithmeticError, LookupError, RuntimeError, TypeError, ValueError)
    try:
        settings = getattr(transformers, config_name).from_dict(shape)
        with torch.device("meta"):
            if source.model_type == "whisper":
                from transformers.models.whisper.modeling_whisper import WhisperEncoder

                network: nn.Module = WhisperEncoder(settings)
            else:
                network = getattr(transformers, model_name)(settings)
    except wrong as error:
        reason = " ".join(str(error).split())
        raise ValueError(
            f"extract.embedder_model: {source.where}/config.json describes no network: {reason:.300}"
        ) from error
    return _fill(network, source).eval().requires_grad_(False)


def _check_frames(num_samples: int, source: _Source) -> None:
    if num_samples != FRAME_SAMPLES:
        raise ValueError(
            f"extract.embedder_model: {source.where} describes frames of {num_samples} samples (conv_stride, "
            f"hop_length), expected {FRAME_SAMPLES}"
        )


def _encoder_tensors(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors under the names of the bare encoder, in float32.

    Models with a head keep the encoder under its type's name, Whisper beside its decoder; and weight norm has an old
    spelling and a new one.
    """
    renamed = {}
    for key, value in tensors.items():
        for prefix in ("hubert.", "wav2vec2.", "wavlm.", "model.encoder."):
            key = key.removeprefix(prefix)
        key = key.replace(".weight_g", ".parametrizations.weight.original0")
        key = key.replace(".weight_v", ".parametrizations.weight.original1")
        renamed[key] = value.float()
    return renamed


def _fill(network: nn.Module, source: _Source) -> nn.Module:
    """`network`, which has no memory yet, with the tensors for its weights."""
    tensors = source.tensors
    if source.model_type == "whisper" and "encoder.conv1.weight" in tensors:  # a bare WhisperModel
        tensors = {key.removeprefix("encoder."): value for key, value in tensors.items()}
    wanted = network.state_dict()
    # Only masked in training; many published encoders lack it.
    missing = [key for key in wanted if key not in tensors and key != "masked_spec_embed"]
    wrong = [
        f"{key} {list(tensors[key].shape)}, expected {list(value.shape)}"
        for key, value in wanted.items()
        if key in tensors and tensors[key].shape != value.shape
    ]
    if missing or wrong:
        problems = [f"{key} is missing" for key in missing] + wrong
        more = f" and {len(problems) - 5} more" if len(problems) > 5 else ""
        raise ValueError(
            f"extract.embedder_model: the weights in {source.where} are not those of its config.json: "
            f"{'; '.join(problems[:5])}{more}"
        )
    network.load_state_dict({key: tensors[key] for key in wanted if key in tensors}, strict=False, assign=True)
    return network


def _no_projection(source: _Source) -> str:
    return (
        f"extract.embedder_model: {source.name} ({source.model_type}) has no final_proj layer, which model.version v1 "
        f"needs to make {V1_WIDTH} features of layer {V1_LAYER}; use model.version v2, or an encoder that has one "
        "(contentvec)"
    )


def _final_projection(source: _Source, width: int, num_layers: int) -> nn.Linear:
    weight, bias = source.tensors.get("final_proj.weight"), source.tensors.get("final_proj.bias")
    if weight is None or bias is None:
        raise ValueError(_no_projection(source))
    if weight.shape[1] != width or bias.shape != weight.shape[:1]:
        raise ValueError(
            f"extract.embedder_model: final_proj of {source.where} has weight {list(weight.shape)} and bias "
            f"{list(bias.shape)}, expected [features, {width}] and [features]"
        )
    if num_layers < V1_LAYER:
        raise ValueError(
            f"extract.embedder_model: {source.name} has {num_layers} layers, model.version v1 takes layer {V1_LAYER}"
        )
    layer = nn.Linear(width, weight.shape[0])
    layer.load_state_dict({"weight": weight, "bias": bias})
    return layer.eval().requires_grad_(False)


def _hash(tensors: Mapping[str, Tensor]) -> str:
    digest = hashlib.sha256()
    for key in sorted(tensors):
        value = tensors[key].contiguous()
        digest.update(f"{key} {list(value.shape)}\n".encode())
        digest.update(value.numpy().data)
    return digest.hexdigest()[:16]


def read_tensors(path: Path) -> dict[str, Tensor]:
    """The tensors of a .safetensors or torch file, on the CPU; no code in the file is run.

    Raises ValueError when the file is something else.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        if path.suffix == ".safetensors":
            size = regular_size(path)
            with path.open("rb") as stream:
                (header,) = struct.unpack("<Q", stream.read(8).ljust(8, b"\0"))
            if MAX_PICKLE < header < size:
                raise ForeignFileError(f"its header takes {header} bytes, expected at most {MAX_PICKLE}")
            content: Any = load_file(path)
        else:
            content = load_pth(path)
            if isinstance(content, dict) and isinstance(content.get("model"), dict):  # as training of penn writes it
                content = content["model"]
        return weights(content, with_counters=True)
    except (ForeignFileError, SafetensorError) as error:
        raise ValueError(f"{path} is not a file of weights: {error}") from error


def _hub_weights(encoder: HubEncoder) -> Path:
    reasons = []
    for filename in WEIGHT_FILES:
        try:
            return hub_file(encoder.repository, encoder.path(filename), encoder.revision)
        except FileNotFoundError as error:
            reasons.append(str(error))
    raise FileNotFoundError(" ".join(reasons))


def _hub_preprocessor(repository: str) -> dict[str, Any]:
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import LocalEntryNotFoundError

    filename = "preprocessor_config.json"
    try:
        return _read_json(hub_file(repository, filename))
    except FileNotFoundError as error:
        unknown = isinstance(error.__cause__, LocalEntryNotFoundError)
        if unknown and try_to_load_from_cache(repository, filename) is None:
            logger.warning("%s of %s could not be looked up: the wave is not normalised", filename, repository)
        return {}
