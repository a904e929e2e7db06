"""Check of the docstrings against the project's rules of language: python -m tools.check_language

The check measures the pronouns per 100 docstring words of each package of src/daxemu, prints the figures, and
fails where a figure exceeds the limit of the package. A sentence with a pronoun for a subject names neither
actor nor object. The check also fails for a docstring of tests/ that begins with a bare scenario code: a
scenario of the kernel recordings is named by its whole key (`m5-mce-cacheline`).

Exit status: 0 without a problem, 1 otherwise.
"""

from __future__ import annotations

import ast
import json
import re
import sys
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

_PRONOUNS = "it its they them their that those this these who whom whose whoever somebody nobody what there"
PRONOUNS = frozenset(_PRONOUNS.split())

LIMIT = 4.0
"""Pronouns per 100 docstring words that a package may have."""


class Ratchet(NamedTuple):
    """Temporary limit of a package above LIMIT, with the reason. A change may lower ``limit``, not
    raise it.
    """

    limit: float
    reason: str


_NOT_YET = "docstrings from before the rules, to be rewritten"

RATCHETS = {
    ".": Ratchet(5.7, _NOT_YET),
    "cli": Ratchet(7.3, _NOT_YET),
    "client": Ratchet(8.1, _NOT_YET),
    "events": Ratchet(6.4, _NOT_YET),
    "host": Ratchet(5.0, _NOT_YET),
    "pmem": Ratchet(4.2, _NOT_YET),
    "pytest_plugin": Ratchet(8.0, _NOT_YET),
}
"""By package. An entry goes once the figure of its package is at most LIMIT."""

_WORD = re.compile(r"[A-Za-z']+")
_FIRST = re.compile(r"\W*([a-z]\d+(?:-[\w-]*\w)?)\b")
_DOCUMENTED = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)


class Figure(NamedTuple):
    """Pronouns and words of docstrings."""

    pronouns: int
    words: int

    @property
    def per_100(self) -> float:
        """Pronouns per 100 words, rounded to one decimal; 0 without words."""
        return round(100 * self.pronouns / max(self.words, 1), 1)


class Docstring(NamedTuple):
    """Docstring of a module, class or function. ``line``: number of the line of its definition."""

    line: int
    text: str


def docstrings(source: str) -> Iterator[Docstring]:
    """Yield the docstrings of a module. Raises SyntaxError if ``source`` is not Python."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, _DOCUMENTED) and (text := ast.get_docstring(node)):
            yield Docstring(getattr(node, "lineno", 1), text)


def measure(source: str) -> Figure:
    """Count pronouns and words in the docstrings of a module."""
    words = [word for doc in docstrings(source) for word in _WORD.findall(doc.text.lower())]
    return Figure(sum(word in PRONOUNS for word in words), len(words))


def figures(root: Path) -> dict[str, Figure]:
    """Return the figure of each package directly below ``root``; "." stands for the modules outside of
    packages.
    """
    found: dict[str, Figure] = {}
    for path in sorted(root.rglob("*.py")):
        parts = path.relative_to(root).parts
        package = parts[0] if len(parts) > 1 else "."
        pronouns, words = measure(path.read_text())
        before = found.get(package, Figure(0, 0))
        found[package] = Figure(before.pronouns + pronouns, before.words + words)
    return found


def too_many(found: Mapping[str, Figure], ratchets: Mapping[str, Ratchet]) -> Iterator[str]:
    """Yield a message for each package whose figure exceeds its limit."""
    for package, figure in found.items():
        limit = ratchets[package].limit if package in ratchets else LIMIT
        if figure.per_100 > limit:
            yield (
                f"{package}: {figure.per_100} pronouns per 100 docstring words, the limit is {limit}: "
                "name the actor and the object of each sentence"
            )


def bare_code(text: str, keys: Collection[str]) -> str | None:
    """Return the scenario code with which a docstring begins. Return None without a code, or for a whole key
    of ``keys``.
    """
    first = _FIRST.match(text)
    if first is None or first[1] in keys:
        return None
    codes = {key.partition("-")[0] for key in keys}
    return first[1] if first[1].partition("-")[0] in codes else None


def bare_codes(root: Path, keys: Collection[str]) -> Iterator[str]:
    """Yield a message for each docstring below ``root`` that begins with a bare scenario code."""
    for path in sorted(root.rglob("*.py")):
        for line, text in docstrings(path.read_text()):
            if (code := bare_code(text, keys)) is not None:
                yield (
                    f"{path}:{line}: the docstring begins with the scenario code {code}: "
                    "state the property first, and write the key whole"
                )


def report(found: Mapping[str, Figure], ratchets: Mapping[str, Ratchet]) -> Iterator[str]:
    """Yield a line for each package: figure, limit, and the reason of a ratchet."""
    for package, figure in found.items():
        line = f"{package:14} {figure.per_100:4.1f} pronouns per 100 docstring words"
        if (ratchet := ratchets.get(package)) is not None:
            passed = "; at most the limit by now: remove the entry" if figure.per_100 <= LIMIT else ""
            line += f" (ratchet {ratchet.limit}: {ratchet.reason}{passed})"
        yield line


def main() -> int:
    """Check the working tree; return the exit status."""
    top = Path(__file__).parent.parent
    keys = json.loads((top / "tests/conformance/recordings/scripts.json").read_text())
    found = figures(top / "src/daxemu")
    for line in report(found, RATCHETS):
        print(line)
    problems = [*too_many(found, RATCHETS), *bare_codes(top / "tests", keys)]
    for problem in problems:
        print(problem, file=sys.stderr)
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
