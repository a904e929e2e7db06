"""Media: the bytes of a device in shared memory, and the poisoned sectors of the hardware."""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import NamedTuple

from daxemu.errors import MediaError, NoSpace, NotADevice, PermissionDenied
from daxemu.pmem import backing
from daxemu.pmem.kept import KeptPages
from daxemu.private_path import PrivatePath
from daxemu.ranges import Range, RangeSet
from daxemu.uapi import PAGE_SECTORS, PAGE_SIZE
from daxemu.units import blocks_of_sectors, byte_span, bytes_of_sectors, round_up, sector_at, sectors_at

_POISON_STEP = 4096  # the file of poisoned sectors has whole pages, filled up with empty lines
_FEW = 512
"""Number of poison ranges up to which each change rewrites the whole file."""
_CLEARED = "clear "

_libc = ctypes.CDLL(None, use_errno=True)
_NR_CACHESTAT = 451  # on every architecture


class Memory(NamedTuple):
    """Place of bytes, for C code: in an open file from ``offset`` on, and mapped at ``address``."""

    fd: int
    offset: int
    address: int


class Media:
    """Media of one device: ``size`` bytes of a sparse file, mapped shared, and the poison.

    Poison is recorded in sectors and written to the file ``poison`` at each change, so that poison outlives
    the process. With many ranges, a change is appended to the file: the cost depends on the changed ranges
    only.
    """

    def __init__(self, directory: PrivatePath, size: int, *, is_direct: bool | None = None) -> None:
        """Map the media. ``is_direct``: True if processes will map the media, None as it was left.

        Raises NotADevice for missing files or a size other than ``size``, Unsupported if the media does not
        fit into the address space, NoSpace if ``is_direct`` is another than before.
        """
        self.size = size
        self._kept: KeptPages | None = None
        self._poison_file = directory / "poison"
        try:
            self._fd = (directory / "media").open(os.O_RDWR)
        except OSError as error:
            raise NotADevice(
                f"{directory}/media: {error.strerror}; "
                "use it as its owner, restore it, or make a new device with daxemu mkfs"
            ) from error
        found = os.fstat(self._fd).st_size
        if found != size:
            os.close(self._fd)
            raise NotADevice(
                f"{directory}/media has {found} bytes, device.toml says {size}: restore the one that is wrong"
            )
        self.poison = RangeSet()
        self._poison_lines = self._poison_end = 0
        """Number of lines of the file, and bytes up to the end of the last line."""
        try:
            self._load_poison()
            self._map = self._mapped()
        except BaseException:
            os.close(self._fd)
            raise
        self._view = memoryview(self._map)
        self._is_saved = False
        """True while clears are recorded already (see ``clearing``)."""
        try:
            self._choose(directory, is_direct)
        except BaseException:
            self.close()
            raise

    def _mapped(self) -> mmap.mmap:
        try:
            return mmap.mmap(self._fd, self.size)
        except OSError as error:
            if error.errno != errno.ENOMEM:
                raise
            raise backing.too_large(self.size) from error

    @staticmethod
    def create(directory: PrivatePath, size: int) -> None:
        """Make the files of new media without poison."""
        media = (directory / "media").make(os.O_RDWR)
        try:
            os.ftruncate(media, size)
        finally:
            os.close(media)
        (directory / "poison").write_bytes(b"\n" * _POISON_STEP)

    def close(self) -> None:
        """Unmap. Precondition: no view handed out by :meth:`view` is alive."""
        self._view.release()
        with suppress(BufferError):  # a traceback may hold views: the last view unmaps
            self._map.close()
        os.close(self._fd)
        if self._kept is not None:
            self._kept.close()

    # -- bytes

    def view(self, offset: int, length: int) -> memoryview:
        """Return the live bytes, writable. Precondition: reserved; the caller has checked for poison.

        The readable bytes of a page put aside are those of the kept copy. Raises MediaError for a range that
        lies on such pages in part: see :meth:`pieces`.
        """
        found = self.pieces(offset, length)
        if len(found) > 1:
            raise MediaError(f"a part of the media at {offset:#x}+{length:#x} is on pages with poison")
        return self._piece(found[0]) if found else self._view[offset:offset]

    def pieces(self, offset: int, length: int) -> list[Range]:
        """Return the range in pieces that :meth:`view` takes: pages put aside, and others."""
        whole = Range(offset, offset + length)
        if not self.has_aside(offset, length):
            return [whole] if whole else []
        aside = self._aside_in(offset, length)
        parts = [part.clip(*whole) for part in aside]
        return sorted([*parts, *aside.gaps(*whole)])

    def _piece(self, part: Range) -> memoryview:
        if self._kept is not None and self.has_aside(*_span(part)):
            return self._kept.view(*_span(part))
        return self._view[part.start : part.end]

    def store(self, offset: int, data: bytes | memoryview) -> None:
        """Write to unused memory, reserved or not. Faster than a write through a view: whole pages are
        neither zeroed before nor faulted in. Raises NoSpace.
        """
        rest = memoryview(data)
        while rest:
            try:
                done = os.pwrite(self._fd, rest, offset)
            except OSError:  # full, or a limit on the size of files, which does not count for mappings
                done = len(rest)
                backing.reserve(self._fd, offset, done)
                self._view[offset : offset + done] = rest
            offset, rest = offset + done, rest[done:]

    def overwrite(self, offset: int, data: bytes | memoryview) -> None:
        """Write over readable bytes, reserved or not. Raises NoSpace."""
        for part in self.pieces(offset, len(data)):
            chunk = memoryview(data)[part.start - offset : part.end - offset]
            if self._kept is not None and self.has_aside(*_span(part)):
                self._kept.put(part.start, chunk)
            else:
                self.store(part.start, chunk)

    def reserve(self, offset: int, length: int) -> None:
        """Back the range with memory, except pages put aside. Raises NoSpace if the host has no memory left;
        then nothing is reserved.
        """
        if not self.has_aside(offset, length):
            backing.reserve(self._fd, offset, length)
            return
        for part in self._aside_in(offset, length).gaps(offset, offset + length):
            backing.reserve(self._fd, *_span(part))

    def release(self, offset: int, length: int) -> None:
        """Give the memory of the range back. After the next reserve, the range reads as zeros."""
        backing.punch(self._fd, offset, length)
        if self._kept is not None:
            self._kept.zero(offset, length)

    def count_pages(self, offset: int, length: int) -> int | None:
        """Return the number of pages of memory behind the range; None where cachestat(2) is missing (before
        Linux 6.5). The cost is in proportion to these pages, not to the range.
        """
        counts = (ctypes.c_uint64 * 5)()  # struct cachestat: nr_cache first
        part = (ctypes.c_uint64 * 2)(offset, length)
        if _libc.syscall(_NR_CACHESTAT, self._fd, part, counts, 0) != 0:
            return None
        return counts[0]

    def written(self) -> Iterator[memoryview]:
        """Yield the bytes of each run that the backing file has data for, whole pages, poisoned ones too.
        Pages put aside have no data.
        """
        for run in backing.data_runs(self._fd):
            yield self._view[run.start : run.end]

    def memory(self, offset: int) -> Memory:
        """Return the place of the bytes from ``offset`` on. Valid until :meth:`close`."""
        return Memory(self._fd, offset, ctypes.addressof(ctypes.c_char.from_buffer(self._map)) + offset)

    # -- pages put aside

    @property
    def is_direct(self) -> bool:
        """True if processes map the media: pages with poison are put aside."""
        return self._kept is not None

    def has_aside(self, offset: int, length: int) -> bool:
        """Return True if any page of the range is put aside: punched out of the media."""
        if self._kept is None or not self.poison or length <= 0:
            return False
        return self.poison.overlaps(*_sectors_of_pages(offset, length))

    def strays(self) -> Iterator[Range]:
        """Yield pages, in bytes, that are put aside and have memory in the media all the same: none, unless
        another program has written to the media. SEEK_DATA finds no page that is only reserved.
        """
        for sectors in self.poison if self._kept is not None else ():
            pages = bytes_of_sectors(sectors).outer(PAGE_SIZE)
            if self.count_pages(*_span(pages)) or backing.has_data(self._fd, pages):
                yield pages

    def drop_strays(self, offset: int, length: int) -> None:
        """Take the memory of pages away that are put aside: a touch through a mapping that no userfaultfd
        watched has made pages of zeros.
        """
        if self._kept is not None:
            for part in self._aside_in(offset, length).overlapping(offset, offset + length):
                backing.punch(self._fd, *_span(part))

    def _aside_in(self, offset: int, length: int) -> RangeSet:
        """Return the bytes of the pages of the range that are put aside."""
        poisoned = self.poison.overlapping(*_sectors_of_pages(offset, length))
        return RangeSet(bytes_of_sectors(sectors).outer(PAGE_SIZE) for sectors in poisoned)

    def _choose(self, directory: PrivatePath, is_direct: bool | None) -> None:
        """Put the pages with poison aside, or back into the media, as ``is_direct`` says.

        Also completes a change that a crash interrupted. A page with poison and kept contents has these
        contents, whatever the media has. A page without poison has the kept contents only if the media has
        none. Raises NoSpace.
        """
        if not (is_direct or KeptPages.exists(directory)):
            return
        kept = KeptPages(directory, self.size)
        try:
            for page in [page for run in kept.pages for page in range(*run)]:
                at = page * PAGE_SIZE
                has_poison = self.is_poisoned(at, PAGE_SIZE)
                is_stale = not has_poison and backing.has_data(self._fd, Range(at, at + PAGE_SIZE))
                if not is_stale and not (has_poison and is_direct is not False):
                    self._restore(page, kept.get(page))
                if is_stale or not has_poison or is_direct is False:
                    kept.forget(Range(page, page + 1))
        except BaseException:
            kept.close()
            raise
        if is_direct is False:
            kept.remove()
            return
        self._kept = kept
        self._put_aside(self.poison)

    def _restore(self, page: int, data: bytearray) -> None:
        """Write a whole page back into the media, in one step for processes that map the page."""
        self.store(page * PAGE_SIZE, memoryview(data))

    def _put_aside(self, ranges: Iterable[Range]) -> None:
        """Copy readable sectors of pages with poison, then punch the pages. Precondition: recorded as poison;
        see :meth:`_reserve_kept`.
        """
        assert self._kept is not None
        for sectors in ranges:
            pages = blocks_of_sectors(sectors)
            for page in self._mixed(sectors):
                if page not in self._kept.pages and backing.has_data(self._fd, _bytes_of(page)):
                    self._kept.put(page * PAGE_SIZE, os.pread(self._fd, PAGE_SIZE, page * PAGE_SIZE))
            backing.punch(self._fd, *byte_span(pages))

    def _reserve_kept(self, ranges: Iterable[Range]) -> None:
        """Make room for the contents of pages that ``ranges`` poison in part. Raises NoSpace."""
        if self._kept is not None:
            for page in (page for sectors in ranges for page in _edges(sectors)):
                self._kept.reserve(Range(page, page + 1))

    def _mixed(self, sectors: Range) -> list[int]:
        """Return the pages at the ends of ``sectors`` with poison and readable sectors."""
        return [page for page in _edges(sectors) if not self.poison.covers(*_sectors_of(page))]

    def _clear_kept(self, sectors: Range) -> list[int]:
        """Zero poisoned sectors about to be cleared. Return the pages that are in the media again, and whose
        kept contents must be forgotten after the record of the clear. Raises NoSpace.
        """
        kept = self._kept
        if kept is None:
            return []
        whole = blocks_of_sectors(sectors)
        ends = {whole.start, whole.end - 1}
        pages = ends | {page for run in kept.pages.overlapping(*whole) for page in range(*run)}
        done: list[int] = []
        for page in sorted(pages):
            poisoned = [run.clip(*_sectors_of(page)) for run in self.poison.overlapping(*_sectors_of(page))]
            cleared = [part for run in poisoned if (part := run.clip(*sectors))]
            if not cleared:
                continue
            data = kept.get(page)
            for part in cleared:
                at = bytes_of_sectors(part)
                data[at.start - page * PAGE_SIZE : at.end - page * PAGE_SIZE] = bytes(at.length)
            if cleared != poisoned:
                kept.put(page * PAGE_SIZE, data)
            elif page in kept.pages:
                self._restore(page, data)
                done.append(page)
        return done

    # -- poison

    def is_poisoned(self, offset: int, length: int) -> bool:
        """Return True if any byte of the range is poison."""
        return bool(self.poison) and self.poison.overlaps(*sectors_at(offset, length))

    def poisoned(self, offset: int, length: int) -> Iterator[Range]:
        """Yield the poisoned byte ranges (whole sectors) that overlap ``[offset, offset + length)``."""
        for sectors in self.poison.overlapping(*sectors_at(offset, length)):
            yield bytes_of_sectors(sectors)

    def add_poison(self, *ranges: Range) -> None:
        """Poison sectors. Raises NoSpace without room for the record; then nothing has changed."""
        self._reserve_kept(ranges)
        added = [part for sectors in ranges for part in self.poison.add(*sectors)]
        try:
            self._record(added)
        except NoSpace:
            for part in added:
                self.poison.remove(*part)
            raise
        if self._kept is not None:
            self._put_aside(ranges)

    def make_room(self, changes: int) -> None:
        """Reserve room in the file ``poison`` for ``changes`` more ranges. Raises NoSpace."""
        if len(self.poison) + changes > _FEW:
            longest = len(f"{_CLEARED}{sector_at(self.size)} {sector_at(self.size)}\n")
            with self._writing():
                self._extend(self._poison_end + changes * longest)

    def clear_poison(self, sectors: Range) -> list[Range]:
        """Make sectors readable. Return the sectors that were poison; the caller overwrites their bytes
        next. Pages put aside are in the media again if no poison is left; a page that was poison as a whole
        must be reserved. Raises NoSpace; then nothing has changed.
        """
        again = self._clear_kept(sectors)
        cleared = self.poison.remove(*sectors)
        try:
            if not self._is_saved:
                self._record(cleared, _CLEARED)
        except NoSpace:
            for part in cleared:
                self.poison.add(*part)
            if self._kept is not None:
                self._put_aside(cleared)
            raise
        for page in again:
            assert self._kept is not None
            self._kept.forget(Range(page, page + 1))
        return cleared

    @contextmanager
    def clearing(self, ranges: Iterable[Range]) -> Iterator[None]:
        """Context in which the sectors are cleared, in several calls. The clears are recorded once, at the
        begin. Raises NoSpace without room for the record; then nothing has changed.
        """
        clearing = list(ranges)
        self._record(clearing, _CLEARED, but=clearing)
        self._is_saved = True
        try:
            yield
        finally:
            self._is_saved = False
            if any(self.poison.overlaps(*sectors) for sectors in clearing):
                self._save_poison(self.poison)

    def _load_poison(self) -> None:
        """Load the poison from the lines of the file, in order. "first-sector count" (the sysfs format of
        badblocks) adds poison; "clear first-sector count" removes poison.
        """
        try:
            text = self._poison_file.read_bytes().decode().rstrip("\n")
            for line in filter(None, text.split("\n")):
                first, count = (int(word) for word in line.removeprefix(_CLEARED).split())
                if first < 0 or count <= 0 or first + count > sector_at(self.size):
                    raise ValueError(line)
                change = self.poison.remove if line.startswith(_CLEARED) else self.poison.add
                change(first, first + count)
                self._poison_lines += 1
            self._poison_end = len(text) + 1 if text else 0
        except FileNotFoundError:
            return
        except ValueError as error:
            raise NotADevice(
                f"{self._poison_file}: not a list of 'sector count' lines; "
                "correct the file, or remove it to have no poison"
            ) from error

    def _record(self, changed: Sequence[Range], prefix: str = "", *, but: Sequence[Range] = ()) -> None:
        """Record added or cleared poison. ``but``: ranges that are not cleared yet. Raises NoSpace."""
        lines = self._poison_lines + len(changed)
        if changed and len(self.poison) > _FEW and lines < 4 * len(self.poison):
            with suppress(NoSpace):  # the whole file may be shorter
                self._append_poison(changed, prefix)
                return
        if changed:
            left = self.poison.copy() if but else self.poison
            for sectors in but:
                left.remove(*sectors)
            self._save_poison(left)

    @contextmanager
    def _writing(self) -> Iterator[None]:
        try:
            yield
        except (OSError, NotADevice, PermissionDenied) as error:
            why = error.strerror if isinstance(error, OSError) else error
            raise NoSpace(f"{self._poison_file} cannot be written: {why}; make room there") from error

    def _append_poison(self, changed: Sequence[Range], prefix: str) -> None:
        data = "".join(f"{prefix}{r.start} {r.length}\n" for r in changed).encode()
        with self._writing():
            self._extend(self._poison_end + len(data))
            with open(self._poison_file.open(os.O_RDWR), "r+b", buffering=0) as file:
                # A file made by hand may lack the end of its last line.
                file.seek(max(0, self._poison_end - 1))
                file.write(b"\n" * bool(self._poison_end) + data)
        self._poison_end += len(data)
        self._poison_lines += len(changed)

    def _extend(self, wanted: int) -> None:
        """Make the file at least ``wanted`` bytes long, with empty lines. Raises OSError."""
        wanted = round_up(wanted, _POISON_STEP)
        with open(self._poison_file.open(os.O_RDWR, create=True), "r+b", buffering=0) as file:
            size = file.seek(0, os.SEEK_END)
            missing = max(0, wanted - size)
            try:
                if missing and file.write(b"\n" * missing) != missing:
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            except OSError:
                file.truncate(size)
                raise

    def _save_poison(self, poison: RangeSet) -> None:
        text = "".join(f"{r.start} {r.length}\n" for r in poison)
        data = text.encode().ljust(round_up(len(text), _POISON_STEP) or _POISON_STEP, b"\n")
        with self._writing():
            found = self._poison_file.lstat().st_size if self._poison_file.exists() else 0
            if len(data) <= found:
                # Overwritten in place: a full disk must not keep poison from being cleared.
                with open(self._poison_file.open(os.O_RDWR), "r+b", buffering=0) as file:
                    file.write(data.ljust(found, b"\n"))
                    file.truncate(len(data))
            else:
                scratch = self._poison_file.with_name("poison.new")
                scratch.write_bytes(data)
                scratch.rename("poison")
        self._poison_end, self._poison_lines = len(text), len(poison)


def _span(part: Range) -> tuple[int, int]:
    return part.start, part.length


def _bytes_of(page: int) -> Range:
    return Range(page * PAGE_SIZE, (page + 1) * PAGE_SIZE)


def _sectors_of(page: int) -> Range:
    return Range(page * PAGE_SECTORS, (page + 1) * PAGE_SECTORS)


def _sectors_of_pages(offset: int, length: int) -> Range:
    return sectors_at(*_span(Range(offset, offset + length).outer(PAGE_SIZE)))


def _edges(sectors: Range) -> list[int]:
    """Return the pages that hold the ends of ``sectors``, if not whole."""
    pages = blocks_of_sectors(sectors)
    inside = sectors.inner(PAGE_SECTORS)
    ends = {pages.start, pages.end - 1}
    return sorted(page for page in ends if not inside or not _sectors_of(page).clip(*inside))
