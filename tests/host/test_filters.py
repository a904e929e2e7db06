"""The filters of daxemu run, executed by an interpreter of classic BPF. tests/host/test_direct_filter.py has
the same filters under the kernel.
"""

from __future__ import annotations

import errno
import struct
from collections.abc import Iterator
from itertools import pairwise

import pytest

from daxemu.errors import Unsupported
from daxemu.host.run import bpf, filters, zone
from daxemu.host.run.filters import AUDIT_ARCH_I386, AUDIT_ARCH_X86_64, X32, Nr
from daxemu.uapi import MADV_HWPOISON, MADV_REMOVE, MADV_SOFT_OFFLINE

ALLOW, NOTIFY, NO_SUCH = filters.RET_ALLOW, filters.RET_USER_NOTIF, filters.RET_ERRNO | errno.ENOSYS
IN_ZONE = zone.SLICES[3].start + 0x5000
BELOW, ABOVE = zone.START - 1, zone.END
USUAL = 0x7F12_3456_7000
FIXED, ANONYMOUS, SHARED, PRIVATE, LOADER = 0x10, 0x20, 1, 2, 0x800
GARBAGE = 0xDEAD_BEEF << 32
AARCH64 = 0xC00000B7
AGENT = zone.MAGIC << 32
CLONE_VM, CLONE_FS = 0x100, 0x200


def executed(code: bytes, number: int, *args: int, arch: int = AUDIT_ARCH_X86_64) -> int:
    """Execute a filter; return its action."""
    data = struct.pack("=iIQ6Q", number, arch, 0x40_1000, *args, *([0] * (6 - len(args))))
    program = [bpf.INSTRUCTION.unpack_from(code, at) for at in range(0, len(code), bpf.INSTRUCTION.size)]
    at, loaded = 0, 0
    while True:
        opcode, then, otherwise, operand = program[at]
        at += 1
        if opcode == bpf.LOAD:
            (loaded,) = struct.unpack_from("=I", data, operand)
        elif opcode == bpf.RETURN:
            return int(operand)
        else:
            holds = {
                bpf.JUMP_EQUAL: loaded == operand,
                bpf.JUMP_GREATER_EQUAL: loaded >= operand,
                bpf.JUMP_ANY_BIT: loaded & operand != 0,
            }[opcode]
            at += then if holds else otherwise


