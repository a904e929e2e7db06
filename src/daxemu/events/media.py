"""Events of the media: poison and silent corruption, and the file bytes that were lost."""

from __future__ import annotations

from daxemu.events.base import Event
from daxemu.fields import Address, DeviceOffset, FileOffset, Ino, Length, Pfn, Pid, Tid


class PoisonInjected(Event):
    """Media went bad. ``offset`` and ``length`` are device bytes, rounded out to sectors."""

    offset: DeviceOffset
    length: Length
    latent: bool = False

    def summary(self) -> str:
        return f"poison{' (latent)' if self.latent else ''} at device {self.offset:#x}+{self.length:#x}"


class PoisonCleared(Event):
    """Media is readable again: ``by`` a write that covered it, or by request."""

    offset: DeviceOffset
    length: Length
    by: str

    def summary(self) -> str:
        return f"poison cleared at device {self.offset:#x}+{self.length:#x} by {self.by}"


class ScrubFound(Event):
    """A scrub found poison that nobody knew of. ``offset`` and ``length`` are device bytes."""

    offset: DeviceOffset
    length: Length

    def summary(self) -> str:
        return f"scrub: poison at device {self.offset:#x}+{self.length:#x}"


class MadviseInjected(Event):
    """``madvise_inject_error()``: a thread asked for a page of its own to go bad, or (``soft``) offline."""

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
    """A file lost the bytes ``[offset, offset + length)``."""

    ino: Ino
    path: str
    offset: FileOffset
    length: Length

    def summary(self) -> str:
        return f"damaged: {self.path} {self.offset:#x}+{self.length:#x}"


class StoreLost(Event):
    """A store through a mapping was written back to poison and is gone."""

    ino: Ino
    path: str
    offset: FileOffset
    length: Length

    def summary(self) -> str:
        return f"lost store: {self.path} {self.offset:#x}+{self.length:#x}"


class CorruptionFound(Event):
    """Device bytes were not what was written there, without being poison. ``by``: a read or a scrub."""

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
