"""Events of the media: poison and silent corruption, and the file bytes that were lost."""

from __future__ import annotations

from daxemu.events.base import Event


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


class SilentlyCorrupted(Event):
    """Device bytes were changed without poison (``inject --silent``)."""

    offset: int
    length: int

    def summary(self) -> str:
        return f"silent corruption at device {self.offset:#x}+{self.length:#x}"
