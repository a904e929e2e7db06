"""Files of /proc, read with as few system calls as possible: a failure reads several for each process."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator

GONE = (FileNotFoundError, ProcessLookupError, PermissionError)
"""Errors for a dead process, and for a process that the caller may not look into."""
_CHUNK = 1 << 16  # bytes


def read_whole(path: str) -> bytes:
    """Return the content of a file. Raises OSError of open(2) and read(2): ProcessLookupError for an end of
    the process after open(2).
    """
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        pieces = []
        # One read(2) of a file of lines returns at most a page, also for a larger buffer.
        while piece := os.read(fd, _CHUNK):
            pieces.append(piece)
        return b"".join(pieces)
    finally:
        os.close(fd)


def read_lines(path: str) -> list[str]:
    """Return the lines of a file. Only a newline ends a line: names of other users' processes and paths may
    hold any other line end of Python. A byte outside UTF-8 becomes a surrogate.
    """
    return os.fsdecode(read_whole(path)).split("\n")


def pids() -> Iterator[int]:
    """Yield the ids of the processes that /proc shows, in no order."""
    return (int(name) for name in os.listdir("/proc") if name.isdigit())


def cut_short(name: str) -> ProcessLookupError:
    """Return the error for a text of /proc/PID/``name`` that lacks its end: the process counts as gone."""
    return ProcessLookupError(errno.ESRCH, f"/proc/PID/{name} is cut short")
