"""What only a CUDA device shows of encoders, trackers and faiss. Skipped where there is none."""

from __future__ import annotations

from pathlib import Path

import pytest
import soundfile
import torch
from helpers import make_ssl_folder, make_whisper_folder, narrow_recipe, workspace_of, write_features

import rvc_dist
from rvc_dist.config import ExtractConfig, IndexConfig
from rvc_dist.features import index
from rvc_dist.features.content import load_embedder
from rvc_dist.features.f0 import load_f0
from rvc_dist.features.precision import check_device
from rvc_dist.features.rmvpe import RMVPE
from rvc_dist.workspace import Shard, StageError, read_json

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
CPU, CUDA = torch.device("cpu"), torch.device("cuda", 0)
SPEECH = Path(rvc_dist.__file__).parent / "demo_voice" / "voice" / "000.flac"
each_precision = pytest.mark.parametrize(("name", "tolerance"), [("fp32", 5e-3), ("bf16", 5e-2), ("fp16", 5e-3)])


def speech(seconds: float) -> torch.Tensor:
    return torch.from_numpy(soundfile.read(SPEECH, dtype="float32", frames=int(16000 * seconds))[0])


def skip_without(name: str) -> None:
    try:
        check_device(name, CUDA)
    except StageError as error:
        pytest.skip(str(error))


@each_precision
@pytest.mark.parametrize("kind", ["Hubert", "Wav2Vec2", "WavLM", "Whisper"])
def test_encoders(tmp_path: Path, kind: str, name: str, tolerance: float) -> None:
    skip_without(name)
    if kind == "Whisper":
        make_whisper_folder(tmp_path / "enc", whole=False)
    else:
        make_ssl_folder(tmp_path / "enc", kind)
    waves = speech(2.0).reshape(2, 16000)
    wanted = load_embedder(ExtractConfig(embedder_model=str(tmp_path / "enc")), "v2", CPU)(waves)
    embedder = load_embedder(ExtractConfig(embedder_model=str(tmp_path / "enc"), precision=name), "v2", CUDA)
    found = embedder(waves)
    assert found.device == CUDA
    assert float((found.cpu() - wanted).norm() / wanted.norm()) < tolerance
    assert torch.equal(embedder(waves), found)


@each_precision
@pytest.mark.parametrize("method", ["rmvpe", "crepe-tiny", "swipe", "hybrid[swipe+yin]"])
def test_trackers(tmp_path: Path, method: str, name: str, tolerance: float) -> None:
    skip_without(name)
    torch.manual_seed(0)
    torch.save(RMVPE().state_dict(), tmp_path / "rmvpe.pt")
    if method == "crepe-tiny":
        pytest.importorskip("torchcrepe")
    config = ExtractConfig(f0_method=method, f0_model=str(tmp_path / "rmvpe.pt"), f0_max=2000.0)
    waves = torch.stack([*speech(2.0).reshape(2, 16000), torch.zeros(16000)])
    wanted = load_f0(config, CPU)(waves)
    tracker = load_f0(ExtractConfig(**(vars(config) | {"precision": name})), CUDA)
    found = tracker(waves).cpu()
    assert ((found > 0) == (wanted > 0)).float().mean() > 0.95
    both = (found > 0) & (wanted > 0)
    assert (found[both] / wanted[both]).log2().abs().median() < tolerance
    assert torch.equal(tracker(waves).cpu(), found)


def test_faiss_on_gpus_finds_as_much(tmp_path: Path) -> None:
    faiss = pytest.importorskip("faiss")
    if not hasattr(faiss, "StandardGpuResources"):
        pytest.skip("faiss is built for CPUs")
    assert index._has_gpus()
    recipe = narrow_recipe(tmp_path, index=IndexConfig(algorithm="kmeans"))
    vectors = torch.randn(500, 24, generator=torch.Generator().manual_seed(0)).numpy()
    write_features(recipe, [[vectors]])
    index.run(recipe, Shard())
    assert read_json(workspace_of(recipe).index_report_file)["recall"] > 0.8
