"""The plain model for test_model.py: files are tables of page objects, shared by being the same object."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

from daxemu.uapi import PAGE_SIZE, SECTOR_SIZE, Ino


@dataclass(eq=False)
class Page:
    """A block that is in use: its bytes, and which of its sectors are poison."""

    data: bytearray = field(default_factory=lambda: bytearray(PAGE_SIZE))
    bad: set[int] = field(default_factory=set)


@dataclass(eq=False)
class File:
    """``pages`` holds no holes; a file lives as long as it has names or is open."""

    ino: Ino
    size: int = 0
    pages: dict[int, Page] = field(default_factory=dict)
    opens: int = 0


class Model:
    """What a filesystem should hold. Every verb first says, by ``None`` or a word, what must happen."""

    def __init__(self) -> None:
        self.names: dict[bytes, File] = {}
        self.open_files: list[File] = []
        self.given_up: set[Page] = set()
        """Blocks that lost a user since the last commit, and have another: shared until the next."""

    @property
    def files(self) -> list[File]:
        """Every file that is there, once."""
        return list(dict.fromkeys([*self.names.values(), *self.open_files]))

    def links_of(self, page: Page) -> int:
        """How many places in files use this block."""
        return sum(other is page for file in self.files for other in file.pages.values())

    def is_shared(self, page: Page) -> bool:
        """Whether a store needs another block than this."""
        return self.links_of(page) > 1 or page in self.given_up

    def counts(self) -> Counter[Page]:
        """The same for every block."""
        return Counter(page for file in self.files for page in file.pages.values())

    def after_crash(self) -> Model:
        """What a mount will find: names, sizes and places as they are now, bytes as they are by then."""
        then = Model()
        copies = {file: File(file.ino, file.size, dict(file.pages)) for file in self.names.values()}
        then.names = {name: copies[file] for name, file in self.names.items()}
        return then

    # -- writing

    def needed(self, file: File, offset: int, length: int) -> int:
        """How many new blocks a store takes: holes, and blocks that others use too."""
        touched = (file.pages.get(i) for i in _indexes(offset, length))
        return sum(page is None or self.is_shared(page) for page in touched)

    def meets_poison(self, file: File, offset: int, length: int) -> bool:
        """Whether an edge of the range cuts a page that is poison."""
        edges = [edge // PAGE_SIZE for edge in (offset, offset + length) if edge % PAGE_SIZE]
        return any(i in file.pages and file.pages[i].bad for i in edges)

    def write(
        self, file: File, offset: int, data: bytes, *, from_cache: bool = False, grow: bool = True
    ) -> list[int]:
        """Store; returns the page indexes whose store was lost to poison."""
        lost = []
        counts = self.counts()  # as it was before: all blocks of one store are treated alike
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
        if grow:
            file.size = max(file.size, offset + len(data))
        return lost

    def truncate(self, file: File, size: int) -> None:
        """The end moves; what is cut off is gone, and reads as zeros if the file grows again."""
        if size < file.size and size % PAGE_SIZE and size // PAGE_SIZE in file.pages:
            self.write(file, size, bytes(PAGE_SIZE - size % PAGE_SIZE), grow=False)
        if size < file.size:
            file.pages = {i: page for i, page in file.pages.items() if i * PAGE_SIZE < size}
        file.size = size

    def preallocate(self, file: File, first: int, last: int) -> None:
        """Holes become blocks of zeros."""
        for i in range(first, last):
            file.pages.setdefault(i, Page())

    def punch(self, file: File, offset: int, length: int) -> None:
        """Zeros: edges are written, whole blocks go."""
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
        """The rules of FICLONERANGE."""
        end = src_offset + length
        if src_offset % PAGE_SIZE or dst_offset % PAGE_SIZE or length <= 0 or end > src.size:
            return False
        if end % PAGE_SIZE and (end != src.size or dst_offset + length < dst.size):
            return False
        return src is not dst or abs(src_offset - dst_offset) >= length

    @staticmethod
    def clone(src: File, src_offset: int, dst: File, dst_offset: int, length: int) -> None:
        """``dst`` gets ``src``'s very pages, and holes where it has holes."""
        for i in _indexes(0, length):
            page = src.pages.get(src_offset // PAGE_SIZE + i)
            dst.pages.pop(dst_offset // PAGE_SIZE + i, None)
            if page is not None:
                dst.pages[dst_offset // PAGE_SIZE + i] = page
        dst.size = max(dst.size, dst_offset + length)

    # -- names

    def unlink(self, name: bytes) -> None:
        """The name goes; the file may live on by others, or by being open."""
        del self.names[name]

    def rename(self, old: bytes, new: bytes) -> None:
        """``new`` is replaced, unless both are the same file."""
        if self.names.get(new) is not self.names[old]:
            self.names[new] = self.names.pop(old)

    # -- poison

    @staticmethod
    def poison(file: File, offset: int, length: int) -> None:
        """Sectors of every page in the range go bad; holes have no media."""
        for page, sectors in _sectors(file, offset, length):
            page.bad |= sectors

    @staticmethod
    def clear(file: File, offset: int, length: int) -> None:
        """Bad sectors of the range become good and zero."""
        for page, sectors in _sectors(file, offset, length):
            for sector in sectors & page.bad:
                page.data[sector * SECTOR_SIZE : (sector + 1) * SECTOR_SIZE] = bytes(SECTOR_SIZE)
            page.bad -= sectors

    # -- reading

    @staticmethod
    def content(file: File) -> bytes:
        """All bytes, poison or not."""
        whole = bytearray(-(-file.size // PAGE_SIZE) * PAGE_SIZE)
        for i, page in file.pages.items():
            whole[i * PAGE_SIZE : (i + 1) * PAGE_SIZE] = page.data
        return bytes(whole[: file.size])

    @staticmethod
    def bad_pages(file: File) -> list[int]:
        """Indexes of the pages that cannot be read, in order; what lies beyond the end is never read."""
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
