"""Rules of POSIX and Linux for open files, locks and mappings that pjdfstest does not check."""

from __future__ import annotations

import errno
import fcntl
import mmap
import os
import shutil
import subprocess
from pathlib import Path

import pytest

from tests.support.actor import Actor
from tests.support.elsewhere import python, start
from tests.support.mount import PATIENCE
from tests.support.quick import QuickMount
from tests.support.scene import PAGE, ask

pytestmark = pytest.mark.mount


@pytest.fixture
def top(quick_mount: QuickMount) -> Path:
    return quick_mount.path


# -- opening


def test_appending_by_two_processes(top: Path) -> None:
    code = """
fd = os.open(sys.argv[1], os.O_WRONLY | os.O_APPEND | os.O_CREAT)
for i in range(1000):
    line = f"{sys.argv[2]} {i} ".ljust(30 + i % 50, "x") + "\\n"
    assert os.write(fd, line.encode()) == len(line)
"""
    writers = [start(code, top / "log", name) for name in "ab"]
    for writer in writers:
        assert writer.communicate(timeout=PATIENCE) == ("", "")
    lines = (top / "log").read_text().splitlines()
    for name in "ab":
        mine = [line.split()[1] for line in lines if line.startswith(name)]
        assert mine == [str(i) for i in range(1000)]
    assert len(lines) == 2000


def test_exclusive_creation_has_one_winner(top: Path) -> None:
    code = """
sys.stdin.readline()
won = 0
for i in range(300):
    try:
        os.close(os.open(f"{sys.argv[1]}/f{i}", os.O_CREAT | os.O_EXCL | os.O_WRONLY))
        won += 1
    except FileExistsError:
        pass
print(won)
"""
    processes = [start(code, top) for _ in range(3)]
    won = [process.communicate("go\n", timeout=PATIENCE)[0] for process in processes]
    assert sum(map(int, won)) == 300
    assert len(os.listdir(top)) == 300


def test_o_trunc(top: Path) -> None:
    path = top / "f"
    path.write_bytes(b"x" * 10_000)
    with path.open("rb") as reader:
        os.close(os.open(path, os.O_WRONLY | os.O_TRUNC))
        assert os.fstat(reader.fileno()).st_size == 0
        assert reader.read() == b""
    with pytest.raises(IsADirectoryError):
        os.open(top, os.O_WRONLY)


def test_a_running_program_cannot_be_written(top: Path) -> None:
    sleep = shutil.which("sleep")
    assert sleep is not None
    program = top / "sleep"
    shutil.copy(sleep, program)
    with program.open("r+b"), pytest.raises(OSError, match=os.strerror(errno.ETXTBSY)):
        subprocess.run([program, "0"], check=True)
    running = subprocess.Popen([program, "60"])
    try:
        with pytest.raises(OSError, match=os.strerror(errno.ETXTBSY)):
            os.open(program, os.O_WRONLY)
        program.unlink()
    finally:
        running.kill()
        running.wait()


# -- locks


@pytest.mark.parametrize("kind", ["flock", "lockf"])
def test_locks_between_processes(top: Path, kind: str) -> None:
    """A lock excludes other processes, and is released when its process ends in any way."""
    path = top / "f"
    path.write_bytes(b"x" * 100)
    hold = f"""
fd = os.open(sys.argv[1], os.O_RDWR)
fcntl.{kind}(fd, fcntl.LOCK_EX)
print("held", flush=True)
sys.stdin.readline()
"""
    holder = start(hold, path)
    lock = getattr(fcntl, kind)
    try:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "held\n"
        with path.open("r+b") as file:
            for how in (fcntl.LOCK_EX, fcntl.LOCK_SH):
                with pytest.raises(OSError, match=os.strerror(errno.EAGAIN)):
                    lock(file, how | fcntl.LOCK_NB)
            if kind == "lockf":
                assert "EAGAIN" in python("fcntl.lockf(os.open(sys.argv[1], 2), 6, 10, 50)", path)
            holder.kill()
            lock(file, fcntl.LOCK_EX)  # waits until the lock is gone
            if kind == "lockf":
                fcntl.lockf(file, fcntl.LOCK_UN, 10, 50)
                assert python("fcntl.lockf(os.open(sys.argv[1], 2), 6, 10, 50)", path) == ""
                assert python("fcntl.lockf(os.open(sys.argv[1], 2), 6, 10, 0)", path) == "EAGAIN"
    finally:
        holder.kill()
        holder.communicate()


# -- holes and large files


@pytest.mark.parametrize("size", [1 << 40, (1 << 63) - PAGE])
def test_sparse_files(quick_mount: QuickMount, size: int) -> None:
    path = quick_mount.path / "f"
    with path.open("w+b", buffering=0) as file:
        fd = file.fileno()
        os.ftruncate(fd, size)
        for offset in (0, 1 << 31, 1 << 39, size - 3):
            assert os.pread(fd, 3, offset) == bytes(3)
        os.pwrite(fd, b"end", size - 3)
        os.pwrite(fd, b"mid", 1 << 35)
        assert os.pread(fd, 10, (1 << 35) - 2) == b"\0\0mid" + bytes(5)
        assert os.fstat(fd).st_blocks == 16
        with mmap.mmap(fd, PAGE, offset=1 << 38) as view:
            assert view[:] == bytes(PAGE)
            view[7] = 1
            view.flush()
        assert os.fstat(fd).st_blocks == 24
        with pytest.raises(OSError, match=rf"\[Errno ({errno.EFBIG}|{errno.EINVAL})\]"):
            os.ftruncate(fd, (1 << 63) - 1)
    quick_mount.remount()
    with path.open("rb", buffering=0) as file:
        assert os.pread(file.fileno(), 10, size - 5) == b"\0\0end"
        assert os.fstat(file.fileno()).st_size == size


