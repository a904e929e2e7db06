"""The comparison accepts no wrong outcome: each of these outcomes is wrong, although some are the
kernel's.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from tests.conformance.compare import UNEXPLAINED, judge
from tests.conformance.recording import Outcome, Scenario, Step, scenarios
from tests.conformance.rules import CACHE, HARDWARE
from tests.conformance.world import World

LINE = "MCE: Killing p0 due to hardware memory corruption fault at VA"


def world_before(scenario: Scenario, index: int) -> World:
    """Return the world after all steps before ``index`` ended as in the kernel."""
    world = World()
    for step in scenario.steps[:index]:
        world.after(step, step.expected or Outcome({"ret": 0, "ok": "?"}), None)
    return world


def find(name: str, do: str) -> tuple[int, Step, World]:
    scenario = scenarios()[name]
    index = next(i for i, s in enumerate(scenario.steps) if s.do == do and s.expected is not None)
    return index, scenario.steps[index], world_before(scenario, index)


def ar(**other: Any) -> dict[str, Any]:
    signal = {"who": "p0", "thread": 0, "sig": "SIGBUS", "code": "BUS_MCEERR_AR", "addr": "m0+0x1000"}
    return {**signal, "lsb": 12, "how": "during access", **other}


FAULT = {"faulted": True}


def test_consumed_poison_is_hardware_poison() -> None:
    found = judge(*find_with("a0-late", "tr 0 1", Outcome(FAULT, (ar(),), (), (LINE,))))
    assert found is not None
    assert found.reasons == (HARDWARE,)


@pytest.mark.parametrize(
    "ours",
    [
        Outcome({"ok": "B", "faults": 0}),  # as the kernel: but the media is bad
        Outcome(FAULT, (ar(lsb=21),), (), (LINE,)),
        Outcome(FAULT, (ar(addr="m0+0x1004"),), (), (LINE,)),
        Outcome(FAULT, (ar(thread=1),), (), (LINE,)),
        Outcome(FAULT, (ar(code="BUS_ADRERR"),), (), (LINE,)),
        Outcome(FAULT, (ar(), ar()), (), (LINE,)),
        Outcome(FAULT, (ar(),), (), ()),
        Outcome("died", (), ({"who": "p0", "signal": "SIGBUS"},), (LINE,)),
    ],
)
def test_anything_else_on_poison_is_unexplained(ours: Outcome) -> None:
    found = judge(*find_with("a0-late", "tr 0 1", ours))
    assert found is not None
    assert found.reasons == (UNEXPLAINED,)


@pytest.mark.parametrize(
    ("count", "pages", "right"), [(4096, "A", True), (8192, "AB", False), (4096, "B", False)]
)
def test_good_bytes_before_poison_are_the_right_ones(count: int, pages: str, right: bool) -> None:
    ours = Outcome({"ret": count, "errno": "0", "pages": pages})
    found = judge(*find_with("p1-nobody-maps", "pread 0 0 32768", ours))
    assert found is not None
    assert found.reasons == ((HARDWARE, CACHE) if right else (UNEXPLAINED,))


def test_a_step_on_good_pages_has_no_excuse() -> None:
    found = judge(*find_with("a0-late", "tr 0 2", Outcome({"ok": "D", "faults": 1})))
    assert found is not None
    assert found.reasons == (UNEXPLAINED,)


def test_a_signal_to_a_stranger_is_unexplained() -> None:
    index, step, world = find("b0-two-procs-late", "poison page 1 of f (corrupt-pfn)")
    assert step.expected is not None
    ao = ar(code="BUS_MCEERR_AO", how="async")
    told = Outcome(step.expected.res, (ao,), (), step.expected.dmesg, step.expected.counters)
    found = judge(index, step, told, world)
    assert found is not None
    assert found.reasons == (UNEXPLAINED,)


def test_fault_around_makes_neighbours_present() -> None:
    """Process p2 touched page 5 while page 3 was cached."""
    index, step, world = find("m2-mce-ar-early", "machine check ar on that page (QEMU monitor)")
    assert step.expected is not None
    line = "Memory failure: PFN: Sending SIGBUS to {} due to hardware memory corruption"

    def told(who: str) -> Outcome:
        signal = ar(who=who, code="BUS_MCEERR_AO", addr="m0+0x3000", how="async")
        assert step.expected is not None
        signals, lines = (*step.expected.signals, signal), (*step.expected.dmesg, line.format(who))
        return replace(step.expected, signals=signals, dmesg=lines)

    found = judge(index, step, told("p2"), world)
    assert found is not None
    assert found.reasons == (CACHE,)
    index, step, world = find("m2-mce-ar-early", "machine check ar on that page (QEMU monitor)")
    found = judge(index, step, told("p4"), world)
    assert found is not None
    assert found.reasons == (UNEXPLAINED,)


def find_with(name: str, do: str, ours: Outcome) -> tuple[int, Step, Outcome, World]:
    index, step, world = find(name, do)
    return index, step, ours, world


def test_the_world_keeps_an_unlinked_file_that_is_mapped() -> None:
    world = World()
    for who, do in (
        ("-", "mkfile f pages 2 first A"),
        ("p0", "open 0 f rw"),
        ("p0", "mmap 0 0 0 2 shared"),
        ("p0", "tr 0 1"),
        ("p0", "unlink f"),
        ("-", "mkfile g pages 2 first K"),
    ):
        world.after(Step(who, do), Outcome({"ret": 0, "ok": "?"}), None)
    poison = Step("inj", "poison page 1 of f (corrupt-pfn)")
    (block,) = world.failing(poison)
    assert list(world.mapped_at(block)) == [("p0", 0, 1)]
    assert world.letter_at(("p0", 0, 1)) == "B"
    world.after(poison, Outcome({"ret": 0}), None)
    assert world.bad(world.block_at(("p0", 0, 1)))


def test_a_direct_mount_has_no_difference_of_the_page_cache() -> None:
    """The outcomes of a page cache are unexplained: good bytes before poison, and a neighbour present."""
    index, step, world = find("p1-nobody-maps", "pread 0 0 32768")
    world.direct = True
    found = judge(index, step, Outcome({"ret": 4096, "errno": "0", "pages": "A"}), world)
    assert found is not None
    assert found.reasons == (UNEXPLAINED,)
    index, step, world = find("p1-nobody-maps", "pread 0 0 32768")
    world.direct = True
    found = judge(index, step, Outcome({"ret": -1, "errno": "EIO", "pages": ""}), world)
    assert found is not None
    assert found.reasons == (HARDWARE,)


def test_a_direct_mount_explains_page_faults_only_after_poison() -> None:
    index, step, world = find("a1-early-sysctl", "tr 0 2")
    world.direct = True
    assert step.expected is not None
    ours = Outcome({"ok": "C", "faults": 0 if step.expected.res["faults"] else 1})
    found = judge(index, step, ours, world)
    assert found is not None
    assert found.reasons == (UNEXPLAINED,)
