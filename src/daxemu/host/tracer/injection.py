"""System call made in the name of another thread, without the knowledge of its program. Only x86_64.

Purpose: to queue a siginfo with si_code > 0 to a thread that blocks its signal, and to give a signal its
default action back. ``restart_call`` is here because the function needs registers, too: it restarts a system
call that a stop of the tracer interrupted. Counterpart in Linux: send_sig_mceerr() of kernel/signal.c for a
thread that blocks the signal, and the effect of force_sig_info_to_task() on a thread.

States of an ``Injection``: prepared -> at the call's entry -> at the call's exit -> undone. The caller that
steps the thread counts the states (``tracer.held_thread.Phase``).

Invariants:
- an injection changes registers and up to SIGINFO_SIZE bytes of stack, and ``undo`` puts back exactly these;
- an injection may be undone at any ptrace stop, whether the system call was made or not, and is undone once;
- an injection that is not possible raises ``CannotInject`` and leaves the thread as before.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
import platform
import struct
from collections.abc import Sequence
from io import FileIO
from signal import SIGBUS
from typing import NamedTuple

from daxemu.host.proc import maps
from daxemu.host.proc.processes import faults_of
from daxemu.host.proc.status import ThreadStatus
from daxemu.host.tracer import ptrace
from daxemu.host.tracer.messages import ForceAR, Send
from daxemu.host.tracer.siginfo import bus_error
from daxemu.uapi import PAGE_SIZE

_MACHINE = platform.machine()
_AT_SYSINFO_EHDR = 33  # uapi/linux/auxvec.h
_RED_ZONE = 128  # bytes below the stack pointer that the ABI lets a function use
_SCAN_LIMIT = 1 << 20  # bytes of each mapping that are searched for an instruction

_NR_RT_SIGACTION = 13  # asm/unistd_64.h
_NR_MADVISE = 28
_MADV_DONTNEED_LOCKED = 24  # asm-generic/mman-common.h, since Linux 5.18

# asm/user_64.h: indices into struct user_regs_struct
_R13, _R12, _R10, _R9, _R8 = 2, 3, 7, 8, 9
_RAX, _RDX, _RSI, _RDI, _ORIG_RAX, _RIP, _CS, _RSP = 10, 12, 13, 14, 15, 16, 17, 19
_Regs = ctypes.c_uint64 * 27
# struct user_regs_struct32, of a thread that runs 32-bit code
_EAX, _ORIG_EAX = 6, 11
_Regs32 = ctypes.c_uint32 * 17
_USER_CS_64 = 0x33
_SYSCALL_INSN = b"\x0f\x05"
_MINUS_ONE = (1 << 64) - 1

# linux/errno.h: restart the system call unless a handler runs; then EINTR
_ERESTARTNOHAND = 514

# signal(7), "Interruption of system calls by stop signals": these fail with EINTR for a PTRACE_INTERRUPT,
# though no signal was delivered. rt_sigtimedwait, semop, semtimedop, io_getevents, io_pgetevents, epoll_wait,
# epoll_pwait, epoll_pwait2, and with a socket timeout recvfrom, recvmsg, recvmmsg, accept, accept4, sendto,
# sendmsg. None of them has done any work when it fails so.
SAYS_EINTR = frozenset((128, 65, 220, 208, 333, 232, 281, 441, 45, 47, 299, 43, 288, 44, 46))

# errno of /proc/TID/mem at an address without memory
_UNMAPPED = (errno.EIO, errno.EFAULT)


class CannotInject(Exception):
    """The thread cannot be made to call; the message gives the reason to a user."""


def _get_regs(tid: int) -> ctypes.Array[ctypes.c_uint64] | None:
    """Return the registers of a stopped 64-bit thread; None if the thread runs 32-bit code."""
    regs = _Regs()
    if ptrace.get_regs(tid, regs) != ctypes.sizeof(regs) or regs[_CS] != _USER_CS_64:
        return None
    return regs


class Registers:
    """General registers of a stopped 64-bit thread, to be put back later."""

    def __init__(self, tid: int, regs: ctypes.Array[ctypes.c_uint64]) -> None:
        self._tid = tid
        self._regs = regs

    @property
    def call(self) -> int:
        """Number of the system call that the thread is in or returns from; -1 if none."""
        return ctypes.c_int64(self._regs[_ORIG_RAX]).value

    @property
    def result(self) -> int:
        """Result of the system call; negative: -errno."""
        return ctypes.c_int64(self._regs[_RAX]).value

    @property
    def place(self) -> tuple[int, int, int]:
        """Place of the stopped thread, as processes.place_of_fault()."""
        return self._regs[_RSP], self._regs[_RIP], faults_of(self._tid)

    def put_back(self) -> None:
        """Give the thread these registers."""
        ptrace.set_regs(self._tid, self._regs)


def registers(tid: int) -> Registers:
    """Return the registers of a stopped thread. Raises CannotInject if the thread runs 32-bit code."""
    return Registers(tid, _get_regs_64(tid))


def find_instruction(tid: int) -> int:
    """Return the address of a ``syscall`` instruction in the program of a stopped thread. Raises
    CannotInject.
    """
    with open_memory(tid) as memory:
        return _find_syscall_insn(tid, _get_regs_64(tid), memory.fileno())


def prepare(tid: int, insn: int, number: int, args: Sequence[int], *, r12: int, r13: int) -> None:
    """Set the registers of a stopped thread for a system call of up to six arguments, by the instruction at
    ``insn``. Raises CannotInject.
    """
    regs = _get_regs_64(tid)
    regs[_RIP], regs[_RAX], regs[_R12], regs[_R13] = insn, number, r12, r13
    regs[_ORIG_RAX] = _MINUS_ONE  # otherwise the kernel would restart the interrupted system call here
    for register, value in zip((_RDI, _RSI, _RDX, _R10, _R8, _R9), args, strict=False):
        regs[register] = value & _MINUS_ONE
    ptrace.set_regs(tid, regs)


def _get_regs_64(tid: int) -> ctypes.Array[ctypes.c_uint64]:
    regs = _get_regs(tid) if _MACHINE == "x86_64" else None
    if regs is None:
        raise CannotInject("it runs 32-bit code, or the machine is not x86_64")
    return regs


def restart_call(tid: int) -> None:
    """Restart the interrupted system call at an EVENT_STOP if the kernel would not restart the call by
    itself.

    A relative timeout begins anew (epoll_wait, sigtimedwait), which is better than an EINTR without a signal.
    """
    if _MACHINE != "x86_64":
        return
    regs = _get_regs(tid)
    if regs is None or regs[_ORIG_RAX] not in SAYS_EINTR:
        return
    if regs[_RAX] == (-errno.EINTR) & _MINUS_ONE:
        regs[_RAX] = (-_ERESTARTNOHAND) & _MINUS_ONE
        ptrace.set_regs(tid, regs)


class InjectedCall(NamedTuple):
    """A system call: up to four arguments, of which ``PAYLOAD`` stands for the address of ``payload``."""

    number: int
    arguments: tuple[int, ...]
    payload: bytes


PAYLOAD = -1


def queue_to_itself(status: ThreadStatus, sig: int, info: bytes) -> InjectedCall:
    """rt_tgsigqueueinfo(2) by the thread to itself.

    Only a thread itself may queue a siginfo with si_code > 0, and sigtimedwait(2), signalfd(2) and a later
    unblocking find only a queued siginfo.
    """
    return InjectedCall(ptrace.NR_RT_TGSIGQUEUEINFO, (status.ns_tgid, status.ns_tid, sig, PAYLOAD), info)


def default_action(sig: int) -> InjectedCall:
    """rt_sigaction(2) with SIG_DFL: a ``struct sigaction`` of zeros, mask of 8 bytes."""
    return InjectedCall(_NR_RT_SIGACTION, (sig, PAYLOAD, 0, 8), bytes(32))


def discard(address: int, length: int) -> InjectedCall:
    """madvise(2): drop the private copies of ``length`` bytes, locked or not."""
    return InjectedCall(_NR_MADVISE, (address, length, _MADV_DONTNEED_LOCKED, 0), b"")


class Injection:
    """System call made by a stopped thread, without the knowledge of its program.

    After construction the caller lets the thread run to the entry of the call and then to the exit
    (``cont_to_syscall``), reads ``result``, calls ``undo``. Syscall stops instead of single steps: the
    SIGTRAP of a step is a forced signal, which would reset the disposition of a blocked or ignored SIGTRAP.
    """

    def __init__(self, tid: int, status: ThreadStatus, call: InjectedCall) -> None:
        if _MACHINE != "x86_64":
            raise CannotInject(f"its SIGBUS is blocked, and there is no way around that on {_MACHINE}")
        regs = _get_regs(tid)
        if regs is None:
            raise CannotInject("it runs 32-bit code")
        self._tid = tid
        self._regs = regs
        self._suspends_seccomp = status.seccomp != 0
        self._memory = open_memory(tid)  # closed with this object
        insn = _find_syscall_insn(tid, regs, self._memory.fileno())
        self._where, self._saved = _write_scratch(self._memory.fileno(), regs[_RSP], call.payload)
        try:
            if self._suspends_seccomp:
                _suspend_seccomp(tid)
            ptrace.set_regs(tid, self._prepared(insn, call))
        except (OSError, CannotInject):
            self._restore_memory()
            raise

    def _prepared(self, insn: int, call: InjectedCall) -> ctypes.Array[ctypes.c_uint64]:
        regs = _Regs(*self._regs)
        regs[_RIP] = insn
        regs[_RAX] = call.number
        regs[_ORIG_RAX] = _MINUS_ONE  # otherwise the kernel would restart the interrupted system call here
        for register, value in zip((_RDI, _RSI, _RDX, _R10), call.arguments, strict=False):
            regs[register] = self._where if value == PAYLOAD else value
        return regs

    def result(self) -> int:
        """Return value of the call, at its exit: 0 or a negated errno."""
        regs = _Regs()
        ptrace.get_regs(self._tid, regs)
        return ctypes.c_int64(regs[_RAX]).value

    def undo(self) -> None:
        """Put registers and stack back."""
        ptrace.set_regs(self._tid, self._regs)
        if self._suspends_seccomp:
            ptrace.suspend_seccomp(self._tid, False)
        self._restore_memory()

    def _restore_memory(self) -> None:
        try:
            os.pwrite(self._memory.fileno(), self._saved, self._where)
        except OSError as error:
            if error.errno not in _UNMAPPED:  # unmapped by another thread: no memory to restore
                raise


def fail_call(tid: int, number: int, error: int) -> None:
    """Turn the success of system call ``number``, at whose return the thread is stopped, into ``-error``."""
    if _MACHINE != "x86_64":
        return
    regs = _Regs()
    words: ctypes.Array[ctypes.c_uint64] | ctypes.Array[ctypes.c_uint32] = regs
    call, result = _ORIG_RAX, _RAX
    if ptrace.get_regs(tid, regs) == ctypes.sizeof(_Regs32):
        words, call, result = _Regs32.from_buffer(regs), _ORIG_EAX, _EAX
    if words[call] == number and words[result] == 0:
        words[result] = -error  # ctypes cuts the value to the register's size
        ptrace.set_regs(tid, regs)


def begin(tid: int, request: Send | tuple[int, int]) -> Injection:
    """Begin the system call that a stopped thread must make: drop (address, bytes), queue the AO, or set the
    default action for a forced signal.
    """
    status = ptrace.status_of_held(tid)
    if isinstance(request, tuple):
        return Injection(tid, status, discard(*request))
    if isinstance(request, ForceAR):
        return Injection(tid, status, default_action(SIGBUS))
    info = bus_error(request.code, request.addr, request.lsb)
    return Injection(tid, status, queue_to_itself(status, SIGBUS, info))


def open_memory(tid: int) -> FileIO:
    """Open the memory of a held thread for reading and writing. Raises CannotInject."""
    try:
        return FileIO(f"/proc/{tid}/mem", "r+")
    except PermissionError as error:
        raise CannotInject("its SIGBUS is blocked, and its memory is not accessible") from error


def _suspend_seccomp(tid: int) -> None:
    """Suspend the seccomp filters: a filter might kill the process for a system call that the program never
    makes.
    """
    try:
        ptrace.suspend_seccomp(tid, True)
    except OSError as error:
        if error.errno not in (errno.EPERM, errno.EINVAL):
            raise
        raise CannotInject("its SIGBUS is blocked, and a seccomp filter watches its system calls") from error


def _write_scratch(memory: int, stack: int, info: bytes) -> tuple[int, bytes]:
    """Put ``info`` below the red zone or, without memory there, over live stack (put back before use)."""
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
    """Return the address of a ``syscall`` instruction: the last one that the thread used, one in the vDSO, or
    any other.
    """
    if regs[_ORIG_RAX] < _MINUS_ONE and peek(memory, regs[_RIP] - 2, 2) == _SYSCALL_INSN:
        return regs[_RIP] - 2
    vdso = _vdso_base(tid)
    for start, length in [(vdso, 2 * PAGE_SIZE), (vdso, PAGE_SIZE)] if vdso else []:
        found = peek(memory, start, length).find(_SYSCALL_INSN)
        if found >= 0:
            return start + found
    for vma in maps.read(tid):
        if not vma.executable:
            continue
        found = peek(memory, vma.start, min(vma.area.length, _SCAN_LIMIT)).find(_SYSCALL_INSN)
        if found >= 0:
            return vma.start + found
    raise CannotInject("its SIGBUS is blocked, and it has no system call instruction mapped")


def peek(memory: int, where: int, length: int) -> bytes:
    """Return bytes of a thread's memory; empty if the bytes are not mapped."""
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


def has_left(tid: int, fault: tuple[int, int, int]) -> bool:
    """Return True if a stopped thread is not in the page fault of this place (ForceAR.fault)."""
    with contextlib.suppress(CannotInject):  # 32-bit code, whose registers are not looked at
        return registers(tid).place != fault
    return False
