"""Scene: a mount with real processes on it. The processes end before the mount does.

Fault-around makes up to 16 cached neighbours of a touched page present, an aligned 64 KiB window. A page that
must stay absent when another page is touched is at least ``FAR`` pages away.
"""

from __future__ import annotations

import errno
import subprocess
import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, Self

from tests.support.actor import Actor, Signal
from tests.support.mount import DaxMount

PAGE = 4096
PAGES = 128
"""Default length of files and mappings, in pages."""
FAR = 32
"""Distance in pages: two pages FAR apart are never made present by the same fault."""

_TRACER = """
import ctypes, os, sys
SEIZE, CONT, LISTEN = 0x4206, 7, 0x4208
libc, pid = ctypes.CDLL(None, use_errno=True), int(sys.argv[1])
libc.ptrace.argtypes = (ctypes.c_long, ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p)
if libc.ptrace(SEIZE, pid, None, None):
    sys.exit(f"PTRACE_SEIZE: {os.strerror(ctypes.get_errno())}")
print("holding", flush=True)
while True:
    _, status = os.waitpid(pid, 0x40000000)
    if not os.WIFSTOPPED(status):
        break
    event = status >> 16
    libc.ptrace(LISTEN if event == 128 else CONT, pid, None, 0 if event else os.WSTOPSIG(status))
"""


class Scene:
    """Mount and actors. A context manager: the actors end with the block."""

    def __init__(self, mount: DaxMount) -> None:
        self.mount = mount
        self._actors = ExitStack()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self._actors.close()

    def actor(self, name: str = "p0", wrapper: Sequence[str] = ()) -> Actor:
        """Start a process in the root directory of the mount, on a direct mount under ``daxemu run``."""
        if "run" not in wrapper:
            wrapper = [*self.mount.wrapper, *wrapper]
        return self._actors.enter_context(Actor.spawn(name, cwd=self.mount.path, wrapper=wrapper))

    def mapper(
        self,
        name: str = "p0",
        file: str = "f",
        *,
        touch: Iterable[int] = (),
        kind: str = "shared",
        pages: int = PAGES,
        first: int = 0,
        before: Sequence[str] = (),
    ) -> Actor:
        """Start a process with ``pages`` pages of ``file``, from page ``first`` on, as mapping 0.

        The process has read the pages in ``touch``. ``before``: commands to run before the mapping is made.
        """
        actor = self.actor(name)
        for command in (*before, f"open 0 {file} rw", f"mmap 0 0 {first} {pages} {kind}"):
            ask(actor, command)
        for page in touch:
            assert actor.cmd(f"tr 0 {page}").ok == letter(first + page)
            assert present(actor, 0, page)
        return actor

    def mappers(self, count: int, **how: Any) -> list[Actor]:
        """Start several processes with equal mappings, named p0, p1 and so on."""
        return [self.mapper(f"p{i}", **how) for i in range(count)]

    def poison(self, *pages: int, file: str = "f") -> list[dict[str, Any]]:
        """Poison whole pages of a file in one call; return the result of each range."""
        ranges = self.mount.inject(file, *((page * PAGE, PAGE) for page in pages))["ranges"]
        assert isinstance(ranges, list)
        return ranges

    def set(self, **settings: object) -> None:
        """Run ``daxemu set``."""
        self.mount.run("set", self.mount.path, *(f"{name}={value}" for name, value in settings.items()))

    def signal_events(self, actor: Actor) -> list[dict[str, Any]]:
        """Return the SignalSent events of a process, in order."""
        return [e for e in self.mount.events("SignalSent") if e["pid"] == actor.pid]

    def badblocks(self) -> list[list[int]]:
        """Return the bad blocks as [first sector, number of sectors]."""
        found = self.mount.json("badblocks", self.mount.path)["ranges"]
        assert isinstance(found, list)
        return found

    def damaged(self) -> list[tuple[str, int, int]]:
        """Return (path, offset, length) of each damaged range."""
        files = self.mount.json("damaged", self.mount.path)["files"]
        return [(f["path"], f["offset"], f["length"]) for f in files]

    def device_offset(self, file: str, page: int) -> int:
        """Return the device offset in bytes of a page of a file."""
        for extent in self.mount.json("map", self.mount.path / file)["extents"]:
            within = page * PAGE - int(extent["offset"])
            if 0 <= within < extent["length"]:
                assert extent["device_offset"] is not None, f"page {page} of {file} is a hole"
                return int(extent["device_offset"] + within)
        raise AssertionError(f"page {page} of {file} is past its end")


