"""Two pages of the site come from outside docs/: the README is its start, and the specification."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).resolve().parents[1]
OUTSIDE = {"index.md": "README.md", "formats/amkv-v1.md": "formats/amkv-v1.md"}

# Where links lead outside the site they stay text: the site has no copy of the source.
_SOURCE = re.compile(
    r"(?<!!)\[([^\]]*)\]\((?:\.\./)*(?:amcli|LICENSE|formats/vectors|tests)[^)]*\)"
)


def on_files(files: Files, config: Any) -> Files:
    """Adds them."""
    for name, path in OUTSIDE.items():
        text = (ROOT / path).read_text(encoding="utf-8")
        files.append(File.generated(config, name, content=text))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Links as they are in the repository, to where things are on the site."""
    markdown = _SOURCE.sub(r"\1", markdown)
    if page.file.src_uri == "index.md":
        return markdown.replace("](docs/", "](")
    depth = page.file.src_uri.count("/")
    return markdown.replace(
        "](" + "../" * (depth + 1) + "formats/", "](" + "../" * depth + "formats/"
    )
