"""docs/worked-example.md shows the events of a real mount."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.support import worked_example
from tests.support.pages import TOP
from tests.support.zygote import Zygote

pytestmark = pytest.mark.mount


def test_the_page_shows_what_happens(tmp_path: Path, zygote: Zygote) -> None:
    page = (TOP / "docs" / "worked-example.md").read_text()
    shown = re.findall(r"^## \d+\. ([^\n]*)\n.*?^```text\n(.*?)^```", page, re.DOTALL | re.MULTILINE)
    played = [(event.capitalize(), text) for event, text in worked_example.play(tmp_path, zygote)]
    assert shown == played, "run: python -m tests.support.worked_example"
