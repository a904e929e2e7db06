"""Typed records of everything that happened, their JSON form, and the kernel's own log line for each.

An event says what *was* done, never what will be. Each one that the kernel would log knows that line
(``dmesg()``); the others return None there. Addresses and offsets are bytes; ``pfn`` is a page frame number.
"""

from __future__ import annotations

from collections.abc import Callable
from enum import StrEnum
from typing import Annotated

import msgspec

from daxemu.uapi import BUS_MCEERR_AO, BUS_MCEERR_AR


class Outcome(StrEnum):
    """``enum mf_result`` of mm/memory-failure.c."""

    IGNORED = "Ignored"
    FAILED = "Failed"
    DELAYED = "Delayed"
    RECOVERED = "Recovered"


class PageType(StrEnum):
    """``enum mf_action_page_type`` of mm/memory-failure.c, those that apply to device memory."""

    DAX = "dax page"
    PFN_MAP = "non struct page pfn"


def signalled(processes: int, signals: int) -> str:
    """Return a count for people: processes, and signals in parentheses where the numbers differ."""
    count = f"{processes} process{'' if processes == 1 else 'es'} signalled"
    return count if signals == processes else f"{count} ({signals} signals)"


class Event(msgspec.Struct, tag_field="event", kw_only=True):
    """One thing that happened. ``seq`` counts from 1 in each mount; ``time`` is seconds since the epoch."""

    seq: int = 0
    # A time that no clock shows (from a damaged file) is refused when decoded.
    time: Annotated[float, msgspec.Meta(ge=0, lt=1 << 40)] = 0.0

    def dmesg(self) -> str | None:
        """The line the kernel prints for this, without its timestamp; None if it prints none."""
        return None

    def printed_by(self) -> str:
        """The kernel's function that prints that line. Precondition: there is one."""
        raise NotImplementedError(f"{type(self).__name__} has no line")

    def summary(self) -> str:
        """One line for people."""
        return self.dmesg() or type(self).__name__


class Mounted(Event):
    device: str
    mountpoint: str
    size: int

    def summary(self) -> str:
        return f"mounted {self.device} on {self.mountpoint}"


class Unmounted(Event):
    mountpoint: str

    def summary(self) -> str:
        return f"unmounted {self.mountpoint}"


class DeviceTightened(Event):
    """Other users could open ``files`` files of DEVICE, against ``mode`` (octal) of device.toml."""

    device: str
    mode: str
    files: int

    def summary(self) -> str:
        return f"{self.device}: others no longer have access to {self.files} of its files (mode {self.mode})"


class SettingChanged(Event):
    name: str
    value: str

    def summary(self) -> str:
        return f"set {self.name}={self.value}"


class EventsRepeated(Event):
    """Only in the file: ``count`` events like the one before, ``first`` to ``seq``, since ``since``. ``what``
    is a summary of each.
    """

    first: int
    since: float
    what: str
    count: int = 0

    def summary(self) -> str:
        return f"{self.what}: {self.count} times more, events {self.first} to {self.seq}"


class PoisonInjected(Event):
    """Media went bad. ``offset`` and ``length`` are device bytes, rounded out to sectors."""

    offset: int
    length: int
    latent: bool = False

    def summary(self) -> str:
        return f"poison{' (latent)' if self.latent else ''} at device {self.offset:#x}+{self.length:#x}"


class PoisonCleared(Event):
    """Media is readable again: ``by`` a write that covered it, or by request."""

    offset: int
    length: int
    by: str

    def summary(self) -> str:
        return f"poison cleared at device {self.offset:#x}+{self.length:#x} by {self.by}"


class ScrubFound(Event):
    """A scrub found poison that nobody knew of. ``offset`` and ``length`` are device bytes."""

    offset: int
    length: int

    def summary(self) -> str:
        return f"scrub: poison at device {self.offset:#x}+{self.length:#x}"


class MadviseInjected(Event):
    """``madvise_inject_error()``: a thread asked for a page of its own to go bad, or (``soft``) offline."""

    pid: int
    tid: int
    address: int
    pfn: int
    soft: bool

    def dmesg(self) -> str:
        what = "Soft offlining" if self.soft else "Injecting memory failure for"
        return f"{what} pfn {self.pfn:#x} at process virtual address {self.address:#x}"

    def printed_by(self) -> str:
        return "madvise_inject_error"


class MemoryFailureHandled(Event):
    """The end of one memory_failure(): ``action_result()``.

    ``signals``: SIGBUS sent for all parts of the failure, one for each mapping of each process that was
    chosen. ``processes``: distinct processes among their receivers. ``told`` is the old name of ``signals``.
    """

    pfn: int
    nr_pages: int
    page_type: str
    outcome: Outcome
    told: int
    files: int
    error: str | None = None
    signals: int = 0
    processes: int = 0

    def dmesg(self) -> str:
        return f"Memory failure: {self.pfn:#x}: recovery action for {self.page_type}: {self.outcome.value}"

    def printed_by(self) -> str:
        return "action_result"


