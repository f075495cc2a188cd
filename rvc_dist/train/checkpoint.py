"""Checkpoints: saved whole or not at all, verified before they are used.

A checkpoint is a directory of safetensors and JSON files, written beside its final name and renamed. `manifest.json`,
written last, lists every file's size and SHA-256. Nothing is pickled. None shares a file with another, so that what
damages one leaves the others whole.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import secrets
import shutil
import stat
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal, TypeAlias, TypedDict, cast

from accelerate import Accelerator
from accelerate.utils import broadcast_object_list
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from rvc_dist.features.feature_files import SINCE
from rvc_dist.features.identity import EmbedderId
from rvc_dist.files import ForeignFileError, atomic_write, read_bounded, sha256_of, space
from rvc_dist.runtime.accelerator import on_first_rank
from rvc_dist.schema import MAX_JSON_BYTES, Count, FileName, Positive, SpeakerId, Word, check, parse_json, record
from rvc_dist.train.loss_scale import LossScaleState
from rvc_dist.train.optimizers import OptimizerState
from rvc_dist.train.progress import Progress
from rvc_dist.workspace import CHECKPOINT_MANIFEST as MANIFEST
from rvc_dist.workspace import CHECKPOINT_RECORDINGS as RECORDINGS
from rvc_dist.workspace import CHECKPOINT_STATE as STATE
from rvc_dist.workspace import (
    Speaker,
    Speakers,
    StageError,
    TrainedOn,
    list_checkpoints,
    read_json,
    split_data,
    whole_data,
)

logger = logging.getLogger(__name__)

FORMAT, FORMAT_OF_MANY = 2, 3
"""Raised when a checkpoint of before can no longer be continued; and of one with RECORDINGS, which came later."""
MODELS = ("generator", "discriminator")
FILES = (*(f"{name}.safetensors" for n in MODELS for name in (n, f"optimizer_{n}")), STATE)
IDENTITY = record(False, **{"embedder": record(name=Word), "discriminator.version": Word})
"""Besides the generator's shape."""
AVERAGE = "generator_ema"
"""The stem of the file that runs with train.ema_decay have besides."""
SPARE_BYTES = 16 << 20
"""Free space beyond the tensors themselves that a checkpoint asks for."""


Why: TypeAlias = Literal["due", "best", "stop", "end"]
"""Why a checkpoint was written: the recipe wants one now, validation found its weights the best, a signal stopped the
run, or the run is at its end."""


class WrittenFile(TypedDict):
    """Of a file in MANIFEST."""

    bytes: Count
    sha256: str


class MeterState(TypedDict):
    names: list[str]
    ranks: list[list[float]]


class OldState(TypedDict):
    """What is in STATE of every version of FORMAT."""

    format: int
    progress: Progress
    identity: dict[str, Any]
    optimizer_groups: dict[str, list[dict[str, Any]]]
    meter: MeterState
    num_ranks: Positive


class StateFile(OldState, total=False):
    trained_speakers: list[SpeakerId]
    speaker_info: list[Speaker]
    data: TrainedOn
    loss_scales: dict[str, LossScaleState]
    why: Why


