from __future__ import annotations

import hashlib
import json
import logging
import os
import time
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import safetensors.torch
import soundfile
import torch
from helpers import make_ssl_folder, make_whisper_folder
from huggingface_hub import constants
from torch import Tensor

import rvc_dist
from rvc_dist.choices import EMBEDDERS
from rvc_dist.config import EmbedderMix, ExtractConfig
from rvc_dist.features.content import Embedder, Version, load_embedder, published
from rvc_dist.features.hub import hub_silence
from rvc_dist.features.identity import EmbedderId
from rvc_dist.workspace import StageError

CPU = torch.device("cpu")
SPEECH = Path(rvc_dist.__file__).parent / "demo_voice" / "voice" / "000.flac"
RECORDED_STD = 0.50424
RECORDED = [-0.915, 0.0292, -0.1755, 0.164]
WHISPER_BASE = os.environ.get("RVC_DIST_WHISPER", "")
"""Folder of the pretrained whisper-base encoder, which is too large to ship with the tests."""


OFF = EmbedderMix()


def load(model: str | Path, version: Version = "v2", mix: EmbedderMix = OFF) -> Embedder:
    return load_embedder(ExtractConfig(embedder_model=str(model), embedder_mix=mix), version, CPU)


def speech(num_samples: int = 16000, start: int = 8000) -> Tensor:
    return torch.from_numpy(soundfile.read(SPEECH, dtype="float32", start=start, frames=num_samples)[0])


def states_of(network: Any) -> tuple[list[Tensor], Tensor]:
    """What enters the first layer of a HuBERT-like network and what each gives for `speech`; what it gives in all."""
    states: list[Tensor] = []

    def hear(_module: Any, inputs: tuple[Tensor, ...], out: Any) -> None:
        if not states:
            states.append(inputs[0])
        states.append(out[0] if isinstance(out, tuple) else out)

    hooks = [layer.register_forward_hook(hear) for layer in network.encoder.layers]
    with torch.no_grad():
        last: Tensor = network(speech()[None]).last_hidden_state
    for hook in hooks:
        hook.remove()
    return states, last


def check_contract(embedder: Embedder, width: int, num_frames: int) -> None:
    waves = torch.stack([speech(), speech(start=30000)])
    features = embedder(waves)
    assert embedder.width == width
    assert features.shape == (2, num_frames, width)
    assert features.dtype == torch.float32
    assert not features.requires_grad
    assert len(embedder.weights_hash) == 16
    # Not to the last bit: the order of summation in a matrix product depends on its shape.
    alone = torch.cat([embedder(wave[None]) for wave in waves])
    torch.testing.assert_close(features, alone, atol=1e-5, rtol=1e-4)
    assert embedder(torch.zeros(1, 16000)).isfinite().all()


