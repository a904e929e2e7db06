"""Programs with limits of their own: seccomp(2), descriptors, memory. Each gets an answer; nothing hangs."""

from __future__ import annotations

import subprocess
import sys

import pytest

from tests.support.mount import DAXEMU, PATIENCE, DaxMount

pytestmark = pytest.mark.mount

_MAPS = """
import ctypes, mmap, os, resource, struct
libc = ctypes.CDLL(None, use_errno=True)
file = open("f", "r+b")
def maps_and_forks():
    at = mmap.mmap(file.fileno(), 4 * 4096)
    at[4096] = at[0]
    if not (pid := os.fork()):
        os._exit(at[0] != 65)
    assert os.wait()[1] == 0
    os.ftruncate(file.fileno(), 4096)
    os.ftruncate(file.fileno(), 4 * 4096)
    assert (at[0], at[4096]) == (65, 0)
    print("mapped")
"""
_FILTER = """
def code(what, then, otherwise, value):
    return struct.pack("=HBBI", what, then, otherwise, value)
number, result = code(0x20, 0, 0, 0), (code(6, 0, 0, 0x7FFF0000), code(6, 0, 0, {action}))
program = b"".join([number, code(0x15, 1, 0, {number}), *result])
text = ctypes.create_string_buffer(program, len(program))
assert libc.prctl(38, 1, 0, 0, 0) == 0
assert libc.prctl(22, 2, struct.pack("=HxxxxxxQ", 4, ctypes.addressof(text)), 0, 0) == 0
try:
    maps_and_forks()
except OSError as error:
    print("errno", error.errno)
"""

CALLS = {"setsid": 112, "close_range": 436, "clone": 56, "recvmsg": 47, "sendto": 44, "ioctl": 16}
ACTIONS = {"kill": 0x80000000, "trap": 0x30000, "EPERM": 0x50001}


@pytest.mark.parametrize("action", ACTIONS)
@pytest.mark.parametrize("call", CALLS)
def test_a_filter_that_the_agent_does_not_survive(dax_mount: DaxMount, call: str, action: str) -> None:
    """An agent has the filters of its program. The program gets ENODEV, with an event, or the mapping."""
    dax_mount.make_file("f", 4)
    code = _FILTER.replace("{number}", str(CALLS[call])).replace("{action}", str(ACTIONS[action]))
    said = output(dax_mount, _MAPS + code)
    if (call, action) == ("setsid", "EPERM"):
        assert said == "mapped"
    else:
        assert said == "errno 19"
        assert dax_mount.events("DirectMappingRefused")
    assert dax_mount.events("UnexpectedError") == []


@pytest.mark.parametrize("most", [5, 6, 16])
def test_few_descriptors(dax_mount: DaxMount, most: int) -> None:
    dax_mount.make_file("f", 4)
    code = f"resource.setrlimit(resource.RLIMIT_NOFILE, ({most}, {most}))\n"
    code += "try:\n    maps_and_forks()\nexcept OSError as error:\n    print('errno', error.errno)"
    assert output(dax_mount, _MAPS + code) == ("mapped" if most > 5 else "errno 19")


@pytest.mark.parametrize(
    "limit", ["RLIMIT_AS", "RLIMIT_DATA", "RLIMIT_MEMLOCK", "RLIMIT_STACK", "RLIMIT_NPROC"]
)
def test_no_room_left(dax_mount: DaxMount, limit: str) -> None:
    """A limit that leaves no room for an agent: ENODEV or ENOMEM. The others do not concern a mapping."""
    dax_mount.make_file("f", 4)
    code = f"""
now = int(open("/proc/self/statm").read().split()[0]) * 4096 if {limit!r} == "RLIMIT_AS" else 0
resource.setrlimit(resource.{limit}, (now, now))
try:
    maps_and_forks()
except OSError as error:
    print("errno", error.errno)
"""
    wanted = ("errno 19", "errno 12") if limit in {"RLIMIT_AS", "RLIMIT_DATA"} else ("mapped",)
    assert output(dax_mount, _MAPS + code) in wanted


def output(mount: DaxMount, code: str) -> str:
    """Return the last line of Python code under ``daxemu run`` in the root directory of the mount."""
    argv = [*DAXEMU, "run", str(mount.path), "--", sys.executable, "-c", code]
    done = subprocess.run(argv, cwd=mount.path, capture_output=True, text=True, timeout=PATIENCE)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout.strip()
