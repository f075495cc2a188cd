"""What a run leaves to be listened to: phrases as the voice speaks them, made anew at every evaluation.

RUN/samples/step_00001000/ holds a FLAC file a phrase and samples.json, RUN/samples/originals what they are made of, at
the same loudness. What is made of other recordings than the dataset's goes through encoder, pitch tracker and index
once and is kept beside them: no evaluation loads an encoder.

Shapes: S samples, T frames, C channels.
"""

from __future__ import annotations

import io
import logging
import os
import shutil
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from rvc_dist.config import F0_PER_S, FEATURE_RATE, Recipe
from rvc_dist.data import audio, decode
from rvc_dist.data.sources import content_of
from rvc_dist.features.extractor import Extractor
from rvc_dist.features.feature_files import read_report
from rvc_dist.features.identity import EmbedderId
from rvc_dist.features.index_file import Retriever
from rvc_dist.files import ForeignFileError, atomic_write, regular_size, write_json
from rvc_dist.models.generator import Generator
from rvc_dist.models.modules import kernel_search
from rvc_dist.models.shape import GeneratorShape
from rvc_dist.runtime.background import Background
from rvc_dist.train.checkpoint import discard
from rvc_dist.train.clips import ClipRef
from rvc_dist.train.conversion import (
    CONTEXT,
    Fed,
    Feeder,
    converted,
    filtered,
    for_conversion,
    semitones_to,
    with_context,
)
from rvc_dist.train.dataset import ClipDataset, ClipTable, place
from rvc_dist.train.holdout import in_turn
from rvc_dist.workspace import (
    DEMO_VOICE_DIR,
    IndexReport,
    Speakers,
    StageError,
    Workspace,
    fingerprint,
    read_header,
    read_json,
    save_arrays,
)

logger = logging.getLogger(__name__)

FOREIGN = DEMO_VOICE_DIR / "source" / "fr.flac"
"""Another speaker, in another language: the same for every run, so that runs compare."""
NUM_OWN, NUM_SPEAKERS = 3, 3
"""Held-out phrases, and speakers of a run who speak the other ones: as many as a listener hears out."""
LEAST_S, MOST_S = 1.0, 8.0
"""Of a recording, and of a phrase."""
PAUSE_S = 1.0
"""Clips that lie farther apart in their recording are not of one phrase."""
LEVEL = 10.0 ** (-23.0 / 20.0)
"""The RMS of speech in every file: below full scale by more than its peaks rise above it."""
FRAME_S, BELOW = 0.05, 10.0 ** (-30.0 / 20.0)
"""Speech is what is in frames so long that are no farther below the loudest."""
MAX_PEAK = 0.99
LEAST_PEAK = 1e-5
"""What is softer is silence, and stays so."""


@dataclass(frozen=True)
class Phrase:
    """Something to say, in a voice."""

    name: str
    """Of its file in the folder of every evaluation."""
    kind: str
    """own, foreign or reference"""
    title: str
    speaker: int
    source: str
    original: str
    """Name of its original's file."""
    index: bool
    """Retrieval was mixed in."""
    fed: Fed
    first: int
    """Sample of what is made of it with which its file begins: before it is context."""
    num_samples: int
    """Of its file."""


@dataclass(frozen=True)
class Source:
    """A recording that is not the run's."""

    kind: str
    path: Path
    content: str
    """Hash of the file."""

    @property
    def original(self) -> str:
        return f"{self.kind}_{self.content[:8]}.flac"


