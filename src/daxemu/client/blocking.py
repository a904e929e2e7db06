"""The blocking client. Standard library only, but for what is typed: that needs msgspec once it is used."""

from __future__ import annotations

import contextlib
import json
import os
import socket
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self, TypeVar

from daxemu.client import connection as wire
from daxemu.client.notices import Notice, notice_of
from daxemu.errors import Busy
from daxemu.host.mountinfo import Mount, mount_of

if TYPE_CHECKING:
    import msgspec

    from daxemu.events import Event
    from daxemu.protocol import Request

    R = TypeVar("R", bound=msgspec.Struct)


class Client:
    """One connection to one supervisor."""

    def __init__(self, mount: Mount, *, patience: float | None = None) -> None:
        """``patience``: seconds to wait for each answer, for ever if None. Raises NotMounted when nobody
        answers at the mount's socket.
        """
        self.mount = mount
        self._socket = wire.connect(mount)
        self._socket.settimeout(patience)
        self._lines = self._socket.makefile("rb")

    @classmethod
    def at(cls, path: str | os.PathLike[str], *, patience: float | None = None) -> Self:
        """The supervisor of the mount that ``path`` is on. Raises NotMounted."""
        return cls(mount_of(Path(path)), patience=patience)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def hang_up(self) -> None:
        """End the connection under another thread that reads from it: it finds the end, and may close."""
        with contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        """Hang up."""
        self._lines.close()
        self._socket.close()

    def set_patience(self, seconds: float | None) -> None:
        """How long to wait for what comes from now on; an event that does not is a TimeoutError."""
        self._socket.settimeout(seconds)

    def request(self, op: str, **arguments: Any) -> dict[str, Any]:
        """Ask, and wait for the answer. Raises what the supervisor raised, NotMounted if it went away, Busy
        if it does not answer in time.
        """
        return wire.result_of(self._converse(wire.encode({"op": op, **arguments})))

    def ask(self, request: Request[R]) -> R:
        """The same with types: one of daxemu.protocol's requests, answered with what it is declared to."""
        return wire.typed_result_of(request, self._converse(wire.encode_typed(request)))

    def follow(self, after: int = 0) -> Iterator[dict[str, Any]]:
        """The events of this mount with ``seq`` above ``after``, then each new one, until the mount ends.

        From then on nothing else can be asked on this connection.
        """
        for line in self.follow_lines(after):
            yield json.loads(line)

    def follow_lines(self, after: int = 0) -> Iterator[bytes]:
        """As :meth:`follow`, each event as its line of JSON."""
        self._send(wire.encode({"op": "follow", "after": after}))
        for line in self._lines:
            yield line.rstrip(b"\n")

    def events(
        self,
        after: int = 0,
        *,
        kinds: Sequence[type[Event]] | None = None,
        files: Sequence[wire.File] | None = None,
        ranges: Sequence[tuple[int, int]] | None = None,
        pids: Sequence[int] | None = None,
    ) -> Iterator[Event]:
        """As :meth:`follow`, typed (daxemu.events), and only those that protocol.Follow would be sent.

        The subscription holds once this returns. Raises InvalidArgument for a file that is not there.
        """
        self._send(wire.encode_typed(wire.follow_of(after, kinds, files, ranges, pids)))
        return self._events()

    def _events(self) -> Iterator[Event]:
        from daxemu.events import decode

        for line in self._lines:
            yield decode(line)

    def notices(self, *files: wire.File, after: int | None = None) -> Iterator[Notice]:
        """What this process should know: bytes lost in ``files`` or, if none are named, in any file of the
        mount that it has mapped; and the end of the device. ``after`` None: from now on.

        The subscription holds once this returns; mappings are looked at when the event comes. No signal is
        needed, nor does one come in its place.
        """
        since = self.request("status")["events"] if after is None else after
        found = self.events(since, files=files or None)
        return (
            notice
            for event in found
            if (notice := notice_of(event, self.mount, only_mapped=not files)) is not None
        )

    def _converse(self, line: bytes) -> bytes:
        self._send(line)
        try:
            answer = self._lines.readline()
        except TimeoutError as error:
            where = self.mount.mountpoint
            raise Busy(f"the supervisor of {where} does not answer: daxemu umount --force {where}") from error
        except ConnectionError:
            answer = b""
        if not answer:
            raise wire.went_away(self.mount)
        return answer

    def _send(self, line: bytes) -> None:
        # Where it hung up, it may have said why before: whoever reads finds that, or the end.
        with contextlib.suppress(ConnectionError):
            self._socket.sendall(line)
