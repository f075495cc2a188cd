"""The infer stage: convert a recording of any length with a voice file, window by window.

Shapes: S samples, T frames, C channels. Positions in the input are counted in frames of 10 ms.
"""

from __future__ import annotations

import itertools
import logging
import os
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from rvc_dist.choices import EMBEDDERS
from rvc_dist.config import F0_HOP, F0_PER_S, FEATURE_RATE, InferConfig, Recipe
from rvc_dist.data import audio, decode
from rvc_dist.features.content import WITHOUT_FILES
from rvc_dist.features.extractor import Extractor
from rvc_dist.features.f0 import drawn_on
from rvc_dist.features.index_file import Retriever
from rvc_dist.files import BESIDE_GLOB, beside, remove_half_written, space
from rvc_dist.models.pitch import coarse_pitch
from rvc_dist.runtime.device import compute_exactly
from rvc_dist.train.dataset import covered_frames, feature_frames
from rvc_dist.voice.file import Voice
from rvc_dist.workspace import Shard, StageError, Workspace

logger = logging.getLogger(__name__)

CONTEXT = F0_PER_S
"""Frames of context on either side of a window: more than the encoders' and the decoder's reach at the joins."""
FADE = 4
"""Frames over which neighbouring windows are cross-faded."""
SEARCH_SHARE = 0.25
"""The join is put at the quietest place of this last part of a window."""
MAX_PEAK = 0.99


