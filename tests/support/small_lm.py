"""The main job with a small model, which may be killed: ``small_lm.py STEPS SECONDS arguments ...``.

It is killed so many seconds after it has logged so many steps; of 0 steps, not at all.
"""

import os
import signal
import sys
import threading


def killed_after(steps, seconds, log):
    """The function that logs a step, which kills this process a while after the n-th call."""
    calls = []

    def counting(*given, **named):
        log(*given, **named)
        calls.append(1)
        if len(calls) == steps:
            threading.Timer(seconds, os.kill, (os.getpid(), signal.SIGKILL)).start()

    return counting


if __name__ == "__main__":
    import jax
    import train_lm

    import jaxreg as jr

    train_lm.WIDTH, train_lm.HEADS, train_lm.LAYERS, train_lm.LENGTH, train_lm.BATCH = 16, 2, 1, 16, 2
    steps, seconds, *arguments = sys.argv[1:]
    jr.telemetry.log = killed_after(int(steps), float(seconds), jr.telemetry.log)
    train_lm.show = lambda log, options: None
    with jax.numpy_rank_promotion("allow"):
        train_lm.main(arguments)
