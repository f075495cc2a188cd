"""Corpora: layouts, manifests, Lhotse's lists and data sets of the hub become the sources and speakers worked out by
hand here, and what is wrong with them is named.
"""

from __future__ import annotations

import gzip
import json
import logging
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
from helpers import changed, tiny_recipe, tone

from rvc_dist import __main__ as cli
from rvc_dist import workspace
from rvc_dist.config import Recipe
from rvc_dist.data import clip_files, decode, preprocess, work_list
from rvc_dist.data.sources import list_sources, read_corpus
from rvc_dist.files import write_json
from rvc_dist.report.facts import read_facts
from rvc_dist.workspace import (
    Shard,
    SourceFile,
    StageError,
    WorkList,
    Workspace,
    cut_units,
    read_header,
    read_json,
    unit_files,
)

RATE = 24000


def touch(folder: Path, *paths: str) -> Path:
    for path in paths:
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_bytes(b"sound")
    return folder


def speakers_by_path(audio_dir: Path, work: Workspace | None = None) -> dict[str, str]:
    sources, speakers = list_sources(audio_dir, work)
    return {s.path: speakers.names[s.speaker] for s in sources if not s.reason}


def record(path: Path, seconds: float = 2.0, f0_hz: float = 150.0) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    soundfile.write(path, tone(seconds, RATE, f0_hz), RATE)


def recipe_of(folder: Path, audio_dir: object) -> Recipe:
    return changed(tiny_recipe(folder / "run"), "data", audio_dir=str(audio_dir))


def contents(recipe: Recipe) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(Path(recipe.run_dir, "clips").iterdir())}


# Layouts


LIBRITTS = {
    "LibriTTS/train-clean-100/19/198/19_198_000000_000000.wav": "libritts_19",
    "LibriTTS/train-clean-100/19/198/19_198_000000_000002.wav": "libritts_19",
    "LibriTTS/dev-other/1034/121119/1034_121119_000014_000001.wav": "libritts_1034",
}
HIFI = {
    "hi_fi_tts_v0/audio/92_clean/10425_alice/a_01.flac": "hifitts_92",
    "hi_fi_tts_v0/audio/11614_other/2_book/b_02.flac": "hifitts_11614",
}


def test_libritts_speakers_are_those_of_its_second_folders_and_texts_are_counted(tmp_path: Path) -> None:
    texts = [path.replace(".wav", f".{kind}.txt") for path in LIBRITTS for kind in ("normalized", "original")]
    touch(tmp_path, *LIBRITTS, *texts, "LibriTTS/speakers.tsv")
    corpus = read_corpus(tmp_path)
    assert speakers_by_path(tmp_path) == LIBRITTS
    assert corpus.speakers.names == {0: "libritts_1034", 1: "libritts_19"}
    assert [s.reason for s in corpus.sources] == [""] * 3
    assert corpus.about == (
        "LibriTTS: 2 speakers, 3 recordings or parts; left out: 6 that are no recordings (*.txt), "
        "1 that are no recordings (*.tsv)"
    )
    subset = tmp_path / "LibriTTS" / "train-clean-100"  # another beginning of the path, the same names
    assert set(speakers_by_path(subset).values()) == {"libritts_19"}


def test_of_two_microphones_one_is_taken_and_the_list_of_silences_is_followed(tmp_path: Path) -> None:
    folder = "VCTK/wav48_silence_trimmed"
    touch(
        tmp_path,
        *(f"{folder}/p225/p225_00{i}_mic{mic}.flac" for i in (1, 2) for mic in (1, 2)),
        f"{folder}/p280/p280_001_mic1.flac",  # who was recorded by the first alone
        f"{folder}/s5/s5_001_mic2.flac",
        "VCTK/txt/p225/p225_001.txt",
    )
    (tmp_path / "VCTK" / "vctk-silences.0.92.txt").write_text("p225_002 0.93 3.45\np315_001\n")
    corpus = read_corpus(tmp_path)
    assert speakers_by_path(tmp_path) == {
        f"{folder}/p225/p225_001_mic2.flac": "p225",
        f"{folder}/p225/p225_002_mic2.flac": "p225",
        f"{folder}/p280/p280_001_mic1.flac": "p280",
        f"{folder}/s5/s5_001_mic2.flac": "s5",
    }
    assert [(s.from_s, s.to_s) for s in corpus.sources] == [(0, 0), (0.83, 3.55), (0, 0), (0, 0)]
    assert "VCTK 0.92: 3 speakers, 4 recordings or parts; left out: 2 " in corpus.about
    assert "2 of microphone 1 where there is one of microphone 2" in corpus.about
    (tmp_path / "VCTK" / "vctk-silences.0.92.txt").write_text("p225_002 3.45 0.93\n")
    with pytest.raises(StageError, match=r"0\.92\.txt, line 1: 'p225_002 3\.45 0\.93': ends before it begins; exp"):
        read_corpus(tmp_path)


