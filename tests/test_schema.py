"""Texts that anybody may have edited: JSON that is checked against a type, YAML with bounds."""

from __future__ import annotations

import contextlib
import copy
import json
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers import EMBEDDER

from rvc_dist import workspace
from rvc_dist.config import ConfigError, load_recipe
from rvc_dist.files import ForeignFileError
from rvc_dist.runtime import run_lock
from rvc_dist.runtime.heartbeat import HEARTBEAT
from rvc_dist.runtime.logs import Failure
from rvc_dist.runtime.run_lock import HOLDER
from rvc_dist.schema import MAX_JSON_BYTES, MAX_JSON_VALUES, MAX_YAML_BYTES, check, parse_json, parse_yaml
from rvc_dist.tools import bench
from rvc_dist.train import checkpoint
from rvc_dist.train.progress import Progress
from rvc_dist.train.trial import Compiled
from rvc_dist.workspace import SourceFile, StageError

CLIP = {"speaker": 0, "source": "a.wav", "start_s": 0.0, "content": "0a"}
SIZES = {"num_samples": 9, "num_content": 2, "num_f0": 4}
FILE = {"path": "a.wav", "speaker": 0, "seconds_in": 1.0, "clips": 1, "seconds_out": 1.0, "reason": "", "lost": {}}
FILE |= {"sample_rate": 48000, "effective_rate": 44100}
SOURCE = asdict(SourceFile("a.wav", 0, 1, 10**18))
STATE = {"format": 2, "identity": {}, "meter": {"names": ["a"], "ranks": [[1.0, 2]]}, "num_ranks": 1}
MINE = {"rank": 0, "host": "a", "pid": 1, "token": "a1", "step": 3, "phase": "forward"}
DEALT = {"audio_s_per_s": 9.0, "parts": {"data": {"wall_s": 0.0}}}
SUMMARY = {"series": {"longest": {"wall_s": 1.0}, "dealt": DEALT}, "longest_frames": 100, "memory": {"resident": 1}}
DOCUMENTS: dict[Any, dict[str, Any]] = {
    workspace.WorkListFile: {"version": 2, "listing": "", "settings": {}, "units": [[SOURCE]], "excluded": [SOURCE]},
    workspace.FeaturesReport: {"settings": {}, "clips": "", "content_frames": 1},
    workspace.IndexReport: {"stamp": "", "file": "a.index", "speakers": [{"speaker": 0, "file": "b.index"}]},
    workspace.SpeakersFile: {"speakers": [{"id": 0, "name": "alice"}], "trained": [0]},
    workspace.ClipsReport: {"total_dataset_duration": "00:00:01"},
    workspace.ClipsHeader: {"stamp": "", "sample_rate": 48000, "clips": [CLIP], "files": [FILE]},
    workspace.FeaturesHeader: {"stamp": "", "sample_rate": 48000, "embedder": EMBEDDER, "clips": [CLIP | SIZES]},
    workspace.MuteHeader: {"stamp": "", **SIZES},
    checkpoint.StateFile: STATE | {"progress": Progress(batches_done=((1, 2),)).to_file(), "optimizer_groups": {}},
    Compiled: {"key": {}, "compiled": {"generator": True, "discriminator": False}},
    Failure: {"rank": 0, "host": "a", "time": 1.0, "error": "b"},
    HOLDER: run_lock.job() | {"token": "a1", "beat": 0, "path": "/a", "slurm_job": "1", "elastic_run": "2"},
    HEARTBEAT: MINE | {"num_sent": 0, "count": 7, "in_phase_s": 0.5, "failure": ""},
    bench.MEASURED: {"machine": {"cores": 1, "threads": 1}, "summary": SUMMARY},
    bench.ON_RANKS: {"communication": {"with_s": 2.0, "without_s": 1.0, "share": 0.5}},
}
ABSURD = [
    None,
    True,
    -1,
    1.5,
    2**70,
    float("nan"),
    float("inf"),
    "\ud800",
    "a\0b",
    "../x",
    [],
    {},
    [[]],
    [{}],
    {"a": 1},
]


