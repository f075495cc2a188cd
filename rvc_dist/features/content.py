"""Content encoders: what is said, without who says it.

B clips, S samples at 16 kHz, T frames at 50 per second, C features.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
import math
import struct
from abc import ABC, abstractmethod
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, NamedTuple, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrize

from rvc_dist.choices import EMBEDDERS, EmbedderSpec, resolve
from rvc_dist.config import FEATURE_RATE, EmbedderMix, ExtractConfig
from rvc_dist.features.hub import hub_file, make_torchaudio_importable
from rvc_dist.features.identity import EmbedderId
from rvc_dist.features.precision import lower
from rvc_dist.files import ForeignFileError, read_bounded, regular_size, sha256_of
from rvc_dist.models.spectral import mel_bank
from rvc_dist.models.torch_file import MAX_PICKLE, load_pth, weights
from rvc_dist.runtime.device import PRECISIONS
from rvc_dist.schema import Rule, parse_json, record, within
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
    bool: "do_normalize conv_bias conv_pos_batch_norm do_stable_layer_norm feat_proj_layer_norm scale_embedding",
    float: "layer_norm_eps",
    str: "model_type hidden_act feat_extract_activation feat_extract_norm activation_function",
}
SETTINGS = record(False, **{key: kind for kind, keys in _KEYS.items() for key in keys.split()})
"""The keys of config.json and Whisper's preprocessor_config.json that count here; others are for training."""
MODELS = {
    "hubert": "transformers:HubertModel",
    "wav2vec2": "transformers:Wav2Vec2Model",
    "wavlm": "transformers:WavLMModel",
    "whisper": "transformers.models.whisper.modeling_whisper:WhisperEncoder",
}
"""`model_type` of a config.json -> the class that reads it."""
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

    @property
    def identity(self) -> EmbedderId:
        return EmbedderId(self.name, self.weights_hash, self.mix)

    def describe(self) -> dict[str, Any]:
        """What the features were made with; training and export carry it along."""
        return self.identity.to_features() | {"width": self.width}

    @torch.inference_mode()
    def __call__(self, wave: Tensor) -> Tensor:
        assert wave.dim() == 2, f"expected [B, S], got {list(wave.shape)}"
        return self.encode(wave.to(self.device, torch.float32)).float().contiguous()


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

    def __init__(self, version: Version, mix: EmbedderMix, device: torch.device) -> None:
        super().__init__(device)
        if mix.is_on:
            raise ValueError(
                f"extract.embedder_mix.layers: got {list(mix.layers)} with mfcc, which has no layers; leave it empty "
                "or choose another extract.embedder_model"
            )
        self.width = MFCC_WIDTH[version]
        constants = (self.N_FFT, FRAME_SAMPLES, self.NUM_MELS, self.NUM_CEPSTRA, self.CONTEXT, self.FLOOR, self.width)
        self.weights_hash = hashlib.sha256(repr(("mfcc", 1, *constants)).encode()).hexdigest()[:16]
        self.window = torch.hann_window(self.N_FFT, device=device)
        mels = mel_bank(FEATURE_RATE, self.N_FFT, self.NUM_MELS, low_hz=20.0, htk=True, area=False)
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