def test_corpora_side_by_side_and_what_is_named_otherwise_among_them(tmp_path: Path) -> None:
    old_vctk = {f"VCTK-Corpus/wav48/p226/p226_{i:03d}.wav": "p226" for i in range(20)}
    touch(tmp_path, *HIFI, *LIBRITTS, *old_vctk, "jingle.wav")
    assert speakers_by_path(tmp_path) == HIFI | LIBRITTS | old_vctk
    reasons = {s.path: s.reason for s in read_corpus(tmp_path).sources if s.reason}
    assert reasons == {"jingle.wav": "not named as LibriTTS or VCTK 0.80 or HiFi-TTS names its recordings"}


def test_folders_that_resemble_no_layout_are_speakers_at_any_depth(tmp_path: Path) -> None:
    touch(tmp_path, "alice/ch1/a.flac", "alice/ch1/part 2/b.flac", "bob/c.flac", "92_clean/book/d.flac")
    assert set(speakers_by_path(tmp_path).values()) == {"alice", "bob", "92_clean"}


def test_a_run_from_before_layouts_were_known_goes_on_as_it_was(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """By its work list, in which a folder was a speaker and both microphones were cut."""
    paths = [f"p225/p225_001_mic{mic}.flac" for mic in (1, 2)]
    touch(tmp_path / "audio", *paths)
    work = Workspace(tmp_path / "run", "tiny")
    old = WorkList("", {}, cut_units([SourceFile(path, 0, 5, 0, 1.0) for path in paths]), ())
    work.clips_dir.mkdir(parents=True)
    work.work_list_file.write_text(old.dumps())
    assert "corpus" not in work.work_list_file.read_text()
    assert sorted(speakers_by_path(tmp_path / "audio", work)) == paths
    assert "its layout is that of VCTK 0.92, but the clips of this run were cut with a folder a speaker" in caplog.text
    assert sorted(speakers_by_path(tmp_path / "audio")) == paths[1:]


def test_names_of_thousands_keep_their_ids_when_others_come(tmp_path: Path) -> None:
    lines = [{"audio": "a.wav", "speaker": f"reader {i:04d}", "start_s": i, "end_s": i + 1} for i in range(0, 4000, 2)]
    touch(tmp_path, "a.wav")
    manifest, work = tmp_path / "corpus.jsonl", Workspace(tmp_path / "run", "tiny")

    def ids() -> dict[str, int]:
        manifest.write_text("\n".join(map(json.dumps, lines)))
        _, speakers = list_sources(manifest, work)
        work.save_speakers(speakers)
        return {name: i for i, name in speakers.names.items()}

    before = ids()
    assert before == {f"reader {2 * i:04d}": i for i in range(2000)}
    lines += [line | {"speaker": f"reader {i:04d}"} for i, line in zip(range(1, 4000, 2), lines, strict=True)]
    lines = [line | {"start_s": i} for i, line in enumerate(lines)]
    lines = [line | {"end_s": i + 0.5} for i, line in enumerate(lines)]
    after = ids()
    assert {name: after[name] for name in before} == before
    assert {after[f"reader {i:04d}"] for i in range(1, 4000, 2)} == set(range(2000, 4000))
    lines = [{"audio": "a.wav", "speaker": f"reader {i}", "start_s": i, "end_s": i + 1} for i in range(10_000)]
    with pytest.raises(StageError, match="10000 speakers by name; expected at most 9999"):
        ids()


# Manifests


def manifest(folder: Path, *lines: dict[str, Any] | str, name: str = "corpus.jsonl") -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    text = "".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in lines)
    (folder / name).write_bytes(gzip.compress(text.encode()) if name.endswith(".gz") else text.encode())
    return folder / name


