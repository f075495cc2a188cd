"""What is held out: a share of each speaker's seconds, at the ends of recordings, nothing of it in training."""

import json
import logging
import random
from dataclasses import replace

import numpy as np
import pytest
from helpers import tiny_recipe

from rvc_dist.train.clips import MUTE_SOURCE, ClipRef
from rvc_dist.train.dataset import ClipTable
from rvc_dist.train.holdout import SpeakerShare, choice, evenly, hold_out, report, settled_by

SHARE, SEED = 0.05, 1234


def cut(name: str, seconds: float, speaker: int = 0) -> list[ClipRef]:
    """As the Automatic cut does: at silences every 2 to 14 s, then in windows of 3 s that overlap by 0.3 s."""
    rng, at, spans = random.Random(name), 0.0, []
    while seconds - at > 0.5:
        length, start = min(rng.uniform(2, 14), seconds - at), 0.0
        while length - start > 3.3:
            spans.append((at + start, 3.0))
            start += 2.7
        spans.append((at + start, length - start))
        at += length
    refs = (ClipRef(0, f"{i:05d}", speaker, name, 298, start, n, name) for i, (start, n) in enumerate(spans))
    return [c for c in refs if c.duration_s >= 0.5]


def dataset(lengths: list[float], num_speakers: int = 1) -> list[ClipRef]:
    return [c for s in range(num_speakers) for i, n in enumerate(lengths) for c in cut(f"{s}/{i}.wav", n, speaker=s)]


def overlap(a: ClipRef, b: ClipRef) -> bool:
    same = (a.speaker, a.source) == (b.speaker, b.source)
    return same and min(a.start_s + a.duration_s, b.start_s + b.duration_s) - max(a.start_s, b.start_s) > 0.01


@pytest.mark.parametrize(
    ("lengths", "num_speakers"),
    [
        *[([600], 1), ([300] * 2, 1), ([200] * 3, 1), ([6.3] * 95, 1), ([240], 1), ([60], 1), ([18000], 1)],
        *[([6] * 16, 2), ([200], 2), ([60] * 3, 5), ([90], 20), ([30] * 4, 20)],
    ],
)
def test_each_speaker_gives_a_shard_of_their_seconds_and_nothing_of_it_is_trained_on(lengths, num_speakers):
    clips = dataset(lengths, num_speakers)
    held, lost, shares = hold_out(clips, SHARE, SEED)
    assert [s.speaker for s in shares] == list(range(num_speakers))
    for share in shares:
        own = [c for c in clips if c.speaker == share.speaker]
        assert share.total_s == pytest.approx(sum(c.duration_s for c in own))
        assert share.held_s == pytest.approx(sum(c.duration_s for c in own if c in held))
        assert share.lost_s == pytest.approx(sum(c.duration_s for c in own if c in lost))
        assert share.held <= 0.1 + 1e-9
        assert share.held_s >= min(7.5, 0.05 * share.total_s), "about 10 s, where that is no more than a tenth"
        assert share.lost_s <= share.held_s + 0.01
    for source in {c.source for c in clips}:
        ordered = [c for c in clips if c.source == source]  # by start
        sides = "".join("h" if c in held else "l" if c in lost else "t" for c in ordered)
        assert sides == "t" * sides.count("t") + "l" * sides.count("l") + "h" * sides.count("h"), "one stretch"
        assert sides.count("l") <= 1, "a boundary loses a clip at most"
        kept = [c for c in ordered if c not in held and c not in lost]
        assert not any(overlap(a, b) for a in kept[-2:] for b in ordered if b in held)
    assert hold_out(random.Random(0).sample(clips, len(clips)), SHARE, SEED).clips == held, "in any order"
    if len(clips) > 200:
        assert 0.02 < sum(s.held_s for s in shares) / sum(s.total_s for s in shares) < 0.09


