"""Held-out clips: who is heard, what the log says, and what is best."""

import logging
import math
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from helpers import changed, make_features, tiny_recipe, with_train

from rvc_dist.train import holdout, trainer, validation
from rvc_dist.train.clips import ClipRef
from rvc_dist.train.dataset import ClipTable
from rvc_dist.train.progress import Progress
from rvc_dist.train.quality import BROKEN, Quality

pytestmark = pytest.mark.usefixtures("thin")

GOOD = Quality(0.5, 6.0, 30.0, 0.05, 1.5, 0.9)


@pytest.fixture
def begin(request):
    """A run that is about to take its first step."""

    def make(recipe) -> trainer.Trainer:
        run = trainer.Trainer(recipe)
        request.addfinalizer(run.close)
        return run

    return make


def test_each_speaker_with_held_out_speech_has_numbers_and_counts_alike(tmp_path, begin, caplog):
    recipe = tiny_recipe(tmp_path)
    make_features(recipe, num_clips=24, speakers=(0, 1, 0, 1, 0, 2, 0, 1))  # of 2 there is too little to hold out
    run = begin(recipe)
    before = torch.random.get_rng_state()
    with caplog.at_level(logging.INFO):
        verdict = run.validation.judge(run.step.generator, Progress(step=7))
    assert torch.equal(torch.random.get_rng_state(), before)
    assert [*verdict.speakers] == [0, 1]
    every = run.validation.measure(run.step.generator)
    assert (verdict.num_clips, len(every)) == (len(run.table.holdout),) * 2
    for speaker, found in verdict.speakers.items():
        own = [q.mel_distance for q, c in zip(every, run.validation.clips, strict=True) if c.speaker == speaker]
        assert found.mel_distance == pytest.approx(sum(own) / len(own), rel=1e-12)
        assert all(map(math.isfinite, found[:1] + found[3:]))
    means = [q.mel_distance for q in verdict.speakers.values()]
    assert verdict.mean.mel_distance == pytest.approx(sum(means) / len(means), rel=1e-12)
    assert verdict.is_best
    assert f"validation at step 7: mel {verdict.mean.mel_distance:.4f}, cepstra " in caplog.text
    farthest = max(verdict.speakers, key=lambda s: verdict.speakers[s].mel_distance)
    assert f"mel distance by speaker, farthest first: {farthest}: " in caplog.text
    assert f"step 7 is the best: mel distance {verdict.mean.mel_distance:.4f} is the first" in caplog.text


def test_an_evaluation_converts_each_clip_once(tmp_path, begin, monkeypatch):
    recipe = tiny_recipe(tmp_path)
    make_features(recipe, num_clips=24)
    run, converted, resynthesise = begin(recipe), [], validation.Validation.resynthesise

    def once(self, generator, clip, *number):
        converted.append(clip)
        return resynthesise(self, generator, clip, *number)

    monkeypatch.setattr(validation.Validation, "resynthesise", once)
    run.evaluate()
    assert converted == run.validation.clips


def test_without_held_out_clips_there_is_no_verdict(tmp_path, begin):
    recipe = changed(tiny_recipe(tmp_path), "data", holdout=0.0)
    make_features(recipe)
    run = begin(recipe)
    assert run.validation.judge(run.step.generator, Progress()) is None
    assert run.evaluate() is False


@pytest.mark.parametrize(
    ("best", "now", "is_best", "why"),
    [
        (None, 0.5, True, "mel distance 0.5000 is the first"),
        (0.5, 0.4, True, "mel distance 0.4000 is 20.0% below the 0.5000 of step 3"),
        (0.4, 0.5, False, "mel distance 0.5000 is 25.0% above the 0.4000 of step 3, which stays the best"),
        (0.5, 0.5, False, "mel distance 0.5000 is no less than the 0.5000 of step 3, which stays the best"),
        (0.0, 0.5, False, "mel distance 0.5000 is no less than the 0.0000 of step 3, which stays the best"),
        (0.5, math.inf, False, "mel distance inf is never the best"),
        (None, math.nan, False, "mel distance nan is never the best"),
    ],
)
def test_what_is_best_says_why(best, now, is_best, why):
    before = Progress(step=9, epoch=4, best_metric=best, best_step=3, best_epoch=1)
    after, said = before.judged(now)
    assert said == why
    assert after == (replace(before, best_metric=now, best_step=9, best_epoch=4) if is_best else before)


