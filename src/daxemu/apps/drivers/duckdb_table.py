"""DuckDB driver: records in a table. Interface: daxemu.apps.programs.driven."""

import os
import sys
from pathlib import Path

import duckdb

BASE = 2000


def main(verb: str, directory: str) -> None:
    try:
        connection = duckdb.connect(Path(directory) / "records.duckdb")
        # No automatic checkpoint: records stay in the log.
        connection.execute("SET wal_autocheckpoint = '1TB'; PRAGMA disable_checkpoint_on_shutdown")
    except duckdb.Error as error:
        sys.exit(f"error: {error}")
    if verb == "prepare":
        rows = [(number, line.rstrip("\n")) for number, line in enumerate(sys.stdin)]
        connection.execute("SET force_compression = 'uncompressed'")
        connection.execute("CREATE TABLE record (id INTEGER, body VARCHAR)")
        connection.begin()
        connection.executemany("INSERT INTO record VALUES (?, ?)", rows[:BASE])
        connection.commit()
        connection.execute("CHECKPOINT")
        connection.begin()
        connection.executemany("INSERT INTO record VALUES (?, ?)", rows[BASE:])
        connection.commit()
        os._exit(0)
    print("ready", flush=True)
    for line in sys.stdin:
        try:
            if line == "write\n":
                late = connection.execute(f"SELECT * FROM record WHERE id >= {BASE}").fetchall()
                connection.begin()
                connection.execute(f"DELETE FROM record WHERE id >= {BASE}")
                connection.executemany("INSERT INTO record VALUES (?, ?)", late)
                connection.commit()
                print("written", flush=True)
                continue
            # Drop the buffer cache, so that the query reads the file.
            connection.execute("SET memory_limit = '400KB'; RESET memory_limit")
            for number, body in connection.execute("SELECT id, body FROM record ORDER BY id").fetchall():
                print(f"{number:06d} {body}")
        except duckdb.Error as error:
            print(f"error: {error}")
        print("end", flush=True)
    try:
        connection.close()
    except duckdb.Error as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2])
