"""The supervisor's end of a daxemu run: descriptors and packets of any kind."""

from __future__ import annotations

import errno
import os
import socket
from pathlib import Path

import pytest
import trio

from daxemu.cli import run as cli
from daxemu.client import Client
from daxemu.errors import PermissionDenied
from daxemu.events import Event
from daxemu.host.proc.mountinfo import Mount
from daxemu.host.run import seccomp, zone
from daxemu.host.run.attached import AttachedRun, for_failure
from daxemu.host.run.filters import AUDIT_ARCH_X86_64, Nr
from daxemu.host.run.helper import Handover, Helper
from daxemu.host.run.seccomp import CONTINUE, Answer, NotifiedCall
from daxemu.host.unexpected import Unexpected
from tests.support.forwarded import stub
from tests.support.under_filter import program

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="direct mappings need root")


def raw_call(id_: int, tid: int, nr: int = Nr.MMAP, flags: int = 0) -> bytes:
    return seccomp.NOTIFICATION.pack(id_, tid, flags, nr, AUDIT_ARCH_X86_64, 0, *[0] * 6)


async def handed_to(run: AttachedRun, emitted: list[Event], handled: list[NotifiedCall]) -> None:
    """Serve a run until its end, every call answered ENOMEM."""

    async def handle(run: AttachedRun, call: NotifiedCall) -> Answer:
        handled.append(call)
        return Answer(error=errno.ENOMEM)

    unexpected = Unexpected(emitted.append)
    async with trio.open_nursery() as nursery:
        await run.serve(handle, emitted.append, unexpected.nursery(nursery), unexpected)


@pytest.mark.parametrize(
    "packets",
    [
        [b"x"],
        [bytes(79), bytes(81), bytes(4096)],
        [raw_call(id_, 1) for id_ in (0, 1, 2**63, 2**64 - 1)],
        [raw_call(5, 2**32 - 1, 2**31 - 1, flags=1)],
    ],
    ids=["short", "sizes", "ids", "numbers"],
)
def test_nonsense_is_dropped(packets: list[bytes]) -> None:
    """Packets that are no waiting call reach no handler, and the next call is answered."""
    emitted: list[Event] = []
    handled: list[NotifiedCall] = []
    with program() as (sock, listener):
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        for packet in packets:
            ours.send(packet)
        sock.send(b"m")
        call = None
        while call is None:
            call = seccomp.receive(listener)
        real = seccomp.NOTIFICATION.pack(
            call.id, call.tid, 0, call.nr, AUDIT_ARCH_X86_64, call.ip, *call.args
        )
        ours.send(real)
        ours.send(real)  # the same call twice
        run = AttachedRun(os.dup(listener), theirs, zone.SLICES[0])

        async def main() -> None:
            with trio.fail_after(20):
                async with trio.open_nursery() as nursery:
                    nursery.start_soon(handed_to, run, emitted, handled)
                    assert await trio.to_thread.run_sync(sock.recv, 1) == bytes([errno.ENOMEM])
                    ours.close()

        trio.run(main)
        assert handled == [call]
        assert emitted == []
        assert not run.answer(call, CONTINUE)
        assert not run.is_waiting(call)


def test_answers_without_a_waiting_call() -> None:
    with program() as (_sock, listener):
        nobody = NotifiedCall(12345, 1, Nr.MMAP, (0, 0, 0, 0, 0, 0))
        assert not seccomp.answer(listener, nobody, Answer(7))
        assert not seccomp.is_waiting(listener, nobody)
        with pytest.raises(FileNotFoundError):
            seccomp.add_fd(listener, nobody, 0)


