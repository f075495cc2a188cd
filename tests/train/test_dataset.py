"""The sampler, the alignment of features to frames, and batches."""

import signal
import subprocess
import sys
import time
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import psutil
import pytest
import torch
import torch.nn.functional as F
from helpers import EMBEDDER, WIDTH, make_features, tiny_recipe, with_train, workspace_of

from rvc_dist.config import RATES, RateSpec
from rvc_dist.models.spectral import spectrogram_with_reach
from rvc_dist.train import loader
from rvc_dist.train.dataset import (
    CachedClips,
    ClipData,
    ClipDataset,
    ClipTable,
    cached_bytes,
    collate,
    covered_frames,
    feature_frames,
    make_dataset,
)
from rvc_dist.train.sampler import BucketBatchSampler, MicroBatchSpec
from rvc_dist.workspace import save_arrays


@pytest.mark.parametrize("rate", RATES["v2"])
def test_features_follow_the_spectrogram_in_time(rate):
    hop = RATES["v2"][rate].hop
    frames = feature_frames(200, rate, hop, 50)
    seconds = torch.arange(200, dtype=torch.float64) * hop / rate
    assert torch.equal(frames, (seconds * 50 + 1e-6).floor().long())
    if rate != 44100:
        assert torch.equal(frames, torch.arange(200) // 2)
        assert torch.equal(feature_frames(200, rate, hop, 100), torch.arange(200))


@pytest.mark.parametrize("rate", RATES["v2"])
def test_covered_frames_is_the_most_that_all_three_reach(rate):
    hop = RATES["v2"][rate].hop
    num_samples, num_content, num_f0 = 3 * rate, 149, 300
    frames = covered_frames(rate, hop, num_samples, num_content, num_f0)
    assert feature_frames(frames, rate, hop, 50)[-1] < num_content
    assert feature_frames(frames, rate, hop, 100)[-1] < num_f0
    assert frames * hop <= num_samples
    one_more = feature_frames(frames + 1, rate, hop, 50)[-1] >= num_content
    assert one_more or (frames + 1) * hop > num_samples or feature_frames(frames + 1, rate, hop, 100)[-1] >= num_f0


def test_collate_pads_with_zeros():
    spec = RATES["v2"][24000]
    clips = [
        ClipData(torch.ones(n * spec.hop + 2 * spec.reach), torch.ones(n, 2), torch.ones(n), speaker)
        for n, speaker in ((3, 0), (2, 5))
    ]
    plan = MicroBatchSpec(clips=(7, 3), epoch=0, padded_frames=4, loss_scale=1.0, mean_frames=2.5)
    batch = collate(clips, plan, spec, seeds=(70, 30))
    assert batch.wave.shape == (2, 1, 4 * spec.hop)
    assert batch.content.shape == (2, 4, 2)
    assert batch.wave_with_reach.sum() == 5 * spec.hop + 4 * spec.reach
    assert batch.content[1, 2:].abs().sum() == 0
    assert batch.lengths.tolist() == [3, 2]
    assert batch.speaker.tolist() == [0, 5]
    assert batch.to(torch.device("cpu")).mean_frames == 2.5
    first = batch.first(1)
    assert (first.clips, first.seeds, first.lengths.tolist()) == ((7,), (70,), [3])


def test_a_clips_noise_is_its_own_and_another_one_each_epoch(tmp_path):
    recipe = tiny_recipe(tmp_path)
    make_features(recipe)
    dataset = ClipDataset(recipe, ClipTable.load(recipe).train)
    (one,) = dataset[(MicroBatchSpec((2,), 0, 100, 1.0, 1.0),)]
    (two,) = dataset[(MicroBatchSpec((1, 2), 0, 100, 1.0, 1.0),)]
    (later,) = dataset[(MicroBatchSpec((2,), 1, 100, 1.0, 1.0),)]
    assert one.seeds == two.seeds[1:]
    assert len({*two.seeds, *later.seeds}) == 3


def test_a_cached_dataset_gives_the_same_batches(tmp_path):
    recipe = tiny_recipe(tmp_path)
    make_features(recipe)
    table = ClipTable.load(recipe)
    plans = (MicroBatchSpec(tuple(range(len(table.train))), 0, 100, 1.0, 1.0),)
    (read,) = ClipDataset(recipe, table.train)[plans]
    (cached,) = CachedClips(recipe, table.train, torch.device("cpu"))[plans]
    for name in ("wave", "content", "f0", "lengths", "speaker"):
        assert torch.equal(getattr(read, name), getattr(cached, name))
    seconds = 24000 * 4 + 50 * 16 * 4 + 100 * 4
    frames = sum(c.num_frames for c in dict.fromkeys(table.train))
    beyond = 4 * recipe.rate_spec.reach * len(dict.fromkeys(table.train))
    assert cached_bytes(recipe, table.train, 16) == round(frames / 100 * seconds) + beyond


def test_units_are_read_where_they_are_said_to_be(tmp_path):
    """As from a cache of objects: the run folder has neither clips nor features then."""
    recipe, kept = tiny_recipe(tmp_path / "run"), tiny_recipe(tmp_path / "kept")
    make_features(recipe)
    table = ClipTable.load(recipe)
    plans = (MicroBatchSpec(tuple(range(len(table.train))), 0, 100, 1.0, 1.0),)
    (before,) = ClipDataset(recipe, table.train)[plans]
    (tmp_path / "run").rename(tmp_path / "kept")
    for dataset in (
        ClipDataset(recipe, table.train, workspace_of(kept)),
        make_dataset(with_train(recipe, cache_on_device=True), table, torch.device("cpu"), workspace_of(kept)),
    ):
        (moved,) = dataset[plans]
        assert torch.equal(moved.wave_with_reach, before.wave_with_reach)
        assert torch.equal(moved.content, before.content)


def whole_file_spectrogram(wave: torch.Tensor, spec: RateSpec) -> torch.Tensor:
    """As other tools of RVC take it of a file [S], before they cut it to the features: [F, T]."""
    padded = F.pad(wave[None], (spec.reach, spec.reach), mode="reflect")
    window = torch.hann_window(spec.n_fft)
    bins = torch.stft(padded, spec.n_fft, spec.hop, window=window, center=False, return_complex=True)
    return (bins[0].abs().square() + 1e-6).sqrt()


@pytest.mark.parametrize("kind", [ClipDataset, CachedClips])
@pytest.mark.parametrize("rate", RATES["v2"])
def test_a_clips_spectrogram_is_the_whole_files_cut_to_its_frames(tmp_path, rate, kind):
    """149 content frames for 3.0 s, samples beyond the last hop or none, and a clip of which a part is shown."""
    recipe = tiny_recipe(tmp_path)
    recipe = replace(recipe, data=replace(recipe.data, sample_rate=rate, holdout=0.0))
    work, spec, rng = workspace_of(recipe), recipe.rate_spec, np.random.default_rng(1)
    make_features(recipe, num_clips=1)
    lengths = [(3 * rate, 149), (3 * rate + 77, 149), (3 * rate + 77, 150), (300 * spec.hop, 160), (12 * rate, 599)]
    waves = {f"{i:05d}": rng.normal(0, 0.3, n).astype(np.float32) for i, (n, _) in enumerate(lengths)}
    arrays, clips = {}, []
    for i, (num_samples, num_content) in enumerate(lengths):
        arrays[f"{i:05d}.content"] = np.zeros((num_content, 16), np.float32)
        arrays[f"{i:05d}.f0"] = np.zeros(2 * num_content, np.float32)
        sizes = {"num_samples": num_samples, "num_content": num_content, "num_f0": 2 * num_content}
        clips.append({"speaker": 0, "source": f"{i}.wav", "start_s": 0.0} | sizes)
    header = {"stamp": "", "sample_rate": rate, "clips": clips, "embedder": EMBEDDER | {"width": WIDTH}}
    save_arrays(work.clips_file(0), waves, header)
    save_arrays(work.features_file(0), arrays, header)
    table = ClipTable.load(recipe)
    dataset = kind(recipe, table.train, *([torch.device("cpu")] if kind is CachedClips else []))
    firsts = set()
    for number, clip in enumerate(table.train[:5]):
        whole = whole_file_spectrogram(torch.from_numpy(waves[clip.key]), spec)
        for epoch in (0, 1):
            first = dataset._first_frame(number, epoch)
            batch = dataset.read_batch(MicroBatchSpec((number,), epoch, 900, 1.0, 1.0))
            last = first + int(batch.lengths)
            firsts.add(first)
            ours = spectrogram_with_reach(batch.wave_with_reach[0], spec.n_fft, spec.hop)[0, :, : last - first]
            torch.testing.assert_close(ours, whole[:, first:last], rtol=1e-5, atol=1e-5)
            samples = torch.from_numpy(waves[clip.key])[first * spec.hop : last * spec.hop]
            assert torch.equal(batch.wave[0, 0, : len(samples)], samples)
    assert len(firsts) == 3, "the long clip begins elsewhere in each epoch"


SIGNALLER = """
import os, signal, sys
for number in 3 * (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
    os.kill(int(sys.argv[1]), number)
"""


@pytest.mark.parametrize("stuck", [False, True])
def test_loader_processes_outlive_what_stops_a_rank_but_not_the_loader(tmp_path, monkeypatch, stuck):
    """A launcher's signals come from another process, and more than once."""
    monkeypatch.setattr(loader, "WORKERS_S", 1.0)
    if stuck:
        monkeypatch.setattr(ClipDataset, "read_batch", lambda *_: time.sleep(60))
    recipe = tiny_recipe(tmp_path)
    make_features(recipe)
    table = ClipTable.load(recipe)
    sampler = BucketBatchSampler([c.num_frames for c in table.train], 2, 1, 0, 7)
    settings = {"num_workers": 1, "prefetch_factor": 2, "persistent_workers": True}
    before = set(psutil.Process().children())
    steps = iter(loader.make_loader(ClipDataset(recipe, table.train), sampler, settings))
    (worker,) = set(psutil.Process().children()) - before
    if not stuck:
        next(steps)
        subprocess.run([sys.executable, "-c", SIGNALLER, str(worker.pid)], check=True)
        assert len([next(steps) for _ in range(10)]) == 10
    assert loader.end_loader(steps) == []
    assert not worker.is_running()


@pytest.mark.parametrize("ends", [True, False])
def test_pytorch_hears_of_a_loader_process_again_once_it_has_ended(monkeypatch, ends):
    """One that hangs in the kernel outlives a SIGKILL, and its end is no fault of what the rank does by then."""
    monkeypatch.setattr(loader, "WORKERS_S", 0.01)
    worker = SimpleNamespace(exitcode=None, join=lambda _: None)
    worker.kill = lambda: setattr(worker, "exitcode", -9 if ends else None)
    loaded = SimpleNamespace(_workers=[worker], _shutdown_workers=lambda: time.sleep(0.1))

    def handler(*_: object) -> None: ...

    before = signal.signal(signal.SIGCHLD, handler)
    try:
        assert loader.end_loader(loaded) == []
        assert signal.getsignal(signal.SIGCHLD) == (handler if ends else signal.SIG_DFL)
    finally:
        signal.signal(signal.SIGCHLD, before)
