"""Every event of this mount: kept, appended to DEVICE/events.jsonl, and handed to whoever follows."""

from __future__ import annotations

import logging
import os
import time
from collections import deque
from collections.abc import AsyncIterator

import trio

from daxemu.errors import PermissionDenied
from daxemu.events import Event, encode
from daxemu.private_path import PrivatePath

log = logging.getLogger(__name__)

KEPT = 100_000
_BATCH = 256  # events handed to a follower at a time


class EventLog:
    """The last ``KEPT`` events in memory, all of them in the file. ``emit`` never waits for a follower."""

    def __init__(self, path: PrivatePath) -> None:
        """Raises PermissionDenied when the file cannot be written to."""
        try:
            fd = path.open(os.O_WRONLY | os.O_APPEND, create=True)
            self._file = os.fdopen(fd, "ab", buffering=0)
        except OSError as error:
            raise PermissionDenied(
                f"{path}: {error.strerror}; mount it as the user who owns {path.parent}"
            ) from error
        self._lines: deque[bytes] = deque(maxlen=KEPT)
        self._mend = b""
        self._emitted = 0
        self._more = trio.Event()

    def emit(self, event: Event) -> None:
        """Number it, date it, keep it."""
        self._emitted += 1
        event.seq = self._emitted
        event.time = time.time()
        line = encode(event)
        self._lines.append(line)
        self._append(line, event.seq)
        self._more.set()
        self._more = trio.Event()

    def _append(self, line: bytes, seq: int) -> None:
        """What happened happened: a full disk must not undo it. The file's gap shows in the numbers."""
        data = self._mend + line + b"\n"
        try:
            written = self._file.write(data)
        except OSError as error:
            log.error("event %d is not in the file: %s", seq, error.strerror)
        else:
            # Half a line is ended before the next one, so that it spoils no other.
            self._mend = b"" if written == len(data) else b"\n"

    @property
    def emitted(self) -> int:
        """How many events there were; also the last one's ``seq``."""
        return self._emitted

    async def follow(self, after: int) -> AsyncIterator[list[bytes]]:
        """The encoded events with ``seq`` above ``after``, as many at a time as have come, for ever.

        A follower who is more than ``KEPT`` events behind misses those between; the numbers show it.
        """
        while True:
            while after < self._emitted:
                oldest = self._emitted - len(self._lines)
                after = max(after, oldest)
                upto = min(self._emitted, after + _BATCH)
                lines = [self._lines[seq - oldest] for seq in range(after, upto)]
                after = upto
                yield lines
            await self._more.wait()

    def close(self) -> None:
        """Close the file."""
        self._file.close()
