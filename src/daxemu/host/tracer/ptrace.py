"""ptrace(2) and the meaning of its stops: typed access to the kernel, one function a request.

Purpose: no policy. ``tracer.held_thread`` decides how a stopped thread goes on, ``tracer.injection`` makes
system calls in the name of the thread. Every failure is an OSError with the kernel's errno; ESRCH from a
request means "not stopped any more": the thread is being killed.

Invariants: no function waits, except for short locks in the kernel.
"""

from __future__ import annotations

import ctypes
import errno
import os
import platform
from enum import Enum, auto
from pathlib import Path
from signal import SIGBUS, SIGTRAP
from typing import NamedTuple

from daxemu.host.proc import stat, status
from daxemu.host.proc.file_pages import FilePage
from daxemu.host.proc.procfs import read_whole
from daxemu.host.proc.status import ThreadStatus
from daxemu.host.tracer.siginfo import SIGBUS_BIT, SIGINFO_SIZE, SigInfo, parse

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
_GETSIGMASK = 0x420A
_SETSIGMASK = 0x420B
_DETACH = 17
_O_TRACESYSGOOD = 0x00000001
_O_TRACEFORK = 0x00000002
_O_TRACEVFORK = 0x00000004
_O_TRACECLONE = 0x00000008
_O_TRACEEXEC = 0x00000010
_O_SUSPEND_SECCOMP = 0x00200000
FORK_EVENTS = (1, 2, 3)  # PTRACE_EVENT_FORK, _VFORK, _CLONE
EVENT_EXEC = 4
EVENT_STOP = 128
SYSCALL_STOP = SIGTRAP | 0x80

# uapi/linux/wait.h: threads and processes alike, children of any thread
WALL = 0x40000000
# only tracees of this very thread
WNOTHREAD = 0x20000000

# TRACEEXEC: a thread that calls execve(2) takes its leader's id; without this stop it would vanish silently.
OPTIONS = _O_TRACESYSGOOD | _O_TRACEEXEC
# The child of a traced fork is a tracee with the same options.
TRACE_FORKS = _O_TRACEFORK | _O_TRACEVFORK | _O_TRACECLONE
_NT_PRSTATUS = 1

# asm/unistd.h: (tgkill, rt_tgsigqueueinfo)
_NR_TGKILL, NR_RT_TGSIGQUEUEINFO = {"aarch64": (131, 240)}.get(platform.machine(), (234, 297))

# asm/unistd.h: execve, execveat
_EXECVE = {"aarch64": (b"221", b"281")}.get(platform.machine(), (b"59", b"322"))

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
    """Become the tracer of a thread without stopping the thread, which outlives the tracer. EPERM: see
    ``refusal``.
    """
    _ptrace("SEIZE", _SEIZE, tid, data=OPTIONS)


_STOPPED_IN = (b"refrigerator", b"freez", b"signal_stop")
"""Parts of the names of kernel functions (wchan) in which a frozen thread sleeps."""


def may_sleep(tid: int) -> bool:
    """Return True if ``seize`` may sleep in the kernel: the thread is stopped (in a frozen cgroup of version
    1 the stop cannot become a traced stop), frozen, or in execve(2), which holds cred_guard_mutex.
    """
    try:
        state = stat.read(tid).state
        if state == "T":
            return True
        if state == "D" and any(name in read_whole(f"/proc/{tid}/wchan") for name in _STOPPED_IN):
            return True  # not the state D of a page fault: that thread may be traced for an AR already
        return read_whole(f"/proc/{tid}/syscall").split(b" ", 1)[0] in _EXECVE
    except OSError:
        return False


def interrupt(tid: int) -> None:
    """Ask for an EVENT_STOP. Any other stop that precedes it may swallow the request."""
    _ptrace("INTERRUPT", _INTERRUPT, tid)


def cont(tid: int, sig: int = 0) -> None:
    """Let a stopped thread run; ``sig`` is the signal to deliver at a signal-delivery-stop."""
    _ptrace("CONT", _CONT, tid, data=sig)


def cont_to_syscall(tid: int, sig: int = 0) -> None:
    """Let a stopped thread run until the thread enters or leaves a system call; ``sig`` as in ``cont``."""
    _ptrace("SYSCALL", _SYSCALL, tid, data=sig)


def listen(tid: int) -> None:
    """Leave a thread in its group-stop, but get a report of its end."""
    _ptrace("LISTEN", _LISTEN, tid)


