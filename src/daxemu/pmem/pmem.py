"""A pmem device: media, badblocks, dax_device and pagemap tied together (drivers/nvdimm/pmem.c)."""

from __future__ import annotations

from collections.abc import Sequence

from daxemu.errors import InvalidArgument
from daxemu.events import Emit, no_log
from daxemu.mm.memory_failure import MemoryFailures, PfnMapping
from daxemu.mm.pagemap import DevPagemap
from daxemu.mm.pfn_space import PfnAddressSpace
from daxemu.pmem.badblocks import Badblocks
from daxemu.pmem.dax_device import DaxDevice
from daxemu.pmem.device_dir import DeviceDir
from daxemu.pmem.media import Media
from daxemu.pmem.sysfs import Sysfs
from daxemu.ranges import Range, RangeSet
from daxemu.uapi import PAGE_SIZE, Pfn, page_align_down, page_align_up
from daxemu.units import PFN_PHYS, PHYS_PFN, sectors_of


class Pmem:
    """The driver's view of one DEVICE.

    The constructor adds all poison to badblocks, as the first ARS at boot.
    """

    def __init__(self, device: DeviceDir, emit: Emit = no_log, *, is_direct: bool | None = None) -> None:
        """``emit`` gets an event for each call to the holder. ``is_direct``: see Media. Precondition: the
        device's lock is held. Raises NotADevice.
        """
        config = device.config
        self.name = device.name
        self._root = device.root
        self._sysfs: Sysfs | None = None
        self.media = Media(device.root, config.size, is_direct=is_direct)
        self.badblocks = Badblocks()
        altmap_pages = config.altmap // PAGE_SIZE
        self.dax = DaxDevice(
            device.name,
            self.media,
            config.altmap,
            self.badblocks,
            config.base_pfn + altmap_pages,
            config.align,
            self._mkpage_present,
            emit,
        )
        self.pages = Range(config.base_pfn, config.base_pfn + config.size // PAGE_SIZE)
        self.pgmap: DevPagemap | None = None
        """None for memory without struct pages."""
        self._pfn_space = PfnAddressSpace(device.name, self.pages, self)
        if config.struct_pages:
            self.pgmap = DevPagemap(device.name, (self.pages,), ops=self, altmap_pages=altmap_pages)
        for poisoned in self.dax.poisoned(0, self.dax.size):
            sectors = sectors_of(poisoned)
            self.badblocks.set(sectors.start, sectors.length)

    def attach(self, mm: MemoryFailures) -> None:
        """``pmem_attach_disk()``: register the pfns with ``mm``. Raises Busy.

        Registered by memremap_pages(), or by register_pfn_address_space() for memory without struct pages.
        """
        if self.pgmap is not None:
            mm.memremap_pages(self.pgmap)
        else:
            mm.pfn_spaces.register(self._pfn_space)

    def detach(self, mm: MemoryFailures) -> None:
        """``pmem_detach_disk()`` after kill_dax(): unregister the pfns, and remove the struct pages.

        From now on the pfns are outside the control of ``mm`` (memunmap_pages()).
        """
        if self.pgmap is None:
            mm.pfn_spaces.unregister(self._pfn_space)
            return
        mm.memunmap_pages(self.pgmap)
        if self.pgmap.memmap is not None:
            self.pgmap.memmap.remove_pages(self.pages)

    def make_struct_pages(self) -> None:
        """Create the struct pages in ``DEVICE/struct_page``, the other half of devm_memremap_pages().

        Without effect for memory without struct pages. Raises NoSpace.
        """
        if self.pgmap is None:
            return
        from daxemu.mm.memmap import Memmap

        memmap = Memmap.create(self._root / "struct_page", self.pages)
        memmap.add_pages(self.pages, self.pgmap.altmap_pages)
        memmap.memmap_init_zone_device(self.pages)
        self.pgmap.memmap = memmap

    def show_in_sysfs(self) -> Sysfs:
        """Create ``DEVICE/sysfs`` and keep ``badblocks`` there up to date.

        The caller shows the counters. Raises NoSpace.
        """
        sysfs = Sysfs(self._root / "sysfs")
        self._sysfs = sysfs
        self.badblocks.on_change.register(lambda: sysfs.show_badblocks(self.badblocks))
        sysfs.show_badblocks(self.badblocks)
        return sysfs

    def _mkpage_present(self, cleared: Range) -> None:
        """``pmem_mkpage_present()``: clear PG_hwpoison of the pages of ``cleared`` without poison.

        Does nothing while the device has no memmap.
        """
        memmap = self.pgmap.memmap if self.pgmap is not None else None
        if memmap is None:
            return
        start, end = page_align_down(cleared.start), page_align_up(cleared.end)
        poisoned = RangeSet(
            (page_align_down(r.start), page_align_up(r.end)) for r in self.dax.poisoned(start, end - start)
        )
        good = [Range(self.pfn_of(part.start), self.pfn_of(part.end)) for part in poisoned.gaps(start, end)]
        memmap.clear_hwpoison(*good)

    def close(self) -> None:
        """Close the media and remove the struct pages. Precondition: the dax device has no holder."""
        if self.pgmap is not None and self.pgmap.memmap is not None:
            self.pgmap.memmap.discard()
            self.pgmap.memmap = None
        if self._sysfs is not None:
            self._sysfs.close()
        self.media.close()

    def pfn_of(self, offset: int) -> Pfn:
        """Return the pfn of device byte ``offset``."""
        return self.dax.base_pfn + PHYS_PFN(offset)

    def offset_of(self, pfn: Pfn) -> int:
        """Return the first device byte of ``pfn``; negative inside the altmap."""
        return PFN_PHYS(pfn - self.dax.base_pfn)

    def memory_failure(self, pgmap: DevPagemap, pfn: Pfn, nr_pages: int, flags: int) -> None:
        """``pmem_pagemap_memory_failure()``: convert pfns to device bytes and notify the holder."""
        offset = self.offset_of(pfn)
        if offset < 0:
            raise InvalidArgument(f"pfn {pfn:#x} is in the altmap, which holds struct pages and no data")
        self.dax.notify_failure(offset, PFN_PHYS(nr_pages), flags)

    def failure(self, space: PfnAddressSpace, pfn: Pfn, nr_pages: int) -> None:
        """``pfn_address_space_ops.failure``: notify the holder, as with struct pages."""
        self.dax.notify_failure(self.offset_of(pfn), PFN_PHYS(nr_pages), 0)

    def pfn_to_pgoff(self, space: PfnAddressSpace, pfn: Pfn, nr_pages: int) -> Sequence[PfnMapping]:
        """Return no mapping: the driver knows no files.

        The holder names the files by ``mf_dax_kill_procs()``.
        """
        return ()
