"""ptrace(2), /proc/TID/status, and a system call made in another thread's name.

Purpose: typed access to the kernel, one function a request; no policy (that is ``tracer``). Every failure is
an OSError with the kernel's errno; ESRCH from a request means "not stopped any more": the thread is being
killed.

Invariants:
- nothing here waits, but for the kernel's own short locks;
- an ``Injection`` changes the registers and up to SIGINFO_SIZE bytes of stack, and ``undo`` puts back exactly
  those. It may be undone at any ptrace stop, whether the system call was made or not, and is undone once.
"""

from __future__ import annotations

import ctypes
import errno
import os
import platform
import re
import struct
from enum import Enum, auto
from io import FileIO
from pathlib import Path
from signal import SIGBUS, SIGTRAP
from typing import NamedTuple

from daxemu.host.siginfo import SIGBUS_BIT, SIGINFO_SIZE, SigInfo, Status, parse, read_status
from daxemu.uapi import PAGE_SIZE

# uapi/linux/ptrace.h
_CONT = 7
_SYSCALL = 24
_SETOPTIONS = 0x4200
_GETEVENTMSG = 0x4201
_GETSIGINFO = 0x4202
_SETSIGINFO = 0x4203
_GETREGSET = 0x4204
_SETREGSET = 0x4205
_SEIZE = 0x4206
_INTERRUPT = 0x4207
_LISTEN = 0x4208
_DETACH = 17
_O_TRACESYSGOOD = 0x00000001
_O_TRACEEXEC = 0x00000010
_O_SUSPEND_SECCOMP = 0x00200000
EVENT_EXEC = 4
EVENT_STOP = 128
SYSCALL_STOP = SIGTRAP | 0x80

# uapi/linux/wait.h: threads and processes alike, whoever's children they are
WALL = 0x40000000

# TRACEEXEC because a thread that calls execve(2) takes its leader's id: without that stop it would vanish
# silently.
_OPTIONS = _O_TRACESYSGOOD | _O_TRACEEXEC
_NT_PRSTATUS = 1
_AT_SYSINFO_EHDR = 33
_RED_ZONE = 128
_SCAN_LIMIT = 1 << 20

_MACHINE = platform.machine()
# asm/unistd.h: (tgkill, rt_tgsigqueueinfo)
_NR_TGKILL, _NR_RT_TGSIGQUEUEINFO = {"aarch64": (131, 240)}.get(_MACHINE, (234, 297))

_libc = ctypes.CDLL(None, use_errno=True)
_libc.ptrace.argtypes = [ctypes.c_long, ctypes.c_long, ctypes.c_void_p, ctypes.c_void_p]
_libc.ptrace.restype = ctypes.c_long
_libc.syscall.restype = ctypes.c_long


class _IoVec(ctypes.Structure):
    _fields_ = (("base", ctypes.c_void_p), ("len", ctypes.c_size_t))


def _fail(what: str) -> OSError:
    number = ctypes.get_errno()
    return OSError(number, f"{what}: {os.strerror(number)}")


def _ptrace(name: str, request: int, tid: int, addr: int = 0, data: int = 0) -> None:
    if _libc.ptrace(request, tid, addr, data) == -1:
        raise _fail(f"PTRACE_{name} {tid}")


def seize(tid: int) -> None:
    """Become the tracer of a thread without stopping it. EPERM: see ``Status``; never kills it when the
    tracer exits."""
    _ptrace("SEIZE", _SEIZE, tid, data=_OPTIONS)


def interrupt(tid: int) -> None:
    """Ask for an EVENT_STOP. Any other stop that comes first may swallow the request."""
    _ptrace("INTERRUPT", _INTERRUPT, tid)


def cont(tid: int, sig: int = 0) -> None:
    """Let a stopped thread run; at a signal-delivery-stop ``sig`` is what it gets."""
    _ptrace("CONT", _CONT, tid, data=sig)


def cont_to_syscall(tid: int) -> None:
    """Let a stopped thread run until it enters or leaves a system call."""
    _ptrace("SYSCALL", _SYSCALL, tid)


def listen(tid: int) -> None:
    """Leave a thread in its group-stop, but hear of its end."""
    _ptrace("LISTEN", _LISTEN, tid)


def detach(tid: int, sig: int = 0) -> None:
    """Let a stopped thread go for good, with ``sig`` as in ``cont``."""
    _ptrace("DETACH", _DETACH, tid, data=sig)


def event_message(tid: int) -> int:
    """PTRACE_GETEVENTMSG; at EVENT_EXEC the id the thread had before."""
    message = ctypes.c_ulong()
    _ptrace("GETEVENTMSG", _GETEVENTMSG, tid, data=ctypes.addressof(message))
    return message.value


