"""Files of /proc, read with as few system calls as there can be: a failure reads several for each process."""

from __future__ import annotations

import os

_CHUNK = 1 << 16


def read_whole(path: str) -> bytes:
    """All of a file. Raises what open(2) and read(2) do, ProcessLookupError of a process that is gone."""
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        pieces = []
        # A file of lines is read a page at a time at the most, however much is asked for.
        while piece := os.read(fd, _CHUNK):
            pieces.append(piece)
        return b"".join(pieces)
    finally:
        os.close(fd)
