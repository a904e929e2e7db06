"""Program for the tests of apps: keeps all records in memory, and misbehaves at the second "read".

Usage: faulty.py FILE HOW
"""

from __future__ import annotations

import os
import signal
import sys


def main(file: str, how: str) -> None:
    with open(file, encoding="utf-8") as lines:
        records = lines.read().splitlines()
    print("ready", flush=True)
    for count, _ in enumerate(sys.stdin):
        if count:
            misbehave(how)
        for number, record in enumerate(records):
            if not (count and number == 3 and how in ("loses", "logs")):
                print(f"{number:06d} {record}")
        print("end", flush=True)
    if how == "stays":
        signal.pause()


def misbehave(how: str) -> None:
    if how == "hangs":
        signal.pause()
    if how == "dies":
        os.kill(os.getpid(), signal.SIGSEGV)
    if how == "logs":
        print("log: checksum mismatch, record dropped", file=sys.stderr)
    if how == "complains":
        print("error: input/output error")


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2])
