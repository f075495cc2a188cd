"""Who speaks: the names of a dataset's folders, RUN/speakers.json, and how often a clip counts."""

import re
import shutil
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
import soundfile
from helpers import (
    SteadyPitch,
    changed,
    make_checkpoint,
    make_generator,
    narrow_recipe,
    tiny_recipe,
    tone,
    workspace_of,
)

from rvc_dist.choices import F0_METHODS, F0Spec
from rvc_dist.data import preprocess
from rvc_dist.data.sources import folder_of, list_sources
from rvc_dist.features import extract
from rvc_dist.tools import dataset_stats
from rvc_dist.train import checkpoint
from rvc_dist.train.clips import MUTE_SOURCE
from rvc_dist.train.dataset import ClipTable
from rvc_dist.workspace import Shard, Speaker, Speakers, StageError, Workspace


@pytest.fixture
def work(tmp_path: Path) -> Workspace:
    return Workspace(tmp_path / "run", "tiny")


def dataset(folder: Path, *tops: str) -> Path:
    for top in tops:
        path = folder / top / "a.wav"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"sound")
    return folder


def ids(folder: Path, work: Workspace | None = None) -> dict[str, int]:
    return {f.path.removesuffix("a.wav"): f.speaker for f in list_sources(folder, work)[0] if not f.reason}


@pytest.mark.parametrize(
    ("tops", "expected", "names"),
    [
        (["", "3"], {"": 0, "3/": 3}, {0: "0", 3: "3"}),
        (["bob", "alice", "Zoë"], {"Zoë/": 0, "alice/": 1, "bob/": 2}, {0: "Zoë", 1: "alice", 2: "bob"}),
        (["Zoe\u0308"], {"Zoe\u0308/": 0}, {0: "Zo\u00eb"}),
        (["Bo_b_7_2", "a_9_1", "a_9_100"], {"Bo_b_7_2/": 7, "a_9_1/": 9, "a_9_100/": 9}, {7: "Bo_b", 9: "a"}),
    ],
)  # fmt: skip
def test_folders_are_called_by_id_by_name_or_by_both(tmp_path, tops, expected, names):
    folder = dataset(tmp_path, *tops)
    assert ids(folder) == expected
    assert list_sources(folder)[1] == Speakers(names)


@pytest.mark.parametrize(
    ("tops", "message"),
    [
        (["0", "alice"], r"named in several ways \(by id: 0, by name: alice\); name all folders in one: 0, 1, "),
        (["", "alice"], r"named in several ways \(in no folder, by name: alice\); "),
        (["alice", "bob_1_1"], r"named in several ways \(by name: alice, Name_ID_Repeat: bob_1_1\); "),
        (["", "bob_1_1"], r"named in several ways \(in no folder, Name_ID_Repeat: bob_1_1\); "),
        (["al_1_1", "bob_1_1"], "al_1_1 is speaker 1, called al and bob_1_1 is speaker 1, called bob; give each"),
        (["al_1_1", "al_2_1"], "al_1_1 is speaker 1, called al and al_2_1 is speaker 2, called al; give each"),
        (["Al", "al"], "Al is speaker 0, called Al and al is speaker 1, called al; give each"),
    ],
)
def test_mixed_and_clashing_names_are_refused_in_one_sentence(tmp_path, tops, message):
    with pytest.raises(StageError, match=message) as error:
        list_sources(dataset(tmp_path, *tops))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("top", ["al_0_0", "al_0_101", "al_10000_1", "99999999999999999999", "a|b", "a\nb", "b\udcff"])
def test_a_folder_that_names_no_speaker_is_left_out_with_its_reason(tmp_path, top):
    (file, other) = list_sources(dataset(tmp_path, "alice_0_1", top))[0]
    assert not {f.path: f.reason for f in (file, other)}["alice_0_1/a.wav"]
    assert {f.path: f.reason for f in (file, other)}[f"{top}/a.wav"].startswith("folder ")


def test_folders_without_recordings_name_nobody(tmp_path):
    dataset(tmp_path, "0", "alice")
    (tmp_path / "alice" / "a.wav").rename(tmp_path / "alice" / "notes.txt")
    assert ids(tmp_path) == {"0/": 0}


