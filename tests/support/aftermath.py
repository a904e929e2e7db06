"""Tree after a crash, and the check whether a crash can have left the tree."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from tests.support.workload import DIRECTORY, Shape, State, shape


@dataclass
class Tree:
    """Tree as found. ``data``: the bytes of every name, None for a directory."""

    data: dict[str, bytes | None] = field(default_factory=dict)
    shape: Shape = field(default_factory=dict)


def look(top: Path) -> Tree:
    """Return every name below ``top``."""
    data: dict[str, bytes | None] = {}
    inodes: dict[str, int | None] = {}
    for directory, subdirectories, files in os.walk(top):
        for name in [*subdirectories, *files]:
            path = Path(directory) / name
            key = str(path.relative_to(top))
            data[key] = path.read_bytes() if name in files else None
            inodes[key] = path.stat().st_ino if name in files else DIRECTORY
    return Tree(data, shape(inodes, {name: len(found) for name, found in data.items() if found is not None}))


def why_not(found: Tree, states: list[State], older: Mapping[int, Sequence[bytes]] = {}) -> str | None:
    """Return None if a crash within the given history can have left ``found``; otherwise the first
    contradiction.

    Names, links and sizes must be those of one state. A byte overwritten in place may be as in any state, or
    as in ``older`` versions of the same file.
    """
    possible = [state for state in states if state.shape() == found.shape]
    if not possible:
        nearest = min(states, key=lambda state: len(set(state.shape().items()) ^ set(found.shape.items())))
        wrong = set(nearest.shape().items()) ^ set(found.shape.items())
        return f"no state has these names, links and sizes; the nearest differs by {sorted(wrong, key=str)}"
    reasons = [_why_not_bytes(found.data, state, states, older) for state in possible]
    return None if None in reasons else reasons[0]


def _why_not_bytes(
    found: dict[str, bytes | None], state: State, states: list[State], older: Mapping[int, Sequence[bytes]]
) -> str | None:
    for name, data in found.items():
        number = state.names[name]
        if number is DIRECTORY or data is None:
            continue
        versions = {other.files[number] for other in states if number in other.files}
        versions |= set(older.get(number, ()))
        if data in versions:
            continue
        padded = [version.ljust(len(data), b"\0") for version in versions]
        for at, byte in enumerate(data):
            if all(version[at] != byte for version in padded):
                return f"{name}: byte {at} of {len(data)} never was what it is"
    return None
