"""Compiles the kernels for GPUs that need not be here, and prints what each takes, a line each.

    TRITON_INTERPRET=0 python tests/attention/compile_for_gpus.py [CAPABILITY ...]

With compute capabilities (80 90 120), all head sizes and types instead of a few; takes minutes.
"""

import itertools
import json
import re
import sys
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from longspan.attention import cuda, cuda_kernels

NAMES = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}
FEW, MANY = 4, 4096
"""Rows of a key/value head."""

Case = tuple[int, torch.dtype, int, int, bool]
"""Compute capability, type, head size, rows, causal."""

CASES: list[Case] = [
    (90, torch.bfloat16, 128, MANY, True),
    (80, torch.bfloat16, 80, FEW, False),
    (80, torch.float32, 64, FEW, False),
]


def compiled(kernel: Any, capability: int, warps: int, stages: int, **given: Any) -> dict[str, Any]:
    """Compile for arguments as they are launched: aligned, and with the last stride 1."""
    signature, constants, aligned = {}, {}, {}
    for place, name in enumerate(kernel.arg_names):
        value = given.get(name, "i32")
        signature[name] = value if isinstance(value, str) else "constexpr"
        if not isinstance(value, str):
            constants[name] = value
        elif value != "fp32" and name not in ("tokens", "keys", "rows", "splits"):
            aligned[(place,)] = [["tt.divisibility", 16]]
    binary = triton.compile(
        ASTSource(kernel, signature, constants, aligned),
        target=GPUTarget("cuda", capability, 32),
        options={"num_warps": warps, "num_stages": stages},
    )
    tensor_cores = re.search(r"mma\.sync|wgmma|tcgen05\.mma", binary.asm["ptx"]) is not None
    assert len(binary.asm["cubin"]) > 0
    return {"shared_bytes": binary.metadata.shared, "tensor_cores": tensor_cores}


def attend(case: Case) -> dict[str, Any]:
    capability, dtype, head_dim, rows, causal = case
    tile = cuda.tile_of(rows, head_dim, dtype)
    inputs = dict.fromkeys(("q_ptr", "k_ptr", "v_ptr"), f"*{NAMES[dtype]}")
    outputs = dict.fromkeys(("out_ptr", "lse_ptr"), "*fp32")
    return compiled(
        cuda_kernels.attend,
        *(capability, tile.num_warps, tile.num_stages),
        **(inputs | outputs | dict.fromkeys(("q_dim", "k_dim", "v_dim"), 1)),
        scale="fp32",
        GROUP=4,
        HEAD_DIM=head_dim,
        CAUSAL=causal,
        BLOCK_ROWS=tile.rows,
        BLOCK_KEYS=tile.keys,
        BLOCK_DIM=cuda.padded(head_dim),
    )


def merge(capability: int, head_dim: int) -> dict[str, Any]:
    pointers = dict.fromkeys(("outs_ptr", "lses_ptr", "out_ptr", "lse_ptr"), "*fp32")
    sizes = {"HEAD_DIM": head_dim, "BLOCK_DIM": cuda.padded(head_dim)}
    return compiled(
        cuda_kernels.merge,
        *(capability, cuda.MERGE_WARPS, 1),
        **pointers,
        **sizes,
        BLOCK_SPLITS=cuda.MAX_SPLITS,
    )


def main() -> None:
    cases, merges = CASES, [(90, 128)]
    if capabilities := [int(capability) for capability in sys.argv[1:]]:
        sizes = (32, 64, 80, 96, 128, 256)
        cases = list(itertools.product(capabilities, NAMES, sizes, (FEW, 64, MANY), (False, True)))
        merges = list(itertools.product(capabilities, sizes))
    for case in cases:
        shown = dict(zip(("capability", "dtype", "head_dim", "rows", "causal"), case, strict=True))
        print(json.dumps({"name": "attend", **shown, **attend(case)}, default=str), flush=True)
    for capability, head_dim in merges:
        shown = {"capability": capability, "head_dim": head_dim}
        print(json.dumps({"name": "merge", **shown, **merge(capability, head_dim)}), flush=True)


if __name__ == "__main__":
    main()
