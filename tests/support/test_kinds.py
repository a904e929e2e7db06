"""The kind of a test follows from the fixtures, and a test without the right marker fails."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.support import kinds
from tests.support.mount import DaxMount

pytest_plugins = ["pytester"]


def uses_nothing() -> None:
    pass


def item(request: pytest.FixtureRequest, *fixtures: str) -> pytest.Item:
    """A test with the given fixtures."""
    made = pytest.Function.from_parent(request.node.parent, name="made", callobj=uses_nothing)
    made.fixturenames = [*fixtures]
    kinds.mark(made)
    return made


@pytest.mark.parametrize(
    ("fixtures", "kind"),
    [
        ([], "unit"),
        (["tmp_path", "core"], "unit"),
        (["tmp_path", "dax_mount", "scene"], "mount"),
        (["zygote", "quick_mount"], "mount"),
        (["archives"], "slow"),
        (["cluster", "dax_mount"], "slow"),
    ],
)
def test_the_kind_follows_from_the_fixtures(
    request: pytest.FixtureRequest, fixtures: list[str], kind: str
) -> None:
    made = item(request, *fixtures)
    assert kinds.kind(made) == kind
    assert kinds.count([made])[kind] == 1


def test_a_benchmark_is_slow(request: pytest.FixtureRequest) -> None:
    made = item(request)
    made.add_marker("bench")
    kinds.mark(made)
    assert kinds.kind(made) == "slow"


def test_a_mount_in_a_unit_test_fails_before_it_is_made(tmp_path: Path) -> None:
    with pytest.raises(AssertionError, match=r"needs @pytest.mark.mount"):
        DaxMount(tmp_path / "device", tmp_path).mount()


def test_files_with_long_tests_come_first_and_stay_whole(pytester: pytest.Pytester) -> None:
    pytester.makeconftest(
        "from tests.support import kinds\n"
        "def pytest_configure(config):\n"
        "    for name in ('mount', 'slow'):\n"
        "        config.addinivalue_line('markers', name)\n"
        "def pytest_collection_modifyitems(items):\n"
        "    kinds.sort(items)\n"
    )
    marked = "import pytest\ndef test_a(): pass\n@pytest.mark.{}\ndef test_b(): pass\n"
    pytester.makepyfile(
        test_1="def test_a(): pass", test_2=marked.format("mount"), test_3=marked.format("slow")
    )
    pytester.syspathinsert(Path(__file__).parents[2])
    found = pytester.runpytest_inprocess("--collect-only", "-q").outlines
    names = [line for line in found if "::" in line]
    assert names == [
        "test_3.py::test_a",
        "test_3.py::test_b",
        "test_2.py::test_a",
        "test_2.py::test_b",
        "test_1.py::test_a",
    ]
