"""Progress of a newly chosen repair strategy: a line on the terminal while the command waits."""

from __future__ import annotations

import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

from daxemu.cli.common import human
from daxemu.cli.output import complain, rewrite
from daxemu.client import Client
from daxemu.errors import DaxemuError

INTERVAL = 0.5
"""Seconds between two requests for the progress."""


def describe(done_bytes: int, total_bytes: int) -> str:
    """Return the progress as text: percent and sizes."""
    return f"{100 * done_bytes // max(1, total_bytes)} % ({human(done_bytes)} of {human(total_bytes)})"


@contextmanager
def line(strategy: str) -> Iterator[Line]:
    """Show a line of progress on standard error, if standard error is a terminal. The line is erased at the
    end.
    """
    shown = Line(strategy)
    try:
        yield shown
    finally:
        shown.clear()


class Line:
    """Line on the terminal; each update overwrites the line."""

    def __init__(self, strategy: str) -> None:
        self._strategy = strategy
        self._there = False

    def __call__(self, done: int, total: int) -> None:
        if sys.stderr.isatty():
            rewrite(f"{self._strategy}: {describe(done, total)}")
            self._there = True

    def clear(self) -> None:
        """Erase the line."""
        if self._there:
            rewrite("")


def choose(client: Client, strategy: str | None, op: str, /, **arguments: Any) -> dict[str, Any]:
    """Send a request that chooses ``strategy``, and show the progress. After Ctrl-C, print that the
    supervisor goes on, and raise KeyboardInterrupt.
    """
    if strategy is None:
        return client.request(op, **arguments)
    stop = threading.Event()
    with line(strategy) as show:
        looking = threading.Thread(target=_look, args=(client, show, stop), daemon=True)
        if sys.stderr.isatty():
            looking.start()
        try:
            return client.request(op, **arguments)
        except KeyboardInterrupt:
            where = client.mount.mountpoint
            show.clear()
            complain(
                f"daxemu: the supervisor goes on with {strategy}: see daxemu status {where}; "
                f"daxemu repair {where} --strategy none ends it"
            )
            raise
        finally:
            stop.set()
            if looking.is_alive():
                looking.join()


def _look(client: Client, show: Line, stop: threading.Event) -> None:
    with suppress(DaxemuError), Client(client.mount, patience=5.0) as other:
        while not stop.wait(INTERVAL):
            progress = other.request("status")["repair"].get("progress")
            if progress is not None and not stop.is_set():
                show(progress["done_bytes"], progress["total_bytes"])
