"""Failures and signals that are under way, for the request ``settle``."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import trio

from daxemu.errors import Busy, InvalidArgument
from daxemu.host.unexpected import Nursery, task_name
from daxemu.protocol import Settled

T = TypeVar("T")
R = TypeVar("R")


class UnderWay:
    """Work that began and has not ended, by name. Belongs to the trio thread."""

    def __init__(self) -> None:
        self._events: dict[trio.Event, str] = {}

    def begin(self, name: str) -> trio.Event:
        """Note that work ``name`` begins. The caller must pass the returned event to :meth:`end`."""
        event = trio.Event()
        self._events[event] = name
        return event

    def end(self, event: trio.Event) -> None:
        """Note the end of the work that :meth:`begin` returned ``event`` for."""
        del self._events[event]
        event.set()

    @contextmanager
    def one(self, name: str) -> Iterator[None]:
        """Count the context as under way, by ``name``."""
        event = self.begin(name)
        try:
            yield
        finally:
            self.end(event)

    def counting(self, name: str, work: Callable[[T], Awaitable[R]]) -> Callable[[T], Awaitable[R]]:
        """Return a function that calls ``work``, and counts the call as under way by ``name``."""

        async def counted(argument: T) -> R:
            with self.one(name):
                return await work(argument)

        return counted

    async def settle(self, patience: float) -> Settled:
        """Wait until no work is under way. Work that begins during the wait is waited for, too.

        Raises Busy after ``patience`` seconds, with the names of the remaining work. Raises InvalidArgument
        for a negative ``patience``.
        """
        if not patience >= 0:
            raise InvalidArgument(f"{patience:g} seconds of patience: give 0 or more")
        began = time.monotonic()
        with trio.move_on_after(patience):
            while self._events:
                await next(iter(self._events)).wait()
            return Settled(time.monotonic() - began)
        left = ", ".join(f"{count} x {name}" for name, count in Counter(self._events.values()).items())
        raise Busy(f"not settled within {patience:g} s: {left}; wait longer, or see daxemu log")


class Counted:
    """Nursery whose tasks count as under way from start to end. Tasks with a name in ``but`` do not count."""

    def __init__(self, inner: Nursery, under_way: UnderWay, but: tuple[str, ...] = ()) -> None:
        self._inner = inner
        self._under_way = under_way
        self._but = but

    def start_soon(self, async_fn: Callable[..., Awaitable[Any]], *args: Any) -> None:
        """See ``trio.Nursery.start_soon``."""
        if task_name(async_fn) in self._but:
            self._inner.start_soon(async_fn, *args)
        else:
            event = self._under_way.begin(task_name(async_fn))
            self._inner.start_soon(self._run, event, async_fn, *args)

    async def _run(self, event: trio.Event, async_fn: Callable[..., Awaitable[Any]], *args: Any) -> None:
        try:
            await async_fn(*args)
        finally:
            self._under_way.end(event)
