"""Files that nobody should have to trust: made by kind and seed, and given to what reads them.

`python hostile.py FIRST END FOLDER KIND...` makes and reads the inputs of these numbers of each kind (for END 0, as
many as it has) in one process, and prints a line of JSON for each: how it ended, after how long, and how much more
memory than before it took meanwhile.

A kind is an entry of KINDS: what must lie beside the hostile file, how to make one of a seed, and what reads it.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import hashlib
import io
import json
import os
import pickle
import re
import resource
import shutil
import signal
import struct
import sys
import time
import traceback
import zipfile
import zlib
from collections.abc import Callable, Mapping, Sequence
from functools import cache, partial
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import experiments
import faiss
import numpy as np
import safetensors.numpy
import soundfile
import torch
import yaml
from helpers import (
    NARROW,
    SteadyPitch,
    changed,
    make_checkpoint,
    make_generator,
    make_ssl_folder,
    make_whisper_folder,
    narrow_recipe,
    thin_networks,
    tone,
    voice_contents,
    workspace_of,
    write_features,
)
from torch import Tensor

from rvc_dist import choices, files, workspace
from rvc_dist.__main__ import run_stage
from rvc_dist.choices import F0_METHODS, F0Spec
from rvc_dist.config import ExtractConfig, InferConfig, Recipe, load_recipe
from rvc_dist.features.content import load_embedder, read_tensors
from rvc_dist.features.index_file import Retriever
from rvc_dist.models.discriminator import MultiPeriodDiscriminator
from rvc_dist.models.state_dict import to_upstream
from rvc_dist.runtime import run_lock, watchdog
from rvc_dist.runtime.logs import RankLog
from rvc_dist.screen import set_up_logging
from rvc_dist.tools import bench, bench_report, dataset_stats, measuring, plan
from rvc_dist.tools.inspect_file import inspect
from rvc_dist.tools.tracing import TracedStep
from rvc_dist.train import checkpoint, networks, trial
from rvc_dist.train.dataset import ClipTable
from rvc_dist.workspace import Shard, StageError

MOST_S = 20
"""Seconds after which an input is taken for one that never ends."""
MOST_BYTES = 16 << 30
"""Of address space: what libraries map counts too."""
WIDTH = 768
T = TypeVar("T")
Random = np.random.Generator
ABSURD: tuple[Any, ...] = (
    *(0, -1, 1, 7, 10**9, 2**31, 2**62, 2**70, 1.5, float("nan"), float("inf"), True, None, "", "1", "x" * 100_000),
    *([], {}, [0], [10**9] * 3, [1] * 1000, [[]], [["a"]], (), torch.zeros(2), torch.zeros(())),
)
"""In the place of any plain value."""


class Kind(NamedTuple):
    count: int
    """Inputs of the slow test."""
    prepare: Callable[[Path], None]
    """Write into a folder what every input needs beside it."""
    make: Callable[[Path, Random], None]
    """Write an input into that folder."""
    read: Callable[[Path], int]
    """Let the program read it; its exit code."""


def one_of(things: Sequence[T], rng: Random) -> T:
    return things[int(rng.integers(len(things)))]


def stage(name: str, recipe: Recipe) -> int:
    """`rvc-dist NAME` without the reading of its arguments, which takes longer than most inputs."""
    set_up_logging(Shard())
    return run_stage(name, recipe, Shard(), {})


def told(stage: str, function: Callable[[], object]) -> int:
    """What `main` does with a stage, for a part of one."""
    try:
        function()
    except (StageError, ValueError) as error:
        sys.stderr.write(f"rvc-dist {stage}: {error}\n")
        return 1
    return 0


def mangle(data: bytes, rng: Random) -> bytes:
    """`data` with one to three faults anywhere: what a bad disk, or a fuzzer that knows no format, does."""
    found = bytearray(data)
    for _ in range(rng.integers(1, 4)):
        at, size = int(rng.integers(len(found) + 1)), int(rng.integers(1, 64))
        fault = rng.integers(7)
        if fault == 0 and at < len(found):
            found[at] ^= 1 << int(rng.integers(8))
        elif fault == 1:
            del found[at:]
        elif fault == 2:
            found[at : at + size] = bytes(size)
        elif fault == 3:
            found[at:at] = rng.bytes(size)
        elif fault == 4:
            found[at:at] = found[at : at + size]
        elif fault == 5:
            number = one_of((0, 1, 2**31, 2**32 - 1, 2**40, 2**62, 2**63, 2**64 - 1), rng)
            found[at : at + 8] = struct.pack("<Q", number)
        else:
            del found[at : at + size]
    return bytes(found)


def spoil(path: Path, whole: bytes, rng: Random) -> bool:
    """Write what no reader of any format may trip over: no file, one of another kind, a mangled one; or nothing."""
    path.unlink(missing_ok=True)
    choice = rng.integers(8)
    if choice == 0:
        kind = rng.integers(5)
        if kind == 0:
            os.mkfifo(path)
        elif kind == 1:
            path.mkdir()
        elif kind == 2:
            path.symlink_to("/dev/zero")
        elif kind == 3:
            path.symlink_to(path.name)
        else:
            path.write_bytes(rng.bytes(int(rng.integers(3)) * 50))
    elif choice < 3:
        path.write_bytes(mangle(whole, rng))
    return choice < 3


# Torch files


def saved(contents: Any, **options: Any) -> bytes:
    buffer = io.BytesIO()
    torch.save(contents, buffer, **options)
    return buffer.getvalue()


def rezipped(data: bytes, change: Callable[[str, bytes], bytes], compression: int = zipfile.ZIP_STORED) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(data)) as before, zipfile.ZipFile(buffer, "w", compression) as after:
        for name in before.namelist():
            after.writestr(name, change(name, before.read(name)))
    return buffer.getvalue()


def with_pickle(data: bytes, pickled: Callable[[bytes], bytes]) -> bytes:
    return rezipped(data, lambda name, content: pickled(content) if name.endswith("data.pkl") else content)


def pickle_bomb(rng: Random) -> bytes:
    """A pickle that costs more than its bytes, or does more than to hold plain data."""
    nested = b"]" * int(rng.choice([10, 1000, 100_000]))
    doubled = b")" + b"q\0h\0\x86" * 60  # a tuple of itself twice, sixty times over
    choices = (
        b"\x80\2" + nested + b"a" * (len(nested) - 1) + b".",
        b"\x80\2]r\xff\xff\xff\x7f.",
        b"\x80\2\x8b\xff\xff\xff\x7f" + bytes(100) + b".",
        b"\x80\2X\xff\xff\xff\xff" + bytes(100) + b".",
        b"\x80\2}" + doubled + b"K\1s.",  # as a key it has to be hashed
        b"\x80\2}X\6\0\0\0weight" + doubled + b"sX\6\0\0\0config" + doubled + b"s.",
        b"\x80\2c__builtin__\nbytearray\n\x8a\5\0\0\0\0\x10\x85R.",
        b"\x80\2cos\nsystem\nX\4\0\0\0true\x85R.",
        b"\x80\2ctorch._utils\n_rebuild_tensor_v2\n(R.",
        b"\x80\2ccollections\nOrderedDict\n(]tR.",
        pickle.dumps({"weight": {}, "config": [1] * 18}, protocol=int(rng.integers(6))),
        b"\x80\2" + b"(" * 500_000 + b".",
        b"\x80\2" + b"0" * 10 + b".",
    )
    return one_of(choices, rng)


def odd_tensor(like: Tensor, rng: Random) -> Tensor:
    """A tensor in the place of `like` that is not what a network holds."""
    broken = like.clone()
    broken.view(-1)[rng.integers(like.numel())] = float(rng.choice([np.nan, np.inf, -np.inf]))
    overlapping = torch.zeros(like.numel() + 8, dtype=like.dtype).as_strided(
        [*like.shape[:-1], like.shape[-1]], [1] * like.ndim
    )
    choices: tuple[Callable[[], Tensor], ...] = (
        lambda: torch.zeros((), dtype=like.dtype).expand(10**8, *like.shape[1:]),
        lambda: torch.zeros((), dtype=like.dtype).expand(like.shape),
        lambda: broken,
        lambda: overlapping,
        lambda: like.to(torch.complex64),
        lambda: like > 0,
        lambda: like.to(torch.float8_e4m3fn),
        lambda: like.to(torch.int32),
        lambda: like.float().to_sparse(),
        lambda: torch.quantize_per_tensor(like.float(), 0.1, 0, torch.qint8),
        lambda: like[:0],
        lambda: like[None],
        lambda: like.flatten(),
        lambda: torch.zeros(like.shape, device="meta"),
        lambda: torch.nn.Parameter(like.float()),
    )
    return one_of(choices, rng)()


def odd_state(state: Mapping[str, Tensor], rng: Random) -> dict[Any, Any]:
    """A state dict with one thing wrong."""
    found: dict[Any, Any] = dict(state)
    key = list(found)[rng.integers(len(found))]
    choice = rng.integers(6)
    if choice == 0:
        del found[key]
    elif choice == 1:
        found[key] = one_of(ABSURD, rng)
    elif choice == 2:
        found["more." * int(rng.integers(1, 1000))] = torch.zeros(3)
    elif choice == 3:
        found[int(rng.integers(9))] = found.pop(key)
    else:
        found[key] = odd_tensor(found[key], rng)
    return found


def write_torch(path: Path, contents: dict[str, Any], state_key: str, rng: Random) -> None:
    """A torch file with something wrong, on any level: file, zip, pickle, tensors, values."""
    whole = saved(contents)
    if spoil(path, whole, rng):
        return
    choice = rng.integers(10)
    if choice == 0:
        data = saved(contents, _use_new_zipfile_serialization=False)
    elif choice == 1:
        bomb = bytes(int(rng.choice([0, 1 << 25])))
        data = rezipped(
            whole, lambda name, content: bomb + content if name.endswith("data/0") else content, zipfile.ZIP_DEFLATED
        )
    elif choice == 2:
        data = rezipped(whole, lambda name, content: b"big" if name.endswith("byteorder") else content)
    elif choice == 3:
        data = with_pickle(whole, partial(mangle, rng=rng))
    elif choice == 4:
        data = with_pickle(whole, lambda _: pickle_bomb(rng))
    elif choice == 5:
        data = rezipped(whole, lambda name, content: content[: len(content) // 2] if "data/" in name else content)
    elif choice < 8:
        data = saved(contents | {state_key: odd_state(contents[state_key], rng)})
    else:
        odd = copy.deepcopy({k: v for k, v in contents.items() if k != state_key}) | {state_key: contents[state_key]}
        where: Any = odd
        key: Any = list(odd)[rng.integers(len(odd))]
        if isinstance(odd[key], list) and rng.integers(4):
            where, key = odd[key], int(rng.integers(len(odd[key])))
        where[key] = one_of(ABSURD, rng)
        data = saved(odd)
    path.write_bytes(data)


@cache
def voice() -> dict[str, Any]:
    recipe = narrow_recipe(Path("unused"))
    told = {"speaker_info": [{"id": 0, "name": "alice", "f0_median": 200.0}], "f0_median": 200.0, "unvoiced": "zero"}
    return voice_contents(recipe, make_generator(recipe)) | told | {"embedder_mix": {"layers": [], "ratio": 0.5}}


def infer(folder: Path) -> int:
    config = InferConfig(
        input=str(folder / "in.wav"),
        output=str(folder / "out.wav"),
        model=str(folder / "voice.pth"),
        index_rate=0.0,
        embedder_model="mfcc",
    )
    return stage("infer", narrow_recipe(folder, infer=config))


def prepare_infer(folder: Path) -> None:
    soundfile.write(folder / "in.wav", tone(0.2), 24000)
    (folder / "voice.pth").write_bytes(saved(voice()))
    F0_METHODS["pyin"] = F0Spec(SteadyPitch)


@cache
def networks_of_a_run() -> dict[str, dict[str, Tensor]]:
    generator = make_generator(narrow_recipe(Path("unused")))
    discriminator = MultiPeriodDiscriminator(choices.DISCRIMINATORS["v2"], NARROW.discriminator_channels)
    return {"g": to_upstream(generator.state_dict()), "d": to_upstream(discriminator.state_dict())}


def make_pretrained(folder: Path, rng: Random) -> None:
    name = "gd"[rng.integers(2)]
    contents = {"model": networks_of_a_run()[name], "iteration": 3, "optimizer": {}, "learning_rate": 1e-4}
    write_torch(folder / f"{name}.pth", contents, "model", rng)


def read_pretrained(folder: Path) -> int:
    names = [n for n in "gd" if os.path.lexists(folder / f"{n}.pth")]
    recipe = changed(narrow_recipe(folder), "train", **{f"pretrained_{n}": str(folder / f"{n}.pth") for n in names})
    table = ClipTable((), (), WIDTH, {"name": "mfcc", "width": WIDTH, "hash": ""}, 1)
    return told("train", lambda: networks.build(recipe, table))


def make_weights(folder: Path, rng: Random) -> None:
    """The weights of a pitch tracker or an encoder, in either format."""
    arrays = {f"layer.{i}": np.ones((i + 1, 3), np.float32) for i in range(6)}
    path = folder / ("weights.safetensors" if rng.integers(2) else "weights.pt")
    if path.suffix == ".pt":
        tensors = {name: torch.from_numpy(array) for name, array in arrays.items()}
        write_torch(path, {"model": tensors, "step": 3}, "model", rng)
    else:
        write_safetensors(path, arrays, {}, rng)


def read_weights(folder: Path) -> int:
    return told("extract", lambda: [read_tensors(path) for path in folder.glob("weights.*")])


def make_inspected(folder: Path, rng: Random) -> None:
    """One of the files that other kinds have, under its name or another's."""
    makers: tuple[Callable[[Path, Random], None], ...] = (
        lambda f, r: write_torch(f / "voice.pth", voice(), "weight", r),
        *(make_pretrained, make_weights, make_index),
    )
    if which := int(rng.integers(len(makers))):
        (folder / "voice.pth").unlink()  # a whole one takes as long to read as ten others
    makers[which](folder, rng)
    for path in list(folder.iterdir()):
        if rng.integers(8) == 0:
            path.rename(folder / f"x{rng.choice(['.pth', '.index', '.safetensors', '.npy', ''])}")


