"""Sound files that conversion writes: their kinds, how loud they are, and what they were made of.

Shapes: S samples, C channels.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from rvc_dist.choices import SOUNDS
from rvc_dist.data.audio import resampled
from rvc_dist.data.decode import Samples
from rvc_dist.files import BESIDE_GLOB, beside, remove_half_written, space
from rvc_dist.workspace import StageError

MAX_PEAK = 0.99
BLOCK = 1 << 16
"""Samples encoded at once: of many more, libsndfile's encoder of Vorbis has no room on the stack."""
MAX_WAV_BYTES = (1 << 32) - (1 << 16)
"""A larger wav is written as RF64, which counts its bytes with 64 bits."""
MADE_BY = "rvc_dist"


def check_output(target: Path) -> None:
    """Find out now whether `target` can be written, not after the conversion.

    Raises:
        StageError: it cannot.
    """
    import soundfile

    kind = target.suffix[1:].lower()
    if not soundfile.check_format(SOUNDS[kind].form, SOUNDS[kind].subtype):
        version = soundfile.__libsndfile_version__
        raise StageError(
            f"infer.output: {target}: libsndfile {version} here cannot write {kind};",
            "pip install --upgrade soundfile, or take wav",
        )
    try:
        if target.is_dir():
            raise StageError(f"infer.output: {target} is a folder, expected the name of a file")
        with beside(target) as probe:
            probe.touch(exist_ok=False)
        remove_half_written(target.parent, BESIDE_GLOB)
    except OSError as error:
        raise StageError(f"infer.output: {target} cannot be written ({error.strerror})") from error


def stamp_of(path: Path) -> str:
    """What `write` was told that a file is made of; nothing where there is no such file of ours."""
    import soundfile

    if not os.path.isfile(path):
        return ""
    try:
        with soundfile.SoundFile(os.fsencode(path)) as file:
            made_by, _, stamp = str(file.comment).partition(" ")
    except soundfile.LibsndfileError:
        return ""
    return stamp if made_by == MADE_BY else ""


def write(
    path: Path, blocks: Iterator[Samples], rate: int, num_samples: int | None = None, channels: int = 1, stamp: str = ""
) -> None:
    """Write blocks [S] or [S, C] of `rate`, turned down if any sample would clip. The file appears when it is whole.

    Its rate is another where its kind cannot have that one; `num_samples` a channel are expected, and `stamp` is what
    `stamp_of` will find.

    Raises:
        OSError, StageError: it cannot be written; where the disk is full, they say what `num_samples` need.
    """
    import soundfile

    spec = SOUNDS[path.suffix[1:].lower()]
    if rate != (fitting := spec.rate(rate)):
        blocks, rate = resampled(blocks, rate, fitting, channels if channels > 1 else None), fitting
    peak = 0.0
    num_bytes = num_samples and 6 * num_samples * channels  # as float32, then in 16 bits
    with beside(path, num_bytes) as half, tempfile.TemporaryFile(dir=path.parent) as raw:
        for block in blocks:
            peak = max(peak, float(np.abs(block).max(initial=0.0)))
            raw.write(block.astype(np.float32).tobytes())
        is_large = spec.form == "WAV" and raw.tell() // 2 > MAX_WAV_BYTES
        raw.seek(0)
        gain = np.float32(min(1.0, MAX_PEAK / peak) if peak > 0 else 1.0)
        form: dict[str, Any] = {"samplerate": rate, "channels": channels, "subtype": spec.subtype}
        form["format"] = "RF64" if is_large else spec.form
        with half.open("xb+") as stream:
            try:
                with soundfile.SoundFile(stream.fileno(), "w", closefd=False, **form) as file:
                    if stamp:
                        file.comment = f"{MADE_BY} {stamp}"
                    while samples := raw.read(4 * channels * BLOCK):
                        file.write(np.frombuffer(samples, dtype=np.float32).reshape(-1, channels) * gain)
            except soundfile.LibsndfileError as error:
                # It says "System error" of whatever the disk refuses: a write of our own meets the same and names it.
                stream.seek(0, os.SEEK_END)
                stream.write(bytes(1 << 22))
                stream.flush()
                raise StageError(f"infer.output: {path} cannot be written ({error}); {space(path)}") from error
        half.replace(path)
