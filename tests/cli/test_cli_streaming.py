"""Answers as markdown: what is printed is never taken back, and nothing is lost."""

from __future__ import annotations

import io
from collections.abc import Iterator

import pytest
from rich.console import Console as Screen
from screens import shown

from amcli.commands.screen.streaming import StreamedMarkdown, blocks

TEXT = """\
# Codes

Two of them
on two lines.

- `42-51`, *Kenji*
- 61-17

1. first
2. second

| who | code |
| --- | --- |
| Kenji | 42-51 |

```python
print("code")

print("more")
```

> said, and
> said again

The [end](https://example.org) of it.
"""


def drawn(pieces: Iterator[str], width: int = 60, height: int = 12) -> str:
    """What is left on the screen."""
    out = io.StringIO()
    screen = Screen(
        file=out, force_terminal=True, width=width, height=height, color_system=None,
        _environ={},
    )  # fmt: skip
    StreamedMarkdown(screen).show(pieces)
    return out.getvalue()


def in_pieces(text: str, size: int) -> Iterator[str]:
    for i in range(0, len(text), size):
        yield text[i : i + size]


def test_a_finished_block_stays_what_it_is() -> None:
    """Wherever the text is cut off, all blocks but the last are those of the whole text."""
    whole = blocks(TEXT)
    assert len(whole) == 8
    for n in range(len(TEXT) + 1):
        found = blocks(TEXT[:n])
        assert "".join(found) == TEXT[:n]
        assert found[:-1] == whole[: len(found) - 1]


@pytest.mark.parametrize("size", [1, 7, 1000])
def test_the_screen_ends_the_same_however_the_text_comes(size: int) -> None:
    final = shown(drawn(in_pieces(TEXT, size)))
    assert final == shown(drawn(iter([TEXT])))
    lines = [line.strip() for line in final.split("\n")]
    for line in ("Two of them", "on two lines.", "• 42-51, Kenji", "1 first", "Kenji  42-51"):
        assert line in lines
    assert "▌ said, and" in lines
    assert "https://example.org" in final  # shown, not hidden behind a word
    assert "\n\n\n" not in final


def test_what_came_before_an_interrupt_stays() -> None:
    def pieces() -> Iterator[str]:
        yield "One.\n\nTwo"
        yield " and"
        raise KeyboardInterrupt

    out = io.StringIO()
    screen = Screen(file=out, force_terminal=True, width=60, height=12, color_system=None)
    with pytest.raises(KeyboardInterrupt):
        StreamedMarkdown(screen).show(pieces())
    assert shown(out.getvalue()).rstrip("\n") == "One.\n\nTwo and"


def test_a_block_taller_than_the_screen_is_printed_whole() -> None:
    text = "\n".join(f"line {i}" for i in range(40))
    final = shown(drawn(in_pieces(text, 9), height=8)).rstrip("\n").split("\n")
    assert [line.strip() for line in final] == text.split("\n")


def test_control_characters_of_an_answer_do_not_reach_the_terminal() -> None:
    assert "\x1b]0;" not in drawn(iter(["a\x1b]0;title\x07b"]))
