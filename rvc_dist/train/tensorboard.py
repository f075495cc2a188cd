"""RUN/tensorboard: curves, sounds, pictures and the recipe of a run, beside those of other runs."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from rvc_dist.config import Recipe
from rvc_dist.files import disk_errors
from rvc_dist.report.facts import flat, recipe_changes
from rvc_dist.runtime.background import Background
from rvc_dist.workspace import Workspace, read_json

if TYPE_CHECKING:
    from rvc_dist.report.figures import Wave

logger = logging.getLogger(__name__)

LAYOUT = {
    "Losses": {
        "generator": ["Multiline", ["loss/g_.*"]],
        "mel": ["Multiline", ["loss/g_mel"]],
        "discriminator": ["Multiline", ["loss/d"]],
        "gradient norms": ["Multiline", ["grad/norm_g", "grad/norm_d"]],
    },
    "Validation on held-out speech": {
        "mel distance": ["Multiline", ["validation/mel_distance", "best/mel_distance"]],
        "mel distance by speaker": ["Multiline", ["validation_speaker_.*/mel_distance"]],
        "mel-cepstral distance, dB": ["Multiline", ["validation/mcd_db"]],
        "pitch error, cents": ["Multiline", ["validation/f0_cents"]],
        "voicing error, share of frames": ["Multiline", ["validation/voicing_error"]],
        "loudness error, dB": ["Multiline", ["validation/loudness_db"]],
        "speaker similarity, 1 is the same": ["Multiline", ["validation/similarity"]],
        "mel distance of the weights and their average": ["Multiline", ["validation_(raw|ema)/mel_distance"]],
    },
    "Validation on unseen speakers": {
        "pitch error, cents": ["Multiline", ["validation_unseen/f0_cents"]],
        "voicing error, share of frames": ["Multiline", ["validation_unseen/voicing_error"]],
        "loudness error, dB": ["Multiline", ["validation_unseen/loudness_db"]],
        "similarity of content and to the target": ["Multiline", ["validation_unseen/.*_similarity"]],
    },
    "Throughput": {
        "seconds of audio a second": ["Multiline", ["perf/audio_s_per_s"]],
        "seconds a step, by part": ["Multiline", ["perf/(?!audio_).*_s"]],
    },
}
"""The tab Custom Scalars; tags are regular expressions."""
METRICS = ("best/mel_distance", "best/step", "validation/mel_distance", "loss/g_mel", "loss/g_total", "loss/d")
"""The columns of the tab HParams beside the recipe; their last values are the run's."""
SECTIONS = ("data", "preprocess", "extract", "model", "train")
"""Of the recipe, what decides a run."""
ALWAYS = ("train.batch_size", "train.learning_rate", "train.optimizer", "train.precision", "model.vocoder")
"""Of it, what the tab HParams shows of every run, besides what is not as by default."""
CARD = ".card"
"""Ends the name of the file that says what a run is: TensorBoard believes the first it finds, so there is only one."""
NUM_PICTURES = 3


def plain_recipe(recipe: Recipe) -> dict[str, bool | int | float | str | None]:
    """What decides a run, with dotted keys, for tables of hyperparameters."""
    parts = {key: value for key, value in recipe.to_dict().items() if key in SECTIONS}
    return {k: v if isinstance(v, bool | int | float | None) else str(v) for k, v in flat(parts).items()}


class TensorBoard:
    """Writes in a thread of its own.

    `first_step` hides what an earlier run wrote at or after it.
    """

    def __init__(self, recipe: Recipe, work: Workspace, first_step: int) -> None:
        self.recipe, self.work, self.folder = recipe, work, work.events_dir
        self._writer: Any = None
        self._background = Background(f"TensorBoard's writer in {self.folder}")
        self._call(partial(self._open, first_step))

    def scalars(self, values: Mapping[str, float], step: int) -> None:
        now, kept = time.time(), dict(values)
        self._call(lambda: [self._writer.add_scalar(name, value, step, now) for name, value in kept.items()])

    def spectrograms(self, name: str, rows: Sequence[tuple[str, Tensor]], rate: int, step: int) -> None:
        """Of titled waves [S], above one another."""
        kept = [(title, wave.detach().float().cpu().numpy(), rate) for title, wave in rows]
        self._call(partial(self._picture, name, kept, step))

    def samples(self, folder: Path, step: int) -> None:
        """What was made to listen to in RUN/samples: its sounds, and the first ones' spectrograms."""
        self._call(partial(self._samples, folder, step))

    def flush(self) -> None:
        """Return when all is on the disk, or when it has not answered for some seconds."""
        self._call(lambda: self._writer.flush())
        self._background.flush()

    def close(self) -> None:
        self._call(lambda: self._writer.close())
        self._background.close()

    def _call(self, function: Callable[[], object]) -> None:
        # Errors of the writer's thread do not say of which file they are.
        self._background.call(disk_errors(self.folder)(function))

    def _open(self, first_step: int) -> None:
        from torch.utils.tensorboard.summary import hparams
        from torch.utils.tensorboard.writer import SummaryWriter

        self.folder.mkdir(parents=True, exist_ok=True)
        for old in self.work.tensorboard_dir.glob("events.out.tfevents.*"):  # where older versions wrote them
            old.rename(self.folder / old.name)
        for old in self.folder.glob(f"*{CARD}"):
            old.unlink()
        with SummaryWriter(str(self.folder), filename_suffix=CARD) as card:
            card.add_custom_scalars(LAYOUT)
            values, changed = plain_recipe(self.recipe), {key for key, _, _ in recipe_changes(self.recipe)}
            shown = {k: str(v) if v is None else v for k, v in values.items() if k in changed or k in ALWAYS}
            make: Any = hparams
            for summary in make(shown, dict.fromkeys(METRICS, 0.0)):
                card.file_writer.add_summary(summary)
        # No call waits for its thread, which waits for the disk.
        self._writer = SummaryWriter(str(self.folder), purge_step=first_step, max_queue=0)
        rows = "".join(f"| {key} | {value} | {default} |\n" for key, default, value in recipe_changes(self.recipe))
        changes = f"| key | value | default |\n|---|---|---|\n{rows}"
        whole = "".join(f"    {line}\n" for line in self.recipe.to_yaml().splitlines())
        self._writer.add_text("recipe/changes", changes, first_step - 1)
        self._writer.add_text("recipe/whole", whole, first_step - 1)

    def _picture(self, name: str, rows: Sequence[tuple[str, Wave, int]], step: int) -> None:
        from rvc_dist.report.figures import spectrograms_as_pixels  # which imports matplotlib

        self._writer.add_image(f"spectrograms/{name}", spectrograms_as_pixels(rows), step, dataformats="HWC")

    def _samples(self, folder: Path, step: int) -> None:
        from rvc_dist.report.sounds import Sample, inside, read_wave

        for number, sample in enumerate(read_json(folder / "samples.json", list[Sample])):
            name = sample["file"].rpartition(".")[0]
            wave, rate = read_wave(folder / sample["file"])
            self._writer.add_audio(f"samples/{name}", wave[None], step, sample_rate=rate)
            path = sample["original"] and inside(folder.parent, folder / sample["original"])
            if not path:
                continue
            original = read_wave(path)
            self._writer.add_audio(f"originals/{name}", original[0][None], step, sample_rate=original[1])
            if number < NUM_PICTURES:
                rows = [(f"{sample['title']}: original", *original), (f"at step {step}", wave, rate)]
                self._picture(name, rows, step)