def test_names_keep_their_ids_whoever_comes_and_goes(tmp_path, work):
    """Listing twice gives the same, so any shard may write the file."""
    folder = dataset(tmp_path / "audio", "bob", "carol")

    def listed() -> dict[int, str]:
        for _ in range(2):
            _, speakers = list_sources(folder, work)
            work.save_speakers(speakers)
        return work.speakers().names

    assert listed() == {0: "bob", 1: "carol"}
    dataset(folder, "alice")
    assert listed() == {0: "bob", 1: "carol", 2: "alice"}
    work.save_speakers(Speakers(work.speakers().names, trained=(1,)))
    shutil.rmtree(folder / "bob")
    shutil.rmtree(folder / "carol")
    assert listed() == {1: "carol", 2: "alice"}, "bob was never trained, and is forgotten"
    dataset(folder, "dave")
    assert listed() == {0: "dave", 1: "carol", 2: "alice"}
    for top in ("alice", "dave"):
        shutil.rmtree(folder / top)
    dataset(folder, "carol_5_1")
    with pytest.raises(StageError, match="carol_5_1 is speaker 5, called carol and one that was trained is speaker 1"):
        list_sources(folder, work)


def test_ids_may_be_given_names_in_the_file(tmp_path, work):
    folder = dataset(tmp_path / "audio", "0", "4")
    work.save_speakers(Speakers.of([Speaker(id=4, name="dora")]))
    _, speakers = list_sources(folder, work)
    assert speakers.names == {0: "0", 4: "dora"}
    assert [speakers.label(i) for i in (0, 4, 9)] == ["0", "4 (dora)", "9"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[]", "expected keys"),
        ('{"speakers": [{"id": 0, "name": "a|b"}]}', r"speakers\[0\]\.name: got 'a|b', expected a name of at most 255"),
        ('{"speakers": [{"id": 0, "name": ""}]}', r"speakers\[0\]\.name: got ''"),
        ('{"speakers": [{"id": -1, "name": "a"}]}', r"speakers\[0\]\.id: got -1, expected 0 to 9999"),
        ('{"speakers": [{"id": 0, "name": "a"}, {"id": 0, "name": "b"}]}', "two have one id, or one name"),
        ('{"speakers": [{"id": 0, "name": "a"}, {"id": 1, "name": "a"}]}', "two have one id, or one name"),
        ('{"trained": ["a"]}', r"trained\[0\]: got 'a'"),
    ],
)
def test_a_damaged_file_is_named(work, text, message):
    work.root.mkdir()
    work.speakers_file.write_text(text)
    with pytest.raises(StageError, match=rf"speakers\.json: .*{message}"):
        work.speakers()


def test_repeats_are_those_of_the_folder():
    assert [folder_of(p).repeat for p in ("al_0_3/b/c.wav", "alice/a.wav", "al_0_3.wav", "3/a.wav")] == [3, 1, 1, 1]


def test_a_clip_counts_as_often_as_its_folder_says(tmp_path, capsys, monkeypatch):
    """From the folder's name to the list that is trained on, and to the tables."""
    monkeypatch.setitem(F0_METHODS, "pyin", F0Spec(SteadyPitch))
    recipe = changed(tiny_recipe(tmp_path / "run"), "data", audio_dir=str(tmp_path / "audio"))
    for top in ("bob_4_3", "alice_1_1"):
        path = tmp_path / "audio" / top / "a.wav"
        path.parent.mkdir(parents=True)
        soundfile.write(path, tone(4.0, 24000), 24000)
    for stage in (preprocess, extract):
        stage.run(recipe, Shard())
    table = ClipTable.load(recipe)
    counts = Counter((c.speaker, c.start_s) for c in table.train if c.source != MUTE_SOURCE)
    assert {(speaker, count) for (speaker, _), count in counts.items()} == {(1, 1), (4, 3)}
    assert sum(c.source == MUTE_SOURCE for c in table.train) == 2, "silence of each speaker counts once"
    assert len(table.holdout) == len(set(table.holdout))
    assert workspace_of(recipe).speakers() == Speakers({1: "alice", 4: "bob"})
    dataset_stats.run(recipe, Shard())
    assert {"1 (alice)", "4 (bob)"} <= set(re.findall(r"\d \(\w+\)", capsys.readouterr().out))


def test_without_the_file_the_newest_checkpoint_knows(tmp_path):
    recipe = narrow_recipe(tmp_path)
    known = Speakers({1: "alice", 4: "bob"}, trained=(1,))
    saved = replace(make_checkpoint(recipe, make_generator(recipe)), speakers=known)
    checkpoint.save(workspace_of(recipe).checkpoints_dir, saved)
    assert workspace_of(recipe).speakers() == known


def test_what_cannot_be_used_belongs_to_its_folders_speaker(tmp_path):
    (dataset(tmp_path, "2", "7") / "7" / "a.wav").rename(tmp_path / "7" / "notes.txt")
    assert [(f.path, f.speaker) for f in list_sources(tmp_path)[0]] == [("2/a.wav", 2), ("7/notes.txt", 7)]
