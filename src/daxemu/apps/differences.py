"""Cells that differ between page-cache mode and direct mounts, and the reason of each difference."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

from daxemu.apps.cell import MatrixCell, ProgramLife


class Explanation(NamedTuple):
    """Reason why cells differ. ``programs``, ``situations``: the reason holds for each combination."""

    programs: tuple[str, ...]
    situations: tuple[str, ...]
    text: str


EXPLANATIONS: tuple[Explanation, ...] = ()


class CellDifference(NamedTuple):
    """Cell whose behaviour depends on the mode. ``reason``: empty if EXPLANATIONS has none."""

    cached: MatrixCell
    direct: MatrixCell
    reason: str


def differences(made: Sequence[MatrixCell]) -> Iterator[CellDifference]:
    """Yield the cells observed in both modes with different outcomes, in the order of ``made``."""
    cached = {(c.application, c.situation): c for c in made if c.mode == "page cache"}
    for cell in made:
        other = cached.get((cell.application, cell.situation))
        if cell.mode != "direct" or other is None or cell.failed or other.failed:
            continue
        if (_kind(other.first), _kind(other.again)) != (_kind(cell.first), _kind(cell.again)):
            yield CellDifference(other, cell, _reason(cell))


def _kind(life: ProgramLife | None) -> tuple[str, bool] | None:
    return None if life is None else (life.outcome, life.stays)


def _reason(cell: MatrixCell) -> str:
    return next(
        (
            each.text
            for each in EXPLANATIONS
            if cell.application in each.programs and cell.situation in each.situations
        ),
        "",
    )
