"""Agent: a process that shares the memory of a program (clone(CLONE_VM)), and nothing else of the program.

Purpose: batches of system calls in an address space, without a wait in the event loop. A SEQPACKET socket
connects the supervisor with the agent (agent.c): a packet with calls goes out, a packet with their results
comes back. The socket is the agent's life line in both directions: the agent ends when the supervisor has
ended, by whatever, and the supervisor wakes all waiting tasks when the agent has ended.

Invariant: a batch has one reply, which is dropped if the task that waits was cancelled.
"""

from __future__ import annotations

import array
import contextlib
import ctypes
import errno
import os
import select
import signal
import socket
import struct
import time
from collections import deque
from collections.abc import Callable, Sequence
from typing import Protocol, Self

import trio

from daxemu.host.descriptors import is_in_reserve
from daxemu.host.direct import limits
from daxemu.host.direct.code import BATCH, CALLS_IN_BATCH, MEMORY, WILL
from daxemu.host.direct.errors import AddressSpaceGone, AgentRefused
from daxemu.host.direct.locking import held
from daxemu.host.direct.syscalls import (
    NR_CLOSE,
    NR_FUTEX,
    NR_GETPID,
    NR_IOCTL,
    NR_MREMAP,
    NR_PRCTL,
    NR_USERFAULTFD,
    Syscall,
)
from daxemu.ranges import Range
from daxemu.uapi import U64_MAX

ANSWER_PATIENCE = 20.0
"""Seconds of a batch without a reply after which an address space cannot follow changes of files any more:
the process is frozen, or a thread holds mmap_lock in a page fault that a foreign server never answers.
"""
SOON = 2
"""Milliseconds for which Agent.begin() waits: an agent answers in 0.04 ms, if a processor is free."""
SPIN = 40_000 if len(os.sched_getaffinity(0)) > 1 else 0
"""Nanoseconds of SOON without sleep, if the agent has another processor: a sleep and its end take 30 us."""
_MOST_BYTES = 8 * CALLS_IN_BATCH
"""Bytes of the longest reply."""
_CALL = struct.Struct("=7Q")
_FOURTH = 4 * 8  # offset of the fourth argument in a call
_CREDENTIALS = struct.Struct("=3i")
_HEIR = struct.Struct("=2Q")
MOST_OUTSIDE = (MEMORY - WILL) // _HEIR.size - 1
"""Ranges of addresses outside the zone that an address space can map."""
_PIDFD_GETFD = 438  # asm/unistd.h, of every machine

# The agent has the rights of its program, and userfaultfd(2) wants more. The device only wants to be opened.
_DEVICE = "/dev/userfaultfd"  # since Linux 6.1
_DEVICE_FD = 3  # of the agent: a second userfaultfd is made for mappings outside the zone
_PR_GET_CHILD_SUBREAPER = 37  # uapi/linux/prctl.h
_FUTEX_WAKE = 1  # uapi/linux/futex.h
_IOC_NEW = 0xAA00  # uapi/linux/userfaultfd.h: USERFAULTFD_IOC_NEW

_FEW = 4
"""Calls that an agent makes in some 20 us."""
_CALLS_UNDER_WAY = 4 * CALLS_IN_BATCH
"""Calls sent without a reply. A packet fits into the socket's buffer several times."""

_libc = ctypes.CDLL(None, use_errno=True)
_libc.syscall.restype = ctypes.c_long


