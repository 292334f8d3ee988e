"""What every rank imports, torch and transformers' modelling code with it."""

import gc

__all__ = ["preload"]


def preload() -> None:
    """Import it, which takes seconds, and keep it apart from what is made later.

    It starts no thread but those of OpenBLAS, which end at a fork, and touches no GPU. Its objects
    stay, so the garbage collector looks at them neither now nor later: not for the time alone, but
    because forks share their pages as long as nobody writes to them.
    """
    gc.disable()
    from longspan.worker import digest, launch, measure  # noqa: F401

    gc.freeze()
    gc.enable()
