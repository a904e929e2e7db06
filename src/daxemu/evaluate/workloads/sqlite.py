"""sqlite3 workload: transactions rewriting a few rows, reads of single rows."""

from __future__ import annotations

import random
import sqlite3
from collections.abc import Iterator

from daxemu.evaluate.workloads.base import Mismatch, Truth, Workload, ino_of, pattern

NAME = "rows.db"
ANYWHERE = -1


class SqliteRun(Workload):
    """Run of specs.Sqlite. One row is one record. A transaction is acknowledged when COMMIT returns."""

    failures = (OSError, sqlite3.Error)

    def prepare(self) -> None:
        connection = self._connect()
        connection.execute("CREATE TABLE record (id INTEGER PRIMARY KEY, content BLOB NOT NULL)")
        connection.execute("BEGIN")
        connection.executemany(
            "INSERT INTO record VALUES (?, ?)", ((i, self._content(i, 0)) for i in range(self.spec.count))
        )
        connection.execute("COMMIT")
        connection.close()

    def open(self) -> None:
        self._truth = Truth(self.state / "truth", self.spec.count)
        self._connection: sqlite3.Connection | None = None

    def step(self, rng: random.Random) -> int:
        if self._connection is None:
            self._connection = self._connect()
        try:
            if rng.randrange(2):
                return self._read(self._connection, rng.randrange(self.spec.count))
            return self._write(self._connection, rng.sample(range(self.spec.count), self.spec.rows))
        except sqlite3.Error:
            # After an I/O error SQLite may hold stale state: open the file again.
            self._connection.close()
            self._connection = None
            raise

    def _read(self, connection: sqlite3.Connection, index: int) -> int:
        row = connection.execute("SELECT content FROM record WHERE id = ?", (index,)).fetchone()
        if row is None:
            raise sqlite3.DatabaseError(f"row {index} is gone")
        return len(row[0])

    def _write(self, connection: sqlite3.Connection, indices: list[int]) -> int:
        rows = [(self._content(index, self._truth.begin(index)), index) for index in indices]
        connection.execute("BEGIN IMMEDIATE")
        connection.executemany("UPDATE record SET content = ? WHERE id = ?", rows)
        connection.execute("COMMIT")
        for index in indices:
            self._truth.settle(index)
        return sum(len(content) for content, _ in rows)

    def check(self) -> Iterator[Mismatch]:
        truth = Truth(self.state / "truth", self.spec.count)
        path = self.root / NAME
        connection: sqlite3.Connection | None = None
        for index in range(self.spec.count):
            candidates = [self._content(index, version) for version in truth.possible(index)]
            try:
                connection = connection or self._connect()
                row = connection.execute("SELECT content FROM record WHERE id = ?", (index,)).fetchone()
            except sqlite3.Error:
                yield Mismatch(NAME, ino_of(path), ANYWHERE, self.spec.record, "unreadable")
                if connection is not None:
                    connection.close()
                connection = None
                continue
            if row is None or row[0] not in candidates:
                yield Mismatch(NAME, ino_of(path), ANYWHERE, self.spec.record, "wrong")
        if connection is not None:
            connection.close()

    def size(self) -> int:
        return int(self.spec.count * self.spec.record)

    def _connect(self) -> sqlite3.Connection:
        connection = sqlite3.connect(self.root / NAME, isolation_level=None, timeout=5.0)
        connection.execute("PRAGMA synchronous = NORMAL")
        return connection

    def _content(self, index: int, version: int) -> bytes:
        return pattern(self.seed, 2, index, version, self.spec.record)
