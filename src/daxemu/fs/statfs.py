"""What a filesystem says of itself: how full it is, and what it lost."""

from __future__ import annotations

from typing import NamedTuple

from daxemu.uapi import Ino


class Damage(NamedTuple):
    """Bytes ``[offset, offset + length)`` of a file that cannot be read."""

    ino: Ino
    path: str
    offset: int
    length: int


class StatFs(NamedTuple):
    """``struct statfs``, in blocks of 4096 bytes."""

    blocks: int
    free: int
    available: int
    files: int
    name_max: int
