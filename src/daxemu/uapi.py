"""Constants and unit types of the kernel's headers, under the kernel's own names.

Units: a *pfn* counts 4096-byte pages of the physical address space, a *sector* 512 bytes of the device, a
*block* 4096 bytes of the device or of a file. Offsets and lengths without a unit in their name are bytes.
"""

from __future__ import annotations

# Unit types. Aliases instead of NewTypes: an alias documents the unit, and arithmetic needs no casts.
Pfn = int
Sector = int
Block = int
Ino = int

# asm/page_types.h, linux/blk_types.h
PAGE_SHIFT = 12
PAGE_SIZE = 1 << PAGE_SHIFT
SECTOR_SHIFT = 9
SECTOR_SIZE = 1 << SECTOR_SHIFT
PAGE_SECTORS = 1 << (PAGE_SHIFT - SECTOR_SHIFT)
PMD_SHIFT = 21
PMD_SIZE = 1 << PMD_SHIFT
HPAGE_PMD_NR = PMD_SIZE // PAGE_SIZE  # linux/huge_mm.h

# linux/limits.h
U64_MAX = (1 << 64) - 1

# linux/mm.h: flags of memory_failure()
MF_ACTION_REQUIRED = 1 << 1
MF_SW_SIMULATED = 1 << 5
MF_MEM_PRE_REMOVE = 1 << 7

# linux/sched.h: task flags, field 9 of /proc/PID/task/TID/stat
PF_EXITING = 0x00000004
PF_MCE_PROCESS = 0x00000080
PF_KTHREAD = 0x00200000
PF_MCE_EARLY = 0x08000000

# uapi/asm-generic/mman-common.h
MADV_REMOVE = 9
MADV_HWPOISON = 100
MADV_SOFT_OFFLINE = 101

# uapi/linux/capability.h
CAP_FSETID = 4
CAP_LINUX_IMMUTABLE = 9
CAP_SYS_PTRACE = 19
CAP_SYS_ADMIN = 21

# uapi/asm-generic/siginfo.h: si_code of SIGBUS
BUS_ADRERR = 2
BUS_MCEERR_AR = 4
BUS_MCEERR_AO = 5

# uapi/linux/fs.h, linux/fs.h
RENAME_NOREPLACE = 1 << 0
RENAME_EXCHANGE = 1 << 1
RENAME_WHITEOUT = 1 << 2
XATTR_CREATE = 1
XATTR_REPLACE = 2
XATTR_NAME_CAPS = b"security.capability"
NAME_MAX = 255
SYMLINK_MAX = 4095
XATTR_SIZE_MAX = 65536

# uapi/linux/kernel-page-flags.h, linux/kernel-page-flags.h: bits of /proc/kpageflags
KPF_HWPOISON = 19
KPF_NOPAGE = 20
KPF_RESERVED = 32

# uapi/linux/falloc.h
FALLOC_FL_KEEP_SIZE = 0x01
FALLOC_FL_PUNCH_HOLE = 0x02
FALLOC_FL_ZERO_RANGE = 0x10


def page_align_down(offset: int) -> int:
    """Return the start of the page with byte ``offset``."""
    return offset & ~(PAGE_SIZE - 1)


def page_align_up(offset: int) -> int:
    """Return the first page boundary at or after byte ``offset``."""
    return (offset + PAGE_SIZE - 1) & ~(PAGE_SIZE - 1)