def test_a_manifest_gives_parts_of_recordings_to_speakers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two who talk in turn in one recording, and one by a path elsewhere; what is cut is what was asked for."""
    wave = np.concatenate([tone(2.0, RATE, 110.0), tone(3.0, RATE, 220.0), tone(1.0, RATE, 330.0)])
    (tmp_path / "lists" / "talk").mkdir(parents=True)
    soundfile.write(tmp_path / "lists" / "talk" / "1.flac", wave, RATE)
    record(tmp_path / "other.wav", 1.5)
    path = manifest(
        tmp_path / "lists",
        {"audio": "talk/1.flac", "speaker": "bob", "start_s": 2, "end_s": 5.0},
        {"audio": "./talk/1.flac", "speaker": "alice", "end_s": 2.0},
        "",
        {"audio": "talk/1.flac", "speaker": "alice", "start_s": 5.0},
        {"audio": str(tmp_path / "other.wav"), "speaker": "bob"},
        name="corpus.jsonl.gz",
    )
    recipe = changed(recipe_of(tmp_path, path), "preprocess", cut_method="skip", process_effects=False)
    recipe = changed(recipe, "preprocess", normalization="none")
    opened: list[str] = []
    find_parts = decode.find_parts
    monkeypatch.setattr(decode, "find_parts", lambda path: opened.append(path.name) or find_parts(path))
    decode._known.cache_clear()
    preprocess.run(recipe, Shard())
    assert sorted(opened) == ["1.flac", "other.wav"], "each file is looked through once, however many parts it has"
    from safetensors.numpy import load_file

    found = {}
    for unit in sorted(Path(recipe.run_dir, "clips").glob("0*")):
        clips, header = load_file(unit), read_header(unit)
        assert header is not None
        for i, clip in enumerate(header["clips"]):
            found[clip["speaker"], clip["source"], clip["start_s"]] = clips[f"{i:05d}"]
    talk = "talk/1.flac"
    other = str(tmp_path / "other.wav")
    assert found.keys() == {(0, talk, 0.0), (0, talk, 5.0), (1, talk, 2.0), (1, other, 0.0)}
    for key, (first, last) in {(0, talk, 0.0): (0, 2), (0, talk, 5.0): (5, 6), (1, talk, 2.0): (2, 5)}.items():
        np.testing.assert_allclose(found[key], wave[first * RATE : last * RATE], atol=1e-4)
    assert Workspace(recipe.run_dir, recipe.name).speakers().names == {0: "alice", 1: "bob"}
    report = read_json(Path(recipe.run_dir, "clips", "report.json"))
    entries = [(f["path"], f["speaker"], f["seconds_in"]) for f in report["files"]]
    assert entries == [(talk, 0, 3.0), (other, 1, 1.5), (talk, 1, 3.0)]


def test_what_does_not_fit_the_disk_is_left_out_with_its_line(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    record(tmp_path / "a.wav", 2.0)
    (tmp_path / "words.wav").write_text("these are words")
    a = {"audio": "a.wav", "speaker": 3}
    path = manifest(
        tmp_path,
        a | {"end_s": 1.0},
        a | {"end_s": 1.0},
        a | {"start_s": 1.0, "end_s": 2.1},  # within what lists round
        a | {"start_s": 1.0, "end_s": 2.6},
        a | {"start_s": 2.0},
        {"audio": "none.wav", "speaker": 4},
        {"audio": ".", "speaker": 4},
        {"audio": "words.wav", "speaker": 4},
        *({"audio": f"gone/{i}.wav", "speaker": 4} for i in range(20)),
    )
    recipe = recipe_of(tmp_path, path)
    caplog.set_level(logging.INFO)
    preprocess.run(recipe, Shard())
    plan = WorkList.load(Path(recipe.run_dir, "clips", "plan.json"))
    assert plan is not None
    assert [(f.speaker, f.start_s, f.duration_s) for unit in plan.units for f in unit.files] == [(3, 0, 1), (3, 1, 1)]
    assert [f.reason for f in plan.excluded if not f.path.startswith("gone")] == [
        "line 2: the same as line 1",
        "line 4: ends at 2.6 s, the recording has 2.00 s",
        "line 5: begins at 2 s, the recording has 2.00 s",
        "line 7: it is a folder, expected a file",
        "line 6: cannot be read (No such file or directory)",
        "line 8: not readable as audio (Format not recognised)",
    ]
    assert "manifest: 2 speakers, 5 recordings or parts; left out: 23 that cannot be used, named below" in caplog.text
    assert f"and 11 more ({recipe.run_dir}/clips/report.json): line 2" in caplog.text
    assert caplog.text.count("No such file") == 11, "of 21"


def test_lines_that_say_nothing_are_refused_all_at_once(tmp_path: Path) -> None:
    touch(tmp_path, "a.wav")
    a = {"audio": "a.wav", "speaker": "bob"}
    path = manifest(
        tmp_path,
        a,
        "{",
        a | {"end": 2},
        {"speaker": "bob"},
        a | {"start_s": -1},
        a | {"start_s": 2, "end_s": 2},
        a | {"speaker": " bob"},
        a | {"speaker": 1.5},
        a | {"audio": ""},
        a | {"speaker": "eve"},
        "[1]",
        '{"audio": "a.wav", "audio": "b.wav"}',
    )
    with pytest.raises(StageError) as error:
        read_corpus(path)
    told, *lines = str(error.value).splitlines()
    assert told.startswith(f"data.audio_dir: 11 of 12 lines of {path} cannot be used; expected in each {{")
    assert [line.strip() for line in lines] == [
        "line 2: not valid JSON (Expecting property name enclosed in double quotes: line 2 column 1 (char 2))",
        "line 3: unknown key end; did you mean end_s?",
        "line 4: audio: got nothing, expected a name",
        "line 5: start_s: got -1, expected seconds",
        "line 6: end_s: got 2, expected more than start_s",
        "line 7: speaker: got ' bob', expected a name of at most 255 printable letters and no |",
        "line 8: speaker: got 1.5, expected a name of at most 255 printable letters and no | or an id or null",
        "line 9: audio: got '', expected a path",
        "line 10: gives to eve what line 1 gives to bob",
        "line 11: the whole: got [1], expected keys with values",
        "line 12: the key 'audio' is there twice",
    ]


@pytest.mark.parametrize(
    ("speakers", "message"),
    [
        (
            ("Bob", "bob"),
            r"Bob \(line 1\) is speaker 0, called Bob and bob \(line 2\) is speaker 1, called bob; give each",
        ),
        (("al b", "al  b"), r"al  b \(line 2\) is speaker 0, called al  b and al b \(line 1\) is speaker 1"),
        (("bob", None), r"named in several ways \(not at all, by name: bob\)"),
        (("bob", 3), r"named in several ways \(by id: 3, by name: bob\)"),
        ((10_000, 10_001), r"no usable recording;.*\n  a\.wav: line 1: speaker id 10000 is above 9999"),
    ],
)
def test_speakers_of_a_manifest_that_cannot_be_told_apart(
    tmp_path: Path, speakers: tuple[Any, Any], message: str
) -> None:
    touch(tmp_path, "a.wav", "b.wav")
    lines = [{"audio": f"{name}.wav", "speaker": who} for name, who in zip("ab", speakers, strict=True)]
    with pytest.raises(StageError, match=message):
        read_corpus(manifest(tmp_path, *lines))


@pytest.mark.parametrize(
    ("name", "data", "message"),
    [
        ("a.jsonl", b"", "holds no usable recording"),
        ("a.jsonl", b"\xff\xfe", r"1 of 1 lines of .*a\.jsonl cannot be used"),
        ("a.jsonl.gz", b"no gzip", r"a\.jsonl\.gz cannot be read \(Not a gzipped file"),
        (
            "a.json",
            b"{}",
            r"a\.json is a file; expected a folder of recordings, or a list of them \(\.jsonl or \.jsonl\.gz\)",
        ),
    ],
)
def test_a_file_that_is_no_list(tmp_path: Path, name: str, data: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(data)
    with pytest.raises(StageError, match=message):
        read_corpus(tmp_path / name)


def test_digits_alone_are_a_name_and_numbers_are_ids(tmp_path: Path) -> None:
    touch(tmp_path, "a.wav", "b.wav")
    names = {"audio": "a.wav", "speaker": "19"}, {"audio": "b.wav", "speaker": "7"}
    assert set(speakers_by_path(manifest(tmp_path, *names)).values()) == {"speaker_19", "speaker_7"}
    sources, _ = list_sources(manifest(tmp_path, *(line | {"speaker": int(line["speaker"])} for line in names)))
    assert [s.speaker for s in sources] == [7, 19]


# The pass that all share


@pytest.fixture
def many(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """22 recordings of two speakers, one of them unreadable; parts of the pass of four files."""
    monkeypatch.setattr(work_list, "PART", 4)
    for i in range(21):
        record(tmp_path / "audio" / "ab"[i % 2] / f"{i:02d}.wav", 1.0, 100.0 + 10 * i)
    (tmp_path / "audio" / "a" / "99.wav").write_text("these are words")
    return tmp_path / "audio"


@pytest.mark.parametrize("normalization", ["post", "lufs"])
def test_the_pass_gives_the_same_from_any_ranks_and_tasks(
    tmp_path: Path, many: Path, monkeypatch: pytest.MonkeyPatch, normalization: str
) -> None:
    recipe = changed(recipe_of(tmp_path / "one", many), "preprocess", normalization=normalization)
    monkeypatch.setattr(work_list, "PART", 1000)
    preprocess.run(recipe, Shard())
    alone = contents(recipe)
    assert not Path(recipe.run_dir, "survey").exists()
    monkeypatch.setattr(work_list, "PART", 4)
    for count, is_array in ((3, False), (2, True), (5, True)):
        recipe = changed(recipe_of(tmp_path / f"{count}", many), "preprocess", normalization=normalization)
        with ThreadPoolExecutor(count) as ranks:
            list(ranks.map(lambda i: preprocess.run(recipe, Shard(i, count, is_array)), range(count)))  # noqa: B023
        assert contents(recipe) == alone
        assert not Path(recipe.run_dir, "survey").exists()


@pytest.mark.parametrize("error", [FileNotFoundError, FileExistsError])
def test_a_pass_whose_folder_another_removes_while_it_writes_is_over(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: type[OSError]
) -> None:
    """Before the file is made, or within `mkdir`, which finds a folder and then none."""
    monkeypatch.setattr(work_list, "PART", 2)
    over: list[bool] = []

    def gone(*_: object) -> None:
        over.append(True)
        raise error(tmp_path)

    monkeypatch.setattr(work_list, "write_json", gone)
    spread = work_list.SharedPass(tmp_path / "survey" / "a", Shard(0, 2, array=True), 1, lambda: bool(over))
    assert spread.map("facts", [1, 2, 3, 4], lambda item: item, int, lambda _: False) is None


def test_a_killed_pass_goes_on_where_it_was(tmp_path: Path, many: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A task of an array that never sees the others does all of it in the end; what is done is not done again."""
    recipe = recipe_of(tmp_path, many)
    asked: list[str] = []
    content_of = work_list._facts

    def dies(audio_dir: Path, content: Any, file: SourceFile) -> Any:
        asked.append(file.path)
        if len(asked) == 11:
            raise KeyboardInterrupt
        return content_of(audio_dir, content, file)

    monkeypatch.setattr(work_list, "_facts", dies)
    recipe = changed(recipe, "preprocess", num_workers=1)
    with pytest.raises(KeyboardInterrupt):
        preprocess.make_work_list(recipe, Workspace(recipe.run_dir, "tiny"), Shard(1, 2, array=True))
    first = sorted(asked[:10])
    own = {"a": (8, 10, 12, 14), "b": (1, 3, 5, 7, 17, 19)}
    assert first == [f"{speaker}/{i:02d}.wav" for speaker, numbers in own.items() for i in numbers]
    preprocess.make_work_list(recipe, Workspace(recipe.run_dir, "tiny"), Shard(0, 2, array=True))
    assert sorted(asked[11:]) == sorted({p.relative_to(many).as_posix() for p in many.rglob("*.wav")} - {*first})


