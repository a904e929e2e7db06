"""VFS of SQLite on the metadata region, with the two files of the region and no other file.

SQLite runs in WAL mode with exclusive locking and needs no shared-memory file; temporary files are in memory.
Consecutive writes of SQLite go to the media in one piece, at the sync.
"""

from __future__ import annotations

import itertools
from typing import Any

import apsw

from daxemu.errors import DaxemuError
from daxemu.fs.metadata_page import PAYLOAD, MetadataFile
from daxemu.fs.metadata_region import MetadataRegion

_NAMES = {"db": MetadataFile.DB, "db-wal": MetadataFile.WAL}
_MAGIC = {
    MetadataFile.DB: (b"SQLite format 3\0",),
    MetadataFile.WAL: (b"\x37\x7f\x06\x82", b"\x37\x7f\x06\x83"),
}
_numbers = itertools.count(1)


class MetadataVfs(apsw.VFS):
    """VFS for apsw.Connection: pass ``vfs.name``, with the file name "db". ``failure`` keeps the exception of
    the last failed access.
    """

    def __init__(self, region: MetadataRegion) -> None:
        self.name = f"daxemu-{next(_numbers)}"
        self.region = region
        self.failure: DaxemuError | None = None
        super().__init__(self.name, base="")

    def xFullPathname(self, name: str) -> str:
        """Return ``name``: the VFS has no directories."""
        return name

    def xAccess(self, pathname: str, flags: int) -> bool:
        """Return True if the file exists."""
        file = _NAMES.get(pathname)
        return file is not None and _exists(self.region, file)

    def xDelete(self, filename: str, syncdir: bool) -> None:
        """Delete the WAL. SQLite calls this after the WAL was copied back."""
        file = _NAMES.get(filename)
        try:
            if file is not None and self.region.size(file):
                self.region.write(file, 0, bytes(PAYLOAD))
        except DaxemuError as error:
            raise self.failed(error) from error

    def failed(self, error: DaxemuError) -> apsw.IOError:
        """Keep ``error`` in ``failure``, and return an exception that SQLite understands."""
        self.failure = error
        return apsw.IOError(str(error))

    def xOpen(self, name: Any, flags: list[int]) -> Any:
        """Open one of the two files. Raises CantOpenError for any other name."""
        file = _NAMES.get(str(name.filename()) if isinstance(name, apsw.URIFilename) else str(name))
        if file is None:
            raise apsw.CantOpenError(f"the metadata region has no file {name}")
        flags[1] = flags[0]
        return _VfsFile(self, file)


def _exists(region: MetadataRegion, file: MetadataFile) -> bool:
    if not region.size(file):
        return False
    magic = _MAGIC[file]
    return region.read(file, 0, len(magic[0])) in magic


class _VfsFile:
    """``sqlite3_io_methods`` of one file."""

    def __init__(self, vfs: MetadataVfs, file: MetadataFile) -> None:
        self._vfs = vfs
        self._region = vfs.region
        self._file = file
        # The size of the file is its room: SQLite knows the used part from its own headers.
        self._size = self._region.size(file) if _exists(self._region, file) else 0
        self._room = 0
        """Bytes that the file has room for, at least."""
        self._pending: list[bytes] = []
        self._pending_at = self._pending_end = 0

    def flush(self) -> None:
        """Write the data that SQLite has written since the last call to the media. Raises NoSpace,
        MediaError.
        """
        if self._pending:
            data = self._pending[0] if len(self._pending) == 1 else b"".join(self._pending)
            self._pending = []
            self._region.write(self._file, self._pending_at, data)

    def xRead(self, amount: int, offset: int) -> bytes:
        """Read up to ``amount`` bytes; fewer at the end of the file."""
        try:
            self.flush()
            return self._region.read(self._file, offset, max(0, min(amount, self._size - offset)))
        except DaxemuError as error:
            raise self._vfs.failed(error) from error

    def xWrite(self, data: bytes, offset: int) -> None:
        """Write at ``offset``, and grow the file. Precondition: ``Store.ensure_room`` made room."""
        end = offset + len(data)
        try:
            if end > self._room:
                self._region.grow(self._file, end)
                self._room = self._region.size(self._file)
            if not self._pending or offset != self._pending_end:
                self.flush()
                self._pending_at = offset
        except DaxemuError as error:
            raise self._vfs.failed(error) from error
        # SQLite writes a frame of the log as a header and a page, and a transaction as several frames,
        # without a gap.
        self._pending.append(data)
        self._pending_end = end
        self._size = max(self._size, end)

    def xTruncate(self, newsize: int) -> None:
        """Do nothing: the blocks stay, and SQLite knows the used part from its headers."""
        try:
            self.flush()
            if newsize == 0 and self._size:
                self._region.write(self._file, 0, bytes(PAYLOAD))
        except DaxemuError as error:
            raise self._vfs.failed(error) from error
        self._size = min(self._size, newsize)

    def xFileSize(self) -> int:
        """In bytes."""
        return self._size

    def xSync(self, flags: int) -> None:
        """Flush. Data on the media is durable."""
        try:
            self.flush()
        except DaxemuError as error:
            raise self._vfs.failed(error) from error

    def xClose(self) -> None:
        """Do nothing: the file holds no resource."""
        self.xSync(0)

    def xLock(self, level: int) -> None:
        """Do nothing: the lock of the device keeps other processes out."""

    def xUnlock(self, level: int) -> None:
        """See xLock."""

    def xCheckReservedLock(self) -> bool:
        """See xLock."""
        return False

    def xSectorSize(self) -> int:
        """Return the number of bytes that a power failure leaves whole."""
        return 512

    def xDeviceCharacteristics(self) -> int:
        """Return the guarantees: writes stay in order, and do not change adjacent bytes."""
        return int(
            apsw.SQLITE_IOCAP_SEQUENTIAL
            | apsw.SQLITE_IOCAP_SAFE_APPEND
            | apsw.SQLITE_IOCAP_POWERSAFE_OVERWRITE
        )

    def xFileControl(self, op: int, ptr: int) -> bool:
        """Return False: no file control is supported."""
        return False
