#!/usr/bin/env python3
"""Poison a file's first page, and print what that did to whom.

examples/watch_a_failure.py /tmp/pmem/file
"""

import os
import sys

from daxemu.client import Client


def main(path: str) -> None:
    with Client.at(path) as control, Client.at(path) as listener:
        seen = control.request("status")["events"]
        control.request("inject", ino=os.stat(path).st_ino, ranges=[[0, 4096]])
        for event in listener.follow(after=seen):
            if event["event"] == "SignalSent":
                print(
                    f"{event['comm']} (pid {event['pid']}) was told at {event['address']:#x}: {event['result']}"
                )
            if event["event"] == "MemoryFailureHandled":
                print(
                    f"pfn {event['pfn']:#x}: {event['outcome']}, {event['files']} files, {event['told']} told"
                )
                break


if __name__ == "__main__":
    main(sys.argv[1])
