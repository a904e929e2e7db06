"""``daxemu mount --direct``, not under ``daxemu run``: read(2), write(2), refused mappings, other modes."""

from __future__ import annotations

import errno
import mmap
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from daxemu.pmem.backing import data_runs, has_data
from daxemu.ranges import Range
from tests.support.mount import DaxMount, dax_mount_at

pytestmark = pytest.mark.mount

PAGE = 4096


@pytest.fixture
def direct(tmp_path: Path) -> Iterator[DaxMount]:
    with dax_mount_at(tmp_path, "64M", mount=False) as made:
        made.mount("--direct")
        yield made


@pytest.fixture
def path(direct: DaxMount) -> Path:
    """A file of eight pages A to H."""
    return direct.make_file("f", 8)


@contextmanager
def opened(path: Path, flags: int = os.O_RDWR) -> Iterator[int]:
    fd = os.open(path, flags)
    try:
        yield fd
    finally:
        os.close(fd)


def device_offset(mount: DaxMount, path: Path, page: int) -> int:
    """Return the offset in the media of a page of a file."""
    for extent in mount.json("map", path)["extents"]:
        if extent["offset"] <= page * PAGE < extent["offset"] + extent["length"]:
            return int(extent["device_offset"] + page * PAGE - extent["offset"])
    raise AssertionError("a hole")


@contextmanager
def media_of(mount: DaxMount) -> Iterator[mmap.mmap]:
    """Map the media, as programs under ``daxemu run`` do."""
    with open(mount.device / "media", "r+b") as file, mmap.mmap(file.fileno(), 0) as media:
        yield media


def in_media(mount: DaxMount, at: int) -> bool:
    with open(mount.device / "media", "rb") as file:
        return has_data(file.fileno(), Range(at, at + PAGE))


def refusal(call: Callable[..., object], *arguments: object) -> int:
    """Return the errno of a call that must fail."""
    with pytest.raises(OSError, match=r"\[Errno \d+\]") as error:
        call(*arguments)
    assert error.value.errno is not None
    return error.value.errno


def test_the_mode_is_told(direct: DaxMount) -> None:
    assert direct.json("status", direct.path)["mode"] == "direct"
    assert "direct, of programs under daxemu run" in direct.run("status", direct.path)
    assert direct.events("Mounted")[-1]["mode"] == "direct"
    direct.umount()
    direct.mount()
    assert direct.json("status", direct.path)["mode"] == "page cache"
    assert direct.events("Mounted")[-1].get("mode", "page cache") == "page cache"


def test_doctor_says_whether_direct_mappings_are_possible(direct: DaxMount) -> None:
    (found,) = [line for line in direct.json("doctor")["findings"] if line["subject"] == "direct mappings"]
    assert found["verdict"] == "ok"


def test_a_shared_mapping_is_refused_and_a_private_mapping_works(path: Path) -> None:
    with opened(path) as fd:
        for flags in (mmap.MAP_SHARED, 0x03 | 0x80000):  # MAP_SHARED_VALIDATE | MAP_SYNC
            assert refusal(mmap.mmap, fd, PAGE, flags) in (errno.ENODEV, errno.EOPNOTSUPP)
        with mmap.mmap(fd, 2 * PAGE, mmap.MAP_PRIVATE) as private:
            assert private[PAGE : PAGE + 2] == b"BB"
            private[0:1] = b"x"
        assert os.pread(fd, 1, 0) == b"A"


def test_a_shared_mapping_of_a_new_file_is_refused_too(direct: DaxMount) -> None:
    with opened(direct.path / "new", os.O_RDWR | os.O_CREAT) as fd:
        os.ftruncate(fd, PAGE)
        assert refusal(mmap.mmap, fd, PAGE) == errno.ENODEV


def test_a_program_on_the_mount_can_be_executed(direct: DaxMount) -> None:
    program = direct.path / "true"
    program.write_bytes(Path("/bin/true").read_bytes())
    program.chmod(0o755)
    subprocess.run([program], check=True)


def test_reads_and_writes_are_coherent_with_stores_to_the_media(direct: DaxMount, path: Path) -> None:
    at = device_offset(direct, path, 2)
    with opened(path) as fd, opened(path, os.O_RDONLY) as reader, media_of(direct) as media:
        assert os.pread(reader, 4, 2 * PAGE) == b"CCCC"
        media[at : at + 4] = b"DIRE"
        assert os.pread(reader, 4, 2 * PAGE) == b"DIRE"
        assert path.read_bytes()[2 * PAGE : 2 * PAGE + 5] == b"DIREC"
        os.pwrite(fd, b"write", 2 * PAGE)
        assert media[at : at + 5] == b"write"


def test_a_read_that_meets_poison_is_eio_with_no_bytes(direct: DaxMount, path: Path) -> None:
    with opened(path) as fd:
        assert os.pread(fd, 8 * PAGE, 0).startswith(b"AAA")
        direct.inject("f", (3 * PAGE, 1))
        for offset, length in ((0, 8 * PAGE), (2 * PAGE, 2 * PAGE), (3 * PAGE + 600, 1), (4 * PAGE - 1, 2)):
            assert refusal(os.pread, fd, length, offset) == errno.EIO
        assert os.pread(fd, 3 * PAGE, 0) == b"A" * PAGE + b"B" * PAGE + b"C" * PAGE
        assert os.pread(fd, PAGE, 4 * PAGE) == b"E" * PAGE


