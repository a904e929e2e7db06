"""Programs under the filter for direct mappings, with the real helper and control socket.

Files in shared memory stand for files of a direct mount, files of a memfd for those of a second one; a stub
supervisor (tests/support/forwarding.py) decides.
"""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
PATIENCE = 30.0
START = """
import functools, os, sys
from pathlib import Path
from daxemu.cli.run import _attach
from daxemu.host.proc.mountinfo import Mount
from daxemu.host.run import helper
from daxemu.host.run.runner import execute
*heres, command = sys.argv[1:]
memfd = os.memfd_create("second")
def mount(path, number):
    return Mount(Path(path), Path(path), (os.major(number), os.minor(number)))
numbers = [os.stat(heres[0]).st_dev, os.fstat(memfd).st_dev]
known = [mount(path, number) for path, number in zip(heres, numbers)]
os.close(memfd)
helper.mounts = lambda process="self": known
execute(eval(command), None, lambda tid, piece, soft: 5, functools.partial(_attach, False))
"""
PROGRAM = """
import ctypes, mmap, os, signal, sys, threading, time
libc = ctypes.CDLL(None, use_errno=True)
libc.syscall.restype = ctypes.c_long
here = sys.argv[1]
def syscall(number, *args):
    result = libc.syscall(ctypes.c_long(number), *map(ctypes.c_long, args))
    return result if result != -1 else -ctypes.get_errno()
def mapped(at=0, flags=1, path=here + "/f", length=4 * 4096, fd=None):
    own = os.open(path, os.O_RDWR) if fd is None else fd
    try:
        return syscall(9, at, length, 3, flags, own, 0)
    finally:
        if fd is None:
            os.close(own)
SLICE = 0x2000_0000_0000
"""


class Stub:
    """A stub supervisor that runs, with its directory."""

    def __init__(self, directory: Path, *, direct: bool = True) -> None:
        self.directory = directory
        if not direct:
            (directory / "mode").write_text("page cache")
        self.decide("continue")
        self.process = self.started()

    def started(self) -> subprocess.Popen[str]:
        process = subprocess.Popen(
            [sys.executable, "-m", "tests.support.forwarding", str(self.directory)],
            stdout=subprocess.PIPE,
            text=True,
            cwd=ROOT,
        )
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        return process

    def decide(self, words: str) -> None:
        """Set the decision for mmap(2)."""
        (self.directory / "answer").write_text(words)

    def calls(self) -> list[list[Any]]:
        """Return number, thread, arguments and start of the slice of each forwarded call."""
        try:
            return [json.loads(line) for line in (self.directory / "calls").read_text().splitlines()]
        except FileNotFoundError:
            return []

    def numbers(self) -> list[int]:
        return [call[0] for call in self.calls()]

    def refusals(self) -> list[dict[str, Any]]:
        lines = (self.directory / "events.jsonl").read_text().splitlines()
        return [event for event in map(json.loads, lines) if event["event"] == "DirectMappingRefused"]

    def kill(self) -> None:
        self.process.kill()
        self.process.wait(PATIENCE)
        assert self.process.stdout is not None
        self.process.stdout.close()


@contextlib.contextmanager
def stub(*, direct: bool = True) -> Iterator[Stub]:
    with TemporaryDirectory(dir="/dev/shm") as path:
        (Path(path) / "f").write_bytes(b"direct" + bytes(4 * 4096))
        made = Stub(Path(path), direct=direct)
        try:
            yield made
        finally:
            made.kill()


def started(stubs: Sequence[Stub], command: list[str], **options: Any) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", START, *(str(each.directory) for each in stubs), repr(command)],
        stdout=subprocess.PIPE,
        text=True,
        cwd=ROOT,
        **options,
    )


def python(stubs: Sequence[Stub], script: str, **options: Any) -> subprocess.Popen[str]:
    return started(
        stubs, [sys.executable, "-c", PROGRAM + script, *(str(each.directory) for each in stubs)], **options
    )


def output_of(process: subprocess.Popen[str], status: int = 0) -> str:
    """Return what a process prints; its exit status must be ``status``."""
    try:
        out, _ = process.communicate(timeout=PATIENCE)
    finally:
        process.kill()
    assert process.returncode == status
    return out.strip()


def says(on: Stub, script: str) -> str:
    return output_of(python([on], script))


def helper_of(process: subprocess.Popen[str]) -> int:
    """Return the helper of a run: the process with the same arguments as the run had."""
    assert isinstance(process.args, list)
    wanted = [
        str(word).encode() for word in process.args[1:]
    ]  # the interpreter may be a script (tests/asan.sh)
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit() and int(entry.name) != process.pid:
            with contextlib.suppress(OSError):
                if (entry / "cmdline").read_bytes().split(b"\0")[1:-1] == wanted:
                    return int(entry.name)
    raise AssertionError("no helper")


def eventually(condition: Callable[[], bool]) -> bool:
    deadline = time.monotonic() + PATIENCE
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.01)
    return condition()
