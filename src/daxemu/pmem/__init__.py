"""The persistent-memory device: shared-memory media, poison, and the interfaces for a filesystem.

Counterpart in Linux: drivers/nvdimm/pmem.c (``pmem``), block/badblocks.c (``badblocks``), drivers/dax/super.c
(``dax_device``), and the ndctl tool (``device_dir``, ``inject``).

Offsets: *media* offsets count from the start of the media file. *Device* offsets count from ``data_offset``,
the first byte after a reserved altmap. Filesystem, badblocks and command line use device offsets.

Invariants
- ``badblocks`` is a subset of the poison. A sector leaves both at once, when a write covers the sector.
- No byte is read from poison: every read goes through :meth:`DaxDevice.direct_access` or ``read``, which
  check for poison first.
- No store reaches a page of the media that was not reserved before: a full backing store is an ENOSPC at
  reservation, never a SIGBUS in this process.
"""