def test_failed_handlers_have_an_answer() -> None:
    """No call changes mappings, or copies an address space, without the supervisor."""
    answers = {
        Nr.MMAP: Answer(error=errno.ENODEV),
        Nr.MUNMAP: Answer(error=errno.ENOMEM),
        Nr.MREMAP: Answer(error=errno.ENOMEM),
        Nr.FORK: Answer(error=errno.EAGAIN),
        Nr.CLONE: Answer(error=errno.EAGAIN),
        Nr.EXECVE: CONTINUE,
    }
    for nr, answer in answers.items():
        assert for_failure(NotifiedCall(1, 1, nr, (0, 0, 0, 0, 0, 0))) == answer


# -- taking descriptors


def ino(fd: int) -> int:
    return os.fstat(fd).st_ino


def test_descriptors_of_another_kind_are_refused() -> None:
    packets, _peer = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    stream, _other = socket.socketpair()
    file = os.open("/dev/null", os.O_RDWR)
    with program() as (_, listener):
        given = zone.SLICES[2]
        wrong = [
            (Handover(file, packets.fileno(), given), ino(packets.fileno())),
            (Handover(listener, stream.fileno(), given), ino(stream.fileno())),
            (Handover(listener, file, given), ino(file)),
            (Handover(listener, listener, given), ino(listener)),
            (Handover(listener, packets.fileno(), given), ino(stream.fileno())),
            (Handover(listener, 99999, given), 1),
            (Handover(-1, packets.fileno(), given), ino(packets.fileno())),
            (Handover(listener, packets.fileno(), range(1 << 40)), ino(packets.fileno())),
            (Handover(listener, packets.fileno(), zone.ARENAS), ino(packets.fileno())),
        ]
        before = os.listdir("/proc/self/fd")
        for offered, number in wrong:
            with pytest.raises(PermissionDenied):
                AttachedRun.take(os.getpid(), offered, number)
        assert os.listdir("/proc/self/fd") == before
        good = Handover(listener, packets.fileno(), given)
        with pytest.raises(PermissionDenied, match="cannot copy"):
            AttachedRun.take(2**22 + 1, good, ino(packets.fileno()))
        run = AttachedRun.take(os.getpid(), good, ino(packets.fileno()))
        assert run.zone == given
    os.close(file)


# -- which filter a program gets


def mount_at(directory: Path, owner: int | None = 0) -> Mount:
    return Mount(directory, directory, (0, 1), owner)


def test_which_mounts_may_be_direct(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A mount whose supervisor says so, or does not answer; no mount of another user."""
    monkeypatch.setattr(cli, "_SHORT_PATIENCE", 0.3)
    with stub() as direct, stub(direct=False) as page_cache:
        assert cli._may_be_direct(mount_at(direct.directory))
        assert not cli._may_be_direct(mount_at(page_cache.directory))
        assert not cli._may_be_direct(mount_at(tmp_path))
        assert not cli._may_be_direct(mount_at(direct.directory, 1000))
        monkeypatch.setattr(cli, "mounts", lambda: [mount_at(page_cache.directory)])
        assert not cli._may_be_direct(None)
        direct.process.send_signal(19)
        assert cli._may_be_direct(mount_at(direct.directory))


def test_a_mount_of_another_user_is_never_asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its supervisor is foreign: a call would wait for an answer that may never come."""
    asked: list[Mount] = []

    def attach(mount: Mount, offered: Handover) -> bool:
        asked.append(mount)
        return False

    with program() as (_, listener):
        helper = Helper(listener, None, lambda call: None, attach)
        for owner, times in ((1000, 0), (0, 1), (None, 2)):
            monkeypatch.setattr(
                "daxemu.host.run.helper.mounts", lambda process, owner=owner: [mount_at(tmp_path, owner)]
            )
            assert not helper._ask(1, os.getpid()).is_refused
            assert len(asked) == times


def test_no_process_attaches_another() -> None:
    with stub() as direct, Client(mount_at(direct.directory)) as client:
        with pytest.raises(PermissionDenied, match="may not attach"):
            client.request("attach", pid=1)
        assert client.request("attach", pid=os.getpid()) == {}
