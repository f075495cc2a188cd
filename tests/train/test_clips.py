"""Clips in columns: what they say, and what they take."""

import time
import tracemalloc
from dataclasses import replace

import pytest
from helpers import changed, make_features, tiny_recipe

from rvc_dist.train import fingerprint
from rvc_dist.train.clips import MUTE, MUTE_SOURCE, ClipList, ClipRef
from rvc_dist.train.dataset import ClipTable
from rvc_dist.workspace import fingerprint as fingerprint_of

CLIPS = (
    ClipRef(3, "00007", 9999, "a/é \udcff.wav", 298, 1.25, 3.5, "0123456789abcdef", 100, True),
    ClipRef(2**40, "x", 0, "", 2**33),
    ClipRef(MUTE, "00000", 1, MUTE_SOURCE, 100),
)


def many(count: int, clips_a_recording: int = 8) -> list[ClipRef]:
    """Speaker 0 has half of the clips, 1 a quarter, and so on."""
    found = []
    for i in range(count):
        speaker = min((count - i).bit_length(), 20)
        recording, place = divmod(i, clips_a_recording)
        source = f"speaker_{speaker}/{recording:06d}.flac"
        found.append(ClipRef(i // 200, f"{i % 200:05d}", speaker, source, 298, 2.7 * place, 3.0, f"{recording:016x}"))
    return found


def test_a_list_of_clips_is_what_it_was_made_of():
    listed = ClipList.of(iter(CLIPS))
    assert (*listed,) == CLIPS == tuple(listed[i] for i in range(3))
    assert (listed[-1], len(listed)) == (CLIPS[2], 3)
    assert (*listed[1:],) == CLIPS[1:]
    assert (*listed.take([2, 0, 0]),) == (CLIPS[2], CLIPS[0], CLIPS[0])
    assert (*(listed + ClipList.of(CLIPS[:1])), *(listed + listed[:1])) == 2 * (*CLIPS, CLIPS[0])
    assert ClipList.of(listed) is listed
    assert listed == ClipList.of(CLIPS)
    assert listed != ClipList.of(CLIPS[:2])
    assert not ClipList.of(())
    with pytest.raises(IndexError):
        listed[3]


def test_a_run_is_known_by_the_same_fingerprint_as_ever(tmp_path):
    """Places in epochs of runs that older versions began count on it."""
    clips = ClipList.of([*CLIPS, *many(9000)])
    plain = fingerprint_of([(c.source, c.unit, c.key, c.num_frames) for c in (*CLIPS, *many(9000))])
    assert fingerprint.of_clips(clips) == plain
    assert fingerprint.of_clips(clips[:0]) == fingerprint_of([])
    recipe = tiny_recipe(tmp_path)
    make_features(recipe, num_clips=12, speakers=(0, 1))
    table = ClipTable.load(recipe)
    as_before = replace(table, train=tuple(table.train), holdout=tuple(table.holdout))
    assert fingerprint.of_data(recipe, table) == fingerprint.of_data(recipe, as_before)
    nameless = [replace(c, content="") for c in table.train]
    data = fingerprint.of_data(recipe, replace(table, train=nameless, holdout=()))
    ends_s = {c.source: max(o.start_s + o.duration_s for o in nameless if o.source == c.source) for c in nameless}
    assert data["recordings"] == {f"{s} to {end:.2f} s": s for s, end in ends_s.items() if s}


def test_a_hundred_thousand_clips_are_split_in_seconds_and_take_megabytes(tmp_path):
    """Loader processes inherit them: an object of each clip would be copied to every process that reads it."""
    recipe = changed(tiny_recipe(tmp_path), "data", holdout=0.05)
    clips, mute = many(100_000), replace(CLIPS[2], num_frames=50)
    began_s = time.process_time()
    listed = ClipList.of(clips)
    table = ClipTable.split(recipe, listed, lambda s: [replace(mute, speaker=s)], {"width": 16})
    data = fingerprint.of_data(recipe, table)
    assert time.process_time() - began_s < 30
    num_lost = round(sum(s.lost_s for s in table.shares) / 3)
    assert len(table.train) - len(table.shares) + len(table.holdout) + num_lost == 100_000
    assert 0.04 < len(table.holdout) / 100_000 < 0.06
    assert len(data["recordings"]) == 12_500
    del table, listed, data
    tracemalloc.start()
    listed = ClipList.of(clips)
    held, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert len(listed) == 100_000
    assert held < 80 * 100_000, "bytes a clip"
    assert peak < 250 * 100_000
