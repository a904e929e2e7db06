"""Loads through a mapping; poison raises an exception instead of SIGBUS."""

from __future__ import annotations

import ctypes
import errno
import os

from daxemu.errors import InvalidArgument, MediaError


class _PyBuffer(ctypes.Structure):
    """``Py_buffer`` of the stable ABI (since Python 3.11)."""

    _fields_ = (
        ("buf", ctypes.c_void_p),
        ("obj", ctypes.py_object),
        ("len", ctypes.c_ssize_t),
        ("itemsize", ctypes.c_ssize_t),
        ("readonly", ctypes.c_int),
        ("ndim", ctypes.c_int),
        ("format", ctypes.c_char_p),
        ("shape", ctypes.c_void_p),
        ("strides", ctypes.c_void_p),
        ("suboffsets", ctypes.c_void_p),
        ("internal", ctypes.c_void_p),
    )


def safe_read(mapping: object, offset: int = 0, length: int | None = None) -> bytes:
    """Read bytes ``[offset, offset + length)`` of a mapping (mmap, numpy.memmap, any buffer); ``length`` None
    is to the end.

    The kernel performs the loads, through /proc/self/mem, and returns an error for poison, where a load of
    the process would get SIGBUS. No signal is sent. Raises MediaError with the offset of the first poisoned
    byte, and the bytes before as ``good``; InvalidArgument for a range outside of the mapping, TypeError for
    an object without a buffer.
    """
    view = _PyBuffer()
    ctypes.pythonapi.PyObject_GetBuffer(ctypes.py_object(mapping), ctypes.byref(view), 0)
    try:
        size = int(view.len)
        wanted = size - offset if length is None else length
        if offset < 0 or wanted < 0 or offset + wanted > size:
            raise InvalidArgument(
                f"bytes {offset}+{wanted} are not in the mapping: it has {size} bytes, from 0 on"
            )
        return _load(int(view.buf or 0) + offset, offset, wanted)
    finally:
        ctypes.pythonapi.PyBuffer_Release(ctypes.byref(view))


def _load(address: int, offset: int, length: int) -> bytes:
    good = bytearray()
    memory = os.open("/proc/self/mem", os.O_RDONLY | os.O_CLOEXEC)
    try:
        while len(good) < length:
            try:
                part = os.pread(memory, length - len(good), address + len(good))
            except OSError as error:
                if error.errno != errno.EIO:
                    raise
                lost = offset + len(good)
                raise MediaError(
                    f"byte {lost} of the mapping cannot be loaded: see daxemu damaged", good=bytes(good)
                ) from error
            good += part
    finally:
        os.close(memory)
    return bytes(good)
