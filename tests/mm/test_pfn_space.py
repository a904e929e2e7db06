"""Memory without struct pages: registration of drivers, and failures as opposed to those of struct pages."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import pytest

from daxemu.errors import Busy, DaxemuError, InvalidArgument, MediaError, NoDevice
from daxemu.events import Event, MemoryFailureHandled, Outcome, OutsideKernelControl
from daxemu.mm.memory_failure import (
    FileId,
    Incident,
    MemoryFailures,
    PfnMapping,
    PresentRun,
    Task,
    Thread,
    collect_procs_pfn,
)
from daxemu.mm.pagemap import DevPagemap
from daxemu.mm.pfn_space import PfnAddressSpace, PfnAddressSpaces
from daxemu.ranges import Range
from daxemu.uapi import PF_EXITING, PF_MCE_EARLY, PF_MCE_PROCESS

FILE = FileId((0, 26), 77)
EARLY, LATE = PF_MCE_PROCESS | PF_MCE_EARLY, PF_MCE_PROCESS


@dataclass
class Driver:
    """A driver of memory mapped to FILE from page 5 on. Records the failed pages."""

    error: DaxemuError | None = None
    failed: list[tuple[int, int]] = field(default_factory=list)

    def failure(self, space: PfnAddressSpace, pfn: int, nr_pages: int) -> None:
        self.failed.append((pfn, nr_pages))
        if self.error is not None:
            raise self.error

    def pfn_to_pgoff(self, space: PfnAddressSpace, pfn: int, nr_pages: int) -> Sequence[PfnMapping]:
        return [PfnMapping(FILE, 5 + pfn - space.pages.start, nr_pages, pfn)]


class Machine:
    def __init__(self) -> None:
        self.events: list[Event] = []
        self.mm = MemoryFailures(self.events.append)

    def space(self, start: int, end: int, error: DaxemuError | None = None) -> Driver:
        driver = Driver(error)
        self.mm.pfn_spaces.register(PfnAddressSpace(f"space{start}", Range(start, end), driver))
        return driver

    def handled(self) -> list[tuple[str, int, int, Outcome]]:
        return [
            (event.page_type, event.pfn, event.nr_pages, event.outcome)
            for event in self.events
            if isinstance(event, MemoryFailureHandled)
        ]

    def outside(self) -> list[tuple[int, int]]:
        return [(e.pfn, e.nr_pages) for e in self.events if isinstance(e, OutsideKernelControl)]


@pytest.fixture
def machine() -> Machine:
    return Machine()


# -- registration


@pytest.mark.parametrize(("start", "end"), [(100, 200), (150, 160), (0, 101), (199, 300), (0, 1000)])
def test_registering_an_overlapping_range_is_ebusy(machine: Machine, start: int, end: int) -> None:
    machine.space(100, 200)
    with pytest.raises(Busy):
        machine.space(start, end)
    machine.space(200, 210)
    machine.space(90, 100)
    assert len(machine.mm.pfn_spaces) == 3


@pytest.mark.parametrize(("start", "end"), [(100, 100), (101, 100), (-1, 5)])
def test_registering_an_empty_range_is_einval(machine: Machine, start: int, end: int) -> None:
    with pytest.raises(InvalidArgument):
        machine.space(start, end)


def test_registering_without_callbacks_is_einval() -> None:
    with pytest.raises(InvalidArgument):
        PfnAddressSpaces().register(PfnAddressSpace("mute", Range(0, 1), None))


def test_memory_of_an_unregistered_space_is_enxio(machine: Machine) -> None:
    space = PfnAddressSpace("gone", Range(100, 200), Driver())
    machine.mm.pfn_spaces.register(space)
    machine.mm.pfn_spaces.unregister(space)
    machine.mm.pfn_spaces.unregister(space)
    with pytest.raises(NoDevice):
        machine.mm.memory_failure(150, 1, 0)
    machine.mm.pfn_spaces.register(space)


def test_unregistering_an_unknown_space_has_no_effect(machine: Machine) -> None:
    machine.space(100, 200)
    machine.mm.pfn_spaces.unregister(PfnAddressSpace("stranger", Range(100, 200), Driver()))
    assert len(machine.mm.pfn_spaces) == 1


# -- failures


@pytest.mark.parametrize("nr_pages", [1, 512, 1 << 30])
def test_one_call_for_a_range_of_any_size(machine: Machine, nr_pages: int) -> None:
    driver = machine.space(1000, 1000 + (1 << 31))
    incident = machine.mm.memory_failure(1010, nr_pages, 0)
    assert driver.failed == [(1010, nr_pages)]
    assert incident.pfn_mappings == [PfnMapping(FILE, 15, nr_pages, 1010)]
    assert incident.mappings == []
    assert machine.mm.action_result(incident, 2) is Outcome.RECOVERED
    (event,) = machine.events
    assert isinstance(event, MemoryFailureHandled)
    assert event.dmesg() == "Memory failure: 0x3f2: recovery action for non struct page pfn: Recovered"
    assert (event.files, event.told) == (1, 2)
    assert sum(machine.mm.counters.values()) == 0, "a pfn without a struct page is on no node"


def test_an_error_of_the_driver_is_failed_and_its_mappings_are_still_recorded(machine: Machine) -> None:
    machine.space(100, 200, MediaError("it burns"))
    incident = machine.mm.memory_failure(100, 1, 0)
    assert incident.pfn_mappings
    assert machine.mm.action_result(incident, 0) is Outcome.FAILED


def test_memory_without_a_driver_is_enxio_logged_and_not_counted(machine: Machine) -> None:
    driver = machine.space(100, 200)
    with pytest.raises(NoDevice, match="memory outside kernel control"):
        machine.mm.memory_failure(200, 3, 0)
    assert machine.outside() == [(200, 3)]
    assert driver.failed == []
    assert sum(machine.mm.counters.values()) == 0


def test_a_range_over_several_drivers_is_split(machine: Machine) -> None:
    machine.mm.memremap_pages(DevPagemap("pmem0", (Range(0, 50),), None))
    machine.mm.memremap_pages(DevPagemap("pmem1", (Range(120, 150),), None))
    low, high = machine.space(60, 130, MediaError("no")), machine.space(140, 200)
    incident = machine.mm.memory_failure(40, 200, 0)
    assert machine.mm.action_result(incident, 0) is Outcome.FAILED
    # A page with a struct page belongs to the pagemap, even if a pfn address space overlaps.
    assert low.failed == [(60, 60)]
    assert high.failed == [(150, 50)]
    assert machine.handled() == [
        ("dax page", 40, 10, Outcome.FAILED),
        ("dax page", 120, 30, Outcome.FAILED),
        ("non struct page pfn", 60, 60, Outcome.FAILED),
        ("non struct page pfn", 150, 50, Outcome.RECOVERED),
    ]
    assert machine.outside() == [(50, 10), (200, 40)]
    assert machine.mm.counters[Outcome.FAILED] == 2
    assert machine.mm.counters[Outcome.RECOVERED] == 0


def test_poisoning_a_poisoned_page_is_handled_again(machine: Machine) -> None:
    driver = machine.space(100, 200)
    for _ in range(2):
        machine.mm.action_result(machine.mm.memory_failure(100, 1, 0), 0)
    assert driver.failed == [(100, 1)] * 2
    assert machine.handled() == [("non struct page pfn", 100, 1, Outcome.RECOVERED)] * 2


# -- victims


@pytest.mark.parametrize(
    ("flags", "position"),
    [
        ([0], 0),
        ([LATE], 0),
        ([LATE, EARLY], 1),
        ([PF_EXITING, LATE], 1),
        ([PF_EXITING], None),
    ],
)
def test_each_process_that_maps_a_failed_page_is_a_victim(flags: list[int], position: int | None) -> None:
    threads = tuple(Thread(10 + index, each) for index, each in enumerate(flags))
    run = PresentRun(FILE.ino, 17, 2, 0x7000_2000, 12)
    failed = PfnMapping(FILE, 15, 4, 1010)
    to_kill = collect_procs_pfn(failed, [Task(10, "p0", threads, (run,))], early_kill=False)
    if position is None:
        assert to_kill == []
    else:
        (victim,) = to_kill
        assert (victim.tid, victim.address, victim.shift, victim.pfn) == (
            10 + position,
            0x7000_2000,
            12,
            1012,
        )


def test_an_incident_without_parts_has_no_error() -> None:
    assert Incident(1, 0, 1, 0).error is None
