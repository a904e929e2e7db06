"""System calls for an agent."""

from __future__ import annotations

from typing import NamedTuple

from daxemu.host.run.zone import MAGIC

FD_MEDIA, FD_VOID = 0, 1
_MAGIC = MAGIC << 32


class Syscall(NamedTuple):
    """A system call: number and up to six arguments."""

    number: int
    args: tuple[int, ...]


def mmap_media(at: int, length: int, prot: int, shared: bool, offset: int) -> Syscall:
    """Map the media from byte ``offset`` on."""
    return Syscall(9, (at, length, prot, 0x11 if shared else 0x12, FD_MEDIA | _MAGIC, offset))


def mmap_void(at: int, length: int, prot: int) -> Syscall:
    """Map the empty file."""
    return Syscall(9, (at, length, prot, 0x11, FD_VOID | _MAGIC, 0))


def mmap_anonymous(at: int, length: int, prot: int) -> Syscall:
    """Map anonymous memory."""
    return Syscall(9, (at, length, prot, 0x4032, 0xFFFFFFFF | _MAGIC, 0))


def munmap(at: int, length: int) -> Syscall:
    """munmap(2)."""
    return Syscall(11, (at, length, 0, 0, 0, _MAGIC))


def mprotect(at: int, length: int, prot: int) -> Syscall:
    """mprotect(2)."""
    return Syscall(10, (at, length, prot, 0, 0, _MAGIC))


def madvise(at: int, length: int, advice: int) -> Syscall:
    """madvise(2)."""
    return Syscall(28, (at, length, advice, 0, 0, _MAGIC))


def mremap(at: int, old: int, new: int, to: int) -> Syscall:
    """mremap(2) with MREMAP_MAYMOVE and MREMAP_FIXED."""
    return Syscall(25, (at, old, new, 3, to, _MAGIC))
