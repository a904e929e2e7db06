"""Control socket, over a real socket: a peer loses only its own connection by breaking the protocol."""

from __future__ import annotations

import contextlib
import json
import os
import resource
import socket
import stat
import struct
from pathlib import Path

import pytest
import trio
import trio.testing

from daxemu import protocol
from daxemu.events import SettingChanged, UnexpectedError, decode
from daxemu.supervisor import control
from daxemu.supervisor.control import MAX_LINE
from daxemu.supervisor.descriptors import connections_of_a_user
from tests.supervisor.server import Server, reply, serve


def test_a_request_is_answered(tmp_path: Path) -> None:
    async def scenario(server: Server) -> None:
        answer = await server.ask(b'{"op":"inject","ranges":[[0,4096]],"ino":2}')
        assert answer == {"ok": True, "result": {}, "error": None, "message": None}
        assert server.asked == [protocol.Inject([(0, 4096)], ino=2)]

    serve(tmp_path, scenario)


def test_a_refusal_names_the_error(tmp_path: Path) -> None:
    async def scenario(server: Server) -> None:
        refused = await server.ask(b'{"op":"scrub"}')
        assert (refused["ok"], refused["error"], refused["message"]) == (False, "Busy", "not now")
        assert (await server.ask(b'{"op":"remove"}'))["message"] == "a refusal"

    serve(tmp_path, scenario)


def test_an_unexpected_exception_costs_the_request_alone(tmp_path: Path) -> None:
    async def scenario(server: Server) -> None:
        stream = await server.connect()
        await stream.send_all(b'{"op":"damaged"}\n{"op":"status"}\n')
        both = b""
        while both.count(b"\n") < 2:
            both += await stream.receive_some()
        refused, answered = map(json.loads, both.splitlines())
        assert (refused["ok"], refused["error"]) == (False, "DaxemuError")
        assert "the request damaged failed inside the supervisor (ZeroDivisionError)" in refused["message"]
        assert "its traceback is in" in refused["message"]
        assert answered["ok"]
        (event,) = map(decode, (tmp_path / "events.jsonl").read_bytes().splitlines())
        assert isinstance(event, UnexpectedError)
        assert event.where == "the request damaged"

    serve(tmp_path, scenario)


def test_a_follower_that_hangs_up_is_noticed_without_an_event(tmp_path: Path) -> None:
    """As many followers as a user may have hang up, again and again: no connection is left over."""

    async def scenario(server: Server) -> None:
        limit = connections_of_a_user()
        for _ in range(3):
            peers = [await server.connect() for _ in range(limit)]
            for peer in peers:
                await peer.send_all(b'{"op":"follow"}\n')
            await trio.testing.wait_all_tasks_blocked()
            for peer in peers:
                await peer.aclose()
            await trio.testing.wait_all_tasks_blocked(0.01)
        assert (await server.ask(b'{"op":"status"}'))["ok"]

    serve(tmp_path, scenario)


def test_a_follower_that_shuts_down_its_sending_half_still_hears(tmp_path: Path) -> None:
    async def scenario(server: Server) -> None:
        peer = await server.connect()
        await peer.send_all(b'{"op":"follow"}\n')
        await peer.send_eof()
        await trio.testing.wait_all_tasks_blocked()
        server.log.emit(SettingChanged(name="a", value="b"))
        assert b"SettingChanged" in await peer.receive_some()

    serve(tmp_path, scenario)


def test_a_user_has_a_limited_number_of_connections(tmp_path: Path) -> None:
    async def scenario(server: Server) -> None:
        held = [await server.connect() for _ in range(connections_of_a_user())]
        await trio.testing.wait_all_tasks_blocked()
        refused = await reply(await server.connect())
        assert (refused["ok"], refused["error"]) == (False, "Busy")
        await held[0].send_all(b'{"op":"status"}\n')
        assert (await reply(held[0]))["ok"]
        for stream in held:
            await stream.aclose()
        await trio.testing.wait_all_tasks_blocked(0.01)

    serve(tmp_path, scenario)


MANY_DESCRIPTORS = 10_000


