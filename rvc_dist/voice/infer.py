"""The infer stage: convert recordings of any length with a voice file, window by window.

Shapes: S samples, T frames, C channels. Positions in the input are counted in frames of 10 ms.
"""

from __future__ import annotations

import contextlib
import ctypes
import itertools
import logging
import os
import re
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from functools import cache, partial
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import torch

from rvc_dist.choices import EMBEDDERS
from rvc_dist.config import F0_PER_S, FEATURE_RATE, ConfigError, ExtractConfig, InferConfig, Recipe
from rvc_dist.data import audio, decode
from rvc_dist.data.sources import content_of
from rvc_dist.features.content import WITHOUT_FILES
from rvc_dist.features.extractor import Extractor
from rvc_dist.features.index_file import Retriever, index_in
from rvc_dist.files import atomic_write
from rvc_dist.runtime.device import compute_exactly
from rvc_dist.screen import AUDIO, ProgressBar
from rvc_dist.train.conversion import Feeder, converted, for_conversion, semitones_to
from rvc_dist.voice.file import CONVERTED_AS, Voice
from rvc_dist.voice.loudness import Loudness, matched
from rvc_dist.voice.pitch import GivenPitch
from rvc_dist.voice.recordings import Job, list_jobs, share_of
from rvc_dist.voice.sound_file import check_output, stamp_of, write
from rvc_dist.voice.windows import convert
from rvc_dist.workspace import Shard, StageError, Workspace, fingerprint, listed, wait_for

logger = logging.getLogger(__name__)

KERNEL_CACHE = "ONEDNN_PRIMITIVE_CACHE_CAPACITY", "64"
"""On a CPU each length of window has kernels of its own, of which oneDNN would keep 1024, some 0.6 MB each."""


@dataclass(frozen=True)
class Converter:
    """Converts windows of 16 kHz audio."""

    voice: Voice
    extractor: Extractor
    retriever: Retriever | None
    recipe: Recipe
    device: torch.device
    speaker: int
    semitones: float = 0.0
    """Transposition that this recording needs besides infer.pitch."""
    given_pitch: GivenPitch | None = None
    """infer.f0_file"""

    @classmethod
    def load(cls, recipe: Recipe) -> Converter:
        """Everything that a conversion needs.

        Raises:
            StageError: the voice, its encoder, the pitch tracker or the index cannot be had or do not fit.
        """
        work, config, device = Workspace(recipe.run_dir, recipe.name), recipe.infer, compute_exactly("infer")
        voice = Voice.load(Path(config.model) if config.model else work.last_voice_file, device)
        speaker = voice.speaker(config.speaker)
        recipe = as_trained(recipe, voice)
        extractor = _extractor(recipe, voice)
        width = voice.generator.shape.content_channels
        given = GivenPitch(Path(config.f0_file)) if config.f0_file else None
        retriever = _retriever(config, work, width, speaker)
        return cls(voice, extractor, retriever, recipe, device, speaker, given_pitch=given)

    def settings(self) -> dict[str, Any]:
        """All that a result depends on besides its recording."""
        recipe, work = self.recipe, Workspace(self.recipe.run_dir, self.recipe.name)
        chosen = {k: v for k, v in asdict(recipe.infer).items() if k not in ("input", "output", "index", "f0_file")}
        files = {"model": recipe.infer.model or str(work.last_voice_file), "f0_file": recipe.infer.f0_file}
        files["index"] = str(self.retriever.path) if self.retriever else None
        return (
            chosen
            | {key: file and content_of(Path(file)) for key, file in files.items()}
            | {key: getattr(getattr(recipe, part), key) for part, keys in CONVERTED_AS.items() for key in keys}
            | {k: v for k, v in asdict(recipe.extract).items() if k == "unvoiced" or re.fullmatch("f0_.*model", k)}
            | {"embedder": self.extractor.embedder.describe(), "speaker": self.speaker}
        )

    def for_recording(self, recording: decode.Recording) -> Converter:
        """This, with the transposition that brings the recording's median pitch to the voice's (infer.auto_pitch).

        Raises:
            StageError: the voice's is not known.
        """
        if not self.recipe.infer.auto_pitch or self.extractor.f0_method is None:
            return self
        wanted = self.voice.median_f0(self.speaker)
        if wanted is None:
            raise StageError(
                "infer.auto_pitch: the voice file does not say its median pitch (f0_median);",
                "give infer.pitch in semitones instead, or export the voice again",
            )
        semitones, found = semitones_to(wanted, recording, self.extractor.f0_method, self.recipe)
        if found is None:
            logger.warning("infer.auto_pitch: nothing is voiced, so nothing is transposed")
            return self
        logger.info("infer: median pitch %.1f Hz, the voice's %.1f Hz: %+.0f semitones", found, wanted, semitones)
        return replace(self, semitones=semitones)

    @torch.inference_mode()
    def __call__(self, wave: audio.Wave, at: int = 0) -> audio.Wave:
        """One window [S] at 16 kHz -> [S / 16000 * rate] at the voice's rate; its last frames may be silent.

        Without its context it begins at frame `at` of the recording. Its noise depends on that alone.

        Raises:
            StageError: the network gives something else than finite numbers.
        """
        torch.manual_seed(self.recipe.infer.seed + at)
        made = converted(self.voice.generator, self.feeder(wave, at), self.speaker, self.recipe)
        if not np.isfinite(made).all():
            raise StageError(
                "infer.model: the voice gives samples that are not finite numbers; its weights are damaged"
            )
        return made

    @property
    def feeder(self) -> Feeder:
        draws_on = (self.voice.unvoiced or self.recipe.extract.unvoiced) == "interpolated"
        of_voice = self.voice.generator.shape, self.extractor, self.retriever, self.recipe, draws_on
        return Feeder(*of_voice, self.semitones, self.given_pitch)