class Pretrained(Embedder):
    """A network that others trained, in the format of transformers.

    Raises:
        ValueError: its files describe no network, or one that is of no use here.
    """

    def __init__(self, source: _Source, version: Version, mix: EmbedderMix, device: torch.device) -> None:
        super().__init__(device)
        self.name, self.mix = source.name, mix
        self.weights_hash = _hash(source.tensors)
        network = _build(source)
        num_layers, self.width = network.config.num_hidden_layers, network.config.hidden_size
        if mix.is_on and mix.layers[-1] > num_layers:
            raise ValueError(
                f"extract.embedder_mix.layers: got {list(mix.layers)}, {source.name} has {num_layers} layers: expected "
                f"numbers from 0 (what enters the first) to {num_layers}"
            )
        if version == "v1":
            if num_layers < V1_LAYER:
                raise ValueError(
                    f"extract.embedder_model: {source.name} has {num_layers} layers, model.version v1 takes layer "
                    f"{V1_LAYER}"
                )
            num_features = max(1, source.tensors["final_proj.weight"].numel() // self.width)
            network.final_proj = nn.Linear(self.width, num_features, device="meta")
            self.width = num_features
        self.network: Any = _filled(network, source).to(device)

    @abstractmethod
    def lower(self, dtype: torch.dtype) -> None:
        """Let the network compute in `dtype`."""

    def mixed(self, usual: Tensor, states: Sequence[Tensor]) -> Tensor:
        """[B, T, C] of the usual layer and of all layers -> [B, T, C] float32."""
        if not self.mix.is_on:
            return usual.float()
        others = torch.stack([states[layer].float() for layer in self.mix.layers]).mean(dim=0)
        return (1.0 - self.mix.ratio) * usual.float() + self.mix.ratio * others


class SelfSupervised(Pretrained):
    """HuBERT, wav2vec 2.0 or WavLM: v2 takes the last hidden state, v1 layer 9 through `final_proj`.

    Other layers are mixed in before the projection.
    """

    def __init__(self, source: _Source, version: Version, mix: EmbedderMix, device: torch.device) -> None:
        super().__init__(source, version, mix, device)
        self.normalize = source.preprocessor.get("do_normalize", False)
        self.is_projected = version == "v1"
        _check_frames(math.prod(self.network.config.conv_stride), source)

    def lower(self, dtype: torch.dtype) -> None:
        # The wave enters the first layer, a thousandth of the work, and would be heard through its own rounding.
        last = self.network.final_proj if self.is_projected else None
        lower(self.network, dtype, self.network.feature_extractor.conv_layers[0], last)

    def encode(self, wave: Tensor) -> Tensor:
        if self.normalize:
            wave = wave - wave.mean(dim=1, keepdim=True)
            wave = wave / (wave.square().mean(dim=1, keepdim=True) + 1e-7).sqrt()
        out = self.network(wave, output_hidden_states=self.mix.is_on or self.is_projected)
        # hidden_states[0] is what enters the first layer.
        usual = out.hidden_states[V1_LAYER] if self.is_projected else out.last_hidden_state
        hidden = self.mixed(usual, out.hidden_states)
        features: Tensor = self.network.final_proj(hidden) if self.is_projected else hidden
        return features


class Whisper(Pretrained):
    """The encoder of Whisper (Radford et al. 2022, arXiv:2212.04356), v2 only.

    It was trained on 30 s, shorter recordings padded with zeros. Here the positional embedding is cut to the clip's
    length instead, so that a 3 s clip costs a tenth. One second of silence stays behind the clip, and its frames are
    dropped: attention rests on silence, and would rest on a frame of speech if there were none.
    """

    TAIL_SAMPLES = FEATURE_RATE

    def __init__(self, source: _Source, version: Version, mix: EmbedderMix, device: torch.device) -> None:
        super().__init__(source, version, mix, device)
        from transformers import WhisperFeatureExtractor

        settings = self.network.config
        make: Any = WhisperFeatureExtractor
        extractor = make(settings.num_mel_bins, **source.preprocessor)
        self.n_fft: int = extractor.n_fft
        self.hop: int = extractor.hop_length
        _check_frames(2 * self.hop, source)
        self.window = torch.hann_window(self.n_fft, device=device)
        self.mel_filters = torch.from_numpy(extractor.mel_filters).float().T.contiguous().to(device)
        self.max_samples = settings.max_source_positions * 2 * self.hop

    def lower(self, dtype: torch.dtype) -> None:
        lower(self.network, dtype, self.network.conv1, self.network.layer_norm)

    def encode(self, wave: Tensor) -> Tensor:
        # Beyond the positions it knows: equal pieces, so that none of them is a scrap without context.
        num_pieces = -(-wave.shape[1] // self.max_samples)
        piece = -(-wave.shape[1] // (num_pieces * FRAME_SAMPLES)) * FRAME_SAMPLES
        parts = [part for part in torch.split(wave, piece, dim=1) if part.shape[1] >= FRAME_SAMPLES]
        return torch.cat([self._encode_piece(part) for part in parts], dim=1)

    def _encode_piece(self, wave: Tensor) -> Tensor:
        net = self.network
        num_frames = wave.shape[1] // FRAME_SAMPLES
        wave = F.pad(wave, (0, min(self.TAIL_SAMPLES, self.max_samples - wave.shape[1])))
        x: Tensor = F.gelu(net.conv2(F.gelu(net.conv1(self._log_mel(wave))))).transpose(1, 2)
        x = x + net.embed_positions.weight[: x.shape[1]]
        states = [x]
        for layer in net.layers:
            out = layer(x, None)
            x = out[0] if isinstance(out, tuple) else out  # a tuple before transformers 5
            states.append(x)
        states[-1] = net.layer_norm(x)
        return self.mixed(states[-1], states)[:, :num_frames]

    def _log_mel(self, wave: Tensor) -> Tensor:
        """[B, S] -> [B, mels, S // hop], within about -1..1."""
        spectrum = torch.stft(wave, self.n_fft, self.hop, window=self.window, return_complex=True)
        mel = (self.mel_filters @ spectrum[..., :-1].abs().square()).clamp_min(1e-10).log10()
        mel = torch.maximum(mel, mel.amax(dim=(1, 2), keepdim=True) - 8.0)
        return (mel + 4.0) / 4.0


def load_embedder(config: ExtractConfig, version: Version, device: torch.device) -> Embedder:
    """The content encoder that the recipe names, on `device`, in the recipe's precision and without gradients.

    `extract.embedder_model` is an existing folder (which wins over every other meaning), a name in EMBEDDERS or a hub
    id. Raises StageError when the encoder cannot be had, ValueError when it is of no use here.
    """
    name, mix = config.embedder_model, config.embedder_mix
    if name in EMBEDDERS and (make := EMBEDDERS[name].make) and not Path(name).is_dir():
        embedder: Embedder = resolve(make)(version, mix, device)
        return embedder
    source = _read_source(name)
    is_whisper = source.model_type == "whisper"
    if version == "v1" and (is_whisper or "final_proj.weight" not in source.tensors):
        raise ValueError(
            f"extract.embedder_model: {name} ({source.model_type}) has no final_proj layer, which model.version v1 "
            f"needs to make {V1_WIDTH} features of layer {V1_LAYER}; use model.version v2, or an encoder that has one "
            "(contentvec)"
        )
    network = (Whisper if is_whisper else SelfSupervised)(source, version, mix, device)
    network.lower(PRECISIONS[config.precision])
    return network


def published(embedder: EmbedderId) -> EmbedderId:
    """`embedder` under the name of the published encoder that has its weights, by which other tools find it.

    Which one that is, its folder tells where the file in it is known, or else the hub's cache: nothing is fetched.
    """
    if embedder.name in EMBEDDERS or not embedder.hash:
        return embedder
    files = [file for name in WEIGHT_FILES if (file := Path(embedder.name) / name).is_file()]
    own = {sha256_of(file) for file in files}
    for name, spec in EMBEDDERS.items():
        if spec.repository and (spec.sha256 in own or _cached_hash(spec) == embedder.hash):
            logger.info("the encoder %s is %s by its weights, and is called so", embedder.name, name)
            return replace(embedder, name=name)
    return embedder


def _cached_hash(spec: EmbedderSpec) -> str | None:
    """Of a published encoder's weights in the hub's cache; None where they are not there."""
    from huggingface_hub import try_to_load_from_cache

    for filename in WEIGHT_FILES:
        path = try_to_load_from_cache(spec.repository, spec.path(filename), revision=spec.revision)
        if isinstance(path, str):
            with contextlib.suppress(ValueError):  # damaged: whoever uses it says so
                return _hash(_encoder_tensors(read_tensors(Path(path))))
    return None


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
    folder, spec = Path(name), EMBEDDERS.get(name, EmbedderSpec(name))
    if is_local := folder.is_dir():
        where, file = name, partial(_folder_file, folder)
    elif name not in EMBEDDERS and (name.startswith((".", "~", "/")) or name.count("/") > 1):
        raise StageError(f"extract.embedder_model: {folder.absolute()} is no folder")
    else:
        where, file = str(spec), partial(_hub_file, spec)
    try:
        config = _read_settings(file("config.json"))
        if config.get("model_type") not in MODELS:
            raise ValueError(
                f"extract.embedder_model: {where}/config.json has model_type {config.get('model_type')!r}, expected "
                f"one of {', '.join(MODELS)}"
            )
        weights_file = file(*WEIGHT_FILES)
    except FileNotFoundError as error:
        raise StageError(
            f"extract.embedder_model: the encoder {name} cannot be had. {folder.absolute()} is no folder; {error}",
            f"Put config.json and {' or '.join(WEIGHT_FILES)} of {spec} into a folder and say "
            f"--extract.embedder_model FOLDER{WITHOUT_FILES}",
        ) from error
    if is_local:
        settings = folder / "preprocessor_config.json"
        preprocessor = _read_settings(settings) if settings.is_file() else {}
    else:  # the named encoders are given the wave as it is, by every tool, and have no such file
        preprocessor = {} if name in EMBEDDERS else _hub_preprocessor(spec.repository)
    return _Source(name, where, config, preprocessor, _encoder_tensors(read_tensors(weights_file)))


def _folder_file(folder: Path, *filenames: str) -> Path:
    """The first of the files that is there."""
    for filename in filenames:
        if (folder / filename).is_file():
            return folder / filename
    found = ", ".join(sorted(path.name for path in folder.iterdir())) or "nothing"
    raise ValueError(
        f"extract.embedder_model: {folder.absolute()} holds {found}; expected config.json (the transformers format) "
        f"and {' or '.join(WEIGHT_FILES)} (weights in one file)"
    )


def _hub_file(spec: EmbedderSpec, *filenames: str) -> Path:
    """The first of the files that is to be had."""
    reasons = []
    for filename in filenames:
        try:
            return hub_file(spec.repository, spec.path(filename), spec.revision)
        except FileNotFoundError as error:
            reasons.append(str(error))
    raise FileNotFoundError(" ".join(reasons))


def _read_settings(path: Path) -> dict[str, Any]:
    """The SETTINGS that are in a configuration."""
    try:
        config = parse_json(read_bounded(path, MAX_CONFIG_BYTES), SETTINGS)
    except ForeignFileError as error:
        raise ValueError(f"extract.embedder_model: {path} is no configuration: {error}") from error
    return {key: config[key] for key in SETTINGS.__annotations__ if key in config}


def _build(source: _Source) -> Any:
    """The network of a config.json, which takes no memory yet."""
    make_torchaudio_importable()
    import huggingface_hub.errors

    model = resolve(MODELS[source.model_type])
    strict: type[Exception] = getattr(huggingface_hub.errors, "StrictDataclassError", ValueError)
    wrong: Errors = (strict, ArithmeticError, LookupError, RuntimeError, TypeError, ValueError)
    try:
        # Without masks of training, whose embedding many published encoders lack.
        settings = model.config_class.from_dict(source.config | {"mask_time_prob": 0.0, "mask_feature_prob": 0.0})
        with torch.device("meta"):
            return model(settings)
    except wrong as error:
        raise ValueError(
            f"extract.embedder_model: {source.where}/config.json describes no network: {_short(error)}"
        ) from error


def _filled(network: nn.Module, source: _Source) -> nn.Module:
    """`network` with the tensors for its weights, ready for use."""
    prefix = "encoder." if "encoder.conv1.weight" in source.tensors else ""  # of a bare WhisperModel
    found = {key: source.tensors[prefix + key] for key in network.state_dict() if prefix + key in source.tensors}
    try:
        network.load_state_dict(found, assign=True)
    except RuntimeError as error:
        raise ValueError(
            f"extract.embedder_model: the weights in {source.where} are not those of its config.json: {_short(error)}"
        ) from error
    for module in network.modules():
        if parametrize.is_parametrized(module):  # a weight norm, which would be computed in each call
            parametrize.remove_parametrizations(module, "weight")
    return network.eval().requires_grad_(False)


def _short(error: Exception) -> str:
    return f"{' '.join(str(error).split()):.300}"


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


def _hub_preprocessor(repository: str) -> dict[str, Any]:
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import LocalEntryNotFoundError

    filename = "preprocessor_config.json"
    try:
        return _read_settings(hub_file(repository, filename))
    except FileNotFoundError as error:
        unknown = isinstance(error.__cause__, LocalEntryNotFoundError)
        if unknown and try_to_load_from_cache(repository, filename) is None:
            logger.warning("%s of %s could not be looked up: the wave is not normalised", filename, repository)
        return {}