def test_a_peer_is_turned_away_where_no_descriptor_is_left(tmp_path: Path) -> None:
    async def scenario(server: Server) -> None:
        peers = [socket.socket(socket.AF_UNIX) for _ in range(3)]
        taken: list[int] = []
        await trio.testing.wait_all_tasks_blocked()
        with contextlib.suppress(OSError):
            while len(taken) < MANY_DESCRIPTORS:
                taken.append(os.open("/dev/null", os.O_RDONLY))
        assert len(taken) < MANY_DESCRIPTORS
        try:
            for peer in peers:
                peer.connect(str(server.path))
            peers[0].settimeout(0.0)
            while True:
                await trio.sleep(0.01)
                with contextlib.suppress(BlockingIOError):
                    assert peers[0].recv(1) == b""
                    break
        finally:
            for fd in taken:
                os.close(fd)
            for peer in peers:
                peer.close()

    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    try:
        # Earlier tests of this process may have left descriptors open.
        highest = max(map(int, os.listdir("/proc/self/fd")))
        resource.setrlimit(resource.RLIMIT_NOFILE, (highest + 200, hard))
        serve(tmp_path, scenario)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


GARBAGE = [
    b"hello",
    b"{",
    b"[]",
    b"null",
    b"{}",
    b'{"op":"nothing"}',
    b'{"op":5}',
    b'{"op":"inject"}',
    b'{"op":"inject","ranges":"all"}',
    b'{"op":"inject","ranges":[[1]]}',
    b'{"op":"inject","ranges":[[1e400,1]]}',
    b'{"op":"inject","ranges":[[' + b"9" * 5000 + b",1]]}",
    b'{"op":"status","extra":1}',
    b'{"op":"\xff"}',
    b'{"op":"set","settings":{"\xff":"1"}}',
    b'{"op":"set","settings":{"\\ud800":"1"}}',
    b"\x00\x01\x02\xff\xfe",
    b"GET / HTTP/1.1\r",
    b'{"x":' + b"[" * 200_000,
    b'{"x":' + b'{"x":' * 100_000,
]


@pytest.mark.parametrize("line", GARBAGE, ids=lambda line: repr(line[:30]))
def test_garbage_gets_an_error_and_the_connection_goes_on(tmp_path: Path, line: bytes) -> None:
    async def scenario(server: Server) -> None:
        stream = await server.connect()
        await stream.send_all(line + b"\n")
        refused = await reply(stream)
        assert (refused["ok"], refused["error"]) == (False, "InvalidArgument")
        assert "\n" not in refused["message"]
        await stream.send_all(b'{"op":"status"}\n')
        assert (await reply(stream))["ok"]

    serve(tmp_path, scenario)


def test_a_line_without_end_is_refused_and_hung_up_on(tmp_path: Path) -> None:
    async def scenario(server: Server) -> None:
        stream = await server.connect()
        try:
            await stream.send_all(b"x" * (MAX_LINE + (1 << 20)))
        except trio.BrokenResourceError:
            return
        received = b""
        try:
            while chunk := await stream.receive_some():
                received += chunk
        except trio.BrokenResourceError:
            pass  # the peer hung up with bytes unread
        assert not received or b"InvalidArgument" in received

    serve(tmp_path, scenario)


def test_a_long_line_within_the_limit_is_answered(tmp_path: Path) -> None:
    async def scenario(server: Server) -> None:
        ranges = b",".join(b"[%d,4096]" % (number * 4096) for number in range(100_000))
        assert (await server.ask(b'{"op":"inject","ranges":[' + ranges + b"]}"))["ok"]

    serve(tmp_path, scenario)


def test_lines_may_come_in_pieces_or_together_and_empty_ones_are_nothing(tmp_path: Path) -> None:
    async def scenario(server: Server) -> None:
        stream = await server.connect()
        for piece in (b'{"op":', b'"sta', b'tus"}\n'):
            await stream.send_all(piece)
            await trio.testing.wait_all_tasks_blocked()
        assert (await reply(stream))["ok"]
        await stream.send_all(b'\n  \n{"op":"status"}\n{"op":"clear","ranges":[]}\n')
        while len(server.asked) < 3:
            await stream.receive_some()

    serve(tmp_path, scenario)


def test_a_peer_that_closed_its_half_still_gets_its_answer(tmp_path: Path) -> None:
    async def scenario(server: Server) -> None:
        stream = await server.connect()
        await stream.send_all(b'{"op":"status"}\n{"op":"unfinished')
        await stream.send_eof()
        assert (await reply(stream))["ok"]
        assert await stream.receive_some() == b""

    serve(tmp_path, scenario)


