"""Healthy bytes are read and written without Python, with the same results."""

from __future__ import annotations

import errno
import mmap
import os
import re
import struct
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.elsewhere import NOBODY
from tests.support.mount import DAXEMU, PATIENCE
from tests.support.quick import QuickMount
from tests.support.scene import PAGE

pytestmark = [
    pytest.mark.mount,
    pytest.mark.skipif("DAXEMU_LAYOUTS" in os.environ, reason="DAXEMU_LAYOUTS says who has layouts"),
]

PAGES = 64


@pytest.fixture
def file(quick_mount: QuickMount) -> Iterator[int]:
    """File whose requests C answers: page n is full of byte n."""
    fd = os.open(quick_mount.path / "f", os.O_RDWR | os.O_CREAT, 0o644)
    try:
        os.write(fd, b"".join(bytes([n]) * PAGE for n in range(PAGES)))
        cold_read(fd, 0)
        before = answered(quick_mount)
        assert cold_read(fd, 7) == bytes([7]) * PAGE
        os.pwrite(fd, b"x", 9 * PAGE)
        assert answered(quick_mount) >= before + 2
        os.pwrite(fd, bytes([9]), 9 * PAGE)
        yield fd
    finally:
        os.close(fd)


def answered(mount: QuickMount) -> int:
    """Return the number of requests answered in C so far."""
    with mount.client() as client:
        said = client.request("status")["layouts"]
    found = re.fullmatch(r"(\d+) requests answered", said)
    assert found, said
    return int(found[1])


def cold_read(fd: int, page: int, length: int = PAGE) -> bytes:
    """Read bytes outside of the kernel's cache."""
    os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
    return os.pread(fd, length, page * PAGE)


def test_poison_is_met_by_reads_and_writes(quick_mount: QuickMount, file: int) -> None:
    quick_mount.inject("f", (7 * PAGE, 1))
    with pytest.raises(OSError, match=rf"\[Errno {errno.EIO}\]"):
        cold_read(file, 7)
    with pytest.raises(OSError, match=rf"\[Errno {errno.EFAULT}\]"):
        os.pwrite(file, b"x", 7 * PAGE)
    assert cold_read(file, 6) == bytes([6]) * PAGE
    assert os.pwrite(file, b"y" * PAGE, 7 * PAGE) == PAGE
    assert cold_read(file, 7) == b"y" * PAGE
    before = answered(quick_mount)
    assert cold_read(file, 7) == b"y" * PAGE
    assert answered(quick_mount) > before


def test_latent_poison_is_met_too(quick_mount: QuickMount, file: int) -> None:
    quick_mount.inject("f", (7 * PAGE, 1), latent=True)
    with pytest.raises(OSError, match=rf"\[Errno {errno.EIO}\]"):
        cold_read(file, 7)


def test_a_clone_keeps_the_bytes_of_its_moment(quick_mount: QuickMount, file: int) -> None:
    quick_mount.run("reflink", quick_mount.path / "f", quick_mount.path / "clone")
    assert cold_read(file, 7) == bytes([7]) * PAGE
    os.pwrite(file, b"new" * 100, 7 * PAGE)
    clone = os.open(quick_mount.path / "clone", os.O_RDWR)
    try:
        assert cold_read(clone, 7) == bytes([7]) * PAGE
        os.pwrite(clone, b"other", 8 * PAGE)
        assert cold_read(file, 8) == bytes([8]) * PAGE
        assert cold_read(file, 7)[:300] == b"new" * 100
    finally:
        os.close(clone)


def test_a_shorter_file_ends_earlier(quick_mount: QuickMount, file: int) -> None:
    os.ftruncate(file, 7 * PAGE + 10)
    assert cold_read(file, 7) == bytes([7]) * 10
    os.ftruncate(file, 9 * PAGE)
    assert cold_read(file, 7, 2 * PAGE) == (bytes([7]) * 10).ljust(2 * PAGE, b"\0")


def test_a_hole_reads_as_zeros(file: int) -> None:
    subprocess.run(
        ["fallocate", "-p", "-o", str(7 * PAGE), "-l", str(PAGE), f"/proc/self/fd/{file}"],
        pass_fds=[file],
        check=True,
        timeout=PATIENCE,
    )
    assert cold_read(file, 6, 3 * PAGE) == bytes([6]) * PAGE + bytes(PAGE) + bytes([8]) * PAGE


def test_times_are_those_of_the_last_write(file: int) -> None:
    for write in (lambda: os.pwrite(file, b"x", 0), lambda: store(file, 3)):
        time.sleep(0.01)
        before = time.time_ns()
        write()
        status = os.fstat(file)
        # The kernel's own clock may lag by a tick.
        assert before - 10**7 <= status.st_mtime_ns == status.st_ctime_ns <= time.time_ns()


def store(fd: int, page: int) -> None:
    """A store through a mapping, written back."""
    with mmap.mmap(fd, PAGES * PAGE) as mapping:
        mapping[page * PAGE] = 0xFF
        mapping.flush()


