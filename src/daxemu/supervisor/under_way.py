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
    """What began and has not ended. Belongs to the trio thread."""

    def __init__(self) -> None:
        self._events: dict[trio.Event, str] = {}

    def begin(self, name: str) -> trio.Event:
        """Note that ``name`` begins. Precondition: :meth:`end` follows."""
        event = trio.Event()
        self._events[event] = name
        return event

    def end(self, event: trio.Event) -> None:
        """Note the end."""
        del self._events[event]
        event.set()

    @contextmanager
    def one(self, name: str) -> Iterator[None]:
        """The block is under way."""
        event = self.begin(name)
        try:
            yield
        finally:
            self.end(event)

    def counting(self, name: str, work: Callable[[T], Awaitable[R]]) -> Callable[[T], Awaitable[R]]:
        """Return ``work``, under way as ``name`` while it runs."""

        async def counted(argument: T) -> R:
            with self.one(name):
                return await work(argument)

        return counted

    async def settle(self, patience: float) -> Settled:
        """Wait until all that is under way now has ended, and all that began by the end of that.

        Raises Busy, with the names of the rest, after ``patience`` seconds; InvalidArgument for a negative
        ``patience``.
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
    """A nursery whose tasks are under way from their start to their end, ``but`` those of these names."""

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
