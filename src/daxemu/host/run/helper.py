"""The helper of ``daxemu run`` for programs with direct mappings.

The C loop (``forward_in_c``) forwards each call to the supervisor of its mount. This module finds the mount
of a device at the first mmap(2) of a file there, attaches the listener to the mount's supervisor, and answers
madvise(2) with MADV_HWPOISON or MADV_SOFT_OFFLINE outside the zone as for every other program.

The mount that ``daxemu run`` names is asked while the command starts.

States of a device: unknown -> asked (in a thread, because a supervisor may take its time) -> attached, or not
ours. While no supervisor answers for a mount that was attached, mmap(2) of its files is ENODEV. A device that
is not attached is unknown again when the mount table changes.

Only the thread of :meth:`Helper.serve` uses the C loop. Threads hand their results over in ``_learned``.
"""

from __future__ import annotations

import contextlib
import errno
import os
import socket
import threading
from collections.abc import Callable
from pathlib import Path
from queue import SimpleQueue
from typing import NamedTuple

from daxemu.errors import Busy, DaxemuError, Unsupported
from daxemu.host.proc.mountinfo import Mount, mounts
from daxemu.host.run import seccomp, zone
from daxemu.host.run.forward_in_c import Forwarder, Work
from daxemu.host.run.seccomp import Answer, NotifiedCall


class Handover(NamedTuple):
    """Descriptors of this process for a supervisor: the listener, and the supervisor's end of a socket that
    the calls arrive at. ``zone``: addresses for the direct mappings of the mount.
    """

    listener: int
    socket: int
    zone: range


Attach = Callable[[Mount, Handover], bool]
"""Give the descriptors to the supervisor of a mount. Return False for a mount in page-cache mode. Called in
any thread; raises DaxemuError or OSError.
"""


class _Learned(NamedTuple):
    """Result for a device. ``socket``: this end of the socket of an attached mount. ``is_refused``: mmap(2)
    is ENODEV this time.
    """

    minor: int
    socket: int | None = None
    zone: range = range(0)
    is_refused: bool = False


class Helper:
    """Answers the calls of one listener."""

    def __init__(
        self,
        listener: int,
        only: Mount | None,
        madvise: Callable[[NotifiedCall], None],
        attach: Attach,
    ) -> None:
        """``only``: the one mount for direct mappings; None: every direct mount. ``madvise``: answer the call
        of a failure; called in a thread of its own.
        """
        self._listener = listener
        self._only = only
        self._madvise = madvise
        self._attach = attach
        self._forwarder = Forwarder(listener)
        self._slices = list(reversed(zone.SLICES))
        self._direct: set[Path] = set()
        self._waiting: dict[int, list[bytes]] = {}
        self._learned: SimpleQueue[_Learned] = SimpleQueue()

    def serve(self) -> None:
        """Serve until the last process under the filter is gone."""
        _hurry()
        if self._only is not None:
            self._begin_to_learn(self._only.dev[1], os.getpid())
        while True:
            work, raw = self._forwarder.serve()
            if work is Work.ENDED:
                return
            if work is Work.WOKEN:
                self._take_learned()
            else:
                self._work(work, raw)

    def _work(self, work: Work, raw: bytes) -> None:
        """Do what the C loop left for Python."""
        call = seccomp.parse(raw)
        if work is Work.MADVISE:
            threading.Thread(target=self._madvise, args=(call,), daemon=True).start()
        elif work is Work.DEVICE:
            minor = self._forwarder.asked
            if (waiting := self._waiting.get(minor)) is not None:
                waiting.append(raw)
                return
            self._begin_to_learn(minor, call.tid)
            self._waiting[minor].append(raw)

    def _begin_to_learn(self, minor: int, tid: int) -> None:
        self._waiting[minor] = []
        threading.Thread(target=self._learn, args=(minor, tid), daemon=True).start()

    def _learn(self, minor: int, tid: int) -> None:
        learned = _Learned(minor, is_refused=True)
        try:
            learned = self._ask(minor, tid)
        finally:
            self._learned.put(learned)
            self._forwarder.wake()

    def _ask(self, minor: int, tid: int) -> _Learned:
        """Find the mount of a device, and attach its supervisor if the mount is direct."""
        mount = self._mount_of(minor, tid)
        if mount is None or (self._only is not None and mount.device != self._only.device):
            return _Learned(minor)
        if mount.owner not in (None, 0):  # a mount of another user is never direct, and may never answer
            return _Learned(minor)
        if not self._slices:
            return _Learned(minor, is_refused=True)
        given = self._slices.pop()
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs:
            try:
                is_attached = self._attach(mount, Handover(self._listener, theirs.fileno(), given))
            except (OSError, DaxemuError) as error:
                # A supervisor that is gone, or that does not answer in time.
                ours.close()
                self._slices.append(given)
                is_refused = mount.device in self._direct or isinstance(error, Busy)
                return _Learned(minor, is_refused=is_refused)
        if not is_attached:
            ours.close()
            self._slices.append(given)
            return _Learned(minor)
        self._direct.add(mount.device)
        return _Learned(minor, ours.detach(), given)

    def _mount_of(self, minor: int, tid: int) -> Mount | None:
        """Return the daxemu mount of a device, as this process or the thread sees mounts; None if neither
        sees one.
        """
        for process in ("self", tid):
            try:
                found = next((each for each in mounts(process) if each.dev == (0, minor)), None)
            except OSError:
                continue  # the thread is gone
            if found is not None:
                return found
        return None

    def _take_learned(self) -> None:
        while not self._learned.empty():
            learned = self._learned.get()
            if learned.socket is not None:
                try:
                    self._forwarder.attach(learned.minor, learned.zone, learned.socket)
                except Unsupported:
                    os.close(learned.socket)
                    learned = _Learned(learned.minor, is_refused=True)
            elif not learned.is_refused:
                self._forwarder.not_ours(learned.minor)
            for raw in self._waiting.pop(learned.minor):
                if learned.is_refused:
                    seccomp.answer(self._listener, seccomp.parse(raw), Answer(error=errno.ENODEV))
                else:
                    self._work(self._forwarder.route(raw), raw)


def _hurry() -> None:
    """Let this thread, but none that it starts, run before every ordinary process, where that is permitted.

    Until the helper has received a call, a signal interrupts the caller's wait, and a caller without
    SA_RESTART gets EINTR, which mmap(2) never returns otherwise. On a busy machine, in a loop of mmap(2),
    493 of 2000 signals met this window; with this priority 90.
    """
    with contextlib.suppress(OSError):
        os.sched_setscheduler(0, os.SCHED_FIFO | os.SCHED_RESET_ON_FORK, os.sched_param(1))
