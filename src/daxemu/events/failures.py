"""Events of memory failures: the calls, the outcomes, the signals, the removal of a device."""

from __future__ import annotations

from daxemu.events.base import Event, Outcome, signalled
from daxemu.fields import (
    Address,
    DeviceOffset,
    FileOffset,
    Files,
    Ino,
    Length,
    Pages,
    Pfn,
    Pid,
    Processes,
    Signals,
    Tid,
)
from daxemu.uapi import BUS_MCEERR_AO, BUS_MCEERR_AR


class NotifyFailure(Event):
    """Call of the holder's ``->notify_failure``. ``offset`` and ``length`` are device bytes; ``flags`` are
    those of memory_failure(). The removal of a device is one call: 0, U64_MAX, MF_MEM_PRE_REMOVE.
    """

    offset: DeviceOffset
    length: Length
    flags: int

    def summary(self) -> str:
        return f"notify_failure of device {self.offset:#x}+{self.length:#x}, flags {self.flags:#x}"


class MemoryFailureHandled(Event):
    """The end of one memory_failure(): ``action_result()``.

    ``signals``: SIGBUS sent for all parts of the failure, one for each mapping of each victim. ``processes``:
    distinct processes among the receivers. ``told`` is the old name of ``signals``.
    """

    pfn: Pfn
    nr_pages: Pages
    page_type: str
    outcome: Outcome
    told: Signals
    files: Files
    error: str | None = None
    signals: Signals = 0
    processes: Processes = 0

    def dmesg(self) -> str:
        return f"Memory failure: {self.pfn:#x}: recovery action for {self.page_type}: {self.outcome.value}"

    def printed_by(self) -> str:
        return "action_result"


class OutsideKernelControl(Event):
    """Failure of pages outside every pagemap and pfn address space: no action (-ENXIO)."""

    pfn: Pfn
    nr_pages: Pages

    def dmesg(self) -> str:
        return f"Memory failure: {self.pfn:#x}: memory outside kernel control"

    def printed_by(self) -> str:
        return "memory_failure"


KILLED_BY_SIGBUS = "killed by SIGBUS, which the thread had blocked"
"""Reason of a SignalSent that is gone: the kernel logs the killing although no stop showed the delivery."""


class SignalSent(Event):
    """SIGBUS for one thread. ``result``: delivered, pending, merged (with a pending SIGBUS of the thread),
    ignored, gone, or inexact (for ``reason``). ``current``: action required because the thread itself called
    memory_failure(), not because of a page fault.
    """

    pid: Pid
    tid: Tid
    comm: str
    code: int
    address: Address
    lsb: int
    pfn: Pfn
    result: str
    reason: str | None = None
    current: bool = False

    def dmesg(self) -> str | None:
        if self._in_a_fault:
            if self.result != "delivered" and self.reason != KILLED_BY_SIGBUS:
                return None  # a thread that was killed meanwhile, or whose signal stayed the kernel's own
            victim = f"{self.comm}:{self.pid}"
            return f"MCE: Killing {victim} due to hardware memory corruption fault at {self.address:x}"
        return (
            f"Memory failure: {self.pfn:#x}: Sending SIGBUS to {self.comm}:{self.pid} "
            "due to hardware memory corruption"
        )

    def printed_by(self) -> str:
        return "do_sigbus" if self._in_a_fault else "kill_proc"

    @property
    def _in_a_fault(self) -> bool:
        return self.code == BUS_MCEERR_AR and not self.current

    def summary(self) -> str:
        name = {BUS_MCEERR_AO: "BUS_MCEERR_AO", BUS_MCEERR_AR: "BUS_MCEERR_AR"}.get(self.code, str(self.code))
        why = f" ({self.reason})" if self.reason else ""
        return (
            f"SIGBUS {name} to {self.comm}:{self.pid} thread {self.tid} "
            f"addr {self.address:#x} lsb {self.lsb}: {self.result}{why}"
        )


class PopulateFailed(Event):
    """A thread populated or locked a mapping of unreadable bytes (system call ``call``), within bytes
    ``[offset, offset + length)`` of the file. ``result``: ENOMEM (the call returned it), ignored (the call
    succeeded), killed (by SIGKILL: nothing else ends the call of a thread that cannot be held), endless
    (SIGKILL is not permitted either), or gone (the thread died meanwhile), for ``reason``. ``exposed``: other
    processes that had such a page present while the thread got zeros. A load in these processes may have
    returned zeros.
    """

    pid: Pid
    tid: Tid
    comm: str
    call: str
    ino: Ino
    path: str
    offset: FileOffset
    length: Length
    result: str
    reason: str | None = None
    exposed: tuple[Pid, ...] = ()

    def summary(self) -> str:
        why = f" ({self.reason})" if self.reason else ""
        if self.exposed:
            why += f" (zeros shown to processes {', '.join(map(str, self.exposed))})"
        return (
            f"{self.call} of {self.comm}:{self.pid} thread {self.tid} over unreadable bytes of {self.path} "
            f"{self.offset:#x}+{self.length:#x}: {self.result}{why}"
        )


class FaultRepeated(Event):
    """A thread requested an unreadable page of a file ``times`` times in a row."""

    pid: Pid
    tid: Tid
    comm: str
    ino: Ino
    path: str
    offset: FileOffset
    times: int

    def summary(self) -> str:
        return (
            f"{self.comm}:{self.pid} thread {self.tid} asked {self.times} times for the unreadable page "
            f"at {self.offset:#x} of {self.path}"
        )


class DaxActiveAtRemove(Event):
    """A surprise removal begins while the device is held (proposed for the pmem driver in 2021)."""

    device: str

    def dmesg(self) -> str:
        return f"nd_pmem {self.device}: DAX active at remove, trigger mass memory failure"

    def printed_by(self) -> str:
        return "pmem_pagemap_kill"


class DeviceRemoved(Event):
    """The end of a surprise removal. ``signals``, ``processes`` and ``told`` as in MemoryFailureHandled."""

    device: str
    told: Signals
    signals: Signals = 0
    processes: Processes = 0

    def summary(self) -> str:
        return f"{self.device} was removed, {signalled(self.processes, self.signals)}"
