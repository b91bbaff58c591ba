"""Text from files: plain text and markdown as they are, HTML and PDF as the text they show.

A file's first bytes and the end of its name decide. Nothing is fetched, run or guessed.
"""

from __future__ import annotations

import io
import logging
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import NamedTuple

from amcli.errors import UsageError
from amcli.system.files import unix_lines

_HTML_ENDINGS = (".html", ".htm", ".xhtml")
_HTML_STARTS = (b"<!doctype html", b"<html")

# Document formats that are not text, and how to convert them.
_CONVERTED = {
    ".docx": "pandoc {name} -o {stem}.md",
    ".odt": "pandoc {name} -o {stem}.md",
    ".epub": "pandoc {name} -o {stem}.md",
    ".rtf": "pandoc {name} -o {stem}.md",
    ".gz": "gunzip {name}",
    ".zip": "unzip {name}",
}


class Reading(NamedTuple):
    """A file's text, and its number of pages if it has pages."""

    text: str
    pages: int | None = None


def read(name: str, data: bytes) -> Reading:
    """The text of a file; `name` is used for its ending and in messages.

    Raises UsageError for binary data, encodings other than UTF-8 (HTML may declare its own), a PDF
    that is locked, damaged or without text, and where the PDF reader is not installed.
    """
    if data.startswith(b"%PDF-") or Path(name).suffix.lower() == ".pdf":
        return _pdf(name, data)
    start = data[:200].lstrip(b"\xef\xbb\xbf \t\r\n").lower()
    if Path(name).suffix.lower() in _HTML_ENDINGS or start.startswith(_HTML_STARTS):
        return Reading(html_text(_decode(name, data, _declared(data))))
    return Reading(_decode(name, data))


def _decode(name: str, data: bytes, declared: str | None = None) -> str:
    if data.startswith((b"\xff\xfe", b"\xfe\xff")):
        declared = "utf-16"  # by its byte order mark
    elif b"\0" in data:
        path = Path(name)
        advice = _CONVERTED.get(path.suffix.lower())
        raise UsageError(
            f"{name} is binary data, not text (a zero byte at {data.index(0)})",
            "give a plain text file in UTF-8"
            if advice is None
            else f"convert it first: {advice.format(name=name, stem=path.stem)}",
            code="not-text",
            field="path",
            path=name,
        )
    try:
        text = data.decode(declared or "utf-8-sig")
    except UnicodeDecodeError as error:
        wrong = f"byte {data[error.start]:#04x} at {error.start}"
        raise UsageError(
            f"{name} is not {(declared or 'UTF-8').upper()} text ({wrong})",
            "convert it first, for example with iconv -f latin1 -t utf-8",
            code="not-text",
            field="path",
            path=name,
        ) from error
    except LookupError as error:
        raise UsageError(
            f"{name} says that it is in {declared}, which nobody knows",
            "convert it to UTF-8 first",
            code="not-text",
            field="path",
            path=name,
        ) from error
    return unix_lines(text.removeprefix("\ufeff")).strip()


# ---- PDF --------------------------------------------------------------------------------------


def _pdf(name: str, data: bytes) -> Reading:
    try:
        import pypdf
        from pypdf.errors import DependencyError, PyPdfError
    except ImportError as error:
        raise UsageError(
            f"{name} is a PDF, and pypdf, which reads them, is not installed",
            "pip install 'amkv[pdf]'",
            code="package-missing",
            package="pypdf",
            path=name,
        ) from error
    logging.getLogger("pypdf").setLevel(logging.CRITICAL)  # it warns of faults that it then repairs
    try:
        reader = pypdf.PdfReader(io.BytesIO(data))
        locked = reader.is_encrypted and not reader.decrypt("")
        pages = [] if locked else [page.extract_text().strip() for page in reader.pages]
    except DependencyError as error:
        raise UsageError(
            f"{name} is encrypted: {error}",
            "pip install 'pypdf[crypto]'",
            code="package-missing",
            package="cryptography",
            path=name,
        ) from error
    # Damaged files make the reader fail in all sorts of ways.
    except (PyPdfError, ArithmeticError, AttributeError, LookupError, OSError, RuntimeError,
            TypeError, ValueError) as error:  # fmt: skip
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise UsageError(
            f"{name} is a damaged PDF: {reason}",
            "export it again",
            code="pdf-damaged",
            field="path",
            path=name,
            reason=reason,
        ) from error
    if locked:
        raise UsageError(
            f"{name} is locked with a password",
            f"unlock it first: qpdf --decrypt {name} out.pdf",
            code="pdf-locked",
            field="path",
            path=name,
        )
    text = unix_lines("\n\n".join(page for page in pages if page))
    if not text:
        raise UsageError(
            f"{name} has {len(pages)} pages and no text: they are pictures",
            f"recognise the text first, for example: ocrmypdf {name} out.pdf",
            code="pdf-without-text",
            field="path",
            path=name,
        )
    # Fonts without a proper table give characters that UTF-8 cannot encode.
    return Reading(text.encode("utf-8", "replace").decode(), len(pages))


