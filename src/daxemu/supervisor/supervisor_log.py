"""DEVICE/supervisor.log: output of the supervisor and its children to stderr, within a limit of bytes.

Near half of the limit the file is renamed to ``supervisor.log.1``, which replaces an older file of that name,
and stderr goes to a new file. In the foreground stderr is the terminal, and no file is rotated.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from contextlib import suppress

from daxemu.private_path import PrivatePath
from daxemu.supervisor.event_file import ROTATED

log = logging.getLogger(__name__)

MARGIN = 64 << 10
"""Bytes below half of the limit at which the file is rotated: room for one message with a traceback."""


class SupervisorLog(logging.Handler):
    """Checks the size of the file after each message. ``limit`` returns the current limit in bytes."""

    def __init__(self, path: PrivatePath, limit: Callable[[], int]) -> None:
        super().__init__()
        self._path = path
        self._limit = limit
        self._outputs = [fd for fd in (1, 2) if self._goes_there(fd)]

    def _goes_there(self, fd: int) -> bool:
        try:
            return os.path.samestat(os.fstat(fd), self._path.lstat())
        except OSError:
            return False

    def attach(self) -> None:
        """Check from now on. Rotates at once if an earlier mount left a large file."""
        logging.getLogger().addHandler(self)
        self._rotate_in_time()

    def detach(self) -> None:
        """End the checks."""
        logging.getLogger().removeHandler(self)

    def emit(self, record: logging.LogRecord) -> None:
        """See logging.Handler.emit."""
        if record.name != __name__:
            self._rotate_in_time()

    def _rotate_in_time(self) -> None:
        try:
            if self._outputs and os.fstat(self._outputs[0]).st_size > self._limit() // 2 - MARGIN:
                self._rotate()
        except OSError as error:
            log.error("%s cannot be rotated: %s", self._path, error.strerror)

    def _rotate(self) -> None:
        with suppress(FileNotFoundError):  # renamed already, by a rotation that failed afterwards
            self._path.rename(self._path.name + ROTATED)
        fd = self._path.make(os.O_WRONLY | os.O_APPEND)
        try:
            for output in self._outputs:
                os.dup2(fd, output)
        finally:
            os.close(fd)
