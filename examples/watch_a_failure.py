#!/usr/bin/env python3
"""Poison the first page of a file and print each event of the failure.

examples/watch_a_failure.py /tmp/pmem/file
"""

import sys
from pathlib import Path

from daxemu.client import Client


def main(path: str) -> None:
    with Client.at(path) as control, Client.at(path) as listener:
        seen = control.request("status")["events"]
        control.request("inject", ino=Path(path).stat().st_ino, ranges=[[0, 4096]])
        control.settle()
        last = control.request("status")["events"]
        for event in listener.follow(after=seen):
            if event["event"] == "SignalSent":
                print("{comm} (pid {pid}) was signalled at {address:#x}: {result}".format_map(event))
            if event["event"] == "MemoryFailureHandled":
                print("pfn {pfn:#x}: {outcome}, {files} files, {processes} processes".format_map(event))
            if event["seq"] >= last:
                break


if __name__ == "__main__":
    main(sys.argv[1])
