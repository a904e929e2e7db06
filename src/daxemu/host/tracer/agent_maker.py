"""Making of an agent: a held thread clones a process that shares the memory of its program. Only x86_64.

Purpose: the stops of a thread from its first one to its last, for ``MakeAgent`` and ``TraceFork``. The code
of an agent (host/direct/agent.c) arrives in the request. ``tracer.process`` has the loop. Each thread has a
*script*: a generator that takes the wait status of each stop, lets the thread run on, and returns in the last
stop.

The thread waits in a system call that seccomp(2) notified. The supervisor answers -ERESTARTNOINTR once the
thread is seized: the call did nothing, and the thread makes the call again after the script. In between the
thread makes other calls, by syscall stops. Neither steps nor breakpoints: their SIGTRAP is a forced signal,
which resets the disposition of a blocked or ignored SIGTRAP.

Invariants:
- registers and signal mask are put back in an EVENT_STOP, because only signal handling restarts a system
  call;
- every signal but SIGKILL and SIGSTOP is blocked meanwhile; a signal that comes first is delivered first;
- the program gets no child: the first process makes the agent and ends, and the thread reaps it;
- the program's copy of the agent's socket is closed, whatever fails.
"""

from __future__ import annotations

import errno
import os
import resource
import signal
import struct
from collections import deque
from collections.abc import Callable, Generator, Iterator
from io import FileIO
from typing import NamedTuple

from daxemu.host.tracer import injection, ptrace
from daxemu.host.tracer.injection import CannotInject
from daxemu.host.tracer.messages import (
    AgentMade,
    ArmedAck,
    Gone,
    MakeAgent,
    NotTaken,
    Outcome,
    Refused,
    Report,
    TraceFork,
)
from daxemu.uapi import PAGE_SIZE, U64_MAX

# asm/unistd_64.h
_NR_CLOSE, _NR_MMAP, _NR_MADVISE, _NR_CLONE, _NR_FORK, _NR_WAIT4, _NR_PRCTL = 3, 9, 28, 56, 57, 61, 157
# uapi/linux/mman.h, uapi/linux/sched.h, uapi/linux/wait.h, uapi/linux/prctl.h
_PROT_RWX, _MAP_PRIVATE, _MAP_ANONYMOUS, _MAP_FIXED_NOREPLACE = 7, 0x02, 0x20, 0x100000
_CLONE_VM, _CLONE_VFORK, _WALL = 0x100, 0x4000, 0x40000000
_PR_SET_CHILD_SUBREAPER, _PR_GET_CHILD_SUBREAPER = 36, 37
_NO_FD = 0xFFFF_FFFF
_MADV_DONTNEED = 4
# linux/errno.h: ERESTARTSYS, ERESTARTNOINTR, ERESTARTNOHAND. The call did nothing yet.
_RESTARTS = (-512, -513, -514)
_ERESTARTNOINTR = 513

_WORD = struct.Struct("=q")
_HEADER = 64
"""Bytes that the code of an agent expects to be zero at first, but for the word of the result."""

Script = Generator[None, int, Outcome | None]
"""Takes the wait status of each stop; returns the outcome in the last stop of the thread."""
_Part = Generator[None, int, None]


class _Failed(Exception):
    """No agent can be made; the message gives the reason to a user."""


class Maker(NamedTuple):
    """Thread, and the script of the thread. ``request``: settled by the outcome of the script."""

    tid: int
    request: MakeAgent | TraceFork
    script: Script