def letter(page: int) -> str:
    """Return the letter filling a page of a fresh file (``DaxMount.make_file``)."""
    return chr(ord("A") + page % 26)


def ask(actor: Actor, command: str) -> int:
    """Run a system call that must succeed; return its result."""
    result = actor.cmd(command)
    assert result.ret is not None, f"{command}: {result}"
    assert result.errno == "0", f"{command}: {result}"
    return result.ret


def refused(actor: Actor, command: str) -> str | None:
    """Run a system call that must fail; return the name of its errno."""
    result = actor.cmd(command)
    assert result.ret == -1, f"{command}: {result}"
    return result.errno


def append_until_full(file: Path, byte: bytes) -> None:
    """Append pages filled with ``byte`` until the device is full (ENOSPC)."""
    with file.open("ab", buffering=0) as growing:
        try:
            while True:
                growing.write(byte * PAGE)
        except OSError as error:
            if error.errno != errno.ENOSPC:
                raise


def present(actor: Actor, mapping: int, page: int) -> bool:
    """Return True if the page is present in the page tables of the process."""
    return bool(actor.cmd(f"pagemap {mapping} {page}").res["present"])


def signals_of(actor: Actor) -> list[dict[str, Any]]:
    """Return the signals since the last call, in the form of the recordings.

    Every signal sent so far has arrived.
    """
    actor.barrier()
    return [signal.recorded() for signal in actor.signals()]


def ao(page: int, *, mapping: int = 0, thread: int = 0, how: str = "async") -> dict[str, Any]:
    """Return the expected action optional signal of a mapped page."""
    addr = f"m{mapping}+{page * PAGE:#x}"
    return {"thread": thread, "sig": "SIGBUS", "code": "BUS_MCEERR_AO", "addr": addr, "lsb": 12, "how": how}


def ar(page: int, *, mapping: int = 0, thread: int = 0) -> dict[str, Any]:
    """Return the expected action required signal of a consumed page.

    The actor touches the first byte of the page.
    """
    addr = f"m{mapping}+{page * PAGE:#x}"
    how = "during access"
    return {"thread": thread, "sig": "SIGBUS", "code": "BUS_MCEERR_AR", "addr": addr, "lsb": 12, "how": how}


def consumes(actor: Actor, command: str, expected: dict[str, Any]) -> None:
    """Assert that an access faults, with exactly the expected signal."""
    result = actor.cmd(command)
    assert result.faulted, f"{actor.name}: {command}: {result}"
    assert signals_of(actor) == [expected]


def is_plain_sigbus(signal: Signal) -> bool:
    """Return True for a SIGBUS as sent by kill(2), without an address."""
    return signal.sig == "SIGBUS" and not signal.code.startswith("BUS_") and signal.raw == 0


@contextmanager
def second_tracer(pid: int) -> Iterator[None]:
    """Have a second tracer hold the process. Every signal passes through that tracer unchanged."""
    tracer = subprocess.Popen(
        [sys.executable, "-c", _TRACER, str(pid)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    try:
        assert tracer.stdout is not None
        assert tracer.stdout.readline() == "holding\n", tracer.communicate()[1]
        yield
    finally:
        tracer.kill()
        tracer.communicate()
