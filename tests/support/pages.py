"""Runnable pages of the documentation: a run must print the output that the page shows."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

from tests.support import kinds
from tests.support.mount import clear_away

TOP = Path(__file__).parents[2]
BIN = Path(sys.executable).parent
DEVICES = "/dev/shm/pmem"
"""Name of devices in pages, before a number."""


class Step(NamedTuple):
    """``code`` for ``program``, and the expected output."""

    program: str
    code: str
    shown: str


def steps(text: str) -> list[Step]:
    """Return the ``$ command`` lines of console blocks, each with the output shown below, and the python
    blocks, each with the text block directly after, if any.
    """
    found: list[Step] = []
    blocks = re.finditer(r"```(console|python)\n(.*?)```(?:\n+```text\n(.*?)```)?", text, re.DOTALL)
    for language, code, output in (block.groups(default="") for block in blocks):
        if language == "python":
            found.append(Step("python3", code, output))
            continue
        for part in re.split(r"^\$ ", code, flags=re.MULTILINE)[1:]:
            command, _, shown = part.partition("\n")
            while command.endswith("\\") or ("<<" in command and not _ends_heredoc(command)):
                more, _, shown = shown.partition("\n")
                command += f"\n{more}"
            found.append(Step("bash", command, shown))
    return found


def _ends_heredoc(command: str) -> bool:
    word = re.search(r"<<\s*'?(\w+)", command)
    return word is None or command.endswith(f"\n{word[1]}")


def anonymous(text: str) -> str:
    """Replace output that differs from run to run: times, process ids, addresses of mappings, and the choice
    of free blocks.
    """
    text = re.sub(r"device 0x[0-9a-f]+\+", "device WHERE+", text)
    text = re.sub(r"0x10[0-9a-f]{4}\b", "PFN", text)
    text = re.sub(r"\[\d+\.\d+\]", "[TIME]", text)
    text = re.sub(r'"time":[\d.]+', '"time":TIME', text)
    text = re.sub(r"^\d\d:\d\d:\d\d\.\d\d\d", "CLOCK", text, flags=re.MULTILINE)
    text = re.sub(r"(supervisor|pid|thread) \d+", r"\1 PID", text)
    text = re.sub(r"(Killing|SIGBUS to|by) (\S+):\d+", r"\1 \2:PID", text)
    text = re.sub(r"fault at [0-9a-f]+", "fault at ADDRESS", text)
    text = re.sub(r"addr 0x[0-9a-f]+", "addr ADDRESS", text)
    text = re.sub(r"in \d+\.\d+s", "in TIME", text)
    # A shell that runs commands from a file prints more than a shell at a terminal.
    return re.sub(r".*Bus error.*", "Bus error", text)


def run_page(page: Path, scratch: Path) -> None:
    """Run every step of a page, in a mount and on a device of its own where the page has /tmp/ and
    /dev/shm/pmem0.

    A line ``...`` of the output shown stands for any lines.
    """
    kinds.require("mount")
    device = f"{DEVICES}-{os.getpid()}-"
    environment = {
        **os.environ,
        "PATH": f"{BIN}:{os.environ['PATH']}",
        "COLUMNS": "80",
        "PYTHONPATH": "",
        "TMPDIR": str(scratch),
    }

    def here(text: str) -> str:
        return re.sub(r"(?<![\w/])/tmp/", f"{scratch}/", text.replace(DEVICES, device))

    try:
        for step in steps(page.read_text()):
            # In a shell of its own that outlives the command, so that the shell reports a death.
            script = here(step.code if step.program != "bash" else f"ulimit -c 0\n{step.code}\ntrue\n")
            done = subprocess.run(
                [step.program],
                input=script,
                text=True,
                timeout=100,
                env=environment,
                cwd=TOP,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
            )
            assert matches(here(step.shown), done.stdout), f"{step.code}\n--- printed\n{done.stdout}"
    finally:
        for mountpoint in scratch.iterdir():
            clear_away(mountpoint)
        for left in Path("/dev/shm").glob(f"{Path(device).name}*"):
            shutil.rmtree(left, ignore_errors=True)


def matches(shown: str, printed: str) -> bool:
    """Return True if ``printed`` equals the output that a page shows."""
    parts = [re.escape(part) for part in re.split(r"^\.\.\.\n", anonymous(shown), flags=re.MULTILINE)]
    return re.fullmatch("(?s:.*)".join(parts), anonymous(printed)) is not None
