"""The sampler, the alignment of features to frames, and batches."""

import time

import numpy as np
import pytest
import torch

from rvc_dist.config import RATES
from rvc_dist.data import (
    BucketBatchSampler,
    collate,
    covered_frames,
    feature_frames,
    held_out_sources,
)


def speech_lengths(count: int) -> list[int]:
    """Frames of clips as preprocessing cuts them: mostly 3 s, the rest anything above half a second."""
    rng = np.random.default_rng(0)
    return [298 if rng.random() < 0.6 else int(rng.integers(50, 330)) for _ in range(count)]


def parts(lengths: list[int], batch_size: int, num_ranks: int, epoch: int = 0) -> list[list]:
    """plans[step][rank] of one epoch."""
    samplers = [BucketBatchSampler(lengths, batch_size, num_ranks, r, seed=7) for r in range(num_ranks)]
    batches = samplers[0].global_batches(epoch)
    return [[s.part(clips, epoch) for s in samplers] for clips in batches]


@pytest.mark.parametrize("num_ranks", [1, 3, 8, 64])
@pytest.mark.parametrize("count", [7, 252, 1000])
def test_every_clip_is_seen_exactly_once_an_epoch_on_any_number_of_ranks(num_ranks, count):
    seen = [c for step in parts(speech_lengths(count), 8, num_ranks) for p in step if p.share > 0 for c in p.clips]
    assert sorted(seen) == list(range(count))


def test_all_ranks_have_the_same_shape_and_their_shares_sum_to_the_ranks():
    for step in parts(speech_lengths(252), 8, 8):
        assert len({p.padded_frames for p in step}) == 1
        assert len({p.mean_frames for p in step}) == 1
        assert sum(p.share for p in step) == pytest.approx(8)


def test_a_rank_without_clips_of_its_own_borrows_one_that_counts_for_nothing():
    (step,) = parts([100, 100, 100], 1, 4)
    assert [p.share for p in step] == [pytest.approx(4 / 3)] * 3 + [0.0]
    assert len(step[3].clips) == 1


def test_mean_frames_is_the_global_count_over_the_ranks():
    (step,) = parts([60, 70, 80, 90], 2, 2)
    assert [p.mean_frames for p in step] == [150.0, 150.0]
    assert [p.share for p in step] == [1.0, 1.0]


def test_only_one_batch_an_epoch_is_short_and_shapes_are_bounded():
    lengths = speech_lengths(1003)
    sampler = BucketBatchSampler(lengths, 4, 2, 0, seed=1)
    batches = sampler.global_batches(0)
    assert len(batches) == sampler.steps_per_epoch == -(-1003 // 8)
    assert sorted(len(b) for b in batches)[:2] == [1003 % 8, 8]
    assert {sampler.part(b, 0).padded_frames for b in batches} <= {50, 100, 150, 200, 250, 300, 350}


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
    sampler.start_at(1, 2)
    stream = iter(sampler)
    assert [next(stream) for _ in range(10)] == whole[sampler.steps_per_epoch + 2 :][:10]


def test_a_million_clips_on_a_thousand_ranks_are_planned_in_seconds():
    lengths = speech_lengths(1000) * 1000
    began_at = time.monotonic()
    sampler = BucketBatchSampler(lengths, 4, 1024, 1000, seed=1)
    batches = sampler.global_batches(0)
    sampler.part(batches[0], 0)
    assert time.monotonic() - began_at < 10
    assert sum(len(b) for b in batches) == 1_000_000


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


def test_holdout_is_by_source_and_never_everything():
    sources = {f"{i}.wav" for i in range(40)}
    kept_out = held_out_sources(sources, 0.1, 1)
    assert len(kept_out) == 4
    assert kept_out < sources
    assert held_out_sources(sources, 0.1, 1) == kept_out
    assert held_out_sources({"a.wav", "b.wav"}, 0.05, 1) < {"a.wav", "b.wav"}
    assert held_out_sources({"a.wav"}, 0.5, 1) == set()
    assert held_out_sources(sources, 0.0, 1) == set()


def test_collate_pads_with_zeros():
    clips = [(torch.ones(6), torch.ones(3, 2), torch.ones(3), 0), (torch.ones(4), torch.ones(2, 2), torch.ones(2), 5)]
    batch = collate(clips, padded_frames=4, share=1.0, mean_frames=2.5, hop=2)
    assert batch.wave.shape == (2, 1, 8)
    assert batch.content.shape == (2, 4, 2)
    assert batch.wave.sum() == 10
    assert batch.content[1, 2:].abs().sum() == 0
    assert batch.lengths.tolist() == [3, 2]
    assert batch.speaker.tolist() == [0, 5]
    assert batch.to(torch.device("cpu")).mean_frames == 2.5
