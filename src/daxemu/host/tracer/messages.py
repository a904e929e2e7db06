"""What the supervisor and the tracer process say to each other.

Purpose: the vocabulary of the socket between ``tracer.link`` and ``tracer``. Each packet is a JSON list of
messages: ``Request`` in, ``Report`` out.

Invariants:
- every request gets exactly one ``Outcome``, however late; ``ArmedAck``, ``Asleep`` and ``Postponed`` may
  come before it, and are none;
- a report's ``id`` is its request's; the link gives each id once, whichever tracer process serves it;
- nothing here but data: both sides import it, and the tracer must stay light.
"""

from __future__ import annotations

from typing import ClassVar

import msgspec

from daxemu.host.proc.file_pages import FilePage
from daxemu.uapi import BUS_MCEERR_AO, BUS_MCEERR_AR, PAGE_SHIFT


class _Message(msgspec.Struct, tag=True, frozen=True):
    id: int


class ArmAR(_Message, frozen=True):
    """The next BUS_ADRERR of ``tid`` within ``timeout`` seconds is consumed poison, if it is for ``page``."""

    tid: int
    timeout: float = 1.0
    page: FilePage | None = None


class Send(_Message, frozen=True):
    """Tell ``tid`` of process ``tgid`` of poison at its virtual address ``addr``, ``2**lsb`` bytes."""

    code: ClassVar[int]

    tgid: int
    tid: int
    addr: int
    lsb: int = PAGE_SHIFT


class SendAO(Send, frozen=True):
    """Action optional: queued, and nothing if it is ignored.

    With ``page``, what ``addr`` shows: told at another address if the process has moved it there, and not
    told if it has unmapped it, or is another program by now.
    """

    code = BUS_MCEERR_AO

    page: FilePage | None = None


class ForceAR(Send, frozen=True):
    """Action required, before the thread's next instruction; one that blocks or ignores SIGBUS dies of it."""

    code = BUS_MCEERR_AR


class Hold(_Message, frozen=True):
    """Stop thread ``tid`` of process ``tgid`` when its system call returns, until ``LetGo``."""

    tgid: int
    tid: int


class LetGo(_Message, frozen=True):
    """Let a ``Held`` thread run. First drop the private copies at ``discard`` (address, bytes), each of which
    begins with the page of the same index in ``pages``; and have a successful system call ``number`` return
    ``-error`` instead (0: leave the result).
    """

    tid: int
    discard: list[tuple[int, int]] = []
    pages: list[FilePage] = []
    number: int = -1
    error: int = 0


class ArmedAck(_Message, frozen=True):
    """The thread is held: its fault may be failed now, or its system call end."""


class Refused(_Message, frozen=True):
    """Not possible, for a reason to show. ``signalled``: it was sent a plain SIGBUS instead. ``killed``: it
    was sent SIGKILL, before the thread could load from a copy that cannot be dropped.
    """

    reason: str
    signalled: bool = False
    killed: bool = False


class Delivered(_Message, frozen=True):
    """Handed over: the thread handles it now, or has it pending because it blocks SIGBUS, or dies of it.

    ``serial`` is the signal's: equal in all reports of one real signal (it settles every ``ArmAR`` of its
    thread), in no others. It is the ``id`` of the last request that the signal settles, the one for the read
    that failed: so just one report of a signal has ``id == serial``.
    """

    tid: int
    code: int
    addr: int
    serial: int


class NotTaken(_Message, frozen=True):
    """No SIGBUS came in time; the thread is let go."""


class Gone(_Message, frozen=True):
    """The thread exited, called execve(2), or unmapped the page. ``signal`` ended it; 0 if unknown.

    ``addr``: where the process had the page whose fault merged with that signal, a virtual address in bytes;
    0 if unknown.
    """

    signal: int = 0
    addr: int = 0


class Ignored(_Message, frozen=True):
    """The process ignores SIGBUS, so an AO does not exist for it."""


class Held(_Message, frozen=True):
    """The system call has returned, and the thread is stopped before its next instruction."""


class Resumed(_Message, frozen=True):
    """The thread runs again, as ``LetGo`` said."""


class Asleep(_Message, frozen=True):
    """Not final: the thread of this request is stopped or asleep in the kernel, and may be for long."""


class Postponed(_Message, frozen=True):
    """Not final: ``limit`` victims with a tracer thread each are stuck. The victim of this request, stopped
    or asleep as well, is looked at once a second.
    """

    limit: int


Request = ArmAR | SendAO | ForceAR | Hold | LetGo
Outcome = Delivered | Refused | NotTaken | Gone | Ignored | Held | Resumed
Report = ArmedAck | Asleep | Postponed | Outcome

MOST_IN_PACKET = 128
"""Messages: so many fit into MAX_PACKET."""
MAX_PACKET = 1 << 16
