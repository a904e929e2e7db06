"""SQLite's view of the metadata region: a VFS whose two files are the region's, and nothing else exists.

SQLite runs in WAL mode with exclusive locking, so it wants no shared-memory file; temporary files are in
memory. What SQLite writes in a row is put on the media in one piece, when it syncs.
"""

from __future__ import annotations

import itertools
from typing import Any

import apsw

from daxemu.errors import DaxemuError
from daxemu.fs.metadata_page import PAYLOAD
from daxemu.fs.metadata_region import MetadataFile, MetadataRegion

_NAMES = {"db": MetadataFile.DB, "db-wal": MetadataFile.WAL}
_MAGIC = {
    MetadataFile.DB: (b"SQLite format 3\0",),
    MetadataFile.WAL: (b"\x37\x7f\x06\x82", b"\x37\x7f\x06\x83"),
}
_numbers = itertools.count(1)


class MetadataVfs(apsw.VFS):
    """Give ``vfs.name`` to apsw.Connection, with the file name "db". ``failure`` keeps what an access
    raised.
    """

    def __init__(self, region: MetadataRegion) -> None:
        self.name = f"daxemu-{next(_numbers)}"
        self.region = region
        self.failure: DaxemuError | None = None
        super().__init__(self.name, base="")

    def xFullPathname(self, name: str) -> str:
        """There are no directories."""
        return name

    def xAccess(self, pathname: str, flags: int) -> bool:
        """Whether a file exists."""
        file = _NAMES.get(pathname)
        return file is not None and _exists(self.region, file)

    def xDelete(self, filename: str, syncdir: bool) -> None:
        """SQLite deletes the WAL when it has been copied back."""
        file = _NAMES.get(filename)
        try:
            if file is not None and self.region.size(file):
                self.region.write(file, 0, bytes(PAYLOAD))
        except DaxemuError as error:
            raise self.failed(error) from error

    def failed(self, error: DaxemuError) -> apsw.IOError:
        """Keep ``error``; what to raise for it, which SQLite understands."""
        self.failure = error
        return apsw.IOError(str(error))

    def xOpen(self, name: Any, flags: list[int]) -> Any:
        """One of the two files."""
        file = _NAMES.get(str(name.filename()) if isinstance(name, apsw.URIFilename) else str(name))
        if file is None:
            raise apsw.CantOpenError(f"no file {name} here")
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
        # What is there is as long as it has room: SQLite knows from its header what of that counts.
        self._size = self._region.size(file) if _exists(self._region, file) else 0
        self._room = 0
        """Bytes the file has room for, at the least."""
        self._pending: list[bytes] = []
        self._pending_at = self._pending_end = 0

    def flush(self) -> None:
        """Put on the media what SQLite has written since the last call. Raises NoSpace, MediaError."""
        if self._pending:
            data = self._pending[0] if len(self._pending) == 1 else b"".join(self._pending)
            self._pending = []
            self._region.write(self._file, self._pending_at, data)

    def xRead(self, amount: int, offset: int) -> bytes:
        """Short at the end of the file."""
        try:
            self.flush()
            return self._region.read(self._file, offset, max(0, min(amount, self._size - offset)))
        except DaxemuError as error:
            raise self._vfs.failed(error) from error

    def xWrite(self, data: bytes, offset: int) -> None:
        """Grows the file; the store has seen to it that there is room."""
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
        # A frame of the log comes as a header and a page, a transaction as several frames: all in a row.
        self._pending.append(data)
        self._pending_end = end
        self._size = max(self._size, end)

    def xTruncate(self, newsize: int) -> None:
        """The blocks stay; SQLite knows from its headers what counts."""
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
        """What is on the media is durable."""
        try:
            self.flush()
        except DaxemuError as error:
            raise self._vfs.failed(error) from error

    def xClose(self) -> None:
        """Nothing to give back."""
        self.xSync(0)

    def xLock(self, level: int) -> None:
        """Nobody else is here: the device has a lock of its own."""

    def xUnlock(self, level: int) -> None:
        """See xLock."""

    def xCheckReservedLock(self) -> bool:
        """See xLock."""
        return False

    def xSectorSize(self) -> int:
        """The unit that a power failure leaves whole."""
        return 512

    def xDeviceCharacteristics(self) -> int:
        """Writes stay in order, and leave alone what is beside them."""
        return int(
            apsw.SQLITE_IOCAP_SEQUENTIAL
            | apsw.SQLITE_IOCAP_SAFE_APPEND
            | apsw.SQLITE_IOCAP_POWERSAFE_OVERWRITE
        )

    def xFileControl(self, op: int, ptr: int) -> bool:
        """No special wishes."""
        return False
