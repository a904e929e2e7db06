"""Small jobs in another process, as another user or as the same one."""

from __future__ import annotations

import os
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

from tests.support.mount import PATIENCE

NOBODY = ("setpriv", "--reuid=65534", "--regid=65534", "--clear-groups")
SYSTEM_PYTHON = "/usr/bin/python3"
"""Python that other users may run: the interpreter of the tests may lie in a private directory."""
PRELUDE = "import errno, fcntl, mmap, os, sys\n"


def python(code: str, *arguments: str | Path, cwd: Path = Path("/"), wrapper: tuple[str, ...] = ()) -> str:
    """Run Python code; return the output, or the name of the errno that ended the code.

    ``cwd`` gives another user a directory beyond the reach of a path walk.
    """
    done = start(code, *arguments, cwd=cwd, wrapper=wrapper)
    said, error = done.communicate(timeout=PATIENCE)
    assert done.returncode == 0, error
    return said.strip()


def start(
    code: str, *arguments: str | Path, cwd: Path = Path("/"), wrapper: tuple[str, ...] = ()
) -> subprocess.Popen[str]:
    """Start Python code without waiting; the caller can send input."""
    # Another user may not run the interpreter of the tests; with tests/asan.sh it is a script.
    executable = SYSTEM_PYTHON if wrapper and Path(SYSTEM_PYTHON).exists() else sys.executable
    indented = "".join(f"    {line}\n" for line in code.strip().splitlines())
    guarded = f"try:\n{indented}except OSError as error:\n    print(errno.errorcode[error.errno])\n"
    return subprocess.Popen(
        [*wrapper, executable, "-c", PRELUDE + guarded, *map(str, arguments)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=cwd,
    )


def daxemu_as_user() -> tuple[str, ...]:
    """``daxemu`` for an ordinary user, to be put behind NOBODY. Skips the test where ordinary users cannot
    run daxemu: the packages of the tests' Python must fit the system's Python, and be readable.
    """
    paths = [str(Path(__file__).parents[2] / "src"), sysconfig.get_path("purelib")]
    environment = ("env", f"PYTHONPATH={os.pathsep.join(paths)}", "PYTHONDONTWRITEBYTECODE=1", "HOME=/")
    command = (*environment, SYSTEM_PYTHON, "-m", "daxemu")
    done = subprocess.run([*NOBODY, *command, "--version"], capture_output=True, text=True, cwd="/")
    if done.returncode:
        why = (done.stderr.strip().splitlines() or ["no message"])[-1]
        pytest.skip(f"another user cannot run daxemu here: {why}")
    return command