def test_a_work_list_of_many_recordings_has_a_line_a_unit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files = [SourceFile(f"{i}\udcff.wav", i % 3, 10, 7, 15.0, content="c", from_s=1.5, to_s=16.5) for i in range(9)]
    left_out = SourceFile("x.wav", 0, 0, 0, reason="no sound", repeat=3)
    plan = WorkList("listing", {"a": 1.5}, cut_units(files), (left_out,), -20.0, "manifest")
    path = tmp_path / "plan.json"
    path.write_text(plan.dumps())
    assert WorkList.load(path) == plan
    monkeypatch.setattr(workspace, "MAX_PLAIN_RECORDINGS", 8)
    path.write_text(plan.dumps())
    assert len(path.read_text().splitlines()) == 1 + len(plan.units) + 1
    assert WorkList.load(path) == plan
    monkeypatch.setattr(workspace, "RECORDINGS_A_LINE", 2)
    others = replace(plan, excluded=tuple(replace(left_out, path=f"{i}.txt") for i in range(5)))
    for some, num_lines in (others, 3), (replace(plan, excluded=()), 1):
        path.write_text(some.dumps())
        assert len(path.read_text().splitlines()) == 1 + len(plan.units) + num_lines, "of those that are left out, too"
        assert WorkList.load(path) == some
    path.write_text(plan.dumps())
    path.write_text(path.read_text().replace('"size": 10', '"size": -10', 1))
    with pytest.raises(StageError, match=r"units\[0\]\[0\]\.size: got -10, expected at least 0"):
        WorkList.load(path)
    path.write_text(plan.dumps()[:-9])
    with pytest.raises(StageError, match=r"plan\.json: not a work list of ours \(not valid JSON"):
        WorkList.load(path)


