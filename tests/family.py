"""Who is whose child: a program that serves has one that forks its ranks."""

import psutil


def ranks_of(pid: int) -> list[int]:
    """The processes of the ranks that a program has started, in order."""
    forkers = psutil.Process(pid).children()
    return [rank.pid for forker in forkers for rank in forker.children()]
