"""Calls into a repair strategy, with a time limit. A strategy may be the code of a user.

A strategy runs in the event loop's thread, so a strategy that hangs would stop the mount. An alarm (SIGALRM)
raises an exception in the code of the strategy, but never within a change of the filesystem
(:meth:`Guard.atomically`).
"""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import ParamSpec, TypeVar

P = ParamSpec("P")
T = TypeVar("T")


class Hung(Exception):
    """A call exceeded its time limit. Not a DaxemuError, so that a strategy does not catch Hung as such."""


class Guard:
    """Time limit of calls, by SIGALRM. Belongs to the main thread."""

    def __init__(self) -> None:
        self._limit = 0.0
        self._running = self._changing = self._late = False
        signal.signal(signal.SIGALRM, self._on_alarm)

    def close(self) -> None:
        """Restore the default action of SIGALRM."""
        signal.signal(signal.SIGALRM, signal.SIG_DFL)

    def _on_alarm(self, number: int, frame: object) -> None:
        if self._changing:
            self._late = True
        elif self._running:
            raise Hung(f"took more than {self._limit:g} s")

    def call(self, limit: float, what: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """Call ``what`` with a time limit in seconds. Return its result.

        Raises Hung at the limit; exceptions of ``what`` propagate. A call within another call has no limit of
        its own: the limit of the outer call holds.
        """
        if self._running:
            return what(*args, **kwargs)
        self._running, self._late, self._limit = True, False, limit
        signal.setitimer(signal.ITIMER_REAL, limit)
        try:
            return what(*args, **kwargs)
        finally:
            self._running = False
            signal.setitimer(signal.ITIMER_REAL, 0)

    @contextmanager
    def atomically(self) -> Iterator[None]:
        """Defer the alarm during the context. Raises Hung at the end if the limit was exceeded."""
        outer, self._changing = self._changing, True
        try:
            yield
        finally:
            self._changing = outer
        if self._late and not outer and self._running:
            self._late = False
            raise Hung(f"took more than {self._limit:g} s")
