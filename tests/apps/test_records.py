"""Comparison of a program's output with the records written."""

from __future__ import annotations

import re

from daxemu.apps.records import COUNT, LENGTH, compare_lines, text

ERROR = re.compile("error.*")


def answer(*changed: tuple[int, str | None]) -> list[str]:
    """Return all records as lines. ``changed``: (number, replacement text; None to leave the record out)."""
    changes = dict(changed)
    lines = ((number, changes.get(number, text(number))) for number in range(COUNT))
    return [f"{number:06d} {line}" for number, line in lines if line is not None]


def test_records_differ_and_have_one_length() -> None:
    everything = {text(number) for number in range(COUNT)}
    assert len(everything) == COUNT
    assert {len(record) for record in everything} == {LENGTH}


def test_unchanged_output_is_complete() -> None:
    found = compare_lines(answer(), ERROR)
    assert (found.right, found.complete, found.complaints) == (COUNT, True, [])


def test_a_changed_record_is_wrong_and_an_absent_one_missing() -> None:
    found = compare_lines(answer((7, text(8)), (9, None)), ERROR)
    assert (found.right, found.wrong, found.missing) == (COUNT - 2, 1, 1)
    assert found.first_wrong == "record 7"
    assert not found.complete


def test_an_error_line_is_a_complaint_and_a_torn_record_is_not() -> None:
    found = compare_lines([*answer((7, "record\x00")), "rest of seven", "error: I/O"], ERROR)
    assert (found.wrong, found.complaints) == (1, ["error: I/O"])
