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
from concurrent.futures import Future
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, Self, TypeVar

from daxemu.client import connection as wire
from daxemu.client.notices import Notice, notice_of
from daxemu.errors import NotASupervisor
from daxemu.host.proc.mountinfo import Mount, mount_of

if TYPE_CHECKING:
    import asyncio

    import msgspec
    import trio

    from daxemu.events import Event
    from daxemu.protocol import Request

    R = TypeVar("R", bound=msgspec.Struct)


class _LineStream(Protocol):
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
        self._lines: _LineStream | None = None

    @classmethod
    def at(cls, path: str | os.PathLike[str]) -> Self:
        """The supervisor of the mount that ``path`` is on. Raises NotMounted."""
        return cls(mount_of(Path(path)))

    async def __aenter__(self) -> Self:
        made = wire.connecting(self.mount, wire.CONNECT_PATIENCE)
        self._lines = await (_open_asyncio if _runs_asyncio() else _open_trio)(self.mount, made)
        return self

    async def __aexit__(self, *exc: object) -> None:
        await self._connected.close()

    @property
    def _connected(self) -> _LineStream:
        assert self._lines is not None, "open it first: async with AsyncClient.at(PATH) as client"
        return self._lines

    async def request(self, op: str, **arguments: Any) -> dict[str, Any]:
        """See Client.request. Time limits are the caller's: trio.fail_after, asyncio.timeout."""
        return wire.result_of(self.mount, await self._converse(wire.encode({"op": op, **arguments})))

    async def settle(self, patience: float = wire.SETTLE_PATIENCE) -> float:
        """See Client.settle."""
        return wire.seconds_of(self.mount, await self.request("settle", patience=patience))

    async def ask(self, request: Request[R]) -> R:
        """See Client.ask."""
        return wire.typed_result_of(self.mount, request, await self._converse(wire.encode_typed(request)))

    def events(
        self,
        after: int = 0,
        *,
        kinds: Sequence[type[Event]] | None = None,
        files: Sequence[wire.File] | None = None,
        ranges: Sequence[tuple[int, int]] | None = None,
        pids: Sequence[int] | None = None,
    ) -> AsyncIterator[Event]:
        """See Client.events; the subscription holds from the first event asked for. After a timeout of the
        caller's the iterator goes on.
        """
        return _Events(self, wire.encode_typed(wire.follow_of(after, kinds, files, ranges, pids)))

    def notices(self, *files: wire.File, after: int | None = None) -> AsyncIterator[Notice]:
        """See Client.notices; the subscription holds from the first notice asked for."""
        return _Notices(self, files, after)

    async def _converse(self, line: bytes) -> bytes:
        await self._send(line)
        answer = await self._connected.receive()
        if not answer.endswith(b"\n"):
            raise wire.went_away(self.mount)
        return answer

    async def _send(self, line: bytes) -> None:
        # As Client._send.
        with contextlib.suppress(ConnectionError):
            await self._connected.send(line)


class _Events:
    """A subscription. No generator: a generator ends when it is cancelled."""

    def __init__(self, client: AsyncClient, subscribe: bytes) -> None:
        self._client = client
        self._subscribe: bytes | None = subscribe

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> Event:
        if self._subscribe is not None:
            await self._client._send(self._subscribe)
            self._subscribe = None
        line = await self._client._connected.receive()
        if not line.endswith(b"\n"):
            raise StopAsyncIteration
        return wire.event_of(self._client.mount, line)


class _Notices:
    """The events of a subscription that mean something to this process."""

    def __init__(self, client: AsyncClient, files: Sequence[wire.File], after: int | None) -> None:
        self._client = client
        self._files = files
        self._after = after
        self._events: AsyncIterator[Event] | None = None

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> Notice:
        if self._events is None:
            if self._after is None:
                self._after = (await self._client.request("status"))["events"]
            self._events = self._client.events(self._after, files=self._files or None)
        async for event in self._events:
            notice = notice_of(event, self._client.mount, only_mapped=not self._files)
            if notice is not None:
                return notice
        raise StopAsyncIteration


async def _open_trio(mount: Mount, made: Future[socket.socket]) -> _LineStream:
    import trio

    ready, token = trio.Event(), trio.lowlevel.current_trio_token()

    def wake(future: Future[socket.socket]) -> None:
        with contextlib.suppress(trio.RunFinishedError):
            token.run_sync_soon(ready.set)

    made.add_done_callback(wake)
    try:
        with trio.move_on_after(wire.CONNECT_PATIENCE):
            await ready.wait()
        if not ready.is_set():
            raise wire.no_answer(mount)
    except BaseException:
        wire.abandon(made)
        raise
    return _TrioLines(mount, made.result())


async def _open_asyncio(mount: Mount, made: Future[socket.socket]) -> _LineStream:
    import asyncio

    try:
        # Shielded: a cancelled waiter must not make the thread's result impossible to set.
        connected = await asyncio.wait_for(asyncio.shield(asyncio.wrap_future(made)), wire.CONNECT_PATIENCE)
    except TimeoutError as error:
        wire.abandon(made)
        raise wire.no_answer(mount) from error
    except asyncio.CancelledError:
        wire.abandon(made)
        raise
    reader, writer = await asyncio.open_unix_connection(sock=connected, limit=wire.MAX_REPLY)
    return _AsyncioLines(mount, reader, writer)


def _runs_asyncio() -> bool:
    # Not imported to find out: that takes longer than all the rest of this package.
    if (asyncio := sys.modules.get("asyncio")) is None:
        return False
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return False
    return True


def _too_long(mount: Mount) -> NotASupervisor:
    return wire.nonsense(mount, f"a line of more than {wire.MAX_REPLY >> 20} MiB")


class _AsyncioLines:
    def __init__(self, mount: Mount, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._mount = mount
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
        except ValueError as error:  # longer than the limit
            raise _too_long(self._mount) from error

    async def close(self) -> None:
        self._writer.close()
        with contextlib.suppress(ConnectionError):
            await self._writer.wait_closed()


class _TrioLines:
    def __init__(self, mount: Mount, connected: socket.socket) -> None:
        import trio

        self._mount = mount
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
            if searched > wire.MAX_REPLY:
                raise _too_long(self._mount)
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
