"""Runs whose system calls are forwarded to this supervisor: ``daxemu run`` on a direct mount."""

from __future__ import annotations

import logging

from daxemu import protocol as p
from daxemu.errors import Busy, PermissionDenied, Unsupported
from daxemu.events import Emit
from daxemu.host.run.attached import AttachedRun, Handle
from daxemu.host.run.helper import Handover
from daxemu.host.unexpected import Nursery, Unexpected

log = logging.getLogger(__name__)


class Attachments:
    """Attached runs. Belongs to the trio thread."""

    def __init__(self, handle: Handle | None, emit: Emit, nursery: Nursery, unexpected: Unexpected) -> None:
        """``handle``: decides a call; None for a mount in page-cache mode."""
        self._handle = handle
        self._emit = emit
        self._nursery = nursery
        self._unexpected = unexpected
        self._runs: set[AttachedRun] = set()

    async def attach(self, request: p.Attach) -> p.Done:
        """Attach a run. Precondition: the control socket has checked that the process ``pid`` asks.

        Raises Unsupported in page-cache mode, PermissionDenied for descriptors that cannot be taken or are
        attached already, Busy where this process has no free descriptor.
        """
        if self._handle is None:
            raise Unsupported("the mount has no direct mappings: mount it with daxemu mount --direct")
        if request.descriptors is not None:
            listener, sock, ino = request.descriptors
            offered = Handover(listener, sock, range(*request.zone))
            try:
                run = AttachedRun.take(request.pid, offered, ino)
            except OverflowError:
                raise PermissionDenied("a process or descriptor number out of range") from None
            except Busy as error:
                log.warning("process %s gets no direct mappings: %s", request.pid, error)
                raise
            run.is_simulated = request.simulated
            if any(each.has_listener_of(run) for each in self._runs):
                run.close()
                raise PermissionDenied(f"the run of process {request.pid} is attached already")
            self._runs.add(run)
            self._nursery.start_soon(self._serve, run, self._handle)
        return p.Done()

    async def _serve(self, run: AttachedRun, handle: Handle) -> None:
        try:
            await run.serve(handle, self._emit, self._nursery, self._unexpected)
        finally:
            self._runs.discard(run)
