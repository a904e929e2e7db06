"""Libraries, and the drivers (drivers/) that call them: small programs, all talked to alike.

``DRIVER prepare DIR`` stores the records that it is given as lines; ``DRIVER open DIR`` says "ready", and for
each line "read" gives back all as lines ``NUMBER TEXT`` and "end"; an error is a line "error: ...".
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import ClassVar

from daxemu.apps.application import Application, Needs, Place, Spot, find_record, number_of, python_driver
from daxemu.apps.process import Process
from daxemu.apps.records import COUNT, Finding, compare_lines, lines
from daxemu.apps.situations import Part

_COMPLAINT = re.compile(r"error\b.*", re.IGNORECASE)


class Driven(Application):
    """``source``: its driver; ``libraries``: what one in C is linked with; ``options``: what it is told.

    ``data_files`` and ``journal_files``: patterns below its directory.
    """

    source: ClassVar[str]
    libraries: ClassVar[tuple[str, ...]] = ()
    options: ClassVar[tuple[str, ...]] = ()
    data_files: ClassVar[str]
    journal_files: ClassVar[str] = ""

    def prepare(self, place: Place) -> None:
        """See Application.prepare."""
        place.make([*self._driver(place), "prepare", place.root, *self.options], lines(range(COUNT)))

    def spot(self, place: Place, part: Part) -> Spot:
        """See Application.spot."""
        pattern = self.journal_files if part == "journal" else self.data_files
        return find_record(number_of(part), sorted(place.root.rglob(pattern)))

    def start(self, place: Place) -> Process:
        """See Application.start."""
        process = place.start([*self._driver(place), "open", place.root, *self.options])
        process.until("ready")
        return process

    def read(self, place: Place, process: Process) -> Finding:
        """See Application.read."""
        process.send("read\n")
        return compare_lines(process.until("end"), _COMPLAINT)

    def _driver(self, place: Place) -> Sequence[str | Path]:
        if self.source.endswith(".py"):
            return python_driver(self.source)
        return [place.compile(self.source, *self.libraries)]


class Lmdb(Driven):
    """LMDB checks nothing that it loads."""

    name = "lmdb"
    about = "LMDB through liblmdb: loads from a mapping, stores by write(2)"
    needs = Needs(debian=("liblmdb-dev", "gcc", "libc6-dev"), programs=("gcc",), headers=("lmdb.h",))
    source = "lmdb.c"
    libraries = ("lmdb",)
    data_files = "data.mdb"


class RocksDb(Driven):
    """Late records are in the log."""

    name = "rocksdb"
    about = "RocksDB through librocksdb, no block cache; pread(2), a checksum for each block"
    needs = Needs(debian=("librocksdb-dev", "gcc", "libc6-dev"), programs=("gcc",), headers=("rocksdb/c.h",))
    journal = "its write-ahead log, of a process that was killed"
    source = "rocksdb.c"
    libraries = ("rocksdb",)
    options = ("read",)
    data_files = "*.sst"
    journal_files = "*.log"

    def dirty(self, place: Place, process: Process) -> None:
        """See Application.dirty."""
        process.send("write\n")
        process.until("written")


class RocksDbMmap(RocksDb):
    """The same, through mappings."""

    name = "rocksdb-mmap"
    about = "the same with allow_mmap_reads: tables are mapped"
    options = ("mmap",)


class LibPmem(Driven):
    """The simplest program of the PMDK."""

    name = "libpmem"
    about = "PMDK's libpmem: pmem_map_file(), loads and stores"
    needs = Needs(debian=("libpmem-dev", "gcc", "libc6-dev"), programs=("gcc",), headers=("libpmem.h",))
    source = "pmem.c"
    libraries = ("pmem",)
    data_files = "records"


class LibPmemObj(Driven):
    """A pool with a transaction log of its own."""

    name = "libpmemobj"
    about = "PMDK's libpmemobj: a pool with its records in the root object, transactions"
    needs = Needs(debian=("libpmemobj-dev", "gcc", "libc6-dev"), programs=("gcc",), headers=("libpmemobj.h",))
    source = "pmemobj.c"
    libraries = ("pmemobj",)
    data_files = "pool"


class NumpyMemmap(Driven):
    """An array in a file."""

    name = "numpy-memmap"
    about = "numpy.memmap of 2400 rows: loads from a mapping"
    needs = Needs(pypi=("numpy",), modules=("numpy",))
    source = "numpy_memmap.py"
    data_files = "records.dat"


class RaggedTraining(Driven):
    """Training data."""

    name = "mmap-ninja"
    about = "mmap_ninja RaggedMmap of 2400 samples of unequal length: loads from a mapping"
    needs = Needs(pypi=("mmap-ninja",), modules=("mmap_ninja",))
    source = "ragged_mmap.py"
    data_files = "*.ninja"


class DuckDb(Driven):
    """Late records are in the write-ahead log."""

    name = "duckdb"
    about = "DuckDB from Python, its cache emptied before it reads; pread(2), a checksum for each 256 KiB"
    needs = Needs(pypi=("duckdb",), modules=("duckdb",))
    journal = "records.duckdb.wal, of a process that was killed"
    source = "duckdb_table.py"
    data_files = "records.duckdb"
    journal_files = "records.duckdb.wal"

    def dirty(self, place: Place, process: Process) -> None:
        """See Application.dirty."""
        process.send("write\n")
        process.until("written")
