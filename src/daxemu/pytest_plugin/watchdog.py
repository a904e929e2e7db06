"""Has tests on a mount guarded (``guard``), and fails those that hang."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from types import FrameType

import pytest

from daxemu.pytest_plugin.guard import CODE, INTERRUPT
from daxemu.pytest_plugin.mount import DaxMount


class HangGuard:
    """One guard for all tests of a session; the first that needs it starts it."""

    def __init__(self, config: pytest.Config) -> None:
        with _uncaptured(config):  # its last words are for the terminal
            self._guard = subprocess.Popen(
                [sys.executable, "-c", CODE.format(pid=os.getpid())],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                start_new_session=True,
                cwd="/",
            )
        self._watching = False
        self._reason: str | None = None

    @contextmanager
    def watch(self, mount: DaxMount, limit: float) -> Iterator[None]:
        """Around a test, in the main thread. Fails it after ``limit`` seconds, with what was the matter."""
        former = signal.signal(INTERRUPT, self._interrupted)
        self._reason = None
        self._watching = True
        self._tell({"limit": limit, "device": str(mount.device), "mountpoint": str(mount.path)})
        try:
            yield
        finally:
            self._watching = False
            self._tell("done")
            while answer := self._hear():
                self._reason = answer["reason"]
            signal.signal(INTERRUPT, former)
        if self._reason is not None:
            pytest.fail(self._reason, pytrace=False)

    def _interrupted(self, number: int, frame: FrameType | None) -> None:
        if self._watching:
            self._reason = self._hear()["reason"]
            raise pytest.fail.Exception(self._reason)

    def _tell(self, message: object) -> None:
        assert self._guard.stdin is not None
        self._guard.stdin.write(json.dumps(message).encode() + b"\n")
        self._guard.stdin.flush()

    def _hear(self) -> dict[str, str]:
        assert self._guard.stdout is not None
        heard: dict[str, str] = json.loads(self._guard.stdout.readline())
        return heard

    def close(self) -> None:
        """Let the guard go."""
        self._guard.communicate()


def _uncaptured(config: pytest.Config) -> AbstractContextManager[None]:
    capture = config.pluginmanager.getplugin("capturemanager")
    return nullcontext() if capture is None else capture.global_and_fixture_disabled()
