"""Builds the C files of the project, host/supplement.c and those beside it; everything else is in pyproject.toml.

The supplement is optional: where libfuse3's headers or a compiler are missing, daxemu installs without it and
`daxemu status` says what is then missing.
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
            sources=[f"src/daxemu/host/{name}.c" for name in ("supplement", "layouts", "killpriv")],
            depends=["src/daxemu/host/supplement.h"],
            extra_compile_args=[*pkg_config("--cflags"), "-O2", "-Wall", "-Wextra"],
            extra_link_args=pkg_config("--libs"),
            optional=True,
        )
    ]
)
