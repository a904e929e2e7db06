"""Check of an error for the words of libraries."""

from __future__ import annotations

import re

_LIBRARY = re.compile(
    r"invalid literal|could not convert|Expecting |Extra data|codec can't|recursion depth|Traceback|malformed"
    r"|Expected `|Object (?:contains|missing)|Invalid (?:enum value|statement|value \()|\$[.\[`]|column \d"
    r"|not a valid (?:int|float)|NoneType|<class|object has no attribute"
)


def library_words(text: str) -> str | None:
    """Return the first words of a library (int(), json, tomllib, msgspec, click) in an error; None without
    any.
    """
    found = _LIBRARY.search(text)
    return found[0] if found else None
