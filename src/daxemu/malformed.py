"""Malformed input, in the words of daxemu. The messages of msgspec, tomllib and json reach no user.

Each function returns the words for what was found and what was expected. The caller adds the place and the
action.
"""

from __future__ import annotations

import re
import tomllib
from typing import NamedTuple

import msgspec

_KINDS = {
    "int": "a whole number",
    "float": "a number",
    "str": "text",
    "bytes": "text",
    "bool": "true or false",
    "array": "a list",
    "object": "keys with values",
    "null": "nothing",
    "datetime": "a date",
    "date": "a date",
    "time": "a time",
}
_GOT = re.compile(r"Expected `([^`]+)`, got `([^`]+)`")
_LIMIT = re.compile(r"Expected `([^`]+)`(.*)")
_UNKNOWN = re.compile(r"Object contains unknown field `([^`]*)`")
_MISSING = re.compile(r"Object missing required field `([^`]+)`")
_CHOICE = re.compile(r"Invalid (?:enum )?value (.+)", re.DOTALL)
_RANGE = re.compile(r"(?:Integer|Number) (?:value )?out of range")
_TOML_LINE = re.compile(r"\(at line (\d+), column \d+\)")

NOT_TOML = "not TOML: expected KEY = VALUE, or [TABLE]"
NOT_JSON = "not JSON: expected one object in braces"
TOO_DEEP = "nested too deeply"
NOT_UTF8 = "not UTF-8 text"


class Explained(NamedTuple):
    """Reason for a refusal. ``path``: keys and indexes that lead to the wrong value."""

    path: list[str | int]
    reason: str


def explain(error: Exception) -> Explained:
    """Return place and reason of an error of msgspec.

    The text of an error that a hook of daxemu raised stays as written.
    """
    if not isinstance(error, msgspec.ValidationError):
        return Explained([], why_not_text(error, NOT_JSON))
    what, _, place = str(error).partition(" - at `")
    path: list[str | int] = [
        int(index) if index else key for key, index in re.findall(r"([A-Za-z_]\w*)|\[(\d+)\]", place)
    ]
    if (found := _UNKNOWN.match(what)) is not None:
        return Explained([*path, found[1]], f"unknown key {found[1]!r}")
    if (found := _MISSING.match(what)) is not None:
        return Explained(path, f"{found[1]!r} is missing")
    if (found := _GOT.match(what)) is not None:
        return Explained(path, f"expected {_kind(found[1])}, found {_kind(found[2])}")
    if (found := _LIMIT.match(what)) is not None:
        return Explained(path, f"expected {_kind(found[1])}{found[2].replace('`', '')}")
    if (found := _CHOICE.match(what)) is not None:
        return Explained(path, f"{found[1]} is none of the possible values")
    if _RANGE.match(what) is not None:
        return Explained(path, "the number is too large")
    return Explained(path, what)


def why_not_text(error: Exception, otherwise: str) -> str:
    """Return the reason why a parser refused a text as a whole; ``otherwise`` for a wrong character."""
    if isinstance(error, UnicodeError):
        return NOT_UTF8
    return TOO_DEEP if isinstance(error, RecursionError) else otherwise


def toml_line(error: tomllib.TOMLDecodeError, text: str) -> int:
    """Return the number of the line at which ``text`` stops to be TOML."""
    found = _TOML_LINE.search(str(error))
    return int(found[1]) if found else text.count("\n") + 1


def dotted(path: list[str | int]) -> str:
    """Return a path for people: ``faults[0].process``; empty for the whole."""
    return "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in path).removeprefix(".")


def _kind(names: str) -> str:
    return " or ".join(dict.fromkeys(_KINDS.get(name, name) for name in names.split(" | ")))
