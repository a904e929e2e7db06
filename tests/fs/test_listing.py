"""The order of listings: cookies of names, while a directory changes."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from daxemu.fs import listing as listing_module
from daxemu.fs.listing import DOT_DOT, MAX_LISTINGS, Listing, Listings, cookie_of

NAMES = st.binary(min_size=1, max_size=3)


def complete(names: list[bytes]) -> Listing:
    listing = Listing(names)
    assert listing.build(len(names) + 1, lambda name: True)
    return listing


def listed(listing: Listing, cookie: int = DOT_DOT) -> list[bytes]:
    return [name for _, name in listing.after(cookie)]


@given(st.sets(NAMES), st.lists(st.tuples(st.booleans(), NAMES)), st.integers(1, 5))
def test_changes_while_it_is_built(names: set[bytes], changes: list[tuple[bool, bytes]], step: int) -> None:
    """Each name that is there in the end is listed once."""
    listing = Listing(names)
    for is_new, name in changes:
        listing.build(step, names.__contains__)
        (names.add if is_new else names.discard)(name)
        (listing.add if is_new else listing.remove)(name)
    while not listing.build(step, names.__contains__):
        pass
    assert sorted(listed(listing)) == sorted(names)


@given(st.sets(NAMES, min_size=2), st.data())
def test_a_page_begins_behind_any_cookie(names: set[bytes], data: st.DataObject) -> None:
    """Also behind that of a name that is gone."""
    listing = complete(list(names))
    order = listed(listing)
    place = data.draw(st.integers(0, len(order) - 1))
    cookie = list(listing.after(DOT_DOT))[place][0]
    listing.remove(order[place])
    assert listed(listing, cookie) == order[place + 1 :]


def test_cookies_fit_a_file_position() -> None:
    assert all(DOT_DOT < cookie_of(b"%d" % i) < (1 << 63) - 1 for i in range(1000))


def test_names_with_one_hash(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(listing_module, "cookie_of", lambda name: 64)
    names = [b"a", b"b", b"c"]
    listing = complete(names)
    assert listed(listing) == names
    listing.remove(b"a")
    listing.add(b"c")
    listing.add(b"d")
    assert sorted(listed(listing)) == [b"b", b"c", b"d"]
    assert sorted(listed(listing, 64)) == [b"b", b"c"]
    for name in (b"b", b"c", b"d"):
        listing.remove(name)
    assert listed(listing) == []


def test_no_more_than_so_many_are_kept() -> None:
    """What is being built stays: its builder goes on with it."""
    listings = Listings()
    first = listings.of(0, [b"a"])
    for ino in range(1, MAX_LISTINGS + 5):
        listings.of(ino, []).build(1, lambda name: True)
    assert listings.of(0, []) is first
    first.build(2, lambda name: True)
    assert listed(first) == [b"a"]
    for ino in range(MAX_LISTINGS + 5, 2 * MAX_LISTINGS + 5):
        listings.of(ino, []).build(1, lambda name: True)
    assert listings.of(0, []) is not first
