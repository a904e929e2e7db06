"""Address spaces: agents of real programs under the filter."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import trio

from daxemu.uapi import PAGE_SIZE
from tests.host.direct.supervised import Stage, agents, play
from tests.host.tracee import until
from tests.support.actor import compile_victim


@pytest.fixture(scope="session")
def mapper(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(compile_victim("mapper"))


@pytest.fixture
def media(tmp_path: Path) -> Path:
    return Path(f"/dev/shm/daxemu-test-media-{os.getpid()}")


def test_a_program_maps_the_media(mapper: str, media: Path) -> None:
    async def scene(stage: Stage) -> None:
        program = await stage.start(mapper)
        assert await program.ask(f"map {media} 4") == "at 0x200000000000"
        assert await program.ask("store 1 x") == "stored"
        assert os.pread(stage.supervisor.media, 1, PAGE_SIZE) == b"x"
        os.pwrite(stage.supervisor.media, b"y", 2 * PAGE_SIZE)
        assert await program.ask("load 2") == f"byte {ord('y')}"
        assert await program.ask("wait") == "wait -1 10"
        (space,) = stage.supervisor.spaces
        assert space.tgid == program.pid
        assert agents() == [space.agent.pid]
        assert await program.end() == 0
        await until(lambda: not agents())

    play(media, scene)