def get_siginfo(tid: int) -> bytes:
    """The siginfo_t of the signal a thread is stopped for."""
    raw = ctypes.create_string_buffer(SIGINFO_SIZE)
    _ptrace("GETSIGINFO", _GETSIGINFO, tid, data=ctypes.addressof(raw))
    return raw.raw


def set_siginfo(tid: int, info: bytes) -> None:
    """Replace the siginfo_t of the signal a thread is stopped for. Any si_code is allowed."""
    raw = ctypes.create_string_buffer(info, SIGINFO_SIZE)
    _ptrace("SETSIGINFO", _SETSIGINFO, tid, data=ctypes.addressof(raw))


def tgkill(tgid: int, tid: int, sig: int) -> None:
    """tgkill(2)."""
    if _libc.syscall(_NR_TGKILL, tgid, tid, sig) == -1:
        raise _fail(f"tgkill {tid}")


def tgsigqueue(tgid: int, tid: int, sig: int, info: bytes) -> None:
    """rt_tgsigqueueinfo(2). The kernel wants si_code < 0 unless the thread is the caller itself."""
    raw = ctypes.create_string_buffer(info, SIGINFO_SIZE)
    if _libc.syscall(_NR_RT_TGSIGQUEUEINFO, tgid, tid, sig, raw) == -1:
        raise _fail(f"rt_tgsigqueueinfo {tid}")


class Kind(Enum):
    """What a thread stopped for."""

    SIGNAL = auto()  # signal-delivery-stop
    TRAP = auto()  # PTRACE_EVENT_STOP of a running process
    GROUP = auto()  # PTRACE_EVENT_STOP of a stopped one
    SYSCALL = auto()  # entry or exit of an injected system call


class Stop(NamedTuple):
    """A stop, and what is known of SIGBUS in it."""

    kind: Kind
    sig: int = 0
    info: SigInfo | None = None
    blocked: bool = False
    ignored: bool = False
    pending: bool = False  # for this thread, not the process: only that makes the kernel drop another
    result: int = 0  # of the injected system call


def classify(status: int) -> tuple[Kind, int]:
    """The kind of stop, and the signal, of a waitpid(2) status (not of an EVENT_EXEC)."""
    sig = os.WSTOPSIG(status)
    if status >> 16 == EVENT_STOP:
        return (Kind.TRAP if sig == SIGTRAP else Kind.GROUP), 0
    if sig == SYSCALL_STOP:
        return Kind.SYSCALL, 0
    return Kind.SIGNAL, sig


class Step(Enum):
    """How a stopped thread goes on."""

    CONT = auto()
    LISTEN = auto()
    DETACH = auto()
    QUEUE = auto()  # send the signal with our cookie, then CONT
    INJECT = auto()  # prepare an injection, then SYSCALL
    SYSCALL = auto()


def resume(tid: int, step: Step, sig: int) -> None:
    """Let a stopped thread go on; ``sig`` as in ``cont``."""
    if step is Step.DETACH:
        detach(tid, sig)
    elif step is Step.LISTEN:
        listen(tid)
    elif step in (Step.INJECT, Step.SYSCALL):
        cont_to_syscall(tid)
    else:
        cont(tid, sig)


def status_of_held(tid: int) -> Status:
    """The status of a thread that should exist; ESRCH if it does not."""
    status = read_status(tid)
    if status is None:
        raise ProcessLookupError(errno.ESRCH, f"thread {tid} is gone")
    return status


def look(tid: int, wait_status: int, want_masks: bool) -> Stop:
    """What a waitpid(2) status means. The masks of a signal-delivery-stop cost a look at /proc: only if
    wanted."""
    kind, sig = classify(wait_status)
    info = parse(get_siginfo(tid)) if sig == SIGBUS else None
    if kind is Kind.SYSCALL or (kind is Kind.SIGNAL and not want_masks):
        return Stop(kind, sig, info)
    status = status_of_held(tid)
    masks = (status.blocked, status.ignored, status.pending)
    return Stop(kind, sig, info, *(bool(mask & SIGBUS_BIT) for mask in masks))


def send_plain(tgid: int, tid: int) -> bool:
    """A SIGBUS without particulars, better than none. Whether it could be sent."""
    try:
        tgkill(tgid, tid, SIGBUS)
    except OSError as error:
        if error.errno not in (errno.EPERM, errno.ESRCH):
            raise
        return False
    return True


