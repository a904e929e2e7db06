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
def test_changes_during_a_build_are_listed(
    names: set[bytes], changes: list[tuple[bool, bytes]], step: int
) -> None:
    """Each name present at the end is listed once."""
    listing = Listing(names)
    for is_new, name in changes:
        listing.build(step, names.__contains__)
        (names.add if is_new else names.discard)(name)
        (listing.add if is_new else listing.remove)(name)
    while not listing.build(step, names.__contains__):
        pass
    assert sorted(listed(listing)) == sorted(names)


@given(st.sets(NAMES, min_size=2), st.data())
def test_a_listing_continues_after_any_cookie(names: set[bytes], data: st.DataObject) -> None:
    """The cookie of a removed name works, too."""
    listing = complete(list(names))
    order = listed(listing)
    place = data.draw(st.integers(0, len(order) - 1))
    cookie = list(listing.after(DOT_DOT))[place][0]
    listing.remove(order[place])
    assert listed(listing, cookie) == order[place + 1 :]


def test_cookies_fit_a_file_position() -> None:
    assert all(DOT_DOT < cookie_of(b"%d" % i) < (1 << 63) - 1 for i in range(1000))


def test_names_with_the_same_hash_have_different_cookies(monkeypatch: pytest.MonkeyPatch) -> None:
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


def test_at_most_max_listings_complete_listings_are_kept() -> None:
    """An incomplete listing stays, because the reader continues with it."""
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
