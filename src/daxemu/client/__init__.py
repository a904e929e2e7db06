"""Clients of a mount's control socket, blocking and async. No FUSE here.

    from daxemu.client import Client
    with Client.at("/mnt/pmem/file") as client:
        client.request("inject", ino=2, ranges=[[4096, 4096]])

``blocking``      ``Client``: standard library only; its typed requests and events need msgspec, once used
``asynchronous``  ``AsyncClient``, the same under trio or asyncio, whichever runs
``connection``    what both say and hear, without any I/O of their own
``notices``       what a process that maps files of the mount wants to be told
``safe_read``     a load that is an error where it would be a SIGBUS

docs/protocol.md has the requests and what they answer.
"""

from __future__ import annotations

from daxemu.client.asynchronous import AsyncClient
from daxemu.client.blocking import Client
from daxemu.client.notices import Notice
from daxemu.client.safe_read import safe_read

__all__ = ["AsyncClient", "Client", "Notice", "safe_read"]
