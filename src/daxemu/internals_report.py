"""The reply of the request ``internals``: what the supervisor does and waits for."""

from __future__ import annotations

import msgspec


class InternalsReport(msgspec.Struct):
    """State of the supervisor, one line an entry, for people: the text of entries may change. ``layouts``:
    number of files with a layout out.
    """

    tasks: list[str]
    turns: list[str]
    """Failures that are under way."""
    held: list[str]
    """Requests that wait for the invalidate lock. Of a direct mount: page faults, and runs of daxemu run."""
    armed: list[str]
    """Threads that the tracer has a request for."""
    layouts: int

    def lines(self) -> list[str]:
        """Return the report as text for people."""
        lines = []
        for title in ("tasks", "turns", "held", "armed"):
            entries: list[str] = getattr(self, title)
            lines += [f"{title}: {len(entries)}", *(f"  {entry}" for entry in entries)]
        return [*lines, f"layouts out: {self.layouts} files"]