def refusal(tid: int, error: OSError) -> str | None:
    """Why PTRACE_SEIZE was refused; None if the thread is gone."""
    status = read_status(tid)
    if status is None or status.is_dead or error.errno == errno.ESRCH:
        return None
    if error.errno != errno.EPERM:
        return str(error)
    if status.tracer == os.getpid():
        return "already traced by daxemu"
    if status.tracer:
        tracer = read_status(status.tracer)
        return f"already traced by PID {status.tracer} ({tracer.name if tracer else 'gone'})"
    if Path(f"/proc/{tid}").stat().st_uid != os.geteuid():
        return "not permitted (another user's process)"
    return "not permitted (the system forbids tracing it: see ptrace(2), kernel.yama.ptrace_scope)"


def is_vanished(error: OSError) -> bool:
    """ESRCH of ptrace(2), ENOENT of /proc: the thread is dead, or being killed and so not stopped any
    more."""
    return error.errno in (errno.ESRCH, errno.ENOENT)


# --- x86_64: registers and injected system calls
# -------------------------------------------------------------------

# asm/user_64.h: indices into struct user_regs_struct
_R10, _RAX, _RDX, _RSI, _RDI, _ORIG_RAX, _RIP, _CS, _RSP = 7, 10, 12, 13, 14, 15, 16, 17, 19
_Regs = ctypes.c_uint64 * 27
_USER_CS_64 = 0x33
_SYSCALL_INSN = b"\x0f\x05"
_MINUS_ONE = (1 << 64) - 1

# linux/errno.h: restart the system call unless a handler runs; then EINTR
_ERESTARTNOHAND = 514

# signal(7), "Interruption of system calls by stop signals": these say EINTR for a mere PTRACE_INTERRUPT,
# though nothing was delivered. rt_sigtimedwait, semop, semtimedop, io_getevents, io_pgetevents, epoll_wait,
# epoll_pwait, epoll_pwait2, and with a socket timeout recvfrom, recvmsg, recvmmsg, accept, accept4, sendto,
# sendmsg. All did nothing yet when they say so.
_SAYS_EINTR = frozenset((128, 65, 220, 208, 333, 232, 281, 441, 45, 47, 299, 43, 288, 44, 46))


# What /proc/TID/mem says of an address with no memory behind it
_UNMAPPED = (errno.EIO, errno.EFAULT)


class CannotInject(Exception):
    """This thread cannot be made to call; the message says why, for a user to read."""


def _regset(tid: int, request: int, regs: ctypes.Array[ctypes.c_uint64]) -> int:
    vec = _IoVec(ctypes.addressof(regs), ctypes.sizeof(regs))
    _ptrace("REGSET", request, tid, _NT_PRSTATUS, ctypes.addressof(vec))
    return int(vec.len)


def _get_regs(tid: int) -> ctypes.Array[ctypes.c_uint64] | None:
    """The registers of a stopped 64-bit thread; None if it runs 32-bit code."""
    regs = _Regs()
    if _regset(tid, _GETREGSET, regs) != ctypes.sizeof(regs) or regs[_CS] != _USER_CS_64:
        return None
    return regs


def mend_eintr(tid: int) -> None:
    """At an EVENT_STOP: have the interrupted system call restarted if the kernel would not do so by itself.

    A relative timeout begins anew (epoll_wait, sigtimedwait), which beats an EINTR that no signal explains.
    """
    if _MACHINE != "x86_64":
        return
    regs = _get_regs(tid)
    if regs is None or regs[_ORIG_RAX] not in _SAYS_EINTR:
        return
    if regs[_RAX] == (-errno.EINTR) & _MINUS_ONE:
        regs[_RAX] = (-_ERESTARTNOHAND) & _MINUS_ONE
        _regset(tid, _SETREGSET, regs)


