"""The observers of a mount: rules and traces. While there is none, no operation is wrapped."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from daxemu.host.mappings import Mappings
from daxemu.host.observer import Observer, Operation
from daxemu.uapi import Ino


class Observation:
    """Passes each operation to every observer, in the order of :meth:`add`. Belongs to the trio thread."""

    def __init__(self, observe: Sequence[Callable[[Observer | None], None]], mappings: Mappings) -> None:
        """``observe``: functions that begin (an observer) or end (None) the observation of requests.
        ``mappings`` observes page faults.
        """
        self._observe = observe
        self._mappings = mappings
        self._observers: list[Observer] = []

    async def add(self, observer: Observer) -> None:
        """Tell ``observer`` about each operation that begins from now on."""
        self._observers.append(observer)
        if len(self._observers) == 1:
            self._switch(self)
        await self.changed()

    async def changed(self) -> None:
        """Note that an observer wants other files."""
        await self._mappings.observe(self if self._observers else None)

    async def remove(self, observer: Observer) -> None:
        """Tell ``observer`` about no further operation."""
        self._observers.remove(observer)
        if not self._observers:
            self._switch(None)
        await self.changed()

    def _switch(self, observer: Observer | None) -> None:
        for observe in self._observe:
            observe(observer)

    def wants(self, ino: Ino) -> bool:
        """See Observer."""
        return any(observer.wants(ino) for observer in self._observers)

    async def before(self, operation: Operation) -> None:
        """See Observer."""
        for observer in tuple(self._observers):
            await observer.before(operation)

    async def after(self, operation: Operation, seconds: float, error: int) -> None:
        """See Observer."""
        for observer in tuple(self._observers):
            await observer.after(operation, seconds, error)
