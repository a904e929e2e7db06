"""Write-back beside setattr: the kernel holds the inode lock during FUSE_SETATTR.

A hang shows as a command, or a process, beyond its time limit.
"""

from __future__ import annotations

import signal
import subprocess
import sys

import pytest

from tests.support.mount import PATIENCE, DaxMount

pytestmark = pytest.mark.mount

PAGES = 64
ROUNDS = 5
BUSY = """
import mmap, os, sys, threading
path, pages = sys.argv[1], int(sys.argv[2])
over = threading.Event()
file = open(path, "r+b")
memory = mmap.mmap(file.fileno(), pages * 4096)
def chmod():
    os.chmod(path, 0o600)
    os.chmod(path, 0o644)
def truncate():
    os.truncate(path, (pages - 8) * 4096)
    os.truncate(path, pages * 4096)
def utime():
    os.utime(path, (1, 1))
def store():
    memory[0:8] = b"x" * 8
def loop(act):
    try:
        while not over.is_set():
            act()
    except OSError:
        pass  # the mount has ended
threads = [threading.Thread(target=loop, args=(act,)) for act in (chmod, truncate, utime, store)]
for thread in threads:
    thread.start()
print("ready", flush=True)
sys.stdin.read()
over.set()
for thread in threads:
    thread.join()
print("ended", flush=True)
os._exit(0)
"""


@pytest.mark.parametrize("verb", ["inject", "reflink", "powerfail"])
def test_setattr_beside_stores_and_write_back(dax_mount: DaxMount, verb: str) -> None:
    path = dax_mount.make_file("f", PAGES)
    command = [sys.executable, "-c", BUSY, str(path), str(PAGES)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as busy:
        try:
            assert busy.stdout is not None
            assert busy.stdout.readline() == "ready\n"
            for at in range(ROUNDS if verb != "powerfail" else 1):
                if verb == "inject":
                    dax_mount.inject("f", ((16 + at) * 4096, 4096))
                elif verb == "reflink":
                    dax_mount.run("reflink", path, dax_mount.path / f"g{at}")
                else:
                    dax_mount.run("powerfail", dax_mount.path)
            said = busy.communicate(timeout=PATIENCE)[0]
        finally:
            busy.kill()
    # A store after the power failure is a SIGBUS.
    assert said == "ended\n" or (verb == "powerfail" and busy.returncode == -signal.SIGBUS)
