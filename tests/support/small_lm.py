"""The main job with a small model, which may be killed: ``small_lm.py SECONDS arguments of train_lm ...``."""

import os
import signal
import sys
import threading

import jax
import train_lm

train_lm.WIDTH, train_lm.HEADS, train_lm.LAYERS, train_lm.LENGTH, train_lm.BATCH = 16, 2, 1, 16, 2

if __name__ == "__main__":
    seconds, *arguments = sys.argv[1:]
    begun = train_lm.begun

    def killed_soon(*given):
        if float(seconds):
            threading.Timer(float(seconds), os.kill, (os.getpid(), signal.SIGKILL)).start()
        return begun(*given)

    train_lm.begun = killed_soon
    train_lm.show = lambda log, options: None
    with jax.numpy_rank_promotion("allow"):
        train_lm.main(arguments)
