"""The two filters of ``daxemu run``: which system calls another process answers, and which the kernel.

``small``: madvise(2) with MADV_HWPOISON or MADV_SOFT_OFFLINE. ``direct``, for programs with direct mappings:

========================  ==================================================================================
system call               action
========================  ==================================================================================
mmap                      notify for a file, except by the dynamic loader (below); notify for MAP_FIXED in the
                          zone, which replaces direct mappings
munmap, mprotect,         notify if the address is in the zone
madvise, pkey_mprotect
mremap, msync             notify, at any address: outside the zone no event of the userfaultfd would come
remap_file_pages, mseal   EINVAL if the address is in the zone: the first maps any page of the media, and the
                          second keeps a page that a truncation must unmap
madvise                   notify for MADV_HWPOISON, MADV_SOFT_OFFLINE and MADV_REMOVE, at any address
mlock, mlock2, mlockall   notify: their page faults are no stores, and MCL_FUTURE concerns the agent, too
execve, execveat, fork    notify
clone                     notify without CLONE_VM: a new address space
clone3                    ENOSYS: a filter cannot read its flags; libraries then use clone
mmap, mmap2 of i386; mmap notify for a file, to refuse direct mappings: a slice of the zone has no place below
of x32                    4 GiB. No other call of these programs can concern a direct mapping
========================  ==================================================================================

The dynamic loader of glibc maps libraries with MAP_PRIVATE and MAP_DENYWRITE, which the kernel ignores and no
other program uses. These mappings are the kernel's: some 40 for each execve(2), and each notification takes
several times as long as the mmap(2) (docs/performance.md). Code of a direct mount is therefore never a direct
mapping: execve(2) itself maps the program in the kernel.

Everything else is allowed, and so is a call of an agent (``zone.MAGIC``). Calls that no rule names are
allowed by number alone, which the kernel remembers (``seccomp_cache_check_allow``): no program runs for them.
"""

from __future__ import annotations

import errno
import platform
from enum import IntEnum
from typing import NamedTuple

from daxemu.errors import Unsupported
from daxemu.host.run import zone
from daxemu.host.run.bpf import ARCH, NUMBER, Assembler, high, low
from daxemu.uapi import MADV_HWPOISON, MADV_REMOVE, MADV_SOFT_OFFLINE

# uapi/linux/seccomp.h
RET_ALLOW = 0x7FFF0000
RET_USER_NOTIF = 0x7FC00000
RET_ERRNO = 0x00050000

# uapi/linux/audit.h
AUDIT_ARCH_X86_64 = 0xC000003E
AUDIT_ARCH_I386 = 0x40000003

X32 = 0x40000000  # asm/unistd.h: __X32_SYSCALL_BIT
I386_MMAP, I386_MMAP2 = 90, 192  # asm/unistd_32.h

# uapi/linux/mman.h, uapi/asm-generic/mman.h. MAP_SHARED_VALIDATE has the bit of MAP_SHARED.
MAP_SHARED, MAP_FIXED, MAP_ANONYMOUS, MAP_DENYWRITE = 0x01, 0x10, 0x20, 0x800
CLONE_VM = 0x100  # uapi/linux/sched.h


class Nr(IntEnum):
    """Numbers of system calls of x86_64: asm/unistd_64.h."""

    MMAP = 9
    MPROTECT = 10
    MUNMAP = 11
    MREMAP = 25
    MSYNC = 26
    MADVISE = 28
    CLONE = 56
    FORK = 57
    EXECVE = 59
    MLOCK = 149
    MLOCKALL = 151
    REMAP_FILE_PAGES = 216
    PKEY_MPROTECT = 329
    EXECVEAT = 322
    CLONE3 = 435
    MLOCK2 = 325
    MSEAL = 462


class Abi(NamedTuple):
    """Numbers of one machine."""

    seccomp: int
    madvise: int
    arch: int


_ABI = {"x86_64": Abi(317, Nr.MADVISE, AUDIT_ARCH_X86_64), "aarch64": Abi(277, 233, 0xC00000B7)}


def abi() -> Abi:
    """Return the numbers of this machine. Raises Unsupported for a machine without a filter."""
    try:
        return _ABI[platform.machine()]
    except KeyError:
        raise Unsupported(f"daxemu run does not know the system calls of {platform.machine()}") from None


