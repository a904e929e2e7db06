"""Blocking client. Standard library only; typed requests and events import msgspec at their first use."""

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
    """Connection to one supervisor."""

    def __init__(self, mount: Mount, *, patience: float | None = None) -> None:
        """Connect. ``patience``: limit in seconds for each whole exchange, None for no limit; the time of
        connecting counts for the first exchange. Raises NotMounted if no process listens at the socket of the
        mount, Busy if connecting takes longer than ``patience``, NotASupervisor if the owner of the mount
        does not own the socket.
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
        """Process id of the supervisor, from the kernel; 0 if the pid namespace does not show the process."""

    @classmethod
    def at(cls, path: str | os.PathLike[str], *, patience: float | None = None) -> Self:
        """Connect to the supervisor of the mount of ``path``. Raises NotMounted."""
        return cls(mount_of(Path(path)), patience=patience)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def hang_up(self) -> None:
        """End the connection while another thread reads from the connection. The other thread reads the end,
        and may call ``close``.
        """
        with contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        """Hang up."""
        self._socket.close()

    def set_patience(self, seconds: float | None) -> None:
        """Set the limit in seconds for each answer and each event from now on, None for no limit. An event
        after the limit is a TimeoutError.
        """
        self._patience = seconds
        self._spent = 0.0

    def request(self, op: str, **arguments: Any) -> dict[str, Any]:
        """Send a request and return the reply. Raises the exception of the supervisor, NotMounted if the
        supervisor went away, Busy if no answer comes in time, NotASupervisor for an invalid answer.
        """
        return self._request(op, arguments)

    def _request(self, op: str, arguments: dict[str, Any], more: float = 0.0) -> dict[str, Any]:
        """Send a request and return the reply. ``more``: seconds beyond the patience of the client."""
        return wire.result_of(self.mount, self._converse(wire.encode({"op": op, **arguments}), more))

    def settle(self, patience: float = wire.SETTLE_PATIENCE) -> float:
        """Wait until each failure so far was handled and each of its signals is in an event: as delivered, or
        as pending for a stopped process. Return the duration in seconds.

        Raises Busy after ``patience`` seconds. The patience of the client is added to this limit.
        """
        return wire.seconds_of(self.mount, self._request("settle", {"patience": patience}, patience))

    def ask(self, request: Request[R]) -> R:
        """Send a typed request of daxemu.protocol and return the typed reply. Raises as :meth:`request`."""
        return wire.typed_result_of(self.mount, request, self._converse(wire.encode_typed(request)))

    def follow(self, after: int = 0) -> Iterator[dict[str, Any]]:
        """Iterate over the events of the mount with ``seq`` above ``after``, then over new events, until the
        mount ends.

        The connection takes no further request. After a TimeoutError the iterator goes on.
        """
        return map(partial(wire.event_dict_of, self.mount), self.follow_lines(after))

    def follow_lines(self, after: int = 0) -> Iterator[bytes]:
        """Iterate as :meth:`follow`, with each event as a line of JSON."""
        self._begin()
        self._send(wire.encode({"op": "follow", "after": after}))
        return _EventLines(self)

    def events(
        self,
        after: int = 0,
        *,
        kinds: Sequence[type[Event]] | None = None,
        files: Sequence[wire.File] | None = None,
        ranges: Sequence[tuple[int, int]] | None = None,
        pids: Sequence[int] | None = None,
    ) -> Iterator[Event]:
        """Iterate as :meth:`follow`, with typed events (daxemu.events), filtered as by protocol.Follow.

        The subscription has begun when this method returns. Raises InvalidArgument for a missing file.
        """
        subscribe = wire.encode_typed(wire.follow_of(after, kinds, files, ranges, pids))
        self._begin()
        self._send(subscribe)
        return map(partial(wire.event_of, self.mount), _EventLines(self))

    def trace_lines(self, file: str | None = None) -> Iterator[bytes]:
        """Iterate over the records of a trace (daxemu.trace_record), each as a line of JSON, until the mount
        ends. ``file``: a glob, for operations on these files only. The trace has begun when this method
        returns.
        """
        line = self._converse(wire.encode({"op": "trace", "file": file}))
        wire.result_of(self.mount, line)
        return _EventLines(self)

    def notices(self, *files: wire.File, after: int | None = None) -> Iterator[Notice]:
        """Iterate over notices for the calling process: lost bytes of ``files``, and the end of the device.
        Without ``files``, lost bytes of each file of the mount that the process has mapped. ``after``: the
        number of the last event to skip; None for notices from now on.

        The subscription has begun when this method returns. Mappings are read when the event comes. Notices
        are independent of signals: a notice neither needs nor replaces a SIGBUS.
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
        # A peer that closed the connection may have sent the reason before: the next read finds the reason,
        # or the end.
        with contextlib.suppress(ConnectionError):
            self._limit()
            self._socket.sendall(line)

    def _read_line(self) -> bytes:
        """Return the next line, without its newline; empty at the end. Raises TimeoutError, after which the
        next call continues the line, and NotASupervisor for a line of more than MAX_REPLY bytes.
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
        """Limit the next system call on the socket to the rest of the time of the exchange."""
        left = None if self._until is None else self._until - time.monotonic()
        if left is not None and left <= 0:
            raise TimeoutError("timed out")
        self._socket.settimeout(left)

    def _begin(self, more: float = 0.0) -> None:
        """Set the deadline of an exchange, or of one event, that begins now: the patience of the client and
        ``more`` seconds. The time of connecting is subtracted from the first deadline.
        """
        left = None if self._patience is None else self._patience - self._spent + more
        self._until = None if left is None else time.monotonic() + left
        self._spent = 0.0


class _EventLines:
    """Iterator over the events of a subscription as lines. Not a generator: a TimeoutError ends a
    generator.
    """

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
