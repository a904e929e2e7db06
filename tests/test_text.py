"""Foreign text does not act on a terminal, and a name in JSON gives its bytes back."""

from __future__ import annotations

import ast
import json
import unicodedata
from pathlib import Path

import pytest

import daxemu.cli
from daxemu.text import for_people, name_bytes, name_text

BYTES = [bytes([value]) for value in range(1, 256) if value != ord("/")]
CLI = Path(daxemu.cli.__file__).parent


@pytest.mark.parametrize("around", [b"", b"\\", b"\\x", b"a\n", "ü".encode()])
def test_a_name_in_json_gives_its_bytes_back(around: bytes) -> None:
    names = [around + byte + around for byte in BYTES] + [around + b"".join(BYTES), b"\\xff", b"\xff"]
    shown = json.loads(json.dumps([name_text(name) for name in names]))
    assert [name_bytes(text) for text in shown] == names
    assert len(set(shown)) == len(set(names))


def test_no_character_that_acts_on_a_terminal_is_left() -> None:
    everything = "".join(map(chr, [*range(0x3000), 0xDC80, 0xDCFF, 0xD800, 0xFEFF, 0x1F600]))
    shown = for_people(everything)
    assert {unicodedata.category(char) for char in shown}.isdisjoint({"Cc", "Cs", "Zl", "Zp"})
    assert not {"RLO", "LRO", "RLE", "LRE", "PDF", "RLI", "LRI", "FSI", "PDI"} & {
        unicodedata.bidirectional(char) for char in shown
    }
    shown.encode()


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("plain ünï 日本 😀", "plain ünï 日本 😀"),
        ("\x1b[31mred\n", "\\x1b[31mred\\n"),
        ("\x9b31m", "\\u009b31m"),
        ("a\u202egpj.exe", "a\\u202egpj.exe"),
        ("\udcff", "\\xff"),
    ],
)
def test_what_people_see(text: str, shown: str) -> None:
    assert for_people(text) == shown


WRITERS = ("watch/view.py", "demo/", "touch_child.py")
"""Modules that write elsewhere: a widget, other programs, a pipe."""


def test_the_command_line_prints_in_one_place_only() -> None:
    """click.echo and similar functions outside of output.py would print foreign names unescaped."""
    found = []
    for path in CLI.rglob("*.py"):
        if path == CLI / "output.py":
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            if not isinstance(node, ast.Call):
                continue
            called = ast.unparse(node.func)
            if called in {"print", "Text"} or called.rpartition(".")[2] in {"echo", "secho", "write"}:
                found.append(f"{path.relative_to(CLI)}:{node.lineno} {called}")
    assert [each for each in found if not each.startswith(WRITERS)] == []
    assert all(" Text" in each or ".write" in each for each in found)
