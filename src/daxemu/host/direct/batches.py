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
    is planned; the last is awaited at once. Raises OSError, DaxemuError of ``run`` at the end of the context.
    """
    errors: list[Exception] = []

    async def attempt(batch: Sequence[Syscall]) -> None:
        try:
            await run(batch)
        except (OSError, DaxemuError) as error:
            errors.append(error)

    async with trio.open_nursery() as nursery:

        async def submit(batch: Sequence[Syscall], *, is_last: bool) -> None:
            if is_last:
                await attempt(batch)
            else:
                nursery.start_soon(attempt, batch)
                await trio.lowlevel.checkpoint()

        yield submit
    if errors:
        raise errors[0]
