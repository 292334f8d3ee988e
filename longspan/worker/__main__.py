"""A worker process: `python -m longspan.worker FD FOLDER`, one a rank.

It is started by the engine, or by another node's agent, and talks to the engine over the socket FD.
It ends when that is closed or when its starter ends, which holds its standard input, whatever it is
doing then, and removes its starter's temporary FOLDER, since a killed one can't.
"""

import contextlib
import gc
import os
import select
import shutil
import sys
import threading
import traceback
from socket import socket

from longspan.errors import LongspanError
from longspan.worker.channel import Channel, Done, Execute, Failed, Measure, Measured, Ready, Start


def main() -> None:
    channel = Channel(socket(fileno=int(sys.argv[1])))
    threading.Thread(target=_end_with_engine, args=(channel, sys.argv[2]), daemon=True).start()
    try:
        _serve(channel)
    except BaseException as error:
        expected = isinstance(error, LongspanError)
        details = "" if expected else traceback.format_exc()
        with contextlib.suppress(OSError):  # the engine may be what has gone
            channel.send(Failed(type(error).__name__, str(error), details))
        threading.Event().wait()  # the engine stops all ranks together


def _end_with_engine(channel: Channel, folder: str) -> None:
    """Sleep until the engine or the starter has gone; then end the process, even in an exchange."""
    hang_up = select.poll()
    hang_up.register(channel, select.POLLRDHUP)  # messages don't wake it
    hang_up.register(sys.stdin, 0)  # POLLHUP is always reported
    hang_up.poll()
    shutil.rmtree(folder, ignore_errors=True)
    os._exit(0)


def _serve(channel: Channel) -> None:
    start = channel.receive()
    assert isinstance(start, Start)
    gc.disable()  # what is imported stays, and the collector would go through it over and over
    from longspan.worker.digest import model_digest
    from longspan.worker.launch import launch, rates_of
    from longspan.worker.measure import measure

    gc.freeze()
    gc.enable()
    runner = launch(start)
    digest = model_digest(runner.model)
    channel.send(Ready(runner.pool.num_pages, rates_of(runner.device), digest))
    while True:
        message = channel.receive()
        if isinstance(message, Measure):
            channel.send(Measured(measure(runner)))
        else:
            assert isinstance(message, Execute)
            channel.send(Done(runner.execute(message.plan)))


if __name__ == "__main__":
    main()
