"""Cells of misbehaving test programs, and of real programs."""

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
from daxemu.apps.cell import Behaviour, CellRequest, CellRun, MatrixCell
from daxemu.apps.process import Process
from daxemu.apps.records import COUNT, ReadBack, compare_lines, lines
from daxemu.apps.situations import Part
from daxemu.events.mounts import Mode
from daxemu.host.proc.mountinfo import mounts
from daxemu.host.run import zone
from tests.support.mount import DAXEMU, daxemu

pytestmark = pytest.mark.mount

PATIENCE = 60.0


class Faulty(Application):
    """The program tests/apps/faulty.py."""

    name = "faulty"
    about = "a program of the tests"
    note = "Misbehaves in one way."
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

    def read(self, place: Place, process: Process) -> ReadBack:
        process.send("read\n")
        return compare_lines(process.until("end"), re.compile("error.*"))


def make(
    name: str, situation: str, tmp_path: Path, limit: float = 20.0, mode: Mode = "page cache"
) -> tuple[MatrixCell, list[str]]:
    """Run a cell; return the cell and its steps. Assert that no directory, device or mount is left."""
    unique = f"daxemu-apps-{os.getpid()}-{uuid.uuid4().hex[:8]}"
    request = CellRequest(name, situation, limit, str(tmp_path / unique), f"/dev/shm/{unique}", mode)
    steps: list[str] = []
    cell = CellRun(request, lambda step: steps.append(step.text)).make()
    assert not Path(request.directory).exists()
    assert not Path(request.device).exists()
    assert [m for m in mounts() if str(m.device) == request.device] == []
    return cell, steps


def behaviours(cell: MatrixCell) -> tuple[Behaviour, Behaviour]:
    assert cell.failed is None
    assert cell.first is not None
    assert cell.again is not None
    return cell.first.outcome, cell.again.outcome


@pytest.mark.parametrize(
    ("how", "outcome", "said"),
    [
        ("hangs", Behaviour.HANGS, "no output for 1 s"),
        ("dies", Behaviour.DIES, "killed by SIGSEGV"),
        ("loses", Behaviour.WRONG, "2399 records right, 1 missing"),
        ("logs", Behaviour.LOGGED, "log: log: checksum mismatch"),
        ("complains", Behaviour.REPORTS, "error: input/output error"),
        ("stays", Behaviour.RIGHT, "does not end when asked to"),
    ],
)
def test_each_misbehaviour_is_classified(
    how: str, outcome: Behaviour, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Faulty, "how", how, raising=False)
    monkeypatch.setattr(programs, "APPLICATIONS", (Faulty,))
    cell, _ = make("faulty", "late", tmp_path, limit=1.0)
    # The first life has all records in memory; the restarted program consumes the poison.
    assert behaviours(cell) == (outcome, Behaviour.REPORTS)
    assert cell.first is not None
    assert cell.again is not None
    assert said in cell.first.said
    assert "Input/output error" in cell.again.said


def test_a_cell_whose_data_cannot_be_made_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def prepare(self: Faulty, place: Place) -> None:
        place.make(["sh", "-c", "echo too bad; exit 3"])

    monkeypatch.setattr(Faulty, "prepare", prepare)
    monkeypatch.setattr(programs, "APPLICATIONS", (Faulty,))
    cell, steps = make("faulty", "late", tmp_path)
    assert cell.failed == "DaxemuError: sh ended with status 3: too bad"
    assert cell.first is None
    assert cell.failed in steps


@pytest.mark.skipif(shutil.which("sqlite3") is None, reason="no sqlite3 here: make setup installs it")
def test_mapped_sqlite3_dies_of_ao_under_early_kill_and_of_ar_after_a_restart(tmp_path: Path) -> None:
    cell, steps = make("sqlite3-mmap", "early", tmp_path)
    assert behaviours(cell) == (Behaviour.AO, Behaviour.AR)
    assert "   2400 records right" in steps
    assert any("SIGBUS BUS_MCEERR_AO to sqlite3:" in line and "lsb 12: delivered" in line for line in steps)
    assert cell.hurt.endswith("+0x1000 (record 1000)")


@pytest.mark.skipif(shutil.which("sqlite3") is None, reason="no sqlite3 here: make setup installs it")
def test_sqlite3_does_not_notice_a_changed_record(tmp_path: Path) -> None:
    cell, _ = make("sqlite3", "silent", tmp_path)
    assert behaviours(cell) == (Behaviour.WRONG, Behaviour.WRONG)
    assert cell.first is not None
    assert (cell.first.right, cell.first.wrong) == (COUNT - 1, 1)


def test_numpy_dies_of_ar_on_latent_poison(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    asked = ("--only", "numpy-memmap", "--situation", "latent", "--situation", "journal")
    shown = json.loads(daxemu("apps", *asked, "-o", page, "--json"))
    (cell,) = shown["cells"]
    assert (cell["first"]["outcome"], cell["again"]["outcome"]) == ("SIGBUS AR", "SIGBUS AR")
    assert "lsb 12: delivered" in cell["first"]["signals"][0]
    assert shown["not_made"][0]["reason"] == "no journal"
    assert "| `numpy-memmap` | SIGBUS AR / SIGBUS AR | - |" in page.read_text()


@pytest.mark.skipif(shutil.which("git") is None, reason="no git here: make setup installs it")
def test_git_dies_of_ao_at_a_removal_and_is_right_when_the_device_is_back(tmp_path: Path) -> None:
    cell, _ = make("git", "remove", tmp_path)
    assert behaviours(cell) == (Behaviour.AO, Behaviour.RIGHT)
    assert cell.hurt == "the whole device"


@pytest.mark.skipif(os.geteuid() != 0, reason="direct mounts need root")
def test_on_a_direct_mount_numpy_maps_the_media_and_dies_of_ar(tmp_path: Path) -> None:
    cell, steps = make("numpy-memmap", "late", tmp_path, mode="direct")
    assert behaviours(cell) == (Behaviour.AR, Behaviour.AR)
    assert cell.first is not None
    (signal,) = cell.first.signals
    found = re.search(r"at (0x\w+), lsb 12: delivered", signal)
    assert found is not None
    address = int(found[1], 16)
    assert any(address in each for each in zone.SLICES), "only direct mappings have addresses in the zone"
    assert any(line.startswith("   $ daxemu run MOUNTPOINT -- ") for line in steps)


@pytest.mark.skipif(os.geteuid() != 0, reason="direct mounts need root")
def test_the_command_names_the_mode_of_each_cell() -> None:
    asked = ("--only", "numpy-memmap", "--situation", "healthy")
    shown = json.loads(daxemu("apps", *asked, "--both", "--json"))
    assert shown["modes"] == ["page cache", "direct"]
    assert [(c["mode"], c["first"]["outcome"]) for c in shown["cells"]] == [
        ("page cache", "right"),
        ("direct", "right"),
    ]


def test_one_mode_or_both() -> None:
    done = subprocess.run([*DAXEMU, "apps", "--direct", "--both"], capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr == "daxemu: --direct and --both exclude each other: give one of them\n"


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
        assert time.monotonic() < deadline, left  # killed processes need a moment to die
        time.sleep(0.01)


def _command_lines() -> list[bytes]:
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):
            found.append(path.read_bytes())
    return found
