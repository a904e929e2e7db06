"""The control socket: JSON lines over a Unix stream, for the mount's owner and root.

A mistake of a peer has no effect beyond the connection of that peer. Garbage and unknown requests get an
error reply. A line of more than MAX_LINE bytes, or a peer that disconnects, ends the connection.
"""

from __future__ import annotations

import errno
import os
import socket
import struct
from collections.abc import Awaitable, Callable, Iterator

import msgspec
import trio

from daxemu import protocol as p
from daxemu.errors import Busy, DaxemuError, FsError, InvalidArgument, PermissionDenied
from daxemu.host.descriptors import EXHAUSTED
from daxemu.host.proc import status
from daxemu.host.unexpected import Unexpected, refused
from daxemu.malformed import dotted, explain
from daxemu.private_path import PrivatePath
from daxemu.supervisor.descriptors import Connections, EmergencyDescriptor, Hangups
from daxemu.supervisor.event_log import EventLog
from daxemu.supervisor.selection import selects
from daxemu.supervisor.trace import Traces

MAX_LINE = 4 << 20
_NO_DESCRIPTOR = (errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.ENOBUFS)
_PIECE = 4096
"""Entries of a list that are encoded in one step of the event loop: 2 ms."""
_SENT = 64 << 10
"""Least bytes of a reply that are sent separately."""
_RETRY = 0.1
"""Seconds between two calls of accept(2) while no descriptor is free."""
_UCRED = struct.Struct("=iII")

Answer = Callable[[p.AnyRequest], Awaitable[msgspec.Struct]]


class ControlSocket:
    """Serves the socket ``path``. ``answer`` executes a request, and raises DaxemuError to refuse."""

    def __init__(
        self, path: PrivatePath, log: EventLog, traces: Traces, answer: Answer, unexpected: Unexpected
    ) -> None:
        self._unexpected = unexpected
        self._connections = Connections()
        self._hangups = Hangups()
        self._emergency = EmergencyDescriptor()
        self._path = path
        self._log = log
        self._traces = traces
        self._answer = answer
        self._answering = 0
        self._idle = trio.Event()
        self._idle.set()

    async def idle(self) -> None:
        """Wait until every reply is sent. Followers of events are not waited for."""
        await self._idle.wait()

    def bind(self) -> trio.SocketListener:
        """Bind and listen. Replaces the socket file of a dead supervisor.

        Precondition: the device's lock is held. Raises OSError.
        """
        self._path.unlink()
        sock = trio.socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        os.fchmod(sock.fileno(), 0o600)  # bind(2) makes the file with the mode of the socket
        # A short path through the directory: sun_path has 108 bytes, and the path of a device may be longer.
        directory, path = self._path.bind_path()
        try:
            with socket.socket(fileno=os.dup(sock.fileno())) as raw:
                raw.bind(path)
        finally:
            os.close(directory)
        sock.listen(64)
        return trio.SocketListener(sock)

    async def serve(self, listener: trio.SocketListener) -> None:
        """Serve until cancelled."""
        try:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self._hangups.watch)
                while True:
                    stream = await self._accept(listener)
                    if self._emergency.renew():
                        nursery.start_soon(self._handle, stream)
                    else:
                        await stream.aclose()  # the last free descriptor is kept as the emergency descriptor
        finally:
            self._emergency.give_up()
            self._hangups.close()
            self._path.unlink()

    async def _accept(self, listener: trio.SocketListener) -> trio.SocketStream:
        while True:
            try:
                return await listener.accept()
            except OSError as error:
                if error.errno not in _NO_DESCRIPTOR:
                    raise
                if not self._emergency.give_up():
                    await trio.sleep(_RETRY)

    async def _handle(self, stream: trio.SocketStream) -> None:
        async with stream:
            try:
                pid, uid = self._check_peer(stream)
                with self._connections.counted(uid):
                    await self._converse(stream, pid)
            except (trio.BrokenResourceError, trio.ClosedResourceError):
                return  # the peer disconnected
            except DaxemuError as error:
                await _try_to_send(stream, _refusal(error))
            except Exception as error:  # noqa: BLE001 - ends this connection only
                if isinstance(error, OSError) and error.errno in EXHAUSTED:
                    await _try_to_send(stream, _refusal(Busy("the supervisor has no free descriptor")))
                    return
                said = self._unexpected.report("a connection of the control socket", error)
                await _try_to_send(stream, _refusal(DaxemuError(said)))

    def _check_peer(self, stream: trio.SocketStream) -> tuple[int, int]:
        """Return the pid and the uid of the peer. Raises PermissionDenied."""
        raw = stream.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _UCRED.size)
        pid, uid, _ = _UCRED.unpack(raw)
        if uid not in (0, os.geteuid()):
            raise PermissionDenied(
                f"only the mount's owner (uid {os.geteuid()}) and root may ask, not uid {uid}: "
                f"sudo -u '#{os.geteuid()}' daxemu ..."
            )
        return int(pid), int(uid)

    async def _converse(self, stream: trio.SocketStream, peer: int) -> None:
        buffer = bytearray()
        async for chunk in stream:
            buffer += chunk
            while (end := buffer.find(b"\n")) >= 0:
                line = bytes(buffer[:end])
                del buffer[: end + 1]
                if line.strip():
                    await self._one(stream, line, peer)
            if len(buffer) > MAX_LINE:
                raise InvalidArgument(f"a request of more than {MAX_LINE} bytes: make several of it")

    async def _one(self, stream: trio.SocketStream, asked: bytes, peer: int) -> None:
        try:
            request = p.decode_request(asked)
        except (msgspec.MsgspecError, UnicodeError, RecursionError) as error:
            path, reason = explain(error)
            where = f"{dotted(path)}: " if path else ""
            refusal = InvalidArgument(f"not a request: {where}{reason}; see docs/protocol.md")
            await stream.send_all(_refusal(refusal))
            return
        if len(asked) > _SENT:
            await trio.lowlevel.checkpoint()  # the decoding of the longest line is a step of 30 ms
        if isinstance(request, p.Attach) and request.pid != peer and _is_itself(peer, request.pid):
            request = msgspec.structs.replace(request, pid=peer)
        if isinstance(request, p.Attach) and request.pid != peer:
            # Descriptors are taken from the process itself, never from another one.
            await stream.send_all(
                _refusal(PermissionDenied(f"process {peer} may not attach process {request.pid}"))
            )
        elif isinstance(request, p.Trace):
            with self._hangups.cancelling(stream):
                await self._trace(stream, request)
        elif isinstance(request, p.Follow):
            with self._hangups.cancelling(stream):
                await self._follow(stream, request)
        else:
            await self._reply(stream, request)

    async def _trace(self, stream: trio.SocketStream, request: p.Trace) -> None:
        async with self._traces.one(request) as trace:
            await stream.send_all(msgspec.json.encode(p.Reply(True, result=msgspec.Raw(b"{}"))) + b"\n")
            async for lines in trace.lines():
                await stream.send_all(b"\n".join(lines) + b"\n")

    async def _follow(self, stream: trio.SocketStream, request: p.Follow) -> None:
        async for lines in self._log.follow(request.after):
            wanted = [line + b"\n" for line in lines if selects(request, line)]
            if wanted:
                await stream.send_all(b"".join(wanted))
            else:
                await trio.lowlevel.checkpoint()

    async def _reply(self, stream: trio.SocketStream, request: p.AnyRequest) -> None:
        self._answering += 1
        if self._idle.is_set():
            self._idle = trio.Event()
        try:
            try:
                result = await self._answer(request)
                parts = await _encoded(result)
            except Exception as error:  # noqa: BLE001 - ends this request only
                refusal = refused(error)
                if refusal is None:
                    op = type(request).__struct_config__.tag
                    refusal = DaxemuError(self._unexpected.report(f"the request {op}", error))
                parts = [_refusal(refusal)]
            for part in parts:
                await stream.send_all(part)
        finally:
            self._answering -= 1
            if not self._answering:
                self._idle.set()


