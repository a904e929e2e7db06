"""Limits of the kernel for an address space: VMAs, addresses, locked memory."""

from __future__ import annotations

_MAX_MAP_COUNT = "/proc/sys/vm/max_map_count"


def most_pieces() -> int:
    """Return the largest number of shown pieces of an address space.

    A piece counts for two VMAs. A quarter of vm.max_map_count is left to the program.
    """
    with open(_MAX_MAP_COUNT, encoding="ascii") as file:
        return int(file.read()) * 3 // 8
