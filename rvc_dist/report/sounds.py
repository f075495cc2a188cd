"""What a page plays: some of RUN/samples, as MP3 in the page itself.

MP3, since every browser plays it, those of phones too, and libsndfile writes it; Opus is half the size, but an iPhone
from before 2025 does not play it in Ogg.
"""

from __future__ import annotations

import base64
import io
import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path
from typing import NamedTuple, TypedDict

import numpy as np

from rvc_dist.choices import SOUNDS
from rvc_dist.data.audio import resample
from rvc_dist.files import ForeignFileError, regular_size
from rvc_dist.report.figures import Wave
from rvc_dist.schema import Count, OsName, Positive, Seconds
from rvc_dist.workspace import StageError, read_json

MAX_PHRASES, MAX_STEPS = 12, 8
MAX_SOUND_S = 30.0
"""What is read of a file: samples are phrases."""
MAX_BYTES = 6_000_000
"""Of all MP3 in a page: some 10 minutes."""
BYTES_PER_S = 12_000
"""More than MP3 takes of a voice at 48 kHz."""
NUM_THREADS = 4
KINDS = {"own": "own voice, held out", "foreign": "another speaker, converted", "reference": "your reference"}
NOTHING: tuple[Wave, int] = np.zeros(0, np.float32), 1
_STEP = re.compile(r"step_(\d{1,12})")


class Sample(TypedDict):
    """An entry of samples.json."""

    file: OsName
    kind: str
    title: str
    speaker: Count
    speaker_name: str
    source: str
    original: OsName | None
    seconds: Seconds
    rate: Positive
    index: bool


class Sound(NamedTuple):
    label: str
    wave: Wave
    rate: int
    address: str
    """The sound itself, as a data: URL."""
    step: int | None


@dataclass
class Phrase:
    """One phrase at several steps."""

    kind: str
    title: str
    source: str
    about: str
    original: Path | None
    files: dict[int, Path] = field(default_factory=dict)
    """By step."""
    sounds: list[Sound] = field(default_factory=list)
    """The original first, then what was made of it, by step."""

    @property
    def kind_label(self) -> str:
        return KINDS.get(self.kind, self.kind)


@dataclass
class Samples:
    """Of a run."""

    phrases: list[Phrase]
    steps: list[int]
    """Those that are in the page."""
    left_out: str
    """What is not, in a sentence."""


def read_samples(folder: Path, notes: list[str]) -> list[Phrase]:
    """All phrases in RUN/samples, those of the newest step first; what cannot be read becomes a note."""
    phrases: dict[tuple[str, str, str], Phrase] = {}
    for step_folder in sorted(folder.glob("step_*"), reverse=True):
        if (found := _STEP.fullmatch(step_folder.name)) is None:
            continue
        try:
            entries = read_json(step_folder / "samples.json", list[Sample])
        except (StageError, ForeignFileError, OSError) as error:
            notes.append(f"{step_folder}: {error}")
            continue
        for entry in entries:
            key = (entry["kind"], entry["title"], entry["source"])
            path = inside(folder, step_folder / entry["file"])
            original = entry["original"] and inside(folder, step_folder / entry["original"])
            name = f"{'speaker ' * entry['speaker_name'].isdecimal()}{entry['speaker_name']}"
            about = f"voice of {name}{', with the index' * entry['index']}"
            if path is not None:
                phrases.setdefault(key, Phrase(*key, about, original or None)).files[int(found[1])] = path
    order = list(KINDS)
    return sorted(phrases.values(), key=lambda p: order.index(p.kind) if p.kind in order else len(order))


def inside(folder: Path, path: Path) -> Path | None:
    """The path, if it leads to a file in `folder`: samples.json may be anybody's."""
    whole = path.resolve()
    return whole if whole.is_file() and whole.is_relative_to(folder.resolve()) else None


def chosen(items: Sequence[int], most: int, keep: Iterable[int] = ()) -> list[int]:
    """At most `most` of rising `items`, evenly: the first, the last and those of `keep` among them."""
    if len(items) <= most:
        return list(items)
    wanted = {items[0], items[-1], *(set(keep) & set(items))}
    spread = [items[i] for i in np.linspace(0, len(items) - 1, most).round().astype(int)]
    for item in spread:
        if len(wanted) < most:
            wanted.add(item)
    return sorted(wanted)


