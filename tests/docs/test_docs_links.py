"""Links between pages, and to files and sections, lead somewhere."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from shown import ROOT, pages

_LINK = re.compile(r"(?<!!)\[[^\]]*\]\(([^)\s]+)\)|!\[[^\]]*\]\(([^)\s]+)\)")


def anchors(path: Path) -> set[str]:
    """Sections of a page as links name them: lower case, dashes, nothing but words."""
    text = re.sub(r"^```.*?^```$", "", path.read_text(encoding="utf-8"), flags=re.M | re.S)
    titles = re.findall(r"^#+ +(.+)$", text, re.MULTILINE)
    return {re.sub(r"[\s-]+", "-", re.sub(r"[^\w\s-]", "", t).strip().lower()) for t in titles}


@pytest.mark.parametrize("page", pages())
def test_links_lead_somewhere(page: str) -> None:
    source = ROOT / page
    text = re.sub(r"^```.*?^```$", "", source.read_text(encoding="utf-8"), flags=re.M | re.S)
    for target in ("".join(match) for match in _LINK.findall(text)):
        if "://" in target or target.startswith("mailto:"):
            continue
        name, _, section = target.partition("#")
        path = (source.parent / name).resolve() if name else source
        assert path.exists(), f"{page}: {target} is not there"
        if section and path.suffix == ".md":
            assert section in anchors(path), f"{page}: {target}: no such section"


def test_every_page_is_reached_from_the_navigation() -> None:
    navigation = (ROOT / ".ci" / "mkdocs.yml").read_text(encoding="utf-8")
    listed = set(re.findall(r"([\w./-]+\.md)", navigation))
    for page in pages():
        name = "index.md" if page == "README.md" else page.removeprefix("docs/")
        if not name.startswith("benchmarks/peers/"):
            assert name in listed, f"{page} is not in .ci/mkdocs.yml"
