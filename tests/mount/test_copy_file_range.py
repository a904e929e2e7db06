"""copy_file_range(2) and cp on a real mount: which blocks are shared, which bytes are copied, which calls are
refused.
"""

from __future__ import annotations

import errno
import mmap
import os
import subprocess
from collections.abc import Iterator

import pytest

from tests.support.files import Files, content, is_clone
from tests.support.quick import QuickMount
from tests.support.scene import PAGE, Scene, ar, consumes, letter

pytestmark = pytest.mark.mount

BAD = 40


@pytest.fixture
def dax_mount(quick_mount: QuickMount) -> QuickMount:
    return quick_mount


@pytest.fixture
def files(quick_mount: QuickMount) -> Iterator[Files]:
    with Files(quick_mount) as made:
        yield made


def test_an_aligned_copy_is_shared(files: Files) -> None:
    one, two = files.letters("one", 8), files.open("two")
    free = os.statvfs(files.mount.path).f_bavail
    assert os.copy_file_range(one, two, 4 * PAGE, 2 * PAGE, 0) == 4 * PAGE
    assert content(two) == content(one)[2 * PAGE : 6 * PAGE]
    assert files.shared_by("two") == [(0, 4, 2)]
    assert files.shared_by("one") == [(0, 2, 1), (2, 4, 2), (6, 2, 1)]
    assert os.statvfs(files.mount.path).f_bavail == free
    assert os.fstat(two).st_blocks == 32
    os.pwrite(two, b"w", PAGE)
    os.pwrite(one, b"v", 2 * PAGE)
    assert content(two)[: 2 * PAGE] == b"C" * PAGE + b"w" + b"D" * (PAGE - 1)
    assert content(one)[2 * PAGE : 4 * PAGE] == b"v" + b"C" * (PAGE - 1) + b"D" * PAGE


@pytest.mark.parametrize(
    ("source", "target", "length"),
    [(100, 0, PAGE), (0, 100, PAGE), (PAGE, PAGE, 100), (10, 10, 5000), (PAGE + 1, 3, 4 * PAGE)],
)
def test_an_unaligned_copy_has_the_right_bytes(files: Files, source: int, target: int, length: int) -> None:
    one, two = files.letters("one", 8), files.letters("two", 8, "M")
    expected = bytearray(content(two))
    expected[target : target + length] = content(one)[source : source + length]
    done = 0
    while done < length:
        done += os.copy_file_range(one, two, length - done, source + done, target + done)
    assert content(two) == bytes(expected)
    assert content(one) == b"".join(bytes([65 + i]) * PAGE for i in range(8))


def test_the_partial_last_block(files: Files) -> None:
    """A partial last block is shared where the block becomes the target's end, and copied where the target
    goes on.
    """
    one, two, long = files.open("one"), files.open("two"), files.letters("long", 4, "M")
    os.write(one, b"x" * (PAGE + 100))
    assert os.copy_file_range(one, two, 1 << 30, 0, 0) == PAGE + 100
    assert is_clone(one, two)
    assert os.fstat(two).st_size == PAGE + 100
    done = 0
    while got := os.copy_file_range(one, long, 1 << 20, done, done):
        done += got
    assert content(long) == b"x" * (PAGE + 100) + content(long)[PAGE + 100 :]
    assert content(long)[PAGE + 100 :] == b"N" * (PAGE - 100) + b"O" * PAGE + b"P" * PAGE


def test_within_one_file(files: Files) -> None:
    fd = files.letters("f", 8)
    assert os.copy_file_range(fd, fd, 2 * PAGE, 0, 4 * PAGE) == 2 * PAGE
    assert content(fd) == b"".join(c * PAGE for c in (b"A", b"B", b"C", b"D", b"A", b"B", b"G", b"H"))
    with pytest.raises(OSError, match=os.strerror(errno.EINVAL)):
        os.copy_file_range(fd, fd, 2 * PAGE, 0, PAGE)


