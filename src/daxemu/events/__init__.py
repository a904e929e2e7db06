"""Typed event records, their JSON form, and the kernel's log line for each.

An event reports a completed action, never a planned one. ``dmesg()`` returns the kernel's log line of an
event, or None. The type of a field declares its kind and unit (daxemu.fields).

A subclass of ``Event`` in one of these modules is an event: its class is the only place that lists it.
``any_event`` is generated (``make protocol``).

``base``      the base class and its vocabulary
``mounts``    a mount, its supervisor, the filesystem's records
``media``     poison, silent corruption, damaged files
``failures``  memory_failure(), signals, removal
``repairs``   repair strategies
``rules``     rules that fired
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Union

import msgspec

from daxemu.events.base import *  # noqa: F403
from daxemu.events.base import Event
from daxemu.events.failures import *  # noqa: F403
from daxemu.events.media import *  # noqa: F403
from daxemu.events.mounts import *  # noqa: F403
from daxemu.events.repairs import *  # noqa: F403
from daxemu.events.rules import *  # noqa: F403

EVENT_TYPES: tuple[type[Event], ...] = tuple(Event.__subclasses__())
"""Every class of events, in the order of definition."""

if TYPE_CHECKING:
    from daxemu.events.any_event import AnyEvent as AnyEvent
else:
    AnyEvent = Union[EVENT_TYPES]  # noqa: UP007

_decoder: msgspec.json.Decoder[AnyEvent] = msgspec.json.Decoder(AnyEvent)


def encode(event: Event) -> bytes:
    """Encode an event as one JSON object on one line, without the newline."""
    return msgspec.json.encode(event)


def decode(line: bytes | str) -> AnyEvent:
    """Decode the event of one line. Raises msgspec.ValidationError or msgspec.DecodeError for other text."""
    try:
        return _decoder.decode(line)
    except (UnicodeDecodeError, RecursionError) as error:
        raise msgspec.DecodeError(str(error)) from error
