"""Events of rules."""

from __future__ import annotations

from daxemu.events.base import Event
from daxemu.fields import FileOffset, Ino, Length, Pid, Tid


class RuleFired(Event):
    """An operation fired rule ``rule``. ``number``: number of the match, from 1. ``offset`` and ``length``:
    bytes of the operation, 0 if it has no range. ``ino``: null for a name that
    may not exist. ``then``: the actions. The events of the actions follow.
    """

    rule: str
    number: int
    op: str
    ino: Ino | None
    path: str
    pid: Pid
    tid: Tid
    comm: str
    offset: FileOffset
    length: Length
    then: list[str]

    def summary(self) -> str:
        where = f" {self.offset:#x}+{self.length:#x}" if self.length else ""
        return (
            f"rule {self.rule}: {self.op} of {self.path}{where} by {self.comm}:{self.pid}, "
            f"match {self.number}: {', '.join(self.then)}"
        )


class RuleFailed(Event):
    """An action of rule ``rule`` was not possible, for ``reason``."""

    rule: str
    action: str
    reason: str

    def summary(self) -> str:
        return f"rule {self.rule}: {self.action} was not possible: {self.reason}"