def test_the_end_and_bad_descriptors(files: Files) -> None:
    one, two = files.letters("one", 2), files.open("two")
    assert os.copy_file_range(one, two, PAGE, 2 * PAGE, 0) == 0
    assert os.copy_file_range(one, two, PAGE, 1 << 40, 0) == 0
    reader, writer = files.open("one", os.O_RDONLY), files.open("two", os.O_WRONLY)
    appender = files.open("two", os.O_WRONLY | os.O_APPEND)
    for source, target in ((one, reader), (writer, two), (one, appender)):
        with pytest.raises(OSError, match=os.strerror(errno.EBADF)):
            os.copy_file_range(source, target, PAGE, 0, 0)
    assert content(two) == b""


def test_dirty_pages_of_both_files(files: Files) -> None:
    """Stores through a mapping of the source are copied; stale pages of the target are revoked."""
    if files.mount.is_direct:
        pytest.skip("maps in the process of the test, which is not under daxemu run")
    one, two = files.letters("one", 4), files.letters("two", 4, "M")
    with mmap.mmap(one, 4 * PAGE) as source, mmap.mmap(two, 4 * PAGE) as target:
        source[PAGE], target[PAGE], target[3 * PAGE] = ord("s"), ord("t"), ord("u")
        assert os.copy_file_range(one, two, 2 * PAGE, 0, 0) == 2 * PAGE
        assert target[: 2 * PAGE] == b"A" * PAGE + b"s" + b"B" * (PAGE - 1)
        assert target[3 * PAGE] == ord("u")
        target[0] = ord("w")
        assert source[0] == ord("A")
    os.fsync(two)
    assert content(two) == (
        b"w" + b"A" * (PAGE - 1) + b"s" + b"B" * (PAGE - 1) + b"O" * PAGE + b"u" + b"P" * (PAGE - 1)
    )
    assert content(one)[: 2 * PAGE] == b"A" * PAGE + b"s" + b"B" * (PAGE - 1)


def test_over_poison(scene: Scene) -> None:
    """A clone shares poison. A copy of poisoned bytes fails."""
    scene.poison(BAD)
    path = scene.mount.path
    with (path / "f").open("rb") as source, (path / "g").open("w+b", buffering=0) as target:
        assert os.copy_file_range(source.fileno(), target.fileno(), 128 * PAGE, 0, 0) == 128 * PAGE
        assert is_clone(source.fileno(), target.fileno())
        assert os.pread(target.fileno(), PAGE, (BAD - 1) * PAGE) == letter(BAD - 1).encode() * PAGE
        with pytest.raises(OSError, match=os.strerror(errno.EIO)):
            os.pread(target.fileno(), PAGE, BAD * PAGE)
        with pytest.raises(OSError, match=os.strerror(errno.EIO)):
            os.copy_file_range(source.fileno(), target.fileno(), PAGE, BAD * PAGE + 100, 300 * PAGE)
    assert scene.damaged() == [("/f", BAD * PAGE, PAGE), ("/g", BAD * PAGE, PAGE)]
    consumes(scene.mapper(file="g"), f"tr 0 {BAD}", ar(BAD))


# -- cp


def test_cp_makes_a_reflink(files: Files) -> None:
    one = files.letters("one", 200)
    subprocess.run(["cp", files.mount.path / "one", files.mount.path / "two"], check=True, timeout=30)
    assert is_clone(one, files.open("two"))
    assert files.shared_by("two") == [(0, 200, 2)]


@pytest.mark.parametrize("option", ["--sparse=always", "--sparse=auto", "--sparse=never", "--reflink=auto"])
def test_cp_of_a_sparse_file(files: Files, option: str) -> None:
    one = files.open("one")
    os.pwrite(one, b"x" * 5000, 10 * PAGE)
    os.pwrite(one, bytes(64 * PAGE), 20 * PAGE)
    os.pwrite(one, b"y", 200 * PAGE)
    os.ftruncate(one, 300 * PAGE + 7)
    subprocess.run(["cp", option, files.mount.path / "one", files.mount.path / "two"], check=True, timeout=30)
    two = files.open("two")
    assert os.pread(two, 1 << 21, 0) == os.pread(one, 1 << 21, 0)
    if option == "--sparse=always":
        assert os.fstat(two).st_blocks <= 3 * 8 * 16
    elif option != "--sparse=never":
        assert os.fstat(two).st_blocks <= os.fstat(one).st_blocks
