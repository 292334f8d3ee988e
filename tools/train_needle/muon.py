"""Muon (Jordan et al., 2024, kellerjordan.github.io/posts/muon) in float32.

PyTorch's own works in bfloat16, which CPUs without instructions for it compute 25 times slower.
"""

from collections.abc import Iterable

import torch
import torch.distributed as dist
from torch import Tensor, nn

COEFFICIENTS = (3.4445, -4.7750, 2.0315)
ROUNDS = 5


def orthogonal(gradient: Tensor) -> Tensor:
    """A matrix with the same directions, whose singular values are about 1."""
    a, b, c = COEFFICIENTS
    x = gradient / (gradient.norm() + 1e-7)
    wide = x if x.shape[0] <= x.shape[1] else x.T
    for _ in range(ROUNDS):
        square = wide @ wide.T
        wide = a * wide + (b * square + c * square @ square) @ wide
    return wide if x.shape[0] <= x.shape[1] else wide.T


class Muon(torch.optim.Optimizer):
    """Momentum, made orthogonal; steps have the root mean square that those of AdamW have.

    Every process makes some of the matrices orthogonal, and all get them.
    """

    def __init__(
        self,
        matrices: Iterable[nn.Parameter],
        lr: float,
        process: int,
        processes: int,
        momentum: float = 0.95,
    ) -> None:
        super().__init__(matrices, {"lr": lr, "momentum": momentum})
        self._process, self._processes = process, processes

    @torch.no_grad()
    def step(self) -> None:  # type: ignore[override]
        [group] = self.param_groups
        updates = []
        for index, matrix in enumerate(group["params"]):
            kept = self.state[matrix].setdefault("momentum", torch.zeros_like(matrix))
            kept.lerp_(matrix.grad, 1 - group["momentum"])
            if index % self._processes == self._process:
                updates.append(orthogonal(matrix.grad.lerp(kept, group["momentum"])))
            else:
                updates.append(torch.zeros_like(matrix))
        every = torch.cat([update.flatten() for update in updates])
        dist.all_reduce(every)
        sizes = [update.numel() for update in updates]
        for matrix, update in zip(group["params"], every.split(sizes), strict=True):
            scale = 0.2 * max(matrix.shape) ** 0.5
            matrix.add_(update.view_as(matrix), alpha=-scale * group["lr"])
