"""Structs that C and Python share: a library of other sources is refused."""

from __future__ import annotations

import ctypes
import struct

import pytest

from daxemu.host import victims
from daxemu.host.c_layout import layout_of, refusal
from daxemu.host.fuse import structs as fuse_structs
from daxemu.host.fuse import supplement
from daxemu.host.victims import structs


def test_sizes_and_offsets() -> None:
    assert layout_of(struct.Struct("=2IQ")) == [16, 0, 4, 8]
    assert layout_of(struct.Struct("@IP")) == [16, 0, 8]
    assert layout_of(struct.Struct("@2IPI4x")) == [24, 0, 4, 8, 16]
    assert layout_of(struct.Struct("=i64sQ")) == [76, 0, 4, 68]
    assert layout_of(fuse_structs.RawNote) == [24, 0, 8, 16]


@pytest.mark.skipif(victims.MISSING is not None, reason="host/victims/*.c were not built")
@pytest.mark.parametrize(
    "other",
    [
        (*structs.SHARED, struct.Struct("=I")),
        structs.SHARED[:-1],
        (struct.Struct("=2Q2I"), *structs.SHARED[1:]),
        (struct.Struct("=Q2I"), *structs.SHARED[1:]),
    ],
    ids=["one more", "one less", "another field", "another size"],
)
def test_a_library_whose_structs_differ_is_refused(other: tuple[struct.Struct, ...]) -> None:
    library = victims.library()
    assert refusal(library, "daxemu_victims_layout", *structs.SHARED) is None
    found = refusal(library, "daxemu_victims_layout", *other)
    assert found is not None
    assert "rebuild it with" in found


@pytest.mark.skipif(supplement.MISSING is not None, reason="supplement.c was not built")
def test_a_supplement_whose_structs_differ_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    class Longer(ctypes.Structure):
        _fields_ = (*fuse_structs.RawRequest._fields_, ("more", ctypes.c_uint64))

    loaded = supplement.library()
    monkeypatch.setattr(supplement, "_library", loaded)
    assert supplement.load() is None
    monkeypatch.setattr(fuse_structs, "REQUEST_LAYOUT", (Longer,))
    assert "rebuild it with" in (supplement.load() or "")


def test_a_library_without_the_symbol_is_of_other_sources() -> None:
    with pytest.raises(ValueError, match="no_such_symbol"):
        refusal(ctypes.CDLL(None), "no_such_symbol", structs.WAIT)
