"""Fixture ``dax_events``."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, TypeVar

from daxemu.client import Client
from daxemu.events import Event, SignalSent
from daxemu.text import for_people

if TYPE_CHECKING:
    from daxemu.pytest_plugin.mount import DaxMount

E = TypeVar("E", bound=Event)

PATIENCE = 10.0


class Events:
    """Events of a mount."""

    def __init__(self, mount: DaxMount) -> None:
        self._mount = mount

    def __call__(self, kind: type[E] = Event) -> list[E]:  # type: ignore[assignment]
        """Return the events so far, of one kind or of all kinds."""
        return [event for event in self._mount.events() if isinstance(event, kind)]

    def settle(self, *, timeout: float = PATIENCE) -> None:
        """Wait until each failure so far was handled and each of its signals is in an event. Raises Busy."""
        if self._mount.where() is not None:
            with Client.at(self._mount.path, patience=timeout) as client:
                client.settle(timeout)

    def exactly(self, count: int, kind: type[E] = SignalSent) -> list[E]:  # type: ignore[assignment]
        """Settle, and return the events of a kind. Raises AssertionError if their number is not ``count``."""
        self.settle()
        found = self(kind)
        if len(found) != count:
            lines = [
                f"{len(found)} events {kind.__name__}, expected {count}",
                *(for_people(e.summary()) for e in found),
            ]
            raise AssertionError("\n".join(lines))
        return found

    def none(self, kind: type[Event] = SignalSent) -> None:
        """Settle. Raises AssertionError if an event of the kind exists; the default kind is SignalSent."""
        self.exactly(0, kind)

    def wait(self, kind: type[E], count: int = 1, *, timeout: float = PATIENCE) -> list[E]:
        """Wait for the first ``count`` events of a kind since the mount was made, and return these. Raises
        TimeoutError after ``timeout`` seconds.
        """
        found: list[E] = []
        deadline = time.monotonic() + timeout
        with Client.at(self._mount.path, patience=timeout) as client:
            events = client.events(kinds=[kind])
            while len(found) < count:
                client.set_patience(max(0.001, deadline - time.monotonic()))
                try:
                    event = next(events)
                except (TimeoutError, StopIteration) as error:
                    raise TimeoutError(
                        f"{len(found)} of {count} events {kind.__name__} came within {timeout:g} s"
                    ) from error
                assert isinstance(event, kind)
                found.append(event)
        return found
