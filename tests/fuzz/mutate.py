"""Deterministic mutations of bytes, for targets without coverage feedback."""

from __future__ import annotations

import random

INTERESTING = (
    0,
    1,
    7,
    127,
    128,
    255,
    4095,
    4096,
    0x7FFF_FFFF,
    0x8000_0000,
    0xFFFF_FFFF,
    2**63 - 1,
    2**64 - 1,
)


def mutated(rng: random.Random, data: bytes) -> bytes:
    """``data`` with one to four changes: bits, bytes, integers, pieces removed, repeated or moved."""
    out = bytearray(data)
    for _ in range(rng.randint(1, 4)):
        at = rng.randint(0, len(out))
        length = rng.choice((1, 2, 4, 8, 16, 64))
        match rng.randrange(6):
            case 0 if at < len(out):
                out[at] ^= 1 << rng.randrange(8)
            case 1:
                out[at : at + length] = rng.randbytes(length)
            case 2:
                out[at : at + 8] = rng.choice(INTERESTING).to_bytes(8, "little")
            case 3:
                del out[at : at + length]
            case 4:
                out[at:at] = out[at : at + length] * rng.randint(1, 3)
            case _:
                out[at:at] = rng.choice(
                    (b"\0", b"\n", b"[", b"]", b'"', b"=", b"-1", b"9" * 20, b"\xff", b"1e999")
                )
    return bytes(out)
