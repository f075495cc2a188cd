"""Which clips validation has and training never sees: a share of each speaker's seconds, at the ends of recordings.

Recordings that another tool cut are held out whole, since where their clips lie is only guessed; only of a speaker
whose recordings are all too long for that, their ends.

A recording's part hangs on a draw from its own name, its content and the seed, so that others may come and go. Only
where the draws of a speaker's recordings give too little or too much do they depend on one another; what a run has
trained on stays on its side then, since its checkpoints know what was held out.
"""

from __future__ import annotations

import hashlib
import logging
import math
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import product, zip_longest
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

from rvc_dist.workspace import StageError, fingerprint

if TYPE_CHECKING:
    from rvc_dist.config import Recipe
    from rvc_dist.train.clips import ClipRef
    from rvc_dist.train.dataset import ClipTable
    from rvc_dist.workspace import Speakers, TrainedOn

T = TypeVar("T")

LEAST_S = 10.0
"""Of a speaker who has enough for it."""
STRETCH_S = 6.0
"""Of a recording: two clips, for about one that is lost at the edge."""
MOST_SHARE = 0.1
"""Of a speaker's seconds, unless the recipe asks for more."""
ENOUGH, TOO_MUCH = 0.75, 1.35
"""Of what a speaker should have held out: draws that give less or more are put right."""
SAME_S = 1e-3
"""Starts of clips are rounded: those that share less than this do not overlap."""
MAX_VALIDATED = 32
"""Clips of one validation, or as many as there are speakers."""
VALIDATED_S, LEAST_VALIDATED_S = 100.0, 1.0
"""Of all these clips together; so each is cut to its share of that, but never to less than a second."""
MAX_SPEAKERS_VALIDATED = round(VALIDATED_S / LEAST_VALIDATED_S)
"""Of more speakers, so many are drawn."""
BEST_BY = "mel distance of eight resolutions"
"""What the best checkpoint is chosen by: every clip has it, it hears spectrum, pitch and loudness alike, and it needs
no weights against other distances. A checkpoint keeps this name: what was best by another measure begins anew."""
LISTED = 6
"""Most speakers whose shares are shown one by one."""


class SpeakerShare(NamedTuple):
    """Seconds of a speaker's clips; those of overlapping clips count in each of them."""

    speaker: int
    total_s: float
    held_s: float
    lost_s: float
    """On neither side, since these clips overlap held-out ones."""

    @property
    def held(self) -> float:
        return self.held_s / self.total_s


class HeldOut(NamedTuple):
    clips: frozenset[ClipRef]
    lost: frozenset[ClipRef]
    shares: tuple[SpeakerShare, ...]


def hold_out(clips: Iterable[ClipRef], share: float, seed: int, settled: Mapping[str, float] | None = None) -> HeldOut:
    """The clips that are held out, those that overlap them, and what that comes to by speaker.

    `settled` are the recordings that were split before: see `settled_by`.
    """
    by_recording: dict[tuple[int, str], list[ClipRef]] = {}
    for clip in clips:
        by_recording.setdefault((clip.speaker, clip.source), []).append(clip)
    by_speaker: dict[int, list[_Recording]] = {}
    for (speaker, _), its_clips in sorted(by_recording.items()):
        by_speaker.setdefault(speaker, []).append(_Recording(its_clips, seed, settled or {}))
    shares = []
    for speaker, recordings in by_speaker.items():
        if share:
            _hold_out_of_speaker(recordings, share)
        lost_s = sum(_seconds(r.lost) for r in recordings)
        shares.append(
            SpeakerShare(speaker, sum(r.seconds for r in recordings), sum(r.held_s for r in recordings), lost_s)
        )
    every = [r for recordings in by_speaker.values() for r in recordings]
    return HeldOut(
        frozenset(c for r in every for c in r.held), frozenset(c for r in every for c in r.lost), tuple(shares)
    )