@pytest.mark.parametrize("kind", DOCUMENTS, ids=lambda kind: kind.__name__)
def test_a_wrong_value_anywhere_is_a_sentence_with_its_key(kind: Any) -> None:
    """In the place of each value each absurd one, or none: it is accepted or named, nothing else happens."""
    good = json.loads(json.dumps(DOCUMENTS[kind]))
    assert check(copy.deepcopy(good), kind) == good
    refused = 0
    for path in paths(good):
        for value in [*ABSURD, "remove"]:
            edited = copy.deepcopy(good)
            at = edited
            for key in path[:-1]:
                at = at[key]
            if value == "remove":
                del at[path[-1]]
            else:
                at[path[-1]] = value
            said = reason(json.dumps(edited).encode(), kind)
            assert not said or ((": got " in said or "unknown key" in said) and len(said) < 300)
            refused += bool(said)
    assert refused > len(paths(good))


def reason(text: bytes, kind: Any) -> str:
    try:
        parse_json(text, kind)
    except ForeignFileError as error:
        return str(error)
    return ""


def paths(value: Any) -> list[tuple[Any, ...]]:
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [path for key, item in items for path in ((key,), *((key, *rest) for rest in paths(item)))]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (b"", "not valid JSON"),
        (b"[" * 100_000, "not valid JSON|nested"),
        (b'{"a":' * 40 + b"1" + b"}" * 40, "nested deeper than 32 levels"),
        (b"[" + b"0," * MAX_JSON_VALUES + b"0]", "more than"),
        (b'{"a": ' + b"9" * 5000 + b"}", "not valid JSON"),
        (b'{"a": 1, "a": 2}', "the key 'a' is there twice"),
        ('"\U0001f600'.encode() + b"x" * (MAX_JSON_BYTES // 2) + b'"', "bytes in memory"),
        (b"\xff\xfe", "not valid JSON"),
        (b"[]", "the whole: got \\[\\], expected keys"),
    ],
)
def test_json_has_bounds(text: bytes, expected: str) -> None:
    with pytest.raises(ForeignFileError, match=expected):
        parse_json(text, dict)


def test_a_damaged_document_is_named_with_the_remedy(tmp_path: Path) -> None:
    (tmp_path / "report.json").write_text('{"stamp": "x", "file": "../../etc/passwd"}')
    with pytest.raises(StageError, match=r"report\.json: file: got '.*', expected a file's name alone; delete it and"):
        workspace.read_json(tmp_path / "report.json", workspace.IndexReport)


LAUGHS = "a0: &a0 [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]\n" for i in range(1, 10)
)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (LAUGHS, "more than 10000 values"),
        ("name: &a [*a]", "a holds itself"),
        ("[" * 5000, "levels|nesting depth"),
        ("- " * 5000, "levels"),
        ("x" * (MAX_YAML_BYTES + 1), "bytes, expected at most"),
        ("train: {seed: 1}\ntrain: {seed: 2}", "the key 'train' is there twice"),
        ("train: {seed: " + "9" * 5000 + "}", "letters without quotes"),
        ("train: {seed: 2001-99-99}", "train.seed: got '2001-99-99', expected a whole number"),
        ("train: {max_steps: " + "9" * 30 + "}", "train.max_steps: got 9+, expected at most 9007199254740992"),
        ('run_dir: "\\ud800"', "run_dir: got|invalid Unicode"),
        ('run_dir: "a\\0b"', "run_dir: got"),
        ("train: !!python/object/apply:os.system [true]", "not valid YAML"),
    ],
)
def test_a_hostile_recipe_is_a_sentence(text: str, expected: str, tmp_path: Path) -> None:
    (tmp_path / "r.yaml").write_text(text)
    began = time.monotonic()
    with pytest.raises(ConfigError, match=expected) as caught:
        load_recipe(tmp_path / "r.yaml")
    assert time.monotonic() - began < 10
    assert len(str(caught.value)) < 1000


def test_random_edits_of_a_recipe_are_sentences() -> None:
    rng = np.random.Generator(np.random.PCG64(11))
    good = b"name: a\ntrain: &t {seed: 1, loss: {mel: 45.0}}\nextract: {embedder_mix: {layers: [9]}}\nx: *t\n"
    letters = np.frombuffer(b"{}[]:,&*!|>'\"#%@` \n\t-?0x\xff", np.uint8)
    for _ in range(300):
        text = np.frombuffer(good, np.uint8).copy()
        text[rng.integers(len(text), size=4)] = rng.choice(letters, 4)
        with contextlib.suppress(ForeignFileError):
            parse_yaml(text.tobytes())
