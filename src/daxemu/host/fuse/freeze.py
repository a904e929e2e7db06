"""Freeze: holds accesses to the mount back while its device is removed (freeze_super() in
xfs_dax_notify_failure_freeze()).

Between the collection of victims and the shutdown of the filesystem, a process outside the collection must
gain no page, and a collected process must lose none. So requests of collected processes are served from the
media: a victim asleep in a page fault could not take a signal. All other requests wait for the thaw.

A waiting request has its folio locked, and may hold the mmap_lock of its process. The collection can wait for
either lock. So each request is served after PATIENCE, even if the removal is still in progress.
"""

from __future__ import annotations

from collections.abc import Iterable

import trio

from daxemu.host.proc.processes import process_of
from daxemu.mm.to_kill import Task

PATIENCE = 1.0
"""Seconds for which a request is held at most."""
MOST_HELD = 32
"""Requests held at the same time; pyfuse3 has tasks for 99. Any others are served at once."""


class Freeze:
    """Freeze of one removal. Belongs to the trio thread."""

    def __init__(self) -> None:
        self._admitted: set[int] = set()
        self._is_thawed = False
        self._changed = trio.Event()
        self.held = 0
        """Number of requests held just now."""

    def admit(self, tasks: Iterable[Task]) -> None:
        """Serve all requests of these processes from now on, held requests first."""
        self._admitted = {task.pid for task in tasks}
        self._wake()

    def thaw(self) -> None:
        """Let every request go on."""
        self._is_thawed = True
        self._wake()

    def _wake(self) -> None:
        self._changed.set()
        self._changed = trio.Event()

    async def wait(self, tid: int) -> None:
        """Wait until a request of thread ``tid`` may be answered; 0 is an unknown thread."""
        if self.held >= MOST_HELD:
            return
        pid = process_of(tid) if tid else 0
        self.held += 1
        try:
            with trio.move_on_after(PATIENCE):
                while not self._is_thawed and pid not in self._admitted:
                    await self._changed.wait()
        finally:
            self.held -= 1
