"""The filesystem's invariants, as code (counterpart: xfs_repair -n).

Called by the command line and the tests.
"""

from __future__ import annotations

import stat
from collections import Counter

from daxemu.errors import DaxemuError
from daxemu.fs.filesystem import Filesystem
from daxemu.fs.inode import RESERVED_INO, ROOT_INO, Inode
from daxemu.fs.rmap import METADATA_INO, Link, ReflinkProxy
from daxemu.ranges import RangeSet
from daxemu.uapi import PAGE_SIZE


def fsck(fs: Filesystem) -> list[str]:
    """Return all problems, one line each; an empty list if the filesystem is sound."""
    checks = (
        _check_extents,
        _check_tails,
        _check_media,
        _check_rmap,
        _check_free_space,
        _check_tree,
        _check_store,
    )
    return [problem for check in checks for problem in check(fs)]


def _check_store(fs: Filesystem) -> list[str]:
    try:
        damage = fs.region.damaged_pages(is_clean=fs.store.is_clean)
        return [*(found.line for found in damage), *fs.store.integrity_check()]
    except DaxemuError as error:
        return [str(error)]


def _check_extents(fs: Filesystem) -> list[str]:
    wrong = []
    for inode in fs.names:
        if (inode.extents is not None) != stat.S_ISREG(inode.mode):
            wrong.append(
                f"inode {inode.ino}: extents in a file of mode {inode.mode:o}, or none in a regular one"
            )
        if inode.extents is None:
            continue
        at = blocks = 0
        for link in inode.extents:
            blocks += link.length
            if link.ino != inode.ino:
                wrong.append(f"inode {inode.ino}: holds a link of inode {link.ino}")
            if link.length <= 0 or link.file_block < at:
                wrong.append(f"inode {inode.ino}: links overlap or are empty at block {link.file_block}")
            if link.dev_block < 0 or link.dev_end > fs.allocator.total:
                wrong.append(f"inode {inode.ino}: blocks {link.dev_block}-{link.dev_end} outside the device")
            at = link.file_end
        if blocks != inode.extents.blocks:
            wrong.append(f"inode {inode.ino}: says {inode.extents.blocks} blocks, has {blocks}")
    return wrong


def _check_tails(fs: Filesystem) -> list[str]:
    """Check that bytes of a file's last block beyond the file size are zero."""
    if not fs.store.is_clean and fs.is_read_only:
        return []  # after a crash the next mount zeroes the tails
    wrong = []
    for inode in fs.names:
        tail = inode.size % PAGE_SIZE
        if inode.extents is None or not tail or fs.is_exposed(inode.ino):
            continue
        (run,) = inode.extents.runs(inode.size // PAGE_SIZE, inode.size // PAGE_SIZE + 1)
        if run.link is None or fs.dax.is_poisoned(run.dev_block * PAGE_SIZE, PAGE_SIZE):
            continue
        beyond = bytes(fs.dax.direct_access(run.dev_block * PAGE_SIZE, PAGE_SIZE)[tail:])
        if beyond.count(0) != len(beyond):
            wrong.append(f"inode {inode.ino}: its last block holds bytes other than zero beyond its end")
    return wrong


def _check_media(fs: Filesystem) -> list[str]:
    """Check that pages with poison are not in the media, if processes map the media."""
    return [
        f"page {page.start // PAGE_SIZE} of the device has poison and is in the media: it can be mapped"
        for page in fs.dax.strays()
    ]


def _check_rmap(fs: Filesystem) -> list[str]:
    wrong = []
    mapped = {id(link) for inode in fs.names if inode.extents is not None for link in inode.extents}
    references: Counter[ReflinkProxy] = Counter()
    links: list[Link] = []
    for link in fs.rmap:
        if link.proxy is not None:
            references[link.proxy] += 1
        if link.ino == METADATA_INO:
            links.append(link)
            continue
        if id(link) not in mapped:
            wrong.append(f"{link}: in the reverse map, in no file")
        mapped.discard(id(link))
        links.append(link)
    wrong += [f"{len(mapped)} links of files are not in the reverse map"] if mapped else []
    wrong += [
        f"proxy with reference count {proxy.refcount} has {count} links"
        for proxy, count in references.items()
        if proxy.refcount != count
    ]
    if len(links) != fs.rmap.link_count:
        wrong.append(f"the reverse map counts {fs.rmap.link_count} links and has {len(links)}")
    return wrong + _check_sharing(links)


def _check_sharing(links: list[Link]) -> list[str]:
    """Check that overlapping links hold one proxy, and links without a proxy do not overlap."""
    wrong = []
    active: list[Link] = []
    for link in sorted(links, key=lambda item: item.dev_block):
        active = [other for other in active if other.dev_end > link.dev_block]
        wrong += [
            f"{other} and {link} share blocks without sharing a proxy"
            for other in active
            if link.proxy is None or other.proxy is not link.proxy
        ]
        active.append(link)
    return wrong


def _check_free_space(fs: Filesystem) -> list[str]:
    used = RangeSet((link.dev_block, link.dev_end) for link in fs.rmap)
    free = RangeSet(fs.allocator.free_ranges())
    wrong = [f"block {r.start}-{r.end} is free and in use" for run in used for r in free.overlapping(*run)]
    if used.total + free.total != fs.allocator.total:
        wrong.append(
            f"{used.total} used and {free.total} free blocks, but the device has {fs.allocator.total}"
        )
    return wrong


def _check_tree(fs: Filesystem) -> list[str]:
    wrong = []
    names: Counter[int] = Counter()
    subdirectories: Counter[int] = Counter()
    inodes: dict[int, Inode] = {inode.ino: inode for inode in fs.names}
    for directory in fs.names:
        for name, child in (directory.entries or {}).items():
            there = inodes.get(child)
            if there is None:
                wrong.append(
                    f"directory {directory.ino}: {name!r} leads to inode {child}, which does not exist"
                )
                continue
            names[child] += 1
            if there.is_dir:
                subdirectories[directory.ino] += 1
                if there.parent != directory.ino:
                    wrong.append(
                        f"directory {child}: its parent is {there.parent}, its name is in {directory.ino}"
                    )
    for inode in fs.names:
        if inode.is_dir:
            expected = 2 + subdirectories[inode.ino] if names[inode.ino] or inode.ino == ROOT_INO else 0
        else:
            expected = names[inode.ino] + (inode.ino == RESERVED_INO)
        if inode.nlink != expected:
            wrong.append(f"inode {inode.ino}: link count {inode.nlink}, has {expected}")
        # After a crash the next mount removes orphans.
        is_orphan = fs.is_read_only and not fs.store.is_clean and inode.extents is not None
        if inode.nlink == 0 and inode.pins <= 0 and inode.opens == 0 and not is_orphan:
            wrong.append(f"inode {inode.ino}: unlinked, unused, and still there")
    return wrong + _check_reachable(inodes)


def _check_reachable(inodes: dict[int, Inode]) -> list[str]:
    """Check that every directory with a name is reachable from the root.

    A ring of directories has right link counts, but is not reachable.
    """
    reached: set[int] = set()
    ahead = [ROOT_INO]
    while ahead:
        ino = ahead.pop()
        if ino not in reached and (inode := inodes.get(ino)) is not None and inode.entries is not None:
            reached.add(ino)
            ahead += inode.entries.values()
    return [
        f"directory {inode.ino}: cannot be reached from the root"
        for inode in inodes.values()
        if inode.is_dir and inode.nlink and inode.ino not in reached
    ]
