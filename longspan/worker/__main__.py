"""A worker process: `python -m longspan.worker FD FOLDER`, started by the engine, one a rank.

It ends when the engine closes the socket FD or dies, whatever it is doing then, and removes the
engine's temporary FOLDER, since a killed engine can't.
"""

import os
import queue
import shutil
import sys
import threading
import traceback
from socket import socket

from longspan.errors import LongspanError
from longspan.worker.channel import Channel, Done, Execute, Failed, Message, Ready, Start


def main() -> None:
    channel = Channel(socket(fileno=int(sys.argv[1])))
    inbox: queue.SimpleQueue[Message] = queue.SimpleQueue()
    threading.Thread(target=_listen, args=(channel, inbox, sys.argv[2]), daemon=True).start()
    try:
        _serve(channel, inbox)
    except BaseException as error:
        expected = isinstance(error, LongspanError)
        details = "" if expected else traceback.format_exc()
        channel.send(Failed(type(error).__name__, str(error), details))
        threading.Event().wait()  # the engine stops all ranks together


def _listen(channel: Channel, inbox: "queue.SimpleQueue[Message]", folder: str) -> None:
    """Read messages; end the process with the engine, even in the middle of an exchange."""
    while True:
        try:
            inbox.put(channel.receive())
        except (EOFError, OSError):
            shutil.rmtree(folder, ignore_errors=True)
            os._exit(0)


def _serve(channel: Channel, inbox: "queue.SimpleQueue[Message]") -> None:
    start = inbox.get()
    assert isinstance(start, Start)
    from longspan.worker.launch import launch

    runner = launch(start)
    channel.send(Ready(runner.pool.num_pages))
    while True:
        message = inbox.get()
        assert isinstance(message, Execute)
        channel.send(Done(runner.execute(message.plan)))


if __name__ == "__main__":
    main()