def detach(tid: int, sig: int = 0) -> None:
    """Let a stopped thread go for good, with ``sig`` as in ``cont``."""
    _ptrace("DETACH", _DETACH, tid, data=sig)


def event_message(tid: int) -> int:
    """PTRACE_GETEVENTMSG; at EVENT_EXEC the id the thread had before, at FORK_EVENTS the child."""
    message = ctypes.c_ulong()
    _ptrace("GETEVENTMSG", _GETEVENTMSG, tid, data=ctypes.addressof(message))
    return message.value


def get_siginfo(tid: int) -> bytes:
    """Return the siginfo_t of the signal a thread is stopped for."""
    raw = ctypes.create_string_buffer(SIGINFO_SIZE)
    _ptrace("GETSIGINFO", _GETSIGINFO, tid, data=ctypes.addressof(raw))
    return raw.raw


def set_siginfo(tid: int, info: bytes) -> None:
    """Replace the siginfo_t of the signal a thread is stopped for. Any si_code is allowed."""
    raw = ctypes.create_string_buffer(info, SIGINFO_SIZE)
    _ptrace("SETSIGINFO", _SETSIGINFO, tid, data=ctypes.addressof(raw))


def get_mask(tid: int) -> int:
    """Return a stopped thread's signal mask: bit N-1 for signal N."""
    mask = ctypes.c_uint64()
    _ptrace("GETSIGMASK", _GETSIGMASK, tid, ctypes.sizeof(mask), ctypes.addressof(mask))
    return mask.value


def set_mask(tid: int, mask: int) -> None:
    """Set a stopped thread's signal mask, as in ``get_mask``."""
    value = ctypes.c_uint64(mask)
    _ptrace("SETSIGMASK", _SETSIGMASK, tid, ctypes.sizeof(value), ctypes.addressof(value))


def unblock(tid: int, sig: int) -> None:
    """Take a signal out of a stopped thread's mask."""
    set_mask(tid, get_mask(tid) & ~(1 << (sig - 1)))


def set_options(tid: int, options: int) -> None:
    """Set the options of a stopped thread, which ``seize`` has set to OPTIONS."""
    _ptrace("SETOPTIONS", _SETOPTIONS, tid, data=options)


def suspend_seccomp(tid: int, suspend: bool) -> None:
    """Suspend or resume a stopped thread's seccomp filters. EPERM, EINVAL: not available on this system."""
    _ptrace("SETOPTIONS", _SETOPTIONS, tid, data=OPTIONS | (_O_SUSPEND_SECCOMP if suspend else 0))


def can_suspend_seccomp(tid: int) -> bool:
    """Suspend a stopped thread's seccomp filters where the system allows it; return whether it does."""
    try:
        suspend_seccomp(tid, True)
    except OSError as error:
        if error.errno not in (errno.EPERM, errno.EINVAL):
            raise
        return False
    return True


def get_regs(tid: int, regs: ctypes.Array[ctypes.c_uint64]) -> int:
    """Read a stopped thread's general registers. Return their size in bytes, which identifies the ABI."""
    return _regset("GETREGSET", _GETREGSET, tid, regs)


def set_regs(tid: int, regs: ctypes.Array[ctypes.c_uint64]) -> None:
    """Write a stopped thread's general registers."""
    _regset("SETREGSET", _SETREGSET, tid, regs)


def _regset(name: str, request: int, tid: int, regs: ctypes.Array[ctypes.c_uint64]) -> int:
    vec = _IoVec(ctypes.addressof(regs), ctypes.sizeof(regs))
    _ptrace(name, request, tid, _NT_PRSTATUS, ctypes.addressof(vec))
    return int(vec.len)


def tgkill(tgid: int, tid: int, sig: int) -> None:
    """tgkill(2)."""
    if _libc.syscall(_NR_TGKILL, tgid, tid, sig) == -1:
        raise _fail(f"tgkill {tid}")


def tgsigqueue(tgid: int, tid: int, sig: int, info: bytes) -> None:
    """rt_tgsigqueueinfo(2). The kernel wants si_code < 0 unless the thread is the caller itself."""
    raw = ctypes.create_string_buffer(info, SIGINFO_SIZE)
    if _libc.syscall(NR_RT_TGSIGQUEUEINFO, tgid, tid, sig, raw) == -1:
        raise _fail(f"rt_tgsigqueueinfo {tid}")


class StopKind(Enum):
    """Reason for a stop."""

    SIGNAL = auto()  # signal-delivery-stop
    TRAP = auto()  # PTRACE_EVENT_STOP of a running process
    GROUP = auto()  # PTRACE_EVENT_STOP of a stopped one
    SYSCALL = auto()  # entry or exit of an injected system call


