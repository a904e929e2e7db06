"""The blocking client. Standard library only, but for what is typed: that needs msgspec once it is used."""

from __future__ import annotations

import contextlib
import os
import socket
import time
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self, TypeVar

from daxemu.client import connection as wire
from daxemu.client.notices import Notice, notice_of
from daxemu.host.proc.mountinfo import Mount, mount_of

if TYPE_CHECKING:
    import msgspec

    from daxemu.events import Event
    from daxemu.protocol import Request

    R = TypeVar("R", bound=msgspec.Struct)


class Client:
    """One connection to one supervisor."""

    def __init__(self, mount: Mount, *, patience: float | None = None) -> None:
        """``patience``: seconds for each whole exchange, the first one with the connecting; without a limit
        if None. Raises NotMounted when no process listens at the mount's socket, Busy if connecting takes
        longer, NotASupervisor if the socket is not the mount owner's.
        """
        self.mount = mount
        self._patience = patience
        self._buffer = bytearray()
        self._searched = 0
        began = time.monotonic()
        self._socket = wire.connect(mount, wire.CONNECT_PATIENCE if patience is None else patience)
        self._spent = time.monotonic() - began
        self._until: float | None = None
        self.pid = wire.peer_of(self._socket)[0]
        """The supervisor's process, as the kernel says; 0 if this pid namespace does not show that."""

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
        self._socket.close()

    def set_patience(self, seconds: float | None) -> None:
        """How long to wait for each answer and each event from now on; an event that does not come is a
        TimeoutError.
        """
        self._patience = seconds
        self._spent = 0.0

    def request(self, op: str, **arguments: Any) -> dict[str, Any]:
        """Ask, and wait for the answer. Raises what the supervisor raised, NotMounted if it went away, Busy
        if it does not answer in time, NotASupervisor if the answer is none.
        """
        return self._request(op, arguments)

    def _request(self, op: str, arguments: dict[str, Any], more: float = 0.0) -> dict[str, Any]:
        """``more``: seconds that the supervisor may take beyond the client's patience."""
        return wire.result_of(self.mount, self._converse(wire.encode({"op": op, **arguments}), more))

    def settle(self, patience: float = wire.SETTLE_PATIENCE) -> float:
        """Wait until every failure so far was handled and every signal of them is an event: as delivered, or
        as pending for a process that is stopped. Return the seconds that took.

        Raises Busy if it takes longer than ``patience`` seconds; the client's own patience comes on top.
        """
        return wire.seconds_of(self.mount, self._request("settle", {"patience": patience}, patience))

    def ask(self, request: Request[R]) -> R:
        """The same with types: one of daxemu.protocol's requests, answered with what it is declared to."""
        return wire.typed_result_of(self.mount, request, self._converse(wire.encode_typed(request)))

    def follow(self, after: int = 0) -> Iterator[dict[str, Any]]:
        """The events of this mount with ``seq`` above ``after``, then each new one, until the mount ends.

        From then on nothing else can be asked on this connection. After a TimeoutError the iterator goes on.
        """
        return map(partial(wire.event_dict_of, self.mount), self.follow_lines(after))

    def follow_lines(self, after: int = 0) -> Iterator[bytes]:
        """As :meth:`follow`, each event as its line of JSON."""
        self._begin()
        self._send(wire.encode({"op": "follow", "after": after}))
        return _SocketLines(self)

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
        subscribe = wire.encode_typed(wire.follow_of(after, kinds, files, ranges, pids))
        self._begin()
        self._send(subscribe)
        return map(partial(wire.event_of, self.mount), _SocketLines(self))

    def notices(self, *files: wire.File, after: int | None = None) -> Iterator[Notice]:
        """What this process should know: bytes lost in ``files`` or, if none are named, in any file of the
        mount that it has mapped; and the end of the device. ``after`` None: from now on.

        The subscription holds once this returns; mappings are looked at when the event comes. No signal is
        needed, nor does one come in its place.
        """
        since = self.request("status")["events"] if after is None else after
        found = self.events(since, files=files or None)
        return filter(None, map(partial(notice_of, mount=self.mount, only_mapped=not files), found))

    def _converse(self, line: bytes, more: float = 0.0) -> bytes:
        self._begin(more)
        try:
            self._send(line)
            answer = self._read_line()
        except TimeoutError as error:
            raise wire.no_answer(self.mount, self.pid) from error
        if not answer:
            raise wire.went_away(self.mount)
        return answer

    def _send(self, line: bytes) -> None:
        # Where it hung up, it may have said why before: whoever reads finds that, or the end.
        with contextlib.suppress(ConnectionError):
            self._limit()
            self._socket.sendall(line)

    def _read_line(self) -> bytes:
        """The next line, without its newline; nothing at the end. Raises TimeoutError, after which the next
        call goes on, and NotASupervisor for a line that is too long.
        """
        while (end := self._buffer.find(b"\n", self._searched)) < 0:
            self._searched = len(self._buffer)
            if self._searched > wire.MAX_REPLY:
                raise wire.nonsense(self.mount, f"a line of more than {wire.MAX_REPLY >> 20} MiB")
            self._limit()
            try:
                chunk = self._socket.recv(1 << 18)
            except ConnectionError:
                return b""
            if not chunk:
                return b""
            self._buffer += chunk
        line = bytes(self._buffer[:end])
        del self._buffer[: end + 1]
        self._searched = 0
        return line

    def _limit(self) -> None:
        """Let the next system call on the socket wait no longer than the exchange may."""
        left = None if self._until is None else self._until - time.monotonic()
        if left is not None and left <= 0:
            raise TimeoutError("timed out")
        self._socket.settimeout(left)

    def _begin(self, more: float = 0.0) -> None:
        """Set the deadline of an exchange, or of one event, that begins now: the client's patience and
        ``more`` seconds, less what the connecting took of the first.
        """
        left = None if self._patience is None else self._patience - self._spent + more
        self._until = None if left is None else time.monotonic() + left
        self._spent = 0.0


class _SocketLines:
    """The events of a subscription, each as its line. No generator: a TimeoutError would end that."""

    def __init__(self, client: Client) -> None:
        self._client = client

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> bytes:
        self._client._begin()
        line = self._client._read_line()
        if not line:
            raise StopIteration
        return line
