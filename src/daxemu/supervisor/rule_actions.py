"""Actions of rules: what happens when an operation fires a rule."""

from __future__ import annotations

import errno
import os
import signal
from collections.abc import Awaitable, Callable

import trio

from daxemu import protocol as p
from daxemu.errors import FsError, InvalidArgument
from daxemu.fs.filesystem import Filesystem
from daxemu.host.observer import Operation
from daxemu.host.proc.processes import process_of
from daxemu.host.unexpected import Nursery
from daxemu.rule import (
    Action,
    ClearAction,
    InjectAction,
    KillAction,
    PowerFailAction,
    RemoveAction,
    StopAction,
)
from daxemu.supervisor.verbs.device_ranges import file_ranges
from daxemu.supervisor.verbs.poison import Poison
from daxemu.units import byte_span, pages_at


class RuleActions:
    """Takes the actions of rules. Belongs to the trio thread.

    The kernel keeps pages locked while some operations wait (``Operation.holds_pages``), and a revoke waits
    for these pages. So for such an operation a failure is begun: the media is poisoned before the operation
    goes on, and the rest happens beside it.
    """

    def __init__(
        self,
        fs: Filesystem,
        poison: Poison,
        remove: Callable[[p.Remove], Awaitable[object]],
        power_fail: Callable[[], Awaitable[object]],
        tasks: Nursery,
    ) -> None:
        """``tasks`` runs what goes on beside an operation."""
        self._fs = fs
        self._poison = poison
        self._remove = remove
        self._power_fail = power_fail
        self._tasks = tasks
        self.ending: trio.Event | None = None
        """Not set while the mount or the device ends after an operation: no later operation may begin."""

    async def take(self, action: Action, operation: Operation, *, after: bool) -> None:
        """Take an action. Raises DaxemuError if the action is not possible."""
        if isinstance(action, InjectAction):
            ranges = await self._ranges(action, operation)
            await self._inject(p.Inject(ranges, kind=action.kind, seed=action.seed), operation)
        elif isinstance(action, ClearAction):
            await self._poison.clear(p.Clear(await self._ranges(action, operation)))
        elif isinstance(action, StopAction):
            os.kill(process_of(operation.tid), signal.SIGSTOP)
        elif after:
            # The answer goes out before the event loop begins this task.
            self.ending = trio.Event()
            self._fs.layouts.break_all()
            self._tasks.start_soon(self._end, action)
        elif isinstance(action, RemoveAction) and operation.holds_pages:
            self._tasks.start_soon(self._end, action)
            while (
                not self._fs.dax.is_leaving
            ):  # from its first step on, a removal holds reads and writes back
                await trio.lowlevel.checkpoint()
        else:
            await self._end(action)

    async def _end(self, action: Action) -> None:
        """Take an action that ends the mount, or the device. Then end ``ending``."""
        try:
            await self._take_last(action)
        finally:
            if self.ending is not None:
                self.ending.set()

    async def _take_last(self, action: Action) -> None:
        if isinstance(action, RemoveAction):
            await self._remove(p.Remove())
        elif isinstance(action, PowerFailAction):
            await self._power_fail()
        elif isinstance(action, KillAction):
            os.kill(os.getpid(), signal.SIGKILL)

    async def _inject(self, request: p.Inject, operation: Operation) -> None:
        if not operation.holds_pages:
            await self._poison.inject(request)
            return
        begun = trio.Event()
        self._tasks.start_soon(self._inject_beside, request, begun)
        await begun.wait()

    async def _inject_beside(self, request: p.Inject, begun: trio.Event) -> None:
        try:
            await self._poison.inject(request, on_poisoned=begun.set)
        finally:
            begun.set()

    async def _ranges(
        self, action: InjectAction | ClearAction, operation: Operation
    ) -> list[tuple[int, int]]:
        """Return the device bytes of an action as pairs [offset, length]. Raises InvalidArgument for a hole.

        A hole whose store is only in the page cache is a hole: a rule waits for no write-back.
        """
        if action.ranges and action.ino is None and not action.of_file:
            return list(action.ranges)
        is_given = bool(action.ranges) and action.ino is not None
        ino = action.ino if is_given and action.ino is not None else self._file_of(operation)
        wanted = list(action.ranges) or [self._pages_of(operation)]
        found = await file_ranges(self._fs, ino, wanted)
        if not found:
            raise InvalidArgument(f"{self._fs.names.path_of(ino)} has no media at this range: it is a hole")
        return [(start, end - start) for start, end in found]

    @staticmethod
    def _pages_of(operation: Operation) -> tuple[int, int]:
        """Return offset and length of the pages of an operation, in bytes."""
        if not operation.length:
            raise InvalidArgument(f"{operation.op} is no operation on bytes: give --offset or --length")
        start, length = byte_span(pages_at(operation.offset, operation.length))
        return start, length

    def _file_of(self, operation: Operation) -> int:
        """Return the file of an operation. Raises FsError ENOENT if there is none yet."""
        if operation.ino is not None:
            return operation.ino
        if operation.parent is None or operation.name is None:
            raise FsError(errno.ENOENT)
        return self._fs.names.lookup(operation.parent, operation.name).ino
