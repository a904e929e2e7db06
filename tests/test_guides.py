"""Pages for contributors name what exists: functions, files, make targets, terms."""

from __future__ import annotations

import importlib
import inspect
import re
from functools import cache

import pytest

from tests.support.pages import TOP

CONCURRENCY = (TOP / "docs" / "concurrency.md").read_text()
PACKAGES = "cli|client|fs|host|mm|pmem|repair|supervisor"


@cache
def sources() -> str:
    """Text of every source file, Python and C."""
    files = [path for suffix in ("py", "c", "h") for path in (TOP / "src").rglob(f"*.{suffix}")]
    return "\n".join(path.read_text() for path in files)


def exists(name: str) -> bool:
    """Whether ``package.module.Class.attribute`` is in daxemu. Attributes that ``__init__`` sets count."""
    parts = name.split(".")
    found: object = None
    for end in range(len(parts), 0, -1):
        try:
            found = importlib.import_module(".".join(["daxemu", *parts[:end]]))
        except ModuleNotFoundError:
            continue
        break
    else:
        return False
    for attribute in parts[end:]:
        if hasattr(found, attribute):
            found = getattr(found, attribute)
        elif inspect.isclass(found) and re.search(rf"\bself\.{attribute}\b", inspect.getsource(found)):
            found = None
        else:
            return False
    return True


def named(page: str, pattern: str) -> list[str]:
    """Everything in backticks that has the form of ``pattern``, each once, in order."""
    words = re.findall(r"(?<!`)`([^`\n]+)`(?!`)", page)
    return list(dict.fromkeys(word for word in words if re.fullmatch(pattern, word)))


@pytest.mark.parametrize("name", named(CONCURRENCY, rf"({PACKAGES})(\.\w+)+"))
def test_a_function_of_the_page_on_concurrency_exists(name: str) -> None:
    assert exists(name)


@pytest.mark.parametrize("name", named(CONCURRENCY, r"_?[a-z]\w*_\w+|[A-Z][a-z]\w+"))
def test_a_short_name_of_the_page_on_concurrency_is_in_the_sources(name: str) -> None:
    assert re.search(rf"\b{name}\b", sources())


def test_a_name_that_is_gone_is_noticed() -> None:
    assert exists("supervisor.failures.Failures.mf_mutex")
    assert not exists("supervisor.failures.Failures.mutex_of_old")
    assert not exists("supervisor.nothing.Failures")
    assert not exists("host.session.revoke")


def test_every_step_says_where_it_runs() -> None:
    paths = re.split(r"^## ", CONCURRENCY, flags=re.MULTILINE)
    for path in paths:
        steps = re.split(r"^\d+\. ", path, flags=re.MULTILINE)[1:]
        unmarked = [step for step in steps if not re.search(r"\[(loop|worker|tracer)[],]", step)]
        assert [step for step in unmarked if not step.startswith(("The client", "The kernel"))] == []


@pytest.mark.parametrize(
    "path", ["Inject", "Load of latent", "Clone of", "Removal", "umount --force", "Populate over"]
)
def test_the_paths_are_there_with_their_checkpoints(path: str) -> None:
    _, _, text = CONCURRENCY.partition(f"\n## {path}")
    steps = text.partition("\n## ")[0].lower()
    assert steps.count("*checkpoint*") >= 3
    assert "crash" in steps
