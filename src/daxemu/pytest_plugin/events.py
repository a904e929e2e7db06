"""The fixture ``dax_events``."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, TypeVar

from daxemu.client import Client
from daxemu.events import Event

if TYPE_CHECKING:
    from daxemu.pytest_plugin.mount import DaxMount

E = TypeVar("E", bound=Event)

PATIENCE = 10.0


class Events:
    """What happened on a mount."""

    def __init__(self, mount: DaxMount) -> None:
        self._mount = mount

    def __call__(self, kind: type[E] = Event) -> list[E]:  # type: ignore[assignment]
        """The events so far, of one kind or all."""
        return [event for event in self._mount.events() if isinstance(event, kind)]

    def wait(self, kind: type[E], count: int = 1, *, timeout: float = PATIENCE) -> list[E]:
        """The first ``count`` events of a kind, since the mount was made, waited for. Raises TimeoutError."""
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
