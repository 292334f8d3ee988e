"""A worker process: `python -m longspan.worker FD FOLDER`, one a rank.

It is started by the engine, or by another node's agent, and talks to the engine over the socket FD.
Its starter holds its standard input and has a temporary FOLDER.
"""

import sys
from socket import socket

from longspan.worker.channel import Channel
from longspan.worker.rank import serve

if __name__ == "__main__":
    serve(Channel(socket(fileno=int(sys.argv[1]))), lifeline=sys.stdin, folder=sys.argv[2])
