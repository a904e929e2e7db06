"""Line numbers of keys in a TOML text: tomllib does not report them."""

from __future__ import annotations

import re

_TABLE = re.compile(r"\s*(\[\[?)\s*([^\]]+?)\s*\]\]?\s*(?:#.*)?$")
_KEY = re.compile(r"""\s*("[^"]*"|'[^']*'|[\w-]+)((?:\s*\.\s*[\w"'-]+)*)\s*=""")


def line_of(text: str, path: list[str | int]) -> int:
    """Return the line (from 1) of the key or table at ``path``, or of its nearest parent in the text.

    Exact for tables, arrays of tables and keys at the beginning of a line. A key inside an inline table has
    the line of the outer key.
    """
    found = _lines(text)
    wanted = tuple(path)
    while wanted and wanted not in found:
        wanted = wanted[:-1]
    return found.get(wanted, 1)


def _lines(text: str) -> dict[tuple[str | int, ...], int]:
    found: dict[tuple[str | int, ...], int] = {}
    counts: dict[tuple[str | int, ...], int] = {}
    here: tuple[str | int, ...] = ()
    for number, line in enumerate(text.splitlines(), 1):
        if table := _TABLE.match(line):
            names = [name.strip().strip("\"'") for name in table[2].split(".")]
            here = ()
            for name in names[:-1]:
                here = (*here, name)
                found.setdefault(here, number)
                if here in counts:  # an array of tables: the last element
                    here = (*here, counts[here])
            here = (*here, names[-1])
            if table[1] == "[[":
                counts[here] = counts.get(here, -1) + 1
                found.setdefault(here, number)
                here = (*here, counts[here])
            found[here] = number
        elif key := _KEY.match(line):
            at = (*here, key[1].strip("\"'"))
            found.setdefault(at, number)
            for part in re.findall(r"[\w-]+", key[2]):
                at = (*at, part)
                found.setdefault(at, number)
    return found
