"""Full pages that are found again by what they hold: the keys of some tokens after some others."""

from array import array
from collections.abc import Iterable, Sequence
from hashlib import blake2b
from typing import NamedTuple


class Place(NamedTuple):
    """One page of one rank's pool."""

    rank: int
    page: int


class PrefixCache:
    """The places of full pages, on whatever rank they are, by the hash of all tokens up to theirs.

    A page that is computed twice is known by its first place only.
    """

    def __init__(self) -> None:
        self._places: dict[bytes, Place] = {}
        self._hashes: dict[Place, bytes] = {}

    def __contains__(self, place: Place) -> bool:
        return place in self._hashes

    def add(self, page_hash: bytes, place: Place) -> None:
        if page_hash not in self._places:
            self._places[page_hash] = place
            self._hashes[place] = page_hash

    def forget(self, place: Place) -> None:
        del self._places[self._hashes.pop(place)]

    def find(self, page_hashes: Iterable[bytes]) -> list[Place]:
        """Where the first pages of a sequence are, as many as are known without a gap."""
        found = []
        for page_hash in page_hashes:
            place = self._places.get(page_hash)
            if place is None:
                break
            found.append(place)
        return found


def chain(previous: bytes, token_ids: Sequence[int]) -> bytes:
    """The hash of a page: of its token ids and, through the one before, of all earlier ones."""
    return blake2b(previous + array("q", token_ids).tobytes(), digest_size=16).digest()
