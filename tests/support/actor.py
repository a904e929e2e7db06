"""Driver of tests/victims/actor.c: real processes that open, map, touch and die at the test's command.

    with Actor.spawn("p0", cwd=mountpoint) as p0:
        p0.cmd("open 0 f rw")
        p0.cmd("mmap 0 0 0 8 shared")
        assert p0.cmd("tr 0 1").res == {"ok": "B", "faults": 1}

The commands, and the form of results and signals, are those of the kernel recordings; actor.c lists them.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import json
import os
import select
import signal
import struct
import subprocess
import tempfile
import threading
import time
import warnings
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self, TypeVar

VICTIMS = Path(__file__).resolve().parent.parent / "victims"
BUILD = VICTIMS / "build"
GCC = ("gcc", "-O1", "-Wall", "-Wextra", "-pthread")
TIMEOUT = 20.0
PIDFD_GET_INFO = 0xC040FF0B  # linux/pidfd.h, since 6.13
PIDFD_INFO_EXIT = 1 << 3  # since 6.15

T = TypeVar("T")


def compile_victim(name: str, build: Path = BUILD, options: tuple[str, ...] = ()) -> Path:
    """The binary of tests/victims/NAME.c, compiled first if need be; many processes may ask at once.

    ``options``: more options of gcc.
    """
    source = VICTIMS / f"{name}.c"
    read = b"".join(each.read_bytes() for each in (source, *sorted(VICTIMS.glob("*.h"))))
    key = hashlib.sha256(read + " ".join((*GCC, *options)).encode()).hexdigest()[:16]
    binary = build / f"{name}-{key}"
    if not binary.exists():
        build.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=build) as scratch:
            fresh = Path(scratch) / name
            done = subprocess.run(
                [*GCC, *options, "-o", str(fresh), str(source)], capture_output=True, text=True
            )
            if done.returncode != 0:
                raise RuntimeError(f"cannot compile {source}:\n{done.stderr}")
            fresh.replace(binary)
    return binary


def compile_actor(build: Path = BUILD) -> Path:
    """The binary of actor.c."""
    return compile_victim("actor", build)


@dataclass(frozen=True)
class Result:
    """Result of a command: `res` as in the recordings."""

    res: dict[str, Any]

    @property
    def ok(self) -> str | None:
        return self.res.get("ok")

    @property
    def faults(self) -> int | None:
        return self.res.get("faults")

    @property
    def faulted(self) -> bool:
        return bool(self.res.get("faulted"))

    @property
    def ret(self) -> int | None:
        return self.res.get("ret")

    @property
    def errno(self) -> str | None:
        return self.res.get("errno")

    @property
    def pages(self) -> str | None:
        return self.res.get("pages")

    def __str__(self) -> str:
        if self.faulted:
            return "FAULT"
        if self.ok is not None:
            return f"ok {self.ok!r}" + (f" ({self.faults} faults)" if self.faults else "")
        if self.ret is None:
            return json.dumps(self.res)
        failure = f" {self.errno}" if self.errno != "0" else ""
        return f"ret {self.ret}{failure}" + (f" pages {self.pages}" if self.pages else "")


@dataclass(frozen=True)
class Signal:
    """Signal as the process saw it. `addr` is "m0+0x1000", or hex outside of all mappings."""

    thread: int
    sig: str
    code: str
    addr: str
    raw: int
    how: str
    lsb: int | None = None

    def recorded(self) -> dict[str, Any]:
        """Return the recordings' form, less `who`."""
        lsb = {} if self.lsb is None else {"lsb": self.lsb}
        told = {"thread": self.thread, "sig": self.sig, "code": self.code, "addr": self.addr}
        return {**told, **lsb, "how": self.how}


@dataclass(frozen=True)
class Death:
    """End of a process: by a signal, with an exit status, or (neither) unknown."""

    signal: signal.Signals | None = None
    exit: int | None = None

    @classmethod
    def of_wait_status(cls, status: int) -> Death:
        if os.WIFSIGNALED(status):
            return cls(signal=signal.Signals(os.WTERMSIG(status)))
        return cls(exit=os.WEXITSTATUS(status))

    def recorded(self) -> dict[str, Any]:
        return {"exit": self.exit} if self.signal is None else {"signal": self.signal.name}

    def __str__(self) -> str:
        return f"exit {self.exit}" if self.signal is None else self.signal.name


class ActorError(Exception):
    """An actor misbehaves; the message ends with the transcript."""

    def __init__(self, actor: Actor, what: str) -> None:
        super().__init__(f"{actor.name} (pid {actor.pid}): {what}\n{actor.transcript}")


class ActorTimeout(ActorError):
    """No answer in time; the process has been killed."""


class ActorDied(ActorError):
    """The actor died instead of answering, or before a command."""

    def __init__(self, actor: Actor, death: Death, what: str) -> None:
        super().__init__(actor, what)
        self.death = death


