"""Uses of pyfuse3 and libfuse beyond the documented interfaces.

- pyfuse3 looks up ``trio`` among its own globals when ``main()`` runs: ``trio.Lock`` once, and
  ``trio.lowlevel.wait_readable`` before each read of /dev/fuse. :func:`lent_to_pyfuse3` replaces both.
- pyfuse3 calls every coroutine method of ``pyfuse3.Operations``: ``HANDLERS``.
- pyfuse3 calls ``fuse_session_new()`` through the dynamic linker, and libfuse exports that name as a
  function: supplement.c takes the call first. From libfuse 3.17 on, the name is a macro over a versioned
  function.
"""

from __future__ import annotations

import ctypes
import inspect
from collections.abc import Awaitable, Callable, Iterator
from contextlib import AbstractAsyncContextManager, contextmanager
from types import SimpleNamespace

import trio

from daxemu.host.fuse import supplement  # noqa: F401 - before pyfuse3

import pyfuse3  # isort: skip  (after host.supplement, which must be loaded first)

PYFUSE3_VERSIONS = ("3.5.0",)
"""Releases of pyfuse3 for which the list above was checked."""
LIBFUSE_VERSIONS = ((3, 10), (3, 16))
"""First and last release of libfuse for which the list above was checked."""

HANDLERS = frozenset(
    name for name, verb in vars(pyfuse3.Operations).items() if inspect.iscoroutinefunction(verb)
)
"""Names of the handlers that pyfuse3 may call."""


def libfuse_version() -> tuple[int, int]:
    """Return the release of the loaded libfuse (major, minor). Raises OSError if none can be loaded."""
    number: int = ctypes.CDLL("libfuse3.so.3").fuse_version()
    # 35 in libfuse 3.5, 310 in libfuse 3.10
    return (number // 100, number % 100) if number >= 100 else (number // 10, number % 10)


@contextmanager
def lent_to_pyfuse3(
    lock: AbstractAsyncContextManager[None], wait_readable: Callable[[int], Awaitable[None]]
) -> Iterator[None]:
    """Have ``pyfuse3.main()`` take this lock and this wait for a descriptor instead of trio's."""
    real = vars(pyfuse3)["trio"]
    lowlevel = SimpleNamespace(**{**vars(trio.lowlevel), "wait_readable": wait_readable})
    vars(pyfuse3)["trio"] = SimpleNamespace(**{**vars(trio), "Lock": lambda: lock, "lowlevel": lowlevel})
    try:
        yield
    finally:
        vars(pyfuse3)["trio"] = real
