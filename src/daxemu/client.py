"""A blocking client of a mount's control socket. Standard library only, no FUSE.

    from daxemu.client import Client
    with Client.at("/mnt/pmem/file") as client:
        client.request("inject", ino=2, ranges=[[4096, 4096]])

See supervisor/protocol.py for the requests and what they answer.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from daxemu.errors import ERRORS, Busy, DaxemuError, NotMounted
from daxemu.host.mountinfo import Mount, mount_of

_UCRED = struct.Struct("=iII")


class Client:
    """One connection to one supervisor."""

    def __init__(self, mount: Mount, *, patience: float | None = None) -> None:
        """``patience``: seconds to wait for each answer, for ever if None. Raises NotMounted when nobody
        answers at the mount's socket.
        """
        self.mount = mount
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._socket.settimeout(patience)
        directory = -1
        try:
            # By way of the directory: a socket's path has 108 bytes at most, a device's path may be longer.
            directory = os.open(mount.device, os.O_PATH | os.O_CLOEXEC)
            self._socket.connect(f"/proc/self/fd/{directory}/{mount.socket.name}")
        except OSError as error:
            self._socket.close()
            raise NotMounted(
                f"no supervisor answers for {mount.mountpoint} ({error.strerror}): "
                f"daxemu umount --force {mount.mountpoint}"
            ) from error
        finally:
            if directory >= 0:
                os.close(directory)
        if _is_dead(self._socket):
            self._socket.close()
            raise NotMounted(
                f"the supervisor of {mount.mountpoint} is dead: daxemu umount {mount.mountpoint}"
            )
        self._lines = self._socket.makefile("rb")

    @classmethod
    def at(cls, path: str | os.PathLike[str]) -> Client:
        """The supervisor of the mount that ``path`` is on. Raises NotMounted."""
        return cls(mount_of(Path(path)))

    def __enter__(self) -> Client:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def close(self) -> None:
        """Hang up."""
        self._lines.close()
        self._socket.close()

    def request(self, op: str, **arguments: Any) -> dict[str, Any]:
        """Ask, and wait for the answer. Raises what the supervisor raised, NotMounted if it went away, Busy
        if it does not answer in time.
        """
        self._send({"op": op, **arguments})
        try:
            line = self._lines.readline()
        except TimeoutError as error:
            where = self.mount.mountpoint
            raise Busy(f"the supervisor of {where} does not answer: daxemu umount --force {where}") from error
        except ConnectionError:
            line = b""
        if not line:
            raise NotMounted(f"the supervisor of {self.mount.mountpoint} went away")
        reply = json.loads(line)
        if not reply["ok"]:
            raise ERRORS.get(reply["error"], DaxemuError)(reply["message"])
        result: dict[str, Any] = reply["result"]
        return result

    def follow(self, after: int = 0) -> Iterator[dict[str, Any]]:
        """The events of this mount with ``seq`` above ``after``, then each new one, until the mount ends."""
        for line in self.follow_lines(after):
            yield json.loads(line)

    def follow_lines(self, after: int = 0) -> Iterator[bytes]:
        """As :meth:`follow`, each event as its line of JSON."""
        self._send({"op": "follow", "after": after})
        for line in self._lines:
            yield line.rstrip(b"\n")

    def _send(self, message: dict[str, Any]) -> None:
        # Where it hung up, it may have said why before: whoever reads finds that, or the end.
        with contextlib.suppress(ConnectionError):
            self._socket.sendall(json.dumps(message).encode() + b"\n")


def _is_dead(connection: socket.socket) -> bool:
    """Whether the process that listens has ended, but for a thread that waits on its own mount and cannot be
    killed: its sockets stay open, and nobody answers there any more.
    """
    credentials = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _UCRED.size)
    pid, _, _ = _UCRED.unpack(credentials)
    try:
        fields = Path(f"/proc/{pid}/stat").read_bytes().rpartition(b") ")[2].split()
    except OSError:
        return True
    return fields[0] in (b"Z", b"X")
