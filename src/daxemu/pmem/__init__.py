"""The persistent-memory device: shared-memory media, its poison, and the interfaces a filesystem uses.

Counterpart in Linux: drivers/nvdimm/pmem.c (``pmem``), block/badblocks.c (``badblocks``), drivers/dax/super.c
(``dax_device``), and the ndctl tool (``device_dir``, ``inject``).

Offsets: *media* offsets count from the start of the media file; *device* offsets count from ``data_offset``,
the first byte after a reserved altmap, and are what a filesystem, badblocks and the command line use.

Invariants
- ``badblocks`` is a subset of the poison: a sector leaves both at once, when something writes over it.
- No byte is read from poison: every read goes through :meth:`DaxDevice.direct_access` or ``read``, which look
  first.
- No store reaches a page of the media that was not reserved before: a full backing store is an ENOSPC at
  reservation, never a SIGBUS in this process.
"""
