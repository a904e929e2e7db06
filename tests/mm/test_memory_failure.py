"""memory_failure(): one call to the driver for a range, the kernel's choice of threads, the outcome."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import partial

import pytest

from daxemu.errors import Busy, CorruptMetadata, DaxemuError, NoDevice, Unsupported
from daxemu.events import Event, MemoryFailureHandled, Outcome, OutsideKernelControl, no_log
from daxemu.mm.memory_failure import (
    Incident,
    MappingRange,
    MemoryFailures,
    PresentRun,
    Task,
    Thread,
    ToKill,
    collect_procs,
    find_early_kill_thread,
    task_early_kill,
)
from daxemu.mm.pagemap import DevPagemap
from daxemu.ranges import Range
from daxemu.uapi import (
    MF_ACTION_REQUIRED,
    MF_MEM_PRE_REMOVE,
    PF_EXITING,
    PF_KTHREAD,
    PF_MCE_EARLY,
    PF_MCE_PROCESS,
    U64_MAX,
)

NONE, LATE, EARLY = 0, PF_MCE_PROCESS, PF_MCE_PROCESS | PF_MCE_EARLY
STRAY = PF_MCE_EARLY  # PF_MCE_EARLY has no effect without PF_MCE_PROCESS


# -- victims


@pytest.mark.parametrize(
    ("flags", "by_policy", "by_sysctl"),
    [
        ([NONE], None, 0),
        ([LATE], None, None),
        ([EARLY], 0, 0),
        ([STRAY], None, 0),
        ([NONE, EARLY], 1, 0),
        ([LATE, EARLY], 1, 1),
        ([LATE, NONE], None, 1),
        ([LATE, LATE, NONE, EARLY], 3, 2),
        ([EARLY, EARLY], 0, 0),
        ([NONE, NONE, EARLY], 2, 0),
        ([LATE, LATE], None, None),
        ([], None, None),
        ([EARLY | PF_EXITING, NONE], None, 1),
        ([EARLY | PF_KTHREAD], None, None),
    ],
)
def test_find_early_kill_thread(flags: list[int], by_policy: int | None, by_sysctl: int | None) -> None:
    """find_early_kill_thread(): the sysctl decides for threads without a policy, and for no other thread."""
    threads = [Thread(100 + i, flag) for i, flag in enumerate(flags)]
    for early_kill, wanted in ((False, by_policy), (True, by_sysctl)):
        found = find_early_kill_thread(threads, early_kill)
        assert (found.tid if found else None) == (None if wanted is None else 100 + wanted)


def a_task(pid: int, *flags: int, runs: tuple[PresentRun, ...] | None = None) -> Task:
    run = PresentRun(7, 3, 1, 0x7F0000003000, 12)
    threads = tuple(Thread(pid + i, flag) for i, flag in enumerate(flags))
    return Task(pid, f"p{pid}", threads, (run,) if runs is None else runs)


def an_incident(flags: int = 0) -> Incident:
    return Incident(1, 500, 4, flags, [MappingRange(7, 3, 4, 500)])


def test_the_consumer_is_a_victim_whatever_its_policy() -> None:
    task = a_task(10, NONE, LATE)
    found = task_early_kill(task, early_kill=False, force_tid=11)
    assert found is not None
    assert found.tid == 11
    assert task_early_kill(task, early_kill=False, force_tid=99) is None
    assert task_early_kill(task, early_kill=True, force_tid=99) == task.threads[0]


def test_the_policy_chooses_the_thread_of_each_process() -> None:
    tasks = [a_task(10, NONE), a_task(20, LATE, EARLY), a_task(30, LATE)]
    assert [(k.task.pid, k.tid) for k in collect_procs(an_incident(), tasks, early_kill=False)] == [(20, 21)]
    victims = collect_procs(an_incident(), tasks, early_kill=True)
    assert [(k.task.pid, k.tid) for k in victims] == [(10, 10), (20, 21)]


def test_a_process_without_a_present_page_is_no_victim() -> None:
    assert collect_procs(an_incident(), [a_task(10, EARLY, runs=())], early_kill=True) == []
    removal = an_incident(MF_MEM_PRE_REMOVE)
    assert collect_procs(removal, [a_task(10, EARLY, runs=())], early_kill=True) == []


def test_a_signal_has_the_victims_address_the_shift_and_the_pfn() -> None:
    runs = (PresentRun(7, 5, 2, 0x1000, 12), PresentRun(7, 3, 1, 0x200000, 21))
    task = a_task(10, EARLY, runs=runs)
    assert collect_procs(an_incident(), [task], early_kill=False) == [
        ToKill(task, 10, 0x200000, 21, 500),
        ToKill(task, 10, 0x1000, 12, 502, merges=True),
    ]


def test_each_file_sharing_the_page_has_the_pfn() -> None:
    incident = Incident(1, 500, 1, 0, [MappingRange(7, 3, 1, 500), MappingRange(8, 90, 1, 500)])
    task = a_task(10, EARLY, runs=(PresentRun(8, 90, 1, 0x9000, 12),))
    (victim,) = collect_procs(incident, [task], early_kill=False)
    assert (victim.address, victim.pfn) == (0x9000, 500)


def test_removal_signals_each_process_once_through_the_leader_whatever_its_policy() -> None:
    runs = (PresentRun(7, 5, 2, 0x1000, 12), PresentRun(8, 0, 9, 0x8000, 12))
    tasks = [a_task(10, LATE, EARLY, runs=runs), a_task(20, NONE)]
    victims = collect_procs(an_incident(MF_MEM_PRE_REMOVE), tasks, early_kill=False)
    assert [(k.tid, k.address) for k in victims] == [(10, 0x1000), (20, 0x7F0000003000)]


@pytest.mark.parametrize("flags", [0, MF_MEM_PRE_REMOVE])
def test_a_process_without_threads_is_no_victim(flags: int) -> None:
    """A process that exits between collect and the choice of a thread has no threads left."""
    assert collect_procs(an_incident(flags), [a_task(10)], early_kill=True) == []


# -- the failure


@dataclass
class Owner:
    """The ops of a dev_pagemap: record each call, then raise an error or name a file range."""

    mm: MemoryFailures
    error: Exception | None = None
    calls: list[tuple[int, int, int]] = field(default_factory=list)

    def memory_failure(self, pgmap: DevPagemap, pfn: int, nr_pages: int, flags: int) -> None:
        self.calls.append((pfn, nr_pages, flags))
        if self.error is not None:
            raise self.error
        self.mm.mf_dax_kill_procs(7, 0, nr_pages, pfn, flags)


@dataclass
class Machine:
    mm: MemoryFailures
    events: list[Event]

    def pagemap(self, start: int, end: int, error: Exception | None = None, altmap: int = 0) -> Owner:
        owner = Owner(self.mm, error)
        self.mm.memremap_pages(DevPagemap(f"pmem{start}", (Range(start, end),), owner, altmap))
        return owner

    def fail(self, pfn: int, nr_pages: int, signals: int = 0) -> Outcome:
        return self.mm.action_result(self.mm.memory_failure(pfn, nr_pages, 0), signals)


@pytest.fixture
def machine() -> Machine:
    events: list[Event] = []
    return Machine(MemoryFailures(events.append), events)


@pytest.mark.parametrize("nr_pages", [1, 512, 1_610_612_736])
def test_one_call_for_a_range_of_any_size(machine: Machine, nr_pages: int) -> None:
    owner = machine.pagemap(1000, 1000 + (1 << 31))
    incident = machine.mm.memory_failure(1000, nr_pages, MF_ACTION_REQUIRED)
    assert owner.calls == [(1000, nr_pages, MF_ACTION_REQUIRED)]
    assert incident.mappings == [MappingRange(7, 0, nr_pages, 1000)]


def test_each_driver_is_called_for_its_part_of_the_range(machine: Machine) -> None:
    one, two = machine.pagemap(100, 200), machine.pagemap(300, 400, altmap=10)
    machine.mm.memory_failure(150, 1000, 0)
    assert one.calls == [(150, 50, 0)]
    assert two.calls == [(310, 90, 0)]


def test_outcome_is_failed_for_the_altmap_and_recovered_for_data(machine: Machine) -> None:
    owner = machine.pagemap(300, 400, altmap=10)
    incident = machine.mm.memory_failure(305, 10, 0)
    assert owner.calls == [(310, 5, 0)]
    assert machine.mm.action_result(incident, 0) is Outcome.FAILED
    assert [
        (e.pfn, e.nr_pages, e.outcome) for e in machine.events if isinstance(e, MemoryFailureHandled)
    ] == [(305, 5, Outcome.FAILED), (310, 5, Outcome.RECOVERED)]


def test_dev_pagemap_failure_is_one_call_for_each_range(machine: Machine) -> None:
    owner = Owner(machine.mm)
    pgmap = DevPagemap("pmem0", (Range(100, 1 << 31), Range(1 << 32, 1 << 33)), owner, altmap_pages=10)
    machine.mm.memremap_pages(pgmap)
    incident = machine.mm.dev_pagemap_failure(pgmap, MF_MEM_PRE_REMOVE)
    assert owner.calls == [
        (110, (1 << 31) - 110, MF_MEM_PRE_REMOVE),
        (1 << 32, 1 << 32, MF_MEM_PRE_REMOVE),
    ]
    assert incident.pre_remove
    assert machine.mm.action_result(incident, 0) is Outcome.RECOVERED


def test_a_failure_reaches_each_range_of_a_pagemap(machine: Machine) -> None:
    owner = Owner(machine.mm)
    machine.mm.memremap_pages(DevPagemap("pmem0", (Range(100, 200), Range(300, 400)), owner))
    machine.mm.action_result(machine.mm.memory_failure(150, 200, 0), 0)
    assert owner.calls == [(150, 50, 0), (300, 50, 0)]
    assert [e.pfn for e in machine.events if isinstance(e, OutsideKernelControl)] == [200]


def test_poisoning_a_poisoned_page_is_handled_again(machine: Machine) -> None:
    """memory_failure_dev_pagemap() does not test PG_hwpoison."""
    owner = machine.pagemap(100, 200)
    assert [machine.fail(150, 1), machine.fail(150, 1)] == [Outcome.RECOVERED] * 2
    assert len(owner.calls) == 2
    assert machine.mm.counters[Outcome.RECOVERED] == 2


def test_on_count_is_called_after_each_change() -> None:
    seen: list[int] = []
    mm = MemoryFailures(no_log, on_count=lambda counters: seen.append(counters[Outcome.RECOVERED]))
    machine = Machine(mm, [])
    machine.pagemap(100, 200)
    machine.fail(100, 1)
    machine.fail(101, 1)
    assert seen == [1, 2]


@pytest.mark.parametrize(("pfn", "nr_pages"), [(99, 1), (200, 10), (0, 100), (150, 0), (150, -1)])
def test_memory_without_a_driver_is_enxio(machine: Machine, pfn: int, nr_pages: int) -> None:
    machine.pagemap(100, 200)
    with pytest.raises(NoDevice):
        machine.mm.memory_failure(pfn, nr_pages, 0)
    assert sum(machine.mm.counters.values()) == 0


def test_unsupported_falls_back_on_a_handler_that_finds_no_mapping(machine: Machine) -> None:
    """A holder without notify_failure (scenario `s0-metadata` on ext4-dax) is -EBUSY for an unmapped page."""
    machine.pagemap(100, 200, Unsupported("nobody holds it"))
    incident = machine.mm.memory_failure(150, 1, 0)
    assert isinstance(incident.error, Busy)
    assert "nobody holds it" in str(incident.error)
    assert machine.mm.action_result(incident, 0) is Outcome.FAILED


def test_a_pagemap_without_ops_is_failed(machine: Machine) -> None:
    machine.mm.memremap_pages(DevPagemap("pmem0", (Range(100, 200),), None))
    assert machine.fail(150, 1) is Outcome.FAILED


def test_an_error_of_the_driver_is_failed_and_is_in_the_event(machine: Machine) -> None:
    machine.pagemap(100, 200, CorruptMetadata("the records are damaged"))
    assert machine.fail(150, 1) is Outcome.FAILED
    (event,) = machine.events
    assert isinstance(event, MemoryFailureHandled)
    assert event.error == "the records are damaged"


def test_one_failed_part_fails_the_incident_and_the_other_drivers_are_still_called(machine: Machine) -> None:
    machine.pagemap(100, 200, CorruptMetadata("no"))
    other = machine.pagemap(200, 300)
    assert machine.fail(100, 200) is Outcome.FAILED
    assert other.calls == [(200, 100, 0)]


def test_an_unexpected_exception_of_a_driver_propagates(machine: Machine) -> None:
    machine.pagemap(100, 200, ZeroDivisionError())
    with pytest.raises(ZeroDivisionError):
        machine.mm.memory_failure(150, 1, 0)


def test_outcomes_are_counted_and_logged(machine: Machine) -> None:
    machine.pagemap(100, 200)
    machine.pagemap(200, 300, CorruptMetadata("no"))
    assert [machine.fail(100, 2, signals=3), machine.fail(110, 1), machine.fail(250, 1)] == [
        Outcome.RECOVERED,
        Outcome.RECOVERED,
        Outcome.FAILED,
    ]
    assert machine.mm.counters == {
        Outcome.IGNORED: 0,
        Outcome.FAILED: 1,
        Outcome.DELAYED: 0,
        Outcome.RECOVERED: 2,
    }
    assert machine.events[0] == MemoryFailureHandled(
        pfn=100, nr_pages=2, page_type="dax page", outcome=Outcome.RECOVERED, told=3, signals=3, files=1
    )


def test_the_same_range_can_fail_again_before_the_first_outcome(machine: Machine) -> None:
    machine.pagemap(100, 200)
    first = machine.mm.memory_failure(100, 1, 0)
    second = machine.mm.memory_failure(100, 1, 0)
    assert first.serial < second.serial
    assert first.mappings == second.mappings
    assert [machine.mm.action_result(each, 0) for each in (second, first)] == [Outcome.RECOVERED] * 2


# -- mf_dax_kill_procs()


def test_mf_dax_kill_procs_outside_a_failure_is_refused(machine: Machine) -> None:
    with pytest.raises(RuntimeError):
        machine.mm.mf_dax_kill_procs(7, 0, 1, 100, 0)


def test_nested_failures_record_into_their_own_incidents(machine: Machine) -> None:
    outer, inner = machine.mm.draft(100, 1, MF_MEM_PRE_REMOVE), machine.mm.draft(200, 1, MF_MEM_PRE_REMOVE)
    with machine.mm.during(outer):
        with machine.mm.during(inner):
            machine.mm.mf_dax_kill_procs(8, 0, 1, 200, 0)
        machine.mm.mf_dax_kill_procs(7, 0, 1, 100, 0)
    assert [m.mapping for m in outer.mappings] == [7]
    assert [m.mapping for m in inner.mappings] == [8]
    with pytest.raises(RuntimeError):
        machine.mm.mf_dax_kill_procs(7, 0, 1, 100, 0)


def test_a_count_of_u64_max_is_the_whole_device_not_a_range(machine: Machine) -> None:
    notify = partial(machine.mm.mf_dax_kill_procs, 0, 0, U64_MAX, 100, MF_MEM_PRE_REMOVE)
    incident = machine.mm.removal(100, 50, notify)
    assert incident.whole_device
    assert incident.pre_remove
    assert incident.mappings == []


# -- pagemaps


@pytest.mark.parametrize(("start", "end"), [(100, 200), (150, 160), (0, 101), (199, 300)])
def test_overlapping_pagemaps_are_refused(machine: Machine, start: int, end: int) -> None:
    owner = machine.pagemap(100, 200)
    with pytest.raises(Busy):
        machine.pagemap(start, end)
    machine.pagemap(200, 210)
    assert machine.fail(199, 1) is Outcome.RECOVERED
    assert len(owner.calls) == 1


def test_memory_of_an_unregistered_pagemap_is_refused(machine: Machine) -> None:
    pgmap = DevPagemap("pmem0", (Range(100, 200),), None)
    machine.mm.memremap_pages(pgmap)
    machine.mm.memunmap_pages(pgmap)
    with pytest.raises(DaxemuError):
        machine.mm.memory_failure(100, 1, 0)
    machine.mm.memremap_pages(pgmap)
