"""etcd: a key for each record, in one member without peers."""

from __future__ import annotations

import re
import signal
from collections.abc import Iterable, Iterator

from daxemu.apps.application import Application, Needs, Place, Spot, find_record, number_of
from daxemu.apps.process import Process
from daxemu.apps.records import BASE, COUNT, ReadBack, compare_lines, text
from daxemu.apps.situations import Part

_CLIENT, _PEER = "unix://localhost:1", "unix://localhost:2"
"""Sockets in the working directory of the process."""
_KEY = re.compile(r"\d{6}")
_COMPLAINT = re.compile(r'(Error:|\{"level":"(warn|error)").*')
_COMMITTED = 0.5
"""Seconds after which etcd has committed every store to the data file; etcd's own interval is 0.1 s."""


class Etcd(Application):
    """etcd with bbolt. All records are in the data file and in the write-ahead log."""

    name = "etcd"
    note = (
        "bbolt maps the data file with MAP_POPULATE and does not check loaded data. The Go runtime ends the "
        "program with a stack trace at each SIGBUS. Entries of the write-ahead log have checksums, and etcd "
        "refuses to start with a log that is damaged in the middle."
    )
    about = "etcd of one member, read with etcdctl: loads from a mapping of the data file"
    needs = Needs(debian=("etcd-server", "etcd-client"), programs=("etcd", "etcdctl"))
    journal = "the write-ahead log of a killed process"
    stamp = re.compile(r"[\d-]+ [\d:.]+ ")

    def prepare(self, place: Place) -> None:
        """See Application.prepare."""
        process = self.start(place)
        for numbers in (range(BASE), range(BASE, COUNT)):
            self._put(place, numbers)
        process.ends_within(_COMMITTED)
        process.ask_to_end(signal.SIGKILL)

    def spot(self, place: Place, part: Part) -> Spot:
        """See Application.spot."""
        member = place.root / "etcd" / "member"
        files = sorted(member.glob("wal/*.wal")) if part == "journal" else [member / "snap" / "db"]
        return find_record(number_of(part), files)

    def start(self, place: Place) -> Process:
        """See Application.start."""
        for socket in place.scratch.glob("localhost:*"):
            socket.unlink()  # of a killed process
        process = place.start(
            [
                *("etcd", "--data-dir", place.root / "etcd", "--max-txn-ops", str(COUNT)),
                *("--listen-client-urls", _CLIENT, "--advertise-client-urls", _CLIENT),
                *("--listen-peer-urls", _PEER, "--initial-advertise-peer-urls", _PEER),
                *("--initial-cluster", f"default={_PEER}"),
            ]
        )
        process.until("ready to serve client requests")
        return process

    def read(self, place: Place, process: Process) -> ReadBack:
        """See Application.read."""
        _, output = place.ask(self._etcdctl("get", "--from-key", ""))
        return compare_lines(_joined(output), _COMPLAINT)

    def dirty(self, place: Place, process: Process) -> None:
        """See Application.dirty."""
        self._put(place, range(BASE, COUNT))

    def stop(self, place: Place, process: Process) -> int:
        """See Application.stop."""
        return process.ask_to_end()

    def _put(self, place: Place, numbers: Iterable[int]) -> None:
        """Store records in one transaction: no comparison, the requests, no requests otherwise."""
        requests = "".join(f'put {number:06d} "{text(number)}"\n' for number in numbers)
        place.make(self._etcdctl("txn"), f"\n{requests}\n\n")

    @staticmethod
    def _etcdctl(*words: str) -> list[str]:
        return ["etcdctl", "--endpoints", _CLIENT, "--command-timeout", "10s", *words]


def _joined(lines: Iterable[str]) -> Iterator[str]:
    """Yield ``KEY VALUE`` for each pair of lines, and all other lines as they are."""
    rest = iter(lines)
    for line in rest:
        yield f"{line} {next(rest, '')}" if _KEY.fullmatch(line) else line
