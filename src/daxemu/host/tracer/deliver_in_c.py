"""AO to many threads at once, as far as all goes as usual (victims/deliver.c).

States of a delivery: seized and interrupted -> its mark is queued -> done; or, at any time, Python's again.
Belongs to the thread that traces.
"""

from __future__ import annotations

import struct
from array import array
from collections.abc import Iterator, Sequence
from signal import SIGBUS
from typing import NamedTuple

from daxemu.host.tracer import injection, ptrace, siginfo
from daxemu.host.tracer.messages import SendAO
from daxemu.host.victims import as_argument, library
from daxemu.host.victims.structs import DELIVERY, WAIT

_COUNT = struct.Struct("=I")
_OTHER, _DELIVERED, _INTERRUPTED, _QUEUED = range(4)
_NO_PAGE = (0, 0, 0, 0)
_MOST = 4096  # in victims/deliver.c, too


class Taken(NamedTuple):
    """A delivery that is Python's again. Its thread has its mark (``cookie``) queued; 0: it was only
    interrupted.
    """

    request: SendAO
    cookie: int


class Wait(NamedTuple):
    """What waitpid(2) said of a thread. ``sent``: what it was given; ``taken``: what is Python's again."""

    tid: int
    status: int
    sent: SendAO | None = None
    taken: Taken | None = None


class Deliveries:
    """Those under way. Precondition: the C is not MISSING."""

    def __init__(self) -> None:
        self._requests: dict[int, Taken] = {}
        calls = array("I", sorted(injection.SAYS_EINTR))
        library().daxemu_restart(calls.tobytes(), len(calls))

    def __len__(self) -> int:
        return len(self._requests)

    @property
    def room(self) -> int:
        """How many more there can be."""
        return _MOST - len(self)

    def __contains__(self, tid: int) -> bool:
        return tid in self._requests

    def begin(self, requests: Sequence[tuple[SendAO, int]]) -> int:
        """Seize and interrupt the thread of each request, with its cookie. Returns how many: the one after
        these cannot be. Precondition: no thread has two, and there is room.
        """
        packed = b"".join(
            DELIVERY.pack(
                request.tgid,
                request.tid,
                *(request.page or _NO_PAGE),
                request.addr,
                siginfo.queued(SIGBUS, cookie),
                siginfo.bus_error(request.code, request.addr, request.lsb),
            )
            for request, cookie in requests
        )
        begun: int = library().daxemu_deliver(packed, len(requests), ptrace.OPTIONS)
        self._requests.update((request.tid, Taken(request, cookie)) for request, cookie in requests[:begun])
        return begun

    def reap(self, most: int) -> tuple[int, list[Wait]]:
        """Serve the stops that there are by now, ``most`` at the most. Returns how many there were, and those
        that are not just a step of a delivery.
        """
        waits, told = bytearray(WAIT.size * most), bytearray(_COUNT.size)
        stops: int = library().daxemu_reap(as_argument(waits), most, as_argument(told))
        return stops, list(self._meant(memoryview(waits)[: WAIT.size * _COUNT.unpack(told)[0]]))

    def _meant(self, waits: memoryview) -> Iterator[Wait]:
        for tid, status, what in WAIT.iter_unpack(waits):
            if what == _OTHER:
                yield Wait(tid, status)
            elif what == _DELIVERED:
                yield Wait(tid, status, sent=self._requests.pop(tid).request)
            else:
                yield Wait(tid, status, taken=self._as_taken(tid, what))

    def take_over(self, tid: int) -> Taken:
        """Take a delivery over between two stops of its thread."""
        return self._as_taken(tid, library().daxemu_take_over(tid))

    def take_all(self) -> list[Taken]:
        """Take over all of them."""
        return [self.take_over(tid) for tid in list(self._requests)]

    def _as_taken(self, tid: int, stage: int) -> Taken:
        taken = self._requests.pop(tid)
        return taken if stage == _QUEUED else taken._replace(cookie=0)