class Agent(Protocol):
    """Maker of system calls in one address space. ``pid``: the agent, ``tgid``: the program."""

    @property
    def pid(self) -> int:
        """Process id of the agent; 0 until the agent has made its first batch."""

    @property
    def tgid(self) -> int:
        """Process id of the program; 0 until a fork has made the process."""

    async def run(self, batch: Sequence[Syscall]) -> list[int]:
        """Make the system calls in order, all of them whatever their results.

        Return the results; a negative result is -errno. Several tasks may call: batches run in the order of
        the calls, one after the other. Raises AddressSpaceGone if the process ended, or ends meanwhile: the
        number of calls made is not known then.
        """

    def begin(self, batch: Sequence[Syscall]) -> AgentReply | None:
        """Send a batch of 1 to CALLS_IN_BATCH calls, and wait for its reply up to SOON, in which nothing
        else runs in this process. Return the reply, which may not have come yet; None if the agent is not
        idle, or has ended: then nothing is sent.

        Precondition: no call makes an event of the userfaultfd, which nobody reads meanwhile.
        """

    async def completed(self, reply: AgentReply) -> list[int]:
        """Return the results of a batch, once they have come. Raises AddressSpaceGone. Ends the agent after
        ANSWER_PATIENCE.
        """

    @property
    def guard_fd(self) -> int:
        """Descriptor of the agent for ``syscalls.guard``: the userfaultfd of mappings outside the zone."""

    def bequeath(self, ranges: Sequence[Range]) -> None:
        """Have each access to ``ranges``, outside the zone, fail once the supervisor has ended. Replaces the
        ranges of the last call.

        Precondition: at most MOST_OUTSIDE ranges. Raises AddressSpaceGone.
        """


class AgentReply:
    """Results of a batch that was sent; None: none have come yet, or none will come."""

    def __init__(self) -> None:
        self.results: list[int] | None = None
        self.has_come = trio.Event()


