"""One pmem device: media, badblocks, dax_device and dev_pagemap tied together (drivers/nvdimm/pmem.c)."""

from __future__ import annotations

from daxemu.errors import InvalidArgument
from daxemu.mm.pagemap import DevPagemap
from daxemu.pmem.badblocks import Badblocks
from daxemu.pmem.dax_device import DaxDevice
from daxemu.pmem.device_dir import DeviceDir
from daxemu.pmem.media import Media
from daxemu.ranges import Range
from daxemu.uapi import PAGE_SHIFT, PAGE_SIZE, SECTOR_SIZE, Pfn


class Pmem:
    """The driver's view of one DEVICE. Probing it finds all poison that is there (the first ARS at boot)."""

    def __init__(self, device: DeviceDir) -> None:
        """Precondition: the device's lock is held. Raises NotADevice."""
        config = device.config
        self.name = device.name
        self.media = Media(device.path, config.size)
        self.badblocks = Badblocks()
        altmap_pages = config.altmap // PAGE_SIZE
        self.dax = DaxDevice(
            device.name, self.media, config.altmap, self.badblocks, config.base_pfn + altmap_pages
        )
        self.pgmap = DevPagemap(
            device.name,
            (Range(config.base_pfn, config.base_pfn + config.size // PAGE_SIZE),),
            ops=self,
            altmap_pages=altmap_pages,
        )
        for bad in self.dax.poisoned(0, self.dax.size):
            self.badblocks.set(bad.start // SECTOR_SIZE, bad.length // SECTOR_SIZE)

    def close(self) -> None:
        """Give the media back. Precondition: nobody holds the dax device."""
        self.media.close()

    def pfn_of(self, offset: int) -> Pfn:
        """The page frame that holds device byte ``offset``."""
        return self.dax.base_pfn + (offset >> PAGE_SHIFT)

    def offset_of(self, pfn: Pfn) -> int:
        """The device byte at which page frame ``pfn`` starts; negative inside the altmap."""
        return (pfn - self.dax.base_pfn) << PAGE_SHIFT

    def memory_failure(self, pgmap: DevPagemap, pfn: Pfn, nr_pages: int, flags: int) -> None:
        """``pmem_pagemap_memory_failure()``: pfns become device bytes, and the holder is told."""
        offset = self.offset_of(pfn)
        if offset < 0:
            raise InvalidArgument(f"pfn {pfn:#x} holds struct pages, no data")
        self.dax.notify_failure(offset, nr_pages << PAGE_SHIFT, flags)