def as_trained(recipe: Recipe, voice: Voice) -> Recipe:
    """The recipe with the settings that the voice was trained with, where its file says them and `infer` does not.

    Raises:
        StageError: they are none that this version knows.
    """
    given = {key: getattr(recipe.infer, key) for key in ("f0_method", "f0_min", "f0_max")}
    told = {part: dict(values) for part, values in voice.trained_with.items()}
    pitch = told.setdefault("extract", {})
    for key, default in asdict(ExtractConfig()).items():
        asked = getattr(recipe.extract, key)
        if key in pitch and given.get(key) is None and asked not in (default, pitch[key]):
            other = f"infer.{key} overrules it" if key in given else "infer.autotune overrules it"
            logger.warning("extract.%s: the voice was trained with %s, not with %s; %s", key, pitch[key], asked, other)
    pitch.update({key: value for key, value in given.items() if value is not None})
    try:
        return replace(recipe, **{part: replace(getattr(recipe, part), **values) for part, values in told.items()})
    except ConfigError as error:
        raise StageError(
            f"infer.model: how the voice was trained is not known here, or not with what `infer` says: {error};",
            "say --infer.f0_method, --infer.f0_min and --infer.f0_max",
        ) from error


def _extractor(recipe: Recipe, voice: Voice) -> Extractor:
    """The voice's encoder with the voice's mix of layers, or the encoder that infer.embedder_model names instead.

    Raises:
        StageError: it cannot be had, does not fit, or is not the voice's although nobody asked for another.
    """
    given, wanted = recipe.infer.embedder_model, voice.embedder
    known = {*EMBEDDERS, recipe.extract.embedder_model}
    if (
        given is None
        and wanted.name not in known
        and not (Path(wanted.name).is_dir() or Path(wanted.name).is_absolute())
    ):
        raise StageError(
            f"infer.embedder_model: the voice file names the encoder {wanted.name!a}, which is neither published (as "
            f"{', '.join(sorted(EMBEDDERS))} are) nor a folder here, and nothing is fetched because a voice file says "
            "so:",
            "if you trust it, say --infer.embedder_model with that name, or give the folder of its encoder",
        )
    encoder = given or wanted.name
    used = replace(
        recipe,
        extract=replace(for_conversion(recipe.extract), embedder_model=encoder, embedder_mix=wanted.mix),
        model=replace(recipe.model, version=voice.version),
    )
    try:
        extractor = Extractor.load(used, with_pitch=voice.generator.shape.pitch_guidance)
    except StageError as error:  # here the encoder is chosen under another key, and the mix is the voice's
        message = str(error).replace(WITHOUT_FILES, "").replace("extract.embedder_model", "infer.embedder_model")
        message = message.replace("extract.embedder_mix", "infer.model: the voice's embedder_mix")
        why = f" (the voice was trained with {wanted})" if message.startswith("infer.") else ""
        raise StageError(message + why) from error
    found, width = extractor.embedder.width, voice.generator.shape.content_channels
    if found != width:
        raise StageError(
            f"infer.embedder_model: {extractor.embedder.name} gives features {found} wide, the voice was trained on "
            f"{width} ({wanted})"
        )
    if extractor.embedder.identity.agrees_with(wanted) is False:
        problem = f"infer.embedder_model: the voice was trained with {wanted}, not with {extractor.embedder.identity}"
        if given is None:
            raise StageError(
                f"{problem};",
                "give the folder of its encoder as --infer.embedder_model FOLDER (one that is named there is used even "
                "if it is another, with a warning)",
            )
        logger.warning("%s: the words may come out wrong", problem)
    return extractor


