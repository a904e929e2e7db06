"""The table from exception to errno and exit status: complete, and equal in every release."""

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


def test_errno_and_exit_status_of_each_error_are_fixed() -> None:
    assert {name: (kind.errno, kind.exit_status) for name, kind in ERRORS.items()} == STABLE


def test_every_error_but_fs_error_can_be_sent_by_name() -> None:
    kinds = {
        kind
        for kind in vars(errors).values()
        if isinstance(kind, type) and issubclass(kind, DaxemuError) and kind is not DaxemuError
    }
    assert kinds - set(ERRORS.values()) == {FsError, NotASupervisor}


@pytest.mark.parametrize("kind", ERRORS.values(), ids=ERRORS.keys())
def test_an_error_can_be_created_again_from_its_text(kind: type[DaxemuError]) -> None:
    assert str(kind("what was wrong")) == "what was wrong"


def test_an_error_without_a_text_has_the_text_of_its_errno() -> None:
    assert str(ERRORS["NoSpace"]()) == "No space left on device"
    assert str(FsError(errno.ENOENT)) == "No such file or directory"


def test_an_fs_error_carries_any_errno() -> None:
    error = FsError(errno.EXDEV, "not here")
    assert (error.errno, error.exit_status, str(error)) == (errno.EXDEV, 1, "not here")


def test_a_media_error_has_the_poisoned_ranges() -> None:
    assert MediaError("poison", [Range(0, 512)]).ranges == (Range(0, 512),)
    assert MediaError("poison").ranges == ()