@dataclass(frozen=True)
class Checkpoint:
    """One checkpoint in memory."""

    progress: Progress
    identity: dict[str, Any]
    """What must match for the weights to mean the same: shapes, rates, embedder, optimizer."""
    models: dict[str, dict[str, Tensor]]
    """State dicts by MODELS."""
    optimizers: dict[str, OptimizerState]
    """By MODELS."""
    meter: dict[str, Any] = field(default_factory=lambda: {"names": [], "ranks": []})
    """`Meter.state` of a run that stopped between two log lines."""
    num_ranks: int = 1
    speakers: Speakers = field(default_factory=Speakers)
    """Who was ever trained; none where an older version of rvc_dist wrote the checkpoint."""
    data: dict[str, Any] = field(default_factory=dict)
    """`fingerprint.of_data`; empty where an older version wrote it."""
    loss_scales: dict[str, LossScaleState] = field(default_factory=dict)
    """By MODELS, of those that compute in float16."""
    why: Why = "due"
    ema: dict[str, Tensor] = field(default_factory=dict)
    """State dict of the generator with the averages of its weights; empty without train.ema_decay."""

    def generator(self, weights: str) -> tuple[dict[str, Tensor], bool]:
        """Those of export.weights, and whether they are the average.

        Raises:
            StageError: there is no average.
        """
        averaged = is_averaged(weights, bool(self.ema), self.progress)
        return (self.ema if averaged else self.models["generator"]), averaged

    def tensors(self) -> dict[str, dict[str, Tensor]]:
        """File stem to what it holds."""
        states = {f"optimizer_{name}": state.tensors for name, state in self.optimizers.items()}
        return {**self.models, **states, **({AVERAGE: self.ema} if self.ema else {})}

    @property
    def num_bytes(self) -> int:
        return sum(t.nbytes for tensors in self.tensors().values() for t in tensors.values())

    def to_host(self) -> Checkpoint:
        """With the weights copied to host memory, where training cannot change them; optimizer states are there."""
        weights = {**self.models, AVERAGE: self.ema}
        copies = {n: {k: t.detach().to("cpu", copy=True) for k, t in w.items()} for n, w in weights.items()}
        return replace(self, ema=copies.pop(AVERAGE), models=copies)


def has_average(path: Path) -> bool:
    """Whether the checkpoint in `path` has one of G's weights."""
    return (path / f"{AVERAGE}.safetensors").is_file()


def is_averaged(weights: str, is_there: bool, progress: Progress) -> bool:
    """Whether those that export.weights names are the average, which `is_there` or not.

    Raises:
        StageError: there is none.
    """
    if weights == "ema" and not is_there:
        raise StageError(
            f"export.weights: the checkpoint of step {progress.step} has no average of its weights;",
            "leave it out, or train with train.ema_decay above 0",
        )
    return weights == "ema" or (weights == "chosen" and is_there and progress.uses_ema is not False)


class AsyncCheckpointWriter:
    """Writes checkpoints in a thread of its own, one at a time: training waits only for the copy to host memory."""

    def __init__(
        self,
        folder: Path,
        keep: int,
        check: Callable[[], None] = lambda: None,
        limit_s: float = 600.0,
        on_saved: Callable[[Checkpoint, Path], object] = lambda *_: None,
    ) -> None:
        self.folder, self.keep, self.limit_s, self.on_saved = folder, keep, limit_s, on_saved
        self.check = check
        """Called before each: raises a StageError when this process may not write here any more."""
        self.error: StageError | None = None
        """Why the last one could not be written."""
        self._thread: threading.Thread | None = None

    def start(self, checkpoint: Checkpoint) -> None:
        """Copy `checkpoint` and begin to write it, after the one before is written."""
        self.wait()
        if self._thread is None:
            args = (checkpoint.to_host(),)
            self._thread = threading.Thread(target=self._write, args=args, name="checkpoint writer", daemon=True)
            self._thread.start()

    def _write(self, checkpoint: Checkpoint) -> None:
        try:
            self.check()
            path = save(self.folder, checkpoint)
            prune(self.folder, self.keep, checkpoint.progress.best_step)
        except StageError as error:
            self.error = error
        except OSError as error:
            self.error = StageError(f"{self.folder}: old checkpoints cannot be removed ({error})")
        except BaseException as error:
            self.error = StageError(
                f"{self.folder}: the checkpoint of step {checkpoint.progress.step} cannot be written ({error!r}); "
                f"{space(self.folder, checkpoint.num_bytes)}; earlier checkpoints are untouched and the same command "
                "goes on from them"
            )
            raise  # a fault of ours: the thread's traceback is printed and logged
        else:
            logger.info("saved %s", path)
            self.on_saved(checkpoint, path)

    def wait(self, limit_s: float | None = None) -> None:
        """Return when nothing is being written any more, or with an error after `limit_s`, by default self.limit_s."""
        if self._thread is not None and self.error is None:
            limit_s = self.limit_s if limit_s is None else limit_s
            self._thread.join(limit_s)
            if self._thread.is_alive():
                self.error = StageError(
                    f"{self.folder}: the last checkpoint is still being written after {limit_s:g} s: see whether its "
                    "disk answers, and raise train.timeout_s where it is only slow; earlier checkpoints are untouched "
                    "and the same command goes on from them"
                )
            else:
                self._thread = None

    def finish(self) -> None:
        """Return when the last checkpoint is on the disk.

        Raises:
            StageError: it is not, or this process may not write here any more.
        """
        self.check()
        self.wait()
        if self.error is not None:
            raise self.error


