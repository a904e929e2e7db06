"""Check of the docstrings against the project's rules of language: python -m tools.check_language

The check measures the pronouns per 100 docstring words of each package of src/daxemu, prints the figures, and
fails where a figure exceeds the limit of the package. A sentence with a pronoun for a subject names neither
actor nor object. The check also fails for a docstring of tests/ that begins with a bare scenario code: a
scenario of the kernel recordings is named by its whole key (`m5-mce-cacheline`). Third, the check fails for a
name in src/daxemu (module, class, function, parameter, variable) with a word for which docs/glossary.md has
another.

Exit status: 0 without a problem, 1 otherwise.
"""

from __future__ import annotations

import ast
import json
import re
import sys
from collections.abc import Collection, Iterator, Mapping
from itertools import pairwise
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


RATCHETS: dict[str, Ratchet] = {}
"""By package. An entry goes once the figure of its package is at most LIMIT."""

REPLACED = {
    "bad": "poisoned, or bad_block for poison that the driver knows",
    "hurt": "failed, poisoned or damaged",
    "sick": "poisoned",
    "hidden": "latent",
    "told": "signalled",
    "heal": "clear or repair",
    "mend": "clear or repair",
}
"""Words that no name may have, with the words to use. A form of a word (healed, mendable) counts, too."""

PUBLIC = {
    "told": "field of replies, events and reports: the old name of signals",
    "bad": "field of the reply of survey, and of a trial's result",
    "bad_left_off": "field of a trial's result",
    "hurt": "field of an observation of daxemu apps",
    "healed": "field of daxemu fsck --json",
    "mendable": "field of daxemu fsck --json",
    "mend": "field of daxemu doctor --json",
}
"""Names that users have. Each is allowed as a field, an attribute and a keyword, and as no other name."""

LIBRARY = frozenset({"BadParameter"})
"""Names of libraries: click.BadParameter."""

UNFINISHED: frozenset[str] = frozenset()
"""Packages that are written at this moment: not checked for REPLACED yet."""

_FORMS = re.compile(r"(bad|hurt|sick|hidden|told|heal|mend)(?:s|ed|ing|able)?")
_CAMEL = re.compile(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+")
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


def replaced_word(name: str) -> str | None:
    """Return the first word of REPLACED in a name; None without one. ``bad_block`` is a term of its own."""
    words = [word.lower() for word in _CAMEL.findall(name)]
    for word, following in pairwise([*words, ""]):
        form = _FORMS.fullmatch(word)
        if form is not None and not (word == "bad" and following in ("block", "blocks")):
            return form[1]
    return None


def _names(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """Yield (line, name) for each name of a module that a person has chosen; no public field."""
    fields = {
        id(node.target)
        for made in ast.walk(tree)
        if isinstance(made, ast.ClassDef)
        for node in made.body
        if isinstance(node, ast.AnnAssign)
    }
    for node in ast.walk(tree):
        match node:
            case ast.Name(id=name):
                if not (name in PUBLIC and id(node) in fields):
                    yield node.lineno, name
            case ast.Attribute(attr=name) | ast.keyword(arg=str(name)):
                if name not in PUBLIC:
                    yield node.lineno, name
            case ast.arg(arg=name) | ast.alias(name=name):
                yield node.lineno, name
            case ast.FunctionDef(name=name) | ast.AsyncFunctionDef(name=name) | ast.ClassDef(name=name):
                yield node.lineno, name


def replaced_words(root: Path) -> Iterator[str]:
    """Yield a message for each name below ``root`` with a word of REPLACED."""
    for path in sorted(root.rglob("*.py")):
        if str(path.parent.relative_to(root)) in UNFINISHED:
            continue
        names = [(1, path.stem), *_names(ast.parse(path.read_text()))]
        for line, name in dict.fromkeys(names):
            if name not in LIBRARY and (word := replaced_word(name)) is not None:
                yield f"{path}:{line}: {name}: not {word!r}, but {REPLACED[word]} (docs/glossary.md)"


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
    problems = [
        *too_many(found, RATCHETS),
        *bare_codes(top / "tests", keys),
        *replaced_words(top / "src/daxemu"),
    ]
    for problem in problems:
        print(problem, file=sys.stderr)
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
