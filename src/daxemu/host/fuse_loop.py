"""pyfuse3's main loop without a turn through trio's for every request.

To trio, each request is a wait for /dev/fuse and a lock taken, both of which run everybody else first: twice
what it costs to answer most. So pyfuse3 is given a lock and a wait of ours. While requests follow one another
they are answered in a row; other tasks have their turn every BURST, or once nothing comes for LINGER.
"""

from __future__ import annotations

import select
import time
from types import SimpleNamespace, TracebackType

import trio

import daxemu.host.supplement  # noqa: F401  (must be loaded before pyfuse3)

import pyfuse3  # isort: skip

BURST = 1e-3
"""Seconds of requests after which other tasks have their turn."""
LINGER = 100e-6
"""Seconds that the event loop waits for the next request alone."""
FD_SETSIZE = 1024
"""select(2) takes descriptors below this."""


class ReadLock:
    """A lock that is free at once for who has just released it: no handing over, no turn of the loop."""

    def __init__(self) -> None:
        self._held = False
        self._lot = trio.lowlevel.ParkingLot()
        self.waiting = 0
        """Tasks that wait for it: one of them goes on reading when this one has to wait while it answers."""

    async def __aenter__(self) -> None:
        self.waiting += 1
        try:
            while self._held:
                await self._lot.park()
        finally:
            self.waiting -= 1
        self._held = True

    async def __aexit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._held = False
        self._lot.unpark()


class FuseLoop:
    """What pyfuse3's session needs of trio."""

    def __init__(self) -> None:
        self.lock = ReadLock()
        self._burst_ends = 0.0

    async def wait_readable(self, fd: int) -> None:
        """``trio.lowlevel.wait_readable``, but a request that is there or comes soon is no reason to wait."""
        # With nobody to go on reading while this task waits for something else, let one come.
        if not self.lock.waiting or time.monotonic() > self._burst_ends:
            await trio.lowlevel.checkpoint()
            self._burst_ends = time.monotonic() + BURST
        if fd >= FD_SETSIZE or not select.select((fd,), (), (), LINGER)[0]:
            await trio.lowlevel.wait_readable(fd)
            self._burst_ends = time.monotonic() + BURST

    async def main(self) -> None:
        """``pyfuse3.main()``."""
        lowlevel = SimpleNamespace(**{**vars(trio.lowlevel), "wait_readable": self.wait_readable})
        vars(pyfuse3)["trio"] = SimpleNamespace(
            **{**vars(trio), "Lock": lambda: self.lock, "lowlevel": lowlevel}
        )
        try:
            await pyfuse3.main()
        finally:
            vars(pyfuse3)["trio"] = trio
