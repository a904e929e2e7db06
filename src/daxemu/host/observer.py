"""Observation of operations: what programs request of the filesystem, before and after it is served.

Without an observer nothing is wrapped, so observation costs nothing until it begins. Observers are the rules
of a mount (supervisor/rules.py) and its traces.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple, Protocol

from daxemu.rule import Op
from daxemu.text import name_text
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

    def paths(self, path_of: Callable[[Ino], str]) -> list[str]:
        """Return the paths of the operation: two for a rename, the old one first."""
        names = [] if self.old is None else [self.old]
        if self.parent is not None and self.name is not None:
            names.append((self.parent, self.name))
        if not names:
            return ["" if self.ino is None else path_of(self.ino)]
        return [f"{path_of(directory).removesuffix('/')}/{name_text(name)}" for directory, name in names]

    @property
    def holds_pages(self) -> bool:
        """True if the kernel keeps pages of the file locked until the answer: no revoke may be waited for."""
        return self.op in (Op.READ, Op.WRITE, Op.WRITE_BACK, Op.LOAD, Op.STORE)


class Observer(Protocol):
    """Receiver of operations. Belongs to the trio thread."""

    def wants(self, ino: Ino) -> bool:
        """Return whether each page fault of a file must be an operation, which makes mappings slower."""

    async def before(self, operation: Operation) -> None:
        """Take note of an operation that is not served yet. The thread waits."""

    async def after(self, operation: Operation, seconds: float, error: int) -> None:
        """Take note of an operation that was served in ``seconds``, with errno ``error`` (0: success). The
        thread waits; its answer is sent next.
        """
