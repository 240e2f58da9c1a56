"""Host functions that another process can import."""

import os
import signal
import sys
import time

import numpy as np


def squares(data, logprobs):
    """Σ lp², its gradient, and the process that computed it."""
    value = float(sum(np.sum(np.square(lp)) for lp in logprobs))
    return value, {"pid": os.getpid()}, [2 * lp for lp in logprobs]


def count(data):
    """The number of datums."""
    return float(len(data))


def raises(data):
    """Fail."""
    raise ValueError("no such fact")


def exits(data):
    """End the process's Python."""
    sys.exit("enough")


def dies(data):
    """End the process as the kernel does when memory is short."""
    os.kill(os.getpid(), signal.SIGKILL)


def sleeps(data):
    """Never return."""
    time.sleep(1e6)


def unpicklable(data):
    """Return what no pipe can carry."""
    return lambda: None


def grinds(data, loops):
    """Keep one core busy with Python's own arithmetic."""
    total = 0
    for i in range(loops):
        total = (total * 31 + i) % 1_000_003
    return float(total)