def test_a_read_near_latent_poison_does_not_find_the_poison(direct: DaxMount, path: Path) -> None:
    """Nothing is read ahead."""
    direct.inject("f", (3 * PAGE, 1), latent=True)
    with opened(path) as fd:
        for page in (0, 1, 2, 4, 5):
            assert len(os.pread(fd, PAGE, page * PAGE)) == PAGE
        assert direct.json("status", direct.path)["badblocks"] == 0
        assert refusal(os.pread, fd, 1, 3 * PAGE) == errno.EIO
    assert direct.json("status", direct.path)["badblocks"] == 1


def test_a_write_to_poison_follows_the_rules_of_direct_access(direct: DaxMount, path: Path) -> None:
    at = device_offset(direct, path, 3)
    with opened(path) as fd:
        direct.inject("f", (3 * PAGE, 1))
        assert not in_media(direct, at)
        assert refusal(os.pwrite, fd, b"x" * 100, 3 * PAGE + 1000) == errno.EFAULT
        assert refusal(os.pwrite, fd, b"x" * PAGE, 3 * PAGE + 1) == errno.EFAULT
        assert not in_media(direct, at)
        assert os.pwrite(fd, b"x" * 2 * PAGE, 3 * PAGE) == 2 * PAGE
        assert os.pread(fd, PAGE, 3 * PAGE) == b"x" * PAGE
    assert in_media(direct, at)
    assert direct.json("badblocks", direct.path)["sectors"] == 0


def test_a_clear_brings_the_other_sectors_back(direct: DaxMount, path: Path) -> None:
    at = device_offset(direct, path, 3)
    direct.inject("f", (3 * PAGE + 512, 512))
    assert not in_media(direct, at)
    direct.run("clear", path)
    assert in_media(direct, at)
    page = path.read_bytes()[3 * PAGE : 4 * PAGE]
    assert page == b"D" * 512 + bytes(512) + b"D" * 3072


def test_nothing_that_daxemu_does_touches_a_page_with_poison(direct: DaxMount, path: Path) -> None:
    at = device_offset(direct, path, 3)
    direct.inject("f", (3 * PAGE, 512))
    with opened(path) as fd:
        os.truncate(path, 7 * PAGE)
        os.pwrite(fd, b"y" * 3 * PAGE, 0)
        os.fsync(fd)
        refusal(os.pread, fd, 8 * PAGE, 0)
    for verb in ("map", "damaged", "badblocks", "scrub", "status"):
        direct.run(verb, path if verb == "map" else direct.path)
    direct.run("inject", path, "--silent", "--offset", 3 * PAGE, "--length", PAGE)
    assert not in_media(direct, at)
    direct.umount()
    direct.run("fsck", direct.device)
    assert not in_media(direct, at)


@pytest.mark.parametrize("killed", [False, True])
@pytest.mark.parametrize("modes", [("--direct", ""), ("", "--direct")])
def test_the_next_mount_may_be_of_the_other_mode(
    tmp_path: Path, modes: tuple[str, str], killed: bool
) -> None:
    with dax_mount_at(tmp_path, "64M", mount=False) as made:
        made.mount(*filter(None, modes[:1]))
        path = made.make_file("f", 8)
        with opened(path) as fd:
            os.fsync(fd)
        at = device_offset(made, path, 3)
        made.inject("f", (3 * PAGE + 512, 512))
        if killed:
            supervisor = made.json("status", made.path)["pid"]
            os.kill(supervisor, signal.SIGKILL)
        made.umount(*(["--force"] if killed else []))
        made.mount(*filter(None, modes[1:]))
        assert in_media(made, at) is (modes[1] == "")
        with opened(path) as fd:
            assert refusal(os.pread, fd, 1, 3 * PAGE) == errno.EIO
            assert os.pread(fd, PAGE, 2 * PAGE) == b"C" * PAGE
        made.run("clear", path)
        assert path.read_bytes()[3 * PAGE : 4 * PAGE] == b"D" * 512 + bytes(512) + b"D" * 3072


def test_requests_of_healthy_bytes_are_answered_in_c(direct: DaxMount, path: Path) -> None:
    def answered() -> int:
        return int(direct.json("status", direct.path)["layouts"].split()[0])

    with opened(path) as fd:
        os.pread(fd, 1, 0)
        before = answered()
        for _ in range(50):
            os.pread(fd, PAGE, PAGE)
        assert answered() >= before + 50


def test_a_direct_mount_without_privilege_is_refused_in_one_line(tmp_path: Path) -> None:
    with dax_mount_at(tmp_path, "64M", mount=False) as made:
        done = subprocess.run(
            [
                *("setpriv", "--bounding-set", "-sys_ptrace", "--inh-caps", "-all", sys.executable, "-m"),
                *("daxemu", "mount", "--direct", str(made.device), str(made.path)),
            ],
            capture_output=True,
            text=True,
        )
        assert done.returncode != 0
        assert "CAP_SYS_PTRACE" in done.stderr
        assert len(done.stderr.splitlines()) == 1


def test_a_sparse_device_stays_sparse(direct: DaxMount) -> None:
    direct.run("inject", direct.path, "--offset", 40 << 20, "--length", 8 << 20)
    with open(direct.device / "media", "rb") as media:
        assert sum(run.length for run in data_runs(media.fileno())) < 4 << 20