class AgentMakers:
    """All threads with a script. Each request gets one outcome, which goes to ``outbox``."""

    def __init__(self, outbox: deque[Report]) -> None:
        self._outbox = outbox
        self._makers: dict[int, Maker] = {}
        self._open: set[int] = set()
        """Ids of requests without an outcome."""
        self._early: dict[int, int] = {}
        """Wait statuses of children whose fork has not been reported yet."""

    def __contains__(self, tid: int) -> bool:
        return tid in self._makers

    def __iter__(self) -> Iterator[int]:
        return iter(tuple(self._makers))

    def __bool__(self) -> bool:
        return bool(self._makers)

    def begin(self, request: MakeAgent | TraceFork) -> None:
        """Interrupt a seized thread, and begin its script."""
        self._open.add(request.id)
        self._outbox.append(ArmedAck(request.id))
        self._start(
            request.tid,
            request,
            _make(request, request.tid) if isinstance(request, MakeAgent) else self._fork(request),
        )
        try:
            ptrace.interrupt(request.tid)
        except OSError as error:
            if not ptrace.is_vanished(error):
                raise
            self.drop(request.tid)

    def on_stop(self, tid: int, status: int) -> bool:
        """Serve a stop. Return True in the last stop: the caller goes on with the thread, whose registers,
        mask and options are as before. Precondition: ``tid`` is in here. Raises OSError as ptrace(2) does.
        """
        try:
            self._makers[tid].script.send(status)
        except StopIteration as end:
            del self._makers[tid]
            if end.value is not None:
                self._settle(end.value)
            return True
        return False

    def is_early(self, tid: int, status: int) -> bool:
        """Keep the stop of a child whose fork is not reported yet. Return False if no fork is traced."""
        if not any(isinstance(maker.request, TraceFork) for maker in self._makers.values()):
            return False
        self._early[tid] = status
        return True

    def drop(self, tid: int, sig: int = 0) -> None:
        """Forget a thread that has ended, by signal ``sig``; 0: unknown."""
        self._early.pop(tid, None)
        if (maker := self._makers.pop(tid, None)) is None:
            return
        if not any(other.request is maker.request for other in self._makers.values()):
            self._settle(Gone(maker.request.id, sig))

    def _settle(self, outcome: Outcome) -> None:
        if outcome.id in self._open:
            self._open.discard(outcome.id)
            self._outbox.append(outcome)

    def _start(self, tid: int, request: MakeAgent | TraceFork, script: Script) -> None:
        next(script)
        self._makers[tid] = Maker(tid, request, script)

    def _fork(self, request: TraceFork) -> Script:
        """Let the thread fork, start the script of the child, and close the socket in the parent."""
        tid = request.tid
        yield from _event_stop(tid)
        child = yield from self._forked(request)
        ptrace.set_options(tid, ptrace.OPTIONS)
        yield from _held(tid, lambda insn: _closed(request, tid, insn))
        return None if child else NotTaken(request.id)

    def _forked(self, request: TraceFork) -> Generator[None, int, int]:
        """Let the thread repeat its fork. Return the child; 0 without one: the fork failed, or a signal came
        first, and the fork will be notified once more. Ends in an EVENT_STOP.
        """
        tid, child = request.tid, 0
        before = injection.registers(tid)
        if before.call in (_NR_CLONE, _NR_FORK) and before.result == -_ERESTARTNOINTR:
            ptrace.set_options(tid, ptrace.OPTIONS | ptrace.TRACE_FORKS)
            ptrace.cont_to_syscall(tid)
            status = yield
            if os.WSTOPSIG(status) != ptrace.SYSCALL_STOP:
                yield from _event_stop(tid, status)
                return 0
            ptrace.cont_to_syscall(tid)  # from the entry
            while os.WSTOPSIG(status := (yield)) != ptrace.SYSCALL_STOP:
                if status >> 16 in ptrace.FORK_EVENTS:
                    child = ptrace.event_message(tid)
                    self._adopt(child, request)
                ptrace.cont_to_syscall(tid)
            ptrace.interrupt(tid)
            ptrace.cont(tid)
            yield from _event_stop(tid)
        return child

    def _adopt(self, child: int, request: TraceFork) -> None:
        self._start(child, request, _make(request, child))
        if (status := self._early.pop(child, None)) is not None:
            self.on_stop(child, status)  # its first stop: not the last one


def _make(request: MakeAgent | TraceFork, tid: int) -> Script:
    """Have the thread make an agent."""
    yield from _event_stop(tid)
    ptrace.set_options(tid, ptrace.OPTIONS)  # the child of a traced fork would trace the agent
    outcome: Outcome = AgentMade(request.id, tid)

    def steps(insn: int) -> _Part:
        nonlocal outcome
        try:
            yield from _cloned(request, tid, insn)
            if isinstance(request, TraceFork):
                yield from _dropped(request, tid, insn)
        except (_Failed, CannotInject) as why:
            outcome = Refused(request.id, str(why))
        yield from _closed(request, tid, insn)

    refusal = yield from _held(tid, steps)
    if refusal is not None:
        outcome = Refused(request.id, refusal)
    if isinstance(outcome, Refused) and isinstance(request, TraceFork):
        os.kill(tid, signal.SIGKILL)
        outcome = Refused(request.id, outcome.reason, killed=True)
    return outcome


def _held(tid: int, steps: Callable[[int], _Part]) -> Generator[None, int, str | None]:
    """Take steps with all signals blocked and without seccomp filters. Begins and ends in an EVENT_STOP, with
    equal registers. Return the reason if no step is possible. ``steps`` takes the address of a syscall
    instruction.
    """
    try:
        registers, insn = injection.registers(tid), injection.find_instruction(tid)
    except CannotInject as why:
        return str(why)
    mask = ptrace.get_mask(tid)
    ptrace.set_mask(tid, U64_MAX)
    suspends = ptrace.can_suspend_seccomp(tid)
    yield from steps(insn)
    ptrace.interrupt(tid)
    ptrace.cont(tid)
    yield from _event_stop(tid)
    if suspends:
        ptrace.suspend_seccomp(tid, False)
    registers.put_back()
    ptrace.set_mask(tid, mask)
    return None


