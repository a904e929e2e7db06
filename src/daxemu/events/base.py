"""Base class of all events, and the words that several events share."""

from __future__ import annotations

from collections.abc import Callable
from enum import StrEnum

import msgspec

from daxemu.fields import Time


class Outcome(StrEnum):
    """``enum mf_result`` of mm/memory-failure.c."""

    IGNORED = "Ignored"
    FAILED = "Failed"
    DELAYED = "Delayed"
    RECOVERED = "Recovered"


class PageType(StrEnum):
    """``enum mf_action_page_type`` of mm/memory-failure.c, those that apply to device memory."""

    DAX = "dax page"
    PFN_MAP = "non struct page pfn"


def signalled(processes: int, signals: int) -> str:
    """Return a count for people: processes, and signals in parentheses where the numbers differ."""
    count = f"{processes} process{'' if processes == 1 else 'es'} signalled"
    return count if signals == processes else f"{count} ({signals} signals)"


class Event(msgspec.Struct, tag_field="event", kw_only=True):
    """Record of one event. ``seq`` counts from 1 in each mount; ``time`` is seconds since the epoch."""

    seq: int = 0
    time: Time = 0.0

    def dmesg(self) -> str | None:
        """Return the line that the kernel prints for this event, without a timestamp; None if the kernel
        prints none.
        """
        return None

    def printed_by(self) -> str:
        """Return the kernel function that prints the line. Precondition: ``dmesg()`` is not None."""
        raise NotImplementedError(f"{type(self).__name__} has no line")

    def summary(self) -> str:
        """Return one line for people."""
        return self.dmesg() or type(self).__name__


Emit = Callable[[Event], None]
"""Publication of an event. A layer calls the function once for each event, and gets no answer."""


def no_log(event: Event) -> None:
    """Drop an event: for a device without a log."""
