"""The supervisor's end of a ``daxemu run``: the calls that its helper forwards, and answers to them.

A call arrives as a struct seccomp_notif in a packet. The answer goes to a copy of the listener, so the helper
takes no part in it. A call that several supervisors must see carries the flag ``_ACKNOWLEDGE`` for all but
the last: in place of CONTINUE such a supervisor returns the id to the helper.

Invariants:
- each call gets an answer: the handler's, or the answer for a failed handler (``for_failure``);
- a packet that is no call is dropped; the kernel refuses an answer for an id that does not wait.
"""

from __future__ import annotations

import ctypes
import errno
import os
import platform
import select
import socket
import stat
import struct
from collections.abc import Awaitable, Callable
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Self

import trio

from daxemu.errors import Busy, PermissionDenied
from daxemu.events import DirectMappingRefused, Emit
from daxemu.host.descriptors import EXHAUSTED, is_in_reserve
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
_TID = struct.Struct("=I")  # of struct seccomp_notif, at byte 8
CREDENTIALS = struct.Struct("=3i")
"""struct ucred: pid, uid, gid."""
_LISTENER = "anon_inode:seccomp notify"
_PIDFD_GETFD = 438  # asm/unistd.h, of every machine
_NR_KCMP = {"x86_64": 312}.get(platform.machine(), 272)  # asm/unistd.h
_KCMP_FILE = 0  # uapi/linux/kcmp.h
_MOST_FD = 2**31 - 1

_libc = ctypes.CDLL(None, use_errno=True)
_libc.syscall.restype = ctypes.c_long

Handle = Callable[["AttachedRun", NotifiedCall], Awaitable[Answer | None]]
"""Decide a call. Return the answer; None if :meth:`AttachedRun.answer` was or will be called."""


