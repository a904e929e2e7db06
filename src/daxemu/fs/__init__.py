"""The filesystem: a namespace of inodes, files as extents of device blocks, reflinks, and the way back from a
device range.

Counterpart in Linux: fs/xfs (``xfs_rmap``, ``xfs_reflink``, ``xfs_notify_failure.c``). No pyfuse3 in here:
``host/operations`` translates. Blocks are 4096 bytes; device blocks count from the first data byte of the dax
device.

Invariants (``fsck`` checks each but the reservation)
- One :class:`~daxemu.fs.extents.Link` is one file's claim on one run of device blocks. It is in its file's
  ``ExtentMap`` and in the ``Rmap``, or in neither: only ``ExtentMap`` changes either.
- Links of one file do not overlap in the file. Links that overlap on the device all hold the same
  ``ReflinkProxy``, and a link without a proxy overlaps no other.
- A proxy's reference count is the number of links that hold it. Which proxy stands for a block never changes
  while any link to the block is intact.
- Every device block is free, or has a link, and not both. Blocks with a link are reserved in the media.
- Bytes of a file's last block beyond its size are zero, on the media.

Nothing here awaits; under trio each verb is atomic.
"""