class Actor:
    """One process, driven by text lines. A context manager: the process does not outlive the block."""

    def __init__(
        self, name: str, pid: int, to: int, answers: int, popen: subprocess.Popen[bytes] | None
    ) -> None:
        self.name = name
        self.pid = pid
        self._to = to
        self._answers = answers
        self._popen = popen
        self._pidfd = os.pidfd_open(pid)
        self._partial = b""
        self._results: deque[dict[str, Any]] = deque()
        self._signals: deque[Signal] = deque()
        self._spoken: list[str] = []
        self._forks: list[Actor] = []
        self._death: Death | None = None
        self._closed = False
        os.set_blocking(answers, False)

    @classmethod
    def spawn(
        cls, name: str = "p0", cwd: str | os.PathLike[str] | None = None, wrapper: Sequence[str] = ()
    ) -> Actor:
        """Start an actor; `wrapper` is an argv that runs the command after it, such as ["setpriv",
        "--reuid=1000"].
        """
        # For the kernel the parent is the thread that spawned it; only the main thread lives long enough.
        main_thread = threading.current_thread() is threading.main_thread()
        option = ["die-with-parent"] if main_thread else []
        argv = [*wrapper, str(compile_actor()), name, *option]
        popen = subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, cwd=cwd, bufsize=0)
        assert popen.stdin is not None
        assert popen.stdout is not None
        actor = cls(name, popen.pid, os.dup(popen.stdin.fileno()), os.dup(popen.stdout.fileno()), popen)
        popen.stdin.close()
        popen.stdout.close()
        try:
            actor._greet()
        except BaseException:
            actor.close()
            raise
        return actor

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, where: TracebackType | None
    ) -> None:
        self.close()

    # Commands

    def cmd(self, command: str, timeout: float = TIMEOUT) -> Result:
        """Run a command and return its result."""
        self.send(command)
        return self.reply(timeout)

    def send(self, command: str) -> None:
        """Begin a command; `reply` returns the result."""
        self._spoken.append(f"> {command}")
        if self._death is not None:
            raise ActorDied(self, self._death, f"dead already ({self._death})")
        with contextlib.suppress(BrokenPipeError):  # the actor is dying: the reply reports the death
            os.write(self._to, command.encode() + b"\n")

    def reply(self, timeout: float = TIMEOUT) -> Result:
        """Return the result of the command sent last."""
        said = self._wait(self._next_result, timeout)
        if "error" in said:
            raise ActorError(self, f"bad command: {said['error']}")
        return Result(said["res"])

    def start_spin(self, mapping: int, page: int) -> None:
        """Read the page in a loop until a fault, which is the `reply`. Returns after one load."""
        self.send(f"spin {mapping} {page}")
        self._wait(lambda: self._results[0] if self._results else None, TIMEOUT)
        if "spinning" in self._results[0]:
            self._results.popleft()

    def fork(self, name: str) -> Actor:
        """fork(2): the child is an actor, too, with the same descriptors and mappings; it ends with its
        parent.
        """
        with tempfile.TemporaryDirectory() as fifos:
            Path(fifos).chmod(0o711)
            ends = []
            for path in (f"{fifos}/in", f"{fifos}/out"):
                os.mkfifo(path)
                Path(path).chmod(0o666)
                ends.append(os.open(path, os.O_RDWR | os.O_NONBLOCK | os.O_CLOEXEC))
            forked = self.cmd(f"fork {name} {fifos}/in {fifos}/out")
            if forked.ret is None or forked.ret < 0:
                raise ActorError(self, f"cannot fork: {forked}")
            child = Actor(name, forked.ret, ends[0], ends[1], None)
            self._forks.append(child)
            child._greet()
        return child

    def exec(self) -> Result:
        """execve(2) of the actor: mappings, descriptors and threads are gone, the connection stays."""
        return self.cmd("exec")

    def pvm(self, verb: str, other: Actor, mapping: int, page: int, length: int) -> Result:
        """`verb` is pvmread or pvmwrite, the memory belongs to `other`, from a page of its mapping on."""
        return self.cmd(f"{verb} {other.pid} {other.addr(mapping, page):#x} {length}")

    def addr(self, mapping: int, page: int = 0) -> int:
        """The virtual address of a page of a mapping."""
        return self._number(f"addr {mapping}") + page * 4096

    def tid(self, thread: int) -> int:
        """The thread's id; the main thread is 0."""
        return self._number(f"tid {thread}")

    def _number(self, command: str) -> int:
        ret = self.cmd(command).ret
        assert ret is not None
        return ret

    # Signals

    def signals(self) -> list[Signal]:
        """Return the signals that arrived since the last call, in order."""
        self._drain()
        got = list(self._signals)
        self._signals.clear()
        return got

    def wait_signal(self, timeout: float = TIMEOUT) -> Signal:
        """The next signal not yet asked for."""
        return self._wait(lambda: self._signals.popleft() if self._signals else None, timeout)

    def barrier(self) -> None:
        """Wait until every signal sent to any thread before is among `signals`."""
        self.cmd("barrier")

    def expect_no_signal(self) -> None:
        """Assert that no signal was sent since the last look."""
        self.barrier()
        got = self.signals()
        assert not got, f"{self.name} got {got}\n{self.transcript}"

    # Life and death

    @property
    def alive(self) -> bool:
        self._advance(time.monotonic())
        return self._death is None

    def wait_death(self, timeout: float = TIMEOUT) -> Death:
        """Wait until the actor dies, by itself or killed by another process."""
        deadline = time.monotonic() + timeout
        while self._death is None:
            if not self._advance(deadline):
                self.kill()
                raise ActorTimeout(self, f"still alive after {timeout} s")
        return self._death

    def kill(self, timeout: float = 5.0) -> None:
        """SIGKILL, and wait; a process the kernel will not let go of only costs a warning."""
        deadline = time.monotonic() + timeout
        with contextlib.suppress(ProcessLookupError):
            signal.pidfd_send_signal(self._pidfd, signal.SIGKILL)
        while self._death is None:
            if not self._advance(deadline):
                warnings.warn(f"{self.name} (pid {self.pid}) does not die", ResourceWarning, stacklevel=2)
                return

    def close(self) -> None:
        """End the actor and all its children. A second call does no harm."""
        if self._closed:
            return
        for child in self._forks:
            child.close()
        if self._death is None:
            self.kill()
        self._closed = True
        for fd in (self._to, self._answers, self._pidfd):
            os.close(fd)
        if self._popen is not None:
            self._popen.kill()  # a wrapper that stayed around
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._popen.wait(5)

    @property
    def transcript(self) -> str:
        """Return all commands and answers so far."""
        return "\n".join(self._spoken)

    # Underneath

    def _greet(self) -> None:
        """Read the first line, which carries the pid: under a wrapper it may differ from the started
        process's.
        """
        pid = self._wait(self._next_result, TIMEOUT)["hello"]
        if pid != self.pid:
            os.close(self._pidfd)
            self.pid, self._pidfd = pid, os.pidfd_open(pid)

    def _next_result(self) -> dict[str, Any] | None:
        return self._results.popleft() if self._results else None

    def _wait(self, ready: Callable[[], T | None], timeout: float) -> T:
        """Return the first result of `ready`; kill the process after the time limit."""
        deadline = time.monotonic() + timeout
        while (got := ready()) is None:
            if self._death is not None:
                raise ActorDied(self, self._death, f"died: {self._death}")
            if not self._advance(deadline):
                self.kill()
                raise ActorTimeout(self, f"no answer within {timeout} s")
        return got

    def _advance(self, deadline: float) -> bool:
        """Wait for output or death and note either; False after the deadline."""
        if self._death is not None:
            return True
        poll = select.poll()
        poll.register(self._answers, select.POLLIN)
        poll.register(self._pidfd, select.POLLIN)
        events = dict(poll.poll(max(deadline - time.monotonic(), 0) * 1000))
        self._drain()  # all output arrives before the death is seen
        if self._pidfd in events:
            self._death = self._exit_status()
            self._spoken.append(f"died: {self._death}")
        elif events.get(self._answers, 0) & select.POLLHUP:
            time.sleep(0.001)  # dying: the pidfd follows
        return self._death is not None or time.monotonic() < deadline

    def _drain(self) -> None:
        """Read and sort all available output."""
        if self._closed:
            return
        with contextlib.suppress(BlockingIOError):
            while chunk := os.read(self._answers, 65536):
                *lines, self._partial = (self._partial + chunk).split(b"\n")
                for line in lines:
                    self._note(line.decode())

    def _note(self, line: str) -> None:
        self._spoken.append(f"< {line}")
        said = json.loads(line)
        if "signal" in said:
            self._signals.append(Signal(**said["signal"]))
        else:
            self._results.append(said)

    def _exit_status(self) -> Death:
        if self._popen is not None and self._popen.pid == self.pid:
            with contextlib.suppress(subprocess.TimeoutExpired):  # a tracer has not released the process yet
                status = self._popen.wait(2)
                return Death(signal=signal.Signals(-status)) if status < 0 else Death(exit=status)
        return _exit_status_of_stranger(self.pid, self._pidfd)


def _exit_status_of_stranger(pid: int, pidfd: int) -> Death:
    """Return the end of a process that is no child; its parent may or may not have reaped it."""
    for _ in range(200):
        status = _zombie_status(pid)
        if status is None:
            status = _reaped_status(pidfd)
        if status is not None:
            return Death.of_wait_status(status)
        time.sleep(0.005)
    return Death()


def _zombie_status(pid: int) -> int | None:
    """The exit_code in /proc/PID/stat: field 52, readable between death and reaping."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return None
    fields = stat.rpartition(")")[2].split()
    return int(fields[49]) if fields[0] == "Z" else None


def _reaped_status(pidfd: int) -> int | None:
    """Return the status after reaping, from the pidfd, on kernels since 6.15."""
    info = bytearray(struct.pack("=Q", PIDFD_INFO_EXIT).ljust(64, b"\0"))
    try:
        fcntl.ioctl(pidfd, PIDFD_GET_INFO, info)
    except OSError as error:
        if error.errno in (errno.ESRCH, errno.ENOTTY, errno.EINVAL):
            return None
        raise
    (mask,) = struct.unpack_from("=Q", info)
    (status,) = struct.unpack_from("=i", info, 60)
    return int(status) if mask & PIDFD_INFO_EXIT else None
