"""The last resort: a thread that cuts the FUSE connection when the event loop stands still.

Whoever waits for a server that waits for itself is unkillable (state D) until somebody aborts the connection;
this is somebody who is always there.
"""

from __future__ import annotations

import threading
import time

import trio

from daxemu.host.mountinfo import Mount
from daxemu.host.session import abort_connection

BEAT = 1.0
PATIENCE = 30.0


class Watchdog:
    """Run :meth:`beat` as a trio task. The thread it starts is a daemon: it never keeps the process alive."""

    def __init__(self, mount: Mount, patience: float = PATIENCE) -> None:
        self._mount = mount
        self._patience = patience
        self._last = time.monotonic()
        self._stopped = threading.Event()

    async def beat(self) -> None:
        """Show that the event loop runs, once a second, until cancelled."""
        thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)
        thread.start()
        try:
            while True:
                self._last = time.monotonic()
                await trio.sleep(BEAT)
        finally:
            self._stopped.set()

    def _watch(self) -> None:
        missed = 0.0
        while not self._stopped.wait(self._patience / 10):
            # Counted in our own turns, not by the clock alone: a machine that was suspended has stood still
            # as a whole.
            stale = time.monotonic() - self._last > self._patience
            missed = missed + self._patience / 10 if stale else 0.0
            if missed >= self._patience / 2:
                abort_connection(self._mount)
                return
