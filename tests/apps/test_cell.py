"""What is seen of a program: of ones that do a thing wrong on purpose, and of real ones."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import uuid
from pathlib import Path
from typing import ClassVar

import pytest

from daxemu.apps import programs
from daxemu.apps.application import Application, Needs, Place, Spot, find_record
from daxemu.apps.cell import Cell, CellRun, Outcome, Task
from daxemu.apps.process import Process
from daxemu.apps.records import COUNT, Finding, compare_lines, lines
from daxemu.apps.situations import Part
from daxemu.host.mountinfo import mounts
from tests.support.mount import DAXEMU, daxemu

pytestmark = pytest.mark.mount

PATIENCE = 60.0


class Faulty(Application):
    """tests/apps/faulty.py."""

    name = "faulty"
    about = "a program of the tests"
    note = "It does one thing wrong."
    needs = Needs(programs=("sh",))
    how: ClassVar[str]

    def prepare(self, place: Place) -> None:
        (place.root / "records").write_text(lines(range(COUNT)))

    def spot(self, place: Place, part: Part) -> Spot:
        return find_record(1000, [place.root / "records"])

    def start(self, place: Place) -> Process:
        process = place.start(
            [sys.executable, Path(__file__).with_name("faulty.py"), place.root / "records", self.how]
        )
        process.until("ready")
        return process

    def read(self, place: Place, process: Process) -> Finding:
        process.send("read\n")
        return compare_lines(process.until("end"), re.compile("error.*"))


def make(name: str, situation: str, tmp_path: Path, limit: float = 20.0) -> tuple[Cell, list[str]]:
    """The cell, and what was told of it; nothing is left."""
    unique = f"daxemu-apps-{os.getpid()}-{uuid.uuid4().hex[:8]}"
    task = Task(name, situation, limit, str(tmp_path / unique), f"/dev/shm/{unique}")
    told: list[str] = []
    cell = CellRun(task, lambda step: told.append(step.text)).make()
    assert not Path(task.directory).exists()
    assert not Path(task.device).exists()
    assert [m for m in mounts() if str(m.device) == task.device] == []
    return cell, told


def outcomes(cell: Cell) -> tuple[Outcome, Outcome]:
    assert cell.failed is None
    assert cell.first is not None
    assert cell.again is not None
    return cell.first.outcome, cell.again.outcome


@pytest.mark.parametrize(
    ("how", "outcome", "said"),
    [
        ("hangs", Outcome.HANGS, "nothing for 1 s"),
        ("dies", Outcome.DIES, "killed by SIGSEGV"),
        ("loses", Outcome.WRONG, "2399 records right, 1 missing"),
        ("logs", Outcome.LOGGED, "its log: log: checksum mismatch"),
        ("complains", Outcome.REPORTS, "error: input/output error"),
        ("stays", Outcome.RIGHT, "does not end when it is asked to"),
    ],
)
def test_what_a_program_does_is_what_is_seen(
    how: str, outcome: Outcome, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Faulty, "how", how, raising=False)
    monkeypatch.setattr(programs, "APPLICATIONS", (Faulty,))
    cell, _ = make("faulty", "late", tmp_path, limit=1.0)
    # It has all in memory; started again it meets the poison.
    assert outcomes(cell) == (outcome, Outcome.REPORTS)
    assert cell.first is not None
    assert cell.again is not None
    assert said in cell.first.said
    assert "Input/output error" in cell.again.said


def test_data_that_cannot_be_made_is_no_outcome(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def prepare(self: Faulty, place: Place) -> None:
        place.make(["sh", "-c", "echo too bad; exit 3"])

    monkeypatch.setattr(Faulty, "prepare", prepare)
    monkeypatch.setattr(programs, "APPLICATIONS", (Faulty,))
    cell, told = make("faulty", "late", tmp_path)
    assert cell.failed == "DaxemuError: sh ended with status 3: too bad"
    assert cell.first is None
    assert cell.failed in told


@pytest.mark.skipif(shutil.which("sqlite3") is None, reason="no sqlite3 here: make setup installs it")
def test_sqlite3_through_a_mapping_is_told_early_and_killed_when_it_touches(tmp_path: Path) -> None:
    cell, told = make("sqlite3-mmap", "early", tmp_path)
    assert outcomes(cell) == (Outcome.AO, Outcome.AR)
    assert "   2400 records right" in told
    assert any("SIGBUS BUS_MCEERR_AO to sqlite3:" in line and "lsb 12: delivered" in line for line in told)
    assert cell.hurt.endswith("+0x1000 (record 1000)")


@pytest.mark.skipif(shutil.which("sqlite3") is None, reason="no sqlite3 here: make setup installs it")
def test_sqlite3_does_not_notice_a_changed_record(tmp_path: Path) -> None:
    cell, _ = make("sqlite3", "silent", tmp_path)
    assert outcomes(cell) == (Outcome.WRONG, Outcome.WRONG)
    assert cell.first is not None
    assert (cell.first.right, cell.first.wrong) == (COUNT - 1, 1)


def test_numpy_meets_latent_poison(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    asked = ("--only", "numpy-memmap", "--situation", "latent", "--situation", "journal")
    shown = json.loads(daxemu("apps", *asked, "-o", page, "--json"))
    (cell,) = shown["cells"]
    assert (cell["first"]["outcome"], cell["again"]["outcome"]) == ("SIGBUS AR", "SIGBUS AR")
    assert "lsb 12: delivered" in cell["first"]["signals"][0]
    assert shown["not_made"][0]["reason"] == "no journal"
    assert "| `numpy-memmap` | SIGBUS AR / SIGBUS AR | - |" in page.read_text()


@pytest.mark.skipif(shutil.which("git") is None, reason="no git here: make setup installs it")
def test_git_is_told_of_a_removal_and_right_when_the_device_is_back(tmp_path: Path) -> None:
    cell, _ = make("git", "remove", tmp_path)
    assert outcomes(cell) == (Outcome.AO, Outcome.RIGHT)
    assert cell.hurt == "the whole device"


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_matrix_leaves_nothing(number: int) -> None:
    process = subprocess.Popen(
        [*DAXEMU, "apps", "--only", "numpy-memmap", "--situation", "late"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    for line in process.stdout:
        if "is started" in line:
            break
    process.send_signal(number)
    _, errors = process.communicate(timeout=PATIENCE)
    assert process.returncode == 130
    assert errors == "daxemu: stopped after 0 of 1 cells\n"
    name = f"daxemu-apps-{process.pid}-"
    assert [m for m in mounts() if name in str(m.device)] == []
    assert list(Path("/dev/shm").glob(f"{name}*")) == []
    deadline = time.monotonic() + PATIENCE
    while left := [cmdline for cmdline in _command_lines() if name.encode() in cmdline]:
        assert time.monotonic() < deadline, left  # killed, they take a moment to die
        time.sleep(0.01)


def _command_lines() -> list[bytes]:
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):
            found.append(path.read_bytes())
    return found
