"""Pages that mkdocs makes at each build of what is written elsewhere: README, CONTRIBUTING."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from mkdocs.structure.files import File, Files

if TYPE_CHECKING:
    from mkdocs.config.defaults import MkDocsConfig

ROOT = Path(__file__).parents[1]
PAGES = {"README.md": "index.md", "CONTRIBUTING.md": "contributing.md"}
"""Files of the checkout's root and the pages that they become."""


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Adds the pages that no file in docs/ holds."""
    for source, page in PAGES.items():
        text = with_site_links((ROOT / source).read_text(encoding="utf-8"))
        files.append(File.generated(config, page, content=text))
    return files


def on_page_markdown(markdown: str, **_: object) -> str:
    """Links of pages in docs/ to files beside it."""
    return with_site_links(markdown)


def with_site_links(text: str) -> str:
    """A code host's links between files become links between pages."""
    for source, page in PAGES.items():
        text = text.replace(f"]({source}", f"]({page}").replace(f"](../{source}", f"]({page}")
    return text.replace("](docs/", "](")
