"""Calls into a strategy that anybody may have written: bounded in time, whatever they raise.

A strategy runs on the event loop's thread, so one that hangs would hold up everything. An alarm ends it with
an exception in its own code; never in the middle of a change to the filesystem, which it makes
``atomically``.
"""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import ParamSpec, TypeVar

P = ParamSpec("P")
T = TypeVar("T")


class Hung(Exception):
    """It took too long. No DaxemuError: the strategy is not to take it for one."""


class Guard:
    """Belongs to the main thread, and to SIGALRM."""

    def __init__(self) -> None:
        self._limit = 0.0
        self._running = self._changing = self._late = False
        signal.signal(signal.SIGALRM, self._on_alarm)

    def close(self) -> None:
        """Give SIGALRM back."""
        signal.signal(signal.SIGALRM, signal.SIG_DFL)

    def _on_alarm(self, number: int, frame: object) -> None:
        if self._changing:
            self._late = True
        elif self._running:
            raise Hung(f"took more than {self._limit:g} s")

    def call(self, limit: float, what: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """Call it; it has ``limit`` seconds. Raises Hung, and what it raises. A call from within another is
        part of that.
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
        """No alarm within; one that was due comes at the end. Raises Hung then."""
        outer, self._changing = self._changing, True
        try:
            yield
        finally:
            self._changing = outer
        if self._late and not outer and self._running:
            self._late = False
            raise Hung(f"took more than {self._limit:g} s")
