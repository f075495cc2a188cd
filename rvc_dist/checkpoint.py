"""Checkpoints: saved whole or not at all, verified before they are used; pretrained weights.

A checkpoint is a directory of safetensors and JSON files, written beside its final name and renamed. `manifest.json`,
written last, lists every file's size and SHA-256. Nothing is pickled.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.optim import Optimizer

from rvc_dist.models.state_dict import from_upstream, load_pth
from rvc_dist.workspace import StageError, atomic_write, read_json

logger = logging.getLogger(__name__)

MANIFEST = "manifest.json"


@dataclass
class Progress:
    """Where a run stands. All of it is in the checkpoint, none of it in a file name."""

    step: int = 0
    """Optimizer steps done."""
    epoch: int = 0
    """Epochs completed."""
    clips_in_epoch: int = 0
    """Clips of the current epoch already trained on, over all ranks: the position in the data on any world size."""
    best_metric: float | None = None
    best_step: int = 0
    best_epoch: int = 0


@dataclass(frozen=True)
class Checkpoint:
    """One checkpoint in memory."""

    progress: Progress
    identity: dict[str, Any]
    """What must match for the weights to mean the same: shapes, rates, embedder, optimizer."""
    models: dict[str, dict[str, Tensor]]
    optimizers: dict[str, dict[str, Any]]
    rng: list[Tensor] = field(default_factory=list)
    """Random state of each rank."""


def optimizer_state(optimizer: Optimizer, module: nn.Module) -> dict[str, Any]:
    """`tensors`: NAME.KEY of every state tensor, by parameter name; `groups`: the plain options of each group."""
    names = {id(p): n for n, p in module.named_parameters()}
    tensors = {
        f"{names[id(p)]}/{key}": value if isinstance(value, Tensor) else torch.tensor(value)
        for p, state in optimizer.state.items()
        for key, value in state.items()
    }
    return {"tensors": tensors}


def load_optimizer_state(optimizer: Optimizer, module: nn.Module, state: Mapping[str, Any]) -> None:
    parameters = dict(module.named_parameters())
    optimizer.state.clear()
    for name, value in state["tensors"].items():
        parameter, _, key = name.rpartition("/")
        target = parameters[parameter]
        # Step counts stay where the optimizer made them (on the host, for all but fused ones).
        moved = value.to(target.device) if value.numel() > 1 or value.shape == target.shape else value
        optimizer.state[target][key] = moved.clone()


def save(folder: Path, checkpoint: Checkpoint) -> Path:
    """Write `checkpoint` below `folder` and return its directory."""
    final = folder / f"step_{checkpoint.progress.step:08d}"
    beside = folder / f".{final.name}.tmp"
    shutil.rmtree(beside, ignore_errors=True)
    beside.mkdir(parents=True)
    try:
        for name, tensors in checkpoint.models.items():
            _save_tensors(beside / f"{name}.safetensors", tensors)
        for name, state in checkpoint.optimizers.items():
            _save_tensors(beside / f"{name}.safetensors", state["tensors"])
        _save_tensors(beside / "rng.safetensors", {f"{i:05d}": s for i, s in enumerate(checkpoint.rng)})
        state = {"progress": asdict(checkpoint.progress), "identity": checkpoint.identity}
        atomic_write(beside / "state.json", json.dumps(state, indent=1))
        manifest = {p.name: {"bytes": p.stat().st_size, "sha256": _sha256(p)} for p in sorted(beside.iterdir())}
        atomic_write(beside / MANIFEST, json.dumps(manifest, indent=1))
    except OSError as error:
        shutil.rmtree(beside, ignore_errors=True)
        raise StageError(f"{final}: cannot be written ({error.strerror}); earlier checkpoints are untouched") from error
    if final.exists():
        shutil.rmtree(final)
    beside.rename(final)
    _sync_folder(folder)
    return final


def _save_tensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    save_file({k: v.detach().contiguous().cpu() for k, v in tensors.items()}, path)
    with path.open("rb") as stream:
        os.fsync(stream.fileno())


def _sync_folder(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as stream:
        while block := stream.read(1 << 22):
            digest.update(block)
    return digest.hexdigest()


def all_in(folder: Path) -> list[Path]:
    """The checkpoints below `folder`, oldest first."""
    return sorted(p for p in folder.glob("step_*") if p.is_dir())


def latest(folder: Path) -> Path | None:
    found = all_in(folder)
    return found[-1] if found else None


def prune(folder: Path, keep: int, best_step: int) -> None:
    """Remove all but the newest `keep` checkpoints and the best one."""
    found = all_in(folder)
    for path in found[:-keep]:
        if path.name != f"step_{best_step:08d}":
            shutil.rmtree(path)


def damage(path: Path) -> list[str]:
    """What is wrong with a checkpoint's files; empty when all are as they were written."""
    if not (path / MANIFEST).is_file():
        return [f"{MANIFEST} is missing"]
    problems = []
    for name, wanted in read_json(path / MANIFEST).items():
        file = path / name
        if not file.is_file():
            problems.append(f"{name} is missing")
        elif file.stat().st_size != wanted["bytes"]:
            problems.append(f"{name} has {file.stat().st_size} bytes, expected {wanted['bytes']}")
        elif _sha256(file) != wanted["sha256"]:
            problems.append(f"{name} was changed (its SHA-256 differs)")
    return problems


