"""The background scrub: an address range scrub every so often, as firmware and ``nfit``'s do.

Poison is an interval set: a scrub costs what is poison, whatever the size of the device.
"""

from __future__ import annotations

import math
from collections.abc import Awaitable, Callable

import trio


class Scrubber:
    """Calls ``scrub`` each time ``interval`` seconds are over; 0 is never. Belongs to the trio thread."""

    def __init__(self, scrub: Callable[[], Awaitable[object]]) -> None:
        self._scrub = scrub
        self._changed = trio.Event()
        self._stopped = False
        self.interval = 0.0
        self.scrubs = 0
        """How many there were."""

    def set(self, interval: float) -> None:
        """Scrub at this interval from now on."""
        self.interval = interval
        self._wake()

    def stop(self) -> None:
        """No more scrubs, for there is nothing left to scrub."""
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
