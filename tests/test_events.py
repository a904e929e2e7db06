"""Events: each survives a round trip through JSON, and has the kernel's message, to the letter."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import get_args

import msgspec
import pytest
from tools.event_types import module

import daxemu.events
from daxemu.events import (
    EVENT_TYPES,
    CorruptionFound,
    DaxActiveAtRemove,
    DeviceRemoved,
    DeviceTightened,
    DirectMappingRefused,
    Event,
    EventsRepeated,
    FaultRepeated,
    FileDamaged,
    FilesystemShutdown,
    LoopStalled,
    MadviseInjected,
    MemoryFailureHandled,
    MetadataRewritten,
    MetadataUpgraded,
    Mounted,
    NotifyFailure,
    Outcome,
    OutsideKernelControl,
    PoisonCleared,
    PoisonInjected,
    PopulateFailed,
    RepairFinished,
    RepairProgress,
    RepairStrategyFailed,
    RuleFailed,
    RuleFired,
    ScrubFound,
    SettingChanged,
    SignalSent,
    SilentlyCorrupted,
    StoreLost,
    UnexpectedError,
    Unmounted,
    any_event,
    decode,
    encode,
)
from daxemu.fields import Kind, declared
from daxemu.uapi import BUS_MCEERR_AO, BUS_MCEERR_AR, MF_MEM_PRE_REMOVE, U64_MAX


def a_signal(code: int, reason: str | None = None) -> SignalSent:
    return SignalSent(
        pid=123,
        tid=124,
        comm="p0",
        code=code,
        address=0x7F1234567000,
        lsb=12,
        pfn=0x240200,
        result="inexact" if reason else "delivered",
        reason=reason,
    )


def a_failure(outcome: Outcome) -> MemoryFailureHandled:
    return MemoryFailureHandled(
        pfn=0x240200, nr_pages=1, page_type="dax page", outcome=outcome, told=2, files=1
    )


SAMPLES: list[Event] = [
    Mounted(seq=1, time=2.5, device="/dev/shm/pmem0", mountpoint="/mnt", size=6 << 40, mode="direct"),
    DirectMappingRefused(pid=7, tid=8, comm="p0", path="/mnt/f", reason="gdb (5) traces the program"),
    Unmounted(mountpoint="/mnt"),
    DeviceTightened(device="/dev/shm/pmem0", mode="0700", files=3),
    SettingChanged(name="early_kill", value="1"),
    EventsRepeated(seq=99, first=12, count=88, since=2.5, what="set early_kill=1"),
    PoisonInjected(offset=4096, length=512, latent=True),
    PoisonCleared(offset=4096, length=512, by="write"),
    ScrubFound(offset=4096, length=512),
    MadviseInjected(pid=7, tid=8, address=0x7000, pfn=0x240200, soft=False),
    a_failure(Outcome.FAILED),
    OutsideKernelControl(pfn=0x240200, nr_pages=1),
    a_signal(BUS_MCEERR_AO, "another tracer"),
    PopulateFailed(
        pid=7,
        tid=8,
        comm="p0",
        call="mlock",
        ino=2,
        path="/f",
        offset=0,
        length=4096,
        result="killed",
        reason="another tracer",
        exposed=(9, 10),
    ),
    FaultRepeated(pid=7, tid=8, comm="p0", ino=2, path="/f", offset=4096, times=100),
    FileDamaged(ino=2, path='/a "quoted"\n\u00e9', offset=0, length=4096),
    StoreLost(ino=2, path="/f", offset=0, length=4096),
    CorruptionFound(offset=4096, length=512, by="scrub", repaired=True),
    SilentlyCorrupted(offset=4096, length=512),
    RepairFinished(
        strategy="mirror",
        pfn=0x240200,
        nr_pages=1,
        verdict="cannot",
        transparent=False,
        seconds=0.01,
        lost=[(2, 0, 4096)],
        reason="the copy is damaged, too",
    ),
    RepairProgress(strategy="mirror", done_bytes=1 << 20, total_bytes=1 << 30),
    RepairStrategyFailed(strategy="mine", reason="failed: took more than 5 s"),
    NotifyFailure(offset=0, length=U64_MAX, flags=MF_MEM_PRE_REMOVE),
    UnexpectedError(where="the request map", error="OverflowError: too large"),
    LoopStalled(task="serve", step="corrupt", seconds=45.0),
    MetadataRewritten(device="pmem0", file="db", page=3, copy=1, reason="has a wrong checksum"),
    MetadataUpgraded(device="pmem0", before=2, now=3),
    FilesystemShutdown(device="pmem0", reason="Device is about to be removed!"),
    DaxActiveAtRemove(device="pmem0"),
    DeviceRemoved(device="pmem0", told=3),
    RuleFired(
        rule="rule1",
        number=3,
        op="read",
        ino=2,
        path="/db",
        pid=7,
        tid=8,
        comm="p0",
        offset=4096,
        length=4096,
        then=["poison in the bytes of the operation"],
    ),
    RuleFailed(rule="rule1", action="powerfail", reason="the connection cannot be cut"),
]


def test_there_is_a_sample_of_every_type() -> None:
    assert {type(sample) for sample in SAMPLES} == set(EVENT_TYPES)
    assert len(SAMPLES) == len(EVENT_TYPES)


def test_a_class_in_any_module_of_events_is_an_event() -> None:
    modules = [path for path in Path(daxemu.events.__file__).parent.glob("*.py") if path.stem != "any_event"]
    classes = re.findall(r"^class (\w+)\(Event\):", "".join(path.read_text() for path in modules), re.M)
    assert len(classes) > 20
    assert {event.__name__ for event in EVENT_TYPES} == set(classes)
    assert [name for name in classes if not hasattr(daxemu.events, name)] == []


def test_the_union_for_type_checkers_has_every_event() -> None:
    """``make protocol`` makes it."""
    assert set(get_args(any_event.AnyEvent)) == set(EVENT_TYPES)
    assert Path(any_event.__file__).read_text() == module()


UNITS = re.compile(r"bytes|offset|length|pfn|nr_pages|[pt]id|ino|address|size|signals|processes|seconds")


@pytest.mark.parametrize("event", EVENT_TYPES, ids=lambda event: event.__name__)
def test_a_field_with_a_unit_declares_it(event: type[Event]) -> None:
    names = [field.name for field in msgspec.structs.fields(event)]
    assert [name for name in names if UNITS.search(name) and name not in declared(event)] == []


def test_each_length_is_of_one_offset() -> None:
    """The selection of events relies on it: an offset is of the file or of the device, never both."""
    for event in EVENT_TYPES:
        kinds = [field.kind for field in declared(event).values()]
        offsets = kinds.count(Kind.FILE_OFFSET) + kinds.count(Kind.DEVICE_OFFSET)
        assert offsets <= 1
        assert not offsets or kinds.count(Kind.LENGTH) <= 1
        assert (Kind.FILE_OFFSET in kinds) <= (Kind.INODE in kinds)


@pytest.mark.parametrize("sample", SAMPLES, ids=lambda e: type(e).__name__)
def test_an_event_comes_back_as_it_was(sample: Event) -> None:
    line = encode(sample)
    assert b"\n" not in line
    assert decode(line) == sample
    assert type(decode(line)) is type(sample)


@pytest.mark.parametrize("sample", SAMPLES, ids=lambda e: type(e).__name__)
def test_the_json_names_the_event_and_its_fields(sample: Event) -> None:
    fields = json.loads(encode(sample))
    assert fields.pop("event") == type(sample).__name__
    assert set(fields) == {field.name for field in msgspec.structs.fields(sample)}


@pytest.mark.parametrize("sample", SAMPLES, ids=lambda e: type(e).__name__)
def test_every_event_has_a_line_for_people(sample: Event) -> None:
    assert sample.summary()
    assert sample.summary() != type(sample).__name__


@pytest.mark.parametrize(
    "line",
    [b"", b"{}", b"[]", b'{"event":"Nothing"}', b'{"event":"DeviceRemoved","device":1,"told":1}', b"{"],
)
def test_anything_else_is_no_event(line: bytes) -> None:
    with pytest.raises(msgspec.DecodeError):
        decode(line)


# -- the kernel's lines, as recorded (6.1, 6.12, 7.2; xfs-dax). The recordings put PFN and VA for numbers, and
# the name of the process for name:pid.

RECORDED = {
    "Memory failure: PFN: recovery action for dax page: Recovered",
    "Memory failure: PFN: recovery action for dax page: Failed",
    "Memory failure: PFN: Sending SIGBUS to p0 due to hardware memory corruption",
    "MCE: Killing p0 due to hardware memory corruption fault at VA",
    "XFS (pmem0): Device is about to be removed!",
}


def as_recorded(line: str) -> str:
    line = re.sub(r"\b(\w+):\d+ due", r"\1 due", line)
    line = re.sub(r"failure: 0x[0-9a-f]+:", "failure: PFN:", line)
    return re.sub(r"at [0-9a-f]+$", "at VA", line).replace("daxemu (", "XFS (")


@pytest.mark.parametrize(
    ("event", "line"),
    [
        (
            a_failure(Outcome.RECOVERED),
            "Memory failure: 0x240200: recovery action for dax page: Recovered",
        ),
        (a_failure(Outcome.FAILED), "Memory failure: 0x240200: recovery action for dax page: Failed"),
        (
            a_signal(BUS_MCEERR_AO),
            "Memory failure: 0x240200: Sending SIGBUS to p0:123 due to hardware memory corruption",
        ),
        (
            a_signal(BUS_MCEERR_AR),
            "MCE: Killing p0:123 due to hardware memory corruption fault at 7f1234567000",
        ),
        (
            FilesystemShutdown(device="pmem0", reason="Device is about to be removed!"),
            "daxemu (pmem0): Device is about to be removed!",
        ),
    ],
    ids=["recovered", "failed", "action optional", "action required", "removal"],
)
def test_the_line_is_the_kernels(event: Event, line: str) -> None:
    assert event.dmesg() == line
    assert as_recorded(line) in RECORDED


def test_events_that_the_kernel_does_not_log_have_no_line() -> None:
    silent = {type(sample) for sample in SAMPLES if sample.dmesg() is None}
    assert set(EVENT_TYPES) - silent == {
        MadviseInjected,
        MemoryFailureHandled,
        OutsideKernelControl,
        SignalSent,
        FilesystemShutdown,
        DaxActiveAtRemove,
    }


def test_every_line_is_printed_by_a_function_of_the_kernels() -> None:
    by = {type(sample).__name__: sample.printed_by() for sample in SAMPLES if sample.dmesg() is not None}
    assert by == {
        "MadviseInjected": "madvise_inject_error",
        "MemoryFailureHandled": "action_result",
        "OutsideKernelControl": "memory_failure",
        "SignalSent": "kill_proc",
        "FilesystemShutdown": "xfs_do_force_shutdown",
        "DaxActiveAtRemove": "pmem_pagemap_kill",
    }
    assert a_signal(BUS_MCEERR_AR).printed_by() == "do_sigbus"
    assert msgspec.structs.replace(a_signal(BUS_MCEERR_AR), current=True).printed_by() == "kill_proc"


def test_madvise_of_a_thread_has_the_kernels_lines() -> None:
    where = "pfn 0x240200 at process virtual address 0x7000"
    injected = MadviseInjected(pid=7, tid=8, address=0x7000, pfn=0x240200, soft=False)
    assert injected.dmesg() == f"Injecting memory failure for {where}"
    assert msgspec.structs.replace(injected, soft=True).dmesg() == f"Soft offlining {where}"
    told = msgspec.structs.replace(a_signal(BUS_MCEERR_AR, None), current=True)
    assert (told.dmesg() or "").endswith("due to hardware memory corruption")


def test_memory_outside_kernel_control_has_the_kernels_line() -> None:
    """Not in the recordings: mm/memory-failure.c, memory_failure()."""
    line = "Memory failure: 0x240200: memory outside kernel control"
    assert OutsideKernelControl(pfn=0x240200, nr_pages=1).dmesg() == line


def test_a_removal_in_use_has_the_line_that_was_proposed() -> None:
    """Not in the recordings: drivers/nvdimm/pmem.c, pmem_pagemap_kill(), as proposed in 2021."""
    line = "nd_pmem pmem0: DAX active at remove, trigger mass memory failure"
    assert DaxActiveAtRemove(device="pmem0").dmesg() == line


def test_an_inexact_signal_says_why() -> None:
    assert "another tracer" in a_signal(BUS_MCEERR_AO, "another tracer").summary()


def test_outcomes_have_the_kernels_names() -> None:
    assert [outcome.value for outcome in Outcome] == ["Ignored", "Failed", "Delayed", "Recovered"]


@pytest.mark.parametrize("result", ["gone", "inexact", "pending"])
def test_a_fault_whose_signal_did_not_arrive_is_logged_as_no_killing(result: str) -> None:
    sent = SignalSent(pid=1, tid=1, comm="p0", code=4, address=0, lsb=12, pfn=7, result=result)
    assert sent.dmesg() is None
    sent.result = "delivered"
    assert sent.dmesg() == "MCE: Killing p0:1 due to hardware memory corruption fault at 0"
