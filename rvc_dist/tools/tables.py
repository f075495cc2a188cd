"""What the tools print: tables on a terminal, aligned plain text elsewhere; and JSON."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Column, Table

from rvc_dist.workspace import printable

PLAIN_COLUMNS = 140
"""Width where there is no terminal: enough for every table but those that compare datasets."""
Figures = dict[str, float | None]
"""The numbers of a group, such as a speaker, by their keys in JSON; None where there is nothing to measure."""
Columns = dict[str, tuple[Callable[..., str], str]]
"""By heading the text of a cell, and the keys of the figures that are in it."""


def cells(figures: Figures, columns: Columns) -> list[str]:
    found = ((text, [figures[key] for key in keys.split()]) for text, keys in columns.values())
    return ["-" if None in numbers else text(*numbers) for text, numbers in found]


def plain_speakers(figures: Mapping[int, Figures], names: Mapping[int, str]) -> list[dict[str, Any]]:
    """Of each speaker, for JSON."""
    return [{"speaker": speaker, "name": names.get(speaker), **found} for speaker, found in figures.items()]


def some(names: Sequence[str], most: int = 3) -> str:
    """The first of them, and whether there are more."""
    return ", ".join(map(printable, names[:most])) + ", ..." * (len(names) > most)


def print_json(plain: Any) -> None:
    sys.stdout.write(json.dumps(plain, indent=1, allow_nan=False) + "\n")


def console(plain_columns: int = PLAIN_COLUMNS) -> Console:
    """As wide as the terminal, or as `plain_columns` where there is none. Text is printed as it is."""
    out = Console(highlight=False, markup=False)
    if not out.is_terminal:
        out.width = plain_columns
    return out


def say(out: Console, line: str) -> None:
    """A line that is not broken, however long."""
    out.print(line, soft_wrap=True)


def print_table(
    out: Console, columns: Sequence[str | Column], rows: Iterable[Sequence[str]], title: str | None = None
) -> None:
    """The first column is text, the others numbers, but for those that are a Column; one with a `title` has rules."""
    headers = [Column(c, justify="right" if i else "left") if isinstance(c, str) else c for i, c in enumerate(columns)]
    if title is None:
        lines = box.SIMPLE_HEAD if out.is_terminal else None
        table = Table(*headers, box=lines, pad_edge=False, show_header=bool(columns))
    else:
        table = Table(*headers, title=title, title_justify="left", title_style="bold", padding=(0, 1, 0, 0))
        table.box = box.SIMPLE
    for row in rows:
        table.add_row(*row)
    out.print(table)
