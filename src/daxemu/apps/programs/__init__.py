"""Programs of the matrix: one module each, or one module for programs driven alike."""

from __future__ import annotations

from daxemu.apps.application import Application
from daxemu.apps.programs.driven import (
    DuckDb,
    LibPmem,
    LibPmemObj,
    Lmdb,
    NumpyMemmap,
    RaggedTraining,
    RocksDb,
    RocksDbMmap,
)
from daxemu.apps.programs.etcd import Etcd
from daxemu.apps.programs.fio import Fio
from daxemu.apps.programs.git import Git
from daxemu.apps.programs.postgresql import PostgreSql, PostgreSqlChecksums
from daxemu.apps.programs.qemu import Qemu
from daxemu.apps.programs.redis import RedisAof, RedisRdb
from daxemu.apps.programs.sqlite import SqliteMmap, SqliteRollback, SqliteWal
from daxemu.errors import InvalidArgument

APPLICATIONS: tuple[type[Application], ...] = (
    SqliteRollback,
    SqliteWal,
    SqliteMmap,
    PostgreSql,
    PostgreSqlChecksums,
    DuckDb,
    RedisAof,
    RedisRdb,
    RocksDb,
    RocksDbMmap,
    Lmdb,
    Etcd,
    Git,
    NumpyMemmap,
    RaggedTraining,
    LibPmem,
    LibPmemObj,
    Fio,
    Qemu,
)
"""All programs, in the order of the matrix."""


def application_called(name: str) -> type[Application]:
    """Return the program named ``name``. Raises InvalidArgument."""
    for each in APPLICATIONS:
        if each.name == name:
            return each
    known = ", ".join(each.name for each in APPLICATIONS)
    raise InvalidArgument(f"no program {name!r}: known programs are {known}")
