"""What users set: options over variables over the configuration file over defaults."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from conftest import Amkv


@pytest.fixture
def config(here: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The configuration file, not there yet."""
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
    file = tmp_path / "amkv" / "config.toml"
    file.parent.mkdir()
    return file


def asked(amkv: Amkv, *words: str) -> dict[str, object]:
    """What was asked for, of a compaction."""
    done = amkv("compact", "doc.txt", "-f", "--json", "--method", "random", *words)
    assert done.code == 0, done.err
    record: dict[str, object] = json.loads(done.out)
    return record


def test_each_place_gives_way_to_the_one_above(
    amkv: Amkv, config: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By what is refused: it says where it was set, and needs no model."""

    def refused(*words: str) -> str:
        return amkv("compact", "doc.txt", *words).errors[0].removeprefix("error: ")

    config.write_text("ratio = 0.3\n")
    assert refused() == f"{config}, ratio: --ratio 0.3 is below 1"
    config.write_text("ratio = 0.3\n[compact]\nratio = 0.4\n")
    assert refused() == f"{config}, [compact] ratio: --ratio 0.4 is below 1"
    monkeypatch.setenv("AMKV_RATIO", "0.5")
    assert refused() == "AMKV_RATIO: --ratio 0.5 is below 1"
    assert refused("--ratio", "0.6") == "--ratio 0.6 is below 1"


def test_what_is_typed_puts_away_what_it_excludes(amkv: Amkv, config: Path) -> None:
    config.write_text("ratio = 3\nseed = 7\n")
    record = asked(amkv)
    assert (record["requested"], record["seed"]) == ({"ratio": 3}, 7)
    assert asked(amkv, "--tokens", "50")["requested"] == {"tokens": 50}


def test_a_model_is_set_for_documents_and_not_for_artifacts(
    amkv: Amkv, config: Path, here: Path, full: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config.write_text('model = "./nowhere"\n')
    done = amkv("prefill", "doc.txt", "-o", "other.amkv")
    assert "model folder nowhere does not exist" in done.errors[0]
    assert f"using ./nowhere, by {config}, model" in done.err
    monkeypatch.setenv("AMKV_MODEL", "pocket")
    assert amkv("prefill", "doc.txt", "-o", "other.amkv").code == 0
    monkeypatch.delenv("AMKV_MODEL")
    assert amkv("compact", "doc.prefill.amkv", "--method", "keep").code == 0


def test_an_underscore_is_as_good_as_a_dash(amkv: Amkv, config: Path, compact: Path) -> None:
    config.write_text("[chat]\nmax_tokens = 1\n")
    done = amkv("chat", "-c", "doc.amkv", "-p", "Who?")
    assert "cut off at --max-tokens 1" in done.err


BAD = {
    "unknown": ("ration = 3", "there is no setting ration", "did you mean 'ratio'?"),
    "unknown in a table": ("[chat]\nratio = 3", "no setting [chat] ratio", "temperature"),
    "unknown table": ("[compcat]\nratio = 3", "no setting [compcat]", "did you mean 'compact'?"),
    "no TOML": ("ratio = ", "is not valid TOML", "edit "),
    "no UTF-8": ("ratio = \udce4", "is not valid TOML", "edit "),
    "a list": ("ratio = [3]", "ratio is [3], not a word or a number", "ratio = "),
    "refused": ('ratio = "ten"', "config.toml, ratio: --ratio ten is not a number", "--ratio 20"),
    "remote code": ("trust_remote_code = true", "cannot be set, only typed", "take it out"),
    "force": ("force = true", "cannot be set, only typed", "take it out"),
}


@pytest.mark.parametrize("case", BAD)
def test_a_bad_file_is_one_line(amkv: Amkv, config: Path, here: Path, case: str) -> None:
    text, message, hint = BAD[case]
    config.write_bytes(text.encode("utf-8", "surrogateescape"))
    done = amkv("compact", "doc.txt") if "chat" not in text else amkv("chat", "-c", "doc.amkv")
    assert done.code == 2
    assert str(config) in done.errors[0]
    assert message in done.errors[0]
    assert hint in done.errors[1]
    assert amkv("compact", "--help").code == 0
    assert [path.name for path in here.iterdir()] == ["doc.txt"]


def test_a_bad_variable_is_named_and_a_bad_option_is_not_put_down_to_it(
    amkv: Amkv, config: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AMKV_SEED", "x")
    assert amkv("compact", "doc.txt").errors[0] == (
        "error: AMKV_SEED: --seed x is not a whole number"
    )
    monkeypatch.setenv("AMKV_SEED", "1")
    assert amkv("compact", "doc.txt", "--seed", "y").errors[0] == (
        "error: --seed y is not a whole number"
    )


def test_a_variable_that_sets_nothing_is_said(
    amkv: Amkv, config: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AMKV_RATOI", "3")
    monkeypatch.setenv("AMKV_RATIO", "")
    done = amkv("inspect", "no.amkv")
    assert done.err.splitlines()[0] == (
        "warning: AMKV_RATOI is set, and is no setting; AMKV_RATIO is"
    )
    assert asked(amkv, "-q")["requested"] == {"ratio": 20}