async def _encoded(result: msgspec.Struct) -> list[bytes]:
    """Encode a reply as parts of one line. Lists are encoded in pieces of _PIECE entries, with a checkpoint
    after each.
    """
    encode = msgspec.json.encode
    before, after = encode(p.Reply(True, result=msgspec.Raw(b"\0"))).split(b"\0")
    parts = [before]
    for number, name in enumerate(result.__struct_fields__):
        value = getattr(result, name)
        parts.append(b"%c%b:" % (b"{,"[number > 0], encode(name)))
        if not isinstance(value, list) or len(value) <= _PIECE:
            parts.append(encode(value))
            continue
        for first in range(0, len(value), _PIECE):
            parts.append(b"%c%b" % (b"[,"[first > 0], encode(value[first : first + _PIECE])[1:-1]))
            await trio.lowlevel.checkpoint()
        parts.append(b"]")
    parts.append(b"}" if result.__struct_fields__ else b"{}")
    return [*_joined(parts), after + b"\n"]


def _joined(parts: list[bytes]) -> Iterator[bytes]:
    """Yield ``parts``, with short parts joined to pieces of more than _SENT bytes."""
    some: list[bytes] = []
    for part in parts:
        some.append(part)
        if len(part) > _SENT:
            yield b"".join(some)
            some = []
    yield b"".join(some)


async def _try_to_send(stream: trio.SocketStream, line: bytes) -> None:
    with trio.move_on_after(1.0):
        try:
            await stream.send_all(line)
        except (trio.BrokenResourceError, trio.ClosedResourceError):
            return


def _refusal(error: DaxemuError) -> bytes:
    kind = InvalidArgument.__name__ if isinstance(error, FsError) else type(error).__name__
    return msgspec.json.encode(p.Reply(False, error=kind, message=str(error))) + b"\n"


def _is_itself(peer: int, pid: int) -> bool:
    """Return whether a process in another pid namespace gives its process id there."""
    found = status.find(peer)
    return found is not None and found.ns_tgid == pid
