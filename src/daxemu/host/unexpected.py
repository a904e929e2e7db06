"""Unexpected exceptions: each costs a request or a round of a task, never the supervisor.

pyfuse3 answers FUSEError alone; any other exception leaves pyfuse3's main loop, and the mount ends. trio ends
a nursery with the first exception of a task. So handlers and tasks are wrapped: the request gets EIO or an
error reply, the log gets the traceback, and the event ``UnexpectedError`` is emitted.
"""

from __future__ import annotations

import logging
import traceback
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

from daxemu.errors import DaxemuError
from daxemu.events import Emit, UnexpectedError
from daxemu.host.proc.mountinfo import printable

log = logging.getLogger(__name__)


class Nursery(Protocol):
    """Start of tasks, as in ``trio.Nursery``."""

    def start_soon(self, async_fn: Callable[..., Awaitable[Any]], *args: Any) -> None:
        """Start a task."""


class Unexpected:
    """Reports unexpected exceptions. Belongs to the trio thread."""

    def __init__(self, emit: Emit) -> None:
        self._emit = emit

    def report(self, where: str, error: Exception) -> str:
        """Log the traceback of ``error`` and emit an event; ``where``: the failed request or task.

        Return one line for the caller of the request. Raises nothing: a full disk is no second failure.
        """
        text = " ".join(f"{type(error).__name__}: {error}".split()).removesuffix(":")
        # As text: a traceback object would keep views of the media alive, and the media could not be
        # unmapped.
        log.error("%s failed", where, extra={"details": "".join(traceback.format_exception(error))})
        self._emit(UnexpectedError(where=where, error=text))
        return f"{where} failed inside the supervisor ({text}): its traceback is in {_log_name()}; report it"

    def nursery(self, inner: Nursery) -> GuardedNursery:
        """Return a nursery in which an exception of a task ends that task alone."""
        return GuardedNursery(inner, self)

    @contextmanager
    def caught(self, where: str) -> Iterator[None]:
        """Report an exception of the block and go on after the block. DaxemuError is reported too."""
        try:
            yield
        except Exception as error:  # noqa: BLE001 - any exception is reported
            self.report(where, error)


class GuardedNursery:
    """Nursery: an exception of a task is reported, cancels no other task and does not leave the nursery."""

    def __init__(self, inner: Nursery, unexpected: Unexpected) -> None:
        self._inner = inner
        self._unexpected = unexpected

    def start_soon(self, async_fn: Callable[..., Awaitable[Any]], *args: Any) -> None:
        """See ``trio.Nursery.start_soon``."""
        self._inner.start_soon(self._run, async_fn, *args)

    async def _run(self, async_fn: Callable[..., Awaitable[Any]], *args: Any) -> None:
        with self._unexpected.caught(f"task {task_name(async_fn)}"):
            await async_fn(*args)


def task_name(async_fn: Callable[..., Awaitable[Any]]) -> str:
    """Return the name of an async function, without its module."""
    return str(getattr(async_fn, "__qualname__", repr(async_fn)))


def sole(error: Exception) -> Exception:
    """Return the sole exception in the groups of a nursery; ``error`` itself if no group holds just one."""
    while isinstance(error, ExceptionGroup) and len(error.exceptions) == 1:
        error = error.exceptions[0]
    return error


def refused(error: Exception) -> DaxemuError | None:
    """Return the DaxemuError that ``error`` is or wraps; None for an unexpected exception."""
    found = sole(error)
    return found if isinstance(found, DaxemuError) else None


def _log_name() -> str:
    """Return the log of this process: DEVICE/supervisor.log, or the terminal of ``mount --foreground``."""
    try:
        return printable(Path("/proc/self/fd/2").readlink())
    except OSError:
        return "its log"
