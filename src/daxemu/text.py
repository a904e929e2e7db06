"""Untrusted text, made safe for terminals, HTML and JSON. Standard library only.

A file name is bytes that another user chose. In JSON, a name is its UTF-8 text with each backslash doubled
and each byte that is not UTF-8 written as ``\\xHH``. The text is unambiguous; ``name_bytes`` is the inverse.
On a terminal, each character that could control the terminal, or forge a line, is shown as an escape.
"""

from __future__ import annotations

import os
import re
import unicodedata
from html import escape

_SHORT = {"\n": "\\n", "\r": "\\r", "\t": "\\t"}
_BIDI = frozenset("\u061c\u200e\u200f\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069")
_ESCAPED = frozenset({"Cc", "Cs", "Zl", "Zp"})
_NAME_ESCAPE = re.compile(rb"\\(?:\\|x([0-9a-f]{2}))")


def for_people(text: str) -> str:
    """Escape text to one line for a terminal. Control characters (C0, C1, DEL), line and paragraph
    separators, bidirectional marks and lone surrogates become escapes such as ``\\x1b``; all other characters
    stay.
    """
    if text.isascii() and text.isprintable():
        return text
    return "".join(map(_shown, text))


def lines_for_people(text: str) -> list[str]:
    """Split a text of several lines, such as a traceback, and escape each line as for_people does."""
    return [for_people(line) for line in text.rstrip("\n").split("\n")]


def for_html(text: str) -> str:
    """Escape untrusted text for HTML: each line as for_people does, and each character with a meaning in
    HTML.
    """
    return escape("\n".join(lines_for_people(text)))


def _shown(char: str) -> str:
    if char not in _BIDI and unicodedata.category(char) not in _ESCAPED:
        return char
    number = ord(char)
    if 0xDC80 <= number <= 0xDCFF:  # surrogateescape: a byte that is not UTF-8
        return f"\\x{number - 0xDC00:02x}"
    return _SHORT.get(char, f"\\x{number:02x}" if number < 0x80 else f"\\u{number:04x}")


def name_text(name: str | bytes | os.PathLike[str]) -> str:
    """Encode a file name or path for JSON and events: backslashes doubled, bytes that are not UTF-8 as
    ``\\xHH``.
    """
    return os.fsencode(name).replace(b"\\", b"\\\\").decode(errors="backslashreplace")


def name_bytes(text: str) -> bytes:
    """Decode a name from ``text``: the inverse of :func:`name_text`."""
    return _NAME_ESCAPE.sub(
        lambda found: bytes.fromhex(found[1].decode()) if found[1] else b"\\", text.encode()
    )
