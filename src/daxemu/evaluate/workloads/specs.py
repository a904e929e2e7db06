"""Options of each workload in a plan. Types only: reading a plan imports no workload."""

from __future__ import annotations

import msgspec

from daxemu.sizes import human


class Spec(msgspec.Struct, tag_field="kind", forbid_unknown_fields=True, frozen=True, kw_only=True):
    """Options common to all workloads.

    ``name`` defaults to the kind. Sizes (``record``, ``largest``) are bytes; ``count`` is a number of records
    or files.
    """

    name: str = ""

    @property
    def kind(self) -> str:
        return str(type(self).__struct_config__.tag)

    @property
    def label(self) -> str:
        """Return the name for reports."""
        return self.name or self.kind

    def room(self) -> int:
        """Return the space needed on the device in bytes, a rough upper bound."""
        return 0

    def wrong(self, device: int) -> tuple[str, str] | None:
        """Return the first impossible option as (key, reason); None if all are valid. ``device``: bytes."""
        for key in self.__struct_fields__:
            value = getattr(self, key)
            if isinstance(value, int) and value < 1:
                return key, f"{key} must be 1 or more"
        if self.room() > device // 4:
            # A mirror halves the device, and metadata needs space.
            return "kind", f"needs {human(self.room())}, more than a quarter of the {human(device)} device"
        return None


class Command(Spec, tag="command", frozen=True):
    """Any command line, run repeatedly through sh(1) in a directory on the mount (also $DAXEMU_DIR).

    ``prepare`` runs once before, ``verify`` once afterwards. ``verify`` exits with 0 if all data is right,
    and may print lines ``lost PATH OFFSET LENGTH`` or ``wrong PATH OFFSET LENGTH``.
    """

    command: str
    prepare: str = ""
    verify: str = ""


class FileServer(Spec, tag="fileserver", frozen=True):
    """Whole files: 50 % reads, 20 % rewrites, 15 % appends, 15 % deleted and made again."""

    count: int = 64
    largest: int = 128 << 10

    def room(self) -> int:
        return self.count * self.largest * 2


class KvStore(Spec, tag="kvstore", frozen=True):
    """Hash table of fixed slots in one mapped file; ``reads`` per cent of the operations are gets."""

    count: int = 4096
    record: int = 1024
    reads: int = 80
    sync_every: int = 64

    def room(self) -> int:
        return self.count * self.record


class Sqlite(Spec, tag="sqlite", frozen=True):
    """sqlite3: transactions rewriting ``rows`` rows of ``record`` bytes each, and reads of single rows."""

    count: int = 1000
    record: int = 1000
    rows: int = 4

    def room(self) -> int:
        return self.count * self.record * 3


class Dataset(Spec, tag="dataset", frozen=True):
    """Machine learning data set: ragged samples read in random batches through mmap_ninja."""

    count: int = 512
    record: int = 16 << 10
    batch: int = 16

    def room(self) -> int:
        return self.count * self.record


class Snapshots(Spec, tag="snapshots", frozen=True):
    """Live file written record by record, and a reflink every ``every`` writes.

    The last ``keep`` reflinks are kept.
    """

    count: int = 1024
    record: int = 4096
    every: int = 50
    keep: int = 4

    def room(self) -> int:
        return self.count * self.record * 3


class AppendLog(Spec, tag="log", frozen=True):
    """Records appended, fsync(2) every ``sync_every`` records, old ones read back; a full log starts anew."""

    count: int = 8192
    record: int = 512
    sync_every: int = 16

    def room(self) -> int:
        return self.count * self.record


AnyWorkload = Command | FileServer | KvStore | Sqlite | Dataset | Snapshots | AppendLog
