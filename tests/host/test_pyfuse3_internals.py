"""What daxemu uses of pyfuse3 and libfuse beyond their documented interfaces."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest
import trio

from daxemu.host.fuse import supplement
from daxemu.host.fuse.operations import Operations
from daxemu.host.fuse.pyfuse3_internals import (
    HANDLERS,
    LIBFUSE_VERSIONS,
    PYFUSE3_VERSIONS,
    lent_to_pyfuse3,
    libfuse_version,
)

import pyfuse3  # isort: skip  (after host.supplement, which must be loaded first)

TO_CHECK = (
    "check the list at the top of host/fuse/pyfuse3_internals.py against its source, then add the version"
)


def test_the_versions_are_those_that_were_checked() -> None:
    assert pyfuse3.__version__ in PYFUSE3_VERSIONS, f"pyfuse3 {pyfuse3.__version__} is new: {TO_CHECK}"
    first, last = LIBFUSE_VERSIONS
    found = libfuse_version()
    assert first <= found <= last, (
        f"libfuse {found[0]}.{found[1]} is new: {TO_CHECK}; and fuse_session_new() in host/fuse/supplement.c"
    )


@asynccontextmanager
async def lock() -> AsyncIterator[None]:
    yield


async def never(fd: int) -> None:
    raise AssertionError(fd)


def test_what_was_lent_is_taken_back() -> None:
    with lent_to_pyfuse3(lock(), never):
        lent = vars(pyfuse3)["trio"]
    assert lent.lowlevel.wait_readable is never
    assert lent.lowlevel.current_task is trio.lowlevel.current_task
    assert lent.sleep is trio.sleep
    assert vars(pyfuse3)["trio"] is trio


def test_every_handler_of_ours_is_one_that_pyfuse3_calls() -> None:
    ours = {name for name in vars(Operations) if not name.startswith("_")} & set(dir(pyfuse3.Operations))
    assert ours
    called_directly = {"stacktrace", "supports_dot_lookup", "enable_writeback_cache", "enable_acl", "init"}
    assert ours - called_directly <= HANDLERS


@pytest.mark.skipif(supplement.MISSING is not None, reason="supplement.c was not built")
def test_the_supplement_comes_before_libfuse() -> None:
    import ctypes

    everybody = ctypes.CDLL(None)
    ours = ctypes.cast(supplement.library().fuse_session_new, ctypes.c_void_p).value
    assert ctypes.cast(everybody.fuse_session_new, ctypes.c_void_p).value == ours
