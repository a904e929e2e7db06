"""Verbs that look at a mount, the Python client: each works on a direct mount, and says the mode."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from daxemu.client import Client
from daxemu.protocol import Status, Survey, WhoMaps
from tests.mount.direct.test_processes import waiting
from tests.support.actor import compile_victim
from tests.support.mount import DAXEMU, DaxMount
from tests.support.terminal import Terminal

pytestmark = [pytest.mark.mount, pytest.mark.timeout(120)]

PAGE = 4096


@pytest.fixture
def pid(dax_mount: DaxMount) -> Iterator[int]:
    """A program that maps the 16 pages of the file ``f``."""
    path = dax_mount.make_file("f", 16)
    with waiting(dax_mount, compile_victim("direct"), path) as process:
        yield process.pid


def test_status_says_the_mode(dax_mount: DaxMount, pid: int) -> None:
    assert dax_mount.json("status", dax_mount.path)["mode"] == "direct"
    with Client.at(dax_mount.path) as client:
        assert client.ask(Status()).mode == "direct"


def test_internals_are_shown(dax_mount: DaxMount, pid: int) -> None:
    assert "agent.py" in dax_mount.run("status", "--internals", dax_mount.path)


def test_watch_shows_the_mode_and_the_process(dax_mount: DaxMount, pid: int) -> None:
    seen: dict[str, Any] = dax_mount.json("watch", dax_mount.path)
    assert seen["status"]["mode"] == "direct"
    (mapped,) = seen["mapped"]
    assert (mapped["pid"], mapped["offset"], mapped["length"]) == (pid, 0, 16 * PAGE)


def test_the_client_lists_the_process(dax_mount: DaxMount, pid: int) -> None:
    with Client.at(dax_mount.path) as client:
        assert [each.pid for each in client.ask(WhoMaps()).mapped] == [pid]


def test_a_survey_counts_the_blocks_of_the_file(dax_mount: DaxMount, pid: int) -> None:
    with Client.at(dax_mount.path) as client:
        report = client.ask(Survey(cells=16, files=4))
        assert [(use.path, use.bytes) for use in report.files] == [("/f", 16 * PAGE)]
        dax_mount.inject("f", (3 * PAGE, PAGE))
        assert sum(cell.bad for cell in client.ask(Survey(cells=16)).cells) == PAGE


def test_map_shows_extents_and_poison(dax_mount: DaxMount, pid: int) -> None:
    dax_mount.inject("f", (3 * PAGE, PAGE))
    extents = dax_mount.json("map", dax_mount.path / "f")["extents"]
    assert sum(extent["length"] for extent in extents) == 16 * PAGE
    assert dax_mount.run("map", dax_mount.path / "f").split()[-1] == "yes"


def test_page_types_counts_the_mapped_pages(dax_mount: DaxMount, pid: int) -> None:
    dax_mount.inject("f", (3 * PAGE, PAGE))
    counted = dax_mount.json("page-types", dax_mount.device)
    (poisoned,) = [each for each in counted["types"] if "hwpoison" in each["names"]]
    assert poisoned["pages"] == 1


def test_a_program_is_signalled_by_an_injection_of_the_client(dax_mount: DaxMount, pid: int) -> None:
    dax_mount.run("set", dax_mount.path, "early_kill=1")
    dax_mount.inject("f", (PAGE, PAGE))
    assert [event["pid"] for event in dax_mount.events("SignalSent")] == [pid]


def test_watch_says_the_mode(dax_mount: DaxMount, pid: int) -> None:
    with Terminal([*DAXEMU, "watch", str(dax_mount.path)], 200, 50) as terminal:
        terminal.wait_for("mounted, direct")
