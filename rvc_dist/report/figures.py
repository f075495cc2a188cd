"""Curves and spectrograms as SVG for a page: drawn by matplotlib, coloured by the page, so that light and dark fit.

S samples, H bands of a spectrogram, T its frames.
"""

from __future__ import annotations

import io
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Literal, NamedTuple

import matplotlib
import numpy as np
import numpy.typing as npt
from markupsafe import Markup
from matplotlib import mlab
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator, NullFormatter

Numbers = npt.NDArray[np.float64]
Wave = npt.NDArray[np.float32]

INK, GRID = "#010203", "#040506"
"""Stand for the page's colours of text and of lines, as SERIES do for those of curves."""
SERIES = ("#070801", "#070802", "#070803", "#070804", "#070805", "#070806")
VARIABLES = {INK: "var(--ink)", GRID: "var(--grid)"} | {c: f"var(--c{i})" for i, c in enumerate(SERIES)}
STYLE: Any = {
    "svg.fonttype": "none",  # text stays text: small, and in the page's font
    "svg.hashsalt": "rvc_dist",  # the same picture has the same bytes
    "text.parse_math": False,
    "font.size": 8.5,
    "axes.edgecolor": GRID,
    "axes.labelcolor": INK,
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "grid.color": GRID,
    "grid.linewidth": 0.5,
    "text.color": INK,
    "xtick.color": GRID,
    "ytick.color": GRID,
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
    "lines.linewidth": 1.4,
    "legend.frameon": False,
    "legend.fontsize": 8,
    "legend.handlelength": 1.2,
    "legend.columnspacing": 1.2,
    "legend.borderaxespad": 0.1,
    "image.cmap": "magma",
}
WIDTH, HEIGHT = 4.5, 2.35
"""Of a figure in inches of 72 points: as wide as a phone, whose text is then as large as it is drawn."""
LABEL_AT = (-0.125, 0.5)
"""Of the vertical axis, in widths and heights of the axes."""
NUM_POINTS = 150
"""Most points of a curve: where there are more lines, each is the mean of some, and chance is less of it."""
FEW_POINTS = 40
"""Points that are shown one by one."""
FLOOR_DB = 80.0
"""Below the loudest of a figure's spectrograms nothing is shown."""
NUM_BANDS, NUM_FRAMES, NUM_COLOURS = 128, 420, 48
TICKS_HZ = (0, 500, 1000, 2000, 4000, 8000, 16000)


Scale = Literal["fitted", "from zero", "logarithmic"]


class Curve(NamedTuple):
    label: str
    steps: Sequence[float]
    values: Sequence[float]


class Thinned(NamedTuple):
    """A curve of at most NUM_POINTS means, each of as many neighbours, with the smallest and largest of them."""

    steps: Numbers
    means: Numbers
    lows: Numbers
    highs: Numbers


