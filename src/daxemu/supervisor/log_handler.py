"""Where the supervisor's own messages go: DEVICE/supervisor.log, or the terminal.

A storm that meets a full disk would say the same thing a thousand times a second. So each call is rate
limited as printk_ratelimited() is, by the place in the source that it is made at.
"""

from __future__ import annotations

import logging
from typing import TextIO

from daxemu.ratelimit import Ratelimit, suppressed_line


class RatelimitedHandler(logging.StreamHandler[TextIO]):
    """To stderr, or ``stream``; what was suppressed is counted, and said afterwards."""

    def __init__(self, stream: TextIO | None = None) -> None:
        super().__init__(stream)
        self._limits: dict[tuple[str, int], tuple[Ratelimit, logging.LogRecord]] = {}

    def emit(self, record: logging.LogRecord) -> None:
        """See logging.Handler.emit."""
        limit, _ = self._limits.setdefault((record.pathname, record.lineno), (Ratelimit(), record))
        go_ahead, missed = limit.ratelimit(record.created)
        self._say_suppressed(record, missed)
        if go_ahead:
            super().emit(record)

    def _say_suppressed(self, like: logging.LogRecord, missed: int) -> None:
        if missed:
            line = suppressed_line(like.funcName or like.module, missed)
            super().emit(
                logging.LogRecord(like.name, logging.WARNING, like.pathname, like.lineno, line, (), None)
            )

    def close(self) -> None:
        """See logging.Handler.close; at exit, by logging.shutdown."""
        for limit, record in self._limits.values():
            self._say_suppressed(record, limit.release())
        self._limits.clear()
        super().close()
