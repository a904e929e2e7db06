"""Options of a mount, and parsers of setting values.

A parser returns the value, or raises InvalidArgument with the values that are possible.
"""

from __future__ import annotations

import re

import msgspec

from daxemu.errors import InvalidArgument
from daxemu.sizes import human, parse_size

MIN_SECONDS, MAX_SECONDS = 0.01, 1e9
LOG_SIZE = 64 << 20
"""Bytes of each log of a mount (events.jsonl and supervisor.log), its rotated file included."""
MIN_LOG_SIZE, MAX_LOG_SIZE = 1 << 20, 1 << 40


class MountOptions(msgspec.Struct, frozen=True):
    """Options at the start of a mount.

    - ``repair``: the strategy, ``NAME[:key=value,...]``.
    - ``scrub_interval``: seconds; 0 for no background scrub.
    - ``layouts``: True if C may read and write healthy bytes without the filesystem (fs/layouts.py).
    - ``log_size``: bytes of each log.
    - ``direct``: True if programs under ``daxemu run`` map the media itself (docs/direct.md).
    """

    repair: str = "none"
    scrub_interval: float = 0.0
    layouts: bool = True
    log_size: int = LOG_SIZE
    direct: bool = False


PLAIN = MountOptions()


def one_of(text: str, *choices: str) -> str:
    """Return ``text``, which must be one of ``choices``. Raises InvalidArgument."""
    if text not in choices:
        raise InvalidArgument(f"must be {' or '.join(choices)}")
    return text


def seconds(text: str) -> float:
    """Parse a number of seconds; 0 is never. Raises InvalidArgument."""
    value = float(text) if re.fullmatch(r"[0-9]{1,12}(\.[0-9]{1,9})?", text) else -1.0
    if value and not MIN_SECONDS <= value <= MAX_SECONDS:
        raise InvalidArgument(f"must be seconds, {MIN_SECONDS:g} to {MAX_SECONDS:g}, or 0 for never")
    return value


def log_size(text: str) -> int:
    """Parse a size of each log, in bytes. Raises InvalidArgument."""
    try:
        value = parse_size(text)
    except InvalidArgument:
        value = -1
    if not MIN_LOG_SIZE <= value <= MAX_LOG_SIZE:
        raise InvalidArgument(f"must be a size, {human(MIN_LOG_SIZE)} to {human(MAX_LOG_SIZE)}")
    return value


def size_text(value: int) -> str:
    """Return the shortest text that :func:`log_size` parses to ``value``."""
    return human(value) if parse_size(human(value)) == value else str(value)