class Listening:
    """Speaks phrases with the weights of the moment; on the main rank alone."""

    def __init__(self, recipe: Recipe, table: ClipTable, speakers: Speakers) -> None:
        self.recipe, self.table, self.speakers = recipe, table, speakers
        self.work = Workspace(recipe.run_dir, recipe.name)
        self.folder, self.kept_file = self.work.samples_dir, self.work.samples_dir / "features.safetensors"
        self.originals = self.folder / "originals"
        self.phrases: list[Phrase] = []
        self._background = Background(f"{self.folder}")

    def prepare(self, shape: GeneratorShape, f0_medians: Callable[[], dict[int | None, float]]) -> None:
        """Find the phrases, and make what they need: with a network of `shape`, for voices of these median pitches.

        What cannot be had costs its phrases alone, with a warning.

        Raises:
            StageError: train.eval_reference cannot be read.
        """
        try:
            sources = [Source("foreign", FOREIGN, content_of(FOREIGN)), *self._reference()]
            for path in self.folder.glob(".step_*.tmp"):
                shutil.rmtree(path)
            self.phrases = [*self._own(), *self._of_sources(sources, shape, f0_medians)]
        except OSError as error:
            logger.warning("samples: %s; there is nothing to listen to", error)

    def _reference(self) -> Iterator[Source]:
        """What train.eval_reference names; when it is gone, what was kept of it serves."""
        if self.recipe.train.eval_reference is None:
            return
        path = Path(self.recipe.train.eval_reference)
        kept = (read_header(self.kept_file) or {}).get("reference", {})
        try:
            regular_size(path)  # a FIFO may never answer
            yield Source("reference", path, content_of(path))
        except (OSError, ForeignFileError) as error:
            if kept.get("path") != str(path):
                where = f"train.eval_reference: {path} cannot be read ({error});"
                raise StageError(where, "expected a recording") from error
            yield Source("reference", path, kept["content"])

    # Held-out phrases

    def _own(self) -> Iterator[Phrase]:
        reader = ClipDataset(self.recipe, ())
        for number, clips in enumerate(own_phrases(self.table.holdout), 1):
            wave, fed = joined(reader, clips, round(MOST_S * self.recipe.data.sample_rate) // reader.spec.hop)
            first, end_s = clips[0], clips[0].start_s + len(wave) / self.recipe.data.sample_rate
            source = f"{first.source} at {first.start_s:.1f} to {end_s:.1f} s"
            original = f"own_{fingerprint(source, first.content, len(wave))[:8]}.flac"
            self._write_original(original, wave.numpy())
            title = f"held-out phrase {number}"
            yield Phrase(f"own_{number}", "own", title, first.speaker, source, original, False, fed, 0, len(wave))

    # Other recordings

    def _of_sources(
        self, sources: Sequence[Source], shape: GeneratorShape, f0_medians: Callable[[], dict[int | None, float]]
    ) -> list[Phrase]:
        stamp = self._stamp(sources, shape)
        header = read_header(self.kept_file) or {}
        if header.get("stamp") == stamp and all((self.originals / s.original).is_file() for s in sources):
            return self._kept(header["phrases"])
        try:
            with torch.random.fork_rng([]):  # networks that are built draw random weights
                made = list(self._made(sources, shape, f0_medians() if shape.pitch_guidance else {}))
        except StageError as error:
            if str(error).startswith("train.eval_reference"):
                raise
            logger.warning("samples: only held-out phrases are converted: %s", error)
            return []
        references = ({"path": str(s.path), "content": s.content} for s in sources if s.kind == "reference")
        self._keep(made, {"stamp": stamp, "reference": next(references, {})})
        return made

    def _stamp(self, sources: Sequence[Source], shape: GeneratorShape) -> str:
        """Of all that what is kept depends on."""
        report, config = read_report(self.work), self.recipe.infer
        index = self.work.index_report_file
        return fingerprint(
            report,
            read_json(index, IndexReport).get("stamp") if index.is_file() else None,
            [config.index_rate, config.protect, config.autotune, self.recipe.preprocess.process_effects],
            [shape.sample_rate, shape.hop, shape.pitch_guidance, shape.energy],
            [(s.kind, s.content) for s in sources],
            self._speakers,
        )

    @property
    def _speakers(self) -> tuple[int, ...]:
        return self.table.trained_speakers[:NUM_SPEAKERS]

    def _made(
        self, sources: Sequence[Source], shape: GeneratorShape, medians: dict[int | None, float]
    ) -> Iterator[Phrase]:
        """On the host: the device, its memory and its settings are training's."""
        infer = replace(self.recipe.infer, pitch=0.0, f0_file=None)
        recipe = replace(self.recipe, extract=for_conversion(self.recipe.extract))
        extractor = Extractor.load(recipe, shape.pitch_guidance, torch.device("cpu"))
        embedder, trained_on = extractor.embedder, EmbedderId.from_features(self.table.embedder)
        if embedder.identity.agrees_with(trained_on) is False or embedder.width != shape.content_channels:
            raise StageError(f"the features are of {trained_on}, here is {embedder.identity}, {embedder.width} wide")
        for speaker in self._speakers:
            index = self.work.index_file(speaker) if infer.index_rate > 0 else None
            retriever = Retriever(index, shape.content_channels) if index is not None else None
            draws_on = self.recipe.extract.unvoiced == "interpolated"
            feeder = Feeder(shape, extractor, retriever, replace(self.recipe, infer=infer), draws_on)
            for source in sources:
                wanted = medians.get(speaker) or medians.get(None)
                yield self._made_of(source, speaker, feeder, wanted)

    def _made_of(self, source: Source, speaker: int, feeder: Feeder, wanted_hz: float | None) -> Phrase:
        rate, tracker, recipe = self.recipe.data.sample_rate, feeder.extractor.f0_method, feeder.recipe
        try:
            with decode.opened(source.path) as recording:
                if wanted_hz and tracker is not None:
                    feeder = replace(feeder, semitones=semitones_to(wanted_hz, recording, tracker, recipe)[0])
                heard = beginning(audio.stream(recording, FEATURE_RATE), round(MOST_S * FEATURE_RATE))
                original = beginning(audio.stream(recording, rate), round(MOST_S * rate))
        except decode.AudioError as error:
            raise StageError(f"train.eval_reference: {source.path}: {error};", "give another recording") from error
        if len(heard) < LEAST_S * FEATURE_RATE:
            raise StageError(f"train.eval_reference: {source.path} is shorter than a second;", "give a longer one")
        self._write_original(source.original, filtered(recipe, original, rate))
        whose = f" in the voice of {self.speakers.label(speaker)}" if len(self._speakers) > 1 else ""
        title = {"foreign": "another speaker", "reference": "your reference"}[source.kind] + whose
        name = f"{source.kind}_{speaker}" if whose else source.kind
        where = f"{source.path.name} at 0.0 to {len(heard) / FEATURE_RATE:.1f} s, {feeder.semitones:+.0f} semitones"
        has_index = feeder.retriever is not None
        fed, span = feeder(with_context(heard)), (CONTEXT * rate // F0_PER_S, len(heard) * rate // FEATURE_RATE)
        return Phrase(name, source.kind, title, speaker, where, source.original, has_index, fed, *span)

    def _keep(self, phrases: Sequence[Phrase], header: dict[str, Any]) -> None:
        arrays: dict[str, Any] = {}
        entries = []
        for phrase in phrases:
            parts = phrase.fed._asdict()
            arrays |= {f"{phrase.name}.{k}": v.numpy() for k, v in parts.items() if isinstance(v, Tensor)}
            entries.append({k: v for k, v in vars(phrase).items() if k != "fed"} | {"size": phrase.fed.num_samples})
        save_arrays(self.kept_file, arrays, header | {"phrases": entries})

    def _kept(self, entries: Iterable[dict[str, Any]]) -> list[Phrase]:
        from safetensors.torch import load_file

        arrays, phrases = load_file(self.kept_file), []
        for entry in entries:
            name = entry["name"]
            energy = arrays.get(f"{name}.energy")
            fed = Fed(arrays[f"{name}.content"], arrays[f"{name}.f0"], energy, entry.pop("size"))
            phrases.append(Phrase(**entry, fed=fed))
        return phrases

    # At an evaluation

    def play(self, generator: Generator, step: int, on_written: Callable[[Path], object] = lambda _: None) -> None:
        """Speak all phrases; `on_written` is called with the folder that a thread of its own has written them to.

        Where memory or the disk has no room, this evaluation has no samples.
        """
        try:
            waves = [spoken(generator, phrase, self.recipe) for phrase in self.phrases]
        except torch.OutOfMemoryError as error:
            logger.warning("samples of step %d are left out: %s", step, error)
        else:
            if waves:
                self._background.call(partial(self._write, waves, step, on_written))

    def flush(self) -> None:
        """Return when all is written, or when the disk has not answered for some seconds."""
        self._background.flush()

    def close(self) -> None:
        self._background.close()

    def _write(self, waves: Sequence[audio.Wave], step: int, on_written: Callable[[Path], object]) -> None:
        folder = self.folder / f"step_{step:08d}"
        half = folder.with_name(f".{folder.name}.tmp")
        try:
            shutil.rmtree(half, ignore_errors=True)
            half.mkdir(parents=True)
            entries = [self._written(p, wave, step, half) for p, wave in zip(self.phrases, waves, strict=True)]
            write_json(half / "samples.json", entries)
            if os.path.lexists(folder):  # of a run that went on from before
                discard(folder, half)
            else:
                half.rename(folder)
        except OSError as error:
            logger.warning("samples of step %d are left out: %s", step, error)
            shutil.rmtree(half, ignore_errors=True)
        else:
            on_written(folder)

    def _written(self, phrase: Phrase, wave: audio.Wave, step: int, folder: Path) -> dict[str, Any]:
        """The file of a phrase, and what samples.json says of it."""
        rate = self.recipe.data.sample_rate
        if not np.isfinite(wave).all():
            logger.warning("samples: at step %d the voice gives numbers that are not finite: silence", step)
            wave = np.zeros_like(wave)
        write_flac(folder / f"{phrase.name}.flac", levelled(wave, rate), rate)
        return {
            "file": f"{phrase.name}.flac",
            "kind": phrase.kind,
            "title": phrase.title,
            "speaker": phrase.speaker,
            "speaker_name": self.speakers.names.get(phrase.speaker, str(phrase.speaker)),
            "source": phrase.source,
            "original": f"../{self.originals.name}/{phrase.original}",
            "seconds": round(len(wave) / rate, 3),
            "rate": rate,
            "index": phrase.index,
        }

    def _write_original(self, name: str, wave: audio.Wave) -> None:
        """Once: other samples than those that are there have another name."""
        rate = self.recipe.data.sample_rate
        wave = levelled(wave, rate)
        if not (self.originals / name).is_file():
            write_flac(self.originals / name, wave, rate)


def spoken(generator: Generator, phrase: Phrase, recipe: Recipe) -> audio.Wave:
    """A phrase [S] as the voice speaks it now, with the noise that `infer` has; training's noise stays where it is."""
    device = generator.emb_g.weight.device
    with torch.random.fork_rng([device] if device.type == "cuda" else []), kernel_search(False):
        torch.manual_seed(recipe.infer.seed)
        wave = converted(generator, phrase.fed, phrase.speaker, recipe)
    return wave[phrase.first : phrase.first + phrase.num_samples]


def own_phrases(clips: Iterable[ClipRef]) -> list[list[ClipRef]]:
    """Stretches of neighbouring held-out clips: of each recording the longest, evenly over speakers, longest first."""
    by_recording: dict[tuple[int, str], list[ClipRef]] = defaultdict(list)
    for clip in clips:
        by_recording[clip.speaker, clip.source].append(clip)
    by_speaker: dict[int, list[list[ClipRef]]] = defaultdict(list)
    for (speaker, _), its_clips in sorted(by_recording.items()):
        by_speaker[speaker].append(max(_stretches(its_clips), key=_seconds))
    for stretches in by_speaker.values():
        stretches.sort(key=_seconds, reverse=True)
    return list(in_turn(by_speaker.values()))[:NUM_OWN]


def _stretches(clips: list[ClipRef]) -> list[list[ClipRef]]:
    """Neighbours among the clips of a recording. Where clips lie that another tool cut is guessed: they stay alone."""
    found: list[list[ClipRef]] = []
    for clip in sorted(clips, key=lambda c: c.start_s):
        before = found[-1][-1] if found else None
        if before is None or clip.guessed or clip.start_s > before.start_s + before.duration_s + PAUSE_S:
            found.append([clip])
        elif _seconds(found[-1]) < MOST_S:
            found[-1].append(clip)
    return found


def _seconds(stretch: Sequence[ClipRef]) -> float:
    """As far as a phrase goes."""
    return min(MOST_S, stretch[-1].start_s + stretch[-1].duration_s - stretch[0].start_s)


class _Joined(NamedTuple):
    """Parts of the same T frames."""

    wave: Tensor
    """[T * hop]"""
    content: Tensor
    f0: Tensor
    energy: Tensor | None

    def cut(self, first: int, last: int, hop: int) -> _Joined:
        energy = None if self.energy is None else self.energy[first:last]
        return _Joined(self.wave[first * hop : last * hop], self.content[first:last], self.f0[first:last], energy)

    def then(self, other: _Joined) -> _Joined:
        pairs = zip(self, other, strict=True)
        return _Joined(*(None if a is None or b is None else torch.cat([a, b]) for a, b in pairs))  # type: ignore[arg-type]


def joined(reader: ClipDataset, clips: Sequence[ClipRef], most_frames: int) -> tuple[Tensor, Fed]:
    """Neighbouring clips as one: their samples [S], and what the generator is fed of them, at most so many frames.

    They meet in the middle of what they share, at one level: each was levelled for itself.
    """
    hop, reach, whole, end_s = reader.spec.hop, reader.spec.reach, None, 0.0
    for clip in clips:
        read = reader.read(clip)
        wave, content = torch.empty(len(read.content) * hop), torch.empty(read.content.shape)
        place(wave, read.wave_with_reach[reach : len(read.wave_with_reach) - reach])
        place(content, read.content)
        part = _Joined(wave, content, read.f0, read.energy)
        if whole is not None:
            shared = round(max(0.0, end_s - clip.start_s) * reader.rate / hop)
            shared = min(shared, len(whole.f0), len(part.f0))
            before, after = whole.wave[len(whole.wave) - shared * hop :], part.wave[: shared * hop]
            gain = float((before @ after / after.square().sum().clamp_min(1e-9)).clamp(0.1, 10.0)) if shared else 1.0
            part = part._replace(wave=part.wave * gain, energy=None if part.energy is None else part.energy * gain)
            left, half = len(whole.f0) - shared + shared // 2, shared // 2
            whole = whole.cut(0, left, hop).then(part.cut(half, len(part.f0), hop))
        else:
            whole = part
        end_s = clip.start_s + len(read.f0) * hop / reader.rate
    assert whole is not None
    whole = whole.cut(0, most_frames, hop)
    return whole.wave, Fed(whole.content, whole.f0, whole.energy, len(whole.wave))


def beginning(blocks: Iterable[audio.Wave], most: int) -> audio.Wave:
    """The first samples of a stream, at most so many; no more of it is read."""
    parts, num = [np.zeros(0, np.float32)], 0
    for block in blocks:
        parts.append(block)
        num += len(block)
        if num >= most:
            break
    return np.concatenate(parts)[:most]


def levelled(wave: audio.Wave, rate: int) -> audio.Wave:
    """`wave` [S] at LEVEL, by the RMS of what is speech in it; less where it would clip, and silence stays silence."""
    if (peak := float(np.abs(wave).max(initial=0.0))) < LEAST_PEAK:
        return wave
    size = min(len(wave), round(FRAME_S * rate))
    frames = np.square(wave[: len(wave) // size * size], dtype=np.float64).reshape(-1, size).mean(axis=1)
    rms = np.sqrt(frames[frames >= frames.max() * BELOW**2].mean())
    return (wave * np.float32(min(LEVEL / rms, MAX_PEAK / peak))).astype(np.float32)


def write_flac(path: Path, wave: audio.Wave, rate: int) -> None:
    """A wave [S] in -1..1, in 16 bits."""
    import soundfile

    encoded = io.BytesIO()
    soundfile.write(encoded, wave, rate, format="FLAC", subtype="PCM_16")
    atomic_write(path, encoded.getvalue())
