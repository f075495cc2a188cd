"""What the tools print: tables on a terminal, aligned plain text elsewhere."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from rich import box
from rich.console import Console
from rich.table import Column, Table

PLAIN_COLUMNS = 140
"""Width where there is no terminal: enough for every table but those that compare datasets."""


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
