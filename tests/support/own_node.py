"""Mount namespace in which every user may open /dev/fuse, whatever the mode of the machine's node."""

from __future__ import annotations

import ctypes
import os
import stat
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.support.elsewhere import NOBODY

FUSE = Path("/dev/fuse")
CONNECTIONS = Path("/sys/fs/fuse/connections")
CLONE_NEWNS = 0x0002_0000
MS_BIND, MS_REC, MS_PRIVATE = 1 << 12, 1 << 14, 1 << 18
MNT_DETACH = 2
THREAD = "/proc/thread-self/ns/mnt"
PATIENCE = 30.0
"""Time limit in seconds for the end of threads."""

_libc = ctypes.CDLL(None, use_errno=True)


@contextmanager
def fuse_for_everybody() -> Iterator[None]:
    """Run the block, and the processes it starts, in a mount namespace with a /dev/fuse of mode 0666.

    The machine's own node stays as it is. Skips the test, with the reason, where ordinary users cannot open
    the node and no node can be made. Precondition: the main thread.
    """
    outside = os.open(THREAD, os.O_RDONLY | os.O_CLOEXEC)
    here = os.open(".", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        refused = _enter()
        try:
            _require_node(refused)
            yield
        finally:
            if Path(THREAD).readlink() != Path(f"/proc/self/fd/{outside}").readlink():
                _leave(outside)
                os.fchdir(here)  # setns(2) moves the thread to the root directory
    finally:
        os.close(here)
        os.close(outside)


def _leave(outside: int) -> None:
    """Return to a mount namespace. EINVAL while a thread that was started inside is alive."""
    deadline = time.monotonic() + PATIENCE
    while True:
        try:
            return _check(_libc.setns(outside, CLONE_NEWNS), "setns")
        except OSError:
            if time.monotonic() > deadline:
                raise
        time.sleep(0.01)


def _enter() -> str:
    """Enter a new namespace and cover the node; the reason if that is impossible, else nothing."""
    try:
        _check(_libc.unshare(CLONE_NEWNS), "unshare")
        _mount("none", Path("/"), None, MS_REC | MS_PRIVATE)
        _cover_node()
        if not os.path.ismount(CONNECTIONS):
            _mount("none", CONNECTIONS, "fusectl", 0)
    except OSError as error:
        return str(error)
    return ""


def _cover_node() -> None:
    with tempfile.TemporaryDirectory() as scratch:
        _mount("none", Path(scratch), "tmpfs", 0)  # not nodev, as the filesystem of /tmp may be
        try:
            node = Path(scratch, "fuse")
            os.mknod(node, stat.S_IFCHR, os.makedev(10, 229))
            node.chmod(0o666)
            _mount(str(node), FUSE, None, MS_BIND)
        finally:
            _check(_libc.umount2(os.fsencode(scratch), MNT_DETACH), "umount2")


def _require_node(refused: str) -> None:
    done = subprocess.run([*NOBODY, "sh", "-c", f": <> {FUSE}"], capture_output=True, text=True, cwd="/")
    if done.returncode:
        pytest.skip(f"ordinary users cannot open {FUSE}: {refused or done.stderr.strip()}")


def _mount(source: str, target: Path, kind: str | None, flags: int) -> None:
    name = None if kind is None else kind.encode()
    _check(_libc.mount(source.encode(), os.fsencode(target), name, flags, None), f"mount on {target}")


def _check(result: int, call: str) -> None:
    if result:
        number = ctypes.get_errno()
        raise OSError(number, f"{call}: {os.strerror(number)}")