@pytest.mark.parametrize("kind", ["Hubert", "Wav2Vec2", "WavLM"])
def test_self_supervised_v2_is_the_last_hidden_state(tmp_path: Path, kind: str) -> None:
    network = make_ssl_folder(tmp_path / "enc", kind)
    embedder = load(tmp_path / "enc")
    assert embedder.name == str(tmp_path / "enc")
    check_contract(embedder, 16, 49)
    with torch.no_grad():
        expected = network(speech()[None]).last_hidden_state
    torch.testing.assert_close(embedder(speech()[None]), expected, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("kind", ["Hubert", "WavLM"])
def test_self_supervised_v1_projects_layer_9(tmp_path: Path, kind: str) -> None:
    network = make_ssl_folder(tmp_path / "enc", kind)
    embedder = load(tmp_path / "enc", "v1")
    check_contract(embedder, 6, 49)
    tensors = safetensors.torch.load_file(tmp_path / "enc" / "model.safetensors")
    states, _ = states_of(network)
    expected = states[9] @ tensors["final_proj.weight"].T + tensors["final_proj.bias"]
    torch.testing.assert_close(embedder(speech()[None]), expected, atol=1e-6, rtol=1e-5)


def test_v1_needs_the_projection_and_nine_layers(tmp_path: Path) -> None:
    make_ssl_folder(tmp_path / "bare", "Hubert", projection=False)
    with pytest.raises(ValueError, match=r"has no final_proj layer, which model\.version v1 needs"):
        load(tmp_path / "bare", "v1")
    make_ssl_folder(tmp_path / "short", "Hubert", num_layers=4)
    with pytest.raises(ValueError, match=r"has 4 layers, model\.version v1 takes layer 9"):
        load(tmp_path / "short", "v1")
    make_whisper_folder(tmp_path / "whisper", whole=False)
    with pytest.raises(ValueError, match="has no final_proj layer"):
        load(tmp_path / "whisper", "v1")


@pytest.mark.parametrize("kind", ["Hubert", "Wav2Vec2", "WavLM"])
def test_layers_are_mixed_with_the_last(tmp_path: Path, kind: str) -> None:
    states, last = states_of(make_ssl_folder(tmp_path / "enc", kind, num_layers=3))
    embedder = load(tmp_path / "enc", mix=EmbedderMix((0, 2), 0.3))
    assert embedder.mix == EmbedderMix((0, 2), 0.3)
    check_contract(embedder, 16, 49)
    expected = 0.7 * last + 0.15 * states[0] + 0.15 * states[2]
    torch.testing.assert_close(embedder(speech()[None]), expected, atol=1e-6, rtol=1e-5)
    assert (expected - last).abs().max() > 0.005  # random layers change little
    # Nothing but another layer, the last one again, and no mix at all.
    for mix, wanted in ((((1,), 1.0), states[1]), (((3,), 0.4), last), (((1,), 0.0), last), (((), 0.4), last)):
        made = load(tmp_path / "enc", mix=EmbedderMix(*mix))(speech()[None])
        torch.testing.assert_close(made, wanted, atol=1e-6, rtol=1e-5)


def test_v1_mixes_before_the_projection(tmp_path: Path) -> None:
    states, _ = states_of(make_ssl_folder(tmp_path / "enc", "Hubert"))
    embedder = load(tmp_path / "enc", "v1", EmbedderMix((10,), 0.25))
    check_contract(embedder, 6, 49)
    tensors = safetensors.torch.load_file(tmp_path / "enc" / "model.safetensors")
    mixed = 0.75 * states[9] + 0.25 * states[10]
    expected = mixed @ tensors["final_proj.weight"].T + tensors["final_proj.bias"]
    torch.testing.assert_close(embedder(speech()[None]), expected, atol=1e-6, rtol=1e-5)


def test_layers_that_an_encoder_does_not_have_are_refused(tmp_path: Path) -> None:
    make_ssl_folder(tmp_path / "enc", "Hubert", num_layers=2)
    make_whisper_folder(tmp_path / "whisper", whole=False)
    for name in ("enc", "whisper"):
        with pytest.raises(ValueError, match=rf"embedder_mix\.layers: got \[1, 3\], .*/{name} has 2 layers: .* to 2"):
            load(tmp_path / name, mix=EmbedderMix((1, 3)))
    with pytest.raises(ValueError, match=r"extract\.embedder_mix\.layers: got \[9\] with mfcc, which has no layers"):
        load("mfcc", mix=EmbedderMix((9,)))
    assert load("mfcc", mix=EmbedderMix((9,), 0.0)).name == "mfcc"


def test_whisper_mixes_its_layers_too(tmp_path: Path) -> None:
    network = make_whisper_folder(tmp_path / "enc", whole=False)
    embedder = load(tmp_path / "enc", mix=EmbedderMix((1, 2), 0.5))
    check_contract(embedder, 16, 50)
    from transformers import WhisperFeatureExtractor

    wave = torch.zeros(480000)
    wave[:32000] = speech(32000)
    mel = WhisperFeatureExtractor()(wave.numpy(), sampling_rate=16000, return_tensors="pt")["input_features"]
    heard: list[Tensor] = []
    network.layers[0].register_forward_hook(
        lambda _module, _inputs, out: heard.append(out[0] if isinstance(out, tuple) else out)
    )
    with torch.no_grad():
        last = network(mel).last_hidden_state
    expected = 0.75 * last + 0.25 * heard[0]
    torch.testing.assert_close(embedder(wave[None]), expected, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("kind", ["Hubert", "Wav2Vec2", "WavLM"])
def test_every_spelling_of_the_weights_is_the_same_encoder(tmp_path: Path, kind: str) -> None:
    folder = tmp_path / "enc"
    make_ssl_folder(folder, kind, num_layers=2)
    first = load(folder)
    tensors = safetensors.torch.load_file(folder / "model.safetensors")
    renamed = {}
    for key, value in tensors.items():
        old = key.replace("parametrizations.weight.original0", "weight_g")
        old = old.replace("parametrizations.weight.original1", "weight_v")
        renamed[f"{kind.lower()}.{old}"] = value
    assert any(key.endswith("weight_g") for key in renamed)
    (folder / "model.safetensors").unlink()
    torch.save(renamed, folder / "pytorch_model.bin")
    second = load(folder)
    assert second.weights_hash == first.weights_hash
    assert torch.equal(second(speech()[None]), first(speech()[None]))

    renamed[f"{kind.lower()}.encoder.layers.0.attention.k_proj.bias"] += 0.1
    torch.save(renamed, folder / "pytorch_model.bin")
    assert load(folder).weights_hash != first.weights_hash


def test_wave_is_normalised_only_where_the_folder_says_so(tmp_path: Path) -> None:
    folder = tmp_path / "enc"
    make_ssl_folder(folder, "Hubert", num_layers=2)
    wave = speech()[None]
    plain = load(folder)
    (folder / "preprocessor_config.json").write_text(json.dumps({"do_normalize": True}))
    normalising = load(folder)
    torch.testing.assert_close(normalising(wave), normalising(0.25 * wave + 0.1), atol=1e-4, rtol=1e-3)
    by_hand = (wave - wave.mean()) / wave.std()
    torch.testing.assert_close(normalising(wave), plain(by_hand), atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("whole", [True, False])
def test_whisper(tmp_path: Path, whole: bool) -> None:
    from transformers import WhisperFeatureExtractor

    network = make_whisper_folder(tmp_path / "enc", whole)
    embedder = load(tmp_path / "enc")
    check_contract(embedder, 16, 50)
    # Given the whole 30 s, it is what transformers computes.
    wave = torch.zeros(480000)
    wave[:32000] = speech(32000)
    mel = WhisperFeatureExtractor()(wave.numpy(), sampling_rate=16000, return_tensors="pt")["input_features"]
    with torch.no_grad():
        expected = network(mel).last_hidden_state
    torch.testing.assert_close(embedder(wave[None]), expected, atol=1e-5, rtol=1e-4)


def test_whisper_takes_long_input_in_pieces(tmp_path: Path) -> None:
    make_whisper_folder(tmp_path / "enc", whole=False)
    embedder = load(tmp_path / "enc")
    wave = speech(80000).repeat(7)[None]  # 35 s: two pieces of 17.5 s
    features = embedder(wave)
    assert features.shape == (1, 1750, 16)
    torch.testing.assert_close(features[:, 875:], embedder(wave[:, 280000:]), atol=1e-5, rtol=1e-4)
    assert embedder(torch.zeros(1, 480001)).isfinite().all()


@pytest.mark.skipif(not WHISPER_BASE, reason="needs the whisper-base encoder: set RVC_DIST_WHISPER to its folder")
def test_cut_positions_hear_what_the_padded_recording_has() -> None:
    embedder = load(Path(WHISPER_BASE))
    wave = speech(48000, start=0)
    padded = torch.zeros(480000)
    padded[:48000] = wave
    cut, full = embedder(wave[None])[0], embedder(padded[None])[0, :150]
    similarity = torch.cosine_similarity(cut - cut.mean(0), full - full.mean(0), dim=-1)
    assert similarity.mean() > 0.95
    assert similarity.min() > 0.8


@pytest.mark.parametrize(("version", "width"), [("v1", 256), ("v2", 768)])
def test_mfcc_contract(version: Version, width: int) -> None:
    embedder = load("mfcc", version)
    assert embedder.name == "mfcc"
    check_contract(embedder, width, 50)
    assert embedder(torch.zeros(1, 16000)).abs().max() < 0.02
    assert load("mfcc", version).weights_hash == embedder.weights_hash
    assert load("mfcc", "v1").weights_hash != load("mfcc", "v2").weights_hash


def test_mfcc_does_not_change_between_machines_and_versions() -> None:
    t = torch.arange(16000, dtype=torch.float64) / 16000
    wave = (0.3 * torch.sin(2 * torch.pi * (200 * t + 300 * t * t))).float()[None]
    features = load("mfcc")(wave)[0]
    assert features.std().item() == pytest.approx(RECORDED_STD, rel=1e-3)
    assert features[25, ::200].tolist() == pytest.approx(RECORDED, abs=2e-3)


def test_mfcc_hears_what_and_not_how_loud() -> None:
    embedder = load("mfcc")
    wave = speech(32000)[None]
    features = embedder(wave)[0]
    louder = embedder(2.0 * wave)[0]
    assert torch.cosine_similarity(features, louder, dim=-1).mean() > 0.97
    assert torch.cosine_similarity(features, features.roll(20, 0), dim=-1).mean() < 0.3


def test_mfcc_frames_are_where_the_sound_is() -> None:
    wave = 1e-3 * torch.randn(32000, generator=torch.Generator().manual_seed(0))
    wave[16000:] += 0.3 * torch.sin(2 * torch.pi * 400 * torch.arange(16000) / 16000)
    features = load("mfcc")(wave[None])[0]
    assert features.shape[0] == 100
    step = (features[1:] - features[:-1]).norm(dim=-1)
    assert abs(step.argmax().item() - 49) <= 4  # within the context and the slopes around frame 50


def test_unfit_folders_say_what_is_there(tmp_path: Path) -> None:
    (tmp_path / "readme.txt").write_text("")
    with pytest.raises(ValueError, match=r"holds readme\.txt; expected config\.json"):
        load(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "bert"}))
    with pytest.raises(ValueError, match="model_type 'bert', expected one of hubert, wav2vec2, wavlm, whisper"):
        load(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": ["hubert"]}))
    with pytest.raises(ValueError, match=r"no configuration: model_type: got \['hubert'\], expected a text"):
        load(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "hubert"}))
    with pytest.raises(ValueError, match=r"holds config\.json, .* and model\.safetensors or pytorch_model\.bin"):
        load(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"junk")
    with pytest.raises(ValueError, match="not a file of weights: Error while deserializing"):
        load(tmp_path)


