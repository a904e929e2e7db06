"""daxemu watch on terminals, and daxemu report."""

from __future__ import annotations

import json
import mmap
import re
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path

import pytest

from daxemu.cli.watch.view import glyph, map_size
from daxemu.survey_report import Cell
from tests.support.mount import DAXEMU, DaxMount, daxemu
from tests.support.terminal import Terminal

PAGE = 4096
SIZES = [(80, 24), (200, 50), (40, 12)]


@pytest.mark.parametrize(
    ("cell", "sign"),
    [
        (Cell(), "·"),
        (Cell(used=1), "░"),
        (Cell(used=25), "▒"),
        (Cell(used=50), "▓"),
        (Cell(used=100), "█"),
        (Cell(used=10, metadata=6), "M"),
        (Cell(used=10, shared=6), "S"),
        (Cell(used=100, latent=1), "?"),
        (Cell(latent=1, bad=1), "X"),
    ],
)
def test_a_cell_shows_the_worst_of_it(cell: Cell, sign: str) -> None:
    assert glyph(cell, 100) == sign


@pytest.fixture
def mount(dax_mount: DaxMount) -> Iterator[DaxMount]:
    """Make a mount with a file ``f``, mapped by the test process, and a clone of ``f``."""
    file = dax_mount.make_file("f", 64)
    dax_mount.run("reflink", file, dax_mount.path / "clone")
    with open(file, "rb") as opened, mmap.mmap(opened.fileno(), 0, prot=mmap.PROT_READ) as view:
        assert view[0]
        yield dax_mount


def watching(mount: DaxMount, columns: int, rows: int) -> Terminal:
    return Terminal([*DAXEMU, "watch", str(mount.path)], columns, rows)


@pytest.mark.mount
@pytest.mark.parametrize(("columns", "rows"), SIZES)
def test_it_fits_the_terminal(mount: DaxMount, columns: int, rows: int) -> None:
    with watching(mount, columns, rows) as terminal:
        terminal.wait_for("arrows move")
        lines = terminal.lines
        assert lines[0].startswith(str(mount.path)[: columns - 1])
        width, height = map_size(columns, rows)
        top = next(i for i, line in enumerate(lines) if line.startswith("╭") and "device 0x0" in line)
        drawn = lines[top + 1 : top + 1 + height]
        assert all(line[0] == line[width + 1] == "│" for line in drawn)
        assert lines[top + 1 + height].startswith("╰")
        assert "M" in "".join(drawn)
        assert lines[-1].startswith("arrows move")
        if columns >= 80:
            text = "\n".join(lines)
            assert "mapped by: 1 processes" in text
            assert "mounted" in text
        terminal.type("q")
        assert terminal.end() == 0


def go_to(terminal: Terminal, target: int) -> None:
    """Look closer and closer at a place of the device, until a cell is a page."""
    while True:
        found = re.search(r"at the cursor: (0x[0-9a-f]+)\+(0x[0-9a-f]+)", "\n".join(terminal.lines))
        assert found
        at, cell = int(found[1], 16), int(found[2], 16)
        steps = target // cell - at // cell
        terminal.type(("l" if steps > 0 else "h") * abs(steps))
        if cell == PAGE:
            break
        terminal.type("+")
        terminal.wait_for_not(f"+{found[2]}")
    terminal.wait_for(f"at the cursor: {target:#x}+0x1000")


@pytest.mark.mount
def test_keys_zoom_poison_and_clear_at_the_cursor(mount: DaxMount) -> None:
    extent = mount.json("map", mount.path / "f")["extents"][0]
    with watching(mount, 80, 24) as terminal:
        terminal.wait_for("at the cursor")
        go_to(terminal, extent["device_offset"])
        terminal.wait_for("/clone")
        terminal.type("i")
        terminal.wait_for("Recovered, 0 processes signalled")
        terminal.wait_for("X")
        lost = [(found["path"], found["offset"]) for found in mount.json("damaged", mount.path)["files"]]
        assert sorted(lost) == [("/clone", 0), ("/f", 0)]
        terminal.type("c")
        terminal.wait_for("cleared 4096 bytes")
        terminal.type("\x1b[CL")
        terminal.wait_for("latent, 0 processes signalled")
        status = mount.json("status", mount.path)
        assert (status["poisoned_sectors"], status["badblocks"]) == (8, 0)
        terminal.type("-" * 8)
        terminal.wait_for("device 0x0-0x40000000")
        terminal.type("hjkhq")
        assert terminal.end() == 0


