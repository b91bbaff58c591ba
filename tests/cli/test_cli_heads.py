"""inspect --heads and --plot: the numbers of the file, where they belong, in every form."""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest

from amcli.commands.heads import RAMP, STEPS, HeadMap, draw, kept_from, strip
from amkv_format import AmkvFile, FormatError
from conftest import Amkv

GOOD = Path(__file__).parents[2] / "formats" / "vectors" / "good"
BAD = GOOD.parent / "bad"
WITH_POSITIONS = GOOD / "compact-f32.amkv"
WITH_ERRORS = GOOD / "fit-errors.amkv"


def test_every_head_has_its_step() -> None:
    found = HeadMap("entries", [0, 3], [[1, 10], [100, None]], whole=True)
    lines = list(draw([found], 80, colours=False))
    assert lines == [
        "entries",
        "head  0   1",
        "   0  0   5",
        "   3  9   ·",
        "1 0123456789 100",
    ]
    coloured = list(draw([found], 80, colours=True))
    assert f"\x1b[48;5;{RAMP[5]}m    \x1b[0m" in coloured[2]
    assert [re.sub(r"\x1b\[[0-9;]*m", "", line) for line in coloured[:2]] == lines[:2]


def test_a_map_needs_no_colour_of_the_terminal() -> None:
    """Light or dark: cells are blank on a colour of their own, and words have no colour."""
    found = HeadMap("entries", [0, 3], [[1, 10], [100, None]], whole=True)
    for line in draw([found], 80, colours=True):
        for cell in re.findall(r"\x1b\[48;5;\d+m(.*?)\x1b\[0m", line):
            assert not cell.strip()
        rest = re.sub(r"\x1b\[48;5;\d+m *\x1b\[0m", "", line)
        assert "\x1b" not in rest


def test_maps_stand_side_by_side_where_there_is_room() -> None:
    found = [HeadMap(name, [0], [[1.0] * 8], whole=False) for name in ("output", "mass")]
    wide, narrow = (list(draw(found, width, colours=False)) for width in (80, 40))
    assert re.match(r"output +mass$", wide[0])
    assert [line for line in narrow if line in ("output", "mass")] == ["output", "mass"]
    assert max(map(len, narrow)) <= 40


def test_many_heads_fit_80_columns() -> None:
    for heads in (8, 32, 64):
        found = HeadMap("entries", [0], [list(range(heads))], whole=True)
        assert max(map(len, draw([found], 80, colours=False))) <= 80
        assert {found.step(n) for n in range(heads)} <= set(range(STEPS))


def test_all_the_same_is_no_division_by_zero() -> None:
    for value in (0.0, 5.0):
        assert HeadMap("entries", [0], [[value]], whole=False).step(value) == 0


def test_where_the_kept_keys_come_from() -> None:
    with AmkvFile.open(WITH_POSITIONS) as file:
        places = [p for i in range(len(file.layers)) for p in file.positions(i) or [] if p >= 0]
        assert places
        T = file.logical_length
        assert kept_from(file, 10**6) == [places.count(p) for p in range(T)]
        halves = kept_from(file, 2)
        assert halves is not None
        assert sum(halves) == len(places)
        assert halves[0] == sum(p * 2 < T for p in places)
    with AmkvFile.open(GOOD / "prefill-f32.amkv") as file:
        assert kept_from(file, 64) is None
    with AmkvFile.open(BAD / "position-past-end.amkv") as file, pytest.raises(FormatError):
        kept_from(file, 64)


def test_a_strip_shows_nothing_as_nothing_and_little_as_little() -> None:
    title, bars, axis = strip([0, 1, 1000, 500], 4000, plain=False)
    assert bars == " ▁█▄"
    assert "1,000" in title
    assert axis.endswith("token 4,000")
    assert list(strip([0, 1, 1000, 500], 4000, plain=True))[1] == "0194"


def test_a_file_with_positions_has_its_strip(amkv: Amkv) -> None:
    text = amkv("inspect", WITH_POSITIONS, "--heads").out
    assert "kept keys along the text" in text
    record = json.loads(amkv("inspect", WITH_POSITIONS, "--json").out)
    assert sum(record["kept_from"]) > 0
    without = GOOD / "prefill-f32.amkv"
    assert "kept keys" not in amkv("inspect", without, "--heads").out
    assert json.loads(amkv("inspect", without, "--json").out)["kept_from"] is None
    broken = amkv("inspect", BAD / "position-past-end.amkv")
    assert (broken.code, broken.out) == (3, "")


def test_every_valid_file_has_maps_without_colours_when_piped(amkv: Amkv) -> None:
    for path in sorted(GOOD.glob("*.amkv")):
        done = amkv("inspect", path, "--heads")
        assert (done.code, "\x1b" in done.out) == (0, False), path.stem
        assert "\nentries" in done.out


class Cells(HTMLParser):
    """Titles of the cells of a page, and whether it asks for anything from elsewhere."""

    def __init__(self) -> None:
        super().__init__()
        self.titles: list[str] = []
        self.outside: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        found = dict(attrs)
        if tag == "td" and found.get("title"):
            self.titles.append(str(found["title"]))
        if tag in ("script", "link", "img", "iframe") or "src" in found or "href" in found:
            self.outside.append(tag)


def test_the_page_has_every_head_and_needs_nothing(amkv: Amkv, here: Path) -> None:
    done = amkv("inspect", WITH_ERRORS, "--plot", "heads.html")
    assert (done.code, done.err) == (0, "wrote heads.html\n")
    page = Cells()
    page.feed((here / "heads.html").read_text(encoding="utf-8"))
    assert not page.outside
    with AmkvFile.open(WITH_ERRORS) as file:
        for i, layer in enumerate(file.layers):
            for head, entries in enumerate(layer.stored):
                if layer.type == "full":
                    assert f"layer {i}, head {head}: {entries:,}" in page.titles
    amkv("inspect", WITH_POSITIONS, "--plot", "strip.html")
    assert "<svg" in (here / "strip.html").read_text(encoding="utf-8")


def test_a_name_in_a_file_is_no_html(amkv: Amkv, here: Path, compact: Path) -> None:
    from amcli.commands.inspect import describe
    from amcli.commands.screen.picture import page

    with AmkvFile.open(compact) as file:
        record = describe(file, compact)
    record["document"] = {**record["document"], "name": "<script>x</script>"}
    found = HeadMap("entries", [0], [[1]], whole=True)
    assert "<script" not in page(record, [found], None)


@pytest.mark.parametrize("ending", ["png", "svg"])
def test_the_picture(amkv: Amkv, here: Path, ending: str) -> None:
    done = amkv("inspect", WITH_POSITIONS, "--plot", f"heads.{ending}", "-q")
    assert done.code == 0
    start = (here / f"heads.{ending}").read_bytes()[:5]
    assert start in (b"\x89PNG\r", b"<?xml")


def test_another_ending_is_refused_before_anything_is_read(amkv: Amkv) -> None:
    done = amkv("inspect", WITH_ERRORS, "--plot", "heads.txt")
    assert (done.code, done.out) == (2, "")
    assert done.errors[0] == "error: --plot heads.txt: unknown ending '.txt'"
