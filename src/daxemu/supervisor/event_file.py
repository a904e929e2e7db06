"""DEVICE/events.jsonl: one line for each event, within a limit of bytes.

At half of the limit the file is renamed to ``events.jsonl.1``, which replaces an older file of that name, and
a new file begins.

The first ``STORM`` of equal events in a row get a line each. One further line, an EventsRepeated, counts the
rest: each further event overwrites that line with the new count, so the count in the file is always current.
"""

from __future__ import annotations

import errno
import os

from daxemu.events import Event, EventsRepeated, encode
from daxemu.private_path import PrivatePath
from daxemu.ratelimit import DEFAULT_BURST

STORM = DEFAULT_BURST
ROTATED = ".1"
"""Suffix of the name of a rotated file."""
_ROOM = 64
"""Spaces at the end of an EventsRepeated line, for longer numbers later."""


class EventFile:
    """The open file. Precondition: the device's lock is held, which excludes other writers."""

    def __init__(self, path: PrivatePath) -> None:
        """Open the file. Raises OSError if the file cannot be written to."""
        self._path = path
        self._fd: int | None = None
        self._end = 0
        self._last = b""
        self._equal = 0
        self._repeated: EventsRepeated | None = None
        self._line = (0, 0)
        self._open()

    def add(self, event: Event, key: bytes, line: bytes, limit: int) -> None:
        """Write or count an event. ``key``: ``line`` without number and time. ``limit``: bytes of both files.

        Raises OSError if the event is not in the file.
        """
        if key != self._last:
            self._last, self._equal, self._repeated = key, 0, None
        self._equal += 1
        if self._equal <= STORM:
            self._append(line + b"\n", limit)
            return
        said = self._repeated
        if said is None:
            said = self._repeated = EventsRepeated(first=event.seq, since=event.time, what=event.summary())
            self._line = (0, 0)
        said.seq, said.time = event.seq, event.time
        said.count = said.seq - said.first + 1
        self._write_again(encode(said), limit)

    def _write_again(self, line: bytes, limit: int) -> None:
        """Write the EventsRepeated line over its last version, or append the line.

        The line has _ROOM spaces at the end. An overwrite needs no new space, so a full disk does no harm.
        """
        self._open()
        start, length = self._line
        if length and start + length == self._end:
            self._write(line.ljust(length - 1) + b"\n", start)
            return
        data = line.ljust(len(line) + _ROOM) + b"\n"
        self._line = (self._append(data, limit), len(data))

    def _append(self, data: bytes, limit: int) -> int:
        """Append ``data``, and rotate before if needed. Return the offset of the line. Raises OSError."""
        if len(data) > limit // 2:
            raise OSError(errno.EFBIG, os.strerror(errno.EFBIG))
        self._open()
        if self._end + len(data) > limit // 2:
            self.close()
            self._path.rename(self._path.name + ROTATED)
            self._open()
        start = self._end
        self._write(data, start)
        return start

    def _open(self) -> int:
        """Open or make the file, unless open. Return the descriptor. ``_end``: end of the last line."""
        if self._fd is None:
            fd = self._path.open(os.O_RDWR, create=True)
            end = os.fstat(fd).st_size
            if end and os.pread(fd, 1, end - 1) != b"\n":
                # A supervisor that was killed may have left half a line: end the line before the next one.
                end += os.pwrite(fd, b"\n", end)
            self._fd, self._end = fd, end
        else:
            self._end = min(self._end, os.fstat(self._fd).st_size)  # a user may have truncated the file
        return self._fd

    def _write(self, data: bytes, start: int) -> None:
        """Write ``data`` at offset ``start``. Precondition: the file is open. Raises OSError."""
        assert self._fd is not None
        fd, written = self._fd, 0
        try:
            while written < len(data):
                written += os.pwrite(fd, data[written:], start + written)
        except OSError:
            os.ftruncate(fd, start)  # leave no half line
            raise
        self._end = start + len(data)

    def close(self) -> None:
        """Close the file."""
        if self._fd is not None:
            os.close(self._fd)
            self._fd = None
