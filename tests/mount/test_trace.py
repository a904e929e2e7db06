"""Traces on a real mount: each operation once, with its process, range and result."""

from __future__ import annotations

import json
import os
import subprocess
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from daxemu.client import Client
from daxemu.uapi import PAGE_SIZE
from tests.support.mount import DaxMount
from tests.support.pages import BIN
from tests.support.quick import QuickMount

pytestmark = pytest.mark.mount


@contextmanager
def traced(mount: DaxMount, file: str | None = None) -> Iterator[list[dict[str, Any]]]:
    """Trace in the context. The list is complete after the context."""
    records: list[dict[str, Any]] = []
    with Client.at(mount.path, patience=20) as client:
        lines = client.trace_lines(file)
        client.set_patience(None)
        reader = threading.Thread(target=lambda: records.extend(map(json.loads, lines)))
        reader.start()
        yield records
        (mount.path / "the-end").exists()
        with mount.client() as other:
            other.settle()
        client.hang_up()
        reader.join()


def operations(records: list[dict[str, Any]], *ops: str) -> list[tuple[Any, ...]]:
    found = [record for record in records if record["type"] == "operation" and record["op"] in ops]
    return [(r["op"], r["path"], r["offset"], r["length"], r["errno"]) for r in found]


def test_each_operation_is_recorded_once(quick_mount: QuickMount) -> None:
    with traced(quick_mount) as records:
        fd = os.open(quick_mount.path / "a", os.O_RDWR | os.O_CREAT)
        os.pwrite(fd, b"x" * PAGE_SIZE, PAGE_SIZE)
        os.fsync(fd)
        os.posix_fallocate(fd, 0, PAGE_SIZE)
        os.ftruncate(fd, 100)
        os.close(fd)
        (quick_mount.path / "a").rename(quick_mount.path / "b")
        with pytest.raises(FileExistsError):
            os.mkdir(quick_mount.path / "b")  # noqa: PTH102 - one system call
        (quick_mount.path / "b").unlink()
    wanted = ("create", "write", "fsync", "fallocate", "truncate", "rename", "mkdir", "unlink")
    assert operations(records, *wanted) == [
        ("create", "/a", 0, 0, 0),
        ("write", "/a", PAGE_SIZE, PAGE_SIZE, 0),
        ("fsync", "/a", 0, 0, 0),
        ("fallocate", "/a", 0, PAGE_SIZE, 0),
        ("truncate", "/a", 0, 0, 0),
        ("rename", "/a", 0, 0, 0),
        ("unlink", "/b", 0, 0, 0),
    ]
    assert {r["pid"] for r in records if r.get("op") in wanted} == {os.getpid()}


def test_only_the_named_files(quick_mount: QuickMount) -> None:
    with traced(quick_mount, "*.log") as records:
        for name in ("a.db", "b.log"):
            (quick_mount.path / name).write_bytes(b"x")
    assert {record["path"] for record in records} == {"/b.log"}


def test_the_steps_of_a_failure_lie_within_it(quick_mount: QuickMount) -> None:
    path = quick_mount.make_file("f", 2)
    with traced(quick_mount) as records:
        with path.open("rb") as file:
            file.read()
        quick_mount.inject("f", (0, PAGE_SIZE))
    steps = {record["step"]: record for record in records if record["type"] == "step"}
    assert {"memory_failure", "collect_procs", "unmap_mapping_range", "repair"} <= steps.keys()
    whole = steps["memory_failure"]
    assert whole["what"] == "Recovered"
    for step in steps.values():
        assert step["failure"] == whole["failure"]
        assert whole["time"] <= step["time"]
        assert step["time"] + step["seconds"] <= whole["time"] + whole["seconds"] + 1e-3


def test_a_file_for_perfetto(dax_mount: DaxMount, tmp_path: Path) -> None:
    """The file is a list of events also if the mount ends during the trace."""
    output = tmp_path / "trace.json"
    command = [str(BIN / "daxemu"), "trace", str(dax_mount.path), "-o", str(output)]
    trace = subprocess.Popen(command)
    while not (output.exists() and "lookup" in output.read_text()):
        (dax_mount.path / os.urandom(4).hex()).exists()
        assert trace.poll() is None
        time.sleep(0.1)
    dax_mount.umount()
    assert trace.wait(30) == 0
    entries = json.loads(output.read_text())
    assert {entry["name"] for entry in entries if entry["ph"] == "X"} >= {"lookup"}
    assert all(entry["dur"] >= 0 for entry in entries if entry["ph"] == "X")