def _cloned(request: MakeAgent | TraceFork, tid: int, insn: int) -> _Part:
    with injection.open_memory(tid) as memory:
        yield from _mapped(request, tid, insn, memory)
        place, room = request.place, request.place + PAGE_SIZE
        os.pwrite(memory.fileno(), _WORD.pack(-errno.ESRCH).ljust(_HEADER, b"\0"), room)
        yield from _call(tid, insn, _NR_PRCTL, _PR_GET_CHILD_SUBREAPER, room + _WORD.size)
        is_subreaper = any(_read(memory, room + _WORD.size, _WORD.size))
        if is_subreaper:  # the agent would become its child
            os.pwrite(memory.fileno(), bytes(_WORD.size), room + _WORD.size)
            yield from _call(tid, insn, _NR_PRCTL, _PR_SET_CHILD_SUBREAPER, 0)
        args = (_CLONE_VM | _CLONE_VFORK, room + PAGE_SIZE, 0, 0, 0)
        first = yield from _call(tid, place, _NR_CLONE, *args, r12=room, r13=request.fd)
        if first > 0:
            yield from _call(tid, insn, _NR_WAIT4, first, 0, _WALL, 0)
        if is_subreaper:
            yield from _call(tid, insn, _NR_PRCTL, _PR_SET_CHILD_SUBREAPER, 1)
        _check("clone", first)
        _check("the first process of the agent", _WORD.unpack(_read(memory, room, _WORD.size))[0])


def _dropped(request: TraceFork, tid: int, insn: int) -> _Part:
    for start, length in request.drop:
        args = (start, length, _MADV_DONTNEED, 0, 0, request.magic << 32)
        _check(f"madvise at {start:#x}", (yield from _call(tid, insn, _NR_MADVISE, *args)))


def _mapped(request: MakeAgent | TraceFork, tid: int, insn: int, memory: FileIO) -> _Part:
    """Put the code into the process, unless a fork has inherited it."""
    place, code = request.place, request.code
    if injection.peek(memory.fileno(), place, len(code)) == code:
        return
    flags = _MAP_PRIVATE | _MAP_ANONYMOUS | _MAP_FIXED_NOREPLACE
    fd = _NO_FD | request.magic << 32
    at = yield from _call(tid, insn, _NR_MMAP, place, request.length, _PROT_RWX, flags, fd, 0)
    _check(f"mmap at {place:#x}", at)
    if at != place:
        raise _Failed(f"the kernel mapped the memory of the agent at {at:#x}, not at {place:#x}")
    os.pwrite(memory.fileno(), code, place)


def _check(what: str, result: int) -> None:
    if result < 0:
        raise _Failed(f"{what}: {os.strerror(-result)}")


def _read(memory: FileIO, where: int, length: int) -> bytes:
    found = injection.peek(memory.fileno(), where, length)
    if len(found) != length:
        raise _Failed("the program has unmapped the memory of its agent")
    return found


def _closed(request: MakeAgent | TraceFork, tid: int, insn: int) -> _Part:
    """Close the socket, and put the limit of descriptors back."""
    yield from _call(tid, insn, _NR_CLOSE, request.fd)
    if request.limit is not None:
        resource.prlimit(tid, resource.RLIMIT_NOFILE, request.limit)


def _call(
    tid: int, insn: int, number: int, *args: int, r12: int = 0, r13: int = 0
) -> Generator[None, int, int]:
    """Have the thread make a system call by the instruction at ``insn``; return its result."""
    while True:
        injection.prepare(tid, insn, number, args, r12=r12, r13=r13)
        for _ in ("entry", "exit"):
            ptrace.cont_to_syscall(tid)
            while os.WSTOPSIG(status := (yield)) != ptrace.SYSCALL_STOP:
                ptrace.cont_to_syscall(tid, _signal(status))
        result = injection.registers(tid).result
        if result not in _RESTARTS:  # of a stop by SIGSTOP
            return result


def _event_stop(tid: int, status: int | None = None) -> _Part:
    """Wait for the EVENT_STOP of an interrupted thread. Any other stop may have swallowed the INTERRUPT.

    ``status``: the stop in which the thread is; None: the thread runs.
    """
    while True:
        if status is not None:
            if status >> 16 == ptrace.EVENT_STOP:
                return
            ptrace.interrupt(tid)
            ptrace.cont(tid, _signal(status))
        status = yield


def _signal(status: int) -> int:
    """Return the signal to deliver in a stop."""
    sig = os.WSTOPSIG(status)
    return 0 if status >> 16 or sig == ptrace.SYSCALL_STOP else sig
