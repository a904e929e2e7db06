"""Hostile and unlucky programs with direct mappings: data of other files, hangs, and rights."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.mount import DAXEMU, PATIENCE, DaxMount

pytestmark = pytest.mark.mount

_MOVES = """
import ctypes, mmap, os, time
PAGES = 64
libc = ctypes.CDLL(None, use_errno=True)
libc.mmap.restype = libc.mremap.restype = ctypes.c_void_p
libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t] + 3 * [ctypes.c_int] + [ctypes.c_long]
libc.mremap.argtypes = [ctypes.c_void_p] + 2 * [ctypes.c_size_t] + [ctypes.c_int, ctypes.c_void_p]
size = PAGES * 4096
f = os.open("f", os.O_RDWR | os.O_CREAT)
os.pwrite(f, b"F" * size, 0)
go = os.pipe()
other = os.fork()
if not other:
    g = os.open("g", os.O_RDWR | os.O_CREAT)
    os.read(go[0], 1)
    os.ftruncate(f, 0)
    os.fsync(f)
    os.ftruncate(f, size)
    for k in range(100):
        try:
            os.pwrite(g, b"G" * size, k * size)
        except OSError:
            break
    os._exit(0)
at = libc.mmap(None, size, 3, mmap.MAP_SHARED, f, 0)
assert ctypes.string_at(at, size) == b"F" * size
os.write(go[1], b"x")
end = time.monotonic() + 20
while os.waitpid(other, os.WNOHANG) == (0, 0) and time.monotonic() < end:
    for to in (at + (1 << 22), at):
        at = libc.mremap(at, size, size, 3, to)
        assert at != ctypes.c_void_p(-1).value, ctypes.get_errno()
assert ctypes.string_at(at, size) == bytes(size), ctypes.string_at(at, 8)
"""


@pytest.mark.parametrize("dax_mount", ["24M"], indirect=True)
def test_a_mapping_that_moves_while_its_file_is_truncated_shows_no_other_file(dax_mount: DaxMount) -> None:
    for _ in range(5):
        program(dax_mount, _MOVES)
        (dax_mount.path / "f").unlink()
        (dax_mount.path / "g").unlink()


_MAPS = """
import ctypes, mmap, os
libc = ctypes.CDLL(None, use_errno=True)
libc.mmap.restype = ctypes.c_void_p
libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t] + 3 * [ctypes.c_int] + [ctypes.c_long]
libc.syscall.restype = ctypes.c_long
libc.syscall.argtypes = 6 * [ctypes.c_long]
f = os.open("f", os.O_RDONLY)
def mapped(how=mmap.MAP_SHARED):
    ctypes.set_errno(0)
    return libc.mmap(None, 4096, mmap.PROT_READ, how, f, 0)
"""


def test_another_user_gets_no_direct_mapping(dax_mount: DaxMount) -> None:
    """An agent has the whole media open, in the memory of its program."""
    dax_mount.make_file("f", 1)
    code = """
os.setresuid(65534, 65534, 65534)
assert mapped() == ctypes.c_void_p(-1).value and ctypes.get_errno() == 19, ctypes.get_errno()
private = mapped(mmap.MAP_PRIVATE)
assert ctypes.string_at(private, 1) == b"A"
"""
    program(dax_mount, _MAPS + code)
    (event,) = dax_mount.events("DirectMappingRefused")
    assert "uid 65534" in event["reason"]


def test_no_call_maps_another_page_of_the_media_or_keeps_a_page(dax_mount: DaxMount) -> None:
    dax_mount.make_file("f", 1)
    code = """
at = mapped()
for number, *arguments in (
    (216, at, 4096, 0, 9, 0),  # remap_file_pages
    (462, at, 4096, 0, 0, 0),  # mseal
):
    ctypes.set_errno(0)
    assert libc.syscall(number, *arguments) == -1 and ctypes.get_errno() == 22, (number, ctypes.get_errno())
assert ctypes.string_at(at, 1) == b"A"
"""
    program(dax_mount, _MAPS + code)


def test_pkey_mprotect_does_not_make_a_mapping_writable_whose_file_is_not(dax_mount: DaxMount) -> None:
    dax_mount.make_file("f", 1)
    code = """