class Stop(NamedTuple):
    """A stop, with the state of SIGBUS in the thread."""

    kind: StopKind
    sig: int = 0
    info: SigInfo | None = None
    blocked: bool = False
    ignored: bool = False
    pending: bool = False  # for this thread, not the process: only then does the kernel drop a second SIGBUS
    result: int = 0  # of the injected system call
    page: FilePage | None = None  # page mapped at the fault address; None: no page, or not looked at
    place: tuple[int, int, int] | None = None  # as processes.place_of_fault(); None: not looked at


def classify(status: int) -> tuple[StopKind, int]:
    """Return the kind of stop, and the signal, of a waitpid(2) status (not of an EVENT_EXEC)."""
    sig = os.WSTOPSIG(status)
    if status >> 16 == EVENT_STOP:
        return (StopKind.TRAP if sig == SIGTRAP else StopKind.GROUP), 0
    if sig == SYSCALL_STOP:
        return StopKind.SYSCALL, 0
    return StopKind.SIGNAL, sig


class ResumeStep(Enum):
    """Way in which a stopped thread goes on."""

    CONT = auto()
    LISTEN = auto()
    DETACH = auto()
    QUEUE = auto()  # send the signal with the tracer's cookie, then CONT
    FORCE = auto()  # unblock the signal, then QUEUE
    INJECT = auto()  # prepare an injection, then SYSCALL
    SYSCALL = auto()


def resume(tid: int, step: ResumeStep, sig: int) -> None:
    """Let a stopped thread go on; ``sig`` as in ``cont``."""
    if step is ResumeStep.DETACH:
        detach(tid, sig)
    elif step is ResumeStep.LISTEN:
        listen(tid)
    elif step in (ResumeStep.INJECT, ResumeStep.SYSCALL):
        cont_to_syscall(tid)
    else:
        cont(tid, sig)


def status_of_held(tid: int) -> ThreadStatus:
    """Return the status of a thread that should exist. Raises ProcessLookupError if the thread is gone."""
    found = status.find(tid)
    if found is None:
        raise ProcessLookupError(errno.ESRCH, f"thread {tid} is gone")
    return found


def look(tid: int, wait_status: int, cookie: int) -> Stop:
    """Return the meaning of a waitpid(2) status. In a signal-delivery-stop the masks, which cost a read of
    /proc, only tell whether the SIGBUS with ``cookie`` is still pending.
    """
    kind, sig = classify(wait_status)
    info = parse(get_siginfo(tid)) if sig == SIGBUS else None
    arrived = info is not None and info.is_queued_with(cookie)
    if kind is StopKind.SYSCALL or (kind is StopKind.SIGNAL and (arrived or not cookie)):
        return Stop(kind, sig, info)
    held = status_of_held(tid)
    blocked, ignored, pending = (
        bool(mask & SIGBUS_BIT) for mask in (held.blocked, held.ignored, held.pending)
    )
    return Stop(kind, sig, info, blocked, ignored, pending)


def send_plain(tgid: int, tid: int) -> bool:
    """Send a SIGBUS without siginfo, as a last resort. Return False if the signal could not be sent (EPERM,
    ESRCH).
    """
    try:
        tgkill(tgid, tid, SIGBUS)
    except OSError as error:
        if error.errno not in (errno.EPERM, errno.ESRCH):
            raise
        return False
    return True


def refusal(tid: int, error: OSError) -> str | None:
    """Return the reason for a refused PTRACE_SEIZE; None if the thread is gone."""
    found = status.find(tid)
    if found is None or found.is_dead or error.errno == errno.ESRCH:
        return None
    if error.errno != errno.EPERM:
        return str(error)
    if found.tracer:
        tracer = status.find(found.tracer)
        if tracer is not None and tracer.tgid == os.getpid():
            return "already traced by daxemu"
        return f"already traced by PID {found.tracer} ({tracer.name if tracer else 'gone'})"
    if Path(f"/proc/{tid}").stat().st_uid != os.geteuid():
        return "not permitted (another user's process)"
    return "not permitted (the system forbids tracing it: see ptrace(2), kernel.yama.ptrace_scope)"


def is_vanished(error: OSError) -> bool:
    """Return True for ESRCH of ptrace(2) and ENOENT of /proc: the thread is dead, or being killed and so not
    stopped.
    """
    return error.errno in (errno.ESRCH, errno.ENOENT)
