"""Sizes of a model's attention and of its keys and values. Pure Python."""

from typing import TYPE_CHECKING, NamedTuple, Self

if TYPE_CHECKING:
    from longspan.models import ModelSpec

_ITEMSIZE = {"float32": 4, "bfloat16": 2, "float16": 2, "int8": 1}
_SCALE_BYTES = {"int8": 4}


class KVShape(NamedTuple):
    """Sizes of a model's attention: layers, heads, and bytes of one number of its type.

    `row_bytes` are those of a key or a value of one head as it is kept, if not of that type.
    """

    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    itemsize: int
    row_bytes: int | None = None

    @classmethod
    def of(cls, spec: "ModelSpec") -> Self:
        kept = spec.kv_cache_dtype
        row_bytes = spec.head_dim * _ITEMSIZE[kept] + _SCALE_BYTES.get(kept, 0)
        return cls(
            spec.num_layers,
            spec.num_heads,
            spec.num_kv_heads,
            spec.head_dim,
            _ITEMSIZE[spec.dtype],
            None if kept == spec.dtype else row_bytes,
        )

    @property
    def token_bytes(self) -> int:
        """One token's keys and values in all layers."""
        return self.num_layers * self.key_bytes

    @property
    def key_bytes(self) -> int:
        """One token's key and value in one layer."""
        row = self.head_dim * self.itemsize if self.row_bytes is None else self.row_bytes
        return 2 * self.num_kv_heads * row

    @property
    def query_bytes(self) -> int:
        """One token's query out in the model's type, its `out` and `lse` back in float32."""
        return self.asked_bytes + self.answered_bytes

    @property
    def asked_bytes(self) -> int:
        """One token's query in one layer."""
        return self.num_heads * self.head_dim * self.itemsize

    @property
    def answered_bytes(self) -> int:
        """One token's state in one layer, `out` and `lse`."""
        return self.num_heads * (self.head_dim + 1) * 4
