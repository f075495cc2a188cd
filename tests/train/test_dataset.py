"""The sampler, the alignment of features to frames, and batches."""

import subprocess
import sys
import time
import tracemalloc
from dataclasses import replace

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
    BucketBatchSampler,
    CachedClips,
    ClipData,
    ClipDataset,
    ClipTable,
    MicroBatchSpec,
    cached_bytes,
    collate,
    covered_frames,
    feature_frames,
    make_dataset,
)
from rvc_dist.workspace import save_arrays


def speech_lengths(count: int) -> list[int]:
    """Frames of clips as preprocessing cuts them: mostly 3 s, the rest anything above half a second."""
    rng = np.random.default_rng(0)
    return [298 if rng.random() < 0.6 else int(rng.integers(50, 330)) for _ in range(count)]


def parts(lengths: list[int], batch_size: int, num_ranks: int, accum_steps: int = 1, kept: int | None = None) -> list:
    """plans[step][rank * micro-batch] of one epoch."""
    samplers = [BucketBatchSampler(lengths, batch_size, num_ranks, r, 7, accum_steps, kept) for r in range(num_ranks)]
    batches = samplers[0].global_batches(0)
    return [[plan for s in samplers for plan in s.rank_batches(clips, 0)] for clips in batches]


@pytest.mark.parametrize(("num_ranks", "accum_steps"), [(1, 1), (3, 1), (8, 1), (2, 3), (64, 1), (64, 2), (1024, 1)])
@pytest.mark.parametrize("count", [7, 252, 1000])
def test_every_clip_is_seen_exactly_once_an_epoch_on_any_number_of_ranks(num_ranks, accum_steps, count):
    steps = parts(speech_lengths(count), 8, num_ranks, accum_steps)
    assert sorted(c for step in steps for p in step if p.loss_scale > 0 for c in p.clips) == list(range(count))
    for step in steps:
        assert sum(p.loss_scale for p in step) == pytest.approx(num_ranks), (
            "the mean over ranks is that of the global batch"
        )
        assert len(step) % num_ranks == 0, "every rank has as many micro-batches"
        assert max(len(p.clips) for p in step) <= 8
    borrowed = sum(p.loss_scale == 0 for step in steps for p in step)
    assert borrowed == BucketBatchSampler(speech_lengths(count), 8, num_ranks, 0, 7, accum_steps).num_padding_clips


def test_a_global_batch_that_is_kept_has_the_same_clips_on_any_number_of_ranks():
    """Of 8 clips a step: two micro-batches on one rank; 3, 3 and 2 clips on three; on ten, two ranks have none."""
    lengths = speech_lengths(252)
    clips = {}
    for ranks, sizes in {1: (4, 4), 2: (4, 4), 3: (3, 3, 2), 4: (2,) * 4, 10: (1,) * 10}.items():
        steps = parts(lengths, 4, ranks, kept=8)
        assert [len(p.clips) for p in steps[0]] == list(sizes)
        clips[ranks] = [sorted(c for p in step if p.loss_scale > 0 for c in p.clips) for step in steps]
        assert all(sum(p.loss_scale for p in step) == pytest.approx(ranks) for step in steps)
        borrowed = sum(p.loss_scale == 0 for step in steps for p in step)
        sampler = BucketBatchSampler(lengths, 4, ranks, 0, 7, global_batch_size=8)
        assert sampler.num_padding_clips == borrowed
        assert sampler.steps_per_epoch == len(steps) == 32
    assert all(of == clips[1] for of in clips.values())


def test_eight_ranks_compute_less_than_a_twentieth_of_a_small_epoch_for_nothing():
    """252 clips are ten minutes of speech; samplers that fill up by repeating clips repeat half of them and more."""
    for batch_size in (1, 2, 4, 8):
        sampler = BucketBatchSampler(speech_lengths(252), batch_size, 8, 0, seed=7)
        assert sampler.num_padding_clips / 252 < 0.05