class OutsideKernelControl(Event):
    """A failure of pages that no pagemap and no pfn address space has: nothing was done (-ENXIO)."""

    pfn: int
    nr_pages: int

    def dmesg(self) -> str:
        return f"Memory failure: {self.pfn:#x}: memory outside kernel control"

    def printed_by(self) -> str:
        return "memory_failure"


KILLED_BY_SIGBUS = "killed by SIGBUS, which the thread had blocked"
"""Reason of a SignalSent that is gone: the kernel logs the killing although no stop showed the delivery."""


class SignalSent(Event):
    """SIGBUS for one thread. ``result``: delivered, pending, merged (with a SIGBUS that the thread has
    pending), ignored, gone, or inexact (``reason`` says why). ``current``: it is action required because the
    thread itself was in memory_failure(), not by a page fault.
    """

    pid: int
    tid: int
    comm: str
    code: int
    address: int
    lsb: int
    pfn: int
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
    """A thread populated or locked a mapping (system call ``call``) of bytes that cannot be read, among bytes
    ``[offset, offset + length)`` of the file. ``result``: ENOMEM (the call returned it), ignored (the call
    succeeded), killed (by SIGKILL: nothing else ends the call of a thread that cannot be held), endless
    (SIGKILL is not permitted either), or gone (the thread died meanwhile). ``reason`` says why.
    """

    pid: int
    tid: int
    comm: str
    call: str
    ino: int
    path: str
    offset: int
    length: int
    result: str
    reason: str | None = None

    def summary(self) -> str:
        why = f" ({self.reason})" if self.reason else ""
        return (
            f"{self.call} of {self.comm}:{self.pid} thread {self.tid} over unreadable bytes of {self.path} "
            f"{self.offset:#x}+{self.length:#x}: {self.result}{why}"
        )


class FaultRepeated(Event):
    """A thread has asked ``times`` times in a row for a page of a file that cannot be read."""

    pid: int
    tid: int
    comm: str
    ino: int
    path: str
    offset: int
    times: int

    def summary(self) -> str:
        return (
            f"{self.comm}:{self.pid} thread {self.tid} asked {self.times} times for the unreadable page "
            f"at {self.offset:#x} of {self.path}"
        )


class FileDamaged(Event):
    """A file lost the bytes ``[offset, offset + length)``."""

    ino: int
    path: str
    offset: int
    length: int

    def summary(self) -> str:
        return f"damaged: {self.path} {self.offset:#x}+{self.length:#x}"


class StoreLost(Event):
    """A store through a mapping was written back to poison and is gone."""

    ino: int
    path: str
    offset: int
    length: int

    def summary(self) -> str:
        return f"lost store: {self.path} {self.offset:#x}+{self.length:#x}"


class CorruptionFound(Event):
    """Device bytes were not what was written there, without being poison. ``by``: a read or a scrub."""

    offset: int
    length: int
    by: str
    repaired: bool

    def summary(self) -> str:
        what = "repaired" if self.repaired else "not repaired"
        return f"silent corruption at device {self.offset:#x}+{self.length:#x} found by a {self.by}: {what}"


class RepairFinished(Event):
    """What a repair strategy made of a failure. ``verdict``: recovered, lost, cannot, or failed (the strategy
    itself). ``lost``: (inode, offset, length) of bytes that cannot be had any more. ``seconds`` it took.
    """

    strategy: str
    pfn: int
    nr_pages: int
    verdict: str
    transparent: bool
    seconds: float
    lost: list[tuple[int, int, int]]
    reason: str | None = None

    def summary(self) -> str:
        why = f" ({self.reason})" if self.reason else ""
        return f"repair by {self.strategy}: pfn {self.pfn:#x}+{self.nr_pages}: {self.verdict}{why}"


class RepairProgress(Event):
    """A repair strategy that was chosen copies, or adds up, what there is. Once a second, and at the end."""

    strategy: str
    done_bytes: int
    total_bytes: int

    def summary(self) -> str:
        return f"repair by {self.strategy} begins: {self.done_bytes} of {self.total_bytes} bytes"


class RepairStrategyFailed(Event):
    """A repair strategy raised, hung or made no sense; it is asked nothing more."""

    strategy: str
    reason: str

    def summary(self) -> str:
        return f"the repair strategy {self.strategy} failed: {self.reason}"


class SilentlyCorrupted(Event):
    """Device bytes were changed without poison (``inject --silent``)."""

    offset: int
    length: int

    def summary(self) -> str:
        return f"silent corruption at device {self.offset:#x}+{self.length:#x}"


class NotifyFailure(Event):
    """One call of the holder's ``->notify_failure``. ``offset`` and ``length`` are device bytes; ``flags``
    are those of memory_failure(). The removal of a device is one call: 0, U64_MAX, MF_MEM_PRE_REMOVE.
    """

    offset: int
    length: int
    flags: int

    def summary(self) -> str:
        return f"notify_failure of device {self.offset:#x}+{self.length:#x}, flags {self.flags:#x}"


