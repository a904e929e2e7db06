"""Programs under ``daxemu run``, for the tests of their madvise(2)."""

from __future__ import annotations

import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tests.support.actor import Actor
from tests.support.mount import DAXEMU, PATIENCE
from tests.support.scene import Scene, ar, ask


def under_run(
    scene: Scene, *options: str, name: str = "p0", file: str = "f", wrapper: Sequence[str] = ()
) -> Actor:
    """An actor under daxemu run, which maps all of a file of the scene as mapping 0."""
    p0 = scene.actor(name, wrapper=[*DAXEMU, "run", *options, "--", *wrapper])
    ask(p0, f"open 0 {file} rw")
    ask(p0, "mmap 0 0 0 128 shared")
    return p0


def at_return(page: int, *, thread: int = 0) -> dict[str, Any]:
    """AR as delivered when the system call that poisoned the page returns."""
    return {**ar(page, thread=thread), "how": "at syscall return"}


def run(scene: Scene, *command: str | Path, options: Sequence[str | Path] = (), status: int = 0) -> str:
    """Return the output of a command under daxemu run in the mount's root directory."""
    argv = [*DAXEMU, "run", *options, "--", *command]
    done = subprocess.run(
        [str(word) for word in argv], cwd=scene.mount.path, capture_output=True, text=True, timeout=PATIENCE
    )
    assert done.returncode == status, f"{command}: exit {done.returncode}\n{done.stdout}{done.stderr}"
    return done.stdout + done.stderr
