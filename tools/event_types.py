"""The union of all events for type checkers: python -m tools.event_types > src/daxemu/events/any_event.py"""

from __future__ import annotations

from collections.abc import Iterable
from itertools import groupby

from daxemu.events import EVENT_TYPES, Event


def module() -> str:
    """Return the text of the module."""
    lines = [
        '"""The union of all events, for type checkers. Made by `make protocol` of the classes."""',
        "",
        "from __future__ import annotations",
        "",
    ]
    for name, events in groupby(EVENT_TYPES, key=lambda event: event.__module__):
        lines += [f"from {name} import (", *(f"    {event}," for event in _sorted(events)), ")"]
    lines += ["", "AnyEvent = (", "    " + "\n    | ".join(_sorted(EVENT_TYPES)), ")"]
    return "\n".join(lines) + "\n"


def _sorted(events: Iterable[type[Event]]) -> list[str]:
    return sorted(event.__name__ for event in events)


if __name__ == "__main__":
    print(module(), end="")