at = mapped()
assert libc.syscall(329, at, 4096, 3, -1, 0) == -1 and ctypes.get_errno() == 13, ctypes.get_errno()
assert libc.syscall(329, at, 4096, 1, -1, 0) == 0, ctypes.get_errno()
"""
    program(dax_mount, _MAPS + code)


_KINDS = """
import stat
os.mkfifo("fifo")
os.mkdir("directory")
os.symlink("f", "link")
def errors(name, flags):
    global f
    f = os.open(name, flags)
    found = []
    for how in (mmap.MAP_SHARED, mmap.MAP_PRIVATE, 3):
        at = mapped(how)
        found.append(ctypes.get_errno() if at == ctypes.c_void_p(-1).value else 0)
    return found
print(errors("fifo", os.O_RDWR), errors("directory", os.O_RDONLY), errors("f", os.O_PATH),
      errors("link", os.O_PATH | os.O_NOFOLLOW), errors("f", os.O_WRONLY))
"""


def test_what_is_no_open_regular_file_is_refused_as_by_the_kernel(dax_mount: DaxMount) -> None:
    """Directories, FIFOs, and descriptors of O_PATH, which need no right to read the file."""
    dax_mount.make_file("f", 1)
    said = program(dax_mount, _MAPS + _KINDS)
    elsewhere = Path("/dev/shm") / f"daxemu-kinds-{os.getpid()}"
    elsewhere.mkdir()
    try:
        (elsewhere / "f").write_bytes(bytes(4096))
        argv = [sys.executable, "-c", _MAPS + _KINDS]
        done = subprocess.run(
            argv, cwd=elsewhere, capture_output=True, text=True, timeout=PATIENCE, check=True
        )
        assert said == done.stdout
    finally:
        shutil.rmtree(elsewhere)


_FULL = (
    _MAPS
    + """
import signal, sys
size = 8 * 4096
f = os.open("f", os.O_RDWR)
at = libc.mmap(None, size, 3, mmap.MAP_SHARED, f, 0)
other = os.fork()
if other:
    os._exit(os.waitstatus_to_exitcode(os.waitpid(other, 0)[1]))
assert ctypes.string_at(at + 3 * 4096, 1) == b"D"
most = int(open("/proc/sys/vm/max_map_count").read())
block = libc.mmap(None, (most + 10) * 4096, 0, 0x4022, -1, 0)
for page in range(1, most + 10, 2):
    if libc.syscall(10, block + page * 4096, 4096, 1, 0, 0):
        break
else:
    raise AssertionError("the address space is not full")
assert ctypes.get_errno() == 12
os.ftruncate(f, 4096)
os.ftruncate(f, size)
if not os.fork():
    os._exit(ctypes.string_at(at + 3 * 4096, 1) != bytes(1))
found = os.waitstatus_to_exitcode(os.wait()[1])
sys.exit(found not in (0, -signal.SIGBUS))
"""
)


def test_an_address_space_without_room_cannot_follow_and_loses_its_mappings(dax_mount: DaxMount) -> None:
    """No access shows the old block, which may be another file's next. The truncation succeeds."""
    dax_mount.make_file("f", 8)
    program(dax_mount, _FULL)


_ZEROES_AND_CLONES = """
import ctypes, mmap, os
libc = ctypes.CDLL(None)
PAGES = 64
f, g = (os.open(name, os.O_RDWR | os.O_CREAT) for name in "fg")
os.pwrite(f, b"F" * PAGES * 4096, 0)
shown = mmap.mmap(f, PAGES * 4096)
if not os.fork():
    for _ in range(300):
        os.copy_file_range(f, g, PAGES * 4096, 0, 0)
    os._exit(0)
for turn in range(300):
    assert libc.fallocate(f, 0x10 | 1, ctypes.c_long(turn % PAGES * 4096), ctypes.c_long(4096)) == 0
    shown[turn % PAGES * 4096] = 70
assert os.wait()[1] == 0
"""


def test_zeroing_a_mapped_file_while_it_is_cloned_does_not_hang(dax_mount: DaxMount) -> None:
    program(dax_mount, _ZEROES_AND_CLONES)


def program(mount: DaxMount, code: str, *wrapper: str) -> str:
    """Run Python code under ``daxemu run`` in the root directory of the mount; return its output."""
    argv = [*DAXEMU, "run", str(mount.path), "--", *wrapper, sys.executable, "-c", code]
    done = subprocess.run(argv, cwd=mount.path, capture_output=True, text=True, timeout=PATIENCE)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout
