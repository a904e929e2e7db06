"""A mount with real processes on it: who maps what, who was told what. They are gone before the mount is.

Fault-around makes up to 16 cached neighbours of a touched page present, an aligned 64 KiB: pages that must
not be present because another one was touched are at least that far away (``FAR`` pages).
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
"""Pages of the files and mappings that nothing is said of."""
FAR = 32
"""A page and the one FAR pages on are never made present by the same fault."""

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
    """A mount and its actors. A context manager: they do not outlive the block."""

    def __init__(self, mount: DaxMount) -> None:
        self.mount = mount
        self._actors = ExitStack()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self._actors.close()

    def actor(self, name: str = "p0", wrapper: Sequence[str] = ()) -> Actor:
        """A process in the root directory of the mount."""
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
        """A process with ``pages`` of ``file`` from page ``first`` on as mapping 0.

        It has read those in ``touch``. ``before``: commands to do first of all.
        """
        actor = self.actor(name)
        for command in (*before, f"open 0 {file} rw", f"mmap 0 0 {first} {pages} {kind}"):
            ask(actor, command)
        for page in touch:
            assert actor.cmd(f"tr 0 {page}").ok == letter(first + page)
            assert present(actor, 0, page)
        return actor

    def mappers(self, count: int, **how: Any) -> list[Actor]:
        """Several alike, called p0, p1 and so on."""
        return [self.mapper(f"p{i}", **how) for i in range(count)]

    def poison(self, *pages: int, file: str = "f") -> list[dict[str, Any]]:
        """Inject into whole pages of a file in one call; what came of each."""
        ranges = self.mount.inject(file, *((page * PAGE, PAGE) for page in pages))["ranges"]
        assert isinstance(ranges, list)
        return ranges

    def set(self, **settings: object) -> None:
        """``daxemu set``."""
        self.mount.run("set", self.mount.path, *(f"{name}={value}" for name, value in settings.items()))

    def signal_events(self, actor: Actor) -> list[dict[str, Any]]:
        """The SignalSent events for a process, in order."""
        return [e for e in self.mount.events("SignalSent") if e["pid"] == actor.pid]

    def badblocks(self) -> list[list[int]]:
        """The known bad sectors: [first, count]."""
        found = self.mount.json("badblocks", self.mount.path)["ranges"]
        assert isinstance(found, list)
        return found

    def damaged(self) -> list[tuple[str, int, int]]:
        """(path, offset, length) of what files lost."""
        files = self.mount.json("damaged", self.mount.path)["files"]
        return [(f["path"], f["offset"], f["length"]) for f in files]

    def device_offset(self, file: str, page: int) -> int:
        """Where on the device a page of a file is."""
        for extent in self.mount.json("map", self.mount.path / file)["extents"]:
            within = page * PAGE - int(extent["offset"])
            if 0 <= within < extent["length"]:
                assert extent["device_offset"] is not None, f"page {page} of {file} is a hole"
                return int(extent["device_offset"] + within)
        raise AssertionError(f"page {page} of {file} is past its end")


def letter(page: int) -> str:
    """What every byte of a page of a fresh file is (``DaxMount.make_file``)."""
    return chr(ord("A") + page % 26)


def ask(actor: Actor, command: str) -> int:
    """A system call that must succeed; its return value."""
    result = actor.cmd(command)
    assert result.ret is not None, f"{command}: {result}"
    assert result.errno == "0", f"{command}: {result}"
    return result.ret


def refused(actor: Actor, command: str) -> str | None:
    """A system call that must fail; the name of its errno."""
    result = actor.cmd(command)
    assert result.ret == -1, f"{command}: {result}"
    return result.errno


def append_until_full(file: Path, byte: bytes) -> None:
    """Append page after page of this byte, until there is no space for one more."""
    with file.open("ab", buffering=0) as growing:
        try:
            while True:
                growing.write(byte * PAGE)
        except OSError as error:
            if error.errno != errno.ENOSPC:
                raise


def present(actor: Actor, mapping: int, page: int) -> bool:
    """Whether the process has the page in its page tables."""
    return bool(actor.cmd(f"pagemap {mapping} {page}").res["present"])


def told(actor: Actor) -> list[dict[str, Any]]:
    """The signals since the last time, in the recordings' form. Whatever was sent by now has come."""
    actor.barrier()
    return [signal.recorded() for signal in actor.signals()]


def ao(page: int, *, mapping: int = 0, thread: int = 0, how: str = "async") -> dict[str, Any]:
    """Action optional: poison mapped at this page."""
    addr = f"m{mapping}+{page * PAGE:#x}"
    return {"thread": thread, "sig": "SIGBUS", "code": "BUS_MCEERR_AO", "addr": addr, "lsb": 12, "how": how}


def ar(page: int, *, mapping: int = 0, thread: int = 0) -> dict[str, Any]:
    """Action required: poison consumed at this page, whose first byte the actor touches."""
    addr = f"m{mapping}+{page * PAGE:#x}"
    how = "during access"
    return {"thread": thread, "sig": "SIGBUS", "code": "BUS_MCEERR_AR", "addr": addr, "lsb": 12, "how": how}


def consumes(actor: Actor, command: str, expected: dict[str, Any]) -> None:
    """The access faults, with this signal and no other."""
    result = actor.cmd(command)
    assert result.faulted, f"{actor.name}: {command}: {result}"
    assert told(actor) == [expected]


def is_plain_sigbus(signal: Signal) -> bool:
    """Whether it is a SIGBUS as kill(2) sends it, without address."""
    return signal.sig == "SIGBUS" and not signal.code.startswith("BUS_") and signal.raw == 0


@contextmanager
def second_tracer(pid: int) -> Iterator[None]:
    """Another tracer holds the process: every signal goes through it, unchanged."""
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
