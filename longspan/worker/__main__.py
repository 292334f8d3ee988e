"""The process that forks ranks: `python -m longspan.worker FD`. See `longspan.worker.forks`.

It is started by the engine, or by another node's agent, which talks to it over the socket FD.
"""

import os
import sys
from socket import socket

from longspan.worker.preload import preload

if __name__ == "__main__":
    preload()
    from longspan.worker.forks import Forks

    Forks(socket(fileno=int(sys.argv[1]))).run()
    os._exit(0)  # an interpreter with torch takes its time to end
