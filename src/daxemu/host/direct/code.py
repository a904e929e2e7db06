"""Code of the agent, from the C library of agent.c, whose layouts are those of Python. Only x86_64."""

from __future__ import annotations

import ctypes
import importlib.machinery
import platform
from functools import cache
from pathlib import Path

from daxemu.errors import Unsupported
from daxemu.host.c_layout import REBUILD, refusal
from daxemu.host.direct import structs

MEMORY = 7 * 4096
"""Bytes of memory that an agent needs beside its code: redirect.h has the places."""

WILL = 24576
"""Byte of the memory with the will: start and length of each mapping outside the zone, then zeros."""

CALLS_IN_BATCH = 128
"""Most system calls of one packet; agent.c has room for as many. Even: a guard and its call stay together."""

BATCH = 4096
"""Byte of the memory with the calls of a packet."""


@cache
def library() -> ctypes.CDLL:
    """Return the loaded library. Raises Unsupported if it was not built, or built from other sources."""
    paths = (Path(__file__).with_name(f"_agent{end}") for end in importlib.machinery.EXTENSION_SUFFIXES)
    path = next((path for path in paths if path.exists()), None)
    if path is None:
        raise Unsupported("host/direct/agent.c was not built: install gcc, then daxemu again")
    try:
        loaded = ctypes.CDLL(str(path))
        other = refusal(loaded, "daxemu_userfaultfd_layout", *structs.SHARED)
        number = ctypes.c_uint32
        count = number.in_dll(loaded, "daxemu_userfaultfd_numbers").value
        numbers = list((number * (1 + count)).in_dll(loaded, "daxemu_userfaultfd_numbers"))[1:]
    except (OSError, ValueError) as error:
        raise Unsupported(f"{path.name} cannot be loaded: {error}") from None
    if other is None and numbers != list(structs.NUMBERS):
        other = f"numbers of userfaultfd requests differ: {REBUILD}"
    if other is not None:
        raise Unsupported(f"{path.name}: {other}")
    return loaded


@cache
def agent_code() -> bytes:
    """Return the code of an agent: position-independent, at most 4096 bytes. Raises Unsupported."""
    if platform.machine() != "x86_64":
        raise Unsupported(f"direct mappings need x86_64: this machine is {platform.machine()}")
    length = ctypes.c_size_t()
    get = library().daxemu_agent_code
    get.restype = ctypes.c_void_p
    return ctypes.string_at(get(ctypes.byref(length)), length.value)