def _retriever(config: InferConfig, work: Workspace, width: int, speaker: int) -> Retriever | None:
    """infer.index, or the run's own index for a voice of that run: the speaker's, else that of all.

    None when there is none or it is not wanted.

    Raises:
        StageError: infer.index is no index, or a folder in which not one alone fits.
    """
    if config.index_rate == 0:
        return None
    is_own = config.model is None or os.path.dirname(os.path.realpath(config.model)) == os.path.realpath(work.voice_dir)
    index = Path(config.index) if config.index else work.index_file(speaker) if is_own else None
    index = index_in(index, speaker) if index is not None and index.is_dir() else index
    logger.info("infer: index %s", index or "none, so infer.index_rate has no effect")
    return Retriever(index, width) if index is not None else None


def run(recipe: Recipe, shard: Shard) -> None:
    """Convert this process's share of infer.input; what was made of the same recording and settings stays as it is.

    What is wrong with one recording keeps nobody from the others.

    Raises:
        StageError: recordings cannot be read, a result not be written, or `Converter.load` fails.
    """
    os.environ.setdefault(*KERNEL_CACHE)
    jobs = list_jobs(recipe.infer)
    if recipe.infer.f0_file and len(jobs) > 1:
        raise StageError(f"infer.f0_file: got one for {len(jobs)} recordings;", "convert one alone")
    mine, failed = share_of(jobs, shard), dict[Path, str]()
    waits = len(jobs) > 1 and shard.count > 1 and not shard.array
    for job in mine:
        with contextlib.suppress(OSError):  # `check_output` names what is wrong
            job.failure_file.unlink()
    lengths = {job: seconds for job in mine if (seconds := _seconds(job, failed)) is not None}
    if lengths:
        check_output(next(iter(lengths)).target)
    if lengths or (waits and (mine or shard.is_first)):
        converter = Converter.load(recipe)
        stamps = stamps_of(converter.settings())
        others = [job for job in jobs if job not in lengths] if waits and shard.is_first else []
        with _progress(lengths, others, stamps) as bar:
            _convert_all(converter, lengths, stamps, failed, bar)
            converter.extractor.warn_at_edges("infer")
            if waits:
                failed = _failures_of_all(jobs, mine, stamps, failed, shard)
    if failed and len(jobs) == 1:
        raise StageError(f"infer.input: {jobs[0].source}: {failed[jobs[0].source]}")
    if failed:
        reasons = listed((str(source), why) for source, why in failed.items())
        raise StageError(f"infer.input: {len(failed)} of {len(jobs)} recordings were not converted:", listed=reasons)


Stamps: TypeAlias = Callable[[Job], str]


def stamps_of(settings: dict[str, Any]) -> Stamps:
    """What the results of jobs are known by: the settings and the recording's bytes, read once they are asked for."""
    return cache(lambda job: fingerprint(settings, content_of(job.source)))


def _seconds(job: Job, failed: dict[Path, str]) -> float | None:
    """How long a recording is; None, with the reason in `failed`, where it is none."""
    try:
        return decode.duration(job.source)
    except decode.AudioError as error:
        failed[job.source] = str(error)
        return None


def _outcome(job: Job, stamp: str) -> str | None:
    """Of a job of any rank: why it failed, nothing when it is done, None when it is neither."""
    if stamp_of(job.target) == stamp:
        return ""
    with contextlib.suppress(OSError):
        found, _, reason = job.failure_file.read_text(encoding="utf-8", errors="replace").partition("\n")
        return reason if found == stamp else None
    return None


