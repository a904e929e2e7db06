"""Markdown page of the matrix."""

from __future__ import annotations

import json
from pathlib import Path

import msgspec
import pytest

from daxemu.apps.application import Application
from daxemu.apps.cell import Behaviour, MatrixCell, ProgramLife
from daxemu.apps.differences import EXPLANATIONS, Explanation, differences
from daxemu.apps.matrix import Wanted
from daxemu.apps.programs import application_called
from daxemu.apps.report import as_markdown, summary
from daxemu.apps.situations import BY_NAME

NUMPY = application_called("numpy-memmap")
SQLITE = application_called("sqlite3")

CACHE = {"mode": "page cache"}


def want(application: type[Application], situation: str, why_not: str = "") -> Wanted:
    return Wanted(application, BY_NAME[situation], why_not)


def cell(name: str, situation: str, first: ProgramLife, again: ProgramLife) -> MatrixCell:
    return MatrixCell(name, situation, hurt="a file 0x0+0x1000", first=first, again=again)


WANTED = [
    want(SQLITE, "silent"),
    want(SQLITE, "journal"),
    want(SQLITE, "remove", "absent: sqlite3"),
    want(NUMPY, "silent"),
    want(NUMPY, "journal", "no journal"),
    want(NUMPY, "remove"),
]
MADE = [
    cell(
        "sqlite3", "silent", ProgramLife(Behaviour.WRONG, "1 wrong"), ProgramLife(Behaviour.WRONG, "1 wrong")
    ),
    cell(
        "sqlite3", "journal", ProgramLife(Behaviour.REPORTS, "a | b `c` \x07"), ProgramLife(Behaviour.RIGHT)
    ),
    MatrixCell("numpy-memmap", "silent", failed="DaxemuError: no space"),
    cell("numpy-memmap", "remove", ProgramLife(Behaviour.AO, stays=True), ProgramLife(Behaviour.RIGHT)),
]


def test_the_matrix_has_every_program_and_situation() -> None:
    lines = as_markdown(WANTED, MADE).splitlines()
    assert "| | Silent | Journal | Removal |" in lines
    assert "| `sqlite3` | **wrong** / **wrong** | reports / right | absent |" in lines
    assert "| `numpy-memmap` | not observed | - | SIGBUS AO + / right |" in lines


def test_the_summary_counts_cells_of_the_matrix() -> None:
    page = as_markdown(WANTED, MADE)
    assert "Of 3 cells with an injection or a removal" in page
    assert "- **Changed bytes: wrong data without an error**: 1: `sqlite3` (silent)." in page
    assert "with the poison still present**: 1: `sqlite3` (journal)." in page
    assert "- **Removed and put back: all data right**: 1: `numpy-memmap` (remove)." in page
    assert "- **No answer**: none." in page
    assert "- **Did not end when asked to**: 1: `numpy-memmap` (remove)." in page


def test_program_output_cannot_break_the_page() -> None:
    (row,) = [line for line in as_markdown(WANTED, MADE).splitlines() if line.startswith("| journal |")]
    assert row == "| journal | a file 0x0+0x1000 | reports: `a / b 'c' \\x07` | right |"


def test_the_summary_is_json() -> None:
    found = json.loads(json.dumps(summary(WANTED, MADE)))
    assert [c["situation"] for c in found["cells"]] == ["silent", "journal", "silent", "remove"]
    assert found["cells"][0]["first"]["outcome"] == "wrong"
    assert found["not_made"] == [
        {"application": "sqlite3", "situation": "remove", **CACHE, "reason": "absent: sqlite3"},
        {"application": "numpy-memmap", "situation": "journal", **CACHE, "reason": "no journal"},
    ]
    assert found["programs"]["numpy-memmap"]["versions"]["numpy"]


def direct(cell: MatrixCell, first: Behaviour) -> MatrixCell:
    """Return ``cell`` as observed on a direct mount, with another outcome of the first life."""
    return msgspec.structs.replace(cell, mode="direct", first=ProgramLife(first))


BOTH = [*WANTED, *(cell._replace(mode="direct") for cell in WANTED)]
OBSERVED = [*MADE, direct(MADE[0], Behaviour.WRONG), direct(MADE[1], Behaviour.AR)]


def test_a_page_of_both_modes_has_a_matrix_of_each() -> None:
    page = as_markdown(BOTH, OBSERVED)
    cache, _, hardware = page.partition("## The matrix on direct mounts, as on DAX hardware")
    assert "| `sqlite3` | **wrong** / **wrong** | reports / right | absent |" in cache
    assert "| `sqlite3` | **wrong** / **wrong** | SIGBUS AR / right | absent |" in hardware
    assert "### On direct mounts\n\nOf 2 cells" in page
    assert "### sqlite3, direct\n" in page


def test_only_cells_with_another_behaviour_are_listed_as_differences() -> None:
    (found,) = differences(OBSERVED)
    assert (found.direct.application, found.direct.situation) == ("sqlite3", "journal")
    row = "| `sqlite3` | Journal | reports / right | SIGBUS AR / right |"
    assert [line for line in as_markdown(BOTH, OBSERVED).splitlines() if line.startswith(row)]


def test_a_page_of_one_mode_lists_no_differences() -> None:
    assert "## Cells that differ" not in as_markdown(WANTED, MADE)


def test_each_difference_on_the_published_page_is_explained() -> None:
    page = (Path(__file__).parents[2] / "docs" / "applications.md").read_text()
    rows = page.partition("## Cells that differ between the modes")[2].partition("\n## ")[0]
    assert "the behaviour is the same in both modes" in rows
    assert "not explained" not in rows


@pytest.mark.parametrize("each", EXPLANATIONS, ids=lambda each: each.programs[0])
def test_an_explanation_names_programs_and_situations(each: Explanation) -> None:
    assert {application_called(name).name for name in each.programs} == set(each.programs)
    assert set(each.situations) <= set(BY_NAME)
