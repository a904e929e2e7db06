"""The table of exception, errno and exit status: complete, and the same in every release."""

from __future__ import annotations

import errno

import pytest

from daxemu import errors
from daxemu.errors import ERRORS, DaxemuError, FsError, MediaError, NotASupervisor
from daxemu.ranges import Range

STABLE = {
    "InvalidArgument": (errno.EINVAL, 2),
    "NotADevice": (errno.ENODEV, 3),
    "NotMounted": (errno.ENOTTY, 3),
    "Busy": (errno.EBUSY, 4),
    "PermissionDenied": (errno.EPERM, 5),
    "NoSpace": (errno.ENOSPC, 6),
    "MediaError": (errno.EIO, 7),
    "PartialOverPoison": (errno.EFAULT, 7),
    "Shutdown": (errno.EIO, 7),
    "NoDevice": (errno.ENXIO, 7),
    "Unsupported": (errno.EOPNOTSUPP, 8),
    "CorruptMetadata": (errno.EUCLEAN, 9),
}
"""Scripts depend on these: a number here never changes, a new error gets a line."""


def test_the_table_is_what_scripts_depend_on() -> None:
    assert {name: (kind.errno, kind.exit_status) for name, kind in ERRORS.items()} == STABLE


def test_every_error_can_travel_but_the_one_that_carries_any_errno() -> None:
    kinds = {
        kind
        for kind in vars(errors).values()
        if isinstance(kind, type) and issubclass(kind, DaxemuError) and kind is not DaxemuError
    }
    assert kinds - set(ERRORS.values()) == {FsError, NotASupervisor}


@pytest.mark.parametrize("kind", ERRORS.values(), ids=ERRORS.keys())
def test_an_error_is_made_again_from_its_text(kind: type[DaxemuError]) -> None:
    assert str(kind("what was wrong")) == "what was wrong"


def test_an_error_without_a_text_says_its_errno() -> None:
    assert str(ERRORS["NoSpace"]()) == "No space left on device"
    assert str(FsError(errno.ENOENT)) == "No such file or directory"


def test_an_fs_error_carries_any_errno() -> None:
    error = FsError(errno.EXDEV, "not here")
    assert (error.errno, error.exit_status, str(error)) == (errno.EXDEV, 1, "not here")


def test_a_media_error_says_where() -> None:
    assert MediaError("poison", [Range(0, 512)]).ranges == (Range(0, 512),)
    assert MediaError("poison").ranges == ()