@dataclass(frozen=True)
class Converter:
    """Converts windows of 16 kHz audio."""

    voice: Voice
    extractor: Extractor
    retriever: Retriever | None
    recipe: Recipe
    device: torch.device
    speaker: int

    @classmethod
    def load(cls, recipe: Recipe) -> Converter:
        """Everything that a conversion needs.

        Raises:
            StageError: the voice, its encoder, the pitch tracker or the index cannot be had or do not fit.
        """
        work, config, device = Workspace(recipe.run_dir, recipe.name), recipe.infer, compute_exactly("infer")
        voice = Voice.load(Path(config.model) if config.model else work.last_voice_file, device)
        speaker = voice.speaker(config.speaker)
        extractor = _extractor(recipe, voice)
        width = voice.generator.shape.content_channels
        return cls(voice, extractor, _retriever(config, work, width), recipe, device, speaker)

    @torch.inference_mode()
    def __call__(self, wave: audio.Wave) -> audio.Wave:
        """One window [S] at 16 kHz -> [S / 16000 * rate] at the voice's rate; its last frames may be silent.

        Raises:
            StageError: the network gives something else than finite numbers.
        """
        config, shape = self.recipe.infer, self.voice.generator.shape
        # Input and output as the clips were in training: without it a young voice hums a constant that no mel loss
        # hears. The context swallows the filter's onset.
        effects = self.recipe.preprocess.process_effects
        wave = audio.highpass(wave, FEATURE_RATE) if effects else wave
        ((_, content, f0),) = self.extractor([wave])
        f0 = f0 * 2.0 ** (config.pitch / 12.0)
        if self.retriever is not None:
            mixed = self.retriever(content, config.index_rate)
            kept = self._kept_share(f0, len(content))
            content = mixed * kept[:, None] + content * (1.0 - kept[:, None])
        if (self.voice.unvoiced or self.recipe.extract.unvoiced) == "interpolated":
            f0 = drawn_on(f0)
        wanted = len(wave) * shape.sample_rate // FEATURE_RATE
        frames = covered_frames(shape.sample_rate, shape.hop, wanted, len(content), len(f0))
        content_t = torch.from_numpy(content)[feature_frames(frames, shape.sample_rate, shape.hop, F0_PER_S // 2)]
        f0_t = torch.from_numpy(f0)[feature_frames(frames, shape.sample_rate, shape.hop, F0_PER_S)]
        made = self._generate(content_t, f0_t).cpu().numpy()
        if not np.isfinite(made).all():
            raise StageError(
                "infer.model: the voice gives samples that are not finite numbers; its weights are damaged"
            )
        made = audio.highpass(made[:wanted], shape.sample_rate) if effects else made[:wanted]
        return np.pad(made, (0, wanted - len(made)))

    def _kept_share(self, f0: Any, num_content: int) -> Any:
        """How much of the retrieval each content frame [T50] keeps: unvoiced consonants are easily smeared by it.

        A voice without pitch guidance does not know what is voiced, and keeps all of it.
        """
        protect = self.recipe.infer.protect if self.voice.generator.shape.pitch_guidance else 0.5
        voiced = f0[np.minimum(np.arange(num_content) * 2, len(f0) - 1)] > 0
        return np.where(voiced | (protect >= 0.5), 1.0, protect).astype(np.float32)

    def _generate(self, content: Tensor, f0: Tensor) -> Tensor:
        """content [T, C], f0 [T] -> wave [S]."""
        guided = self.voice.generator.shape.pitch_guidance
        content, f0 = content.unsqueeze(0).to(self.device), f0.unsqueeze(0).to(self.device)
        lengths = torch.tensor([content.shape[1]], device=self.device)
        speaker = torch.tensor([self.speaker], device=self.device)
        coarse = coarse_pitch(f0) if guided else None
        return self.voice.generator.infer(content, lengths, coarse, f0 if guided else None, speaker)[0, 0].float()


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
        extract=replace(
            recipe.extract, embedder_model=encoder, embedder_mix=wanted.mix, precision="fp32", unvoiced="zero"
        ),
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


def _retriever(config: InferConfig, work: Workspace, width: int) -> Retriever | None:
    """infer.index, or the run's own index for a voice of that run; None when there is none or it is not wanted."""
    if config.index_rate == 0:
        return None
    is_own = config.model is None or os.path.dirname(os.path.realpath(config.model)) == os.path.realpath(work.voice_dir)
    index = Path(config.index) if config.index else work.index_file() if is_own else None
    logger.info("infer: index %s", index or "none, so infer.index_rate has no effect")
    return Retriever(index, width) if index is not None else None


def run(recipe: Recipe, shard: Shard) -> None:
    """Convert infer.input to infer.output.

    Raises:
        StageError: the input cannot be read, the output not be written, or `Converter.load` fails.
    """
    if not shard.is_first:
        return
    source, target = Path(recipe.infer.input), Path(recipe.infer.output)
    if not source.is_file():
        raise StageError(f"infer.input: {source} {'is not a file' if source.exists() else 'does not exist'}")
    try:
        with decode.opened(source) as recording:
            check_output(source, target)
            converter = Converter.load(recipe)
            torch.manual_seed(recipe.infer.seed)
            logger.info("infer: %s, %.1f s", source, recording.duration_s)
            rate, blocks = converter.voice.rate, audio.stream(recording, FEATURE_RATE)
            num_samples = round(recording.duration_s * rate)
            write(target, convert(converter, blocks, num_samples), rate, num_samples)
    except decode.AudioError as error:
        raise StageError(f"infer.input: {source}: {error}") from error
    for note in recording.told():
        logger.warning("infer: %s: %s", source, note)
    converter.extractor.warn_at_edges("infer")
    logger.info("infer: %s", target)


def check_output(source: Path, target: Path) -> None:
    """Find out now whether `target` can be written, not after the conversion.

    Raises:
        StageError: it cannot, or it is the recording itself.
    """
    try:
        if target.is_dir():
            raise StageError(f"infer.output: {target} is a folder, expected a file name that ends in .wav or .flac")
        with beside(target) as probe:
            probe.touch(exist_ok=False)
        is_source = target.exists() and target.samefile(source)
        remove_half_written(target.parent, BESIDE_GLOB)
    except OSError as error:
        raise StageError(f"infer.output: {target} cannot be written ({error.strerror})") from error
    if is_source:
        raise StageError(f"infer.output: {target} is infer.input itself;", "give the result another name")


def convert(converter: Converter, blocks: Iterator[audio.Wave], num_samples: int | None = None) -> Iterator[audio.Wave]:
    """Convert a stream of 16 kHz blocks [S] into a stream of blocks at the voice's rate, of the same total length.

    `num_samples` is that length where it is known better than 16 kHz tell it: to the sample of the voice's rate.

    Each window is converted with a second of context on both sides; windows meet where the input is quietest and are
    cross-faded there, so that no join clicks. At most two windows are in memory.
    """
    rate = converter.voice.rate
    per_frame = rate // F0_PER_S
    context, fade = CONTEXT * per_frame, FADE * per_frame
    half = fade // 2
    ramp = (0.5 - 0.5 * np.cos(np.pi * (np.arange(fade) + 0.5) / fade)).astype(np.float32)
    tail: audio.Wave | None = None
    done = 0
    for piece, length, last in windows(blocks, int(converter.recipe.infer.window_s * F0_PER_S)):
        size = length * rate // FEATURE_RATE
        if last and num_samples is not None and abs(num_samples - done - size) < per_frame:
            size = num_samples - done
        done += size
        made = converter(piece)[context - half : context + size + half]  # a half fade more on either side
        if tail is None:
            made = made[half:]
        else:
            yield tail * (1 - ramp) + made[:fade] * ramp
            made = made[fade:]
        if last:
            yield made[:-half]
        else:
            yield made[:-fade]
            tail = made[-fade:]


def windows(blocks: Iterator[audio.Wave], window: int) -> Iterator[tuple[audio.Wave, int, bool]]:
    """Cut a stream of 16 kHz blocks into pieces of at most `window` frames, each with its context around it.

    Yields (piece with CONTEXT frames of context on both sides, silence beyond the ends; samples that it stands for;
    whether it is the last).
    """
    context, most = CONTEXT * F0_HOP, window * F0_HOP
    buffer = silence = np.zeros(context, dtype=np.float32)
    for block in itertools.chain(blocks, [silence]):
        # buffer[0] is always `context` samples before the next window.
        buffer = np.concatenate([buffer, block])
        while len(buffer) - 2 * context > most:
            cut = quietest_frame(buffer[context : context + most]) * F0_HOP
            yield buffer[: cut + 2 * context], cut, False
            buffer = buffer[cut:]
    # Whole frames: the encoders and the pitch tracker count in them.
    length = len(buffer) - 2 * context
    yield np.pad(buffer, (0, -len(buffer) % F0_HOP)), length, True


def quietest_frame(wave: audio.Wave) -> int:
    """The 10 ms frame in the last part of `wave` before and after which a fade would meet the least energy.

    At least one fade is left on either side of it.
    """
    energy = np.square(wave[: len(wave) // F0_HOP * F0_HOP].reshape(-1, F0_HOP)).sum(axis=1)
    # faded[i] is the energy of the frames i .. i + FADE - 1, which a cut at frame i + FADE // 2 fades over.
    faded = np.convolve(energy, np.ones(FADE), mode="valid")
    first = max(FADE, int(len(energy) * (1 - SEARCH_SHARE)))
    candidates = faded[first - FADE // 2 : len(energy) - FADE - FADE // 2 + 1]
    return first + int(np.argmin(candidates))


def write(path: Path, blocks: Iterator[audio.Wave], rate: int, num_samples: int | None = None) -> None:
    """Write blocks as 16-bit wav or flac, turned down if any sample would clip. The file appears when it is whole.

    Raises:
        OSError, StageError: it cannot be written; where the disk is full, they say what `num_samples` need.
    """
    import soundfile

    peak = 0.0
    num_bytes = num_samples and 6 * num_samples  # as float32, then in 16 bits
    with beside(path, num_bytes) as half, tempfile.TemporaryFile(dir=path.parent) as raw:
        for block in blocks:
            peak = max(peak, float(np.abs(block).max(initial=0.0)))
            raw.write(block.astype(np.float32).tobytes())
        raw.seek(0)
        gain = np.float32(min(1.0, MAX_PEAK / peak) if peak > 0 else 1.0)
        kind = path.suffix[1:].upper()
        form: dict[str, Any] = {"samplerate": rate, "channels": 1, "format": kind, "subtype": "PCM_16"}
        with half.open("xb+") as stream:
            try:
                with soundfile.SoundFile(stream.fileno(), "w", closefd=False, **form) as file:
                    while samples := raw.read(1 << 22):
                        file.write(np.frombuffer(samples, dtype=np.float32) * gain)
            except soundfile.LibsndfileError as error:
                # It says "System error" of whatever the disk refuses: a write of our own meets the same and names it.
                stream.seek(0, os.SEEK_END)
                stream.write(bytes(1 << 22))
                stream.flush()
                raise StageError(f"infer.output: {path} cannot be written ({error}); {space(path)}") from error
        half.replace(path)