# Lhotse and data sets of the hub


def lhotse_recordings(folder: Path) -> Any:
    import lhotse

    for name, seconds in (("a", 3.0), ("b", 2.0), ("c", 1.0)):
        record(folder / f"{name}.wav", seconds)
    soundfile.write(folder / "stereo.wav", np.stack([tone(2.0, RATE)] * 2, axis=1), RATE)
    paths = [folder / f"{name}.wav" for name in ("a", "b", "c", "stereo")]
    return lhotse, lhotse.RecordingSet.from_recordings(lhotse.Recording.from_file(path) for path in paths)


def test_lhotses_supervisions_are_parts_of_its_recordings(tmp_path: Path) -> None:
    lhotse, recordings = lhotse_recordings(tmp_path / "audio")
    made = lhotse.SupervisionSegment
    supervisions = lhotse.SupervisionSet.from_segments(
        [
            made("a-1", "a", start=0.5, duration=1.0, speaker="amy"),
            made("a-2", "a", start=1.5, duration=1.5, speaker="19"),
            made("b-1", "b", start=0.0, duration=2.0, speaker="amy"),
            made("s-1", "stereo", start=0.0, duration=2.0, channel=1, speaker="amy"),
            made("x-1", "x", start=0.0, duration=2.0, speaker="amy"),
            made("c-1", "c", start=0.0, duration=1.0, speaker="19"),
        ]
    )
    recordings.to_file(tmp_path / "some_recordings_train.jsonl.gz")
    supervisions.to_file(tmp_path / "some_supervisions_train.jsonl.gz")
    corpus = read_corpus(tmp_path / "some_recordings_train.jsonl.gz")
    names = corpus.speakers.names
    path = {name: str(tmp_path / "audio" / f"{name}.wav") for name in "abc"}
    used = [(s.path, names[s.speaker], s.from_s, s.to_s) for s in corpus.sources if not s.reason]
    assert used == [
        (path["a"], "amy", 0.5, 1.5),
        (path["b"], "amy", 0.0, 0.0),
        (path["a"], "speaker_19", 1.5, 0.0),
        (path["c"], "speaker_19", 0.0, 0.0),
    ]
    assert {s.reason for s in corpus.sources if s.reason} == {
        "s-1: channel [1] of [0, 1], expected all; split the channels before",
        "x-1: there is no such recording in some_recordings_train.jsonl.gz",
    }
    (tmp_path / "lists").mkdir()
    for list_file in tmp_path.glob("*.gz"):
        list_file.rename(tmp_path / "lists" / list_file.name)
    assert read_corpus(tmp_path / "lists").sources == corpus.sources


