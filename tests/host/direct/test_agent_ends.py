"""Ends of agents: the supervisor is killed, or the agent ends after the first reply."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import trio

from daxemu.host.direct.agent import ProcessAgent
from daxemu.host.direct.syscalls import NR_GETPID, Syscall
from tests.host.direct.supervised import agents


def test_agents_end_with_a_killed_supervisor_and_map_the_void_before(mapper: str, media: Path) -> None:
    """The supervisor is a process of its own here, killed by SIGKILL. No program maps the media then."""
    script = (
        "import sys, trio\n"
        "from pathlib import Path\n"
        "from tests.host.direct.supervised import play\n"
        "async def scene(stage):\n"
        "    program = await stage.start(sys.argv[1])\n"
        "    await program.ask(f'map {sys.argv[2]} 4')\n"
        "    print(program.pid, flush=True)\n"
        "    await trio.sleep_forever()\n"
        "play(Path(sys.argv[2]), scene)\n"
    )
    with subprocess.Popen(
        [sys.executable, "-c", script, mapper, str(media)], stdout=subprocess.PIPE
    ) as supervisor:
        assert supervisor.stdout is not None
        program = int(supervisor.stdout.readline())
        pidfd = os.pidfd_open(program)
        ours = agents(media)
        assert len(ours) == 1
        os.kill(program, signal.SIGSTOP)  # at the end of its stdin the program would exit
        assert str(media) in Path(f"/proc/{program}/maps").read_text()
        supervisor.kill()
        supervisor.wait()
        while agents(media):
            time.sleep(0.001)
        maps = Path(f"/proc/{program}/maps").read_text()
        assert str(media) not in maps
        assert maps.startswith("200000000000-")
        assert "memfd:void" in maps.partition("\n")[0]
        signal.pidfd_send_signal(pidfd, signal.SIGKILL)
        os.close(pidfd)


def test_an_agent_that_ended_after_its_first_reply_is_gone() -> None:
    """As at the end of a pid namespace."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    agent = ProcessAgent(ours, [])
    child = os.fork()
    if child == 0:
        theirs.send(bytes(8))
        os._exit(0)
    theirs.close()
    os.waitpid(child, 0)
    trio.run(agent.serve)
    assert agent.ended.is_set()


def test_a_reply_that_does_not_come_soon_comes_later() -> None:
    """An empty batch needs no reply. The agent here answers each byte of a pipe with a reply."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    may_answer, answer = os.pipe()
    agent = ProcessAgent(ours, [])
    child = os.fork()
    if child == 0:
        ours.close()
        while theirs.recv(1 << 12) and os.read(may_answer, 1):
            theirs.send(bytes(8))
        os._exit(0)
    theirs.close()
    calls = [Syscall(NR_GETPID, ())]

    async def main() -> None:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(agent.serve)
            os.write(answer, b"x")
            assert await agent.run(calls) == [0]
            assert await agent.run([]) == []
            reply = agent.begin(calls)
            assert reply is not None
            assert reply.results is None
            assert agent.begin(calls) is None
            os.write(answer, b"x")
            assert await agent.completed(reply) == [0]
            os.write(answer, b"x")
            assert await agent.run(calls) == [0]
            agent.close()

    trio.run(main)
    os.waitpid(child, 0)
    os.close(may_answer)
    os.close(answer)
