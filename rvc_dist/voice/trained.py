"""A run that was trained, for what is written of it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from rvc_dist.config import Recipe
from rvc_dist.data.remote import data_of
from rvc_dist.train import checkpoint
from rvc_dist.train.dataset import ClipTable
from rvc_dist.train.voice_file import Dataset, DatasetFacts
from rvc_dist.workspace import StageError, Workspace, list_checkpoints


@dataclass(frozen=True)
class Trained:
    """A run that was trained."""

    recipe: Recipe
    work: Workspace
    checkpoints: list[Path]
    """Those that are whole, oldest first; at least one."""
    facts: DatasetFacts
    """Of the dataset that is there now."""

    @classmethod
    def of(cls, recipe: Recipe) -> Trained:
        """Raises StageError when there is no whole checkpoint, or no report of the clips."""
        work = Workspace(recipe.run_dir, recipe.name)
        work.check_name()
        if not list_checkpoints(work.checkpoints_dir):
            raise StageError(f"{work.checkpoints_dir} has no checkpoint:", "run `rvc-dist train` first")
        facts = DatasetFacts.of_run(data_of(recipe), ClipTable.load(recipe))
        return cls(recipe, work, checkpoint.whole_in(work.checkpoints_dir), facts)

    def load(self, path: Path) -> tuple[checkpoint.Checkpoint, Dataset]:
        """A checkpoint, and what it was trained on."""
        return self.facts.told_of(checkpoint.load(path), path)
