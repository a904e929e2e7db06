"""Shared code of the verbs: parsed and printed sizes, tables."""

from __future__ import annotations

import click
import pytest

from daxemu.cli.common import SIZE, human, table


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("0", 0),
        ("512", 512),
        ("4K", 4096),
        ("4k", 4096),
        ("4KiB", 4096),
        ("4KB", 4096),
        ("10B", 10),
        ("1.5M", 3 << 19),
        ("6T", 6 << 40),
        ("1P", 1 << 50),
        ("0x1000", 4096),
        ("0xFf", 255),
        (" 8M ", 8 << 20),
        ("-4K", -4096),
        ("+1", 1),
        ("007", 7),
    ],
)
def test_a_size(text: str, size: int) -> None:
    assert SIZE.convert(text, None, None) == size


def test_an_int_is_a_size() -> None:
    assert SIZE.convert(4096, None, None) == 4096


@pytest.mark.parametrize(
    "text",
    [
        "",
        " ",
        "K",
        "4X",
        "4KK",
        "four",
        "1e6",
        "0x",
        "1.",
        ".5K",
        "4 K",
        "--4",
        "0.3",
        "1.1K",
        "9" * 5000,
        "9" * 400 + ".5",
        "nan",
    ],
    ids=lambda text: text[:10],
)
def test_no_size(text: str) -> None:
    with pytest.raises(click.UsageError):
        SIZE.convert(text, None, None)


@pytest.mark.parametrize(
    ("size", "text"),
    [
        (0, "0"),
        (512, "512"),
        (4096, "4K"),
        (1536, "1.5K"),
        (8 << 20, "8M"),
        (6 << 40, "6T"),
        (1 << 50, "1P"),
        (1023, "1023"),
    ],
)
def test_a_size_for_people(size: int, text: str) -> None:
    assert human(size) == text


@pytest.mark.parametrize("size", [0, 1, 4096, 3 << 19, 6 << 40, 8 << 20, 1 << 50])
def test_what_is_shown_can_be_typed(size: int) -> None:
    assert SIZE.convert(human(size), None, None) == size


def test_a_table_aligns_names_left_and_numbers_right() -> None:
    assert table([("a", "1"), ("long", "1000")], ("name", "size")) == [
        "name  size",
        "a        1",
        "long  1000",
    ]


def test_a_table_without_rows_is_its_header() -> None:
    assert table([], ("name", "size")) == ["name  size"]


def test_no_line_of_a_table_ends_in_blanks() -> None:
    lines = table([("a", ""), ("bb", "x")], ("first", "second"))
    assert all(line == line.rstrip() for line in lines)


def test_a_column_is_of_numbers_only_if_all_are() -> None:
    assert table([("1", "-5"), ("x", "2.5")], ("a", "b")) == ["a    b", "1   -5", "x  2.5"]