# ---- HTML -------------------------------------------------------------------------------------

_DECLARED = re.compile(rb"<meta[^>]+charset\s*=\s*[\"']?\s*([\w.:-]+)", re.IGNORECASE)
_SILENT = frozenset({"script", "style", "template", "noscript", "svg", "math", "iframe", "object"})
_MARKS = {"li": "- ", **{f"h{n}": "#" * n + " " for n in range(1, 7)}}
_LINES = frozenset({"dd", "div", "dt", "li", "summary", "tbody", "tfoot", "thead", "tr"})
"""Elements that start on a new line."""

_BLOCKS = frozenset(
    {"address", "article", "aside", "blockquote", "body", "details", "dialog", "dl", "fieldset",
     "figcaption", "figure", "footer", "form", "h1", "h2", "h3", "h4", "h5", "h6", "header", "hr",
     "html", "main", "nav", "ol", "p", "pre", "section", "table", "title", "ul"}
)  # fmt: skip
"""Elements with an empty line before and after them."""


def _declared(data: bytes) -> str | None:
    """The encoding that a page declares in its first 2,048 bytes."""
    found = _DECLARED.search(data[:2048])
    return None if found is None else found[1].decode("ascii")


def html_text(page: str) -> str:
    """The text that a page shows, in lines as a browser breaks them.

    Headings get their `#`, list items a dash, table cells a bar between them.
    """
    parser = _Page()
    parser.feed(page)
    parser.close()
    lines = "".join(parser.pieces).split("\n")
    text = "\n".join(line.rstrip() for line in lines)
    return re.sub(r"\n{3,}", "\n\n", text).strip()


class _Page(HTMLParser):
    """Collects `pieces` of text; the parser of the standard library never fails on bad HTML."""

    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self.pieces: list[str] = []
        self._silent: list[str] = []
        self._as_it_is = 0
        self._fresh = True  # whether the next word begins a line
        self._marked = False  # whether a list or heading mark waits for its text
        self._row_begun = False

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag in _SILENT:
            self._silent.append(tag)
        if tag in _BLOCKS | _LINES:
            self._break(2 if tag in _BLOCKS else 1)
        if tag == "br":
            self._break(1)
        elif tag == "pre":
            self._as_it_is += 1
        elif tag == "tr":
            self._row_begun = False
        elif tag in ("td", "th"):
            if self._row_begun:
                self._write(" | ")
            self._row_begun = True
        elif tag in _MARKS:
            self._write(_MARKS[tag])
            self._marked = True

    def handle_endtag(self, tag: str) -> None:
        if tag in self._silent:
            del self._silent[self._silent.index(tag) :]
        if tag == "pre":
            self._as_it_is = max(0, self._as_it_is - 1)
        if tag in _BLOCKS | _LINES:
            self._break(2 if tag in _BLOCKS else 1)

    def handle_data(self, data: str) -> None:
        if self._as_it_is:
            self._write(data)
            return
        text = re.sub(r"[ \t\n\r\f]+", " ", data).replace("\xa0", " ")
        self._write(text.lstrip() if self._fresh else text)

    def _write(self, text: str) -> None:
        if not text or self._silent:
            return
        self.pieces.append(text)
        self._fresh = text.endswith((" ", "\n"))
        self._marked = False

    def _break(self, lines: int) -> None:
        """Ends the line, unless nothing but a mark is on it."""
        if self._silent or self._marked:
            return
        tail = "".join(self.pieces[-3:])
        if tail.strip(" "):
            missing = lines - (len(tail) - len(tail.rstrip("\n ")))
            self.pieces.append("\n" * max(0, missing))
        self._fresh = True
