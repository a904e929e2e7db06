"""page-types: the flags of the struct pages of a mounted DEVICE (tools/mm/page-types.c)."""

from __future__ import annotations

from pathlib import Path

import click

from daxemu.cli.common import DEVICE, as_owner_option, emit, human, json_option, table
from daxemu.cli.output import say, say_json
from daxemu.errors import NotMounted, Unsupported
from daxemu.mm.memmap import Memmap
from daxemu.mm.pfn_kinds import PfnKind
from daxemu.pmem.device_dir import DeviceDir
from daxemu.uapi import KPF_HWPOISON, KPF_NOPAGE, KPF_RESERVED, PAGE_SIZE

NAMES = {KPF_HWPOISON: ("X", "hwpoison"), KPF_NOPAGE: ("n", "nopage"), KPF_RESERVED: ("r", "reserved")}
"""Bit of /proc/kpageflags that a page of a device can have -> letter and word of page-types."""


def kpageflags(kind: PfnKind, hwpoison: bool) -> int:
    """Return the flags of a pfn (``stable_page_flags()``): KPF_NOPAGE for a pfn without a readable struct
    page.
    """
    if kind is not PfnKind.ZONE_DEVICE:
        return 1 << KPF_NOPAGE
    return 1 << KPF_RESERVED | hwpoison << KPF_HWPOISON


def _words(flags: int) -> list[str]:
    return [word for bit, (_, word) in NAMES.items() if flags >> bit & 1]


def _letters(flags: int) -> str:
    return "".join(letter if flags >> bit & 1 else "_" for bit, (letter, _) in NAMES.items())


@click.command()
@click.argument("device", type=DEVICE)
@click.option("--list", "-l", "as_list", is_flag=True, help="Print each range of pfns, not only the counts.")
@as_owner_option
@json_option
def page_types(device: Path, as_list: bool, as_json: bool) -> None:
    """Count the page frames of a mounted DEVICE by the flags of their struct pages.

    Walks every pfn from 0 to the end of the device. The command reads the memory map of the running machine
    directly and does not ask the supervisor. A pfn without a readable struct page is counted by its kind.

    \b
    Example:
      daxemu page-types /dev/shm/pmem0
    """
    directory = DeviceDir.look(device)
    if not directory.config.struct_pages:
        raise Unsupported(
            f"{device} has no struct pages: page-types needs a device made without --no-struct-pages"
        )
    try:
        memmap = Memmap.open(directory.root / "struct_page")
    except FileNotFoundError as error:
        raise NotMounted(
            f"{device} is not mounted, so it has no struct pages: daxemu mount {device} MOUNTPOINT"
        ) from error
    if as_list:
        _print_ranges(memmap, as_json)
    else:
        _print_counts(memmap, as_json)
    memmap.close()


def _print_counts(memmap: Memmap, as_json: bool) -> None:
    found = [(kpageflags(kind, hwpoison), kind, pages) for (kind, hwpoison), pages in memmap.count().items()]
    found.sort(key=lambda each: (list(PfnKind).index(each[1]), each[0]))
    total = sum(pages for _, _, pages in found)
    rows = [
        (
            f"{flags:#018x}",
            str(pages),
            human(pages * PAGE_SIZE),
            _letters(flags),
            kind.value,
            ",".join(_words(flags)),
        )
        for flags, kind, pages in found
    ]
    rows.append(("total", str(total), human(total * PAGE_SIZE), "", "", ""))
    emit(
        {
            "pages": total,
            "types": [
                {"flags": flags, "kind": kind.value, "names": _words(flags), "pages": pages}
                for flags, kind, pages in found
            ],
        },
        as_json,
        lambda: table(rows, ("flags", "pages", "size", "symbolic", "kind", "long-symbolic")),
    )


def _print_ranges(memmap: Memmap, as_json: bool) -> None:
    for pages, kind, hwpoison in memmap.walk():
        flags = kpageflags(kind, hwpoison)
        if not as_json:
            say(f"{pages.start:#x}\t{pages.length:#x}\t{_letters(flags)}\t{kind}", tabs=True)
            continue
        say_json(
            {
                "pfn": pages.start,
                "pages": pages.length,
                "flags": flags,
                "kind": kind.value,
                "names": _words(flags),
            }
        )
