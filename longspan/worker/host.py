"""A host of ranks, as the engine sees it."""

from collections.abc import Collection
from typing import Protocol

from longspan.errors import LongspanError

__all__ = ["Host"]


class Host(Protocol):
    """Who has started some ranks, and knows how they end."""

    @property
    def ranks(self) -> Collection[int]: ...

    def place(self, rank: int) -> str:
        """What follows the number of one of its ranks in errors, such as " on node 1 (name)"."""
        ...

    def lost(self) -> LongspanError | None:
        """How one of its ranks ended, or it did, if that has happened."""
        ...

    def stop(self) -> None:
        """End its ranks, whose channels have been closed before."""
        ...
