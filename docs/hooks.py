"""Pages that mkdocs makes at each build of what is written elsewhere: README and its neighbours, the recipe's keys."""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path
from typing import TYPE_CHECKING, get_type_hints

from mkdocs.structure.files import File, Files

if TYPE_CHECKING:
    from mkdocs.config.defaults import MkDocsConfig

ROOT = Path(__file__).parents[1]
PAGES = {"README.md": "index.md", "CONTRIBUTING.md": "contributing.md", "CHANGELOG.md": "changelog.md"}
"""Files of the checkout's root and the pages that they become."""
NOTEBOOK = ROOT / "launch" / "notebook.ipynb"


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Adds the pages that no file in docs/ holds."""
    for source, page in PAGES.items():
        text = with_site_links((ROOT / source).read_text(encoding="utf-8"))
        files.append(File.generated(config, page, content=text))
    files.append(File.generated(config, NOTEBOOK.name, abs_src_path=str(NOTEBOOK)))
    files.append(File.generated(config, "keys.md", content=recipe_keys()))
    return files


def recipe_keys() -> str:
    """A page of every key: what it may be, its default and its meaning, as the dataclasses of the recipe say it."""
    sys.path.insert(0, str(ROOT))  # mkdocs may run where the checkout is not installed
    from rvc_dist.arguments import _docstrings, _sections
    from rvc_dist.config import Recipe
    from rvc_dist.schema import expected

    docs = _docstrings()
    lines = ["# Recipe keys", "", "Made of the code at each build. On the command line: `--section.key VALUE`.", ""]
    for prefix, kind in _sections(Recipe):
        hints = get_type_hints(kind, include_extras=True)
        lines += [f"## {prefix.rstrip('.') or 'The run'}", "", str(kind.__doc__), ""]
        lines += ["| key | default | may be | meaning |", "|---|---|---|---|"]
        for field in dataclasses.fields(kind):
            if field.default is not dataclasses.MISSING:
                default = "null" if field.default is None else str(field.default)
                default = default.lower() if isinstance(field.default, bool) else default
                cells = [
                    f"`{prefix}{field.name}`",
                    f"`{default}`" if default != "" else "",
                    expected(hints[field.name]),
                ]
                cells.append(" ".join(docs.get((kind.__name__, field.name), "").split()))
                lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
        lines.append("")
    return "\n".join(lines)


def on_page_markdown(markdown: str, **_: object) -> str:
    """Links of pages in docs/ to files beside it."""
    return with_site_links(markdown)


def with_site_links(text: str) -> str:
    """A code host's links between files become links between pages."""
    for source, page in PAGES.items():
        text = text.replace(f"]({source}", f"]({page}").replace(f"](../{source}", f"]({page}")
    return text.replace("](docs/", "](").replace("](launch/", "](")
