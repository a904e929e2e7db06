"""Data of every program: numbered records of text. The number alone determines the content."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Mapping

import msgspec

BASE = 2000
"""Records below BASE are in the data file itself when a program is started."""
COUNT = 2400
"""Number of records. Records from BASE on were acknowledged, and are in the journal of a program with one."""
LENGTH = 500
DATA_TARGET = BASE // 2
"""Record for injections into the data file: its page is poisoned, or its bytes are changed."""
JOURNAL_TARGET = (BASE + COUNT) // 2
"""Record for injections into the journal."""
HEAD = len(f"record {0:06d} ")

_LINE = re.compile(r"(\d{6}) (.*)")


def text(number: int, version: int = 0) -> str:
    """Return a record of LENGTH characters. A compressed record has about half the size, or more."""
    head = f"record {number:06d} " if not version else f"change {number:06d} "
    body = hashlib.shake_256(f"{number} {version}".encode()).hexdigest(LENGTH // 2)
    return (head + body)[:LENGTH]


def lines(numbers: Iterable[int]) -> str:
    """Return records as lines of text, for a program's input."""
    return "".join(f"{text(number)}\n" for number in numbers)


class ReadBack(msgspec.Struct):
    """Records returned by a program, counted against the written records.

    ``complaints``: error messages of the program to its client.
    """

    right: int = 0
    wrong: int = 0
    missing: int = 0
    complaints: list[str] = []
    first_wrong: str = ""

    @property
    def complete(self) -> bool:
        """True if every record came back right."""
        return not self.wrong and not self.missing


def compare(found: Mapping[int, object], expected: Mapping[int, object], complaints: list[str]) -> ReadBack:
    """Compare the records found with the records written."""
    read_back = ReadBack(complaints=complaints)
    for number, wanted in expected.items():
        if number not in found:
            read_back.missing += 1
        elif found[number] == wanted:
            read_back.right += 1
        else:
            read_back.wrong += 1
            read_back.first_wrong = read_back.first_wrong or f"record {number}"
    return read_back


def compare_lines(output: Iterable[str], complaint: re.Pattern[str]) -> ReadBack:
    """Compare output lines ``NUMBER TEXT`` with all COUNT records.

    Lines matching ``complaint`` are errors reported by the program.
    """
    found, complaints = {}, []
    for line in output:
        if (match := _LINE.fullmatch(line)) is not None:
            found[int(match[1])] = match[2]
        elif complaint.match(line):
            complaints.append(line.strip())
    return compare(found, {number: text(number) for number in range(COUNT)}, complaints)
