"""daxemu: a DAX device, a reflink filesystem on it, and the kernel's memory-failure machinery, in userspace.

Layers, imports only downwards (checked by import-linter):

    cli -> supervisor -> host, client -> repair -> fs -> pmem -> mm -> events, errors, ranges, uapi

``mm``, ``pmem``, ``fs`` and ``repair`` are the core: synchronous, without any I/O of the host. The core
decides, ``host`` acts.
"""

__version__ = "0.1.0"
