"""Events of repair strategies."""

from __future__ import annotations

from daxemu.events.base import Event
from daxemu.fields import FileOffset, Ino, Length, Pages, Pfn, Seconds


class RepairFinished(Event):
    """Verdict of a repair strategy on a failure. ``verdict``: recovered, lost, cannot, or failed (the
    strategy raised an error). ``lost``: (inode, offset, length) of bytes that stay damaged. ``seconds``:
    duration.
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
    """A newly chosen repair strategy copies or sums up the existing data. One event a second, and one at the
    end.
    """

    strategy: str
    done_bytes: Length
    total_bytes: Length

    def summary(self) -> str:
        return f"repair by {self.strategy} begins: {self.done_bytes} of {self.total_bytes} bytes"


class RepairStrategyFailed(Event):
    """A repair strategy raised an exception, hung, or gave an invalid answer. The strategy is not called
    again.
    """

    strategy: str
    reason: str

    def summary(self) -> str:
        return f"the repair strategy {self.strategy} failed: {self.reason}"