@pytest.mark.parametrize("line", [b"", b'{"op":"status"}\n', b'{"op":"follow"}\n', b'{"op":"st'])
def test_a_peer_that_vanishes_harms_no_other(tmp_path: Path, line: bytes) -> None:
    async def scenario(server: Server) -> None:
        for _ in range(50):
            stream = await server.connect()
            await stream.send_all(line)
            # A reset, not an orderly end.
            stream.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            await stream.aclose()
        server.log.emit(SettingChanged(name="n", value="v"))
        await trio.testing.wait_all_tasks_blocked()
        server.log.emit(SettingChanged(name="n", value="v"))

    serve(tmp_path, scenario)


def test_a_slow_request_delays_no_other(tmp_path: Path) -> None:
    async def scenario(server: Server) -> None:
        slow = await server.connect()
        await slow.send_all(b'{"op":"badblocks"}\n')
        assert (await server.ask(b'{"op":"status"}'))["ok"]
        server.go_on.set()
        assert (await reply(slow))["ok"]

    serve(tmp_path, scenario)


def test_idle_waits_for_answers_but_not_for_followers(tmp_path: Path) -> None:
    async def scenario(server: Server) -> None:
        follower = await server.connect()
        await follower.send_all(b'{"op":"follow"}\n')
        await trio.testing.wait_all_tasks_blocked()
        with trio.fail_after(30):
            await server.control.idle()
        slow = await server.connect()
        await slow.send_all(b'{"op":"badblocks"}\n')
        await trio.testing.wait_all_tasks_blocked()
        with trio.move_on_after(0.05) as waited:
            await server.control.idle()
        assert waited.cancelled_caught
        server.go_on.set()
        await server.control.idle()

    serve(tmp_path, scenario)


def test_a_follower_gets_events_as_lines(tmp_path: Path) -> None:
    async def scenario(server: Server) -> None:
        for number in range(3):
            server.log.emit(SettingChanged(name="n", value=str(number)))
        stream = await server.connect()
        await stream.send_all(b'{"op":"follow","after":2}\n')
        assert (await reply(stream))["seq"] == 3
        server.log.emit(SettingChanged(name="n", value="later"))
        assert (await reply(stream))["value"] == "later"

    serve(tmp_path, scenario)


def test_a_follower_that_does_not_read_stops_no_other(tmp_path: Path) -> None:
    async def scenario(server: Server) -> None:
        stream = await server.connect()
        await stream.send_all(b'{"op":"follow"}\n')
        for number in range(3000):
            server.log.emit(SettingChanged(name="n" * 1000, value=str(number)))
        await trio.testing.wait_all_tasks_blocked()

    serve(tmp_path, scenario)


class Stranger:
    """Reads every peer's credentials as user 1234's, because the machine has no second user to ask."""

    size = struct.calcsize("=iII")

    def unpack(self, raw: bytes) -> tuple[int, int, int]:
        return (1, 1234, 1234)


def test_only_owner_and_root_are_answered(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def scenario(server: Server) -> None:
        monkeypatch.setattr(control, "_UCRED", Stranger())
        stream = await server.connect()
        await stream.send_all(b'{"op":"status"}\n')
        refused = await reply(stream)
        assert (refused["ok"], refused["error"]) == (False, "PermissionDenied")
        assert server.asked == []
        monkeypatch.undo()

    serve(tmp_path, scenario)


def test_the_socket_is_for_its_owner_and_replaces_a_dead_ones(tmp_path: Path) -> None:
    (tmp_path / "control.sock").write_text("left behind")

    async def scenario(server: Server) -> None:
        mode = server.path.stat().st_mode
        assert stat.S_ISSOCK(mode)
        assert stat.S_IMODE(mode) == 0o600

    serve(tmp_path, scenario)


def test_a_device_may_lie_deeper_than_a_socket_path_is_long(tmp_path: Path) -> None:
    deep = tmp_path / ("d" * 120)
    deep.mkdir()

    async def main() -> None:
        server = Server(deep)
        listener = server.control.bind()
        assert server.path.exists()
        await listener.aclose()
        server.log.close()

    trio.run(main)