def read_wave(path: Path) -> tuple[Wave, int]:
    """The first channel [S] of a sound file, and its rate.

    Raises:
        ForeignFileError: it is none, or longer than a phrase.
    """
    import soundfile

    regular_size(path)
    try:
        with soundfile.SoundFile(path) as file:
            if file.frames > MAX_SOUND_S * file.samplerate:
                raise ForeignFileError(f"{path.name} has more than {MAX_SOUND_S:.0f} s")
            return file.read(dtype="float32", always_2d=True)[:, 0], file.samplerate
    except soundfile.LibsndfileError as error:
        raise ForeignFileError(f"{path.name} is no sound file ({error})") from error


def mp3_address(sound: tuple[Wave, int]) -> str:
    """A wave [S] of a rate as a data: URL; at the nearest rate that MP3 has."""
    import soundfile

    wave, rate = sound
    spec, out = SOUNDS["mp3"], io.BytesIO()
    if spec.rate(rate) != rate:
        wave = resample(wave, rate, spec.rate(rate))
    soundfile.write(out, wave, spec.rate(rate), format=spec.form, subtype=spec.subtype)
    return f"data:audio/mpeg;base64,{base64.b64encode(out.getvalue()).decode()}"


def embed(phrases: list[Phrase], advised: int | None, notes: list[str], max_bytes: int = MAX_BYTES) -> Samples:
    """Give the phrases their sounds: as many steps and phrases as a page bears."""
    every = sorted({step for phrase in phrases for step in phrase.files})
    shown = _some_of_each_kind(phrases, MAX_PHRASES)
    steps: list[int] = []
    waves: dict[Path, tuple[Wave, int]] = {}
    for most in range(MAX_STEPS, 1, -1):
        steps = chosen(every, most, {advised} if advised is not None else ())
        paths = [path for phrase in shown for path in (phrase.original, *map(phrase.files.get, steps)) if path]
        for path in (path for path in paths if path not in waves):
            try:
                waves[path] = read_wave(path)
            except (ForeignFileError, OSError) as error:
                notes.append(f"{path.name}: {error}")
                waves[path] = NOTHING
        if BYTES_PER_S * sum(len(waves[p][0]) / waves[p][1] for p in paths) <= max_bytes:
            break
    left = max_bytes / BYTES_PER_S
    wanted: list[tuple[Phrase, int | None, tuple[Wave, int]]] = []
    for phrase in shown:
        for step in [None, *steps]:
            source = phrase.original if step is None else phrase.files.get(step)
            wave, rate = waves[source] if source else NOTHING
            if 0 < len(wave) < left * rate:
                left -= len(wave) / rate
                wanted.append((phrase, step, (wave, rate)))
    with ThreadPoolExecutor(NUM_THREADS) as pool:  # libsndfile's encoder lets go of the interpreter
        addresses = pool.map(mp3_address, [sound for _, _, sound in wanted])
        for (phrase, step, sound), address in zip(wanted, addresses, strict=True):
            phrase.sounds.append(Sound("original" if step is None else f"step {step}", *sound, address, step))
    kept = [phrase for phrase in shown if any(sound.step is not None for sound in phrase.sounds)]
    parts = [f"{len(steps)} of {len(every)} steps"] if len(steps) < len(every) else []
    parts += [f"{len(kept)} of {len(phrases)} phrases"] if len(kept) < len(phrases) else []
    left_out = f"Here are {' and '.join(parts)}; all are in the run's folder samples." if parts else ""
    return Samples(kept, steps, left_out)


def _some_of_each_kind(phrases: list[Phrase], most: int) -> list[Phrase]:
    """At most `most`, in turn of each kind, in their order."""
    turns = defaultdict[str, Iterator[int]](count)
    numbered = sorted((next(turns[phrase.kind]), i) for i, phrase in enumerate(phrases))
    return [phrases[i] for i in sorted(i for _, i in numbered[:most])]
