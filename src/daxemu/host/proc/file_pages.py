"""Pages of files as the mappings of a process show them just now.

Addresses are bytes, ``FilePage.pgoff`` counts pages. A process that is gone shows nothing.
"""

from __future__ import annotations

from typing import NamedTuple

from daxemu.host.proc import maps


class FilePage(NamedTuple):
    """Page ``pgoff`` of a file anywhere on the host."""

    major: int
    minor: int
    ino: int
    pgoff: int


def page_at(pid: int, address: int) -> FilePage | None:
    """Return the page of a file that a process (or thread) shows at ``address``; None if none."""
    vma = maps.find_vma(pid, address)
    return None if vma is None else _page_of(vma, address)


def find_page(pid: int, page: FilePage, address: int) -> int | None:
    """Return where a process shows ``page``: ``address`` if the page is there, else the first address; None
    if the process does not show the page.
    """
    if page_at(pid, address) == page:
        return address
    try:
        for vma in maps.read(pid):
            there = vma.address_of(page.pgoff)
            if vma.start <= there < vma.end and _page_of(vma, there) == page:
                return there
    except OSError:
        pass
    return None


def _page_of(vma: maps.Vma, address: int) -> FilePage:
    return FilePage(*vma.dev, vma.ino, vma.page_at(address))
