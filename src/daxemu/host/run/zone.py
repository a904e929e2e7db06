"""Addresses of direct mappings, and the mark of an agent's own system calls.

The supervisor places direct mappings in the *zone*, far from every address that the kernel chooses by itself.
The filter therefore knows by address alone which munmap(2) concerns a mount. Only a program that names the
address (MAP_FIXED, or a hint) has a mapping outside the zone: see ``host.direct.outside``.
"""

from __future__ import annotations

SLICE_SIZE = 1 << 40
"""Bytes of the slice of one mount."""

START = 0x2000_0000_0000
END = 0x3000_0000_0000


def has(address: int) -> bool:
    """Return True if an address is in the zone."""
    return START <= address < END


ARENAS = range(END - SLICE_SIZE, END)
"""Last slice of the zone: the code and the slots of agents."""

SLICES = tuple(range(start, start + SLICE_SIZE) for start in range(START, ARENAS.start, SLICE_SIZE))
"""Slice of each mount of one ``daxemu run``."""

MAGIC = 0x6461_7865
"""Upper half of a register that the kernel ignores, in system calls of an agent: the descriptor (argument 4)
of mmap(2), the sixth argument (argument 5) of every other call. The filter allows such a call.
"""
