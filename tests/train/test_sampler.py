"""The sampler: each clip once an epoch, or each speaker's share, on any number of ranks, from any place on."""

import time
import tracemalloc
from itertools import pairwise

import numpy as np
import pytest

from rvc_dist.train.clips import MUTE
from rvc_dist.train.progress import Progress
from rvc_dist.train.sampler import BucketBatchSampler, Sampling


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


def test_a_million_clips_on_a_thousand_ranks_are_planned_in_seconds_and_in_the_same_memory():
    lengths = speech_lengths(1000) * 1000
    peaks = {}
    for num_ranks in (1, 1024):
        began_at = time.process_time()
        tracemalloc.start()
        sampler = BucketBatchSampler(lengths, 4, num_ranks, num_ranks - 1, seed=1)
        batches = sampler.global_batches(0)
        sampler.rank_batches(batches[0], 0)
        peaks[num_ranks] = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert time.process_time() - began_at < 10
        assert sum(len(b) for b in batches) == 1_000_000
    assert peaks[1024] <= peaks[1] < 250e6


def shares(counts: list[int], balance: float, epochs: int) -> np.ndarray:
    """turns[epoch, clip] of speakers of so many clips."""
    speakers = np.repeat(np.arange(len(counts)), counts)
    sampler = BucketBatchSampler([100] * len(speakers), 4, 1, 0, 7, 1, None, Sampling(balance), speakers)
    every = [np.concatenate(sampler.global_batches(e)) for e in range(epochs)]
    assert all(len(set(draws.tolist())) == len(speakers) for draws in every), "each draw once"
    return np.array([np.bincount(draws % len(speakers), minlength=len(speakers)) for draws in every])


def test_speakers_are_equal_by_hand():
    """Twelve turns of three speakers are four each, whoever has one clip, three or eight."""
    turns = shares([1, 3, 8], 1.0, 6)
    assert [row.tolist() for row in np.add.reduceat(turns, [0, 1, 4], axis=1)] == [[4, 4, 4]] * 6
    assert turns[:, 0].tolist() == [4] * 6
    assert turns[:, 1:4].sum(axis=0).tolist() == [8] * 3
    assert turns[:2, 4:].sum(axis=0).tolist() == [1] * 8, "all eight before any has a second turn"


def test_a_balance_between_by_hand():
    """Four clips weigh 2, one clip 1, nine 3: of fourteen turns 4 2/3, 2 1/3 and 7, rounded over the epochs."""
    turns = np.add.reduceat(shares([4, 1, 9], 0.5, 6), [0, 4, 5], axis=1)
    assert turns[:3].sum(axis=0).tolist() == turns[3:].sum(axis=0).tolist() == [14, 7, 21]
    assert turns.sum(axis=1).tolist() == [14] * 6


def test_shares_are_exact_over_epochs_and_no_clip_of_a_speaker_is_two_turns_ahead():
    rng = np.random.default_rng(3)
    for _ in range(12):
        counts = rng.integers(1, 40, rng.integers(1, 12)).tolist()
        balance = float(rng.choice([0.1, 0.37, 0.5, 0.9, 1.0]))
        so_far = np.cumsum(shares(counts, balance, 9), axis=0)
        weights = np.array(counts) ** (1 - balance)
        wanted = sum(counts) * weights / weights.sum()
        starts = np.cumsum([0, *counts[:-1]])
        for epoch, turns in enumerate(so_far, 1):
            of_speakers = np.add.reduceat(turns, starts)
            assert np.abs(of_speakers - epoch * wanted).max() < 1 + 1e-6
            spread = np.maximum.reduceat(turns, starts) - np.minimum.reduceat(turns, starts)
            assert spread.max() <= 1, (counts, balance, epoch)


def test_silent_clips_are_heard_once_and_repeated_ones_share_their_speakers_turns():
    """Speaker 0 has clip 0 twice in the list (Name_ID_Repeat) and clip 2; speaker 1 one clip; two are silent."""
    speakers = np.array([0, 0, 0, 1, -1, -1])
    sampler = BucketBatchSampler([100] * 6, 2, 1, 0, 7, 1, None, Sampling(1.0), speakers)
    turns = sum(np.bincount(np.concatenate(sampler.global_batches(e)) % 6, minlength=6) for e in range(3))
    assert turns.tolist() == [2, 2, 2, 6, 3, 3]


def random_clips(rng: np.random.Generator) -> dict:
    """What samplers of all ranks are told, of any shape."""
    count = int(rng.integers(1, 300))
    units = rng.integers(0, rng.integers(1, 30), count)
    speakers = units % rng.integers(1, 6)
    if count > 5:
        units[-3:], speakers[-3:] = MUTE, -1
    sampling = Sampling(float(rng.choice([0.0, 0.3, 1.0])), int(rng.choice([0, 0, 1, 2000, 20_000, 10**6])))
    lengths = rng.integers(38, 1200, count)
    return {"lengths": lengths, "sampling": sampling, "speakers": speakers, "units": units, "seed": 5}