@pytest.mark.parametrize("lengths", [[600], [300] * 2, [200] * 3, [60] * 10, [180, 40, 300]])
def test_another_recording_moves_no_clip_across(lengths):
    """The choice hangs on each recording's own name and content: none of a hundred that are added has a say."""
    clips = dataset(lengths)
    before = hold_out(clips, SHARE, SEED)
    for number in range(100):
        new = cut(f"new {number}.wav", random.Random(number).choice(lengths))
        after = hold_out(clips + new, SHARE, SEED)
        assert (after.clips - {*new}, after.lost - {*new}) == (before.clips, before.lost)
    if len(lengths) > 3:
        assert hold_out(clips, SHARE, SEED + 1).clips != before.clips


def test_what_was_trained_on_never_crosses_when_recordings_are_added_one_by_one():
    """Speakers of 0.5 to 3 min, whose share depends on all that they have: what a checkpoint knows stays."""
    added, shares = 0, []
    for number in range(60):
        rng, clips, before, settled = random.Random(number), [], None, {}
        goal_s = rng.uniform(30, 180)
        while sum(c.duration_s for c in clips) < goal_s:
            old, clips = clips, clips + cut(f"{number} {len(clips)}.wav", rng.choice([6, 10, 20, 30, 60]))
            after = hold_out(clips, SHARE, SEED, settled)
            if before is not None:
                added += 1
                assert (after.clips & {*old}, after.lost & {*old}) == (before.clips, before.lost)
            kept = json.loads(json.dumps(choice(SHARE, SEED, after.clips)))
            settled = settled_by(kept | {"recordings": {c.content: c.source for c in clips}}, SHARE, SEED)
            before = after
        shares += after.shares
    assert len(shares) == 60
    assert added > 200
    assert max(s.held for s in shares) <= 0.1 + 1e-9
    assert 0.06 < np.median([s.held for s in shares]) < 0.09
    assert not settled_by(kept, SHARE, SEED + 1), "another seed chooses anew"
    assert not settled_by({}, SHARE, SEED), "an older version's checkpoint"


@pytest.mark.parametrize("seconds", [6.3, 12.0])
def test_the_shard_of_many_short_recordings_does_not_hang_on_luck(seconds):
    clips = dataset([seconds] * 95)
    shares = [hold_out(clips, SHARE, seed).shares[0].held for seed in range(20)]
    assert min(shares) > 0.036
    assert max(shares) < 0.069


def test_a_recording_in_slices_is_one_recording_and_clips_that_do_not_overlap_lose_nothing():
    clips = [replace(c, source="long.wav", start_s=c.start_s + at) for at in (0, 300, 600) for c in cut(f"{at}", 300)]
    held, lost, (share,) = hold_out(clips, SHARE, SEED)
    assert 40 < share.held_s < 50
    assert min(c.start_s for c in held) > 850
    assert len(lost) <= 1
    apart = [ClipRef(0, f"{i}", 0, "a.wav", 298, 3.0 * i, 3.0) for i in range(40)]
    assert [c.key for c in apart if c in hold_out(apart, SHARE, SEED).clips] == ["37", "38", "39"]
    assert not hold_out(apart, SHARE, SEED).lost


@pytest.mark.parametrize(("lengths", "num_speakers"), [([20] * 30, 2), ([6.3] * 95, 1), ([60, 30, 30] * 9, 3)])
def test_recordings_that_another_tool_cut_are_held_out_whole(lengths, num_speakers):
    clips = [replace(c, guessed=True) for c in dataset(lengths, num_speakers)]
    held, lost, shares = hold_out(clips, SHARE, SEED)
    assert not lost
    assert all(0.75 * SHARE <= s.held <= 0.1 for s in shares)
    assert not {c.source for c in held} & {c.source for c in clips if c not in held}
    settled = settled_by(choice(SHARE, SEED, held) | {"recordings": {c.content: c.source for c in clips}}, SHARE, SEED)
    assert hold_out(clips + cut("new.wav", 30), SHARE, SEED, settled).clips >= held, "a run that goes on"