class AttachedRun:
    """Calls of one ``daxemu run``. ``zone``: the addresses for its direct mappings of this mount. Belongs to
    the trio thread.
    """

    def __init__(self, listener: int, sock: socket.socket, given: range, filters: int = 1) -> None:
        """Take over both descriptors. ``filters``: number of seccomp(2) filters of the run's command. Raises
        OSError, with ``sock`` detached, if no descriptor is free.
        """
        try:
            # Readable once the last process under the filter has ended: EPOLLHUP. Calls are POLLIN.
            self._exits = select.epoll()
        except OSError:
            sock.detach()
            raise
        self._exits.register(listener, 0)
        self.zone = given
        self.is_simulated = False
        """True if failures by madvise(2) poison nothing (``daxemu run --simulated``)."""
        self._listener = listener
        self._socket = sock
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_PASSCRED, 1)
        self._helper = sender(sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, CREDENTIALS.size))
        helper = status.find(self._helper)
        self._is_foreign = helper is not None and helper.ns_tgid != self._helper
        """True for a helper in another pid namespace."""
        self.filters = filters
        self._to_acknowledge: set[int] = set()
        self._under_way: set[int] = set()

    @classmethod
    def take(cls, pid: int, offered: Handover, socket_ino: int) -> Self:
        """Copy the descriptors of process ``pid``. Precondition: ``pid`` is the process that asks. Raises
        PermissionDenied for descriptors of another kind, or that this process may not copy; Busy
        if this process has no free descriptor.

        ``socket_ino``: inode number of the socket; a request that waited too long may name a descriptor that
        means another socket by now.
        """
        if offered.zone not in zone.SLICES:
            raise PermissionDenied(f"{offered.zone.start:#x} is not the start of a slice of the zone")
        with ExitStack() as undo:
            listener, sock = _copies(pid, offered.listener, offered.socket)
            undo.callback(os.close, listener)
            undo.callback(os.close, sock)
            if is_in_reserve(max(listener, sock)):
                raise _no_descriptor()
            try:
                if _name(listener) != _LISTENER or not _is_connected_socket(sock, socket_ino):
                    raise PermissionDenied(
                        f"descriptors {offered.listener} and {offered.socket} of process {pid} are not a "
                        f"listener of seccomp(2) and a connected SOCK_SEQPACKET socket, inode {socket_ino}"
                    )
                helper = status.find(pid)
                filters = 1 + (helper.seccomp_filters if helper is not None else 0)
                made = cls(listener, socket.socket(fileno=sock), offered.zone, filters)
            except OSError as error:
                raise _no_descriptor() from error
            undo.pop_all()
        return made

    async def serve(self, handle: Handle, emit: Emit, nursery: Nursery, unexpected: Unexpected) -> None:
        """Give each call to ``handle``, in a task of ``nursery``, until the helper or its last process ends.

        A handler may still be at work at the return: its answer then has no effect.
        """
        try:
            async with trio.open_nursery() as waits:
                waits.start_soon(self._await_last_exit, waits.cancel_scope)
                await self._receive(partial(self._start, handle, emit, nursery, unexpected))
                waits.cancel_scope.cancel()
        finally:
            self.close()

    async def _receive(self, start: Callable[[bytes], None]) -> None:
        """Pass calls on until the helper closes the socket."""
        while True:
            await trio.lowlevel.wait_readable(self._socket)
            for _ in range(_BATCH):
                raw = self._packet()
                if raw is None:
                    break
                if not raw:
                    return
                if len(raw) == seccomp.NOTIFICATION.size:
                    start(raw)
            await trio.lowlevel.checkpoint()

    async def _await_last_exit(self, scope: trio.CancelScope) -> None:
        """Cancel ``scope`` when no process under the filter is left, whoever has the socket still open."""
        await trio.lowlevel.wait_readable(self._exits.fileno())
        scope.cancel()

    def has_listener_of(self, other: AttachedRun) -> bool:
        """Return whether both runs have the same listener, and the helper of this one has not ended."""
        if self.is_closed or other.is_closed:
            return False
        own = os.getpid()
        is_same = _libc.syscall(_NR_KCMP, own, own, _KCMP_FILE, self._listener, other._listener) == 0
        return is_same and not self._helper_has_ended()

    def _helper_has_ended(self) -> bool:
        try:
            return not self._socket.recv(1, socket.MSG_DONTWAIT | socket.MSG_PEEK)
        except BlockingIOError:
            return False
        except OSError:
            return True

    def close(self) -> None:
        """Close both descriptors: the helper then answers for this mount."""
        if self._listener >= 0:
            trio.lowlevel.notify_closing(self._socket)
            trio.lowlevel.notify_closing(self._exits.fileno())
            self._exits.close()  # before the listener: other copies of the listener would stay in the epoll
            self._socket.close()
            os.close(self._listener)
            self._listener = -1

    @property
    def is_closed(self) -> bool:
        """True once no more call can come: the helper or the last process under the filter has ended."""
        return self._listener < 0

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
            raw, ancillary, _, _ = self._socket.recvmsg(
                seccomp.NOTIFICATION.size + 1, socket.CMSG_SPACE(CREDENTIALS.size), socket.MSG_DONTWAIT
            )
        except BlockingIOError:
            return None
        except OSError:
            return b""
        return self._translated(raw, ancillary) if self._is_foreign else raw

    def _translated(self, raw: bytes, ancillary: list[tuple[int, int, bytes]]) -> bytes:
        """Replace the thread id by that in this pid namespace, which the credentials of the packet have.

        0: the helper may not name another process, or the thread is dead.
        """
        tid = next((sender(data) for _, kind, data in ancillary if kind == socket.SCM_CREDENTIALS), 0)
        if len(raw) != seccomp.NOTIFICATION.size:
            return raw
        return raw[:8] + _TID.pack(0 if tid == self._helper else tid) + raw[12:]

    def _start(
        self, handle: Handle, emit: Emit, nursery: Nursery, unexpected: Unexpected, raw: bytes
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
        answer: Answer | None = (
            Answer(error=errno.ENODEV) if call.nr == Nr.MMAP else CONTINUE
        )  # at the unmount
        try:
            answer = await handle(self, call)
        except Exception as error:  # noqa: BLE001 - ends this call only
            unexpected.report(f"the system call {call.nr} of thread {call.tid}", error)
            answer = for_failure(call)
        finally:
            self._under_way.discard(call.id)
            if answer is not None:
                self.answer(call, answer)


def sender(credentials: bytes) -> int:
    """Return the process id of a struct ucred, in this pid namespace; 0 if it has none here."""
    return int(CREDENTIALS.unpack(credentials[: CREDENTIALS.size])[0])


def for_failure(call: NotifiedCall) -> Answer:
    """Return the answer for a call that cannot be decided: an error, because a call of the kernel alone would
    change mappings unseen. Only execve(2), which ends all mappings, goes on.
    """
    match call.nr:
        case Nr.MMAP:
            return Answer(error=errno.ENODEV)
        case Nr.EXECVE | Nr.EXECVEAT:
            return CONTINUE
        case Nr.FORK | Nr.CLONE:
            return Answer(error=errno.EAGAIN)
    return Answer(error=errno.ENOMEM)


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
    if wrong := [fd for fd in fds if not 0 <= fd <= _MOST_FD]:
        raise PermissionDenied(f"{wrong[0]} is no descriptor of process {pid}")
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
        if isinstance(error, OSError) and error.errno in EXHAUSTED:
            raise _no_descriptor() from error
        raise PermissionDenied(f"cannot copy descriptors of process {pid}: {error}") from error
    return copies


def _no_descriptor() -> Busy:
    return Busy("the supervisor has no free descriptor: end some programs of daxemu run")


def _name(fd: int) -> str:
    return str(Path(f"/proc/self/fd/{fd}").readlink())


def _is_connected_socket(fd: int, ino: int) -> bool:
    """Return whether a descriptor is a connected socket for packets with an inode number. Raises OSError."""
    found = os.fstat(fd)
    if not stat.S_ISSOCK(found.st_mode) or found.st_ino != ino:
        return False
    with socket.socket(fileno=os.dup(fd)) as sock:
        if (sock.family, sock.type) != (socket.AF_UNIX, socket.SOCK_SEQPACKET):
            return False
        try:
            sock.getpeername()
        except OSError:  # ENOTCONN: listening, or never connected
            return False
    return True
