"""AO signals to many threads at once, in C (victims/deliver.c), while every stop is the expected one.

States of a delivery: seized and interrupted -> its mark is queued -> done. In any state Python may take the
delivery over. Everything here belongs to the thread that traces.
"""

from __future__ import annotations

import os
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
_MOST = 4096  # MOST of victims/deliver.c


class Taken(NamedTuple):
    """Delivery that Python took over. ``cookie``: the mark queued to the thread; 0 if the thread was only
    interrupted.
    """

    request: SendAO
    cookie: int


class Wait(NamedTuple):
    """Status of a thread as returned by waitpid(2). ``sent``: the request that was delivered; ``taken``: the
    delivery that Python takes over.
    """

    tid: int
    status: int
    sent: SendAO | None = None
    taken: Taken | None = None


class Deliveries:
    """Deliveries under way in C. Precondition: the C library is not MISSING."""

    def __init__(self) -> None:
        self._requests: dict[int, Taken] = {}
        calls = array("I", sorted(injection.SAYS_EINTR))
        library().daxemu_restart(calls.tobytes(), len(calls))

    def __len__(self) -> int:
        return len(self._requests)

    @property
    def room(self) -> int:
        """Number of further deliveries that fit."""
        return _MOST - len(self)

    def __contains__(self, tid: int) -> bool:
        return tid in self._requests

    def begin(self, requests: Sequence[tuple[SendAO, int]]) -> int:
        """Seize and interrupt the thread of each request, which comes with its cookie. Return the number of
        requests begun, from the first on; the next request cannot be begun.

        Preconditions:
        - no thread has two requests;
        - ``room`` covers all requests.
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
        """Serve at most ``most`` stops that have been reported by now. Return the number of stops, and each
        wait that is more than a step of a delivery.
        """
        waits, count = bytearray(WAIT.size * most), bytearray(_COUNT.size)
        stops: int = library().daxemu_reap(as_argument(waits), most, as_argument(count))
        return stops, list(self._meant(memoryview(waits)[: WAIT.size * _COUNT.unpack(count)[0]]))

    def _meant(self, waits: memoryview) -> Iterator[Wait]:
        for tid, status, what in WAIT.iter_unpack(waits):
            if what == _OTHER:
                yield Wait(tid, status)
            elif what == _DELIVERED:
                yield Wait(tid, status, sent=self._requests.pop(tid).request)
            else:
                yield Wait(tid, status, taken=self._as_taken(tid, what))

    def take_over(self, tid: int) -> Taken:
        """Take a delivery over from C between two stops of its thread."""
        return self._as_taken(tid, library().daxemu_take_over(tid))

    def take_all(self) -> list[Taken]:
        """Take all deliveries over from C."""
        return [self.take_over(tid) for tid in list(self._requests)]

    def _as_taken(self, tid: int, stage: int) -> Taken:
        taken = self._requests.pop(tid)
        return taken if stage == _QUEUED else taken._replace(cookie=0)


def reap(most: int) -> tuple[int, list[Wait]]:
    """Return the statuses that waitpid(2) has by now, at most ``most``, and their number."""
    waits: list[Wait] = []
    while len(waits) < most:
        try:
            tid, status = os.waitpid(-1, os.WNOHANG | ptrace.WALL | ptrace.WNOTHREAD)
        except ChildProcessError:
            break
        if tid == 0:
            break
        waits.append(Wait(tid, status))
    return len(waits), waits