class UnexpectedError(Event):
    """An exception that no code expects, ``error``, ended a request or a round of a task (``where``). Its
    traceback is in supervisor.log.
    """

    where: str
    error: str

    def summary(self) -> str:
        return f"{self.where} failed inside the supervisor: {self.error}"


class LoopStalled(Event):
    """One step of the event loop took ``seconds``: no request was answered meanwhile. The watchdog cut the
    mount. ``task`` is the task that ran, ``step`` the innermost function; the stack is in supervisor.log.
    """

    task: str
    step: str
    seconds: float

    def summary(self) -> str:
        return f"the mount was cut: {self.task} stood still for {self.seconds:.0f} s in {self.step}"


class MetadataRewritten(Event):
    """One copy of a page of the filesystem's records was bad and was rewritten from the other copy.

    ``file``: db, wal or superblock. ``page``: the page's number in the file, or the superblock's first block
    on the device. ``copy``: 1 or 2. ``reason``: "has a wrong checksum" or "is older than the other".
    """

    device: str
    file: str
    page: int
    copy: int
    reason: str

    def summary(self) -> str:
        where = "" if self.file == "superblock" else f"page {self.page} of "
        found = f"metadata {where}{self.file}: copy {self.copy} {self.reason}"
        return f"{found}; rewritten from the other copy"


class MetadataUpgraded(Event):
    """The filesystem's records were rewritten in today's format; ``before`` and ``now`` are the formats."""

    device: str
    before: int
    now: int

    def summary(self) -> str:
        return f"metadata upgraded from format {self.before} to format {self.now}"


class FilesystemShutdown(Event):
    device: str
    reason: str

    def dmesg(self) -> str:
        return f"daxemu ({self.device}): {self.reason}"

    def printed_by(self) -> str:
        return "xfs_do_force_shutdown"


class DaxActiveAtRemove(Event):
    """A surprise removal begins while somebody holds the device (proposed for the pmem driver in 2021)."""

    device: str

    def dmesg(self) -> str:
        return f"nd_pmem {self.device}: DAX active at remove, trigger mass memory failure"

    def printed_by(self) -> str:
        return "pmem_pagemap_kill"


class DeviceRemoved(Event):
    """The end of a surprise removal. ``signals``, ``processes`` and ``told`` as in MemoryFailureHandled."""

    device: str
    told: int
    signals: int = 0
    processes: int = 0

    def summary(self) -> str:
        return f"{self.device} was removed, {signalled(self.processes, self.signals)}"


EVENT_TYPES: tuple[type[Event], ...] = (
    Mounted,
    Unmounted,
    DeviceTightened,
    SettingChanged,
    EventsRepeated,
    PoisonInjected,
    PoisonCleared,
    ScrubFound,
    MadviseInjected,
    MemoryFailureHandled,
    OutsideKernelControl,
    SignalSent,
    PopulateFailed,
    FaultRepeated,
    FileDamaged,
    StoreLost,
    CorruptionFound,
    SilentlyCorrupted,
    RepairFinished,
    RepairProgress,
    RepairStrategyFailed,
    NotifyFailure,
    UnexpectedError,
    LoopStalled,
    MetadataRewritten,
    MetadataUpgraded,
    FilesystemShutdown,
    DaxActiveAtRemove,
    DeviceRemoved,
)

AnyEvent = (
    Mounted
    | Unmounted
    | DeviceTightened
    | SettingChanged
    | EventsRepeated
    | PoisonInjected
    | PoisonCleared
    | ScrubFound
    | MadviseInjected
    | MemoryFailureHandled
    | OutsideKernelControl
    | SignalSent
    | PopulateFailed
    | FaultRepeated
    | FileDamaged
    | StoreLost
    | CorruptionFound
    | SilentlyCorrupted
    | RepairFinished
    | RepairProgress
    | RepairStrategyFailed
    | NotifyFailure
    | UnexpectedError
    | LoopStalled
    | MetadataRewritten
    | MetadataUpgraded
    | FilesystemShutdown
    | DaxActiveAtRemove
    | DeviceRemoved
)

Emit = Callable[[Event], None]
"""How a layer publishes: it hands the event up and thinks no more of it."""

_decoder = msgspec.json.Decoder(AnyEvent)


def encode(event: Event) -> bytes:
    """One JSON object on one line, without the newline."""
    return msgspec.json.encode(event)


def decode(line: bytes | str) -> Event:
    """The event of one line. Raises msgspec.ValidationError or msgspec.DecodeError for anything else."""
    try:
        event: Event = _decoder.decode(line)
    except (UnicodeDecodeError, RecursionError) as error:
        raise msgspec.DecodeError(str(error)) from error
    return event
