"""What is made of a program's answers."""

from __future__ import annotations

import re

from daxemu.apps.records import COUNT, LENGTH, compare_lines, text

ERROR = re.compile("error.*")


def answer(*changed: tuple[int, str | None]) -> list[str]:
    """All records as lines, but for those that are changed, or with None left out."""
    changes = dict(changed)
    lines = ((number, changes.get(number, text(number))) for number in range(COUNT))
    return [f"{number:06d} {line}" for number, line in lines if line is not None]


def test_records_are_all_different_and_of_one_length() -> None:
    everything = {text(number) for number in range(COUNT)}
    assert len(everything) == COUNT
    assert {len(record) for record in everything} == {LENGTH}


def test_all_is_right() -> None:
    found = compare_lines(answer(), ERROR)
    assert (found.right, found.complete, found.complaints) == (COUNT, True, [])


def test_a_record_that_differs_is_wrong_and_one_that_is_not_there_is_missing() -> None:
    found = compare_lines(answer((7, text(8)), (9, None)), ERROR)
    assert (found.right, found.wrong, found.missing) == (COUNT - 2, 1, 1)
    assert found.first_wrong == "record 7"
    assert not found.complete


def test_errors_are_complaints_and_torn_records_are_not() -> None:
    found = compare_lines([*answer((7, "record\x00")), "rest of seven", "error: I/O"], ERROR)
    assert (found.wrong, found.complaints) == (1, ["error: I/O"])