def test_lhotses_cuts(tmp_path: Path) -> None:
    lhotse, recordings = lhotse_recordings(tmp_path)
    a, b, _, _ = recordings
    made = lhotse.SupervisionSegment
    told = [made("a-1", "a", start=-0.5, duration=1.0, speaker="amy"), made("a-2", "a", start=0.5, duration=9.0)]
    cuts = [
        lhotse.MonoCut("one", start=1.0, duration=1.5, channel=0, supervisions=told[:1], recording=a),
        lhotse.MonoCut("two", start=1.0, duration=1.5, channel=0, supervisions=told[1:], recording=a),
        lhotse.MonoCut("whole", start=0.0, duration=2.0, channel=0, recording=b),
        lhotse.MonoCut("fast", start=0.0, duration=1.0, channel=0, recording=b.perturb_speed(1.1)),
    ]
    cuts.append(cuts[0].append(cuts[2]))
    lhotse.CutSet.from_cuts([cuts[0], cuts[-2], cuts[-1]]).to_file(tmp_path / "my_cuts.jsonl")
    sources = read_corpus(tmp_path / "my_cuts.jsonl").sources
    assert [(Path(s.path).name, s.from_s, s.to_s) for s in sources if not s.reason] == [("a.wav", 1.0, 1.5)]
    assert {s.reason for s in sources if s.reason} == {
        "a MixedCut, expected a MonoCut",
        "fast: it is changed by transforms, expected it as it was recorded",
    }
    lhotse.CutSet.from_cuts(cuts[1:3]).to_file(tmp_path / "my_cuts.jsonl")
    sources = read_corpus(tmp_path / "my_cuts.jsonl").sources
    assert [(Path(s.path).name, s.from_s, s.to_s) for s in sources] == [("a.wav", 1.5, 2.5), ("b.wav", 0.0, 0.0)]


