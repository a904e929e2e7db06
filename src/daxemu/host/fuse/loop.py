"""pyfuse3's main loop, without a round of trio's loop for every request.

In trio, each request is a wait for /dev/fuse and an acquired lock. Both run all other tasks first, at twice
the cost of most answers. So daxemu lends pyfuse3 a lock and a wait. Consecutive requests are answered in a
row; other tasks run every BURST, or once no request comes for LINGER.
"""

from __future__ import annotations

import ctypes
import os
import select
import time
from types import TracebackType

import trio

from daxemu.host.fuse.pyfuse3_internals import lent_to_pyfuse3
from daxemu.host.fuse.supplement import READS, library

import pyfuse3  # isort: skip  (after host.supplement, which must be loaded first)

BURST = 1_000_000
"""Nanoseconds of requests after which other tasks run."""
LINGER = 100_000
"""Nanoseconds for which the event loop waits for nothing but the next request."""
SPIN = 20_000
"""Nanoseconds of LINGER without sleep, on a machine with another processor for the client."""
FD_SETSIZE = 1024
"""select(2) takes descriptors below this."""


class ReadLock:
    """Lock without handover: the last holder can take the lock again at once, without a round of the loop."""

    def __init__(self) -> None:
        self._held = False
        self._lot = trio.lowlevel.ParkingLot()
        self.waiting = 0
        """Tasks that wait for the lock: one of them reads on when the holder waits during an answer."""

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
    """Lock and wait for pyfuse3's session, in place of trio's."""

    def __init__(self) -> None:
        self.lock = ReadLock()
        # Shared with answers.c, which reads the next request itself after a request answered in C.
        if READS:
            self._burst_ends = ctypes.c_int64.in_dll(library(), "daxemu_burst_ends")
            self._is_idle = ctypes.c_int.in_dll(library(), "daxemu_is_idle")
            ctypes.c_int64.in_dll(library(), "daxemu_linger").value = LINGER
            several = len(os.sched_getaffinity(0)) > 1
            ctypes.c_int64.in_dll(library(), "daxemu_spin").value = SPIN if several else 0
        else:
            self._burst_ends, self._is_idle = ctypes.c_int64(), ctypes.c_int()
        self._burst_ends.value = 0

    def _begin_burst(self) -> None:
        self._burst_ends.value = time.monotonic_ns() + BURST

    async def wait_readable(self, fd: int) -> None:
        """``trio.lowlevel.wait_readable``, without a round of trio for a request that comes soon."""
        # No other task waits to read: let pyfuse3 start one, to read on while this task waits during an
        # answer.
        if not self.lock.waiting or time.monotonic_ns() >= self._burst_ends.value:
            await trio.lowlevel.checkpoint()
            self._begin_burst()
        if self._is_idle.value or not self._comes_soon(fd):
            self._is_idle.value = 0
            await trio.lowlevel.wait_readable(fd)
            self._begin_burst()

    def _comes_soon(self, fd: int) -> bool:
        """Return whether to read on: answers.c waits itself, and reports a wait without a request."""
        if READS:
            return True
        return fd < FD_SETSIZE and bool(select.select((fd,), (), (), LINGER / 1e9)[0])

    async def main(self) -> None:
        """Run ``pyfuse3.main()`` with this lock and this wait."""
        with lent_to_pyfuse3(self.lock, self.wait_readable):
            await pyfuse3.main()