@pytest.mark.parametrize("value", [0, 10**5, 10**9, [10**9], [512] * 100_000, "x", None])
@pytest.mark.parametrize("kind", ["Hubert", "Whisper"])
def test_absurd_numbers_of_a_configuration_are_refused_at_once(tmp_path: Path, kind: str, value: Any) -> None:
    if kind == "Whisper":
        make_whisper_folder(tmp_path / "enc", whole=False)
        keys = ["d_model", "encoder_layers", "encoder_attention_heads", "num_mel_bins", "max_source_positions"]
    else:
        make_ssl_folder(tmp_path / "enc", kind, num_layers=2)
        keys = ["hidden_size", "num_hidden_layers", "intermediate_size", "conv_dim", "conv_stride", "conv_kernel"]
    config = json.loads((tmp_path / "enc" / "config.json").read_text())
    began = time.monotonic()
    for key in keys:
        (tmp_path / "enc" / "config.json").write_text(json.dumps(config | {key: value}))
        with pytest.raises(ValueError, match=r"extract\.embedder_model: .*enc") as caught:
            load(tmp_path / "enc")
        assert len(str(caught.value)) < 1000
    assert time.monotonic() - began < 10


def test_numbers_of_the_size_of_the_weights_alone_take_memory(tmp_path: Path) -> None:
    make_ssl_folder(tmp_path / "enc", "Hubert", num_layers=2)
    config = json.loads((tmp_path / "enc" / "config.json").read_text())
    many = config | {"hidden_size": 65536, "intermediate_size": 65536, "num_hidden_layers": 256}
    (tmp_path / "enc" / "config.json").write_text(json.dumps(many))  # 9 TB
    with pytest.raises(ValueError, match=r"the weights in .* are not those of its config\.json"):
        load(tmp_path / "enc")


