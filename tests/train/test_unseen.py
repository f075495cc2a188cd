"""Speakers whom training never hears: who they are, into whom they are converted, and what is said of it."""

import logging
import math
import re
from dataclasses import replace

import pytest
import torch
from helpers import changed, make_features, tiny_recipe, train, with_train, workspace_of

from rvc_dist.config import ConfigError, recipe_of
from rvc_dist.report.history import read_history
from rvc_dist.report.page import write_page
from rvc_dist.train import unseen
from rvc_dist.train.dataset import ClipDataset, ClipTable
from rvc_dist.train.holdout import unseen_speakers
from rvc_dist.train.quality import Ear
from rvc_dist.workspace import Speakers, StageError

pytestmark = pytest.mark.usefixtures("thin")

CPU = torch.device("cpu")
NAMES = Speakers({0: "anna", 1: "bob", 2: "cleo", 3: "dora"})


def choose(wanted, heard=(), speakers=(0, 1, 2, 3), seed=1234):
    recipe = recipe_of([("data.holdout_speakers", str(wanted)), ("train.seed", str(seed))])
    return unseen_speakers(recipe, speakers, NAMES, heard)


def test_a_count_draws_speakers_by_name_and_never_one_who_was_heard():
    two = choose(2)
    assert len(two) == 2
    assert choose(1) < two < choose(3)
    assert {choose(1, seed=seed) for seed in range(30)} == {frozenset({s}) for s in range(4)}
    heard = set(range(4)) - two
    assert choose(2, heard=heard) == two, "who was unseen stays unseen"
    assert choose(2, heard=heard, speakers=range(9)).isdisjoint(heard)
    assert choose(0) == frozenset()


def test_a_list_has_names_and_ids():
    assert choose("[anna, 3]") == {0, 3}
    assert choose("[dora]") == {3}


@pytest.mark.parametrize(
    ("wanted", "heard", "message"),
    [
        (4, (), "data.holdout_speakers: got 4, but there are 4 speakers; expected less, at most 3"),
        (3, (0, 1), "there are 4 speakers, of whom checkpoints have heard 2; expected less, at most 2"),
        ("[eve, anna]", (), "nobody is called eve; expected some of 0 (anna), 1 (bob), 2 (cleo), 3 (dora)"),
        ("[bob, anna]", (1,), "the newest checkpoint has heard 1 (bob); leave them out of it, or give the run another"),
        ("[0, 1, 2, dora]", (), "nobody is left to train on; name fewer"),
    ],
)
def test_what_cannot_be_kept_out_is_refused(wanted, heard, message):
    with pytest.raises(StageError, match=re.escape(message)):
        choose(wanted, heard)


@pytest.mark.parametrize("wrong", ["-1", "anna", "[[1]]", "1.5", "10000"])
def test_a_recipe_with_another_kind_of_value_is_refused(wrong):
    with pytest.raises(
        ConfigError, match=r"data.holdout_speakers: .* expected a number of speakers, or a list of names"
    ):
        recipe_of([("data.holdout_speakers", wrong)])


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    """Five units of three clips; 4 and 1 speak in turn, with 2 once; the pitch rises by 60 Hz a unit."""
    recipe = changed(tiny_recipe(tmp_path_factory.mktemp("unseen") / "run"), "data", holdout_speakers=("2",))
    recipe = with_train(recipe, max_steps=2, eval_every_steps=2, ema_decay=0.9)
    make_features(recipe, num_clips=15, speakers=(4, 1, 2, 1, 4))
    return recipe


def test_training_never_hears_them(prepared):
    table = ClipTable.load(prepared)
    assert {c.speaker for c in table.unseen} == {2}
    assert {c.speaker for c in (*table.train, *table.holdout)} == {1, 4}, "no silent clips of theirs either"
    assert (len(table.unseen), table.num_speakers, table.trained_speakers) == (3, 5, (1, 4))
    without = ClipTable.load(changed(prepared, "data", holdout_speakers=0))
    assert [c for c in without.train if c.speaker in (1, 4)] == [c for c in table.train if c.speaker in (1, 4)]


def test_the_target_is_the_speaker_who_is_nearest_in_pitch(prepared):
    """Of 2 the pitch is 220 to 260 Hz; the held-out clips of 1 have 200 or 320 Hz, those of 4 140 or 380 Hz."""
    table = ClipTable.load(prepared)
    speech = unseen.UnseenSpeech(prepared, table, ClipDataset(prepared, table.train), Ear(prepared, CPU))
    assert len(speech.pairs) == 3
    for clip, target in speech.pairs:
        medians = {t.speaker: hz for t, hz in unseen.targets_of(prepared, table, speech.dataset)}
        hz = unseen.median_hz(speech.dataset.read(clip).f0)
        assert target.speaker == min(medians, key=lambda s: abs(math.log(medians[s] / hz)))
        assert target in (*table.holdout, *table.train)


def test_what_is_compared(prepared):
    table = ClipTable.load(prepared)
    speech = unseen.UnseenSpeech(prepared, table, ClipDataset(prepared, table.train), Ear(prepared, CPU))
    at = torch.arange(24000) / 24000
    source = sum(0.1 * torch.sin(2 * math.pi * k * 150 * at) for k in range(1, 9))
    lower = sum(0.05 * torch.sin(2 * math.pi * k * 150 * 2 ** (-1 / 12) * at) for k in range(1, 9))
    same, other = (speech.compare(source, source, made) for made in (source, lower))
    assert same[:3] == pytest.approx((0.0, 0.0, 0.0), abs=1e-3)
    assert same[3:] == pytest.approx((1.0, 1.0), abs=1e-4)
    assert other.f0_cents == pytest.approx(100.0, abs=8.0)
    assert other.loudness_db == pytest.approx(6.02, abs=0.5)
    assert other.content_similarity < 0.9999
    assert speech.compare(source, source, source * math.nan).f0_cents == math.inf


def test_an_encoder_that_is_not_there_costs_the_content_alone(prepared, caplog):
    recipe = changed(prepared, "extract", embedder_model="nobody/has-this")
    table = ClipTable.load(prepared)
    speech = unseen.UnseenSpeech(recipe, table, ClipDataset(recipe, table.train), Ear(recipe, CPU))
    wave = torch.sin(torch.arange(24000) / 20)
    found = [speech.compare(wave, wave, wave) for _ in range(2)]
    assert all(math.isnan(f.content_similarity) and f.f0_cents < 1 for f in found)
    (said,) = [r.message for r in caplog.records if r.levelno == logging.WARNING]
    assert said.startswith("validation does not measure the content of conversions: extract.embedder_model")


@pytest.mark.slow
def test_a_run_says_apart_how_unseen_speakers_are_converted(prepared, caplog):
    caplog.set_level(logging.INFO)
    train(prepared)
    assert "speakers whom training never hears (data.holdout_speakers): 2, " in caplog.text
    assert "unseen speakers at step 2, into trained voices: " in caplog.text
    work = workspace_of(prepared)
    (line,) = [line for line in read_history(work.history_file) if line["kind"] == "validation"]
    assert set(line["unseen"]) == set(unseen.UnseenQuality._fields)
    assert set(line["speakers"]) == {"1", "4"}
    page = write_page(work.root).read_text()
    assert "Unseen speakers: voicing error" in page
    assert "Similarity to the target" in page
    assert "their average" in page
    with pytest.raises(StageError, match=r"data.holdout_speakers: the newest checkpoint has heard 1;"):
        train(changed(prepared, "data", holdout_speakers=("1",)))
    train(replace(with_train(prepared, max_steps=3)))
