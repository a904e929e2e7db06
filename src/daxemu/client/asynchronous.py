"""The async client, for trio and asyncio: it takes whichever runs where it is opened.

Two adapters of a few lines, rather than a third library: trio is what the supervisor runs on, asyncio what
most programs have, and a line out and a line in is all there is to it.
"""

from __future__ import annotations

import contextlib
import os
import socket
import sys
from collections.abc import AsyncIterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, Self, TypeVar

from daxemu.client import connection as wire
from daxemu.client.notices import Notice, notice_of
from daxemu.host.mountinfo import Mount, mount_of

if TYPE_CHECKING:
    import asyncio

    import msgspec
    import trio

    from daxemu.events import Event
    from daxemu.protocol import Request

    R = TypeVar("R", bound=msgspec.Struct)

MAX_REPLY = 1 << 30
"""Bytes of one answer: asyncio wants a limit, and a list of bad blocks may be long."""


class _Lines(Protocol):
    """A connection, as one of the two libraries has it."""

    async def send(self, line: bytes) -> None:
        """Raises ConnectionError if the other side hung up."""

    async def receive(self) -> bytes:
        """The next line, or nothing at the end."""

    async def close(self) -> None:
        """Hang up."""


class AsyncClient:
    """One connection to one supervisor, made by ``async with AsyncClient.at(PATH) as client``.

    One task at a time may use it.
    """

    def __init__(self, mount: Mount) -> None:
        self.mount = mount
        self._lines: _Lines | None = None

    @classmethod
    def at(cls, path: str | os.PathLike[str]) -> Self:
        """The supervisor of the mount that ``path`` is on. Raises NotMounted."""
        return cls(mount_of(Path(path)))

    async def __aenter__(self) -> Self:
        # A Unix socket's connect() waits only while more than 64 others do.
        self._lines = await _open(wire.connect(self.mount))
        return self

    async def __aexit__(self, *exc: object) -> None:
        await self._connected.close()

    @property
    def _connected(self) -> _Lines:
        assert self._lines is not None, "open it first: async with AsyncClient.at(PATH) as client"
        return self._lines

    async def request(self, op: str, **arguments: Any) -> dict[str, Any]:
        """See Client.request. Time limits are the caller's: trio.fail_after, asyncio.timeout."""
        return wire.result_of(await self._converse(wire.encode({"op": op, **arguments})))

    async def ask(self, request: Request[R]) -> R:
        """See Client.ask."""
        return wire.typed_result_of(request, await self._converse(wire.encode_typed(request)))

    async def events(
        self,
        after: int = 0,
        *,
        kinds: Sequence[type[Event]] | None = None,
        files: Sequence[wire.File] | None = None,
        ranges: Sequence[tuple[int, int]] | None = None,
        pids: Sequence[int] | None = None,
    ) -> AsyncIterator[Event]:
        """See Client.events; the subscription holds from the first event asked for."""
        from daxemu.events import decode

        await self._send(wire.encode_typed(wire.follow_of(after, kinds, files, ranges, pids)))
        while line := await self._connected.receive():
            yield decode(line)

    async def notices(self, *files: wire.File, after: int | None = None) -> AsyncIterator[Notice]:
        """See Client.notices; the subscription holds from the first notice asked for."""
        since = (await self.request("status"))["events"] if after is None else after
        async for event in self.events(since, files=files or None):
            notice = notice_of(event, self.mount, only_mapped=not files)
            if notice is not None:
                yield notice

    async def _converse(self, line: bytes) -> bytes:
        await self._send(line)
        answer = await self._connected.receive()
        if not answer:
            raise wire.went_away(self.mount)
        return answer

    async def _send(self, line: bytes) -> None:
        # As Client._send.
        with contextlib.suppress(ConnectionError):
            await self._connected.send(line)


async def _open(connected: socket.socket) -> _Lines:
    if not _runs_asyncio():
        return _TrioLines(connected)
    import asyncio

    reader, writer = await asyncio.open_unix_connection(sock=connected, limit=MAX_REPLY)
    return _AsyncioLines(reader, writer)


def _runs_asyncio() -> bool:
    # Not imported to find out: that takes longer than all the rest of this package.
    if (asyncio := sys.modules.get("asyncio")) is None:
        return False
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return False
    return True


class _AsyncioLines:
    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader = reader
        self._writer = writer

    async def send(self, line: bytes) -> None:
        self._writer.write(line)
        await self._writer.drain()

    async def receive(self) -> bytes:
        try:
            return await self._reader.readline()
        except ConnectionError:
            return b""

    async def close(self) -> None:
        self._writer.close()
        with contextlib.suppress(ConnectionError):
            await self._writer.wait_closed()


class _TrioLines:
    def __init__(self, connected: socket.socket) -> None:
        import trio

        self._broken: type[Exception] = trio.BrokenResourceError
        self._stream: trio.SocketStream = trio.SocketStream(trio.socket.from_stdlib_socket(connected))
        self._buffer = bytearray()

    async def send(self, line: bytes) -> None:
        try:
            await self._stream.send_all(line)
        except self._broken as error:
            raise ConnectionError from error

    async def receive(self) -> bytes:
        searched = 0
        while (end := self._buffer.find(b"\n", searched)) < 0:
            searched = len(self._buffer)
            try:
                chunk = await self._stream.receive_some()
            except self._broken:
                return b""
            if not chunk:
                return b""
            self._buffer += chunk
        line = bytes(self._buffer[: end + 1])
        del self._buffer[: end + 1]
        return line

    async def close(self) -> None:
        await self._stream.aclose()