def prepare_folder(folder: Path, num_bytes: int) -> None:
    """Make sure, before any step, that a checkpoint of `num_bytes` can be written; remove what killed runs left.

    Raises:
        StageError: the folder cannot be written to, or its disk is too full.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        atomic_write(folder / ".probe", "")
        (folder / ".probe").unlink()
        for path in folder.glob(".step_*.tmp"):
            _clear(path)
    except OSError as error:
        raise StageError(
            f"{folder}: checkpoints cannot be written there ({error.strerror}); nothing was trained.",
            "Make the folder writable or choose another run_dir",
        ) from error
    _check_space(folder, num_bytes)


def _check_space(folder: Path, num_bytes: int) -> None:
    free = shutil.disk_usage(folder).free
    if free < num_bytes + SPARE_BYTES:
        raise StageError(
            f"{folder}: a checkpoint needs {(num_bytes + SPARE_BYTES) / 1e6:.0f} MB, the disk has {free / 1e6:.0f} MB "
            "free; earlier checkpoints are untouched.",
            "Free some space (or lower train.keep_checkpoints) and run the same command",
        )


def save(folder: Path, checkpoint: Checkpoint) -> Path:
    """Write `checkpoint` below `folder` and return its directory.

    Raises:
        StageError: the disk is full or refuses; what was there before is untouched.
    """
    final = folder / f"step_{checkpoint.progress.step:08d}"
    beside = folder / f".{final.name}.{secrets.token_hex(8)}.tmp"
    try:
        beside.mkdir(parents=True)
        _check_space(folder, checkpoint.num_bytes)
        for name, tensors in checkpoint.tensors().items():
            _save_tensors(beside / f"{name}.safetensors", tensors)
        data, lines = split_data(checkpoint.data)
        if is_of_many := "in_file" in data:
            with (beside / RECORDINGS).open("x", encoding="ascii") as stream:
                stream.writelines(lines)
                stream.flush()
                os.fsync(stream.fileno())
        state = {
            "format": FORMAT_OF_MANY if is_of_many else FORMAT,
            "progress": checkpoint.progress.to_file(),
            "identity": checkpoint.identity,
            "optimizer_groups": {name: s.groups for name, s in checkpoint.optimizers.items()},
            "meter": checkpoint.meter,
            "num_ranks": checkpoint.num_ranks,
            "why": checkpoint.why,
            "trained_speakers": checkpoint.speakers.trained,
            "data": data,
            **({"loss_scales": checkpoint.loss_scales} if checkpoint.loss_scales else {}),
            **({"speaker_info": checkpoint.speakers.info} if checkpoint.speakers.has_names else {}),
        }
        atomic_write(beside / STATE, json.dumps(state, indent=1))
        manifest = {p.name: {"bytes": p.stat().st_size, "sha256": sha256_of(p)} for p in sorted(beside.iterdir())}
        atomic_write(beside / MANIFEST, json.dumps(manifest, indent=1))
        _sync_folder(beside)
        if os.path.lexists(final):
            discard(final, beside)
        else:
            beside.rename(final)
        _sync_folder(folder)
    except (OSError, SafetensorError) as error:
        reason = os.strerror(error.errno) if isinstance(error, OSError) and error.errno else error
        raise StageError(
            f"{final}: cannot be written ({reason}); {space(folder, checkpoint.num_bytes + SPARE_BYTES)}; earlier "
            "checkpoints are untouched.",
            "Free some space, or raise the limit, and run the same command",
        ) from error
    finally:
        with contextlib.suppress(OSError):
            _clear(beside)
    return final


def discard(path: Path, successor: Path | None = None) -> None:
    """Remove a checkpoint, under another name: when this is killed halfway, no half of it looks like a whole one.

    Its place is taken by `successor`.
    """
    aside = path.with_name(f".{path.name}.old.tmp")
    _clear(aside)
    path.rename(aside)
    if successor is not None:
        successor.rename(path)
    _clear(aside)


def _clear(path: Path) -> None:
    """Remove a folder, or a link to one, if it is there."""
    if path.is_symlink() or path.is_file():
        path.unlink()
    elif path.exists():
        shutil.rmtree(path)


def _save_tensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    with path.open("xb") as stream:
        mode = stat.S_IMODE(os.fstat(stream.fileno()).st_mode)
    save_file({k: v.detach().contiguous().cpu() for k, v in tensors.items()}, path)
    if stat.S_IMODE(path.stat().st_mode) != mode:  # safetensors 0.8 makes a file that its owner alone may read
        path.chmod(mode)
    with path.open("rb") as stream:
        os.fsync(stream.fileno())


def _sync_folder(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def whole_in(folder: Path) -> list[Path]:
    """The checkpoints below `folder` that are as they were written, oldest first; a warning names the others.

    Raises:
        StageError: there are some, and none is whole.
    """
    problems = {path: find_corruption(path) for path in list_checkpoints(folder)}
    whole = [path for path, found in problems.items() if not found]
    if problems and not whole:
        verify(max(problems))
    for path in problems.keys() - set(whole):
        logger.warning("%s is damaged and was passed over (%s); remove it", path, "; ".join(problems[path]))
    return whole


def latest(folder: Path) -> Path | None:
    """The newest checkpoint; one without a manifest, which is written last, was never whole or is half removed."""
    for path in reversed(list_checkpoints(folder)):
        if (path / MANIFEST).is_file():
            return path
        logger.warning("%s has no %s and is passed over: it was never whole, or is half removed", path, MANIFEST)
    return None


def newest(
    accelerator: Accelerator, folder: Path, identity: Mapping[str, Any] | None = None
) -> tuple[Path, Checkpoint] | None:
    """The newest checkpoint, verified as by `verify`, the same on all ranks; None without one."""
    (path,) = broadcast_object_list([latest(folder)])
    if path is None:
        return None
    on_first_rank(accelerator, partial(verify, path, identity))
    return path, load(path)


def prune(folder: Path, keep: int, best_step: int) -> None:
    """Remove all but the newest `keep` checkpoints, the best one, and the newest one whatever it is.

    Those that a stop wrote do not count among the `keep`, so that they replace each other and no other.
    """
    found = [p for p in list_checkpoints(folder) if (p / MANIFEST).is_file()]
    regular = [p for p in found if not _is_of_stop(p)]
    kept = {*regular[-keep:], *found[-1:], folder / f"step_{best_step:08d}"}
    for path in found:
        if path not in kept:
            discard(path)


def _is_of_stop(path: Path) -> bool:
    with contextlib.suppress(StageError, OSError):  # one whose state is damaged is another's matter
        return bool(state_of(path).get("why") == "stop")
    return False


def find_corruption(path: Path) -> list[str]:
    """What is wrong with a checkpoint's files; empty when all are as they were written."""
    if not (path / MANIFEST).is_file():
        return [f"{MANIFEST} is missing"]
    try:
        wanted_files = parse_json(read_bounded(path / MANIFEST, MAX_JSON_BYTES), dict[FileName, WrittenFile])
    except ForeignFileError as error:
        return [f"{MANIFEST} is not what was written ({error})"]
    problems = [f"{name} is not in {MANIFEST}" for name in FILES if name not in wanted_files]
    for name in {*FILES, f"{AVERAGE}.safetensors", RECORDINGS} & wanted_files.keys():
        file, size, digest = path / name, wanted_files[name]["bytes"], wanted_files[name]["sha256"]
        if not file.is_file():
            problems.append(f"{name} is missing")
        elif file.stat().st_size != size:
            problems.append(f"{name} has {file.stat().st_size} bytes, expected {size}")
        elif sha256_of(file) != digest:
            problems.append(f"{name} was changed (its SHA-256 differs)")
    return problems


