"""Conversions between units: exact at, before and after each boundary."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

import daxemu
from daxemu.pmem.inject import failed_pages
from daxemu.ranges import BlockRange, ByteRange, PfnRange, Range, SectorRange
from daxemu.uapi import page_align_down, page_align_up
from daxemu.units import (
    DIV_ROUND_UP,
    PFN_PHYS,
    PHYS_PFN,
    blocks_inside,
    blocks_of,
    blocks_of_sectors,
    byte_span,
    bytes_of_blocks,
    bytes_of_sectors,
    pages_at,
    round_down,
    round_up,
    sector_at,
    sectors_at,
    sectors_of,
)
from tests.support.core import Core


@pytest.mark.parametrize(
    ("area", "overlapping", "inside", "sectors"),
    [
        (Range(0, 4096), Range(0, 1), Range(0, 1), Range(0, 8)),
        (Range(1, 4096), Range(0, 1), Range(1, 1), Range(0, 8)),
        (Range(0, 4097), Range(0, 2), Range(0, 1), Range(0, 9)),
        (Range(4095, 8193), Range(0, 3), Range(1, 2), Range(7, 17)),
        (Range(4096, 4096), Range(1, 1), Range(1, 1), Range(8, 8)),
        (Range(5000, 5001), Range(1, 2), Range(2, 1), Range(9, 10)),
    ],
)
def test_bytes_become_blocks_and_sectors(
    area: Range, overlapping: Range, inside: Range, sectors: Range
) -> None:
    assert (blocks_of(area), blocks_inside(area), sectors_of(area)) == (overlapping, inside, sectors)
    assert sectors_at(area.start, area.length) == sectors
    assert pages_at(area.start, area.length) == overlapping
    assert sector_at(area.start) == sectors.start


def test_blocks_and_sectors_become_bytes() -> None:
    assert bytes_of_blocks(Range(2, 5)) == Range(8192, 20480)
    assert byte_span(Range(2, 5)) == (8192, 12288)
    assert bytes_of_sectors(Range(1, 3)) == Range(512, 1536)
    assert blocks_of_sectors(Range(7, 9)) == Range(0, 2)
    assert blocks_of_sectors(Range(8, 16)) == Range(1, 2)
    assert (PFN_PHYS(3), PHYS_PFN(12288), PHYS_PFN(16383)) == (12288, 3, 3)


@pytest.mark.parametrize(("number", "up", "down"), [(0, 0, 0), (1, 7, 0), (7, 7, 7), (8, 14, 7)])
def test_rounding_is_to_multiples(number: int, up: int, down: int) -> None:
    assert (round_up(number, 7), round_down(number, 7)) == (up, down)
    assert DIV_ROUND_UP(number, 7) == up // 7
    assert page_align_up(number) == round_up(number, 4096)
    assert page_align_down(number + 4096) == round_down(number + 4096, 4096)


def test_a_range_of_another_unit_is_an_error_of_mypy(core: Core) -> None:
    """Each comment "type: ignore" stands for an error: mypy --strict refuses a comment without an error."""
    area: ByteRange = Range(0, 4096)
    blocks: BlockRange = blocks_of(area)
    sectors: SectorRange = sectors_of(area)
    pfns: PfnRange = Range(0, 1)
    assert blocks_of(sectors) == Range(0, 1)  # type: ignore[arg-type]
    assert bytes_of_sectors(blocks) == Range(0, 512)  # type: ignore[arg-type]
    assert byte_span(pfns) == (0, 4096)  # type: ignore[arg-type]
    assert list(core.pmem.badblocks.known(blocks)) == []  # type: ignore[arg-type]
    assert core.fs.allocator.used_in(area) > 0  # type: ignore[arg-type]
    assert failed_pages(core.pmem, sectors)[1] == 1  # type: ignore[arg-type]
    assert blocks_of(Range(0, 1)) == Range(0, 1)  # a range without a unit fits


SHIFTS = frozenset({"PAGE_SHIFT", "SECTOR_SHIFT", "PMD_SHIFT"})

ALLOWED = {
    "uapi.py": "defines the sizes by the shifts",
    "units.py": "defines the conversions",
    "ranges.py": "is below units; rounds to any unit",
    "evaluate/fleet.py": "rounds arrays of numpy, which the conversions do not take",
}
"""Files that may convert by hand, with the reason."""


def by_hand(source: str) -> list[int]:
    """Return the lines with ``-(-x // y)``, a shift by a named shift, or a division or product by
    SECTOR_SIZE.
    """
    return [
        node.lineno
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.expr) and _is_by_hand(node)
    ]


def _is_by_hand(node: ast.expr) -> bool:
    match node:
        case ast.UnaryOp(ast.USub(), ast.BinOp(ast.UnaryOp(ast.USub()), ast.FloorDiv() | ast.RShift())):
            return True
        case ast.BinOp(_, ast.LShift() | ast.RShift(), ast.Name(name)):
            return name in SHIFTS
        case ast.BinOp(_, ast.FloorDiv() | ast.Mult(), ast.Name("SECTOR_SIZE")):
            return True
    return False


@pytest.mark.parametrize(
    ("source", "lines"),
    [
        ("a << PAGE_SHIFT", [1]),
        ("\na >> SECTOR_SHIFT", [2]),
        ("-(-a // b)", [1]),
        ("-(-a >> 3)", [1]),
        ("a // SECTOR_SIZE", [1]),
        ("(a + b) * SECTOR_SIZE", [1]),
        ("a // b + (c << 3) - SECTOR_SIZE", []),
    ],
)
def test_conversions_by_hand_are_found(source: str, lines: list[int]) -> None:
    assert by_hand(source) == lines


def test_no_module_converts_by_hand() -> None:
    top = Path(daxemu.__file__).parent
    found = {
        name: lines
        for path in sorted(top.rglob("*.py"))
        if (lines := by_hand(path.read_text())) and (name := str(path.relative_to(top)))
    }
    assert {name: lines for name, lines in found.items() if name not in ALLOWED} == {}
    assert found.keys() == ALLOWED.keys()  # an entry goes with its last conversion by hand
