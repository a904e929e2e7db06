"""The grammar of rules."""

from __future__ import annotations

from random import Random

import pytest

from daxemu.errors import InvalidArgument
from daxemu.rule import On, Op, When, parse_on, parse_when


def fired(text: str, among: int = 12, seed: int = 0) -> list[int]:
    when, random = parse_when(text), Random(seed)
    return [number for number in range(1, among + 1) if when.fires(number, random)]


@pytest.mark.parametrize(
    ("text", "numbers"),
    [
        ("1", [1]),
        ("3", [3]),
        ("10+", [10, 11, 12]),
        ("3+4", [3, 7, 11]),
        ("2..4", [2, 3, 4]),
        ("1..9+3", [1, 4, 7]),
        ("100%", list(range(1, 13))),
    ],
)
def test_when_fires_as_in_strace(text: str, numbers: list[int]) -> None:
    assert fired(text) == numbers
    assert str(parse_when(text)) == text
    assert parse_when(str(parse_when(text))) == parse_when(text)


def test_a_probability_is_repeatable_by_its_seed() -> None:
    first = fired("20%", 1000, seed=7)
    assert first == fired("20%", 1000, seed=7) != fired("20%", 1000, seed=8)
    assert 120 < len(first) < 280


@pytest.mark.parametrize("text", ["", "0", "x", "-1", "3..1", "3+0", "0%", "101%", "%", "1..", "+2", "nan%"])
def test_a_when_that_never_fires_is_refused(text: str) -> None:
    with pytest.raises(InvalidArgument):
        parse_when(text)


@pytest.mark.parametrize(
    ("glob", "path", "matches"),
    [
        ("db", "/db", True),
        ("db", "/deep/er/db", True),
        ("db", "/db2", False),
        ("*.log", "/a/b.log", True),
        ("a/*.log", "/a/b.log", True),
        ("/a/*.log", "/a/b.log", True),
        ("a/*.log", "/x/a/b.log", False),
        ("[ab]", "/b", True),
        ("*", "/any", True),
    ],
)
def test_a_file_is_a_glob(glob: str, path: str, matches: bool) -> None:
    assert On("read", glob).names(path) is matches


def test_a_rule_in_one_word() -> None:
    assert parse_on("read:*.sst:3+2", "mydb") == On("read", "*.sst", When(3, None, 2), "mydb")
    assert parse_on("fsync:db", "17", after=True) == On("fsync", "db", When(), 17, after=True)
    assert parse_on("any:a:b:2").file == "a:b"


@pytest.mark.parametrize("text", ["read", "read:", ":db", "reed:db", "read:db:x", "read:db:"])
def test_a_rule_that_makes_no_sense_is_refused(text: str) -> None:
    with pytest.raises(InvalidArgument):
        parse_on(text)


def test_a_word_may_stand_for_several_operations() -> None:
    assert parse_on("fault:db").ops == {Op.LOAD, Op.STORE}
    assert parse_on("open:db").ops == {Op.OPEN, Op.CREATE}
    assert parse_on("any:db").ops == set(Op)