def data_set(folder: Path, speakers: list[str], *more: str) -> Any:
    """Of the hub, with sound inside it, of a second a row; `more` are other columns of sound."""
    import datasets

    sounds = []
    for i in range(len(speakers)):
        record(folder / f"{i}.flac", 1.0, 100.0 + 20 * i)
        sounds.append({"bytes": (folder / f"{i}.flac").read_bytes(), "path": f"{i}.flac"})
    columns = ["audio", *more]
    found = datasets.Dataset.from_dict({"speaker_id": speakers} | dict.fromkeys(columns, sounds))
    for column in columns:
        found = found.cast_column(column, datasets.Audio())
    return found


def test_a_data_set_of_the_hub_gives_the_clips_of_the_same_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Saved by `save_to_disk`, and as a folder of Parquet's files; nothing is decoded by its own package."""
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    made = data_set(tmp_path / "files", ["amy", "19", "amy"])
    made.save_to_disk(tmp_path / "saved")
    (tmp_path / "parquet").mkdir()
    made.to_parquet(tmp_path / "parquet" / "train-00000-of-00001.parquet")
    lines = [{"audio": f"files/{i}.flac", "speaker": who} for i, who in enumerate(["amy", "19", "amy"])]
    waves = {}
    for name, audio_dir in {
        "manifest": manifest(tmp_path, *lines),
        "saved": tmp_path / "saved",
        "parquet": tmp_path / "parquet",
        "asked": f"hf:{tmp_path / 'parquet'}?split=train&speaker=speaker_id",
    }.items():
        recipe = recipe_of(tmp_path / name, audio_dir)
        preprocess.run(recipe, Shard())
        assert Workspace(recipe.run_dir, "tiny").speakers().names == {0: "amy", 1: "speaker_19"}
        header, (unit,) = (
            read_header(Path(recipe.run_dir, "clips", "00000.safetensors")),
            Path(recipe.run_dir, "clips").glob("0*"),
        )
        assert header is not None
        waves[name] = (
            unit.read_bytes()[-3 * 90_000 :],
            [(c["speaker"], c["start_s"], c["content"]) for c in header["clips"]],
        )
        before = unit.stat().st_mtime_ns
        preprocess.run(recipe, Shard())
        assert unit.stat().st_mtime_ns == before
    assert len(waves["manifest"][1]) == 3
    assert all(found == waves["manifest"] for found in waves.values())


@pytest.mark.parametrize(
    ("query", "message"),
    [
        ("?split=dev", r"has no split dev; expected one of all"),
        ("?audio=audio&speaker=who", r"has no column who; expected one of speaker_id, audio, other"),
        ("", r"has 2 columns of sound \(audio, other\); expected one; choose with hf:.*\?audio=COLUMN"),
        ("?audio=speaker_id", r"has 0 columns of sound \(speaker_id, audio, other\)"),
        ("?spliet=dev", r"unknown spliet; expected config, split, speaker or audio"),
    ],
)
def test_what_is_asked_of_a_data_set_is_there(tmp_path: Path, query: str, message: str) -> None:
    data_set(tmp_path / "files", ["amy"], "other").save_to_disk(tmp_path / "saved")
    with pytest.raises(StageError, match=message):
        read_corpus(Path(f"hf:{tmp_path / 'saved'}{query}"))


