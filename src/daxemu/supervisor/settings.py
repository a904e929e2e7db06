"""What a setting can be: each returns the value, or raises InvalidArgument that says what it must be."""

from __future__ import annotations

import re

import msgspec

from daxemu.errors import InvalidArgument
from daxemu.sizes import human, parse_size

MIN_SECONDS, MAX_SECONDS = 0.01, 1e9
LOG_SIZE = 64 << 20
"""Bytes of each log of a mount, events.jsonl and supervisor.log, with what was rotated out of it."""
MIN_LOG_SIZE, MAX_LOG_SIZE = 1 << 20, 1 << 40


class MountOptions(msgspec.Struct, frozen=True):
    """What a mount begins with: ``repair`` is a strategy, ``NAME[:key=value,...]``; ``scrub_interval``
    seconds, 0 for no background scrub; ``layouts``: whether healthy bytes may be read and written without
    asking the filesystem each time (fs/layouts.py); ``log_size``: bytes of each log.
    """

    repair: str = "none"
    scrub_interval: float = 0.0
    layouts: bool = True
    log_size: int = LOG_SIZE


PLAIN = MountOptions()


def one_of(text: str, *choices: str) -> str:
    """One of some words."""
    if text not in choices:
        raise InvalidArgument(f"must be {' or '.join(choices)}")
    return text


def seconds(text: str) -> float:
    """A time, or 0 for never."""
    value = float(text) if re.fullmatch(r"[0-9]{1,12}(\.[0-9]{1,9})?", text) else -1.0
    if value and not MIN_SECONDS <= value <= MAX_SECONDS:
        raise InvalidArgument(f"must be seconds, {MIN_SECONDS:g} to {MAX_SECONDS:g}, or 0 for never")
    return value


def log_size(text: str) -> int:
    """Bytes of each log."""
    try:
        value = parse_size(text)
    except InvalidArgument:
        value = -1
    if not MIN_LOG_SIZE <= value <= MAX_LOG_SIZE:
        raise InvalidArgument(f"must be a size, {human(MIN_LOG_SIZE)} to {human(MAX_LOG_SIZE)}")
    return value


def size_text(value: int) -> str:
    """The shortest text that ``log_size`` reads as this value."""
    return human(value) if parse_size(human(value)) == value else str(value)
