"""PostgreSQL: a table read by a client, with and without data checksums."""

from __future__ import annotations

import re
import signal
from pathlib import Path
from typing import ClassVar

from daxemu.apps.application import Application, Needs, Place, Spot, find_record, number_of
from daxemu.apps.install import program
from daxemu.apps.process import Process
from daxemu.apps.records import BASE, COUNT, ReadBack, compare_lines, text
from daxemu.apps.situations import Part

_SETTINGS = {
    "listen_addresses": "",
    "shared_buffers": "128kB",
    "autovacuum": "off",
    "synchronize_seqscans": "off",
    "restart_after_crash": "on",
}
_STAMP = re.compile(r"[\d-]+ [\d:.]+ \w+ \[\d+\] ")
_COMPLAINT = re.compile(r"(psql:.*|ERROR|FATAL|PANIC|WARNING|server closed|connection to server)\b.*")


def _tool(name: str) -> Path:
    return program(name) or Path(name)


def _copy(numbers: range) -> str:
    return "".join(f"{number}\t{text(number)}\n" for number in numbers)


class PostgreSql(Application):
    """PostgreSQL without data checksums. Records from BASE on are in the write-ahead log."""

    name = "postgresql"
    note = (
        "Recovery takes an unreadable or invalid log record for the end of the log, and the database opens "
        "without the commits after that record. The server log has one line about it, at the first start."
    )
    about = "PostgreSQL, shared_buffers of 128 kB, no data checksums; pread(2)"
    needs = Needs(
        debian=("postgresql", "postgresql-client"),
        programs=("postgres", "initdb", "psql"),
        version=("postgres", "--version"),
    )
    journal = "pg_wal after an immediate shutdown (SIGQUIT)"
    user = "postgres"
    stamp = _STAMP
    initdb: ClassVar[tuple[str, ...]] = ()

    def prepare(self, place: Place) -> None:
        """See Application.prepare."""
        place.make(
            [
                *(_tool("initdb"), "-D", place.root / "pg", "--no-sync", "--no-locale", "-E", "UTF8"),
                *("-A", "trust", "-U", "postgres", "--wal-segsize=1", *self.initdb),
            ]
        )
        process = self.start(place)
        place.make(self._psql(place, "CREATE TABLE record (id int PRIMARY KEY, body text NOT NULL)"))
        place.make(self._psql(place, "COPY record FROM STDIN"), _copy(range(BASE)))
        place.make(self._psql(place, "CHECKPOINT"))
        place.make(self._psql(place, "COPY record FROM STDIN"), _copy(range(BASE, COUNT)))
        process.ask_to_end(signal.SIGQUIT)

    def spot(self, place: Place, part: Part) -> Spot:
        """See Application.spot."""
        if part == "journal":
            segments = [path for path in (place.root / "pg" / "pg_wal").iterdir() if path.is_file()]
            newest_first = sorted(segments, key=lambda path: path.stat().st_mtime, reverse=True)
            return find_record(number_of(part), newest_first)
        files = [path for path in (place.root / "pg" / "base").rglob("*") if path.is_file()]
        return find_record(number_of(part), sorted(files))

    def start(self, place: Place) -> Process:
        """See Application.start."""
        settings = [word for name, value in _SETTINGS.items() for word in ("-c", f"{name}={value}")]
        process = place.start([_tool("postgres"), "-D", place.root / "pg", "-k", place.scratch, *settings])
        process.until("database system is ready to accept connections")
        return process

    def read(self, place: Place, process: Process) -> ReadBack:
        """See Application.read."""
        query = "SELECT to_char(id, 'FM000000') || ' ' || body FROM record ORDER BY id"
        _, output = place.ask(self._psql(place, query))
        return compare_lines(output, _COMPLAINT)

    def dirty(self, place: Place, process: Process) -> None:
        """See Application.dirty."""
        place.ask(self._psql(place, f"UPDATE record SET body = body WHERE id >= {BASE}"))

    def stop(self, place: Place, process: Process) -> int:
        """See Application.stop: SIGINT, PostgreSQL's fast shutdown."""
        return process.ask_to_end(signal.SIGINT)

    @staticmethod
    def _psql(place: Place, command: str) -> list[str | Path]:
        return ["psql", "-h", place.scratch, "-U", "postgres", "-XAtq", "-c", command, "postgres"]


class PostgreSqlChecksums(PostgreSql):
    """PostgreSQL with data checksums, the default of later Debian versions."""

    name = "postgresql-checksums"
    note = "As postgresql, but a changed page of a table is found."
    about = "as postgresql, with initdb --data-checksums"
    initdb = ("--data-checksums",)