@pytest.mark.mount
def test_it_ends_with_the_mount_and_gives_the_terminal_back(dax_mount: DaxMount) -> None:
    with watching(dax_mount, 80, 24) as terminal:
        terminal.wait_for("at the cursor")
        dax_mount.umount()
        assert terminal.end() == 0


@pytest.mark.mount
def test_without_a_terminal(mount: DaxMount) -> None:
    assert "watch needs a terminal" in daxemu("watch", mount.path, status=2)
    shown = mount.json("watch", mount.path)
    assert {use["path"] for use in shown["survey"]["files"]} == {"/f", "/clone"}
    assert [mapped["length"] for mapped in shown["mapped"]] == [64 * PAGE]
    assert shown["status"]["state"] == "mounted"


class Page(HTMLParser):
    """Parser: checks for closed tags, and collects the text."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.text = ""
        self.cells = 0

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        assert tag not in ("script", "link", "img")
        self.cells += tag == "rect"
        if tag != "meta":
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


def read(path: Path) -> Page:
    page = Page()
    page.feed(path.read_text())
    assert page.open == []
    return page


@pytest.mark.mount
def test_the_report_of_a_mount_and_of_its_device_later(mount: DaxMount, tmp_path: Path) -> None:
    odd = mount.path / "<b>&odd"
    odd.write_bytes(b"x" * PAGE)
    mount.inject("f", (PAGE, PAGE))
    mount.inject("<b>&odd", (0, PAGE))
    output = tmp_path / "report.html"
    assert json.loads(daxemu("report", mount.path, "-o", output, "--json"))["output"] == str(output)
    page = read(output)
    for text in (
        "mounted",
        "/f",
        "/clone",
        "/<b>&odd",
        "recovery action for dax page: Recovered",
        "FileDamaged",
    ):
        assert text in page.text
    assert page.cells >= 1000
    mount.run("umount", "--force", mount.path)
    daxemu("report", mount.device, "-o", output)
    page = read(output)
    assert "not mounted" in page.text
    assert "recovery action for dax page: Recovered" in page.text


def test_a_report_that_cannot_be_made(tmp_path: Path) -> None:
    assert "not on a daxemu mount" in daxemu("report", tmp_path, status=3)
    device = tmp_path / "pmem"
    daxemu("mkfs", device, "--size", "16M")
    nowhere = tmp_path / "no" / "report.html"
    assert "give another file with -o" in daxemu("report", device, "-o", nowhere, status=1)
    daxemu("report", device, "-o", tmp_path / "empty.html")
    assert "none" in read(tmp_path / "empty.html").text


@pytest.mark.mount
def test_the_first_key_is_not_on_metadata(dax_mount: DaxMount) -> None:
    """Metadata comes first on the device. ``i`` at once poisons a file, or free space: no shutdown."""
    dax_mount.make_file("f", 64)
    with watching(dax_mount, 80, 24) as terminal:
        terminal.wait_for("at the cursor")
        terminal.type("i")
        terminal.wait_for("poisoned device")
        terminal.type("q")
        assert terminal.end() == 0
    assert dax_mount.json("status", dax_mount.path)["state"] == "mounted"
    assert (dax_mount.path / "f").stat().st_size == 64 * PAGE


@pytest.mark.mount
def test_poison_in_metadata_takes_the_key_twice(dax_mount: DaxMount) -> None:
    dax_mount.sound = False
    with watching(dax_mount, 80, 24) as terminal:
        terminal.wait_for("at the cursor")
        go_to(terminal, 0)
        terminal.type("i")
        terminal.wait_for("the same key again")
        assert dax_mount.json("status", dax_mount.path)["state"] == "mounted"
        terminal.type("lhi")
        terminal.wait_for("the same key again")
        assert dax_mount.json("status", dax_mount.path)["state"] == "mounted"
        terminal.type("i")
        terminal.wait_for("poisoned device")
        terminal.type("q")
        assert terminal.end() == 0
    assert dax_mount.json("status", dax_mount.path)["state"] == "shut down"
