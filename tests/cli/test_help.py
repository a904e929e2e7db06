"""``daxemu --help``: one line for each verb, without the import of any verb."""

from __future__ import annotations

import subprocess
import sys

import pytest
from click.testing import CliRunner

from daxemu.cli.main import SUMMARIES, VERBS, main


def test_each_verb_has_a_summary_of_one_line() -> None:
    assert list(SUMMARIES) == list(VERBS)
    said = CliRunner().invoke(main, ["--help"], terminal_width=80).stdout.splitlines()
    listed = dict(line.split(maxsplit=1) for line in said[said.index("Commands:") + 1 :])
    assert listed == SUMMARIES


@pytest.mark.parametrize("option", ["--help", "--version"])
def test_no_module_of_a_verb_is_imported(option: str) -> None:
    code = "import sys; from daxemu.cli.main import main; main([sys.argv[1]], standalone_mode=False)"
    code += "; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code, option], capture_output=True, text=True, check=True)
    imported = set(done.stdout.splitlines()[-1].split())
    assert not imported & {"numpy", "rich", "msgspec", *(f"daxemu.cli.{name}" for name in VERBS.values())}
