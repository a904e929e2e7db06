"""Builds the C of the project: host/supplement.c with those beside it, and host/victims_*.c.

Everything else is in pyproject.toml.

Both are optional: where libfuse3's headers or a compiler are missing, daxemu installs without them. Without
the supplement something is missing, and `daxemu status` says what; without the other nothing is but speed.
"""

import shlex
import shutil
import subprocess

from setuptools import Extension, setup


def pkg_config(flag: str) -> list[str]:
    if shutil.which("pkg-config") is None:
        return []
    done = subprocess.run(["pkg-config", flag, "fuse3"], capture_output=True, text=True)
    return shlex.split(done.stdout) if done.returncode == 0 else []


setup(
    ext_modules=[
        Extension(
            "daxemu.host._supplement",
            sources=[
                f"src/daxemu/host/{name}.c" for name in ("supplement", "answers", "layouts", "killpriv")
            ],
            depends=["src/daxemu/host/supplement.h", "src/daxemu/host/layouts.h"],
            extra_compile_args=[*pkg_config("--cflags"), "-O2", "-Wall", "-Wextra"],
            extra_link_args=pkg_config("--libs"),
            optional=True,
        ),
        Extension(
            "daxemu.host._victims",
            sources=[f"src/daxemu/host/victims_{part}.c" for part in ("collect", "deliver", "proc")],
            depends=["src/daxemu/host/victims.h"],
            extra_compile_args=["-O2", "-Wall", "-Wextra"],
            optional=True,
        ),
    ]
)
