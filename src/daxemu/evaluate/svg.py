"""Just enough of SVG for plots that stand in an HTML page: they scale with it, and take its text colour."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

from daxemu.text import for_html

PALETTE = (
    "#4477aa", "#ee6677", "#228833", "#aa7700", "#aa3377", "#2299bb", "#777777", "#994455", "#5566cc",
    "#117755",
)  # fmt: skip
"""Told apart by most eyes, on white and on black."""


def number(value: float) -> str:
    """A coordinate, without digits that nobody sees."""
    return f"{value:.1f}".rstrip("0").rstrip(".")


class Svg:
    """A drawing of ``width`` x ``height`` units. ``label``: what it shows, for those who cannot see it."""

    def __init__(self, width: float, height: float, label: str) -> None:
        self.width = width
        self.height = height
        self._label = label
        self._parts: list[str] = []

    def line(self, x1: float, y1: float, x2: float, y2: float, css: str, color: str = "") -> None:
        """A straight line; ``css`` names its class."""
        style = f' stroke="{color}"' if color else ""
        self._parts.append(
            f'<line class="{css}"{style} x1="{number(x1)}" y1="{number(y1)}" '
            f'x2="{number(x2)}" y2="{number(y2)}"/>'
        )

    def rect(self, x: float, y: float, w: float, h: float, css: str, title: str = "") -> None:
        """A rectangle, filled by its class."""
        inner = f"<title>{for_html(title)}</title>" if title else ""
        self._parts.append(
            f'<rect class="{css}" x="{number(x)}" y="{number(y)}" width="{number(w)}" height="{number(h)}">'
            f"{inner}</rect>"
        )

    def path(self, points: Sequence[tuple[float, float]], css: str, color: str) -> None:
        """A polyline."""
        if points:
            text = "M" + "L".join(f"{number(x)} {number(y)}" for x, y in points)
            self._parts.append(f'<path class="{css}" stroke="{color}" d="{text}"/>')

    def text(
        self, x: float, y: float, text: str, anchor: str = "start", css: str = "", turn: bool = False
    ) -> None:
        """Text; with ``turn`` it reads upwards."""
        spin = f' transform="rotate(-90 {number(x)} {number(y)})"' if turn else ""
        self._parts.append(
            f'<text class="{css}" x="{number(x)}" y="{number(y)}" text-anchor="{anchor}"{spin}>'
            f"{for_html(text)}</text>"
        )

    def mark(self, x: float, y: float, shape: int, color: str, title: str) -> None:
        """A point: circle, square, triangle, diamond, cross, by number."""
        r = 5.0
        inner = f"<title>{for_html(title)}</title>"
        shapes: list[Sequence[tuple[float, float]]] = [
            [(-r, -r), (r, -r), (r, r), (-r, r)],
            [(0, -r * 1.2), (r * 1.1, r), (-r * 1.1, r)],
            [(0, -r * 1.3), (r * 1.3, 0), (0, r * 1.3), (-r * 1.3, 0)],
            [(-r, -r * 0.4), (r, -r * 0.4), (r, r * 0.4), (-r, r * 0.4)],
        ]
        if shape % 5 == 0:
            self._parts.append(
                f'<circle class="mark" fill="{color}" cx="{number(x)}" cy="{number(y)}" r="{r}">'
                f"{inner}</circle>"
            )
            return
        points = " ".join(f"{number(x + dx)},{number(y + dy)}" for dx, dy in shapes[shape % 5 - 1])
        self._parts.append(f'<polygon class="mark" fill="{color}" points="{points}">{inner}</polygon>')

    def __str__(self) -> str:
        return (
            f'<svg viewBox="0 0 {number(self.width)} {number(self.height)}" role="img" '
            f'aria-label="{for_html(self._label)}">' + "".join(self._parts) + "</svg>"
        )


class Scale:
    """From values to units of a drawing: linear, or with ``knee`` logarithmic above it, with a 0."""

    def __init__(
        self, low: float, high: float, start: float, end: float, *, knee: float | None = None
    ) -> None:
        self._bend: Callable[[float], float] = (lambda v: math.log2(1 + v / knee)) if knee else (lambda v: v)
        self._low, self._high = self._bend(low), self._bend(max(high, low + 1e-12))
        self._start, self._end = start, end

    def __call__(self, value: float) -> float:
        part = (self._bend(value) - self._low) / (self._high - self._low or 1.0)
        return self._start + part * (self._end - self._start)


def round_ticks(low: float, high: float, count: int = 5) -> list[float]:
    """Round numbers that divide a linear axis."""
    if high <= low:
        return [low]
    rough = (high - low) / count
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(power * m for m in (1, 2, 5, 10) if power * m >= rough * 0.999)
    first = math.ceil(low / step - 1e-9)
    return [i * step for i in range(first, math.floor(high / step + 1e-9) + 1)]


def doubling_ticks(high: float, first: float, count: int = 6) -> list[float]:
    """0 and powers of two, for a logarithmic axis of bytes or seconds."""
    steps = max(math.ceil(math.log2(max(high, first) / first)), 1)
    stride = max(round(steps / count), 1)
    return [0.0, *(first * 2.0**i for i in range(0, steps + 1, stride) if first * 2.0**i <= high * 1.001)]


def decade_ticks(low: float, high: float) -> list[float]:
    """1, 2 and 5 times powers of ten, for a logarithmic axis; powers alone where that is many."""
    first, last = math.floor(math.log10(low)), math.ceil(math.log10(high))
    steps = (1, 2, 5) if last - first <= 3 else (1,)
    return [
        m * 10.0**power for power in range(first, last + 1) for m in steps if low <= m * 10.0**power <= high
    ]
