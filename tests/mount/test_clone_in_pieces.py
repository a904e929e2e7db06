"""A clone of many extents is shared in pieces: no program sees a half clone, and a crash leaves a prefix.

Each test stops the supervisor's clone between two pieces, while the event loop goes on.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

import pytest

from daxemu.fs.pieces import PIECE_LINKS
from tests.support.quick import QuickMount
from tests.support.requests import PATIENCE, until, waiting
from tests.support.scene import PAGE
from tests.support.syscalls import ZERO_RANGE, clone_range, extent_map, fallocate

pytestmark = pytest.mark.mount
as_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root sees how many requests wait")
EXTENTS = 2 * PIECE_LINKS + 100
PIECES = EXTENTS // PIECE_LINKS + 2
"""Steps of a clone of EXTENTS extents up to the end of its first piece: steps before make room."""
SIZE = (2 * EXTENTS - 1) * PAGE

_libc = ctypes.CDLL(None)


def _sparse(path: Path, letter: bytes) -> int:
    """Make a file of EXTENTS extents of one page each, with holes between. Return a descriptor."""
    fd = os.open(path, os.O_RDWR | os.O_CREAT)
    for number in range(EXTENTS):
        os.pwrite(fd, letter * PAGE, number * 2 * PAGE)
    return fd


def _load(address: int) -> bytes:
    """Load a byte without the interpreter lock, which a page fault would keep."""
    byte = ctypes.create_string_buffer(1)
    _libc.memcpy(byte, ctypes.c_void_p(address), 1)
    return byte.raw


def _content(letter: bytes) -> bytes:
    return (letter * PAGE + bytes(PAGE)) * (EXTENTS - 1) + letter * PAGE


class Stopped:
    """A clone that stands between its first and second piece, until :meth:`go`."""

    def __init__(self, mount: QuickMount, directory: Path) -> None:
        self.mount = mount
        mount.umount()
        mount.mount("stop_between_pieces", str(directory), PIECES)
        self._directory = directory
        self.source = _sparse(mount.path / "f", b"s")
        self.target = _sparse(mount.path / "g", b"t")
        self.pool = ThreadPoolExecutor(4)

    def begin(self) -> None:
        self.cloning = self.pool.submit(clone_range, self.target, self.source)
        until((self._directory / "stopped").exists)

    def waits(self, what: Callable[[], object]) -> Future[object]:
        """Call ``what`` in a thread; assert that its request waits for the clone."""
        before = waiting(self.mount)
        called = self.pool.submit(what)
        until(lambda: called.done() or waiting(self.mount) > before)
        time.sleep(0.05)  # not enough for a request that does not wait
        assert not called.done()
        return called

    def go(self) -> None:
        (self._directory / "go").touch()
        self.cloning.result(PATIENCE)

    def close(self) -> None:
        (self._directory / "go").touch()
        self.pool.shutdown()
        for fd in (self.source, self.target):
            with suppress(OSError):
                os.close(fd)


@pytest.fixture
def stopped(quick_mount: QuickMount, tmp_path: Path) -> Iterator[Stopped]:
    made = Stopped(quick_mount, tmp_path)
    try:
        yield made
    finally:
        made.close()


@as_root
def test_nobody_sees_a_half_clone(stopped: Stopped) -> None:
    """read(2), load, write(2), truncate(2) and fallocate(2) of the target wait for the last piece."""
    source, target = stopped.source, stopped.target
    view = mmap.mmap(target, SIZE)
    last = ctypes.addressof(ctypes.c_char.from_buffer(view)) + SIZE - 1
    stopped.begin()
    read = stopped.waits(lambda: os.pread(target, SIZE, 0))
    load = stopped.waits(lambda: _load(last))
    written = stopped.waits(lambda: fallocate(target, ZERO_RANGE, SIZE - PAGE, PAGE))
    assert os.pread(source, SIZE, 0) == _content(b"s")  # the source can be read
    stopped.go()
    assert load.result(PATIENCE) in (b"s", b"\0")  # before or after the fallocate()
    written.result(PATIENCE)
    got = read.result(PATIENCE)
    assert isinstance(got, bytes)
    assert got[:-PAGE] == _content(b"s")[:-PAGE]
    assert os.pread(target, SIZE, 0) == _content(b"s")[:-PAGE] + bytes(PAGE)


@as_root
def test_the_clone_has_one_moment(stopped: Stopped) -> None:
    """Stores and writes to the source between two pieces are not in the clone, in none of the pieces."""
    source, target = stopped.source, stopped.target
    with mmap.mmap(source, SIZE) as view:
        view[0] = view[SIZE - 1] = ord("s")
        stopped.begin()
        view[0] = view[SIZE - 1] = ord("x")
        written = stopped.waits(lambda: os.pwrite(source, b"w", SIZE // 2 // PAGE * PAGE))
        synced = stopped.waits(lambda: _libc.sync_file_range(source, ctypes.c_int64(0), ctypes.c_int64(0), 7))
        stopped.go()
        written.result(PATIENCE)
        assert synced.result(PATIENCE) == 0
        assert os.pread(target, SIZE, 0) == _content(b"s")
    os.fsync(source)
    assert [os.pread(source, 1, at) for at in (0, SIZE // 2 // PAGE * PAGE, SIZE - 1)] == [b"x", b"w", b"x"]


@as_root
@pytest.mark.parametrize("which", ["source", "target"])
def test_a_truncation_comes_before_or_after(stopped: Stopped, which: str) -> None:
    fd = getattr(stopped, which)
    stopped.begin()
    cut = stopped.waits(lambda: os.ftruncate(fd, PAGE))
    stopped.go()
    cut.result(PATIENCE)
    kept = stopped.target if which == "source" else stopped.source
    assert os.pread(kept, SIZE, 0) == _content(b"s")
    assert os.pread(fd, SIZE, 0) == b"s" * PAGE


@as_root
def test_a_failure_meanwhile_counts_as_before_the_clone(stopped: Stopped) -> None:
    """Poison of the source that comes between two pieces is shared, and found in both files."""
    mount, place = stopped.mount, SIZE - PAGE
    stopped.begin()

    def inject() -> object:
        with mount.client() as client:
            return client.request("inject", ino=os.fstat(stopped.source).st_ino, ranges=[[place, PAGE]])

    injected = stopped.pool.submit(inject)
    until(lambda: bool(mount.events("PoisonInjected")))
    stopped.go()
    injected.result(PATIENCE)
    for fd in (stopped.source, stopped.target):
        with pytest.raises(OSError, match="Input/output"):
            os.pread(fd, PAGE, place)
        assert os.pread(fd, PAGE, place - 2 * PAGE) == b"s" * PAGE


@pytest.mark.parametrize("how", ["kill", "powerfail"])
def test_a_crash_leaves_a_prefix(stopped: Stopped, how: str) -> None:
    """A commit between two pieces makes a prefix of the clone durable; fsck finds nothing wrong."""
    mount = stopped.mount
    for fd in (stopped.source, stopped.target):
        os.fsync(fd)
    stopped.begin()
    other = os.open(mount.path / "other", os.O_RDWR | os.O_CREAT)
    os.fsync(other)
    with suppress(OSError):
        os.close(other)
    mount.crash(how)
    found = (mount.path / "g").read_bytes()
    shared = found.count(b"s") // PAGE
    assert 0 < shared < EXTENTS
    assert found == (_content(b"s")[: shared * 2 * PAGE] + _content(b"t")[shared * 2 * PAGE :])
    assert (mount.path / "f").read_bytes() == _content(b"s")


def test_a_file_without_a_name_gets_a_whole_clone(stopped: Stopped) -> None:
    """The target is unlinked between two pieces: the blocks are freed at the last close."""
    stopped.begin()
    (stopped.mount.path / "g").unlink()
    stopped.go()
    assert os.pread(stopped.target, SIZE, 0) == _content(b"s")
    assert len(extent_map(stopped.target)) == len(extent_map(stopped.source))
