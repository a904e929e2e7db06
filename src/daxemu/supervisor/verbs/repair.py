"""The verb ``repair``, and repairs of bad blocks outside of a failure."""

from __future__ import annotations

import trio

from daxemu import protocol as p
from daxemu.events import Emit, SettingChanged
from daxemu.fs.filesystem import Filesystem
from daxemu.pmem.pmem import Pmem
from daxemu.ranges import Range
from daxemu.repair.strategy import Verdict
from daxemu.supervisor import incidents
from daxemu.supervisor.consumption import Consumption
from daxemu.supervisor.failures import Failures
from daxemu.supervisor.repairs import Repairs
from daxemu.supervisor.strategy_host import StrategyHost
from daxemu.supervisor.verbs.device_ranges import BATCH, check_present
from daxemu.units import blocks_of, bytes_of_sectors, pages_at


class Repairing:
    """Chooses a repair strategy, and asks the strategy about bad blocks. Belongs to the trio thread."""

    def __init__(
        self,
        pmem: Pmem,
        fs: Filesystem,
        failures: Failures,
        consumption: Consumption,
        repairs: Repairs,
        strategy_host: StrategyHost,
        emit: Emit,
    ) -> None:
        self._pmem = pmem
        self._fs = fs
        self._failures = failures
        self._consumption = consumption
        self._repairs = repairs
        self._strategy_host = strategy_host
        self._emit = emit

    async def repair(self, request: p.Repair) -> p.Repaired:
        """Choose the strategy of the request, if given, and ask the strategy about every bad block.

        Raises NoDevice, and the errors of StrategyHost.choose().
        """
        check_present(self._pmem)
        if request.strategy is not None:
            await self.choose(request.strategy)
            self._emit(SettingChanged(name="repair", value=request.strategy))
        total, reason = p.Repaired(self._strategy_host.text, 0, 0, 0, None), None
        for part in self._pmem.badblocks.in_pieces(BATCH):
            for sectors in part:
                verdict = await self.repair_now(bytes_of_sectors(sectors))
                if verdict is not None:
                    total.recovered += verdict.recovered.total
                    total.lost += verdict.lost.total
                    reason = verdict.reason or reason
            await trio.lowlevel.checkpoint()
        for lost in self._fs.damaged_in_pieces():
            total.left += sum(pages_at(part.offset, part.length).length for part in lost)
            await trio.lowlevel.checkpoint()
        total.reason = reason
        return total

    async def choose(self, strategy: str) -> None:
        """Change to another strategy. Raises the errors of StrategyHost.choose()."""
        await trio.to_thread.run_sync(self._strategy_host.check, strategy)
        await self._strategy_host.attach(strategy)
        self._consumption.forget(Range(0, self._pmem.dax.size))

    async def repair_now(self, poisoned: Range) -> Verdict | None:
        """Ask the strategy about the device bytes ``poisoned``, which are bad blocks.

        Return None if there is no strategy, or if the strategy failed.
        """
        if not self._repairs.is_active:
            return None
        mapped = incidents.of_device_range(self._pmem, self._fs, poisoned)
        return self._repairs.repair_now(blocks_of(poisoned), mapped, await self._failures.holders(mapped))
