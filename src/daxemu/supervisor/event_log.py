"""Events of a mount: numbered, kept in memory, written to DEVICE/events.jsonl, and passed to followers."""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import AsyncIterator

import trio

from daxemu.errors import PermissionDenied
from daxemu.events import Event, encode
from daxemu.private_path import PrivatePath
from daxemu.supervisor.event_file import EventFile
from daxemu.supervisor.settings import LOG_SIZE

log = logging.getLogger(__name__)

KEPT = 100_000  # events in memory
_BATCH = 256  # events handed to a follower at a time


class EventLog:
    """The last ``KEPT`` events in memory, and the last events in the file, at most ``limit`` bytes.

    ``emit`` never waits for a follower.
    """

    def __init__(self, path: PrivatePath, limit: int = LOG_SIZE) -> None:
        """Open the file. Raises PermissionDenied if the file cannot be written to."""
        try:
            self._file = EventFile(path)
        except OSError as error:
            raise PermissionDenied(
                f"{path}: {error.strerror}; mount it as the user who owns {path.parent}"
            ) from error
        self._lines: deque[bytes] = deque(maxlen=KEPT)
        self.limit = limit
        self._emitted = 0
        self._more = trio.Event()

    def emit(self, event: Event) -> None:
        """Number and date an event, keep the event, write the event to the file, and wake followers."""
        self._emitted += 1
        event.seq, event.time = 0, 0.0
        key = encode(event)
        event.seq = self._emitted
        event.time = time.time()
        line = encode(event)
        self._lines.append(line)
        self._append(event, key, line)
        self._more.set()
        self._more = trio.Event()

    def _append(self, event: Event, key: bytes, line: bytes) -> None:
        """Write an event to the file. An error, such as a full disk, is logged; the numbers show the gap."""
        try:
            self._file.add(event, key, line, self.limit)
        except OSError as error:
            log.error("event %d is not in the file: %s", event.seq, error.strerror)

    @property
    def emitted(self) -> int:
        """Number of events so far, which is the ``seq`` of the last event."""
        return self._emitted

    async def follow(self, after: int) -> AsyncIterator[list[bytes]]:
        """Yield lists of encoded events with ``seq`` above ``after``, without an end.

        A list has at most _BATCH events. A follower more than ``KEPT`` events behind misses the oldest; the
        numbers show the gap.
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