@pytest.mark.parametrize("broken", [True, False])
def test_one_clip_that_is_not_finite_keeps_a_step_from_being_the_best(tmp_path, begin, monkeypatch, caplog, broken):
    recipe = tiny_recipe(tmp_path)
    make_features(recipe)
    run = begin(recipe)
    found = [GOOD] * (len(run.validation.clips) - 1) + [BROKEN if broken else GOOD]
    monkeypatch.setattr(run.validation, "measure", lambda _: found)
    assert run.evaluate() is not broken
    levels = [r.levelname for r in caplog.records if "is never the best" in r.message]
    assert levels == ["WARNING"] * broken


def test_a_validation_that_takes_more_than_its_share_of_the_time_says_so_once(tmp_path, begin, monkeypatch, caplog):
    recipe = tiny_recipe(tmp_path)
    make_features(recipe)
    run = begin(recipe)
    clock = iter([0, 4, 4, 100, 104, 104, 150, 160, 160, 200, 220, 220])  # begins, ends, is looked at
    monkeypatch.setattr(validation, "time", SimpleNamespace(monotonic=lambda: next(clock)))
    monkeypatch.setattr(run.validation, "measure", lambda _: [GOOD] * len(run.validation.clips))
    for _ in range(4):
        run.validation.judge(run.step.generator, Progress())
    assert [r.message for r in caplog.records if "of the time" in r.message] == [
        "validation takes 18% of the time: a longer train.eval_every_steps would take less"
    ]


@pytest.mark.parametrize(
    ("speakers", "seconds", "clips", "longest_s"),
    [(1, 9.0, 32, 100 / 32), (1, 3.0, 32, 3.0), (2, 9.0, 32, 100 / 32), (80, 9.0, 80, 1.25), (400, 3.0, 100, 1.0)],
)
def test_a_validation_has_32_clips_or_one_a_speaker_and_a_bounded_length(tmp_path, speakers, seconds, clips, longest_s):
    recipe = tiny_recipe(tmp_path)
    held = tuple(
        ClipRef(0, f"{i}", i % speakers, f"{i % 50}", round(seconds * 100), 0.0, seconds)
        for i in range(max(64, speakers))
    )
    chosen = holdout.validated(recipe, ClipTable((), held, 16, {}, speakers))
    assert len(chosen) == clips
    assert len({c.speaker for c in chosen}) == min(speakers, 100)
    assert max(c.num_frames for c in chosen) == pytest.approx(100 * longest_s, abs=0.5)


def test_of_many_speakers_validation_draws_a_hundred_by_the_seed_alone(tmp_path):
    recipe = tiny_recipe(tmp_path)
    held = [ClipRef(s, f"{i}", s, f"{s} {i}", 300, 0.0, 3.0) for s in range(150) for i in range(3)]
    table = ClipTable((), held, 16, {}, 150)
    chosen = holdout.validated(recipe, table)
    drawn = sorted(range(150), key=lambda s: holdout.draw(recipe.train.seed, "validated", s))[:100]
    assert [c.speaker for c in chosen] == sorted(drawn), "a clip of each"
    shuffled = replace(table, holdout=held[::-1])
    assert holdout.validated(recipe, shuffled) == chosen
    assert {c.speaker for c in holdout.validated(with_train(recipe, seed=7), table)} != {*drawn}
    fewer = replace(table, holdout=[c for c in held if c.speaker not in drawn[:2]])
    assert {*drawn[2:]} < {c.speaker for c in holdout.validated(recipe, fewer)}, "others come in their place alone"

    everybody = replace(table, validates_all=True)
    assert {c.speaker for c in holdout.validated(recipe, everybody)} == {*range(150)}
    for kept, is_all in (everybody, True), (table, False), (replace(everybody, holdout=held[3:]), False):
        stamp = {"validation": holdout.validation_stamp(recipe, kept)}
        assert holdout.validated_all(recipe, table, stamp) is is_all, "as the run began"
    assert not holdout.validated_all(recipe, table, {})
