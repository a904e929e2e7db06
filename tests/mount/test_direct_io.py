"""O_DIRECT beside the page cache."""

from __future__ import annotations

import ctypes
import itertools
import mmap
import os
import platform
import struct
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from tests.support.quick import QuickMount

pytestmark = pytest.mark.mount

SIZE = 1 << 16
ROUNDS = 200
# asm/unistd.h: io_setup, io_submit, io_getevents
CALLS = {"x86_64": (206, 209, 208), "aarch64": (0, 2, 4)}
IOCB = struct.Struct("=QIIHhIQQqQII")  # linux/aio_abi.h: struct iocb
PWRITE, EVENT_SIZE = 1, 32

_libc = ctypes.CDLL(None, use_errno=True)
_libc.syscall.restype = ctypes.c_long


class AsyncWriter:
    """io_submit(2) of one O_DIRECT write after another; each is waited for with io_getevents(2)."""

    def __init__(self, fd: int) -> None:
        self._fd = fd
        self._setup, self._submit, self._getevents = CALLS[platform.machine()]
        self._context = ctypes.c_ulong(0)
        assert _libc.syscall(self._setup, 1, ctypes.byref(self._context)) == 0
        self._buffer = mmap.mmap(-1, SIZE)
        self._address = ctypes.addressof(ctypes.c_char.from_buffer(self._buffer))

    def write(self, byte: bytes) -> None:
        """Write the whole file."""
        self._buffer[:] = byte * SIZE
        raw = IOCB.pack(0, 0, 0, PWRITE, 0, self._fd, self._address, SIZE, 0, 0, 0, 0)
        iocb = ctypes.create_string_buffer(raw, len(raw))
        iocbs = (ctypes.c_void_p * 1)(ctypes.addressof(iocb))
        events = ctypes.create_string_buffer(EVENT_SIZE)
        assert _libc.syscall(self._submit, self._context, ctypes.c_long(1), iocbs) == 1
        one = ctypes.c_long(1)
        assert _libc.syscall(self._getevents, self._context, one, one, events, None) == 1
        assert struct.unpack("=QQqq", events.raw)[2] == SIZE


@contextmanager
def reader(path: os.PathLike[str]) -> Iterator[None]:
    """Process that reads the file through the page cache, again and again."""
    code = f"import os, sys\nfd = os.open(sys.argv[1], 0)\nprint()\nwhile os.pread(fd, {SIZE}, 0): pass"
    process = subprocess.Popen([sys.executable, "-u", "-c", code, path], stdout=subprocess.PIPE)
    try:
        assert process.stdout is not None
        process.stdout.readline()
        yield
        assert process.poll() is None
    finally:
        process.kill()
        process.communicate()


@pytest.mark.skipif(platform.machine() not in CALLS, reason="knows io_submit of x86_64 and aarch64 only")
def test_an_asynchronous_write_is_seen_by_every_later_read(quick_mount: QuickMount) -> None:
    """A read during the write must not leave the old bytes in the page cache."""
    path = quick_mount.path / "aio"
    path.write_bytes(b"." * SIZE)
    fd = os.open(path, os.O_RDWR | os.O_DIRECT)
    cached = os.open(path, os.O_RDONLY)
    try:
        writer = AsyncWriter(fd)
        with reader(path):
            for byte in itertools.islice(itertools.cycle([b"a", b"b"]), ROUNDS):
                writer.write(byte)
                assert os.pread(cached, SIZE, 0) == byte * SIZE
    finally:
        os.close(cached)
        os.close(fd)