def test_only_where_all_recordings_are_too_long_ends_of_them_are_held_out_as_of_any():
    for lengths in ([600], [60] * 3):
        guessed = {replace(c, guessed=True) for c in dataset(lengths)}
        held, lost, _ = hold_out(guessed, SHARE, SEED)
        assert held
        assert not any(overlap(a, b) for a in guessed if a not in held | lost for b in held)


def test_a_speakers_only_speech_is_never_held_out():
    clips = dataset([600]) + cut("short.wav", 12.0, speaker=1) + [ClipRef(0, "0", 2, "one.wav", 900, 0.0, 300.0)]
    for share in (SHARE, 0.5):
        held = hold_out(clips, share, SEED)
        trained = {c.speaker for c in clips if c not in held.clips and c not in held.lost}
        assert trained == {0, 1, 2}
    shares = hold_out(clips, SHARE, SEED).shares
    assert [bool(s.held_s) for s in shares] == [True, False, False]
    lines = dict(report(shares, SHARE))
    assert "nothing is held out of speakers 1 (12.6 s), 2 (300.0 s)" in lines[logging.WARNING]
    assert not hold_out(clips, 0.0, SEED).clips


def test_shares_are_shown_by_speaker_or_summed_up_and_what_is_far_from_asked_is_a_warning():
    few = [SpeakerShare(0, 600.0, 30.0, 3.0), SpeakerShare(4, 100.0, 9.0, 0.0)]
    ((level, line),) = report(few, SHARE)
    assert level == logging.INFO
    assert "speaker 0 30.0 of 600.0 s (5.0%, 3.0 s lost beside); speaker 4 9.0 of 100.0 s (9.0%" in line
    (_, (level, line)) = report(few, 0.2)
    assert level == logging.WARNING
    assert "asked for 20.0%, 5.0% to 9.0% of speakers 0 (600.0 s), 4 (100.0 s) is held out" in line
    ((_, line),) = report([s._replace(speaker=i) for i in range(10) for s in few[:1]], SHARE)
    assert "of 10 speakers: 5.0% of each, 300.0 of 6000.0 s in all (5.0%), 30.0 s lost" in line
    ((_, line),) = [x for x in report([SpeakerShare(0, 9.0, 0.0, 0.0)], SHARE) if x[0] == logging.WARNING]
    assert "no validation and no best checkpoint" in line
    assert not list(report(few, 0.0))


def test_validation_takes_its_clips_evenly_over_speakers_and_recordings():
    clips = [ClipRef(r, f"{i}", r % 10, f"{r}.wav", 298) for r in range(30) for i in range(9)]
    chosen = evenly(clips, 32, SEED)
    assert len(chosen) == 32
    assert {s: sum(c.speaker == s for c in chosen) for s in range(10)} == {s: 3 + (s < 2) for s in range(10)}
    assert len({c.source for c in chosen}) == 30
    assert evenly(clips[::-1], 32, SEED) == chosen
    assert len(evenly(clips, 5, SEED)) == 10, "at least one of each speaker"
    assert len(evenly(clips[:4], 32, SEED)) == 4


def test_the_clips_of_a_table_are_split_and_silence_is_each_speakers(tmp_path):
    recipe = tiny_recipe(tmp_path)
    clips = dataset([200], 2)
    mute = ClipRef(-1, "00000", 0, MUTE_SOURCE, 298)
    table = ClipTable.split(recipe, clips, lambda s: [replace(mute, speaker=s)], {"width": 16})
    held, lost, shares = hold_out(clips, recipe.data.holdout, recipe.train.seed)
    assert {*table.holdout} == held
    assert len(lost) + len(table.holdout) + len(table.train) == len(clips) + 2
    assert (table.shares, table.num_speakers, table.trained_speakers) == (shares, 2, (0, 1))
