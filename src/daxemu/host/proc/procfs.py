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


def read_lines(path: str) -> list[str]:
    """The lines of a file. Only a newline ends one: names of other users' processes and paths may hold any
    other character that Python takes for the end of a line. A byte that is no UTF-8 is a surrogate.
    """
    return os.fsdecode(read_whole(path)).split("\n")


def read_fields(path: str) -> dict[str, str]:
    """The lines ``Name: value`` of a file such as /proc/PID/status. Of equal names the first counts: the name
    of the process comes before all that it could be taken for.
    """
    found: dict[str, str] = {}
    for line in read_lines(path):
        name, colon, value = line.partition(":")
        if colon:
            found.setdefault(name, value.strip())
    return found