def load(path: Path, identity: Mapping[str, Any] | None = None) -> Checkpoint:
    """The checkpoint in `path`, verified.

    Raises:
        StageError: files are damaged, or `identity` differs from the checkpoint's; every mismatch is listed, and the
            newest whole checkpoint before it is named.
    """
    problems = damage(path)
    if problems:
        whole = [p for p in all_in(path.parent) if p != path and not damage(p)]
        remedy = (
            f"remove {path.name} to continue from {whole[-1].name}, the newest whole checkpoint"
            if whole
            else "no other whole checkpoint is left; remove the folder to start over"
        )
        raise StageError(f"{path} is damaged and was not used; {remedy}" + "".join(f"\n  {p}" for p in problems))
    state = read_json(path / "state.json")
    if identity is not None:
        keys = dict.fromkeys([*state["identity"], *identity])
        differ = [k for k in keys if state["identity"].get(k) != identity.get(k)]
        if differ:
            listed = "".join(f"\n  {k}: {state['identity'].get(k)}, now {identity.get(k)}" for k in differ)
            raise StageError(
                f"{path} was made with other settings; change them back, or give the run another run_dir{listed}"
            )
    rng = load_file(path / "rng.safetensors")
    return Checkpoint(
        progress=Progress(**state["progress"]),
        identity=state["identity"],
        models={name: load_file(path / f"{name}.safetensors") for name in ("generator", "discriminator")},
        optimizers={
            name: {"tensors": load_file(path / f"{name}.safetensors")}
            for name in ("optimizer_generator", "optimizer_discriminator")
        },
        rng=[rng[k] for k in sorted(rng)],
    )


def load_pretrained(path: Path, state: Mapping[str, Tensor], module: nn.Module, key: str) -> None:
    """Fill `module` with `state`, which `read_pretrained` found in `path`.

    Raises:
        StageError: keys or shapes do not fit, all of them listed.
    """
    wanted = module.state_dict()
    problems = [f"{k}: missing" for k in wanted if k not in state]
    problems += [f"{k}: not part of this network" for k in state if k not in wanted]
    problems += [
        f"{k}: {list(v.shape)}, this network has {list(wanted[k].shape)}"
        for k, v in state.items()
        if k in wanted and v.shape != wanted[k].shape
    ]
    if problems:
        shown = "".join(f"\n  {p}" for p in problems[:20])
        more = f"\n  and {len(problems) - 20} more" if len(problems) > 20 else ""
        raise StageError(
            f"{key}: {path} does not fit this recipe's network (version, sample rate, pitch guidance, widths and the "
            f"encoder's width must be those it was trained with):{shown}{more}"
        )
    module.load_state_dict({k: v.float() for k, v in state.items()})
    logger.info("%s: %s", key, path)


def read_pretrained(path: Path, key: str) -> dict[str, Tensor]:
    """The state dict of another tool's `G_*.pth` or `D_*.pth`, in this package's spelling of weight norm.

    Raises:
        StageError: no such file, or not one that holds weights alone.
    """
    if not path.is_file():
        raise StageError(f"{key}: {path} does not exist")
    try:
        data = load_pth(path)
    except ValueError as error:
        raise StageError(f"{key}: {path} is not a file of plain weights ({error})") from error
    state = data.get("model", data.get("weight", data)) if isinstance(data, dict) else None
    if not isinstance(state, dict) or not state or not all(isinstance(v, Tensor) for v in state.values()):
        raise StageError(f"{key}: {path} holds no state dict; expected a dict with `model`, as G_*.pth and D_*.pth")
    return from_upstream(state)
