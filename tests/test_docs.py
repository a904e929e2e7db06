"""Commands of the README and the examples run as written, and must print the output shown."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
from ctypes.util import find_library
from pathlib import Path

import pytest
from tools import cli_docs, protocol_docs

from daxemu.cli.main import VERBS
from tests.support.mount import DaxMount
from tests.support.pages import BIN, TOP, matches, run_page, steps

PAGES = [TOP / "README.md", *sorted((TOP / "docs").rglob("*.md"))]


@pytest.mark.mount
@pytest.mark.parametrize("page", [p for p in PAGES if steps(p.read_text())], ids=lambda p: p.name)
def test_a_page_prints_the_output_shown(page: Path, tmp_path: Path) -> None:
    if "socat" in page.read_text() and shutil.which("socat") is None:
        pytest.skip("no socat here: apt-get install socat")
    if "libpmem.so" in page.read_text() and find_library("pmem") is None:
        pytest.skip("no libpmem here: apt-get install libpmem1")
    run_page(page, tmp_path)


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_no_command_of_a_page_escapes(page: Path) -> None:
    """Every block is run (console, python), output of a run block (text), or tested as a file (c, ini
    ...).
    """
    languages = set(re.findall(r"^```(\w*)$", page.read_text(), re.MULTILINE)) - {""}
    assert languages <= {"console", "python", "text", "c", "toml", "dockerfile"}


def test_the_protocol_page_is_up_to_date() -> None:
    assert (TOP / "docs" / "protocol.md").read_text() == protocol_docs.page(), "run: make protocol"


def test_the_page_of_the_command_line_is_up_to_date() -> None:
    assert (TOP / "docs" / "reference" / "cli.md").read_text() == cli_docs.markdown(), "run: make protocol"


def test_the_man_page_is_one() -> None:
    page = cli_docs.man()
    named = re.findall(r"^\.SS daxemu ([a-z-]+)", page.replace("\\-", "-"), re.MULTILINE)
    assert named == list(VERBS)
    if shutil.which("groff") is None:
        pytest.skip("no groff here to look at the man page: apt-get install groff-base")
    done = subprocess.run(
        ["groff", "-man", "-Tutf8", "-ww"], input=page, capture_output=True, text=True, check=True
    )
    assert done.stderr == ""
    assert "Surprise removal" in " ".join(done.stdout.split())


def test_the_site_builds_without_warnings(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", tmp_path],
        cwd=TOP,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
    assert "WARNING" not in done.stderr
    assert (tmp_path / "howto" / "pytest.html").exists()


def test_the_recording_is_of_the_demo() -> None:
    picture = (TOP / "docs" / "demo.svg").read_text()
    assert re.search(r"(\d+)&#160;of&#160;\1&#160;promises&#160;kept", picture), "run: make recording"
    assert "http" not in re.sub(r'xmlns="[^"]*"|<!--.*?-->', "", picture), "it loads something"


def test_the_readme_fits_two_screens() -> None:
    assert len((TOP / "README.md").read_text().splitlines()) <= 120


@pytest.mark.parametrize(
    ("words", "offered"),
    [("daxemu in", "plain,inject"), ("daxemu inject --lat", "plain,--latent"), ("daxemu inject x", "file,x")],
)
def test_completion(words: str, offered: str) -> None:
    shell = {"_DAXEMU_COMPLETE": "bash_complete", "COMP_WORDS": words, "COMP_CWORD": str(words.count(" "))}
    done = subprocess.run([BIN / "daxemu"], env={**os.environ, **shell}, capture_output=True, text=True)
    assert offered in done.stdout.splitlines()


def test_the_output_shown_is_compared() -> None:
    assert matches("a\n...\nz\n", "a\nb\nc\nz\n")
    assert not matches("a\n...\nz\n", "a\nb\n")
    assert not matches("a\n", "a\nb\n")
    text = "```console\n$ cat <<E\n1\nE\n1\n$ b \\\n  c\n```\n```python\nprint(2)\n```\n\n```text\n2\n```\n"
    assert steps(text) == [
        ("bash", "cat <<E\n1\nE", "1\n"),
        ("bash", "b \\\n  c", ""),
        ("python3", "print(2)\n", "2\n"),
    ]


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
    assert re.fullmatch(r"pfn 0x[0-9a-f]+: Recovered, 1 files, 0 processes\n", done.stdout)


@pytest.mark.mount
def test_the_demo_keeps_its_promises() -> None:
    done = subprocess.run([BIN / "daxemu", "demo"], capture_output=True, text=True, timeout=90)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "NOT" not in done.stdout
    assert "ok   a store is on the media at once" in done.stdout


@pytest.mark.mount
def test_the_demo_says_why_a_machine_has_no_direct_mappings() -> None:
    without = ("setpriv", "--bounding-set", "-sys_ptrace", "--inh-caps", "-all")
    done = subprocess.run(
        [*without, sys.executable, "-m", "daxemu", "demo"], capture_output=True, text=True, timeout=90
    )
    assert done.returncode == 0, done.stdout + done.stderr
    (line,) = re.findall(r"^   left out: .*$", done.stdout, re.MULTILINE)
    assert "CAP_SYS_PTRACE" in line
