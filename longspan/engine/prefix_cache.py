"""Full pages that are found again by what they hold: the keys of some tokens after some others."""

from array import array
from collections.abc import Iterable, Mapping, Sequence
from hashlib import blake2b
from typing import NamedTuple


class Place(NamedTuple):
    """One page of one rank's pool."""

    rank: int
    page: int


Hit = Mapping[int, int]
"""One page of a sequence that has been found: the page's number on each rank that has it."""


class PrefixCache:
    """The places of full pages, on whatever ranks they are, by the hash of all tokens up to theirs.

    A page that is computed on several ranks is known on each of them, so that requests that begin
    alike can run on any; computed twice on one rank, it is known there by its first place only.
    """

    def __init__(self) -> None:
        self._places: dict[bytes, dict[int, int]] = {}
        self._hashes: dict[Place, bytes] = {}

    def __contains__(self, place: Place) -> bool:
        return place in self._hashes

    def add(self, page_hash: bytes, place: Place) -> None:
        places = self._places.setdefault(page_hash, {})
        if place.rank not in places:
            places[place.rank] = place.page
            self._hashes[place] = page_hash

    def forget(self, place: Place) -> bytes:
        """Drop a page that is known; returns its hash."""
        page_hash = self._hashes.pop(place)
        places = self._places[page_hash]
        del places[place.rank]
        if not places:
            del self._places[page_hash]
        return page_hash

    def find(self, page_hashes: Iterable[bytes]) -> list[Hit]:
        """Where the first pages of a sequence are, as many as are known without a gap."""
        found: list[Hit] = []
        for page_hash in page_hashes:
            places = self._places.get(page_hash)
            if places is None:
                break
            found.append(places)
        return found


def chain(previous: bytes, token_ids: Sequence[int]) -> bytes:
    """The hash of a page: of its token ids and, through the one before, of all earlier ones."""
    return blake2b(previous + array("q", token_ids).tobytes(), digest_size=16).digest()
