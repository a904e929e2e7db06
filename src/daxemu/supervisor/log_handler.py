"""Messages of the supervisor to stderr: DEVICE/supervisor.log, or the terminal.

Many failures on a full disk would log the same message a thousand times a second. Therefore messages are rate
limited by the line of source code that logs them, as printk_ratelimited() does.

Messages contain file names, process names and texts of other programs. Each message is one line, escaped as
for a terminal (daxemu.text). Tracebacks, and the lines of ``extra={"details": text}``, are indented, so that
no such line looks like a message.
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
    """Log messages and tracebacks of uncaught exceptions of this process to stderr.

    ``layout``: format string of logging.Formatter. ``level``: lowest level that is logged.
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
    """Formats a message as one line, then details and traceback as indented lines. All text is escaped."""

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
    """Writes messages to stderr or ``stream``, rate limited. A later message states the number suppressed."""

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
        """See logging.Handler.close. Called by logging.shutdown at exit."""
        for limit, record in self._limits.values():
            self._say_suppressed(record, limit.release())
        self._limits.clear()
        super().close()
