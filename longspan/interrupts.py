"""When Ctrl-C takes effect."""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager

__all__ = ["interrupts_afterwards"]


@contextmanager
def interrupts_afterwards() -> Iterator[None]:
    """Let Ctrl-C in a block wait for its end; a second Ctrl-C does not wait.

    Does nothing where Ctrl-C would not raise KeyboardInterrupt in the block: outside the main
    thread, and in programs that have a handler of their own.
    """
    usual = signal.default_int_handler
    in_main_thread = threading.current_thread() is threading.main_thread()
    if not in_main_thread or signal.getsignal(signal.SIGINT) is not usual:
        yield
        return
    interrupted = False

    def wait(*_: object) -> None:
        nonlocal interrupted
        interrupted = True
        signal.signal(signal.SIGINT, usual)

    signal.signal(signal.SIGINT, wait)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, usual)
    if interrupted:
        raise KeyboardInterrupt
