"""Redis with an append-only file, and with snapshots.

All data is in memory; files are read only at the start.
"""

from __future__ import annotations

import re
import signal
from collections.abc import Iterable
from pathlib import Path
from typing import ClassVar

from daxemu.apps.application import Application, Needs, Place, ReportedError, Spot, find_record, number_of
from daxemu.apps.process import Process
from daxemu.apps.records import BASE, COUNT, ReadBack, compare_lines, text
from daxemu.apps.situations import Part

_STAMP = re.compile(r"\d+:[A-Z] \d+ \w+ \d{4} [\d:.]+ [#*.-] ")
_READY = "eady to accept connections"
_REPLY = re.compile(r'\s*(\d+)\) "(.*)"')
_COMPLAINT = re.compile(r"(\(error\)|Error|Could not connect)\b.*")


class _Redis(Application):
    needs = Needs(debian=("redis-server", "redis-tools"), programs=("redis-server", "redis-cli"))
    stamp = _STAMP
    options: ClassVar[tuple[str, ...]]

    def start(self, place: Place) -> Process:
        """See Application.start."""
        socket = place.scratch / "redis.sock"
        general: list[str | Path] = [
            "--port",
            "0",
            "--unixsocket",
            socket,
            "--daemonize",
            "no",
            "--dir",
            place.root,
        ]
        process = place.start(["redis-server", *general, *self.options])
        process.until(_READY)
        return process

    def read(self, place: Place, process: Process) -> ReadBack:
        """See Application.read. Also writes one key, to see if writes still succeed."""
        keys = " ".join(f"record:{number}" for number in range(COUNT))
        replies = self._ask(place, [f"MGET {keys}", "SET probe 1"])
        found = [
            f"{int(match[1]) - 1:06d} {match[2]}" if (match := _REPLY.fullmatch(line)) else line
            for line in replies
        ]
        return compare_lines(found, _COMPLAINT)

    def stop(self, place: Place, process: Process) -> int:
        """See Application.stop."""
        return process.ask_to_end(signal.SIGTERM)

    def store(self, place: Place, numbers: Iterable[int]) -> None:
        """Store records. Raises ReportedError."""
        replies = self._ask(place, [f'SET record:{number} "{text(number)}"' for number in numbers])
        if refused := [line for line in replies if line != "OK"]:
            raise ReportedError(refused)

    def _ask(self, place: Place, commands: list[str]) -> list[str]:
        client: list[str | Path] = ["redis-cli", "--no-raw", "-s", place.scratch / "redis.sock"]
        _, replies = place.ask(client, "".join(f"{command}\n" for command in commands))
        return replies


class RedisAof(_Redis):
    """Redis with an append-only file.

    The base file was rewritten once; records from BASE on are in the incremental file.
    """

    name = "redis-aof"
    note = "Redis goes on from memory and cannot be restarted. The file has no checksums."
    about = "Redis, append-only file, appendfsync always; the file is read at the start only"
    journal = "the incremental append-only file"
    options = (
        *("--appendonly", "yes", "--appendfsync", "always", "--save", ""),
        *("--aof-use-rdb-preamble", "no"),
    )

    def prepare(self, place: Place) -> None:
        """See Application.prepare."""
        process = self.start(place)
        self.store(place, range(BASE))
        self._ask(place, ["BGREWRITEAOF"])
        process.until("Background AOF rewrite finished successfully")
        self.store(place, range(BASE, COUNT))
        process.ask_to_end(signal.SIGKILL)

    def spot(self, place: Place, part: Part) -> Spot:
        """See Application.spot."""
        pattern = "*.incr.aof" if part == "journal" else "*.base.aof"
        return find_record(number_of(part), sorted((place.root / "appendonlydir").glob(pattern)))


class RedisRdb(_Redis):
    """Redis with snapshots. A clean end writes a new snapshot."""

    name = "redis-rdb"
    note = (
        "Redis goes on from memory, and the snapshot at its end replaces the damaged file. On a removed "
        "device the snapshot cannot be written, and SIGTERM does not end Redis. The snapshot has a CRC."
    )
    about = "Redis, snapshots, no compression; dump.rdb is read at the start only and written at the end"
    options = ("--appendonly", "no", "--save", "3600 1", "--rdbcompression", "no")

    def prepare(self, place: Place) -> None:
        """See Application.prepare."""
        process = self.start(place)
        self.store(place, range(COUNT))
        self.stop(place, process)

    def spot(self, place: Place, part: Part) -> Spot:
        """See Application.spot."""
        return find_record(number_of(part), [place.root / "dump.rdb"])
