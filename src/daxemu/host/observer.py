"""Observation of operations: what programs request of the filesystem, before and after it is served.

Without an observer nothing is wrapped, so observation costs nothing until it begins. Observers are the rules
of a mount (supervisor/rules.py) and its traces.
"""

from __future__ import annotations

from typing import NamedTuple, Protocol

from daxemu.rule import Op
from daxemu.uapi import Ino


class Operation(NamedTuple):
    """Operation of a thread. ``ino``: the file; of an operation on a name that may not exist, None.
    ``parent`` and ``name``: the name that the operation is about, or None. ``old``: directory and name that a
    rename takes away. ``offset`` and ``length``: bytes
    of the file; 0 if the operation has no range. ``also``: other operations that this one does, too. ``tid``:
    0 if unknown.
    """

    op: Op
    tid: int
    ino: Ino | None = None
    parent: Ino | None = None
    name: bytes | None = None
    old: tuple[Ino, bytes] | None = None
    offset: int = 0
    length: int = 0
    also: frozenset[Op] = frozenset()

    @property
    def holds_pages(self) -> bool:
        """True if the kernel keeps pages of the file locked until the answer: no revoke may be waited for."""
        return self.op in (Op.READ, Op.WRITE, Op.WRITE_BACK, Op.LOAD, Op.STORE)


class Observer(Protocol):
    """Receiver of operations. Belongs to the trio thread."""

    async def before(self, operation: Operation) -> None:
        """Take note of an operation that is not served yet. The thread waits."""

    async def after(self, operation: Operation, seconds: float, error: int) -> None:
        """Take note of an operation that was served in ``seconds``, with errno ``error`` (0: success). The
        thread waits; its answer is sent next.
        """
