"""Pages for contributors name existing functions, files, make targets and terms."""

from __future__ import annotations

import importlib
import inspect
import re
import shutil
import subprocess
import sys
from functools import cache
from pathlib import Path
from typing import get_args, get_type_hints

import pytest

from daxemu.events import Outcome, PageType
from daxemu.failure_kind import FailureKind
from daxemu.host.page_cache import populating
from daxemu.host.tracer.messages import Delivered, Gone, Ignored, NotTaken, Refused
from daxemu.protocol import StatusReport
from daxemu.supervisor import signals
from tests.support.pages import TOP

GLOSSARY = (TOP / "docs" / "glossary.md").read_text()
CONTRIBUTING = (TOP / "CONTRIBUTING.md").read_text()
CONCURRENCY = (TOP / "docs" / "concurrency.md").read_text()
PACKAGES = "apps|cli|client|evaluate|fs|host|mm|pmem|repair|supervisor"
FRAGMENT = r"\+[\w-]+\.(added|changed|fixed|removed)\.md"
"""Name of a news fragment."""


@cache
def sources() -> str:
    """Text of every source file, Python and C."""
    files = [path for suffix in ("py", "c", "h") for path in (TOP / "src").rglob(f"*.{suffix}")]
    return "\n".join(path.read_text() for path in files)


def exists(name: str) -> bool:
    """Return True if ``package.module.Class.attribute`` is in daxemu. Attributes set by ``__init__``
    count.
    """
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
    """Return every text in backticks of the form ``pattern``, each once, in order."""
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


# -- the glossary


def terms(section: str = "") -> list[str]:
    """Return the words explained in one section of the glossary, or in all sections."""
    _, _, text = GLOSSARY.partition(section)
    text = text.partition("\n#")[0] if section else text
    rows = re.findall(r"^\| ([^|]+) \|", text, re.MULTILINE)
    return [word.strip() for row in rows for word in row.split(", ") if word != "word"]


def results_of_a_signal() -> set[str]:
    """Return the possible results of ``SignalSent``."""
    outcomes = [None, Delivered(1, 2, 4, 0, 1), Ignored(1), Gone(1), Refused(1, "no", False), NotTaken(1)]
    return {signals._explain(outcome)[0] for outcome in outcomes} | {"merged"}


def results_of_a_populating_call() -> set[str]:
    """Return the possible results of ``PopulateFailed``: the words given to ``Populating._tell``."""
    calls = re.findall(r"self\._tell\(now, (.*?)[,)]", inspect.getsource(populating.Populating))
    return {word for call in calls for word in re.findall(r'"(\w+)"', call)}


@pytest.mark.parametrize(
    ("section", "words"),
    [
        ("### Outcomes", {*Outcome, *PageType, FailureKind.LATENT, FailureKind.SILENT}),
        ("### Results of a signal", results_of_a_signal()),
        ("### Results of a populating", results_of_a_populating_call()),
        ("### States of a mount", {*get_args(get_type_hints(StatusReport)["state"])}),
        ("## Repair", {"recovered", "lost", "cannot", "failed"}),
    ],
    ids=["outcomes", "signals", "populate", "states", "verdicts"],
)
def test_every_word_of_events_and_replies_is_explained(section: str, words: set[str]) -> None:
    assert len(words) >= 3
    assert {str(word) for word in words} - set(terms(section)) == set()


def test_every_kind_of_harm_is_explained() -> None:
    explained = terms("## Media")
    assert [kind for kind in FailureKind if not any(term.split()[0] == kind for term in explained)] == []


def test_no_word_is_explained_twice_in_a_section() -> None:
    sections = re.findall(r"^##+ .*$", GLOSSARY, re.MULTILINE)
    assert len(sections) >= 9
    for section in sections:
        words = terms(section + "\n")
        assert len(words) == len(set(words)), section


@pytest.mark.parametrize("name", named(GLOSSARY, rf"({PACKAGES})(\.\w+)+"))
def test_a_function_of_the_glossary_exists(name: str) -> None:
    assert exists(name)


# -- how to contribute


@pytest.mark.parametrize("path", named(CONTRIBUTING, r"(src|tests|docs|examples|tools|\.ci)/[\w./-]*"))
def test_a_file_of_a_recipe_exists(path: str) -> None:
    assert (TOP / path).exists()


@pytest.mark.parametrize("command", sorted(set(re.findall(r"\bmake ([a-z][a-z-]*)", CONTRIBUTING))))
def test_a_make_target_that_is_named_exists(command: str) -> None:
    assert re.search(rf"^{command}:", (TOP / "Makefile").read_text(), re.MULTILINE)


def test_each_recipe_is_in_the_table_of_files() -> None:
    recipes = re.findall(r"^### (.*)$", CONTRIBUTING.partition("## Recipes")[2], re.MULTILINE)
    table = (TOP / "docs" / "architecture.md").read_text().partition("## The number of files")[2]
    rows = re.findall(r"^\| (an? .*?) \|", table, re.MULTILINE)
    assert len(recipes) == 8
    pairs = zip(rows, recipes, strict=True)
    assert [pair for pair in pairs if not pair[0].lower().startswith(pair[1].lower()[:9])] == []


@pytest.mark.parametrize("file", ["CONTRIBUTING.md", "README.md"])
def test_a_link_leads_to_a_file(file: str) -> None:
    links = re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", (TOP / file).read_text())
    assert len(links) >= 4
    assert [link for link in links if not (TOP / link).exists()] == []


def test_news_fragments_become_the_changelog(tmp_path: Path) -> None:
    fragments = [path for path in (TOP / "changelog.d").iterdir() if path.name != ".gitignore"]
    assert [path.name for path in fragments if not re.fullmatch(FRAGMENT, path.name)] == []
    shutil.copytree(TOP / "changelog.d", tmp_path / "changelog.d")
    for name in ("pyproject.toml", "CHANGELOG.md"):
        shutil.copy(TOP / name, tmp_path)
    (tmp_path / "changelog.d" / "+test.fixed.md").write_text("A line for a user.\n")
    build = [
        sys.executable,
        "-m",
        "towncrier",
        "build",
        "--yes",
        "--version",
        "9.9.9",
        "--date",
        "2030-01-02",
    ]
    subprocess.run(build, cwd=tmp_path, check=True, capture_output=True)
    before, after = ((top / "CHANGELOG.md").read_text() for top in (TOP, tmp_path))
    head, _, tail = before.partition("<!-- releases -->\n")
    assert after.startswith(f"{head}<!-- releases -->\n\n## 9.9.9 (2030-01-02)\n")
    assert after.endswith(tail)
    section = after.removesuffix(tail)
    assert "- A line for a user.\n" in section.partition("### Fixed\n")[2]
    assert all(path.read_text().strip() in section for path in fragments)
    assert [path.name for path in (tmp_path / "changelog.d").iterdir()] == [".gitignore"]
