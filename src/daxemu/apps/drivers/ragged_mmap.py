"""mmap_ninja driver: a RaggedMmap of samples, each a record and padding.

Interface: daxemu.apps.programs.driven.
"""

import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from mmap_ninja import RaggedMmap

LENGTH = 500


def samples() -> Iterator[np.ndarray]:
    for number, line in enumerate(sys.stdin.buffer):
        yield np.frombuffer(line.rstrip(b"\n") + b"~" * (number % 97), np.uint8)


def main(verb: str, directory: str) -> None:
    path = Path(directory) / "samples"
    if verb == "prepare":
        RaggedMmap.from_generator(path, samples(), batch_size=256)
        return
    data = RaggedMmap(path)
    print("ready", flush=True)
    for _ in sys.stdin:
        for number in range(len(data)):
            sys.stdout.buffer.write(b"%06d %s\n" % (number, data[number].tobytes()[:LENGTH]))
        print("end", flush=True)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2])
