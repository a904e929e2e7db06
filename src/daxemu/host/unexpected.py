"""Exceptions that no code expects: each costs a request or a round of a task, never the supervisor.

pyfuse3 answers FUSEError alone; any other exception leaves its main loop, and the mount ends. trio ends a
nursery with the first exception of a task. So handlers and tasks are wrapped: the exception becomes EIO or an
error reply, its traceback a message in the log, and both an event ``UnexpectedError``.
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
    """The part of ``trio.Nursery`` that starts tasks."""

    def start_soon(self, async_fn: Callable[..., Awaitable[Any]], *args: Any) -> None:
        """Start a task."""


class Unexpected:
    """Where unexpected exceptions are reported. Belongs to the trio thread."""

    def __init__(self, emit: Emit) -> None:
        self._emit = emit

    def report(self, where: str, error: Exception) -> str:
        """Log the traceback of ``error`` and emit an event; ``where``: the request or task that failed.

        Returns one line for the caller of that request. Raises nothing: a full disk is no second failure.
        """
        text = " ".join(f"{type(error).__name__}: {error}".split()).removesuffix(":")
        # As text: a traceback that is kept keeps views of the media, which then cannot be unmapped.
        log.error("%s failed", where, extra={"details": "".join(traceback.format_exception(error))})
        self._emit(UnexpectedError(where=where, error=text))
        return f"{where} failed inside the supervisor ({text}): its traceback is in {_log_name()}; report it"

    def nursery(self, inner: Nursery) -> GuardedNursery:
        """A nursery whose tasks end alone when they raise."""
        return GuardedNursery(inner, self)

    @contextmanager
    def caught(self, where: str) -> Iterator[None]:
        """Report an unexpected exception of the block and go on after it. DaxemuError is reported too."""
        try:
            yield
        except Exception as error:  # noqa: BLE001 - any exception is reported
            self.report(where, error)


class GuardedNursery:
    """A nursery: an exception of one task is reported, and neither cancels other tasks nor leaves here."""

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
    """The name of an async function, without its module."""
    return str(getattr(async_fn, "__qualname__", repr(async_fn)))


def sole(error: Exception) -> Exception:
    """The exception that a nursery wrapped in a group, if the group holds no other."""
    while isinstance(error, ExceptionGroup) and len(error.exceptions) == 1:
        error = error.exceptions[0]
    return error


def refused(error: Exception) -> DaxemuError | None:
    """The refusal that ``error`` is or wraps; None if it is unexpected."""
    found = sole(error)
    return found if isinstance(found, DaxemuError) else None


def _log_name() -> str:
    """Where this process logs to: DEVICE/supervisor.log, or the terminal of ``mount --foreground``."""
    try:
        return printable(Path("/proc/self/fd/2").readlink())
    except OSError:
        return "its log"
