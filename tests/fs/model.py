"""The plain model for test_model.py: files are tables of page objects, shared as the same object."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

from daxemu.uapi import PAGE_SIZE, SECTOR_SIZE, Ino


@dataclass(eq=False)
class Page:
    """A used block: bytes, and the numbers of poisoned sectors."""

    data: bytearray = field(default_factory=lambda: bytearray(PAGE_SIZE))
    bad: set[int] = field(default_factory=set)


@dataclass(eq=False)
class File:
    """``pages`` has no holes. A file lives while it has a name or is open."""

    ino: Ino
    size: int = 0
    pages: dict[int, Page] = field(default_factory=dict)
    opens: int = 0


class Model:
    """The expected state of a filesystem. Verbs change the model; queries predict the outcome of a verb."""

    def __init__(self) -> None:
        self.names: dict[bytes, File] = {}
        self.open_files: list[File] = []
        self.given_up: set[Page] = set()
        """Blocks that lost an owner since the last commit and have another. Shared until the next commit."""

    @property
    def files(self) -> list[File]:
        """Every file, once."""
        return list(dict.fromkeys([*self.names.values(), *self.open_files]))

    def links_of(self, page: Page) -> int:
        """Return the number of file pages backed by the block."""
        return sum(other is page for file in self.files for other in file.pages.values())

    def is_shared(self, page: Page) -> bool:
        """Return True if a store must go to a new block."""
        return self.links_of(page) > 1 or page in self.given_up

    def counts(self) -> Counter[Page]:
        """Return the number of file pages for every block."""
        return Counter(page for file in self.files for page in file.pages.values())

    def after_crash(self) -> Model:
        """Return the model of a mount after a crash.

        Names, sizes and places are copied. Pages stay the same objects, so later changes of bytes show.
        """
        then = Model()
        copies = {file: File(file.ino, file.size, dict(file.pages)) for file in self.names.values()}
        then.names = {name: copies[file] for name, file in self.names.items()}
        return then

    # -- writing

    def needed(self, file: File, offset: int, length: int) -> int:
        """Return the number of new blocks for a store: one for each hole and each shared block."""
        touched = (file.pages.get(i) for i in _indexes(offset, length))
        return sum(page is None or self.is_shared(page) for page in touched)

    def meets_poison(self, file: File, offset: int, length: int) -> bool:
        """Return True if an edge of the range lies inside a poisoned page."""
        edges = [edge // PAGE_SIZE for edge in (offset, offset + length) if edge % PAGE_SIZE]
        return any(i in file.pages and file.pages[i].bad for i in edges)

    def write(
        self, file: File, offset: int, data: bytes, *, from_cache: bool = False, grow: bool = True
    ) -> list[int]:
        """Store ``data``. Return the indexes of pages whose store was lost to poison.

        A store of no bytes changes nothing, not even the size (generic_write_checks()).
        """
        lost = []
        counts = self.counts()  # before the store: all blocks of one store are handled alike
        for index in _indexes(offset, len(data)):
            low, high = max(offset, index * PAGE_SIZE), min(offset + len(data), (index + 1) * PAGE_SIZE)
            page = file.pages.get(index)
            if page is None:
                page = file.pages[index] = Page()
            elif counts[page] > 1 or page in self.given_up:
                page = file.pages[index] = Page(bytearray(PAGE_SIZE) if page.bad else page.data[:])
            elif page.bad and from_cache:
                lost.append(index)
                continue
            page.bad.clear()
            page.data[low - index * PAGE_SIZE : high - index * PAGE_SIZE] = data[low - offset : high - offset]
        if grow and data:
            file.size = max(file.size, offset + len(data))
        return lost

    def truncate(self, file: File, size: int) -> None:
        """Move the end. Bytes cut off read as zeros if the file grows again."""
        if size < file.size and size % PAGE_SIZE and size // PAGE_SIZE in file.pages:
            self.write(file, size, bytes(PAGE_SIZE - size % PAGE_SIZE), grow=False)
        if size < file.size:
            file.pages = {i: page for i, page in file.pages.items() if i * PAGE_SIZE < size}
        file.size = size

    def preallocate(self, file: File, first: int, last: int) -> None:
        """Replace holes by blocks of zeros."""
        for i in range(first, last):
            file.pages.setdefault(i, Page())

    def punch(self, file: File, offset: int, length: int) -> None:
        """Zero the range: edges are written, whole blocks removed."""
        end = offset + length
        for i in _indexes(offset, length):
            low, high = max(offset, i * PAGE_SIZE), min(end, (i + 1) * PAGE_SIZE)
            if i in file.pages and high - low < PAGE_SIZE:
                self.write(file, low, bytes(high - low), grow=False)
            else:
                file.pages.pop(i, None)

    # -- sharing

    @staticmethod
    def may_clone(src: File, src_offset: int, dst: File, dst_offset: int, length: int) -> bool:
        """Return True if FICLONERANGE allows the range."""
        end = src_offset + length
        if src_offset % PAGE_SIZE or dst_offset % PAGE_SIZE or length <= 0 or end > src.size:
            return False
        if end % PAGE_SIZE and (end != src.size or dst_offset + length < dst.size):
            return False
        return src is not dst or abs(src_offset - dst_offset) >= length

    @staticmethod
    def clone(src: File, src_offset: int, dst: File, dst_offset: int, length: int) -> None:
        """Put ``src``'s page objects into ``dst``, and holes for holes."""
        for i in _indexes(0, length):
            page = src.pages.get(src_offset // PAGE_SIZE + i)
            dst.pages.pop(dst_offset // PAGE_SIZE + i, None)
            if page is not None:
                dst.pages[dst_offset // PAGE_SIZE + i] = page
        dst.size = max(dst.size, dst_offset + length)

    # -- names

    def unlink(self, name: bytes) -> None:
        """Remove the name. The file lives on while it has other names or is open."""
        del self.names[name]

    def rename(self, old: bytes, new: bytes) -> None:
        """Replace ``new`` by ``old``, unless both are the same file."""
        if self.names.get(new) is not self.names[old]:
            self.names[new] = self.names.pop(old)

    # -- poison

    @staticmethod
    def poison(file: File, offset: int, length: int) -> None:
        """Poison sectors of every page in the range. Holes have no media."""
        for page, sectors in _sectors(file, offset, length):
            page.bad |= sectors

    @staticmethod
    def clear(file: File, offset: int, length: int) -> None:
        """Clear the poisoned sectors of the range, and zero them."""
        for page, sectors in _sectors(file, offset, length):
            for sector in sectors & page.bad:
                page.data[sector * SECTOR_SIZE : (sector + 1) * SECTOR_SIZE] = bytes(SECTOR_SIZE)
            page.bad -= sectors

    # -- reading

    @staticmethod
    def content(file: File) -> bytes:
        """Return all bytes, including poisoned bytes."""
        whole = bytearray(-(-file.size // PAGE_SIZE) * PAGE_SIZE)
        for i, page in file.pages.items():
            whole[i * PAGE_SIZE : (i + 1) * PAGE_SIZE] = page.data
        return bytes(whole[: file.size])

    @staticmethod
    def bad_pages(file: File) -> list[int]:
        """Return the indexes of unreadable pages, in order. Pages beyond the end are never read."""
        return sorted(i for i, page in file.pages.items() if page.bad and i * PAGE_SIZE < file.size)


def _indexes(offset: int, length: int) -> range:
    return range(offset // PAGE_SIZE, -(-(offset + length) // PAGE_SIZE)) if length else range(0)


def _sectors(file: File, offset: int, length: int) -> list[tuple[Page, set[int]]]:
    found = []
    for i in _indexes(offset, length):
        if i in file.pages:
            base = i * PAGE_SIZE
            low = max(offset - base, 0) // SECTOR_SIZE
            high = -(-min(offset + length - base, PAGE_SIZE) // SECTOR_SIZE)
            found.append((file.pages[i], set(range(low, high))))
    return found
