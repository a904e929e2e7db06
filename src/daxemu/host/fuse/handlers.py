"""Wrappers of pyfuse3's handlers: each exception becomes the errno of an answer."""

from __future__ import annotations

import errno
import functools
from collections.abc import Callable, Coroutine, Generator, Iterable
from contextlib import closing
from typing import Any, ParamSpec, TypeVar

import trio

from daxemu.errors import DaxemuError
from daxemu.host.fuse import supplement  # noqa: F401 - before pyfuse3
from daxemu.host.unexpected import Unexpected, refused

import pyfuse3  # isort: skip  (after host.supplement, which must be loaded first)

P = ParamSpec("P")
T = TypeVar("T")


def translated(verb: Callable[P, Coroutine[Any, Any, T]]) -> Callable[P, Coroutine[Any, Any, T]]:
    """Wrap a handler: a DaxemuError becomes the errno of the system call."""

    @functools.wraps(verb)
    async def translated(*args: P.args, **kwargs: P.kwargs) -> T:
        try:
            return await verb(*args, **kwargs)
        except DaxemuError as error:
            raise pyfuse3.FUSEError(error.errno) from None

    return translated


def contained(
    name: str, verb: Callable[P, Coroutine[Any, Any, T]], unexpected: Unexpected
) -> Callable[P, Coroutine[Any, Any, T]]:
    """Wrap handler ``name``: an unexpected exception is reported, and the request gets EIO."""

    async def contained(*args: P.args, **kwargs: P.kwargs) -> T:
        try:
            return await verb(*args, **kwargs)
        except pyfuse3.FUSEError:
            raise
        except Exception as error:  # noqa: BLE001 - costs this request
            if (refusal := refused(error)) is not None:
                raise pyfuse3.FUSEError(refusal.errno) from None
            unexpected.report(f"FUSE {name}", error)
            raise pyfuse3.FUSEError(errno.EIO) from None

    return contained


async def in_pieces(steps: Iterable[object]) -> None:
    """Run ``steps``, with a checkpoint after each."""
    for _ in steps:
        await trio.lowlevel.checkpoint()


async def result_of(steps: Generator[object, None, T]) -> T:
    """Run ``steps``, with a checkpoint after each. Return the result."""
    with closing(steps):
        while True:
            try:
                next(steps)
            except StopIteration as end:
                result: T = end.value
                return result
            await trio.lowlevel.checkpoint()
