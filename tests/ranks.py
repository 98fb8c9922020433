"""Two processes that share a model over gloo, for scripts that tests run in a process of their own."""

import gc
import os
import socket
import traceback
from collections.abc import Callable


def free_ports(number: int) -> list[str]:
    """Of this machine, different ones."""
    sockets = [socket.socket() for _ in range(number)]
    for each in sockets:
        each.bind(("127.0.0.1", 0))
    ports = [str(each.getsockname()[1]) for each in sockets]
    for each in sockets:
        each.close()
    return ports


def in_two_processes(rank: Callable[[int], None]) -> int:
    """Fork and run rank(0) and rank(1), so that what is imported is imported once; 1 where one fails, which is told."""
    children = []
    for number in (0, 1):
        child = os.fork()
        if child == 0:
            try:
                rank(number)
                gc.collect()  # temporary folders go with what has them: nothing else is done before _exit
            except BaseException:
                traceback.print_exc()
                os._exit(1)
            os._exit(0)
        children.append(child)
    statuses = [os.waitpid(child, 0)[1] for child in children]
    return int(any(statuses))
