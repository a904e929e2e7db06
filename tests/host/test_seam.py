"""The seam for mappings, seen from requests of the kernel: an answer waits until mappings show a change."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Awaitable, Callable
from types import SimpleNamespace
from typing import Any, cast

import pytest
import trio
import trio.testing

from daxemu.errors import DaxemuError, MediaError
from daxemu.host.fuse import supplement
from daxemu.host.fuse.extra_operations import ExtraOperations
from daxemu.host.fuse.gates import Gates
from daxemu.host.fuse.open_files import OpenFiles
from daxemu.host.fuse.operations import Operations
from daxemu.host.fuse.structs import RawRequest
from daxemu.host.fuse.supplement import pack
from daxemu.host.mappings import Access, Answer, Mappings
from daxemu.host.page_cache.mappings import PageCacheMappings
from daxemu.host.unexpected import Unexpected
from daxemu.uapi import PAGE_SIZE as PAGE
from daxemu.uapi import Ino
from tests.support.core import Core, pages

FALLOCATE, COPY_FILE_RANGE = 1, 3
NOBODY = cast(Any, SimpleNamespace(pid=0))
"""Context of a request."""


class Late(PageCacheMappings):
    """Mappings that show old blocks until ``follow`` is set, as direct mappings may."""

    def __init__(self) -> None:
        self._lock = None
        self.follow = trio.Event()

    def is_settled(self, ino: Ino | None = None) -> bool:
        return self.follow.is_set()

    async def settled(self, ino: Ino) -> None:
        await self.follow.wait()


async def no_answer(access: Access) -> Answer:
    raise AssertionError(f"{access} is healthy")


async def no_heal(error: MediaError) -> bool:
    raise AssertionError("nothing is poisoned")


def operations(core: Core, mappings: Mappings) -> Operations:
    return Operations(core.fs, no_answer, no_heal, mappings, OpenFiles(), Gates())


async def write(serving: Operations, ino: Ino) -> None:
    await serving.write(cast(Any, pack(ino, os.O_RDWR)), PAGE, pages("w"))


async def truncate(serving: Operations, ino: Ino) -> None:
    asked = SimpleNamespace(
        update_size=True,
        update_mode=False,
        update_uid=False,
        update_gid=False,
        update_atime=False,
        update_mtime=False,
    )
    values = SimpleNamespace(st_size=0)
    await serving.setattr(cast(Any, ino), cast(Any, values), cast(Any, asked), None, NOBODY)


async def open_trunc(serving: Operations, ino: Ino) -> None:
    await serving.open(cast(Any, ino), cast(Any, os.O_RDWR | os.O_TRUNC), NOBODY)


@pytest.mark.parametrize("change", [write, truncate, open_trunc])
def test_a_change_is_answered_once_mappings_follow(
    core: Core, change: Callable[[Operations, Ino], Awaitable[None]]
) -> None:
    ino = core.file(data=pages("ab"))

    async def ask() -> None:
        mappings = Late()
        answered = trio.Event()

        async def request() -> None:
            await change(operations(core, mappings), ino)
            answered.set()

        async with trio.open_nursery() as nursery:
            nursery.start_soon(request)
            await trio.testing.wait_all_tasks_blocked()
            assert not answered.is_set()
            mappings.follow.set()
        assert answered.is_set()

    trio.run(ask)


class Replies:
    """Answers to the kernel, in place of libfuse."""

    def __init__(self) -> None:
        self.sent: list[int] = []

    def fuse_reply_err(self, req: int, error: int) -> None:
        self.sent.append(error)

    def fuse_reply_write(self, req: int, done: int) -> None:
        self.sent.append(done)


@pytest.mark.skipif(supplement.MISSING is not None, reason="needs the supplement")
@pytest.mark.parametrize(
    ("fields", "reply"),
    [
        pytest.param({"op": FALLOCATE, "mode": 3, "offset": 0, "length": PAGE}, 0, id="punch"),
        pytest.param(
            {"op": COPY_FILE_RANGE, "offset": 0, "target_offset": 8 * PAGE, "length": PAGE}, PAGE, id="copy"
        ),
    ],
)
def test_a_request_answered_at_once_waits_for_mappings_too(
    core: Core, fields: dict[str, int], reply: int
) -> None:
    ino, target = core.file(data=pages("ab")), core.file(b"target")
    request = RawRequest(fh=pack(ino, os.O_RDWR), target_fh=pack(target, os.O_RDWR), **fields)

    class Clones:
        def is_quick(self, *copied: int) -> bool:
            return True

    async def ask() -> None:
        mappings, replies = Late(), Replies()
        async with trio.open_nursery() as nursery:
            extra = ExtraOperations(
                core.fs,
                (0, 0),
                cast(Any, Clones()),
                mappings,
                lambda ino, tid: None,
                OpenFiles(),
                Gates(),
                nursery,
                Unexpected(core.events.append),
            )
            extra.close()
            extra._fuse = cast(Any, replies)
            extra._handle(ctypes.pointer(request))
            await trio.testing.wait_all_tasks_blocked()
            assert replies.sent == []
            mappings.follow.set()
        assert replies.sent == [reply]

    trio.run(ask)


@pytest.mark.parametrize("direct_io", [False, True])
def test_the_implementation_decides_if_opens_bypass_the_page_cache(core: Core, direct_io: bool) -> None:
    ino = core.file(data=pages("a"))

    async def opened() -> Any:
        mappings = Late()
        mappings.direct_io = direct_io
        return await operations(core, mappings).open(cast(Any, ino), cast(Any, os.O_RDONLY), NOBODY)

    found = trio.run(opened)
    assert (found.direct_io, found.keep_cache) == (direct_io, not direct_io)


def test_a_failed_read_is_an_access_with_thread_and_range(core: Core) -> None:
    ino = core.file(data=pages("ab"))
    seen: list[Access] = []

    async def failing() -> None:
        async def on_access(access: Access) -> Answer:
            seen.append(access)
            return Answer.ZEROS

        serving = Operations(core.fs, on_access, no_heal, Late(), OpenFiles(), Gates())
        assert await serving.read(cast(Any, pack(ino, os.O_RDONLY) | 77 << 40), PAGE, PAGE) == bytes(PAGE)

    core.poison(ino, 1)
    trio.run(failing)
    (access,) = seen
    assert isinstance(access.error, DaxemuError)
    assert access[:4] == (ino, PAGE, PAGE, 77)
    assert (access.address, access.is_store) == (None, False)
