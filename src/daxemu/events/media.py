"""Events of the media: poison and silent corruption, and the file bytes that were lost."""

from __future__ import annotations

from daxemu.events.base import Event
from daxemu.fields import Address, DeviceOffset, FileOffset, Ino, Length, Pfn, Pid, Tid


class PoisonInjected(Event):
    """Poison was injected. ``offset`` and ``length`` are device bytes, rounded out to sectors."""

    offset: DeviceOffset
    length: Length
    latent: bool = False

    def summary(self) -> str:
        return f"poison{' (latent)' if self.latent else ''} at device {self.offset:#x}+{self.length:#x}"


class PoisonCleared(Event):
    """Poison was cleared. ``by``: a write of whole sectors, or a request."""

    offset: DeviceOffset
    length: Length
    by: str

    def summary(self) -> str:
        return f"poison cleared at device {self.offset:#x}+{self.length:#x} by {self.by}"


class ScrubFound(Event):
    """A scrub found latent poison. ``offset`` and ``length`` are device bytes."""

    offset: DeviceOffset
    length: Length

    def summary(self) -> str:
        return f"scrub: poison at device {self.offset:#x}+{self.length:#x}"


class MadviseInjected(Event):
    """``madvise_inject_error()``: a thread poisoned one of its pages, or (``soft``) took the page offline."""

    pid: Pid
    tid: Tid
    address: Address
    pfn: Pfn
    soft: bool

    def dmesg(self) -> str:
        what = "Soft offlining" if self.soft else "Injecting memory failure for"
        return f"{what} pfn {self.pfn:#x} at process virtual address {self.address:#x}"

    def printed_by(self) -> str:
        return "madvise_inject_error"


class FileDamaged(Event):
    """The bytes ``[offset, offset + length)`` of a file are damaged."""

    ino: Ino
    path: str
    offset: FileOffset
    length: Length

    def summary(self) -> str:
        return f"damaged: {self.path} {self.offset:#x}+{self.length:#x}"


class StoreLost(Event):
    """A store through a mapping was written back to poison. The stored bytes are lost."""

    ino: Ino
    path: str
    offset: FileOffset
    length: Length

    def summary(self) -> str:
        return f"lost store: {self.path} {self.offset:#x}+{self.length:#x}"


class CorruptionFound(Event):
    """Device bytes without poison differ from the bytes that were written. ``by``: a read or a scrub."""

    offset: DeviceOffset
    length: Length
    by: str
    repaired: bool

    def summary(self) -> str:
        what = "repaired" if self.repaired else "not repaired"
        return f"silent corruption at device {self.offset:#x}+{self.length:#x} found by a {self.by}: {what}"


class SilentlyCorrupted(Event):
    """Device bytes were changed without poison (``inject --silent``)."""

    offset: DeviceOffset
    length: Length

    def summary(self) -> str:
        return f"silent corruption at device {self.offset:#x}+{self.length:#x}"
