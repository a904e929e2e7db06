"""Libraries, and the small programs (drivers/) that call them. All drivers have the same interface.

- ``DRIVER prepare DIR`` stores the records given as lines on stdin.
- ``DRIVER open DIR`` prints "ready". For each line "read" on stdin the driver prints all records as lines
  ``NUMBER TEXT``, then "end".
- An error is a line "error: ...".
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import ClassVar

from daxemu.apps.application import Application, Needs, Place, Spot, find_record, number_of, python_driver
from daxemu.apps.process import Process
from daxemu.apps.records import COUNT, ReadBack, compare_lines, lines
from daxemu.apps.situations import Part

COMPILER = ("gcc", "libc6-dev")
_COMPLAINT = re.compile(r"error\b.*", re.IGNORECASE)


class Driven(Application):
    """Program made of a driver and a library.

    ``source``: file of the driver. ``libraries``: libraries to link a C driver with. ``options``: arguments
    of the driver. ``data_files`` and ``journal_files``: file name patterns below ``root``.
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

    def read(self, place: Place, process: Process) -> ReadBack:
        """See Application.read."""
        process.send("read\n")
        return compare_lines(process.until("end"), _COMPLAINT)

    def _driver(self, place: Place) -> Sequence[str | Path]:
        if self.source.endswith(".py"):
            return python_driver(self.source)
        return [place.compile(self.source, *self.libraries)]


class Lmdb(Driven):
    """LMDB: no checks of loaded data."""

    name = "lmdb"
    note = "LMDB returns pointers into its mapping and does not check the data."
    about = "LMDB through liblmdb: loads from a mapping, stores by write(2)"
    needs = Needs(debian=("liblmdb-dev",), programs=("gcc",), build=COMPILER, headers=("lmdb.h",))
    source = "lmdb.c"
    libraries = ("lmdb",)
    data_files = "data.mdb"


class RocksDb(Driven):
    """RocksDB with read(2). Records from BASE on are in the write-ahead log."""

    name = "rocksdb"
    note = (
        "Blocks of tables have checksums. A log record that cannot be read is refused; one whose checksum is "
        "wrong ends the log (point-in-time recovery, the default), reported only in the file LOG."
    )
    about = "RocksDB through librocksdb, no block cache; pread(2), a checksum for each block"
    needs = Needs(debian=("librocksdb-dev",), programs=("gcc",), build=COMPILER, headers=("rocksdb/c.h",))
    journal = "the write-ahead log of a killed process"
    source = "rocksdb.c"
    stamp = re.compile(r"[\d/:.-]+ [\da-f]+ ")
    libraries = ("rocksdb",)
    options = ("read",)
    data_files = "*.sst"
    journal_files = "*.log"

    def dirty(self, place: Place, process: Process) -> None:
        """See Application.dirty."""
        process.send("write\n")
        process.until("written")

    def log(self, place: Place, process: Process) -> list[str]:
        """See Application.log. The log file is in the working directory."""
        texts = [path.read_text(errors="backslashreplace") for path in place.scratch.glob("*_LOG")]
        lines = [line for text in texts for line in text.splitlines()]
        return [*process.output, *(line for line in lines if "[WARN]" in line or "[ERROR]" in line)]


class RocksDbMmap(RocksDb):
    """RocksDB with mapped tables."""

    name = "rocksdb-mmap"
    note = "As rocksdb; a load from a mapped table returns no error."
    about = "as rocksdb, with allow_mmap_reads: tables are mapped"
    options = ("mmap",)


class LibPmem(Driven):
    """libpmem: the simplest library of the PMDK."""

    name = "libpmem"
    note = "Loads and stores, no checks."
    about = "PMDK's libpmem: pmem_map_file(), loads and stores"
    needs = Needs(debian=("libpmem-dev",), programs=("gcc",), build=COMPILER, headers=("libpmem.h",))
    source = "pmem.c"
    libraries = ("pmem",)
    data_files = "records"


class LibPmemObj(Driven):
    """libpmemobj: an object pool with its own transaction log."""

    name = "libpmemobj"
    note = "Checksums protect the pool's metadata, not the contents of objects."
    about = "PMDK's libpmemobj: a pool with its records in the root object, transactions"
    needs = Needs(debian=("libpmemobj-dev",), programs=("gcc",), build=COMPILER, headers=("libpmemobj.h",))
    source = "pmemobj.c"
    libraries = ("pmemobj",)
    data_files = "pool"


class NumpyMemmap(Driven):
    """numpy.memmap: an array in a file."""

    name = "numpy-memmap"
    note = "Loads and stores, no checks."
    about = "numpy.memmap of 2400 rows: loads from a mapping"
    needs = Needs(pypi=("numpy",), modules=("numpy",))
    source = "numpy_memmap.py"
    data_files = "records.dat"


class RaggedTraining(Driven):
    """mmap_ninja: training samples of unequal length."""

    name = "mmap-ninja"
    note = "Samples are views of one mapping, without checks."
    about = "mmap_ninja RaggedMmap of 2400 samples of unequal length: loads from a mapping"
    needs = Needs(pypi=("mmap-ninja",), modules=("mmap_ninja",))
    source = "ragged_mmap.py"
    data_files = "*.ninja"


class DuckDb(Driven):
    """DuckDB. Records from BASE on are in the write-ahead log."""

    name = "duckdb"
    note = "Blocks and log entries have checksums. DuckDB refuses to open a database with an incomplete log."
    about = "DuckDB from Python, cache emptied before each read; pread(2), a checksum for each 256 KiB"
    needs = Needs(pypi=("duckdb",), modules=("duckdb",))
    journal = "records.duckdb.wal of a killed process"
    source = "duckdb_table.py"
    data_files = "records.duckdb"
    journal_files = "records.duckdb.wal"

    def dirty(self, place: Place, process: Process) -> None:
        """See Application.dirty."""
        process.send("write\n")
        process.until("written")
