"""Builds the C of the project: host/fuse/supplement.c with those beside it, host/victims/*.c,
host/run/*.c and host/direct/*.c.

Everything else is in pyproject.toml.

All are optional: where libfuse3's headers or a compiler are missing, daxemu installs without them. Without
the supplement something is missing, and `daxemu status` says what; without host/victims nothing is but speed;
without host/run or host/direct `daxemu run` gives no direct mappings.
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
            "daxemu.host.fuse._supplement",
            sources=[
                f"src/daxemu/host/fuse/{name}.c" for name in ("supplement", "answers", "layouts", "killpriv")
            ],
            depends=["src/daxemu/host/fuse/supplement.h", "src/daxemu/host/fuse/layouts.h"],
            extra_compile_args=[*pkg_config("--cflags"), "-O2", "-Wall", "-Wextra"],
            extra_link_args=pkg_config("--libs"),
            optional=True,
        ),
        Extension(
            "daxemu.host.direct._agent",
            sources=["src/daxemu/host/direct/agent.c", "src/daxemu/host/direct/redirect.c"],
            depends=["src/daxemu/host/direct/redirect.h"],
            extra_compile_args=["-O2", "-Wall", "-Wextra"],
            optional=True,
        ),
        Extension(
            "daxemu.host.victims._victims",
            sources=[f"src/daxemu/host/victims/{part}.c" for part in ("collect", "deliver", "proc")],
            depends=["src/daxemu/host/victims/victims.h"],
            extra_compile_args=["-O2", "-Wall", "-Wextra"],
            optional=True,
        ),
        Extension(
            "daxemu.host.run._forward",
            sources=["src/daxemu/host/run/forward.c", "src/daxemu/host/run/threads.c"],
            depends=["src/daxemu/host/run/threads.h"],
            extra_compile_args=["-O2", "-Wall", "-Wextra"],
            optional=True,
        ),
    ]
)
