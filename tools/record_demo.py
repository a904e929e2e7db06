"""Recorder of docs/demo.svg, a picture of a real run of daxemu demo: python -m tools.record_demo"""

from __future__ import annotations

import os
import pty
import re
import subprocess
import sys
from io import StringIO
from pathlib import Path

from rich.console import Console
from rich.text import Text

WIDTH = 110
SVG = Path(__file__).parents[1] / "docs" / "demo.svg"


def record() -> str:
    """Run the demo on a terminal and return its output. Raises CalledProcessError for a broken promise."""
    ours, theirs = pty.openpty()
    with subprocess.Popen(
        [sys.executable, "-m", "daxemu", "demo"],
        stdin=subprocess.DEVNULL,
        stdout=theirs,
        stderr=theirs,
        env={**os.environ, "COLUMNS": str(WIDTH)},
    ) as demo:
        os.close(theirs)
        said = b""
        try:
            while chunk := os.read(ours, 1 << 16):
                said += chunk
        except OSError:
            pass  # EIO: the other end of a pty was closed
        finally:
            os.close(ours)
    if demo.returncode:
        raise subprocess.CalledProcessError(demo.returncode, demo.args, said)
    return said.decode().replace("\r\n", "\n")


def picture(said: str) -> str:
    """Return a self-contained SVG. The SVG of rich itself would load a font."""
    console = Console(record=True, width=WIDTH, file=StringIO(), force_terminal=True)
    console.print(Text.from_ansi(f"$ daxemu demo\n{said}"), end="")
    svg = console.export_svg(title="daxemu demo", unique_id="demo")
    return re.sub(r"@font-face \{.*?\}\s*", "", svg, flags=re.DOTALL)


if __name__ == "__main__":
    SVG.write_text(picture(record()))
