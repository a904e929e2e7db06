"""Hostile and unlucky programs with direct mappings: data of other files, hangs, and rights."""

from __future__ import annotations

import subprocess
import sys

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


def program(mount: DaxMount, code: str, *wrapper: str) -> None:
    """Run Python code under ``daxemu run`` in the root directory of the mount."""
    argv = [*DAXEMU, "run", str(mount.path), "--", *wrapper, sys.executable, "-c", code]
    done = subprocess.run(argv, cwd=mount.path, capture_output=True, text=True, timeout=PATIENCE)
    assert done.returncode == 0, done.stdout + done.stderr
