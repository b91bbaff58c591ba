"""What becomes of files: the text that they show, and one line for what cannot be read."""

from __future__ import annotations

import builtins
from pathlib import Path
from typing import Any

import pytest

from amcli.errors import UsageError
from amcli.pipeline.contexts.readers import html_text, read
from amcli.pipeline.contexts.source import read_source
from amcli.pipeline.talk.questions import json_lines

PAGE = """\
<!doctype html><html><head><title>A page</title><style>p { color: red }</style>
<script>if (1 < 2) document.write("<p>no</p>")</script></head>
<body><nav><a href="/">Home</a></nav>
<h1>The   <em>lynx</em></h1>
<p>A lynx&nbsp;is a cat &amp; no dog.<br>It
weighs &lt; 30&#8239;kg.</p>
<ul><li>ears</li><li><p>tail</p></li></ul>
<table><tr><th>name</th><th>age</th></tr><tr><td>Anna</td><td>7</td></tr></table>
<pre>a  b
  c</pre><p>unclosed <b>end
</body>"""

SHOWN = """\
A page

Home

# The lynx

A lynx is a cat & no dog.
It weighs < 30\u202fkg.

- ears
- tail

name | age
Anna | 7

a  b
  c

unclosed end"""


def pdf(*pages: str, trailer: str = "") -> bytes:
    """A PDF of pages with one line each, written by hand."""
    count = len(pages)
    font = 3 + 2 * count
    kids = " ".join(f"{3 + 2 * i} 0 R" for i in range(count))
    objects = [
        "<< /Type /Catalog /Pages 2 0 R >>",
        f"<< /Type /Pages /Kids [{kids}] /Count {count} >>",
    ]
    for i, text in enumerate(pages):
        stream = f"BT /F1 12 Tf 72 720 Td ({text}) Tj ET" if text else ""
        objects += [
            f"<< /Type /Page /Parent 2 0 R /MediaBox [0 0 612 792] /Contents {4 + 2 * i} 0 R "
            f"/Resources << /Font << /F1 {font} 0 R >> >> >>",
            f"<< /Length {len(stream)} >>\nstream\n{stream}\nendstream",
        ]
    objects.append("<< /Type /Font /Subtype /Type1 /BaseFont /Helvetica >>")
    data, places = b"%PDF-1.4\n", []
    for number, body in enumerate(objects, 1):
        places.append(len(data))
        data += f"{number} 0 obj\n{body}\nendobj\n".encode()
    table = "".join(f"{place:010} 00000 n \n" for place in places)
    end = f"xref\n0 {len(objects) + 1}\n0000000000 65535 f \n{table}trailer\n"
    end += f"<< /Size {len(objects) + 1} /Root 1 0 R {trailer} >>\nstartxref\n{len(data)}\n%%EOF\n"
    return data + end.encode()


def test_a_page_is_what_a_browser_shows() -> None:
    assert html_text(PAGE) == SHOWN


@pytest.mark.parametrize("name", ["page.html", "PAGE.HTM", "stdin.txt"])
def test_html_is_known_by_its_ending_or_its_start(name: str) -> None:
    assert read(name, PAGE.encode()).text == SHOWN
    assert read("page.txt", b"the tag <p>").text == "the tag <p>"


def test_html_in_the_encoding_that_it_says() -> None:
    page = '<meta charset="iso-8859-1"><p>sch\u00f6n</p>'
    assert read("a.html", page.encode("latin1")).text == "sch\u00f6n"
    with pytest.raises(UsageError, match="in nonsense, which nobody knows"):
        read("a.html", page.replace("iso-8859-1", "nonsense").encode())


@pytest.mark.parametrize("page", ["<p>", "</li></p>a", "<script>never closed", "<pre><pre>a</pre>"])
def test_broken_html_is_read_as_far_as_it_goes(page: str) -> None:
    assert html_text(page) in ("", "a")


def test_markdown_stays_as_it_is() -> None:
    text = "# Title\n\n* a < b\n\n```sh\nls\n```"
    assert read("a.md", text.replace("\n", "\r\n").encode()).text == text


@pytest.mark.parametrize("end", ["\r\n", "\r"])
def test_lines_may_end_in_any_way(end: str) -> None:
    text = "One line.\n\nAnother.\nAnd a last one."
    assert read("a.txt", text.replace("\n", end).encode()).text == text
    assert read("a.txt", f"One{end}two\nthree\r\n\rfour".encode()).text == "One\ntwo\nthree\n\nfour"
    assert html_text(f"<pre>a{end}b</pre>").split() == ["a", "b"]
    page = f"<!doctype html>{end}<p>A{end}b</p>{end}<pre>c{end}d</pre>".encode()
    assert read("a.html", page).text == "A b\n\nc\nd"
    rows = f'{{"question": "Who?"}}{end}"What?"{end}'
    assert [value for _, value in json_lines(rows, "x", "")] == [{"question": "Who?"}, "What?"]


def test_utf_16_with_its_mark_is_read() -> None:
    assert read("a.txt", "sch\u00f6n".encode("utf-16")).text == "sch\u00f6n"


def test_pages_of_a_pdf() -> None:
    found = read("a.pdf", pdf("The lynx", "", "sleeps"))
    assert found == ("The lynx\n\nsleeps", 3)
    assert read("stdin.txt", pdf("The lynx")).pages == 1


PDF_CASES = {
    "pictures": (pdf("", ""), "has 2 pages and no text", "ocrmypdf a.pdf"),
    "damaged": (b"%PDF-1.4\nnothing", "is a damaged PDF", "again"),
    "not a PDF": (b"some text", "is a damaged PDF", "again"),
    "unknown lock": (pdf("a", trailer="/Encrypt << /Filter /Other >>"), "a.pdf is", ""),
}


@pytest.mark.parametrize("case", PDF_CASES)
def test_pdfs_that_cannot_be_read(case: str) -> None:
    data, message, hint = PDF_CASES[case]
    with pytest.raises(UsageError) as caught:
        read("a.pdf", data)
    assert message in caught.value.message
    assert hint in (caught.value.hint or "")


def test_a_locked_pdf(tmp_path: Path) -> None:
    pypdf = pytest.importorskip("pypdf")
    writer = pypdf.PdfWriter()
    writer.add_blank_page(100, 100)
    writer.encrypt("secret", algorithm="RC4-128")
    writer.write(tmp_path / "a.pdf")
    with pytest.raises(UsageError, match="locked with a password") as caught:
        read("a.pdf", (tmp_path / "a.pdf").read_bytes())
    assert "qpdf" in (caught.value.hint or "")


def test_a_pdf_without_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    original = builtins.__import__

    def without(name: str, *arguments: Any, **options: Any) -> Any:
        if name.startswith("pypdf"):
            raise ImportError(name)
        return original(name, *arguments, **options)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(UsageError, match="pypdf, which reads them, is not installed") as caught:
        read("a.pdf", pdf("a"))
    assert caught.value.hint == "pip install 'amkv[pdf]'"


def test_a_word_document_is_refused_with_what_converts_it() -> None:
    with pytest.raises(UsageError, match=r"report\.docx is binary data") as caught:
        read("report.docx", b"PK\x03\x04\0\0")
    assert caught.value.hint == "convert it first: pandoc report.docx -o report.md"


def test_several_files_are_one_text_in_order_under_their_names(tmp_path: Path) -> None:
    (tmp_path / "b.txt").write_text("First.\n")
    (tmp_path / "a.html").write_text("<p>Second.</p>")
    (tmp_path / "c.pdf").write_bytes(pdf("Third."))
    found = read_source(*(str(tmp_path / name) for name in ("b.txt", "a.html", "c.pdf")))
    assert found.text == (
        "===== b.txt =====\n\nFirst.\n\n===== a.html =====\n\nSecond.\n\n"
        "===== c.pdf =====\n\nThird."
    )
    assert (found.name, found.stem) == ("b.txt, a.html, c.pdf", "b")
    assert [(file.name, file.characters, file.pages) for file in found.files] == [
        ("b.txt", 6, None),
        ("a.html", 7, None),
        ("c.pdf", 6, 1),
    ]
    assert found.manifest()["files"][2] == {"name": "c.pdf", "characters": 6, "pages": 1}


def test_the_name_of_many_files_is_short(tmp_path: Path) -> None:
    paths = []
    for i in range(50):
        paths.append(tmp_path / f"chapter-{i}.txt")
        paths[-1].write_text(str(i))
    assert read_source(*map(str, paths)).name == "chapter-0.txt and 49 more"


def test_one_bad_file_of_several_is_named(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("a")
    (tmp_path / "b.txt").write_text(" \n")
    with pytest.raises(UsageError, match=r"b\.txt is empty"):
        read_source(str(tmp_path / "a.txt"), str(tmp_path / "b.txt"))
