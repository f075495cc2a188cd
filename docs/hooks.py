"""Pages that mkdocs makes at each build of what is written elsewhere: README and its neighbours, the recipe's keys."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING

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
    """A page of every key: what it may be, its default, its meaning and who reads it, as the code says it."""
    sys.path.insert(0, str(ROOT))  # mkdocs may run where the checkout is not installed
    from rvc_dist.arguments import sections
    from rvc_dist.schema import expected
    from rvc_dist.stages import STAGES

    lines = ["# Recipe keys", "", "Made of the code at each build. On the command line: `--section.key VALUE`.", ""]
    for section, about, keys in sections():
        lines += [f"## {section or 'The run'}", "", about, ""]
        lines += ["| key | default | may be | meaning | read by |", "|---|---|---|---|---|"]
        for key in keys:
            if not key.is_section:
                readers = ", ".join(f"`{name}`" for name, stage in STAGES.items() if stage.shows(key.name))
                default, meaning = key.default and f"`{key.default}`", " ".join(key.meaning.split())
                cells = [f"`{key.name}`", default, expected(key.kind), meaning, readers]
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
