"""Survey of the device: the use of each extent."""

from __future__ import annotations

import pytest
import trio

from daxemu.errors import InvalidArgument
from daxemu.pmem.device_dir import altmap_bytes
from daxemu.protocol import Survey
from daxemu.supervisor.verbs.survey import survey
from daxemu.survey_report import Cell, SurveyReport
from daxemu.uapi import PAGE_SIZE as PAGE
from daxemu.uapi import Ino
from tests.support.core import Core, core_at


def look(
    core: Core, offset: int = 0, length: int | None = None, cells: int = 1, files: int = 10
) -> SurveyReport:
    return trio.run(survey, core.pmem, core.fs, Survey(offset, length, cells, files))


def place(core: Core, ino: Ino) -> int:
    """Return the device offset at which a file begins."""
    return core.fs.device_ranges(ino, 0, 1)[0].start


@pytest.mark.parametrize("cells", [1, 2, 7, 64, 1000, 1 << 16])
def test_cells_cover_the_device_and_add_up(core: Core, cells: int) -> None:
    core.clone(core.file(b"f", b"x" * 50 * PAGE), b"clone")
    core.file(b"g", b"y" * 30 * PAGE)
    found = look(core, cells=cells)
    assert len(found.cells) <= cells
    assert found.cell % PAGE == 0
    assert (len(found.cells) - 1) * found.cell < core.pmem.dax.size <= len(found.cells) * found.cell
    usage = core.fs.statfs()
    assert sum(cell.used for cell in found.cells) == (usage.blocks - usage.free) * PAGE
    assert sum(cell.used - cell.metadata for cell in found.cells) == 80 * PAGE
    assert sum(cell.shared for cell in found.cells) == 50 * PAGE


def test_a_part_of_the_device_is_cut_at_its_ends(core: Core) -> None:
    ino = core.file(b"f", b"x" * 10 * PAGE)
    at = place(core, ino)
    found = look(core, at + 2 * PAGE, 3 * PAGE, cells=3)
    assert found.cells == [Cell(used=PAGE)] * 3
    (use,) = found.files
    assert (use.path, use.bytes, use.device_offset, use.file_offset) == (
        "/f",
        3 * PAGE,
        at + 2 * PAGE,
        2 * PAGE,
    )


def test_poison_known_and_latent(core: Core) -> None:
    ino = core.file(b"f", b"x" * 4 * PAGE)
    core.poison(ino, 1)
    core.poison(ino, 2, latent=True)
    found = look(core, place(core, ino), 4 * PAGE, cells=4)
    assert [(cell.bad, cell.latent) for cell in found.cells] == [(0, 0), (PAGE, 0), (0, PAGE), (0, 0)]


def test_poison_is_in_the_cells_of_its_file_on_a_device_with_an_altmap() -> None:
    with core_at(size=16 << 20, altmap=altmap_bytes(16 << 20)) as core:
        ino = core.file(b"f", b"x" * 4 * PAGE)
        core.poison(ino, 1)
        core.poison(ino, 2, latent=True)
        found = look(core, place(core, ino), 4 * PAGE, cells=4)
    assert [(cell.bad, cell.latent) for cell in found.cells] == [(0, 0), (PAGE, 0), (0, PAGE), (0, 0)]


def test_the_files_with_the_most_come_first(core: Core) -> None:
    for pages, name in ((1, b"small"), (9, b"large"), (5, b"middle")):
        core.file(name, b"x" * pages * PAGE)
    assert [(use.path, use.bytes) for use in look(core, files=2).files] == [
        ("/large", 9 * PAGE),
        ("/middle", 5 * PAGE),
    ]
    assert look(core, files=0).files == []


@pytest.mark.parametrize(
    ("offset", "length", "cells"),
    [(-1, None, 1), (0, 0, 1), (0, 1 << 60, 1), (0, None, 0), (0, None, 1 << 17)],
)
def test_invalid_ranges_are_refused(core: Core, offset: int, length: int | None, cells: int) -> None:
    with pytest.raises(InvalidArgument):
        look(core, offset, length, cells)
