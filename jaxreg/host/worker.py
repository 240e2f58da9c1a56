"""A process that runs one function for us again and again."""

from __future__ import annotations

import contextlib
import multiprocessing
import pickle
import signal
import traceback
from multiprocessing.connection import Connection
from typing import Any


class WorkerDied(RuntimeError):
    """The process is gone: killed, out of memory, or it could not start."""


class FunctionRaised(RuntimeError):
    """The function raised in the process; the message has its traceback."""


class Worker:
    """One process. It starts afresh ("spawn"), since a fork of a process with JAX's threads may hang."""

    def __init__(self, payload: bytes, name: str) -> None:
        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(target=serve, args=(theirs, payload), name=name, daemon=True)
        self._process.start()
        theirs.close()  # so that reading ends when the process does
        self._is_ready = False

    def ready(self) -> None:
        """Wait until it has the function.

        Raises:
          WorkerDied: it ended before.
          FunctionRaised: the function could not be loaded there.
        """
        if not self._is_ready:
            self._receive(
                "; a script that starts processes keeps what it runs under `if __name__ == '__main__':`"
            )
            self._is_ready = True

    def ask(self, arguments: bytes) -> Any:
        """What the function gives for pickled arguments.

        Raises:
          WorkerDied: the process ended meanwhile.
          FunctionRaised: the function raised, or gave what cannot be pickled.
        """
        try:
            self._pipe.send_bytes(arguments)
        except OSError as error:
            raise self._died("") from error
        return self._receive("")

    def is_alive(self) -> bool:
        """Whether the process still runs."""
        return self._process.is_alive()

    def kill(self) -> None:
        """End it at once; who waits in `ask` gets a `WorkerDied`, and closes."""
        with contextlib.suppress(ValueError):  # closed already
            self._process.kill()

    def close(self) -> None:
        """End it and free what it held."""
        self.kill()
        with contextlib.suppress(ValueError):
            self._process.join()
            self._process.close()
        self._pipe.close()

    def _receive(self, hint: str) -> Any:
        try:
            good, result = pickle.loads(self._pipe.recv_bytes())
        except (EOFError, OSError) as error:
            raise self._died(hint) from error
        if not good:
            raise FunctionRaised(result)
        return result

    def _died(self, hint: str) -> WorkerDied:
        with contextlib.suppress(ValueError):
            self._process.join(1.0)
            return WorkerDied(f"its process ended with exit code {self._process.exitcode}{hint}")
        return WorkerDied(f"its process was ended{hint}")


def serve(pipe: Connection, payload: bytes) -> None:
    """Run in the process: load the function, then answer until the other side is gone."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the training script, which ends us
    fn = None
    try:
        fn = pickle.loads(payload)
        answer = pickle.dumps((True, None))
    except BaseException:
        answer = pickle.dumps(
            (False, f"the function cannot be loaded in a process\n{traceback.format_exc()}")
        )
    with contextlib.suppress(EOFError, OSError):
        pipe.send_bytes(answer)
        while fn is not None:
            arguments = pipe.recv_bytes()
            try:
                answer = pickle.dumps((True, fn(*pickle.loads(arguments))))
            except BaseException as error:
                said = f"{type(error).__name__}: {error}\n{traceback.format_exc()}"
                answer = pickle.dumps((False, said))
            pipe.send_bytes(answer)
