"""Messages between the supervisor and the tracer process.

Purpose: the vocabulary of the socket between ``tracer.link`` and ``tracer.process``. Each packet is a JSON
list of messages: ``Request`` in, ``Report`` out.

Invariants:
- every request gets exactly one ``Outcome``, however late; ``ArmedAck``, ``Asleep`` and ``Postponed`` may
  precede the outcome, and are none;
- the ``id`` of a report is the ``id`` of its request; the link gives each id once, whichever tracer process
  serves the request;
- only data here: both sides import this module, and the tracer must stay light.
"""

from __future__ import annotations

from typing import ClassVar

import msgspec

from daxemu.host.proc.file_pages import FilePage
from daxemu.uapi import BUS_MCEERR_AO, BUS_MCEERR_AR, PAGE_SHIFT


class _Message(msgspec.Struct, tag=True, frozen=True):
    id: int


class ArmAR(_Message, frozen=True):
    """Turn the next BUS_ADRERR of ``tid`` within ``timeout`` seconds into consumed poison, if the fault is
    for ``page``.
    """

    tid: int
    timeout: float = 1.0
    page: FilePage | None = None


class Send(_Message, frozen=True):
    """Signal ``tid`` of process ``tgid`` for poison at its virtual address ``addr``, ``2**lsb`` bytes."""

    code: ClassVar[int]

    tgid: int
    tid: int
    addr: int
    lsb: int = PAGE_SHIFT


class SendAO(Send, frozen=True):
    """Action optional: queued, and dropped if the process ignores SIGBUS.

    With ``page``, the page that ``addr`` maps: the signal carries another address if the process has moved
    the page. No signal is sent if the process has unmapped the page, or runs another program by now.
    """

    code = BUS_MCEERR_AO

    page: FilePage | None = None


class ForceAR(Send, frozen=True):
    """Action required, before the thread's next instruction; a thread that blocks or ignores SIGBUS dies of
    the signal.

    ``fault``: the page fault that the thread must leave (processes.place_of_fault()). A thread that is
    elsewhere has left the page fault already, perhaps for a handler of SIGBUS: then the outcome is NotTaken.
    If the page fault fails first, its BUS_ADRERR becomes the signal.
    """

    code = BUS_MCEERR_AR

    fault: tuple[int, int, int] | None = None


class Hold(_Message, frozen=True):
    """Stop thread ``tid`` of process ``tgid`` when its system call returns, until ``LetGo``."""

    tgid: int
    tid: int


class LetGo(_Message, frozen=True):
    """Let a ``Held`` thread run. First drop the private copies at ``discard`` (address, bytes), each of which
    begins with the page of the same index in ``pages``. A successful system call ``number`` returns
    ``-error`` instead (0: leave the result).
    """

    tid: int
    discard: list[tuple[int, int]] = []
    pages: list[FilePage] = []
    number: int = -1
    error: int = 0


class _AgentRequest(_Message, frozen=True):
    tgid: int
    tid: int
    fd: int
    place: int
    length: int
    code: bytes
    magic: int
    limit: tuple[int, int] | None = None


class MakeAgent(_AgentRequest, frozen=True):
    """Make an agent in process ``tgid``. Its thread ``tid`` waits in a system call that seccomp(2) notified;
    the supervisor answers the call with -ERESTARTNOINTR after ``ArmedAck``.

    ``fd``: the agent's socket, a descriptor of the process, closed there in the end. ``code`` goes to address
    ``place``, with ``length`` bytes of memory in all. ``magic``: upper half of the descriptor in mmap(2), by
    which the seccomp filter knows an agent's call. ``limit``: RLIMIT_NOFILE to put back, soft and hard.
    """


class TraceFork(_AgentRequest, frozen=True):
    """Make an agent in the child of a fork, before the child runs. Thread ``tid`` waits in fork(2) or
    clone(2); otherwise as ``MakeAgent``. The thread repeats the fork, so the supervisor is notified a second
    time. ``drop``: addresses and lengths, in bytes, whose pages the child does not get (MADV_DONTNEED).
    """

    drop: tuple[tuple[int, int], ...] = ()


class ArmedAck(_Message, frozen=True):
    """The thread is held: the supervisor may now fail its fault, or end its system call."""


class Refused(_Message, frozen=True):
    """Not possible, with the reason to show. ``signalled``: the thread got a plain SIGBUS instead.
    ``killed``: the process got SIGKILL, before the thread could load from a copy that cannot be dropped.
    """

    reason: str
    signalled: bool = False
    killed: bool = False


class Delivered(_Message, frozen=True):
    """Signal delivered: the thread handles SIGBUS now, has SIGBUS pending because the thread blocks it, or
    dies.

    ``serial`` belongs to the signal: equal in all reports of one real signal (which settles every ``ArmAR``
    of its thread), and in no others. ``serial`` is the ``id`` of the last request that the signal settles,
    the request for the read that failed. So just one report of a signal has ``id == serial``.
    """

    tid: int
    code: int
    addr: int
    serial: int


class NotTaken(_Message, frozen=True):
    """No SIGBUS came in time, no child came of a fork, or the thread had left its page fault; the thread is
    let go.
    """


class AgentMade(_Message, frozen=True):
    """Process ``tgid`` has an agent, and runs on: the process of the request, or the child of its fork."""

    tgid: int


class Gone(_Message, frozen=True):
    """The thread exited, called execve(2), or unmapped the page. ``signal``: the signal that ended the
    thread; 0 if unknown.

    ``addr``: virtual address in bytes of the page whose fault merged with the signal; 0 if unknown.
    """

    signal: int = 0
    addr: int = 0


class Ignored(_Message, frozen=True):
    """The process ignores SIGBUS: the kernel would discard an AO at once."""


class Held(_Message, frozen=True):
    """The system call has returned, and the thread is stopped before its next instruction."""


class Resumed(_Message, frozen=True):
    """The thread runs again, with the changes that ``LetGo`` asked for."""


class Asleep(_Message, frozen=True):
    """Not final: the thread of this request is stopped or asleep in the kernel, perhaps for long."""


class Postponed(_Message, frozen=True):
    """Not final: ``limit`` victims with a tracer thread each are stuck. The victim of the request is stopped
    or asleep as well; the tracer checks the victim once a second.
    """

    limit: int


Request = ArmAR | SendAO | ForceAR | Hold | LetGo | MakeAgent | TraceFork
Outcome = Delivered | Refused | NotTaken | Gone | Ignored | Held | Resumed | AgentMade
Report = ArmedAck | Asleep | Postponed | Outcome

MOST_IN_PACKET = 128
"""Limit of messages in a packet: this number of reports fits into MAX_PACKET."""
MAX_PACKET = 1 << 16
MAX_MESSAGE = 1 << 14
"""Bytes: the longest message is a TraceFork with 256 ranges and the code of an agent."""
