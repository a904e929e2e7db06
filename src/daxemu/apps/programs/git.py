"""git: objects read from a mapped pack."""

from __future__ import annotations

import hashlib
import re

from daxemu.apps.application import Application, Needs, Place, Spot, number_of
from daxemu.apps.process import Process
from daxemu.apps.records import COUNT, ReadBack, compare_lines, text
from daxemu.apps.situations import Part

_HEADER = re.compile(r"blob (\d{6})")
_COMPLAINT = re.compile(r"(error|fatal):.*|.* missing")
_END = "end missing"
"""git's answer to "end", a name without an object: marks the end of an answer."""


def _name(number: int) -> str:
    """Return the object name (SHA-1) of a record as a blob."""
    body = text(number).encode()
    return hashlib.sha1(b"blob %d\0" % len(body) + body).hexdigest()


class Git(Application):
    """git: one long-running ``git cat-file --batch``, as on servers."""

    name = "git"
    note = "git has no handler for SIGBUS. A changed object fails zlib's checksum or its own SHA-1."
    about = "git cat-file --batch on a repository with one pack: loads from a mapping, zlib, SHA-1"
    needs = Needs(debian=("git",), programs=("git",))

    def prepare(self, place: Place) -> None:
        """See Application.prepare."""
        place.make(["git", "init", "-q", "--bare", "-b", "main", place.root / "repo"])
        blobs = "".join(
            f"blob\nmark :{number + 1}\ndata {len(text(number))}\n{text(number)}\n" for number in range(COUNT)
        )
        names = "".join(f"M 100644 :{number + 1} r/{number:06d}\n" for number in range(COUNT))
        commit = f"commit refs/heads/main\ncommitter T <t@t> 0 +0000\ndata 3\nall\n{names}\n"
        place.make(
            [*self._git(place), "-c", "fastimport.unpackLimit=0", "fast-import", "--quiet"], blobs + commit
        )

    def spot(self, place: Place, part: Part) -> Spot:
        """See Application.spot."""
        number = number_of(part)
        wanted = _name(number)
        (pack,) = (place.root / "repo" / "objects" / "pack").glob("*.pack")
        for line in place.make([*self._git(place), "verify-pack", "-v", pack]):
            words = line.split()
            if words[0] == wanted:
                size, offset = int(words[3]), int(words[4])
                return Spot(pack, offset + size // 2, 16, f"record {number}")
        raise AssertionError(f"{wanted} is not in its own pack")

    def start(self, place: Place) -> Process:
        """See Application.start."""
        process = place.start([*self._git(place), "cat-file", "--batch=%(objecttype) %(rest)"])
        process.send("end\n")
        process.until(_END)
        return process

    def read(self, place: Place, process: Process) -> ReadBack:
        """See Application.read."""
        process.send("".join(f"{_name(number)} {number:06d}\n" for number in range(COUNT)) + "end\n")
        output = iter(process.until(_END)[:-1])
        lines = []
        for line in output:
            header = _HEADER.fullmatch(line)
            lines.append(f"{header[1]} {next(output, '')}" if header else line)
        return compare_lines(lines, _COMPLAINT)

    @staticmethod
    def _git(place: Place) -> list[str]:
        return ["git", "--git-dir", str(place.root / "repo")]