class _Recording:
    """The clips of a recording, of which the last `count` are held out."""

    def __init__(self, clips: list[ClipRef], seed: int, settled: Mapping[str, float]) -> None:
        self.clips = sorted(clips, key=lambda c: c.start_s)
        self.seconds, self.count, self.held_s = _seconds(clips), 0, 0.0
        self.draw = draw(seed, clips[0].source, *sorted({c.content for c in clips}))
        self._longest_s = max(c.duration_s for c in clips)
        self.is_whole = any(c.guessed for c in clips)
        """All of it is held out, or nothing."""
        starts_s = [settled[c.content] for c in clips if c.content in settled]
        self.is_settled = bool(starts_s)
        if starts_s:
            self.count = sum(c.start_s + SAME_S >= min(starts_s) for c in clips)
            self.held_s = _seconds(self.held)

    @property
    def held(self) -> list[ClipRef]:
        return self.clips[len(self.clips) - self.count :]

    @property
    def lost(self) -> list[ClipRef]:
        return self._overlapping(self.count) if self.count else []

    def _overlapping(self, count: int) -> list[ClipRef]:
        """Earlier clips that share samples with the last `count`."""
        first, found = len(self.clips) - count, []
        start_s = self.clips[first].start_s + SAME_S
        for clip in reversed(self.clips[:first]):
            if clip.start_s + self._longest_s <= start_s:
                break
            if clip.start_s + clip.duration_s > start_s:
                found.append(clip)
        return found

    def hold(self, goal_s: float, most_s: float) -> None:
        """Hold out about `goal_s` seconds, never more than `most_s`, and lose little at the edge, never more than that.

        What was held out before stays where nothing is found.
        """
        held_s, best = 0.0, math.inf
        for count, clip in enumerate(reversed(self.clips), 1):
            held_s += clip.duration_s
            beyond = held_s - goal_s
            if held_s > most_s + SAME_S or beyond >= best:
                break
            if self.is_whole and count < len(self.clips):
                continue
            lost_s = _seconds(self._overlapping(count))
            cost = max(beyond, -2 * beyond) + lost_s
            if cost < best and lost_s <= held_s + SAME_S:
                best, self.count, self.held_s = cost, count, held_s

    def release(self) -> None:
        self.count, self.held_s = 0, 0.0


def _hold_out_of_speaker(recordings: list[_Recording], share: float) -> None:
    total_s = sum(r.seconds for r in recordings)
    most_share = max(share, MOST_SHARE)
    most_s = most_share * total_s
    goal_s = max(share * total_s, min(LEAST_S, most_s))
    ordered = sorted((r for r in recordings if not r.is_settled), key=lambda r: r.draw)
    _hold_by_draw(ordered, share, most_s)
    held_s = sum(r.held_s for r in recordings)
    for recording in reversed(ordered):
        is_short = recording.is_whole or share * recording.seconds < STRETCH_S
        if held_s > min(TOO_MUCH * goal_s, most_s) + SAME_S and is_short:
            held_s -= recording.held_s
            recording.release()
    held_s = _hold_more(ordered, held_s, goal_s, most_share, most_s)
    if held_s <= SAME_S:  # those that were to be held out whole are too long for it
        for recording in ordered:
            recording.is_whole = False
        held_s = _hold_more(ordered, held_s, goal_s, most_share, most_s)
    if total_s - held_s - sum(_seconds(r.lost) for r in recordings) <= SAME_S:  # a speaker's only speech
        for recording in recordings:
            recording.release()


def _hold_more(
    recordings: Sequence[_Recording], held_s: float, goal_s: float, most_share: float, most_s: float
) -> float:
    """Hold out more than the `held_s` seconds until they are about `goal_s`; returns how many they are.

    Of each recording no more than were it the speaker's only one, then whatever there is.
    """
    for bound, recording in product((most_share, 1.0), recordings):
        if held_s < ENOUGH * goal_s:
            others_s = held_s - recording.held_s
            recording.hold(goal_s - others_s, min(most_s - others_s, bound * recording.seconds))
            held_s = others_s + recording.held_s
    return held_s


def _hold_by_draw(recordings: Iterable[_Recording], share: float, most_s: float) -> None:
    """Of each recording its share, or, where that is too short a stretch, a longer one of as many fewer recordings."""
    for recording in recordings:
        goal_s = share * recording.seconds
        if goal_s >= STRETCH_S and not recording.is_whole:
            recording.hold(goal_s, max(share, MOST_SHARE) * recording.seconds)
            continue
        is_cut = recording.seconds >= 3 * STRETCH_S and not recording.is_whole
        stretch_s = STRETCH_S if is_cut else recording.seconds
        if recording.draw * stretch_s < goal_s:
            recording.hold(stretch_s, most_s)


def choice(share: float, seed: int, held: Iterable[ClipRef]) -> dict[str, Any]:
    """What of a split a checkpoint keeps for `settled_by`: where in each recording the `held` clips begin."""
    starts_s: dict[str, float] = {}
    for clip in held:
        starts_s[clip.content] = min(clip.start_s, starts_s.get(clip.content, math.inf))
    return {"holdout": [share, seed], "held_from_s": starts_s}


def settled_by(trained_on: TrainedOn, share: float, seed: int) -> dict[str, float]:
    """By content of the recordings of a checkpoint, the second from which they are held out; infinity: not at all.

    Nothing where another share or seed was asked for: then all is chosen anew.
    """
    if trained_on.get("holdout") != [share, seed]:
        return {}
    starts_s = trained_on.get("held_from_s", {})
    return {content: starts_s.get(content, math.inf) for content in trained_on.get("recordings", {})}


def draw(*parts: object) -> float:
    """A number in 0..1 that hangs on `parts` alone."""
    digest = hashlib.sha256(repr(parts).encode("utf-8", "backslashreplace")).digest()
    return int.from_bytes(digest[:8], "big") / 2**64


def unseen_speakers(recipe: Recipe, speakers: Sequence[int], names: Speakers, heard: Collection[int]) -> frozenset[int]:
    """Whom of the ids `speakers` data.holdout_speakers keeps out of training: those in its list, or as many as it says.

    Of a count they are drawn by name and seed, among those whom no checkpoint has `heard`.

    Raises:
        StageError: it names somebody who is not there or was heard, or leaves nobody to train on.
    """
    wanted, key = recipe.data.holdout_speakers, "data.holdout_speakers"
    if isinstance(wanted, int):
        fresh = sorted((s for s in speakers if s not in heard), key=lambda s: draw(recipe.train.seed, names.label(s)))
        if wanted > len(fresh) or (wanted and wanted >= len(speakers)):
            trained = f", of whom checkpoints have heard {len(speakers) - len(fresh)}" if heard else ""
            raise StageError(
                f"{key}: got {wanted}, but there are {len(speakers)} speakers{trained};",
                f"expected less, at most {min(len(fresh), len(speakers) - 1)}",
            )
        return frozenset(fresh[:wanted])
    ids = {str(s): s for s in speakers} | {names.names[s]: s for s in speakers if s in names.names}
    if unknown := [str(name) for name in wanted if str(name) not in ids]:
        known = ", ".join(names.label(s) for s in speakers[:LISTED]) + ", ..." * (len(speakers) > LISTED)
        raise StageError(f"{key}: nobody is called {', '.join(unknown[:LISTED])};", f"expected some of {known}")
    chosen = frozenset(ids[str(name)] for name in wanted)
    if known_already := [names.label(s) for s in sorted(chosen & {*heard})]:
        raise StageError(
            f"{key}: the newest checkpoint has heard {', '.join(known_already[:LISTED])};",
            "leave them out of it, or give the run another run_dir",
        )
    if chosen >= {*speakers}:
        raise StageError(f"{key}: nobody is left to train on;", "name fewer")
    return chosen


def _seconds(clips: Iterable[ClipRef]) -> float:
    return sum(c.duration_s for c in clips)


def evenly(clips: Sequence[ClipRef], count: int, seed: int) -> list[ClipRef]:
    """`count` of `clips`, and at least one of each speaker: in turn over speakers, and over each one's recordings."""
    tree: dict[int, dict[str, list[ClipRef]]] = {}
    for clip in sorted(clips, key=lambda c: draw(seed, c.source, c.unit, c.key)):
        tree.setdefault(clip.speaker, {}).setdefault(clip.source, []).append(clip)
    queues = [list(in_turn(recordings.values())) for _, recordings in sorted(tree.items())]
    return list(in_turn(queues))[: max(count, len(tree))]