def read_inspected(folder: Path) -> int:
    found = [inspect(path, narrow_recipe(folder)) for path in [*folder.iterdir(), folder]]
    for thing in found:
        sys.stderr.write("".join(f"rvc-dist inspect: {line:.400}\n" for line in (thing.what, *thing.facts.values())))
    return int(not all(thing.is_known for thing in found))


# Safetensors of the run folder


def write_safetensors(path: Path, arrays: dict[str, Any], metadata: dict[str, str], rng: Random) -> None:
    whole = safetensors.numpy.save(arrays, metadata)
    if spoil(path, whole, rng):
        return
    (size,) = struct.unpack_from("<Q", whole)
    header = json.loads(whole[8 : 8 + size])
    name = list(arrays)[rng.integers(len(arrays))]
    choice = rng.integers(8)
    if choice == 0:
        header[name]["dtype"] = str(rng.choice(["F8_E4M3", "BOOL", "I64", "F16", "BF16", "U8", "X"]))
    elif choice == 1:
        header[name]["shape"] = [int(rng.choice([0, 1, 10**9, 2**62])), *header[name]["shape"][1:]]
    elif choice == 2:
        header[name]["data_offsets"] = [0, int(rng.choice([0, 4, 2**40, 2**62]))]
    elif choice == 3:
        header["other"] = header.pop(name)
    else:
        odd = dict(arrays)
        if choice == 4:
            odd[name] = odd[name].copy()
            odd[name].flat[0] = np.nan
        elif choice == 5:
            odd[name] = odd[name][: len(odd[name]) // 2]
        elif choice == 6:
            odd[name] = odd[name].astype(np.float64)
        else:
            odd[name] = odd[name][None]
        path.write_bytes(safetensors.numpy.save(odd, metadata))
        return
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + whole[8 + size :])