def verify(path: Path, identity: Mapping[str, Any] | None = None) -> None:
    """Nothing, if the checkpoint in `path` is as it was written and belongs to this run.

    Raises:
        StageError: files are damaged, or `identity` differs from the checkpoint's; every mismatch is listed, and the
            newest whole checkpoint besides it is named.
    """
    problems = find_corruption(path)
    if problems:
        whole = [p for p in list_checkpoints(path.parent) if p != path and not find_corruption(p)]
        remedy = (
            f"remove {path.name} to continue from {whole[-1].name}, the newest whole checkpoint"
            if whole
            else "no other whole checkpoint is left; remove the folder to start over"
        )
        raise StageError(f"{path} is damaged and was not used;", remedy, "".join(f"\n  {p}" for p in problems))
    state = state_of(path)
    if identity is not None:
        check_identity(path, state["identity"], identity)


def progress_of(path: Path) -> Progress:
    """Where the run was at the checkpoint in `path`, which `verify` has accepted or `whole_in` has found."""
    return Progress.from_file(state_of(path)["progress"])


def identity_of(path: Path) -> dict[str, Any]:
    """The identity of the checkpoint in `path`, which `verify` has accepted."""
    identity: dict[str, Any] = state_of(path)["identity"]
    return identity


def check_identity(path: Path, made_with: Mapping[str, Any], identity: Mapping[str, Any]) -> None:
    """Raises StageError, with every mismatch, when the checkpoint in `path` was `made_with` another identity."""
    before, now = SINCE | _comparable(made_with), SINCE | _comparable(identity)
    differ = [k for k in {**before, **now} if not _agree(k, before.get(k), now.get(k))]
    if differ:
        listed = "".join(f"\n  {k}: {before.get(k)}, now {now.get(k)}" for k in differ)
        remedy = "change them back, or give the run another run_dir"
        raise StageError(f"{path} was made with other settings;", remedy, listed)