def small() -> bytes:
    """Return the filter for programs without direct mappings. Raises Unsupported."""
    here = abi()
    bpf = Assembler()
    bpf.load(ARCH)
    bpf.if_equal(here.arch, otherwise="allow")
    bpf.load(NUMBER)
    bpf.if_equal(here.madvise, otherwise="allow")
    bpf.load(low(2))
    bpf.if_equal(MADV_HWPOISON, then="notify")
    bpf.if_equal(MADV_SOFT_OFFLINE, otherwise="allow")
    _actions(bpf)
    return bpf.assemble()


def direct() -> bytes:
    """Return the filter for programs with direct mappings. Raises Unsupported for any machine but x86_64."""
    if abi().arch != AUDIT_ARCH_X86_64:
        raise Unsupported(f"direct mappings need x86_64: this machine is {platform.machine()}")
    bpf = Assembler()
    bpf.load(ARCH)
    bpf.if_equal(AUDIT_ARCH_X86_64, otherwise="another machine")
    bpf.load(NUMBER)
    bpf.if_equal(Nr.MMAP, then="mmap")
    for number in (Nr.MUNMAP, Nr.MPROTECT, Nr.PKEY_MPROTECT):
        bpf.if_equal(number, then="by address")
    for number in (Nr.MREMAP, Nr.MSYNC):
        bpf.if_equal(number, then="unless marked")
    for number in (Nr.REMAP_FILE_PAGES, Nr.MSEAL):
        bpf.if_equal(number, then="refuse in the zone")
    bpf.if_equal(Nr.MADVISE, then="madvise")
    for number in (Nr.FORK, Nr.EXECVE, Nr.EXECVEAT, Nr.MLOCK, Nr.MLOCK2, Nr.MLOCKALL):
        bpf.if_equal(number, then="notify")
    bpf.if_equal(Nr.CLONE, then="clone")
    bpf.if_equal(X32 | Nr.MMAP, then="foreign mmap")
    bpf.if_equal(Nr.CLONE3, then="no such call", otherwise="allow")

    bpf.label("mmap")
    bpf.load(high(4))
    bpf.if_equal(zone.MAGIC, then="allow")
    bpf.load(low(3))
    bpf.if_any_bit(MAP_ANONYMOUS, then="no file to map")
    bpf.if_any_bit(MAP_DENYWRITE, otherwise="notify")
    bpf.if_any_bit(MAP_SHARED, then="notify")
    bpf.label("no file to map")
    bpf.if_any_bit(MAP_FIXED, otherwise="allow")
    _if_in_zone(bpf, then="notify", otherwise="allow")

    bpf.label("madvise")
    bpf.load(low(2))
    bpf.if_equal(MADV_HWPOISON, then="notify")
    bpf.if_equal(MADV_SOFT_OFFLINE, then="notify")
    bpf.if_equal(MADV_REMOVE, then="notify")

    bpf.label("by address")
    _if_in_zone(bpf, otherwise="allow")
    bpf.label("unless marked")
    bpf.load(high(5))
    bpf.if_equal(zone.MAGIC, then="allow", otherwise="notify")

    bpf.label("refuse in the zone")
    _if_in_zone(bpf, then="invalid", otherwise="allow")

    bpf.label("clone")
    bpf.load(low(0))
    bpf.if_any_bit(CLONE_VM, then="allow")
    bpf.load(high(5))
    bpf.if_equal(zone.MAGIC, then="allow", otherwise="notify")

    bpf.label("another machine")
    bpf.if_equal(AUDIT_ARCH_I386, otherwise="allow")
    bpf.load(NUMBER)
    bpf.if_equal(I386_MMAP, then="notify")  # its arguments are in memory, where a filter cannot read
    bpf.if_equal(I386_MMAP2, otherwise="allow")

    bpf.label("foreign mmap")
    bpf.load(low(3))
    bpf.if_any_bit(MAP_ANONYMOUS, then="allow")

    _actions(bpf)
    bpf.label("no such call")
    bpf.give(RET_ERRNO | errno.ENOSYS)
    bpf.label("invalid")
    bpf.give(RET_ERRNO | errno.EINVAL)
    return bpf.assemble()


def _if_in_zone(bpf: Assembler, then: str | None = None, otherwise: str | None = None) -> None:
    """Jump by whether the first argument is an address in the zone."""
    bpf.load(high(0))
    bpf.if_at_least(zone.END >> 32, then=otherwise)
    bpf.if_at_least(zone.START >> 32, then, otherwise)


def _actions(bpf: Assembler) -> None:
    bpf.label("notify")
    bpf.give(RET_USER_NOTIF)
    bpf.label("allow")
    bpf.give(RET_ALLOW)
