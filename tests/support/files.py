"""Files of a mount, kept open for a test."""

from __future__ import annotations

import os
from contextlib import ExitStack, suppress
from typing import Self

from tests.support.mount import DaxMount
from tests.support.scene import PAGE
from tests.support.syscalls import extent_map


class Files:
    """Open files of a mount, for reading and writing. A context manager that closes the files."""

    def __init__(self, mount: DaxMount) -> None:
        self.mount = mount
        self._stack = ExitStack()
        self._names: dict[str, int] = {}

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self._stack.close()

    def open(self, name: str, flags: int = os.O_RDWR | os.O_CREAT) -> int:
        fd = os.open(self.mount.path / name, flags, 0o644)
        self._stack.callback(_close, fd)
        self._names[name] = fd
        return fd

    def close(self, name: str) -> None:
        """Close the file opened last by this name."""
        os.close(self._names.pop(name))

    def letters(self, name: str, pages: int, first: str = "A") -> int:
        self.mount.make_file(name, pages, first)
        return self.open(name)

    def shared_by(self, name: str) -> list[tuple[int, int, int]]:
        """(first page, pages, links) of each extent, by the command line's map."""
        extents = self.mount.json("map", self.mount.path / name)["extents"]
        return [(e["offset"] // PAGE, e["length"] // PAGE, e["shared_by"]) for e in extents]


def _close(fd: int) -> None:
    with suppress(OSError):  # closed already, or the mount is gone
        os.close(fd)


def content(fd: int) -> bytes:
    """Return all bytes of a small file."""
    return os.pread(fd, 1 << 20, 0)


def is_clone(one: int, other: int) -> bool:
    """Return True if both files have the same blocks."""
    places = [[(e.offset, e.device_offset, e.length) for e in extent_map(fd)] for fd in (one, other)]
    return places[0] == places[1] != []
