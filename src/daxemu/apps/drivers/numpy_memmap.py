"""numpy driver: records in a numpy.memmap. Interface: daxemu.apps.programs.driven."""

import sys
from pathlib import Path

import numpy as np

WIDTH = 512
COUNT = 2400


def main(verb: str, directory: str) -> None:
    path = Path(directory) / "records.dat"
    if verb == "prepare":
        rows = np.memmap(path, np.uint8, "w+", shape=(COUNT, WIDTH))
        for number, line in enumerate(sys.stdin.buffer):
            body = line.rstrip(b"\n")
            rows[number, : len(body)] = np.frombuffer(body, np.uint8)
        rows.flush()
        return
    rows = np.memmap(path, np.uint8, "r", shape=(COUNT, WIDTH))
    print("ready", flush=True)
    for _ in sys.stdin:
        for number in range(COUNT):
            sys.stdout.buffer.write(b"%06d %s\n" % (number, rows[number].tobytes().rstrip(b"\0")))
        print("end", flush=True)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2])
