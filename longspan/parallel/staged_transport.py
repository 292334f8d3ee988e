"""Messages of ranks that share a GPU, which NCCL refuses: over gloo, by the host's memory."""

from collections.abc import Sequence

import torch
from torch import Tensor

from longspan.parallel.transport import Message, TorchTransport, Wait


class StagedTransport(TorchTransport):
    """A `TorchTransport` over gloo that copies each tensor to pinned memory and from there.

    For tests on one GPU: every copy waits for the device.
    """

    def _start(self, sends: Sequence[Message], receives: Sequence[Message]) -> Wait:
        staged = [(peer, _beside(tensor).copy_(tensor)) for peer, tensor in sends]
        landed = [(peer, _beside(tensor)) for peer, tensor in receives]
        wait_for_host = super()._start(staged, landed)

        def wait() -> None:
            wait_for_host()
            for (_, tensor), (_, arrived) in zip(receives, landed, strict=True):
                tensor.copy_(arrived)

        return wait


def _beside(tensor: Tensor) -> Tensor:
    """Room for a tensor in the host's memory."""
    return torch.empty_like(tensor, device="cpu", pin_memory=tensor.is_cuda)