@pytest.fixture(autouse=True)
def _on_x86_64(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("platform.machine", lambda: "x86_64")


def fd(number: int, upper: int = 0) -> int:
    return upper | number


def calls_for_direct() -> Iterator[tuple[int, int, tuple[int, ...]]]:
    """Yield (action, number, arguments)."""
    # mmap(address, length, protection, flags, descriptor, offset)
    for flags in (SHARED, PRIVATE, SHARED | FIXED, 3 | 0x80000):
        yield NOTIFY, Nr.MMAP, (0, 4096, 3, flags, fd(5), 0)
        yield NOTIFY, Nr.MMAP, (IN_ZONE, 4096, 3, flags, fd(5, GARBAGE), 0)
        yield ALLOW, Nr.MMAP, (IN_ZONE, 4096, 3, flags, fd(5, AGENT), 0)
    yield NOTIFY, Nr.MMAP, (0, 4096, 3, GARBAGE | SHARED, fd(5), 0)
    yield ALLOW, Nr.MMAP, (0, 4096, 5, PRIVATE | LOADER, fd(3), 0)
    yield ALLOW, Nr.MMAP, (USUAL, 4096, 5, PRIVATE | LOADER | FIXED, fd(3), 0)
    yield NOTIFY, Nr.MMAP, (IN_ZONE, 4096, 5, PRIVATE | LOADER | FIXED, fd(3), 0)
    yield NOTIFY, Nr.MMAP, (0, 4096, 5, SHARED | LOADER, fd(3), 0)
    yield NOTIFY, Nr.MMAP, (0, 4096, 5, 3 | LOADER, fd(3), 0)
    yield ALLOW, Nr.MMAP, (0, 4096, 3, PRIVATE | ANONYMOUS, 2**64 - 1, 0)
    yield ALLOW, Nr.MMAP, (IN_ZONE, 4096, 3, PRIVATE | ANONYMOUS, 2**64 - 1, 0)  # a hint replaces nothing
    yield ALLOW, Nr.MMAP, (USUAL, 4096, 3, PRIVATE | ANONYMOUS | FIXED, 2**64 - 1, 0)
    yield NOTIFY, Nr.MMAP, (IN_ZONE, 4096, 3, PRIVATE | ANONYMOUS | FIXED, 2**64 - 1, 0)
    yield ALLOW, Nr.MMAP, (IN_ZONE, 4096, 3, PRIVATE | ANONYMOUS | FIXED, fd(0, AGENT), 0)
    for number in (Nr.MUNMAP, Nr.MPROTECT, Nr.MREMAP, Nr.MSYNC, Nr.MADVISE):
        for address in (zone.START, IN_ZONE, zone.ARENAS[0], zone.END - 1):
            yield NOTIFY, number, (address, 4096, 4)
            yield NOTIFY, number, (address, 4096, 4, 0, 0, GARBAGE)
            yield ALLOW, number, (address, 4096, 4, 0, 0, AGENT)
            yield ALLOW, number, (address, 4096, 4, 0, 0, AGENT | 0xFFFF_FFFF)
        # munmap(2) elsewhere is an event of the userfaultfd; mremap(2) and msync(2) elsewhere are not.
        elsewhere = NOTIFY if number in (Nr.MREMAP, Nr.MSYNC) else ALLOW
        for address in (0, USUAL, BELOW, ABOVE, 2**64 - 4096):
            yield elsewhere, number, (address, 4096, 4)
            yield ALLOW, number, (address, 4096, 4, 0, 0, AGENT)
    for advice in (MADV_HWPOISON, MADV_SOFT_OFFLINE, MADV_REMOVE):
        for address in (USUAL, IN_ZONE):
            yield NOTIFY, Nr.MADVISE, (address, 4096, advice)
            yield NOTIFY, Nr.MADVISE, (address, 4096, advice | GARBAGE)
    yield ALLOW, Nr.MADVISE, (USUAL, 4096, MADV_HWPOISON + 2)
    for number in (Nr.FORK, Nr.EXECVE, Nr.EXECVEAT, Nr.MLOCK, Nr.MLOCK2, Nr.MLOCKALL):
        yield NOTIFY, number, ()
    yield NOTIFY, Nr.CLONE, (17,)
    yield NOTIFY, Nr.CLONE, (CLONE_FS | 17,)
    yield NOTIFY, Nr.CLONE, (CLONE_VM << 32 | 17,)
    yield ALLOW, Nr.CLONE, (CLONE_VM | 17,)
    yield NO_SUCH, Nr.CLONE3, (USUAL, 88)
    concerned = {*Nr}
    for other in range(600):
        if other not in concerned:
            yield ALLOW, other, (IN_ZONE, 4096, MADV_HWPOISON, PRIVATE, 5, 0)
    yield ALLOW, 2**31 - 1, ()
    yield ALLOW, -1, ()


def test_direct() -> None:
    code = filters.direct()
    for action, number, args in calls_for_direct():
        found = executed(code, number, *args)
        assert found == action, f"{number} {[hex(arg) for arg in args]}: {found:#x}"


@pytest.mark.parametrize(
    ("action", "arch", "number", "args"),
    [
        (NOTIFY, AUDIT_ARCH_I386, filters.I386_MMAP2, (0, 4096, 3, SHARED, 5, 0)),
        (ALLOW, AUDIT_ARCH_I386, filters.I386_MMAP2, (0, 4096, 3, PRIVATE | ANONYMOUS, 2**32 - 1, 0)),
        (NOTIFY, AUDIT_ARCH_I386, filters.I386_MMAP, (0x1000,)),
        (ALLOW, AUDIT_ARCH_I386, Nr.MMAP, (0, 4096, 3, SHARED, 5, 0)),  # 9 is link(2) there
        (ALLOW, AUDIT_ARCH_I386, 435, ()),
        (ALLOW, AUDIT_ARCH_I386, 2, ()),
        (NOTIFY, AUDIT_ARCH_X86_64, X32 | Nr.MMAP, (0, 4096, 3, SHARED, 5, 0)),
        (ALLOW, AUDIT_ARCH_X86_64, X32 | Nr.MMAP, (0, 4096, 3, PRIVATE | ANONYMOUS, 5, 0)),
        (ALLOW, AUDIT_ARCH_X86_64, X32 | Nr.MUNMAP, (USUAL, 4096)),
        (ALLOW, AARCH64, Nr.MMAP, (0, 4096, 3, SHARED, 5, 0)),
    ],
)
def test_other_machines(action: int, arch: int, number: int, args: tuple[int, ...]) -> None:
    assert executed(filters.direct(), number, *args, arch=arch) == action


def test_small() -> None:
    """Only the two advices are notified; no other call depends on the zone."""
    code = filters.small()
    for advice in (MADV_HWPOISON, MADV_SOFT_OFFLINE):
        assert executed(code, Nr.MADVISE, USUAL, 4096, GARBAGE | advice) == NOTIFY
    assert executed(code, Nr.MADVISE, IN_ZONE, 4096, 4) == ALLOW
    for number in range(600):
        if number != Nr.MADVISE:
            assert executed(code, number, IN_ZONE, 4096, MADV_HWPOISON, PRIVATE, 5) == ALLOW
    assert executed(code, Nr.MADVISE, USUAL, 4096, MADV_HWPOISON, arch=AUDIT_ARCH_I386) == ALLOW


def test_small_on_aarch64(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("platform.machine", lambda: "aarch64")
    code = filters.small()
    assert executed(code, 233, USUAL, 4096, MADV_HWPOISON, arch=AARCH64) == NOTIFY
    assert executed(code, Nr.MADVISE, USUAL, 4096, MADV_HWPOISON, arch=AARCH64) == ALLOW
    with pytest.raises(Unsupported, match="direct mappings need x86_64"):
        filters.direct()


def test_another_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("platform.machine", lambda: "riscv64")
    with pytest.raises(Unsupported, match="riscv64"):
        filters.small()


def test_slices_cover_the_zone() -> None:
    ranges = [*zone.SLICES, zone.ARENAS]
    assert ranges[0].start == zone.START
    assert ranges[-1].stop == zone.END
    assert all(one.stop == other.start for one, other in pairwise(ranges))
