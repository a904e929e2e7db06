"""The filesystem: inodes with names, files as extents of device blocks, reflinks, and the reverse map.

Counterpart in Linux: fs/xfs (``xfs_rmap``, ``xfs_reflink``, ``xfs_notify_failure.c``). The package does not
import pyfuse3; ``host/fuse/operations`` translates. Blocks are 4096 bytes. Device blocks count from the first
data byte of the dax device.

Invariants (``fsck`` checks each but the reservation)
- A :class:`~daxemu.fs.extents.Link` is one file's claim on one run of device blocks. A link is either in the
  ``ExtentMap`` of the file and in the ``Rmap``, or in neither: only ``ExtentMap`` changes the two.
- Links of one file do not overlap in the file. Links that overlap on the device all hold the same
  ``ReflinkProxy``. A link without a proxy overlaps no other link.
- The reference count of a proxy is the number of links with the proxy. The proxy of a block never changes
  while any link to the block is intact.
- Every device block is free, or has a link, and not both. Blocks with a link are reserved in the media.
- Bytes of a file's last block beyond the file size are zero on the media.

The package has no await: under trio each verb is atomic.
"""
