"""sqlite3 shell on one database: rollback journal, write-ahead log, memory-mapped."""

from __future__ import annotations

import re
import signal
from typing import ClassVar

from daxemu.apps.application import Application, Needs, Place, Spot, find_record, number_of
from daxemu.apps.process import Process
from daxemu.apps.records import BASE, COUNT, ReadBack, compare_lines, text
from daxemu.apps.situations import Part

_COMPLAINT = re.compile(r"(Runtime error|Parse error|Error)\b.*")
_ALL = "SELECT printf('%06d ', id) || body FROM record ORDER BY id;\n.print end\n"


def _insert(numbers: range) -> str:
    rows = "".join(f"INSERT INTO record VALUES ({number}, '{text(number)}');\n" for number in numbers)
    return f"BEGIN;\n{rows}COMMIT;\n"


class _Sqlite(Application):
    needs = Needs(debian=("sqlite3",), programs=("sqlite3",))
    journal_file: ClassVar[str]
    pragmas: ClassVar[str] = ""

    def start(self, place: Place) -> Process:
        """See Application.start."""
        process = place.start(["sqlite3", "-batch", place.root / "records.db"])
        process.send(f"PRAGMA cache_size=4;\n{self.pragmas}.print ready\n")
        process.until("ready")
        return process

    def read(self, place: Place, process: Process) -> ReadBack:
        """See Application.read."""
        process.send(_ALL)
        return compare_lines(process.until("end"), _COMPLAINT)

    def spot(self, place: Place, part: Part) -> Spot:
        """See Application.spot."""
        name = self.journal_file if part == "journal" else "records.db"
        return find_record(number_of(part), [place.root / name])

    def make(self, place: Place, script: str) -> None:
        """Run a script, then kill the shell. Raises Ended, TimedOut."""
        process = place.start(["sqlite3", "-batch", "-bail", place.root / "records.db"])
        for part in script.splitlines(keepends=True):
            process.send(part)
        process.send(".print done\n")
        process.until("done")
        process.ask_to_end(signal.SIGKILL)


class SqliteRollback(_Sqlite):
    """sqlite3 with a rollback journal.

    A killed transaction leaves a hot journal; the next start rolls the transaction back.
    """

    name = "sqlite3"
    note = (
        "Pages have no checksums. With an unreadable hot journal the database does not open. A changed one "
        "is written back over good data: the journal's checksum samples every 200th byte only."
    )
    about = "sqlite3 shell, rollback journal, a cache of 4 pages; read(2)"
    journal = "records.db-journal of a transaction killed half way"
    journal_file = "records.db-journal"
    _in_transaction = False

    def prepare(self, place: Place) -> None:
        """See Application.prepare."""
        table = "CREATE TABLE record (id INTEGER PRIMARY KEY, body TEXT NOT NULL);\n"
        self.make(place, table + _insert(range(COUNT)))

    def crash(self, place: Place) -> None:
        """See Application.crash."""
        self.make(place, self._change())

    def dirty(self, place: Place, process: Process) -> None:
        """See Application.dirty."""
        process.send(self._change() + ".print dirty\n")
        process.until("dirty")
        self._in_transaction = True

    def read(self, place: Place, process: Process) -> ReadBack:
        """See Application.read."""
        if self._in_transaction:
            process.send("ROLLBACK;\n")
            self._in_transaction = False
        return super().read(place, process)

    @staticmethod
    def _change() -> str:
        """Return a transaction that is never committed, large enough to spill to the database file."""
        return (
            "PRAGMA cache_size=4;\nBEGIN;\n"
            "UPDATE record SET body = substr(body, 1, 400) || printf('%.100c', 'x');\n"
        )


class SqliteMmap(SqliteRollback):
    """sqlite3 with a mapped database file."""

    name = "sqlite3-mmap"
    note = "As sqlite3, but a load from the mapping consumes the poison."
    about = "sqlite3 shell, rollback journal, PRAGMA mmap_size=256M: loads from a mapping"
    pragmas = "PRAGMA mmap_size=268435456;\n"


class SqliteWal(_Sqlite):
    """sqlite3 with a write-ahead log. Records from BASE on are in the log."""

    name = "sqlite3-wal"
    note = (
        "A frame with a wrong checksum ends the log: all later transactions are gone, without an error. "
        "The -shm file is mapped, so a removal kills the shell."
    )
    about = "sqlite3 shell, write-ahead log, a cache of 4 pages; read(2)"
    journal = "records.db-wal, with transactions since the last checkpoint"
    journal_file = "records.db-wal"
    pragmas = "PRAGMA wal_autocheckpoint=0;\n"

    def prepare(self, place: Place) -> None:
        """See Application.prepare."""
        table = "CREATE TABLE record (id INTEGER PRIMARY KEY, body TEXT NOT NULL);\n"
        self.make(
            place,
            "PRAGMA journal_mode=WAL;\nPRAGMA wal_autocheckpoint=0;\n"
            + table
            + _insert(range(BASE))
            + "PRAGMA wal_checkpoint(TRUNCATE);\n"
            + _insert(range(BASE, COUNT)),
        )
