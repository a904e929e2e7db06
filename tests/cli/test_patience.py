"""Long requests: no deadline while the supervisor answers other requests, an end otherwise."""

from __future__ import annotations

import json
import socket
import threading
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from daxemu.cli import patience
from daxemu.cli.patience import PatientClient
from daxemu.errors import Busy
from daxemu.host.proc.mountinfo import Mount

LOOKS = 3
"""Times that the supervisor is looked at before it answers the long request."""


class Supervisor:
    """Control socket: answers ``status``, unless ``stands_still``, and ``scrub`` after LOOKS status
    requests.
    """

    def __init__(self, directory: Path) -> None:
        self.stands_still = False
        self.looks = 0
        self._enough = threading.Event()
        self._listener = socket.socket(socket.AF_UNIX)
        self._listener.bind(str(directory / "control.sock"))
        self._listener.listen()
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        with suppress(OSError):
            while True:
                connected, _ = self._listener.accept()
                threading.Thread(target=self._serve, args=(connected,), daemon=True).start()

    def _serve(self, connected: socket.socket) -> None:
        with suppress(OSError), connected, connected.makefile("rwb") as lines:
            for line in lines:
                if not self._answer(json.loads(line)["op"]):
                    self._enough.wait()
                lines.write(json.dumps({"ok": True, "result": {"bytes": 0, "ranges": []}}).encode() + b"\n")
                lines.flush()

    def _answer(self, op: str) -> bool:
        if self.stands_still:
            return False
        if op == "status":
            self.looks += 1
            if self.looks == LOOKS:
                self._enough.set()
            return True
        return False

    def close(self) -> None:
        """Release all waiting threads."""
        self._enough.set()
        self._listener.close()


@pytest.fixture
def supervisor(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Supervisor]:
    monkeypatch.setattr(patience, "PATIENCE", 1.0)
    made = Supervisor(tmp_path)
    yield made
    made.close()


def client_of(directory: Path) -> PatientClient:
    return PatientClient(Mount(Path("/mnt"), directory, (0, 0)), patience=1.0)


def test_a_supervisor_at_work_has_as_long_as_it_needs(supervisor: Supervisor, tmp_path: Path) -> None:
    """A long request gets its answer after LOOKS times the patience."""
    with client_of(tmp_path) as client:
        assert client.request("scrub") == {"bytes": 0, "ranges": []}
    assert supervisor.looks >= LOOKS


def test_a_supervisor_that_stands_still_has_not(supervisor: Supervisor, tmp_path: Path) -> None:
    with client_of(tmp_path) as client:
        supervisor.stands_still = True
        with pytest.raises(Busy, match="does not answer"):
            client.request("scrub")
    assert supervisor.looks == 0


@pytest.mark.parametrize("op", sorted(patience._LONG))
def test_each_long_request_is_one_of_the_protocol(op: str) -> None:
    assert op in patience._REQUESTS


def test_a_short_request_has_its_deadline(supervisor: Supervisor, tmp_path: Path) -> None:
    """The supervisor answers others meanwhile."""
    with client_of(tmp_path) as client, pytest.raises(Busy, match="does not answer"):
        client.request("damaged")
    assert supervisor.looks == 0
