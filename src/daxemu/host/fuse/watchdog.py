"""Watchdog, the last resort: a thread that cuts the FUSE connection when the event loop stands still.

A client of a server that waits for itself is unkillable (state D) until the connection is aborted. The thread
names the interrupted step, task and stack, in the log and in an event.
"""

from __future__ import annotations

import logging
import sys
import threading
import time
import traceback

import trio

from daxemu.events import Emit, LoopStalled
from daxemu.host.fuse.session import abort_connection
from daxemu.host.proc.mountinfo import Mount

log = logging.getLogger(__name__)

BEAT = 1.0
PATIENCE = 30.0


class Watchdog(trio.abc.Instrument):
    """Watchdog of one event loop. The caller runs :meth:`beat` as a trio task.

    The watching thread is a daemon thread, which never keeps the process alive. ``patience``: seconds.
    """

    def __init__(self, mount: Mount, emit: Emit, patience: float = PATIENCE) -> None:
        self._mount = mount
        self._emit = emit
        self._patience = patience
        self._last = time.monotonic()
        self._stopped = threading.Event()
        self._task: trio.lowlevel.Task | None = None
        self.cut: str | None = None
        """Reason for a cut of the connection; None without a cut."""

    def before_task_step(self, task: trio.lowlevel.Task) -> None:
        """See ``trio.abc.Instrument``."""
        self._task = task

    async def beat(self) -> None:
        """Show that the event loop runs, once a second, until cancelled."""
        watched = trio.lowlevel.current_trio_token(), threading.get_ident()
        trio.lowlevel.add_instrument(self)
        thread = threading.Thread(target=self._watch, args=watched, name="watchdog", daemon=True)
        thread.start()
        try:
            while True:
                self._last = time.monotonic()
                await trio.sleep(BEAT)
        finally:
            self._stopped.set()
            trio.lowlevel.remove_instrument(self)

    def _watch(self, loop: trio.lowlevel.TrioToken, thread: int) -> None:
        missed = 0.0
        while not self._stopped.wait(self._patience / 10):
            # Counted in rounds of this thread, not by the clock alone: in a suspended machine both threads
            # stood still.
            stale = time.monotonic() - self._last > self._patience
            missed = missed + self._patience / 10 if stale else 0.0
            if missed >= self._patience / 2:
                event = self._name_step(thread)
                loop.run_sync_soon(self._emit, event)
                abort_connection(self._mount)
                return

    def _name_step(self, thread: int) -> LoopStalled:
        """Log the current step of the event loop's thread; return the event."""
        seconds = time.monotonic() - self._last
        stack = traceback.extract_stack(sys._current_frames()[thread])
        task = self._task.name if self._task is not None else "no task"
        event = LoopStalled(task=task, step=stack[-1].name, seconds=seconds)
        self.cut = event.summary()
        log.error("%s", self.cut, extra={"details": "".join(stack.format())})
        return event
