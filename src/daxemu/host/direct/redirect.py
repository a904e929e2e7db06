"""Redirection of a thread that forks to the code of its agent: ``redirect.c``, and the wait for the stop.

Purpose: a fork(2) costs one ptrace stop of the parent, and none of the child. The supervisor itself traces
the thread for this moment. A thread that cannot be redirected in this way forks under the tracer process:
``tracer.agent_maker``.
"""

from __future__ import annotations

import ctypes
import errno
import os
import struct
from collections.abc import Sequence
from functools import cache
from typing import NamedTuple

import trio

from daxemu.host.direct import code
from daxemu.host.proc import status
from daxemu.uapi import PAGE_SIZE

_FIRST_LOOK, _LONGEST_LOOK = 0.0001, 0.01
"""Seconds between looks at a thread that has not stopped yet: no event of trio reports a ptrace stop."""
_PATIENCE = 5.0
"""Seconds to wait for the stop when the supervisor ends."""


class RecordLayout(NamedTuple):
    """Numbers of redirect.h: offset of the records in the memory of an agent, bytes of a record, offset in a
    record of the word that the child waits for, most ranges of pages that the code drops in the child.
    """

    records: int
    size: int
    word: int
    most_drops: int


@cache
def layout() -> RecordLayout:
    """Return the numbers of the library. Raises Unsupported."""
    numbers = (ctypes.c_uint32 * len(RecordLayout._fields)).in_dll(code.library(), "daxemu_records")
    return RecordLayout(*numbers)


class ForkRecord(NamedTuple):
    """Place for the registers of a thread. ``room``: memory of the agent. ``used``: numbers of the records of
    other threads.
    """

    room: int
    number: int
    used: tuple[int, ...]

    @property
    def word(self) -> int:
        """Address of the word that the child waits for."""
        return self.address(self.number) + layout().word

    def address(self, number: int) -> int:
        """Return the address of a record."""
        return self.room + layout().records + number * layout().size

    def free_in(self, child: int) -> None:
        """Free the records of threads that the child of a fork does not have. Raises OSError."""
        if self.used:
            with open(f"/proc/{child}/mem", "r+b", buffering=0) as memory:
                for number in self.used:
                    os.pwrite(memory.fileno(), bytes(8), self.address(number))


def find_record(tid: int, place: int, filters: int) -> ForkRecord | None:
    """Return a free record of the agent with code at ``place``; None if thread ``tid`` must fork under the
    tracer process.

    ``filters``: number of seccomp(2) filters of a program that installed none. A further filter may forbid
    the calls of the code, which then is no call of the program.
    """
    found = status.find(tid)
    if found is None or found.seccomp_filters > filters:
        return None
    used = ctypes.c_uint32()
    room = place + PAGE_SIZE
    number = int(code.library().daxemu_free_record(tid, ctypes.c_uint64(room), ctypes.byref(used)))
    if number < 0:
        return None
    return ForkRecord(room, number, tuple(each for each in range(32) if used.value >> each & 1))


def seize(tid: int, listener: int, id_: int) -> None:
    """Trace a thread, and have it stop: its call ``id_`` of ``listener`` is answered. Next call
    :func:`redirect`. Raises OSError of PTRACE_SEIZE, before the answer.
    """
    error = int(code.library().daxemu_seize(tid, listener, ctypes.c_uint64(id_)))
    if error:
        raise OSError(-error, f"PTRACE_SEIZE {tid}: {os.strerror(-error)}")


async def redirect(
    tid: int, place: int, record: ForkRecord, socket: int, drops: Sequence[tuple[int, int]], magic: int
) -> bool:
    """Wait until a seized thread has stopped, and let it fork by the code at ``place``. Return False if the
    thread has ended, or makes its call again: a signal came first.

    ``socket``: descriptor of the agent in the program. ``drops``: addresses and lengths, at most
    ``RecordLayout.most_drops``.
    ``magic``: 0 if other supervisors must see the fork.
    """
    library = code.library()
    look = _FIRST_LOOK
    with trio.CancelScope() as scope:
        while not (state := int(library.daxemu_is_stopped(tid))):
            try:
                await trio.sleep(look)
            except trio.Cancelled:  # a thread that stops now must not stay stopped
                scope.shield, scope.deadline = True, trio.current_time() + _PATIENCE
                raise
            look = min(2 * look, _LONGEST_LOOK)
    if state < 0:
        return False
    packed = b"".join(struct.pack("=QQ", *drop) for drop in drops)
    done = library.daxemu_redirect(
        tid,
        ctypes.c_uint64(place),
        ctypes.c_uint64(record.room),
        record.number,
        socket,
        packed,
        len(drops),
        ctypes.c_uint64(magic),
    )
    if done < 0 and -done not in (errno.ESRCH, errno.EFAULT):
        raise OSError(-done, f"thread {tid} cannot be redirected: {os.strerror(-done)}")
    return bool(done > 0)
