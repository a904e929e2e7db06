"""What a plan can say of each workload. Types only: reading a plan imports no workload."""

from __future__ import annotations

import msgspec

from daxemu.sizes import human


class Spec(msgspec.Struct, tag_field="kind", forbid_unknown_fields=True, frozen=True, kw_only=True):
    """``name`` is the kind if not given; ``files`` and ``record`` are bytes, ``count`` a number."""

    name: str = ""

    @property
    def kind(self) -> str:
        return str(type(self).__struct_config__.tag)

    @property
    def label(self) -> str:
        """What it is called in reports."""
        return self.name or self.kind

    def room(self) -> int:
        """Bytes on the device that it needs at most, roughly."""
        return 0

    def wrong(self, device: int) -> tuple[str, str] | None:
        """What cannot be, as (key, text)."""
        for key in self.__struct_fields__:
            value = getattr(self, key)
            if isinstance(value, int) and value < 1:
                return key, f"{key} must be 1 or more"
        if self.room() > device // 4:
            # A mirror halves the device, and metadata wants some.
            return "kind", f"needs {human(self.room())}, more than a quarter of the {human(device)} device"
        return None


class Command(Spec, tag="command", frozen=True):
    """Any command line, run again and again in a directory on the mount (also $DAXEMU_DIR), through sh(1).

    ``prepare`` runs once before, ``verify`` once afterwards: it exits 0 if all is well, and may print lines
    ``lost PATH OFFSET LENGTH`` or ``wrong PATH OFFSET LENGTH``.
    """

    command: str
    prepare: str = ""
    verify: str = ""


class FileServer(Spec, tag="fileserver", frozen=True):
    """Whole files read, rewritten, appended to, deleted and made again: 50, 20, 15, 15 of a hundred."""

    count: int = 64
    largest: int = 128 << 10

    def room(self) -> int:
        return self.count * self.largest * 2


class KvStore(Spec, tag="kvstore", frozen=True):
    """A hash table of fixed slots in one mapped file; ``reads`` of a hundred operations are gets."""

    count: int = 4096
    record: int = 1024
    reads: int = 80
    sync_every: int = 64

    def room(self) -> int:
        return self.count * self.record


class Sqlite(Spec, tag="sqlite", frozen=True):
    """sqlite3: transactions that rewrite ``rows`` rows of ``record`` bytes, and reads of one."""

    count: int = 1000
    record: int = 1000
    rows: int = 4

    def room(self) -> int:
        return self.count * self.record * 3


class Dataset(Spec, tag="dataset", frozen=True):
    """A machine learning data set: ragged samples read in random batches through mmap_ninja."""

    count: int = 512
    record: int = 16 << 10
    batch: int = 16

    def room(self) -> int:
        return self.count * self.record


class Snapshots(Spec, tag="snapshots", frozen=True):
    """A live file written by record; a reflink of it every ``every`` writes, the last ``keep`` kept."""

    count: int = 1024
    record: int = 4096
    every: int = 50
    keep: int = 4

    def room(self) -> int:
        return self.count * self.record * 3


class AppendLog(Spec, tag="log", frozen=True):
    """Records appended, fsync(2) every ``sync_every``, and an old one read back now and then; begun anew when
    full.
    """

    count: int = 8192
    record: int = 512
    sync_every: int = 16

    def room(self) -> int:
        return self.count * self.record


AnyWorkload = Command | FileServer | KvStore | Sqlite | Dataset | Snapshots | AppendLog