class ProcessAgent:
    """Agent at the other end of a socket. Belongs to the trio thread."""

    _immediate = 0
    """Number of batches answered without a step of the event loop, of all agents."""

    def __init__(self, sock: socket.socket, fds: Sequence[int]) -> None:
        """Take over ``sock``, and have the agent receive copies of ``fds`` with its first batch: the media
        and the void, which become its descriptors MEDIA_FD and VOID_FD. The caller may close ``fds`` at once.
        Raises OSError, with ``sock`` closed, if no descriptor is free.
        """
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_PASSCRED, 1)
        self.pid = 0
        self.tgid = 0
        self.memory = 0
        """Address of the agent's memory."""
        sock.setblocking(False)
        self._raw = sock
        self._socket = trio.socket.from_stdlib_socket(sock)
        self._fds: list[int] = []
        self._has_device = False
        try:
            for fd in fds:
                self._fds.append(os.dup(fd))
            with contextlib.suppress(FileNotFoundError):
                self._fds.append(os.open(_DEVICE, os.O_RDWR | os.O_CLOEXEC))
                self._has_device = True
        except OSError:
            self._drop_fds()
            self._socket.close()
            raise
        self._soon = select.poll()
        self._soon.register(sock, select.POLLIN)
        self._turn = trio.Lock()
        self._expected: deque[AgentReply] = deque()
        self._pidfd = -1
        self._is_closed = False
        self.ended = trio.Event()
        """Set when the agent has ended, or is to end."""
        self._on_end: Callable[[], None] | None = None
        self._awaits_child = False
        self.told = trio.Event()
        """Set when the child of a fork has told its process id, or never will."""

    @classmethod
    def pair(cls, fds: Sequence[int]) -> tuple[Self, socket.socket]:
        """Return an agent, and the socket that the agent is to get. Raises AgentRefused if no descriptor is
        free but those in reserve.
        """
        try:
            ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
            try:
                if is_in_reserve(max(ours.fileno(), theirs.fileno())):
                    raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))
                return cls(ours, fds), theirs
            except OSError:
                ours.close()
                theirs.close()
                raise
        except OSError as error:
            raise AgentRefused(
                f"the supervisor has no free descriptor ({error.strerror}): end some programs of daxemu run"
            ) from error

    async def run(self, batch: Sequence[Syscall]) -> list[int]:
        """See :meth:`Agent.run`. Ends the agent after ANSWER_PATIENCE without a reply.

        A batch of few calls is answered without a step of the event loop, but for every sixteenth. A
        mremap(2) may wait until another task has read its event.
        """
        results: list[int] = []
        if 0 < len(batch) <= _FEW and not any(call.number == NR_MREMAP for call in batch):
            reply = self.begin(batch)
            if reply is not None:
                ProcessAgent._immediate += 1
                if ProcessAgent._immediate % 16 == 0:
                    await trio.lowlevel.checkpoint()
                return await self.completed(reply)
        async with held(self._turn):
            for first in range(0, len(batch), _CALLS_UNDER_WAY):
                burst = batch[first : first + _CALLS_UNDER_WAY]
                packets = range(0, len(burst), CALLS_IN_BATCH)
                for reply in [await self._sent(burst[at : at + CALLS_IN_BATCH]) for at in packets]:
                    results += await self.completed(reply)
        return results

    async def completed(self, reply: AgentReply) -> list[int]:
        """See :meth:`Agent.completed`."""
        if reply.results is not None:
            return reply.results
        with trio.move_on_after(ANSWER_PATIENCE):
            await reply.has_come.wait()
        if reply.results is None:
            self.close()
            raise self._gone()
        return reply.results

    def begin(self, batch: Sequence[Syscall]) -> AgentReply | None:
        """See :meth:`Agent.begin`."""
        if self._is_closed or self._fds or self._expected or self._turn.locked():
            return None
        try:
            self._raw.send(self._packed(batch))
        except OSError:  # no room, or the agent has ended
            return None
        reply = AgentReply()
        self._expected.append(reply)
        with contextlib.suppress(OSError):  # no reply yet; or the agent has ended, which serve() sees
            if (self._comes_at_once() or self._soon.poll(SOON)) and (packet := self._raw.recv(_MOST_BYTES)):
                self._take(packet)
        return reply

    def _comes_at_once(self) -> bool:
        """Return True once a reply is there; False after SPIN."""
        ends = time.monotonic_ns() + SPIN
        while time.monotonic_ns() < ends:
            if self._soon.poll(0):
                return True
        return False

    async def serve(self) -> None:
        """Receive replies until the agent ends. A task of its own calls this, once."""
        try:
            await self._receive()
        finally:
            self.close()

    def on_end(self, call: Callable[[], None]) -> None:
        """Call ``call`` when the agent has ended, or is to end: at once if it has."""
        self._on_end = call
        if self._is_closed:
            call()

    def awaits_child(self) -> None:
        """Expect a packet of the child of a fork, which makes its agent: see ``told``."""
        self._awaits_child = True

    async def _receive(self) -> None:
        while not self._is_closed:
            try:
                packet, ancillary, _, _ = await self._socket.recvmsg(
                    _MOST_BYTES, socket.CMSG_SPACE(_CREDENTIALS.size)
                )
            except (ConnectionResetError, trio.ClosedResourceError):
                return
            except OSError:
                if self._is_closed:  # EBADF, if closed at the checkpoint before the call
                    return
                raise
            if not packet:
                return
            if self._awaits_child:
                self._awaits_child = False
                self.tgid = _sender(ancillary)
                self.told.set()
                continue
            if not self.pid and not self._identify(_sender(ancillary)):
                return
            self._take(packet)

    def _take(self, packet: bytes) -> None:
        reply = self._expected.popleft()
        reply.results = [value for (value,) in struct.iter_unpack("=q", packet)]
        reply.has_come.set()

    def close(self) -> None:
        """End the agent, and wake all tasks that wait."""
        if self._is_closed:
            return
        self._is_closed = True
        self.ended.set()
        self.told.set()
        self._socket.close()
        self._drop_fds()
        if self._pidfd >= 0:
            with contextlib.suppress(ProcessLookupError):
                signal.pidfd_send_signal(self._pidfd, signal.SIGKILL)
            os.close(self._pidfd)
            self._pidfd = -1
        while self._expected:
            self._expected.popleft().has_come.set()
        if self._on_end is not None:
            self._on_end()

    async def take_userfaultfd(self) -> int:
        """Have the agent open a userfaultfd of its address space; return a copy of it in this process, for
        which nobody else has a descriptor. Raises AddressSpaceGone, and OSError of userfaultfd(2) or
        pidfd_getfd(2).
        """
        flags = os.O_CLOEXEC | os.O_NONBLOCK
        if self._has_device:
            (there,) = await self.run([Syscall(NR_IOCTL, (_DEVICE_FD, _IOC_NEW, flags))])
        else:
            (there,) = await self.run([Syscall(NR_USERFAULTFD, (flags,))])
        _raise_for("userfaultfd", there)
        copy = int(_libc.syscall(_PIDFD_GETFD, self._pidfd, there, 0))
        number = ctypes.get_errno()
        await self.run([Syscall(NR_CLOSE, (there,))])
        if copy < 0:
            _raise_for("pidfd_getfd", -number)
        return copy

    @property
    def guard_fd(self) -> int:
        """See :meth:`Agent.guard_fd`."""
        return _DEVICE_FD + self._has_device

    def give(self, fd: int) -> None:
        """Have the agent receive a copy of ``fd`` with the next batch: the userfaultfd of ``guard_fd``."""
        self._fds.append(os.dup(fd))

    def bequeath(self, ranges: Sequence[Range]) -> None:
        """See :meth:`Agent.bequeath`."""
        packed = b"".join(_HEIR.pack(part.start, part.length) for part in ranges) + bytes(_HEIR.size)
        buffer = ctypes.create_string_buffer(packed)
        here = struct.pack("=2Q", ctypes.addressof(buffer), len(packed))
        there = struct.pack("=2Q", self.memory + WILL, len(packed))
        if _libc.process_vm_writev(self.pid, here, 1, there, 1, 0) != len(packed):
            raise self._gone()

    async def settle(self, word: int = 0) -> None:
        """Make the first batch of an agent whose address space has a userfaultfd already: a fork's.

        ``word``: address of the word that the child waits for, until the word is 0 (agent.c); 0: the child
        does not wait. prctl(2) is a system call that stores a 0 of 4 bytes.
        """
        go = [Syscall(NR_PRCTL, (_PR_GET_CHILD_SUBREAPER, word)), Syscall(NR_FUTEX, (word, _FUTEX_WAKE, 1))]
        await self.run(go if word else [Syscall(NR_GETPID, ())])

    async def _sent(self, calls: Sequence[Syscall]) -> AgentReply:
        """Send a packet of calls; return its reply, which has not come yet."""
        packet = self._packed(calls)
        reply = AgentReply()
        try:
            if self._is_closed:
                raise BrokenPipeError
            if self._fds:
                rights = array.array("i", self._fds)
                self._expected.append(reply)
                await self._socket.sendmsg([packet], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, rights)])
                self._drop_fds()
            else:
                self._expected.append(reply)
                try:
                    self._raw.send(packet)  # a send of trio is a step of the event loop more
                except BlockingIOError:
                    await self._socket.send(packet)
        except (BrokenPipeError, ConnectionResetError, trio.ClosedResourceError):
            raise self._gone() from None
        return reply

    def _packed(self, calls: Sequence[Syscall]) -> bytes:
        try:  # most calls have six arguments, none of them negative
            return b"".join([_CALL.pack(call.number, *call.args) for call in calls])
        except struct.error:
            return b"".join(self._packed_call(index, call) for index, call in enumerate(calls))

    def _packed_call(self, index: int, call: Syscall) -> bytes:
        args = [value & U64_MAX for value in (*call.args, 0, 0, 0, 0, 0, 0)[:6]]
        if call.is_guard:
            args[2] = self.memory + BATCH + index * _CALL.size + _FOURTH
        return _CALL.pack(call.number | call.is_guard << 32, *args)

    def _identify(self, pid: int) -> bool:
        """Note the agent's process id. Return False if the agent has ended since."""
        try:
            self._pidfd = os.pidfd_open(pid)
        except ProcessLookupError:
            return False
        self.pid = pid
        with contextlib.suppress(OSError):  # the agent has ended: serve() sees it
            limits.lift(pid)
        return True

    def _drop_fds(self) -> None:
        for fd in self._fds:
            os.close(fd)
        self._fds = []

    def _gone(self) -> AddressSpaceGone:
        return AddressSpaceGone(f"process {self.tgid} has no agent any more: it ended or called execve(2)")


def _sender(ancillary: list[tuple[int, int, bytes]]) -> int:
    """Return the process id of a packet's sender, in this pid namespace, from the kernel's credentials."""
    for level, kind, data in ancillary:
        if (level, kind) == (socket.SOL_SOCKET, socket.SCM_CREDENTIALS):
            return int(_CREDENTIALS.unpack(data[: _CREDENTIALS.size])[0])
    raise AssertionError("SO_PASSCRED is set")


def _raise_for(what: str, result: int) -> None:
    if result < 0:
        if result == -errno.ESRCH:
            raise AddressSpaceGone(f"{what}: the process has ended")
        raise OSError(-result, f"{what}: {os.strerror(-result)}")