def features_recipe(folder: Path) -> Recipe:
    return changed(narrow_recipe(folder), "extract", include_mutes=0)


def prepare_features(folder: Path) -> None:
    recipe = features_recipe(folder)
    rng = np.random.default_rng(0)
    write_features(recipe, [[rng.standard_normal((50, 16), np.float32) for _ in range(3)] for _ in range(2)])


def make_features(folder: Path, rng: Random) -> None:
    path = workspace_of(features_recipe(folder)).features_file(0)
    with safetensors.safe_open(path, framework="numpy") as file:
        metadata, arrays = file.metadata(), {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    write_safetensors(path, arrays, metadata, rng)


def read_features(folder: Path) -> int:
    code = stage("index", features_recipe(folder))
    return max(code, told("train", lambda: ClipTable.load(features_recipe(folder))))


# Indexes


@cache
def an_index(kind: str, width: int = WIDTH) -> bytes:
    vectors = np.random.default_rng(0).standard_normal((400, width), np.float32)
    made = faiss.index_factory(width, kind)
    made.train(vectors)
    made.add(vectors[: 1 if kind == "IVF64,Flat" else 400])
    return faiss.serialize_index(made).tobytes()


OTHER_INDEXES = (
    *("PQ8x4fs", "IVF4,PQ8x4fs", "IVF4,PQ8x4", "PQ8x4", "SQ8", "IVF4,SQ8", "HNSW8,Flat", "LSH", "PCA8,IVF4,Flat"),
    *("IVF4_HNSW8,Flat", "IVF4,PQ8x4,RFlat", "NSG8,Flat", "IVF4,Flat,RFlat"),
)
"""Codes of 4 bits: their 16 centroids are trained in no time."""


def make_index(folder: Path, rng: Random) -> None:
    path = folder / "i.index"
    whole = an_index(str(rng.choice(["IVF4,Flat", "IVF64,Flat", "Flat"])))
    if spoil(path, whole, rng):
        return
    choice = rng.integers(8)
    found = bytearray(whole)
    if choice == 0:
        found = bytearray(an_index(str(rng.choice(OTHER_INDEXES)), 16))
    elif choice == 1:
        found = bytearray(an_index("IVF4,Flat", int(rng.choice([1, 16, 256]))))
    elif choice == 2:  # a number of a header: sizes, counts, kinds, nprobe
        heads = [m.start() for m in re.finditer(rb"IxF2|IwFl|ilar|full|sprs", whole)]
        at = heads[rng.integers(len(heads))] + 4 * int(rng.integers(0, 16))
        odd = one_of((0, 1, 3, 100, 2**20, 2**31 - 1, 2**32, 2**40, 2**61, 2**62, 2**63, 2**64 - 1), rng)
        found[at : at + 8] = struct.pack("<Q", odd)
    elif choice == 3:  # vectors and their numbers
        at = len(found) - 8 * int(rng.integers(1, 40))
        found[at : at + 8] = struct.pack("<Q", one_of((0, 399, 400, 2**31, 2**63, 2**64 - 1), rng))
    elif choice == 4:
        at = whole.find(b"ilar")
        found[at : at + 4] = one_of((b"il00", b"ilod", b"ilps", b"ilpl", b"noop"), rng)
    elif choice == 5 and b"ilar" in whole:  # lists on the disk, in a file that it names
        head = whole[: whole.find(b"ilar")]
        lists = struct.pack("<QQQ", 4, 4 * WIDTH, 4) + bytes(4 * 24) + struct.pack("<Q", 0)
        name = b"/etc/passwd"
        found = bytearray(head + b"ilod" + lists + struct.pack("<Q", len(name)) + name + struct.pack("<Q", 1 << 20))
    elif choice == 6:
        at = 4 * int(rng.integers(10, len(found) // 4))
        found[at : at + 4] = struct.pack("<f", float(rng.choice([np.nan, np.inf])))
    else:
        found += rng.bytes(9)
    path.write_bytes(found)


def read_index(folder: Path) -> int:
    queries = np.zeros((3, WIDTH), np.float32)
    return told("infer", lambda: Retriever(folder / "i.index", WIDTH)(queries, 0.5))


# .npy files


def prepare_experiment(folder: Path) -> None:
    experiments.make(folder / "logs" / "voice", "applio")


def make_npy(folder: Path, rng: Random) -> None:
    names = ("extracted/0_0_0.npy", "f0_voiced/0_0_0.wav.npy", "extracted/3_1_0.npy")
    path = folder / "logs" / "voice" / names[rng.integers(len(names))]
    whole = path.read_bytes()
    if spoil(path, whole, rng):
        return
    deep = b"(" * int(rng.choice([50, 5000, 60_000]))
    headers = (
        b"{'descr': " + deep,
        b"{'descr': '<f4', 'fortran_order': False, 'shape': " + deep,
        b"{'descr': '|O', 'fortran_order': False, 'shape': (1,), }",
        b"{'descr': [('a', '<f4'), ('b', '|O')], 'fortran_order': False, 'shape': (1,), }",
        b"{'descr': '<f4', 'fortran_order': False, 'shape': (9999999999999, 99999999), }",
        b"{'descr': '<f4', 'fortran_order': False, 'shape': (-1, 768), }",
        b"{'descr': '<f4', 'fortran_order': False, 'shape': (4294967296, 4294967296), }",
        b"{'descr': '<f4', 'fortran_order': True, 'shape': (2, 3), }",
        b"{'descr': '<c8', 'fortran_order': False, 'shape': (2, 3), }",
        b"{'descr': '<U9999999', 'fortran_order': False, 'shape': (2, 3), }",
        b"{'shape': (2, 3), 'descr': '<f4'}",
        b"9" * 5000,
        b"{'descr': '<f4', 'fortran_order': False, 'shape': (" + b"1," * 100 + b"), }",
    )
    text = one_of(headers, rng) + b"\n"
    version = int(rng.integers(1, 4))
    length = struct.pack("<H" if version == 1 else "<I", min(len(text), 65535))
    path.write_bytes(b"\x93NUMPY" + bytes([version, 0]) + length + text + bytes(int(rng.choice([0, 24, 4096]))))


def read_npy(folder: Path) -> int:
    recipe = changed(narrow_recipe(folder), "data", audio_dir=str(folder / "logs" / "voice"), sample_rate=24000)
    return stage("import", recipe)


# Texts


PLAIN_ABSURD: tuple[Any, ...] = (
    *(0, -1, 1, 7, 10**9, 2**31, 2**53, 2**62, 2**70, 1.5, -0.5, 1e308, float("nan"), float("inf"), True, None),
    *("", "1", "x" * 100_000, "\ud800", "\udc80", "a\0b", "../../x", "/etc/passwd", "a/" * 3000, "\x1b[2J\n", "ä"),
    *([], {}, [0], [10**9] * 3, [1] * 1000, [[]], [{}], {"a": 1}, {"": {}}, [[["a"] * 3] * 3] * 3),
)
"""`ABSURD` as far as texts can hold it."""


def places(value: Any) -> list[tuple[Any, Any]]:
    """(container, key) of every value within `value`."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [place for key, item in items for place in ((value, key), *places(item))]


def edited(document: Any, rng: Random) -> Any:
    """A copy of `document` with one to three values replaced, removed, renamed or added."""
    found = copy.deepcopy(document)
    for _ in range(rng.integers(1, 4)):
        if not (inside := places(found)):
            return one_of(PLAIN_ABSURD, rng)
        where, key = one_of(inside, rng)
        choice = rng.integers(8)
        if choice == 0:
            del where[key]
        elif choice == 1 and isinstance(where, dict):
            where[str(one_of(("x" * 1000, "", "path", "\ud800"), rng))] = where.pop(key)
        elif choice == 2 and isinstance(where, list):
            where.extend(where * int(rng.choice([1, 100])))
        elif choice == 3 and isinstance(where[key], (int, float)):
            where[key] = where[key] * one_of((-1, 2, 1000, 1.000001), rng) + 1
        else:
            where[key] = copy.deepcopy(one_of(PLAIN_ABSURD, rng))
    return found


def big_json(rng: Random) -> bytes:
    """A text that costs much: little of it is within the bounds."""
    choices: tuple[Callable[[], bytes], ...] = (
        lambda: b"[" * int(rng.choice([33, 5000, 1_000_000])),
        lambda: b'{"a":' * 500 + b"1" + b"}" * 500,
        lambda: b"[" + b"0," * 1_900_000 + b"0]",
        lambda: b'{"a": [' + b"{}," * 900_000 + b"{}]}",
        lambda: b"{" + b",".join(b'"%d":{}' % i for i in range(500_000)) + b"}",
        lambda: b'{"a": "' + b"x" * (60 << 20) + b'"}',
        lambda: b'{"a": "' + "\U0001f600".encode() + b"x" * (60 << 20) + b'"}',
        lambda: b'{"a": "' + b"\\u0041" * (10 << 20) + b'"}',
        lambda: b'{"a": ' + b"9" * int(rng.choice([4000, 5000, 1_000_000])) + b"}",
        lambda: b'{"a": 1e' + b"9" * 4000 + b"}",
        lambda: b" " * (70 << 20),
        lambda: b'{"a": 1, "a": 2}',
    )
    return one_of(choices, rng)()


def write_json(path: Path, rng: Random, document: Any = None) -> None:
    """A JSON file with something wrong, on any level: file, text, values."""
    whole = path.read_bytes() if document is None else json.dumps(document).encode()
    if spoil(path, whole, rng):
        return
    choice = rng.integers(30)
    if choice == 0:
        data = big_json(rng)
    elif choice == 1:
        data = one_of((b"\xff\xfe{}", b"\xef\xbb\xbf{}", b"null", b"[]", b"0", b'"x"', b"{", b"", b"\0" * 99), rng)
    elif choice < 4:
        data = mangle(whole, rng)
    else:
        data = json.dumps(edited(json.loads(whole), rng)).encode()
    path.write_bytes(data)


# Texts of the run folder


def run_recipe(folder: Path) -> Recipe:
    return changed(narrow_recipe(folder), "extract", include_mutes=1)


def prepare_run(folder: Path) -> None:
    """A run folder of all stages, as far as the narrow voice is made by them."""
    F0_METHODS["pyin"] = F0Spec(SteadyPitch)
    recipe = run_recipe(folder)
    (folder / "audio" / "1").mkdir(parents=True)
    for name, seconds in (("a.wav", 1.5), ("b.wav", 2.0), ("1/c.wav", 1.5)):
        soundfile.write(folder / "audio" / name, tone(seconds), 24000)
    for name in ("preprocess", "extract", "index"):
        assert not stage(name, recipe), name
    work = workspace_of(recipe)
    generator = make_generator(recipe, num_speakers=2)
    (content,) = {f.content for f in workspace.WorkList.load(work.work_list_file).units[0].files if f.path == "a.wav"}
    data = {"recordings": {content: "a.wav"}, "train": "1", "validation": "2", "dataset_length": "00:00:05"}
    data |= {"holdout": [0.05, 0.1], "held_from_s": {"a.wav": 1.0}}
    checkpoint.save(work.checkpoints_dir, dataclasses.replace(make_checkpoint(recipe, generator), data=data))
    assert not stage("export", recipe)
    files.write_json(work.compile_file, {"key": {}, "compiled": {"generator": True, "discriminator": False}})
    failure = {"rank": 1, "host": "a", "time": 1.0, "error": "disk full"}
    files.write_json(work.failure_file(1), failure)
    (folder / "chosen").write_text("clips/plan.json")


RUN_FILES: dict[str, tuple[str, ...]] = {
    "clips/plan.json": ("preprocess", "plan", "dataset"),
    "clips/report.json": ("preprocess", "export", "dataset"),
    "clips/00000.safetensors": ("preprocess", "extract", "plan"),
    "features/report.json": ("extract", "index", "export"),
    "features/00000.safetensors": ("index", "export"),
    "features/mute.safetensors": ("extract", "export"),
    "index/report.json": ("index", "infer"),
    "checkpoints/step_00000010/state.json": ("export", "preprocess"),
    "checkpoints/step_00000010/manifest.json": ("export",),
    "speakers.json": ("preprocess", "dataset"),
    "config.yaml": ("preprocess", "extract"),
    "compile.json": (),
    "logs/failed_rank_00001.json": (),
}
"""A file of the run folder -> the stages that read it."""


def make_run(folder: Path, rng: Random) -> None:
    name = one_of(list(RUN_FILES), rng)
    (folder / "chosen").write_text(name)
    path = folder / "run" / name
    if path.suffix == ".yaml":
        write_yaml(path, rng)
    elif path.suffix == ".json":
        write_json(path, rng)
        if path.name == "state.json" and path.is_file():  # else its hash alone is told
            manifest = json.loads((path.parent / "manifest.json").read_text())
            data = path.read_bytes()
            manifest["state.json"] = {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
            (path.parent / "manifest.json").write_text(json.dumps(manifest))
    else:
        with safetensors.safe_open(path, framework="numpy") as file:
            metadata, arrays = file.metadata(), {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
        write_json(folder / "header", rng, json.loads(metadata[workspace.HEADER_KEY]))
        text = (folder / "header").read_bytes() if (folder / "header").is_file() else b"{}"
        path.write_bytes(safetensors.numpy.save(arrays, {workspace.HEADER_KEY: text.decode(errors="replace")}))


def read_run(folder: Path) -> int:
    recipe, name = run_recipe(folder), (folder / "chosen").read_text()
    work = workspace_of(recipe)
    if name == "compile.json":
        return told("train", lambda: workspace.read_json(work.compile_file, trial.Compiled))
    if name.startswith("logs"):
        return told("train", lambda: sys.stderr.write(f"rvc-dist: {RankLog(work, Shard()).first_failure(0)}\n"))
    code = told("export", lambda: (work.index_file(), work.kept_recipe()))
    for each in RUN_FILES[name]:
        if each == "plan":
            code = max(code, told("plan", lambda: plan.training_clips(recipe)))
        elif each == "dataset":
            code = max(code, told("dataset", lambda: dataset_stats.run(recipe, Shard(), [work.root], True)))
        elif each == "infer":
            code = max(code, told("infer", lambda: work.index_file()))
        else:
            code = max(code, stage(each, recipe))
    return code


# Recipes


def write_yaml(path: Path, rng: Random) -> None:
    whole = path.read_bytes()
    if spoil(path, whole, rng):
        return
    levels = int(rng.integers(3, 40))
    laughs = "a0: &a0 [x, x, x, x, x, x, x, x, x]\n" + "".join(
        f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]\n" for i in range(1, levels)
    )
    merges = "a0: &a0 {x: 1}\n" + "".join(f"a{i}: &a{i} {{<<: [*a{i - 1}, *a{i - 1}]}}\n" for i in range(1, levels))
    texts = (
        *(laughs, merges, "name: &a [*a]", "? *a\n: &a b", "[" * 100_000, "{" * 100_000, "- " * 100_000, "a: " * 5000),
        *("? " * 5000, "x" * 200_000, "train: {seed: " + "9" * 5000 + "}", "train: {seed: 2001-99-99}", "&a " * 5000),
        *('run_dir: "\\ud800"', 'run_dir: "a\\0b"', "train: !!python/object/apply:os.system [true]", "!!binary x"),
        *("%YAML 9.9\n---\na: 1", "--- a\n--- b\n", "train: {seed: 0x" + "f" * 2000 + "}", "name: !!set {a, b}"),
        *("train: {seed: 1:" + ":".join(["59"] * 900) + "}", "train:\n" + "  seed: 1\n" * 9000, "\t\t: x", "\0"),
        *("train: {learning_rate: .inf}", "train: {batch_size: 1e400}", "{? [a]: b}", "{? {a: b}: c}", "null: 1"),
    )
    choice = rng.integers(4)
    if choice == 0:
        data = mangle(whole, rng)
    elif choice == 1:
        data = one_of(texts, rng).encode("utf-8", "surrogatepass")
    else:
        text = yaml.safe_dump(edited(yaml.safe_load(whole), rng), allow_unicode=bool(rng.integers(2)))
        data = text.encode("utf-8", "replace")
    path.write_bytes(data)


def prepare_recipe(folder: Path) -> None:
    (folder / "r.yaml").write_text(narrow_recipe(folder).to_yaml())


# An encoder's folder


def prepare_encoder(folder: Path) -> None:
    make_ssl_folder(folder / "Hubert", "Hubert", 2)
    make_ssl_folder(folder / "WavLM", "WavLM", 2)
    make_whisper_folder(folder / "Whisper", whole=False)
    make_ssl_folder(folder / "encoder", "Wav2Vec2", 2)
    for path in folder.iterdir():
        (path / "preprocessor_config.json").write_text('{"do_normalize": true, "n_fft": 400, "hop_length": 160}')


def make_encoder(folder: Path, rng: Random) -> None:
    name = one_of(("Hubert", "WavLM", "Whisper"), rng)
    shutil.rmtree(folder / "encoder")
    (folder / name).rename(folder / "encoder")
    path = folder / "encoder" / ("config.json" if rng.integers(5) else "preprocessor_config.json")
    if rng.integers(2):
        write_json(path, rng)
        return
    config = json.loads(path.read_bytes())
    numbers = [key for key, value in config.items() if type(value) in (int, list)]
    config[one_of(numbers, rng)] = one_of((0, 3, 255, 10**5, 10**7, 10**9, [10**9], [512] * 100_000), rng)
    path.write_text(json.dumps(config))


def read_encoder(folder: Path) -> int:
    config = ExtractConfig(embedder_model=str(folder / "encoder"))
    wave = torch.zeros(1, 8000)
    return told("extract", lambda: load_embedder(config, "v2", torch.device("cpu"))(wave))


# What `import` reads besides arrays


def make_import(folder: Path, rng: Random) -> None:
    experiment = folder / "logs" / "voice"
    waves = experiment / "sliced_audios"
    filelist = experiment / "filelist.txt"
    choice = rng.integers(8)
    if choice < 3:
        write_json(experiment / ("config.json" if rng.integers(2) else "model_info.json"), rng)
    elif choice == 3:
        spoil(filelist, filelist.read_bytes(), rng)
    elif choice < 6:
        lines = filelist.read_text().splitlines()
        at = int(rng.integers(len(lines)))
        odd = (
            *(
                "",
                "|" * 1000,
                "||",
                "a|b|999999999",
                "a|b|-1",
                "a|b|1e9",
                "a|b|\u0661",
                "mute|/etc/passwd|0",
                "\0|\0|0",
            ),
            *("x" * 100_000 + "|y|0", "../../etc/passwd|y|0", "mute/../../mute/x/mute.npy|mute/x/mute.npy|0"),
            *("\u2028".join(lines), "a|" + "/dev/zero" + "|0", "mute.wav|/dev/mute/mute.npy|0", lines[at][:-1] + "7"),
            *("\n".join(f"{i}_0_0.wav|b|{i}" for i in range(3000)), "mute.wav|a/mute/x/mute.npy|0\n" * 5000),
            *("a|b|0\n" * 400_000, "\n" * 299_000, "x" * (40 << 20)),
        )
        lines[at] = one_of(odd[: None if rng.integers(4) else -3], rng)
        filelist.write_text("\n".join(lines), "utf-8", "surrogatepass")
    else:
        names = (
            b"0_0_9.wav",
            b"\xff\xfe.wav",
            b"a\nb.wav",
            b"\x1b[2J.wav",
            b"9" * 240 + b".wav",
            b"0_0_0.flac",
            b".wav",
        )
        path = Path(os.fsdecode(os.fsencode(waves) + b"/" + one_of(names, rng)))
        spoil(path, (waves / "0_0_0.wav").read_bytes(), rng)
        for folder_name in ("extracted", "f0_voiced"):
            if not rng.integers(3):
                shutil.rmtree(experiment / folder_name)
                spoil(experiment / folder_name, b"x", rng)


def prepare_speakers(folder: Path) -> None:
    """An experiment of several speakers, with weights and the optimizers' moments."""
    experiment = experiments.make(folder / "logs" / "voice", "rvc-next")
    experiments.add_mutes(experiment, "rvc-next")
    narrow = changed(narrow_recipe(folder), "data", sample_rate=experiments.RATE)
    experiments.add_weights(experiment, 5, narrow, tool="rvc-next")


def make_speakers(folder: Path, rng: Random) -> None:
    experiment = folder / "logs" / "voice"
    choice = rng.integers(6)
    path = experiment / one_of(("experiment.json", "multispeaker_manifest.json", "config.json"), rng)
    if choice < 4 and path.name != "config.json":  # which says how wide the weights are: else they only take long
        for letter in "GD":
            (experiment / f"{letter}_5.pth").unlink()
    if choice < 2:
        write_json(path, rng, json.loads(path.read_text("utf-8")))
    elif choice == 2:
        path = experiment / "mute" / "3_feature768" / "mute.npy"
        spoil(path, path.read_bytes(), rng)
    elif choice == 3:
        filelist = experiment / "filelist.txt"
        lines = filelist.read_text("utf-8").splitlines()
        names = ("", "|", "\x1b[2J", "x" * 100_000, "109", "\udcff", "speaker 5", "../../x", "\0", "Zoë B.", "a|b|c")
        start, _, _ = lines[0].rpartition("|")
        others = [f"{start.rpartition('|')[0]}|{i}|name {i}" for i in range(int(rng.choice([2, 3000])))]
        filelist.write_text("\n".join([f"{start}|{one_of(names, rng)}", *lines[1:], *others]), "utf-8", "surrogatepass")
    else:
        path = experiment / one_of(("G_5.pth", "D_5.pth"), rng)
        contents = torch.load(path, weights_only=True)
        if choice == 4:
            write_torch(path, contents, "model", rng)
        else:
            torch.save(contents | {"optimizer": edited(contents["optimizer"], rng)}, path)


# Locks, beats and results of the bench


def prepare_lock(folder: Path) -> None:
    run_lock.STALE_S = 0.0  # a holder elsewhere is soon taken for dead
    held = run_lock.job() | {
        "pid_space": "another kernel",
        "token": "a1",
        "beat": 5,
        "path": str(folder / "train.lock"),
    }
    (folder / "train.lock").write_text(json.dumps(held))


def make_lock(folder: Path, rng: Random) -> None:
    path = folder / "train.lock"
    held = json.loads(path.read_text())
    here = {"pid_space": run_lock.pid_space(), "path": str(one_of((path, Path("/dev/zero"), folder), rng))}
    write_json(path, rng, held | here if rng.integers(2) else held)


def read_lock(folder: Path) -> int:
    def train() -> None:
        set_up_logging(Shard())
        mine = run_lock.RunLock(folder / "train.lock")
        run_lock.may_be_held(mine.path)
        if not any(mine.try_acquire() for _ in range(3)):
            raise AssertionError("neither taken nor refused")
        mine.check()
        mine.release()

    return told("train", train)


def prepare_beats(folder: Path) -> None:
    work = workspace.Workspace(folder, "tiny")
    for rank in range(3):
        beat = {
            "rank": rank,
            "host": "a",
            "pid": 7,
            "token": "a1",
            "step": 3,
            "phase": "forward",
            "num_sent": 0,
            "failure": "",
        }
        work.logs_dir.mkdir(exist_ok=True)
        work.beat_file(rank).write_text(json.dumps(beat | {"num_sent": 0, "count": 9 + rank, "in_phase_s": 0.5}))


def make_beats(folder: Path, rng: Random) -> None:
    write_json(workspace.Workspace(folder, "tiny").beat_file(int(rng.integers(3))), rng)


def read_beats(folder: Path) -> int:
    """What the first rank says of a slow step."""
    watching = watchdog.Watch(workspace.Workspace(folder, "tiny"))
    watching._num_ranks = 3
    watching._others = watching._beats(watching._beats({}))
    for silent in list(watching._others.values())[:1], []:
        watchdog.logger.warning(watching._waited_for(silent))
    watching._end(list(watching._others.values()))
    return 0


def prepare_results(folder: Path) -> None:
    recipe = narrow_recipe(folder)
    longest, dealt = {"wall_s": 1.0}, {"audio_s_per_s": 9.0, "parts": {"data": {"wall_s": 0.01}}}
    summary = {"series": {"longest": longest, "dealt": dealt}, "longest_frames": 100, "memory": {"resident": 10**9}}
    wire = {"communication": {"with_s": 1.1, "without_s": 1.0, "share": 0.1}}
    for ranks in (1, 2, 4):
        key = {"ranks": ranks, **measuring.recipe_key(recipe), "device": "cpu", "cpu": "Abacus", "threads": 1}
        more = wire if ranks > 1 else {}
        result = {"key": key, "machine": {"cores": 4, "threads": 1}, "summary": summary | more}
        bench.store(folder / "run" / "bench" / "results.json", result)


def read_results(folder: Path) -> int:
    recipe = narrow_recipe(folder)
    path = folder / "run" / "bench" / "results.json"
    traced = TracedStep(100, 400, {"generator": 300, "discriminator": 100}, 800, 4000, 2e9, 1e7)

    def forecast() -> None:
        if results := plan.kept_results(recipe):
            pace, _, machine = plan.pace_of_results(results, traced)
            plan.find_cluster(recipe, pace, machine)
            list(bench_report.scaling_rows(results[0], bench.load_results(path)))
            bench_report.not_comparable(results[0], bench.load_results(path))
            bench.store(path, results[0])

    return told("plan", forecast)


KINDS: dict[str, Kind] = {
    "voice": Kind(100, prepare_infer, lambda f, rng: write_torch(f / "voice.pth", voice(), "weight", rng), infer),
    "pretrained": Kind(80, lambda folder: None, make_pretrained, read_pretrained),
    "weights": Kind(60, lambda folder: None, make_weights, read_weights),
    "inspect": Kind(
        60, lambda folder: (folder / "voice.pth").write_bytes(saved(voice())), make_inspected, read_inspected
    ),
    "features": Kind(80, prepare_features, make_features, read_features),
    "index": Kind(140, lambda folder: None, make_index, read_index),
    "npy": Kind(80, prepare_experiment, make_npy, read_npy),
    "run": Kind(80, prepare_run, make_run, read_run),
    "recipe": Kind(
        80,
        prepare_recipe,
        lambda folder, rng: write_yaml(folder / "r.yaml", rng),
        lambda folder: told("run", lambda: load_recipe(folder / "r.yaml")),
    ),
    "import": Kind(80, prepare_experiment, make_import, read_npy),
    "speakers": Kind(40, prepare_speakers, make_speakers, read_npy),
    "lock": Kind(40, prepare_lock, make_lock, read_lock),
    "beat": Kind(30, prepare_beats, make_beats, read_beats),
    "results": Kind(
        30,
        prepare_results,
        lambda folder, rng: write_json(folder / "run" / "bench" / "results.json", rng),
        read_results,
    ),
    "encoder": Kind(60, prepare_encoder, make_encoder, read_encoder),
}


def memory() -> tuple[int, int]:
    """Bytes of memory that this process has had in use: at most since the last call, and now."""
    status = Path("/proc/self/status").read_text(encoding="ascii")
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    most, now = (int(re.findall(rf"{key}:\s+(\d+)", status)[0]) << 10 for key in ("VmHWM", "VmRSS"))
    return most, now


def run_one(kind: Kind, base: Path, folder: Path, rng: Random) -> dict[str, Any]:
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(base, folder)
    kind.make(folder, rng)
    _, before = memory()
    screen, ended = io.StringIO(), ""
    started_at = time.monotonic()
    signal.alarm(MOST_S)
    try:
        with contextlib.redirect_stderr(screen), contextlib.redirect_stdout(screen):
            code = kind.read(folder)
    except BaseException:  # noqa: BLE001 - whatever it is, it is what is looked for
        code, ended = -1, traceback.format_exc()
    signal.alarm(0)
    seconds = time.monotonic() - started_at
    # What an import, the watch and the lock say, which go on without a file.
    ways = ("features not imported", "nothing can be read of", "locked by", "left out: ", "called by the id")
    said = [s for s in screen.getvalue().splitlines() if s.startswith("rvc-dist ") or any(way in s for way in ways)]
    most, _ = memory()
    return {"code": code, "s": seconds, "more": most - before, "said": said, "traceback": ended}


def write_line(data: dict[str, Any]) -> None:
    sys.stdout.write(json.dumps(data) + "\n")
    sys.stdout.flush()


def run(name: str, numbers: range, folder: Path) -> None:
    kind = KINDS[name]
    base = folder / "base"
    (folder / "input").mkdir(parents=True)
    kind.prepare(folder / "input")  # its files name each other: it is put back to this place for every input
    (folder / "input").rename(base)
    # The first of all pays for what is imported late: a healthy one, of which nothing is said.
    shutil.copytree(base, folder / "input")
    with contextlib.redirect_stderr(io.StringIO()), contextlib.redirect_stdout(io.StringIO()):
        kind.read(folder / "input")
    for number in numbers:
        # An input that ends this process leaves only its number.
        write_line({"kind": name, "number": number})
        rng = np.random.default_rng([zlib.crc32(name.encode()), number])
        write_line({"kind": name, "number": number} | run_one(kind, base, folder / "input", rng))


if __name__ == "__main__":
    resource.setrlimit(resource.RLIMIT_AS, (MOST_BYTES, MOST_BYTES))
    torch.set_num_threads(1)
    thin_networks(setattr)  # a healthy file of many layers takes long to read, and is no other file
    first, end, base, *kinds = sys.argv[1:]
    for kind_name in kinds:
        run(kind_name, range(int(first), int(end) or KINDS[kind_name].count), Path(base) / kind_name)