def test_each_draw_is_seen_once_whatever_the_ranks_are_and_wherever_they_change():
    """Any shape, balance and window; ranks, batch size and accumulation change up to three times within the epoch."""
    rng = np.random.default_rng(11)
    for _ in range(60):
        told, epoch, seen = random_clips(rng), int(rng.integers(3)), []
        count, place = len(told["lengths"]), Progress(epoch=epoch)
        for is_last in (False, False, False, True):
            ranks, size, accum = int(rng.choice([1, 2, 3, 8])), int(rng.integers(1, 6)), int(rng.integers(1, 3))
            samplers = [
                BucketBatchSampler(**told, batch_size=size, num_ranks=ranks, rank=rank, accum_steps=accum)
                for rank in range(ranks)
            ]
            full = samplers[0].global_batch_size
            plans = [[b.tolist() for b in s.global_batches(epoch, place.batches_done)] for s in samplers]
            assert all(plan == plans[0] for plan in plans)
            assert sum(map(len, plans[0])) == count - len(seen), "of the epoch all that is left"
            assert sum(len(step) != full for step in plans[0]) <= 1, "one batch is short at most"
            taken = plans[0] if is_last else plans[0][: int(rng.integers(len(plans[0]) + 1))]
            for step in taken:
                dealt = [spec for s in samplers for spec in s.rank_batches(np.array(step), epoch) if spec.loss_scale]
                assert sorted(c for spec in dealt for c in spec.clips) == sorted(step)
                place = place.advanced(full, epoch_ends=False)
            seen += [clip for step in taken for clip in step]
            again = [b.tolist() for b in samplers[0].global_batches(epoch, place.batches_done)]
            assert again == plans[0][len(taken) :], "on as many ranks it goes on as it would have"
        assert len(seen) == len(set(seen)) == count
        if not told["sampling"].balance:
            assert sorted(seen) == list(range(count))


@pytest.mark.parametrize("balance", [0.0, 0.6])
def test_a_window_reads_its_units_alone_and_a_unit_is_in_two_windows_at_most(balance):
    """40 units of about 7,500 frames each in windows of 50,000; a global batch of 16 clips."""
    units = np.repeat(np.arange(100, 140), 30)
    told = {
        "lengths": speech_lengths(1200),
        "sampling": Sampling(balance, 50_000),
        "speakers": units // 20,
        "units": units,
    }
    sampler = BucketBatchSampler(**told, batch_size=4, num_ranks=4, rank=1, seed=3)
    for epoch, done in ((0, []), (1, []), (1, [(16, 20)]), (1, [(16, 20), (24, 11)])):
        batches, windows = sampler.global_batches(epoch, done), sampler.windows(epoch, done)
        assert [w.first for w in windows] == [0, *(w.end for w in windows[:-1])]
        assert windows[-1].end == len(batches)
        places: dict[int, list[int]] = {}
        for number, window in enumerate(windows):
            read = units[np.concatenate(batches[window.first : window.end]) % 1200]
            assert list(dict.fromkeys(read.tolist())) == list(window.units), "in the order of first use"
            for unit in window.units:
                places.setdefault(unit, []).append(number)
        assert all(len(at) == 1 or (len(at) == 2 and at[1] == at[0] + 1) for at in places.values())
        assert 4 <= len(windows) <= 8
        for one, two in pairwise(windows):
            assert len(set(one.units) & set(two.units)) < 16, "fewer than a global batch wait for the next"
    first, second = ([w.units for w in sampler.windows(e)] for e in (0, 1))
    assert first != second


def test_windows_hang_on_no_number_of_ranks():
    units = np.repeat(np.arange(50), 20)
    kept = []
    for ranks in (1, 2, 3, 8, 1024):
        sampler = BucketBatchSampler([100] * 1000, 1, ranks, 0, 9, 1, None, Sampling(0.0, 10_000), None, units)
        order, windows = sampler._shuffled(4)
        kept.append((order.tolist(), windows.tolist()))
        assert sorted(np.concatenate(sampler.global_batches(4)).tolist()) == list(range(1000))
    assert all(k == kept[0] for k in kept)
    assert max(kept[0][1]) == 9, "of five units each"


def test_the_windows_of_a_shuffled_order_are_one():
    sampler = BucketBatchSampler([100] * 6, 2, 1, 0, 1, units=np.array([4, 4, 9, 9, MUTE, MUTE]))
    ((units, first, end),) = sampler.windows(0)
    assert (sorted(units), first, end) == ([4, 9], 0, 3)


@pytest.mark.parametrize("sampling", [Sampling(), Sampling(0.5), Sampling(0.0, 200_000), Sampling(1.0, 200_000)])
def test_a_hundred_thousand_clips_of_two_thousand_speakers_on_a_thousand_ranks(sampling):
    """Every rank's part is its own, and together they are all; a place within an epoch takes seconds."""
    rng = np.random.default_rng(0)
    speakers = np.sort(np.minimum(rng.pareto(1.0, 100_000) * 100, 1999).astype(np.int64))
    lengths, units = speech_lengths(1000) * 100, np.arange(100_000) // 200
    began_s = time.process_time()
    sampler = BucketBatchSampler(lengths, 4, 1024, 0, 3, 1, None, sampling, speakers, units)
    batches = sampler.global_batches(2, [(2000, 7), (500, 9)])
    assert sum(map(len, batches)) == 100_000 - 7 * 2000 - 9 * 500
    assert time.process_time() - began_s < 10
    for step in (batches[0], batches[-1]):
        dealt = []
        for rank in range(1024):
            sampler.rank = rank
            dealt += [c for spec in sampler.rank_batches(step, 2) if spec.loss_scale for c in spec.clips]
        assert sorted(dealt) == sorted(step.tolist())