class Injection:
    """rt_tgsigqueueinfo(2) to itself, made by a stopped thread that knows nothing of it.

    Only a thread itself may queue a siginfo with si_code > 0, and only a queued one is found by
    sigtimedwait(2), signalfd(2) or a later unblocking. After construction the caller lets the thread run to
    the entry of the call and then to its exit (``cont_to_syscall``), reads ``result``, calls ``undo``.
    Syscall stops instead of single steps: a step's SIGTRAP is a forced signal, which would reset a blocked or
    ignored SIGTRAP's disposition.
    """

    def __init__(self, tid: int, status: Status, sig: int, info: bytes) -> None:
        if _MACHINE != "x86_64":
            raise CannotInject(f"its SIGBUS is blocked, and there is no way around that on {_MACHINE}")
        regs = _get_regs(tid)
        if regs is None:
            raise CannotInject("its SIGBUS is blocked, and it runs 32-bit code")
        self._tid = tid
        self._regs = regs
        self._suspends_seccomp = status.seccomp != 0
        self._memory = _open_memory(tid)  # closed with this object
        insn = _find_syscall_insn(tid, regs, self._memory.fileno())
        self._where, self._saved = _write_scratch(self._memory.fileno(), regs[_RSP], info)
        try:
            if self._suspends_seccomp:
                _suspend_seccomp(tid)
            _regset(tid, _SETREGSET, self._call(insn, status, sig))
        except (OSError, CannotInject):
            self._restore_memory()
            raise

    def _call(self, insn: int, status: Status, sig: int) -> ctypes.Array[ctypes.c_uint64]:
        regs = _Regs(*self._regs)
        regs[_RIP] = insn
        regs[_RAX] = _NR_RT_TGSIGQUEUEINFO
        regs[_ORIG_RAX] = _MINUS_ONE  # or the kernel would restart the interrupted system call here
        regs[_RDI], regs[_RSI], regs[_RDX], regs[_R10] = status.ns_tgid, status.ns_tid, sig, self._where
        return regs

    def result(self) -> int:
        """At the exit of the call: what it returned, 0 or a negated errno."""
        regs = _Regs()
        _regset(self._tid, _GETREGSET, regs)
        return ctypes.c_int64(regs[_RAX]).value

    def undo(self) -> None:
        """Put registers and stack back."""
        _regset(self._tid, _SETREGSET, self._regs)
        if self._suspends_seccomp:
            _ptrace("SETOPTIONS", _SETOPTIONS, self._tid, data=_OPTIONS)
        self._restore_memory()

    def _restore_memory(self) -> None:
        try:
            os.pwrite(self._memory.fileno(), self._saved, self._where)
        except OSError as error:
            if error.errno not in _UNMAPPED:  # by another thread meanwhile: nothing is left to restore
                raise


def _open_memory(tid: int) -> FileIO:
    try:
        return FileIO(f"/proc/{tid}/mem", "r+")
    except PermissionError as error:
        raise CannotInject("its SIGBUS is blocked, and its memory is not accessible") from error


def _suspend_seccomp(tid: int) -> None:
    """A filter might kill the process for a system call it never makes itself."""
    try:
        _ptrace("SETOPTIONS", _SETOPTIONS, tid, data=_OPTIONS | _O_SUSPEND_SECCOMP)
    except OSError as error:
        if error.errno not in (errno.EPERM, errno.EINVAL):
            raise
        raise CannotInject("its SIGBUS is blocked, and a seccomp filter watches its system calls") from error


def _write_scratch(memory: int, stack: int, info: bytes) -> tuple[int, bytes]:
    """Put ``info`` below the red zone, or, where no stack is mapped there, over live stack: it is put back
    before use."""
    for where in ((stack - _RED_ZONE - len(info)) & ~15, stack):
        try:
            saved = os.pread(memory, len(info), where)
            if len(saved) == len(info) == os.pwrite(memory, info, where):
                return where, saved
        except OverflowError:
            break
        except OSError as error:
            if error.errno not in _UNMAPPED:
                raise
    raise CannotInject("its SIGBUS is blocked, and its stack pointer points to no memory")


def _find_syscall_insn(tid: int, regs: ctypes.Array[ctypes.c_uint64], memory: int) -> int:
    """The address of a ``syscall`` instruction: the one it has just used, one in the vDSO, or any other."""
    if regs[_ORIG_RAX] < _MINUS_ONE and _peek(memory, regs[_RIP] - 2, 2) == _SYSCALL_INSN:
        return regs[_RIP] - 2
    vdso = _vdso_base(tid)
    for start, length in [(vdso, 2 * PAGE_SIZE), (vdso, PAGE_SIZE)] if vdso else []:
        found = _peek(memory, start, length).find(_SYSCALL_INSN)
        if found >= 0:
            return start + found
    with open(f"/proc/{tid}/maps") as maps:
        ranges = re.findall(r"^([0-9a-f]+)-([0-9a-f]+) ..x", maps.read(), re.MULTILINE)
    for low, high in ranges:
        start = int(low, 16)
        found = _peek(memory, start, min(int(high, 16) - start, _SCAN_LIMIT)).find(_SYSCALL_INSN)
        if found >= 0:
            return start + found
    raise CannotInject("its SIGBUS is blocked, and it has no system call instruction mapped")


def _peek(memory: int, where: int, length: int) -> bytes:
    """Bytes of a thread's memory; none if they are not mapped."""
    try:
        return os.pread(memory, length, where)
    except (OSError, OverflowError):  # OverflowError: [vsyscall] lies beyond any off_t
        return b""


def _vdso_base(tid: int) -> int:
    with open(f"/proc/{tid}/auxv", "rb") as file:
        raw = file.read()
    for key, value in struct.iter_unpack("=QQ", raw[: len(raw) // 16 * 16]):
        if key == _AT_SYSINFO_EHDR:
            return int(value)
    return 0
