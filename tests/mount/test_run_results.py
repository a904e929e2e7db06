"""daxemu run: results of madvise(2) for each kind of memory."""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

from tests.support.mount import dax_mount_at
from tests.support.scene import PAGE, Scene, ask, refused, signals_of
from tests.support.under_run import at_return, run, under_run

pytestmark = pytest.mark.mount

BAD = 1
CALL = """
import ctypes, errno, mmap, os, sys
libc = ctypes.CDLL(None, use_errno=True)
libc.madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
libc.mmap.argtypes = (ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_long)
libc.mmap.restype = ctypes.c_void_p
libc.munmap.argtypes = (ctypes.c_void_p, ctypes.c_size_t)
P, RW, SHARED, PRIVATE, ANON, FIXED = 4096, 3, 1, 2, 32, 16
def advise(at, length, advice=100):
    ret = libc.madvise(at, length, advice)
    print("0" if not ret else errno.errorcode[ctypes.get_errno()], flush=True)
f = os.open("f", os.O_RDWR)
m = libc.mmap(None, 8 * P, RW, SHARED, f, 0)
"""


def calls(scene: Scene, script: str, options: Sequence[str | Path] = ()) -> list[str]:
    """Return the results of the madvise(2) calls of a Python script without a SIGBUS handler."""
    return run(scene, sys.executable, "-c", CALL + script, options=options).split()


def test_madvise_returns_the_kernels_errors(scene: Scene) -> None:
    script = """
advise(m + 1, P)                                   # not aligned
advise(m, 0)
advise(m, 2**64 - 1)                               # wraps around
libc.munmap(m + 4 * P, P)
advise(m + 4 * P, 2 * P)                           # begins with a hole in the address space
anon = libc.mmap(None, 2 * P, RW, SHARED | ANON, -1, 0)
advise(anon, P, 12345)
"""
    assert calls(scene, script) == ["EINVAL", "EINVAL", "EINVAL", "EFAULT", "EINVAL"]
    assert scene.badblocks() == []


@pytest.mark.parametrize(
    ("script", "result", "damaged"),
    [
        ("libc.munmap(m + 2 * P, P); advise(m + P, 3 * P)", "EFAULT", 1),
        ("libc.mmap(m + 2 * P, P, RW, FIXED | PRIVATE | ANON, -1, 0); advise(m + P, 3 * P)", "EINVAL", 1),
        ("libc.mmap(m + 2 * P, P, 0, FIXED | SHARED, f, 2 * P); advise(m + P, 3 * P)", "EFAULT", 1),
        ("os.ftruncate(f, 2 * P); advise(m + P, 3 * P)", "EFAULT", 1),
        ("os.ftruncate(f, 2 * P); os.ftruncate(f, 8 * P); advise(m + P, 3 * P)", "EBUSY", 1),
        ("p = libc.mmap(None, P, RW, PRIVATE, f, 0); advise(p, P)", "0", 1),
        ("p = libc.mmap(None, P, RW, PRIVATE, f, 0); ctypes.memset(p, 1, 1); advise(p, P)", "EINVAL", 0),
    ],
    ids=["unmapped", "foreign", "no-access", "past-the-end", "hole", "private", "copied"],
)
def test_the_pages_before_an_unavailable_page_fail(
    scene: Scene, script: str, result: str, damaged: int
) -> None:
    """The pages before the first unavailable page have failed, with their signal, which a handler ignores
    here.
    """
    quiet = (
        "libc.signal.argtypes = (ctypes.c_int, ctypes.c_void_p); on = ctypes.CFUNCTYPE(None, ctypes.c_int)"
    )
    handled = f"{quiet}(lambda sig: None); libc.signal(7, ctypes.cast(on, ctypes.c_void_p))\n"
    assert calls(scene, handled + script) == [result]
    assert sum(length for _, _, length in scene.damaged()) == damaged * PAGE


def test_a_store_into_a_hole_is_poisoned(scene: Scene) -> None:
    p0 = under_run(scene)
    ask(p0, "open 1 new creat")
    ask(p0, f"trunc 1 {8 * PAGE}")
    ask(p0, "mmap 1 1 0 8 shared")
    p0.cmd("tw 1 3 x")
    ask(p0, "madvise 1 3 1 hwpoison")
    assert scene.damaged() == [("/new", 3 * PAGE, PAGE)]


def test_poison_cannot_be_poisoned_again(scene: Scene) -> None:
    """A poisoned page cannot be faulted in: EFAULT."""
    p0 = under_run(scene)
    ask(p0, "madvise 0 1 1 hwpoison")
    assert refused(p0, "madvise 0 1 1 hwpoison") == "EFAULT"
    assert signals_of(p0) == [at_return(1)]


def test_a_removed_device(scene: Scene) -> None:
    p0 = under_run(scene)
    scene.mount.sound = False
    scene.mount.run("remove", scene.mount.path)
    signals_of(p0)
    assert refused(p0, "madvise 0 1 1 hwpoison") == "EFAULT"
    assert signals_of(p0) == []


@pytest.mark.skipif(shutil.which("setpriv") is None, reason="needs setpriv")
def test_madvise_without_the_capability_is_refused(scene: Scene) -> None:
    scene.mount.path.chmod(0o777)
    (scene.mount.path / "f").chmod(0o666)
    p0 = under_run(scene, wrapper=["setpriv", "--reuid=65534", "--clear-groups"])
    assert refused(p0, "madvise 0 1 1 hwpoison") == "EPERM"
    assert scene.badblocks() == []


def test_other_advice_is_the_kernels(scene: Scene) -> None:
    script = "advise(m, P, 4); advise(m, P, 3); advise(m, P, 99)"
    assert calls(scene, script) == ["0", "0", "EINVAL"]


def test_foreign_memory_is_the_kernels(scene: Scene) -> None:
    script = "a = libc.mmap(None, P, RW, SHARED | ANON, -1, 0); advise(a, P, 101)"
    without = subprocess.run(
        [sys.executable, "-c", CALL + script], cwd=scene.mount.path, capture_output=True, text=True
    )
    assert calls(scene, script) == without.stdout.split()


def test_only_the_mount_that_was_named(scene: Scene, tmp_path: Path) -> None:
    assert calls(scene, "advise(m, P, 101)", [scene.mount.path]) == ["EIO"]
    (tmp_path / "other").mkdir()
    with dax_mount_at(tmp_path / "other", "64M") as other:
        assert calls(scene, "advise(m, P, 101)", [other.path]) != ["EIO"]
        assert calls(scene, "advise(m, P, 101)") == ["EIO"]


def test_no_supervisor_no_failure(scene: Scene) -> None:
    p0 = under_run(scene)
    assert p0.cmd(f"tr 0 {BAD}").ok == "B"
    scene.mount.sound = False
    pid = scene.mount.json("status", scene.mount.path)["pid"]
    subprocess.run(["kill", "-9", str(pid)], check=True)
    assert refused(p0, f"madvise 0 {BAD} 1 hwpoison") == "EIO"
    assert signals_of(p0) == []
    p0.close()