def validated(recipe: Recipe, table: ClipTable) -> list[ClipRef]:
    """The clips that every validation of a run converts, or their beginnings where that would take long.

    Of whom they are hangs on the seed and on each speaker's own id, so that most stay when others come or go.
    """
    seed = recipe.train.seed
    drawn = sorted({c.speaker for c in table.holdout}, key=lambda speaker: draw(seed, "validated", speaker))
    heard = {*(drawn if table.validates_all else drawn[:MAX_SPEAKERS_VALIDATED])}
    clips = evenly([c for c in table.holdout if c.speaker in heard], MAX_VALIDATED, seed)
    longest_s = max(LEAST_VALIDATED_S, VALIDATED_S / max(1, len(clips)))
    most_frames = round(longest_s * recipe.data.sample_rate / recipe.rate_spec.hop)
    return [replace(clip, num_frames=min(clip.num_frames, most_frames)) for clip in clips]


def validation_stamp(recipe: Recipe, table: ClipTable) -> str:
    """Of what a validation measures, and on which clips."""
    clips = [(c.source, c.start_s, c.content) for c in validated(recipe, table)]
    return fingerprint(BEST_BY, recipe.train.seed, clips)


def validated_all(recipe: Recipe, table: ClipTable, trained_on: TrainedOn) -> bool:
    """Whether the run's validations were on clips of every speaker: a version without a bound began it, on these."""
    if len({c.speaker for c in table.holdout}) <= MAX_SPEAKERS_VALIDATED or "validation" not in trained_on:
        return False
    return validation_stamp(recipe, replace(table, validates_all=True)) == trained_on["validation"]


def in_turn(queues: Iterable[Sequence[T]]) -> Iterator[T]:
    """The first of each, then the second of each, and so on."""
    return (item for row in zip_longest(*queues) for item in row if item is not None)


def report(shares: Sequence[SpeakerShare], asked: float) -> Iterator[tuple[int, str]]:
    """(level of logging, line) on what was held out, and on what is far from what was asked."""
    if not asked or not shares:
        return
    if len(shares) <= LISTED:
        rows = (
            f"speaker {s.speaker} {s.held_s:.1f} of {s.total_s:.1f} s ({s.held:.1%}, {s.lost_s:.1f} s lost beside)"
            for s in shares
        )
        yield logging.INFO, f"held out: {'; '.join(rows)}"
    else:
        total_s, held_s, lost_s = (sum(values) for values in list(zip(*shares, strict=True))[1:])
        yield (
            logging.INFO,
            f"held out of {len(shares)} speakers: {_range(shares)} of each, {held_s:.1f} of {total_s:.1f} s in all "
            f"({held_s / total_s:.1%}), {lost_s:.1f} s lost at the edges",
        )
    if none := [s for s in shares if not s.held_s]:
        rest = "there is no validation and no best checkpoint" if len(none) == len(shares) else "the others have it"
        yield (
            logging.WARNING,
            f"data.holdout: nothing is held out of {_speakers(none)}: too few clips, or too long ones; {rest}",
        )
    if far := [s for s in shares if s.held_s and not asked / 2 <= s.held <= 2.05 * asked]:
        yield (
            logging.WARNING,
            f"data.holdout: asked for {asked:.1%}, {_range(far)} of {_speakers(far)} is held out: whole clips, and at "
            f"least about {LEAST_S:.0f} s where that is no more than {MOST_SHARE:.0%}",
        )


def _range(shares: Sequence[SpeakerShare]) -> str:
    low, high = (f"{bound(s.held for s in shares):.1%}" for bound in (min, max))
    return low if low == high else f"{low} to {high}"


def _speakers(shares: Sequence[SpeakerShare]) -> str:
    more = f" and {len(shares) - LISTED} more" if len(shares) > LISTED else ""
    listed = ", ".join(f"{s.speaker} ({s.total_s:.1f} s)" for s in shares[:LISTED])
    return f"speaker{'s' if len(shares) > 1 else ''} {listed}{more}"
