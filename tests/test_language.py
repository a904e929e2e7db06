"""Check of the docstrings' language: each rule accepts good docstrings and names bad ones."""

from __future__ import annotations

from pathlib import Path

import pytest
from tools import check_language
from tools.check_language import (
    LIMIT,
    RATCHETS,
    Docstring,
    Figure,
    Ratchet,
    bare_code,
    bare_codes,
    docstrings,
    figures,
    measure,
    replaced_word,
    replaced_words,
    report,
    too_many,
)

KEYS = ["m5-mce-cacheline", "g5-fsync-dirty", "p1-nobody-maps"]

SOURCE = '''
"""Module of two functions."""

class Owner:
    """What it owns."""

    async def take(self):
        """Take the extent."""

def plain():
    return "it, they and what are no docstring"
'''


def test_every_docstring_of_a_module_is_found() -> None:
    assert list(docstrings(SOURCE)) == [
        Docstring(1, "Module of two functions."),
        Docstring(4, "What it owns."),
        Docstring(7, "Take the extent."),
    ]


def test_only_words_of_docstrings_count() -> None:
    assert measure(SOURCE) == Figure(pronouns=2, words=10)


@pytest.mark.parametrize(
    ("figure", "per_100"), [(Figure(1, 25), 4.0), (Figure(0, 0), 0.0), (Figure(41, 1000), 4.1)]
)
def test_a_figure_is_pronouns_per_100_words(figure: Figure, per_100: float) -> None:
    assert figure.per_100 == per_100


def test_figures_are_by_package(tmp_path: Path) -> None:
    for name, text in {
        "a.py": "A thing.",
        "fs/b.py": "It.",
        "fs/deep/c.py": "A link.",
        "mm/d.py": "",
    }.items():
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f'"""{text}"""\n')
    assert figures(tmp_path) == {".": Figure(0, 2), "fs": Figure(1, 3), "mm": Figure(0, 0)}


def test_a_package_above_its_limit_is_named() -> None:
    found = {
        "mm": Figure(41, 1000),
        "fs": Figure(40, 1000),
        "host": Figure(50, 1000),
        "cli": Figure(51, 1000),
    }
    ratchets = {"host": Ratchet(5.0, "old"), "cli": Ratchet(5.0, "old")}
    problems = list(too_many(found, ratchets))
    assert [problem.partition(":")[0] for problem in problems] == ["mm", "cli"]
    assert "4.1 pronouns per 100 docstring words, the limit is 4.0" in problems[0]
    assert "5.1 pronouns per 100 docstring words, the limit is 5.0" in problems[1]


def test_the_report_has_each_figure_and_the_ratchets_that_may_go() -> None:
    found = {"mm": Figure(20, 1000), "fs": Figure(45, 1000), "cli": Figure(40, 1000)}
    lines = list(report(found, {"fs": Ratchet(5.0, "old"), "cli": Ratchet(5.0, "old")}))
    assert lines[0].split()[:2] == ["mm", "2.0"]
    assert lines[1].endswith("4.5 pronouns per 100 docstring words (ratchet 5.0: old)")
    assert lines[2].endswith("remove the entry)")


@pytest.mark.parametrize(
    ("text", "code"),
    [
        ("m5: one sector.", "m5"),
        ("m5.", "m5"),
        ("`g5` and more.", "g5"),
        ("g5-dirty.", "g5-dirty"),
        ("g5, m5: both.", "g5"),
        ("m5-mce-cacheline: one sector.", None),
        ("One bad sector poisons a page (`m5-mce-cacheline`).", None),
        ("p0 maps the file.", None),
        ("m55 is no scenario.", None),
        ("Return m5.", None),
        ("", None),
    ],
)
def test_a_bare_scenario_code_at_the_beginning_is_found(text: str, code: str | None) -> None:
    assert bare_code(text, KEYS) == code


def test_a_bare_code_is_named_with_file_and_line(tmp_path: Path) -> None:
    (tmp_path / "test_a.py").write_text('def test_one():\n    """m5."""\n\ndef test_two():\n    """Two."""\n')
    (problem,) = bare_codes(tmp_path, KEYS)
    assert problem.startswith(f"{tmp_path}/test_a.py:1: the docstring begins with the scenario code m5")


@pytest.mark.parametrize(
    ("name", "word"),
    [
        ("hurt", "hurt"),
        ("_healed_by", "heal"),
        ("isMendable", "mend"),
        ("MAX_BAD", "bad"),
        ("TOLD", "told"),
        ("hidden2", "hidden"),
        ("bad_block", None),
        ("_set_bad_blocks", None),
        ("badblocks", None),
        ("threshold", None),
        ("amendment", None),
        ("_", None),
    ],
)
def test_a_name_with_a_replaced_word_is_found(name: str, word: str | None) -> None:
    assert replaced_word(name) == word


NAMES = """
class Reply(Struct):
    told: int
    sick: int

def f(told, *, hurt=1):
    x = reply.told + reply.heal
    g(told=x, mended=x)
    hidden = bad = x
    raise click.BadParameter("bad")
"""


def test_a_public_name_is_allowed_as_field_attribute_and_keyword_only(tmp_path: Path) -> None:
    (tmp_path / "fs").mkdir()
    (tmp_path / "fs" / "heal.py").write_text(NAMES)
    found = [line.split(": ")[0:2] for line in replaced_words(tmp_path)]
    places = sorted((int(place.rpartition(":")[2]), name) for place, name in found)
    assert places == [
        (1, "heal"),
        (4, "sick"),
        (6, "hurt"),
        (6, "told"),
        (7, "heal"),
        (8, "mended"),
        (9, "bad"),
        (9, "hidden"),
    ]


def test_the_working_tree_passes(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    assert check_language.main() == 0
    assert "supervisor" in capsys.readouterr().out
    monkeypatch.setattr(check_language, "LIMIT", 0.1)
    assert check_language.main() == 1
    assert "the limit is 0.1" in capsys.readouterr().err


def test_every_ratchet_is_above_the_limit_and_has_a_reason() -> None:
    """None is left."""
    assert [ratchet for ratchet in RATCHETS.values() if ratchet.limit <= LIMIT or not ratchet.reason] == []
