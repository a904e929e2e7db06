"""What is there after a crash, and whether that can be."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path

from tests.support.workload import DIRECTORY, State


def look(top: Path) -> dict[str, bytes | None]:
    """Every name below ``top``: its bytes, None for a directory."""
    found: dict[str, bytes | None] = {}
    for directory, subdirectories, files in os.walk(top):
        for name in subdirectories:
            found[str((Path(directory) / name).relative_to(top))] = None
        for name in files:
            path = Path(directory) / name
            found[str(path.relative_to(top))] = path.read_bytes()
    return found


def why_not(
    found: dict[str, bytes | None], states: list[State], older: Mapping[int, Sequence[bytes]] = {}
) -> str | None:
    """None if ``found`` can be what a crash within this piece of history left; else what speaks against it.

    Names and sizes must be those of one state. A byte that was overwritten in place may be as in any of them,
    or as in ``older`` versions of the same file.
    """
    sizes = {name: None if data is None else len(data) for name, data in found.items()}
    possible = [state for state in states if state.sizes() == sizes]
    if not possible:
        nearest = min(states, key=lambda state: len(set(state.sizes().items()) ^ set(sizes.items())))
        wrong = set(nearest.sizes().items()) ^ set(sizes.items())
        return f"no state has these names and sizes; the nearest differs by {sorted(wrong, key=str)}"
    reasons = [_why_not_bytes(found, state, states, older) for state in possible]
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
