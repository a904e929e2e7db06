"""Hot loops of a failure in C: victims/collect.c looks at many processes in one call, victims/deliver.c
signals many threads.

Each C loop answers for ordinary cases, and leaves all others to Python, which can do all of the work: without
the C library only speed is lost. DAXEMU_VICTIMS=python in the environment disables the C library.
docs/performance.md has the gain of each part.
"""

from __future__ import annotations

import ctypes
import importlib.machinery
import os
from pathlib import Path

from daxemu.host.c_layout import REBUILD, refusal
from daxemu.host.victims import structs

_VERSION = 2
_SWITCH = "DAXEMU_VICTIMS"


def _load() -> tuple[ctypes.CDLL | None, str | None]:
    if os.environ.get(_SWITCH) == "python":
        return None, f"{_SWITCH}=python"
    paths = (Path(__file__).with_name(f"_victims{end}") for end in importlib.machinery.EXTENSION_SUFFIXES)
    path = next((path for path in paths if path.exists()), None)
    if path is None:
        return None, "host/victims/*.c were not built: install gcc, then daxemu again"
    try:
        loaded = ctypes.CDLL(str(path), use_errno=True)
        version = ctypes.c_int.in_dll(loaded, "daxemu_victims_version").value
    except (OSError, ValueError) as error:
        return None, f"{path.name} cannot be loaded: {error}"
    if version != _VERSION:
        return None, f"{path.name} is of version {version}, not {_VERSION}: install daxemu again"
    try:
        other = refusal(loaded, "daxemu_victims_layout", *structs.SHARED)
    except ValueError as error:
        other = f"{error}: {REBUILD}"
    return (loaded, None) if other is None else (None, f"{path.name}: {other}")


_library, MISSING = _load()
"""MISSING: reason why the C library is not available; None if it is."""


def library() -> ctypes.CDLL:
    """Return the loaded library. Precondition: the library is not MISSING."""
    assert _library is not None
    return _library


def as_argument(data: bytearray) -> ctypes.Array[ctypes.c_char]:
    """Return ``data`` for C to write to; the caller keeps the result as long as C uses ``data``."""
    return (ctypes.c_char * len(data)).from_buffer(data)
