"""Media: the bytes of a device in shared memory, and the poisoned sectors of the hardware."""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import NamedTuple

from daxemu.errors import MediaError, NoSpace, NotADevice, PermissionDenied, Unsupported
from daxemu.private_path import PrivatePath
from daxemu.ranges import Range, RangeSet
from daxemu.sizes import human
from daxemu.uapi import FALLOC_FL_KEEP_SIZE, FALLOC_FL_PUNCH_HOLE, SECTOR_SIZE
from daxemu.units import bytes_of_sectors, round_up, sectors_at

_POISON_STEP = 4096  # the file of poisoned sectors has whole pages, filled up with empty lines
_FEW = 512
"""Number of poison ranges up to which each change rewrites the whole file."""
_CLEARED = "clear "

_libc = ctypes.CDLL(None, use_errno=True)
_NR_CACHESTAT = 451  # on every architecture
_libc.fallocate.argtypes = (ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64)


def fallocate(fd: int, mode: int, offset: int, length: int) -> None:
    """Call ``fallocate(2)`` with any mode. Raises OSError."""
    while _libc.fallocate(fd, mode, offset, length) != 0:
        number = ctypes.get_errno()
        if number != errno.EINTR:
            raise OSError(number, os.strerror(number))


def check_mappable(size: int) -> None:
    """Check that ``size`` bytes fit into the address space of a process. Raises Unsupported."""
    if not _is_mappable(size):
        raise _too_large(size)


def _is_mappable(size: int) -> bool:
    try:
        mmap.mmap(-1, size, mmap.MAP_PRIVATE, mmap.PROT_READ).close()
    except OSError:
        return False
    return True


def _too_large(size: int) -> Unsupported:
    powers = (1 << bit for bit in range(size.bit_length() - 1, 0, -1))
    most = next(filter(_is_mappable, powers), 0)
    return Unsupported(
        f"a device of {human(size)} does not fit into the address space of a process on this machine: "
        f"the largest that does is {human(most)}"
    )


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

    def __init__(self, directory: PrivatePath, size: int) -> None:
        """Map the media. Raises NotADevice for missing files or a size other than ``size``, Unsupported if
        the media does not fit into the address space.
        """
        self.size = size
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

    def _mapped(self) -> mmap.mmap:
        try:
            return mmap.mmap(self._fd, self.size)
        except OSError as error:
            if error.errno != errno.ENOMEM:
                raise
            raise _too_large(self.size) from error

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

    # -- bytes

    def view(self, offset: int, length: int) -> memoryview:
        """Return the live bytes, writable. Precondition: reserved; the caller has checked for poison."""
        return self._view[offset : offset + length]

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
                self.reserve(offset, done)
                self._view[offset : offset + done] = rest
            offset, rest = offset + done, rest[done:]

    def reserve(self, offset: int, length: int) -> None:
        """Back the range with memory. Raises NoSpace if the host has no memory left; then nothing is
        reserved.
        """
        try:
            fallocate(self._fd, 0, offset, length)
        except OSError as error:
            if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.ENOMEM, errno.EFBIG):
                raise NoSpace(
                    "the memory behind the device is full: free some of /dev/shm or of the disk"
                ) from error
            raise MediaError(f"cannot reserve media: {error.strerror}") from error

    def release(self, offset: int, length: int) -> None:
        """Give the memory of the range back. After the next reserve, the range reads as zeros."""
        fallocate(self._fd, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, offset, length)

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
        """Yield the bytes of each run that the backing file has data for, whole pages, poisoned ones too."""
        end = 0
        while True:
            try:
                start = os.lseek(self._fd, end, os.SEEK_DATA)
            except OSError as error:
                if error.errno == errno.ENXIO:  # no data behind ``end``
                    return
                raise
            end = os.lseek(self._fd, start, os.SEEK_HOLE)
            yield self._view[start:end]

    def memory(self, offset: int) -> Memory:
        """Return the place of the bytes from ``offset`` on. Valid until :meth:`close`."""
        return Memory(self._fd, offset, ctypes.addressof(ctypes.c_char.from_buffer(self._map)) + offset)

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
        added = [part for sectors in ranges for part in self.poison.add(*sectors)]
        try:
            self._record(added)
        except NoSpace:
            for part in added:
                self.poison.remove(*part)
            raise

    def make_room(self, changes: int) -> None:
        """Reserve room in the file ``poison`` for ``changes`` more ranges. Raises NoSpace."""
        if len(self.poison) + changes > _FEW:
            longest = len(f"{_CLEARED}{self.size // SECTOR_SIZE} {self.size // SECTOR_SIZE}\n")
            with self._writing():
                self._extend(self._poison_end + changes * longest)

    def clear_poison(self, sectors: Range) -> list[Range]:
        """Make sectors readable. Return the sectors that were poison; the caller overwrites their bytes
        next.
        """
        cleared = self.poison.remove(*sectors)
        try:
            if not self._is_saved:
                self._record(cleared, _CLEARED)
        except NoSpace:
            for part in cleared:
                self.poison.add(*part)
            raise
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
                if first < 0 or count <= 0 or (first + count) * SECTOR_SIZE > self.size:
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
