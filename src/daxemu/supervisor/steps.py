"""Steps of failures, for traces. Without a trace nothing is recorded."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from daxemu.mm.incident import Incident
from daxemu.trace_record import StepTrace

Sink = Callable[[StepTrace], None]


class Steps:
    """Passes the steps of failures to the traces. Belongs to the trio thread."""

    def __init__(self) -> None:
        self._sinks: list[Sink] = []
        self._numbers = 0

    def add(self, sink: Sink) -> None:
        """Pass each step that ends from now on to ``sink``."""
        self._sinks.append(sink)

    def remove(self, sink: Sink) -> None:
        """Pass no further step to ``sink``."""
        self._sinks.remove(sink)

    def next_number(self) -> int:
        """Return the number of a new failure."""
        self._numbers += 1
        return self._numbers

    def took(self, incident: Incident, number: int, step: str, began: float, what: str = "") -> None:
        """Record a step of failure ``number`` from ``began`` (seconds since the epoch) to now."""
        self.lasted(incident, number, step, began, time.time(), what)

    def lasted(
        self, incident: Incident, number: int, step: str, began: float, ended: float, what: str = ""
    ) -> None:
        """Record a step of failure ``number`` from ``began`` to ``ended``, seconds since the epoch."""
        for sink in tuple(self._sinks):
            sink(StepTrace(began, ended - began, number, step, incident.pfn, incident.nr_pages, what))


class Stopwatch:
    """Beginning and end of each step of a worker thread."""

    def __init__(self) -> None:
        self.steps: list[tuple[str, float, float]] = []

    @contextmanager
    def timed(self, step: str) -> Iterator[None]:
        """Time the context."""
        began = time.time()
        try:
            yield
        finally:
            self.steps.append((step, began, time.time()))