def state_of(path: Path) -> Any:
    """The contents of a whole checkpoint's STATE.

    Raises:
        StageError: it is of another format.
    """
    state = read_json(path / STATE)
    if (found := state.get("format", 1)) not in (FORMAT, FORMAT_OF_MANY):
        raise StageError(
            f"{path} has format {found}, this version of rvc_dist reads {FORMAT} and {FORMAT_OF_MANY}:",
            "continue it with the version that made it, or give the run another run_dir",
        )
    try:
        _comparable(check(check(state, StateFile)["identity"], IDENTITY, "identity"))
        _speakers(state)
        return state
    except ValueError as error:
        raise StageError(f"{path / STATE}: {error};", f"remove {path.name} to go on from the one before") from error


def _comparable(identity: Mapping[str, Any]) -> dict[str, Any]:
    return {k: EmbedderId.from_features(v) if k == "embedder" else v for k, v in identity.items()}


def _agree(key: str, before: Any, now: Any) -> bool:
    if key == "generator.num_speakers" and isinstance(before, int) and isinstance(now, int):
        return before <= now  # the table grows when its weights are taken
    if isinstance(before, EmbedderId) and isinstance(now, EmbedderId):
        return before.agrees_with(now) is True
    return bool(before == now)


def _speakers(state: Mapping[str, Any]) -> Speakers:
    return Speakers.of(state.get("speaker_info", ()), state.get("trained_speakers", ()))


def load(path: Path) -> Checkpoint:
    """The checkpoint in `path`, which `verify` has accepted or `whole_in` has found."""
    state = state_of(path)
    groups = state["optimizer_groups"]
    return Checkpoint(
        progress=Progress.from_file(state["progress"]),
        identity=state["identity"],
        models={name: load_file(path / f"{name}.safetensors") for name in MODELS},
        optimizers={n: OptimizerState(load_file(path / f"optimizer_{n}.safetensors"), groups[n]) for n in MODELS},
        meter=state["meter"],
        num_ranks=state["num_ranks"],
        why=state.get("why", "due"),
        speakers=_speakers(state),
        data=cast(dict[str, Any], whole_data(path, state.get("data", {}))),
        loss_scales=state.get("loss_scales", {}),
        ema=load_file(path / f"{AVERAGE}.safetensors") if has_average(path) else {},
    )
