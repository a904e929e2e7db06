"""The supervisor's end of a ``daxemu run``: the calls that its helper forwards, and answers to them.

A call arrives as a struct seccomp_notif in a packet. The answer goes to a copy of the listener, so the helper
takes no part in it. A call that several supervisors must see carries the flag ``_ACKNOWLEDGE`` for all but
the last: in place of CONTINUE such a supervisor returns the id to the helper.

Invariants:
- each call gets an answer: the handler's, or the answer for a failed handler (ENODEV for mmap(2), otherwise
  CONTINUE);
- a packet that is no call is dropped; the kernel refuses an answer for an id that does not wait.
"""

from __future__ import annotations

import ctypes
import errno
import os
import socket
import stat
import struct
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Self

import trio

from daxemu.errors import PermissionDenied
from daxemu.events import DirectMappingRefused, Emit
from daxemu.host.proc import status
from daxemu.host.proc.mountinfo import printable
from daxemu.host.proc.processes import comm_of, process_of
from daxemu.host.proc.procfs import GONE
from daxemu.host.run import seccomp, zone
from daxemu.host.run.filters import AUDIT_ARCH_X86_64, X32, Nr
from daxemu.host.run.helper import Handover
from daxemu.host.run.seccomp import CONTINUE, Answer, NotifiedCall
from daxemu.host.unexpected import Nursery, Unexpected

_ACKNOWLEDGE = 1  # host/run/forward.c
_BATCH = 64
"""Packets taken in one step of the event loop."""
_ID = struct.Struct("=Q")
_LISTENER = "anon_inode:seccomp notify"
_PIDFD_GETFD = 438  # asm/unistd.h, of every machine

_libc = ctypes.CDLL(None, use_errno=True)
_libc.syscall.restype = ctypes.c_long

Handle = Callable[["AttachedRun", NotifiedCall], Awaitable[Answer | None]]
"""Decide a call. Return the answer; None if :meth:`AttachedRun.answer` was or will be called."""


class AttachedRun:
    """Calls of one ``daxemu run``. ``zone``: the addresses for its direct mappings of this mount. Belongs to
    the trio thread.
    """

    def __init__(self, listener: int, sock: socket.socket, given: range, filters: int = 1) -> None:
        """Take over both descriptors. ``filters``: number of seccomp(2) filters of the run's command."""
        self.zone = given
        self.is_simulated = False
        """True if failures by madvise(2) poison nothing (``daxemu run --simulated``)."""
        self._listener = listener
        self._socket = sock
        self.filters = filters
        self._to_acknowledge: set[int] = set()
        self._under_way: set[int] = set()

    @classmethod
    def take(cls, pid: int, offered: Handover, socket_ino: int) -> Self:
        """Copy the descriptors of process ``pid``. Precondition: ``pid`` is the process that asks. Raises
        PermissionDenied for descriptors of another kind, or that this process may not copy.

        ``socket_ino``: inode number of the socket; a request that waited too long may name a descriptor that
        means another socket by now.
        """
        if offered.zone not in zone.SLICES:
            raise PermissionDenied(f"{offered.zone.start:#x} is not the start of a slice of the zone")
        listener, sock = _copies(pid, offered.listener, offered.socket)
        if _name(listener) != _LISTENER or not _is_socket(sock, socket_ino):
            os.close(listener)
            os.close(sock)
            raise PermissionDenied(
                f"descriptors {offered.listener} and {offered.socket} of process {pid} are not a listener of "
                f"seccomp(2) and the socket with inode {socket_ino}"
            )
        helper = status.find(pid)
        filters = 1 + (helper.seccomp_filters if helper is not None else 0)
        return cls(listener, socket.socket(fileno=sock), offered.zone, filters)

    async def serve(self, handle: Handle, emit: Emit, nursery: Nursery, unexpected: Unexpected) -> None:
        """Give each call to ``handle``, in a task of ``nursery``, until the helper or its last process ends.

        A handler may still be at work at the return: its answer then has no effect.
        """
        try:
            while True:
                await trio.lowlevel.wait_readable(self._socket)
                for _ in range(_BATCH):
                    raw = self._packet()
                    if raw is None:
                        break
                    if not raw:
                        return
                    if len(raw) == seccomp.NOTIFICATION.size:
                        self._start(raw, handle, emit, nursery, unexpected)
                await trio.lowlevel.checkpoint()
        finally:
            self.close()

    def close(self) -> None:
        """Close both descriptors: the helper then answers for this mount."""
        if self._listener >= 0:
            trio.lowlevel.notify_closing(self._socket)
            self._socket.close()
            os.close(self._listener)
            self._listener = -1

    def is_waiting(self, call: NotifiedCall) -> bool:
        """Return True if the thread still waits: data read of /proc/TID before is then the thread's own."""
        return self._listener >= 0 and seccomp.is_waiting(self._listener, call)

    @property
    def listener(self) -> int:
        """Descriptor of the listener; -1 after the end of the helper."""
        return self._listener

    def is_last(self, call: NotifiedCall) -> bool:
        """Return True if no other supervisor must see the call."""
        return call.id not in self._to_acknowledge

    def restarted(self, call: NotifiedCall) -> None:
        """Note that the call was answered by ``listener``, and is made again."""
        if call.id in self._to_acknowledge:
            self._to_acknowledge.discard(call.id)
            self._acknowledge(call)  # the helper forgets the call

    def add_fd(self, call: NotifiedCall, fd: int, *, number: int | None = None) -> int:
        """Copy a descriptor into the process that waits: see ``seccomp.add_fd``. Raises FileNotFoundError
        also after the end of the helper.
        """
        if self._listener < 0:
            raise FileNotFoundError(errno.ENOENT, "the helper of daxemu run has ended")
        return seccomp.add_fd(self._listener, call, fd, number=number)

    def answer(self, call: NotifiedCall, answer: Answer) -> bool:
        """Let the call return. Return False if no thread waits for the answer.

        CONTINUE of a call that other supervisors must see first goes to the helper.
        """
        if self._listener < 0:
            return False
        if call.id in self._to_acknowledge:
            self._to_acknowledge.discard(call.id)
            if answer.proceed:
                return self._acknowledge(call)
            answered = seccomp.answer(self._listener, call, answer)
            self._acknowledge(call)  # the helper forgets the call
            return answered
        return seccomp.answer(self._listener, call, answer)

    def _acknowledge(self, call: NotifiedCall) -> bool:
        try:
            self._socket.send(_ID.pack(call.id), socket.MSG_DONTWAIT | socket.MSG_NOSIGNAL)
        except OSError:
            # No room: the helper reads nothing. Only this call loses the other supervisors' notice.
            return seccomp.answer(self._listener, call, CONTINUE)
        return True

    def _packet(self) -> bytes | None:
        """Return the next packet; empty at the end, None if none has arrived."""
        try:
            return self._socket.recv(seccomp.NOTIFICATION.size + 1, socket.MSG_DONTWAIT)
        except BlockingIOError:
            return None
        except OSError:
            return b""

    def _start(
        self, raw: bytes, handle: Handle, emit: Emit, nursery: Nursery, unexpected: Unexpected
    ) -> None:
        call = seccomp.parse(raw)
        if call.id in self._under_way or not self.is_waiting(call):
            return
        if seccomp.flags_of(raw) & _ACKNOWLEDGE:
            self._to_acknowledge.add(call.id)
        if seccomp.arch_of(raw) != AUDIT_ARCH_X86_64 or call.nr & X32:
            reason = "the program is not a 64-bit program: addresses below 4 GiB have no room for the media"
            self.answer(call, refused(call, reason, emit))
            return
        self._under_way.add(call.id)
        nursery.start_soon(self._one, call, handle, unexpected)

    async def _one(self, call: NotifiedCall, handle: Handle, unexpected: Unexpected) -> None:
        answer: Answer | None = for_failure(call)
        try:
            answer = await handle(self, call)
        except Exception as error:  # noqa: BLE001 - ends this call only
            unexpected.report(f"the system call {call.nr} of thread {call.tid}", error)
        finally:
            self._under_way.discard(call.id)
            if answer is not None:
                self.answer(call, answer)


