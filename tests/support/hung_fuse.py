"""Foreign FUSE mount of one file, ``f``, whose server never answers a READ once the test says so.

The server is a thread of the test. A request of the test itself to the mount would hang, too: only victims
use the mount.
"""

from __future__ import annotations

import ctypes
import errno
import os
import struct
import subprocess
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from daxemu.host.proc import stat
from daxemu.uapi import PAGE_SIZE
from tests.support.actor import compile_victim

PATIENCE = 30.0
"""Seconds."""
MNT_DETACH = 2
HEADER = struct.Struct("=IIQQIIII")
_ATTR = struct.Struct("=QQQQQQIIIIIIIIII")
_FILE = 2  # nodeid

_libc = ctypes.CDLL(None, use_errno=True)


class HungFuse:
    """Server of the mount. The first ``errors`` READs fail with EIO; each later READ waits for ever."""

    def __init__(self, fd: int, errors: int) -> None:
        self._fd = fd
        self._errors = errors
        self.hanging = threading.Event()
        """Set once a READ waits."""

    def serve(self) -> None:
        """Serve until the descriptor is closed, or the mount is gone."""
        while True:
            try:
                request = os.read(self._fd, 1 << 17)
            except OSError as error:
                if error.errno in (errno.EINTR, errno.EAGAIN, errno.ENOENT):
                    continue
                return
            _, opcode, unique, nodeid, *_ = HEADER.unpack_from(request)
            found = self._answer(opcode, nodeid)
            if found is not None:
                number, data = found
                os.write(self._fd, struct.pack("=IiQ", 16 + len(data), -number, unique) + data)

    def _answer(self, opcode: int, nodeid: int) -> tuple[int, bytes] | None:
        """Return the error and the data of the answer; None for no answer."""
        match opcode:
            case 26:  # INIT
                return 0, struct.pack("=IIIIHHIIHHI28x", 7, 31, 0, 0, 0, 0, PAGE_SIZE, 1, 1, 0, 0)
            case 1:  # LOOKUP
                return 0, struct.pack("=QQQQII", _FILE, 0, 3600, 3600, 0, 0) + _attributes(_FILE)
            case 3:  # GETATTR
                return 0, struct.pack("=QII", 3600, 0, 0) + _attributes(nodeid)
            case 14:  # OPEN
                return 0, struct.pack("=QII", 0, 0, 0)
            case 15:  # READ
                if self._errors:
                    self._errors -= 1
                    return errno.EIO, b""
                self.hanging.set()
                return None
            case 2 | 36:  # FORGET, INTERRUPT
                return None
            case 18 | 25:  # RELEASE, FLUSH
                return 0, b""
        return errno.ENOSYS, b""


def _attributes(ino: int) -> bytes:
    mode = 0o100644 if ino == _FILE else 0o040755
    return _ATTR.pack(ino, PAGE_SIZE, 8, 0, 0, 0, 0, 0, 0, mode, 1, 0, 0, 0, PAGE_SIZE, 0)


@contextmanager
def hung_fuse(path: Path, errors: int = 0) -> Iterator[HungFuse]:
    """Mount a :class:`HungFuse` on the directory ``path``. The end of the block cuts the connection."""
    fd = os.open("/dev/fuse", os.O_RDWR | os.O_CLOEXEC)
    server = HungFuse(fd, errors)
    thread = threading.Thread(target=server.serve, daemon=True)
    options = f"fd={fd},rootmode=40000,user_id=0,group_id=0,allow_other".encode()
    if _libc.mount(b"hung", os.fsencode(path), b"fuse", 0, options):
        number = ctypes.get_errno()
        os.close(fd)
        raise OSError(number, f"mount on {path}: {os.strerror(number)}")
    thread.start()
    try:
        yield server
    finally:
        _abort(path)
        _libc.umount2(os.fsencode(path), MNT_DETACH)
        thread.join()
        os.close(fd)


def _abort(path: Path) -> None:
    mounts = (line.split() for line in Path("/proc/self/mountinfo").read_text().splitlines())
    minor = next(fields[2].partition(":")[2] for fields in mounts if fields[4] == str(path))
    Path(f"/sys/fs/fuse/connections/{minor}/abort").write_text("1")


@contextmanager
def stuck_victim(file: Path, page: int, other: Path, how: str) -> Iterator[int]:
    """Start a process that has a page of ``file`` present and waits for a mount on ``other``. Yield the pid.

    ``how``: "read" in read(2), "fault" in a page fault, "locked" in a page fault in which a thread holds
    mmap_lock. Only the second read of a page fault is made under mmap_lock: the first has failed.
    """
    mode = "read" if how == "read" else "fault"
    arguments = (str(page), mode, str(other / "f"))
    command: list[str | Path] = [compile_victim("waiter"), file, *arguments]
    with hung_fuse(other, errors=int(how == "locked")) as server:
        process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        try:
            assert process.stdin is not None
            assert process.stdout is not None
            assert process.stdout.readline() == "ready\n"
            assert server.hanging.wait(PATIENCE)
            if how == "locked":
                process.stdin.write("x")
                process.stdin.flush()
                wait_for_state(process.pid, "D")
            yield process.pid
        finally:
            process.kill()  # it dies once the connection is cut
    process.communicate()


def wait_for_state(pid: int, letters: str) -> None:
    """Wait until the state of a process in /proc/PID/stat is one of ``letters``."""
    deadline = time.monotonic() + PATIENCE
    while stat.read(pid).state not in letters:
        assert time.monotonic() < deadline
        time.sleep(0.001)
