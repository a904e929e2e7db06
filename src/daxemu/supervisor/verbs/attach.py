"""Runs whose system calls are forwarded to this supervisor: ``daxemu run`` on a direct mount."""

from __future__ import annotations

from daxemu import protocol as p
from daxemu.errors import PermissionDenied, Unsupported
from daxemu.events import Emit
from daxemu.host.run.attached import AttachedRun, Handle
from daxemu.host.run.helper import Handover
from daxemu.host.unexpected import Nursery, Unexpected


class Attachments:
    """Attached runs. Belongs to the trio thread."""

    def __init__(self, handle: Handle | None, emit: Emit, nursery: Nursery, unexpected: Unexpected) -> None:
        """``handle``: decides a call; None for a mount in page-cache mode."""
        self._handle = handle
        self._emit = emit
        self._nursery = nursery
        self._unexpected = unexpected

    async def attach(self, request: p.Attach) -> p.Done:
        """Attach a run. Precondition: the control socket has checked that the process ``pid`` asks.

        Raises Unsupported in page-cache mode, PermissionDenied for descriptors that cannot be taken.
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
            run.is_simulated = request.simulated
            self._nursery.start_soon(run.serve, self._handle, self._emit, self._nursery, self._unexpected)
        return p.Done()
