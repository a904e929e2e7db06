"""Events of repair strategies."""

from __future__ import annotations

from daxemu.events.base import Event
from daxemu.fields import FileOffset, Ino, Length, Pages, Pfn, Seconds


class RepairFinished(Event):
    """What a repair strategy made of a failure. ``verdict``: recovered, lost, cannot, or failed (the strategy
    itself). ``lost``: (inode, offset, length) of bytes that cannot be had any more. ``seconds`` it took.
    """

    strategy: str
    pfn: Pfn
    nr_pages: Pages
    verdict: str
    transparent: bool
    seconds: Seconds
    lost: list[tuple[Ino, FileOffset, Length]]
    reason: str | None = None

    def summary(self) -> str:
        why = f" ({self.reason})" if self.reason else ""
        return f"repair by {self.strategy}: pfn {self.pfn:#x}+{self.nr_pages}: {self.verdict}{why}"


class RepairProgress(Event):
    """A repair strategy that was chosen copies, or adds up, what there is. Once a second, and at the end."""

    strategy: str
    done_bytes: Length
    total_bytes: Length

    def summary(self) -> str:
        return f"repair by {self.strategy} begins: {self.done_bytes} of {self.total_bytes} bytes"


class RepairStrategyFailed(Event):
    """A repair strategy raised, hung or made no sense; it is asked nothing more."""

    strategy: str
    reason: str

    def summary(self) -> str:
        return f"the repair strategy {self.strategy} failed: {self.reason}"
