"""The background scrub: an address range scrub at an interval, as firmware and ``nfit`` do.

Poison is an interval set: the cost of a scrub grows with the number of poisoned ranges, not with the device.
"""

from __future__ import annotations

import math
from collections.abc import Awaitable, Callable

import trio


class Scrubber:
    """Calls ``scrub`` every ``interval`` seconds; 0 is never. Belongs to the trio thread."""

    def __init__(self, scrub: Callable[[], Awaitable[object]]) -> None:
        self._scrub = scrub
        self._changed = trio.Event()
        self._stopped = False
        self.interval = 0.0
        self.scrubs = 0
        """Number of scrubs so far."""

    def set(self, interval: float) -> None:
        """Scrub every ``interval`` seconds from now on."""
        self.interval = interval
        self._wake()

    def stop(self) -> None:
        """End :meth:`run`: the device is being removed."""
        self._stopped = True
        self._wake()

    def _wake(self) -> None:
        self._changed.set()
        self._changed = trio.Event()

    async def run(self) -> None:
        """Scrub until :meth:`stop`."""
        while not self._stopped:
            with trio.move_on_after(self.interval or math.inf) as wait:
                await self._changed.wait()
            if wait.cancelled_caught and not self._stopped:
                await self._scrub()
                self.scrubs += 1
