"""Real control socket for tests, with answers from the test."""

from __future__ import annotations

import json
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any, cast

import msgspec
import trio

from daxemu import protocol
from daxemu.errors import Busy, FsError
from daxemu.host.unexpected import Unexpected
from daxemu.private_path import PrivatePath
from daxemu.supervisor.control import ControlSocket
from daxemu.supervisor.event_log import EventLog
from daxemu.supervisor.trace import Traces


class Server:
    """Control socket with a given ``answer`` function."""

    def __init__(self, directory: Path) -> None:
        self.path = directory / "control.sock"
        self.log = EventLog(PrivatePath.at(directory) / "events.jsonl")
        self.asked: list[protocol.AnyRequest] = []
        self.go_on = trio.Event()
        self.control = ControlSocket(
            PrivatePath.at(directory) / "control.sock",
            self.log,
            cast("Traces", None),
            self.answer,
            Unexpected(self.log.emit),
        )

    async def answer(self, request: protocol.AnyRequest) -> msgspec.Struct:
        self.asked.append(request)
        match request:
            case protocol.Scrub():
                raise Busy("not now")
            case protocol.Remove():
                raise FsError(5, "a refusal")
            case protocol.Damaged():
                raise ZeroDivisionError
            case protocol.GetBadblocks():
                await self.go_on.wait()
        return protocol.Done()

    async def connect(self) -> trio.SocketStream:
        return await trio.open_unix_socket(self.path)

    async def ask(self, line: bytes) -> dict[str, Any]:
        """Send one line on a separate connection; return the reply."""
        stream = await self.connect()
        await stream.send_all(line + b"\n")
        return await reply(stream)


async def reply(stream: trio.SocketStream) -> dict[str, Any]:
    buffer = b""
    while not buffer.endswith(b"\n"):
        chunk = await stream.receive_some()
        assert chunk, f"hung up after {buffer!r}"
        buffer += chunk
    found: dict[str, Any] = json.loads(buffer)
    return found


def serve(directory: Path, scenario: Callable[[Server], Awaitable[None]]) -> None:
    """Run ``scenario`` against a server; afterwards the server must still answer."""

    async def main() -> None:
        server = Server(directory)
        listener = server.control.bind()
        with trio.fail_after(20):
            async with trio.open_nursery() as nursery:
                nursery.start_soon(server.control.serve, listener)
                await scenario(server)
                assert (await server.ask(b'{"op":"status"}'))["ok"]
                nursery.cancel_scope.cancel()
        server.log.close()

    trio.run(main)
    assert not (directory / "control.sock").exists()
