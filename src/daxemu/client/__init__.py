"""Clients of the control socket of a mount, blocking and async. Independent of FUSE.

    from daxemu.client import Client
    with Client.at("/mnt/pmem/file") as client:
        client.request("inject", ino=2, ranges=[[4096, 4096]])

``blocking``      ``Client``: standard library only; its typed requests and events need msgspec, once used
``asynchronous``  ``AsyncClient``, for trio and asyncio
``connection``    shared by both clients: connecting, requests and replies as lines
``notices``       events as addresses of the calling process, for a process with mapped files
``safe_read``     loads through a mapping; poison raises an exception instead of SIGBUS

docs/protocol.md has the requests and replies.
"""

from __future__ import annotations

from daxemu.client.asynchronous import AsyncClient
from daxemu.client.blocking import Client
from daxemu.client.notices import Notice
from daxemu.client.safe_read import safe_read

__all__ = ["AsyncClient", "Client", "Notice", "safe_read"]
