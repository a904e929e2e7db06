"""What the README and the examples say is run as it stands, and must print what they say it prints."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from daxemu.cli.main import VERBS
from tests.support.mount import DaxMount, clear_away

pytestmark = pytest.mark.mount

TOP = Path(__file__).parents[1]
BIN = Path(sys.executable).parent


def console_steps(text: str) -> list[tuple[str, str]]:
    """The ``$ command`` lines of all console blocks, each with the output shown below it."""
    steps: list[tuple[str, str]] = []
    for block in re.findall(r"```console\n(.*?)```", text, re.DOTALL):
        for part in re.split(r"^\$ ", block, flags=re.MULTILINE)[1:]:
            command, _, output = part.partition("\n")
            steps.append((command, output))
    return steps


def anonymous(text: str) -> str:
    """Output without what differs from run to run: times, process ids, addresses of mappings."""
    text = re.sub(r"\[\d+\.\d+\]", "[TIME]", text)
    text = re.sub(r"supervisor \d+", "supervisor PID", text)
    text = re.sub(r"Killing \S+:\d+", "Killing PROCESS", text)
    text = re.sub(r"fault at [0-9a-f]+", "fault at ADDRESS", text)
    # A shell that runs commands from a file says more than one at a terminal.
    return re.sub(r".*Bus error.*", "Bus error", text)


def test_the_readme_tour_prints_what_it_shows(tmp_path: Path) -> None:
    device, mountpoint = f"/dev/shm/readme-{os.getpid()}", str(tmp_path / "pmem")
    environment = {**os.environ, "PATH": f"{BIN}:{os.environ['PATH']}"}

    def here(text: str) -> str:
        return text.replace("/dev/shm/pmem0", device).replace("/tmp/pmem", mountpoint)

    try:
        for command, shown in console_steps((TOP / "README.md").read_text()):
            # In a shell of its own that outlives the command, so that it is the shell that reports a death.
            script = f"ulimit -c 0\n{here(command)}\ntrue\n"
            done = subprocess.run(
                ["bash"], input=script, capture_output=True, text=True, timeout=60, env=environment
            )
            assert anonymous(done.stdout + done.stderr) == anonymous(here(shown)), command
    finally:
        clear_away(Path(mountpoint))
        subprocess.run(["rm", "-rf", device], check=True)


def test_the_readme_names_every_verb() -> None:
    text = (TOP / "README.md").read_text()
    shown = subprocess.run([BIN / "daxemu", "--help"], capture_output=True, text=True, check=True).stdout
    verbs = re.findall(r"^  (\w+) ", shown.partition("Commands:")[2], re.MULTILINE)
    assert len(verbs) >= 16
    assert [verb for verb in verbs if not re.search(rf"`[^`]*\b{verb}\b", text)] == []


@pytest.mark.parametrize("verb", sorted(VERBS))
def test_every_help_has_an_example_that_parses(verb: str) -> None:
    shown = subprocess.run(
        [BIN / "daxemu", verb, "--help"], capture_output=True, text=True, check=True
    ).stdout
    example = shown.partition("Example:")[2].strip().splitlines()[0]
    assert shlex.split(example)[:2] == ["daxemu", verb]
    assert "--json" in shown or verb == "run", "run prints nothing of its own"


def test_example_device_memory_without_struct_pages() -> None:
    shown = subprocess.run(
        [sys.executable, TOP / "examples" / "device_memory_without_struct_pages.py"],
        check=True,
        capture_output=True,
        text=True,
        timeout=60,
    ).stdout
    assert "the program got signal 7 code 5" in shown
    assert "recovery action for non struct page pfn: Recovered" in shown
    assert "refused: pfn 0x8000100+1: memory outside kernel control" in shown


def test_example_watch_a_failure(dax_mount: DaxMount) -> None:
    file = dax_mount.make_file("f", 1)
    done = subprocess.run(
        [sys.executable, TOP / "examples" / "watch_a_failure.py", file],
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
    assert re.fullmatch(r"pfn 0x[0-9a-f]+: Recovered, 1 files, 0 told\n", done.stdout)


def test_the_readme_python_works(dax_mount: DaxMount) -> None:
    (code,) = re.findall(r"```python\n(.*?)```", (TOP / "README.md").read_text(), re.DOTALL)
    code = code.replace("/tmp/pmem", str(dax_mount.path))
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert "recovered" in done.stdout, done.stderr


def test_the_demo_keeps_its_promises() -> None:
    done = subprocess.run([BIN / "daxemu", "demo"], capture_output=True, text=True, timeout=90)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "NOT" not in done.stdout