def test_holes_that_a_write_leaves_are_zero(top: Path) -> None:
    """Holes read as zeros, also in the block with the old end, whatever bytes were beyond the end."""
    path = top / "f"
    path.write_bytes(b"x" * 3 * PAGE)
    os.truncate(path, 100)
    with path.open("r+b", buffering=0) as file:
        os.pwrite(file.fileno(), b"y", 2 * PAGE + 5)
        assert path.read_bytes() == b"x" * 100 + bytes(2 * PAGE - 95) + b"y"
    assert path.stat().st_blocks == 16


# -- mappings


def test_a_mapped_file_is_truncated(quick_mount: QuickMount) -> None:
    """Pages beyond the end raise SIGBUS BUS_ADRERR, the rest of the last block reads as zeros; growth reads
    as zeros again.
    """
    quick_mount.make_file("f", 8)
    with Actor.spawn("p0", cwd=quick_mount.path) as p0:
        for command in ("open 0 f rw", "mmap 0 0 0 8 shared"):
            ask(p0, command)
        assert [p0.cmd(f"tr 0 {page}").ok for page in (2, 5)] == ["C", "F"]
        os.truncate(quick_mount.path / "f", 2 * PAGE + 10)
        assert p0.cmd("tr 0 2").ok == "C"
        for command in ("tr 0 5", "tw 0 3 z"):
            assert p0.cmd(command).faulted
            told = p0.wait_signal()
            assert (told.sig, told.code, told.addr) == (
                "SIGBUS",
                "BUS_ADRERR",
                f"m0+{int(command[5]) * PAGE:#x}",
            )
        ask(p0, f"trunc 0 {8 * PAGE}")
        assert [p0.cmd(f"tr 0 {page}").ok for page in (2, 3, 5)] == ["C", "0", "0"]
        assert p0.cmd("tw 0 5 n").ok == "n"
        ask(p0, "fsync 0")
    data = (quick_mount.path / "f").read_bytes()
    assert data == b"C".join([b"A" * PAGE + b"B" * PAGE, b""]) + b"C" * 9 + bytes(
        3 * PAGE - 10
    ) + b"n" + bytes(3 * PAGE - 1)


def test_mappings_see_writes_and_reads_see_stores(top: Path) -> None:
    path = top / "f"
    path.write_bytes(bytes(4 * PAGE))
    with path.open("r+b", buffering=0) as file, mmap.mmap(file.fileno(), 4 * PAGE) as view:
        for i in range(200):
            at = i * 79 % (4 * PAGE - 8)
            if i % 2:
                os.pwrite(file.fileno(), i.to_bytes(8, "little"), at)
                assert view[at : at + 8] == i.to_bytes(8, "little")
            else:
                view[at : at + 8] = i.to_bytes(8, "little")
                assert os.pread(file.fileno(), 8, at) == i.to_bytes(8, "little")
        assert python("print(open(sys.argv[1], 'rb').read().hex())", path) == view[:].hex()


def test_a_private_mapping_keeps_its_stores_to_itself(top: Path) -> None:
    path = top / "f"
    path.write_bytes(b"a" * PAGE)
    with path.open("r+b") as file, mmap.mmap(file.fileno(), PAGE, flags=mmap.MAP_PRIVATE) as view:
        view[0] = ord("z")
        os.pwrite(file.fileno(), b"bb", 0)
        assert view[:2] == b"za"
        assert path.read_bytes()[:3] == b"bba"


def test_mtime_of_a_mapped_store(top: Path) -> None:
    path = top / "f"
    path.write_bytes(bytes(PAGE))
    before = path.stat()
    with path.open("r+b") as file, mmap.mmap(file.fileno(), PAGE) as view:
        view[0] = 1
        view.flush()
        after = path.stat()
        assert after.st_mtime_ns > before.st_mtime_ns
        assert after.st_ctime_ns > before.st_ctime_ns


# -- files without a name


def test_unlinked_but_open(quick_mount: QuickMount) -> None:
    top = quick_mount.path
    free = os.statvfs(top).f_bavail
    (top / "d").mkdir()
    with (top / "d" / "f").open("w+b", buffering=0) as file:
        fd = file.fileno()
        file.write(b"x" * 10 * PAGE)
        (top / "d" / "f").unlink()
        (top / "d").rmdir()
        os.ftruncate(fd, 20 * PAGE)
        os.pwrite(fd, b"y", 15 * PAGE)
        with mmap.mmap(fd, 20 * PAGE) as view:
            view[5] = ord("z")
            view.flush()
        os.fchmod(fd, 0o600)
        os.setxattr(fd, "user.a", b"1")
        assert os.pread(fd, 6, 0) == b"xxxxxz"
        assert os.fstat(fd).st_nlink == 0
        with open(f"/proc/self/fd/{fd}", "rb") as again:
            assert again.read(6) == b"xxxxxz"
        subprocess.run(["sync", "-f", top], check=True, timeout=PATIENCE)
        assert os.statvfs(top).f_bavail < free
    assert os.listdir(top) == []
    fd = os.open(top, os.O_RDONLY)
    os.fsync(fd)
    os.close(fd)
    quick_mount.remount()
    assert os.statvfs(top).f_bavail == free


def test_sync_1(top: Path) -> None:
    """sync(1) writes stores through a mapping to the media."""
    path = top / "f"
    path.write_bytes(bytes(PAGE))
    with path.open("r+b") as file, mmap.mmap(file.fileno(), PAGE) as view:
        view[0] = 1
        before = path.stat().st_mtime_ns
        for arguments in ([], ["-f", top], [path], ["-d", path]):
            subprocess.run(["sync", *arguments], check=True, timeout=PATIENCE)
        assert path.stat().st_mtime_ns >= before
