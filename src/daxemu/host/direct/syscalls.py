"""System calls that an agent makes in the address space of a program. Only x86_64.

Purpose: numbers, flags, and the mark by which the seccomp filter of ``daxemu run`` lets calls of an agent
pass: ``zone.MAGIC`` in the upper half of a register whose upper half the kernel ignores. The register is
that of ``int fd`` for mmap(2), and r9 (the sixth argument) for calls with fewer arguments.
"""

from __future__ import annotations

from typing import NamedTuple

from daxemu.host.direct.structs import UFFDIO_WRITEPROTECT
from daxemu.host.run import zone
from daxemu.uapi import U64_MAX

MEDIA_FD = 1
VOID_FD = 2
"""Descriptors of every agent: the media, and an empty file whose pages all lie beyond its end."""

# asm/unistd_64.h
NR_MMAP = 9
NR_MPROTECT = 10
NR_MUNMAP = 11
NR_MREMAP = 25
NR_MUNLOCK = 150
NR_IOCTL = 16
NR_MSYNC = 26
NR_MADVISE = 28
NR_GETPID = 39
NR_CLOSE = 3
NR_CLONE = 56
NR_FORK = 57
NR_VFORK = 58
NR_EXECVE = 59
NR_PRCTL = 157
NR_FUTEX = 202
NR_EXECVEAT = 322
NR_USERFAULTFD = 323

# uapi/asm-generic/mman-common.h, uapi/linux/mman.h
PROT_NONE = 0
PROT_READ = 1
PROT_WRITE = 2
PROT_EXEC = 4
MAP_SHARED = 0x01
MAP_PRIVATE = 0x02
MAP_FIXED = 0x10
MAP_ANONYMOUS = 0x20
MAP_NORESERVE = 0x4000
MAP_FIXED_NOREPLACE = 0x100000
MADV_DONTNEED = 4
MADV_DONTFORK = 10
MADV_DOFORK = 11
MREMAP_MAYMOVE = 1
MREMAP_FIXED = 2

_NO_FD = 0xFFFF_FFFF
_HERE = -1  # the agent's side puts the address


class Syscall(NamedTuple):
    """System call: number, and arguments as 64-bit register values.

    ``is_guard``: an ioctl(2) whose third argument is the address of the last three. If the ioctl fails, the
    agent makes none of the calls behind it in the packet: the result of each is -ECANCELED.
    """

    number: int
    args: tuple[int, ...]
    is_guard: bool = False


def _marked(number: int, *args: int) -> Syscall:
    """Return a call of at most five arguments with the magic in r9."""
    padded = (*args, 0, 0, 0, 0, 0)[:5]
    return Syscall(number, (*(value & U64_MAX for value in padded), zone.MAGIC << 32))


def _mmap(at: int, length: int, prot: int, flags: int, fd: int, offset: int) -> Syscall:
    return Syscall(NR_MMAP, (at, length, prot, flags, fd | zone.MAGIC << 32, offset))


def mmap_media(
    at: int, length: int, prot: int, shared: bool, offset: int, *, replace: bool = True
) -> Syscall:
    """Map ``length`` bytes of the media from byte ``offset`` at address ``at``.

    ``replace``: whether mappings in the place go (MAP_FIXED), or the call fails with EEXIST.
    """
    flags = (MAP_SHARED if shared else MAP_PRIVATE) | _place(replace)
    return _mmap(at, length, prot, flags, MEDIA_FD, offset)


def mmap_anonymous(at: int, length: int, prot: int, *, replace: bool = True) -> Syscall:
    """Map ``length`` bytes of private zeros at address ``at`` without reserving memory."""
    flags = MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE | _place(replace)
    return _mmap(at, length, prot, flags, _NO_FD, 0)


def mmap_void(at: int, length: int, prot: int, shared: bool = True) -> Syscall:
    """Map ``length`` bytes of an empty file at address ``at``: any access is SIGBUS with BUS_ADRERR."""
    return _mmap(at, length, prot, (MAP_SHARED if shared else MAP_PRIVATE) | MAP_FIXED, VOID_FD, 0)


def munmap(at: int, length: int) -> Syscall:
    """Unmap ``length`` bytes from address ``at`` on."""
    return _marked(NR_MUNMAP, at, length)


def mremap(old: int, old_length: int, new_length: int, new: int | None = None) -> Syscall:
    """Change the length in bytes of the mapping at ``old`` in place, or move the mapping to address ``new``,
    which replaces mappings at ``new`` atomically.
    """
    if new is None:
        return _marked(NR_MREMAP, old, old_length, new_length)
    return _marked(NR_MREMAP, old, old_length, new_length, MREMAP_MAYMOVE | MREMAP_FIXED, new)


def mprotect(at: int, length: int, prot: int) -> Syscall:
    """Change the protection of ``length`` bytes from address ``at`` on."""
    return _marked(NR_MPROTECT, at, length, prot)


def munlock(at: int, length: int) -> Syscall:
    """Unlock ``length`` bytes from address ``at`` on."""
    return Syscall(NR_MUNLOCK, (at, length))


def madvise(at: int, length: int, advice: int) -> Syscall:
    """Give an advice for ``length`` bytes from address ``at`` on."""
    return _marked(NR_MADVISE, at, length, advice)


def guard(at: int, length: int, fd: int) -> Syscall:
    """Fail unless ``length`` bytes from address ``at`` on are registered with the userfaultfd ``fd`` of the
    agent, and no munmap(2) of any range of ``fd`` is under way (UFFDIO_WRITEPROTECT). The bytes become
    write-protected.
    """
    return Syscall(NR_IOCTL, (fd, UFFDIO_WRITEPROTECT, _HERE, at, length, 1), is_guard=True)


def _place(replace: bool) -> int:
    return MAP_FIXED if replace else MAP_FIXED_NOREPLACE
