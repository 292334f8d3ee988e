"""A rank in a process of its own: does what the engine says, and ends when the engine does."""

import contextlib
import os
import select
import shutil
import threading
import traceback
from typing import IO, Any

from longspan.errors import LongspanError
from longspan.worker.channel import Channel, Done, Execute, Failed, Measure, Measured, Ready, Start
from longspan.worker.heap import settle_heap
from longspan.worker.preload import preload

__all__ = ["serve"]


def serve(channel: Channel, lifeline: IO[Any] | None = None, folder: str | None = None) -> None:
    """Be the rank that the engine says at the other end of `channel`. Does not return.

    When the channel closes, or the `lifeline` hangs up that the starter of this process holds, the
    process ends, whatever it is doing then. It removes the starter's temporary `folder`, since a
    killed one can't.
    """
    watched = (channel, lifeline, folder)
    threading.Thread(target=_end_with_engine, args=watched, daemon=True).start()
    try:
        _obey(channel)
    except BaseException as error:
        expected = isinstance(error, LongspanError)
        details = "" if expected else traceback.format_exc()
        with contextlib.suppress(OSError):  # the engine may be what has gone
            channel.send(Failed(type(error).__name__, str(error), details))
        threading.Event().wait()  # the engine stops all ranks together


def _end_with_engine(channel: Channel, lifeline: IO[Any] | None, folder: str | None) -> None:
    """Sleep until the engine or the starter has gone; then end the process, even in an exchange."""
    hang_up = select.poll()
    hang_up.register(channel, select.POLLRDHUP)  # messages don't wake it
    if lifeline is not None:
        hang_up.register(lifeline, 0)  # POLLHUP is always reported
    hang_up.poll()
    if folder is not None:
        shutil.rmtree(folder, ignore_errors=True)
    os._exit(0)


def _obey(channel: Channel) -> None:
    start = channel.receive()
    assert isinstance(start, Start)
    preload()
    settle_heap()
    from longspan.worker.digest import model_digest
    from longspan.worker.launch import launch, rates_of
    from longspan.worker.measure import measure, measure_links

    runner = launch(start)
    digest = model_digest(runner.model)
    messages = measure_links(runner) if start.config.calibration is None else ()
    rates, transport = rates_of(runner.device, runner.dtype), runner.transport.name
    joins = runner.meeting is not None
    channel.send(Ready(runner.pool.num_pages, rates, messages, digest, transport, joins))
    while True:
        message = channel.receive()
        if isinstance(message, Measure):
            channel.send(Measured(measure(runner)))
        else:
            assert isinstance(message, Execute)
            channel.send(Done(runner.execute(message.plan)))
