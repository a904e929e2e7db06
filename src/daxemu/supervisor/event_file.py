"""DEVICE/events.jsonl: a line of each event, within a limit of bytes.

At half of the limit the file becomes ``events.jsonl.1``, in the place of an older one, and a new one begins.

Of equal events in a row ``STORM`` are written out. One line counts all further ones, an EventsRepeated that
each of them writes anew, in its place: at any time the file says how many there were.
"""

from __future__ import annotations

import errno
import os

from daxemu.events import Event, EventsRepeated, encode
from daxemu.private_path import PrivatePath
from daxemu.ratelimit import DEFAULT_BURST

STORM = DEFAULT_BURST
ROTATED = ".1"
"""What the name of a file gets at its end when another takes its place."""
_ROOM = 64
"""Bytes that the numbers of a line of equal events may grow by."""


class EventFile:
    """The open file. Precondition: the device's lock is held, so nobody else writes."""

    def __init__(self, path: PrivatePath) -> None:
        """Raises OSError if the file cannot be written to."""
        self._path = path
        self._fd: int | None = None
        self._end = 0
        self._last = b""
        self._equal = 0
        self._repeated: EventsRepeated | None = None
        self._line = (0, 0)
        self._open()

    def add(self, event: Event, key: bytes, line: bytes, limit: int) -> None:
        """Write ``line``, or count it. ``key`` is the line without number and time.

        Raises OSError if it is not in the file.
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
        """Write the line of equal events in the place of itself. It has room to grow, so a full disk does
        not spoil it.
        """
        self._open()
        start, length = self._line
        if length and start + length == self._end:
            self._write(line.ljust(length - 1) + b"\n", start)
            return
        data = line.ljust(len(line) + _ROOM) + b"\n"
        self._line = (self._append(data, limit), len(data))

    def _append(self, data: bytes, limit: int) -> int:
        """Return where the line begins."""
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
        """Open the file, or a new one. ``_end`` is its size afterwards, or where its last whole line ends."""
        if self._fd is None:
            fd = self._path.open(os.O_RDWR, create=True)
            end = os.fstat(fd).st_size
            if end and os.pread(fd, 1, end - 1) != b"\n":
                # Half a line, of a supervisor that was killed, is ended, so that it spoils no other.
                end += os.pwrite(fd, b"\n", end)
            self._fd, self._end = fd, end
        else:
            self._end = min(self._end, os.fstat(self._fd).st_size)  # somebody may have emptied it
        return self._fd

    def _write(self, data: bytes, start: int) -> None:
        fd, written = self._open(), 0
        try:
            while written < len(data):
                written += os.pwrite(fd, data[written:], start + written)
        except OSError:
            os.ftruncate(fd, start)  # no half a line
            raise
        self._end = start + len(data)

    def close(self) -> None:
        """Close the file."""
        if self._fd is not None:
            os.close(self._fd)
            self._fd = None
