"""HTML frame of a report: head, style, legend.

Everything is inline; the page loads nothing from elsewhere.
"""

from __future__ import annotations

from collections.abc import Sequence
from importlib.resources import files

from daxemu.evaluate.plots import Colors
from daxemu.evaluate.svg import Svg
from daxemu.text import for_html


def page(title: str, body: str) -> str:
    """Return a complete HTML document. ``title`` is escaped here; ``body`` must be HTML already."""
    style = files("daxemu.evaluate").joinpath("report.css").read_text(encoding="utf-8")
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{for_html(title)}</title><style>{style}</style></head><body>{body}</body></html>\n"
    )


def legend(by: Colors, workloads: Sequence[str]) -> str:
    """Return the legend as HTML: one colour for each strategy, one marker shape for each workload."""
    items = [f'<span><i style="background:{color}"></i>{for_html(name)}</span>' for name, color in by.items()]
    for index, name in enumerate(sorted(workloads)):
        shape = Svg(16, 16, name)
        shape.mark(8, 8, index, "currentColor", name)
        items.append(f"<span>{shape}{for_html(name)}</span>")
    return f"<div class=legend>{''.join(items)}</div>"
