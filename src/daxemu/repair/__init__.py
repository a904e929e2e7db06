"""Repair strategies: classes that recover the data of failed blocks (Protocol: strategy.py).

No kernel filesystem repairs file data under DAX, so the package has no counterpart in Linux. A kernel would
call a strategy between ``->notify_failure`` and kill_procs(). Like the rest of the core, a strategy is
synchronous and does no I/O of the host, except to arrays beside the device (arrays.py).

Invariants
- A strategy changes the filesystem through a :class:`~daxemu.repair.volume.Volume` only.
- A block reported as recovered is readable, and holds the data last written.
"""
