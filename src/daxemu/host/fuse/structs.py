"""Structs that the C supplement and Python share. The library exports sizes and offsets of its structs:
:mod:`supplement` refuses a library built from other sources.
"""

from __future__ import annotations

import ctypes
import struct


class RawRequest(ctypes.Structure):
    """``struct daxemu_request`` of supplement.c."""

    _fields_ = (
        ("req", ctypes.c_void_p),
        ("op", ctypes.c_uint64),
        ("tid", ctypes.c_uint64),
        ("ino", ctypes.c_uint64),
        ("fh", ctypes.c_uint64),
        ("offset", ctypes.c_int64),
        ("length", ctypes.c_int64),
        ("mode", ctypes.c_int64),
        ("target_ino", ctypes.c_uint64),
        ("target_fh", ctypes.c_uint64),
        ("target_offset", ctypes.c_int64),
        ("data", ctypes.c_void_p),
        ("data_size", ctypes.c_uint64),
        ("room", ctypes.c_uint64),
    )


class RawNote(ctypes.Structure):
    """``struct noted`` of answers.c."""

    _fields_ = (("what", ctypes.c_uint64), ("which", ctypes.c_uint64), ("value", ctypes.c_int64))


ATTR_OUT = struct.Struct("=QIIQQQQQQIIIIIIIIII")
"""``struct fuse_attr_out``: validity of the attributes (seconds, nanoseconds), then ``struct fuse_attr``."""

REQUEST_LAYOUT = (RawRequest,)
"""In the order of daxemu_request_layout in supplement.c."""
ANSWERS_LAYOUT = (RawNote, ATTR_OUT)
"""In the order of daxemu_answers_layout in answers.c."""
