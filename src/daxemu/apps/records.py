"""The data that every program is given: numbered records of text, each known from its number alone."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Mapping

import msgspec

BASE = 2000
"""Records below are in the data file proper when a program is started."""
COUNT = 2400
"""Those from BASE on were acknowledged, and are in the journal of a program that has one."""
LENGTH = 500
HURT = BASE // 2
"""The record in whose page the data file is hurt."""
HURT_LATE = (BASE + COUNT) // 2
"""The same of the journal."""
HEAD = len(f"record {0:06d} ")

_LINE = re.compile(r"(\d{6}) (.*)")


def text(number: int, version: int = 0) -> str:
    """A record: LENGTH characters, which no compression makes much smaller than half."""
    head = f"record {number:06d} " if not version else f"change {number:06d} "
    body = hashlib.shake_256(f"{number} {version}".encode()).hexdigest(LENGTH // 2)
    return (head + body)[:LENGTH]


def lines(numbers: Iterable[int]) -> str:
    """Records as lines of text, for a program's input."""
    return "".join(f"{text(number)}\n" for number in numbers)


class Finding(msgspec.Struct):
    """What a program gave back when it was asked for everything. ``complaints``: what it said of errors to
    whoever asked.
    """

    right: int = 0
    wrong: int = 0
    missing: int = 0
    complaints: list[str] = []
    first_wrong: str = ""

    @property
    def complete(self) -> bool:
        """Whether it was all there."""
        return not self.wrong and not self.missing


def compare(found: Mapping[int, object], expected: Mapping[int, object], complaints: list[str]) -> Finding:
    """What was found, against what was written."""
    finding = Finding(complaints=complaints)
    for number, wanted in expected.items():
        if number not in found:
            finding.missing += 1
        elif found[number] == wanted:
            finding.right += 1
        else:
            finding.wrong += 1
            finding.first_wrong = finding.first_wrong or f"record {number}"
    return finding


def compare_lines(output: Iterable[str], complaint: re.Pattern[str]) -> Finding:
    """The same of lines ``NUMBER TEXT``; lines like ``complaint`` are errors that the program tells of."""
    found, complaints = {}, []
    for line in output:
        if (match := _LINE.fullmatch(line)) is not None:
            found[int(match[1])] = match[2]
        elif complaint.match(line):
            complaints.append(line.strip())
    return compare(found, {number: text(number) for number in range(COUNT)}, complaints)