def _failures_of_all(
    jobs: list[Job], mine: list[Job], stamps: Stamps, failed: dict[Path, str], shard: Shard
) -> dict[Path, str]:
    """On the first rank, which waits for the others, what all failed at; else nothing.

    A rank that ended with an error would end those that still work: only the first one does, when all are done.
    """
    for job in mine:
        if job.source in failed:
            atomic_write(job.failure_file, f"{stamps(job)}\n{failed[job.source]}")
    if not shard.is_first:
        return {}
    outcomes = {
        job.source: wait_for(f"{job.target} of another rank", partial(_outcome, job, stamps(job))) for job in jobs
    }
    for job in jobs:
        job.failure_file.unlink(missing_ok=True)
    return {source: reason for source, reason in outcomes.items() if reason}


def _progress(mine: dict[Job, float], others: list[Job], stamps: Stamps) -> ProgressBar:
    """Of this process's recordings of so many seconds, and of those of other ranks, whose files tell it."""
    waiting = {job: seconds for job in others if (seconds := _seconds(job, {})) is not None}

    def look(bar: ProgressBar) -> None:
        for job, seconds in [*waiting.items()]:
            is_there = job.target.exists() or job.failure_file.exists()
            if is_there and (outcome := _outcome(job, stamps(job))) is not None:
                del waiting[job]
                bar.advance(seconds, num_failed=int(outcome != ""))

    return ProgressBar("infer", sum(mine.values()) + sum(waiting.values()), AUDIO, look=look)


def _convert_all(
    converter: Converter, lengths: dict[Job, float], stamps: Stamps, failed: dict[Path, str], bar: ProgressBar
) -> None:
    """Convert recordings of so many seconds that were not converted before; `failed` gets why one could not be."""
    todo = {job: seconds for job, seconds in lengths.items() if stamp_of(job.target) != stamps(job)}
    if done := len(lengths) - len(todo):
        told = next(iter(lengths)).target if len(lengths) == 1 else f"{done} of {len(lengths)} results"
        logger.info("infer: %s: made before of the same with the same settings", told)
    bar.begin(sum(lengths.values()) - sum(todo.values()))
    for number, (job, seconds) in enumerate(todo.items(), 1):
        logger.debug("infer: %s, %.1f s (%d of %d)", job.source, seconds, number, len(todo))
        bar.text = job.source.name
        try:
            convert_recording(converter, job, stamps(job), bar)
        except decode.AudioError as error:
            logger.warning("infer: %s: %s", job.source, error)
            failed[job.source] = str(error)
            bar.num_failed += 1
        else:
            logger.info("infer: %s", job.target)


def counted(made: Iterator[decode.Samples], rate: int, bar: ProgressBar) -> Iterator[decode.Samples]:
    """`made`, counted as it passes."""
    for block in made:
        give_memory_back()
        bar.advance(len(block) / rate)
        yield block


def give_memory_back() -> None:
    """Let the C library return what is free: windows of many lengths would leave gaps of many sizes in its heap."""
    with contextlib.suppress(OSError, AttributeError):  # it is not glibc
        ctypes.CDLL("libc.so.6").malloc_trim(0)


def convert_recording(converter: Converter, job: Job, stamp: str, bar: ProgressBar) -> None:
    """Convert one recording as `infer` says.

    Raises:
        AudioError: it cannot be read.
        StageError, OSError: the result cannot be made or written.
    """
    config, rate = converter.recipe.infer, converter.voice.rate
    with decode.opened(job.source) as recording:
        converter = converter.for_recording(recording)
        blocks = audio.stream(recording, FEATURE_RATE, config.channels == "keep")
        first, source = next(blocks), Loudness(FEATURE_RATE)
        num_channels = first.shape[1] if first.ndim == 2 else 1
        num_samples = round(recording.duration_s * rate)
        blocks = source.noted(itertools.chain([first], blocks))
        made = convert(converter, blocks, rate, round(config.window_s * F0_PER_S), num_samples)
        if config.loudness_mix < 1.0:
            made = matched(made, rate, source, config.loudness_mix)
        write(job.target, counted(made, rate, bar), rate, num_samples, num_channels, stamp)
    for note in recording.told():
        logger.warning("infer: %s: %s", job.source, note)
