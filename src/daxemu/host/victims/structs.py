"""Structs of victims.h. The library exports sizes and offsets: a library of other sources is refused."""

from __future__ import annotations

import struct

SIGINFO_SIZE = 128
"""Bytes of a siginfo_t."""

WANTED = struct.Struct("=3Q")
SEARCH = struct.Struct("@2IPI4x")
PROCESS = struct.Struct("=iiIIQ64s")
RUN = struct.Struct("=7Q")
RUNS = struct.Struct("@P2I")
DELIVERY = struct.Struct(f"=2i2I3Q{SIGINFO_SIZE}s{SIGINFO_SIZE}s")
WAIT = struct.Struct("=3i")

SHARED = (WANTED, SEARCH, PROCESS, RUN, RUNS, DELIVERY, WAIT)
"""In the order of daxemu_victims_layout in proc.c."""
