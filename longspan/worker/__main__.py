"""A worker process: `python -m longspan.worker FD FOLDER`, started by the engine, one a rank.

It ends when the engine closes the socket FD or dies, whatever it is doing then, and removes the
engine's temporary FOLDER, since a killed engine can't.
"""

import contextlib
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
    """Sleep until the engine's side is closed; then end the process, even in an exchange."""
    hang_up = select.poll()
    hang_up.register(channel, 0)  # messages don't wake it: POLLHUP is always reported
    hang_up.poll()
    shutil.rmtree(folder, ignore_errors=True)
    os._exit(0)


def _serve(channel: Channel) -> None:
    start = channel.receive()
    assert isinstance(start, Start)
    from longspan.worker.launch import launch, rates_of
    from longspan.worker.measure import measure

    runner = launch(start)
    channel.send(Ready(runner.pool.num_pages, rates_of(runner.device)))
    while True:
        message = channel.receive()
        if isinstance(message, Measure):
            channel.send(Measured(measure(runner)))
        else:
            assert isinstance(message, Execute)
            channel.send(Done(runner.execute(message.plan)))


if __name__ == "__main__":
    main()