def test_rows_without_sound_and_without_speakers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    record(tmp_path / "a.wav")
    rows = [{"bytes": (tmp_path / "a.wav").read_bytes(), "path": None}, None, {"bytes": b"", "path": "x.wav"}]
    made = datasets.Dataset.from_dict({"sound": rows}).cast_column("sound", datasets.Audio())
    made.save_to_disk(tmp_path / "saved")
    corpus = read_corpus(tmp_path / "saved")
    assert [(s.path, s.speaker, s.reason) for s in corpus.sources] == [
        ("hf:all/0/", 0, ""),
        ("hf:all/1/", 0, "row 1 of all: there is no sound in it"),
        ("hf:all/2/x.wav", 0, "row 2 of all: empty (0 bytes)"),
    ]
    assert "no column of speakers known: all of one" in corpus.about


@pytest.mark.parametrize(("name", "package"), [("my_cuts.jsonl", "lhotse"), ("hf:owner/name", "datasets")])
def test_a_missing_package_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, package: str) -> None:
    manifest(tmp_path, {"id": "a", "type": "MonoCut"}, name="my_cuts.jsonl")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(__import__("sys").modules, package, None)
    with pytest.raises(
        StageError, match=rf"needs the package {package} \(.*\): pip install {package} \(the extra corpora has it\)"
    ):
        read_corpus(Path(name))


def test_the_command_looks_at_any_corpus(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for path in LIBRITTS:
        record(tmp_path / path)
    assert (
        cli.main(["dataset", str(tmp_path / "LibriTTS"), "--data.sample_rate", str(RATE)]) == 3
    )  # a tone has no pauses
    said = capsys.readouterr().out
    assert "LibriTTS: 2 speakers, 3 recordings or parts" in said
    assert "0 (libritts_1034)" in said
    lines = [{"audio": path, "speaker": who, "end_s": 1.0} for path, who in LIBRITTS.items()]
    assert cli.main(["dataset", str(manifest(tmp_path, *lines)), "--data.sample_rate", str(RATE), "--json"]) == 3
    (found,) = json.loads(capsys.readouterr().out)
    assert [(s["name"], s["minutes"]) for s in found["speakers"]] == [
        ("libritts_1034", pytest.approx(1 / 60)),
        ("libritts_19", pytest.approx(2 / 60)),
    ]


def test_a_survey_is_shared_and_says_who_speaks_how_long(
    tmp_path: Path, many: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["--data.sample_rate", str(RATE), "--run_dir", str(tmp_path / "run"), "--survey"]
    for part in ("1/2", "0/2"):
        assert cli.main(["dataset", str(many), *options, "--shard", part]) == 0
        said = capsys.readouterr().out
        assert "Folders by speaker: 2 speakers, 0.01 hours" in said
        assert "Minutes of a speaker: 0.17 the least, 0.17 half of them, 0.18 the most" in said  # of 10 and 11 s
        assert "Left out: 1, as a/99.wav: not readable as audio" in said
    assert cli.main(["dataset", str(many), *options, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["sample_rates"] == [{"sample_rate": RATE, "minutes": pytest.approx(21 / 60)}]
    assert [(s["name"], s["recordings"]) for s in found["speakers"]] == [("a", 11), ("b", 10)]
    assert not list(Path(tmp_path, "run", "clips").glob("0*")), "nothing is cut"
    assert cli.main(["dataset", str(many), *options[:-1], "--shard", "0/2"]) == 1
    assert cli.main(["dataset", str(many), str(tmp_path), *options]) == 1


def test_a_report_of_many_files_lists_those_with_something_to_say(
    tmp_path: Path, many: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(clip_files, "MAX_LISTED", 21)
    recipe = recipe_of(tmp_path, many)
    preprocess.run(recipe, Shard())
    report = read_json(Path(recipe.run_dir, "clips", "report.json"))
    assert (report["files_used"], report["files_left_out"], report["files_not_listed"]) == (21, 1, 21)
    assert [file["path"] for file in report["files"]] == ["a/99.wav"]
    facts = read_facts(Path(recipe.run_dir))
    assert facts.data is not None
    assert [(row[0], row[1], row[4]) for row in facts.data.speakers] == [
        ("0 (a)", "11", f"{RATE} Hz"),
        ("1 (b)", "10", f"{RATE} Hz"),
    ]
    rows, whole = facts.data.speakers, clip_files.clips_report
    monkeypatch.undo()
    every = [dict(f) for p in unit_files(Path(recipe.run_dir, "clips")) for f in (read_header(p) or {})["files"]]
    write_json(Path(recipe.run_dir, "clips", "report.json"), whole(every, 21.0))
    again = read_facts(Path(recipe.run_dir)).data
    assert again is not None
    assert again.speakers == rows, "the same as of all files"