def test_weights_of_another_encoder_are_refused(tmp_path: Path) -> None:
    make_ssl_folder(tmp_path / "enc", "Hubert", num_layers=2)
    file, other = tmp_path / "enc" / "model.safetensors", {"encoder.layer_norm.weight": torch.zeros(3)}
    tensors = safetensors.torch.load_file(file)
    safetensors.torch.save_file(other, file)
    with pytest.raises(ValueError, match=r"are not those of its config\.json: .*Missing key.*feature_extractor\."):
        load(tmp_path / "enc")
    safetensors.torch.save_file(tensors | other, file)
    with pytest.raises(ValueError, match=r"size mismatch for encoder\.layer_norm\.weight: .*\[3\].*\[16\]"):
        load(tmp_path / "enc")
    safetensors.torch.save_file(tensors | {"final_proj.bias": torch.zeros(5)}, file)
    load(tmp_path / "enc")
    make_ssl_folder(tmp_path / "v1", "Hubert")
    file = tmp_path / "v1" / "model.safetensors"
    safetensors.torch.save_file(safetensors.torch.load_file(file) | {"final_proj.bias": torch.zeros(5)}, file)
    with pytest.raises(ValueError, match=r"size mismatch for final_proj\.bias: .*\[5\].*\[6\]"):
        load(tmp_path / "v1", "v1")


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache of the hub, which is not to be had."""
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def test_a_hub_that_does_not_answer_is_asked_once(
    cache: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    calls: list[str] = []

    def refuse(_session: object, url: str, **_options: object) -> None:
        calls.append(url)
        raise ConnectionError("no route")

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(type(huggingface_hub.get_session()), "head", refuse)
    hub_silence.cache_clear()
    for name in ("contentvec", "spin"):
        with pytest.raises(StageError, match=rf"{constants.ENDPOINT} did not give it \(no route\)"):
            load(name)
    hub_silence.cache_clear()
    assert calls == [constants.ENDPOINT]
    assert not cache.exists()
    logging.getLogger("huggingface_hub.file_download").warning("on the root's handlers alone")
    assert "alone" not in capfd.readouterr().err


NAMED = {
    "contentvec": ("lengyue233/content-vec-best", ""),
    "spin": ("IAHispano/Applio", "Resources/embedders/spin"),
    "spin-v2": ("IAHispano/Applio", "Resources/embedders/spin-v2"),
    "chinese-hubert-base": ("IAHispano/Applio", "Resources/embedders/chinese_hubert_base"),
    "japanese-hubert-base": ("IAHispano/Applio", "Resources/embedders/japanese_hubert_base"),
    "korean-hubert-base": ("IAHispano/Applio", "Resources/embedders/korean_hubert_base"),
}


def test_each_named_encoder_is_read_from_its_place_in_the_cache(tmp_path: Path, cache: Path) -> None:
    assert EMBEDDERS.keys() == {*NAMED, "mfcc"}
    for number, (name, (repository, folder)) in enumerate(NAMED.items()):
        snapshot = cache / f"models--{repository.replace('/', '--')}" / "snapshots" / EMBEDDERS[name].revision
        place = snapshot / folder
        place.parent.mkdir(parents=True, exist_ok=True)
        make_ssl_folder(tmp_path / name, "Hubert", num_layers=2)
        tensors = safetensors.torch.load_file(tmp_path / name / "model.safetensors")
        tensors["encoder.layers.0.attention.k_proj.bias"] += number
        (tmp_path / name / "model.safetensors").unlink()
        torch.save(tensors, tmp_path / name / "pytorch_model.bin")
        (tmp_path / name).rename(place)
    hashes = {name: load(name).weights_hash for name in NAMED}
    assert len(set(hashes.values())) == len(NAMED)
    for name, (repository, folder) in NAMED.items():
        snapshot = cache / f"models--{repository.replace('/', '--')}" / "snapshots" / EMBEDDERS[name].revision
        assert load(snapshot / folder).weights_hash == hashes[name]
        assert load(name).name == name


def test_a_folder_with_published_weights_has_their_name(
    tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """By the digest of its file, or by what the hub's cache holds; nothing is fetched."""
    folder = tmp_path / "mine"
    make_ssl_folder(folder, "Hubert", num_layers=2)
    own = EmbedderId(str(folder), load(folder).weights_hash, EmbedderMix((1,), 0.5))
    assert published(own) == own
    assert published(EmbedderId("mfcc", "00ff")).name == "mfcc"
    assert published(EmbedderId("custom", "")).name == "custom"  # an import: of unknown weights

    spec = EMBEDDERS["spin"]
    place = cache / f"models--{spec.repository.replace('/', '--')}" / "snapshots" / spec.revision / spec.folder
    place.mkdir(parents=True)
    torch.save(safetensors.torch.load_file(folder / "model.safetensors"), place / "pytorch_model.bin")
    with caplog.at_level("INFO"):
        assert published(own) == EmbedderId("spin", own.hash, own.mix)
    assert f"the encoder {folder} is spin by its weights" in caplog.text
    (place / "pytorch_model.bin").write_bytes(b"damaged")
    assert published(own) == own

    digest = hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()
    monkeypatch.setitem(EMBEDDERS, "contentvec", EMBEDDERS["contentvec"]._replace(sha256=digest))
    assert published(own) == EmbedderId("contentvec", own.hash, own.mix)


@pytest.mark.usefixtures("cache")
def test_without_files_the_error_says_what_to_do(tmp_path: Path) -> None:
    for name, (repository, folder) in {**NAMED, "some/encoder": ("some/encoder", "")}.items():
        with pytest.raises(StageError) as caught:
            load(name)
        message = str(caught.value)
        for part in (name, repository, folder, str(tmp_path), "HF_HUB_OFFLINE", "--extract.embedder_model FOLDER"):
            assert part in message
        assert "or say --extract.embedder_model mfcc" in message
        assert ("of IAHispano/Applio (folder Resources/embedders/" in message) is bool(folder)
    with pytest.raises(StageError, match="/no/such/folder is no folder"):
        load("/no/such/folder")
