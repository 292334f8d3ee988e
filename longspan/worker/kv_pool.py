"""One rank's pool of KV pages: keys and values of many requests in one tensor."""

from collections.abc import Sequence

import torch
from torch import Tensor

from longspan.attention.kv_format import encode, row_length
from longspan.plan import Extent
from longspan.worker import huge_pages
from longspan.worker.scatter import scatter


class KVPool:
    """`data` [L, 2, G, slots, D], a slot being one token's place: page p has slots p*P .. p*P+P-1.

    A head's keys in a run of pages lie side by side, which is what attention reads fastest. They
    are rows of a `kv_format`: in int8 D is 4 more than the head size.
    """

    def __init__(
        self,
        num_layers: int,
        num_pages: int,
        page_size: int,
        num_kv_heads: int,
        head_dim: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        self.num_pages = num_pages
        self.page_size = page_size
        shape = (num_layers, 2, num_kv_heads, num_pages * page_size, row_length(head_dim, dtype))
        self.data = (
            huge_pages.zeros(shape, dtype)
            if device.type == "cpu"
            else torch.empty(shape, dtype=dtype, device=device)
        )
        self._planes = [layer.unbind() for layer in self.data]

    def take_memory(self) -> None:
        """Take all of the pool's memory now, not at the first use of each part of it."""
        self.data.zero_()

    def slots(self, extents: Sequence[Extent], first: int, last: int) -> Tensor:
        """The slots [last - first] of tokens first .. last - 1 of a request's share."""
        ranges = self.ranges(extents, first, last)
        return torch.cat([torch.arange(r.start, r.stop) for r in ranges]).to(self.data.device)

    def write(self, layer: int, slots: Tensor, k: Tensor, v: Tensor) -> None:
        """Put k, v [T, G, D] into slots [T] of one layer."""
        for pool, tensor in zip(self._planes[layer], (k, v), strict=True):
            scatter(pool, slots, encode(tensor, pool.dtype))

    def ranges(self, extents: Sequence[Extent], first: int, last: int) -> list[slice]:
        """Where tokens first .. last - 1 of a request's share lie, as ranges of slots."""
        ranges = []
        for extent in extents:
            start, length = extent.start * self.page_size, extent.length * self.page_size
            if first < length and last > 0:
                ranges.append(slice(start + max(first, 0), start + min(last, length)))
            first, last = first - length, last - length
        return ranges

    def read_pages(self, extents: Sequence[Extent]) -> Tensor:
        """A contiguous copy of whole pages in all layers, in order: [L, 2, G, S, D]."""
        return torch.cat([self.data[:, :, :, place] for place in self._whole(extents)], dim=3)

    def empty_pages(self, extents: Sequence[Extent]) -> Tensor:
        """Room for what `read_pages` gives for as many pages, [L, 2, G, S, D]."""
        num_layers, two, num_kv_heads, _, head_dim = self.data.shape
        tokens = sum(extent.length for extent in extents) * self.page_size
        return self.data.new_empty((num_layers, two, num_kv_heads, tokens, head_dim))

    def write_pages(self, extents: Sequence[Extent], pages: Tensor) -> None:
        """Put `pages` [L, 2, G, S, D] into whole pages, in all layers."""
        places = self._whole(extents)
        lengths = [place.stop - place.start for place in places]
        for place, part in zip(places, pages.split(lengths, dim=3), strict=True):
            self.data[:, :, :, place] = part

    def _whole(self, extents: Sequence[Extent]) -> list[slice]:
        return [slice(e.start * self.page_size, e.end * self.page_size) for e in extents]