def for_failure(call: NotifiedCall) -> Answer:
    """Return the answer for a call that cannot be decided: ENODEV for mmap(2), otherwise CONTINUE."""
    return Answer(error=errno.ENODEV) if call.nr == Nr.MMAP else CONTINUE


def refused(call: NotifiedCall, reason: str, emit: Emit) -> Answer:
    """Return ENODEV for an mmap(2), and emit why. ``reason``: one line that says what to do."""
    try:
        path = printable(Path(f"/proc/{call.tid}/fd/{call.args[4] & 0xFFFFFFFF}").readlink())
    except OSError:
        path = "a file"
    pid = process_of(call.tid)
    emit(DirectMappingRefused(pid=pid, tid=call.tid, comm=comm_of(pid), path=path, reason=reason))
    return Answer(error=errno.ENODEV)


def tracer_of(tid: int) -> str | None:
    """Return the reason to refuse a direct mapping to a traced thread; None if no process traces the thread.

    An agent is made by ptrace(2), and a thread has one tracer at a time.
    """
    try:
        tracer = status.read(tid).tracer
    except GONE:
        return None
    if not tracer:
        return None
    return (
        f"{comm_of(tracer)} ({tracer}) traces the program: start the tracer later (gdb -p, strace -p), after "
        "the program's first direct mapping"
    )


def _copies(pid: int, *fds: int) -> list[int]:
    """Return copies of descriptors of another process. Raises PermissionDenied."""
    copies: list[int] = []
    try:
        pidfd = os.pidfd_open(pid)
        try:
            for fd in fds:
                copy = _libc.syscall(_PIDFD_GETFD, pidfd, fd, 0)
                if copy < 0:
                    number = ctypes.get_errno()
                    raise OSError(number, os.strerror(number))
                copies.append(copy)
        finally:
            os.close(pidfd)
    except (OSError, ctypes.ArgumentError) as error:
        for copy in copies:
            os.close(copy)
        raise PermissionDenied(f"cannot copy descriptors of process {pid}: {error}") from error
    return copies


def _name(fd: int) -> str:
    return str(Path(f"/proc/self/fd/{fd}").readlink())


def _is_socket(fd: int, ino: int) -> bool:
    found = os.fstat(fd)
    if not stat.S_ISSOCK(found.st_mode) or found.st_ino != ino:
        return False
    with socket.socket(fileno=os.dup(fd)) as sock:
        return (sock.family, sock.type) == (socket.AF_UNIX, socket.SOCK_SEQPACKET)
