"""Failures outside of the mount: memory of another driver, without struct pages."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

import trio
import trio.testing

from daxemu.events import Event, MemoryFailureHandled, Outcome, PageType, SignalSent
from daxemu.host.mappings import Translations
from daxemu.host.proc.file_pages import FilePage
from daxemu.host.tracer.link import TracerLink
from daxemu.mm.incident import Part
from daxemu.mm.memory_failure import FileId, Incident, MappingRange, MemoryFailures, PfnMapping, Task
from daxemu.mm.pfn_space import PfnAddressSpace
from daxemu.ranges import Range
from daxemu.supervisor.failures import Failures, Signalled
from daxemu.supervisor.signals import Signals
from tests.support.actor import Actor
from tests.support.scene import PAGE, ao, ask, signals_of

BASE = 0x8000000


class Accelerator:
    """Driver whose memory is a file, page for page."""

    def __init__(self, path: Path) -> None:
        found = path.stat()
        self._file = FileId((os.major(found.st_dev), os.minor(found.st_dev)), found.st_ino)

    def failure(self, space: PfnAddressSpace, pfn: int, nr_pages: int) -> None:
        pass

    def pfn_to_pgoff(self, space: PfnAddressSpace, pfn: int, nr_pages: int) -> Sequence[PfnMapping]:
        return [PfnMapping(self._file, pfn - space.pages.start, nr_pages, pfn)]


class NoMount(Translations):
    """Machine without mappings on a mount."""

    survive_shutdown = False

    def collect(self, incidents: Sequence[Incident]) -> list[list[Task]]:
        return [[] for _ in incidents]

    def still_mapped(self, task: Task) -> bool:
        raise AssertionError("nobody consumed anything")

    def revoke(self, incident: Incident) -> None:
        assert not incident.mappings

    def revoke_all(self) -> None:
        raise AssertionError("nothing was removed")

    def file_page(self, ino: int, index: int) -> FilePage:
        raise AssertionError("no file of a mount")


def test_processes_that_map_another_drivers_memory_are_signalled(tmp_path: Path) -> None:
    (tmp_path / "f").write_bytes(bytes(8 * PAGE))
    events: list[Event] = []
    mm = MemoryFailures(events.append)
    space = PfnAddressSpace("accelerator", Range(BASE, BASE + 8), Accelerator(tmp_path / "f"))
    mm.pfn_spaces.register(space)

    async def fail() -> Signalled:
        async with TracerLink.open() as tracer, trio.open_nursery() as nursery:
            mappings = NoMount()
            failures = Failures(mm, mappings, Signals(tracer, mappings.file_page, events.append, nursery))
            return (await failures.handle(mm.memory_failure(BASE + 1, 1, 0)))[1]

    with Actor.spawn("p0", cwd=tmp_path) as mapper, Actor.spawn("p1", cwd=tmp_path) as elsewhere:
        for actor, first in ((mapper, 0), (elsewhere, 2)):
            ask(actor, "open 0 f rw")
            ask(actor, f"mmap 0 0 {first} 2 shared")
        assert trio.run(fail) == Signalled(signals=1, processes=1)
        assert signals_of(mapper) == [ao(1)]
        assert signals_of(elsewhere) == []
    (sent,) = [event for event in events if isinstance(event, SignalSent)]
    assert (sent.comm, sent.pfn, sent.result) == ("p0", BASE + 1, "delivered")
    (handled,) = [event for event in events if isinstance(event, MemoryFailureHandled)]
    assert (handled.page_type, handled.outcome.value, handled.told) == ("non struct page pfn", "Recovered", 1)


class Counting(NoMount):
    """Counts the failures of each look at the machine."""

    def __init__(self) -> None:
        self.looks: list[int] = []

    def collect(self, incidents: Sequence[Incident]) -> list[list[Task]]:
        self.looks.append(len(incidents))
        return super().collect(incidents)

    def revoke(self, incident: Incident) -> None:
        pass


def test_failures_that_wait_for_their_turn_are_seen_to_together_but_removal_alone() -> None:
    mm = MemoryFailures(lambda event: None)
    mappings = Counting()

    def hurt(page: int, *, whole_device: bool = False) -> Incident:
        mappings = [MappingRange(1, page, 1, BASE + page)]
        return Incident(page, BASE + page, 1, 0, mappings, whole_device=whole_device)

    async def storm() -> None:
        async with TracerLink.open() as tracer, trio.open_nursery() as nursery:
            failures = Failures(
                mm, mappings, Signals(tracer, mappings.file_page, lambda event: None, nursery)
            )
            async with trio.open_nursery() as storm:
                await failures.mf_mutex.acquire()
                for incident in (*map(hurt, range(5)), hurt(5, whole_device=True), *map(hurt, range(6, 9))):
                    storm.start_soon(failures.handle, incident)
                    await trio.testing.wait_all_tasks_blocked()
                failures.mf_mutex.release()

    trio.run(storm)
    assert mappings.looks == [5, 1, 3]


class Tasks(trio.abc.Instrument):
    """Counts the started tasks of failures."""

    def __init__(self) -> None:
        self.started = 0

    def task_spawned(self, task: trio.lowlevel.Task) -> None:
        self.started += "Failures" in task.name


def test_many_failures_without_a_victim_cost_no_task_and_one_write_of_the_counters() -> None:
    events: list[Event] = []
    tasks, written = Tasks(), 0

    def write(counters: object) -> None:
        nonlocal written
        written += 1

    mm = MemoryFailures(events.append, on_count=write)
    mappings = NoMount()

    async def storm() -> None:
        async with TracerLink.open() as tracer, trio.open_nursery() as nursery:
            failures = Failures(mm, mappings, Signals(tracer, mappings.file_page, events.append, nursery))
            many = [
                Incident(n, BASE + n, 1, 0, [], parts=(Part(PageType.DAX, BASE + n, 1),)) for n in range(100)
            ]
            trio.lowlevel.add_instrument(tasks)
            handled = await failures.handle_all(many)
            trio.lowlevel.remove_instrument(tasks)
            assert {each.outcome for each in handled} == {Outcome.RECOVERED}

    trio.run(storm)
    assert [event.pfn for event in events if isinstance(event, MemoryFailureHandled)] == list(
        range(BASE, BASE + 100)
    )
    assert (tasks.started, written) == (0, 1)
    assert mm.counters[Outcome.RECOVERED] == 100