def test_an_epoch_goes_on_with_the_clips_left_on_another_number_of_ranks():
    lengths = speech_lengths(252)
    before, after = (BucketBatchSampler(lengths, 4, ranks, 0, seed=7) for ranks in (2, 3))
    seen = [c for clips in before.global_batches(5)[:10] for c in clips.tolist()]
    first = after.global_batches(5, batches_done=[(8, 10)])
    assert sorted(seen + [c for clips in first for c in clips.tolist()]) == list(range(252))
    # It stops again after four steps of 12, and goes on as it would have, or on 2 ranks with what is left then.
    rest = after.global_batches(5, batches_done=[(8, 10), (12, 4)])
    assert [c.tolist() for c in rest] == [c.tolist() for c in first[4:]]
    seen += [c for clips in first[:4] for c in clips.tolist()]
    again = before.global_batches(5, batches_done=[(8, 10), (12, 4)])
    assert sorted(seen + [c for clips in again for c in clips.tolist()]) == list(range(252))
    assert sum(len(c) != 8 for c in again) <= 1


def test_all_ranks_have_the_same_shape():
    for step in parts(speech_lengths(252), 8, 8):
        assert len({p.padded_frames for p in step}) == 1
        assert len({p.mean_frames for p in step}) == 1


def test_a_rank_without_clips_of_its_own_borrows_one_that_counts_for_nothing():
    (step,) = parts([100, 100, 100], 1, 4)
    assert [p.loss_scale for p in step] == [pytest.approx(4 / 3)] * 3 + [0.0]
    assert len(step[3].clips) == 1


def test_mean_frames_is_the_global_count_over_the_ranks():
    (step,) = parts([60, 70, 80, 90], 2, 2)
    assert [p.mean_frames for p in step] == [150.0, 150.0]
    assert [p.loss_scale for p in step] == [1.0, 1.0]


def test_only_one_batch_an_epoch_is_short_and_shapes_are_bounded():
    lengths = speech_lengths(1003)
    sampler = BucketBatchSampler(lengths, 4, 2, 0, seed=1)
    batches = sampler.global_batches(0)
    assert len(batches) == sampler.steps_per_epoch == -(-1003 // 8)
    assert sorted(len(b) for b in batches)[:2] == [1003 % 8, 8]
    assert {plan.padded_frames for b in batches for plan in sampler.rank_batches(b, 0)} <= {
        50,
        100,
        150,
        200,
        250,
        300,
        350,
    }


def test_epochs_differ_and_are_reproducible():
    sampler = BucketBatchSampler(speech_lengths(100), 4, 1, 0, seed=1)
    again = BucketBatchSampler(speech_lengths(100), 4, 1, 0, seed=1)
    first, second = ([b.tolist() for b in sampler.global_batches(e)] for e in (0, 1))
    assert first != second
    assert first == [b.tolist() for b in again.global_batches(0)]
    other_seed = BucketBatchSampler(speech_lengths(100), 4, 1, 0, seed=2)
    assert first != [b.tolist() for b in other_seed.global_batches(0)]


def test_iteration_continues_where_it_is_told_to():
    sampler = BucketBatchSampler(speech_lengths(50), 4, 2, 1, seed=3)
    stream = iter(sampler)
    whole = [next(stream) for _ in range(30)]
    sampler.start_at(1, [(8, 2)])
    stream = iter(sampler)
    assert [next(stream) for _ in range(10)] == whole[sampler.steps_per_epoch + 2 :][:10]


@pytest.mark.alone
def test_a_million_clips_on_a_thousand_ranks_are_planned_in_seconds_and_in_the_same_memory():
    lengths = speech_lengths(1000) * 1000
    peaks = {}
    for num_ranks in (1, 1024):
        began_at = time.monotonic()
        tracemalloc.start()
        sampler = BucketBatchSampler(lengths, 4, num_ranks, num_ranks - 1, seed=1)
        batches = sampler.global_batches(0)
        sampler.rank_batches(batches[0], 0)
        peaks[num_ranks] = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert time.monotonic() - began_at < 10
        assert sum(len(b) for b in batches) == 1_000_000
    assert peaks[1024] <= peaks[1] < 250e6


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
    monkeypatch.setattr(loader, "WORKERS_S", 0.2)
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
