"""Repair strategies: what to do about data that went bad. One file each, behind one Protocol (strategy.py).

No kernel filesystem repairs file data under DAX, so this has no counterpart there but the place it would be
called from: between ``->notify_failure`` and kill_procs(). Like the rest of the core it is synchronous and
does no I/O of the host, but for its own arrays beside the device (arrays.py).

Invariants: a strategy changes the filesystem through its :class:`~daxemu.repair.volume.Volume` only; what it
says it recovered can be read, and is what was last written.
"""
