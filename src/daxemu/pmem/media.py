"""The device's bytes in shared memory, and the hardware's truth about them: which sectors are poison."""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from typing import NamedTuple

from daxemu.errors import MediaError, NoSpace, NotADevice, PermissionDenied, Unsupported
from daxemu.private_path import PrivatePath
from daxemu.ranges import Range, RangeSet
from daxemu.sizes import human
from daxemu.uapi import FALLOC_FL_KEEP_SIZE, FALLOC_FL_PUNCH_HOLE, SECTOR_SIZE

_POISON_STEP = 4096  # the file of poisoned sectors has whole pages, filled up with empty lines

_libc = ctypes.CDLL(None, use_errno=True)
_libc.fallocate.argtypes = (ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64)


def fallocate(fd: int, mode: int, offset: int, length: int) -> None:
    """``fallocate(2)`` with any mode. Raises OSError."""
    while _libc.fallocate(fd, mode, offset, length) != 0:
        number = ctypes.get_errno()
        if number != errno.EINTR:
            raise OSError(number, os.strerror(number))


def check_mappable(size: int) -> None:
    """Raises Unsupported if so many bytes do not fit into the address space of a process of this machine."""
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


def sectors_of(offset: int, length: int) -> Range:
    """The sectors that hold any of the bytes ``[offset, offset + length)``."""
    return Range(offset // SECTOR_SIZE, -(-(offset + length) // SECTOR_SIZE))


class Memory(NamedTuple):
    """Where bytes are, for code that is not Python: in an open file from ``offset`` on, and mapped at
    ``address``.
    """

    fd: int
    offset: int
    address: int


class Media:
    """The media of one device: ``size`` bytes of a sparse file, mapped shared, and their poison.

    Poison is kept in sectors and written to the file ``poison`` at every change, so that it outlives this
    process.
    """

    def __init__(self, directory: PrivatePath, size: int) -> None:
        """Raises NotADevice when the files are missing or are not what ``size`` says, Unsupported if there
        are too many bytes for this machine.
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
        try:
            self.poison = RangeSet(self._load_poison())
            self._map = self._mapped()
        except BaseException:
            os.close(self._fd)
            raise
        self._view = memoryview(self._map)
        self._is_saved = False
        """Whether what is cleared now is recorded already."""

    def _mapped(self) -> mmap.mmap:
        try:
            return mmap.mmap(self._fd, self.size)
        except OSError as error:
            if error.errno != errno.ENOMEM:
                raise
            raise _too_large(self.size) from error

    @staticmethod
    def create(directory: PrivatePath, size: int) -> None:
        """Make the files of a new, healthy media."""
        media = (directory / "media").make(os.O_RDWR)
        try:
            os.ftruncate(media, size)
        finally:
            os.close(media)
        (directory / "poison").write_bytes(b"\n" * _POISON_STEP)

    def close(self) -> None:
        """Unmap. Precondition: no view handed out by :meth:`view` is alive."""
        self._view.release()
        with suppress(BufferError):  # the traceback of what failed may hold views: unmapped with the last
            self._map.close()
        os.close(self._fd)

    # -- bytes

    def view(self, offset: int, length: int) -> memoryview:
        """The live bytes, writable. Precondition: reserved; the caller has looked at the poison."""
        return self._view[offset : offset + length]

    def store(self, offset: int, data: bytes | memoryview) -> None:
        """Write to memory that was not used yet, reserved or not. Faster than through a view: whole pages are
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
        """Back the range with memory. Raises NoSpace when the host has none left; then nothing is
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
        """Give the range's memory back; it reads as zeros when it is reserved again."""
        fallocate(self._fd, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, offset, length)

    def memory(self, offset: int) -> Memory:
        """Where the bytes from ``offset`` on are, until :meth:`close`."""
        return Memory(self._fd, offset, ctypes.addressof(ctypes.c_char.from_buffer(self._map)) + offset)

    # -- poison

    def is_poisoned(self, offset: int, length: int) -> bool:
        """Whether any byte of the range cannot be read."""
        return bool(self.poison) and self.poison.overlaps(*sectors_of(offset, length))

    def poisoned(self, offset: int, length: int) -> Iterator[Range]:
        """The poisoned byte ranges that meet ``[offset, offset + length)``, whole sectors each."""
        for sectors in self.poison.overlapping(*sectors_of(offset, length)):
            yield Range(sectors.start * SECTOR_SIZE, sectors.end * SECTOR_SIZE)

    def add_poison(self, *ranges: Range) -> None:
        """Make sectors unreadable. Raises NoSpace if that cannot be recorded; then nothing has changed."""
        added = [part for sectors in ranges for part in self.poison.add(*sectors)]
        try:
            if added:
                self._save_poison(self.poison)
        except NoSpace:
            for part in added:
                self.poison.remove(*part)
            raise

    def clear_poison(self, sectors: Range) -> list[Range]:
        """Make the sectors readable; returns those that were not. Their bytes are whatever is written
        next.
        """
        cleared = self.poison.remove(*sectors)
        try:
            if cleared and not self._is_saved:
                self._save_poison(self.poison)
        except NoSpace:
            for part in cleared:
                self.poison.add(*part)
            raise
        return cleared

    @contextmanager
    def clearing(self, ranges: Iterable[Range]) -> Iterator[None]:
        """Within, these sectors are cleared, in as many calls as it takes: they are recorded at once. Raises
        NoSpace if that cannot be; then nothing has changed.
        """
        left = RangeSet(self.poison)
        for sectors in ranges:
            left.remove(*sectors)
        self._save_poison(left)
        self._is_saved = True
        try:
            yield
        finally:
            self._is_saved = False
            if self.poison != left:
                self._save_poison(self.poison)

    def _load_poison(self) -> Iterator[tuple[int, int]]:
        """The file holds "first-sector count" lines, the sysfs form of badblocks."""
        try:
            for line in self._poison_file.read_bytes().decode().split("\n"):
                if not line:
                    continue
                first, count = (int(word) for word in line.split())
                if first < 0 or count <= 0 or (first + count) * SECTOR_SIZE > self.size:
                    raise ValueError(line)
                yield first, first + count
        except FileNotFoundError:
            return
        except ValueError as error:
            raise NotADevice(
                f"{self._poison_file}: not a list of 'sector count' lines ({error}); "
                "mend it, or remove it to have no poison"
            ) from error

    def _save_poison(self, poison: RangeSet) -> None:
        text = "".join(f"{r.start} {r.length}\n" for r in poison)
        data = text.encode().ljust(-(-len(text) // _POISON_STEP) * _POISON_STEP or _POISON_STEP, b"\n")
        try:
            if len(data) <= self._poison_file.lstat().st_size:
                # Over what is there: a full disk must not keep poison from being cleared.
                with open(self._poison_file.open(os.O_RDWR), "r+b", buffering=0) as file:
                    file.write(data)
                    file.truncate()
            else:
                scratch = self._poison_file.with_name("poison.new")
                scratch.write_bytes(data)
                scratch.rename("poison")
        except (OSError, NotADevice, PermissionDenied) as error:
            why = error.strerror if isinstance(error, OSError) else error
            raise NoSpace(f"{self._poison_file} cannot be written: {why}; make room there") from error