def test_written_data_survives_a_remount(quick_mount: QuickMount, file: int) -> None:
    os.pwrite(file, b"a" * (40 * PAGE), 3 * PAGE)
    os.pwrite(file, b"b" * 10, 50 * PAGE + 5)
    times = os.fstat(file).st_mtime_ns
    os.close(file)
    quick_mount.remount()
    found = (quick_mount.path / "f").read_bytes()
    assert (found[3 * PAGE : 43 * PAGE], found[50 * PAGE + 5 :][:10]) == (b"a" * (40 * PAGE), b"b" * 10)
    assert (quick_mount.path / "f").stat().st_mtime_ns == times
    os.open(quick_mount.path / "f", os.O_RDONLY)  # for the fixture to close


def test_appends_within_a_block(quick_mount: QuickMount) -> None:
    path = quick_mount.path / "log"
    with path.open("ab", buffering=0) as log:
        for number in range(2000):
            log.write(b"%06d\n" % number)
            if number % 100 == 0:
                assert path.stat().st_size == 7 * (number + 1)
    assert answered(quick_mount) > 1900
    expected = b"".join(b"%06d\n" % number for number in range(2000))
    assert path.read_bytes() == expected
    fd = os.open(path, os.O_RDWR)
    try:
        os.fsync(fd)
        quick_mount.crash("powerfail")
    finally:
        os.close(fd)
    assert path.read_bytes() == expected


def test_attributes_are_those_of_now(quick_mount: QuickMount) -> None:
    top = quick_mount.path
    for number in range(20):
        (top / f"d{number}").mkdir()
        assert top.stat().st_nlink == 3 + number
    assert (top / "d7").stat().st_nlink == 2
    (top / "f").write_bytes(b"x" * 5000)
    assert ((top / "f").stat().st_size, (top / "f").stat().st_blocks) == (5000, 16)
    os.link(top / "f", top / "g")
    assert (top / "f").stat().st_nlink == 2
    (top / "g").chmod(0o600)
    assert (top / "f").stat().st_mode & 0o777 == 0o600


def test_the_space_of_a_removed_file_is_there_again(quick_mount: QuickMount) -> None:
    free = os.statvfs(quick_mount.path).f_bfree
    for _ in range(50):
        (quick_mount.path / "f").write_bytes(b"x" * (1 << 20))
        (quick_mount.path / "f").unlink()
    assert os.statvfs(quick_mount.path).f_bfree >= free - 64  # the metadata may have grown


@pytest.mark.parametrize("how", ["write", "truncate", "open", "fallocate", "copy"])
@pytest.mark.parametrize("who", ["root", "nobody"])
def test_set_id_bits(quick_mount: QuickMount, how: str, who: str) -> None:
    """A write without CAP_FSETID clears the set-id bits, as on any filesystem."""
    path = quick_mount.path / "f"
    quick_mount.path.chmod(0o777)
    path.write_bytes(b"x" * 2 * PAGE)
    (quick_mount.path / "other").write_bytes(b"y" * 2 * PAGE)
    (quick_mount.path / "other").chmod(0o644)
    script = {
        "write": "printf x | dd of=f conv=notrunc status=none",
        "truncate": "truncate -s 1 f",
        "open": ": > f",
        "fallocate": f"fallocate -l {4 * PAGE} f",
        "copy": "cp --reflink=auto other f",
    }[how]
    path.chmod(0o6777)
    assert path.stat().st_mode & 0o7777 == 0o6777
    subprocess.run(
        [*(NOBODY if who == "nobody" else ()), "sh", "-c", script],
        cwd=quick_mount.path,
        check=True,
        timeout=PATIENCE,
    )
    assert path.stat().st_mode & 0o7777 == (0o6777 if who == "root" else 0o777)


def test_capabilities_go_with_the_first_write(quick_mount: QuickMount) -> None:
    """The kernel asks for security.capability before each write(2); C answers most of these requests."""
    path, name = quick_mount.path / "f", "security.capability"
    capability = struct.pack("<IIIII", 0x0200_0001, 1 << 13, 0, 0, 0)  # VFS_CAP_REVISION_2, CAP_NET_RAW
    with path.open("wb", buffering=0) as file:
        for _ in range(3):
            file.write(b"x" * PAGE)
            os.setxattr(path, name, capability)
            assert os.getxattr(path, name) == capability
            file.write(b"y" * 10)
            with pytest.raises(OSError, match=rf"\[Errno {errno.ENODATA}\]"):
                os.getxattr(path, name)


def test_a_strategy_sees_everything(quick_mount: QuickMount, file: int) -> None:
    quick_mount.run("repair", quick_mount.path, "--strategy", "mirror")
    before = answered(quick_mount)
    assert cold_read(file, 7) == bytes([7]) * PAGE
    os.pwrite(file, b"x", 9 * PAGE)
    assert answered(quick_mount) == before
    quick_mount.run("repair", quick_mount.path, "--strategy", "none")
    cold_read(file, 7)
    cold_read(file, 8)
    assert answered(quick_mount) > before


def test_without_layouts(quick_mount: QuickMount) -> None:
    quick_mount.umount()
    mount = subprocess.run(
        [*DAXEMU, "mount", "--no-layouts", quick_mount.device, quick_mount.path],
        capture_output=True,
        text=True,
        timeout=PATIENCE,
    )
    assert mount.returncode == 0, mount.stderr
    path = Path(quick_mount.path, "f")
    path.write_bytes(b"x" * 100_000)
    assert path.read_bytes() == b"x" * 100_000
    assert quick_mount.json("status", quick_mount.path)["layouts"] == "off"
