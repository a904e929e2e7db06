"""Where the supervisor's own messages go: DEVICE/supervisor.log, or the terminal.

A storm that meets a full disk would say the same thing a thousand times a second. So each call is rate
limited as printk_ratelimited() is, by the place in the source that it is made at.

File names, process names and messages of others are in these messages: each message is one line, escaped as
for a terminal (daxemu.text). Tracebacks, and the lines of ``extra={"details": text}``, are indented, so that
none of them looks like a message.
"""

from __future__ import annotations

import logging
import sys
import threading
from types import TracebackType
from typing import Any, TextIO

from daxemu.ratelimit import Ratelimit, suppressed_line
from daxemu.text import for_people, lines_for_people

INDENT = "    "


def log_to_stderr(layout: str, level: int) -> None:
    """Have this process log to stderr: messages, and the tracebacks of exceptions that nothing catches.
    ``layout`` is a format string of logging.Formatter.
    """
    handler = RatelimitedHandler()
    handler.setFormatter(EscapingFormatter(layout))
    logging.basicConfig(level=level, handlers=[handler])
    sys.excepthook = _log_uncaught
    threading.excepthook = lambda found: _log_uncaught(
        found.exc_type, found.exc_value or found.exc_type(), found.exc_traceback
    )


def _log_uncaught(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    logging.getLogger(__name__).critical("uncaught exception", exc_info=(kind, error, trace))


class EscapingFormatter(logging.Formatter):
    """A message on one line, then its details and its traceback, indented; all of it escaped."""

    def formatMessage(self, record: logging.LogRecord) -> str:
        """See logging.Formatter.formatMessage."""
        record.message = for_people(record.message)
        details: str = getattr(record, "details", "")
        return "\n".join([super().formatMessage(record), *(_indented(details) if details else ())])

    def formatException(self, ei: Any) -> str:
        """See logging.Formatter.formatException."""
        return "\n".join(_indented(super().formatException(ei)))


def _indented(text: str) -> list[str]:
    return [INDENT + line for line in lines_for_people(text)]


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
