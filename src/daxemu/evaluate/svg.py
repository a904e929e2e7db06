"""Minimal SVG for plots inside an HTML page. Plots scale with the page and use the page's text colour."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

from daxemu.text import for_html

PALETTE = (
    "#4477aa", "#ee6677", "#228833", "#aa7700", "#aa3377", "#2299bb", "#777777", "#994455", "#5566cc",
    "#117755",
)  # fmt: skip
"""Colours that most people can distinguish, on white and on black."""


def number(value: float) -> str:
    """Format a coordinate with one decimal at most."""
    return f"{value:.1f}".rstrip("0").rstrip(".")


class Svg:
    """Drawing of ``width`` x ``height`` units. ``label``: text for screen readers."""

    def __init__(self, width: float, height: float, label: str) -> None:
        self.width = width
        self.height = height
        self._label = label
        self._parts: list[str] = []

    def line(self, x1: float, y1: float, x2: float, y2: float, css: str, color: str = "") -> None:
        """Add a straight line with CSS class ``css``."""
        style = f' stroke="{color}"' if color else ""
        self._parts.append(
            f'<line class="{css}"{style} x1="{number(x1)}" y1="{number(y1)}" '
            f'x2="{number(x2)}" y2="{number(y2)}"/>'
        )

    def rect(self, x: float, y: float, w: float, h: float, css: str, title: str = "") -> None:
        """Add a rectangle, filled by CSS class ``css``."""
        inner = f"<title>{for_html(title)}</title>" if title else ""
        self._parts.append(
            f'<rect class="{css}" x="{number(x)}" y="{number(y)}" width="{number(w)}" height="{number(h)}">'
            f"{inner}</rect>"
        )

    def path(self, points: Sequence[tuple[float, float]], css: str, color: str) -> None:
        """Add a polyline. No points: nothing is added."""
        if points:
            text = "M" + "L".join(f"{number(x)} {number(y)}" for x, y in points)
            self._parts.append(f'<path class="{css}" stroke="{color}" d="{text}"/>')

    def text(
        self, x: float, y: float, text: str, anchor: str = "start", css: str = "", turn: bool = False
    ) -> None:
        """Add text; rotated by 90 degrees, reading upwards, if ``turn``."""
        spin = f' transform="rotate(-90 {number(x)} {number(y)})"' if turn else ""
        self._parts.append(
            f'<text class="{css}" x="{number(x)}" y="{number(y)}" text-anchor="{anchor}"{spin}>'
            f"{for_html(text)}</text>"
        )

    def mark(self, x: float, y: float, shape: int, color: str, title: str) -> None:
        """Add a point marker. ``shape`` modulo 5: circle, square, triangle, diamond, rectangle."""
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
    """Map from values to drawing units: linear, or logarithmic above ``knee`` with a point for 0."""

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
    """Return round numbers dividing a linear axis into about ``count`` parts."""
    if high <= low:
        return [low]
    rough = (high - low) / count
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(power * m for m in (1, 2, 5, 10) if power * m >= rough * 0.999)
    first = math.ceil(low / step - 1e-9)
    return [i * step for i in range(first, math.floor(high / step + 1e-9) + 1)]


def doubling_ticks(high: float, first: float, count: int = 6) -> list[float]:
    """Return 0 and ``first`` times powers of two, for a logarithmic axis."""
    steps = max(math.ceil(math.log2(max(high, first) / first)), 1)
    stride = max(round(steps / count), 1)
    return [0.0, *(first * 2.0**i for i in range(0, steps + 1, stride) if first * 2.0**i <= high * 1.001)]


def decade_ticks(low: float, high: float) -> list[float]:
    """Return 1, 2 and 5 times powers of ten for a logarithmic axis.

    An axis of more than three decades has powers of ten alone.
    """
    first, last = math.floor(math.log10(low)), math.ceil(math.log10(high))
    steps = (1, 2, 5) if last - first <= 3 else (1,)
    return [
        m * 10.0**power for power in range(first, last + 1) for m in steps if low <= m * 10.0**power <= high
    ]
