"""Batches of system calls in order, each planned while the agent makes the one before."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from typing import Protocol

import trio

from daxemu.errors import DaxemuError
from daxemu.host.direct.syscalls import Syscall


class Submit(Protocol):
    """Have a batch of system calls made after the batches before."""

    async def __call__(self, batch: Sequence[Syscall], *, is_last: bool) -> None: ...


@asynccontextmanager
async def in_order(run: Callable[[Sequence[Syscall]], Awaitable[None]]) -> AsyncIterator[Submit]:
    """Context that gives a function to have batches made by ``run``. The agent makes a batch while the next
    is planned; a single batch is awaited at once. After an error the rest of the batches is not made. Raises
    OSError, DaxemuError of ``run`` at the end of the context.

    One task makes all batches: two tasks that become runnable at one moment run in any order.
    """
    errors: list[Exception] = []
    send, receive = trio.open_memory_channel[Sequence[Syscall]](1)
    is_begun = False

    async def make(batch: Sequence[Syscall]) -> None:
        try:
            await run(batch)
        except (OSError, DaxemuError) as error:
            errors.append(error)

    async def make_all() -> None:
        async for batch in receive:
            if not errors:
                await make(batch)

    async with trio.open_nursery() as nursery:

        async def submit(batch: Sequence[Syscall], *, is_last: bool) -> None:
            nonlocal is_begun
            if is_last and not is_begun:
                await make(batch)
                return
            if not is_begun:
                is_begun = True
                nursery.start_soon(make_all)
            await send.send(batch)

        async with send:
            yield submit
    if errors:
        raise errors[0]
