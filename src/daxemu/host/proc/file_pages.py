"""Pages of files in the current mappings of a process.

Addresses are bytes, ``FilePage.pgoff`` counts pages. A dead process has no pages.
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


NOWHERE = FilePage(0, 0, 0, 0)
"""Page of a file that no process can have mapped."""


def page_at(pid: int, address: int) -> FilePage | None:
    """Return the page of a file mapped at ``address`` of a process (or thread); None without a mapping."""
    vma = maps.find_vma(pid, address)
    return None if vma is None else _page_of(vma, address)


def find_page(pid: int, page: FilePage, address: int) -> int | None:
    """Return an address at which a process maps ``page``: ``address`` if possible, else the first; None if
    the process does not map the page. ``NOWHERE`` is not mapped, although anonymous memory has its numbers.
    """
    if page == NOWHERE:
        return None
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
