"""Core with a repair strategy, as in a machine, without a mount."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from daxemu.events import RepairFinished
from daxemu.pmem.inject import corrupt, failed_pages, inject
from daxemu.supervisor.repairs import Repairs
from daxemu.supervisor.strategy_host import StrategyHost
from daxemu.uapi import Ino
from tests.support.core import Core, core_at


class Repairing:
    """``host`` has the strategy of ``core``, ``repairs`` asks it; a remount brings all back."""

    def __init__(self, core: Core, strategy: str) -> None:
        self.core = core
        self.strategy = strategy
        self.attach(after_crash=False)

    def choose(self, strategy: str) -> None:
        """Change the strategy."""
        self.strategy = strategy
        for _ in self.host.choose(strategy):
            pass

    def attach(self, *, after_crash: bool) -> None:
        """Choose the strategy, as a mount does."""
        core = self.core
        self.host = StrategyHost(core.fs, core.device.root / "repair", core.events.append)
        self.repairs = Repairs(core.pmem, core.fs, self.host, core.events.append)
        for _ in self.host.choose(self.strategy, after_crash=after_crash):
            pass

    def remount(self, *, crash: bool = False) -> None:
        """Unmount or, with ``crash``, die; and mount again."""
        if crash:
            self.core.fs.watch(None)  # the strategy gets no further calls, as in a dead process
        else:
            self.host.close()
        self.core.close(save=not crash)
        self.core.open()
        self.attach(after_crash=self.core.fs.had_crashed)

    def fail(self, offset: int, length: int) -> RepairFinished | None:
        """Fail device bytes; return the strategy's verdict, None if no file owned the bytes."""
        seen = len(self.core.events)
        bad = inject(self.core.pmem, offset, length)
        incident = self.core.mm.memory_failure(*failed_pages(self.core.pmem, bad), 0)
        repaired = self.repairs.failed(incident, ())
        self.core.mm.action_result(incident, 0, errors=repaired.errors)
        found = [event for event in self.core.events[seen:] if isinstance(event, RepairFinished)]
        return found[0] if found else None

    def corrupt(self, offset: int, length: int, seed: int = 0) -> None:
        """Change bytes of the device silently."""
        corrupt(self.core.pmem, offset, length, seed)

    def at(self, ino: Ino, offset: int) -> int:
        """Return the device offset of a byte of a file."""
        return self.core.fs.device_ranges(ino, offset, 1)[0].start


@contextmanager
def repairing(strategy: str, size: int = 8 << 20) -> Iterator[Repairing]:
    """A fresh core with a strategy."""
    with core_at(size=size) as core:
        made = Repairing(core, strategy)
        try:
            yield made
        finally:
            made.host.close()
