"""Bursts of events: a wait for the next event, without a step of the event loop while events come soon.

A thread that stores to one page after another makes an event some 20 us after the last answer. A step of the
event loop takes longer.
"""

from __future__ import annotations

import select
import time

import trio

LENGTH = 1_000_000
"""Nanoseconds of a burst after which other tasks run."""
LINGER = 50e-6
"""Seconds for which a burst waits for the next event alone."""
FD_SETSIZE = 1024
"""select(2) takes descriptors below this."""


class Burst:
    """Wait of one task for one descriptor."""

    def __init__(self) -> None:
        self._ends = 0

    async def readable(self, fd: int) -> None:
        """Wait until a descriptor is readable. Raises ClosedResourceError."""
        if fd < FD_SETSIZE and time.monotonic_ns() < self._ends and select.select((fd,), (), (), LINGER)[0]:
            return
        await trio.lowlevel.wait_readable(fd)
        self._ends = time.monotonic_ns() + LENGTH

    def end(self) -> None:
        """Let other tasks run before the next event: an answer is theirs."""
        self._ends = 0