def thinned(steps: Sequence[float], values: Sequence[float], num_points: int = NUM_POINTS) -> Thinned:
    x, y = np.asarray(steps, np.float64), np.asarray(values, np.float64)
    per_point = -(-len(x) // num_points)
    starts = np.arange(0, len(x), max(1, per_point))
    counts = np.diff(starts, append=len(x))
    means = np.add.reduceat(y, starts) / counts
    return Thinned(
        np.add.reduceat(x, starts) / counts, means, np.minimum.reduceat(y, starts), np.maximum.reduceat(y, starts)
    )


@contextmanager
def figure(height: float = HEIGHT) -> Iterator[Figure]:
    """One whose margins are those of all, so that neighbours align; measuring text for others takes half the time."""
    with matplotlib.rc_context(STYLE):
        drawn = Figure(figsize=(WIDTH, height))
        drawn.subplots_adjust(left=0.145, right=0.97, bottom=0.42 / height, top=1 - 0.24 / height, hspace=0.28)
        yield drawn


def svg(drawn: Figure, what: str) -> Markup:
    """The figure as an element of a page; `what` it shows is for those who cannot see it."""
    out = io.StringIO()
    drawn.savefig(out, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    text = out.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    text = re.sub(r"<style [^>]*>.*?</style>", "", text, flags=re.DOTALL)  # it would be the whole page's
    # Of a path's points: finer than any screen.
    text = re.sub(r' d="[^"]*"', lambda path: re.sub(r"(\.\d\d)\d+", r"\1", path[0]), text)
    for colour, variable in VARIABLES.items():
        text = text.replace(colour, variable)
    text = re.sub(r' width="[^"]*pt" height="[^"]*pt"', "", text, count=1)  # the page says how wide it is
    return Markup(text).replace("<svg ", Markup('<svg role="img" aria-label="{}" ').format(what), 1)


def curves(
    found: Sequence[Curve], unit: str, what: str, scale: Scale = "fitted", marks: Mapping[str, float] | None = None
) -> Markup:
    """Curves over steps, and `marks`, steps with a name."""
    with figure() as drawn:
        axes: Axes = drawn.subplots()
        for colour, curve in zip(SERIES * (1 + len(found) // len(SERIES)), found, strict=False):
            line = thinned(curve.steps, curve.values)
            if len(line.steps) < len(curve.steps):
                axes.fill_between(line.steps, line.lows, line.highs, color=colour, alpha=0.18, linewidth=0)
            marker = "o" if len(line.steps) <= FEW_POINTS else None
            axes.plot(line.steps, line.means, color=colour, label=curve.label, marker=marker, markersize=2.6)
        for name, step in (marks or {}).items():
            axes.axvline(step, color=INK, linewidth=0.9, linestyle=(0, (4, 3)))
            where: Any = ("data", "axes fraction")
            beside: Any = {"xytext": (-2, 0), "textcoords": "offset points", "ha": "right", "va": "top"}
            axes.annotate(name, (step, 0.98), xycoords=where, rotation=90, fontsize=8, **beside)
        if scale == "from zero":
            axes.set_ylim(0, 1.08 * max(max(curve.values) for curve in found) or 1.0)
        elif scale == "logarithmic" and all(value > 0 for curve in found for value in curve.values):
            axes.set_yscale("log")
            axes.yaxis.set_minor_formatter(NullFormatter())
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.6g}"))
        axes.xaxis.set_major_locator(MaxNLocator(8, integer=True))
        axes.margins(x=0.02)
        return svg_over_steps(drawn, axes, unit, what, has_legend=len(found) > 1)


def svg_over_steps(drawn: Figure, axes: Axes, unit: str, what: str, has_legend: bool = True) -> Markup:
    """With its labels, and the legend above the axes, where it hides nothing."""
    axes.set_xlabel("step")
    axes.set_ylabel(unit)
    axes.yaxis.set_label_coords(*LABEL_AT)
    if has_legend:
        drawn.legend(loc="upper left", bbox_to_anchor=(0.125, 1.0), ncols=4)
    return svg(drawn, what)


def shares(steps: Sequence[float], parts: Mapping[str, Sequence[float]], what: str) -> Markup:
    """What a step's seconds are spent on, above one another."""
    with figure() as drawn:
        axes: Axes = drawn.subplots()
        lines = {name: thinned(steps, values) for name, values in parts.items()}
        first = next(iter(lines.values()))
        colours = [SERIES[i % len(SERIES)] for i in range(len(lines))]
        axes.stackplot(first.steps, *(line.means for line in lines.values()), labels=list(lines), colors=colours)
        axes.margins(x=0)
        axes.set_ylim(0, 1.1 * float(np.quantile(np.sum([line.means for line in lines.values()], axis=0), 0.98)))
        return svg_over_steps(drawn, axes, "s a step", what)


def spectrogram(wave: Wave, rate: int) -> Numbers:
    """[H, T] in dB of a wave [S]; the bands are as far apart in mels."""
    size = 1 << round(np.log2(rate / 24))  # 43 ms
    hop = max(size // 4, len(wave) // NUM_FRAMES)
    padded = np.pad(wave, (size // 2, max(size // 2, size - len(wave))))
    found = mlab.specgram(padded, NFFT=size, Fs=rate, noverlap=max(0, size - hop), mode="psd")
    power, hz = (np.asarray(part, np.float64) for part in found[:2])
    bands = np.linspace(0, mel(rate / 2), NUM_BANDS)
    at = np.interp(700 * np.expm1(bands / 1127), hz, np.arange(len(hz)))
    low = np.floor(at).astype(int)
    high, part = np.minimum(low + 1, len(hz) - 1), (at - low)[:, None]
    return np.asarray(10 * np.log10((1 - part) * power[low] + part * power[high] + 1e-14))


def mel(hz: float) -> float:
    return float(1127 * np.log1p(hz / 700))


def spectrograms(rows: Sequence[tuple[str, Wave, int]], what: str) -> Markup:
    """Of (title, wave [S], Hz), above one another, with one scale of time, pitch and loudness."""
    with drawn_spectrograms(rows) as drawn:
        return svg(drawn, what)


def spectrograms_as_pixels(rows: Sequence[tuple[str, Wave, int]]) -> npt.NDArray[np.uint8]:
    """The same, as [height, width, 3], on white."""
    with drawn_spectrograms(rows) as drawn:
        drawn.set_dpi(130)
        canvas: Any = FigureCanvasAgg(drawn)
        canvas.draw()
        return np.asarray(canvas.buffer_rgba())[..., :3].copy()


@contextmanager
def drawn_spectrograms(rows: Sequence[tuple[str, Wave, int]]) -> Iterator[Figure]:
    made = [(title, spectrogram(wave, rate), len(wave) / rate, rate) for title, wave, rate in rows]
    loudest = max(float(image.max()) for _, image, _, _ in made)
    longest, highest = max(seconds for _, _, seconds, _ in made), max(rate for *_, rate in made) / 2
    with figure(0.66 + 1.3 * len(made)) as drawn:
        panels: list[Axes] = drawn.subplots(len(made), 1, sharex=True, squeeze=False)[:, 0].tolist()
        for axes, (title, image, seconds, rate) in zip(panels, made, strict=True):
            levels = np.clip((image - loudest + FLOOR_DB) / FLOOR_DB, 0, 1)
            coarse = np.round(levels * (NUM_COLOURS - 1)) / (NUM_COLOURS - 1)  # what repeats is smaller as PNG
            extent = (0.0, seconds, 0.0, mel(rate / 2))
            axes.imshow(coarse, origin="lower", aspect="auto", interpolation="none", extent=extent, vmin=0, vmax=1)
            axes.grid(visible=False)
            axes.set_title(title, loc="left", fontsize=8.5, pad=3)
            ticks = [hz for hz in TICKS_HZ if hz <= highest]
            axes.set_yticks([mel(hz) for hz in ticks], [str(hz) if hz < 1000 else f"{hz // 1000}k" for hz in ticks])
            axes.set_ylim(0, mel(highest))
            axes.set_xlim(0, longest)
            axes.set_ylabel("Hz")
            axes.yaxis.set_label_coords(*LABEL_AT)
        panels[-1].set_xlabel("s")
        yield drawn
