"""Client of every verb: limited patience, a message during long waits, and checked replies."""

from __future__ import annotations

import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import msgspec

from daxemu import protocol as p
from daxemu.cli.output import complain
from daxemu.client import Client
from daxemu.client import connection as wire
from daxemu.errors import Busy, DaxemuError

PATIENCE = 5.0
"""Limit in seconds for an answer, or for a sign that the supervisor still works on a long request."""
SILENCE = 1.0
"""Seconds after which a verb on a terminal prints the reason of its wait."""
_REQUESTS = {str(kind.__struct_config__.tag): kind for kind in p.REQUEST_TYPES}
_LONG = frozenset(op for op, kind in _REQUESTS.items() if kind.is_long)
"""Requests that may take minutes. The deadline of such a request is renewed while the supervisor answers
other requests.
"""
_ONCE_ABSENT = {"scrubs": 0, "repair": p.RepairReport("none", 0, 0, 0, 0, 0, None), "supplement": ""}
"""Fields of a status that supervisors of earlier versions do not send. Such a supervisor may still serve a
mount.
"""


class PatientClient(Client):
    """Client whose requests always end: with an answer of the right type, or with an exception of
    daxemu.errors.
    """

    def _request(self, op: str, arguments: dict[str, Any], more: float = 0.0) -> dict[str, Any]:
        """See Client.request. A long request has no time limit of its own; instead the supervisor must answer
        a ``status`` every ``PATIENCE`` seconds.
        """
        with _announced(self), _watched(self, op in _LONG):
            result = super()._request(op, arguments, more)
        try:
            expected = {**_ONCE_ABSENT, **result} if op == "status" else result
            msgspec.convert(expected, p.reply_type(_REQUESTS[op]))
        except msgspec.ValidationError as error:
            raise wire.nonsense(self.mount, "a reply of another type") from error
        return result


@contextmanager
def _announced(client: Client) -> Iterator[None]:
    """Print the reason of a wait that takes longer than SILENCE seconds, if standard error is a terminal."""
    if not sys.stderr.isatty():
        yield
        return

    def say() -> None:
        stopped = wire.state_of(client.pid) in ("T", "t")
        how = f", which is stopped: kill -CONT {client.pid}" if stopped else ""
        complain(f"daxemu: waiting for the supervisor of {client.mount.mountpoint} (pid {client.pid}){how}")

    timer = threading.Timer(SILENCE, say)
    timer.start()
    try:
        yield
    finally:
        timer.cancel()
        timer.join()


@contextmanager
def _watched(client: Client, is_long: bool) -> Iterator[None]:
    """Remove the time limit of a long request. The connection is closed once the supervisor no longer answers
    ``status``.
    """
    if not is_long:
        yield
        return
    ended, silent = threading.Event(), threading.Event()

    def look() -> None:
        while not ended.wait(PATIENCE):
            try:
                with Client(client.mount, patience=PATIENCE) as other:
                    other.request("status")
            except Busy:
                silent.set()
                client.hang_up()
                return
            except DaxemuError:
                continue  # the request sees the end of the connection too

    client.set_patience(None)
    watching = threading.Thread(target=look, name="patience", daemon=True)
    watching.start()
    try:
        yield
    except DaxemuError as error:
        if silent.is_set():
            raise wire.no_answer(client.mount, client.pid) from error
        raise
    finally:
        ended.set()
        client.set_patience(PATIENCE)
